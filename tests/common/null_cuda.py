"""Builds tests/null_cuda, the CUDA run time without a GPU, and says how a process gets it; reads its log.

What it is for and what it cannot show is in tests/null_cuda/runtime.cc. A process started with `environment()` sees
NVIDIA devices whose kernels do nothing; inside of it `launches(call)` gives what a call launched. A whole command:

    python -m tests.common.null_cuda python -m pytest tests/integration/test_memory.py
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "null_cuda"
CONVOLUTION_ENDS = ("Algorithm_v7", "AlgorithmEx", "WorkspaceSize")
COMPILER = "libnvrtc.so.13"  # torch opens it by its name, and the first one that is loaded is it


def missing() -> str | None:
    """Why it cannot be built here, or None."""
    import torch

    if torch.version.cuda is None:
        return "torch is a CPU build"
    if cuda_includes() == "none":
        return "CUDA's headers are not installed"
    return None


@functools.cache
def cuda_includes() -> str:
    facts = [sys.executable, str(ROOT / "cmake" / "installed_torch.py")]
    return subprocess.run(facts, capture_output=True, text=True, check=True).stdout.strip().split(";")[3]


@functools.cache
def build() -> Path:
    """The library. Built once per state of the sources and of torch, in the user's temporary folder."""
    import torch

    sources = sorted(SOURCES.glob("*.cc"))
    state = hashlib.sha256(torch.__version__.encode())
    for file in [*sources, SOURCES / "null_cuda.h", Path(__file__)]:
        state.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"torch_fl_null_cuda_{os.getuid()}_{state.hexdigest()[:16]}"
    library = folder / "libcuda.so.1"  # the name that Triton and torch's run-time compiler load
    if library.exists():
        return library
    folder.mkdir(exist_ok=True)
    text = "".join(file.read_text() for file in sources)
    written = set(re.findall(r"\b((?:cublas|cudnn)\w+)\(", text))
    for macro, kinds in (("DESCRIPTOR", "Create Destroy"), ("CONVOLUTION", "Get Find")):
        for kind in re.findall(rf"^{macro}\((\w+)\)$", text, re.M):
            written |= {f"cudnn{what}{kind}Descriptor" for what in kinds.split()}
            written |= {f"cudnn{what}Convolution{kind}{end}" for what in kinds.split() for end in CONVOLUTION_ENDS}
    torch_libraries = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cuda*.so"))
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", *map(str, torch_libraries)], capture_output=True, text=True, check=True
    )
    names = {
        family: set(re.findall(rf"\b({family}[A-Z]\w*)", symbols.stdout)) - written for family in ("cublas", "cudnn")
    }
    major, minor, patch = torch._C._cudnn.getCompileVersion()
    # Written under names of our own and renamed at the end: tests of several processes may build it at once.
    own = f"{os.getpid()}.tmp"
    common = ["c++", "-std=c++17", "-O2", "-g", "-fPIC", "-shared"]
    common.append(f"-DCUDNN_VERSION={major * 10000 + minor * 100 + patch}")
    for family in names:
        (folder / f"{family}.{own}").write_text("".join(f"CALL({name})\n" for name in sorted(names[family])))
        common.append(f'-D{family.upper()}_NAMES="{folder}/{family}.{own}"')
    for include in cuda_includes().split("|"):
        common += ["-isystem", include]
    compiler = [file for file in sources if file.stem == "compiler"]
    for name, files in ((COMPILER, compiler), (library.name, [f for f in sources if f not in compiler])):
        command = [*common, f"-Wl,-soname,{name}", "-o", str(folder / own), *map(str, files), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        (folder / own).rename(folder / name)
    return library


def environment(devices: int = 1, **settings) -> dict[str, str]:
    """Environment variables for a process on the null CUDA; settings are NULL_CUDA_* without the prefix."""
    library = build()
    variables = {f"NULL_CUDA_{name.upper()}": str(value) for name, value in settings.items()}
    path = f"{library.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
    return variables | {
        "LD_PRELOAD": f"{library}:{library.parent / COMPILER}",
        "LD_LIBRARY_PATH": path,
        "FLAGOS_ACCELERATOR": "cuda",
        "NULL_CUDA_DEVICES": str(devices),
        "TORCH_CUDNN_V8_API_DISABLED": "1",  # tests/null_cuda/dnn.cc
        # torch keeps what it compiles under names that kernels of a GPU have too: neither may find the other's.
        "USE_PYTORCH_KERNEL_CACHE": "0",
    }


def active() -> bool:
    """Whether this process runs on the null CUDA."""
    return "null_cuda" in os.environ.get("LD_PRELOAD", "")


def run_again() -> int | None:
    """Runs this very program on the null CUDA when there is no GPU: its exit code; None when there is no need."""
    import torch

    if active() or torch.cuda.is_available():
        return None
    from torch_fl.flaggems import PRIVATE_TUNING

    # FlagGems' tuning database asks for the GPU's name when it lies in a file.
    variables = os.environ | environment() | {"FLAGGEMS_DB_URL": PRIVATE_TUNING}
    return subprocess.run([sys.executable, *sys.argv], env=variables, check=False).returncode


@functools.cache
def library() -> ctypes.CDLL:
    """The library that this process was started with."""
    loaded = ctypes.CDLL(os.environ["LD_PRELOAD"].split(":")[0])
    loaded.null_cuda_read.restype = ctypes.c_size_t
    loaded.null_cuda_read.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    loaded.null_cuda_launches.restype = ctypes.c_ulonglong
    loaded.null_cuda_fail.argtypes = [ctypes.c_char_p, ctypes.c_int]
    return loaded


def launches(call, addresses: bool = False) -> tuple[list[str], object]:
    """The log of what `call()` did on the device, one line per kernel, copy or library call, and its result.

    A kernel's parameter that is an address in device memory is written as where it lies in which allocation,
    "[512 of 2097152]", or with `addresses` as it is, "@7f..."."""
    null = library()
    null.null_cuda_log(2 if addresses else 1)
    try:
        result = call()
    finally:
        room = null.null_cuda_read(None, 0)
        text = ctypes.create_string_buffer(room + 1)
        null.null_cuda_read(text, room)
        null.null_cuda_log(0)
    return text.raw[:room].decode().splitlines(), result


if __name__ == "__main__":  # python -m tests.common.null_cuda COMMAND...: runs a command on it
    os.execvpe(sys.argv[1], sys.argv[1:], {**os.environ, **environment()})
