"""`python -m torch_fl doctor`: one screen that says what works here, what does not, and why. `--json` for programs.

Each check is a function that returns lines, raises when something does not work, or raises Doubt when it works but is
known to give trouble. A failed check does not stop the others, and what can be said is said even when torch_fl did not
start. The exit code is 1 when a check failed.
"""

import collections
import glob
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
import warnings

SELF_TEST_SECONDS = 5.0
TESTED_TORCH = ((2, 11), (2, 15))
FLAGGEMS = "5.0.2"

_own_fallbacks: collections.Counter = collections.Counter()  # calls on the CPU that the arithmetic check asked for


class Doubt(Exception):
    """Works, but is known to give trouble."""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def _tool(name: str) -> str:
    """The first line that a program says of its version."""
    path = shutil.which(name)
    if path is None:
        return f"{name}: not found"
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    lines = [line for line in said.stdout.splitlines() if line.strip()]
    version = next((line for line in lines if "release" in line), lines[0] if lines else "no version")
    return f"{path}: {version.strip()}"


def versions():
    import torch

    built = (torch.version.cuda and f"CUDA {torch.version.cuda}") or "CPU only"
    return (
        f"torch_fl {_version('torch_fl')}, torch {torch.__version__} ({built}), Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}"
    )


def known_trouble():
    """Combinations that are known to be bad or were never tried."""
    import torch

    found = []
    low, high = TESTED_TORCH
    if not low <= _numbers(torch.__version__) <= high:
        found.append(f"torch {torch.__version__}: tested are {low[0]}.{low[1]} to {high[0]}.{high[1]}")
    if torch.version.cuda and _numbers(torch.version.cuda) == (12, 2):
        found.append("CUDA 12.2 gives wrong results (NaN) in some kernels: use 12.8 or newer")
    elif torch.version.cuda and _numbers(torch.version.cuda) < (12, 8):
        found.append(f"CUDA {torch.version.cuda} is not tested: use 12.8 or newer")
    gems = _version("flag_gems")
    if gems and gems.split("+")[0] != FLAGGEMS:
        found.append(f"FlagGems {gems}: tested is {FLAGGEMS}")
    if gems and not _version("triton"):
        found.append("FlagGems is installed without triton: its Python kernels cannot run")
    if found:
        raise Doubt("\n".join(found))
    return "no known bad combination"


def library():
    from torch_fl import _C

    folder = os.path.dirname(_C.__file__)
    return [folder, ", ".join(sorted(os.path.basename(path) for path in glob.glob(f"{folder}/*.so")))]


def start():
    import torch_fl

    if torch_fl._failure is not None:
        raise torch_fl._failure
    return f"the chip in use is {torch_fl.chip()}"


def chips():
    from torch_fl import _C

    lines = []
    for name in _C._chips():
        lines += [line for line in _C._chip_report(name).splitlines() if line.strip()]
    return lines


def nvidia():
    """Why CUDA does not start, where a GPU is there and another chip is in use."""
    from torch_fl import _C, _cuda

    known = _cuda.facts()
    if _C._chip() == "cuda" or not known.gpu:
        return "in use" if _C._chip() == "cuda" else "no GPU"
    raise Doubt(_cuda.explain(known) or "a GPU is there, but another chip was chosen")


