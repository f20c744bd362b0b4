"""Copies: every direction, dtype and layout, blocking and not; item; casts on the way."""

import itertools

import pytest
import torch

import torch_fl

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.complex32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "expanded": lambda t: t[:1].expand(t.shape),
    "empty": lambda t: t[:0],
    "scalar": lambda t: t.flatten()[3],
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2),
}
DEVICES = ["cpu", "flagos:0"] + (["flagos:1"] if torch_fl.flagos.device_count() > 1 else [])
DIRECTIONS = [(a, b) for a, b in itertools.product(DEVICES, DEVICES) if (a, b) != ("cpu", "cpu")]


def source(dtype):
    values = (torch.arange(2 * 3 * 4 * 5) % 2 == 0) if dtype is torch.bool else torch.arange(2 * 3 * 4 * 5) % 100
    return values.to(torch.float32).to(dtype).reshape(2, 3, 4, 5)


def bits(t):
    return t.detach().cpu().contiguous().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def place(t, device):
    """`t` on the device in exactly its layout: its storage is moved whole."""
    if device == "cpu":
        return t
    flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return flat.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("src", "dst"), DIRECTIONS)
def test_to(src, dst, dtype, non_blocking):
    x = source(dtype)
    moved = place(x, src).to(dst, non_blocking=non_blocking)
    assert moved.device == torch.device(dst) and moved.dtype is dtype
    for where in {src, dst} - {"cpu"}:
        torch.flagos.synchronize(where)
    assert torch.equal(bits(moved), bits(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("src", "dst"), DIRECTIONS)
def test_layouts(src, dst, layout):
    x = LAYOUTS[layout](source(torch.float32))
    y = place(x, src)
    moved = y.to(dst)
    assert torch.equal(moved.cpu(), x)
    if src != dst:
        assert moved.stride() == x.to("cpu", copy=True).stride(), "preserve_format differs from the CPU's"
    for target_layout in LAYOUTS:
        shape = x.shape
        if len(shape) != 4 or target_layout in ("expanded", "empty", "scalar", "permuted", "offset"):
            target = torch.zeros(shape)
        else:
            target = LAYOUTS[target_layout](torch.zeros(shape))
        target = place(target, dst)
        assert target.copy_(y) is target
        assert torch.equal(target.cpu(), x)


@pytest.mark.parametrize("to", [torch.float64, torch.float16, torch.int32, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize(("src", "dst"), DIRECTIONS)
def test_cast_on_the_way(src, dst, to):
    x = source(torch.float32)
    assert torch.equal(place(x, src).to(dst, to).cpu(), x.to(to))
    target = torch.empty(x.shape, dtype=to, device=dst)
    assert torch.equal(target.copy_(place(x, src)).cpu(), x.to(to))


@pytest.mark.parametrize(("src", "dst"), DIRECTIONS)
def test_broadcast_and_partial_copies(src, dst):
    target = torch.zeros(4, 6, device=dst)
    target.copy_(torch.arange(6.0, device=src))
    assert torch.equal(target.cpu(), torch.arange(6.0).expand(4, 6))
    target[1:3, ::2] = torch.full((2, 3), 9.0, device=src)
    expected = torch.arange(6.0).repeat(4, 1)
    expected[1:3, ::2] = 9
    assert torch.equal(target.cpu(), expected)
    target[0].copy_(torch.tensor(5.0, device=src))
    assert target[0].tolist() == [5.0] * 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_item_and_tolist(dtype, device):
    x = source(dtype).flatten()[:7]
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        assert [v.item() for v in x.to(device)] == [v.item() for v in x]
        return
    assert x.to(device)[3].item() == x[3].item()
    assert x.to(device).tolist() == x.tolist()


def test_lazy_bits(device):
    x = torch.complex(torch.arange(4.0), torch.ones(4))
    for lazy in (x.conj(), x.conj().imag, torch._neg_view(x)):
        assert torch.equal(lazy.to(device).cpu(), lazy.resolve_conj().resolve_neg())
        target = torch.zeros(4, dtype=lazy.dtype, device=device)
        assert torch.equal(target.copy_(lazy).cpu(), lazy.resolve_conj().resolve_neg())
        back = torch.zeros(4, dtype=lazy.dtype)
        assert torch.equal(
            back.copy_(target.conj() if lazy.is_complex() else target), lazy.conj().resolve_conj().resolve_neg()
        )


def test_pinned_non_blocking_both_ways(device):
    x = torch.arange(1 << 16, dtype=torch.float32).pin_memory()
    y = x.to(device, non_blocking=True)
    z = torch.empty_like(x).pin_memory()
    z.copy_(y * 2, non_blocking=True)
    torch.flagos.synchronize()
    assert torch.equal(z, x * 2)


def test_pageable_non_blocking_may_be_reused_at_once(device):
    """The host may overwrite pageable memory as soon as the call returns, as on CUDA."""
    for k in range(20):
        x = torch.full((1 << 16,), float(k))
        y = x.to(device, non_blocking=True)
        x.fill_(-1)
        assert y.sum().item() == k * (1 << 16)


def test_same_device_copy_is_in_stream_order(device):
    x = torch.zeros(1 << 16, device=device)
    for k in range(10):
        y = torch.empty_like(x)
        y.copy_(x, non_blocking=True)
        x.add_(1)
        assert y[5].item() == k


def test_to_without_copy_returns_the_same_object(device):
    x = torch.ones(2, device=device)
    assert x.to(device) is x and x.to("flagos:0") is x and x.flagos() is x
    assert x.to(device, copy=True) is not x
    cpu = torch.ones(2)
    assert cpu.cpu() is cpu


def test_large_copy(device):
    x = torch.arange(8 << 20, dtype=torch.int32)  # 32 MB
    y = x.to(device)
    assert torch.equal(y.cpu(), x) and y.sum(dtype=torch.int64).item() == x.sum(dtype=torch.int64).item()


def test_copy_to_and_from_meta(device):
    assert torch.ones(3, device=device).to("meta").is_meta
    with pytest.raises(NotImplementedError, match="meta"):
        torch.ones(3, device="meta").to(device)


def test_numpy_path(device):
    numpy = pytest.importorskip("numpy", reason="needs numpy")
    array = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
    x = torch.from_numpy(array).to(device)
    assert (x.cpu().numpy() == array).all()
    assert torch.as_tensor(array, device=device).is_flagos
    with pytest.raises(TypeError, match=r"flagos.*cpu"):
        numpy.asarray(x)


LAZY = {"plain": lambda t: t, "conj": torch.conj, "neg": torch._neg_view, "both": lambda t: torch._neg_view(t.conj())}


@pytest.mark.parametrize("way", ["to host", "to host, pinned", "to device", "to device, pinned", "on device"])
@pytest.mark.parametrize("how", ["", "strided", "other dtype"])
@pytest.mark.parametrize("non_blocking", [False, True])
def test_every_pair_of_lazy_bits(device, way, how, non_blocking):
    """The bits of either side, of both and of none, whatever else the copy has to do."""
    target, source = torch.randn(4, 3, dtype=torch.complex64), torch.randn(4, 3, dtype=torch.complex64)
    if how == "strided":
        source = source.t().contiguous().t()
    elif how == "other dtype":
        source = source.to(torch.complex128)
    for to, of in itertools.product(LAZY.values(), LAZY.values()):
        expected = to(target.clone()).copy_(of(source))
        a = target.clone() if "to host" in way else target.to(device)
        b = source.clone() if "to device" in way else source.to(device)
        if "pinned" in way:
            a, b = (t.pin_memory() if t.is_cpu else t for t in (a, b))
        result = to(a).copy_(of(b), non_blocking)
        torch.flagos.synchronize()
        assert (result.is_conj(), result.is_neg()) == (expected.is_conj(), expected.is_neg())
        assert torch.equal(result.cpu().resolve_conj().resolve_neg(), expected.resolve_conj().resolve_neg())
