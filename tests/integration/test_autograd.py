"""Autograd on flagos: gradients equal the CPU's, hooks, functions, higher order, graph lifetime."""

import gc
import weakref

import pytest
import torch
from torch.autograd import Function, gradcheck, gradgradcheck


def both(fn, *shapes, device):
    """Gradients of fn on the CPU and on the device, from the same inputs."""
    results = []
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for where in ("cpu", device):
        leaves = [t.to(where).detach().requires_grad_() for t in inputs]
        fn(*leaves).backward()
        results.append([t.grad.cpu() for t in leaves])
    return results


@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (lambda x, w: (x @ w).relu().sum(), [(3, 4), (4, 2)]),
        (lambda x: torch.nn.functional.layer_norm(x, (4,)).pow(2).sum(), [(3, 4)]),
        (lambda x: x.softmax(-1).log().mean(), [(2, 5)]),
        (lambda x: x.transpose(0, 1)[1:].reshape(-1).cumsum(0).sum(), [(3, 4)]),
        (lambda x, y: torch.cat([x, y]).sort().values[:3].sum(), [(4,), (4,)]),
        (lambda x: x.index_select(0, torch.tensor([0, 0, 1], device=x.device)).sum(), [(3, 2)]),
        (lambda x, w: torch.nn.functional.conv2d(x, w, padding=1).tanh().sum(), [(1, 2, 5, 5), (3, 2, 3, 3)]),
        (lambda x: torch.linalg.svdvals(x).sum(), [(4, 3)]),
        (lambda x: torch.view_as_real(torch.fft.fft(x)).pow(2).sum(), [(6,)]),
    ],
)
def test_gradients_equal_the_cpu_s(fn, shapes, device):
    expected, actual = both(fn, *shapes, device=device)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_gradcheck(device):
    x = torch.randn(3, 3, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.randn(3, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(lambda a, b: (a @ b).sin(), (x, y))
    assert gradgradcheck(lambda a, b: (a * b).exp(), (x, y))


def test_custom_function(device):
    class Cube(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            assert x.is_flagos and gradient.is_flagos
            return 3 * x**2 * gradient

    x = torch.tensor([2.0, 3.0], device=device, requires_grad=True)
    Cube.apply(x).sum().backward()
    assert x.grad.tolist() == [12.0, 27.0] and x.grad.is_flagos


def test_hooks_and_accumulation(device):
    x = torch.ones(3, device=device, requires_grad=True)
    seen = []
    x.register_hook(lambda g: seen.append(g.device.type) or g * 2)
    x.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.sum().item()))
    for _ in range(2):
        (x * 3).sum().backward()
    assert seen == ["flagos", 18.0, "flagos", 36.0]
    assert x.grad.tolist() == [12.0] * 3


def test_inplace_bumps_the_version_and_is_noticed(device):
    x = torch.ones(3, device=device, requires_grad=True)
    y = x.exp()
    version = y._version
    y.mul_(2)
    assert y._version == version + 1
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version 1"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        x.add_(1)


def test_views_and_inplace(device):
    base = torch.zeros(4, device=device, requires_grad=True)
    copy = base.clone()
    view = copy[1:3]
    view.mul_(5).add_(1)
    assert view._base is copy and "SliceBackward" not in type(copy.grad_fn).__name__
    copy.sum().backward()
    assert base.grad.tolist() == [1.0, 5.0, 5.0, 1.0]


def test_no_grad_and_inference_mode(device):
    x = torch.ones(2, device=device, requires_grad=True)
    with torch.no_grad():
        assert not (x * 2).requires_grad
    with torch.inference_mode():
        y = x * 2
        assert y.is_inference() and y.is_flagos
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
        (y * x).sum().backward()


def test_gradient_across_devices(device):
    """A copy between devices is differentiable both ways."""
    x = torch.ones(3, requires_grad=True)
    (x.to(device) * 3).cpu().mul(2).sum().backward()
    assert x.grad.tolist() == [6.0] * 3 and x.grad.device.type == "cpu"
    y = torch.ones(3, device=device, requires_grad=True)
    (y.cpu() * 5).to(device).sum().backward()
    assert y.grad.tolist() == [5.0] * 3 and y.grad.is_flagos


def test_higher_order_and_forward_mode(device):
    x = torch.tensor(2.0, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(x**4, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x, create_graph=True)
    (third,) = torch.autograd.grad(second, x)
    assert (first.item(), second.item(), third.item()) == (32.0, 48.0, 48.0)
    import torch.autograd.forward_ad as fwd

    with fwd.dual_level():
        dual = fwd.make_dual(torch.tensor(3.0, device=device), torch.tensor(1.0, device=device))
        assert fwd.unpack_dual(dual.sin() * dual).tangent.item() == pytest.approx(
            3 * torch.tensor(3.0).cos().item() + torch.tensor(3.0).sin().item()
        )


def test_graph_frees_memory(device):
    gc.collect()
    before = torch.flagos.memory_allocated()
    x = torch.randn(256, 256, device=device, requires_grad=True)
    loss = (x @ x).relu().sum()
    loss.backward()
    kept = weakref.ref(loss)
    del loss, x
    gc.collect()
    assert kept() is None
    assert torch.flagos.memory_allocated() == before


def test_error_in_backward_leaves_the_device_usable(device):
    class Broken(Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("broken on purpose")

    x = torch.ones(3, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="broken on purpose"):
        (Broken.apply(x * 2) * 3).sum().backward()
    (x * 2).sum().backward()
    assert x.grad.tolist() == [2.0] * 3


def test_anomaly_mode_names_the_operator(device):
    x = torch.tensor([-1.0], device=device, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError, match=r"SqrtBackward0.*nan"):
        x.sqrt().sum().backward()


def test_saved_tensor_hooks(device):
    x = torch.arange(1.0, 4.0, device=device, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        y = x.exp()
    y.sum().backward()
    torch.testing.assert_close(x.grad.cpu(), torch.arange(1.0, 4.0).exp())


def test_multithreaded_backward_uses_the_device_s_thread(device):
    """Backward of flagos nodes runs in the autograd engine; many small graphs at once must not mix."""
    import threading

    errors = []

    def work(k):
        try:
            for _ in range(20):
                x = torch.full((8,), float(k), device=device, requires_grad=True)
                (x * x).sum().backward()
                assert x.grad.tolist() == [2.0 * k] * 8
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
