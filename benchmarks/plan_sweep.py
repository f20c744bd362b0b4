"""Which FlagGems operators can have a launch plan, and whether a replay does what the Python call does.

    python benchmarks/plan_sweep.py --json benchmarks/results/plans_cuda.json         # a GPU: bytes are compared
    python benchmarks/plan_sweep.py --json benchmarks/results/plans_null_cuda.json    # no GPU: launches are compared

Without a GPU it runs on the null CUDA of the tests. Arguments are those with which PyTorch's own operator samples call
an operator, in several dtypes and layouts: shifted, strided, transposed, expanded, of size zero, the same tensor twice,
two dtypes (tests/common/judge_cases.py). Plans are made with one set of tensors and replayed with another.

Swept are the operators whose verdict is right, within their limits; all of them where there are no verdicts. A call is
    equal     the replay does what the Python call does
    unequal   it does not                     raises    only with plans: both give exit code 1
    refused   it cannot have a plan           varies    two Python calls differ as well
    unused    nothing was recorded            outside   of the kernel's limits: the next backend served
    unserved  the kernel raises without plans, too
each with its reason in the results, which are written all along. --work is the judge's folder: what has been compiled
and listed there is not done again.
"""

import argparse
import collections
import datetime
import itertools
import json
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

STARTED = time.monotonic()  # before torch is imported
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import common  # noqa: E402
from tests.common import judge_cases, null_cuda, workers  # noqa: E402
from tests.common.compare import first_lines  # noqa: E402
from tests.common.samples import copy_tree  # noqa: E402

DTYPES = ("float32", "float16", "int64", "bool")
BACKEND = "flagos_python"
FAILURES = ("unequal", "raises")
REASONS = (*FAILURES, "refused", "varies", "unserved", "unused")  # those of which a reason is shown, the worst first


def in_turn(cases):
    """(kind, case): of each kind one, then of each kind another one; what is written by hand last."""
    kinds = collections.defaultdict(list)
    for case in sorted(cases, key=lambda case: case.label.startswith("by hand")):
        word = case.label.split()[-1]
        kind = "as it is" if word.isdigit() else word
        kinds[kind].append((kind, case))
    for row in itertools.zip_longest(*kinds.values()):
        yield from filter(None, row)


def native_takes(op: str, nest) -> bool:
    """Whether the native kernel takes a call. On a GPU alone: the null CUDA takes all."""
    if null_cuda.active():
        return True
    try:
        with torch.no_grad():
            judge_cases.overload(op)(*copy_tree(nest[0], "flagos"), **copy_tree(nest[1], "flagos"))
        torch.flagos.synchronize()
    except torch.AcceleratorError as error:
        workers.leave(error)
    except Exception:
        return False
    return True


def work(options) -> None:
    channel = workers.Channel()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    index = None
    for task in channel.tasks():
        channel.at("start")
        if "opinfo" in task:
            channel.done({"reached": judge_cases.reached_by(task["opinfo"])})
            continue
        import torch_fl
        from tests.common import judge_run
        from tests.common.plan_judge import judge, judge_numbers, scaled

        if index is None:
            index = judge_cases.load_index(options.work)
            torch.ones(1, device="flagos")
            judge_run.limit_tuning(judge_run.CONFIGURATIONS)  # as the judge does, whose kernels are compiled
        op, rows = task["op"], []
        end = min(time.monotonic() + options.op_budget, options.until)
        for kind, case in in_turn(judge_cases.cases(op, index, DTYPES, 60)):
            if time.monotonic() > end or len(rows) >= options.calls:
                break
            nest = case.nest()
            if case.label in task["skip"]:
                continue
            channel.at(case.label)
            if not judge_cases.cpu_takes(op, nest) or not native_takes(op, nest):
                continue
            channel.at(case.label, "with plans")
            try:
                first, second = copy_tree(nest, "flagos"), copy_tree(nest, "flagos")
                with torch.no_grad(), torch_fl.route({op: BACKEND}):
                    verdict, why = judge(op, judge_cases.overload(op), first, second, not null_cuda.active())
                    if kind == "as it is" and verdict in ("equal", "refused") and scaled(nest, 1):
                        row = judge_numbers(op, judge_cases.overload(op), nest, not null_cuda.active())
                        rows.append([row[0], row[1][:400], "other numbers", case.label])
            except torch.AcceleratorError as error:
                workers.leave(error)
            except Exception as error:
                verdict, why = "raises", f"{type(error).__name__}: {first_lines(error, 120)}"
            rows.append([verdict, why[:400], kind, case.label])
        channel.done({"rows": rows})


def wanted_operators() -> tuple[list[str], int, str]:
    """(operators to sweep, how many others there are, which ones they are)"""
    import torch_fl

    routed = {row.op for row in torch_fl.routes()}
    kernels = torch_fl.integration.kernels()
    usable = {op: row[0] for op, row in kernels.items() if op in routed and row[0] != "unusable"}
    right = sorted(op for op, verdict in usable.items() if verdict == "right")
    which = "operators with the verdict right" if right else "all operators: there are no verdicts for this machine"
    return right or sorted(usable), len(kernels) - len(right or usable), which


