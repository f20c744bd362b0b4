"""The host chip's fault plan, random delays, fork, and life cycle."""

import ctypes
import time
from ctypes import byref, c_float, c_int32, c_uint64, c_void_p

import pytest
from hal_abi import (
    D2H,
    DEVICE_LOST,
    ENTRIES,
    H2D,
    INVALID_ARGUMENT,
    OK,
    STATUS,
    TIMING,
    DeviceInfo,
    HostFn,
    PointerInfo,
)

FAILURES = STATUS[1:]


class Everything:
    """One valid call of every entry, and what has to be undone afterwards."""

    def __init__(self, hal):
        self.hal = hal
        self.block = hal.alloc(4096)
        self.stream, self.event, self.timed = hal.stream(), hal.event(), hal.event(0, TIMING)
        hal.do.event_record(0, self.timed, None)
        hal.do.stream_sync(0, None)
        self.buffer = ctypes.create_string_buffer(64)
        self.nothing = HostFn(lambda _: None)

    def call(self, entry):
        hal, block, address = self.hal, self.block, ctypes.addressof(self.buffer)
        out, number, other = c_void_p(), c_int32(), c_int32()
        arguments = {
            "probe": (),
            "init": (),
            "device_count": (byref(number),),
            "device_info": (0, byref(DeviceInfo(struct_size=ctypes.sizeof(DeviceInfo)))),
            "mem_info": (0, byref(c_uint64()), byref(c_uint64())),
            "malloc": (0, 64, byref(out)),
            "free": (0, block),
            "host_malloc": (64, byref(out)),
            "host_free": (None,),
            "pointer_info": (block, byref(PointerInfo(struct_size=ctypes.sizeof(PointerInfo)))),
            "host_alias": (block, byref(out)),
            "copy_async": (0, block, address, 64, H2D, None),
            "copy2d_async": (0, block, 8, address, 8, 8, 8, H2D, None),
            "fill_async": (0, block, 0, 64, None),
            "stream_create": (0, 0, byref(out)),
            "stream_destroy": (0, self.stream),
            "stream_sync": (0, None),
            "stream_query": (0, self.stream),
            "stream_native_handle": (0, None, byref(out)),
            "stream_priority_range": (0, byref(number), byref(other)),
            "stream_host_func": (0, None, self.nothing, None),
            "event_create": (0, 0, byref(out)),
            "event_destroy": (0, self.event),
            "event_record": (0, self.event, None),
            "event_sync": (0, self.event),
            "event_query": (0, self.event),
            "event_elapsed_ms": (0, self.timed, self.timed, byref(c_float())),
            "stream_wait_event": (0, None, self.event),
            "device_sync": (0,),
            "can_access_peer": (0, 1, byref(number)),
            "enable_peer": (0, 1),
            "last_error": (0,),
        }[entry]
        status = getattr(hal, entry)(*arguments)
        hal.do.stream_sync(0, None) if status == OK and entry != "stream_sync" else None
        if status == OK and out.value:
            {"malloc": lambda p: hal.free(0, p), "host_malloc": hal.host_free}.get(entry, lambda p: None)(out.value)
            {"stream_create": lambda s: hal.stream_destroy(0, s)}.get(entry, lambda p: None)(out.value)
            {"event_create": lambda e: hal.event_destroy(0, e)}.get(entry, lambda p: None)(out.value)
        if status == OK and entry == "free":
            self.block = hal.alloc(4096)
        if status == OK and entry == "stream_destroy":
            self.stream = hal.stream()
        if status == OK and entry == "event_destroy":
            self.event = hal.event()
        return status, out.value

    def close(self):
        self.hal.do.device_sync(0)
        self.hal.do.free(0, self.block)
        self.hal.do.stream_destroy(0, self.stream)
        self.hal.do.event_destroy(0, self.event)
        self.hal.do.event_destroy(0, self.timed)


@pytest.fixture
def everything(host, library):
    before = library.live(0)
    e = Everything(host)
    yield e
    library.set_fail(None)
    e.close()
    assert library.live(0) == before


PLANNED = sorted(set(ENTRIES) - {"last_message", "shutdown"})


@pytest.mark.parametrize("entry", PLANNED)
def test_every_entry_can_fail_with_every_status(host, library, everything, entry):
    for number, name in enumerate(FAILURES, 1):
        assert library.set_fail(f"{entry}@2={name}") == OK
        assert everything.call(entry)[0] == OK
        status, out = everything.call(entry)
        assert STATUS[status] == name and status == number and out is None
        assert entry in host.message() and (name in host.message())
        if name != "DEVICE_LOST":
            assert everything.call(entry)[0] == OK, "one failure, then as before"
        assert library.set_fail(None) == OK


