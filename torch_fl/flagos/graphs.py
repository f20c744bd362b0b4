"""Graphs: work recorded once and replayed with one launch, with the signatures of torch.cuda.

On an NVIDIA GPU flagos streams and memory are CUDA's own, so torch.cuda's capture records flagos operators unchanged;
these functions translate devices and streams and delegate. Chips without graphs refuse in one sentence.
"""

import contextlib

import torch

from torch_fl import _C


def _check_chip(name: str) -> None:
    chip = _C._chip()
    if chip != "cuda":
        raise RuntimeError(f"torch.flagos.{name}: the chip {chip} records no graphs, only cuda does; run without")


def _cuda_stream(stream):
    """The torch.cuda.Stream that a flagos stream is; None and CUDA streams pass."""
    if stream is None or stream.device.type == "cuda":
        return stream
    cuda = torch.device("cuda", stream.device_index)
    return torch.cuda.Stream(
        stream_id=stream.stream_id,
        device_index=stream.device_index,
        device_type=torch.cuda.default_stream(cuda).device_type,
    )


class CUDAGraph(torch.cuda.CUDAGraph):
    """A recorded graph: torch.cuda.CUDAGraph, for flagos work."""

    def __new__(cls, *arguments, **keywords):
        _check_chip("CUDAGraph")
        return super().__new__(cls, *arguments, **keywords)


class graph:
    """Context manager that records the flagos work inside it into a CUDAGraph."""

    def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode: str = "global"):
        _check_chip("graph")
        self._pool = torch.cuda.graph_pool_handle() if pool is None else pool
        self._graph = torch.cuda.graph(cuda_graph, self._pool, _cuda_stream(stream), capture_error_mode)

    def __enter__(self):
        self._before = [torch.cuda.current_stream(self._graph.capture_stream.device), torch.cuda.current_stream()]
        with self._undone_by_an_error():
            self._graph.__enter__()

    def __exit__(self, *exception):
        with self._undone_by_an_error():
            return self._graph.__exit__(*exception)

    @contextlib.contextmanager
    def _undone_by_an_error(self):
        """A recording that cannot start or end would leave its stream current and torch's allocators at recording: from
        then on the one would free no cached memory before it says that there is none, the other reuse no pinned one."""
        try:
            yield
        except BaseException:
            for stream in self._before:
                torch.cuda.set_stream(stream)
            with contextlib.suppress(RuntimeError):  # it had not come that far, or further
                torch._C._cuda_endAllocateToPool(self._graph.capture_stream.device_index, self._pool)
                torch._C._cuda_releasePool(self._graph.capture_stream.device_index, self._pool)
            with contextlib.suppress(RuntimeError):
                _C._end_recording_pinned(*self._pool)
            raise


def graph_pool_handle():
    """A token for graphs that shall share memory: the `pool` of `graph` and make_graphed_callables."""
    _check_chip("graph_pool_handle")
    return torch.cuda.graph_pool_handle()


def is_current_stream_capturing() -> bool:
    """Whether the current stream is recording a graph."""
    return _C._chip() == "cuda" and torch.cuda.is_current_stream_capturing()


def make_graphed_callables(callables, sample_args, num_warmup_iters=3, allow_unused_input=False, pool=None):
    """Functions or modules whose forward and backward replay graphs, as torch.cuda.make_graphed_callables makes."""
    _check_chip("make_graphed_callables")
    return torch.cuda.make_graphed_callables(callables, sample_args, num_warmup_iters, allow_unused_input, pool)


__all__ = [
    "CUDAGraph",
    "graph",
    "graph_pool_handle",
    "is_current_stream_capturing",
    "make_graphed_callables",
]
