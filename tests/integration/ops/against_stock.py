#!/usr/bin/env python3
"""op_db on flagos against the stock device whose kernels it uses: the same bits, and nothing that stock can do missing.

    python tests/integration/ops/against_stock.py --json benchmarks/results/opdb_cuda.json        # cuda, on a GPU
    python tests/integration/ops/against_stock.py --stock cpu --dtypes float32 --ops '^linalg'    # on the host chip

Each device computes in processes of its own and gives digests: stock CUDA autograd beside flagos in one process can
fail inside torch. Where the digests differ, stock runs the case six times more and both run it with
torch.use_deterministic_algorithms. A kernel that is not deterministic is known by that: stock's own results vary, or
torch refuses it there, or what torch takes in its place gives the same bits on both. Such cases are compared by sums
and listed with their reason; every other difference is a failure. Only cases that stock passes count. Exit code 0 when
every one of them passes on flagos and none of them reached the copying CPU fallback. The result file is renewed as the
run goes on.

On the null CUDA (tests/null_cuda; no GPU) kernels compute nothing. There a case passes when it launches the same
kernels with the same grids, copies the same bytes and gives results of the same type, size and layout.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402

from benchmarks import common  # noqa: E402
from tests.common import null_cuda, opdb, workers  # noqa: E402
from tests.common.compare import first_lines, to_host  # noqa: E402
from tests.common.devices import fallback_counts, load_device, versions  # noqa: E402
from tests.common.samples import copy_tree, tensors_in, tree_map  # noqa: E402

MODES = ("forward", "backward", "out", "inplace")
REPEATS = 6
# (operator, dtype, mode) of which stock is no measure.
NO_MEASURE = {
    # Of one dimension torch computes it and leaves out= as it was; for half flagos writes it there.
    ("fft.ihfftn", "float16", "out"),
}


# ---- one device's side ---------------------------------------------------------------------------------------------


def dtypes_of(op, stock: str, wanted: str) -> list[torch.dtype]:
    supported = op.supported_dtypes(stock)
    if wanted != "all":
        supported = {d for d in supported if str(d).split(".")[1] in wanted.split(",")}
    return sorted(supported, key=str)


def run_mode(op, sample, mode: str, device: str):
    """The tensors that a case leaves; NotCounted when the sample has no such case."""
    nest = copy_tree(sample.nest(), device, mode == "backward")
    for position in opdb.CPU_ARGUMENTS.get(opdb.op_name(op), ()):
        args = list(nest[1])
        args[position] = copy_tree(sample.args[position], "cpu")
        nest = (nest[0], tuple(args), nest[2])
    if device != "cpu" and not tensors_in(nest) and "device" not in sample.kwargs:
        raise opdb.NotCounted("nothing in this sample names a device")
    torch.manual_seed(sample.seed)
    if mode == "inplace":
        if sample.broadcasts or not isinstance(nest[0], torch.Tensor):
            raise opdb.NotCounted("no in-place case")
        return [op.inplace_variant(nest[0], *nest[1], **nest[2])]
    output = op(nest[0], *nest[1], **nest[2])
    if mode == "forward":
        unwritten = opdb.UNWRITTEN_RESULTS.get(opdb.op_name(op), ())
        return [torch.zeros_like(t) if i in unwritten else t for i, t in enumerate(tensors_in(output))]
    if mode == "out":
        if not isinstance(output, (torch.Tensor, tuple, list)):
            raise opdb.NotCounted("no tensor result")
        out = tree_map(lambda t: opdb.make_out(t, "same", device), output)
        torch.manual_seed(sample.seed)
        op(nest[0], *nest[1], **nest[2], out=out)
        return tensors_in(out)
    if sample.kwargs.get("cu_seqlens_k") is not None:  # they end before the last keys
        raise opdb.NotCounted("no kernel writes the gradients of keys that are in no sequence")
    if sample.process is not None:
        output = sample.process(output)
    outputs = [t for t in tensors_in(output) if t.requires_grad]
    leaves = [t for t in tensors_in(nest) if t.requires_grad]
    if not outputs or not leaves:
        raise opdb.NotCounted("no gradient")
    generator = torch.Generator().manual_seed(sample.seed)
    seeds = [opdb.gradient_for(t, generator, device) for t in outputs]
    return [g for g in torch.autograd.grad(outputs, leaves, seeds, allow_unused=True) if g is not None]


def digest(tensors, values: bool, log: str = "") -> tuple[str, list[float]]:
    """(hash of `log`, dtypes, sizes, strides and with `values` bytes; sums for a comparison of results that vary)."""
    total, sums = hashlib.sha1(log.encode(), usedforsecurity=False), []
    for tensor in tensors:
        total.update(repr((tensor.dtype, tuple(tensor.shape), tensor.layout)).encode())
        if tensor.layout is torch.strided and not tensor.is_nested:
            total.update(repr(tensor.stride()).encode())
        if not values:
            continue
        host = to_host(tensor.detach())
        parts = [host]
        if host.layout is torch.sparse_coo:
            host = host.coalesce()
            parts = [host.indices(), host.values()]
        elif host.layout is not torch.strided or host.is_nested:
            parts = [host.values()]
        for part in parts:
            part = part.int_repr() if part.is_quantized else part.resolve_conj().resolve_neg()
            # clone: contiguous() leaves a stride other than 1 on a dimension of size 1, which view(dtype) refuses
            part = part.clone(memory_format=torch.contiguous_format)
            total.update(part.reshape(-1).view(torch.uint8).numpy().tobytes())
            if part.is_floating_point() or part.is_complex():
                wide = part.abs().to(torch.float64)
                sums.append(float(torch.nan_to_num(wide, posinf=0).sum()))
    return total.hexdigest(), sums


def work(options) -> None:
    """A worker process: cases of (operator, dtype) tasks to ["ok", digest, sums] or ["error", text]. Of a task with
    "only" these cases alone run, "times" times, and ["ok", digest, sums, whether all are the same] comes of them."""
    channel = workers.Channel()
    torch.set_num_threads(1)
    load_device(options.device)
    ops = opdb.ops_by_name()
    if options.device == "flagos":
        for op in ops.values():  # torch.cuda's functions of C++ strings take tensors of cuda alone
            if isinstance(op.op, torch.cuda.jiterator._JittedFunction):
                op.op = torch.flagos.jiterator._JittedFunction(op.op, op.op.return_by_ref, op.op.kwargs_dict)
    warnings.simplefilter("ignore")
    if null_cuda.active():
        torch.backends.cuda.enable_cudnn_sdp(False)  # needs cuDNN's graphs, which the null CUDA has not

    def observed(values, *arguments):
        if not null_cuda.active():
            return digest(run_mode(*arguments), values)
        log, tensors = null_cuda.launches(lambda: run_mode(*arguments))
        if options.show:
            print("\n".join(log), file=sys.stderr, flush=True)
        return digest(tensors, False, "\n".join(log))  # the bytes of results are what lay in the memory before

    torch.utils.deterministic.fill_uninitialized_memory = False  # no part of what a kernel gives
    for task in channel.tasks():
        op, dtype = ops[task["op"]], getattr(torch, task["dtype"])
        values = opdb.op_name(op).split(".")[0] not in opdb.UNINITIALIZED
        torch.use_deterministic_algorithms("deterministic" in task)
        cases, reached = {}, {}
        channel.at("samples", "")
        modes = [m for m in task["modes"] if mode_exists(op, dtype, m, options.stock)]
        try:
            samples = opdb.make_samples(op, dtype, options.samples, "backward" in modes, options.variants)
        except Exception:
            samples, modes = [], []
        for mode in modes:
            for sample in samples:
                name = f"{mode} {sample.label}"
                if name in task["skip"] or name not in task.get("only", [name]):
                    continue
                channel.at(mode, sample.label)
                before = fallback_counts()
                try:
                    runs = [observed(values, op, sample, mode, options.device) for _ in range(task.get("times", 1))]
                    cases[name] = ["ok", *runs[0], all(run[0] == runs[0][0] for run in runs)]
                except opdb.NotCounted:
                    continue
                except torch.AcceleratorError as error:
                    workers.leave(error)
                except Exception as error:
                    cases[name] = ["error", first_lines(error, 200)]
                if more := {op: n - before.get(op, 0) for op, n in fallback_counts().items() if n > before.get(op, 0)}:
                    reached[name] = more
        channel.done({"cases": cases, "fallbacks": reached})


def mode_exists(op, dtype, mode: str, stock: str) -> bool:
    if (opdb.op_name(op), str(dtype).split(".")[1], mode) in NO_MEASURE:
        return False
    if mode == "backward":
        return op.supports_autograd and dtype in op.supported_backward_dtypes(stock)
    return {"forward": True, "out": op.supports_out, "inplace": op.inplace_variant is not None}[mode]


# ---- both sides ----------------------------------------------------------------------------------------------------


def key(task) -> str:
    return f"{task['op']} {task['dtype']}"


class Side:
    """What a device gave so far: cases by (operator, dtype), those that ran again with deterministic algorithms, and
    (operator, dtype) -> case -> operators on the CPU fallback."""

    def __init__(self, options, device: str):
        self.options, self.device = options, device
        self.results: dict[str, dict] = {}
        self.deterministic: dict[str, dict] = {}
        self.fallbacks: dict[str, dict] = {}
        self.environment = dict(os.environ)
        if device == options.stock:
            self.environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

    def run(self, tasks, jobs: int, end: float, done=lambda: None, deterministic: bool = False) -> None:
        """Runs tasks; none is begun after `end` (time.monotonic). `done` is called after each."""
        o = self.options
        results = self.deterministic if deterministic else self.results
        environment = self.environment | ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if deterministic else {})
        command = [sys.executable, __file__, "--worker", "--device", self.device, "--stock", o.stock]
        command += ["--samples", str(o.samples)] + ["--variants"] * o.variants + ["--show"] * o.show

        def answered(task, answer):
            results.setdefault(key(task), {}).update(answer["cases"])
            if not deterministic:
                self.fallbacks.setdefault(key(task), {}).update(answer["fallbacks"])
            done()

        def crashed(crash):
            mode, label = crash.at or ("samples", "")
            name = f"{mode} {label}"
            said = f"crash: {crash.how}: {' | '.join(crash.tail)[-150:]}"
            results.setdefault(key(crash.task), {})[name] = ["error", said]
            if mode == "samples" or len(crash.task["skip"]) > 20:
                return None
            return {**crash.task, "skip": [*crash.task["skip"], name]}

        workers.run_tasks(command, tasks, answered, crashed, jobs, 120.0, environment, end)


def differing(stock: Side, ours: Side, tasks, **changes) -> list:
    """Tasks that run those cases again whose digests differ although stock's are the same every time."""
    again = []
    for task in tasks:
        cases, here = (side.results.get(key(task), {}) for side in (stock, ours))
        both = [n for n, c in cases.items() if c[0] == "ok" and here.get(n, [""])[0] == "ok"]
        if only := [n for n in both if here[n][1] != cases[n][1] and cases[n][3]]:
            again.append({**task, "only": only, **changes})
    return again