def test_device_loss_is_sticky_and_stays_with_its_device(host, library, everything):
    library.set_fail("stream_sync@1=DEVICE_LOST")
    assert host.stream_sync(0, None) == DEVICE_LOST
    for call in (
        lambda: host.malloc(0, 64, byref(c_void_p())),
        lambda: host.free(0, everything.block),
        lambda: host.stream_query(0, None),
        lambda: host.device_sync(0),
        lambda: host.last_error(0),
    ):
        assert call() == DEVICE_LOST
        assert "flagos:0 is lost" in host.message()
    assert host.stream_sync(1, None) == OK
    library.set_fail(None)
    assert host.stream_sync(0, None) == OK


def test_plan_counts_from_when_it_is_set(host, library):
    library.set_fail("malloc@3=OUT_OF_MEMORY;malloc@4=INTERNAL; ".rstrip("; "))
    seen = []
    for _ in range(5):
        out = c_void_p()
        seen.append(STATUS[host.malloc(0, 64, byref(out))])
        host.free(0, out)
    assert seen == ["OK", "OK", "OUT_OF_MEMORY", "INTERNAL", "OK"]


def test_calls_are_counted(host, library):
    library.set_fail(None)
    assert library.calls("device_sync") == 0
    for _ in range(7):
        host.device_sync(0)
    import threading

    threads = [threading.Thread(target=lambda: [host.device_sync(1) for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert library.calls("device_sync") == 407
    assert library.calls("no_such_entry") == 0
    library.set_fail(None)
    assert library.calls("device_sync") == 0


BAD_PLANS = {
    "malloc": "expected ENTRY@N=STATUS",
    "malloc@1": "expected ENTRY@N=STATUS",
    "malloc=OUT_OF_MEMORY": "expected ENTRY@N=STATUS",
    "mallok@1=OUT_OF_MEMORY": "no such entry",
    "last_message@1=INTERNAL": "no such entry",
    "malloc@0=OUT_OF_MEMORY": "call number",
    "malloc@x=OUT_OF_MEMORY": "call number",
    "malloc@1=OK": "no such failure status",
    "malloc@1=OOM": "no such failure status",
    "free@1=INTERNAL;malloc@1=": "no such failure status",
}


@pytest.mark.parametrize("plan", BAD_PLANS)
def test_malformed_plan(host, library, plan):
    library.set_fail("free@1=INTERNAL")
    assert library.set_fail(plan) == INVALID_ARGUMENT
    assert BAD_PLANS[plan] in library.message() and plan.split(";")[-1] in library.message()
    p = host.alloc(64)
    assert STATUS[host.free(0, p)] == "INTERNAL", "the former plan is still in force"
    host.do.free(0, p)


def test_malformed_plan_in_the_environment(script):
    result = script("library.open('host')", FLAGOS_SIM_FAIL="malloc@1=OUT_OF_MEMORY;frea@1=INTERNAL")
    assert result.returncode == 1
    assert 'FLAGOS_SIM_FAIL: fault plan item "frea@1=INTERNAL": no such entry' in result.stderr


def test_plan_in_the_environment(script):
    code = """
hal = library.open('host')
assert hal.malloc(0, 64, byref(ptr())) == OK
assert hal.malloc(0, 64, byref(ptr())) == OUT_OF_MEMORY
assert hal.malloc(0, 64, byref(ptr())) == OK
"""
    result = script(code, FLAGOS_SIM_FAIL="malloc@2=OUT_OF_MEMORY")
    assert result.returncode == 0, result.stderr


def test_init_can_fail_and_be_tried_again(script):
    code = """
try:
    library.open('host')
except HalError as error:
    print(error)
assert library.open('host').count() == 2
"""
    result = script(code, FLAGOS_SIM_FAIL="init@2=UNAVAILABLE")
    assert result.returncode == 0, result.stderr
    library_set = "library.set_fail('init@1=UNAVAILABLE')\n" + code
    result = script(library_set)
    assert result.returncode == 0, result.stderr
    assert 'init of chip "host"' in result.stdout and "UNAVAILABLE" in result.stdout


# ---- random delays ----------------------------------------------------------------------------------------------


def two_stream_program(hal, wait):
    """Writes on one stream, reads on another; right only with the wait. True when the result is right."""
    a, b, e = hal.stream(), hal.stream(), hal.event()
    p, n = hal.alloc(4096), 4096
    hal.do.fill_async(0, p, 0, n, None)
    hal.do.stream_sync(0, None)
    right = True
    for value in range(1, 61):  # delays are random: enough rounds that one of them hits
        out = ctypes.create_string_buffer(n)
        hal.do.fill_async(0, p, value, n, a)
        hal.do.event_record(0, e, a)
        if wait:
            hal.do.stream_wait_event(0, b, e)
        hal.do.copy_async(0, ctypes.addressof(out), p, n, D2H, b)
        hal.do.event_record(0, e, b)
        hal.do.stream_wait_event(0, a, e)
        hal.do.stream_sync(0, b)
        right = right and out.raw == bytes([value]) * n
    hal.do.device_sync(0)
    for s in (a, b):
        hal.do.stream_destroy(0, s)
    hal.do.event_destroy(0, e)
    hal.do.free(0, p)
    return right


@pytest.mark.parametrize("seed", range(1, 11))
def test_delays_expose_a_missing_wait_and_spare_a_right_program(host, library, seed):
    library.dll.flagos_sim_set_chaos(seed)
    assert two_stream_program(host, wait=True)
    assert not two_stream_program(host, wait=False)


def test_delays_expose_early_reuse_of_a_host_buffer(host, library):
    library.dll.flagos_sim_set_chaos(3)
    p, wrong = host.alloc(4096), 0
    for _ in range(60):
        buffer = ctypes.create_string_buffer(b"a" * 4096, 4096)
        host.do.copy_async(0, p, ctypes.addressof(buffer), 4096, H2D, None)
        ctypes.memset(ctypes.addressof(buffer), 0, 4096)  # too early
        host.do.stream_sync(0, None)
        wrong += host.read(p, 4096) != b"a" * 4096
    host.do.free(0, p)
    assert wrong


def test_delays_from_the_environment(script):
    code = """
hal = library.open('host')
p = hal.alloc(64)
start = time.monotonic()
for _ in range(100):
    hal.do.fill_async(0, p, 0, 64, None)
hal.do.stream_sync(0, None)
print(time.monotonic() - start)
"""
    # 100 tasks, one in four delayed by up to 2 ms; the same delays in every run with this seed.
    assert float(script(code, FLAGOS_SIM_CHAOS="5").stdout) > 0.008


# ---- fork and life cycle ----------------------------------------------------------------------------------------

FORK = """
hal = library.open('host')
stream, event, p = hal.stream(), hal.event(), hal.alloc(64)
hal.do.fill_async(0, p, 1, 64, stream)
hal.do.device_sync(0)
pid = os.fork()
if pid == 0:
    sys.path.insert(0, '.')
    bad = []
    for name, types in ENTRIES.items():
        if name in ('last_message', 'device_count'):
            continue
        arguments = [HostFn() if t is HostFn else 0 if t in (c_int32, c_uint32, c_uint64) else None for t in types]
        status = getattr(hal, name)(*arguments)
        if status != FAILED_PRECONDITION or 'spawn' not in hal.message() or name not in hal.message():
            bad.append((name, status, hal.message()))
    if hal.count() != 2:
        bad.append('count')
    print(bad, flush=True)
    os._exit(1 if bad else 0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert hal.read(p, 64) == bytes([1]) * 64      # the parent goes on
hal.do.stream_destroy(0, stream)
"""


def test_forked_child(script):
    result = script("from ctypes import *\n" + FORK)
    assert result.returncode == 0, result.stdout + result.stderr


def test_forked_child_touching_device_memory(script):
    code = """
from ctypes import *
hal = library.open('host')
p, a = hal.alloc(64), c_void_p()
hal.do.host_alias(p, byref(a))
pid = os.fork()
if pid == 0:
    ctypes.memset(a.value, 0, 1)
    os._exit(0)
assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
assert hal.read(p, 64) == bytes([255]) * 64
"""
    result = script(code)
    assert result.returncode == 0, result.stderr
    assert "a forked child touched device memory of flagos:0" in result.stderr and "spawn" in result.stderr


def test_fork_before_init_is_harmless(script):
    code = """
pid = os.fork()
hal = library.open('host')
hal.do.free(0, hal.alloc(64))
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    result = script(code)
    assert result.returncode == 0, result.stderr


SHUTDOWN = """
from ctypes import *
hal = library.open('host')
stream, event, p, seen = hal.stream(), hal.event(), hal.alloc(64), []
def slow(_):
    time.sleep(0.05)
    seen.append(1)
callback = HostFn(slow)
hal.do.stream_host_func(0, stream, callback, None)
hal.do.shutdown()
assert seen == [1]                                   # queued work has finished
for name, types in ENTRIES.items():
    if name in ('last_message', 'probe', 'init'):
        continue
    arguments = [HostFn() if t is HostFn else 0 if t in (c_int32, c_uint32, c_uint64) else None for t in types]
    assert getattr(hal, name)(*arguments) == FAILED_PRECONDITION, name
    assert name in hal.message() and 'init()' in hal.message()
assert hal.probe() == OK
hal.do.init()
assert hal.stream_sync(0, stream) == NOT_FOUND       # handles of the former life are dead
q = hal.alloc(64)
hal.write(q, b'again')
assert hal.read(q, 5) == b'again'
hal.do.shutdown()
"""


def test_shutdown_and_init_again(script):
    result = script(SHUTDOWN)
    assert result.returncode == 0, result.stderr


def test_exit_with_work_pending(script):
    code = """
hal = library.open('host')
p = hal.alloc(64 << 20)
for i in range(50):
    hal.do.fill_async(0, p, i, 64 << 20, hal.stream())
"""
    start = time.monotonic()
    result = script(code)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start < 30


def test_sim_functions_before_open(script):
    code = """
assert library.calls('malloc') == 0
try:
    library.live(0)
except HalError as error:
    print(error)
"""
    result = script(code)
    assert result.returncode == 0 and "not initialised" in result.stdout
