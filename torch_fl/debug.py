"""Finding the operator that goes wrong: compare_with_cpu(), trace() and last_ops().

The first two see every operator below autograd, forward and backward, in the threads that run for the `with` block.
`python -m torch_fl.debug FILE.pt` runs a reproducer that compare_with_cpu() has written.
"""

import collections
import os
import sys
import tempfile
import time
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from torch_fl import _C, flagos, routing

# Relative to the largest element of the expected result: what a different order of summation may cost.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
    torch.complex128: 1e-9,
    torch.complex64: 1e-4,
}
# Where numbers cancel the largest element says little. There it is this many times what the result changes by when each
# argument is changed by the rounding of its type.
ROUNDINGS = 16
# What CUDA may round the operands of these operators to, in float32, when that is allowed: for convolutions it is.
TF32 = 5e-3
CONVOLUTIONS = ("convolution", "convolution_backward", "_convolution")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addbmm")
# Their results have no defined content.
UNDEFINED = ("empty", "new_empty", "resize", "_efficientzerotensor", "_reshape_alias")


class Difference(AssertionError):
    """An operator gave another result on flagos than on the CPU; `op`, `call` (its number), `reproducer` (a file)."""

    def __init__(self, message, op, call, reproducer):
        super().__init__(message)
        self.op, self.call, self.reproducer = op, call, reproducer


def _name(func) -> str:
    """The operator as routes() names it, with its namespace when that is not aten."""
    full = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
    return full.removeprefix("aten::")


def _backend(name: str) -> str:
    try:
        return next((step.backend for step in routing.explain(name) if step.chosen), "none")
    except (RuntimeError, ValueError):
        return "not routed"  # a composite, or an operator of another library that has not been called


class _Served(TorchDispatchMode):
    """A mode that knows which backend served a call.

    explain() does not say it for a thread with routes of its own, nor where a route has conditions.
    """

    def __init__(self):
        super().__init__()
        self._counting: list[bool] = []

    def __enter__(self):
        self._counting.append(_C._set_counting(True))
        return super().__enter__()

    def __exit__(self, kind, error, traceback):
        _C._set_counting(self._counting.pop())
        return super().__exit__(kind, error, traceback)

    @staticmethod
    def _counted(name: str) -> collections.Counter:
        """Calls of an operator so far, by backend."""
        calls: collections.Counter = collections.Counter()
        for op, backend, count, _ in _C._counts():
            if op == name:
                calls[backend] += count
        return calls

    def _server(self, name: str, before: collections.Counter) -> str:
        """The backend that has served since `before`; what explain() says where no or more than one has."""
        served = list(self._counted(name) - before)
        return served[0] if len(served) == 1 else _backend(name)


def _shown(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shown(v) for v in value) + "]"
    return str(value)


def _arguments(args, kwargs) -> str:
    return ", ".join([_shown(a) for a in args] + [f"{k}={_shown(v)}" for k, v in kwargs.items()])


class _Copier:
    """Copies arguments to a device with sizes, strides, offsets and shared storages as they are."""

    def __init__(self, device):
        self.device = torch.device(device)
        self._storages: dict = {}

    def __call__(self, value):
        if isinstance(value, torch.device):
            return self.device if value.type in ("flagos", "cpu") else value
        if not isinstance(value, torch.Tensor) or value.device.type not in ("flagos", "cpu"):
            return value
        if value.dim() == 0 and value.device.type == "cpu" and self.device.type != "cpu":
            return value  # a number among device tensors
        if value.layout is not torch.strided or value.is_quantized:
            return value.detach().to(self.device, copy=True)
        storage = value.untyped_storage()
        if storage._cdata not in self._storages:
            # The key is an address: holding the storage keeps it from being used again.
            self._storages[storage._cdata] = (storage, self._copy(storage))
        copy = torch.empty(0, dtype=value.dtype, device=self.device)
        copy.set_(self._storages[storage._cdata][1], value.storage_offset(), value.size(), value.stride())
        if value.is_conj():
            copy = copy.conj()
        if value.is_neg():
            copy = torch._neg_view(copy)
        return copy

    def _copy(self, storage):
        raw = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return raw.to(self.device, copy=True).untyped_storage()


