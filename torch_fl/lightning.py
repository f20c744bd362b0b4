"""Lightning's Trainer on flagos: import this once, then `Trainer(accelerator="flagos", strategy="flagos", devices=1)`.

Lightning has a fixed list of accelerators and puts every other one on the CPU unless the strategy names the device.
Mixed precision: `plugins=MixedPrecision("bf16-mixed", device="flagos")` in place of `precision`, which means CUDA.
"""

import importlib.util

import torch

from torch_fl import flagos

if importlib.util.find_spec("lightning") is not None:  # the package of both names; else the older one
    from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
    from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
else:
    from pytorch_lightning.accelerators import Accelerator, AcceleratorRegistry
    from pytorch_lightning.strategies import SingleDeviceStrategy, StrategyRegistry


class FlagosAccelerator(Accelerator):
    """What Lightning asks of a device."""

    def setup_device(self, device: torch.device) -> None:
        flagos.set_device(device)

    def get_device_stats(self, device) -> dict:
        return flagos.memory_stats(device)

    def teardown(self) -> None:
        flagos.empty_cache()

    @staticmethod
    def parse_devices(devices):
        return list(range(devices)) if isinstance(devices, int) else [int(index) for index in devices]

    @staticmethod
    def get_parallel_devices(devices) -> list[torch.device]:
        return [torch.device("flagos", index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        return 1  # one process, one device

    @staticmethod
    def is_available() -> bool:
        return flagos.is_available()

    @staticmethod
    def name() -> str:
        return "flagos"


AcceleratorRegistry.register("flagos", FlagosAccelerator, description="flagos", override=True)
StrategyRegistry.register("flagos", SingleDeviceStrategy, description="flagos", override=True, device="flagos:0")

__all__ = ["FlagosAccelerator"]
