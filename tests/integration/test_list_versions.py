"""In-place operators on lists count `_version` of every member as the CPU's do, so that autograd notices the change."""

import pytest
import torch

import torch_fl
from tests.common import list_operators

OPERATORS = list_operators.operators()
pytestmark = pytest.mark.skipif(
    torch_fl.chip() != "host",
    reason="the chip's own kernels count, which differ between CPU and CUDA; "
    "test_like_stock.py compares flagos with cuda",
)


def versions(operator, device):
    positional, keyword = list_operators.arguments(operator, device)
    operator(*positional, **keyword)
    values = [*positional, *keyword.values()]
    tensors = [t for x in values for t in (x if isinstance(x, list) else [x])]
    return [t._version for t in tensors if isinstance(t, torch.Tensor)]


def test_there_are_many():
    assert len(OPERATORS) > 70


@pytest.mark.parametrize("name", OPERATORS)
def test_versions(name, device):
    assert versions(OPERATORS[name], device) == versions(OPERATORS[name], "cpu")


def test_autograd_notices(device):
    x = torch.ones(3, device=device, requires_grad=True)
    y = x.exp()
    torch._foreach_add_([y.detach()], 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
