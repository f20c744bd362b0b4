"""The routing rules without torch: builds routing_test.cc with config.cc and resolve.cc, runs its checks and fuzzer."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("routing") / "test"
    command = ["c++", "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += ["-Wall", "-Wextra", f"-I{ROOT}", "-o", str(out), str(ROOT / "tests/unit/routing_test.cc")]
    command += [str(ROOT / "csrc/aten" / name) for name in ("config.cc", "resolve.cc")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def run(program, *args):
    done = subprocess.run([program, *args], capture_output=True, text=True, errors="replace", timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_rules(program):
    assert run(program).count("ok  ") >= 11


def test_fuzz(program, request):
    inputs = "1000000" if request.config.getoption("--full") else "10000"
    assert f"fuzz: {inputs} inputs" in run(program, "fuzz", inputs)
