"""torch.utils.checkpoint on flagos: same gradients, RNG restored, less memory."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


def block(dropout=0.0):
    return torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Dropout(dropout), torch.nn.Linear(256, 64)
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_same_gradients(reentrant, dropout, device):
    results = []
    for use in (False, True):
        torch.manual_seed(0)
        model = block(dropout).to(device)
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        torch.manual_seed(7)
        y = checkpoint(model, x, use_reentrant=reentrant) if use else model(x)
        y.square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e), "the recomputed forward differs: the RNG state was not restored"


def test_less_memory(device):
    def peak(use):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(block() for _ in range(6))).to(device)
        x = torch.randn(512, 64, device=device, requires_grad=True)
        torch.flagos.reset_peak_memory_stats()
        start = torch.flagos.memory_allocated()
        y = checkpoint_sequential(model, 6, x, use_reentrant=False) if use else model(x)
        y.sum().backward()
        return torch.flagos.max_memory_allocated() - start

    assert peak(True) < 0.7 * peak(False)


def test_autocast_is_restored(device):
    weight = torch.randn(4, 4, device=device, requires_grad=True)
    seen = []

    def fn(x):
        y = x @ weight
        seen.append(y.dtype)
        return y @ weight  # recomputation stops at the last tensor that backward needs

    with torch.autocast("flagos", dtype=torch.bfloat16):
        y = checkpoint(fn, torch.randn(4, 4, device=device, requires_grad=True), use_reentrant=False)
    y.float().sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_second_device_rng(device):
    if torch.flagos.device_count() < 2:
        pytest.skip("needs two devices")
    x = torch.ones(64, device="flagos:1", requires_grad=True)
    torch.manual_seed(3)
    y = checkpoint(lambda t: torch.nn.functional.dropout(t, 0.5), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(y.detach(), x.grad), "mask of the recomputation differs from the forward's"


def test_exception_inside(device):
    x = torch.ones(3, device=device, requires_grad=True)
    calls = []

    def fn(t):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("on purpose")
        return t * t

    y = checkpoint(fn, x, use_reentrant=False)
    with pytest.raises(ValueError, match="on purpose"):
        (y * y).sum().backward()
    (x * 2).sum().backward()
    assert x.grad.tolist() == [2.0] * 3
