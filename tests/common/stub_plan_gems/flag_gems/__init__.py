"""A stand-in for FlagGems with Triton kernels of its own, one per thing that a launch plan must get right."""

import torch
import triton
import triton.language as tl

CALLS = []  # the operators whose Python function ran
SECRET = []  # a tensor that no key can know of


@triton.jit
def scaled_sum(x, y, out, n, alpha, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, inside) + alpha * tl.load(y + at, inside), inside)


def add(x, y, alpha=1):
    CALLS.append("add.Tensor")
    x, y = torch.broadcast_tensors(x, y if isinstance(y, torch.Tensor) else torch.full_like(x, y))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.data_ptr() == y.data_ptr():
        y = y.reshape(-1)
    scaled_sum[(triton.cdiv(x.numel(), 64),)](x, y, out, x.numel(), float(alpha), BLOCK=64)
    return out


def add_(x, y, alpha=1):
    CALLS.append("add_.Tensor")
    scaled_sum[(triton.cdiv(x.numel(), 64),)](x, y, x, x.numel(), float(alpha), BLOCK=64)
    return x


def silu(x):
    """A temporary, an operator of torch, and a result that is part of a larger allocation."""
    CALLS.append("silu")
    both = torch.zeros((2, *x.shape), dtype=x.dtype, device=x.device)
    scaled_sum[(1,)](x, x, both[1], x.numel(), 0.5, BLOCK=64)
    return both[1]


def sigmoid(x):
    CALLS.append("sigmoid")
    x.sum().item()
    return torch.empty_like(x)


def tanh(x):
    CALLS.append("tanh")
    return x


def exp(x):
    CALLS.append("exp")
    raise ValueError("no exp today")


def neg(x):
    """Copies its argument, or SECRET's tensor when there is one: no plan can know."""
    CALLS.append("neg")
    return (SECRET or [x])[0].clone()


_FULL_CONFIG = (
    ("add.Tensor", add),
    ("add_.Tensor", add_),
    ("silu", silu),
    ("sigmoid", sigmoid),
    ("tanh", tanh),
    ("exp", exp),
    ("neg", neg),
)
