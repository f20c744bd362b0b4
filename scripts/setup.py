"""Sets a working copy up: virtual environment, torch, requirements, C++ build. `make run` and `make test` call it.

Every step leaves a stamp with the hash of what it was made from, so a second call does only what changed. Only the
standard library is used; run it with scripts/find_python.sh, or with any Python from 3.10 on.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_TORCH = "2.11.0"
MINIMUM_PYTHON = (3, 10)
# Variables that change what is compiled (README.md lists them); a change rebuilds.
BUILD_VARIABLES = (
    "ACCELERATOR CUDA_HOME METAX_PATH ASCEND_HOME METAX_ARCH METAX_MXCC CUDA_KERNEL METAX_KERNEL ASCEND_KERNEL "
    "FLAGGEMS_KERNEL FLAGGEMS_PYTHON FLAGGEMS_DIR CC CXX CXXFLAGS CMAKE_ARGS"
).split()
SOURCE_DIRS = ("accelerator", "cmake", "csrc", "emulators", "include")
SOURCE_FILES = ("CMakeLists.txt", "pyproject.toml")


class SetupError(Exception):
    """One line for the user: what is missing and how to get it."""


def say(text):
    print(f"setup: {text}", flush=True)


def digest(*parts):
    return hashlib.sha256("\0".join(str(p) for p in parts).encode()).hexdigest()


class Setup:
    def __init__(self, venv, torch_version, build_dir):
        self.venv = Path(venv).resolve()
        self.python = self.venv / "bin" / "python"
        self.torch_version = torch_version
        self.build_dir = build_dir

    # ---- stamps ------------------------------------------------------------------------------------------------------

    def is_done(self, step, key):
        stamp = self.venv / "stamps" / step
        return stamp.exists() and stamp.read_text() == key

    def mark_done(self, step, key):
        stamp = self.venv / "stamps" / step
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(key)

    # ---- running things ----------------------------------------------------------------------------------------------

    def run(self, what, command, **kwargs):
        """Runs a command; its output is shown only when it fails, unless a person is watching."""
        watch = sys.stdout.isatty()
        result = subprocess.run(
            [str(c) for c in command],
            cwd=ROOT,
            stdout=None if watch else subprocess.PIPE,
            stderr=None if watch else subprocess.STDOUT,
            text=True,
            **kwargs,
        )
        if result.returncode != 0:
            if not watch:
                sys.stdout.write(result.stdout)
            raise SetupError(f"{what} failed (exit status {result.returncode}); its output is above")

    def pip(self, what, *arguments, **kwargs):
        base = [self.python, "-m", "pip", "--disable-pip-version-check", "install"]
        self.run(what, base + list(arguments), **kwargs)

    def ask(self, code):
        """What `code` prints in the environment's Python; '' when it fails."""
        result = subprocess.run([str(self.python), "-c", code], capture_output=True, text=True, cwd=self.venv)
        return result.stdout.strip() if result.returncode == 0 else ""

    # ---- steps -------------------------------------------------------------------------------------------------------

    def make_venv(self):
        if sys.version_info < MINIMUM_PYTHON:
            raise SetupError(f"Python {sys.version.split()[0]} is too old: needs 3.10 or newer, best 3.12")
        key = digest("venv", self.venv)
        if self.is_done("venv", key) and self.ask("print(1)") == "1":
            return
        say(f"making the virtual environment {self.venv.name} with Python {sys.version.split()[0]}")
        self.run("python -m venv", [sys.executable, "-m", "venv", "--clear", self.venv])
        self.mark_done("venv", key)

    def check_compiler(self):
        compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
        if compiler is None:
            raise SetupError(
                "no C++ compiler found (tried c++, g++, clang++). On Debian or Ubuntu: apt-get install g++"
            )
        key = digest("compiler", compiler)
        if self.is_done("compiler", key):
            return
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cc"
            source.write_text("#include <optional>\n#include <thread>\nint main() { return *std::optional<int>(0); }\n")
            command = [*compiler.split(), "-std=c++17", str(source), "-o", str(Path(folder) / "probe"), "-pthread"]
            try:
                result = subprocess.run(command, capture_output=True, text=True)
                message = result.stderr.strip().splitlines()[0] if result.returncode else ""
            except OSError as error:
                message = str(error)
        if message:
            raise SetupError(f"{compiler} cannot build a C++17 program: {message}. Needs g++ >= 9 or clang++ >= 10")
        self.mark_done("compiler", key)

    def install_torch(self):
        spec = f"torch=={self.torch_version}"
        key = digest(spec)
        if self.is_done("torch", key):
            return
        say(f"installing {spec} (the largest download: up to 3 GB with its CUDA libraries)")
        self.pip(f"pip install {spec}", spec)
        self.mark_done("torch", key)

    def install_requirements(self, group):
        path = ROOT / "requirements" / f"{group}.txt"
        key = digest(path.read_text(), self.torch_version)
        step = f"requirements-{group}"  # its own name: "build" is a step too
        if self.is_done(step, key):
            return
        say(f"installing requirements/{group}.txt")
        # The torch pin keeps a requirement from replacing the torch that the C++ part is built against.
        self.pip(f"pip install -r requirements/{group}.txt", "-r", path, f"torch=={self.torch_version}")
        self.mark_done(step, key)

    def install_cuda_headers(self):
        """A CUDA build of torch includes CUDA headers from its own. When there is no toolkit, wheels have them."""
        key = digest(self.torch_version, os.environ.get("CUDA_HOME"))
        if self.is_done("cuda_headers", key):
            return
        cuda = self.ask("import torch; print(torch.version.cuda or '')")
        if cuda and not find_toolkit(cuda):
            major = cuda.split(".")[0]
            names = (
                ["nvidia-cuda-runtime", "nvidia-cuda-crt"]
                if int(major) >= 13
                else [f"nvidia-cuda-runtime-cu{major}", f"nvidia-cuda-nvcc-cu{major}"]
            )
            say(f"no CUDA {cuda} toolkit here: taking its headers from the wheels {', '.join(names)}")
            self.pip("pip install of the CUDA headers", *(f"{name}=={cuda}.*" for name in names))
        self.mark_done("cuda_headers", key)

    def build(self, force=False):
        key = digest(self.build_key())
        if self.is_done("build", key) and not force:
            return
        again = (ROOT / self.build_dir / "CMakeCache.txt").exists()
        say("building the C++ part" + (" (only what changed)" if again else " (several minutes the first time)"))
        start = time.monotonic()
        environment = dict(os.environ, PATH=f"{self.venv / 'bin'}{os.pathsep}{os.environ['PATH']}")
        environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        self.pip(
            "building torch_fl",
            "--no-build-isolation",
            "--no-deps",
            f"--config-settings=build-dir={self.build_dir}",
            "-e",
            ".",
            env=environment,
        )
        say(f"built in {time.monotonic() - start:.0f} s")
        self.mark_done("build", key)

    def build_key(self):
        parts = [self.torch_version, str(self.build_dir)]
        parts += [f"{name}={os.environ.get(name, '')}" for name in BUILD_VARIABLES]
        paths = [ROOT / name for name in SOURCE_FILES]
        for folder in SOURCE_DIRS:
            paths += sorted(p for p in (ROOT / folder).rglob("*") if p.is_file() and not p.name.startswith("."))
        parts += [f"{p.relative_to(ROOT)}:{hashlib.sha256(p.read_bytes()).hexdigest()}" for p in paths if p.exists()]
        return "\n".join(parts)


