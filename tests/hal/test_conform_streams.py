"""Every chip: streams and events, their order, their errors. A waiting host function keeps a stream busy."""

import threading
import time
from ctypes import byref, c_float, c_int32, c_void_p

import pytest
from hal_abi import (
    D2D,
    FAILED_PRECONDITION,
    H2D,
    INVALID_ARGUMENT,
    NOT_FOUND,
    NOT_READY,
    OK,
    TIMING,
    HostFn,
)


class Gate:
    """Holds a stream until open() is called."""

    def __init__(self, hal, device, stream):
        self.event = threading.Event()
        self.callback = HostFn(lambda _: self.event.wait(20))
        hal.do.stream_host_func(device, stream, self.callback, None)

    def open(self):
        self.event.set()


@pytest.fixture
def stream(hal):
    s = hal.stream()
    yield s
    hal.do.stream_sync(0, s)
    hal.do.stream_destroy(0, s)


@pytest.fixture
def event(hal):
    e = hal.event()
    yield e
    hal.do.event_sync(0, e)
    hal.do.event_destroy(0, e)


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.001)


# ---- streams ----------------------------------------------------------------------------------------------------


def test_streams_are_distinct(hal):
    streams = [hal.stream() for _ in range(20)]
    assert len(set(streams)) == 20 and None not in streams
    for s in streams:
        assert hal.stream_destroy(0, s) == OK


def test_new_stream_is_idle(hal, stream):
    assert hal.stream_query(0, stream) == OK
    assert hal.stream_sync(0, stream) == OK


def test_default_stream(hal):
    hal.do.device_sync(0)
    assert hal.stream_query(0, None) == OK
    assert hal.stream_sync(0, None) == OK
    assert hal.stream_destroy(0, None) == INVALID_ARGUMENT


def test_stream_create_needs_an_output(hal):
    assert hal.stream_create(0, 0, None) == INVALID_ARGUMENT


def test_native_handle(hal, stream):
    a, b = c_void_p(), c_void_p()
    hal.do.stream_native_handle(0, stream, byref(a))
    hal.do.stream_native_handle(0, stream, byref(b))
    assert a.value and a.value == b.value
    assert hal.stream_native_handle(0, None, byref(b)) == OK
    assert hal.stream_native_handle(0, stream, None) == INVALID_ARGUMENT


@pytest.mark.needs("priorities")
def test_priorities(hal):
    least, greatest = c_int32(9), c_int32(9)
    hal.do.stream_priority_range(0, byref(least), byref(greatest))
    assert greatest.value <= least.value
    assert hal.stream_priority_range(0, None, byref(greatest)) == INVALID_ARGUMENT


@pytest.mark.parametrize("priority", [0, -1, 100, -100])
def test_priorities_are_clamped(hal, priority):
    s = hal.stream(0, priority)
    assert hal.stream_destroy(0, s) == OK


def test_work_is_in_stream_order(hal, stream):
    p = hal.alloc(1 << 20)
    for i in range(50):
        hal.do.fill_async(0, p, i, 1 << 20, stream)
    assert hal.read(p, 1 << 20, stream=stream) == bytes([49]) * (1 << 20)
    hal.do.free(0, p)


def test_destroy_lets_queued_work_finish(hal):
    p, q = hal.alloc(8 << 20), hal.alloc(8 << 20)
    hal.do.fill_async(0, q, 0, 8 << 20, None)
    hal.do.stream_sync(0, None)
    s = hal.stream()
    for i in range(20):
        hal.do.fill_async(0, p, i, 8 << 20, s)
    hal.do.copy_async(0, q, p, 8 << 20, D2D, s)
    assert hal.stream_destroy(0, s) == OK
    hal.do.device_sync(0)
    assert hal.read(q, 8 << 20) == bytes([19]) * (8 << 20)
    hal.do.free(0, p)
    hal.do.free(0, q)


