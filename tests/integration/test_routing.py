"""Routes: the table, explain, set_route, route(), the environment, the conf file, the dispatch log."""

import json
import re
import threading
from pathlib import Path

import pytest
import torch

import torch_fl
from tests.common.process import check_python, error_line, run_python

BACKENDS = {"flagos", "flagos_python", "cuda", "metax", "ascend", "host", "composite", "cpu"}
LINE = re.compile(r"^\[flagos dispatch\] (\S+) -> (\S+)$")


def native():
    """The backend that serves most operators here."""
    names = [r.backend for r in torch_fl.routes()]
    return max(set(names), key=names.count)


@pytest.fixture
def mul():
    """An operator whose route a test may change."""
    yield "mul.Tensor"
    torch_fl.set_route("mul.Tensor", None)
    torch_fl.fallbacks(reset=True)


def test_table():
    routes = torch_fl.routes()
    assert len(routes) > 1000
    names = [r.op for r in routes]
    assert len(set(names)) == len(names)
    assert not any(name.startswith("aten::") for name in names)
    assert {"mm", "add.Tensor", "mm.out", "cat", "sort.stable", "native_layer_norm"} <= set(names)
    assert {r.backend for r in routes if r.backend} <= BACKENDS
    # An operator of another library may have no kernel anywhere; other test files leave such ones behind.
    assert all(r.backend or r.reason.startswith("no backend has a kernel") for r in routes)
    assert all(r.reason and r.origin for r in routes)
    assert set(torch_fl.get_registered_ops()) == set(names)


def test_explain_shows_every_step():
    explanation = torch_fl.explain("mm")
    assert [s.backend for s in explanation if s.chosen] == [next(r.backend for r in torch_fl.routes() if r.op == "mm")]
    assert all(step.reason for step in explanation)
    assert "mm" in repr(explanation) and "->" in repr(explanation)


@pytest.mark.parametrize(
    ("op", "server", "words"),
    [("matmul", "composite", "composed of other operators"), ("view", "torch_fl", "part of the device")],
)
def test_explain_without_a_route(op, server, words):
    """An operator that has no place in the table still says who serves it, and why FlagGems is not asked."""
    steps = torch_fl.explain(op)
    assert [step.backend for step in steps if step.chosen] == [server] and words in steps[0].reason
    assert {"flagos", "flagos_python"} <= {step.backend for step in steps} and all(step.reason for step in steps)
    with pytest.raises(ValueError, match=f"'{op}' has no route: .*{words}"):
        torch_fl.set_route(op, "cpu")


def test_native_names_the_chips_own_kernels(mul, device):
    torch_fl.set_route(mul, "native")
    assert next(r.backend for r in torch_fl.routes() if r.op == mul) == native()
    torch_fl.set_route(mul, "native [numel>=5]")  # native serves the others too, not the CPU
    torch_fl.fallbacks(reset=True)
    x = torch.ones(2, device=device)
    with torch_fl.count_ops() as counts:
        assert (x * 2).tolist() == [2, 2]
    assert (mul, native(), 1) in counts.rows() and torch_fl.fallbacks() == {}


def test_several_lines_for_an_operator(tmp_path):
    """The first line that holds serves; the log names the backend that does."""
    conf = tmp_path / "my.conf"
    conf.write_text("mm = cpu [numel<=3]\nmm = native [dtype=float64]\nmm = cpu [numel>=9]\nmm = metax\n")
    code = """
    import torch, torch_fl
    for x in (torch.ones(1, 1), torch.ones(2, 2).double(), torch.ones(3, 3), torch.ones(2, 2)):
        try:
            torch.mm(x.flagos(), x.t().flagos())
        except RuntimeError as error:
            print(str(error).split(chr(10))[0])
    print(torch_fl.explain("mm"))
    """
    result = run_python(code, FLAGOS_BACKEND_CONFIG=str(conf), FLAGOS_LOG_DISPATCH="1")
    assert result.returncode == 0, result.stderr[-2000:]
    served = re.findall(r"dispatch\] mm -> (\w+)", result.stderr)
    assert served == ["cpu", native(), "cpu"], served
    assert "backend not registered: mm -> metax" in result.stdout and f"{conf}:4" in result.stdout
    assert "for calls within numel<=3; others native within dtype=float64" in result.stdout


