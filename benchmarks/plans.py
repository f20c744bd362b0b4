"""Host time of one call of FlagGems' Python kernels: from a launch plan, and in Python; the native kernel beside them.

    python benchmarks/plans.py --json benchmarks/results/plans_time_cuda.json        # a GPU
    python benchmarks/plans.py --json FILE               # no GPU: the null CUDA of the tests

Microseconds that the calling thread spends on a call whose kernel runs later. The three ways take turns in one process,
so that each round compares neighbours; ratios are medians over the rounds. `passed on` is a call that the limits of
flagos_python send to the native kernel. On the null CUDA a launch costs next to nothing, which a real one does not.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from benchmarks import common  # noqa: E402
from tests.common import null_cuda  # noqa: E402

WAYS = ("native", "plan", "python", "passed on")
TARGET = 1.3  # plan over native, median of the operators
ROWS, COLUMNS = 8, 64  # small: the device is never the slower one


def operators() -> dict:
    """operator -> a call of it with arguments that stay the same"""
    x, y = (torch.randn(ROWS, COLUMNS, device="flagos") for _ in range(2))
    positive, weight = x.abs() + 1, torch.randn(COLUMNS, device="flagos")
    table, rows = torch.randn(100, COLUMNS, device="flagos"), torch.arange(ROWS, device="flagos")
    mask, where = x > 0, torch.randint(COLUMNS, (ROWS, 4), device="flagos")
    return {
        "add.Tensor": lambda: x + y,
        "mul.Tensor": lambda: x * y,
        "silu": lambda: F.silu(x),
        "_softmax": lambda: torch.softmax(x, -1),
        "mean.dim": lambda: x.mean(-1, keepdim=True),
        "pow.Tensor_Scalar": lambda: x.pow(2),
        "rsqrt": lambda: torch.rsqrt(positive),
        "native_layer_norm": lambda: F.layer_norm(x, (COLUMNS,), weight),
        "embedding": lambda: F.embedding(rows, table),
        "where.self": lambda: torch.where(mask, x, y),
        "cat": lambda: torch.cat([x, y]),
        "gather": lambda: torch.gather(x, 1, where),
    }


class Way:
    """Sends an operator one way while it is entered."""

    def __init__(self, op: str, way: str):
        self.op, self.way = op, way

    def __enter__(self):
        import torch_fl

        backends = {"native": torch_fl.chip(), "passed on": "flagos_python [numel<=1]"}
        torch_fl.set_route(self.op, backends.get(self.way, "flagos_python"))
        torch_fl.plans.use(self.way != "python")

    def __exit__(self, *_):
        import torch_fl

        torch_fl.plans.use(True)
        torch_fl.set_route(self.op, None)


def timed(call, calls: int) -> float:
    """Microseconds per call on this thread."""
    torch.flagos.synchronize()
    begin = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - begin) / calls / 1000


def hits(op: str) -> int:
    import torch_fl

    return torch_fl.plans.counts().get(op, {"hits": 0})["hits"]


def measure(op: str, call, rounds: int, calls: int) -> dict:
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        order = WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]
        for way in order:
            with Way(op, way):
                for _ in range(6):  # the first round compiles and records
                    call()
                before = hits(op)
                times[way].append(timed(call, calls))
                replayed = hits(op) - before
                if replayed != (calls if way == "plan" else 0):
                    raise RuntimeError(f"{replayed} of {calls} calls were replayed on the way '{way}'")
    row = {f"{way} us": round(statistics.median(times[way]), 2) for way in WAYS}
    for way in WAYS[1:]:
        ratios = [a / b for a, b in zip(times[way], times["native"], strict=True)]
        row[f"{way} / native"] = round(statistics.median(ratios), 3)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--calls", type=int, default=200, help="calls between two readings of the clock")
    parser.add_argument("--ops", nargs="*", help="operators; default: all of them")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    code = null_cuda.run_again()
    if code is not None:
        return code
    import torch_fl

    warnings.simplefilter("ignore")  # a kernel that is known to be wrong says so when it is asked for by name
    torch.set_grad_enabled(False)
    rows, failed = {}, {}
    shown = [f"{way} us" for way in WAYS] + [f"{way} / native" for way in WAYS[1:]]
    print(f"{'operator':20}" + "".join(f"{name:>19}" for name in shown))
    for op, call in operators().items():
        if options.ops and op not in options.ops:
            continue
        try:
            rows[op] = measure(op, call, options.rounds, options.calls)
        except Exception as error:
            failed[op] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"{op:20} {failed[op]}", flush=True)
            continue
        print(f"{op:20}" + "".join(f"{rows[op][name]:19}" for name in shown), flush=True)
    medians = {name: round(statistics.median(row[name] for row in rows.values()), 3) for name in shown if rows}
    print(f"{'median':20}" + "".join(f"{medians[name]:19}" for name in shown if rows))
    if options.json:
        where = common.where("flagos")
        if null_cuda.active():
            where["gpu"] = "none: null CUDA, kernels do nothing"
        data = {"what": "host microseconds per call; see benchmarks/plans.py", "where": where}
        data |= {"date": datetime.date.today().isoformat(), "flag_gems": torch_fl.integration.installed_version()}
        data |= {"rounds": options.rounds, "calls": options.calls, "target": f"plan / native <= {TARGET}"}
        data |= {"median": medians, "operators": rows, "failed": failed}
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0 if rows and not failed and medians["plan / native"] <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
