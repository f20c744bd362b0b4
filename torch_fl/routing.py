"""Which backend serves which operator: reading, explaining and changing routes.

The decisions are made in C++ (csrc/aten/resolve.cc); this file is their Python face. Operators are named as the
dispatcher names them, without `aten::`: `mm`, `add.Tensor`, `mm.out`. Where a name has to be an identifier, '.' is
written '__', as in FLAGOS_OP_mm__out.
"""

import contextlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch_fl import _C, _env, integration

_chip = ""
_configured: tuple[str, dict] = ("", {})  # the conf file and FLAGOS_OP_<name> of the start
_set: dict[str, str] = {}  # set_route()'s routes as they were given

# The backends that run FlagGems kernels.
FLAGGEMS_BACKENDS = ("flagos", "flagos_python")


class Route(NamedTuple):
    op: str
    backend: str
    origin: str  # api, env, conf FILE:LINE, or default
    reason: str


class Step(NamedTuple):
    backend: str
    chosen: bool
    reason: str


class Explanation(list):
    """The backends that were considered for an operator, in order, with what became of each."""

    def __init__(self, op, steps):
        super().__init__(Step(*step) for step in steps)
        self.op = op

    def __repr__(self):
        lines = [f"{self.op}:"]
        lines += [f"  {'->' if step.chosen else '  '} {step.backend:<14} {step.reason}" for step in self]
        return "\n".join(lines)


def default_conf(chip_name: str) -> Path:
    """The shipped conf file of a chip."""
    folder = Path(__file__).resolve().parent
    own = folder / f"backends_{chip_name}.conf"
    return own if own.exists() else folder / "backends.conf"


def configure(chip_name: str) -> None:
    """Reads conf file and environment. Called once, at import; raises before anything is applied."""
    global _chip, _configured
    conf = _env.get("FLAGOS_BACKEND_CONFIG") or os.fspath(default_conf(chip_name))
    if os.path.isdir(conf):  # which C++ would read as an empty file
        raise ValueError(f"{conf}: is a folder; FLAGOS_BACKEND_CONFIG must name a conf file")
    strict_mode, log = _env.flag("FLAGOS_STRICT"), _env.flag("FLAGOS_LOG_DISPATCH")
    by_operator = {f"FLAGOS_OP_{name}": backend for name, backend in _env.with_prefix("FLAGOS_OP_").items()}
    integration.install(chip_name)
    _C._configure(conf, by_operator)
    _configured = conf, by_operator
    for op, origin in _C._lines_without_effect():
        warnings.warn(
            f"torch_fl: {origin}: {op!r} has no route on the chip {chip_name}: torch composes it of others; "
            "route those",
            stacklevel=2,
        )
    _C._set_strict(strict_mode)
    _C._set_log(log)
    _chip = chip_name


@contextlib.contextmanager
def conf_files():
    """Inside the `with` block the function that it gives puts another conf file in force, in all threads, as if
    FLAGOS_BACKEND_CONFIG had named it. What set_route() and FLAGOS_OP_<name> say still goes before."""
    conf, by_operator = _configured
    try:
        yield lambda path: _C._configure(os.fspath(path), by_operator)
    finally:
        _C._configure(conf, by_operator)


def chip() -> str:
    """The name of the chip behind flagos: host, cuda, metax, ascend, ..."""
    return _chip


def routes() -> list[Route]:
    """The routing table: one row per operator."""
    return [Route(*row) for row in _C._routes()]


def _check_names(routes: dict) -> None:
    """One sentence for what the bindings would answer with their signatures."""
    for op, backend in routes.items():
        if not isinstance(op, str):
            raise TypeError(f"torch_fl: expected an operator's name, such as 'mm' or 'add.Tensor', got {op!r}")
        if not isinstance(backend, str):
            raise TypeError(f"torch_fl: {op}: expected a backend's name, such as 'cpu', got {backend!r}")


def explain(op: str) -> Explanation:
    """Every backend that was considered for `op`, with the reason for taking it or not."""
    _check_names({op: ""})
    return Explanation(op, _C._explain(op))


