"""Which operators a workload calls with which arguments: what there is to measure, and a few copies to do it with.

Only operators that have a choice are noted: at least one FlagGems kernel that is judged right beside the native one.
The workload is not touched: its calls go where they would go, and what is kept are copies.
"""

import contextlib
import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from torch_fl import _C, debug, flagos, routing

SAMPLES = 3  # calls kept of one operator, dtype and size class
SIZE_CLASS = 8  # a class ends at this many times its beginning
_SIGNATURES = 4096  # told apart in one group; later ones count as its first
_SYNCHRONIZING = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


class Choice(NamedTuple):
    """The backends that may serve an operator by right."""

    native: str
    default: str  # what serves without any line
    others: tuple[str, ...]  # judged right, in the default order, without the native one and without the CPU


def choice(op: str) -> Choice | None:
    """The backends for an operator; None when it has no route or there is nothing to choose."""
    try:
        rows, native = _C._candidates(op)
    except (RuntimeError, ValueError):  # no route
        return None
    right = [backend for backend, usable, by_name_only, _ in rows if usable and not by_name_only]
    others = tuple(backend for backend in right if backend not in (native, "cpu"))
    return Choice(native, right[0], others) if native in right and others else None


def tensors_of(args, kwargs) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]


def size_class(numel: int) -> tuple[int, int]:
    """The first and the last number of elements of the class."""
    low = 1
    while low * SIZE_CLASS <= numel:
        low *= SIZE_CLASS
    return low, low * SIZE_CLASS - 1


class Copier:
    """Copies tensors with sizes, strides, alignment and the memory they share; of a storage only the part in use."""

    ALIGNMENT = 512

    def __init__(self, tensors):
        self._spans: dict[int, list] = {}  # storage -> [first byte, last byte + 1, the tensor's storage, its copy]
        for tensor in tensors:
            if tensor.numel():
                first = tensor.storage_offset() * tensor.element_size()
                last = first + tensor.element_size() * (
                    1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
                )
                storage = tensor.untyped_storage()
                span = self._spans.setdefault(storage._cdata, [first, last, storage, None])
                span[0], span[1] = min(span[0], first), max(span[1], last)
        for span in self._spans.values():
            span[0] -= span[0] % self.ALIGNMENT

    @property
    def nbytes(self) -> int:
        return sum(last - first for first, last, *_ in self._spans.values())

    def __call__(self, value):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach()
        if not value.numel():
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        span = self._spans[value.untyped_storage()._cdata]
        first, last, storage, copied = span
        if copied is None:
            raw = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage, first, (last - first,), (1,))
            copied = span[3] = raw.clone().untyped_storage()
        copy = torch.empty(0, dtype=value.dtype, device=value.device)
        offset = value.storage_offset() - first // value.element_size()
        copy.set_(copied, offset, value.shape, value.stride())
        copy = copy.conj() if value.is_conj() else copy
        return torch._neg_view(copy) if value.is_neg() else copy


def copied(args, kwargs):
    """Copies of a call's arguments."""
    copier = Copier(tensors_of(args, kwargs))
    return tree_map(copier, args), tree_map(copier, kwargs)


@dataclass
class Sample:
    """One call to measure with."""

    args: tuple
    kwargs: dict
    words: str
    calls: int = 0


@dataclass
class Group:
    """The calls of one operator with one dtype and size: what a route can tell apart."""

    op: str
    func: object
    choice: Choice
    dtype: str  # of the first tensor argument, as conf lines name it; "" when there is none
    low: int  # elements of the largest tensor argument
    high: int
    calls: int = 0
    samples: dict[tuple, Sample] = field(default_factory=dict)  # by signature
    signatures: dict[tuple, int] = field(default_factory=dict)  # -> calls
    nothing: str = ""  # why there is no sample

    def settle(self) -> None:
        """Gives the calls of signatures without a sample to those with one."""
        total = sum(self.signatures[signature] for signature in self.samples)
        for signature, sample in self.samples.items():
            sample.calls = max(1, round(self.calls * self.signatures[signature] / total))


