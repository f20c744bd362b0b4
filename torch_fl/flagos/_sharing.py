"""Sending tensors to other processes: refused in one sentence, since torch gives device plugins no shared memory.

torch.multiprocessing would try to share a flagos storage as if it were the CPU's and say so obscurely. The pickler of
multiprocessing takes reducers by type; this one passes everything but flagos storages on to torch's.
"""

from multiprocessing.reduction import ForkingPickler

import torch
from torch.multiprocessing import reductions


def _reduce_storage(storage):
    if storage.device.type == "flagos":
        raise RuntimeError(
            "flagos: a tensor on flagos cannot be sent to another process, because device memory is not shared between "
            "processes; send tensor.cpu() and call .flagos() there"
        )
    return reductions.reduce_storage(storage)


def register() -> None:
    """Puts the reducer in place."""
    ForkingPickler.register(torch.UntypedStorage, _reduce_storage)
