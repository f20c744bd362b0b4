"""The host chip's memory: protection, quarantine, canaries, fresh contents, limits. Crashes happen in a child."""

import ctypes
import signal
from ctypes import byref, c_void_p

import pytest
from hal_abi import INTERNAL, INVALID_ARGUMENT, OK, OUT_OF_MEMORY

TOUCH = "hal = library.open('host'); p = hal.alloc(4096, 1); print(hex(p), flush=True); "


def alias(hal, p):
    out = c_void_p()
    hal.do.host_alias(p, byref(out))
    return out.value


def test_reading_device_memory_faults_and_says_why(script):
    result = script(TOUCH + "ctypes.string_at(p, 1)")
    assert result.returncode == -signal.SIGSEGV
    assert result.stderr.startswith(f"flagos: the host touched device memory of flagos:1 at {result.stdout.strip()};")
    assert ".cpu()" in result.stderr and "FLAGOS_HOST_PROTECT=0" in result.stderr
    assert result.stderr.count("\n") == 1


def test_writing_device_memory_faults(script):
    result = script(TOUCH + "ctypes.memset(p + 100, 0, 1)")
    assert result.returncode == -signal.SIGSEGV and "flagos:1" in result.stderr


def test_protection_can_be_switched_off(script):
    result = script(TOUCH + "hal.write(p, b'abc', 1); print(ctypes.string_at(p, 3))", FLAGOS_HOST_PROTECT="0")
    assert result.returncode == 0 and "b'abc'" in result.stdout


def test_other_faults_are_not_ours(script):
    result = script("library.open('host'); ctypes.string_at(8, 1)")
    assert result.returncode == -signal.SIGSEGV and "flagos" not in result.stderr


def test_an_earlier_handler_still_runs(script):
    result = script("import faulthandler; faulthandler.enable(); " + TOUCH + "ctypes.string_at(p, 1)")
    assert result.returncode == -signal.SIGSEGV
    assert result.stderr.startswith("flagos: the host touched")
    assert "Fatal Python error: Segmentation fault" in result.stderr and "string_at" in result.stderr


def test_use_of_freed_memory_faults(script):
    code = "a = c_void_p(); hal.do.host_alias(p, byref(a)); hal.do.free(1, p); ctypes.string_at(a.value, 1)"
    result = script("from ctypes import *\n" + TOUCH + code)
    assert result.returncode == -signal.SIGSEGV and "freed or out-of-bounds" in result.stderr


def test_overrun_past_the_slack_faults(script):
    code = "a = c_void_p(); hal.do.host_alias(p, byref(a)); ctypes.memset(a.value, 0, 4096 * 3)"
    result = script("from ctypes import *\n" + TOUCH + code)
    assert result.returncode == -signal.SIGSEGV and "freed or out-of-bounds" in result.stderr


@pytest.mark.parametrize("size", [1, 1000, 4096, 100_000])
def test_small_overrun_is_found_at_free(host, library, size):
    p = host.alloc(size)
    ctypes.memset(alias(host, p) + size, 0, 1)
    assert host.free(0, p) == INTERNAL
    assert "past its end" in host.message() and str(size) in host.message()
    assert host.free(0, p) == OK, "reported once, then the block can be freed"


@pytest.mark.parametrize("size", [1, 4096, 2 << 20])
def test_fresh_memory_is_nan(host, size):
    p = host.alloc(size)
    assert host.read(p, size) == b"\xff" * size
    host.write(p, b"\0" * size)
    host.do.free(0, p)
    q = host.alloc(size)
    assert host.read(q, size) == b"\xff" * size
    host.do.free(0, q)


