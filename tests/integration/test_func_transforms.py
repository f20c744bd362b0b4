"""torch.func beyond test_vmap_func.py, and torch.library.opcheck, on flagos."""

import pytest
import torch
from torch import func
from torch.testing._internal.common_methods_invocations import op_db

import torch_fl

# torch.library.opcheck without test_autograd_registration, which torch has for CPU, CUDA and XPU only.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
OPS = {
    "aten::add.Tensor": lambda d: (torch.ones(2, 3, device=d), torch.ones(3, device=d)),
    "aten::mm": lambda d: (torch.ones(2, 3, device=d), torch.ones(3, 2, device=d)),
    "aten::relu_": lambda d: (torch.randn(5, device=d),),
    "aten::select.int": lambda d: (torch.randn(2, 3, device=d), 0, 1),
    "aten::sort": lambda d: (torch.randn(2, 3, device=d),),
    "aten::convolution": lambda d: (
        torch.randn(1, 2, 5, 5, device=d),
        torch.randn(3, 2, 3, 3, device=d),
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
    ),
    "aten::native_layer_norm": lambda d: (torch.randn(2, 3, device=d), [3], None, None, 1e-5),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_of_aten_operators(name, grad, device):
    """Schema, fake kernel and AOT dispatch of an operator, checked by torch itself."""
    packet, _, overload = name.removeprefix("aten::").partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    args = OPS[name](device)
    if grad and name != "aten::relu_":
        args = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
    # AOT dispatch takes no in-place operator.
    tests = [name for name in CHECKS if packet != "relu_" or "aot" not in name]
    torch.library.opcheck(op, args, test_utils=tests)


def test_opcheck_of_a_custom_operator(device):
    @torch.library.custom_op("flagos_opcheck::scale", mutates_args=())
    def scale(x: torch.Tensor, k: float) -> torch.Tensor:
        return x * k

    scale.register_fake(lambda x, k: torch.empty_like(x))
    scale.register_autograd(
        lambda ctx, g: (g * ctx.k, None), setup_context=lambda ctx, inputs, output: setattr(ctx, "k", inputs[1])
    )
    torch.library.opcheck(scale, (torch.randn(3, device=device, requires_grad=True), 2.0), test_utils=CHECKS)


def test_opcheck_finds_a_wrong_fake(device):
    @torch.library.custom_op("flagos_opcheck::half", mutates_args=())
    def half(x: torch.Tensor) -> torch.Tensor:
        return x[::2].clone()

    half.register_fake(lambda x: torch.empty_like(x))
    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
        torch.library.opcheck(half, (torch.randn(4, device=device),), test_utils="test_faketensor")


# Batching rules of these operators are torch's own; what is tested is that they reach flagos.
VMAP = """sin add matmul sum softmax index_select cat nn.functional.linear nn.functional.layer_norm
cumsum where sort""".split()


@pytest.mark.parametrize("name", VMAP)
def test_vmap_equals_a_loop(name, device):
    info = next(op for op in op_db if op.name == name and not op.variant_test_name)
    compared = 0
    for sample in list(info.sample_inputs(device, torch.float32))[:6]:
        if not isinstance(sample.input, torch.Tensor) or sample.input.numel() == 0:
            continue
        batch = torch.stack([sample.input.detach(), sample.input.detach() + 1])

        def call(x, sample=sample):
            return info.op(x, *sample.args, **sample.kwargs)

        expected = [call(x) for x in batch]
        actual = func.vmap(call)(batch)
        first = expected[0] if isinstance(expected[0], torch.Tensor) else expected[0][0]
        result = actual if isinstance(actual, torch.Tensor) else actual[0]
        assert result.is_flagos
        torch.testing.assert_close(result[0], first)
        compared += 1
    assert compared or name == "cat"  # its samples are lists


def test_double_backward_through_a_network(device):
    def penalty(where):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 2, 3), torch.nn.Softplus(), torch.nn.Flatten(), torch.nn.Linear(8, 1)
        )
        net.to(where)
        x = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4).to(where).requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        g.square().sum().backward()
        return [p.grad.cpu() for p in net.parameters() if p.grad is not None]

    for actual, expected in zip(penalty(device), penalty("cpu"), strict=True):
        torch.testing.assert_close(actual, expected)


def test_jacobian_of_a_functional_module(device):
    net = torch.nn.Linear(3, 2).to(device)
    x = torch.randn(3, device=device)
    jacobian = func.jacrev(lambda p: func.functional_call(net, p, (x,)))(dict(net.named_parameters()))
    assert torch.equal(jacobian["weight"][0, 0], x) and not jacobian["weight"][0, 1].any()


def test_hessian_vector_product_and_linearize(device):
    x, v = torch.randn(4, device=device), torch.randn(4, device=device)
    f = lambda t: (t**3).sum()  # noqa: E731
    product = func.jvp(func.grad(f), (x,), (v,))[1]
    torch.testing.assert_close(product, 6 * x * v)
    value, linear = func.linearize(f, x)
    torch.testing.assert_close(linear(v), (3 * x**2 * v).sum())
    torch.testing.assert_close(value, f(x))


def test_randomness_under_vmap_follows_the_seed(device):
    def draw():
        torch_fl.flagos.manual_seed(3)
        return func.vmap(lambda x: x + torch.rand_like(x), randomness="different")(torch.zeros(3, 4, device=device))

    first = draw()
    assert torch.equal(first, draw()) and not torch.equal(first[0], first[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's fallback for vmap
@pytest.mark.parametrize("masked", [False, True])
def test_attention_under_transforms(masked, device):
    """Which fused kernel may be used is asked with the wrappers that the transforms put around tensors."""
    if masked and torch_fl.chip() == "cuda":
        pytest.skip("torch's rule for vmap over a masked attention fails on stock cuda, too")
    from torch.nn.functional import scaled_dot_product_attention as attention

    q = torch.randn(3, 1, 2, 4, 8)

    def results(q):
        mask = torch.ones(4, 4, dtype=torch.bool, device=q.device).tril() if masked else None
        energy = lambda t: attention(t, t, t, mask).square().sum()  # noqa: E731
        vmapped = func.vmap(lambda t: attention(t, t, t, mask))(q)
        return [t.cpu() for t in (vmapped, func.grad(energy)(q), func.vmap(func.grad(energy))(q))]

    for actual, expected in zip(results(q.to(device)), results(q), strict=True):
        torch.testing.assert_close(actual, expected)
