"""Memory: what is held, what is free, and giving the cache back."""

import pickle
import sys

import torch

from torch_fl import _C
from torch_fl.flagos._device import _checked_index, get_device_name


def empty_cache() -> None:
    """Gives memory that no tensor uses back to the chip."""
    torch.accelerator.memory.empty_cache()


def memory_stats(device=None) -> dict:
    """The allocator's statistics under the names that torch.cuda.memory_stats uses."""
    return torch.accelerator.memory.memory_stats(_checked_index(device))


def _nested(stats: dict) -> dict:
    nested: dict = {}
    for name, value in stats.items():
        *path, last = name.split(".")
        level = nested
        for part in path:
            level = level.setdefault(part, {})
        level[last] = value
    return nested


def memory_stats_as_nested_dict(device=None) -> dict:
    """The same statistics, one dictionary per level of the name."""
    return _nested(memory_stats(device))


def memory_allocated(device=None) -> int:
    """Bytes in tensors now."""
    return memory_stats(device).get("allocated_bytes.all.current", 0)


def max_memory_allocated(device=None) -> int:
    """Most bytes in tensors since the last reset_peak_memory_stats."""
    return memory_stats(device).get("allocated_bytes.all.peak", 0)


def memory_reserved(device=None) -> int:
    """Bytes taken from the chip now: in tensors or cached."""
    return memory_stats(device).get("reserved_bytes.all.current", 0)


def max_memory_reserved(device=None) -> int:
    """Most bytes taken from the chip since the last reset_peak_memory_stats."""
    return memory_stats(device).get("reserved_bytes.all.peak", 0)


def reset_peak_memory_stats(device=None) -> None:
    """Starts the peaks anew from the current values."""
    torch.accelerator.memory.reset_peak_memory_stats(_checked_index(device))


def reset_accumulated_memory_stats(device=None) -> None:
    """Starts the counts of what was ever allocated and freed anew."""
    torch.accelerator.memory.reset_accumulated_memory_stats(_checked_index(device))


def memory_cached(device=None) -> int:
    """Another name for memory_reserved."""
    return memory_reserved(device)


def max_memory_cached(device=None) -> int:
    """Another name for max_memory_reserved."""
    return max_memory_reserved(device)


def reset_max_memory_allocated(device=None) -> None:
    """Another name for reset_peak_memory_stats."""
    reset_peak_memory_stats(device)


def reset_max_memory_cached(device=None) -> None:
    """Another name for reset_peak_memory_stats."""
    reset_peak_memory_stats(device)


def mem_get_info(device=None) -> tuple[int, int]:
    """(free, total) bytes of a device, as the chip says."""
    return _C._mem_info(_checked_index(device))


def device_memory_used(device=None) -> int:
    """Bytes in use on a device by all processes, as the chip says."""
    free, total = mem_get_info(device)
    return total - free


def get_per_process_memory_fraction(device=None) -> float:
    """The share of a device's memory that this process may take."""
    return _C._get_memory_fraction(_checked_index(device))


def set_per_process_memory_fraction(fraction: float, device=None) -> None:
    """Limits this process to a share of a device's memory; beyond it an allocation raises torch.OutOfMemoryError."""
    if not isinstance(fraction, (int, float)):
        raise TypeError(f"fraction must be a number from 0 to 1, got {type(fraction).__name__}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be from 0 to 1, got {fraction}")
    _C._set_memory_fraction(float(fraction), _checked_index(device))


def caching_allocator_alloc(size: int, device=None, stream=None) -> int:
    """Address of `size` bytes from the allocator, for code outside torch. Free it with caching_allocator_delete.

    The memory belongs to `stream`: a stream, a native handle, or None for the current stream of the device.
    """
    index = _checked_index(device)
    if stream is None:
        stream_id = _C._current_stream(index)[0]
    elif isinstance(stream, torch.Stream):
        stream_id = stream.stream_id
    elif isinstance(stream, int) and not isinstance(stream, bool):
        stream_id = _C._external_stream(stream, index)[0] if stream else _C._default_stream(index)[0]
    else:
        raise TypeError(f"caching_allocator_alloc: expected a stream, its native handle or None, got {stream!r}")
    return _C._raw_allocate(size, stream_id, index)


def caching_allocator_delete(mem_ptr: int) -> None:
    """Gives back what caching_allocator_alloc returned."""
    _C._raw_delete(mem_ptr)


def host_memory_stats() -> dict:
    """Statistics of the allocator of pinned host memory."""
    return _C._host_memory_stats()


def host_memory_stats_as_nested_dict() -> dict:
    """The same statistics, one dictionary per level of the name."""
    return _nested(host_memory_stats())


def get_allocator_backend() -> str:
    """The name of the allocator: "native" is the caching allocator, torch's own or ours."""
    return torch.cuda.get_allocator_backend() if _C._chip() == "cuda" else "native"


def reset_accumulated_host_memory_stats() -> None:
    """Starts the counts of pinned memory that was ever allocated and freed anew."""
    _C._reset_accumulated_host_memory_stats()


def reset_peak_host_memory_stats() -> None:
    """Starts the peaks of pinned memory anew from the current values."""
    _C._reset_peak_host_memory_stats()


