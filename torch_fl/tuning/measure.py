"""Measures the backends of an operator against the native one, on the device's clock and on the host's.

Pairs: in each round every backend runs a block of calls between two blocks of the native one, in alternating order, so
that what slows the machine down meets all of them. A backend's figure is the median over the rounds of its time
relative to the native time of its round. The noise is the spread of native against itself: how many times longer one of
a round's two native blocks took than the other, less one; of all rounds the value that nine of ten stay below.

The device's clock are two events around a block. So that launches do not wait for the host, the device gets something
to do before the first of them. The host's clock says how long it takes to enqueue a call.
"""

import contextlib
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_flatten

from torch_fl import _C, debug, flagos, routing
from torch_fl.tuning.observe import Sample, copied

ROUNDS = 9
NATIVE = "native"
LEAST_NOISE = 0.02
HOPELESS = 10  # times native's time: not worth a pair
_BLOCK = 2e-3  # seconds that a block should take at least
_MOST_CALLS = 100  # of one block; of an operator that writes its arguments fewer, because they drift
_MOST_CALLS_WRITING = 16
_WARM = 4  # a launch plan is recorded at the second call and used from the third on
_CHUNK = 1 << 24  # elements compared at once


class Wrong(Exception):
    """The backend must not serve such a call."""


class Different(Wrong):
    """It gives another result than the native kernel."""


@dataclass
class Clock:
    """Times of one clock: relative to native, and how far native is from itself."""

    ratio: float
    noise: float


@dataclass
class Measured:
    """What came of one sample."""

    host: float = 0.0  # seconds of one native call
    device: float = 0.0
    clocks: dict[str, tuple[Clock, Clock]] = field(default_factory=dict)  # backend -> host's, device's
    refused: dict[str, str] = field(default_factory=dict)  # backend -> why it was not timed


def first_line(error) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


@contextlib.contextmanager
def routed(op: str, backend: str):
    """The route of an operator for all threads, as a conf sets it: unlike route() it leaves the others fast."""
    before = routing.route_set(op)
    routing.set_route(op, backend)
    try:
        yield
    finally:
        routing.set_route(op, before)


# ---- right? --------------------------------------------------------------------------------------------------------


def _chunks(tensor):
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    return [flat] if flat.numel() <= _CHUNK else flat.split(_CHUNK)


def _difference(actual, expected) -> str | None:
    if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
        return debug._mismatch(actual, expected, None)
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return f"{debug._shown(actual)} instead of {debug._shown(expected)}"
    if expected.numel() and any(
        n > 1 and a != e for n, a, e in zip(expected.shape, actual.stride(), expected.stride(), strict=True)
    ):
        return f"strides {tuple(actual.stride())} instead of {tuple(expected.stride())}"
    for mine, native in zip(_chunks(actual), _chunks(expected), strict=True):
        if words := debug._mismatch(mine, native, None):
            return words
    return None


def _run(func, sample: Sample):
    args, kwargs = copied(sample.args, sample.kwargs)
    with torch.no_grad():
        returned = func(*args, **kwargs)
    return debug._results(args, kwargs, returned, func)


def check(func, op: str, backend: str, sample: Sample) -> None:
    """Raises Wrong unless the backend serves this very call and gives what the native one gives."""
    with routed(op, NATIVE):
        expected = _run(func, sample)
    try:
        with routed(op, backend), routing.count_ops() as counts:
            actual = _run(func, sample)
        if not any(row[:2] == (op, backend) for row in counts.rows()):
            raise Wrong("passes such calls on: they are outside its limits")
        with routed(op, NATIVE):
            for (what, mine), (_, theirs) in zip(actual, expected, strict=True):
                if words := _difference(mine, theirs):
                    raise Different(f"differs from native in {what}: {words}")
    except torch.AcceleratorError:
        raise
    except Wrong:
        raise
    except Exception as error:
        raise Wrong(f"raises {first_line(error)}") from error


# ---- how fast? -----------------------------------------------------------------------------------------------------


class Busy:
    """Work that keeps the device from waiting for the host while a block is enqueued."""

    def __init__(self, needed: bool):
        self._target = self._source = None
        self._seconds = 0.0
        if not needed:
            return
        try:
            self._source = torch.zeros(1 << 27, dtype=torch.uint8, device="flagos")
            self._target = torch.empty_like(self._source)
        except RuntimeError:  # no memory to spare: small kernels then show the host's time
            self._target = None
            return
        first, last = (flagos.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):
            first.record()
            for _ in range(8):
                self._target.copy_(self._source)
            last.record()
            last.synchronize()
        self._seconds = first.elapsed_time(last) / 8e3

    def __call__(self, seconds: float) -> None:
        if self._target is not None and self._seconds > 0:
            for _ in range(min(1000, int(seconds / self._seconds) + 1)):
                self._target.copy_(self._source)