@pytest.mark.needs("handles")
def test_stale_stream(hal):
    s = hal.stream()
    hal.do.stream_destroy(0, s)
    for attempt in (
        lambda: hal.stream_destroy(0, s),
        lambda: hal.stream_sync(0, s),
        lambda: hal.stream_query(0, s),
        lambda: hal.stream_native_handle(0, s, byref(c_void_p())),
        lambda: hal.copy_async(0, None, None, 0, H2D, s),
        lambda: hal.fill_async(0, None, 0, 0, s),
    ):
        assert attempt() == NOT_FOUND
        assert "stream" in hal.message()
    # A stream created later must not answer to the old handle.
    others = [hal.stream() for _ in range(5)]
    assert s not in others and hal.stream_sync(0, s) == NOT_FOUND
    for other in others:
        hal.do.stream_destroy(0, other)


@pytest.mark.needs("handles")
@pytest.mark.devices(2)
def test_stream_of_another_device(hal, stream, event):
    assert hal.stream_sync(1, stream) == INVALID_ARGUMENT
    assert hal.stream_query(1, stream) == INVALID_ARGUMENT
    assert hal.stream_destroy(1, stream) == INVALID_ARGUMENT
    assert hal.fill_async(1, None, 0, 0, stream) == INVALID_ARGUMENT
    assert hal.event_record(1, event, None) == INVALID_ARGUMENT
    other = hal.stream(1)
    assert hal.event_record(0, event, other) == INVALID_ARGUMENT
    hal.do.stream_destroy(1, other)
    assert hal.stream_sync(0, stream) == OK


@pytest.mark.needs("host_func")
def test_query_counts_the_running_task(hal, stream):
    gate = Gate(hal, 0, stream)
    try:
        assert hal.stream_query(0, stream) == NOT_READY
        time.sleep(0.05)  # by now the task has left the queue and runs
        assert hal.stream_query(0, stream) == NOT_READY
    finally:
        gate.open()
    wait_until(lambda: hal.stream_query(0, stream) == OK)


@pytest.mark.needs("host_func")
def test_calls_do_not_wait_for_the_stream(hal, stream, event):
    p = hal.alloc(1 << 16)
    gate = Gate(hal, 0, stream)
    try:
        start = time.monotonic()
        hal.do.fill_async(0, p, 1, 1 << 16, stream)
        hal.do.copy_async(0, p, p + 4096, 64, D2D, stream)
        hal.do.event_record(0, event, stream)
        assert hal.event_query(0, event) == NOT_READY
        assert time.monotonic() - start < 10
    finally:
        gate.open()
    hal.do.stream_sync(0, stream)
    assert hal.event_query(0, event) == OK
    hal.do.free(0, p)


@pytest.mark.needs("host_func")
def test_streams_are_independent(hal, stream):
    other = hal.stream()
    p = hal.alloc(64)
    gate = Gate(hal, 0, stream)
    try:
        hal.write(p, b"passes", stream=other)
        assert hal.read(p, 6, stream=other) == b"passes"
        assert hal.read(p, 6) == b"passes", "the default stream does not wait for others"
    finally:
        gate.open()
    hal.do.stream_destroy(0, other)
    hal.do.stream_sync(0, stream)
    hal.do.free(0, p)


@pytest.mark.needs("host_func")
def test_host_func_runs_in_order_with_its_argument(hal, stream):
    seen = []
    callback = HostFn(seen.append)
    for i in range(1, 20):
        hal.do.stream_host_func(0, stream, callback, i)
    hal.do.stream_sync(0, stream)
    assert seen == list(range(1, 20))
    assert hal.stream_host_func(0, stream, HostFn(), None) == INVALID_ARGUMENT


@pytest.mark.needs("host_func")
def test_device_sync_waits_for_every_stream(hal):
    streams, seen = [hal.stream() for _ in range(4)], []

    def slow(value):
        time.sleep(0.02)
        seen.append(value)

    callback = HostFn(slow)
    for i, s in enumerate(streams):
        hal.do.stream_host_func(0, s, callback, i + 1)
    hal.do.stream_destroy(0, streams[0])  # also for one that is destroyed but not finished
    hal.do.device_sync(0)
    assert sorted(seen) == [1, 2, 3, 4]
    for s in streams[1:]:
        hal.do.stream_destroy(0, s)


