"""What a vendor's monitoring library says of a device, and what torch.cuda can switch: CUDA's, under flagos indices.

The HAL has no such entries. On the chip cuda the device indices are CUDA's own, so these functions delegate; other
chips refuse in one sentence.
"""

import torch

from torch_fl import _C
from torch_fl.flagos._device import _checked_index


def _cuda(name: str, device=None) -> torch.device:
    """The CUDA device that a flagos device is; raises on other chips."""
    index = _checked_index(device)
    chip = _C._chip()
    if chip != "cuda":
        raise NotImplementedError(f"torch.flagos.{name}: the chip {chip} has no monitoring library; only cuda has")
    return torch.device("cuda", index)


def utilization(device=None) -> int:
    """Per cent of the last sample period during which a kernel ran."""
    return torch.cuda.utilization(_cuda("utilization", device))


def memory_usage(device=None) -> int:
    """Per cent of the last sample period during which memory was read or written."""
    return torch.cuda.memory_usage(_cuda("memory_usage", device))


def temperature(device=None) -> int:
    """Degrees Celsius."""
    return torch.cuda.temperature(_cuda("temperature", device))


def power_draw(device=None) -> int:
    """Milliwatts."""
    return torch.cuda.power_draw(_cuda("power_draw", device))


def clock_rate(device=None) -> int:
    """Clock of the multiprocessors in MHz."""
    return torch.cuda.clock_rate(_cuda("clock_rate", device))


def list_gpu_processes(device=None) -> str:
    """The processes that use a device, with their memory, as text to print."""
    return torch.cuda.list_gpu_processes(_cuda("list_gpu_processes", device))


def is_tf32_supported() -> bool:
    """Whether float32 products can be computed in TF32."""
    return _C._chip() == "cuda" and torch.cuda.is_tf32_supported()


_SYNC_DEBUG_MODES = ("default", "warn", "error")


def get_sync_debug_mode() -> int:
    """0: hidden synchronisation is silent, 1: it warns, 2: it raises."""
    return torch.cuda.get_sync_debug_mode() if _C._chip() == "cuda" else _C._get_sync_debug_mode()


def set_sync_debug_mode(debug_mode: int | str) -> None:
    """Makes operators that make the host wait silent ("default", 0), warn ("warn", 1) or raise ("error", 2).

    Those are copies between host and device that block, and operators whose result the host must know: `item`,
    `nonzero`, indexing with a mask. synchronize() and waiting for a stream or an event are meant, so they pass.
    """
    if isinstance(debug_mode, str) and debug_mode in _SYNC_DEBUG_MODES:
        debug_mode = _SYNC_DEBUG_MODES.index(debug_mode)
    if isinstance(debug_mode, bool) or debug_mode not in (0, 1, 2):
        raise ValueError(f'invalid value of debug_mode: {debug_mode!r}, expected one of "default", "warn", "error"')
    if _C._chip() == "cuda":
        torch.cuda.set_sync_debug_mode(debug_mode)
    else:
        _C._set_sync_debug_mode(debug_mode)


__all__ = [
    "clock_rate",
    "get_sync_debug_mode",
    "is_tf32_supported",
    "list_gpu_processes",
    "memory_usage",
    "power_draw",
    "set_sync_debug_mode",
    "temperature",
    "utilization",
]
