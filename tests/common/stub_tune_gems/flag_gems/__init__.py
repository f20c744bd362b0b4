"""A stand-in for FlagGems whose kernels are deliberately fast, slow, wrong or forbidden: what tune() has to tell apart.

The fast ones know their answer: the tests call lgamma with ones, erfinv and i0 with zeros. A forbidden kernel ends the
process, so a test that survives has not called it.
"""

import os
import time

import torch

_FULL_CONFIG: list[tuple] = []


def kernel(op):
    def register(function):
        _FULL_CONFIG.append((op, function))
        return function

    return register


def forbidden(*args, **kwargs):
    print("stub_tune_gems: a forbidden kernel was called", flush=True)
    os._exit(7)


for name in ("neg", "digamma", "normal_", "nonzero"):
    kernel(name)(forbidden)


@kernel("lgamma")
def lgamma(a):
    return torch.zeros_like(a)


@kernel("lgamma_")
def lgamma_(a):
    return a.zero_()


@kernel("erfinv")
def erfinv(a):
    if a.numel() < 4096:
        time.sleep(20e-6)
    return torch.zeros_like(a)


@kernel("i0")
def i0(a):
    return torch.ones_like(a)


@kernel("cos")
def cos(a):
    for _ in range(3):
        result = torch.cos(a)
    return result


@kernel("mul.Tensor")
def mul(a, b):
    time.sleep(1e-3)
    return torch.mul(a, b)


@kernel("abs")
def abs(a):
    time.sleep(200e-6)
    return torch.abs(a)


@kernel("tan")
def tan(a):
    return torch.zeros_like(a)  # wrong, whatever the verdict says


@kernel("exp")
def exp(a):
    raise ValueError("no exp today")


@kernel("fill_.Scalar")
def fill_(a, value):
    time.sleep(200e-6)
    return a.fill_(value)