def test_many_streams_come_and_go(hal):
    p = hal.alloc(4096)
    for i in range(300):
        s = hal.stream()
        hal.do.fill_async(0, p, i, 4096, s)
        hal.do.stream_destroy(0, s)
    hal.do.device_sync(0)
    hal.do.free(0, p)


# ---- events -----------------------------------------------------------------------------------------------------


def test_event_never_recorded_is_complete(hal, event, stream):
    assert hal.event_query(0, event) == OK
    assert hal.event_sync(0, event) == OK
    assert hal.stream_wait_event(0, stream, event) == OK


def test_event_on_an_idle_stream(hal, event, stream):
    assert hal.event_record(0, event, stream) == OK
    assert hal.event_sync(0, event) == OK
    assert hal.event_query(0, event) == OK


def test_event_arguments(hal, event):
    out = c_void_p(77)
    assert hal.event_create(0, 0, None) == INVALID_ARGUMENT
    assert hal.event_create(0, 0x80, byref(out)) == INVALID_ARGUMENT and out.value == 77
    for entry in (hal.event_destroy, hal.event_sync, hal.event_query):
        assert entry(0, None) == INVALID_ARGUMENT
    assert hal.event_record(0, None, None) == INVALID_ARGUMENT
    assert hal.stream_wait_event(0, None, None) == INVALID_ARGUMENT


@pytest.mark.needs("handles")
def test_stale_event(hal, stream):
    e = hal.event()
    hal.do.event_destroy(0, e)
    for attempt in (
        lambda: hal.event_destroy(0, e),
        lambda: hal.event_sync(0, e),
        lambda: hal.event_query(0, e),
        lambda: hal.event_record(0, e, stream),
        lambda: hal.stream_wait_event(0, stream, e),
        lambda: hal.event_elapsed_ms(0, e, e, byref(c_float())),
    ):
        assert attempt() == NOT_FOUND
        assert "event" in hal.message()


@pytest.mark.needs("handles")
def test_handles_of_the_wrong_kind(hal, stream, event):
    assert hal.event_query(0, stream) == NOT_FOUND
    assert hal.stream_query(0, event) == NOT_FOUND


@pytest.mark.needs("host_func")
def test_wait_orders_streams(hal, event):
    a, b = hal.stream(), hal.stream()
    p, q = hal.alloc(1 << 20), hal.alloc(1 << 20)  # not the host's memory: a copy into that may wait for the stream
    hal.do.fill_async(0, p, 0, 1 << 20, None)
    hal.do.stream_sync(0, None)
    gate = Gate(hal, 0, a)
    try:
        hal.do.fill_async(0, p, 0x11, 1 << 20, a)
        hal.do.event_record(0, event, a)
        hal.do.stream_wait_event(0, b, event)
        hal.do.copy_async(0, q, p, 1 << 20, D2D, b)
        assert hal.stream_query(0, b) == NOT_READY
    finally:
        gate.open()
    hal.do.stream_sync(0, b)
    assert hal.read(q, 1 << 20) == b"\x11" * (1 << 20)
    for s in (a, b):
        hal.do.stream_destroy(0, s)
    for block in (p, q):
        hal.do.free(0, block)


@pytest.mark.needs("host_func")
def test_wait_is_for_the_record_of_that_moment(hal, event):
    a, b = hal.stream(), hal.stream()
    hal.do.event_record(0, event, b)
    hal.do.stream_wait_event(0, b, event)  # complete
    gate = Gate(hal, 0, a)
    try:
        hal.do.event_record(0, event, a)  # later than the wait above: b does not wait for it
        hal.do.stream_sync(0, b)
        assert hal.event_query(0, event) == NOT_READY
    finally:
        gate.open()
    hal.do.event_sync(0, event)
    for s in (a, b):
        hal.do.stream_destroy(0, s)


