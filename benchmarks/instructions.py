#!/usr/bin/env python3
"""Instructions of the host per operator call on two devices, counted by valgrind: exact on any machine, however busy.

    python benchmarks/instructions.py --out benchmarks/results

For changes of a few percent, which times on a shared machine do not show. Without a GPU it runs on the null CUDA
(tests/null_cuda), whose kernels and driver do next to nothing: differences between the devices are real, ratios are
larger than on a GPU. Needs a C++ compiler, valgrind and its headers; takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from tests.common import null_cuda  # noqa: E402


def dump(path: Path) -> tuple[str, int, int]:
    """(what was counted, instructions, those of them in torch_fl's libraries) of one file that callgrind wrote."""
    title, total, ours = "", 0, 0
    names, mine, skip = {}, False, False
    with open(path, encoding="latin-1") as file:  # names of functions may be anything
        for line in file:
            if line.startswith("desc: Trigger: Client Request: "):
                title = line.split(": ", 3)[3].strip()
            elif found := re.match(r"c?ob=\((\d+)\)(?: (.*))?", line):
                if found[2]:
                    names[found[1]] = found[2]
                if not line.startswith("c"):
                    mine = "libtorch_fl" in names.get(found[1], "")
            elif line.startswith("calls="):
                skip = True  # the next line is what the callee took, which is counted there
            elif re.match(r"[+\-*\d]", line):
                count = line.split()
                if not skip and len(count) > 1:
                    total += int(count[1])
                    ours += int(count[1]) * mine
                skip = False
    return title, total, ours


def table(dumps, devices, calls: int) -> dict[str, dict]:
    rows: dict[str, dict] = {}
    for title, total, ours in dumps:
        device, _, name = title.partition("/")
        row = rows.setdefault(name, {})
        row["first" if device == devices[0] else "second"] = round(total / calls)
        if device == devices[1]:
            row["in_torch_fl"] = round(ours / calls)
    for row in rows.values():
        row["plus"] = row["second"] - row["first"]
        row["ratio"] = round(row["second"] / row["first"], 3)
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="cuda,flagos", help="two devices")
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--out", help="folder for instructions_NAME.json")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    devices = options.pair.split(",")

    import torch

    if options.inside:
        torch.set_num_threads(1)
        for device in devices:
            common.load(device)
        torch.ops.load_library(options.inside)
        for device in devices:
            torch.ops.flagos_bench.count_instructions(device, options.calls)
        return 0
    if shutil.which("valgrind") is None:
        parser.error("valgrind is not installed (Debian: apt-get install valgrind)")
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    on_null_cuda = "cuda" in devices and not torch.cuda.is_available()
    if on_null_cuda:
        environment |= null_cuda.environment()
    with tempfile.TemporaryDirectory() as folder:
        library = common.compile_operators("instructions", folder)
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={folder}/counts"]
        command += [
            sys.executable,
            __file__,
            "--inside",
            library,
            "--pair",
            options.pair,
            "--calls",
            str(options.calls),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"instructions: the counted process failed:\n{done.stderr[-3000:]}")
        parts = sorted(Path(folder).glob("counts.*"), key=lambda path: int(path.suffix[1:]))
        dumps = [found for found in map(dump, parts) if found[0]]  # the last one is of the process's end
    rows = table(dumps, devices, options.calls)
    print(f"{'operator':16}{devices[0]:>9}{devices[1]:>9}{'plus':>8}{'ours':>8}{'ratio':>8}")
    for name, row in rows.items():
        print(f"{name:16}{row['first']:9}{row['second']:9}{row['plus']:8}{row['in_torch_fl']:8}{row['ratio']:8.3f}")
    where = common.where("cpu")
    where["made_on"] = "null CUDA, no GPU" if on_null_cuda else where["made_on"]
    data = {"what": "instructions of the host per call", "pair": devices, "where": where, "calls": options.calls}
    common.save(options.out, f"instructions_{'null_cuda' if on_null_cuda else devices[0]}.json", data | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