def memory_snapshot(mempool_id=None, include_traces: bool = False) -> list[dict]:
    """Every segment taken from the chip, with its blocks; of one pool when `mempool_id` is given."""
    if _C._chip() == "cuda":
        return torch.cuda.memory_snapshot(mempool_id, include_traces)
    segments, _ = _C._memory_snapshot(False)
    return [s for s in segments if mempool_id is None or s["segment_pool_id"] == tuple(mempool_id)]


_CONTEXTS = (None, "state", "alloc", "all")


def _record_memory_history(
    enabled="all",
    context="all",
    stacks="all",
    max_entries: int = sys.maxsize,
    device=None,
    clear_history: bool = False,
    **of_cuda,
) -> None:
    """Starts (or with enabled=None stops) recording where memory is allocated and freed, for torch's memory viewer.

    As torch.cuda.memory._record_memory_history: enabled="state" keeps no history, only where live memory comes from;
    `context` None, "state", "alloc", "all" says what has a call stack; stacks="python" leaves C++ frames out.
    """
    if isinstance(enabled, bool):
        enabled = "all" if enabled else None
    if _C._chip() == "cuda":
        of_cuda |= {"context": context, "stacks": stacks, "max_entries": max_entries, "clear_history": clear_history}
        return torch.cuda.memory._record_memory_history(enabled, device=device, **of_cuda)
    if of_cuda:
        raise TypeError(f"_record_memory_history: the chip {_C._chip()} knows no {', '.join(of_cuda)}; only cuda does")
    for name, value, known in (
        ("enabled", enabled, (None, "state", "all")),
        ("context", context, _CONTEXTS),
        ("stacks", stacks, ("python", "all")),
    ):
        if value not in known:
            raise ValueError(f"_record_memory_history: {name}={value!r}, expected one of {known}")
    contexts = None if enabled is None else _CONTEXTS.index(context)
    return _C._record_memory_history(contexts, stacks == "all", max_entries if enabled == "all" else 0, clear_history)


def _snapshot(device=None, augment_with_fx_traces: bool = False) -> dict:
    """Segments and, since _record_memory_history, events by device: what torch's memory viewer shows."""
    if _C._chip() == "cuda":
        index = None if device is None else _checked_index(device)
        keywords = {"augment_with_fx_traces": True} if augment_with_fx_traces else {}  # older torch has no such name
        return torch.cuda.memory._snapshot(index, **keywords)
    segments, traces = _C._memory_snapshot(True)
    if device is not None:
        index = _checked_index(device)
        segments = [segment for segment in segments if segment["device"] == index]
        traces = [trace if i == index else [] for i, trace in enumerate(traces)]
    return {"segments": segments, "device_traces": traces, "allocator_settings": {}, "external_annotations": []}


def _dump_snapshot(filename: str = "dump_snapshot.pickle") -> None:
    """Writes a snapshot in the form that torch's memory viewer reads."""
    with open(filename, "wb") as file:
        pickle.dump(_snapshot(), file)


def _size(value: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 10240 or unit == "GiB":
            return f"{value} {unit}"
        value //= 1024
    return f"{value} GiB"


def memory_summary(device=None, abbreviated: bool = False) -> str:
    """The statistics as a table to print."""
    index = _checked_index(device)
    stats = memory_stats(index)
    rows = [("allocated", "allocated_bytes"), ("active", "active_bytes"), ("requested", "requested_bytes")]
    rows += [("reserved", "reserved_bytes"), ("inactive split", "inactive_split_bytes")]
    counts = [("allocations", "allocation"), ("active blocks", "active"), ("segments", "segment")]
    pools = ("all",) if abbreviated else ("all", "large_pool", "small_pool")
    columns = ("current", "peak", "allocated", "freed")
    lines = [
        f"flagos:{index} ({get_device_name(index)}): out of memory {stats.get('num_ooms', 0)} times, "
        f"{stats.get('num_alloc_retries', 0)} retries after freeing the cache",
        f"{'':<28}" + "".join(f"{column:>14}" for column in columns),
    ]
    for title, name, shown in [(*row, _size) for row in rows] + [(*row, str) for row in counts]:
        for pool in pools:
            values = [stats.get(f"{name}.{pool}.{column}", 0) for column in columns]
            label = title if pool == "all" else f"  {pool.replace('_', ' ')}"
            lines.append(f"{label:<28}" + "".join(f"{shown(value):>14}" for value in values))
    return "\n".join(lines)


__all__ = [
    "caching_allocator_alloc",
    "caching_allocator_delete",
    "device_memory_used",
    "empty_cache",
    "get_allocator_backend",
    "get_per_process_memory_fraction",
    "host_memory_stats",
    "host_memory_stats_as_nested_dict",
    "max_memory_allocated",
    "max_memory_cached",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_cached",
    "memory_reserved",
    "memory_snapshot",
    "memory_stats",
    "memory_stats_as_nested_dict",
    "memory_summary",
    "reset_accumulated_host_memory_stats",
    "reset_accumulated_memory_stats",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
    "reset_peak_host_memory_stats",
    "reset_peak_memory_stats",
    "set_per_process_memory_fraction",
]
