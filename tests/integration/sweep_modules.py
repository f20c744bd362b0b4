#!/usr/bin/env python3
"""module_db (forward, backward) and optim_db (default, for-loop, foreach, fused) on a device, compared with the CPU.

    python tests/integration/sweep_modules.py --json benchmarks/results/modules_host.json
    python tests/integration/sweep_modules.py --only 'LSTM|Adam' --corrupt

Workers are processes of their own: a crash is recorded and the sweep goes on. Exit code 0: nothing failed or crashed,
and no operator reached the copying CPU fallback.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.common import moduledb, workers  # noqa: E402
from tests.common.devices import fallback_counts, load_device, versions  # noqa: E402


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="flagos")
    parser.add_argument("--only", default="", help="regular expression on module and optimizer names")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=180.0)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--corrupt", action="store_true", help="perturb parameters and gradients: checks must turn red")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def work(options):
    channel = workers.Channel()
    torch.set_num_threads(1)
    load_device(options.device)
    for task in channel.tasks():
        before = fallback_counts()
        results = moduledb.check_task(task, options.device, options.corrupt, channel.at)
        reached = {op: n for op, n in fallback_counts().items() if n > before.get(op, 0)}
        channel.done({"results": results, "fallbacks": sorted(reached)})


def row_name(task, mode):
    return f"module {mode}" if task["kind"] == "module" else f"optimizer {task['implementation']}"


def main(argv=None) -> int:
    options = arguments(argv)
    if options.worker:
        work(options)
        return 0
    tasks = [t for t in moduledb.module_tasks() + moduledb.optimizer_tasks() if re.search(options.only, t["name"])]
    rows, failures, crashes, fallbacks, cpu_failed = {}, [], [], set(), {}
    start = time.monotonic()

    def row(task, mode):
        empty = {"names": set(), "cases": 0, "passed": 0, "bit_equal": 0, "cpu_failed": 0}
        return rows.setdefault(row_name(task, mode), empty)

    def on_result(task, answer):
        fallbacks.update(answer["fallbacks"])
        for mode, case, kind, detail in answer["results"]:
            counts = row(task, mode)
            if kind == "none":
                continue
            if kind == "cpu":
                counts["cpu_failed"] += 1
                reason = f"{task['name']}: {detail}"
                cpu_failed[reason] = cpu_failed.get(reason, 0) + 1
                continue
            counts["names"].add(task["name"])
            counts["cases"] += 1
            counts["passed"] += kind == "passed"
            counts["bit_equal"] += kind == "passed" and bool(detail)
            if kind == "failed":
                failures.append({**task, "mode": mode, "case": case, "message": detail})
                if not options.corrupt:
                    print(f"FAIL {task} {mode} {case}: {detail}", flush=True)

    def on_crash(crash):
        mode, case, side = crash.at or ("start", "", "device")
        crashes.append(
            {**crash.task, "mode": mode, "case": case, "side": side, "message": crash.how, "stderr": crash.tail}
        )
        print(f"CRASH ({side}) {crash.task} {mode} {case}: {crash.how}: {' | '.join(crash.tail)}", flush=True)
        if mode in ("start", "inputs"):
            return None
        row(crash.task, mode)["cases" if side == "device" else "cpu_failed"] += 1
        return {**crash.task, "skip": [*crash.task.get("skip", []), [mode, case]]}

    command = [sys.executable, __file__, "--worker", "--device", options.device] + ["--corrupt"] * options.corrupt
    workers.run_tasks(command, tasks, on_result, on_crash, options.jobs, options.timeout)
    seconds = time.monotonic() - start
    table = {}
    print(f"\nmodule_db and optim_db on {options.device}, torch {torch.__version__}, {seconds:.0f} s")
    print(f"{'':22}{'names':>6}{'cases':>7}{'passed':>8}{'%':>9}{'bit-equal':>11}{'CPU fails':>11}")
    for name, counts in sorted(rows.items()):
        percent = 100 * counts["passed"] / max(counts["cases"], 1)
        table[name] = {**counts, "names": len(counts["names"]), "percent": round(percent, 4)}
        print(
            f"{name:22}{len(counts['names']):6}{counts['cases']:7}{counts['passed']:8}{percent:9.3f}"
            f"{counts['bit_equal']:11}{counts['cpu_failed']:11}"
        )
    print(f"failures {len(failures)}, crashes {len(crashes)}, operators on the CPU fallback {len(fallbacks)}")
    if options.json:
        data = {
            "what": "module_db and optim_db, device against CPU; see tests/integration/sweep_modules.py",
            "versions": versions(options.device),
            "options": {"only": options.only, "corrupt": options.corrupt},
            "seconds": round(seconds),
            "table": table,
            "failures": failures,
            "crashes": crashes,
            "cpu_fallbacks": sorted(fallbacks),
            "cpu_failed": dict(sorted(cpu_failed.items(), key=lambda item: -item[1])[:20]),
        }
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n")
    if options.corrupt:
        cases = sum(counts["cases"] for counts in rows.values())
        print(f"negative control: {100 * len(failures) / max(cases, 1):.1f} % of the cases turned red")
        return 0 if len(failures) > cases / 2 else 1
    device_crashes = [c for c in crashes if c["side"] == "device"]
    return 1 if failures or device_crashes or fallbacks else 0


if __name__ == "__main__":
    sys.exit(main())
