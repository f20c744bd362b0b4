"""The same memory under another label, without a copy: for code that knows torch.cuda and not flagos.

A flagos tensor on an NVIDIA GPU lives in CUDA memory. `as_cuda` gives a CUDA tensor over it for CUDA extensions, CuPy
and every consumer of DLPack or `__cuda_array_interface__`; `from_cuda` takes memory the other way. Both tensors own the
memory, share the version counter (so autograd notices changes made under the other label) and use the same streams.
Results are detached. A storage that has two labels cannot be resized any more.

Triton needs none of this: it asks a tensor only for `data_ptr()`, so kernels take flagos tensors as they are.
"""

import torch

from torch_fl import _C


def _check_chip(function: str) -> None:
    chip = _C._chip()
    if chip != "cuda":
        raise RuntimeError(
            f"torch.flagos.{function} works on the chip cuda only, this process runs on {chip}: its memory is not "
            "CUDA's. Copy with .cpu(), or choose the chip with FLAGOS_ACCELERATOR=cuda"
        )


def as_cuda(tensor: torch.Tensor) -> torch.Tensor:
    """A CUDA tensor over a flagos tensor's memory: no copy, detached."""
    _check_chip("as_cuda")
    return _C._as_native(tensor)


def from_cuda(tensor: torch.Tensor) -> torch.Tensor:
    """A flagos tensor over a CUDA tensor's memory: no copy, detached, on the device of the same index.

    Every call makes a flagos storage of its own; tensors over the same CUDA memory still see each other's writes.
    """
    _check_chip("from_cuda")
    return _C._from_native(tensor)


def to_dlpack(tensor: torch.Tensor):
    """A DLPack capsule that says CUDA (kDLCUDA), for libraries that do not know flagos.

    torch.utils.dlpack.to_dlpack of a flagos tensor says kDLExtDev, which only torch reads.
    """
    _check_chip("to_dlpack")
    return torch.utils.dlpack.to_dlpack(as_cuda(tensor))


def from_dlpack(source) -> torch.Tensor:
    """A flagos tensor over the memory of an object with `__dlpack__`, or of a DLPack capsule, that lives on a GPU."""
    _check_chip("from_dlpack")
    tensor = torch.utils.dlpack.from_dlpack(source)
    if tensor.device.type == "flagos":
        return tensor
    if tensor.device.type != "cuda":
        raise ValueError(
            f"torch.flagos.from_dlpack: the memory is on {tensor.device}, not on a GPU; "
            'copy it with torch.utils.dlpack.from_dlpack(source).to("flagos")'
        )
    return from_cuda(tensor)


__all__ = ["as_cuda", "from_cuda", "from_dlpack", "to_dlpack"]
