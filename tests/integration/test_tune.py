"""torch_fl.tune() and `python -m torch_fl tune`, with stand-in kernels that are fast, slow, wrong or forbidden."""

import json
import os
import re
from pathlib import Path

import pytest

import torch_fl
from tests.common.process import check_python, run_python

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "tests/common/stub_tune_gems"
WORKLOAD = ROOT / "tests/common/tune_workload.py"
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(STUB), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    "GEMS_VENDOR": "nvidia",
    "FLAGOS_FLAGGEMS_VERDICTS": str(STUB / "verdicts.json"),
    "FLAGOS_BACKEND_CONFIG": os.devnull,  # the shipped one keeps some of the operators native
    "FLAGGEMS_DB_URL": None,
    "FLAGGEMS_SOURCE_DIR": None,
    "FLAGGEMS_DIR": None,
    "OMP_NUM_THREADS": "1",
}

pytestmark = pytest.mark.skipif(torch_fl.chip() != "host", reason="the stand-in kernels compute on CPU tensors")


def command(*arguments, **environment):
    argv = ["torch_fl", *map(str, arguments)]
    code = f"import runpy, sys; sys.argv = {argv!r}; runpy.run_module('torch_fl', run_name='__main__')"
    return run_python(code, timeout=300, **{**ENVIRONMENT, **environment})


def result_line(text):
    return next(line for line in text.splitlines() if line.startswith("result"))


