#!/usr/bin/env python3
"""What the front before the CUDA allocator gains: one allocate and free, and the operators of dispatch.py.

    python benchmarks/alloc_front.py --json benchmarks/results/alloc_front.json
    python benchmarks/alloc_front.py --rounds 0                            # without the operators

`front` and `native` alternate in one process: the allocator as a flagos call meets it, and as other code does, which
the front passes on. `without` is a process with FLAGOS_ALLOC_FRONT=0: its `native` is PyTorch alone, so the difference
from `native` is what the front costs others. The operators run in processes with and without the front in turn, each
pairing cuda with flagos; the figure is the median of the ratios.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import torch  # noqa: E402

from benchmarks import common  # noqa: E402

SIZES = [512, 4096, 65536, 1 << 20, 4 << 20]


def build(folder: Path):
    """The library made from alloc_front.cc, loaded."""
    import torch_fl

    torch_lib, ours = Path(torch.__file__).parent, Path(torch_fl._C.__file__).parent
    out = folder / "alloc_front.so"
    standard = "17" if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13) else "20"
    command = ["c++", f"-std=c++{standard}", "-O2", "-fPIC", "-shared", "-o", str(out)]
    command += [str(ROOT / "benchmarks/alloc_front.cc"), "-isystem", str(torch_lib / "include")]
    for libraries, names in ((ours, ["torch_fl"]), (torch_lib / "lib", ["c10"])):
        command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", *(f"-l{n}" for n in names)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"alloc_front.cc does not compile:\n{done.stderr[-2000:]}")
    call = ctypes.CDLL(str(out)).time_allocations
    call.argtypes, call.restype = (ctypes.c_size_t, ctypes.c_int, ctypes.c_int), ctypes.c_double
    return call


def time_sizes(repeat: int, pairs: int) -> dict:
    """{size: {"front": ns, "native": ns}}, medians; the two alternate."""
    import torch_fl

    if torch_fl.chip() != "cuda":
        sys.exit(f"the front is part of the chip cuda; this process runs on {torch_fl.chip()}")
    torch.zeros(1, device="flagos")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        call = build(Path(folder))
        for size in SIZES:
            times: dict[str, list[float]] = {"front": [], "native": []}
            for _ in range(repeat):
                times["front"].append(call(size, pairs, 0))
                times["native"].append(call(size, pairs, -1))
            rows[str(size)] = {k: round(statistics.median(v), 1) for k, v in times.items()}
    return rows


def run(arguments, seconds, **env):
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **env}, capture_output=True, text=True, timeout=seconds
    )
    if done.returncode != 0:
        print(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-1000:]}", file=sys.stderr)
    return done.stdout


def operators(rounds: int, repeat: int, ops: str, seconds: float) -> dict:
    """{mode: {operator: {"with": ratio flagos to cuda, "without": ratio}}} over alternating processes."""
    budget = common.Budget(seconds)
    ratios: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "dispatch.json"
        for k in range(2 * rounds):
            if budget.left() < 20:
                print(f"operators: {k} of {2 * rounds} processes ran in the time", file=sys.stderr)
                break
            which = ("with", "without")[(k + k // 2) % 2]
            result.unlink(missing_ok=True)
            arguments = [str(ROOT / "benchmarks/dispatch.py"), "--pair", "cuda,flagos", "--repeat", str(repeat)]
            arguments += ["--ops", ops, "--json", str(result)]
            try:
                run(arguments, budget.left(), FLAGOS_ALLOC_FRONT="1" if which == "with" else "0")
            except subprocess.TimeoutExpired:
                break
            if not result.exists():
                continue
            for mode, data in json.loads(result.read_text())["modes"].items():
                for name, row in data["operators"].items():
                    if "pairs" in row:
                        ratios.setdefault(mode, {}).setdefault(name, {}).setdefault(which, []).append(row["pairs"])
    return {
        mode: {
            name: {w: round(statistics.median(v), 3) for w, v in row.items()}
            for name, row in rows.items()
            if len(row) == 2
        }
        for mode, rows in ratios.items()
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=100, help="batches per size")
    parser.add_argument("--pairs", type=int, default=2000, help="allocations per batch")
    parser.add_argument("--rounds", type=int, default=2, help="processes of dispatch.py with the front, and without")
    parser.add_argument("--op-repeat", type=int, default=60, help="pairs of batches per operator in dispatch.py")
    parser.add_argument("--ops", default="", help="only operators whose name contains this")
    parser.add_argument("--limit", type=float, default=400, help="seconds for the operators")
    parser.add_argument("--json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        print(common.RESULT + json.dumps(time_sizes(options.repeat, options.pairs)))
        return 0

    sizes = time_sizes(options.repeat, options.pairs)
    arguments = [__file__, "--worker", "--repeat", str(options.repeat), "--pairs", str(options.pairs)]
    lines = [n for n in run(arguments, 300, FLAGOS_ALLOC_FRONT="0").splitlines() if n.startswith(common.RESULT)]
    if not lines:
        return 1
    without = json.loads(lines[-1][len(common.RESULT) :])
    where = common.where("flagos")
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    print(f"\none allocate and free, ns\n{'bytes':>10}{'front':>10}{'native':>10}{'without':>10}")
    for size, row in sizes.items():
        row["without"] = without[size]["native"]
        print(f"{size:>10}{row['front']:10.1f}{row['native']:10.1f}{row['without']:10.1f}")
    data = {"what": "the CUDA allocator's front; see benchmarks/alloc_front.py", "versions": where, "allocate": sizes}

    data["operators"] = operators(options.rounds, options.op_repeat, options.ops, options.limit)
    data["summary"] = {}
    for mode, rows in data["operators"].items():
        print(f"\n{mode}: flagos to cuda\n{'operator':20}{'with':>8}{'without':>9}")
        for name, row in rows.items():
            print(f"{name:20}{row['with']:8.3f}{row['without']:9.3f}")
        summary = {w: round(statistics.median(r[w] for r in rows.values()), 3) for w in ("with", "without")}
        data["summary"][mode] = summary
        print(f"median over {len(rows)} operators: with {summary['with']}, without {summary['without']}")
    if options.json:
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