def find_toolkit(cuda):
    """The include folder of a CUDA toolkit of that major version, or None."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent]
    roots += [f"/usr/local/cuda-{cuda}", "/usr/local/cuda"]
    for root in filter(None, roots):
        header = Path(root) / "include" / "cuda.h"
        if header.exists() and (header.parent / "crt" / "host_config.h").exists():
            version = re.search(r"#define CUDA_VERSION (\d+)", header.read_text(errors="replace"))
            if version and int(version[1]) // 1000 == int(cuda.split(".")[0]):
                return header.parent
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", default=[], help="requirement groups to install: demo, test, check")
    parser.add_argument("--venv", default=str(ROOT / ".venv"), help="the virtual environment (default .venv)")
    parser.add_argument("--torch", default=DEFAULT_TORCH, help=f"torch release to build against ({DEFAULT_TORCH})")
    parser.add_argument("--rebuild", action="store_true", help="build even when no source changed")
    arguments = parser.parse_args()
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    setup = Setup(arguments.venv, arguments.torch, Path("build") / f"torch-{arguments.torch}-{tag}")
    try:
        setup.make_venv()
        setup.check_compiler()
        setup.install_torch()
        setup.install_requirements("build")
        setup.install_cuda_headers()
        for group in arguments.groups:
            setup.install_requirements(group)
        setup.build(arguments.rebuild)
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
