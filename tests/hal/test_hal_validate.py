"""FLAGOS_HAL_VALIDATE=1: the interposer finds what the caller does wrong. It is put before the skeleton chip, which
checks next to nothing itself, so every finding below is the interposer's own."""

import os
import subprocess
import sys

import pytest
from hal_abi import HERE, ROOT

FINDINGS = {
    "double free": ("p = hal.alloc(64); hal.do.free(0, p)", "hal.free(0, p)", "freed before (double free)"),
    "interior free": ("p = hal.alloc(64)", "hal.free(0, p + 8)", "not the start of a live block"),
    "free of host memory": ("", "hal.free(0, ctypes.addressof(buffer))", "not the start of a live block"),
    "free of pinned memory": ("p = hal.pinned(64)", "hal.free(0, p)", "belongs to device -1, the call names 0"),
    "host_free of device memory": ("p = hal.alloc(64)", "hal.host_free(p)", "belongs to device 0, the call names -1"),
    "wrong device": ("", "hal.stream_sync(3, None)", "device 3 does not exist, the chip has 1"),
    "stale stream": ("s = hal.stream(); hal.do.stream_destroy(0, s)", "hal.stream_sync(0, s)", "not a live stream"),
    "stream destroyed twice": (
        "s = hal.stream(); hal.do.stream_destroy(0, s)",
        "hal.stream_destroy(0, s)",
        "not a live stream",
    ),
    "stale event": ("e = hal.event(); hal.do.event_destroy(0, e)", "hal.event_query(0, e)", "not a live event"),
    "stale after reuse": (
        "s = hal.stream(); hal.do.stream_destroy(0, s); t = [hal.stream() for _ in range(9)]",
        "hal.stream_query(0, s)",
        "not a live stream",
    ),
    "event as stream": ("e = hal.event()", "hal.stream_sync(0, e)", "not a live stream"),
    "invented handle": ("", "hal.stream_sync(0, 0xdeadbeef)", "not a live stream"),
    "NULL event": ("", "hal.event_query(0, None)", "event is NULL"),
    "copy kind": ("p = hal.alloc(64)", "hal.copy_async(0, p, p, 8, 9, None)", "9 is not a copy kind"),
    "kind says host, is device": (
        "p = hal.alloc(64)",
        "hal.copy_async(0, p, p, 8, H2D, None)",
        "the kind says that src is host memory",
    ),
    "kind says device, is host": (
        "p = hal.alloc(64)",
        "hal.copy_async(0, ctypes.addressof(buffer), p, 8, D2D, None)",
        "dst",
    ),
    "kind says device, is pinned": (
        "p = hal.alloc(64); q = hal.pinned(64)",
        "hal.copy_async(0, q, p, 8, D2D, None)",
        "is pinned",
    ),
    "past the end": ("p = hal.alloc(64)", "hal.fill_async(0, p + 60, 0, 5, None)", "inside one live block"),
    "size overflow": ("p = hal.alloc(64)", "hal.fill_async(0, p + 1, 0, (1 << 64) - 1, None)", "inside one live block"),
    "use after free": (
        "p = hal.alloc(64); hal.do.free(0, p)",
        "hal.copy_async(0, ctypes.addressof(buffer), p, 8, D2H, None)",
        "inside one live block",
    ),
    "alias": ("", "hal.malloc(0, 0, byref(ptr()))", "size is 0"),
    "after shutdown": ("hal.do.shutdown()", "hal.malloc(0, 64, byref(ptr()))", "before init() or after shutdown()"),
}

SCRIPT = """
hal = library.open('template')
buffer = ctypes.create_string_buffer(64)
{prepare}
status = {call}
print(STATUS[status], hal.message())
"""


@pytest.fixture(scope="module")
def skeleton(compiler):
    return str(compiler.shared(ROOT / "accelerator/_template/hal.cc", "libtemplate.so"))


@pytest.mark.parametrize("case", FINDINGS)
def test_finding(script, skeleton, case):
    prepare, call, words = FINDINGS[case]
    code = "from ctypes import *\n" + SCRIPT.format(prepare=prepare, call=call)
    result = script(code, FLAGOS_HAL_PATH=skeleton, FLAGOS_HAL_VALIDATE="1")
    assert result.returncode == 0, result.stderr
    status, _, message = result.stdout.strip().partition(" ")
    assert status in ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION")
    assert message.startswith("validate: ") and words in message


