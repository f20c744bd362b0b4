"""Moves OpInfo samples between devices without changing their layout, and makes awkward variants of them.

A sample is any nest of tuples, lists, dicts and slices with tensors in it. A copy keeps what an operator can see:
sizes, strides, storage offset, which tensors share a storage, the conj and neg bits, requires_grad.
"""

from __future__ import annotations

import torch
from torch.testing._internal.common_utils import noncontiguous_like


def tree_map(fn, value):
    """Applies fn to every leaf of a nest; containers keep their type (named tuples included)."""
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, tuple):
        items = [tree_map(fn, item) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items) if type(value) is not tuple else tuple(items)
    if isinstance(value, list):
        return [tree_map(fn, item) for item in value]
    if isinstance(value, dict):
        return {key: tree_map(fn, item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(tree_map(fn, item) for item in (value.start, value.stop, value.step)))
    return fn(value)


def tensors_in(value) -> list[torch.Tensor]:
    """The tensors of a nest, in order."""
    found: list[torch.Tensor] = []

    def look(leaf):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        return leaf

    tree_map(look, value)
    return found


def is_plain(tensor: torch.Tensor) -> bool:
    """Strided, with a storage of its own: not sparse, nested, quantized or mkldnn."""
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def copy_tensor(
    tensor: torch.Tensor, device: str, memo: dict | None = None, requires_grad: bool = False
) -> torch.Tensor:
    """A leaf on `device` with the same values and layout. Tensors that share a storage share one afterwards (memo)."""
    memo = {} if memo is None else memo
    with torch.no_grad():
        result = _copy_layout(tensor.detach(), device, memo)
    if requires_grad and (result.is_floating_point() or result.is_complex()):
        result.requires_grad_()
    return result


def _copy_layout(tensor, device, memo):
    if not is_plain(tensor):
        return tensor.clone() if tensor.device.type == torch.device(device).type else tensor.to(device)
    storage = tensor.untyped_storage()
    size = tensor.element_size()
    if storage.nbytes() % size:
        return tensor.clone().to(device)
    key = (storage._cdata, tensor.dtype)
    if key not in memo:
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        flat.set_(storage, 0, (storage.nbytes() // size,), (1,))
        # Many processes may share a GPU, and each wait for it is long: pageable memory is read before this returns.
        stays = torch.device(device).type == tensor.device.type
        memo[key] = flat.clone() if stays else flat.to(device, non_blocking=torch.device(device).type != "cpu")
    flat = memo[key]
    sizes, strides, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
    result = flat.new_empty(0).set_(flat.untyped_storage(), offset, sizes, strides)
    if tensor.is_conj():
        result = torch._conj(result)
    if tensor.is_neg():
        result = torch._neg_view(result)
    return result


def copy_tree(value, device: str, grad: bool = False):
    """A copy of a nest on `device`. Strings and torch.devices that say "cpu" follow, and "cuda", which samples name
    where torch has it. grad: keep requires_grad."""
    memo: dict = {}
    seen: dict[int, torch.Tensor] = {}

    def move(leaf):
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in seen:
                seen[id(leaf)] = copy_tensor(leaf, device, memo, grad and leaf.requires_grad)
            return seen[id(leaf)]
        if isinstance(leaf, torch.device) and leaf.type in ("cpu", "cuda"):
            return torch.device(device)
        if isinstance(leaf, str) and leaf == "cpu":
            return device
        if isinstance(leaf, torch.Generator) and torch.device(device).type != "cpu":
            generator = torch.Generator(device=device)
            generator.manual_seed(leaf.initial_seed())
            return generator
        return leaf

    return tree_map(move, value)


# ---- awkward variants ------------------------------------------------------------------------------------------------


def _strided(t):
    return noncontiguous_like(t) if t.numel() > 1 else t


def _offset(t):
    if t.numel() == 0 or not t.is_contiguous():
        return t
    buffer = torch.empty(t.numel() + 3, dtype=t.dtype)
    buffer[:3].fill_(1)
    view = buffer[3:].view(t.shape)
    return view.copy_(t)


def _transposed(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() >= 2 and min(t.shape[-2:]) > 1 else t


def _channels_last(t):
    if t.dim() == 4 and t.shape[1] > 1:
        return t.contiguous(memory_format=torch.channels_last)
    if t.dim() == 5 and t.shape[1] > 1:
        return t.contiguous(memory_format=torch.channels_last_3d)
    return t


def _zero_size(t):
    return t.narrow(0, 0, 0) if t.dim() and t.shape[0] else t


def _expanded(t):
    return t.narrow(0, 0, 1).expand(t.shape) if t.dim() and t.shape[0] > 1 else t


def _conj(t):
    return torch._conj(t.conj_physical()) if t.is_complex() and t.numel() else t


def _neg(t):
    if t.dtype is torch.complex32:  # the CPU has no kernel that reads conj and neg together for it
        return t
    return torch._neg_view(torch.neg(t)) if (t.is_floating_point() or t.is_complex()) and t.numel() else t


VARIANTS = {
    "strided": _strided,
    "offset": _offset,
    "transposed": _transposed,
    "channels_last": _channels_last,
    "zero_size": _zero_size,
    "expanded": _expanded,
    "conj": _conj,
    "neg": _neg,
}


def make_variant(name: str, value):
    """The nest with every plain CPU tensor in the named layout, or None when that changes nothing."""
    change = VARIANTS[name]
    changed = False

    def apply(leaf):
        nonlocal changed
        if not isinstance(leaf, torch.Tensor) or not is_plain(leaf):
            return leaf
        with torch.no_grad():
            result = change(leaf.detach())
        if result is leaf or (
            result.shape == leaf.shape
            and result.stride() == leaf.stride()
            and result.storage_offset() == leaf.storage_offset()
            and result.is_conj() == leaf.is_conj()
            and result.is_neg() == leaf.is_neg()
        ):
            return leaf
        changed = True
        return result.requires_grad_(leaf.requires_grad)

    try:
        result = tree_map(apply, value)
    except (RuntimeError, TypeError, NotImplementedError):  # a dtype that lacks neg, copy, ...: no such variant
        return None
    return result if changed else None
