"""Why CUDA does not work here, in one sentence, from what the machine, the driver, torch and the environment say.

Nothing here starts CUDA: a process that has done so could no longer fork children that use it.
"""

import ctypes
import glob
import warnings
from pathlib import Path
from typing import NamedTuple


class Facts(NamedTuple):
    """What can be known without starting CUDA."""

    torch_version: str
    torch_cuda: str | None  # the CUDA that torch was built for, "13.0"; None for a build without CUDA
    gpu: bool  # the kernel driver shows a GPU
    driver_cuda: str | None  # the newest CUDA that the driver supports; None when libcuda.so.1 does not open
    visible: str | None  # CUDA_VISIBLE_DEVICES; None when unset
    built: bool  # libtorch_fl_cuda.so is there


def facts() -> Facts:
    """The facts of this process."""
    import torch

    from torch_fl import _C, _env

    return Facts(
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        gpu=bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/dxg")),
        driver_cuda=_driver_cuda(),
        visible=_env.raw("CUDA_VISIBLE_DEVICES"),
        built=(Path(_C.__file__).parent / "libtorch_fl_cuda.so").exists(),
    )


def _driver_cuda() -> str | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def capability() -> tuple[int, int] | None:
    """The first visible GPU's compute capability, (9, 0) for sm_90, from NVML; None when it cannot be known."""
    from torch_fl import _env

    visible = (_env.raw("CUDA_VISIBLE_DEVICES") or "0").split(",")[0].strip()
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return None
        if visible.isdecimal():
            failed = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(visible)), ctypes.byref(device))
        else:
            failed = nvml.nvmlDeviceGetHandleByUUID(visible.encode(), ctypes.byref(device))
        failed = failed or nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return None
    return None if failed else (major.value, minor.value)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def explain(known: Facts) -> str | None:
    """What is wrong and what to do about it; None when nothing is seen to be wrong."""
    host = "or set FLAGOS_ACCELERATOR=host for the simulated device"
    if not known.gpu:
        return f"no NVIDIA GPU: there is no device node /dev/nvidia0; load the NVIDIA driver, {host}"
    if known.torch_cuda is None:
        return (
            f"this machine has an NVIDIA GPU, but PyTorch {known.torch_version} is built without CUDA; install a CUDA "
            f"build of PyTorch (12.8 or newer) and rebuild torch_fl, {host}"
        )
    if known.visible is not None and known.visible.split(",")[0].strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={known.visible!r} hides every GPU; unset it or name one, {host}"
    if known.driver_cuda is None:
        return f"the GPU is there, but libcuda.so.1, the driver's library, does not open; install the driver, {host}"
    if _numbers(known.driver_cuda)[0] < _numbers(known.torch_cuda)[0]:
        return (
            f"the NVIDIA driver is too old: it supports CUDA up to {known.driver_cuda}, PyTorch "
            f"{known.torch_version} is built for CUDA {known.torch_cuda}; update the driver or install a PyTorch for "
            f"CUDA {known.driver_cuda}, {host}"
        )
    if not known.built:
        return f"torch_fl was built against a PyTorch without CUDA (libtorch_fl_cuda.so is missing); rebuild it, {host}"
    return None


def explained(error: Exception, asked: str | None) -> Exception:
    """The error of a failed start, with the reason when it was CUDA that failed."""
    if asked not in (None, "cuda") or "cuda" not in str(error):
        return error
    reason = explain(facts())
    return error if reason is None else RuntimeError(f"flagos: the chip cuda does not start: {reason}")


def warn_of_version(torch_cuda: str | None) -> None:
    """CUDA 12.2 is known to give NaN; everything below 12.8 is untested."""
    if torch_cuda is None or _numbers(torch_cuda) >= (12, 8):
        return
    known = "gives wrong results (NaN) in some kernels" if _numbers(torch_cuda) == (12, 2) else "is not tested"
    warnings.warn(
        f"torch_fl: PyTorch is built for CUDA {torch_cuda}, which {known}; use CUDA 12.8 or newer", stacklevel=2
    )