@pytest.mark.needs("host_func")
def test_recording_again_does_not_release_earlier_waits(hal, event):
    a, b = hal.stream(), hal.stream()
    gate = Gate(hal, 0, a)
    try:
        hal.do.event_record(0, event, a)
        hal.do.stream_wait_event(0, b, event)
        hal.do.event_record(0, event, None)  # completes at once
        hal.do.event_sync(0, event)
        time.sleep(0.02)
        seen = []
        callback = HostFn(seen.append)
        hal.do.stream_host_func(0, b, callback, 1)
        time.sleep(0.02)
        assert not seen and hal.stream_query(0, b) == NOT_READY
    finally:
        gate.open()
    hal.do.stream_sync(0, b)
    assert seen == [1]
    for s in (a, b):
        hal.do.stream_destroy(0, s)


@pytest.mark.needs("host_func")
def test_destroying_streams_and_events_with_waits_pending(hal):
    a, b, e = hal.stream(), hal.stream(), hal.event()
    gate = Gate(hal, 0, a)
    try:
        hal.do.event_record(0, e, a)
        hal.do.stream_wait_event(0, b, e)
        hal.do.event_destroy(0, e)
        hal.do.stream_destroy(0, a)
        hal.do.stream_destroy(0, b)
    finally:
        gate.open()
    assert hal.device_sync(0) == OK


@pytest.mark.devices(2)
@pytest.mark.needs("host_func")
def test_wait_for_an_event_of_another_device(hal):
    a, b, e = hal.stream(0), hal.stream(1), hal.event(0)
    gate = Gate(hal, 0, a)
    try:
        hal.do.event_record(0, e, a)
        assert hal.stream_wait_event(1, b, e) == OK
        assert hal.stream_query(1, b) == NOT_READY
    finally:
        gate.open()
    assert hal.stream_sync(1, b) == OK
    hal.do.stream_destroy(0, a)
    hal.do.stream_destroy(1, b)
    hal.do.event_destroy(0, e)


@pytest.mark.needs("handles")
@pytest.mark.devices(2)
def test_event_of_another_device(hal, event):
    for entry in (hal.event_sync, hal.event_query, hal.event_destroy):
        assert entry(1, event) == INVALID_ARGUMENT
    assert hal.event_query(0, event) == OK


def test_elapsed_time(hal, stream):
    first, second = hal.event(0, TIMING), hal.event(0, TIMING)
    hal.do.event_record(0, first, stream)
    hal.do.event_sync(0, first)
    time.sleep(0.03)
    hal.do.event_record(0, second, stream)
    hal.do.event_sync(0, second)
    ms = c_float(-1)
    hal.do.event_elapsed_ms(0, first, second, byref(ms))
    assert 20 < ms.value < 2000
    hal.do.event_elapsed_ms(0, second, first, byref(ms))
    assert -2000 < ms.value < -20
    assert hal.event_elapsed_ms(0, first, second, None) == INVALID_ARGUMENT
    for e in (first, second):
        hal.do.event_destroy(0, e)


def test_elapsed_time_needs_timing_and_records(hal, event, stream):
    timed = hal.event(0, TIMING)
    ms = c_float(-1)
    assert hal.event_elapsed_ms(0, timed, timed, byref(ms)) == FAILED_PRECONDITION, "never recorded"
    hal.do.event_record(0, timed, stream)
    hal.do.event_record(0, event, stream)
    hal.do.stream_sync(0, stream)
    assert hal.event_elapsed_ms(0, timed, event, byref(ms)) == FAILED_PRECONDITION, "created without timing"
    assert ms.value == -1
    hal.do.event_destroy(0, timed)


@pytest.mark.needs("host_func")
def test_elapsed_time_of_a_pending_event(hal, stream):
    first, second = hal.event(0, TIMING), hal.event(0, TIMING)
    hal.do.event_record(0, first, stream)
    gate = Gate(hal, 0, stream)
    try:
        hal.do.event_record(0, second, stream)
        assert hal.event_elapsed_ms(0, first, second, byref(c_float())) == NOT_READY
    finally:
        gate.open()
    hal.do.stream_sync(0, stream)
    assert hal.event_elapsed_ms(0, first, second, byref(c_float())) == OK
    for e in (first, second):
        hal.do.event_destroy(0, e)
