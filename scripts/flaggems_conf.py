#!/usr/bin/env python3
"""Writes torch_fl/backends_flagos_py.conf from the verdicts: every FlagGems Python kernel that was judged right.

    python scripts/flaggems_conf.py            # after scripts/judge_flaggems.py has written or changed verdicts
    python scripts/flaggems_conf.py --check    # exit code 1 when the file is not what the verdicts make of it

Verdicts of the CUDA chip count; where several GPUs were judged, a kernel must be right on each of them.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "torch_fl/backends_flagos_py.conf"
HEAD = """# backends_flagos_py.conf: every FlagGems Python kernel that is verified. Format: see backends.conf.
# Written by scripts/flaggems_conf.py.
"""


def verdict_files(folder: Path = ROOT / "torch_fl/flaggems") -> list[Path]:
    return sorted(folder.glob("verdicts_*_cuda*.json"))


def text(files: list[Path]) -> str:
    """The conf file that these verdicts make."""
    if not files:
        return HEAD + "# No verdict is in the package yet, so every operator takes its default.\n"
    judged = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    right = set.intersection(
        *({op for op, entry in data["ops"].items() if entry["verdict"] == "right"} for data in judged)
    )
    where = "; ".join(f"FlagGems {data['flaggems']} on {data['device']}" for data in judged)
    lines = "".join(f"{op} = flagos_python\n" for op in sorted(right))
    return f"{HEAD}# Judged: {where}. Calls outside of a kernel's limits go to the next backend.\n{lines}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    wanted = text(verdict_files())
    if not options.check:
        CONF.write_text(wanted, encoding="utf-8")
        print(f"{CONF}: {wanted.count(' = flagos_python')} operators")
    elif CONF.read_text(encoding="utf-8") != wanted:
        print(f"{CONF} is not what the verdicts make of it: run scripts/flaggems_conf.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