def test_explain_unknown_operator_names_the_nearest():
    with pytest.raises((ValueError, RuntimeError, KeyError), match=r"add.Tensr.*add.Tensor"):
        torch_fl.explain("add.Tensr")


@pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")
def test_set_route(mul, device):
    x = torch.full((2,), 3.0, device=device)
    torch_fl.set_route(mul, "cpu")
    row = next(r for r in torch_fl.routes() if r.op == mul)
    assert row.backend == "cpu" and "set_route" in row.origin + row.reason
    torch_fl.fallbacks(reset=True)
    assert (x * x).tolist() == [9, 9] and torch_fl.fallbacks() == {mul: 1}
    torch_fl.set_route(mul, None)
    assert next(r for r in torch_fl.routes() if r.op == mul).backend != "cpu"


@pytest.mark.parametrize(
    ("op", "backend", "words"),
    [
        ("mul.Tensor", "cuad", ("cuad", "cuda")),
        ("mul.Tensro", "cpu", ("mul.Tensro", "mul.Tensor")),
        ("", "cpu", ("operator",)),
    ],
)
def test_set_route_refuses_unknown_names(op, backend, words, mul):
    before = torch_fl.routes()
    with pytest.raises((ValueError, RuntimeError, KeyError)) as error:
        torch_fl.set_route(op, backend)
    for word in words:
        assert word in str(error.value)
    assert torch_fl.routes() == before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: torch_fl.explain(torch.ops.aten.mm.default), "expected an operator's name"),
        (lambda: torch_fl.set_route(None, "cpu"), "expected an operator's name"),
        (lambda: torch_fl.set_route("mm", 3), "mm: expected a backend's name"),
        (lambda: torch_fl.route(mm=None).__enter__(), "mm: expected a backend's name"),
        (lambda: torch_fl.route("mm").__enter__(), "expected route"),
        (lambda: torch_fl.route(["mm"]).__enter__(), "expected route"),
    ],
)
def test_other_things_than_names_are_refused_in_one_line(call, words):
    with pytest.raises(TypeError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def absent_backend():
    present = {r.backend for r in torch_fl.routes()}
    return next(b for b in ("metax", "ascend", "cuda") if b not in present)


def test_named_backend_that_is_absent_fails_at_the_call(mul, device):
    backend = absent_backend()
    x = torch.ones(2, device=device)
    torch_fl.set_route(mul, backend)
    with pytest.raises(RuntimeError) as error:
        x * x
    text = str(error.value).split("\n")[0]
    assert "backend not registered" in text and mul in text and backend in text, text
    assert native() in text, "the message does not say what is available"
    assert (x + x).tolist() == [2, 2]
    torch_fl.set_route(mul, None)
    assert (x * x).tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")
def test_route_is_for_one_thread_and_nests(mul, device):
    x = torch.ones(2, device=device)
    seen = {}

    def other():
        torch_fl.fallbacks(reset=True)
        x * x
        seen["other"] = torch_fl.fallbacks()

    with torch_fl.route(mul__Tensor="cpu"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        x * x
        seen["inner"] = torch_fl.fallbacks()
        with torch_fl.route({"mul.Tensor": native()}):
            x * x
            seen["nested"] = torch_fl.fallbacks()
    x * x
    assert seen == {"other": {}, "inner": {mul: 1}, "nested": {mul: 1}}
    assert torch_fl.fallbacks() == {mul: 1}


def test_a_thread_may_end_inside_its_routes(device):
    """They go with it, and nobody can leave them later in its stead."""
    entered = torch_fl.route(neg="cpu")
    thread = threading.Thread(target=entered.__enter__)
    thread.start()
    thread.join()
    with torch_fl.route(exp=native()):
        with pytest.raises(RuntimeError, match="on the thread that entered them"):
            entered.__exit__(None, None, None)


@pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")
def test_routes_may_be_left_in_any_order(device):
    """As coroutines do that take turns: each leaves its own."""
    first, second = torch_fl.route(neg="cpu"), torch_fl.route(exp="cpu")
    x = torch.ones(3, device=device)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    torch_fl.fallbacks(reset=True)
    x.neg(), x.exp()
    assert torch_fl.fallbacks() == {"exp": 1}
    second.__exit__(None, None, None)
    x.neg(), x.exp()
    assert torch_fl.fallbacks(reset=True) == {"exp": 1}


def test_route_refuses_unknown_names_and_leaves_nothing(device):
    with pytest.raises((ValueError, RuntimeError), match="unknown"), torch_fl.route(no_such_op="cpu"):
        pytest.fail("entered")
    with pytest.raises(KeyError), torch_fl.route(mul__Tensor="cpu"):
        raise KeyError
    torch_fl.fallbacks(reset=True)
    x = torch.ones(2, device=device)
    x * x
    assert torch_fl.fallbacks() == {}


# ---- environment and conf, each in a process of its own
# ---------------------------------------------------------------------

PROGRAM = """
import torch, torch_fl
x = torch.ones(2, 2, device="flagos")
y = torch.mm(x, x)
z = y * 2
"""


def test_dispatch_log_lines():
    result = run_python(PROGRAM, FLAGOS_LOG_DISPATCH="1")
    assert result.returncode == 0, result.stderr[-500:]
    lines = [line for line in result.stderr.split("\n") if "flagos dispatch" in line]
    matches = [LINE.match(line) for line in lines]
    assert lines and all(matches), [line for line, m in zip(lines, matches, strict=True) if not m][:3]
    calls = [m.groups() for m in matches]
    operators = [op for op, _ in calls]
    assert operators.index("mm") < operators.index("mul.Tensor")
    assert {backend for _, backend in calls} <= BACKENDS
    assert run_python(PROGRAM).stderr == ""


def test_environment_routes_one_operator():
    code = PROGRAM + "\nprint(torch_fl.fallbacks())\nprint([r for r in torch_fl.routes() if r.op == 'mm'])"
    result = run_python(code, FLAGOS_OP_mm="cpu", FLAGOS_LOG_DISPATCH="1")
    assert result.returncode == 0, result.stderr[-500:]
    assert "[flagos dispatch] mm -> cpu" in result.stderr
    assert "'mm': 1" in result.stdout and "FLAGOS_OP_mm" in result.stdout


def test_environment_beats_conf(tmp_path):
    conf = tmp_path / "my.conf"
    conf.write_text("# comment\n  mm=cpu   # trailing\nmul.Tensor = cpu\n\n")
    check = """
mm, mul = (next(r for r in torch_fl.routes() if r.op == op) for op in ("mm", "mul.Tensor"))
print(mm.backend, mul.backend, mul.origin)
"""
    name = native()
    out = check_python(PROGRAM + check, FLAGOS_BACKEND_CONFIG=str(conf), FLAGOS_OP_mm=name).split()
    assert out[:2] == [name, "cpu"] and f"{conf}:3" in " ".join(out)
    out = check_python(
        PROGRAM + f"\ntorch_fl.set_route('mul.Tensor', {name!r})" + check, FLAGOS_BACKEND_CONFIG=str(conf)
    ).split()
    assert out[:2] == ["cpu", name], "set_route beats the conf"


def test_aliases_print_canonical_names(tmp_path):
    conf = tmp_path / "my.conf"
    conf.write_text("mm = flaggems\nmul.Tensor = flaggems_python\n")
    out = check_python(
        "import torch_fl\nfor op in ('mm', 'mul.Tensor'): print([s.backend for s in torch_fl.explain(op)])",
        FLAGOS_BACKEND_CONFIG=str(conf),
    )
    assert "flaggems" not in out and "'flagos'" in out and "'flagos_python'" in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mm cpu\n", (":1", "op = backend")),
        ("mm = cpu\nadd.Tensr = cpu\n", (":2", "add.Tensr", "add.Tensor")),
        ("mm = cuad\n", (":1", "cuad", "cuda")),
        ("mm =\n", (":1",)),
        ("= cpu\n", (":1",)),
        ("mm = cpu\nmm = cuda\n", (":2", "mm", ":1")),
        ("\x00\xff\n", (":1",)),
    ],
)
def test_malformed_conf(text, words, tmp_path):
    conf = tmp_path / "bad.conf"
    conf.write_text(text, encoding="latin-1")
    result = run_python("import torch_fl", FLAGOS_BACKEND_CONFIG=str(conf))
    last = error_line(result)
    assert "bad.conf" in last, last
    for word in words:
        assert word in last, last


