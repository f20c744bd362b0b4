"""Operators from outside torch: what a library that never heard of flagos registers must work or say why not."""

import pytest
import torch
from torch.library import Library, custom_op

import torch_fl

lib = Library("flagos_test", "FRAGMENT")
lib.define("cpu_only(Tensor x, float s) -> Tensor")
lib.define("composite(Tensor x) -> Tensor")
lib.define("explicit(Tensor x) -> Tensor")
lib.define("bump_(Tensor(a!) x) -> Tensor(a!)")
lib.define("pair(Tensor x) -> (Tensor, Tensor)")
lib.define("lists(Tensor[] xs, int? n=None) -> Tensor[]")
lib.define("view(Tensor(a) x) -> Tensor(a)")
lib.define("nothing(Tensor x) -> Tensor")
lib.define("for_flagos(Tensor x) -> Tensor")


def check_cpu(x):
    assert x.device.type == "cpu" and not x.is_flagos, "a CPU kernel was handed another device's tensor"
    return x


lib.impl("cpu_only", lambda x, s: check_cpu(x) * s, "CPU")
lib.impl("composite", lambda x: (x * 2).relu(), "CompositeImplicitAutograd")
lib.impl("explicit", lambda x: x + 10, "CompositeExplicitAutograd")
lib.impl("bump_", lambda x: check_cpu(x).add_(1), "CPU")
lib.impl("pair", lambda x: (check_cpu(x) + 1, x.sum()), "CPU")
lib.impl("lists", lambda xs, n=None: [check_cpu(x) + (n or 0) for x in xs], "CPU")
lib.impl("view", lambda x: check_cpu(x)[1:], "CPU")
lib.impl("for_flagos", lambda x: x + 100, "PrivateUse1")

ops = torch.ops.flagos_test
needs_cpu_kernels = pytest.mark.skipif(torch_fl.chip() != "host", reason="CPU kernels serve the simulated host only")
pytestmark = pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")


@pytest.fixture
def x(device):
    return torch.arange(4.0, device=device)


def test_cpu_kernel(x):
    result = ops.cpu_only(x, 3.0)
    assert result.is_flagos and result.tolist() == [0, 3, 6, 9]


def test_composites(x):
    assert ops.composite(x - 2).tolist() == [0, 0, 0, 2]
    assert ops.explicit(x).is_flagos and ops.explicit(x).tolist() == [10, 11, 12, 13]


def test_composite_keeps_autograd(x):
    x = x.requires_grad_()
    ops.composite(x - 1).sum().backward()
    assert x.grad.tolist() == [0, 0, 2, 2]


def test_kernel_without_autograd_does_not_lose_the_graph_silently(x):
    """As on the CPU: the result either requires grad with a node that raises, or a warning is given at backward."""
    x = x.requires_grad_()
    y = ops.cpu_only(x, 2.0)
    reference = ops.cpu_only(torch.arange(4.0).requires_grad_(), 2.0)
    assert y.requires_grad == reference.requires_grad
    if y.requires_grad:
        with pytest.warns(UserWarning, match="autograd kernel was not registered"):
            y.sum().backward()


def test_inplace_returns_the_object(x):
    version = x._version
    assert ops.bump_(x) is x and x.tolist() == [1, 2, 3, 4] and x._version == version + 1


def test_tuples_and_lists(x):
    a, b = ops.pair(x)
    assert a.tolist() == [1, 2, 3, 4] and b.item() == 6 and b.is_flagos
    results = ops.lists([x, x[:2]], 5)
    assert [r.tolist() for r in results] == [[5, 6, 7, 8], [5, 6]] and all(r.is_flagos for r in results)


@needs_cpu_kernels
def test_view_shares_memory(x):
    y = ops.view(x)
    assert y.untyped_storage()._cdata == x.untyped_storage()._cdata
    x.mul_(2)
    assert y.tolist() == [2, 4, 6]


def test_own_kernel_wins(x):
    assert ops.for_flagos(x).tolist() == [100, 101, 102, 103]


def test_missing_kernel_names_operator_and_device(x):
    with pytest.raises(NotImplementedError) as error:
        ops.nothing(x)
    assert "flagos_test::nothing" in str(error.value) and "flagos" in str(error.value), str(error.value)
    assert (x + 1).sum().item() == 10


def test_kernel_that_raises(x):
    lib.define("broken(Tensor x) -> Tensor") if not hasattr(ops, "broken") else None
    lib.impl("broken", lambda t: 1 / 0, "CPU")
    with pytest.raises(ZeroDivisionError):
        ops.broken(x)
    assert (x + 1).sum().item() == 10


def test_custom_op_with_autograd_and_fake(device):
    @custom_op("flagos_test::scaled_sin", mutates_args=(), device_types="cpu")
    def scaled_sin(x: torch.Tensor, scale: float) -> torch.Tensor:
        return x.sin() * scale

    scaled_sin.register_fake(lambda x, scale: torch.empty_like(x))
    scaled_sin.register_autograd(
        lambda ctx, gradient: (gradient * ctx.x.cos() * ctx.scale, None),
        setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0]) or setattr(ctx, "scale", inputs[1]),
    )
    x = torch.arange(3.0, device=device, requires_grad=True)
    y = scaled_sin(x, 2.0)
    y.sum().backward()
    torch.testing.assert_close(y.detach().cpu(), torch.arange(3.0).sin() * 2)
    torch.testing.assert_close(x.grad.cpu(), torch.arange(3.0).cos() * 2)


def test_custom_op_with_a_kernel_for_flagos(device):
    @custom_op("flagos_test::where_am_i", mutates_args=())
    def where_am_i(x: torch.Tensor) -> torch.Tensor:
        return x.new_full((), 1.0)

    @where_am_i.register_kernel("flagos")
    def _(x):
        return x.new_full((), 2.0)

    assert where_am_i(torch.ones(1)).item() == 1 and where_am_i(torch.ones(1, device=device)).item() == 2


def test_mixed_devices_are_refused(x):
    with pytest.raises(RuntimeError, match="device"):
        ops.lists([x, torch.ones(2)])


def test_shows_up_in_the_table(x):
    ops.cpu_only(x, 1.0)
    assert any(r.op == "flagos_test::cpu_only" for r in torch_fl.routes())
