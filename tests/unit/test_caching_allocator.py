"""The device memory cache without the dispatcher around it: builds caching_allocator_test.cc and runs its checks."""

import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["hal_error", "last_ops", "hal_streams", "caching_allocator", "caching_allocator_segments", "memory_history"]
SOURCES += ["platform"]
LIBRARIES = Path(torch.__file__).parent / "lib"
INCLUDE = Path(torch.__file__).parent / "include"


def package():
    """The folder with libflagos.so, without importing the package (a broken build should fail here, not there)."""
    import importlib.util

    spec = importlib.util.find_spec("torch_fl")
    folders = [Path(p) for p in spec.submodule_search_locations] + [Path(sysconfig.get_paths()["platlib"]) / "torch_fl"]
    for folder in folders:
        if (folder / "libflagos.so").exists():
            return folder
    pytest.fail(f"libflagos.so is in none of {folders}; build first")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("caching_allocator") / "test"
    libraries = package()
    standard = "17" if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13) else "20"
    command = ["c++", f"-std=c++{standard}", "-O1", "-g", "-o", str(out), f"-I{ROOT}", f"-I{ROOT / 'include'}"]
    command += ["-isystem", str(INCLUDE), "-isystem", str(INCLUDE / "torch/csrc/api/include")]
    command += [str(ROOT / "tests/unit/caching_allocator_test.cc")]
    command += [str(ROOT / "csrc/runtime" / f"{name}.cc") for name in SOURCES]
    for folder, names in ((libraries, ["flagos"]), (LIBRARIES, ["c10", "torch_cpu", "torch"])):
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}", *(f"-l{name}" for name in names)]
    done = subprocess.run([*command, "-lpthread"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def run(program, *args):
    return subprocess.run([program, *args], capture_output=True, text=True, timeout=300)


def test_checks(program):
    done = run(program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") >= 11


def test_small_blocks_are_quick(program):
    """The allocator's own budget is 60 ns; 200 leaves room for a busy machine and still catches a lost fast path."""
    best = min(float(line.split()[-2]) for _ in range(3) for line in run(program, "bench").stdout.splitlines()[:1])
    assert best < 200