def set_route(op: str, backend: str | None) -> None:
    """Sends `op` to `backend` from now on, in all threads. None takes that back."""
    _check_names({op: "" if backend is None else backend})
    _C._set_route(op, backend)
    if backend is None:
        _set.pop(op, None)
    else:
        _set[op] = backend


def route_set(op: str) -> str | None:
    """What set_route() was last told for `op`, with its conditions."""
    return _set.get(op)


@contextlib.contextmanager
def route(ops: dict[str, str] | None = None, /, **names: str):
    """Sends operators elsewhere inside a `with` block, for the calling thread only.

    `with torch_fl.route(mm="cpu", add__Tensor="cpu"):` or, with dispatcher names, `route({"add.Tensor": "cpu"})`.
    """
    if not isinstance(ops, (Mapping, type(None))):
        raise TypeError(f"torch_fl: expected route(mm='cpu') or route({{'add.Tensor': 'cpu'}}), got route({ops!r})")
    wanted = dict(ops or {})
    wanted.update((name.replace("__", "."), backend) for name, backend in names.items())
    _check_names(wanted)
    pushed = _C._push_thread_route(wanted)
    try:
        yield
    finally:
        _C._pop_thread_route(pushed)


def fallbacks(reset: bool = False) -> dict[str, int]:
    """How often each operator ran on the CPU because nothing else had it; `reset` starts the count anew."""
    counts = dict(_C._fallbacks())
    if reset:
        _C._reset_fallbacks()
    return counts


class strict:
    """Makes a fallback to the CPU an error that names the operator: `torch_fl.strict()`, `torch_fl.strict(False)`.

    Takes effect at once; used in a `with` statement, the earlier state comes back at its end.
    """

    def __init__(self, enabled: bool = True):
        self._previous = _C._set_strict(bool(enabled))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        _C._set_strict(self._previous)


class OpCounts:
    """Calls per operator and the backend that served them, and their host time, since count_ops() was entered."""

    def __init__(self):
        self._start = self._now()
        self._end = None

    @staticmethod
    def _now():
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for op, backend, calls, nanoseconds in _C._counts():  # one row per way in which the backend was chosen
            before = found.get((op, backend), (0, 0))
            found[op, backend] = (before[0] + calls, before[1] + nanoseconds)
        return found

    def rows(self) -> list[tuple[str, str, int]]:
        """(op, backend, calls), most calls first."""
        return [(op, backend, calls) for op, backend, calls, _ in self.timed_rows()]

    def timed_rows(self) -> list[tuple[str, str, int, float]]:
        """(op, backend, calls, seconds of the host without the operators called inside), most calls first."""
        now = self._end if self._end is not None else self._now()
        rows = []
        for (op, backend), (calls, nanoseconds) in now.items():
            before = self._start.get((op, backend), (0, 0))
            rows.append((op, backend, calls - before[0], max(nanoseconds - before[1], 0) / 1e9))
        return sorted((row for row in rows if row[2] > 0), key=lambda row: (-row[2], row[0], row[1]))

    def by_backend(self) -> dict[str, int]:
        """Calls per backend."""
        totals: dict[str, int] = {}
        for _, backend, calls in self.rows():
            totals[backend] = totals.get(backend, 0) + calls
        return totals


@contextlib.contextmanager
def count_ops():
    """Counts and times operator calls inside a `with` block, of all threads.

    `with torch_fl.count_ops() as counts: ...`, then `counts.by_backend()` or `torch_fl.report(counts)`.
    """
    previous = _C._set_counting(True)
    counts = OpCounts()
    try:
        yield counts
    finally:
        counts._end = counts._now()
        _C._set_counting(previous)


def get_registered_ops() -> list[str]:
    """The names of all operators that have a route."""
    return _C._registered_ops()


def is_flaggems_enabled() -> bool:
    """Whether some operator is routed to a FlagGems kernel, in C++ or Python."""
    return any(row.backend in FLAGGEMS_BACKENDS for row in routes())
