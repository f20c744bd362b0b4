"""From the cases of a kernel to its verdict: right, right within limits, wrong, or not judged.

A pure function of the outcomes. The limits are those that torch_fl/flaggems checks at each call: dtypes, contiguous,
unexpanded, aligned, nonempty, nonscalar, same_shape, same_dtype, several, defaults, max_numel. Of all sets of limits
under which no case fails, the one that keeps most passing cases is taken, and of those the smallest. What no case has
tried is not promised: nor are dtypes, strides, sizes of zero or tensors without dimensions. `aligned` is a limit only
where the kernel's own message asks for it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

from tests.common import judge_cases

TRIED = ("contiguous", "unexpanded", "nonempty", "nonscalar")  # not given up before a case without them has passed
FLAGS = (*TRIED, "aligned", "same_shape", "same_dtype", "several")
ALIGNED = "aligned"  # in the message of a case that began where it may not: tensors with strides often do, too
FAULT = "illegal memory access"  # in the message of a case that read or wrote where nothing is
STRIDES = "strides are"  # in the message of a case whose result has other strides
VALUES = ("special", "infinite", "negative")  # last words of the labels of cases with other values
LAYOUTS = (*judge_cases.LAYOUTS, "broadcast", "mixed", "scalar")  # likewise of cases with other sizes, strides, dtypes
ENOUGH = 3  # passing cases without which nothing is called right


@dataclass
class Outcome:
    label: str
    state: str  # passed, failed, or limitation: this judge's own, which says nothing about the kernel
    dtypes: list[str] = field(default_factory=list)  # of the tensors
    flags: list[str] = field(default_factory=list)  # those of FLAGS that hold
    numel: int = 0  # of the largest tensor
    message: str = ""
    call: str = ""  # the operator and its arguments in words
    changed: list[str] = field(default_factory=list)  # arguments that do not have their default

    @property
    def values(self) -> str:
        """Which other values its sample was given; "" when it has its own."""
        return self._word(VALUES)

    @property
    def layout(self) -> str:
        """Which other sizes, strides or dtypes its sample was given; "" when it has its own."""
        return self._word(LAYOUTS)

    def _word(self, known) -> str:
        word = self.label.split()[-1]
        return word if word in known else ""


def features(tensors, dtypes=()) -> dict:
    """What the limits look at, as csrc/python/python_kernels.cc computes it. `dtypes`: those among the arguments."""
    flags = []
    if all(t.is_contiguous() for t in tensors):
        flags.append("contiguous")
    if not any(n > 1 and stride == 0 for t in tensors for n, stride in zip(t.shape, t.stride(), strict=True)):
        flags.append("unexpanded")
    if all(t.numel() for t in tensors):
        flags.append("nonempty")
    if all(t.dim() for t in tensors):
        flags.append("nonscalar")
    if all(t.data_ptr() % 16 == 0 for t in tensors):
        flags.append("aligned")
    if len({t.shape for t in tensors}) <= 1:
        flags.append("same_shape")
    if len({t.dtype for t in tensors}) <= 1:
        flags.append("same_dtype")
    if len(tensors) > 1:
        flags.append("several")
    return {
        "dtypes": sorted({str(d).split(".")[1] for d in (*dtypes, *(t.dtype for t in tensors))}),
        "flags": flags,
        "numel": max((t.numel() for t in tensors), default=0),
    }


def _dtypes(passed, failed):
    """The dtypes of the passing cases without those that have to go so that no case fails; None when nothing is left.

    The dtype goes first that takes most failures with it for each passing case that it costs. Where a dtype that passes
    with its own samples fails with another layout, the layout is to blame: only dtypes stay that pass with it."""
    plain = {tuple(o.dtypes) for o in passed if not o.layout}
    blamed = {o.layout for o in failed if o.layout and tuple(o.dtypes) in plain}
    allowed = {d for o in passed for d in o.dtypes}
    for layout in blamed:
        allowed &= {d for o in passed if o.layout == layout for d in o.dtypes}
    while True:
        left = [o for o in failed if set(o.dtypes) <= allowed]
        if not left:
            return allowed

        def price(d, left=left):
            loss = sum(d in o.dtypes and set(o.dtypes) <= allowed for o in passed)
            return (loss / sum(d in o.dtypes for o in left), d)

        candidates = {d for o in left for d in o.dtypes}
        if not candidates:  # a case without tensors, or one that is no dtype's fault
            return None
        allowed.discard(min(candidates, key=price))
        if not allowed:
            return None


def verdict(outcomes: list[Outcome], note: str = "") -> dict:
    """The entry of verdicts_*.json. `note`: what kept the judge from trying more."""
    passed = [o for o in outcomes if o.state == "passed"]
    # Whether a kernel that goes beyond an empty tensor meets memory there is chance: it is wrong for every dtype.
    failed = [
        replace(o, dtypes=[]) if FAULT in o.message and "nonempty" not in o.flags else o
        for o in outcomes
        if o.state == "failed"
    ]
    limited = [o for o in outcomes if o.state == "limitation"]
    counts = {"cases": len(passed) + len(failed), "passed": len(passed)}
    if not passed and not failed:
        why = f"not judged here: {limited[0].message}" if limited else f"not judged: {note or 'no sample reaches it'}"
        return {"verdict": "unjudged", "why": why}
    if not failed:
        if len(passed) < ENOUGH:
            only = f"only {len(passed)} cases could be tried{'; ' if note else ''}{note}"
            return {"verdict": "unjudged", "why": only, **counts}
        return _right({}, {d for o in passed for d in o.dtypes}, counts, None, passed)
    # Other strides than the native kernel's are a matter of layout: no dtype or size is to blame for them.
    needed = {"contiguous"} if any(STRIDES in o.message and "contiguous" not in o.flags for o in failed) else set()
    best = None
    sizes = sorted({o.numel for o in failed})
    # An argument that must have its default is named "=argument" among the flags.
    changed = sorted({name for o in failed for name in o.changed})
    marks = [f"={name}" for name in changed]
    named = [combination for count in range(3) for combination in itertools.combinations(marks, count)]
    if len(marks) > 2:
        named.append(tuple(marks))
    asked = any(ALIGNED in o.message and "aligned" not in o.flags for o in failed)
    choice = [flag for flag in FLAGS if flag != "aligned" or asked]
    for count in range(len(choice) + 1):
        for flags, defaults in itertools.product(itertools.combinations(choice, count), named):
            if not needed <= set(flags):
                continue
            flags += defaults
            for most in (None, sizes[0] - 1):
                if most is not None and most < 1024:
                    continue

                def inside(o, flags=flags, most=most):
                    holds = {*o.flags, *(f"={name}" for name in changed if name not in o.changed)}
                    return holds.issuperset(flags) and (most is None or o.numel <= most)

                kept = [o for o in passed if inside(o)]
                dtypes = _dtypes(kept, [o for o in failed if inside(o)])
                if dtypes is None:
                    continue
                kept = [o for o in kept if set(o.dtypes) <= dtypes]
                # A dtype is to blame for what fails with some values only where another one passes with them.
                if not {o.values for o in failed if inside(o)} <= {"", *(o.values for o in kept)}:
                    continue
                # A limit on the size may cost nothing that was tried; it is taken only when nothing else will do.
                score = (len(kept), most is None, -len(flags))
                if len(kept) >= ENOUGH and (best is None or score > best[0]):
                    best = (score, flags, most, dtypes, kept)
    first = failed[0]
    if best is None:
        return {"verdict": "wrong", "why": first.message, "reproducer": first.label, "call": first.call, **counts}
    _, flags, most, dtypes, kept = best
    limits = {flag: True for flag in flags if flag in FLAGS}
    if defaults := [flag[1:] for flag in flags if flag not in FLAGS]:
        limits["defaults"] = defaults
    if most is not None:
        limits["max_numel"] = most
    return _right(limits, dtypes, counts, first, kept)


def _right(limits, dtypes, counts, failure, kept):
    entry = {"verdict": "right"}
    if any(o.dtypes for o in kept):  # else there are no tensors
        untried = [flag for flag in TRIED if all(flag in o.flags for o in kept)]
        if "contiguous" in {*untried, *limits}:  # which says more
            untried = [flag for flag in untried if flag != "unexpanded"]
        limits = limits | dict.fromkeys(untried, True)
    limits = {**({"dtypes": sorted(dtypes)} if dtypes else {}), **limits}
    if limits:
        entry["limits"] = limits
    if failure is not None:
        entry.update(why=failure.message, reproducer=failure.label, call=failure.call)
    return {**entry, **counts}


def differences(old: dict, new: dict, ops) -> list[str]:
    """One line for each operator whose verdict or limits are not those of an earlier file, and for what was judged on
    something else."""
    lines = []
    for key in ("flaggems", "chip", "arch"):
        if old.get(key) != new.get(key):
            lines.append(f"{key}: {new.get(key)}, was {old.get(key)}")
    for op in sorted(ops):
        before, now = (
            (d["ops"].get(op, {}).get("verdict"), d["ops"].get(op, {}).get("limits", {})) for d in (old, new)
        )
        if before != now:
            why = new["ops"].get(op, {}).get("why", "")
            lines.append(f"{op}: {now[0]} {now[1]}, was {before[0]} {before[1]}{'; ' if why else ''}{why}")
    return lines
