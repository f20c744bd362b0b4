"""Automatic mixed precision: torch.amp with the device filled in, as torch.cuda.amp has it."""

import functools

import torch


class autocast(torch.amp.autocast):
    """`torch.autocast("flagos", ...)`."""

    def __init__(self, enabled: bool = True, dtype: torch.dtype | None = None, cache_enabled: bool = True):
        super().__init__("flagos", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler("flagos", ...)`."""

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ):
        super().__init__("flagos", init_scale, growth_factor, backoff_factor, growth_interval, enabled)


custom_fwd = functools.partial(torch.amp.custom_fwd, device_type="flagos")
custom_bwd = functools.partial(torch.amp.custom_bwd, device_type="flagos")


def get_amp_supported_dtype() -> list[torch.dtype]:
    """The types autocast may compute in; torch.autocast asks for them."""
    return [torch.bfloat16, torch.float16]


def is_autocast_enabled() -> bool:
    """Whether autocast is on for flagos in this thread."""
    return torch.is_autocast_enabled("flagos")


def set_autocast_enabled(enabled: bool) -> None:
    """Turns autocast for flagos on or off in this thread."""
    torch.set_autocast_enabled("flagos", enabled)


def get_autocast_dtype() -> torch.dtype:
    """The type autocast computes in on flagos."""
    return torch.get_autocast_dtype("flagos")


def set_autocast_dtype(dtype: torch.dtype) -> None:
    """Sets the type autocast computes in on flagos."""
    torch.set_autocast_dtype("flagos", dtype)


__all__ = [
    "GradScaler",
    "autocast",
    "custom_bwd",
    "custom_fwd",
    "get_amp_supported_dtype",
    "get_autocast_dtype",
    "is_autocast_enabled",
    "set_autocast_dtype",
    "set_autocast_enabled",
]
