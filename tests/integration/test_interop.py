"""The same memory under another label: as_cuda, from_cuda, DLPack, __cuda_array_interface__, Triton, CuPy.

The conversion itself is the same on the host chip, where the native label is cpu, and is tested there too. Host tests
wait for the device first: on the host chip streams are threads, and the CPU does not know them.
"""

import gc

import pytest
import torch

import torch_fl
from torch_fl import _C


def as_native(t):
    torch.flagos.synchronize()
    return _C._as_native(t)


def from_native(t):
    return _C._from_native(t, 0)


@pytest.fixture(autouse=True)
def native_label():
    if torch_fl.chip() not in ("host", "cuda"):
        pytest.skip(f"torch has no kernels for the chip {torch_fl.chip()}, so its memory has one label only")


@pytest.fixture
def native():
    """The device type of the native label."""
    return "cuda" if torch_fl.chip() == "cuda" else "cpu"


def test_shares_memory_sizes_and_strides(device, native):
    x = torch.arange(24.0, device=device).reshape(4, 6)[1:, ::2].t()
    y = as_native(x)
    assert y.device.type == native and not y.is_flagos
    assert (y.shape, y.stride(), y.storage_offset()) == (x.shape, x.stride(), x.storage_offset())
    y[0, 0] = 42
    assert x[0, 0].item() == 42
    x[1, 1] = 43
    torch.flagos.synchronize()
    assert y[1, 1].item() == 43


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.cfloat, torch.bool, torch.int64, torch.float8_e4m3fn], ids=str)
def test_dtypes(device, dtype):
    x = torch.ones(3).to(dtype).to(device)
    y = as_native(x)
    assert y.dtype == dtype and y.cpu().tolist() == x.cpu().tolist()


def test_lazy_bits_stay(device):
    x = torch.tensor([1 + 2j], device=device).conj()
    y = as_native(x)
    assert y.is_conj() and y.cpu().tolist() == [1 - 2j]
    assert from_native(y).is_conj()


def test_memory_outlives_the_other_label(device):
    y = as_native(torch.full((1000,), 7.0, device=device))
    gc.collect()
    torch.full((1000,), 8.0, device=device)
    torch.flagos.synchronize()
    assert y.eq(7).all()
    x = from_native(torch.full((1000,), 9.0, device=y.device))
    gc.collect()
    assert (x + 1).sum().item() == 10000


def test_memory_is_freed_once_and_with_the_last(device):
    gc.collect()
    before = torch.flagos.memory_allocated()
    x = torch.ones(1 << 16, device=device)
    y = as_native(x)
    z = from_native(y)
    del x, y
    assert torch.flagos.memory_allocated() > before
    del z
    gc.collect()
    assert torch.flagos.memory_allocated() == before


def test_round_trip(device):
    x = torch.arange(6.0, device=device).reshape(2, 3)
    y = from_native(as_native(x))
    assert y.is_flagos and y.device == x.device and y.data_ptr() == x.data_ptr() and y.shape == x.shape
    y.add_(1)
    assert x.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_twice_the_same_native_storage(device, native):
    """Two flagos storages over one memory: operators between them must see that they overlap."""
    n = torch.zeros(8, device=native)
    a, b = from_native(n), from_native(n)
    assert a.data_ptr() == b.data_ptr()
    a[:4] = 1
    assert b.sum().item() == 4
    with pytest.raises(RuntimeError, match=r"overlap|same memory|memory location"):
        torch.add(a[:4], 1, out=b[2:6])


def test_result_is_detached_and_versions_are_shared(device):
    w = torch.ones(3, device=device, requires_grad=True)
    y = as_native(w)
    assert not y.requires_grad and y.grad_fn is None
    x = torch.ones(3, device=device, requires_grad=True)
    square = x * x
    kept = square.exp()
    as_native(kept).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_inference_tensors(device):
    with torch.inference_mode():
        x = torch.ones(3, device=device)
        y = as_native(x)
    assert y.is_inference() and y.sum().item() == 3


def test_neither_label_can_be_resized(device, native):
    x = torch.ones(4, device=device)
    y = as_native(x)
    for t in (x, y, from_native(torch.ones(4, device=native))):
        with pytest.raises(RuntimeError, match="not resizable"):
            t.resize_(1000)
    with pytest.raises(RuntimeError, match="not resizable"):
        x.untyped_storage().resize_(0)
    assert x.sum().item() == 4


def test_zero_size(device):
    assert as_native(torch.empty(0, 3, device=device)).shape == (0, 3)
    assert from_native(as_native(torch.empty(0, device=device))).is_flagos