def untuned(**environment):
    code = f"import sys, runpy; sys.argv = ['w', 'a']; runpy.run_path({str(WORKLOAD)!r}, run_name='__main__')"
    # Kernels that are wrong or forbidden must not run here either.
    held = {f"FLAGOS_OP_{op}": "native" for op in ("tan", "exp", "normal_", "nonzero", "lgamma", "lgamma_")}
    result = run_python(code, **{**ENVIRONMENT, **held, **environment})
    assert result.returncode == 0, result.stderr[-2000:]
    return result_line(result.stdout)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The command run once: (process, conf path, report)."""
    path = tmp_path_factory.mktemp("tune") / "tuned.conf"
    held = {f"FLAGOS_OP_{op}": "native" for op in ("tan", "exp", "normal_", "nonzero", "lgamma", "lgamma_")}
    done = command("tune", "--json", "--budget", 120, "--out", path, WORKLOAD, "a", **held)
    assert done.returncode == 0, done.stderr[-3000:]
    return done, path, json.loads(done.stdout)


def lines_of(path, op):
    return [line.split("#")[0].strip() for line in path.read_text().splitlines() if line.startswith(f"{op} = ")]


def test_the_workload_is_not_touched(tuned):
    """Its numbers, random ones included, its arguments and its exit are those of a run without tune."""
    assert result_line(tuned[0].stderr) == untuned()


def test_fast_right_kernels_win(tuned):
    _, path, report = tuned
    assert lines_of(path, "lgamma") == ["lgamma = flagos_python"]
    assert lines_of(path, "lgamma_") == ["lgamma_ = flagos_python"]
    assert report["routes"]["lgamma"]["host"] < 0.7
    row = next(r for r in report["rows"] if r["op"] == "lgamma")
    assert row["calls"] == 3 and row["low"] <= 200_000 <= row["high"] and row["dtype"] == "float32"
    assert {"ratio", "noise"} == set(row["clocks"]["flagos_python"][0])


def test_numbers_in_the_place_of_tensors_are_measured_as_such(tuned):
    rows = [r for r in tuned[2]["rows"] if r["op"] == "mul.Tensor"]
    assert {r["low"] for r in rows} == {4096, 32768} and not any(r["why"] for r in rows), rows


@pytest.mark.parametrize("op", ["cos", "mul.Tensor", "abs", "fill_.Scalar"])
def test_slow_kernels_lose(tuned, op):
    assert lines_of(tuned[1], op) == [f"{op} = native"]


def test_a_kernel_that_is_wrong_on_the_recorded_arguments_is_never_taken(tuned):
    _, path, report = tuned
    assert lines_of(path, "tan") == ["tan = native"]
    (row,) = (r for r in report["rows"] if r["op"] == "tan")
    assert row["wrong"] == ["flagos_python"] and "elements differ" in row["refused"]["flagos_python"]
    assert "tan(float32[200000])" in row["refused"]["flagos_python"]


def test_a_kernel_that_raises_is_not_taken(tuned):
    assert lines_of(tuned[1], "exp") == ["exp = native"]
    assert any("no exp today" in str(r["refused"]) for r in tuned[2]["rows"] if r["op"] == "exp")


def test_wrong_and_unjudged_kernels_are_not_even_candidates(tuned):
    """They would have ended the process."""
    assert not {"neg", "digamma"} & {r["op"] for r in tuned[2]["rows"]}
    assert lines_of(tuned[1], "neg") == []


def test_random_and_synchronizing_operators_are_left_out(tuned):
    left_out = tuned[2]["left_out"]
    assert "random" in left_out["normal_"] and "waits" in left_out["nonzero"]
    assert lines_of(tuned[1], "normal_") == ["normal_ = native"]


def test_routes_depend_on_the_size(tuned):
    lines = lines_of(tuned[1], "erfinv")
    assert len(lines) == 2 and lines[1] == "erfinv = native", lines
    assert re.fullmatch(r"erfinv = flagos_python \[dtype=float32 numel>=\d+\]", lines[0]), lines


def test_routes_depend_on_the_dtype(tuned):
    assert lines_of(tuned[1], "i0") == ["i0 = flagos_python [dtype=float32]", "i0 = native"]
    refused = [r["refused"] for r in tuned[2]["rows"] if r["op"] == "i0" and r["dtype"] == "float64"]
    assert "outside its limits" in refused[0]["flagos_python"]


def test_the_conf_says_where_it_was_made(tuned):
    import torch

    text = tuned[1].read_text()
    assert torch.__version__ in text and "flag_gems 5.0.2" in text and torch.flagos.get_device_name() in text
    assert tuned[2]["where"]["chip"] == "host"


def test_the_conf_loads_and_serves(tuned):
    code = """
    import torch, torch_fl
    served = lambda: {op: backend for op, backend, _ in counts.rows()}
    for n in (8, 200_000):
        x = torch.zeros(n, device="flagos")
        with torch_fl.count_ops() as counts:
            torch.erfinv(x), torch.i0(x), torch.lgamma(x + 1), torch.tan(x), torch.abs(x), torch.i0(x.double())
        print(n, served()["erfinv"], served()["lgamma"], served()["tan"], "abs" in served())
        print(sorted((op, b, n) for op, b, n in counts.rows() if op == "i0"))
    """
    out = check_python(code, **{**ENVIRONMENT, "FLAGOS_BACKEND_CONFIG": str(tuned[1])}).splitlines()
    assert out[0] == "8 host flagos_python host False" and out[2] == "200000 flagos_python flagos_python host False"
    assert out[1] == out[3] == "[('i0', 'flagos_python', 1), ('i0', 'host', 1)]"
    assert untuned(FLAGOS_BACKEND_CONFIG=str(tuned[1])) == untuned()


def test_progress_and_gains(tuned):
    done, _, report = tuned
    assert re.search(r"tune: 1/\d+ \w", done.stderr) and "tune: wrote" in done.stderr
    assert report["gains"]["host"] < 1


def test_the_budget_bounds_the_measurements(tmp_path):
    held = {f"FLAGOS_OP_{op}": "native" for op in ("tan", "exp", "normal_", "nonzero")}
    done = command("tune", "--budget", 0, "--out", tmp_path / "t.conf", WORKLOAD, "a", **held)
    assert done.returncode == 0, done.stderr[-2000:]
    assert lines_of(tmp_path / "t.conf", "lgamma") == ["lgamma = native"]
    assert "the time was over" in (tmp_path / "t.conf").read_text()
    assert "all measured calls: device 1.000, host 1.000" in done.stdout and result_line(done.stdout)


def test_a_script_that_fails_writes_nothing(tmp_path):
    script = tmp_path / "bad.py"
    script.write_text("import torch\ntorch.ones(2, device='flagos')\nraise SystemExit(3)\n")
    done = command("tune", "--out", tmp_path / "t.conf", script)
    assert done.returncode == 3 and not (tmp_path / "t.conf").exists(), done.stderr[-1000:]


def test_context_manager(tmp_path):
    code = f"""
    import torch, torch_fl
    x = torch.ones(200_000, device="flagos")
    torch_fl.set_route("erfinv", "flagos_python [numel>=5]")
    before = torch_fl.routes()
    with torch_fl.tune({str(tmp_path / "t.conf")!r}, budget=60) as tuning:
        torch.lgamma(x), torch.erfinv(x * 0)
    assert torch_fl.routes() == before
    print(tuning.report)
    assert tuning.report.as_dict()["routes"]["lgamma"]["lines"] == ["lgamma = flagos_python"]
    assert type(tuning.report).from_dict(tuning.report.as_dict()).conf() == tuning.report.conf()
    try:
        with torch_fl.tune({str(tmp_path / "u.conf")!r}):
            raise KeyError
    except KeyError:
        print("passed on")
    """
    out = check_python(code, **ENVIRONMENT)
    assert "lgamma" in out and out.endswith("passed on\n")
    assert (tmp_path / "t.conf").exists() and not (tmp_path / "u.conf").exists()


def test_the_workload_has_the_last_word(tmp_path):
    """A trial takes the routes that make it faster, and native ones when none do. Routes are put back."""
    path = tmp_path / "t.conf"
    code = f"""
    import torch, torch_fl
    from torch_fl.tuning import trial
    x = torch.ones(200_000, device="flagos")
    torch_fl.set_route("erfinv", "native")
    before, calls = torch_fl.routes(), []
    def part():
        torch.lgamma(x)
        calls.append(1)
    tuning = torch_fl.tune({str(path)!r}, budget=60)
    for wrong in (lambda: tuning.trial(part), lambda: tuning.trial()):
        try:
            wrong()
        except (RuntimeError, ValueError) as error:
            print(error)
        if tuning.report is None:
            with tuning:
                part()
    report = tuning.trial(part, budget=2)
    assert torch_fl.routes() == before and len(calls) > 20
    assert report is tuning.report and report.as_dict()["routes"]["lgamma"]["lines"] == ["lgamma = flagos_python"]
    assert report.trial["taken"] == "both" and report.trial["speeds"]["both"][0]["low"] > 1.5
    assert type(report).from_dict(report.as_dict()).conf() == report.conf()
    assert "taken: both" in str(report) and "taken: both" in open({str(path)!r}).read()

    try:
        tuning.trial(part, lambda: 1 / 0, budget=1)
    except ZeroDivisionError:
        assert tuning.report is report and torch_fl.routes() == before

    trial.run = lambda parts, names, use, seconds: {{name: [[1.0] * 9 for _ in parts] for name in names}}
    native = tuning.trial(part, part)
    assert native.trial["taken"] == "native" and native.gains() == {{"host": 1.0, "device": 1.0}}
    """
    out = check_python(code, **ENVIRONMENT).splitlines()
    assert "nothing to try" in out[0] and "needs the workload" in out[1]
    assert lines_of(path, "lgamma") == ["lgamma = native"]
    assert lines_of(path, "lgamma_") == ["lgamma_ = native"], "nobody saw it: autograd may call it when nobody watches"
    assert "# a trial of the workload showed no gain" in path.read_text()


def test_a_script_has_the_last_word(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nx = torch.ones(200_000, device='flagos')\nprint('ran', torch.lgamma(x).sum().item())\n"
    )
    done = command("tune", "--trial", 2, "--out", tmp_path / "t.conf", script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("ran 0.0") == 1 and "taken: both" in done.stdout
    assert lines_of(tmp_path / "t.conf", "lgamma") == ["lgamma = flagos_python"]


def test_without_flaggems_there_is_nothing_to_choose(tmp_path):
    out = check_python(
        f"""
        import torch, torch_fl
        with torch_fl.tune({str(tmp_path / "t.conf")!r}) as tuning:
            torch.lgamma(torch.ones(9, device="flagos"))
        print(tuning.report.rows)
        """,
        FLAGOS_DISABLE_FLAGGEMS_PY="1",
        FLAGGEMS_DIR=None,
    )
    assert out.strip() == "[]"
    assert run_python("import torch_fl", FLAGOS_BACKEND_CONFIG=str(tmp_path / "t.conf")).stderr == ""


def test_a_clock_that_is_none():
    with pytest.raises(ValueError, match=r"wall.*both, host, device"):
        torch_fl.tune(clock="wall")


def test_the_host_s_time_is_counted_through_composed_operators():
    """It says what is measured first when there is not time for all."""
    import torch

    from torch_fl.tuning import _host_times
    from torch_fl.tuning.observe import Observer

    x = torch.ones(64, 64, device="flagos")
    with Observer() as observer:
        torch.rot90(x)  # composed: the observer looks inside
        x.tan()
    assert _host_times(observer)["tan"] > 0