class Block:
    """Calls of one sample with copies of its arguments; what they write is restored before each block."""

    def __init__(self, func, op: str, sample: Sample, busy: Busy):
        self.op, self.busy = op, busy
        self.args, self.kwargs = copied(sample.args, sample.kwargs)
        self.written = list(
            zip(_written(func, self.args, self.kwargs), _written(func, sample.args, sample.kwargs), strict=True)
        )
        self.counts: dict[str, int] = {}  # backend -> calls of a block
        self.hosts: dict[str, float] = {}  # backend -> seconds of the host for a call, when it last ran
        self.first, self.last = (flagos.Event(enable_timing=True) for _ in range(2))

    def restore(self) -> None:
        for mine, original in self.written:
            if mine.shape == original.shape:
                mine.copy_(original)

    def warm(self, backend: str) -> float:
        """Runs a backend until it is in its stride; seconds of one call. Sets how many calls its blocks have."""
        seconds = []
        with routed(self.op, backend):
            for count in (_WARM, 2, 2):
                self.restore()
                flagos.synchronize()
                start = time.perf_counter()
                self.hosts[backend] = _C._repeat(self.op, tuple(self.args), self.kwargs, count) / count
                flagos.synchronize()
                seconds.append((time.perf_counter() - start) / count)
        most = _MOST_CALLS_WRITING if self.written else _MOST_CALLS
        self.counts[backend] = max(1, min(most, round(_BLOCK / max(min(seconds[1:]), 1e-7))))
        return min(seconds[1:])

    def __call__(self, backend: str) -> tuple[float, float]:
        """Seconds per call of the host and of the device."""
        count = self.counts[backend]
        self.restore()
        with routed(self.op, backend):
            flagos.synchronize()
            self.busy(1.5 * self.hosts[backend] * count)
            self.first.record()
            host = self.hosts[backend] = _C._repeat(self.op, tuple(self.args), self.kwargs, count) / count
            self.last.record()
            self.last.synchronize()
        return host, max(self.first.elapsed_time(self.last) / 1e3, 1e-9) / count


def _written(func, args, kwargs) -> list[torch.Tensor]:
    """The tensors that a call writes, in the schema's order."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[position] if position < len(args) else None)
            found += [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
    return found


def noise_of(ratios) -> float:
    """From the ratios of native blocks of the same round."""
    spread = sorted(max(r, 1 / r) - 1 for r in ratios)
    return max(LEAST_NOISE, spread[int(0.9 * (len(spread) - 1))])


def measure(func, op: str, sample: Sample, routes: dict[str, str], busy: Busy, rounds=ROUNDS) -> Measured:
    """Times the routes (name -> backend, perhaps with conditions) against the native backend."""
    result = Measured()
    block = Block(func, op, sample, busy)
    alone = block.warm(NATIVE)
    order = []
    for name, backend in routes.items():
        try:
            times = block.warm(backend) / alone
        except torch.AcceleratorError:
            raise
        except Exception as error:
            result.refused[name] = f"raises {first_line(error)}"
            continue
        if times > HOPELESS:
            result.refused[name] = f"took {times:.0f} times as long as native in a first trial"
        else:
            order.append(name)
    natives, ratios = [], {name: [] for name in order}
    for number in range(rounds):
        before = block(NATIVE)
        mine = {name: block(routes[name]) for name in (reversed(order) if number % 2 else order)}
        after = block(NATIVE)
        natives.append((before, after))
        for name, seconds in mine.items():
            ratios[name].append([2 * m / (b + a) for m, b, a in zip(seconds, before, after, strict=True)])
    result.host, result.device = (
        statistics.median(seconds[clock] for pair in natives for seconds in pair) for clock in (0, 1)
    )
    noise = [noise_of([after[clock] / before[clock] for before, after in natives]) for clock in (0, 1)]
    for name, rows in ratios.items():
        clocks = (Clock(statistics.median(row[clock] for row in rows), noise[clock]) for clock in (0, 1))
        result.clocks[name] = tuple(clocks)
    return result