def _rtol(name: str, leaves) -> float | None:
    """What to allow a call instead of the entry in TOLERANCES; None for that."""
    if _C._chip() != "cuda" or not any(isinstance(t, torch.Tensor) and t.dtype is torch.float32 for t in leaves):
        return None
    plain = name.split(".")[0]
    rounded = plain in CONVOLUTIONS and torch.backends.cudnn.conv.fp32_precision == "tf32"
    rounded |= plain in PRODUCTS and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return TF32 if rounded else None


def _mismatch(actual, expected, rtol, rounding=0.0) -> str | None:
    """What differs between two results by more than `rounding`, in words; None when nothing does."""
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        return _tensor_mismatch(actual.detach(), expected.detach(), rtol, rounding)
    if type(actual) is not type(expected):
        return f"{type(actual).__name__} instead of {type(expected).__name__}"
    if isinstance(expected, (bool, int)):
        return None if actual == expected else f"{actual} instead of {expected}"
    if isinstance(expected, (float, complex)):
        return _tensor_mismatch(torch.tensor(actual), torch.tensor(expected), rtol, rounding)
    return None


def _tensor_mismatch(actual, expected, rtol, rounding) -> str | None:
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return f"{_shown(actual)} instead of {_shown(expected)}"
    if actual.layout is not torch.strided or actual.is_quantized or expected.numel() == 0:
        return None
    actual, expected = (t.cpu().resolve_conj().resolve_neg().contiguous() for t in (actual, expected))
    if expected.is_floating_point() and expected.dtype not in TOLERANCES:  # float8 and the like have no comparison
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
    tolerance = 0.0
    if expected.dtype in TOLERANCES:
        relative = TOLERANCES[expected.dtype] if rtol is None else rtol
        wide = torch.complex128 if expected.is_complex() else torch.float64
        actual, expected = actual.to(wide), expected.to(wide)
        finite = expected[torch.isfinite(expected)]
        tolerance = max(relative * (finite.abs().max().item() if finite.numel() else 0.0), rounding)
    wrong = ~torch.isclose(actual, expected, rtol=0.0, atol=tolerance, equal_nan=expected.dtype.is_floating_point)
    if not wrong.any():
        return None
    where = tuple(torch.nonzero(wrong)[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, first at {where}: {actual[where].item()} instead of "
        f"{expected[where].item()} (tolerance {tolerance:.3g})"
    )


def _results(args, kwargs, returned, func):
    """What an operator returned, and the arguments that it wrote, each with a name."""
    found = [(f"result {i}", value) for i, value in enumerate(tree_flatten(returned)[0])]
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name, args[position] if position < len(args) else None)
        found += [(f"argument {argument.name}", v) for v in tree_flatten(value)[0] if isinstance(v, torch.Tensor)]
    return found


