#!/usr/bin/env python3
"""Instructions of the host on two devices, counted by valgrind: exact on any machine, however busy.

    python benchmarks/instructions.py --out benchmarks/results           # per call of an operator
    python benchmarks/instructions.py --model --out benchmarks/results   # of a Qwen3-0.6B training step and token

For changes of a few percent, which times on a shared machine do not show. Without a GPU it runs on the null CUDA
(tests/null_cuda), whose kernels and driver do next to nothing: differences between the devices are real, ratios are
larger than on a GPU. A model's figures contain the interpreter, and vary by some parts in a thousand, because malloc
finds its memory in another order each time. Needs a C++ compiler, valgrind and its headers; takes some minutes.
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


def inside(library: str, devices, calls: int) -> None:
    """What runs under valgrind: operators on both devices, one after the other."""
    import torch

    torch.set_num_threads(1)
    for device in devices:
        common.load(device)
    torch.ops.load_library(library)
    for device in devices:
        torch.ops.flagos_bench.count_instructions(device, calls)


def inside_model(library: str, device: str, size: str) -> None:
    """What runs under valgrind: parts of a model on one device."""
    from argparse import Namespace

    import torch

    from benchmarks import qwen3

    torch.set_num_threads(1)
    work = qwen3.Work(Namespace(device=device, size=size))
    torch.ops.load_library(library)
    counted = torch.ops.flagos_bench.counted
    work.start_decode(tokens=4)
    torch.ops.flagos_bench.start_counting()
    work.eager.round(4)
    counted("")  # the first time that it counts differs
    work.eager.round(4)
    counted(f"{device}/prompt and 4 tokens")
    work.start_train()
    counted("")
    loss = work.model(input_ids=work.data[0], labels=work.data[0]).loss
    counted(f"{device}/forward")
    loss.backward()
    counted(f"{device}/backward")
    work.optimizer.step()
    counted(f"{device}/optimizer")
    work.optimizer.zero_grad()
    counted(f"{device}/zero_grad")


def under_valgrind(arguments, flag: str, environment) -> list:
    """The counts that this script makes with `arguments` below valgrind."""
    with tempfile.TemporaryDirectory() as folder:
        library = common.compile_operators("instructions", folder)
        command = ["valgrind", "--tool=callgrind", flag, f"--callgrind-out-file={folder}/counts"]
        command += [sys.executable, __file__, "--inside", library, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"instructions: the counted process failed:\n{done.stderr[-3000:]}")
        parts = sorted(Path(folder).glob("counts.*"), key=lambda path: int(path.suffix[1:]))
        return [found for found in map(dump, parts) if found[0]]  # the last one is of the process's end


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="cuda,flagos", help="two devices")
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--model", action="store_true", help="parts of a Qwen3 model instead of operators")
    parser.add_argument("--size", default="full", help="of the model, as in qwen3.py")
    parser.add_argument("--out", help="folder for instructions_NAME.json")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    devices = options.pair.split(",")
    if options.inside:
        if options.model:
            inside_model(options.inside, devices[0], options.size)
        else:
            inside(options.inside, devices, options.calls)
        return 0
    if shutil.which("valgrind") is None:
        parser.error("valgrind is not installed (Debian: apt-get install valgrind)")

    import torch

    environment = dict(os.environ, OMP_NUM_THREADS="1")
    on_null_cuda = "cuda" in devices and not torch.cuda.is_available()
    if on_null_cuda:
        environment |= null_cuda.environment() | {"NULL_CUDA_ARCH": os.environ.get("NULL_CUDA_ARCH", "80")}
    data = {"what": "instructions of the host per call", "pair": devices, "calls": options.calls}
    name = "instructions"
    if options.model:
        name, data = "instructions_qwen3", {"what": "instructions of the host, Qwen3", "pair": devices}
        data["size"] = options.size
        dumps = []
        for device in devices:
            stock = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} if common.is_stock(device) else {}
            arguments = ["--model", "--size", options.size, "--pair", device]
            dumps += under_valgrind(arguments, "--instr-atstart=no", environment | stock)
        rows = table(dumps, devices, 1)
    else:
        arguments = ["--pair", options.pair, "--calls", str(options.calls)]
        rows = table(under_valgrind(arguments, "--collect-atstart=no", environment), devices, options.calls)
    print(f"{'':20}{devices[0]:>11}{devices[1]:>11}{'plus':>9}{'ours':>9}{'ratio':>8}")
    for title, row in rows.items():
        print(f"{title:20}{row['first']:11}{row['second']:11}{row['plus']:9}{row['in_torch_fl']:9}{row['ratio']:8.3f}")
    where = common.where("cpu")
    where["made_on"] = "null CUDA, no GPU" if on_null_cuda else where["made_on"]
    common.save(
        options.out, f"{name}_{'null_cuda' if on_null_cuda else devices[0]}.json", data | {"where": where, "rows": rows}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
