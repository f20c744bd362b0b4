#!/usr/bin/env python3
"""Judges FlagGems' Python kernels against the native ones and writes torch_fl/flaggems/verdicts_*.json.

    python scripts/judge_flaggems.py --jobs 16 --budget 1500             # on a GPU: verdicts_5.0.2_cuda_sm90.json
    TRITON_INTERPRET=1 FLAGOS_ACCELERATOR=host python scripts/judge_flaggems.py      # anywhere: ..._host.json
    python scripts/judge_flaggems.py --ops '^zero_$' --show                           # one operator, every case
    python scripts/judge_flaggems.py --fresh --compare OLD.json --out NEW.json        # exit code 1: other verdicts

Each operator is tried with calls that OpInfo samples make, in many dtypes and layouts (tests/common/judge_cases.py),
compared as tests/common/judge_run.py says; from the outcomes come the verdict and the smallest limits
(tests/common/judge_limits.py). Workers are processes of their own: a crash, a hang or an illegal access fails a case
and not the run. Outcomes are kept in --work as they come; a second call on the same device goes on from there, in
whatever place the folder lies, with --fresh anew. The file of verdicts is written all along. When --budget seconds are
over, counted from the start of the program, what has no outcome yet stays unjudged, and so does what has been tried
with less than half of its cases. Tuners measure nothing here: each case runs with one of --tune configurations of the
kernel, spread over all of them; what is judged is the operator, not the tuner.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.monotonic()  # before torch is imported
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.common import judge_cases, judge_limits, judge_run, workers  # noqa: E402

# What models call most; judged first, in case the budget ends the run.
FIRST = """
add.Tensor mul.Tensor sub.Tensor div.Tensor mm bmm addmm silu silu_backward _softmax _softmax_backward_data _log_softmax
_log_softmax_backward_data mean.dim rsqrt pow.Tensor_Scalar neg cos sin exp cat embedding embedding_dense_backward
native_layer_norm native_layer_norm_backward gelu gelu_backward sigmoid tanh relu where.self masked_fill.Scalar gather
index.Tensor index_select scatter.src sum sum.dim_IntList mean max.dim argmax topk sort cumsum arange full zeros ones
zeros_like ones_like fill_.Scalar zero_ copy_ _to_copy triu tril eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar
lt.Tensor gt.Scalar gt.Tensor le.Tensor ge.Tensor nll_loss_forward nll_loss_backward add_.Tensor mul_.Tensor sub_.Tensor
div_.Tensor stack bitwise_and.Tensor logical_and logical_not any all native_dropout native_dropout_backward uniform_
normal_ exponential_ multinomial randn rand sqrt reciprocal clamp maximum minimum lerp.Scalar addcmul addcdiv abs
""".split()


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", help="regular expression on the operator's name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for the whole run")
    parser.add_argument("--op-budget", type=float, default=180.0, help="seconds for one operator's cases")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds without a sign of life = a hang")
    parser.add_argument("--most", type=int, default=100, help="cases of one operator at most")
    parser.add_argument("--dtypes", default="", help="dtypes to try, separated by commas (default: all)")
    parser.add_argument("--opinfos", default="", help="regular expression: take samples of these OpInfos only")
    parser.add_argument(
        "--tune", type=int, default=judge_run.CONFIGURATIONS, help="configurations of a kernel that cases run with"
    )
    parser.add_argument("--compare", type=Path, help="verdicts of an earlier run; other ones give exit code 1")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "judge_flaggems")
    parser.add_argument("--fresh", action="store_true", help="forget the outcomes of earlier runs")
    parser.add_argument("--again", default="^$", help="regular expression: judge these once more, before all others")
    parser.add_argument("--out", type=Path, help="file of the verdicts (default: in torch_fl/flaggems)")
    parser.add_argument("--show", action="store_true", help="print every case instead of writing verdicts")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)  # of a worker
    return parser.parse_args(argv)


# ---- a worker ------------------------------------------------------------------------------------------------------


def work(options) -> None:
    channel = workers.Channel()
    torch.set_num_threads(1)
    index = None
    for task in channel.tasks():
        channel.at("start", "")
        if "opinfo" in task:
            channel.done({"opinfo": task["opinfo"], "reached": judge_cases.reached_by(task["opinfo"])})
            continue
        from torch_fl import integration
        from torch_fl.flaggems import interpreter

        interpreted = integration.interpreted()
        if index is None:
            index = judge_cases.load_index(options.work, options.opinfos)
            judge_run.limit_tuning(options.tune)
        refused = unusable(task["op"])
        if refused:
            channel.done({"op": task["op"], "refused": refused})
            continue
        dtypes = options.dtypes.split(",") if options.dtypes else judge_cases.DTYPES
        if interpreted:
            dtypes = [d for d in dtypes if d not in interpreter.DTYPES_WRONG_HERE]
        outcomes = []
        began = time.monotonic()
        end = min(began + options.op_budget, options.until)
        cases = judge_cases.cases(task["op"], index, dtypes, options.most)
        note = "" if cases else "no sample reaches it"
        for number, case in enumerate(cases):
            if {case.label, f"* {case.label.split()[-1]}"} & set(task["skip"]):
                continue
            if time.monotonic() > end:
                note = f"{time.monotonic() - began:.0f} s were over after {number} of {len(cases)} cases"
                break
            nest = case.nest()
            where = (case.label, judge_run.words(task["op"], nest), judge_run.facts_of(task["op"], nest))
            channel.at(*where, False)
            try:
                outcome = judge_run.judge(task["op"], case, interpreted, lambda where=where: channel.at(*where, True))
            except torch.AcceleratorError as error:
                workers.leave(error)
            if outcome:
                outcomes.append(dataclasses.asdict(outcome))
        if cases and not outcomes and not note:
            note = f"the CPU or the native kernel refuses each of its {len(cases)} calls"
        seconds = round(time.monotonic() - began, 1)
        channel.done({"op": task["op"], "outcomes": outcomes, "note": note, "seconds": seconds})


def unusable(op: str) -> dict | None:
    """The verdict on an operator that cannot be tried at all; None for the others."""
    import torch_fl
    from torch_fl import integration

    table = integration.kernels()
    if op in table and table[op][0] == "unusable":
        return {"verdict": "unusable", "why": table[op][1]}
    try:
        with torch_fl.route({op: judge_run.BACKEND}):
            chosen = [step for step in torch_fl.explain(op) if step.backend == judge_run.BACKEND]
    except (RuntimeError, ValueError) as error:
        return {"verdict": "unusable", "why": str(error)}
    return None if chosen else {"verdict": "unusable", "why": "flagos_python has no kernel for it"}


# ---- the run -------------------------------------------------------------------------------------------------------


class Run:
    """The outcomes so far: one line per operator in --work/outcomes.jsonl. write() is called now and then."""

    def __init__(self, options, about: dict, write=lambda run: None):
        self.options, self.write, self.written = options, write, STARTED
        self.end = STARTED + options.budget
        options.work.mkdir(parents=True, exist_ok=True)
        self.path = options.work / "outcomes.jsonl"
        self.results = self._earlier(about)
        self.entries = {op: self._entry(op) for op in self.results}
        self.crashed: dict[str, list] = {}

    def _earlier(self, about):
        """The outcomes that are there already, if they are of this device and these versions."""
        known = {k: about[k] for k in ("flaggems", "chip", "arch", "device", "torch", "triton")}
        rows = []
        if self.path.exists() and not self.options.fresh:
            for line in self.path.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:  # the run was ended while it wrote
                    break
        if not rows or rows[0] != known:
            if rows:
                print(f"judge_flaggems: {self.path} is of {rows[0]}: begun anew", file=sys.stderr)
            rows = [known]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {row["op"]: row for row in rows[1:]}

    def index(self):
        """Which OpInfos reach which overloads; made once."""
        judge_cases.make_index(self.options.work, self.options.opinfos, self.feed)

    def feed(self, tasks, on_result, on_crash):
        options = self.options
        command = [sys.executable, __file__, "--worker", "--work", options.work, "--op-budget", options.op_budget]
        command += ["--most", options.most, "--dtypes", options.dtypes, "--opinfos", options.opinfos]
        command += ["--tune", options.tune, "--until", self.end]
        from torch_fl.flaggems import PRIVATE_TUNING

        # What the judge lets a tuner take is not to be found by a program that tunes.
        environment = dict(os.environ, OMP_NUM_THREADS="1", FLAGGEMS_DB_URL=PRIVATE_TUNING)
        environment.setdefault("FLAGGEMS_CACHE_DIR", str(options.work / "cache"))
        nothing = options.work / "nothing.json"  # no verdict is in force while verdicts are made
        nothing.write_text('{"ops": {}}')
        environment["FLAGOS_FLAGGEMS_VERDICTS"] = str(nothing)
        workers.run_tasks(
            [str(c) for c in command], tasks, on_result, on_crash, options.jobs, options.timeout, environment, self.end
        )

    def judge(self, names):
        once_more = {op for op, row in self.results.items() if cut_short(row.get("note", ""))}
        once_more |= {op for op in names if re.search(self.options.again, op)}
        left = [op for op in names if op in once_more] + [op for op in names if op not in {*self.results, *once_more}]
        self.feed([{"op": op, "skip": []} for op in left], self.done, self.crash)

    def done(self, task, row):
        if "outcomes" in row:
            row["outcomes"] += self.crashed.get(task["op"], [])
            if not row["outcomes"] and cut_short(row["note"]):  # the time was over before its first case
                return
        self.results[row["op"]] = row
        self.entries[row["op"]] = self._entry(row["op"])
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.options.show:
            return
        seconds = f"{row.get('seconds', 0):5.1f} s"
        print(f"{len(self.results):4} {row['op']:36} {seconds} {short(self.entry(row['op']))}", flush=True)
        if time.monotonic() - self.written > 5:
            self.write(self)
            self.written = time.monotonic()

    def crash(self, crash):
        """A case whose kernel killed its process is a failed one; the others are tried again without it. When it was
        the CPU's or the native kernel, the case says nothing, and nor do others with the same change."""
        label, call, facts, kernel = crash.at if crash.at and len(crash.at) == 4 else ("start", "", {}, False)
        task = crash.task
        # What the process said last, warnings of torch's aside.
        tail = next((line for line in reversed(crash.tail) if line.strip() and not re.match(r"\[?W\d", line)), "")
        outcome = judge_limits.Outcome(label, "failed", message=f"{crash.how}: {tail}"[:300], call=call, **facts)
        if kernel:
            self.crashed.setdefault(task["op"], []).append(dataclasses.asdict(outcome))
        if label == "start" or len(task["skip"]) >= 10 or time.monotonic() > self.end:
            note = f"its process ended {len(task['skip']) + 1} times, the last one: {outcome.message}"
            self.done(task, {"op": task["op"], "outcomes": [], "note": note})
            return None
        word = label.split()[-1]
        return {**task, "skip": [*task["skip"], label if kernel or word.isdigit() else f"* {word}"]}

    def entry(self, op):
        return self.entries.get(op) or {"verdict": "unjudged", "why": "not judged: the time was over"}

    def _entry(self, op):
        row = self.results[op]
        if "refused" in row:
            return row["refused"]
        note = row.get("note", "")
        if cut_short(note):
            return {"verdict": "unjudged", "why": f"not judged: {note}"}
        return judge_limits.verdict([judge_limits.Outcome(**o) for o in row["outcomes"]], note)


