"""What tests and sweeps ask about the device under test: load it, its chip, its fallback counters, versions."""

from __future__ import annotations

import gc

import torch

from benchmarks import common


def load_device(device: str) -> None:
    """Makes the device's name known to torch. "cpu" and "meta" serve to try the harness itself."""
    if device.split(":")[0] in ("cpu", "meta", "cuda"):
        return
    import torch_fl  # noqa: F401


def chip_name(device: str) -> str:
    """The chip behind flagos ("host", "cuda", ...), or the device's own name."""
    if not device.startswith("flagos"):
        return device
    import torch_fl

    return torch_fl.chip()


def fallback_counts() -> dict[str, int]:
    """Operators that reached the copying CPU fallback, with counts; empty when torch_fl is not loaded."""
    import sys

    module = sys.modules.get("torch_fl")
    return dict(module.fallbacks()) if module is not None else {}


def versions(device: str) -> dict[str, str]:
    """What a result file must say about where it was made."""
    return {"device": device, **common.where(device)}


def memory_in_use() -> int:
    """Bytes of the device in tensors: without the workspaces that cuBLAS keeps for each thread and stream."""
    gc.collect()
    if chip_name("flagos") == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
    return torch.flagos.memory_allocated()
