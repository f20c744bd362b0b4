"""tune(): from a workload to a conf file whose every line was measured on this machine. docs/routing.md explains it."""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from torch_fl import flagos, routing
from torch_fl.tuning import choose, measure, trial
from torch_fl.tuning.choose import Row
from torch_fl.tuning.observe import Group, Observer, choice
from torch_fl.tuning.report import Tuned, where

_NEVER = f"numel>={2**62}"  # a condition that no call meets


class tune:
    """Observes the operators inside a `with` block, then measures which backend serves each of them best.

    `with torch_fl.tune("tuned.conf") as tuning: step()`; afterwards `print(tuning.report)`. The routes of this process
    stay as they are; the file is for FLAGOS_BACKEND_CONFIG. Forward and backward of the calling thread are seen.

    `budget`: seconds for the measurements, which begin at the end of the block. `clock`: "both" takes a kernel that is
    faster on the device or on the host and slower on neither; "host" or "device" looks only at that one. `memory`:
    bytes for copies of arguments (a quarter of what is free). `progress`: says on stderr what is being measured.
    """

    def __init__(
        self,
        out: str | Path | None = None,
        *,
        budget: float = 120.0,
        clock: str = "both",
        memory: int | None = None,
        progress: bool = False,
    ):
        if clock not in choose.CLOCKS:
            raise ValueError(f"torch_fl: tune(clock={clock!r}): expected one of {', '.join(choose.CLOCKS)}")
        self.out, self.budget, self.clock, self.progress = out, budget, clock, progress
        self.report: Tuned | None = None
        self._observer = Observer(memory)

    def __enter__(self):
        self._observer.__enter__()
        return self

    def __exit__(self, kind, error, traceback):
        self._observer.__exit__(kind, error, traceback)
        if kind is None:
            self.finish()

    def finish(self) -> Tuned:
        """Measures what was observed; __exit__ does it, unless the block ended with an exception."""
        self.report = _measure_all(self._observer, self.budget, self.clock, self._say)
        if self.out is not None:
            self.report.write(self.out)
        return self.report

    def trial(self, *parts: Callable[[], object], budget: float = 60.0) -> Tuned:
        """Lets the workload itself have the last word, after the block: runs the parts, functions without
        arguments, in turns under native routes and under those that each clock would choose, for `budget`
        seconds after two runs under each. Taken is the set that is faster in some part and slower in none
        (trial.pick); native, when no set is. What a part does, it does each time: steps of an optimizer go on.
        Replaces `report` and the file."""
        if self.report is None:
            raise RuntimeError("torch_fl: tune: trial() has nothing to try: it comes after the block that was measured")
        if not parts:
            raise ValueError("torch_fl: tune: trial() needs the workload: one function for each of its parts")
        clocks = choose.CLOCKS if self.clock == "both" else (self.clock,)
        self.report = _try_out(self.report, clocks, list(parts), budget, self._say)
        if self.out is not None:
            self.report.write(self.out)
        return self.report

    def _say(self, text: str) -> None:
        if self.progress:
            print(f"tune: {text}", file=sys.stderr, flush=True)


# ---- measuring -----------------------------------------------------------------------------------------------------


def _measure_all(observer: Observer, budget: float, clock: str, say) -> Tuned:
    start = time.monotonic()
    groups = list(observer.groups.values())
    say(
        f"{len(groups)} groups of calls of {len({g.op for g in groups})} operators have a choice; {budget:g} s for them"
    )
    random = torch.get_rng_state(), flagos.get_rng_state_all() if groups else None
    try:
        rows = _rows(groups, _host_times(observer), start + budget, say)
        _passing(groups, rows, clock, start + budget, say)
    finally:
        torch.set_rng_state(random[0])
        if random[1] is not None:
            flagos.set_rng_state_all(random[1])
    seen = {group.op for group in groups} | set(observer.left_out)
    unseen = [op for op in routing.get_registered_ops() if op not in seen and choice(op)]
    return Tuned(where(), clock, list(rows.values()), observer.left_out, unseen, time.monotonic() - start)


def _host_times(observer: Observer) -> dict[str, float]:
    """Seconds of the host per operator in the workload: what to measure first."""
    times: dict[str, float] = {}
    for op, _, _, seconds in observer.counts.timed_rows():
        times[op] = times.get(op, 0.0) + seconds
    return times


def _rows(groups: list[Group], times: dict[str, float], end: float, say) -> dict[int, Row]:
    """id(group) -> its measurements. Operators that took most time first."""
    busy = measure.Busy(bool(groups) and routing.chip() != "host")
    found = {}
    ordered = sorted(groups, key=lambda g: (-times.get(g.op, 0.0), g.op, -g.calls))
    for number, group in enumerate(ordered, 1):
        row = found[id(group)] = _empty_row(group)
        if not group.samples:
            row.why = group.nothing
        elif time.monotonic() > end:
            row.why = "the time was over before it was measured"
        else:
            _measure_group(group, row, busy)
        say(f"{number}/{len(groups)} {group.op} {row.condition} ({group.calls} calls): {_words(row)}")
    return found


