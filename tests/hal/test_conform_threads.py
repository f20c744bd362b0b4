"""Every chip: 8 threads at once, sharing the device and sharing nothing else."""

import ctypes
import random
import threading

import pytest
from hal_abi import D2D, D2H, H2D, OK

THREADS, ROUNDS = 8, 60


def run_threads(body, count=THREADS):
    errors = []

    def guarded(index):
        try:
            body(index)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_with_streams_of_their_own(hal):
    def body(index):
        device = index % hal.count()
        rng = random.Random(index)
        stream, event = hal.stream(device), hal.event(device)
        for _ in range(ROUNDS):
            n = rng.randrange(1, 1 << 16)
            data = bytes([rng.randrange(256)]) * n
            a, b = hal.alloc(n, device), hal.alloc(n, device)
            source, target = ctypes.create_string_buffer(data, n), ctypes.create_string_buffer(n)
            hal.do.copy_async(device, a, ctypes.addressof(source), n, H2D, stream)
            hal.do.copy_async(device, b, a, n, D2D, stream)
            hal.do.event_record(device, event, stream)
            hal.do.stream_wait_event(device, None, event)
            hal.do.copy_async(device, ctypes.addressof(target), b, n, D2H, None)
            hal.do.stream_sync(device, None)
            assert target.raw == data
            assert hal.pointer(a + n - 1).base == a
            hal.do.stream_sync(device, stream)
            hal.do.free(device, a)
            hal.do.free(device, b)
        hal.do.event_destroy(device, event)
        hal.do.stream_destroy(device, stream)

    run_threads(body)


def test_threads_on_one_stream(hal):
    stream = hal.stream()

    def body(index):
        p = hal.alloc(4096)
        for i in range(ROUNDS):
            hal.do.fill_async(0, p, (index + i) % 256, 4096, stream)
            assert hal.read(p, 4096, stream=stream) == bytes([(index + i) % 256]) * 4096
        hal.do.free(0, p)

    run_threads(body)
    hal.do.stream_destroy(0, stream)


def test_threads_creating_and_destroying(hal):
    def body(index):
        for _ in range(ROUNDS):
            s, e = hal.stream(), hal.event()
            hal.do.event_record(0, e, s)
            assert hal.event_sync(0, e) == OK
            hal.do.event_destroy(0, e)
            hal.do.stream_destroy(0, s)

    run_threads(body)


@pytest.mark.needs("pinned")
def test_threads_with_pinned_memory(hal):
    def body(index):
        for _ in range(ROUNDS // 2):
            p, d = hal.pinned(4096), hal.alloc(4096)
            ctypes.memset(p, index, 4096)
            hal.do.copy_async(0, d, p, 4096, H2D, None)
            assert hal.read(d, 4096) == bytes([index]) * 4096
            hal.do.free(0, d)
            hal.do.host_free(p)

    run_threads(body)


def test_messages_stay_with_their_thread(hal):
    def body(index):
        for _ in range(200):
            hal.stream_sync(-1000 - index, None)
            assert str(-1000 - index) in hal.message()

    run_threads(body)
