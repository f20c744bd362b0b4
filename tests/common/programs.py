"""Compiles C++ against the installed torch: programs and libraries of tests and benchmarks."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def compile_cxx(out, sources, *flags: str, libraries=()) -> Path:
    """Builds `sources` (paths from the project's root) into `out`, with this project's and torch's headers.

    libraries: (folder, names) pairs, linked and found at run time. A RuntimeError holds what the compiler said.
    """
    import torch

    standard = "17" if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13) else "20"
    include = Path(torch.__file__).parent / "include"
    command = ["c++", f"-std=c++{standard}", *flags, "-o", str(out), f"-I{ROOT}", f"-I{ROOT / 'include'}"]
    command += ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    command += [str(ROOT / source) for source in sources]
    for folder, names in libraries:
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}", *(f"-l{name}" for name in names)]
    done = subprocess.run([*command, "-lpthread"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{', '.join(map(str, sources))} do not compile: {done.stderr[-4000:]}")
    return Path(out)


def torch_libraries() -> Path:
    """The folder of torch's shared libraries."""
    import torch

    return Path(torch.__file__).parent / "lib"
