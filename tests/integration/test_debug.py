"""torch_fl.debug: compare_with_cpu finds the wrong operator and writes a reproducer; trace lists what ran."""

import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

import torch_fl
from tests.common.process import run_python
from torch_fl import debug


@pytest.fixture
def wrong():
    """An operator with a bug on flagos: one element too large, or an argument left unwritten."""
    lib = torch.library.Library("flagos_debug_test", "DEF")
    lib.define("plus(Tensor x, Tensor y, *, bool late=False) -> Tensor")
    lib.define("plus_(Tensor(a!) x, Tensor y) -> Tensor(a!)")
    lib.define("spread(Tensor x) -> Tensor[]")
    lib.define("total(Tensor x, float off) -> Tensor")

    def plus(x, y, late=False):
        z = x + y
        z[-1] += 0.5
        return z

    lib.impl("plus", lambda x, y, late=False: x + y, "CPU")
    lib.impl("plus_", lambda x, y: x.add_(y), "CPU")
    lib.impl("spread", lambda x: [x.clone(), x + 1], "CPU")
    lib.impl("total", lambda x, off: x.sum(), "CPU")
    lib.impl("total", lambda x, off: x.sum() + off, "PrivateUse1")
    lib.impl("plus", plus, "PrivateUse1")
    lib.impl("plus_", lambda x, y: x, "PrivateUse1")
    lib.impl("spread", lambda x: [x.clone(), x + 2], "PrivateUse1")
    yield torch.ops.flagos_debug_test
    lib._destroy()


