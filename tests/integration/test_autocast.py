"""Autocast: which dtype each class of operator gets, casts that are cached, GradScaler."""

import pytest
import torch

LOWER = {
    "mm": lambda x: x @ x,
    "linear": lambda x: torch.nn.functional.linear(x, x),
    "bmm": lambda x: torch.bmm(x[None], x[None]),
    "addmm": lambda x: torch.addmm(x, x, x),
    "conv2d": lambda x: torch.nn.functional.conv2d(x[None, None], x[None, None]),
    "sdpa": lambda x: torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
}
FLOAT32 = {
    "softmax": lambda x: x.softmax(-1),
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (4,)),
    "exp": lambda x: x.exp(),
    "sum": lambda x: x.sum(),
    "pow": lambda x: x.pow(2),
    "mse_loss": lambda x: torch.nn.functional.mse_loss(x, x * 2),
    "cumsum": lambda x: x.cumsum(0),
}
WIDEST = {
    "cat": lambda x: torch.cat([x.to(torch.bfloat16), x]),
    "stack": lambda x: torch.stack([x.to(torch.bfloat16), x]),
    "addcmul": lambda x: torch.addcmul(x, x.to(torch.bfloat16), x.to(torch.bfloat16)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOWER)
def test_lower_precision(name, dtype, device):
    x = torch.randn(4, 4, device=device)
    with torch.autocast("flagos", dtype=dtype):
        assert LOWER[name](x).dtype is dtype
    assert LOWER[name](x).dtype is torch.float32


@pytest.mark.parametrize("name", FLOAT32)
def test_float32(name, device):
    x = torch.randn(4, 4, device=device, dtype=torch.bfloat16)
    with torch.autocast("flagos", dtype=torch.bfloat16):
        assert FLOAT32[name](x).dtype is torch.float32


@pytest.mark.parametrize("name", WIDEST)
def test_widest(name, device):
    x = torch.randn(4, 4, device=device)
    with torch.autocast("flagos", dtype=torch.bfloat16):
        assert WIDEST[name](x).dtype is torch.float32


def test_state(device):
    assert not torch.is_autocast_enabled("flagos")
    with torch.autocast("flagos", dtype=torch.float16):
        assert torch.is_autocast_enabled("flagos") and not torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("flagos") is torch.float16
        with torch.autocast("flagos", enabled=False):
            assert (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).dtype is torch.float32
    assert not torch.is_autocast_enabled("flagos")


def test_cpu_tensors_are_left_alone(device):
    with torch.autocast("flagos", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_integers_and_doubles_are_left_alone(device):
    with torch.autocast("flagos", dtype=torch.bfloat16):
        x = torch.ones(2, 2, device=device, dtype=torch.float64)
        assert (x @ x).dtype is torch.float64
        assert (torch.ones(2, device=device, dtype=torch.int64) + 1).dtype is torch.int64


def test_weight_cast_is_cached(device):
    weight = torch.randn(4, 4, device=device, requires_grad=True)
    x = torch.randn(4, 4, device=device)
    with torch.autocast("flagos", dtype=torch.bfloat16):
        first, second = x @ weight, x @ weight
    casts = [{f for f, _ in out.grad_fn.next_functions if f is not None} for out in (first, second)]
    assert casts[0] == casts[1] and len(casts[0]) == 1, "the weight was cast twice"


def test_training_step_equals_the_cpu_s(device):
    def run(where):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 2)
        ).to(where)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(where)
        with torch.autocast(torch.device(where).type, dtype=torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()
        return loss.item(), [p.grad.cpu() for p in model.parameters()]

    loss, gradients = run(device)
    expected_loss, expected = run("cpu")
    assert loss == pytest.approx(expected_loss, rel=2e-2)
    for a, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=5e-2, atol=1e-2)


def test_grad_scaler(device):
    scaler = torch.amp.GradScaler("flagos", init_scale=4.0, growth_interval=1)
    weight = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(weight.sum()).backward()
    assert weight.grad.tolist() == [4.0] * 3
    scaler.unscale_(optimizer)
    assert weight.grad.tolist() == [1.0] * 3
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.0] * 3 and scaler.get_scale() == 8.0
    # An infinity skips the step and lowers the scale.
    optimizer.zero_grad()
    scaler.scale((weight * torch.tensor(float("inf"), device=device)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.0] * 3 and scaler.get_scale() == 4.0


def test_unsupported_dtype_is_refused_or_warned(device):
    with pytest.warns(UserWarning, match="[Ss]upported"), torch.autocast("flagos", dtype=torch.float64):
        assert (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).dtype is torch.float32


def test_custom_fwd_bwd(device):
    class Multiply(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="flagos")
        def forward(ctx, x, y):
            assert torch.is_autocast_enabled("flagos")
            ctx.save_for_backward(x, y)
            return x @ y

        @staticmethod
        @torch.amp.custom_bwd(device_type="flagos")
        def backward(ctx, gradient):
            x, y = ctx.saved_tensors
            return gradient @ y.t().to(gradient.dtype), x.t().to(gradient.dtype) @ gradient

    x = torch.ones(2, 2, device=device, requires_grad=True)
    with torch.autocast("flagos", dtype=torch.bfloat16):
        y = Multiply.apply(x, x)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype is torch.float32 and x.grad.is_flagos
