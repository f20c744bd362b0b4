"""`python -m torch_fl doctor`: one screen that says what works here, what does not, and why.

Each check is a function that returns what it found or raises; a failed one does not stop the others.
"""

import importlib.metadata
import os
import platform
import sys
import traceback


def versions():
    import torch

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    built = (torch.version.cuda and f"CUDA {torch.version.cuda}") or "CPU only"
    return (
        f"torch_fl {version('torch_fl')}, torch {torch.__version__} ({built}), Python {platform.python_version()}, "
        f"triton {version('triton')}, flag_gems {version('flag_gems')}"
    )


def library():
    import torch_fl

    return os.path.dirname(torch_fl._C.__file__)


def chips():
    import torch_fl

    lines = [f"in use: {torch_fl.chip()}"]
    for name in torch_fl._C._chips():
        lines += [line for line in torch_fl._C._chip_report(name).splitlines() if line.strip()]
    return lines


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


def arithmetic():
    import torch

    x = torch.arange(64, dtype=torch.float32).reshape(8, 8)
    y = x.to("flagos")
    difference = ((y @ y + 1).cpu() - (x @ x + 1)).abs().max().item()
    if difference > 1e-3:
        raise RuntimeError(f"a matrix product differs from the CPU's by {difference}")
    return "a matrix product equals the CPU's"


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
    listed = ", ".join(f"{name} {count}" for name, count in sorted(totals.items()))
    return [f"{listed} operators", f"FlagGems: {'in use' if torch_fl.is_flaggems_enabled() else 'not in use'}"]


def environment():
    from torch_fl import _env

    found = []
    for variable in _env.table():
        if variable.name.endswith("_"):
            found += [f"{variable.name}{name}={value}" for name, value in _env.with_prefix(variable.name).items()]
        elif _env.get(variable.name) is not None:
            found.append(f"{variable.name}={_env.get(variable.name)}")
    return found or "no variable of torch_fl is set"


CHECKS = (versions, library, chips, devices, arithmetic, autograd, streams, routes, environment)


def main() -> int:
    """Runs every check, prints one line or more each; 1 when one failed."""
    failed = 0
    for check in CHECKS:
        try:
            found = check()
            mark = "ok  "
        except Exception as error:
            failed += 1
            mark = "FAIL"
            found = f"{type(error).__name__}: {error}".splitlines()
            if isinstance(error, (AttributeError, TypeError)):  # ours, not the user's: show where
                found += traceback.format_exc().splitlines()[-4:-1]
        lines = [found] if isinstance(found, str) else found
        for number, line in enumerate(lines):
            print(f"{mark if number == 0 else '    '} {check.__name__ if number == 0 else '':<12} {line}")
    print("all checks passed" if not failed else f"{failed} of {len(CHECKS)} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
