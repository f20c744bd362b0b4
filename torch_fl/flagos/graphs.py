"""Graphs: work recorded once and replayed with one launch, with the signatures of torch.cuda.

On an NVIDIA GPU flagos streams and memory are CUDA's own, so torch.cuda's capture records flagos operators unchanged;
these functions translate devices and streams and delegate. Chips without graphs refuse in one sentence.
"""

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
        self._graph = torch.cuda.graph(cuda_graph, pool, _cuda_stream(stream), capture_error_mode)

    def __enter__(self):
        self._graph.__enter__()

    def __exit__(self, *exception):
        return self._graph.__exit__(*exception)


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
