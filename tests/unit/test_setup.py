"""The set-up: what it does once it does not do again, and what is missing it says in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import setup as setup_script

ROOT = Path(__file__).resolve().parents[2]


class Recorded(setup_script.Setup):
    """A set-up whose commands are written down instead of run."""

    def __init__(self, venv, torch_version="2.11.0"):
        super().__init__(venv, torch_version, Path("build") / "test")
        self.commands = []

    def run(self, what, command, **kwargs):
        self.commands.append(" ".join(map(str, command)))

    def ask(self, code):
        return "1" if code == "print(1)" else "13.0"

    def all_steps(self, groups=("demo", "test")):
        self.make_venv()
        self.check_compiler()
        self.install_torch()
        self.install_requirements("build")
        self.install_cuda_headers()
        for group in groups:
            self.install_requirements(group)
        self.build()
        done, self.commands = self.commands, []
        return done


def test_the_second_call_does_nothing(tmp_path):
    one = Recorded(tmp_path / "venv")
    first = one.all_steps()
    assert any("-m venv" in c for c in first) and any("torch==2.11.0" in c for c in first)
    assert any("--no-build-isolation" in c for c in first)
    assert one.all_steps() == []
    assert Recorded(tmp_path / "venv").all_steps() == []


def test_another_torch_installs_and_builds_again(tmp_path):
    Recorded(tmp_path / "venv").all_steps()
    again = Recorded(tmp_path / "venv", "2.13.0").all_steps()
    assert any("torch==2.13.0" in c for c in again) and any("--no-build-isolation" in c for c in again)


def test_a_build_variable_builds_again(tmp_path, monkeypatch):
    Recorded(tmp_path / "venv").all_steps()
    monkeypatch.setenv("ACCELERATOR", "metax")
    again = Recorded(tmp_path / "venv").all_steps()
    assert len(again) == 1 and "--no-build-isolation" in again[0]


def test_requirements_never_replace_torch(tmp_path):
    installs = [c for c in Recorded(tmp_path / "venv").all_steps() if " -r " in c]
    assert len(installs) == 3 and all("torch==2.11.0" in c for c in installs)


def test_cuda_headers_come_from_wheels_only_without_a_toolkit(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_script, "find_toolkit", lambda cuda: None)
    without = Recorded(tmp_path / "a").all_steps()
    assert any("nvidia-cuda-crt==13.0.*" in c for c in without)
    monkeypatch.setattr(setup_script, "find_toolkit", lambda cuda: Path("/toolkit/include"))
    assert not any("nvidia" in c for c in Recorded(tmp_path / "b").all_steps())


def test_a_toolkit_of_another_major_version_does_not_count(tmp_path, monkeypatch):
    include = tmp_path / "include"
    (include / "crt").mkdir(parents=True)
    (include / "crt" / "host_config.h").write_text("")
    (include / "cuda.h").write_text("#define CUDA_VERSION 13000\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_script.find_toolkit("13.0") == include
    assert setup_script.find_toolkit("99.0") is None


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup_script.SetupError, match=r"no C\+\+ compiler.*apt-get install g\+\+"):
        Recorded(tmp_path / "venv").check_compiler()


def test_a_compiler_that_cannot_compile_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(setup_script.SetupError, match="/nonexistent/c"):
        Recorded(tmp_path / "venv").check_compiler()


def test_a_python_that_does_not_fit_is_named():
    result = subprocess.run(
        ["sh", ROOT / "scripts" / "find_python.sh", "-c", "pass"],
        env={**os.environ, "PYTHON": "/nonexistent/python"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "/nonexistent/python does not fit" in result.stderr


def test_find_python_runs_its_arguments():
    command = ["sh", ROOT / "scripts" / "find_python.sh", "-c", "import sys; print(sys.version_info >= (3, 10))"]
    result = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert result.stdout == "True\n"
