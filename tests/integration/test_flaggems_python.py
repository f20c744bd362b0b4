"""The backend flagos_python against a stand-in package flag_gems (tests/common/stub_flag_gems), without a GPU."""

import json
import os
import re
from pathlib import Path

import pytest

import torch_fl
from tests.common.process import check_python, run_python
from torch_fl import flaggems

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "tests/common/stub_flag_gems"
CHECKS = ROOT / "tests/common/flaggems_python_checks.py"
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(STUB), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    "GEMS_VENDOR": "nvidia",
    "FLAGOS_FLAGGEMS_VERDICTS": str(STUB / "verdicts.json"),
    "FLAGOS_BACKEND_CONFIG": os.devnull,  # the shipped one keeps some of the operators native
    "FLAGOS_PLAN": "0",  # every call in Python; plans have tests of their own
    "FLAGGEMS_DB_URL": None,
    "FLAGGEMS_SOURCE_DIR": None,
    "FLAGGEMS_DIR": None,
}
PROGRAM = """
import torch, torch_fl
x = torch.ones(2, 2, device="flagos")
print(torch.mm(x, x).tolist())
"""
RAISES = """
import torch, torch_fl
x = torch.ones(2, 2, device="flagos")
for _ in range(2):
    try:
        torch.mm(x, x)
    except RuntimeError as error:
        print(str(error).split(chr(10))[0])
"""


HIDE = "import sys; sys.modules['flag_gems'] = None  # as if it were not installed\n"


def environment(**changes):
    return {**ENVIRONMENT, **changes}


@pytest.fixture(scope="module")
def results():
    code = f"import runpy; runpy.run_path({str(CHECKS)!r}, run_name='__main__')"
    return json.loads(check_python(code, timeout=300, **environment()).splitlines()[-1])


@pytest.mark.parametrize("name", re.findall(r"^def (check_\w+)", CHECKS.read_text(), re.MULTILINE))
def test_check(name, results):
    assert results[name] == ""


def test_log_line_and_alias():
    result = run_python(PROGRAM, **environment(FLAGOS_OP_mm="flaggems_python", FLAGOS_LOG_DISPATCH="1"))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "[flagos dispatch] mm -> flagos_python\n" in result.stderr and result.stdout == "[[2.0, 2.0], [2.0, 2.0]]\n"


def test_the_log_names_who_serves():
    """Calls outside a kernel's limits or a route's conditions, and operators that a kernel calls again."""
    code = """
    import torch, torch_fl
    x, y = torch.ones(2, 2, device="flagos"), torch.ones(9, device="flagos")
    torch.sqrt(x), torch.sqrt(x.double()), torch.sqrt(x.t()), torch.sqrt(y[4:8]), torch.sqrt(y[1:])
    torch.nn.functional.silu(x), torch.nn.functional.silu(y)
    torch.abs(x)
    """
    result = run_python(
        code, **environment(FLAGOS_LOG_DISPATCH="1", FLAGOS_OP_abs="native", FLAGOS_OP_silu="flagos_python")
    )
    assert result.returncode == 0, result.stderr[-2000:]
    chip = torch_fl.chip()
    served = re.findall(r"dispatch\] (sqrt|silu|abs)\S* -> (\w+)", result.stderr)
    assert served == [
        ("sqrt", "flagos_python"),
        ("sqrt", chip),
        ("sqrt", chip),
        ("sqrt", "flagos_python"),
        ("sqrt", chip),
        *[("silu", "flagos_python"), ("silu", chip)] * 2,
        ("abs", chip),
    ], served


@pytest.fixture
def no_verdicts(tmp_path):
    """A file of verdicts that holds none: this machine may have some."""
    path = tmp_path / "verdicts.json"
    path.write_text('{"ops": {}}')
    return str(path)


def test_nothing_is_used_without_verdicts(no_verdicts):
    out = check_python(
        "import sys, torch_fl\nprint(torch_fl.is_flaggems_enabled(), 'flag_gems' in sys.modules)\n"
        "print(torch_fl.explain('mm'))",
        **environment(FLAGOS_FLAGGEMS_VERDICTS=no_verdicts),
    )
    assert out.startswith("False False") and "not judged yet for FlagGems 5.0.2" in out