def resident():
    """Bytes of device memory that this process has really touched."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssShmem"))


def test_large_memory_is_nan_at_both_ends_and_not_committed(host):
    size = 1 << 30

    before = resident()
    p = host.alloc(size)
    assert resident() - before < 8 << 20
    assert host.read(p, 1 << 20) == b"\xff" * (1 << 20)
    assert host.read(p + size - (1 << 20), 1 << 20) == b"\xff" * (1 << 20)
    host.do.free(0, p)


def test_free_gives_pages_back(host):
    p = host.alloc(256 << 20)
    host.do.fill_async(0, p, 1, 256 << 20, None)
    host.do.stream_sync(0, None)
    used = resident()
    host.do.free(0, p)
    assert used - resident() > 200 << 20


def test_addresses_rest_before_they_are_used_again(host):
    p = host.alloc(4096)
    host.do.free(0, p)
    for _ in range(63):
        q = host.alloc(4096)
        assert q != p
        host.do.free(0, q)


def test_addresses_are_used_again_in_the_end(script):
    code = """
hal = library.open('host')
seen = set()
for _ in range(1000):
    p = hal.alloc(1 << 20)
    seen.add(p)
    hal.do.free(0, p)
assert len(seen) < 200, len(seen)
"""
    result = script(code)
    assert result.returncode == 0, result.stderr


LIMIT = """
hal = library.open('host')
assert hal.memory() == (16 << 20, 16 << 20), hal.memory()
p = hal.alloc(16 << 20)
assert hal.memory()[0] == 0
assert hal.malloc(0, 1, byref(ptr())) == OUT_OF_MEMORY
print(hal.message())
hal.alloc(16 << 20, 1)
hal.do.free(0, p)
for size in [1 << 20] * 100 + [15 << 20] * 20:   # quarantine and fragments must not eat the memory
    hal.do.free(0, hal.alloc(size))
hal.alloc(16 << 20)
"""


def test_memory_limit(script):
    result = script(LIMIT, FLAGOS_HOST_MEMORY="16M")
    assert result.returncode == 0, result.stderr
    for word in ("malloc", "flagos:0", "asked for 1 bytes", "16777216 of 16777216 in use", "FLAGOS_HOST_MEMORY"):
        assert word in result.stdout


def test_many_small_blocks(host, library):
    """More blocks than the process may have mappings."""
    before = library.live(0)
    blocks = [host.alloc(100) for _ in range(40_000)]
    assert library.live(0) == (before[0] + 40_000, before[1] + 4_000_000)
    for p in blocks:
        host.do.free(0, p)
    assert library.live(0) == before


def test_live_counts(host, library):
    blocks, size = library.live(1)
    p = host.alloc(1000, 1)
    assert library.live(1) == (blocks + 1, size + 1000)
    host.do.free(1, p)
    assert library.live(1) == (blocks, size)
    assert library.dll.flagos_sim_live(99, None, None) == INVALID_ARGUMENT
    assert "99" in library.message()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FLAGOS_HOST_DEVICES", "0"),
        ("FLAGOS_HOST_DEVICES", "17"),
        ("FLAGOS_HOST_DEVICES", "two"),
        ("FLAGOS_HOST_DEVICES", "-1"),
        ("FLAGOS_HOST_MEMORY", "1T"),
        ("FLAGOS_HOST_MEMORY", "99999999999999999999"),
        ("FLAGOS_HOST_MEMORY", "99999999999G"),
        ("FLAGOS_HOST_PROTECT", "yes"),
        ("FLAGOS_SIM_CHAOS", "1.5"),
    ],
)
def test_malformed_environment(script, name, value):
    result = script("library.open('host')", **{name: value})
    assert result.returncode == 1
    assert f"{name}={value}: must be a whole number from" in result.stderr


@pytest.mark.parametrize("count", [1, 5, 16])
def test_number_of_devices(script, count):
    last = count - 1
    code = f"hal = library.open('host'); assert hal.count() == {count}; hal.do.free({last}, hal.alloc(9, {last}))"
    result = script(code, FLAGOS_HOST_DEVICES=str(count))
    assert result.returncode == 0, result.stderr


def test_out_of_memory_is_a_status(host):
    out = c_void_p()
    assert host.malloc(0, host.memory()[1] + 1, byref(out)) == OUT_OF_MEMORY and out.value is None