def devices():
    import torch_fl

    lines = []
    for index in range(torch_fl.flagos.device_count()):
        properties = torch_fl.flagos.get_device_properties(index)
        free, total = torch_fl.flagos.mem_get_info(index)
        lines.append(f"flagos:{index} {properties.name}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    if not lines:
        raise RuntimeError("no device")
    return lines


def memory():
    with open("/proc/meminfo", encoding="ascii") as file:
        values = dict(line.split(":") for line in file)
    total, free = (int(values[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    return f"{free:.1f} of {total:.1f} GiB of the host's memory available"


def flaggems():
    import torch_fl

    gems, triton = _version("flag_gems"), _version("triton")
    if gems is None:
        return f"not installed (optional); triton {triton or 'not installed'}"
    return f"flag_gems {gems}, triton {triton}, {'in use' if torch_fl.is_flaggems_enabled() else 'not in use'}"


def compiler():
    return [_tool(name) for name in ("c++", "nvcc", "cmake", "ninja")]


def arithmetic():
    """A few operators on each backend against the CPU; none is begun after SELF_TEST_SECONDS of a backend."""
    import torch

    import torch_fl

    a = torch.linspace(-1, 1, 64).reshape(8, 8)
    cases = {
        "exp": lambda x: x.exp(),
        "add.Tensor": lambda x: x + x,
        "mul.Tensor": lambda x: x * x,
        "_softmax": lambda x: x.softmax(1),
        "mm": lambda x: x @ x,
        "sum.dim_IntList": lambda x: x.sum(1),
    }
    before = collections.Counter(torch_fl.fallbacks())
    tuned = {"mm", "sum.dim_IntList"}  # FlagGems would compile dozens of variants of their Python kernels
    lines = []
    for backend in [step.backend for step in torch_fl.explain("mm")]:
        passed, absent, late = [], {}, []
        deadline = time.monotonic() + SELF_TEST_SECONDS
        for op, call in cases.items():
            if backend == "flagos_python" and op in tuned:
                continue
            if time.monotonic() > deadline:
                late.append(op)
                continue
            try:
                # The CPU is a backend to test here, and no fallback to forbid or to warn of.
                with torch_fl.route({op: backend}), torch_fl.strict(False), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    difference = (call(a.to("flagos")).cpu() - call(a)).abs().max().item()
            except Exception as error:
                if "backend not registered" not in str(error):
                    raise RuntimeError(f"{backend}: {op}: {error}") from error
                absent[op] = str(error).splitlines()[0]
                continue
            if not difference <= 1e-3:
                raise RuntimeError(f"{backend}: {op} differs from the CPU by {difference}")
            passed.append(op)
        line = f"{backend}: {', '.join(passed)} equal the CPU's" if passed else f"{backend}: has none of these"
        lines.append(line + (f"; no time was left for {', '.join(late)}" if late else ""))
    _own_fallbacks.update(collections.Counter(torch_fl.fallbacks()) - before)
    return lines


def autograd():
    import torch

    x = torch.ones(4, device="flagos", requires_grad=True)
    (x * x).sum().backward()
    if x.grad.device.type != "flagos" or x.grad.cpu().tolist() != [2.0] * 4:
        raise RuntimeError(f"the gradient of sum(x*x) at 1 is {x.grad.cpu().tolist()}")
    return "a gradient is right"


def streams():
    import torch

    stream = torch.flagos.Stream()
    with torch.flagos.stream(stream):
        x = torch.ones(4, device="flagos") * 2
        event = stream.record_event()
    event.synchronize()
    if x.cpu().tolist() != [2.0] * 4:
        raise RuntimeError("work on a second stream gave a wrong result")
    return "a second stream and an event work"


def routes():
    import torch_fl

    totals: dict[str, int] = {}
    for row in torch_fl.routes():
        totals[row.backend] = totals.get(row.backend, 0) + 1
    lines = [", ".join(f"{name} {count}" for name, count in sorted(totals.items())) + " operators"]
    fallbacks = collections.Counter(torch_fl.fallbacks()) - _own_fallbacks
    if fallbacks:
        lines.append("ran on the CPU: " + ", ".join(f"{op} {count}" for op, count in sorted(fallbacks.items())))
    return lines


def environment():
    from torch_fl import _env

    found = []
    for variable in _env.table():
        if variable.name.endswith("_"):
            found += [f"{variable.name}{name}={value}" for name, value in _env.with_prefix(variable.name).items()]
        elif _env.get(variable.name) is not None:
            found.append(f"{variable.name}={_env.get(variable.name)}")
    if doubts := [f"{name} is no variable of torch_fl; did you mean {near}?" for name, near in _env.misspelt().items()]:
        raise Doubt("\n".join(doubts + found))
    return found or "no variable of torch_fl is set"


FACTS = (versions, known_trouble, library, chips, nvidia, environment)  # true even when torch_fl does not start
USES = (devices, arithmetic, autograd, streams, routes, flaggems)
CHECKS = (versions, known_trouble, library, start, chips, nvidia, devices, memory, flaggems, compiler, arithmetic)
CHECKS += (autograd, streams, routes, environment)


def run(checks=CHECKS) -> list[dict]:
    """Runs checks; per check its name, its status (ok, doubt, failed, skipped) and lines."""
    found, started = [], True
    for check in checks:
        status = "ok"
        if not started and check in USES:
            status, lines = "skipped", ["torch_fl did not start"]
        else:
            try:
                lines = check()
            except Doubt as doubt:
                status, lines = "doubt", str(doubt).splitlines()
            except Exception as error:
                status = "failed"
                lines = f"{type(error).__name__}: {error}".splitlines()
                if isinstance(error, (AttributeError, TypeError)):  # ours, not the user's: show where
                    lines += traceback.format_exc().splitlines()[-4:-1]
                started = started and check is not start
        lines = [lines] if isinstance(lines, str) else list(lines)
        found.append({"check": check.__name__, "status": status, "lines": lines})
    return found


MARKS = {"ok": "ok  ", "doubt": "WARN", "failed": "FAIL", "skipped": "skip"}


def text(found: list[dict]) -> str:
    rows = []
    for entry in found:
        for number, line in enumerate(entry["lines"]):
            mark, name = (MARKS[entry["status"]], entry["check"]) if number == 0 else ("    ", "")
            rows.append(f"{mark} {name.replace('_', ' '):<14} {line}")
    return "\n".join(rows)


def explain_failure(error: BaseException) -> None:
    """Adds to the error of a failed start what the doctor knows without starting; Python prints it below the error."""
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(f"What `python -m torch_fl doctor` says:\n{text(run(FACTS))}")


def main(as_json: bool = False) -> int:
    """Runs every check and prints what it found; 1 when one failed."""
    found = run()
    failed = sum(entry["status"] == "failed" for entry in found)
    doubts = sum(entry["status"] == "doubt" for entry in found)
    if as_json:
        print(json.dumps({"ok": failed == 0, "failed": failed, "doubts": doubts, "checks": found}, indent=1))
        return 1 if failed else 0
    print(text(found))
    warned = f", {doubts} warned" if doubts else ""
    print(f"all checks passed{warned}" if not failed else f"{failed} of {len(found)} checks failed{warned}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main("--json" in sys.argv[1:]))
