#!/usr/bin/env python3
"""op_db on flagos with a conf file against flagos on the chip's own kernels: results within tolerances.

    python tests/integration/ops/against_native.py --json benchmarks/results/opdb_flagos_py.json
    python tests/integration/ops/against_native.py --conf FILE --ops '^sum' --modes forward

Without --conf it is torch_fl/backends_flagos_py.conf. One process computes every case without FlagGems' Python kernels
and keeps the results; another one, with the conf file, compares. Only cases that the native kernels pass count. Where
another seed gives the native kernels other results, types, sizes and strides are compared, not values. Exit code 0 when
at least --target percent of the cases of every mode pass.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from unittest import mock

STARTED = time.monotonic()  # before torch is imported
ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import against_stock  # noqa: E402
import torch  # noqa: E402

from benchmarks import common  # noqa: E402
from tests.common import judge_run, opdb, workers  # noqa: E402
from tests.common.compare import Mismatch, bit_equal, first_lines, to_host  # noqa: E402
from tests.common.samples import is_plain  # noqa: E402

# (relative, absolute). Wider than the judge's: a gradient comes from several kernels in a row.
TOLERANCES = {
    torch.float64: (1e-6, 1e-6),
    torch.float32: (1e-4, 1e-4),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (5e-2, 5e-2),
    torch.complex64: (1e-4, 1e-4),
}
TAIL = 250  # characters of a message that are kept


def facts(t: torch.Tensor) -> tuple:
    dense = t.layout is torch.strided and not t.is_nested and t.numel()
    strides = tuple(step for n, step in zip(t.shape, t.stride(), strict=True) if n > 1) if dense else None
    return (t.dtype, tuple(t.shape), str(t.layout), strides)


def kept(tensors) -> list[tuple]:
    """What is compared of the results: (facts, values or None)."""
    return [(facts(t), to_host(t).clone() if is_plain(t) else None) for t in tensors]


def compare(got, expected, values: bool) -> None:
    if len(got) != len(expected):
        raise Mismatch(f"{len(got)} results, native {len(expected)}")
    for index, ((mine, a), (native, b)) in enumerate(zip(got, expected, strict=True)):
        if mine != native:
            raise Mismatch(f"result {index} is {mine}, native {native}")
        if values and b is not None and not bit_equal(a, b):
            relative, absolute = TOLERANCES.get(b.dtype, (0, 0))
            try:
                torch.testing.assert_close(a, b, rtol=relative, atol=absolute, equal_nan=True)
            except AssertionError as error:
                raise Mismatch(f"result {index}: {first_lines(error, TAIL)}") from None


def cases(task, options):
    """(name, call that gives the results) for each case of an (operator, dtype) pair."""
    op, dtype = opdb.ops_by_name()[task["op"]], getattr(torch, task["dtype"])
    modes = [m for m in task["modes"] if against_stock.mode_exists(op, dtype, m, options.native)]
    try:
        samples = opdb.make_samples(op, dtype, options.samples, "backward" in modes, False)
    except Exception:  # samples that cannot be made say nothing
        return
    for mode in modes:
        for sample in samples:
            name = f"{mode} {sample.label}"
            if name not in task["skip"]:
                yield name, lambda mode=mode, sample=sample: against_stock.run_mode(op, sample, mode, "flagos")


def work(options) -> None:
    channel = workers.Channel()
    torch.set_num_threads(1)
    import torch_fl

    warnings.simplefilter("ignore")
    judge_run.limit_tuning(judge_run.CONFIGURATIONS)  # as the judge does, whose kernels are compiled
    for task in channel.tasks():
        path = options.work / f"{task['op']} {task['dtype']}.pt"
        found: dict = {}
        with torch_fl.count_ops() as counts:
            if options.worker == "native":
                native_side(channel, task, options, found)
                torch.save(found, path)
                answer = {"cases": len(found)}
            else:
                native = torch.load(path, weights_only=False) if path.exists() else {}
                conf_side(channel, task, options, native, found)
                answer = {"cases": found}
        served = {op: calls for op, backend, calls in counts.rows() if backend == "flagos_python"}
        channel.done(answer | {"served": served})


def native_side(channel, task, options, found) -> None:
    uninitialized = task["op"].split(".")[0] in opdb.UNINITIALIZED
    seeded = torch.manual_seed  # op_db seeds some operators itself; gradients that are fed in have their own generator
    for name, call in cases(task, options):
        channel.at(name)
        try:
            results = kept(call())
            with mock.patch.object(torch, "manual_seed", lambda seed: seeded(seed + 1)):
                again = kept(call())
        except torch.AcceleratorError as error:
            workers.leave(error)
        except Exception:  # not counted, or what the native kernels cannot do
            continue
        steady = all(b is None or bit_equal(a, b) for (_, a), (_, b) in zip(results, again, strict=True))
        found[name] = (results, steady and not uninitialized)


def conf_side(channel, task, options, native, found) -> None:
    for name, call in cases(task, options):
        if name not in native:
            continue
        channel.at(name)
        try:
            compare(kept(call()), *native[name])
            found[name] = ""
        except torch.AcceleratorError as error:
            workers.leave(error)
        except Exception as error:
            found[name] = str(error) if isinstance(error, Mismatch) else first_lines(error, TAIL)


def side(options, which: str, tasks, environment: dict, end: float, write=lambda answers, served: None):
    """({(op, dtype): answer}, FlagGems operators that served) of one of the two; write(those so far) now and then."""
    command = [sys.executable, __file__, "--worker", which, "--work", options.work, "--native", options.native]
    command += ["--samples", options.samples]
    answers: dict = {}
    served: dict[str, int] = {}
    written = time.monotonic()

    def done(task, answer):
        nonlocal written
        row = answers.setdefault(f"{task['op']} {task['dtype']}", {})
        if which == "conf":
            row.update(answer["cases"])
        for op, calls in answer["served"].items():
            served[op] = served.get(op, 0) + calls
        if time.monotonic() - written > 5:
            write(answers, served)
            written = time.monotonic()

    def crashed(crash):
        name = crash.at[0] if crash.at else "start"
        row = answers.setdefault(f"{crash.task['op']} {crash.task['dtype']}", {})
        if which == "conf":
            row[name] = f"crash: {crash.how}: {' | '.join(crash.tail)[-150:]}"
        if name == "start" or len(crash.task["skip"]) > 10:
            return None
        return {**crash.task, "skip": [*crash.task["skip"], name]}

    from torch_fl.flaggems import PRIVATE_TUNING

    # What the judge's tuners take is not to be found by a program that tunes.
    environment = {"OMP_NUM_THREADS": "1", "FLAGGEMS_DB_URL": PRIVATE_TUNING, **environment}
    environment = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    workers.run_tasks(list(map(str, command)), tasks, done, crashed, options.jobs, options.timeout, environment, end)
    return answers, served


def summary(answers: dict) -> dict:
    modes: dict = {}
    failures = []
    for pair, found in sorted(answers.items()):
        for name, message in found.items():
            row = modes.setdefault(name.split()[0], {"cases": 0, "passed": 0})
            row["cases"] += 1
            row["passed"] += not message
            if message:
                failures.append({"pair": pair, "case": name, "message": message[:300]})
    for row in modes.values():
        row["percent"] = round(100 * row["passed"] / row["cases"], 3)
    return {"modes": modes, "failures": failures}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conf", type=Path, default=ROOT / "torch_fl/backends_flagos_py.conf")
    parser.add_argument("--modes", default="forward,backward")
    parser.add_argument("--dtypes", default="float32,bfloat16,int64")
    parser.add_argument("--samples", type=int, default=3, help="per operator and dtype")
    parser.add_argument("--ops", default="", help="regular expression on OpInfo's full name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--limit", type=float, default=450, help="seconds for everything, from the start of the program"
    )
    parser.add_argument("--timeout", type=float, default=120, help="seconds without a sign of life = a hang")
    parser.add_argument("--target", type=float, default=99.0, help="percent that must pass")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--native", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=("native", "conf"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        work(options)
        return 0
    import torch_fl

    # Which dtypes and modes an OpInfo has is a matter of the device that its kernels are for.
    options.native = "cuda" if torch_fl.chip() == "cuda" else "cpu"
    tasks = []
    for name, op in opdb.ops_by_name().items():
        if re.search(options.ops, name):
            for dtype in against_stock.dtypes_of(op, options.native, options.dtypes):
                row = {"op": name, "dtype": str(dtype).split(".")[1], "modes": options.modes.split(","), "skip": []}
                tasks.append(row)
    # Dtypes in the order given; within one an order that has nothing to do with names, so that what a time limit cuts
    # off is a fair sample.
    rank = {dtype: i for i, dtype in enumerate(options.dtypes.split(","))}
    tasks.sort(key=lambda task: (rank.get(task["dtype"], 0), zlib.crc32(f"{task['op']}{task['dtype']}".encode())))
    data = {"what": "op_db with a conf file against the chip's own kernels; see against_native.py"}
    data |= {"where": common.where("flagos"), "date": datetime.date.today().isoformat()}
    data |= {"flag_gems": torch_fl.integration.installed_version(), "conf": options.conf.name}
    data |= {"dtypes": options.dtypes, "samples": options.samples}
    data |= {"tolerances": {str(d): list(pair) for d, pair in TOLERANCES.items()}, "tasks": len(tasks)}

    def write(answers, served):
        if options.json:
            found = {"seconds": round(time.monotonic() - STARTED), "pairs": len(answers), **summary(answers)}
            found |= {"served": dict(sorted(served.items()))}
            options.json.write_text(json.dumps(data | found, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        options.work = Path(folder)
        native, _ = side(options, "native", tasks, {"FLAGOS_DISABLE_FLAGGEMS_PY": "1"}, STARTED + options.limit / 3)
        known = [task for task in tasks if f"{task['op']} {task['dtype']}" in native]
        conf = {"FLAGOS_BACKEND_CONFIG": str(options.conf.resolve()), "FLAGOS_DISABLE_FLAGGEMS_PY": None}
        answers, served = side(options, "conf", known, conf, STARTED + options.limit, write)
    write(answers, served)
    result = summary(answers)
    print(f"{options.conf.name}: {len(answers)} of {len(tasks)} (operator, dtype) pairs")
    for mode, row in result["modes"].items():
        print(f"{mode:10}{row['passed']:8} of {row['cases']:8} {row['percent']:8.3f} %")
    print(
        f"{len(served)} operators served by FlagGems, {sum(served.values())} calls; {len(result['failures'])} failures"
    )
    for failure in result["failures"][:40]:
        print(f"FAIL {failure['pair']} {failure['case']}: {failure['message'][:160]}")
    good = all(row["percent"] >= options.target for row in result["modes"].values())
    return 0 if result["modes"] and good else 1


if __name__ == "__main__":
    sys.exit(main())