def test_wrong_arguments(device, native):
    with pytest.raises(RuntimeError, match="expected a flagos tensor"):
        _C._as_native(torch.ones(2))
    with pytest.raises(RuntimeError, match=f"expected a {native} tensor"):
        _C._from_native(torch.ones(2, device="meta"), 0)
    with pytest.raises(RuntimeError, match="expected a dense tensor"):
        _C._as_native(torch.eye(2, device=device).to_sparse())
    with pytest.raises(RuntimeError, match="does not exist"):
        _C._from_native(torch.ones(2, device=native), 99)


def test_other_chips_say_so(device):
    if torch_fl.chip() == "cuda":
        pytest.skip("the chip cuda has these functions")
    for function in (torch.flagos.as_cuda, torch.flagos.from_cuda, torch.flagos.to_dlpack, torch.flagos.from_dlpack):
        with pytest.raises(RuntimeError, match=f"works on the chip cuda only, this process runs on {torch_fl.chip()}"):
            function(torch.ones(2, device=device))


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_dlpack_says_cuda(device):
    x = torch.arange(4.0, device=device)
    assert torch.flagos.as_cuda(x).__dlpack_device__() == (2, 0)
    y = torch.utils.dlpack.from_dlpack(torch.flagos.to_dlpack(x))
    assert y.is_cuda and y.data_ptr() == x.data_ptr()
    z = torch.flagos.from_dlpack(y)
    assert z.is_flagos and z.data_ptr() == x.data_ptr()
    assert torch.flagos.from_dlpack(x).is_flagos
    with pytest.raises(ValueError, match="not on a GPU"):
        torch.flagos.from_dlpack(torch.ones(2))


@pytest.mark.cuda
def test_cuda_array_interface(device):
    x = torch.arange(6.0, device=device).reshape(2, 3).t()
    interface = torch.flagos.as_cuda(x).__cuda_array_interface__
    assert interface["data"][0] == x.data_ptr() and interface["shape"] == (3, 2)


@pytest.mark.cuda
def test_cupy(device):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    x = torch.arange(6.0, device=device)
    with cupy.cuda.ExternalStream(torch.flagos.current_stream()._native_handle()):
        array = cupy.from_dlpack(torch.flagos.as_cuda(x))
        array *= 2
        assert cupy.asarray(torch.flagos.as_cuda(x)).sum() == 30
        made = torch.flagos.from_dlpack(cupy.arange(5, dtype=cupy.float32))
    assert x.tolist() == [0, 2, 4, 6, 8, 10]
    assert made.is_flagos and (made + 1).sum().item() == 15


@pytest.mark.cuda
def test_record_stream_through_the_alias(device):
    side = torch.cuda.Stream()
    x = torch.ones(1 << 20, device=device)
    torch.flagos.as_cuda(x).record_stream(side)
    pointer = x.data_ptr()
    with torch.cuda.stream(side):
        torch.cuda._sleep(int(1e8))
    del x
    y = torch.empty(1 << 20, device=device)
    assert y.data_ptr() != pointer, "memory was given out while a recorded stream still used it"
    side.synchronize()


@pytest.mark.cuda
def test_streams_are_the_same(device):
    side = torch.flagos.Stream()
    with torch.flagos.stream(side):
        assert torch.cuda.current_stream().cuda_stream == side._native_handle()
        assert torch.flagos.current_stream() == side
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.flagos.current_stream()._native_handle() == torch.cuda.current_stream().cuda_stream


# A function of the module: triton.jit reads its source.
def _add_kernel(x, y, out, n, BLOCK: "tl.constexpr"):  # noqa: F821
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # noqa: F821
    mask = index < n
    tl.store(out + index, tl.load(x + index, mask=mask) + tl.load(y + index, mask=mask), mask=mask)  # noqa: F821


@pytest.mark.cuda
def test_triton_kernel_on_flagos_tensors(device, monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setitem(globals(), "tl", triton.language)
    kernel = triton.jit(_add_kernel)
    x, y = torch.rand(1000, device=device), torch.rand(1000, device=device)
    out = torch.empty_like(x)
    kernel[(triton.cdiv(1000, 256),)](x, y, out, 1000, BLOCK=256)
    assert torch.equal(out, x + y)
    side = torch.flagos.Stream()
    side.wait_stream(torch.flagos.current_stream())
    with torch.flagos.stream(side):
        a = torch.full((1000,), 3.0, device=device)
        kernel[(4,)](a, a, out, 1000, BLOCK=256)  # on the current flagos stream, behind the fill
    side.synchronize()
    assert out.sum().item() == 6000


@pytest.mark.cuda
def test_threads_converting_one_tensor(device):
    from concurrent.futures import ThreadPoolExecutor

    x = torch.ones(64, device=device)

    def convert(k):
        for _ in range(2000):
            torch.flagos.from_cuda(torch.flagos.as_cuda(x))
        return torch.flagos.as_cuda(x).sum().item()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(convert, range(8))) == [64.0] * 8
