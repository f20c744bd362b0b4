"""Streams: default, pools, priorities, the thread's current stream, and the order of work."""

import threading

import pytest
import torch

import torch_fl
from torch_fl import _C

flagos = torch_fl.flagos
on_host = pytest.mark.skipif(torch_fl.chip() != "host", reason="drives the simulated host chip")
on_hal = pytest.mark.skipif(torch_fl.chip() == "cuda", reason="states limits of HAL chips")


@pytest.fixture(autouse=True)
def gate(clean_slate):
    yield
    if torch_fl.chip() == "host":
        _C._sim.release()
        _C._sim.set_fail("")
    flagos.synchronize()


def hold(stream):
    _C._sim.hold(stream.stream_id, stream.device_index)


def test_default_is_current():
    assert torch.accelerator.current_stream() == flagos.default_stream()
    assert flagos.default_stream().stream_id == 0
    assert torch.accelerator.current_stream().device.type == "flagos"


def test_new_streams_differ():
    streams = {torch.Stream(device="flagos").stream_id for _ in range(8)}
    assert len(streams) == 8
    assert 0 not in streams


def test_pool_comes_round():
    ids = [torch.Stream(device="flagos").stream_id for _ in range(80)]
    assert 16 <= len(set(ids)) <= 64


def test_set_and_restore():
    before = torch.accelerator.current_stream()
    stream = torch.Stream(device="flagos")
    with flagos.stream(stream):
        assert torch.accelerator.current_stream() == stream
        inner = torch.Stream(device="flagos")
        with flagos.stream(inner):
            assert torch.accelerator.current_stream() == inner
        assert torch.accelerator.current_stream() == stream
    assert torch.accelerator.current_stream() == before


def test_with_torch_stream():
    stream = torch.Stream(device="flagos")
    with stream:
        assert torch.accelerator.current_stream() == stream
        x = torch.ones(100, device="flagos")
    stream.synchronize()
    assert x.sum().item() == 100
    assert torch.accelerator.current_stream() == flagos.default_stream()


def test_current_stream_belongs_to_the_thread():
    stream = torch.Stream(device="flagos")
    seen = []
    with flagos.stream(stream):
        thread = threading.Thread(target=lambda: seen.append(torch.accelerator.current_stream().stream_id))
        thread.start()
        thread.join()
        assert torch.accelerator.current_stream() == stream
    assert seen == [0]


def test_current_stream_belongs_to_the_device():
    if flagos.device_count() < 2:
        pytest.skip("needs two devices")
    stream = torch.Stream(device="flagos:1")
    assert stream.device.index == 1
    with flagos.stream(stream):
        assert flagos.current_device() == 1
        assert flagos.current_stream(0) == flagos.default_stream(0)
        assert flagos.current_stream(1) == stream
    assert flagos.current_device() == 0


def test_priorities():
    least, greatest = flagos.Stream.priority_range()
    assert greatest <= least
    for priority in (least, greatest, least + 5, greatest - 5):
        torch.Stream(device="flagos", priority=priority).synchronize()
        stream = flagos.Stream(priority=priority)
        assert stream.priority == min(max(priority, greatest), least)
        with flagos.stream(stream):
            assert flagos.current_stream().priority == stream.priority
    assert flagos.default_stream().priority == least


@on_host
def test_query_and_synchronize():
    stream = torch.Stream(device="flagos")
    assert stream.query()
    hold(stream)
    assert not stream.query()
    timer = threading.Timer(0.05, _C._sim.release)
    timer.start()
    stream.synchronize()  # must let the other thread run
    assert stream.query()
    timer.join()


@on_host
def test_device_synchronize_waits_for_all_streams():
    streams = [torch.Stream(device="flagos") for _ in range(3)]
    for stream in streams:
        hold(stream)
    timer = threading.Timer(0.05, _C._sim.release)
    timer.start()
    torch.accelerator.synchronize()
    assert all(stream.query() for stream in streams)
    timer.join()


@on_host
def test_streams_do_not_wait_for_each_other():
    stream = torch.Stream(device="flagos")
    hold(stream)
    x = torch.arange(10, device="flagos")
    assert x.sum().item() == 45
    assert not stream.query()


@on_host
def test_wait_stream_orders_copies():
    producer, consumer = torch.Stream(device="flagos"), torch.Stream(device="flagos")
    source = torch.full((1000,), 7.0).pin_memory()
    x = torch.zeros(1000, device="flagos")
    flagos.synchronize()
    hold(producer)
    with flagos.stream(producer):
        x.copy_(source, non_blocking=True)
    consumer.wait_stream(producer)
    target = torch.zeros(1000).pin_memory()
    with flagos.stream(consumer):
        target.copy_(x, non_blocking=True)
    assert not consumer.query()
    assert target.sum().item() == 0
    _C._sim.release()
    consumer.synchronize()
    assert target.sum().item() == 7000


@on_host
def test_operators_wait_for_their_stream():
    stream = torch.Stream(device="flagos")
    source = torch.full((1000,), 3.0).pin_memory()
    x = torch.zeros(1000, device="flagos")
    timer = threading.Timer(0.05, _C._sim.release)
    flagos.synchronize()
    with flagos.stream(stream):
        hold(stream)
        x.copy_(source, non_blocking=True)
        timer.start()
        assert (x * 2).sum().item() == 6000
    timer.join()


@on_host
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_right_programs_survive_random_delays(seed):
    _C._sim.set_chaos(seed)
    try:
        streams = [torch.Stream(device="flagos") for _ in range(3)]
        x = torch.zeros(2000, device="flagos")
        source = torch.empty(2000).pin_memory()
        for i in range(30):
            stream = streams[i % 3]
            stream.wait_stream(streams[(i - 1) % 3])
            with flagos.stream(stream):
                source.fill_(i)
                y = torch.empty_like(x)
                y.copy_(source, non_blocking=True)
                x += y
                y.record_stream(stream)
                stream.synchronize()
        assert x[0].item() == sum(range(30))
        assert bool((x == x[0]).all())
    finally:
        _C._sim.set_chaos(0)


def test_native_handle_makes_the_same_stream():
    stream = torch.Stream(device="flagos")
    again = flagos.ExternalStream(stream.native_handle)
    assert again.native_handle == stream.native_handle


@on_hal
def test_foreign_handle_is_refused():
    with pytest.raises(RuntimeError, match="is not a stream of flagos:0"):
        flagos.ExternalStream(0x1234)


@pytest.mark.skipif(torch_fl.chip() == "cuda", reason="CUDA takes an unknown number for a foreign stream's address")
def test_unknown_stream_id():
    with pytest.raises(RuntimeError):
        flagos.set_stream(
            torch.Stream(stream_id=120, device_index=0, device_type=torch.Stream(device="flagos").device_type)
        )


@on_host
@pytest.mark.parametrize("entry", ["stream_sync", "stream_query", "device_sync"])
def test_faults_are_one_error(entry):
    stream = torch.Stream(device="flagos")
    call = {
        "stream_sync": stream.synchronize,
        "stream_query": stream.query,
        "device_sync": torch.accelerator.synchronize,
    }
    _C._sim.set_fail(f"{entry}@1=INTERNAL")
    with pytest.raises(RuntimeError, match=r"flagos: .* failed on flagos:0 \(host\): INTERNAL"):
        call[entry]()
    call[entry]()
