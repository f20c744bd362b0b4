"""Sending tensors to other processes: refused in one sentence, since torch gives device plugins no shared memory.

torch.multiprocessing would try to share a flagos storage as if it were the CPU's and say so obscurely. The pickler of
multiprocessing takes reducers by type; this one passes everything but flagos storages on to torch's.
"""

import threading
from multiprocessing.reduction import ForkingPickler

import torch
from torch.multiprocessing import reductions


def _refuse():
    raise RuntimeError(
        "flagos: a tensor on flagos cannot be sent to another process, because device memory is not shared between "
        "processes; send tensor.cpu() and call .flagos() there"
    )


def _reduce_storage(storage):
    if storage.device.type != "flagos":
        return reductions.reduce_storage(storage)
    # A queue pickles in a thread that can tell nobody, and whoever waits at its other end would wait for ever: the
    # error travels in the tensor's place.
    if threading.current_thread().name != "QueueFeederThread":
        _refuse()
    return _refuse, ()


def register() -> None:
    """Puts the reducer in place."""
    ForkingPickler.register(torch.UntypedStorage, _reduce_storage)
