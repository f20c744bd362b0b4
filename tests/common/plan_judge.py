"""Whether the replay of a launch plan does on the device what the Python call does.

On a GPU: the bytes of every result, and of the memory of every argument afterwards. On the null CUDA: what is launched,
line by line: kernel, grid, block, shared memory, stream, and every byte of the parameters. An address is compared by
what it points into: an argument, a result, or memory that only the call sees. A replay gives such memory back after its
last use, and a call that is recorded keeps all of it; so two addresses of the call may be one in the replay, as long as
the one is not used any more when the other one begins to be.
"""

import math
import re

import torch

import torch_fl
from tests.common import null_cuda
from tests.common.compare import bytes_of, first_lines, to_host
from tests.common.samples import copy_tree, tensors_in
from torch_fl import _C

SIGHTINGS = 4  # a call that tunes is recorded at a later sighting


def extent(t: torch.Tensor) -> int:
    if t.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def readable(log: list[str], arguments, result) -> tuple[list[str], list[tuple[int, int]]]:
    """The log with names in place of addresses, and the addresses of the call's own memory as they come: (line,
    address)."""
    known = [(f"argument {i}", t.data_ptr(), extent(t)) for i, t in enumerate(tensors_in(arguments)) if t.is_flagos]
    for i, t in enumerate(tensors_in(result)):
        if t.is_flagos:
            storage = t.untyped_storage()
            known.append((f"result {i}", storage.data_ptr(), storage.nbytes()))
    own = []

    def name(line, match):
        address = int(match.group(1), 16)
        for text, start, size in known:
            if start <= address < start + size:
                return f"<{text} + {address - start}>"
        own.append((line, address))
        return "<own>"

    lines = [re.sub(r"@([0-9a-f]+)", lambda match, n=n: name(n, match), line) for n, line in enumerate(log)]
    return lines, own


def own_memory_agrees(replayed, expected) -> str:
    """'' when each address of the recorded call's own memory is one address in the replay, and those that share one are
    not in use at the same time."""
    if len(replayed) != len(expected):
        return f"{len(replayed)} addresses of own memory, expected {len(expected)}"
    became: dict[int, int] = {}
    used: dict[int, tuple[int, int]] = {}  # recorded address -> its first and last line
    for (line, there), (_, here) in zip(expected, replayed, strict=True):
        if became.setdefault(there, here) != here:
            return f"line {line}: one temporary lies in two places"
        used[there] = (used.get(there, (line, line))[0], line)
    for a, (begin, end) in used.items():
        for b, (other_begin, other_end) in used.items():
            if a < b and became[a] == became[b] and not (end < other_begin or other_end < begin):
                return f"lines {other_begin} to {end}: two temporaries that are in use lie in one place"
    return ""


def metadata(result) -> list:
    return [(t.dtype, t.shape, t.stride(), t.storage_offset(), str(t.device)) for t in tensors_in(result)]


def counts_of(op: str) -> dict:
    return torch_fl.plans.counts().get(op, {"hits": 0, "recorded": 0, "refused": {}, "plans": 0})


def call(function, arguments):
    return function(*arguments[0], **arguments[1])


def references(nest) -> list[int]:
    return [t._use_count() for t in tensors_in(nest)]


def judge(op: str, function, first, second, values: bool = False) -> tuple[str, str]:
    """("equal", ""), ("unequal", difference), ("refused", why), ("unused", why) or ("varies", why).

    `first` and `second` are arguments (args, kwargs) of one signature in different memory: the plan is made with the
    first and replayed with the second. values: the device computes, so that bytes are compared. Also ("unserved", why)
    when the kernel raises without plans, and ("outside", why) when the call is outside of its limits.
    """
    torch_fl.plans.clear()
    passed_on = _C._python_kernels_passed_on().get(op, 0)
    try:  # the first sighting runs in Python and is not recorded
        call(function, copy_tree(first, "flagos"))
        torch.flagos.synchronize()
    except torch.AcceleratorError:
        raise
    except Exception as error:
        return "unserved", first_lines(error, 200)
    if _C._python_kernels_passed_on().get(op, 0) > passed_on:
        return "outside", "outside of the limits of its kernel"
    torch_fl.plans.clear()
    for _ in range(SIGHTINGS):
        call(function, first)
        if counts_of(op)["plans"] or counts_of(op)["refused"]:
            break
    if counts_of(op)["refused"]:
        return "refused", next(iter(counts_of(op)["refused"]))
    if not counts_of(op)["plans"]:
        return "unused", "its Python kernel is not called, or never recorded"
    before = references(second)
    verdict = (judge_values if values else judge_launches)(op, function, second)
    if verdict[0] == "equal" and references(second) != before:  # a replay's arguments are lent
        return "unequal", f"arguments have {references(second)} references after the replay, {before} before"
    return verdict


RECORD, REPLAY = (1.03, 1.04, 1.05), (1.07, 1.11)  # what numbers are multiplied with