def _empty_row(group: Group) -> Row:
    return Row(
        group.op, group.dtype, group.low, group.high, group.calls, group.choice.native, group.choice.default
    )  # fmt: skip


def _measure_group(group: Group, row: Row, busy) -> None:
    results, calls = [], []
    routes = {backend: backend for backend in group.choice.others}
    for sample in group.samples.values():
        try:
            _check(group, row, sample, routes)
            results.append(measure.measure(group.func, group.op, sample, routes, busy))
        except torch.AcceleratorError as error:
            raise _device_lost(sample, error) from error
        except RuntimeError as error:  # no memory for another result, for example
            row.why = f"cannot be called again: {measure.first_line(error)}"
            return
        calls.append(sample.calls)
    _combine(row, results, calls)


def _check(group: Group, row: Row, sample, routes: dict[str, str]) -> None:
    """Takes the backends out of `routes` that must not serve the sample."""
    for backend in list(routes):
        try:
            measure.check(group.func, group.op, backend, sample)
        except measure.Wrong as error:
            row.refused[backend] = str(error)
            if isinstance(error, measure.Different):
                row.refused[backend] += f", for {sample.words}"
                row.wrong.append(backend)
            del routes[backend]


def _combine(row: Row, results, calls) -> None:
    """One figure per backend of several samples, each weighted with its calls."""
    total = sum(calls)
    row.host, row.device = (
        sum(n * getattr(r, name) for r, n in zip(results, calls, strict=True)) / total for name in ("host", "device")
    )
    for result in results:
        row.refused.update(result.refused)
    for backend in {name for result in results for name in result.clocks}:
        if backend in row.refused:  # of one sample
            continue
        clocks = []
        for index, name in enumerate(("host", "device")):
            native = [n * getattr(r, name) for r, n in zip(results, calls, strict=True)]
            mine = [r.clocks[backend][index] for r in results]
            ratio = sum(t * c.ratio for t, c in zip(native, mine, strict=True)) / sum(native)
            clocks.append(measure.Clock(ratio, max(c.noise for c in mine)))
        row.clocks[backend] = (clocks[0], clocks[1])


def _passing(groups: list[Group], rows: dict[int, Row], clock: str, end: float, say) -> None:
    """Of operators that several backends win: what native calls cost when a route has to look at its conditions."""
    busy = measure.Busy(False)
    for op in dict.fromkeys(group.op for group in groups):
        mine = [group for group in groups if group.op == op]
        won = choose.winners([rows[id(group)] for group in mine], clock)
        for group in mine:
            row = rows[id(group)]
            others = [name for name in won if name != row.native]
            if not others or row not in won.get(row.native, []):
                continue
            if time.monotonic() > end + 5:
                row.passing = float("inf")  # not known, so not taken
                continue
            sample = max(group.samples.values(), key=lambda s: s.calls)
            routes = {"passing": f"{others[0]} [{_NEVER}]"}
            result = measure.measure(group.func, op, sample, routes, busy)
            row.passing = result.clocks["passing"][0].ratio if "passing" in result.clocks else float("inf")
            say(
                f"{op} {row.condition}: native under a route with conditions takes {row.passing:.2f} of the host's time"
            )


def _device_lost(sample, error):
    return RuntimeError(
        f"flagos: tune: the device failed while {sample.words} was measured, and this process cannot go on: "
        f"{measure.first_line(error)}; give the operator's FlagGems kernel the verdict wrong and tune again"
    )


def _words(row: Row) -> str:
    if row.why:
        return row.why
    timed = [f"{name} device {d.ratio:.2f} host {h.ratio:.2f}" for name, (h, d) in row.clocks.items()]
    return "; ".join(timed + [f"{name} {why}" for name, why in row.refused.items()]) or "nothing to compare"


# ---- trying --------------------------------------------------------------------------------------------------------


def _try_out(report: Tuned, clocks, parts: list[Callable], budget: float, say) -> Tuned:
    sets: dict[str, Tuned] = {}
    for clock in (measure.NATIVE, *clocks):
        one = report.by(clock)
        if all(one.routes() != other.routes() for other in sets.values()):
            sets[clock] = one
    with tempfile.TemporaryDirectory() as folder, routing.conf_files() as use:
        for clock, one in sets.items():
            one.write(Path(folder, clock))
        found = trial.run(parts, list(sets), lambda clock: use(Path(folder, clock)), budget)
    speeds = trial.speeds(found)
    taken = trial.pick(speeds)
    rounds = len(found[taken][0])
    for clock, own in speeds.items():
        say(f"{clock}: " + "; ".join(f"part {n} {s.ratio:.3f} of native's speed" for n, s in enumerate(own, 1)))
    if not speeds:
        say(f"{rounds} rounds in {budget:g} s are too few to tell routes apart; native routes stay")
    data = {name: [asdict(s) for s in own] for name, own in speeds.items()}
    return report.by(taken, {"taken": taken, "rounds": rounds, "seconds": budget, "speeds": data})


__all__ = ["Tuned", "tune"]