def _wide(value, rounded: bool):
    """A floating-point argument in twice the precision, as it is or changed by its rounding, up here, down there."""
    if not isinstance(value, torch.Tensor) or value.dtype not in TOLERANCES or value.layout is not torch.strided:
        return value
    wide = value.to(torch.complex128 if value.is_complex() else torch.float64, copy=True)
    if not rounded:
        return wide
    up = torch.rand(wide.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return wide * (1 + torch.finfo(value.dtype).eps * torch.where(up, 1.0, -1.0).double())


def _roundings(func, args, kwargs) -> list[float]:
    """By how much each result may be off because of the rounding of numbers; [] when the CPU cannot say."""
    runs = []
    try:
        for rounded in (False, True):
            wide_args, wide_kwargs = tree_map(lambda value: _wide(value, rounded), (args, kwargs))  # noqa: B023
            runs.append(_results(wide_args, wide_kwargs, func(*wide_args, **wide_kwargs), func))
        return [
            ROUNDINGS * torch.nan_to_num((a - b).abs().double(), 0, 0).max().item()
            if isinstance(a, torch.Tensor) and a.dtype in TOLERANCES and a.numel()
            else 0.0
            for (_, a), (_, b) in zip(*runs, strict=True)
        ]
    except Exception:  # it has no kernel for such types, or the types have to go together
        return []


def _difference(func, arguments, actual, expected, rtol) -> str | None:
    """What differs between the _results() of a call on flagos and on the CPU; `arguments` are as before the call."""
    roundings = None
    for i, ((what, here), (_, wanted)) in enumerate(zip(actual, expected, strict=True)):
        words = _mismatch(here, wanted, rtol)
        if words is None:
            continue
        roundings = _roundings(func, *tree_map(_Copier("cpu"), arguments)) if roundings is None else roundings
        words = _mismatch(here, wanted, rtol, roundings[i] if roundings else 0.0)
        if words is not None:
            return f"{what}: {words}"
    return None


def _is_random(func, args, kwargs) -> bool:
    """Whether the result depends on a generator. Attention is marked so, but without dropout it does not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else argument.default_value
            return kwargs.get("dropout_p", given) != 0
    return True


class compare_with_cpu(_Served):
    """Runs every operator on the CPU as well and stops at the first whose result differs.

    `with torch_fl.debug.compare_with_cpu(): loss = model(x); loss.backward()`. The error names the operator, its
    backend and the element; the arguments go into a file in `folder` that `python -m torch_fl.debug FILE` runs again.
    `rtol` replaces TOLERANCES (relative to the largest element; a difference that ROUNDINGS explains is none); `ignore`
    names operators to leave out, `mm` or `add.Tensor`. Random operators and those with undefined content are left out.
    Afterwards `compared` counts the calls, and `skipped` says which operators the CPU could not run, and why.
    """

    def __init__(self, rtol: float | None = None, ignore=(), folder: str | os.PathLike | None = None):
        super().__init__()
        self.rtol, self.ignore, self.folder = rtol, frozenset(ignore), folder
        self.compared = 0
        self.skipped: dict[str, str] = {}
        self._calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = _name(func)
        self._calls += 1
        leaves = tree_flatten((args, kwargs))[0]
        ours = any(_without_index(leaf) == torch.device("flagos") for leaf in leaves)
        if not ours or name in self.ignore or name.startswith(UNDEFINED) or _is_random(func, args, kwargs):
            return func(*args, **kwargs)
        before_args, before_kwargs = tree_map(_Copier("cpu"), (args, kwargs))
        calls = self._counted(name)
        returned = func(*args, **kwargs)
        backend = self._server(name, calls)
        cpu_args, cpu_kwargs = tree_map(_Copier("cpu"), (before_args, before_kwargs))
        try:
            expected = func(*cpu_args, **cpu_kwargs)
        except Exception as error:  # the CPU lacks the operator, the type, or the combination
            served = torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "CPU")
            self.skipped[name] = str(error).split("\n")[0] if served else "the CPU has no kernel for it"
            return returned
        self.compared += 1
        here, there = _results(args, kwargs, returned, func), _results(cpu_args, cpu_kwargs, expected, func)
        rtol = _rtol(name, leaves) if self.rtol is None else self.rtol
        words = _difference(func, (before_args, before_kwargs), here, there, rtol)
        if words is not None:
            self._stop(name, backend, func, before_args, before_kwargs, words, rtol)
        return returned

    def _stop(self, name, backend, func, args, kwargs, words, rtol=None):
        folder = tempfile.gettempdir() if self.folder is None else os.fspath(self.folder)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"flagos-{name.replace('::', '-')}-{os.getpid()}-{self._calls}.pt")
        args_saved, kwargs_saved = tree_map(_encode, (list(args), kwargs))
        torch.save({"op": func.name(), "args": args_saved, "kwargs": kwargs_saved, "rtol": rtol}, path)
        raise Difference(
            f"flagos: {name} (backend {backend}, operator call {self._calls}) differs from the CPU: {words}; "
            f"called with {_arguments(args, kwargs)}; run it again with: python -m torch_fl.debug {path}",
            name,
            self._calls,
            path,
        )


def _encode(value):
    """Constants of torch as text: not all of them can be pickled."""
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value).replace("torch.", "torch:")
    return value


def _decode(value):
    return getattr(torch, value[6:]) if isinstance(value, str) and value.startswith("torch:") else value


def _without_index(leaf):
    """A tensor's or argument's device without its index, so that it compares equal to torch.device("flagos")."""
    device = leaf.device if isinstance(leaf, torch.Tensor) else leaf
    return torch.device(device.type) if isinstance(device, torch.device) else None


def reproduce(path: str | os.PathLike) -> str | None:
    """Runs the operator of a reproducer on flagos and on the CPU; what differs, None when nothing does."""
    saved = torch.load(path, weights_only=True, map_location="cpu")
    namespace, name = saved["op"].split("::")
    packet, _, overload = name.partition(".")
    func = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    arguments = tree_map(_decode, (saved["args"], saved["kwargs"]))
    runs = []
    for device in ("flagos", "cpu"):
        args, kwargs = tree_map(_Copier(device), arguments)
        runs.append(_results(args, kwargs, func(*args, **kwargs), func))
    words = _difference(func, arguments, *runs, saved["rtol"])
    return words and f"{_name(func)}: {words}"


class Call(NamedTuple):
    number: int
    op: str
    backend: str
    arguments: str
    result: str
    seconds: float

    def __str__(self):
        return f"{self.number:>6} {self.seconds * 1e6:>10.1f} us  {self.backend:<14} {self.op}({self.arguments})"


class trace(_Served):
    """Lists the operators that run inside a `with` block: `with torch_fl.debug.trace() as t: ...; print(t)`.

    `calls` holds the rows. The time is that of the call on the host; with `synchronize` the device's work is included,
    and an error of the device surfaces in the operator that caused it. `limit` keeps only the last calls. An error that
    leaves the block carries a note with the last `last` operators.
    """

    def __init__(self, synchronize: bool = False, limit: int | None = None, last: int = 10):
        super().__init__()
        self.calls: collections.deque[Call] = collections.deque(maxlen=limit)
        self.synchronize, self.last = synchronize, last
        self._number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = _name(func)
        self._number += 1
        number, result = self._number, "failed"
        arguments = _arguments(args, kwargs)
        calls = self._counted(name)
        start = time.perf_counter()
        try:
            returned = func(*args, **kwargs)
            if self.synchronize:
                flagos.synchronize()
            result = _shown(returned)
            return returned
        finally:
            seconds = time.perf_counter() - start
            leaves = tree_flatten((args, kwargs))[0]
            ours = any(_without_index(leaf) == torch.device("flagos") for leaf in leaves)
            backend = self._server(name, calls) if ours else "-"
            self.calls.append(Call(number, name, backend, arguments, result, seconds))

    def __exit__(self, kind, error, traceback):
        if error is not None and self.calls and hasattr(error, "add_note"):
            rows = "\n".join(str(call) for call in list(self.calls)[-self.last :])
            error.add_note(f"torch_fl.debug.trace: the last operators before this error:\n{rows}")
        return super().__exit__(kind, error, traceback)

    def by_op(self) -> list[tuple[str, str, int, float]]:
        """(op, backend, calls, seconds), most time first."""
        totals: dict[tuple[str, str], list] = {}
        for call in self.calls:
            entry = totals.setdefault((call.op, call.backend), [0, 0.0])
            entry[0] += 1
            entry[1] += call.seconds
        return sorted(((*key, *entry) for key, entry in totals.items()), key=lambda row: -row[3])

    def __str__(self):
        return "\n".join(str(call) for call in self.calls)


def last_ops() -> dict[str, list[tuple[str, str]]]:
    """The last operators of every thread, newest first, with the backends that serve them now.

    Always recorded; errors that surface late name them too. The calling thread's key is "".
    """
    return {thread: [(op, _backend(op)) for op in ops] for thread, ops in _C._last_ops()}


__all__ = ["Call", "Difference", "compare_with_cpu", "last_ops", "reproduce", "trace"]


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m torch_fl.debug FILE.pt   (a file that compare_with_cpu wrote)", file=sys.stderr)
        return 2
    words = reproduce(sys.argv[1])
    print(words or "flagos and the CPU give the same result")
    return 1 if words else 0


if __name__ == "__main__":
    sys.exit(main())
