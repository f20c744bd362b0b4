"""Pinned host memory: making it, recognising it, caching it, and asynchronous copies that keep it alive."""

import pytest
import torch

import torch_fl
from torch_fl import _C

flagos = torch_fl.flagos
on_host = pytest.mark.skipif(torch_fl.chip() != "host", reason="drives the simulated host chip")


@pytest.fixture(autouse=True)
def gate(clean_slate):
    yield
    if torch_fl.chip() == "host":
        _C._sim.release()
        _C._sim.set_fail("")
    flagos.synchronize()


def hold(stream):
    _C._sim.hold(stream.stream_id, stream.device_index)


def test_pin_memory():
    x = torch.arange(100)
    pinned = x.pin_memory()
    assert not x.is_pinned()
    assert pinned.is_pinned()
    assert pinned.device.type == "cpu"
    assert torch.equal(pinned, x)
    assert pinned.pin_memory() is pinned


def test_factory_with_pin_memory():
    x = torch.ones(10, pin_memory=True)
    assert x.is_pinned()
    assert x[3:].is_pinned()
    assert x.sum().item() == 10


def test_device_tensors_are_not_pinned():
    x = torch.ones(10, device="flagos")
    assert not x.is_pinned()
    with pytest.raises(RuntimeError, match="pin"):
        x.pin_memory()


def test_freed_memory_is_reused():
    x = torch.empty(1000, pin_memory=True)
    address = x.data_ptr()
    del x
    y = torch.empty(1000, pin_memory=True)
    assert y.data_ptr() == address


@on_host
def test_freed_memory_waits_for_its_copies():
    stream = torch.Stream(device="flagos")
    source = torch.full((5000,), 2.0, pin_memory=True)
    address = source.data_ptr()
    x = torch.zeros(5000, device="flagos")
    flagos.synchronize()
    hold(stream)
    with flagos.stream(stream):
        x.copy_(source, non_blocking=True)
    del source
    other = torch.full((5000,), 9.0, pin_memory=True)
    assert other.data_ptr() != address
    _C._sim.release()
    stream.synchronize()
    assert x.sum().item() == 10000


@on_host
def test_slices_are_recognised_too():
    stream = torch.Stream(device="flagos")
    source = torch.full((5000,), 2.0, pin_memory=True)
    address = source.data_ptr()
    x = torch.zeros(1000, device="flagos")
    flagos.synchronize()
    hold(stream)
    with flagos.stream(stream):
        x.copy_(source[100:1100], non_blocking=True)
    del source
    assert torch.empty(5000, pin_memory=True).data_ptr() != address
    _C._sim.release()


@on_host
def test_copies_to_the_host_are_asynchronous():
    stream = torch.Stream(device="flagos")
    x = torch.full((1000,), 4.0, device="flagos")
    target = torch.zeros(1000, pin_memory=True)
    flagos.synchronize()
    hold(stream)
    with flagos.stream(stream):
        target.copy_(x, non_blocking=True)
    assert not stream.query()
    assert target.sum().item() == 0
    _C._sim.release()
    stream.synchronize()
    assert target.sum().item() == 4000


def test_copies_from_ordinary_memory_are_finished():
    x = torch.zeros(1000, device="flagos")
    source = torch.ones(1000)
    x.copy_(source, non_blocking=True)
    source.zero_()
    assert x.sum().item() == 1000


def test_statistics():
    _C._host_empty_cache()
    before = flagos.host_memory_stats()
    x = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    after = flagos.host_memory_stats()
    assert after["num_host_alloc"] == before["num_host_alloc"] + 1
    assert after["allocated_bytes.current"] == before["allocated_bytes.current"] + (64 << 20)
    del x
    _C._host_empty_cache()
    end = flagos.host_memory_stats()
    assert end["num_host_free"] > before["num_host_free"]
    assert end["allocated_bytes.current"] <= before["allocated_bytes.current"]


def test_data_loader():
    data = torch.utils.data.TensorDataset(torch.arange(20.0))
    loader = torch.utils.data.DataLoader(data, batch_size=5, pin_memory=True)
    total = 0.0
    for (batch,) in loader:
        assert batch.is_pinned()
        total += batch.to("flagos", non_blocking=True).sum().item()
    assert total == sum(range(20))