TWO_DEVICES = {
    "stream": ("s = hal.stream(0)", "hal.stream_sync(1, s)", "the stream belongs to device 0, the call names 1"),
    "event": ("e = hal.event(1)", "hal.event_query(0, e)", "the event belongs to device 1, the call names 0"),
    "record": ("e = hal.event(1); s = hal.stream(0)", "hal.event_record(1, e, s)", "the stream belongs to device 0"),
    "free": ("p = hal.alloc(64, 1)", "hal.free(0, p)", "belongs to device 1, the call names 0"),
    "fill": ("p = hal.alloc(64, 1)", "hal.fill_async(0, p, 0, 8, None)", "dst belongs to device 1"),
    "alias": ("", "hal.host_alias(ctypes.addressof(buffer), byref(ptr()))", "not inside live device memory"),
    "pitch": ("p = hal.alloc(64)", "hal.copy2d_async(0, p, 4, p, 8, 8, 2, D2D, None)", "a pitch is below the width"),
    "peer": ("", "hal.enable_peer(0, 2)", "device 2 does not exist"),
}


@pytest.mark.parametrize("case", TWO_DEVICES)
def test_finding_with_two_devices(script, case):
    prepare, call, words = TWO_DEVICES[case]
    code = "from ctypes import *\n" + SCRIPT.format(prepare=prepare, call=call).replace("'template'", "'host'")
    result = script(code, FLAGOS_HAL_VALIDATE="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("INVALID_ARGUMENT validate: ") and words in result.stdout


def test_a_cross_device_wait_is_allowed(script):
    code = "hal = library.open('host'); hal.do.stream_wait_event(0, hal.stream(0), hal.event(1))"
    assert script(code, FLAGOS_HAL_VALIDATE="1").returncode == 0


def test_leaks_are_reported_at_shutdown(script, skeleton):
    code = "hal = library.open('template'); hal.alloc(64); hal.stream(); hal.event(); hal.event(); hal.do.shutdown()"
    result = script(code, FLAGOS_HAL_PATH=skeleton, FLAGOS_HAL_VALIDATE="1")
    assert "validate: shutdown with 1 blocks, 1 streams and 2 events still live" in result.stderr


def test_no_leaks_no_report(script):
    code = "hal = library.open('host'); hal.do.free(0, hal.alloc(64)); hal.do.stream_destroy(0, hal.stream())"
    result = script(code + "; hal.do.shutdown()", FLAGOS_HAL_VALIDATE="1")
    assert result.returncode == 0 and result.stderr == ""


def test_native_handle_is_the_chips_own(script):
    code = """
from ctypes import *
hal = library.open('host')
s, native = hal.stream(), c_void_p()
hal.do.stream_native_handle(0, s, byref(native))
assert native.value != s
"""
    assert script(code, FLAGOS_HAL_VALIDATE="1").returncode == 0


def test_a_failed_free_keeps_the_block(script):
    code = """
hal = library.open('host')
p = hal.alloc(64)
library.set_fail('free@1=INTERNAL')
assert hal.free(0, p) == INTERNAL
assert hal.free(0, p) == OK
"""
    result = script(code, FLAGOS_HAL_VALIDATE="1")
    assert result.returncode == 0, result.stderr


def test_missing_entries_stay_missing(script, skeleton):
    code = "hal = library.open('template'); assert not hal.has('host_alias') and not hal.has('stream_host_func')"
    assert script(code, FLAGOS_HAL_PATH=skeleton, FLAGOS_HAL_VALIDATE="1").returncode == 0


def test_malformed_switch(script):
    result = script("library.open('host')", FLAGOS_HAL_VALIDATE="maybe")
    assert result.returncode == 1 and "FLAGOS_HAL_VALIDATE=maybe" in result.stderr


def test_host_chip_conforms_behind_the_interposer(library):
    tests = sorted(str(p) for p in HERE.glob("test_conform_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hal-lib", library.path, *tests]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLAGOS_")}
    result = subprocess.run(
        command, env={**environment, "FLAGOS_HAL_VALIDATE": "1"}, capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout[-3000:]
