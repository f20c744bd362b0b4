#!/usr/bin/env python3
"""The op_db sweep: every OpInfo of the installed torch on a device, compared with the CPU.

    python tests/integration/ops/sweep.py --json benchmarks/results/opdb_host.json       # all of it, device flagos
    python tests/integration/ops/sweep.py --ops '^linalg' --dtypes float32 --modes forward,out
    python tests/integration/ops/sweep.py --dtypes float32 --corrupt                     # negative control: must turn
    red

Modes: forward (values, dtype, sizes, strides, aliasing), backward, out (right size, empty, strided), inplace. Workers
are processes of their own: a crash is recorded and the sweep goes on. Exit code 0 only when nothing failed but what
known_failures.py lists, all of that did fail, nothing crashed and no operator reached the copying CPU fallback.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from known_failures import KNOWN_FAILURES  # noqa: E402

from tests.common import opdb, workers  # noqa: E402
from tests.common.devices import chip_name, fallback_counts, load_device, versions  # noqa: E402


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="flagos")
    parser.add_argument("--modes", default=",".join(opdb.MODES))
    parser.add_argument("--dtypes", default="all", help="all | first | float32,int64,...")
    parser.add_argument("--samples", type=int, default=6, help="samples per operator and dtype, before layout variants")
    parser.add_argument("--no-variants", action="store_true", help="leave out the awkward layouts")
    parser.add_argument("--ops", default="", help="regular expression on OpInfo's full name")
    parser.add_argument("--shard", default="0/1", help="i/n: this part of the operators")
    parser.add_argument("--fraction", type=float, default=1.0, help="a fixed part of the (operator, dtype) pairs")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds without a sign of life = a hang")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--corrupt", action="store_true", help="perturb the device's inputs: checks must turn red")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.modes = options.modes.split(",")
    unknown = set(options.modes) - set(opdb.MODES)
    if unknown:
        parser.error(f"unknown mode {sorted(unknown)[0]}; modes are {', '.join(opdb.MODES)}")
    if options.samples < 1:
        parser.error("--samples must be at least 1")
    return options


def select(options) -> list[dict]:
    """The tasks: one per (operator, dtype). --fraction keeps a pair by a hash of its name, so it never changes."""
    shard, shards = (int(part) for part in options.shard.split("/"))
    names = [name for name in opdb.ops_by_name() if re.search(options.ops, name)]
    tasks = []
    for name in names[shard::shards]:
        for dtype in opdb.parse_dtypes(options.dtypes, opdb.ops_by_name()[name]):
            text = str(dtype).split(".")[1]
            if zlib.crc32(f"{name} {text}".encode()) / 2**32 < options.fraction:
                tasks.append({"op": name, "dtype": text, "modes": options.modes, "skip": []})
    return tasks


def work(options) -> None:
    """A worker process."""
    channel = workers.Channel()
    torch.set_num_threads(1)
    load_device(options.device)
    ops = opdb.ops_by_name()
    for task in channel.tasks():
        before = fallback_counts()
        results = opdb.check_op(
            ops[task["op"]],
            getattr(torch, task["dtype"]),
            options.device,
            task["modes"],
            options.samples,
            not options.no_variants,
            {tuple(pair) for pair in task["skip"]},
            options.corrupt,
            channel.at,
        )
        after = fallback_counts()
        reached = {op: n - before.get(op, 0) for op, n in after.items() if n > before.get(op, 0)}
        channel.done({"modes": {mode: result.as_dict() for mode, result in results.items()}, "fallbacks": reached})


class Report:
    """Collects results; knows which failures were expected."""

    def __init__(self, chip, total, quiet):
        self.chip, self.total, self.quiet = chip, total, quiet
        self.start = time.monotonic()
        self.finished = 0
        self.modes = {}
        self.failures, self.expected, self.crashes, self.cpu_crashes = [], [], [], []
        self.cpu_failed = {}
        self.fallbacks = {}
        self.ran = set()  # (op, dtype, mode) with at least one counted case

    def add(self, task, result):
        self.finished += 1
        for mode, counts in result["modes"].items():
            total = self.totals(mode)
            for key in ("cases", "passed", "bit_equal"):
                total[key] += counts.get(key, 0)
            if counts.get("cases"):
                total["names"].add(task["op"])
                self.ran.add((task["op"], task["dtype"], mode))
            for reason, times in counts.get("cpu_failed", {}).items():
                total["cpu_failed"] += times
                self.cpu_failed.setdefault(mode, {})
                self.cpu_failed[mode][reason] = self.cpu_failed[mode].get(reason, 0) + times
            for failure in counts.get("failures", []):
                self.fail(task, mode, failure["case"], failure["message"])
        for op, times in result["fallbacks"].items():
            self.fallbacks[op] = self.fallbacks.get(op, 0) + times
        if not self.quiet and sys.stderr.isatty():
            print(f"\r{self.finished}/{self.total} {task['op'][:50]:50}", end="", file=sys.stderr)

    def totals(self, mode):
        if mode not in self.modes:
            self.modes[mode] = {"names": set(), "ops": 0, "cases": 0, "passed": 0, "bit_equal": 0, "cpu_failed": 0}
        return self.modes[mode]

    def fail(self, task, mode, case, message):
        record = {"op": task["op"], "dtype": task["dtype"], "mode": mode, "case": case, "message": message}
        known = next((k for k in KNOWN_FAILURES if k.covers(*list(record.values())[:4], self.chip)), None)
        if known:
            self.expected.append({**record, "reason": known.reason})
            return
        self.failures.append(record)
        if not self.quiet:
            print(f"FAIL {task['op']} {task['dtype']} {mode} {case}: {message}", flush=True)

    def crash(self, crash):
        """Records it and returns the task without the case that crashed."""
        mode, case, side = crash.at or ("start", "", "device")
        task = crash.task
        record = {"op": task["op"], "dtype": task["dtype"], "mode": mode, "case": case, "message": crash.how}
        (self.crashes if side == "device" else self.cpu_crashes).append({**record, "stderr": crash.tail})
        where = f"CRASH{' of the CPU itself' if side == 'cpu' else ''} {task['op']} {task['dtype']} {mode} {case}"
        print(f"{where}: {crash.how}: {' | '.join(crash.tail)[-300:]}", flush=True)
        if mode in ("start", "samples") or len(task["skip"]) > 20:
            self.finished += 1
            return None
        total = self.totals(mode)
        total["cases" if side == "device" else "cpu_failed"] += 1
        return {**task, "skip": [*task["skip"], [mode, case]]}

    def unexpected_passes(self):
        """Known failures whose pairs ran and none of which failed."""
        stale = []
        for known in KNOWN_FAILURES:
            if known.chip not in (None, self.chip):
                continue
            ran = any(op == known.op and mode == known.mode for op, _, mode in self.ran)
            hit = any(
                e["op"] == known.op and e["mode"] == known.mode and e["reason"] == known.reason for e in self.expected
            )
            if ran and not hit:
                stale.append(f"{known.op} {known.mode}: {known.reason}")
        return stale

    def summary(self):
        modes = {}
        for mode, total in self.modes.items():
            row = {k: v for k, v in total.items() if k != "names"}
            row["ops"] = len(total["names"])
            row["percent"] = round(100 * row["passed"] / row["cases"], 4) if row["cases"] else None
            modes[mode] = row
        return modes


def run(options) -> Report:
    tasks = select(options)
    report = Report(chip_name(options.device), len(tasks), options.quiet)
    command = [sys.executable, __file__, "--worker", "--device", options.device, "--samples", str(options.samples)]
    command += ["--no-variants"] * options.no_variants + ["--corrupt"] * options.corrupt
    workers.run_tasks(command, tasks, report.add, report.crash, options.jobs, options.timeout)
    return report


def main(argv=None) -> int:
    options = arguments(argv)
    if options.worker:
        work(options)
        return 0
    report = run(options)
    seconds = time.monotonic() - report.start
    stale = report.unexpected_passes() if options.fraction >= 1 and not options.corrupt else []
    print(
        f"\nop_db on {options.device} ({report.chip}), torch {torch.__version__}, "
        f"{report.finished} (operator, dtype) pairs"
    )
    print(f"{'mode':10}{'ops':>6}{'cases':>9}{'passed':>9}{'%':>9}{'bit-equal':>11}{'CPU fails':>11}")
    for mode, row in report.summary().items():
        print(
            f"{mode:10}{row['ops']:6}{row['cases']:9}{row['passed']:9}{row['percent'] or 0:9.3f}"
            f"{row['bit_equal']:11}{row['cpu_failed']:11}"
        )
    print(f"failures {len(report.failures)} (known {len(report.expected)}), crashes {len(report.crashes)}, ", end="")
    print(f"operators on the CPU fallback {len(report.fallbacks)}, {seconds:.0f} s")
    for line in stale:
        print(f"unexpected pass: {line}")
    if options.json:
        write_json(options, report, stale, seconds)
    if options.corrupt:
        cases = sum(row["cases"] for row in report.summary().values())
        red = len(report.failures) + len(report.expected) + len(report.crashes)
        print(f"negative control: {100 * red / max(cases, 1):.1f} % of the cases turned red")
        return 0 if red > cases / 2 else 1
    return 1 if report.failures or report.crashes or report.fallbacks or stale else 0


def write_json(options, report, stale, seconds):
    shown = {k: v for k, v in vars(options).items() if k not in ("json", "worker", "quiet", "jobs", "timeout")}
    data = {
        "what": "op_db sweep, device against CPU; see tests/integration/ops/sweep.py",
        "versions": versions(options.device),
        "options": shown,
        "seconds": round(seconds),
        "pairs": report.finished,
        "modes": report.summary(),
        "failures": report.failures,
        "known_failures": report.expected,
        "unexpected_passes": stale,
        "crashes": report.crashes,
        "cpu_crashes": [{k: c[k] for k in ("op", "dtype", "mode", "case", "message")} for c in report.cpu_crashes],
        "cpu_fallbacks": report.fallbacks,
        # Why the CPU itself fails cases (not counted): the commonest reasons.
        "cpu_failed": {
            mode: dict(sorted(reasons.items(), key=lambda item: -item[1])[:12])
            for mode, reasons in report.cpu_failed.items()
        },
    }
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
