"""Events: order between streams, queries, timing, other devices' events."""

import threading
import time

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


def test_never_recorded_is_done():
    event = torch.Event("flagos")
    assert event.query()
    event.synchronize()
    torch.Stream(device="flagos").wait_event(event)


@on_host
def test_query_follows_the_stream():
    stream = torch.Stream(device="flagos")
    hold(stream)
    event = stream.record_event()
    assert event.device.type == "flagos"
    assert not event.query()
    _C._sim.release()
    event.synchronize()
    assert event.query()


@on_host
def test_synchronize_lets_other_threads_run():
    stream = torch.Stream(device="flagos")
    hold(stream)
    event = stream.record_event()
    timer = threading.Timer(0.05, _C._sim.release)
    timer.start()
    event.synchronize()
    assert event.query()
    timer.join()


@on_host
def test_wait_holds_a_stream_back():
    first, second = torch.Stream(device="flagos"), torch.Stream(device="flagos")
    hold(first)
    event = first.record_event()
    second.wait_event(event)
    assert not second.query()
    _C._sim.release()
    second.synchronize()
    assert event.query()


@on_host
def test_record_again_replaces():
    stream, other = torch.Stream(device="flagos"), torch.Stream(device="flagos")
    event = torch.Event("flagos")
    event.record(stream)
    stream.synchronize()
    other.wait_event(event)  # the first record, which is done
    hold(stream)
    event.record(stream)
    assert not event.query()
    other.synchronize()  # does not wait for the second one


@on_host
def test_wait_for_another_devices_event():
    if flagos.device_count() < 2:
        pytest.skip("needs two devices")
    first, second = torch.Stream(device="flagos:0"), torch.Stream(device="flagos:1")
    hold(first)
    event = first.record_event()
    second.wait_event(event)
    assert not second.query()
    _C._sim.release()
    second.synchronize()


def test_elapsed_time():
    start, end = torch.Event("flagos", enable_timing=True), torch.Event("flagos", enable_timing=True)
    start.record()
    flagos.synchronize()
    time.sleep(0.02)
    end.record()
    end.synchronize()
    assert 15 <= start.elapsed_time(end) < 5000


@pytest.mark.parametrize("timing", [(True, False), (False, False)])
def test_elapsed_time_without_timing(timing):
    start, end = (torch.Event("flagos", enable_timing=flag) for flag in timing)
    start.record()
    end.record()
    end.synchronize()
    with pytest.raises(ValueError, match="enable_timing"):
        start.elapsed_time(end)


def test_elapsed_time_needs_records():
    start, end = torch.Event("flagos", enable_timing=True), torch.Event("flagos", enable_timing=True)
    start.record()
    with pytest.raises((RuntimeError, ValueError), match="recorded"):
        start.elapsed_time(end)


def test_event_of_one_device_on_another():
    if flagos.device_count() < 2:
        pytest.skip("needs two devices")
    event = torch.Event("flagos")
    event.record(torch.Stream(device="flagos:0"))
    with pytest.raises(RuntimeError, match="device"):
        event.record(torch.Stream(device="flagos:1"))
    event.synchronize()


def test_device_modules_event():
    event = flagos.Event(enable_timing=True)
    event.record()
    event.synchronize()
    assert event.query()
    assert isinstance(event, torch.Event)


def test_many_events_do_not_pile_up():
    for _ in range(2000):
        torch.Event("flagos").record()
    flagos.synchronize()


@on_host
def test_fault_at_the_first_record_leaves_the_event_usable():
    for plan in ("event_create@1=INTERNAL", "event_record@1=OUT_OF_MEMORY"):
        event = torch.Event("flagos")
        _C._sim.set_fail(plan)
        with pytest.raises(RuntimeError, match=r"flagos: .*event"):
            event.record()
        _C._sim.set_fail("")
        event.record()
        event.synchronize()
        assert event.query()
