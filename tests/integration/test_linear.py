"""A linear layer in one step: the same bits, gradients and errors as torch's composition."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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


class Watch(TorchDispatchMode):
    """Sees every operator below autograd; while it does, torch composes the layer."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def composed(*arguments):
    with Watch():
        return F.linear(*arguments)


SHAPES = [((4, 8), 16), ((2, 3, 8), 16), ((1, 1, 8), 16), ((2, 1, 3, 8), 5), ((1, 8), 1), ((3, 2), 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "out"), SHAPES)
@pytest.mark.parametrize("needed", ["xw", "x", "w", "xwb", "x_b", "b", "w_b", "x_"])  # _: a bias without gradient
def test_bits_and_gradients(device, shape, out, dtype, needed):
    x, w = make(shape, device, dtype, 0, "x" in needed), make((out, shape[-1]), device, dtype, 1, "w" in needed)
    bias = [make((out,), device, dtype, 3, "b" in needed)] if set(needed) & set("b_") else []
    a, b = F.linear(x, w, *bias), composed(x, w, *bias)
    assert taken(a) and not taken(b)
    assert a.shape == (*shape[:-1], out) and a.stride() == b.stride() and a.equal(b)
    leaves = [t for t in (x, w, *bias) if t.requires_grad]
    g = make(a.shape, device, dtype, 2, False)
    for mine, torchs in zip(torch.autograd.grad(a, leaves, g), torch.autograd.grad(b, leaves, g), strict=True):
        assert mine.equal(torchs) and mine.stride() == torchs.stride() and mine.dtype == dtype


def test_the_same_as_on_the_cpu(device):
    if torch_fl.chip() != "host":
        pytest.skip("only the host chip computes as the CPU does")
    layer = torch.nn.Linear(8, 6)
    x = make((2, 5, 8), "cpu", torch.float32, 0)
    expected = layer(x)
    expected.square().sum().backward()
    grads = [x.grad, layer.weight.grad, layer.bias.grad]
    layer.zero_grad()
    layer.to(device)
    a = x.detach().to(device).requires_grad_()
    result = layer(a)
    result.square().sum().backward()
    assert taken(result) and result.cpu().equal(expected)
    for mine, torchs in zip([a.grad, layer.weight.grad, layer.bias.grad], grads, strict=True):
        assert mine.cpu().equal(torchs)


def test_what_is_not_plain_is_composed(device):
    x, w = make((2, 3, 8), device, torch.float32, 0), make((4, 8), device, torch.float32, 1)
    cases = {
        "a bias of two dimensions": F.linear(x, w, make((1, 4), device, torch.float32, 2)),
        "a bias of one element": F.linear(x, w, make((1,), device, torch.float32, 2)),
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


def test_the_weight_of_one_row_is_its_own_bias(device):
    t = make((1, 1), device, torch.float32, 0)
    assert F.linear(t, t, t[0]).equal(composed(t, t, t[0]))


def test_gradients_that_are_not_contiguous(device):
    x, w = make((2, 3, 8), device, torch.float32, 0), make((4, 8), device, torch.float32, 1)
    g = make((4, 3, 2), device, torch.float32, 2, False).permute(2, 1, 0)
    for gradient in (g, torch.ones(1, device=device).expand(2, 3, 4)):
        mine, torchs = (torch.autograd.grad(f(x, w), (x, w), gradient) for f in (F.linear, composed))
        assert all(a.equal(b) for a, b in zip(mine, torchs, strict=True))


def test_differentiated_twice(device):
    x, w = make((2, 3, 4), device, torch.float64, 0), make((5, 4), device, torch.float64, 1)
    for arguments in ((x, w), (x, w, make((5,), device, torch.float64, 2))):
        assert torch.autograd.gradcheck(F.linear, arguments) and torch.autograd.gradgradcheck(F.linear, arguments)


def test_forward_mode_and_transforms(device):
    x, w = make((2, 3, 4), device, torch.float64, 0, False), make((5, 4), device, torch.float64, 1, False)
    t = make((2, 3, 4), device, torch.float64, 2, False)
    assert torch.autograd.gradcheck(F.linear, (x.requires_grad_(), w.requires_grad_()), check_forward_ad=True)
    x, w = x.detach(), w.detach()
    value, tangent = torch.func.jvp(lambda a: F.linear(a, w), (x,), (t,))
    assert torch.allclose(value, composed(x, w)) and torch.allclose(tangent, composed(t, w))
    bias = make((5,), device, torch.float64, 3, False)
    _, tangent = torch.func.jvp(lambda b: F.linear(x, w, b), (bias,), (bias,))
    assert torch.allclose(tangent, bias.expand(2, 3, 5))
    loss = torch.func.grad(lambda a, b: F.linear(a, b).square().sum(), argnums=(0, 1))
    expected = torch.func.grad(lambda a, b: (a @ b.t()).square().sum(), argnums=(0, 1))
    for a, b in zip(loss(x, w), expected(x, w), strict=True):
        assert torch.allclose(a, b)
    assert torch.allclose(torch.func.vmap(F.linear, in_dims=(0, None))(x, w), composed(x, w))
    hessian = torch.func.hessian(lambda a: F.linear(a, w).square().sum())(x[0])
    assert hessian.shape == (3, 4, 3, 4)


def test_modes_and_routes_see_mm(device):
    x, w = make((2, 3, 8), device, torch.float32, 0), make((4, 8), device, torch.float32, 1)
    plain = F.linear(x, w)
    with Watch() as watch:
        assert not taken(F.linear(x, w)) and not taken(F.linear(x, w, w[:, 0].detach().clone()))
    assert {"aten.mm.default", "aten.addmm.default"} <= set(watch.seen)
    expected = torch.autograd.grad(plain.sum(), (x, w), retain_graph=True)
    bias = make((4,), device, torch.float32, 2)
    try:
        torch_fl.set_route("mm", "cpu")  # for all threads: backward has one of its own
        with torch_fl.route({"addmm": "cpu"}), torch_fl.count_ops() as counts:
            routed = F.linear(x, w)
            assert taken(routed) and torch.allclose(routed, plain)
            assert torch.allclose(F.linear(x, w, bias), plain + bias)
            g = torch.autograd.grad(plain.sum(), (x, w))  # recorded before, and honours the route now
    finally:
        torch_fl.set_route("mm", None)
    assert all(torch.allclose(a, b) for a, b in zip(g, expected, strict=True))
    assert {("mm", "cpu", 3), ("addmm", "cpu", 1)} <= set(counts.rows())
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
    assert len(packed) == 1 and packed[0].data_ptr() == w.data_ptr(), "no gradient needs the input"
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
