#!/usr/bin/env python3
"""Memory of training and of churn on a stock device and on flagos, and the time of one allocation.

    python benchmarks/memory.py --out benchmarks/results                   # cuda against flagos on a GPU
    python benchmarks/memory.py --pair flagos,flagos --limit 60 --steps 8  # tries it on a machine without one

`train`: a transformer encoder on sequences of changing length, AdamW: peaks of what was allocated and reserved.
`churn`: tensors of random sizes that live for random times: how much more is reserved than in use (fragmentation). One
sequence of sizes says little, since a segment more or less is chance: the mean over several.
`allocate`: host time of one torch.empty and its release, per size. Each device has a process of its own; for the times
they take turns, so that a pair sees the same machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import torch  # noqa: E402

from benchmarks import common  # noqa: E402

CHURNS = 8
SIZES = [1 << exponent for exponent in (6, 12, 18, 22, 26)]


class Work:
    """What a worker can be asked."""

    def __init__(self, options):
        common.load(options.device)
        self.device, self.module = options.device, torch.get_device_module(options.device)

    def train(self, steps):
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True, dropout=0.0)
        model = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
        lengths = random.Random(0)
        for _ in range(steps):
            x = torch.randn(4, lengths.randrange(16, 33) * 16, 512).to(self.device)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        common.synchronize(self.device)
        stats = self.module.memory_stats()
        found = common.peaks(self.device)
        return {**found, "retries": stats.get("num_alloc_retries", 0), "oom": stats.get("num_ooms", 0)}

    def churn(self, steps):
        found = [self.one_churn(steps, seed) for seed in range(CHURNS)]
        return {name: statistics.mean(one[name] for one in found) for name in found[0]}

    def one_churn(self, steps, seed):
        """Reserved against allocated while sizes from 1 KiB to 64 MiB come and go; the same ones on every device."""
        common.forget(self.device)
        sizes = random.Random(seed)
        before = self.module.memory_allocated()
        live: list = []
        overhead = []
        for k in range(steps * 100):
            live.append(torch.empty(int(2 ** sizes.uniform(10, 26)), dtype=torch.uint8, device=self.device))
            while len(live) > 60:
                live.pop(sizes.randrange(len(live)))
            if k % 50 == 49:
                overhead.append(self.module.memory_reserved() / self.module.memory_allocated())
        found = common.peaks(self.device)
        found["reserved_over_allocated"] = statistics.median(overhead[len(overhead) // 2 :])
        live.clear()
        return {**found, "left_allocated": self.module.memory_allocated() - before}

    def allocate(self, calls):
        """Nanoseconds by size. The device is given as an object: how long torch reads a string is not the question."""
        device, times = torch.device(self.device), {}
        for size in SIZES:
            for _ in range(10):
                torch.empty(size, dtype=torch.uint8, device=device)
            start = time.perf_counter_ns()
            for _ in range(calls):
                torch.empty(size, dtype=torch.uint8, device=device)
            times[str(size)] = (time.perf_counter_ns() - start) / calls
        return {"ns": times}


def compare(part: str, pairs) -> dict:
    """Ours over stock."""
    if part == "allocate":
        sizes = pairs[0][0]["ns"]
        return {size: common.ratio([[one["ns"][size] for one in pair] for pair in pairs]) for size in sizes}
    ((first, second),) = pairs
    names = ("peak_allocated", "peak_reserved", "reserved_over_allocated")
    return {name: round(second[name] / first[name], 4) for name in names if first.get(name)}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="cuda,flagos", help="two devices: stock, ours")
    parser.add_argument("--steps", type=int, default=40, help="training steps; hundreds of churn steps")
    parser.add_argument("--rounds", type=int, default=30, help="pairs of turns of allocations")
    parser.add_argument("--limit", type=float, default=240, help="seconds for everything")
    parser.add_argument("--out", help="folder for memory.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        common.serve(Work(options))
        return 0
    budget = common.Budget(options.limit)
    devices = options.pair.split(",")
    common.load(devices[1])
    data = {"what": "memory of training and churn; see benchmarks/memory.py", "pair": devices}
    data |= {"where": common.where(devices[1]), "limit": options.limit, "parts": {}}
    print(", ".join(f"{k} {v}" for k, v in data["where"].items()), flush=True)
    failed = False
    with common.workers(str(Path(__file__).resolve()), [], devices) as pair:
        for part in ("train", "churn", "allocate"):
            if part == "allocate":
                share = common.Budget(budget.left() - 10)
                pairs = common.alternate(pair, part, options.rounds, share, budget, calls=2000)
            else:
                pairs = [common.both(pair, part, budget, steps=options.steps)]
            problems = common.errors(pairs) or ([] if pairs else ["no time left"])
            data["parts"][part] = {"results": pairs[0] if part != "allocate" and pairs else [], "errors": problems}
            if problems:
                failed = True
                print(f"{part:9} error: {problems[0]}", flush=True)
            else:
                data["parts"][part]["ratio"] = compare(part, pairs)
                for name, value in data["parts"][part]["ratio"].items():
                    print(f"{part:9} {devices[1]} / {devices[0]} {name}: {value}", flush=True)
            common.save(options.out, "memory.json", data)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
