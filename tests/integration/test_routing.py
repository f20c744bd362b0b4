"""Routes: the table, explain, set_route, route(), the environment, the conf file, the dispatch log."""

import re
import threading

import pytest
import torch

import torch_fl
from tests.common.process import check_python, run_python

BACKENDS = {"flagos", "flagos_python", "cuda", "metax", "ascend", "host", "cpu"}
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
    assert {r.backend for r in routes} <= BACKENDS
    assert all(r.reason and r.origin for r in routes)
    assert set(torch_fl.get_registered_ops()) == set(names)


def test_explain_shows_every_step():
    explanation = torch_fl.explain("mm")
    assert [s.backend for s in explanation if s.chosen] == [next(r.backend for r in torch_fl.routes() if r.op == "mm")]
    assert all(step.reason for step in explanation)
    assert "mm" in repr(explanation) and "->" in repr(explanation)


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
    last = result.stderr.strip().split("\n")[-1]
    assert result.returncode != 0 and "bad.conf" in last, result.stderr[-500:]
    for word in words:
        assert word in last, last


def test_missing_conf(tmp_path):
    result = run_python("import torch_fl", FLAGOS_BACKEND_CONFIG=str(tmp_path / "none.conf"))
    assert result.returncode != 0 and "none.conf" in result.stderr.strip().split("\n")[-1]


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
    last = result.stderr.strip().split("\n")[-1]
    assert result.returncode != 0 and name in last, result.stderr[-500:]
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


def test_report_and_commands():
    out = check_python("import torch_fl; torch_fl.report()") + check_python("import torch_fl; print(torch_fl.report())")
    assert "flagos" in out
    code = "import runpy, sys; sys.argv = ['torch_fl', {!r}]; runpy.run_module('torch_fl', run_name='__main__')"
    for command, word in (("doctor", "host"), ("routes", "mm")):
        result = run_python(code.format(command))
        assert result.returncode == 0 and word in result.stdout, result.stderr[-500:]
