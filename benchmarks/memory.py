#!/usr/bin/env python3
"""Memory of training and of churn on a stock device and on flagos, and the time of one allocation.

    python benchmarks/memory.py --out benchmarks/results                   # cuda against flagos on a GPU
    python benchmarks/memory.py --pair flagos,flagos --limit 60 --steps 8  # tries it on a machine without one

`train`: a transformer encoder on sequences of changing length, AdamW: peaks of what was allocated and reserved.
`churn`: tensors of random sizes that live for random times: how much more is reserved than in use (fragmentation).
`allocate`: host time of one torch.empty and its release, per size. Each device has a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import torch  # noqa: E402

from benchmarks import common  # noqa: E402


def train(options) -> dict:
    device = options.device
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True, dropout=0.0)
    model = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    lengths = random.Random(0)
    for _ in range(options.steps):
        x = torch.randn(4, lengths.randrange(16, 33) * 16, 512).to(device)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    common.synchronize(device)
    stats = torch.get_device_module(device).memory_stats()
    return {**common.peaks(device), "retries": stats.get("num_alloc_retries", 0), "oom": stats.get("num_ooms", 0)}


def churn(options) -> dict:
    """Reserved against allocated while sizes from 1 KiB to 64 MiB come and go; the same sequence on every device."""
    device, sizes = options.device, random.Random(1)
    module = torch.get_device_module(device)
    live: list = []
    overhead = []
    for k in range(options.steps * 100):
        live.append(torch.empty(int(2 ** sizes.uniform(10, 26)), dtype=torch.uint8, device=device))
        while len(live) > 60:
            live.pop(sizes.randrange(len(live)))
        if k % 50 == 49:
            overhead.append(module.memory_reserved() / module.memory_allocated())
    result = {**common.peaks(device), "reserved_over_allocated": statistics.median(overhead[len(overhead) // 2 :])}
    live.clear()
    left = module.memory_allocated()
    module.empty_cache()
    return {**result, "left_allocated": left, "left_reserved": module.memory_reserved()}


def allocate(options) -> dict:
    device, times = options.device, {}
    for exponent in (6, 12, 18, 22, 26):
        batches = []
        for _ in range(30):
            start = time.perf_counter_ns()
            for _ in range(100):
                torch.empty(1 << exponent, dtype=torch.uint8, device=device)
            batches.append((time.perf_counter_ns() - start) / 100)
        times[str(1 << exponent)] = statistics.median(batches[5:])
    return {"ns": times}


WORK = {"train": train, "churn": churn, "allocate": allocate}


def compare(part: str, first: dict, second: dict) -> dict:
    if part == "allocate":
        return {size: round(second["ns"][size] / ns, 3) for size, ns in first["ns"].items()}
    names = ("peak_allocated", "peak_reserved", "reserved_over_allocated")
    return {name: round(second[name] / first[name], 4) for name in names if first.get(name)}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="cuda,flagos", help="two devices: stock, ours")
    parser.add_argument("--steps", type=int, default=40, help="training steps; hundreds of churn steps")
    parser.add_argument("--limit", type=float, default=240, help="seconds for everything")
    parser.add_argument("--out", help="folder for memory.json")
    parser.add_argument("--worker", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        common.load(options.device)
        with contextlib.redirect_stdout(sys.stderr):
            result = WORK[options.worker](options)
        common.give(result)
        return 0
    budget = common.Budget(options.limit)
    devices = options.pair.split(",")
    common.load(devices[1])
    data = {"what": "memory of training and churn; see benchmarks/memory.py", "pair": devices}
    data |= {"where": common.where(devices[1]), "limit": options.limit, "parts": {}}
    print(", ".join(f"{k} {v}" for k, v in data["where"].items()), flush=True)
    script = str(Path(__file__).resolve())
    failed = False
    for part in WORK:
        arguments = ["--worker", part, "--steps", str(options.steps)]
        results = [common.run_worker(script, arguments, device, budget) for device in devices]
        problems = [r["error"] for r in results if "error" in r]
        data["parts"][part] = {"results": results, "errors": problems}
        if problems:
            failed = True
            print(f"{part:9} error: {problems[0]}", flush=True)
        else:
            data["parts"][part]["ratio"] = compare(part, *results)
            for device, result in zip(devices, results, strict=True):
                print(f"{part:9} {device:7} { ({k: v for k, v in result.items() if k != 'device'}) }")
            print(f"{part:9} ratio   {data['parts'][part]['ratio']}", flush=True)
        common.save(options.out, "memory.json", data)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
