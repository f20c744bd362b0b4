"""torch.flagos has every name of torch.cuda that means something beyond CUDA; what is missing is listed, with why."""

import inspect

import pytest
import torch

TYPES = "legacy tensor type; write torch.empty(..., dtype=..., device='flagos')"
GRAPHS = "device graphs are not built yet"
POOLS = "memory pools and pluggable allocators are not built yet"
CUDA_ONLY = "names a part of CUDA itself"
DEPRECATED = "deprecated in torch.cuda"
MONITOR = "needs the vendor's monitoring library; not in the HAL"

MISSING = {
    **{
        f"{kind}{what}": TYPES
        for what in ("Storage", "Tensor")
        for kind in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
    },
    "ComplexDoubleStorage": TYPES,
    "ComplexFloatStorage": TYPES,
    "CUDAGraph": GRAPHS,
    "graph": GRAPHS,
    "graph_pool_handle": GRAPHS,
    "graphs": GRAPHS,
    "make_graphed_callables": GRAPHS,
    "CUDAPluggableAllocator": POOLS,
    "MemPool": POOLS,
    "caching_allocator_enable": POOLS,
    "change_current_allocator": POOLS,
    "get_allocator_backend": POOLS,
    "use_mem_pool": POOLS,
    "CudaError": CUDA_ONLY,
    "DeferredCudaCallError": CUDA_ONLY,
    "GreenContext": CUDA_ONLY,
    "check_error": CUDA_ONLY,
    "cudaStatus": CUDA_ONLY,
    "cudart": CUDA_ONLY,
    "current_blas_handle": CUDA_ONLY,
    "get_gencode_flags": CUDA_ONLY,
    "has_magma": CUDA_ONLY,
    "is_tf32_supported": CUDA_ONLY,
    "jiterator": CUDA_ONLY,
    "nccl": CUDA_ONLY,
    "nvtx": CUDA_ONLY,
    "profiler": CUDA_ONLY,
    "sparse": CUDA_ONLY,
    "tunable": CUDA_ONLY,
    "get_sync_debug_mode": "warning about hidden synchronisation is not built yet",
    "set_sync_debug_mode": "warning about hidden synchronisation is not built yet",
    "host_memory_stats_as_nested_dict": "host_memory_stats has the same numbers",
    "max_memory_cached": DEPRECATED,
    "memory_cached": DEPRECATED,
    "clock_rate": MONITOR,
    "list_gpu_processes": MONITOR,
    "memory_usage": MONITOR,
    "power_draw": MONITOR,
    "temperature": MONITOR,
    "utilization": MONITOR,
}

# What FSDP, checkpointing, FakeTensor, DataLoader and torch.amp look up on a device module.
FRAMEWORKS = """_dump_snapshot _exchange_device _get_device_index _initialized _is_in_bad_fork _lazy_init
_maybe_exchange_device _snapshot get_amp_supported_dtype is_autocast_enabled""".split()


@pytest.mark.parametrize("name", torch.cuda.__all__)
def test_name(name):
    if name in MISSING:
        assert not hasattr(torch.flagos, name), f"{name} exists now: take it out of MISSING"
    else:
        assert hasattr(torch.flagos, name)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_name_that_frameworks_look_up(name):
    assert hasattr(torch.flagos, name)


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", sorted(set(torch.cuda.__all__) - set(MISSING)))
def test_parameters_are_called_alike(name):
    """Code that names its arguments runs on both devices."""
    here, there = getattr(torch.flagos, name), getattr(torch.cuda, name)
    if not inspect.isfunction(there):
        pytest.skip(f"{name} is not a plain function")
    assert parameters(here)[: len(parameters(there))] == parameters(there)


def test_public_names_are_documented():
    silent = [
        name
        for name in torch.flagos.__all__
        if callable(getattr(torch.flagos, name)) and not inspect.getdoc(getattr(torch.flagos, name))
    ]
    assert silent == []
