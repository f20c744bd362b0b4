"""From measurements to routes. Pure functions: no device, no operator is called.

A backend wins a group of calls (operator, dtype, size class) when its gain is beyond the noise on one clock and it is
not slower beyond the noise on the other: whether a program waits for the host or for the device depends on what else it
does. With clock="host" or "device" only that one counts. With clock="native" nothing wins: what remains when a
trial of the workload shows no gain.
"""

from dataclasses import asdict, dataclass, field

from torch_fl.tuning.measure import LEAST_NOISE, NATIVE, Clock

CLOCKS = ("both", "host", "device")


@dataclass
class Row:
    """The measurements of one group. Times are seconds of one native call; ratios are to them."""

    op: str
    dtype: str
    low: int
    high: int
    calls: int
    native: str
    default: str  # what serves the operator when no line names it
    host: float = 0.0
    device: float = 0.0
    clocks: dict[str, tuple[Clock, Clock]] = field(default_factory=dict)  # backend -> host's, device's
    refused: dict[str, str] = field(default_factory=dict)  # backend -> why it may not serve, or was not timed
    wrong: list[str] = field(default_factory=list)  # backends that gave another result than native
    passing: float = 1.0  # the host's time of a native call when the operator's route has conditions
    why: str = ""  # why nothing was measured

    @property
    def condition(self) -> str:
        parts = [f"dtype={self.dtype}"] if self.dtype else []
        return " ".join(parts + ([f"numel>={self.low}", f"numel<={self.high}"] if self.high else []))

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "Row":
        clocks = {name: tuple(Clock(**clock) for clock in pair) for name, pair in data["clocks"].items()}
        return cls(**{**data, "clocks": clocks})


@dataclass
class Decision:
    """The route of one operator: (backend, conditions) lines, and what all its measured calls then take."""

    op: str
    lines: list[tuple[str, str]]
    host: float = 1.0  # relative to native
    device: float = 1.0
    why: str = ""


def _counted(host: Clock, device: Clock, clock: str) -> list[Clock]:
    return [c for name, c in (("host", host), ("device", device)) if clock in (name, "both")]


def _loses(host: Clock, device: Clock, clock: str) -> bool:
    return any(c.ratio > 1 + c.noise for c in _counted(host, device, clock))


def _wins(host: Clock, device: Clock, clock: str) -> bool:
    gains = any(c.ratio * (1 + c.noise) < 1 for c in _counted(host, device, clock))
    return gains and not _loses(host, device, clock)


def _score(host: float, device: float, clock: str) -> float:
    return host if clock == "host" else device if clock == "device" else host * device


def winner(row: Row, clock: str, banned=frozenset()) -> str:
    """The backend of one group."""
    good = [name for name, pair in row.clocks.items() if name not in banned and _wins(*pair, clock)]
    return min(good, key=lambda name: _score(*(c.ratio for c in row.clocks[name]), clock), default=row.native)


def banned(rows: list[Row]) -> frozenset:
    """Backends that may serve no call of the operator: one wrong result is enough."""
    return frozenset(backend for row in rows for backend in row.wrong)


def winners(rows: list[Row], clock: str) -> dict[str, list[Row]]:
    """The measured groups of one operator by the backend that wins them."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if not row.why:
            found.setdefault(winner(row, clock, banned(rows)), []).append(row)
    return found


def _total(rows: list[Row], backend_of) -> tuple[Clock, Clock]:
    """Both clocks over all calls, when backend_of(row) gives each group's backend and factor of the host's time."""
    totals = []
    for index, name in enumerate(("host", "device")):
        native = [row.calls * getattr(row, name) for row in rows]
        ratio, noise = 0.0, 0.0
        for seconds, row in zip(native, rows, strict=True):
            backend, passing = backend_of(row)
            pair = row.clocks.get(backend)
            ratio += seconds * (pair[index].ratio if pair else passing if name == "host" else 1.0)
            noise += seconds * max((p[index].noise for p in row.clocks.values()), default=0.0)
        totals.append(Clock(ratio / (sum(native) or 1.0), noise / (sum(native) or 1.0)))
    return totals[0], totals[1]


def _ranges(rows: list[Row], backend: str, won: dict[str, list[Row]]) -> list[str]:
    """The conditions under which a backend serves: neighbouring groups that it wins are one."""
    names = {id(row): name for name, group in won.items() for row in group}
    conditions = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        run: list[Row] = []
        mine = sorted((row for row in rows if row.dtype == dtype), key=lambda row: row.low)
        for row in [*mine, None]:
            if row is not None and names[id(row)] == backend:
                run.append(row)
            elif run:
                last = row is None
                parts = [f"dtype={dtype}"] if dtype else []
                whole = last and len(run) == len(mine)
                if run[-1].high and not whole:  # beyond the largest that was seen the largest decides
                    parts += [f"numel>={run[0].low}"] + ([] if last else [f"numel<={run[-1].high}"])
                conditions.append(" ".join(parts))
                run = []
    return conditions


def decide(rows: list[Row], clock: str) -> Decision:
    """The route of one operator, from the rows of all its groups."""
    op, native, default = rows[0].op, rows[0].native, rows[0].default
    measured = [row for row in rows if not row.why]
    keep = Decision(op, [("native", "")] if default != native else [])
    if not measured or clock == NATIVE:
        keep.why = "a trial of the workload showed no gain" if measured else rows[0].why
        return keep
    won = winners(rows, clock)
    options = []
    for backend in {name for row in measured for name in row.clocks} - banned(rows):
        if all(backend in row.clocks for row in measured):
            options.append(([(backend, "")], *_total(measured, lambda _, b=backend: (b, 1.0))))
    if len(won) > 1:
        names = {id(row): name for name, group in won.items() for row in group}
        lines = [(name, c) for name in won if name != native for c in _ranges(measured, name, won)]
        mixed = _total(measured, lambda row: (names[id(row)], row.passing))
        if all(condition for _, condition in lines):
            options.append(([*lines, ("native", "")], *mixed))
    good = [option for option in options if _wins(*option[1:], clock)]
    if not good:
        keep.why = _why_native(measured, won, native)
        return keep
    # A route without conditions costs nothing to look at; it is preferred when it is as good.
    lines, host, device = min(good, key=lambda o: _score(o[1].ratio, o[2].ratio, clock) * (1.01 if o[0][0][1] else 1))
    return Decision(op, lines, host.ratio, device.ratio)


def _why_native(rows, won, native) -> str:
    gains = [c.ratio for row in rows for pair in row.clocks.values() for c in pair]
    if set(won) != {native}:
        return "what some calls gain, others lose"
    if gains and min(gains) < 1 - LEAST_NOISE:
        return "faster on one clock at most by the noise, or slower on the other"
    refused = [f"{backend} {why}" for row in rows for backend, why in row.refused.items() if not gains]
    return refused[0] if refused else "nothing is faster"


def portable(rows: list[Row], clock: str) -> str | None:
    """The backend for a conf that holds with and without FlagGems: "native", or None where the default is better.

    It knows no conditions, so that it costs nothing where there is no FlagGems, and it serves other workloads too, with
    other shares of each group: so the default has to win over all calls and must not lose in any group.
    """
    default = rows[0].default
    if default == rows[0].native:
        return None
    right = default not in banned(rows) and all(default in row.clocks and not row.why for row in rows)
    even = right and not any(_loses(*row.clocks[default], clock) for row in rows)
    if even and _wins(*_total(rows, lambda _: (default, 1.0)), clock):
        return None
    return "native"