def test_missing_conf(tmp_path):
    result = run_python("import torch_fl", FLAGOS_BACKEND_CONFIG=str(tmp_path / "none.conf"))
    assert "none.conf" in error_line(result)
    result = run_python("import torch_fl", FLAGOS_BACKEND_CONFIG=str(tmp_path))
    assert f"{tmp_path}: is a folder; FLAGOS_BACKEND_CONFIG" in error_line(result)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FLAGOS_OP_mmm", "cpu", ("mmm", "mm")),
        ("FLAGOS_OP_mm", "gpu", ("gpu", "cpu")),
        ("FLAGOS_OP_add__Tensro", "cpu", ("add.Tensro", "add.Tensor")),
    ],
)
def test_unknown_names_in_the_environment(name, value, words):
    result = run_python("import torch_fl", **{name: value})
    last = error_line(result)
    assert name in last, last
    for word in words:
        assert word in last, last


def test_nothing_half_applied_after_a_bad_conf(tmp_path):
    """The device is not registered when the routes could not be read."""
    conf = tmp_path / "bad.conf"
    conf.write_text("mm = cpu\nnope = cpu\n")
    result = run_python(
        """
        import torch
        assert not hasattr(torch.Tensor, "is_flagos")
        try:
            torch.ones(1, device="flagos")
        except Exception as error:
            print("refused:", error)
        """,
        FLAGOS_BACKEND_CONFIG=str(conf),
    )
    assert result.returncode == 0 and "refused:" in result.stdout, result.stderr[-500:]