def test_training_step_agrees(device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = torch.randn(2, 1, 8, 8, device=device), torch.tensor([1, 3], device=device)
    with debug.compare_with_cpu() as compared:
        loss = torch.nn.functional.cross_entropy(torch.nn.functional.dropout(model(x)), y)
        loss.backward()
        optimizer.step()
    assert compared.compared > 30 and loss.item() > 0
    # What the CPU has nothing to compare with: batch normalisation's operators that are cuDNN's alone.
    theirs = {op for op in compared.skipped if op.startswith("cudnn_batch_norm")}
    assert compared.skipped == dict.fromkeys(theirs, "the CPU has no kernel for it")


def test_awkward_arguments_agree(device):
    x = torch.randn(4, 6, dtype=torch.complex64, device=device)
    with debug.compare_with_cpu() as compared:
        x.conj().t() @ x.t().conj().t()
        base = torch.zeros(10, device=device)
        base[2:6].add_(base[4:8] + 1)
        torch.arange(5, device=device)
        torch.cat([base[::2], base[1::2]])
        torch.empty(3, device=device)
        torch.rand(3, device=device)
        torch.nan_to_num(torch.full((2,), float("nan"), device=device) / 0)
        torch.full((2,), float("inf"), device=device).log()
        base.sum().item()
        torch.ones(3, 3, device=device).to_sparse().to_dense()
        torch.ones(3).to(device).cpu()
        torch.ones(0, 3, device=device).sum(0)
        seen = compared.compared
        q = torch.ones(1, 2, 8, 16, device=device)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        # A GPU's fused attention is one operator that the CPU does not have.
        assert compared.compared > seen + 1 or any("attention" in op for op in compared.skipped)
    assert compared.compared > 20


def test_first_difference_stops_and_names_the_operator(wrong, tmp_path, device):
    x, y = torch.arange(6.0, device=device), torch.ones(6, device=device)
    with pytest.raises(debug.Difference) as error, debug.compare_with_cpu(folder=tmp_path):
        z = x * 2
        wrong.plus(z[1:], y[1:], late=True)
        raise AssertionError("went on after a wrong result")
    text = str(error.value)
    for part in ("flagos_debug_test::plus", "1 of 5 elements", "(4,)", "11.5 instead of 11.0", "float32[5]"):
        assert part in text, text
    assert error.value.op == "flagos_debug_test::plus" and str(tmp_path) in text
    assert debug.reproduce(error.value.reproducer).startswith("flagos_debug_test::plus: result 0: 1 of 5")


def test_written_argument_is_compared(wrong, tmp_path, device):
    x = torch.zeros(3, device=device)
    with pytest.raises(debug.Difference, match="3 of 3 elements"), debug.compare_with_cpu(folder=tmp_path):
        wrong.plus_(x, x + 1)


def test_second_result_is_compared(wrong, tmp_path, device):
    with pytest.raises(debug.Difference, match="result 1: "), debug.compare_with_cpu(folder=tmp_path):
        wrong.spread(torch.zeros(3, device=device))


def test_a_sum_that_cancels_agrees(wrong, tmp_path, device):
    """Of eight thousand numbers of about 1 another order of summation gives another 1e-5; 1e-2 is wrong."""
    x = torch.randn(4096)
    x = torch.cat([x, -x]).to(device)
    with debug.compare_with_cpu(folder=tmp_path) as compared:
        wrong.total(x, 1e-5)
    assert compared.compared == 1 and not list(tmp_path.iterdir())
    with pytest.raises(debug.Difference, match="result 0: 1 of 1"), debug.compare_with_cpu(folder=tmp_path):
        wrong.total(x, 1e-2)


def test_operators_can_be_ignored_and_tolerance_set(wrong, tmp_path, device):
    x = torch.full((4,), 100.0, device=device)
    with debug.compare_with_cpu(ignore=["flagos_debug_test::plus"], folder=tmp_path):
        wrong.plus(x, x)
    with debug.compare_with_cpu(rtol=0.1, folder=tmp_path):
        wrong.plus(x, x)
    assert list(tmp_path.iterdir()) == []


def test_difference_in_backward_is_found(wrong, tmp_path, device):
    class Plus(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return wrong.plus(g, g)

    x = torch.ones(3, device=device, requires_grad=True)
    with pytest.raises(debug.Difference, match="flagos_debug_test::plus"), debug.compare_with_cpu(folder=tmp_path):
        Plus.apply(x).sum().backward()


def test_reproducer_on_the_command_line(tmp_path, device):
    x = torch.randn(3, 4)
    saved = {"op": "aten::addmm", "args": [torch.ones(4), x.t(), x], "kwargs": {"beta": 2}, "rtol": None}
    saved["args"] = [torch.ones(4), x.t().contiguous(), torch.randn(3, 4)]
    torch.save(saved, tmp_path / "case.pt")
    done = subprocess.run(
        [sys.executable, "-m", "torch_fl.debug", tmp_path / "case.pt"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "flagos and the CPU give the same result"), done.stderr


WRONG_SINH = """
import torch, torch_fl
lib = torch.library.Library("aten", "IMPL")
lib.impl("sinh", lambda x: x + x, "PrivateUse1", allow_override=True)
"""


def test_reproducer_stands_alone(tmp_path):
    """The file of a failed run, in processes that know nothing of the program: it fails only where the bug is."""
    program = f"""
        from torch_fl import debug
        net = torch.nn.Linear(3, 3).flagos()
        with debug.compare_with_cpu(folder={str(tmp_path)!r}):
            net(torch.ones(2, 3, device="flagos")).t()[1:].sinh()
    """
    said = run_python(WRONG_SINH + textwrap.dedent(program)).stderr.strip().split("\n")[-1]
    assert "Difference: flagos: sinh" in said and "float32[2, 2]" in said, said
    (file,) = tmp_path.iterdir()
    command = said.rpartition("python -m ")[2].split()
    assert command == ["torch_fl.debug", str(file)]
    again = "import runpy, sys; sys.argv = ['', sys.argv[1]]; runpy.run_module('torch_fl.debug', run_name='__main__')"
    for setup, code, words in ((WRONG_SINH, 1, "sinh: result 0: 4 of 4 elements differ"), ("", 0, "the same result")):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", setup + again, str(file)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code and words in done.stdout, done.stdout + done.stderr


def test_reproducer_keeps_types_devices_and_layouts(tmp_path, device):
    """Whatever an operator takes can be saved and read back without unpickling code."""
    mode = debug.compare_with_cpu(folder=tmp_path)
    func = torch.ops.aten._to_copy.default
    keywords = {"dtype": torch.float16, "layout": torch.strided, "device": torch.device("cpu"), "non_blocking": True}
    keywords["memory_format"] = torch.preserve_format
    with pytest.raises(debug.Difference) as error:
        mode._stop("_to_copy", "host", func, (torch.ones(2),), keywords, "words")
    assert debug.reproduce(error.value.reproducer) is None


def test_trace_lists_operators(device):
    with debug.trace() as t:
        x = torch.ones(2, 3, device=device)
        y = x @ x.t()
        torch.ones(1) + 1
    rows = {call.op: call for call in t.calls}
    assert rows["mm"].arguments == "float32[2, 3], float32[3, 2]" and rows["mm"].result == "float32[2, 2]"
    assert rows["mm"].backend not in ("-", "not routed") and rows["add.Tensor"].backend == "-"
    assert "mm(float32[2, 3], float32[3, 2])" in str(t) and y.sum().item() == 12
    assert {op for op, *_ in t.by_op()} == set(rows)


@pytest.mark.filterwarnings("ignore:flagos. mul.Tensor")  # that it runs on the CPU is what the test is about
def test_backend_is_the_one_that_served_the_call(device, monkeypatch, tmp_path):
    """A thread's own route and a route with conditions are not what explain() says of the operator."""
    x = torch.ones(2, device=device)
    with debug.trace() as t:
        x * 2
        with torch_fl.route({"mul.Tensor": "cpu"}):
            x * 2
        x * 2
    usual, routed, again = (call.backend for call in t.calls if call.op == "mul.Tensor")
    assert routed == "cpu" and usual == again != "cpu"
    monkeypatch.setattr(debug, "_difference", lambda *_: "it differs")
    with torch_fl.route({"mul.Tensor": "cpu"}), pytest.raises(debug.Difference, match="backend cpu"):
        with debug.compare_with_cpu(folder=tmp_path):
            x * 2


def test_trace_sees_backward_and_can_synchronize(device):
    x = torch.ones(2, 3, device=device, requires_grad=True)
    with debug.trace(synchronize=True, limit=3) as t:
        (x @ x.t()).sum().backward()
    assert len(t.calls) == 3 and t.calls[-1].number > 3 and all(call.seconds > 0 for call in t.calls)


def test_error_carries_the_last_operators(device):
    with pytest.raises(RuntimeError) as error, debug.trace(last=2):
        x = torch.ones(2, 3, device=device)
        x.exp()
        x @ x
    (note,) = error.value.__notes__
    assert "exp(float32[2, 3])" in note and "mm(" in note and "ones" not in note


def test_last_operators_are_known_without_a_trace(device):
    x = torch.ones(2, 3, device=device)
    x.exp()
    x @ x.t()
    (mm, backend), (exp, _) = debug.last_ops()[""][:2]
    assert (mm, exp) == ("mm", "exp") and backend == debug._backend("mm")
    for _ in range(100):
        x.exp()
    assert [op for op, _ in debug.last_ops()[""]] == ["exp"] * 16


def test_last_operators_of_other_threads(device):
    x = torch.ones(2, 3, device=device)
    ready, done = threading.Event(), threading.Event()

    def other():
        x.sinh()
        ready.set()
        done.wait()

    def at_sinh():
        return [thread for thread, ops in debug.last_ops().items() if thread and ops and ops[0][0] == "sinh"]

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    x.cosh()
    assert debug.last_ops()[""][0][0] == "cosh" and len(at_sinh()) == 1
    done.set()
    thread.join()
    # join() returns when Python is done with the thread; the system ends it, and its list, a moment later.
    deadline = time.monotonic() + 30
    while at_sinh() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not at_sinh(), "an ended thread is still listed"


@pytest.mark.skipif(torch_fl.chip() != "host", reason="faults are injected into the simulated device")
def test_asynchronous_error_names_the_last_operators(device):
    """Forward, backward (in autograd's thread) and what came before are in the error, with no trace() on."""
    sim = torch_fl._C._sim
    x = torch.ones(4, 4, device=device, requires_grad=True)
    x.sinh().sum().backward()
    sim.set_fail("device_sync@1=INTERNAL")
    try:
        with pytest.raises(RuntimeError) as error:
            torch_fl.flagos.synchronize()
    finally:
        sim.set_fail("")
    text = str(error.value).split("\n")[0]
    assert "INTERNAL" in text and "last operators, newest first: " in text, text
    own, _, others = text.partition("of thread")
    assert "sum" in own and "sinh" in own and "cosh" in others, text
