"""torch.func on flagos: vmap, grad, jacrev, hessian, functional_call, jvp, vjp, functionalize."""

import pytest
import torch
from torch import func


def test_vmap(device):
    x, w = torch.randn(5, 3), torch.randn(3, 2)
    expected = func.vmap(lambda row: (row @ w).relu())(x)
    wd = w.to(device)
    actual = func.vmap(lambda row: (row @ wd).relu())(x.to(device))
    assert actual.is_flagos
    torch.testing.assert_close(actual.cpu(), expected)


def test_vmap_with_dims_and_nesting(device):
    x = torch.randn(4, 3, 2)
    fn = func.vmap(func.vmap(torch.dot, in_dims=(0, 0)), in_dims=(1, 1), out_dims=1)
    torch.testing.assert_close(fn(x.to(device), x.to(device)).cpu(), fn(x, x))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_randomness(randomness, device):
    x = torch.ones(4, 64, device=device)
    y = func.vmap(lambda row: torch.nn.functional.dropout(row, 0.5), randomness=randomness)(x)
    rows_equal = all(torch.equal(y[0], y[k]) for k in range(1, 4))
    assert rows_equal == (randomness == "same")


@pytest.mark.parametrize("transform", [func.jacrev, func.jacfwd, func.hessian, func.grad])
def test_derivatives(transform, device):
    x = torch.randn(4, dtype=torch.float64)
    fn = (lambda t: t.sin().prod()) if transform in (func.grad, func.hessian) else (lambda t: t.sin() * t.sum())
    actual = transform(fn)(x.to(device))
    assert actual.is_flagos
    torch.testing.assert_close(actual.cpu(), transform(fn)(x))


def test_vjp_and_jvp(device):
    x = torch.randn(3, device=device)
    out, pull = func.vjp(torch.exp, x)
    torch.testing.assert_close(pull(torch.ones_like(x))[0], out)
    out, tangent = func.jvp(torch.exp, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, out)


def test_per_sample_gradients(device):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1).to(device)
    x, y = torch.randn(6, 3, device=device), torch.randn(6, 1, device=device)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p, sample, target):
        return torch.nn.functional.mse_loss(func.functional_call(model, p, (sample[None],)), target[None])

    gradients = func.vmap(func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for k in range(6):
        model.zero_grad()
        torch.nn.functional.mse_loss(model(x[k : k + 1]), y[k : k + 1]).backward()
        torch.testing.assert_close(gradients["weight"][k], model.weight.grad)


def test_functionalize(device):
    def fn(x):
        y = x.clone()
        y[0].add_(1)
        y.mul_(2)
        return y

    x = torch.zeros(3, device=device)
    assert func.functionalize(fn)(x).tolist() == [2, 0, 0] and x.tolist() == [0, 0, 0]


def test_stacked_modules(device):
    torch.manual_seed(0)
    models = [torch.nn.Linear(2, 2).to(device) for _ in range(3)]
    parameters, buffers = func.stack_module_state(models)
    x = torch.ones(1, 2, device=device)
    base = models[0]
    out = func.vmap(lambda p, b: func.functional_call(base, (p, b), (x,)))(parameters, buffers)
    for k, model in enumerate(models):
        torch.testing.assert_close(out[k], model(x))


def test_fake_tensors(device):
    """Shape propagation without memory; what torch.compile and export stand on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = torch.flagos.memory_allocated()
    with FakeTensorMode():
        x = torch.empty(1 << 20, 1 << 10, device=device)
        y = (x @ x.t()[:, :5]).relu().sum(0)
    assert y.shape == (5,) and y.device == torch.device("flagos:0")
    assert torch.flagos.memory_allocated() == before


def test_torch_dispatch_mode_sees_aten_operators(device):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    with Log():
        x = torch.ones(2, device=device)
        y = x @ x
    assert y.item() == 2 and any("dot" in name or "mm" in name or "mv" in name for name in seen), seen


def test_make_fx(device):
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: (x + 1).relu())(torch.ones(2, device=device))
    names = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert [str(n) for n in names] == ["aten.add.Tensor", "aten.relu.default"]
    assert graph(torch.full((2,), -3.0, device=device)).tolist() == [0, 0]
