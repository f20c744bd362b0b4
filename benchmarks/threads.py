#!/usr/bin/env python3
"""Eight threads on one device: calls on a shared weight, and backward through it. Errors must be 0.

    python benchmarks/threads.py --out benchmarks/results                       # cuda against flagos on a GPU
    python benchmarks/threads.py --pair cpu,flagos --calls 20000 --limit 60     # tries it on a machine without one

`calls`: each thread multiplies its own matrix by the shared weight, 10^6 times in all, and checks results as it goes.
The loop is TorchScript, which holds no lock of Python's, so that the threads really meet inside torch. `python`: the
same from Python, where they wait for each other, a tenth as often. `backward`: each thread runs forward and backward;
the shared weight's gradient must be the exact sum (small integers in float32). `churn`: tensors made in one thread and
dropped in another. Each device has a process of its own.
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import torch  # noqa: E402

from benchmarks import common  # noqa: E402


def in_threads(count: int, work) -> tuple[float, list[str]]:
    """(seconds, errors) of `work(thread number)` in `count` threads that start together."""
    errors: list[str] = []
    start = threading.Barrier(count + 1)

    def run(number):
        start.wait()
        try:
            work(number)
        except Exception as error:
            errors.append(f"thread {number}: {type(error).__name__}: {str(error).splitlines()[0]}")

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, errors


SPAN = 500  # calls between two checks


@torch.jit.script
def products(x, weight, count: int):
    for _ in range(count):
        x = torch.mm(x, weight)
    return x


def products_from_python(x, weight, count):
    for _ in range(count):
        x = torch.mm(x, weight)
    return x


def multiply(options, budget, function, total) -> dict:
    """`total` products with one shared weight. It turns the columns by one, so that every result is exactly known."""
    device, each = options.device, max(1, total // options.threads // SPAN) * SPAN
    weight = torch.eye(16).roll(1, 1).to(device)
    done = [0] * options.threads

    def work(number):
        host = torch.arange(256.0).view(16, 16) + number
        x = host.to(device)
        with torch.no_grad():
            while done[number] < each and budget.left() > 0:
                x = function(x, weight, SPAN)
                done[number] += SPAN
                if not torch.equal(x.cpu(), host.roll(done[number], 1)):
                    raise AssertionError(f"after {done[number]} calls the matrix starts {x.flatten()[:4].tolist()}")

    seconds, errors = in_threads(options.threads, work)
    count = sum(done)
    asked = each * options.threads
    return {"calls": count, "asked": asked, "seconds": seconds, "per_second": count / seconds, "errors": errors}


def calls(options, budget) -> dict:
    return multiply(options, budget, products, options.calls)


def python(options, budget) -> dict:
    return multiply(options, budget, products_from_python, options.calls // 10)


def backward(options, budget) -> dict:
    device = options.device
    weight = torch.ones(16, 16, device=device, requires_grad=True)
    rounds = max(1, min(2000, options.calls // 500))
    done = [0] * options.threads

    def work(number):
        x = torch.ones(4, 16, device=device)
        for k in range(rounds):
            (x @ weight).sum().backward()  # adds 4 to every element of weight.grad
            done[number] = k + 1
            if k % 50 == 0 and budget.left() < 0:
                return

    seconds, errors = in_threads(options.threads, work)
    total = sum(done)
    gradient = weight.grad.cpu()
    if not torch.equal(gradient, torch.full((16, 16), 4.0 * total)):
        errors.append(
            f"after {total} backward passes the gradient is {gradient.flatten()[:3].tolist()}, not {4.0 * total}"
        )
    return {"backward": total, "seconds": seconds, "per_second": total / seconds, "errors": errors}


def churn(options, budget) -> dict:
    """Half of the threads make tensors, the other half check and drop them."""
    device, half = options.device, max(1, options.threads // 2)
    rounds = max(1, options.calls // 100)
    channels = [queue.Queue(maxsize=64) for _ in range(half)]
    done = [0] * half

    def work(number):
        channel = channels[number % half]
        if number < half:
            try:
                for k in range(rounds):
                    if budget.left() < 0:
                        break
                    channel.put((k, torch.full((1 + (k * 37) % 3000,), float(k % 1000), device=device)))
            finally:
                channel.put(None)
        else:
            wrong = None
            while (item := channel.get()) is not None:  # to the end, or the other thread would wait for ever
                k, tensor = item
                if wrong is None and k % 100 == 0 and not bool((tensor == k % 1000).all()):
                    wrong = f"tensor {k} holds {tensor[:3].tolist()}"
                done[number % half] = k + 1
            if wrong:
                raise AssertionError(wrong)

    seconds, errors = in_threads(2 * half, work)
    return {"tensors": sum(done), "seconds": seconds, "per_second": sum(done) / seconds, "errors": errors}


PARTS = {"calls": calls, "python": python, "backward": backward, "churn": churn}


class Work:
    """What a worker can be asked."""

    def __init__(self, options):
        common.load(options.device)
        self.options = options

    def run(self, part, seconds):
        return PARTS[part](self.options, common.Budget(seconds))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="cuda,flagos", help="two devices: stock, ours")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=1_000_000, help="calls of all threads together")
    parser.add_argument("--limit", type=float, default=300, help="seconds for everything")
    parser.add_argument("--out", help="folder for threads.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        common.serve(Work(options))
        return 0
    budget = common.Budget(options.limit)
    devices = options.pair.split(",")
    common.load(devices[1])
    data = {"what": "threads on one device; see benchmarks/threads.py", "pair": devices, "threads": options.threads}
    data |= {"where": common.where(devices[1]), "limit": options.limit, "parts": {part: {} for part in PARTS}}
    print(", ".join(f"{k} {v}" for k, v in data["where"].items()), flush=True)
    script = str(Path(__file__).resolve())
    failed = False
    arguments = ["--threads", str(options.threads), "--calls", str(options.calls)]
    with common.workers(script, arguments, devices) as pair:
        turns = [(part, which) for part in PARTS for which in (1, 0)]
        for number, (part, which) in enumerate(turns):
            seconds = max(2.0, budget.left() - 10 - 4 * (len(turns) - number - 1))  # no turn but the first needs more
            result = pair[which].ask("run", budget, part=part, seconds=seconds)
            problems = result.get("errors", []) + ([result["error"]] if "error" in result else [])
            failed |= which == 1 and bool(problems or result.get("calls", 0) < result.get("asked", 0))
            data["parts"][part][devices[which]] = result
            counted = next((f"{result[k]} {k}" for k in ("calls", "backward", "tensors") if k in result), "nothing")
            speed = result.get("per_second", 0)
            print(f"{part:9} {devices[which]:7} {counted}, {speed:.0f}/s, {len(problems)} errors", flush=True)
            for problem in problems[:3]:
                print(f"          {problem}")
            common.save(options.out, "threads.json", data)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
