"""What tests and sweeps ask about the device under test: load it, its chip, its fallback counters, versions."""

from __future__ import annotations

import platform

import torch


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
    data = {
        "device": device,
        "chip": chip_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
    }
    return data


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
