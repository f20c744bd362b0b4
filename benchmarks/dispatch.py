#!/usr/bin/env python3
"""Host time per operator call on two devices, interleaved call by call in one process.

    python benchmarks/dispatch.py                          # cpu against flagos (the simulated host), no_grad and grad
    python benchmarks/dispatch.py --add-overhead           # only: what a flagos call adds to a 1-element add
    python benchmarks/dispatch.py --pair cuda,flagos --json benchmarks/results/dispatch.json

Tensors are tiny, so the time is the host's: dispatch, relabelling, allocation. A shared machine swings by tens of
percent within seconds; therefore the two devices alternate batch by batch and the figure is a median over pairs:
`ratio` = median of the second device / median of the first, `pairs` = median of the pairwise ratios, `+ns` = median
of the pairwise differences. On a GPU the queue is drained between batches, outside the measured time. "third party" is
an operator of another library (third_party.cc), which needs a C++ compiler and is left out of the medians.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from benchmarks import common  # noqa: E402


class Inputs:
    """The tensors that the calls use, on one device."""

    def __init__(self, device):
        d = self.device = device
        self.one, self.other = torch.ones(1, device=d), torch.ones(1, device=d)
        self.x, self.y = torch.ones(8, 8, device=d), torch.ones(8, 8, device=d)
        self.out = torch.empty(8, 8, device=d)
        self.v = torch.ones(8, device=d)
        self.b = torch.ones(2, 4, 4, device=d)
        self.img, self.kernel = torch.ones(1, 2, 6, 6, device=d), torch.ones(2, 2, 3, 3, device=d)
        self.index = torch.tensor([1, 3, 5], device=d)
        self.mask = torch.ones(8, 8, device=d) > 0
        self.ids = torch.tensor([[1, 2, 3]], device=d)
        self.q = torch.ones(1, 2, 4, 8, device=d)
        self.list = [torch.ones(4, device=d) for _ in range(4)]
        self.list2 = [torch.ones(4, device=d) for _ in range(4)]
        self.half = torch.ones(8, 8, device=d, dtype=torch.bfloat16)
        self.host = torch.ones(8, 8)
        self.generator = torch.Generator(device=d)
        self.target = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7], device=d)

    def grad(self):
        for name in ("one", "x", "v", "b", "q", "kernel"):
            getattr(self, name).requires_grad_()
        return self


# name -> call. What each stands for is in its name; together they cover every kind of argument and result.
OPS = {
    "add 1 element": lambda i: torch.add(i.one, i.other),
    "neg": lambda i: torch.neg(i.x),
    "exp": lambda i: torch.exp(i.x),
    "gelu": lambda i: F.gelu(i.x),
    "mul": lambda i: torch.mul(i.x, i.y),
    "add scalar": lambda i: torch.add(i.x, 2),
    "pow scalar": lambda i: torch.pow(i.x, 2.0),
    "compare": lambda i: torch.gt(i.x, 0.5),
    "add_": lambda i: i.y.add_(0.0),
    "fill_": lambda i: i.out.fill_(1.0),
    "add out=": lambda i: torch.add(i.y, i.y, out=i.out),
    "mm out=": lambda i: torch.mm(i.y, i.y, out=i.out),
    "where": lambda i: torch.where(i.mask, i.x, i.y),
    "clamp optional": lambda i: torch.clamp(i.x, min=0.0),
    "addcmul": lambda i: torch.addcmul(i.x, i.y, i.y),
    "lerp": lambda i: torch.lerp(i.x, i.y, 0.5),
    "mm": lambda i: torch.mm(i.x, i.y),
    "bmm": lambda i: torch.bmm(i.b, i.b),
    "addmm": lambda i: torch.addmm(i.v, i.x, i.y),
    "linear": lambda i: F.linear(i.x, i.y, i.v),
    "conv2d": lambda i: F.conv2d(i.img, i.kernel),
    "sum": lambda i: torch.sum(i.x),
    "mean dim": lambda i: torch.mean(i.x, -1),
    "max dim (tuple)": lambda i: torch.max(i.x, 1),
    "topk (tuple)": lambda i: torch.topk(i.x, 2),
    "var_mean (tuple)": lambda i: torch.var_mean(i.x, 1),
    "softmax": lambda i: torch.softmax(i.x, -1),
    "layer_norm": lambda i: F.layer_norm(i.x, (8,), i.v, i.v),
    "rms_norm": lambda i: F.rms_norm(i.x, (8,), i.v),
    "sdpa": lambda i: F.scaled_dot_product_attention(i.q, i.q, i.q),
    "embedding": lambda i: F.embedding(i.ids, i.x),
    "cross_entropy": lambda i: F.cross_entropy(i.x, i.target),
    "cat (list)": lambda i: torch.cat([i.x, i.y]),
    "stack (list)": lambda i: torch.stack(i.list),
    "split": lambda i: torch.split(i.x, 4),
    "foreach_add": lambda i: torch._foreach_add(i.list, i.list2),
    "foreach_mul_": lambda i: torch._foreach_mul_(i.list, 1.0),
    "index tensor": lambda i: i.x[i.index],
    "index_put_": lambda i: i.y.index_put_((i.index,), i.other),
    "index_select": lambda i: torch.index_select(i.x, 0, i.index),
    "gather": lambda i: torch.gather(i.v, 0, i.index),
    "masked_fill": lambda i: torch.masked_fill(i.x, i.mask, 0.0),
    "slice": lambda i: i.x[1:3],
    "view": lambda i: i.x.view(-1),
    "transpose": lambda i: i.x.transpose(0, 1),
    "expand": lambda i: i.v.expand(8, 8),
    "empty": lambda i: torch.empty(8, device=i.device),
    "zeros": lambda i: torch.zeros(8, device=i.device),
    "arange": lambda i: torch.arange(8, device=i.device),
    "empty_like": lambda i: torch.empty_like(i.x),
    "randn generator": lambda i: torch.randn(8, device=i.device, generator=i.generator),
    "dropout": lambda i: F.dropout(i.x, 0.5),
    "cast": lambda i: i.half.to(torch.float32),
    "clone": lambda i: torch.clone(i.x),
    "copy_": lambda i: i.out.copy_(i.y),
    "copy from host": lambda i: i.out.copy_(i.host),
    "copy to host": lambda i: i.host.copy_(i.out),
    "item": lambda i: i.other.item(),
}
THIRD_PARTY = "third party"
OPS[THIRD_PARTY] = lambda i: torch.ops.flagos_bench.scale(i.x, 2.0)


def measure(calls, repeat, batch, synchronize):
    """Nanoseconds per call of each of the two calls, as `repeat` pairs; who goes first alternates."""
    now = time.perf_counter_ns
    pairs = []
    span = range(batch)
    for k in range(repeat):
        times = [0.0, 0.0]
        for which in (0, 1) if k % 2 else (1, 0):
            call, sync = calls[which], synchronize[which]
            sync()
            start = now()
            for _ in span:
                call()
            times[which] = (now() - start) / batch
        pairs.append(times)
    return pairs


def judge(pairs):
    first, second = ([p[k] for p in pairs] for k in (0, 1))
    return {
        "first_ns": round(statistics.median(first)),
        "second_ns": round(statistics.median(second)),
        "ratio": round(statistics.median(second) / statistics.median(first), 3),
        "pairs": round(statistics.median([b / a for a, b in pairs]), 3),
        "plus_ns": round(statistics.median([b - a for a, b in pairs])),
    }


def synchronizer(device):
    if device == "cpu":
        return lambda: None
    return lambda: torch.get_device_module(device).synchronize()


def run_mode(mode, devices, names, repeat, batch, share):
    inputs = [Inputs(d).grad() if mode == "grad" else Inputs(d) for d in devices]
    synchronize = [synchronizer(d) for d in devices]
    rows = {}
    with torch.enable_grad() if mode == "grad" else torch.no_grad():
        for name in names:
            if share.left() <= 0:
                break
            calls = [lambda i=i, f=OPS[name]: f(i) for i in inputs]
            try:
                measure(calls, 6, batch, synchronize)  # warm-up
                rows[name] = judge(measure(calls, repeat, batch, synchronize))
            except (AttributeError, RuntimeError, NotImplementedError) as error:
                rows[name] = {"error": str(error).split("\n")[0][:200]}
    return rows


def summarize(rows, asked) -> dict:
    """Of the operators of torch; the one of another library stands apart."""
    good = {name: row for name, row in rows.items() if "error" not in row and name != THIRD_PARTY}
    summary = {"operators": len(good), "asked": asked}
    if good:
        summary["median_ratio"] = round(statistics.median(r["ratio"] for r in good.values()), 3)
        summary["median_pairs"] = round(statistics.median(r["pairs"] for r in good.values()), 3)
        summary["worst"] = max(good, key=lambda name: good[name]["pairs"])
    if "pairs" in rows.get(THIRD_PARTY, {}):
        summary["third_party"] = rows[THIRD_PARTY]["pairs"]
    return summary


def print_table(mode, devices, rows, summary):
    print(f"\n{mode}: ns per call\n{'operator':20}{devices[0]:>9}{devices[1]:>9}{'ratio':>8}{'pairs':>8}{'+ns':>8}")
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:20} {row['error']}")
        else:
            times = f"{row['first_ns']:9}{row['second_ns']:9}"
            print(f"{name:20}{times}{row['ratio']:8.3f}{row['pairs']:8.3f}{row['plus_ns']:8}")
    print(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in summary.items()), flush=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="cpu,flagos", help="two devices")
    parser.add_argument("--modes", default="no_grad,grad")
    parser.add_argument("--ops", default="", help="only operators whose name contains this")
    parser.add_argument("--repeat", type=int, default=200, help="pairs of batches per operator")
    parser.add_argument("--batch", type=int, default=50, help="calls per batch")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--add-overhead", action="store_true", help="only the 1-element add, in detail")
    parser.add_argument("--limit-ns", type=float, help="with --add-overhead: exit 1 when the difference is larger")
    parser.add_argument("--out", help="folder for dispatch.json")
    parser.add_argument("--json", type=Path, help="the same as a file of any name")
    options = parser.parse_args(argv)
    devices = options.pair.split(",")
    if len(devices) != 2:
        parser.error("--pair takes two devices, for example cpu,flagos")
    budget = common.Budget(options.limit)
    for device in devices:
        common.load(device)
    torch.set_num_threads(1)
    where = common.where(devices[1])
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    names = [n for n in OPS if options.ops in n] if not options.add_overhead else ["add 1 element"]
    repeat = 5000 if options.add_overhead else options.repeat
    modes = ["no_grad"] if options.add_overhead else options.modes.split(",")
    data = {"what": "host time per call; see benchmarks/dispatch.py", "pair": devices, "where": where}
    data |= {"repeat": repeat, "batch": options.batch, "modes": {}}
    if THIRD_PARTY in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                torch.ops.load_library(common.compile_operators("third_party", folder))
            except (OSError, RuntimeError) as error:
                print(error)
    gc.disable()
    for number, mode in enumerate(modes):
        share = common.Budget(budget.left() / (len(modes) - number))
        rows = run_mode(mode, devices, names, repeat, options.batch, share)
        summary = summarize(rows, len(names))
        data["modes"][mode] = {"summary": summary, "operators": rows}
        print_table(mode, devices, rows, summary)
        common.save(options.out, "dispatch.json", data)
        if options.json:
            common.save(options.json.parent, options.json.name, data)
    if options.add_overhead:
        plus = data["modes"]["no_grad"]["operators"]["add 1 element"]["plus_ns"]
        print(f"a 1-element add on {devices[1]} takes {plus} ns more than on {devices[0]}")
        return 1 if options.limit_ns is not None and plus > options.limit_ns else 0
    rows = [row for mode in data["modes"].values() for row in mode["operators"].values()]
    return 1 if len(rows) < len(names) * len(modes) or any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
