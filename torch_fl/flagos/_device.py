"""Devices: choosing, counting, describing and waiting for them."""

import types

import torch

from torch_fl import _C


class DeviceProperties(types.SimpleNamespace):
    """What the chip says of a device, as attributes."""


def _get_device_index(device=None, optional: bool = True, allow_cpu: bool = False) -> int:
    """The index that a device argument means: an int, "flagos:1", torch.device, or None for the current one."""
    if isinstance(device, bool):
        raise TypeError(f"expected a flagos device, an index or None, got {device!r}")
    if isinstance(device, int):
        return device
    if device is None:
        if not optional:
            raise ValueError("expected a flagos device with an index, such as 'flagos:0', got None")
        return current_device()
    if isinstance(device, str):
        device = torch.device(device)
    if not isinstance(device, torch.device):
        raise TypeError(f"expected a flagos device, an index or None, got {device!r}")
    if allow_cpu and device.type == "cpu":
        return -1
    if device.type != "flagos":
        raise ValueError(f"expected a flagos device, got {device}")
    if device.index is None:
        if not optional:
            raise ValueError(f"expected a flagos device with an index, such as 'flagos:0', got {device}")
        return current_device()
    return device.index


def _checked_index(device=None) -> int:
    index = _get_device_index(device)
    count = device_count()
    if not 0 <= index < count:
        raise RuntimeError(f"flagos:{index} does not exist: this machine has {count} flagos device(s)")
    return index


def device_count() -> int:
    """Number of devices. Starts nothing and never raises."""
    return _C._device_count()


def is_available() -> bool:
    """Whether there is at least one device. Starts nothing and never raises."""
    return device_count() > 0


def current_device() -> int:
    """Index of the calling thread's current device."""
    return _C._current_device()


def set_device(device) -> None:
    """Makes a device the calling thread's current one. -1 changes nothing, as in torch.cuda."""
    index = _get_device_index(device)
    if index != -1:
        torch._C._accelerator_setDeviceIndex(_checked_index(index))


def _exchange_device(index: int) -> int:
    return torch._C._accelerator_exchangeDevice(index) if index >= 0 else -1


def _maybe_exchange_device(index: int) -> int:
    return torch._C._accelerator_maybeExchangeDevice(index) if index >= 0 else -1


class device:
    """Context manager that makes a device current: `with torch.flagos.device(1): ...`. None and -1 change nothing."""

    def __init__(self, device):
        self.idx = _get_device_index(device, optional=True) if device is not None else -1
        self.prev_idx = -1

    def __enter__(self):
        self.prev_idx = _exchange_device(self.idx)
        return self

    def __exit__(self, *exception):
        self.idx = _maybe_exchange_device(self.prev_idx)
        return False


class device_of(device):
    """Context manager that makes a tensor's or storage's device current; nothing for one on another device type."""

    def __init__(self, obj):
        super().__init__(obj.get_device() if obj.is_flagos else -1)


def synchronize(device=None) -> None:
    """Waits until all work queued on a device is done."""
    torch._C._accelerator_synchronizeDevice(_checked_index(device))


def get_device_properties(device=None):
    """What the chip says of a device: name, total_memory, multi_processor_count, major, minor, warp_size, ..."""
    index = _checked_index(device)
    properties = DeviceProperties(**_C._device_properties(index))
    if _C._chip() == "cuda":  # and whatever else this torch knows of it
        theirs = torch.cuda.get_device_properties(index)
        for name in dir(theirs):
            if not name.startswith("_") and not hasattr(properties, name):
                setattr(properties, name, getattr(theirs, name))
    return properties


def get_device_name(device=None) -> str:
    """The vendor's name of a device."""
    return get_device_properties(device).name


def get_device_capability(device=None) -> tuple[int, int]:
    """(major, minor) compute capability; (0, 0) on chips that have no such notion."""
    properties = get_device_properties(device)
    return properties.major, properties.minor


def can_device_access_peer(device, peer_device) -> bool:
    """Whether a device can read the other's memory directly."""
    return _C._can_access_peer(_checked_index(device), _checked_index(peer_device))


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """Whether bfloat16 tensors can be computed with."""
    if not is_available():
        return False
    return including_emulation or torch.bfloat16 in _supported_dtypes()


def _supported_dtypes():
    return torch._C._accelerator_getDeviceCapability(current_device()).get("supported_dtypes", set())


def get_arch_list() -> list[str]:
    """Architectures of the devices here."""
    return sorted({get_device_properties(i).arch for i in range(device_count())} - {""})


def ipc_collect() -> None:
    """Nothing to collect: torch gives device plugins no sharing of memory between processes."""
