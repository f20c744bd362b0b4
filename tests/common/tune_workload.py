"""A workload for `python -m torch_fl tune` with the stand-in kernels of stub_tune_gems; prints what it computed.

Its arguments end up in its output, to show that they arrive.
"""

import sys

import torch

torch.manual_seed(3)
LARGE, SMALL = 200_000, 8
ones, zeros = torch.ones(LARGE, device="flagos"), torch.zeros(LARGE, device="flagos")
few = torch.zeros(SMALL, device="flagos")
x = torch.randn(LARGE, device="flagos")
w = torch.randn(64, 64, device="flagos", requires_grad=True)
total = torch.zeros((), dtype=torch.float64, device="flagos")
for _ in range(3):
    found = [torch.lgamma(ones), torch.erfinv(zeros), torch.i0(zeros), torch.i0(zeros.double()), torch.cos(x)]
    found += [x * 2, torch.abs(x), torch.tan(x), torch.exp(x), -x, torch.digamma(ones)]
    found += [torch.erfinv(few) for _ in range(4)]
    written = ones.clone().lgamma_()
    view = torch.ones(LARGE + 8, device="flagos")[8:].lgamma_()
    filled = torch.empty_like(ones).fill_(2.0)
    noise = torch.empty(1000, device="flagos").normal_()
    where = torch.nonzero(x[:100] > 0)
    ((w * w).exp().cos().sum()).backward()
    for tensor in (*found, written, view, filled, noise, where, w.grad):
        total += tensor.double().sum()
    assert (ones == 1).all() and (zeros == 0).all()
print("result", float(total).hex(), float(torch.rand((), device="flagos")).hex(), torch.rand(()).item(), sys.argv[1:])
sys.exit(0)