def scaled(nest, factor: float):
    """The call with its floating-point arguments multiplied; None when it has none."""
    args, kwargs = nest
    change = [isinstance(a, float) and math.isfinite(a) and a != 0 for a in (*args, *kwargs.values())]
    if not any(change):
        return None

    def times(a):
        return a * factor if isinstance(a, float) and math.isfinite(a) else a

    return tuple(map(times, args)), {k: times(v) for k, v in kwargs.items()}


def judge_numbers(op: str, function, nest, values: bool = False) -> tuple[str, str]:
    """As judge(), for a plan that is made with some values of the call's numbers and replayed with others."""
    if scaled(nest, 1) is None:
        return "unused", "no number"

    def arguments(factor):
        return copy_tree(scaled(nest, factor), "flagos")

    torch_fl.plans.clear()
    for factor in RECORD:
        call(function, arguments(factor))
    if counts_of(op)["refused"]:
        return "refused", next(iter(counts_of(op)["refused"]))
    for number, factor in enumerate(REPLAY):
        mine, others = arguments(factor), [arguments(factor) for _ in range(2)]
        if values:
            replayed = after_effects(call(function, mine), mine)
        else:
            replayed, result = null_cuda.launches(lambda mine=mine: call(function, mine), addresses=True)
            replayed = readable(replayed, mine, result)[0]
        if counts_of(op).get("patched", 0) != number + 1:
            return "unused", f"one plan per value: {next(iter(counts_of(op).get('apart', {})), 'another class')}"
        torch_fl.plans.use(False)
        try:
            if values:
                expected, again = (after_effects(call(function, other), other) for other in others)
                why = difference(replayed, expected)
                if why and difference(again, expected):
                    return "varies", "two Python calls differ, too"
            else:
                expected, result = null_cuda.launches(lambda other=others[0]: call(function, other), addresses=True)
                expected = readable(expected, others[0], result)[0]
                why = "" if replayed == expected else "\n".join([*replayed, "expected", *expected])
        finally:
            torch_fl.plans.use(True)
        if why:
            return "unequal", why
    return "equal", ""


def judge_launches(op, function, second) -> tuple[str, str]:
    replayed, result = null_cuda.launches(lambda: call(function, second), addresses=True)
    if counts_of(op)["hits"] != 1:
        return "unequal", "other memory gave another key"
    (replayed, own), replayed_metadata = readable(replayed, second, result), metadata(result)
    del result
    torch_fl.plans.clear()
    call(function, second)
    # Recorded, so that it keeps what it allocates until its end.
    expected, result = null_cuda.launches(lambda: call(function, second), addresses=True)
    if replayed_metadata != metadata(result):
        return "unequal", f"results {replayed_metadata}, expected {metadata(result)}"
    expected, own_expected = readable(expected, second, result)
    for got, wanted in zip(replayed, expected, strict=False):
        if got != wanted:
            return "unequal", f"{got}\nexpected {wanted}"
    if len(replayed) != len(expected):
        return "unequal", f"{len(replayed)} launches, expected {len(expected)}"
    why = own_memory_agrees(own, own_expected)
    return ("unequal", why) if why else ("equal", "")


def judge_values(op, function, second) -> tuple[str, str]:
    others = [copy_tree(second, "flagos") for _ in range(2)]  # before anything is written
    result = call(function, second)
    if counts_of(op)["hits"] != 1:
        return "unequal", "other memory gave another key"
    replayed = after_effects(result, second)
    torch_fl.plans.use(False)
    try:
        expected, again = (after_effects(call(function, other), other) for other in others)
    finally:
        torch_fl.plans.use(True)
    why = difference(replayed, expected)
    if why and difference(again, expected):
        return "varies", "two Python calls differ, too"
    return ("unequal", why) if why else ("equal", "")


def after_effects(result, arguments) -> list[tuple]:
    """Everything that a call leaves: each result, and the whole memory of each argument, with its bytes."""
    rows = []
    for t in tensors_in(result):
        rows.append(("result", t.dtype, tuple(t.shape), t.stride(), bytes_of(to_host(t))))
    for t in tensors_in(arguments):
        if t.is_flagos:
            size = t.untyped_storage().nbytes() // t.itemsize
            flat = t.detach().new_empty(0).set_(t.untyped_storage(), 0, (size,), (1,))
            rows.append(("argument", t.dtype, tuple(t.shape), t.stride(), bytes_of(to_host(flat))))
    return rows


def difference(got, expected) -> str:
    if len(got) != len(expected):
        return f"{len(got)} tensors, expected {len(expected)}"
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a[:4] != b[:4]:
            return f"{a[0]} {index}: {a[1:4]}, expected {b[1:4]}"
        if not torch.equal(a[4], b[4]):
            return f"{a[0]} {index}: {int((a[4] != b[4]).sum())} of {b[4].numel()} bytes differ"
    return ""
