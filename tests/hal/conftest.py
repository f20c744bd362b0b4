"""Options and fixtures of the HAL conformance suite.

    pytest tests/hal                                     the host chip in torch_fl's own libflagos.so
    pytest tests/hal --hal-lib build/libflagos.so --hal-chip cuda

Tests in test_conform_*.py hold for every chip; the other files are about the host chip, the registry and the like.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import hal_chips as chips
import pytest
from hal_abi import HERE, ROOT, Hal, Library


def pytest_addoption(parser):
    group = parser.getgroup("hal")
    group.addoption("--hal-chip", default="host", help="chip that the conformance tests drive (default host)")
    group.addoption("--hal-lib", default=None, help="path of libflagos.so; default: the one inside torch_fl")


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(*tags): capabilities of a chip, see tests/hal/hal_chips.py")
    config.addinivalue_line("markers", "devices(n): the test needs n devices of the chip")


def find_library(config):
    given = config.getoption("--hal-lib", None)
    if given:
        return Path(given).resolve()
    spec = importlib.util.find_spec("torch_fl")
    # An editable installation has the sources in one folder and the libraries in another.
    for folder in [
        *(spec.submodule_search_locations if spec else []),
        Path(sysconfig.get_paths()["platlib"]) / "torch_fl",
    ]:
        if (Path(folder) / "libflagos.so").exists():
            return Path(folder) / "libflagos.so"
    pytest.exit("libflagos.so was not found: build torch_fl, or give --hal-lib PATH", returncode=2)


@pytest.fixture(scope="session")
def chip(pytestconfig):
    return pytestconfig.getoption("--hal-chip", "host")


@pytest.fixture(scope="session")
def library(pytestconfig):
    return Library(find_library(pytestconfig))


@pytest.fixture(scope="session")
def opened(library, chip) -> Hal:
    return library.open(chip)


@pytest.fixture
def hal(request, opened, chip) -> Hal:
    """The chip under test. Skips what the chip does not support, and expects what it is known to fail."""
    for mark in request.node.iter_markers("needs"):
        for tag in mark.args:
            if tag in chips.UNSUPPORTED.get(chip, {}):
                pytest.skip(f"{chip} has no {tag}: {chips.UNSUPPORTED[chip][tag]}")
    for mark in request.node.iter_markers("devices"):
        if opened.count() < mark.args[0]:
            pytest.skip(f"needs {mark.args[0]} devices, {chip} has {opened.count()} here")
    reason = chips.EXPECTED_FAILURES.get((chip, request.node.originalname))
    if reason:
        request.node.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    return opened


@pytest.fixture
def host(library) -> Hal:
    """The host chip, for tests about the simulated device, with no fault plan and no delays before and after."""
    hal = library.open("host")
    library.set_fail(None)
    yield hal
    library.set_fail(None)
    library.dll.flagos_sim_set_chaos(0)


class Scripts:
    """Runs Python snippets in a process of their own: for crashes, forks and start-up errors."""

    def __init__(self, library_path):
        self.library_path = str(library_path)

    def __call__(self, code, timeout=60, **environment):
        prelude = (
            "import ctypes, sys, os, threading, time\n"
            f"sys.path.insert(0, {str(HERE)!r})\n"
            "from hal_abi import *\n"
            f"library = Library({self.library_path!r})\n"
        )
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FLAGOS_")}
        return subprocess.run(
            [sys.executable, "-c", prelude + code],
            env={**clean, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )


@pytest.fixture(scope="session")
def script(library):
    return Scripts(library.path)


class Compiler:
    """Builds small shared libraries from sources of this folder, once per set of definitions."""

    def __init__(self, folder):
        self.folder = folder
        self.built = {}

    def run(self, *arguments):
        compiler = shutil.which("c++")
        if not compiler:
            pytest.skip("no C++ compiler on this machine")
        return subprocess.run([compiler, *map(str, arguments)], capture_output=True, text=True)

    def shared(self, source, name, *definitions, flags=()):
        key = (str(source), name, definitions)
        if key not in self.built:
            output = self.folder / name
            defines = [f"-D{d}" for d in definitions]
            result = self.run(
                "-std=c++17",
                "-shared",
                "-fPIC",
                "-pthread",
                "-I",
                ROOT / "include",
                *defines,
                source,
                *flags,
                "-o",
                output,
            )
            assert result.returncode == 0, result.stderr
            self.built[key] = output
        return self.built[key]


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    return Compiler(tmp_path_factory.mktemp("hal_chips"))
