"""scaled_dot_product_attention: the choice of kernel, masks, dropout, gradients, grouped queries."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import torch_fl


def qkv(device, dtype=torch.float32, heads=2, length=8, size=16, grad=False):
    generator = torch.Generator().manual_seed(0)
    shape = (2, heads, length, size)
    return [torch.randn(shape, generator=generator).to(dtype).to(device).requires_grad_(grad) for _ in range(3)]


def masks(length, where):
    return {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": torch.ones(length, length, dtype=torch.bool).tril().to(where)},
        "float": {"attn_mask": torch.linspace(-1, 1, length * length).view(length, length).to(where)},
        "scale": {"scale": 0.3},
    }


@pytest.mark.parametrize(
    "backend", [None, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=["default", "math", "flash"]
)
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float", "scale"])
def test_forward_and_backward_equal_the_cpu_s(mask, backend, device):
    results, dtype, tolerance = [], torch.float32, 1e-4
    if backend is SDPBackend.FLASH_ATTENTION and torch_fl.chip() == "cuda":
        if mask in ("bool", "float"):
            pytest.skip("CUDA's flash kernel takes no mask")
        dtype, tolerance = torch.float16, 1e-2  # nor float32
    for where in ("cpu", device):
        tensors = qkv(where, dtype, grad=True)
        kwargs = masks(8, where)[mask]
        if backend is None:
            out = sdpa(*tensors, **kwargs)
        else:
            with sdpa_kernel(backend):
                out = sdpa(*tensors, **kwargs)
        out.square().sum().backward()
        results.append([out.detach().cpu(), *(t.grad.cpu() for t in tensors)])
    for a, e in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("size", [16, 20])
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], ids=str)
def test_fused_kernels_run_on_the_device(backend, size, device):
    """Not on the CPU fallback, forward, backward and in inference mode."""
    torch_fl.fallbacks(reset=True)
    with sdpa_kernel([backend, SDPBackend.MATH]):
        sdpa(*qkv(device, torch.float16, size=size, grad=True)).sum().backward()
        with torch.inference_mode():
            out = sdpa(*qkv(device, torch.float16, size=size))
    assert torch_fl.fallbacks() == {} and out.shape[-1] == size
    expected = sdpa(*qkv("cpu", torch.float16, size=size))
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, device):
    torch.testing.assert_close(sdpa(*qkv(device, dtype)).cpu(), sdpa(*qkv("cpu", dtype)), rtol=2e-2, atol=2e-2)


def test_a_fused_kernel_is_chosen(device):
    """Without a choice of ours, PrivateUse1 always gets the math kernel: slow, and quadratic in memory."""
    q, k, v = qkv(device, grad=True)
    names = [type(sdpa(q, k, v).grad_fn).__name__]
    with sdpa_kernel(SDPBackend.MATH):
        names.append(type(sdpa(q, k, v).grad_fn).__name__)
    assert names[0] != names[1] and "ScaledDotProduct" in names[0], names
    assert torch._fused_sdp_choice(q, k, v) != SDPBackend.MATH.value


def test_grouped_queries(device):
    q = qkv(device, heads=4)[0]
    _, k, v = qkv(device, heads=2)
    expected = sdpa(q.cpu(), k.cpu(), v.cpu(), enable_gqa=True)
    torch.testing.assert_close(sdpa(q, k, v, enable_gqa=True).cpu(), expected, rtol=1e-5, atol=1e-6)


def test_awkward_layouts(device):
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(device, length=7, size=20))
    torch.testing.assert_close(sdpa(q, k, v).cpu(), sdpa(q.cpu(), k.cpu(), v.cpu()), rtol=1e-5, atol=1e-6)
    expanded = k[:, :1].expand(2, 2, 7, 20)
    torch.testing.assert_close(sdpa(q, expanded, v).cpu(), sdpa(q.cpu(), expanded.cpu(), v.cpu()), rtol=1e-5, atol=1e-6)


def test_dropout_is_seeded(device):
    q, k, v = qkv(device)
    torch.manual_seed(5)
    first = sdpa(q, k, v, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(sdpa(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(sdpa(q, k, v, dropout_p=0.5), first)


def test_multi_head_attention_module(device):
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    for train in (True, False):
        module.train(train)
        expected = module.cpu()(x, x, x, need_weights=False)[0]
        actual = module.to(device)(x.to(device), x.to(device), x.to(device), need_weights=False)[0]
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_bad_shapes(device):
    q, k, v = qkv(device)
    with pytest.raises(RuntimeError):
        sdpa(q, k[..., :3], v)
    with pytest.raises(RuntimeError, match="device"):
        sdpa(q, k.cpu(), v)
    assert sdpa(q, k, v).shape == q.shape
