"""Makes docs/device_api.md: which names of torch.cuda torch.flagos has. `--check` only says whether it is up to date.

The names are those of the installed torch, so the file belongs to the default torch of this tree.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = "docs/device_api.md"
STREAMS = ["Event", "ExternalStream", "Stream"]  # torch.cuda.streams has no __all__


class Row(NamedTuple):
    module: str  # in torch, such as torch.cuda.memory
    name: str
    ours: str | None  # where it is; None when absent
    reason: str  # why it is absent
    meaningful: bool  # counts for the share


def rows() -> list[Row]:
    """Every public name of the modules, in their order."""
    import torch

    from torch_fl.flagos import _absent

    table = []
    for part in ("", "memory", "random", "amp", "streams", "graphs"):
        theirs = getattr(torch.cuda, part) if part else torch.cuda
        module = f"torch.cuda.{part}" if part else "torch.cuda"
        ours = getattr(torch.flagos, part) if part else torch.flagos
        for name in STREAMS if part == "streams" else theirs.__all__:
            where = f"torch.flagos.{part}.{name}" if part and hasattr(ours, name) else f"torch.flagos.{name}"
            if hasattr(ours, name) or hasattr(torch.flagos, name):
                table.append(Row(module, name, where, "", True))
            else:
                why = _absent.reason(name)
                table.append(Row(module, name, None, why or "", name not in _absent.FOREIGN))
    for module in ("torch.accelerator", "torch.accelerator.memory"):
        part = torch.accelerator.memory if module.endswith("memory") else torch.accelerator
        table += [Row(module, name, f"{module}.{name}", "", True) for name in part.__all__]
    return table


def share(table: list[Row]) -> tuple[int, int]:
    """(present, all) names that mean something on flagos, each counted once per module."""
    meaningful = [row for row in table if row.meaningful]
    return sum(row.ours is not None for row in meaningful), len(meaningful)


def render() -> str:
    from torch_fl.flagos import _absent

    table = rows()
    present, meaningful = share(table)
    narrow = sum(row.name in _absent.CUDA_CHIP for row in table if row.ours)
    lines = [
        "# The device API",
        "",
        "`torch.flagos` is used as `torch.cuda` is; where torch has a form that names no device (`torch.accelerator`,",
        "`torch.amp`, `torch.Stream`, `torch.Event`), that works too, since flagos is the accelerator of the process.",
        "",
        f"{present} of the {meaningful} names that mean something beyond CUDA are present; "
        "`tests/integration/test_device_api.py` has a test of",
        f"what each does. {narrow} of them (graphs, monitoring) need the chip `cuda` and refuse in one "
        "sentence on others.",
        "",
        "Made by `scripts/device_api_doc.py` from the installed torch and `torch_fl/flagos/_absent.py`; change those,",
        "not this file.",
    ]
    for module in dict.fromkeys(row.module for row in table):
        lines += ["", f"## {module}", "", "| name | on flagos |", "|---|---|"]
        for row in table:
            if row.module == module:
                note = ", chip `cuda` only" if row.name in _absent.CUDA_CHIP else ""
                lines.append(f"| `{row.name}` | {f'`{row.ours}`{note}' if row.ours else f'absent: {row.reason}'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the file is not up to date")
    arguments = parser.parse_args()
    document = ROOT / DOCUMENT
    if arguments.check:
        if not document.exists() or document.read_text(encoding="utf-8") != render():
            print(f"{DOCUMENT} is not up to date: run python scripts/device_api_doc.py", file=sys.stderr)
            return 1
        return 0
    document.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
