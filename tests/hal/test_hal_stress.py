"""The C++ stress program of 8 threads: plain here, under AddressSanitizer and ThreadSanitizer with --full."""

import shutil
import subprocess

import pytest
from hal_abi import HERE, ROOT


@pytest.mark.parametrize("seed", ["0", "11"])
def test_stress(library, compiler, seed):
    program = compiler.folder / "stress"
    if not program.exists():
        flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-I", ROOT / "include"]
        result = compiler.run(*flags, HERE / "stress.cc", library.path, "-o", program)
        assert result.returncode == 0, result.stderr
    result = subprocess.run(
        [str(program), "host", "60", seed],
        env={"LD_LIBRARY_PATH": library.path.rsplit("/", 1)[0]},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "8 threads, 60 rounds each, 0 failures" in result.stdout


def test_sanitizers(pytestconfig, tmp_path):
    if not pytestconfig.getoption("--full", False):
        pytest.skip("slow: builds libflagos.so twice; runs with --full")
    if not shutil.which("cmake"):
        pytest.skip("no cmake on this machine")
    result = subprocess.run([str(ROOT / "scripts/hal_sanitize.sh"), str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.rstrip().endswith("== clean")
