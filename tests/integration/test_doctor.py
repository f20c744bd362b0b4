"""The doctor: what it says when all is well, when something fails and when torch_fl cannot start; its documents."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_fl
from tests.common.process import run_python
from torch_fl import doctor

ROOT = Path(__file__).resolve().parents[2]


def ask(*arguments, **env):
    code = (
        f"import sys, runpy; sys.argv = ['-m', *{list(arguments)!r}]; sys.orig_argv[1:] = ['-m', 'torch_fl', 'doctor'];"
    )
    return run_python(code + "runpy.run_module('torch_fl', run_name='__main__')", **env)


def test_healthy_machine():
    result = subprocess.run(
        [sys.executable, "-m", "torch_fl", "doctor", "--json"], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["ok"] and found["failed"] == 0
    checks = {entry["check"]: entry for entry in found["checks"]}
    assert set(checks) == {check.__name__ for check in doctor.CHECKS}
    assert all(entry["lines"] for entry in checks.values())
    names = torch_fl._C._chips()
    assert all(any(name in line for line in checks["chips"]["lines"]) for name in names)
    backends = {line.split(":")[0] for line in checks["arithmetic"]["lines"]}
    assert backends == {step.backend for step in torch_fl.explain("mm")}
    assert any("equal the CPU's" in line for line in checks["arithmetic"]["lines"])


def test_start_that_fails_is_diagnosed():
    """The chip does not exist: the doctor still runs, says what is known and fails."""
    result = ask("doctor", "--json", FLAGOS_ACCELERATOR="nochip")
    assert result.returncode == 1, result.stdout + result.stderr
    checks = {entry["check"]: entry for entry in json.loads(result.stdout)["checks"]}
    assert checks["start"]["status"] == "failed" and "nochip" in checks["start"]["lines"][0]
    assert checks["devices"]["status"] == checks["arithmetic"]["status"] == "skipped"
    assert checks["versions"]["status"] == checks["chips"]["status"] == "ok"
    ours = [line for line in checks["environment"]["lines"] if line.startswith("FLAGOS_")]  # others are the machine's
    assert ours == ["FLAGOS_ACCELERATOR=nochip"]


def test_strict_mode_passes_and_the_own_calls_on_the_cpu_are_not_reported():
    result = ask("doctor", "--json", FLAGOS_STRICT="1", FLAGOS_ACCELERATOR="host")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "runs on the CPU" not in result.stderr
    checks = {entry["check"]: entry for entry in json.loads(result.stdout)["checks"]}
    assert any(line.startswith("cpu: exp") for line in checks["arithmetic"]["lines"])
    assert not any("ran on the CPU" in line for line in checks["routes"]["lines"])


@pytest.mark.parametrize(
    ("name", "near"), [("FLAGOS_STRIKT", "FLAGOS_STRICT"), ("FLAGOS_OPS_mm", "FLAGOS_OP_"), ("FLAGOS_OP_mm", None)]
)
def test_misspelt_variable_is_doubted(name, near, monkeypatch):
    monkeypatch.setenv(name, "cpu")
    (entry,) = doctor.run([doctor.environment])
    doubts = [line for line in entry["lines"] if "is no variable" in line]
    assert doubts == ([f"{name} is no variable of torch_fl; did you mean {near}?"] if near else [])
    assert entry["status"] == ("doubt" if near else "ok")


def test_import_error_carries_the_same_facts():
    result = run_python("import torch_fl", FLAGOS_ACCELERATOR="nochip")
    assert result.returncode != 0
    for part in ("nochip", "known chips", "torch_fl doctor", f"Python {sys.version_info[0]}.{sys.version_info[1]}"):
        assert part in result.stderr, result.stderr
    assert all(name in result.stderr for name in torch_fl._C._chips())


def test_wrong_results_are_found(monkeypatch):
    """A backend that computes wrongly makes the check fail and is named."""
    import torch

    true_exp = torch.Tensor.exp
    monkeypatch.setattr(torch.Tensor, "exp", lambda x: true_exp(x) + (0.5 if x.is_flagos else 0))
    (entry,) = doctor.run([doctor.arithmetic])
    assert entry["status"] == "failed" and "exp differs from the CPU by 0.5" in entry["lines"][0]


def test_failures_and_doubts_do_not_stop_the_others(capsys, monkeypatch):
    def broken():
        raise RuntimeError("first line\nsecond line")

    def doubtful():
        raise doctor.Doubt("old")

    monkeypatch.setattr(doctor, "CHECKS", (broken, doubtful, doctor.versions))
    monkeypatch.setattr(doctor.run, "__defaults__", (doctor.CHECKS,))
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert "FAIL broken" in said and "second line" in said and "WARN doubtful" in said and "ok   versions" in said
    assert "1 of 3 checks failed, 1 warned" in said


@pytest.mark.parametrize(
    ("torch_version", "cuda", "packages", "said"),
    [
        ("2.11.0", "13.0", {}, "no known"),
        ("2.11.0", "12.2", {}, "NaN"),
        ("2.11.0", "12.4", {}, "12.4 is not tested"),
        ("2.9.1", None, {}, "torch 2.9.1"),
        ("2.15.0+cpu", None, {"flag_gems": "4.2", "triton": "3.6"}, "FlagGems 4.2"),
        ("2.12.0", None, {"flag_gems": "5.0.2"}, "without triton"),
    ],
)
def test_known_trouble(torch_version, cuda, packages, said, monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "_version", packages.get)
    (entry,) = doctor.run([doctor.known_trouble])
    assert said in entry["lines"][0] and entry["status"] == ("ok" if said == "no known" else "doubt")


def test_report_names_what_the_process_did(device):
    import torch

    torch.ones(3, device=device).exp()
    report = torch_fl.report()
    assert report["chip"] == torch_fl.chip() and len(report["devices"]) == torch_fl.flagos.device_count()
    assert str(report).startswith("torch_fl ")


def source_text():
    """All messages of the code: sources with adjacent string literals joined."""
    folders = ("accelerator", "csrc", "torch_fl")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".cc", ".h", ".py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r'"\s*f?"', "", text)


def test_messages_of_the_troubleshooting_page_are_the_code_s():
    """The first cell of a row, where it is in backquotes, is text of a message; '…' stands for values."""
    rows = re.findall(r"^\| (`[^|]*)\|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    text = source_text()
    other = ("fp16 mixed precision requires a device in", "INTERNAL", "DEVICE_LOST", "TIMEOUT")
    of_others = (
        "torch.OutOfMemoryError",
        "torch.jit.trace",
        "torch.load",
        "nn.DataParallel",
        "Pin memory thread exited unexpectedly",
        "(sqlite3.OperationalError) no such table:",
        *other,
    )
    quoted = [message for row in rows for message in re.findall("`([^`]*)`", row) if message not in of_others]
    missing = [m for m in quoted for part in m.split("…") if part.strip() and part.strip().strip("'") not in text]
    assert len(quoted) > 50 and missing == []