def test_environment_for_flaggems():
    code = PROGRAM + "\nimport os\nprint(os.environ.get('FLAGGEMS_DB_URL'), os.environ['FLAGGEMS_SOURCE_DIR'])"
    out = check_python(code, **environment(FLAGOS_OP_mm="flagos_python"))
    # With a GPU's name its tuning goes into a file, as without torch_fl.
    assert ("None" if torch_fl.chip() == "cuda" else flaggems.PRIVATE_TUNING) in out and str(STUB / "flag_gems") in out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"FLAGOS_DISABLE_FLAGGEMS_PY": "1"}, "FLAGOS_DISABLE_FLAGGEMS_PY=1"),
        ({"PYTHONPATH": str(ROOT)}, "not installed"),
        ({"STUB_FLAG_GEMS_FAIL": "no driver found"}, "RuntimeError: no driver found"),
        ({"GEMS_VENDOR": None}, "no vendor for the chip host"),
    ],
)
def test_absent_and_asked_for_by_name(changes, reason):
    """An error at every call, with the operator, the backend, why, and what there is."""
    if torch_fl.chip() != "host" and "GEMS_VENDOR" in changes:
        pytest.skip("FlagGems knows this chip's vendor")
    hide = HIDE if "PYTHONPATH" in changes else ""
    lines = check_python(hide + RAISES, **environment(FLAGOS_OP_mm="flagos_python", **changes)).splitlines()
    assert len(lines) == 2, lines
    for line in lines:
        for word in ("backend not registered", "mm", "flagos_python", "FLAGOS_OP_mm", reason, "cpu"):
            assert word in line, line


def test_absent_and_not_asked_for():
    """A verified kernel serves by default; when FlagGems cannot be imported, the next one does, without an error."""
    code = """
    import torch, torch_fl
    x = torch.full((2,), 3.0, device="flagos")
    print([r.backend for r in torch_fl.routes() if r.op == "mul.Tensor"])
    print((x * x).tolist())
    print([r.backend for r in torch_fl.routes() if r.op == "mul.Tensor"])
    print(torch_fl.explain("mul.Tensor"))
    with torch_fl.route({"mul.Tensor": "flagos_python"}):
        try:
            x * x
        except RuntimeError as error:
            print("refused", error)
    """
    out = check_python(code, **environment(STUB_FLAG_GEMS_FAIL="no driver found")).splitlines()
    assert out[:2] == ["['flagos_python']", "[9.0, 9.0]"] and "flagos_python" not in out[2], out
    assert "no driver found" in "\n".join(out[3:]) and any("refused" in line for line in out), out


def test_a_vendor_that_flaggems_does_not_know(tmp_path):
    """FlagGems itself ignores the name without notice and guesses."""
    package = tmp_path / "flag_gems"
    for vendor in ("_nvidia", "_metax"):
        (package / "runtime/backend" / vendor).mkdir(parents=True)
    (package / "__init__.py").write_text("")
    changes = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}", "GEMS_VENDOR": "nvidea"}
    out = check_python("import torch_fl\nprint(torch_fl.explain('mm'))", **environment(**changes))
    assert "FlagGems knows no vendor nvidea (GEMS_VENDOR); it knows metax, nvidia" in out


@pytest.mark.parametrize("name", ["FLAGOS_METAX_COMPAT", "FLAGOS_METAX_CUDART_SHIM"])
def test_switches_of_a_chip_that_is_not_there(name):
    result = run_python("import torch_fl", **{name: "1"})
    assert result.returncode != 0 and f"RuntimeError: {name}=1 is for MetaX" in result.stderr, result.stderr[-2000:]


def test_bad_verdict_file(tmp_path):
    path = tmp_path / "verdicts.json"
    path.write_text('{"ops": {"mm": {"verdict": "maybe"}}}')
    result = run_python("import torch_fl", **environment(FLAGOS_FLAGGEMS_VERDICTS=str(path)))
    assert result.returncode != 0 and f"ValueError: {path}: mm: verdict 'maybe'" in result.stderr, result.stderr[-2000:]


def test_the_list_of_operators(no_verdicts, monkeypatch):
    """Nearly every name is an operator of torch, and a composed one is never served whole."""
    monkeypatch.setenv("FLAGOS_FLAGGEMS_VERDICTS", no_verdicts)
    from torch_fl import integration

    names = flaggems.operators("5.0.2")
    assert len(names) == len(set(names)) == 433
    missing = [name for name in names if not integration.exists(name)]
    assert len(missing) < 12, missing
    table = integration.table("cuda", "5.0.2")
    assert {table[op][0] for op in ("rms_norm", "one_hot", "true_divide.Tensor", *missing)} == {"unusable"}
    assert "own" in table["copy_"][1] and table["bitwise_left_shift.Tensor"][0] == "unjudged"
    assert {table[op][0] for op in ("mm", "silu_backward", "_softmax")} == {"unjudged"}


@pytest.mark.parametrize(("value", "answer"), [("true", True), ("ON", True), ("0", False), ("false", False)])
def test_tritons_own_variable_takes_tritons_values(value, answer):
    """What Triton reads as a switch must not keep torch_fl from starting."""
    program = "import torch_fl; print(torch_fl.integration.interpreted())"
    assert check_python(program, TRITON_INTERPRET=value, FLAGOS_ACCELERATOR="host").split() == [str(answer)]
