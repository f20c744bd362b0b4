"""What stands in for the device when torch_fl was autoloaded and could not start.

`import torch` must go on as if torch_fl were not installed, so this says nothing until somebody asks for flagos. The
device name is taken only when torch has no other accelerator at work: a registered name makes flagos *the* accelerator,
and stock autograd on the other one would then fail.
"""

import types

import torch


def register(failure: Exception) -> None:
    """Makes every use of the device raise the reason."""
    if torch.cuda.device_count() > 0 or torch._C._get_privateuse1_backend_name() != "privateuseone":
        return
    reason = f"torch_fl could not start, so the device flagos is not available: {type(failure).__name__}: {failure}"

    def refuse(*args, **kwargs):
        raise RuntimeError(reason) from failure

    module = types.ModuleType("torch.flagos", reason)
    # What torch asks of every device without meaning to use it.
    module.is_available = lambda: False
    module.is_initialized = lambda: False
    module.device_count = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module._lazy_init = refuse

    def missing(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return refuse

    module.__getattr__ = missing
    torch.utils.rename_privateuse1_backend("flagos")
    torch._register_device_module("flagos", module)
