"""scripts/judge_flaggems.py: with a stand-in for FlagGems anywhere, with FlagGems itself in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torch_fl import flaggems

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/judge_flaggems.py"
STUBS = [ROOT / "tests/common/stub_judge_gems", ROOT / "tests/common/stub_flag_gems"]


def judge(folder, *arguments, **environment):
    command = [sys.executable, SCRIPT, "--work", folder / "work", "--jobs", 2, *arguments]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FLAGOS_")}  # a run may hold FlagGems back
    changed = {k: v for k, v in {**inherited, **environment, "FLAGOS_ACCELERATOR": "host"}.items() if v is not None}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=500, env=changed)


HANG = 8  # seconds of silence
OPS = "^(relu|zero_|cat|sum|neg|exp2|rms_norm|mm)$"
SAMPLES = "^(nn.functional.relu|zero_|zero|cat|sum|neg|exp2|mm)$"


@pytest.fixture(scope="module")
def with_stub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    environment = {"PYTHONPATH": os.pathsep.join(map(str, [*STUBS, ROOT])), "GEMS_VENDOR": "nvidia"}
    short = ["--ops", OPS, "--opinfos", SAMPLES, "--most", 60, "--op-budget", 60, "--timeout", HANG]
    first = judge(folder, *short, "--out", folder / "first.json", **environment)
    assert first.returncode == 0, first.stderr[-3000:]
    return folder, short, environment, json.loads((folder / "first.json").read_text())


def test_verdicts_and_limits(with_stub):
    _, _, _, data = with_stub
    ops = data["ops"]
    assert {op: ops[op]["verdict"] for op in ("relu", "zero_", "cat", "sum", "neg")} == {
        "relu": "right", "zero_": "right", "cat": "right", "sum": "right", "neg": "wrong"
    }  # fmt: skip
    assert set(ops["relu"]["limits"]) == {"dtypes"} and ops["relu"]["passed"] == ops["relu"]["cases"] >= 20
    assert ops["zero_"]["limits"]["contiguous"] and ops["cat"]["limits"]["several"]
    assert not {"int8", "int16", "int32", "uint8", "bool"} & set(ops["sum"]["limits"]["dtypes"])
    assert {"float32", "int64"} <= set(ops["sum"]["limits"]["dtypes"])
    assert ops["zero_"]["why"] and ops["zero_"]["reproducer"] and ops["neg"]["call"].startswith("neg(")


def test_crashes_and_hangs_are_failed_cases(with_stub):
    entry = with_stub[3]["ops"]["exp2"]
    assert entry["verdict"] == "right" and entry["passed"] < entry["cases"]
    limits = entry.get("limits", {})
    assert limits.get("nonscalar") or not {"float16", "float64"} & set(limits.get("dtypes", [])), entry
    outcomes = [json.loads(line) for line in (with_stub[0] / "work/outcomes.jsonl").read_text().splitlines()]
    messages = " ".join(o["message"] for row in outcomes if row.get("op") == "exp2" for o in row["outcomes"])
    assert "SIGABRT" in messages and f"no answer for {HANG} s" in messages, messages


def test_every_operator_has_a_verdict_and_a_reason(with_stub):
    data = with_stub[3]
    assert set(data["ops"]) == set(flaggems.operators("5.0.2")) and sum(data["totals"].values()) == len(data["ops"])
    for op, entry in data["ops"].items():
        assert entry["verdict"] in flaggems.VERDICTS and (entry["verdict"] == "right" or entry["why"]), (op, entry)
    assert "gradient" in data["ops"]["rms_norm"]["why"]
    assert "registers none" in data["ops"]["mm"]["why"], data["ops"]["mm"]
    for fact in ("flaggems", "chip", "device", "torch", "python", "date", "tolerances"):
        assert data[fact], fact


def test_a_second_run_goes_on_and_reproduces(with_stub):
    """All but the one verdict that the file it is compared with has otherwise."""
    folder, short, environment, data = with_stub
    with (folder / "work/outcomes.jsonl").open("a") as file:
        file.write('{"op": "cut')  # as if it had been ended while it wrote
    other = json.loads(json.dumps(data))
    other["ops"]["relu"]["limits"] = {"dtypes": ["float32"]}
    (folder / "other.json").write_text(json.dumps(other))
    again = judge(folder, *short, "--compare", folder / "other.json", "--out", folder / "again.json", **environment)
    assert again.returncode == 1, again.stdout + again.stderr[-2000:]
    assert "\nrelu: right" in again.stdout and "\n7 of 8 verdicts as in" in again.stdout, again.stdout
    assert json.loads((folder / "again.json").read_text())["ops"] == data["ops"]


def test_without_flaggems_it_says_why(tmp_path):
    result = judge(tmp_path, PYTHONPATH=str(ROOT), GEMS_VENDOR=None, FLAGOS_DISABLE_FLAGGEMS_PY="1")
    assert result.returncode == 1 and "FLAGOS_DISABLE_FLAGGEMS_PY=1" in result.stderr, result.stderr[-2000:]


def test_flaggems_itself_in_the_interpreter(tmp_path):
    """A few operators; the three that are known to be wrong are limited."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if importlib.util.find_spec("flag_gems") is None:
        pytest.skip("FlagGems is not installed")
    out = tmp_path / "verdicts.json"
    short = ["--ops", "^(silu|zero_|cat|sum)$", "--opinfos", "^(nn.functional.silu|zero_|zero|cat|sum)$"]
    short += ["--most", 60, "--op-budget", 60, "--out", out]
    result = judge(tmp_path, *short, TRITON_INTERPRET="1", GEMS_VENDOR=None)
    assert result.returncode == 0, result.stderr[-3000:]
    ops = json.loads(out.read_text())["ops"]
    assert ops["silu"]["verdict"] == "right"
    assert ops["zero_"]["limits"]["contiguous"] and ops["cat"]["limits"]["several"]
    assert not {"int8", "int16", "int32"} & set(ops["sum"]["limits"]["dtypes"])
