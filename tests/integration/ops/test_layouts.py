"""Awkward layouts that OpInfo samples lack: 6-D, dimensions of stride 0, huge strides, zero size, offsets,
channels-last."""

import pytest
import torch

import torch_fl

pytestmark = pytest.mark.anyplatform

LAYOUTS = {
    "six_dimensions": lambda: torch.arange(64.0).reshape(2, 2, 2, 2, 2, 2).permute(5, 3, 1, 0, 2, 4),
    "stride_zero": lambda: torch.arange(4.0).reshape(4, 1).expand(4, 5),
    "zero_size": lambda: torch.empty(3, 0, 2),
    "scalar": lambda: torch.tensor(3.0),
    "one_element_strided": lambda: torch.arange(10.0)[3:4],
    "every_other": lambda: torch.arange(40.0).reshape(4, 10)[::2, 1::3],
    "reversed": lambda: torch.arange(12.0).reshape(3, 4).flip(0).t(),
    "channels_last": lambda: torch.arange(48.0).reshape(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda: (
        torch.arange(96.0).reshape(2, 3, 2, 2, 4).contiguous(memory_format=torch.channels_last_3d)
    ),
    "diagonal": lambda: torch.arange(16.0).reshape(4, 4).diagonal(),
    "unfolded": lambda: torch.arange(8.0).unfold(0, 4, 2),
    "large_offset": lambda: torch.arange(100000.0)[99990:],
}
OPERATORS = {
    "neg": torch.neg,
    "add": lambda x: x + x,
    "add_broadcast": lambda x: x + x.flatten()[:1].sum() if x.numel() else x + 1,
    "mul_scalar": lambda x: x * 2.5,
    "sum": lambda x: x.sum(),
    "sum_last": lambda x: x.sum(-1) if x.dim() else x,
    "clone": torch.clone,
    "contiguous": lambda x: x.contiguous(),
    "exp": lambda x: (x / 100000).exp(),
    "cumsum": lambda x: x.cumsum(0) if x.dim() else x,
    "sort": lambda x: x.sort(-1).values if x.dim() else x,
    "cat": lambda x: torch.cat([x, x]) if x.dim() else x,
    "empty_like": lambda x: torch.zeros_like(x),
    "copy_": lambda x: torch.zeros(x.shape, device=x.device).copy_(x),
    "to_int": lambda x: x.to(torch.int32),
    "where": lambda x: torch.where(x > 1, x, -x),
    "relu_": lambda x: x.clone().relu_(),
    "flip": lambda x: x.flip(0) if x.dim() else x,
    "compare": lambda x: x > 2,
    "any": lambda x: (x > 2).any(),
    "norm": lambda x: (x / 1000).norm(),
    "reshape": lambda x: x.reshape(-1),
    "masked_select": lambda x: x.masked_select(x > 2),
    "nonzero": lambda x: (x > 2).nonzero(),
}


def place(t, device):
    """The layout itself moves, not a compact copy."""
    flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return flat.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name, layout, device):
    x = LAYOUTS[layout]()
    expected, actual = OPERATORS[name](x), OPERATORS[name](place(x, device))
    assert actual.is_flagos
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if expected.numel() or torch_fl.chip() != "cuda":  # whose kernels give nothing other strides than the CPU's do
        assert actual.stride() == expected.stride()
    torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("layout", [k for k in LAYOUTS if k not in ("stride_zero", "unfolded")])
def test_write_through_a_view(layout, device):
    """In-place work on a view changes exactly the elements of the view."""
    results = []
    for where in ("cpu", device):
        x = place(LAYOUTS[layout]().clone(memory_format=torch.preserve_format), where)
        base = torch.zeros(x.numel() * 2 + 5, device=where)
        view = base[3 : 3 + x.numel()].view(x.shape) if x.numel() else base[:0].view(x.shape)
        view.copy_(x)
        view.add_(1).mul_(2)
        results.append(base.cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize("dims", [0, 1, 2, 5, 8, 20])
def test_many_dimensions(dims, device):
    x = torch.arange(2.0 ** min(dims, 6)).reshape([2] * min(dims, 6) + [1] * max(0, dims - 6))
    y = (place(x, device) + 1).sum(list(range(0, dims, 2))) if dims else place(x, device) + 1
    assert torch.equal(y.cpu(), (x + 1).sum(list(range(0, dims, 2))) if dims else x + 1)