def cut_short(note: str) -> bool:
    """Whether a note says that less than half of an operator's cases were tried: too few for a verdict."""
    numbers = re.search(r"were over after (\d+) of (\d+) cases", note)
    return bool(numbers) and 2 * int(numbers[1]) < int(numbers[2])


def turn(op: str, rank: dict) -> tuple:
    """The order of the run: what models call most; then what writes into an argument comes last, because its kernel has
    been compiled by then for the operator that does not."""
    base, _, which = op.partition(".")
    return rank.get(op, len(rank)), base.endswith("_") or which.endswith("out"), op


def short(entry) -> str:
    limits = entry.get("limits", {})
    shown = " ".join(f"{k}={','.join(v) if isinstance(v, list) else v}" for k, v in limits.items())
    passed = f"{entry['passed']}/{entry['cases']}" if "cases" in entry else ""
    return f"{entry['verdict']:9} {passed:8} {shown} {entry.get('why', '')}"[:200]


def header() -> dict:
    """What the verdicts hold for."""
    import torch_fl
    from torch_fl import flaggems, integration

    interpreted = integration.interpreted()
    return {
        "flaggems": integration.installed_version(),
        "chip": torch_fl.chip(),
        "arch": flaggems.architecture(torch_fl.chip()),
        "device": "Triton's interpreter on a CPU: no verdict on a GPU"
        if interpreted
        else torch.flagos.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton(),
        "python": sys.version.split()[0],
        "date": datetime.date.today().isoformat(),
        "made_by": "scripts/judge_flaggems.py",
        "tolerances": judge_run.described_tolerances(),
    }


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv=None) -> int:
    options = arguments(argv)
    if options.worker:
        work(options)
        return 0
    import torch_fl
    from torch_fl import flaggems, integration

    version = integration.installed_version()
    if not integration.kernels():
        reason = next(s.reason for s in torch_fl.explain("mm") if s.backend == judge_run.BACKEND)
        print(f"judge_flaggems: FlagGems' Python kernels cannot run here: {reason}", file=sys.stderr)
        return 1
    old = json.loads(options.compare.read_text()) if options.compare else None
    every = flaggems.operators(version)
    rank = {op: i for i, op in enumerate(FIRST)}
    names = sorted((op for op in every if re.search(options.ops, op)), key=lambda op: turn(op, rank))
    about = header()
    path = options.out or ROOT / "torch_fl/flaggems" / flaggems.verdict_file(version, torch_fl.chip()).name
    # What --ops leaves out keeps the verdict that the file has.
    before = json.loads(path.read_text())["ops"] if path.exists() else {}
    left_out = {"verdict": "unjudged", "why": "not among the operators of the run"}

    def write(run) -> dict:
        entries = {op: run.entry(op) if op in names else before.get(op, left_out) for op in sorted(every)}
        totals = dict(sorted(collections.Counter(entry["verdict"] for entry in entries.values()).items()))
        lines = ",\n".join(f"  {json.dumps(op)}: {json.dumps(entry)}" for op, entry in entries.items())
        head = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in {**about, "totals": totals}.items())
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text("{\n" + head + ',\n "ops": {\n' + lines + "\n }\n}\n")
        unfinished.replace(path)
        return {**about, "totals": totals, "ops": entries}

    run = Run(options, about, write)
    run.index()
    if options.show:
        run.results, run.entries = {}, {}
    run.judge(names)
    if options.show:
        for op in names:
            for outcome in run.results.get(op, {}).get("outcomes", []):
                print(f"{outcome['state']:10} {outcome['label']:50} {outcome['call']} {outcome['message']}")
            print(f"{op}: {short(run.entry(op))}")
        return 0
    data = write(run)
    print(f"{path}: " + ", ".join(f"{name} {count}" for name, count in data["totals"].items()))
    if old is None:
        return 0
    differences = judge_limits.differences(old, data, names)
    for line in differences:
        print(line)
    print(f"{len(names) - len(differences)} of {len(names)} verdicts as in {options.compare}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
