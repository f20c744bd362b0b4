"""DLPack: out of and into the device, sharing memory, refused where a consumer could read wrong bytes."""

import gc

import pytest
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack


def test_round_trip_shares_memory(device):
    x = torch.arange(12.0, device=device).reshape(3, 4).t()
    y = from_dlpack(to_dlpack(x))
    assert y.is_flagos and y.shape == x.shape and y.stride() == x.stride()
    assert y.data_ptr() == x.data_ptr()
    y[0, 0] = 42
    assert x[0, 0].item() == 42
    del x
    gc.collect()
    assert (y + 1)[0, 0].item() == 43


def test_operators_on_an_adopted_tensor(device):
    """The storage that comes back has no label of ours: it must be adopted on first use."""
    y = from_dlpack(to_dlpack(torch.ones(4, device=device)))
    y.add_(1)
    z = torch.cat([y, y[1:]])
    assert z.tolist() == [2.0] * 7
    y.resize_(2)
    assert y.sum().item() == 4


def test_protocol_methods(device):
    x = torch.arange(3, dtype=torch.int32, device=device)
    kind, index = x.__dlpack_device__()
    assert index == 0 and kind not in (1, 3), "a device tensor must not claim to be CPU memory"
    assert torch.from_dlpack(x).tolist() == [0, 1, 2]


def test_numpy_refuses(device):
    numpy = pytest.importorskip("numpy", reason="needs numpy")
    with pytest.raises((BufferError, RuntimeError, TypeError, ValueError)):
        numpy.from_dlpack(torch.ones(3, device=device))


def test_memory_is_released(device):
    gc.collect()
    before = torch.flagos.memory_allocated()
    for _ in range(10):
        capsule = to_dlpack(torch.ones(1000, device=device))
        del capsule
        y = from_dlpack(to_dlpack(torch.ones(1000, device=device)))
        del y
    gc.collect()
    assert torch.flagos.memory_allocated() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64], ids=str)
def test_dtypes(dtype, device):
    x = torch.ones(4, device=device).to(dtype)
    assert torch.equal(from_dlpack(to_dlpack(x)).cpu(), x.cpu())
