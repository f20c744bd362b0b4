#!/usr/bin/env python3
"""Seconds that `import torch_fl` takes after `import torch`, in fresh processes; and what the first operator adds.

python benchmarks/import_time.py --out benchmarks/results
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import common  # noqa: E402


class Work:
    """What a worker can be asked: once in its life, for the time of an import."""

    def once(self):
        start = time.perf_counter()
        import torch

        middle = time.perf_counter()
        import torch_fl

        end = time.perf_counter()
        torch.ones(2, device="flagos")
        torch.flagos.synchronize()
        first = time.perf_counter()
        return {"torch": middle - start, "torch_fl": end - middle, "first_use": first - end, "chip": torch_fl.chip()}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--limit", type=float, default=120, help="seconds for everything")
    parser.add_argument("--out", help="folder for import_time.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        common.serve(Work())
        return 0
    budget = common.Budget(options.limit)
    script = str(Path(__file__).resolve())
    results = []
    while len(results) < options.repeat and (not results or budget.left() > 10):
        # "cpu" as the device keeps torch from loading torch_fl by itself, which would hide the time.
        with common.workers(script, [], ["cpu"]) as (worker,):
            results.append(worker.ask("once", budget))
    good = [r for r in results if "error" not in r]
    if not good:
        print(results[0]["error"])
        return 1
    data = {"what": "seconds of import; see benchmarks/import_time.py", "where": common.where("flagos")}
    data["errors"] = [r["error"] for r in results if "error" in r]
    for name in ("torch", "torch_fl", "first_use"):
        values = [r[name] for r in good]
        data[name] = {"median": statistics.median(values), "low": min(values), "high": max(values), "runs": len(values)}
        print(f"{name:10} {data[name]['median']:.3f} s ({data[name]['low']:.3f} to {data[name]['high']:.3f})")
    common.save(options.out, "import_time.json", data)
    return 1 if data["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
