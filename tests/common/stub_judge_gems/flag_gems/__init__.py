"""A stand-in for FlagGems for the judge's own test: kernels that are right, and wrong as FlagGems' own are."""

import os
import time

import torch


def relu(x):
    return torch.relu(x)


def zero_(x):
    """Writes from the first element on, as if its tensor were dense."""
    flat = x.as_strided((x.numel(),), (1,))
    flat.zero_()
    return x


def cat(tensors, dim=0):
    """One tensor comes back itself."""
    tensors = [t for t in tensors if t.shape != (0,)]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def total(x, *, dtype=None):
    """Keeps the dtype of small integers."""
    return torch.sum(x, dtype=dtype or x.dtype)


def neg(x):
    return torch.zeros_like(x)


def exp2(x):
    """Of a tensor without dimensions it dies in half precision, and never ends in double precision."""
    if x.dim() == 0 and x.dtype is torch.float16:
        os.abort()
    if x.dim() == 0 and x.dtype is torch.float64:
        time.sleep(3600)
    return torch.exp2(x)


_FULL_CONFIG = [("relu", relu), ("zero_", zero_), ("cat", cat), ("sum", total), ("neg", neg), ("exp2", exp2)]
