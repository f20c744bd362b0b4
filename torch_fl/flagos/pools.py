"""Pools of the caching allocator that a program makes: memory for one purpose, apart from the rest.

On the chip cuda they are torch.cuda's; elsewhere they are those of our own allocator.
"""

import contextlib
import itertools
import sys

import torch

from torch_fl import _C
from torch_fl.flagos import memory
from torch_fl.flagos._device import _checked_index

if _C._chip() == "cuda":

    class MemPool(torch.cuda.MemPool):
        """A pool of the caching allocator: torch.cuda.MemPool. `use_mem_pool` sends allocations to it."""

else:

    class MemPool:
        """A pool of the caching allocator. `use_mem_pool` sends allocations to it.

        Its free memory serves the pool alone. When the pool is gone, that goes back to the chip, and what tensors still
        hold follows when they end and the cache is emptied.
        """

        _numbers = itertools.count(1)

        def __init__(self, allocator=None, use_on_oom: bool = False, no_split: bool = False):
            if allocator is not None or use_on_oom or no_split:
                raise NotImplementedError(
                    f"torch.flagos.MemPool: the chip {_C._chip()} has plain pools, without allocator, use_on_oom or "
                    "no_split; only cuda has those"
                )
            self.id = (0, next(self._numbers))
            self._uses = 0

        @property
        def allocator(self):
            """None: the memory comes from the chip itself."""
            return None

        def use_count(self) -> int:
            """1 for the object, and 1 for each use_mem_pool that is active."""
            return 1 + self._uses

        def snapshot(self, include_traces: bool = False) -> list[dict]:
            """The pool's segments, as memory_snapshot() gives them."""
            return memory.memory_snapshot(self.id, include_traces)

        def __del__(self, _finalizing=sys.is_finalizing):
            if hasattr(self, "id") and not _finalizing():
                _C._end_mempool(self.id[1])


@contextlib.contextmanager
def use_mem_pool(pool: MemPool, device=None):
    """Sends this thread's allocations on a device to a pool."""
    index = _checked_index(device)
    if _C._chip() == "cuda":
        with torch.cuda.use_mem_pool(pool, torch.device("cuda", index)):
            yield
        return
    if not isinstance(pool, MemPool):
        raise TypeError(f"use_mem_pool: expected a torch.flagos.MemPool, got {pool!r}")
    before = _C._use_mempool(pool.id[1], index)
    pool._uses += 1
    try:
        yield
    finally:
        pool._uses -= 1
        _C._use_mempool(*before)


__all__ = ["MemPool", "use_mem_pool"]