def cannot() -> str:
    """Why no plan can be made here, in one line; '' when plans can be made."""
    import torch_fl

    if not torch_fl.integration.kernels():
        reason = next(s.reason for s in torch_fl.explain("mm") if s.backend == BACKEND)
        return f"FlagGems' Python kernels cannot run here: {reason}"
    x = torch.ones(8, device="flagos")
    try:
        with torch_fl.route({"abs": BACKEND}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.abs(x)
    except Exception as error:
        return f"abs by FlagGems raises {first_lines(error)}"
    why = torch_fl.plans.unavailable()
    return f"there are no launch plans here: {why}" if why else ""


def sweep(options, write) -> dict:
    """What became of each operator's calls; write(that so far) is called now and then."""
    import torch_fl

    wanted, others, which = wanted_operators()
    wanted = [op for op in wanted if re.search(options.ops, op)]
    print(f"plan_sweep: {len(wanted)} operators ({which})", flush=True)
    end = STARTED + options.seconds
    command = [sys.executable, __file__, "--worker", "--work", options.work, "--calls", options.calls]
    command += ["--op-budget", options.op_budget, "--until", end]
    environment = dict(os.environ, OMP_NUM_THREADS="1", FLAGOS_PLAN="1", FLAGOS_PLAN_VERIFY="0")
    environment["FLAGGEMS_DB_URL"] = torch_fl.flaggems.PRIVATE_TUNING  # as the judge has it
    environment.setdefault("FLAGGEMS_CACHE_DIR", str(options.work / "cache"))
    options.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, list] = {}
    written = time.monotonic()

    def feed(tasks, on_result, on_crash):
        workers.run_tasks(
            list(map(str, command)), tasks, on_result, on_crash, options.jobs, options.timeout, environment, end
        )

    def result():
        about = {"swept": which, "seconds": round(time.monotonic() - STARTED)}
        return about | summary(found, wanted, others)

    def done(task, answer):
        nonlocal written
        rows = found.setdefault(task["op"], [])
        rows += answer["rows"]
        counted = dict(collections.Counter(row[0] for row in rows))
        print(f"{len(found):4} {task['op']:36} {counted} {worst(rows)}"[:300].replace("\n", " | "), flush=True)
        if time.monotonic() - written > 5:
            write(result())
            written = time.monotonic()

    def crashed(crash):
        label, *where = crash.at or ["start"]
        if where or label == "start":  # else the native kernel ended it, which says nothing of plans
            what = f"{crash.how}: {next((line for line in reversed(crash.tail) if line), '')}"
            found.setdefault(crash.task["op"], []).append(["raises", what[:400], "", label])
        if label == "start" or len(crash.task["skip"]) > 3:
            return None
        return {**crash.task, "skip": [*crash.task["skip"], label]}

    judge_cases.make_index(options.work, "", feed)
    feed([{"op": op, "skip": []} for op in wanted], done, crashed)
    return result()


def worst(rows) -> str:
    """The first reason of the worst that came of an operator's calls, and the call."""
    for verdict in REASONS:
        for row in rows:
            if row[0] == verdict:
                return f"{verdict}: {row[1]} ({row[3]})"
    return ""


def summary(found: dict, wanted: list[str], others: int) -> dict:
    operators, calls, reasons, layouts = (collections.Counter() for _ in range(4))
    failures, by_operator = [], {}
    for op in wanted:
        rows = found.get(op, [])
        verdicts = {row[0] for row in rows}
        operators[
            "unequal" if "unequal" in verdicts
            else "raises" if "raises" in verdicts
            else "recordable, every replay equal" if "equal" in verdicts
            else "recordable, results vary by themselves" if "varies" in verdicts
            else "refused" if "refused" in verdicts
            else "never recorded" if verdicts
            else "not run"
        ] += 1  # fmt: skip
        shown = collections.Counter()
        for verdict, why, kind, label in rows:
            calls[verdict] += 1
            if verdict == "refused":
                reasons[why] += 1
            if verdict in FAILURES:
                failures.append({"op": op, "case": label, "what": verdict, "why": why})
            if verdict in ("equal", "unequal"):
                layouts[f"{kind}: {verdict}"] += 1
            shown[f"{verdict}: {why}" if verdict in REASONS else verdict] += 1
        by_operator[op] = dict(shown)
    return {
        "operators": dict(operators),
        "not routable": others,
        "calls": dict(calls),
        "replays equal": calls["equal"],
        "replays compared": calls["equal"] + calls["unequal"],
        "by layout": dict(sorted(layouts.items())),
        "refused calls by reason": dict(reasons.most_common()),
        "failures": failures,
        "by operator": by_operator,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--calls", type=int, default=14, help="calls per operator at most")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for everything")
    parser.add_argument("--op-budget", type=float, default=20, help="seconds for one operator's calls")
    parser.add_argument("--timeout", type=float, default=120, help="seconds without a sign of life = a hang")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--ops", default="", help="regular expression on the operator's name")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "judge_flaggems")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)  # of a worker
    options = parser.parse_args()
    if options.worker:
        work(options)
        return 0
    code = null_cuda.run_again()
    if code is not None:
        return code
    if why := cannot():
        print(f"plan_sweep: {why}", file=sys.stderr)
        return 1
    import torch_fl

    null = null_cuda.active()
    head = {"what": "launches compared; no GPU: the null CUDA" if null else "bytes of results and arguments compared"}
    head |= {"versions": common.where("flagos"), "flag_gems": torch_fl.integration.installed_version()}
    head |= {"date": datetime.date.today().isoformat()}

    def write(result):
        if options.json:
            options.json.write_text(json.dumps(head | result, indent=1) + "\n", encoding="utf-8")

    result = sweep(options, write)
    write(result)
    print({key: value for key, value in result.items() if key != "by operator"})
    return bool(result["failures"]) or not result["replays compared"]


if __name__ == "__main__":
    sys.exit(main())
