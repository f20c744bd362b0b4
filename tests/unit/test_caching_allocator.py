"""The device memory cache without the dispatcher around it: builds caching_allocator_test.cc and runs its checks."""

import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.common.programs import compile_cxx, torch_libraries

SOURCES = ["hal_error", "last_ops", "hal_streams", "caching_allocator", "caching_allocator_segments", "memory_history"]
SOURCES += ["platform"]


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
    sources = ["tests/unit/caching_allocator_test.cc", *(f"csrc/runtime/{name}.cc" for name in SOURCES)]
    libraries = [(package(), ["flagos"]), (torch_libraries(), ["c10", "torch_cpu", "torch"])]
    return compile_cxx(out, sources, "-O1", "-g", libraries=libraries)


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
