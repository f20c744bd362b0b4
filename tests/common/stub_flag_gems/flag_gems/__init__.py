"""A stand-in for FlagGems: the same registration table, functions that compute with torch on native tensors.

Each function notes its call in CALLS and refuses flagos tensors, which a real kernel could not use. Parameters that
FlagGems' functions lack are lacking here too. STUB_FLAG_GEMS_FAIL makes the import fail.
"""

import os

import torch

if os.environ.get("STUB_FLAG_GEMS_FAIL"):
    raise RuntimeError(os.environ["STUB_FLAG_GEMS_FAIL"])

CALLS: list[str] = []
_FULL_CONFIG: list[tuple] = []
SEEN: dict[str, object] = {}


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def kernel(op):
    def register(function):
        def counted(*args, **kwargs):
            CALLS.append(op)
            for t in tensors([*args, *kwargs.values()]):
                assert t.device.type != "flagos", f"{op} got a flagos tensor"
            return function(*args, **kwargs)

        _FULL_CONFIG.append((op, counted))
        return counted

    return register


@kernel("mm")
def mm(a, b):
    return torch.mm(a, b)


@kernel("mm.out")
def mm_out(a, b, *, out):
    return torch.mm(a, b, out=out)


@kernel("add.Tensor")
def add(a, b, *, alpha=1):
    return torch.add(a, b, alpha=alpha)


@kernel("mul.Tensor")
def mul(a, b):
    return torch.mul(a, b)


@kernel("relu_")
def relu_(a):
    torch.relu_(a)
    return None  # some of FlagGems' in-place functions return nothing


@kernel("cat")
def cat(tensors, dim=0):
    return torch.cat(tensors, dim)


@kernel("clamp")
def clamp(a, mini=None, maxi=None):
    return torch.clamp(a, mini, maxi)


@kernel("sum.dim_IntList")
def sum_dim(a, dim=None, keepdim=False, *, dtype=None):
    SEEN["sum"] = (dim, keepdim, dtype)
    return torch.sum(a, dim, keepdim, dtype=dtype)


@kernel("max.dim")
def max_dim(a, dim=None, keepdim=False):
    found = torch.max(a, dim, keepdim)
    return found.values, found.indices


@kernel("sort.stable")
def sort_stable(a, *, stable, dim=-1, descending=False):
    return torch.sort(a, stable=stable, dim=dim, descending=descending)


@kernel("index.Tensor")
def index(a, indices):
    return torch.ops.aten.index(a, indices)


@kernel("normal_")
def normal_(a, mean=0, std=1, *, generator=None):
    return a.normal_(mean, std, generator=generator)


@kernel("exp")
def exp(a):
    raise ValueError("no exp today")


@kernel("silu")
def silu(a):
    x = torch.ones(2, device="flagos")
    SEEN["silu"] = torch.nn.functional.silu(x).cpu()
    return torch.nn.functional.silu(a)


@kernel("sigmoid")
def sigmoid(a):
    return 7


@kernel("neg")
def neg(a):
    return torch.zeros_like(a)  # wrong


@kernel("sqrt")
def sqrt(a):
    return torch.sqrt(a)


@kernel("abs")
def abs(a):
    return torch.abs(a)


@kernel("zeros_like")
def zeros_like(a, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return torch.zeros_like(a, dtype=dtype)


@kernel("native_layer_norm_backward")
def native_layer_norm_backward(grad, x, shape, mean, rstd, weight=None, bias=None, output_mask=None):
    return torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, output_mask)
