"""Operators that take or return lists: optional lists, foreach and fused ones, mixed dtypes, empty lists, many
tensors."""

import pytest
import torch

pytestmark = pytest.mark.anyplatform


def tensors(device, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device) for s in shapes]


SHAPES = [(3,), (2, 4), (), (0,), (5, 1, 2)]
FOREACH = {
    "add_scalar": lambda a, b: torch._foreach_add(a, 2.5),
    "add_list_alpha": lambda a, b: torch._foreach_add(a, b, alpha=3),
    "mul_scalars": lambda a, b: torch._foreach_mul(a, [1.0, 2.0, 3.0, 4.0, 5.0]),
    "mul_tensor": lambda a, b: torch._foreach_mul(a, torch.tensor(2.0, device=a[0].device)),
    "addcmul": lambda a, b: torch._foreach_addcmul(a, a, b, 0.5),
    "addcdiv": lambda a, b: torch._foreach_addcdiv(a, a, torch._foreach_exp(b), 0.5),
    "lerp": lambda a, b: torch._foreach_lerp(a, b, 0.3),
    "norm": lambda a, b: torch._foreach_norm(a),
    "sqrt": lambda a, b: torch._foreach_sqrt(torch._foreach_abs(a)),
    "maximum": lambda a, b: torch._foreach_maximum(a, b),
    "clamp_min": lambda a, b: torch._foreach_clamp_min(a, 0.0),
    "pow": lambda a, b: torch._foreach_pow(torch._foreach_abs(a), 1.5),
    "neg_": lambda a, b: (torch._foreach_neg_(a), a)[1],
    "copy_": lambda a, b: (torch._foreach_copy_(a, b), a)[1],
    "zero_": lambda a, b: (torch._foreach_zero_(a), a)[1],
    "div_list_": lambda a, b: (torch._foreach_div_(a, torch._foreach_exp(b)), a)[1],
}


@pytest.mark.parametrize("name", FOREACH)
def test_foreach(name, device):
    shapes = [s for s in SHAPES if 0 not in s] + [(1,)] if name == "norm" else SHAPES
    expected = FOREACH[name](tensors("cpu", *shapes), tensors("cpu", *reversed(shapes))[::-1])
    actual = FOREACH[name](tensors(device, *shapes), tensors(device, *reversed(shapes))[::-1])
    assert len(actual) == len(expected) and all(t.is_flagos for t in actual)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e)


def test_foreach_of_many_tensors(device):
    many = [torch.full((3,), float(k), device=device) for k in range(500)]
    torch._foreach_add_(many, 1)
    assert [t[0].item() for t in many] == [k + 1.0 for k in range(500)]


def test_empty_lists_fail_as_on_the_cpu(device):
    for call in (lambda: torch.cat([]), lambda: torch.stack([]), lambda: torch._foreach_add([], 1)):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            call()


def test_cat_mixes(device):
    x = torch.ones(2, device=device)
    assert torch.cat([x, torch.empty(0, device=device)]).tolist() == [1, 1]
    assert torch.cat([x, x.to(torch.int64)]).dtype is torch.float32
    assert torch.cat([x.view(1, 2)] * 100).shape == (100, 2)
    out = torch.empty(0, device=device)
    assert torch.cat([x, x], out=out) is out and out.tolist() == [1, 1, 1, 1]
    assert torch.hstack([x, x]).is_flagos and torch.vstack([x, x]).shape == (2, 2)


def test_optional_lists_in_indexing(device):
    x = torch.arange(24.0).reshape(2, 3, 4)
    y = x.to(device)
    index = torch.tensor([0, 2])
    there = index.to(device)
    for here, away in (
        (x[:, index], y[:, there]),
        (x[..., index], y[..., there]),
        (x[:, index, index], y[:, there, there]),
        (x[torch.tensor([[0], [1]]), :, index], y[torch.tensor([[0], [1]], device=device), :, there]),
        (x[None, x > 5], y[None, y > 5]),
    ):
        assert torch.equal(away.cpu(), here)
    x[:, index] = torch.tensor(5.0)
    y[:, there] = torch.tensor(5.0)
    y.index_put_(
        (torch.tensor([0], device=device), torch.tensor([1], device=device)),
        torch.tensor([9.0], device=device),
        accumulate=True,
    )
    x.index_put_((torch.tensor([0]), torch.tensor([1])), torch.tensor([9.0]), accumulate=True)
    assert torch.equal(y.cpu(), x)


def test_tuples_of_results(device):
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    vectors = (lambda t: torch.linalg.eigh(t + t.T), lambda t: torch.linalg.svd(t, full_matrices=False))
    for call in (
        *vectors,
        lambda t: torch.max(t, 0),
        lambda t: torch.unique(t.round(), return_inverse=True, return_counts=True),
        lambda t: torch.frexp(t),
        lambda t: torch.linalg.lu_factor_ex(t),
        lambda t: torch.var_mean(t, 1),
        lambda t: t.topk(2),
        lambda t: torch.aminmax(t, dim=1),
        lambda t: t.split([1, 3]),
        lambda t: torch.histogram(t, 4),
        lambda t: torch.meshgrid(t[0], t[1], indexing="ij"),
    ):
        expected, actual = call(x), call(x.to(device))
        assert type(actual) is type(expected) and len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert a.is_flagos
            a = a.cpu()
            if call in vectors:  # which way they point is the library's choice
                a, e = a.abs(), e.abs()
            torch.testing.assert_close(a, e)


def test_list_with_one_tensor_elsewhere_is_refused(device):
    x = torch.ones(2, device=device)
    for call in (
        lambda: torch.cat([x, torch.ones(2)]),
        lambda: torch.stack([torch.ones(2), x]),
        lambda: torch.block_diag(x, torch.ones(2)),
    ):
        with pytest.raises(RuntimeError, match="device"):
            call()
