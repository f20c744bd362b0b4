"""Which set of routes serves a whole workload fastest: the sets run it in turns.

A kernel that wins in a loop of its own may win nothing among others, where caches are cold; and only the workload says
whether it waits for the host or for the device. So the last word has the workload itself.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch_fl import flagos
from torch_fl.tuning.measure import LEAST_NOISE, NATIVE

LEAST_ROUNDS = 6  # fewer bound no median with 95 % confidence


@dataclass
class Speed:
    """Of one part under one set of routes: native's time over its own in the same round. The median, and the bounds
    between which the true one lies with 95 % confidence, whatever the distribution: two of the sorted ratios."""

    ratio: float
    low: float
    high: float


def speed(ratios: Iterable[float]) -> Speed:
    ordered = sorted(ratios)
    n, bound, below = len(ordered), 0, 1
    # A ratio is above the true median or not, as a coin falls: `below` of 2 ** n outcomes have `bound` or fewer.
    while 40 * (below := below + math.comb(n, bound + 1)) <= 2**n:
        bound += 1
    return Speed(statistics.median(ordered), ordered[bound], ordered[-1 - bound])


def pick(speeds: dict[str, list[Speed]]) -> str:
    """The set that is surely faster than native in one part and slower in none; the fastest of several; else native."""
    good = [
        name
        for name, parts in speeds.items()
        if any(p.low > 1 for p in parts) and all(p.high >= 1 and p.ratio >= 1 - LEAST_NOISE for p in parts)
    ]
    return max(good, key=lambda name: math.prod(p.ratio for p in speeds[name]), default=NATIVE)


def run(parts: list[Callable], names: list[str], use: Callable[[str], None], seconds: float) -> dict[str, list[list]]:
    """{set: [of each part its seconds in each round]}. `use(name)` puts a set of routes in force."""
    for name in names:  # kernels are compiled, launch plans recorded
        use(name)
        for part in (*parts, *parts):
            part()
    flagos.synchronize()
    found = {name: [[] for _ in parts] for name in names}
    order, shuffle = list(names), random.Random(0).shuffle
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        shuffle(order)
        for name in order:
            use(name)
            for part, times in zip(parts, found[name], strict=True):
                part()  # the first calls after a change of routes decide anew
                flagos.synchronize()
                start = time.perf_counter()
                part()
                flagos.synchronize()
                times.append(time.perf_counter() - start)
    return found


def speeds(found: dict[str, list[list]]) -> dict[str, list[Speed]]:
    """Of every set but native; none of too few rounds."""
    native = found[NATIVE]
    if len(native[0]) < LEAST_ROUNDS:
        return {}
    return {
        name: [
            speed(n / s for n, s in zip(theirs, own, strict=True)) for theirs, own in zip(native, parts, strict=True)
        ]
        for name, parts in found.items()
        if name != NATIVE
    }
