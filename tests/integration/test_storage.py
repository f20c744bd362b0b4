"""Storages: resize, set_, views that see a resize, use after resize_(0)."""

import pytest
import torch


def test_storage_is_on_the_device(device):
    x = torch.arange(6.0, device=device)
    storage = x.untyped_storage()
    assert storage.device == x.device and storage.nbytes() == 24 and len(storage) == 24
    assert storage.data_ptr() == x.data_ptr()
    assert torch.equal(torch.tensor(storage.cpu().tolist(), dtype=torch.uint8), torch.arange(6.0).view(torch.uint8))


def test_resize_grows_and_keeps_values(device):
    x = torch.arange(4.0, device=device)
    view = x[1:3]
    assert x.resize_(100) is x
    assert x.shape == (100,) and x.untyped_storage().nbytes() == 400
    assert torch.equal(x[:4].cpu(), torch.arange(4.0))
    # The view shares the storage, so it moved along.
    assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert view.data_ptr() == x.data_ptr() + 4
    x[1] = 42
    assert view[0].item() == 42


def test_resize_shrinks_without_moving(device):
    x = torch.arange(100.0, device=device)
    pointer = x.data_ptr()
    x.resize_(3, 2)
    assert x.shape == (3, 2) and x.data_ptr() == pointer and x.untyped_storage().nbytes() == 400


def test_untyped_storage_resize(device):
    x = torch.arange(8, dtype=torch.int32, device=device)
    alias = x.view(2, 4)
    x.untyped_storage().resize_(64)
    assert x.untyped_storage().nbytes() == 64 and alias.untyped_storage().nbytes() == 64
    assert x.data_ptr() == alias.data_ptr() == x.untyped_storage().data_ptr()
    assert torch.equal(alias.cpu().flatten(), torch.arange(8, dtype=torch.int32))
    y = torch.empty(0, dtype=torch.int32, device=device).set_(x.untyped_storage(), 8, (8,), (1,))
    y.fill_(7)  # the part that the resize added belongs to us
    assert y.sum().item() == 56 and x.sum().item() == 28


def test_storage_released_and_refilled(device):
    """What FSDP does: resize_(0) frees the memory, resize_(n) brings it back, views follow."""
    x = torch.ones(1 << 18, device=device)
    view = x[10:20]
    before = torch.flagos.memory_allocated()
    x.untyped_storage().resize_(0)
    assert torch.flagos.memory_allocated() <= before - (1 << 20)
    assert x.untyped_storage().nbytes() == 0 and x.untyped_storage().data_ptr() == 0
    x.untyped_storage().resize_(4 << 18)
    x.fill_(3)
    assert view.sum().item() == 30


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: x.add_(1),
        lambda x: x.sum(),
        lambda x: x.cpu(),
        lambda x: x.clone(),
        lambda x: x.copy_(torch.ones(100)),
        lambda x: x.item() if x.numel() == 1 else x[0].item(),
        lambda x: torch.mm(x.view(10, 10), x.view(10, 10)),
        lambda x: torch.add(x, x, out=torch.empty(100, device=x.device)),
        lambda x: x.fill_(0),
    ],
    ids=["add", "add_", "sum", "cpu", "clone", "copy_", "item", "mm", "out", "fill_"],
)
def test_use_after_resize_to_zero_is_an_error(use, device):
    x = torch.ones(100, device=device)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError) as error:
        use(x)
    text = str(error.value)
    assert "storage" in text and ("400" in text or "out of bounds" in text), text
    assert "\n" not in text.split("Exception raised")[0].strip()
    # Nothing is half done: the tensor becomes usable again.
    x.untyped_storage().resize_(400)
    x.fill_(2)
    assert x.sum().item() == 200


def test_set_(device):
    x, y = torch.arange(6.0, device=device), torch.zeros(2, device=device)
    y.set_(x)
    assert y.shape == (6,) and y.data_ptr() == x.data_ptr() and y.is_set_to(x)
    y.set_(x.untyped_storage(), 2, (2, 2), (2, 1))
    assert torch.equal(y.cpu(), torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    y[0, 0] = 9
    assert x[2].item() == 9
    y.set_()
    assert y.numel() == 0 and y.is_flagos


def test_set_refuses_another_device(device):
    x = torch.zeros(2, device=device)
    with pytest.raises(RuntimeError, match=r"device|storage"):
        x.set_(torch.ones(4).untyped_storage())
    assert x.is_flagos and x.sum().item() == 0


def test_set_out_of_bounds(device):
    x = torch.arange(4.0, device=device)
    with pytest.raises(RuntimeError, match=r"[Nn]egative strides"):
        torch.as_strided(x, (2,), (-1,))
    with pytest.raises(RuntimeError, match=r"bounds|storage"):
        x.as_strided((3, 3), (3, 1)).sum()
    assert torch.equal(x.cpu(), torch.arange(4.0))


def test_out_resize_is_carried_to_every_view(device):
    out = torch.empty(0, device=device)
    keep = out.detach()
    storage = out.untyped_storage()
    torch.add(torch.ones(5, device=device), 1, out=out)
    assert out.shape == (5,) and keep.shape == (0,)
    assert storage.nbytes() == out.untyped_storage().nbytes() == keep.untyped_storage().nbytes() == 20
    assert storage.data_ptr() == out.data_ptr() != 0


def test_storage_copy_and_fill(device):
    storage = torch.UntypedStorage(16, device=device)
    storage.fill_(3)
    assert storage.cpu().tolist() == [3] * 16
    other = torch.UntypedStorage(16).fill_(5)
    storage.copy_(other)
    assert storage.tolist() == [5] * 16
    clone = storage.clone()
    clone.fill_(1)
    assert storage[0] == 5 and clone[0] == 1
    storage[2] = 77
    assert storage.tolist()[:4] == [5, 5, 77, 5]


def test_memory_comes_back(device):
    torch.flagos.synchronize()
    before = torch.flagos.memory_allocated()
    x = torch.ones(1 << 20, device=device)
    view, alias = x[5:], x.view(1024, 1024)
    del x
    assert torch.flagos.memory_allocated() >= before + (4 << 20)
    del view, alias
    assert torch.flagos.memory_allocated() == before