def _signature(args, kwargs):
    def each(leaf):
        if isinstance(leaf, torch.Tensor):
            shape, stride = tuple(leaf.shape), tuple(leaf.stride())
            return leaf.dtype, shape, stride, leaf.device.type, leaf.storage_offset() * leaf.element_size() % 16
        return type(leaf), str(leaf)

    leaves, shape = tree_flatten((args, kwargs))
    return (str(shape), *map(each, leaves))


def _plain(tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested)
    )


class Observer(TorchDispatchMode):
    """Notes the calls inside a `with` block, forward and backward, of the thread that runs it.

    Other operators that had a choice are in `left_out`, with the reason.
    """

    def __init__(self, memory: int | None = None):
        super().__init__()
        self.groups: dict[tuple, Group] = {}
        self.left_out: dict[str, str] = {}
        self._memory = memory
        self._held = 0
        self._stack = contextlib.ExitStack()
        self._choice = functools.cache(choice)
        self._routed = frozenset(routing.get_registered_ops())
        self._composed: dict[object, bool] = {}

    def __enter__(self):
        self.counts = self._stack.enter_context(routing.count_ops())
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._stack.close()
        for group in self.groups.values():
            if group.samples:
                group.settle()
        for op, *_ in self.counts.rows():  # those that other operators called
            if (
                op not in self.left_out
                and self._choice(op)
                and not any(group.op == op for group in self.groups.values())
            ):
                self.left_out[op] = "called only inside other operators, where its arguments are not seen"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = debug._name(func)
        if name not in self._routed and self._is_composed(func):
            super().__enter__()  # the mode alone, to see the operators that it is made of; the observation goes on
            try:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        chosen = self._choice(name)
        if chosen:
            self._note(name, func, chosen, args, kwargs)
        return func(*args, **kwargs)

    def _is_composed(self, func) -> bool:
        """Whether the device has nothing for it but torch's composition of other operators."""
        if func not in self._composed:
            has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
            self._composed[func] = has("CompositeExplicitAutograd") and not has("PrivateUse1") and not func.is_view
        return self._composed[func]

    def _note(self, name, func, chosen, args, kwargs):
        reason = self._refusal(func, args, kwargs)
        if reason is not None:
            if reason:
                self.left_out[name] = reason
            return
        tensors = tensors_of(args, kwargs)
        numel = max((t.numel() for t in tensors), default=0)
        low, high = size_class(numel) if numel else (0, 0)
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        group = self.groups.setdefault((name, dtype, low), Group(name, func, chosen, dtype, low, high))
        group.calls += 1
        signature = _signature(args, kwargs)
        if signature not in group.signatures and len(group.signatures) >= _SIGNATURES:
            signature = next(iter(group.signatures))
        calls = group.signatures[signature] = group.signatures.get(signature, 0) + 1
        if signature in group.samples:
            return
        if len(group.samples) >= SAMPLES:
            rarest = min(group.samples, key=group.signatures.__getitem__)
            if calls <= 2 * group.signatures[rarest]:
                return
            self._held -= Copier(tensors_of(group.samples[rarest].args, group.samples[rarest].kwargs)).nbytes
            del group.samples[rarest]
        need = Copier(tensors).nbytes
        if self._held + need > self._limit():
            group.nothing = f"its arguments ({need / 2**20:.0f} MiB) do not fit into the memory for copies"
            return
        self._held += need
        group.samples[signature] = Sample(*copied(args, kwargs), f"{name}({debug._arguments(args, kwargs)})")

    def _refusal(self, func, args, kwargs) -> str | None:
        """Why a call is not noted; "" when there is nothing to say, None when it is."""
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not any(debug._without_index(leaf) == torch.device("flagos") for leaf in leaves):
            return ""
        if debug._is_random(func, args, kwargs):
            return "draws random numbers"
        if any(tag in func.tags for tag in _SYNCHRONIZING):
            return "waits for the device"
        if not all(map(_plain, tensors)):
            return "its tensors are of another kind (sparse, nested, quantized, a subclass)"
        if tensors and not any(t.numel() for t in tensors):
            return ""
        if flagos.is_current_stream_capturing():
            return "was called while a graph was recorded"
        return None

    def _limit(self) -> int:
        if self._memory is None:
            self._memory = flagos.mem_get_info()[0] // 4
        return self._memory