def why_unsteady(pair: str, name: str, stock: Side, ours: Side) -> str:
    """By what a kernel is known that is not deterministic; empty when nothing says so."""
    if not stock.results[pair][name][3]:
        return "stock varies"
    there, here = (side.deterministic.get(pair, {}).get(name, ["", ""]) for side in (stock, ours))
    if there[0] == here[0] == "ok" and there[1] == here[1]:
        return "the same bits with deterministic algorithms"
    if "does not have a deterministic implementation" in there[1]:
        return "no deterministic kernel"
    return ""


def close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=2e-2, abs_tol=1e-2) for x, y in zip(a, b, strict=True))


def judge(stock: Side, ours: Side) -> dict:
    """Per mode: cases that stock passes, how many pass here, how many of the steady ones are bit-equal; failures; the
    cases that are not steady, by reason; operators that the CPU served."""
    modes, failures, unsteady, on_cpu = {}, [], {}, {}
    for pair in sorted(set(stock.results) & set(ours.results)):
        for name, case in dict(stock.results[pair]).items():
            mode = name.split(" ")[0]
            if mode == "samples":
                continue
            row = modes.setdefault(mode, {"stock_fails": 0, "cases": 0, "passed": 0, "steady": 0, "bit_equal": 0})
            if case[0] != "ok":
                row["stock_fails"] += 1
                continue
            row["cases"] += 1
            here = ours.results[pair].get(name, ["error", "no such case on flagos"])
            same = here[0] == "ok" and here[1] == case[1]
            why = "" if same or here[0] != "ok" else why_unsteady(pair, name, stock, ours)
            if why:
                unsteady.setdefault(why, []).append(f"{pair} {name}")
            row["steady"] += not why
            row["bit_equal"] += same
            passed = same or (why != "" and close(case[2], here[2]))
            row["passed"] += passed
            if not passed:
                said = here[1] if here[0] != "ok" else f"sums {here[2]}, stock's {case[2]}" if why else "other bits"
                failures.append({"pair": pair, "case": name, "message": said[:300]})
            for op, count in ours.fallbacks.get(pair, {}).get(name, {}).items():
                on_cpu[op] = on_cpu.get(op, 0) + count
    for row in modes.values():
        row["percent"] = round(100 * row["passed"] / row["cases"], 4) if row["cases"] else None
    return {"modes": modes, "failures": failures, "unsteady": unsteady, "cpu_fallbacks": on_cpu}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", default="cuda")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--dtypes", default="all", help="all | float32,int64,...")
    parser.add_argument("--samples", type=int, default=4, help="samples per operator and dtype")
    parser.add_argument("--variants", action="store_true", help="also the awkward layouts")
    parser.add_argument("--ops", default="", help="regular expression on OpInfo's full name")
    parser.add_argument("--fraction", type=float, default=1.0, help="a fixed part of the (operator, dtype) pairs")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--limit", type=float, default=450, help="seconds for everything")
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--show", action="store_true", help="on the null CUDA: what each case launches, on stderr")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        work(options)
        return 0
    tasks = []
    for name, op in opdb.ops_by_name().items():
        if not re.search(options.ops, name):
            continue
        for dtype in dtypes_of(op, options.stock, options.dtypes):
            text = str(dtype).split(".")[1]
            if zlib.crc32(f"{name} {text}".encode()) / 2**32 < options.fraction:
                tasks.append({"op": name, "dtype": text, "modes": options.modes.split(","), "skip": []})
    # In an order that has nothing to do with names: what a time limit cuts off is then a fair sample.
    tasks.sort(key=lambda task: zlib.crc32(f"{task['op']}{task['dtype']}".encode()))
    start = time.monotonic()
    stock, ours = Side(options, options.stock), Side(options, "flagos")
    load_device("flagos")
    shown = {k: v for k, v in vars(options).items() if k not in ("json", "worker", "device", "jobs")}
    data = {"what": "op_db, flagos against stock; see tests/integration/ops/against_stock.py"}
    data |= {"versions": versions("flagos"), "options": shown, "tasks": len(tasks)}
    written = [start]

    def save(finished=False):
        if not options.json or (not finished and time.monotonic() - written[0] < 15):
            return
        both = len(set(stock.results) & set(ours.results))
        data.update(finished=finished, seconds=round(time.monotonic() - start), pairs=both, **judge(stock, ours))
        common.save(Path(options.json).parent, Path(options.json).name, data)
        written[0] = time.monotonic()

    # Both at once, over the same order, so that at any time what one has the other has too.
    end = start + options.limit * 0.88
    jobs = max(1, options.jobs // 2)
    first = threading.Thread(target=stock.run, args=(tasks, jobs, end))
    first.start()
    ours.run(tasks, max(1, options.jobs - jobs), end, save)
    first.join()
    stock.run(differing(stock, ours, tasks, times=REPEATS), options.jobs, start + options.limit - 5)
    if not null_cuda.active():  # there a difference is in what was launched
        again = differing(stock, ours, tasks, deterministic=True)
        for side in (stock, ours):
            side.run(again, options.jobs, start + options.limit - 5, deterministic=True)
    result = judge(stock, ours)
    save(finished=True)
    seconds, fallbacks = time.monotonic() - start, result["cpu_fallbacks"]
    both = len(set(stock.results) & set(ours.results))
    print(f"op_db on flagos against stock {options.stock}: {both} of {len(tasks)} (operator, dtype) pairs")
    print(f"{'mode':10}{'cases':>9}{'passed':>9}{'%':>9}{'steady':>9}{'bit-equal':>11}{'stock fails':>13}")
    for mode, row in result["modes"].items():
        print(
            f"{mode:10}{row['cases']:9}{row['passed']:9}{row['percent'] or 0:9.3f}{row['steady']:9}"
            f"{row['bit_equal']:11}{row['stock_fails']:13}"
        )
    print(f"failures {len(result['failures'])}, operators on the CPU fallback {len(fallbacks)}, {seconds:.0f} s")
    for failure in result["failures"][:40]:
        print(f"FAIL {failure['pair']} {failure['case']}: {failure['message'][:160]}")
    for why, cases in result["unsteady"].items():
        print(f"not steady, {why}: {', '.join(cases)}")
    if fallbacks:
        print(f"on the CPU: {fallbacks}")
    return 1 if result["failures"] or fallbacks or not result["modes"] else 0


if __name__ == "__main__":
    sys.exit(main())