def test_fused_names_with_underscores_in_the_environment():
    """'__' stands for '.', but operator names have underscores of their own."""
    out = check_python(
        "import torch_fl\nroutes = {r.op: r.backend for r in torch_fl.routes()}\n"
        "print(routes['_fused_sgd_'], routes['__lshift__.Scalar'], routes['add_.Tensor'])",
        FLAGOS_OP__fused_sgd_="cpu",
        FLAGOS_OP_add___Tensor="cpu",
        FLAGOS_OP___lshift____Scalar="cpu",
    )
    assert out.split() == ["cpu", "cpu", "cpu"]


def test_counts_by_backend(device):
    with torch_fl.count_ops() as counts:
        x = torch.ones(2, 2, device=device)
        for _ in range(3):
            torch.mm(x, x)
    rows = {(op, backend): calls for op, backend, calls in counts.rows()}
    assert rows[("mm", native())] == 3
    assert sum(counts.by_backend().values()) == sum(rows.values()) >= 4


def test_log_names_every_backend_canonically(tmp_path):
    """One line per call, before the call, exactly this text."""
    conf = tmp_path / "my.conf"
    conf.write_text("mm = cpu\nbmm = flaggems\nsilu = flaggems_python\n")
    code = """
    import sys, torch, torch_fl
    x = torch.ones(1, 2, 2, device="flagos")
    sys.stderr.write("begin\\n"); sys.stderr.flush()
    torch.mm(x[0], x[0])
    for call in (lambda: torch.bmm(x, x), lambda: torch.nn.functional.silu(x)):
        try:
            call()
        except RuntimeError as error:
            print(str(error).split(chr(10))[0])
    """
    without = {"FLAGGEMS_DIR": None, "FLAGOS_DISABLE_FLAGGEMS_PY": "1"}
    result = run_python(code, FLAGOS_BACKEND_CONFIG=str(conf), FLAGOS_LOG_DISPATCH="1", **without)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "\n[flagos dispatch] mm -> cpu\n" in result.stderr.split("begin")[1]
    assert "flaggems" not in result.stderr
    refused = result.stdout.splitlines()
    for line, op, backend, number in zip(refused, ("bmm", "silu"), ("flagos", "flagos_python"), (2, 3), strict=True):
        assert f"backend not registered: {op} -> {backend} (asked for by {conf}:{number}): " in line, line
        assert f"available for {op}: " in line and "cpu" in line.split("available")[1], line


