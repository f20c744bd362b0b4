"""Names of torch.cuda that torch.flagos has not, each with the reason.

`torch.flagos.<name>` raises with that reason, docs/device_api.md lists it, and tests fail on a name that is neither
here nor present. The first group means something on flagos and is missing; the others mean nothing beyond CUDA.
"""

_TORCH = "says how torch itself was built, not what the device can: ask torch.cuda"
_CUDA = "a part of CUDA itself; where the chip is cuda, torch.cuda's own works on the same device"
_ALLOCATOR = (
    "replaces CUDA's own allocator; on the chip cuda flagos allocates through it, so torch.cuda's function acts on "
    "flagos as well"
)

# A program could want these on flagos. They count against the share that is present.
MISSING: dict[str, str] = {
    "CUDAPluggableAllocator": _ALLOCATOR,
    "caching_allocator_enable": _ALLOCATOR,
    "change_current_allocator": _ALLOCATOR,
}

# These name something that only CUDA has, or that torch has given up.
FOREIGN: dict[str, str] = {
    "CudaError": "flagos raises torch.AcceleratorError and RuntimeError",
    "DeferredCudaCallError": "nothing is deferred: the runtime starts at the first use of the device",
    "GreenContext": _CUDA,
    "amp_definitely_not_available": "GradScaler of torch.cuda asks it about CUDA; flagos always has autocast",
    "check_error": _CUDA,
    "cudaStatus": _CUDA,
    "cudart": _CUDA,
    "current_blas_handle": _CUDA,
    "get_gencode_flags": _TORCH,
    "has_magma": _TORCH,
    "nccl": "collectives are torch.distributed with the backend of torch_fl.distributed",
    "nvtx": _CUDA,
    "profiler": "use torch.profiler",
    "sparse": "an empty module in torch",
    "tunable": _CUDA,
}


def reason(name: str) -> str | None:
    """Why torch.flagos has no such name; None when torch.cuda has none either."""
    return MISSING.get(name) or FOREIGN.get(name)


# Present, but only the chip cuda has what is behind them; the others refuse in one sentence.
CUDA_CHIP = frozenset(
    """CUDAGraph clock_rate graph graph_pool_handle list_gpu_processes make_graphed_callables memory_usage
    power_draw temperature utilization""".split()
)
