"""torch.cuda.jiterator for flagos tensors: elementwise kernels from a string of CUDA C++, compiled at their first use.

The kernel is an operator of its own, `flagos::jiterator`, that knows CUDA only; flagos tensors reach it as they reach
every other library's CUDA operator. Only on the chip cuda.
"""

import weakref
from collections.abc import Callable

import torch

from torch_fl import _C

_functions: weakref.WeakValueDictionary[int, "_JittedFunction"] = weakref.WeakValueDictionary()
_library: torch.library.Library | None = None


def _run(tensors, function, values):
    result = _functions[function].run(tensors, values)
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _operator():
    global _library
    if _library is None:
        library = torch.library.Library("flagos", "FRAGMENT")
        library.define("jiterator(Tensor[] tensors, int function, Scalar[] values) -> Tensor[]")
        library.impl("jiterator", _run, "CUDA")
        _library = library
    return torch.ops.flagos.jiterator


class _JittedFunction:
    def __init__(self, compiled, several: bool, defaults: dict):
        self.compiled = compiled
        self.several = several
        self.defaults = defaults
        _functions[id(self)] = self

    def run(self, tensors, values):
        return self.compiled(*tensors, **dict(zip(self.defaults, values, strict=True)))

    def __call__(self, *tensors: torch.Tensor, **kwargs):
        if _C._chip() != "cuda":
            raise NotImplementedError(f"torch.flagos.jiterator: CUDA C++ does not run on the chip {_C._chip()}")
        for key in kwargs:
            if key not in self.defaults:
                raise KeyError(f"{key} is not declared in function definition")
        if not any(t.is_flagos for t in tensors):  # torch says what is wrong with them
            return self.compiled(*tensors, **kwargs)
        with torch.no_grad():
            results = _operator()(tensors, id(self), list((self.defaults | kwargs).values()))
        return tuple(results) if self.several and len(results) > 1 else results[0]


def _create_jit_fn(code_string: str, **kwargs) -> Callable:
    """As torch.cuda.jiterator._create_jit_fn: a function of up to 8 tensors, of a C++ template that returns a value."""
    return _JittedFunction(torch.cuda.jiterator._create_jit_fn(code_string, **kwargs), False, kwargs)


def _create_multi_output_jit_fn(code_string: str, num_outputs: int, **kwargs) -> Callable:
    """As torch.cuda.jiterator._create_multi_output_jit_fn: the C++ template has references for its results."""
    compiled = torch.cuda.jiterator._create_multi_output_jit_fn(code_string, num_outputs, **kwargs)
    return _JittedFunction(compiled, True, kwargs)


__all__: list[str] = []