def test_a_line_for_a_composite_operator_warns(tmp_path):
    """It would otherwise have no effect without a word."""
    conf = tmp_path / "my.conf"
    conf.write_text("mm = cpu\nmatmul = cpu\n")
    result = run_python("import torch_fl", FLAGOS_BACKEND_CONFIG=str(conf))
    assert result.returncode == 0 and f"{conf}:2: 'matmul' has no route" in result.stderr, result.stderr[-1000:]
    assert ":1:" not in result.stderr


@pytest.mark.parametrize("name", sorted(p.name for p in Path(torch_fl.__file__).parent.glob("backends*.conf")))
def test_shipped_confs_are_valid(name):
    path = Path(torch_fl.__file__).parent / name
    assert run_python("import torch_fl", FLAGOS_BACKEND_CONFIG=str(path)).stderr == ""


def test_api_names_are_not_parsed_as_lines(mul):
    before = torch_fl.routes()
    for op in ("mm = cpu\nmul.Tensor", "mm#", " mm", "mm\x00"):
        with pytest.raises(ValueError, match="unknown operator"):
            torch_fl.set_route(op, "cpu")
    with pytest.raises(ValueError, match=r"unknown operator ''$"):
        torch_fl.set_route("", "cpu")
    assert torch_fl.routes() == before


@pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")
def test_routes_flip_while_others_compute(mul, device, request):
    """Each result is right whatever the route is at that moment, and every thread keeps a route of its own."""
    calls = (10**6 if request.config.getoption("--full") else 10**4) // 8
    chosen, stop, failures = [native(), "cpu", None], threading.Event(), []

    def flip():
        i = 0
        while not stop.is_set():
            torch_fl.set_route(mul, chosen[i % 3])
            i += 1
        flips.append(i)

    def compute(seed):
        try:
            x, y = torch.full((3,), float(seed), device=device), torch.tensor([2.0, 3.0, 4.0], device=device)
            expected = [seed * 2.0, seed * 3.0, seed * 4.0]
            for i in range(calls):
                if i % 16 == 15:
                    with torch_fl.route({mul: chosen[i % 2]}):
                        got = x * y
                else:
                    got = x * y
                if i % 8 == 0:
                    assert got.tolist() == expected, (got, expected)
        except BaseException as error:
            failures.append(repr(error))

    flips = []
    flipper = threading.Thread(target=flip)
    threads = [threading.Thread(target=compute, args=(seed,)) for seed in range(8)]
    for thread in (flipper, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    flipper.join()
    assert not failures, failures[0]
    assert flips[0] > 10


def test_report_counts_and_times(device):
    x = torch.ones(64, 64, device=device)
    with torch_fl.count_ops() as counts:
        torch.mm(x, x)
    report = torch_fl.report(counts)
    row = next(row for row in report["calls"] if row["op"] == "mm")
    assert row["backend"] == native() and row["calls"] == 1
    assert "mm" in str(report) and native() in str(report)


def command(*arguments):
    argv = ["torch_fl", *arguments]
    return run_python(f"import runpy, sys; sys.argv = {argv!r}; runpy.run_module('torch_fl', run_name='__main__')")


def test_routes_command():
    table = command("routes", "--filter", "mm*", "--json")
    rows = {row["op"]: row for row in json.loads(table.stdout)}
    assert {"mm", "mm.out"} <= set(rows) and all(op.startswith("mm") for op in rows), table.stderr[-500:]
    assert rows["mm"].keys() == {"op", "backend", "origin", "reason"}
    assert "mm" in command("routes", "--filter", "mm").stdout
    assert command("routes", "--backend", native(), "--filter", "mm.out").stdout.count("mm.out") == 1
    steps = json.loads(command("routes", "mm", "--json").stdout)["mm"]
    assert sum(step["chosen"] for step in steps) == 1
    wrong = command("routes", "mmm")
    assert wrong.returncode == 1 and "did you mean 'bmm'" in wrong.stderr


def test_report_and_commands():
    out = check_python("import torch_fl; torch_fl.report()") + check_python("import torch_fl; print(torch_fl.report())")
    assert "flagos" in out
    code = "import runpy, sys; sys.argv = ['torch_fl', {!r}]; runpy.run_module('torch_fl', run_name='__main__')"
    for command, word in (("doctor", "host"), ("routes", "mm")):
        result = run_python(code.format(command))
        assert result.returncode == 0 and word in result.stdout, result.stderr[-500:]
