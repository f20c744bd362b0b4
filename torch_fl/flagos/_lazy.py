"""Initialisation state of the device, as torch asks for it.

The run time itself starts when the device is first used, inside C++. What is left for Python is a flag that
torch.utils.checkpoint and FakeTensor read, and a clear refusal in a forked child. `_lazy_init` has to exist: without it
torch looks it up anew for every tensor it makes.
"""

from torch_fl import _C

_initialized = False


def _is_in_bad_fork() -> bool:
    """Whether this process was forked from one that had used the device."""
    return _C._is_in_bad_fork()


def is_initialized() -> bool:
    """Whether the device was used in this process."""
    return _initialized and not _is_in_bad_fork()


def _lazy_init() -> None:
    global _initialized
    if _is_in_bad_fork():
        raise RuntimeError(
            "Cannot re-initialize flagos in forked subprocess. To use flagos with multiprocessing, you must use the "
            "'spawn' start method"
        )
    if _initialized:
        return
    if _C._device_count() == 0:
        raise RuntimeError("flagos has no devices here; `python -m torch_fl doctor` says what was tried")
    _initialized = True


def init() -> None:
    """Starts the device's run time now instead of at its first use."""
    _lazy_init()
