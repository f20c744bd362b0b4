"""Whether the replay of a launch plan does on the device what the Python call does: for processes on the null CUDA.

Both are run with the same tensors and what they launch is compared line by line: kernel, grid, block, shared memory,
stream, and every byte of the parameters. An address is compared by what it points into: an argument, a result, or
memory that only the call sees, which is named by the order in which it appears.
"""

import re

import torch

import torch_fl
from tests.common import null_cuda


def tensors_of(value) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def extent(t: torch.Tensor) -> int:
    if t.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def readable(log: list[str], arguments, result) -> list[str]:
    """The log with names in place of addresses."""
    known = [(f"argument {i}", t.data_ptr(), extent(t)) for i, t in enumerate(tensors_of(arguments)) if t.is_flagos]
    for i, t in enumerate(tensors_of(result)):
        if t.is_flagos:
            storage = t.untyped_storage()
            known.append((f"result {i}", storage.data_ptr(), storage.nbytes()))
    own: dict[int, int] = {}

    def name(match):
        address = int(match.group(1), 16)
        for text, start, size in known:
            if start <= address < start + size:
                return f"<{text} + {address - start}>"
        return f"<own {own.setdefault(address, len(own))}>"

    return [re.sub(r"@([0-9a-f]+)", name, line) for line in log]


def metadata(result) -> list:
    return [(t.dtype, t.shape, t.stride(), t.storage_offset(), str(t.device)) for t in tensors_of(result)]


def judge(op: str, function, first, second) -> tuple[str, str]:
    """("equal", ""), ("refused", why), ("unequal", difference) or ("unused", why).

    `first` and `second` are arguments (args, kwargs) of one signature in different memory: the plan is made with the
    first and replayed with the second.
    """

    def call(arguments):
        return function(*arguments[0], **arguments[1])

    def counts():
        return torch_fl.plans.counts().get(op, {"hits": 0, "recorded": 0, "refused": {}, "plans": 0})

    torch_fl.plans.clear()
    for _ in range(4):  # a call that tunes is recorded at a later sighting
        call(first)
        if counts()["plans"] or counts()["refused"]:
            break
    if counts()["refused"]:
        return "refused", next(iter(counts()["refused"]))
    if not counts()["plans"]:
        return "unused", "its Python kernel is not called, or never recorded"
    replayed, result = null_cuda.launches(lambda: call(second), addresses=True)
    if counts()["hits"] != 1:
        return "unequal", "other memory gave another key"
    replayed, replayed_metadata = readable(replayed, second, result), metadata(result)
    del result
    torch_fl.plans.clear()
    call(second)
    # Recorded, so that it too keeps what it allocates until its end.
    expected, result = null_cuda.launches(lambda: call(second), addresses=True)
    if replayed_metadata != metadata(result):
        return "unequal", f"results {replayed_metadata}, expected {metadata(result)}"
    expected = readable(expected, second, result)
    if replayed == expected:
        return "equal", ""
    for got, wanted in zip(replayed, expected, strict=False):
        if got != wanted:
            return "unequal", f"{got}\nexpected {wanted}"
    return "unequal", f"{len(replayed)} launches, expected {len(expected)}"
