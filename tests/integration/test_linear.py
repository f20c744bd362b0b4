"""A linear layer without bias in one step: the same bits, gradients and errors as torch's composition."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import torch_fl
from tests.common.process import check_python


def names_of(result):
    """The nodes of autograd behind a result, without those that accumulate."""
    seen, todo = [], [result.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node.name() != "struct torch::autograd::AccumulateGrad":
            seen.append(node.name().rsplit("::", 1)[-1])
            todo += [following for following, _ in node.next_functions]
    return seen


def taken(result):
    return names_of(result).count("LinearBackward0") == 1


def make(shape, device, dtype, seed, grad=True):
    torch.manual_seed(seed)
    return torch.randn(shape).to(device, dtype).requires_grad_(grad)


def composed(x, w):
    return torch.matmul(x, w.t())


SHAPES = [((4, 8), 16), ((2, 3, 8), 16), ((1, 1, 8), 16), ((2, 1, 3, 8), 5), ((1, 8), 1), ((3, 2), 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "out"), SHAPES)
@pytest.mark.parametrize(("x_grad", "w_grad"), [(True, True), (True, False), (False, True)])
def test_bits_and_gradients(device, shape, out, dtype, x_grad, w_grad):
    x, w = make(shape, device, dtype, 0, x_grad), make((out, shape[-1]), device, dtype, 1, w_grad)
    a, b = F.linear(x, w), composed(x, w)
    assert taken(a) and not taken(b)
    assert a.shape == (*shape[:-1], out) and a.stride() == b.stride() and a.equal(b)
    leaves = [t for t in (x, w) if t.requires_grad]
    g = make(a.shape, device, dtype, 2, False)
    for mine, torchs in zip(torch.autograd.grad(a, leaves, g), torch.autograd.grad(b, leaves, g), strict=True):
        assert mine.equal(torchs) and mine.stride() == torchs.stride() and mine.dtype == dtype


def test_the_same_as_on_the_cpu(device):
    if torch_fl.chip() != "host":
        pytest.skip("only the host chip computes as the CPU does")
    x, w = make((2, 5, 8), "cpu", torch.float32, 0), make((6, 8), "cpu", torch.float32, 1)
    expected = F.linear(x, w)
    expected.square().sum().backward()
    a, b = (t.detach().to(device).requires_grad_() for t in (x, w))
    result = F.linear(a, b)
    result.square().sum().backward()
    assert result.cpu().equal(expected) and a.grad.cpu().equal(x.grad) and b.grad.cpu().equal(w.grad)


def test_what_is_not_plain_is_composed(device):
    x, w = make((2, 3, 8), device, torch.float32, 0), make((4, 8), device, torch.float32, 1)
    cases = {
        "bias": F.linear(x, w, make((4,), device, torch.float32, 2)),
        "strides of the input": F.linear(make((3, 2, 8), device, torch.float32, 0).transpose(0, 1), w),
        "strides of the weight": F.linear(x, make((8, 4), device, torch.float32, 1).t()),
        "one dimension": F.linear(x[0, 0], w),
        "one column": F.linear(make((2, 3, 1), device, torch.float32, 0), make((4, 1), device, torch.float32, 1)),
        "no elements": F.linear(make((0, 8), device, torch.float32, 0), w),
    }
    square = make((8, 8), device, torch.float32, 0)
    cases["the same tensor twice"] = F.linear(square, square)
    assert not [name for name, result in cases.items() if taken(result)]
    assert cases["the same tensor twice"].equal(composed(square, square))


def test_gradients_that_are_not_contiguous(device):
    x, w = make((2, 3, 8), device, torch.float32, 0), make((4, 8), device, torch.float32, 1)
    mine, torchs = (torch.autograd.grad(f(x, w).sum(), (x, w)) for f in (F.linear, composed))
    assert all(a.equal(b) for a, b in zip(mine, torchs, strict=True))


def test_differentiated_twice(device):
    x, w = make((2, 3, 4), device, torch.float64, 0), make((5, 4), device, torch.float64, 1)
    assert torch.autograd.gradcheck(F.linear, (x, w)) and torch.autograd.gradgradcheck(F.linear, (x, w))


def test_forward_mode_and_transforms(device):
    x, w = make((2, 3, 4), device, torch.float64, 0, False), make((5, 4), device, torch.float64, 1, False)
    t = make((2, 3, 4), device, torch.float64, 2, False)
    assert torch.autograd.gradcheck(F.linear, (x.requires_grad_(), w.requires_grad_()), check_forward_ad=True)
    x, w = x.detach(), w.detach()
    for value, tangent in (torch.func.jvp(lambda a: F.linear(a, w), (x,), (t,)),):
        assert torch.allclose(value, composed(x, w)) and torch.allclose(tangent, composed(t, w))
    loss = torch.func.grad(lambda a, b: F.linear(a, b).square().sum(), argnums=(0, 1))
    expected = torch.func.grad(lambda a, b: composed(a, b).square().sum(), argnums=(0, 1))
    for a, b in zip(loss(x, w), expected(x, w), strict=True):
        assert torch.allclose(a, b)
    assert torch.allclose(torch.func.vmap(F.linear, in_dims=(0, None))(x, w), composed(x, w))
    hessian = torch.func.hessian(lambda a: F.linear(a, w).square().sum())(x[0])
    assert hessian.shape == (3, 4, 3, 4)


def test_modes_and_routes_see_mm(device):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, w = make((2, 3, 8), device, torch.float32, 0), make((4, 8), device, torch.float32, 1)
    plain = F.linear(x, w)
    with Watch():
        assert not taken(F.linear(x, w))
    assert "aten.mm.default" in seen
    with torch_fl.route({"mm": "cpu"}):
        routed = F.linear(x, w)
        assert not taken(routed) and torch.allclose(routed, plain)
        g = torch.autograd.grad(plain.sum(), (x, w))  # recorded before, and honours the route now
    assert [t.shape for t in g] == [x.shape, w.shape]
    with torch.profiler.profile() as profile:
        F.linear(x, w)
    assert "aten::mm" in {event.name for event in profile.events()}


def test_saved_tensors_and_hooks(device):
    x, w = make((2, 3, 8), device, torch.float32, 0), make((4, 8), device, torch.float32, 1)
    packed = []

    def pack(t):
        packed.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.linear(x, w.detach()).sum().backward()
    assert len(packed) == 1 and packed[0].data_ptr() == w.data_ptr(), "the input is needed for the weight's gradient only"
    result = F.linear(x, w)
    result.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        result.sum().backward()
    result = F.linear(x, w)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_hooks_accumulation_and_checkpoints(device):
    from torch.utils.checkpoint import checkpoint

    x, w = make((2, 3, 8), device, torch.float32, 0), make((8, 8), device, torch.float32, 1)
    calls = []
    w.register_hook(lambda g: calls.append(g.shape))
    result = F.linear(F.linear(x, w), w)
    result.retain_grad()
    result.sum().backward()
    first = w.grad.clone()
    assert calls == [w.shape] and result.grad is not None
    for reentrant, _ in itertools.product((False, True), range(2)):
        w.grad = None
        checkpoint(lambda a: F.linear(F.linear(a, w), w), x, use_reentrant=reentrant).sum().backward()
        assert w.grad.equal(first)


def test_inference_autocast_and_no_grad(device):
    x, w = make((2, 3, 8), device, torch.float32, 0), make((4, 8), device, torch.float32, 1)
    expected = composed(x, w).detach()
    with torch.inference_mode():
        result = F.linear(x, w)
        assert result.is_inference() and result.equal(expected)
    with torch.no_grad():
        assert F.linear(x, w).equal(expected) and not F.linear(x, w).requires_grad
    with torch.autocast("flagos", dtype=torch.bfloat16):
        result = F.linear(x, w)
    assert result.dtype == torch.bfloat16 and result.equal(composed(x.bfloat16(), w.bfloat16()))
    result.sum().backward()
    assert w.grad.dtype == torch.float32


def test_wrong_input_says_what_torch_says(device):
    w = make((4, 8), device, torch.float32, 1)
    for x in (
        make((2, 7), device, torch.float32, 0),
        make((2, 8), device, torch.float64, 0),
        make((2, 8), "cpu", torch.float32, 0),
    ):
        with pytest.raises(RuntimeError) as mine:
            F.linear(x, w)
        with pytest.raises(RuntimeError) as torchs:
            composed(x, w)
        assert str(mine.value) == str(torchs.value)
    assert F.linear(make((2, 8), device, torch.float32, 0), w).shape == (2, 4)


def test_an_error_of_the_kernel_leaves_the_arguments_usable():
    out = check_python(
        """
        import torch, torch_fl, torch.nn.functional as F
        x, w = (torch.ones(4, 8, device="flagos", requires_grad=True) for _ in range(2))
        for _ in range(3):
            try:
                F.linear(x, w[:, :7])
            except RuntimeError as error:
                print("refused")
        F.linear(x, w).sum().backward()
        print(x.grad.sum().item())
        """
    )
    assert out.split() == ["refused"] * 3 + ["128.0"]
