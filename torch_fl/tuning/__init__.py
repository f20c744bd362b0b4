"""tune(): from a workload to a conf file whose every line was measured on this machine. docs/routing.md explains it."""

import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from torch_fl import flagos, integration, routing
from torch_fl.tuning import choose, measure, trial
from torch_fl.tuning.choose import Row
from torch_fl.tuning.observe import Group, Observer, choice

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

    def finish(self) -> "Tuned":
        """Measures what was observed; __exit__ does it, unless the block ended with an exception."""
        self.report = _measure_all(self._observer, self.budget, self.clock, self._say)
        if self.out is not None:
            self.report.write(self.out)
        return self.report

    def trial(self, *parts: Callable[[], object], budget: float = 60.0) -> "Tuned":
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


def _measure_all(observer: Observer, budget: float, clock: str, say) -> "Tuned":
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


# ---- trying --------------------------------------------------------------------------------------------------------


def _try_out(report: "Tuned", clocks, parts: list[Callable], budget: float, say) -> "Tuned":
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


def where() -> dict:
    """What the measurements hold for."""
    data = {
        "device": flagos.get_device_name(),
        "chip": routing.chip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "flag_gems": integration.installed_version() or "none",
    }
    for name in ("torch_fl", "triton"):
        try:
            data[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        data["cuda"] = torch.version.cuda
    return data


# ---- what comes of it ----------------------------------------------------------------------------------------------


class Tuned:
    """The outcome of tune(): prints as a table; `write()` makes the conf, `as_dict()` what --json prints."""

    def __init__(
        self,
        where: dict,
        clock: str,
        rows: list[Row],
        left_out: dict[str, str],
        unseen: list[str],
        seconds: float,
        trial: dict | None = None,
    ):
        self.where, self.clock, self.rows, self.seconds = where, clock, rows, seconds
        self.left_out, self.unseen = left_out, unseen  # operators: called and not measured, not called
        self.trial = trial  # what the workload's runs under each set of routes came to
        by_op: dict[str, list[Row]] = {}
        for row in rows:
            by_op.setdefault(row.op, []).append(row)
        self.decisions = {op: choose.decide(mine, clock) for op, mine in sorted(by_op.items())}

    def by(self, clock: str, trial: dict | None = None) -> "Tuned":
        """What another clock, or "native", makes of the same measurements."""
        return Tuned(self.where, clock, self.rows, self.left_out, self.unseen, self.seconds, trial)

    def routes(self) -> dict[str, list]:
        return {op: decision.lines for op, decision in self.decisions.items()}

    def as_dict(self) -> dict:
        decisions = {
            op: {"lines": [_line(op, *line) for line in d.lines], "host": d.host, "device": d.device, "why": d.why}
            for op, d in self.decisions.items()
        }
        return {
            "where": self.where,
            "clock": self.clock,
            "seconds": self.seconds,
            "gains": self.gains(),
            "trial": self.trial,
            "routes": decisions,
            "left_out": self.left_out,
            "unseen": self.unseen,
            "rows": [row.as_dict() for row in self.rows],
        }

    @classmethod
    def from_dict(cls, data: dict) -> "Tuned":
        """What as_dict() told of; the decisions are made anew from the measurements."""
        rows = [Row.from_dict(row) for row in data["rows"]]
        names = ("left_out", "unseen", "seconds", "trial")
        return cls(data["where"], data["clock"], rows, *(data[name] for name in names))

    def gains(self) -> dict[str, float]:
        """Time of all measured calls with the chosen routes relative to native, on each clock; 1 without calls."""
        totals = {}
        for name in ("host", "device"):
            native = chosen = 0.0
            for row in self.rows:
                seconds = row.calls * getattr(row, name)
                native += seconds
                chosen += seconds * getattr(self.decisions[row.op], name)
            totals[name] = chosen / native if native else 1.0
        return totals

    def conf(self) -> str:
        """The text of the conf file."""
        versions = ", ".join(f"{name} {value}" for name, value in self.where.items() if name not in ("device", "chip"))
        lines = [
            "# Routes chosen by `python -m torch_fl tune` or torch_fl.tune(); load them with FLAGOS_BACKEND_CONFIG.",
            f"# Measured on {self.where['device']} (chip {self.where['chip']}), {versions}.",
            "# They hold for that device and those versions. Below an operator: calls in the workload, microseconds of",
            "# one native call, then each backend's time relative to it +- the spread of native against itself.",
            *(f"# {line}" for line in self._trial_lines()),
        ]
        for op, decision in self.decisions.items():
            lines += ["", *(_line(op, *line) for line in decision.lines)]
            if not decision.lines:
                lines.append(f"# {op}: stays with the default; {decision.why or 'native'}")
            elif decision.why:
                lines.append(f"# {decision.why}")
            lines += [f"#   {text}" for row in self.rows if row.op == op for text in _figures(row)]
        routed = [op for op in self.left_out if op not in self.decisions]
        if routed:
            lines += ["", "# Called, and not measured: they stay native."]
            lines += [f"{_line(op, 'native', ''):<44} # {self.left_out[op]}" for op in sorted(routed)]
        if self.unseen:  # autograd calls some only when nobody watches: `add_` where an observer sees `add`
            lines += ["", "# Not called while tune was watching: nobody has timed another kernel for them."]
            lines += [_line(op, "native", "") for op in sorted(self.unseen)]
        return "\n".join(lines) + "\n"

    def _trial_lines(self):
        if not self.trial:
            return
        tried = self.trial
        yield f"tried on the workload, {tried['rounds']} rounds; taken: {tried['taken']}; of native's speed, by the"
        yield "clock that chose the routes, with the interval of the median (95 %):"
        for clock, parts in tried["speeds"].items():
            words = [f"part {n} {p['ratio']:.3f} ({p['low']:.3f} to {p['high']:.3f})" for n, p in enumerate(parts, 1)]
            yield f"  {clock}: " + ", ".join(words)

    def write(self, path: str | Path) -> None:
        Path(path).write_text(self.conf(), encoding="utf-8")

    def __str__(self):
        head = f"{'operator':<34} {'route':<40} {'calls':>8} {'device':>7} {'host':>7}"
        lines = [f"{self.where['device']}, {len(self.rows)} groups of calls in {self.seconds:.0f} s", head]
        for op, decision in self.decisions.items():
            calls = sum(row.calls for row in self.rows if row.op == op)
            route = "; ".join(f"{b} [{c}]" if c else b for b, c in decision.lines) or "default"
            figures = f"{calls:>8} {decision.device:>7.2f} {decision.host:>7.2f}"
            lines.append(f"{op:<34} {route:<40} {figures}  {decision.why}".rstrip())
        lines += [f"{op:<34} {'native, not measured':<40} {why}" for op, why in sorted(self.left_out.items())]
        gains = self.gains()
        lines.append(f"all measured calls: device {gains['device']:.3f}, host {gains['host']:.3f} of native's time")
        lines += self._trial_lines()
        return "\n".join(lines)

    def json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)


def _line(op: str, backend: str, condition: str) -> str:
    return f"{op} = {backend}" + (f" [{condition}]" if condition else "")


def _figures(row: Row):
    name = row.condition or "every call"
    if row.why:
        yield f"{name}: {row.calls} calls, not measured: {row.why}"
        return
    timed = [
        f"{backend} device {d.ratio:.2f} +- {d.noise:.2f}, host {h.ratio:.2f} +- {h.noise:.2f}"
        for backend, (h, d) in row.clocks.items()
    ]
    yield f"{name}: {row.calls} calls, native device {1e6 * row.device:.1f} host {1e6 * row.host:.1f}" + "".join(
        f"; {text}" for text in timed
    )
    for backend, why in row.refused.items():
        yield f"{name}: {backend} not taken: {why}"


__all__ = ["Tuned", "tune"]
