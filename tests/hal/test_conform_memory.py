"""Every chip: device memory, pinned memory, pointers, copies and fills."""

import ctypes
import os
from ctypes import byref, c_void_p
from itertools import pairwise

import pytest
from hal_abi import D2D, D2H, DEVICE, H2D, H2H, INVALID_ARGUMENT, OK, OUT_OF_MEMORY, PINNED, UNKNOWN, PointerInfo


@pytest.fixture
def block(hal):
    p = hal.alloc(4096)
    yield p
    hal.do.device_sync(0)
    hal.do.free(0, p)


@pytest.mark.parametrize("size", [1, 63, 512, 4095, 4096, 4097, 1 << 20, (1 << 21) + 1])
def test_malloc_sizes_and_alignment(hal, size):
    p = hal.alloc(size)
    assert p and p % hal.info().malloc_alignment == 0
    info = hal.pointer(p + size - 1)
    assert (info.kind, info.device, info.base, info.size) == (DEVICE, 0, p, size)
    hal.write(p, b"\x5a" * size)
    assert hal.read(p, size) == b"\x5a" * size
    assert hal.free(0, p) == OK


def test_malloc_of_nothing(hal):
    p = c_void_p(77)
    assert hal.malloc(0, 0, byref(p)) == INVALID_ARGUMENT and p.value == 77
    assert hal.malloc(0, 64, None) == INVALID_ARGUMENT


@pytest.mark.parametrize("size", [1 << 50, (1 << 63) - 1, (1 << 64) - 1])
def test_malloc_too_large(hal, size):
    p = c_void_p(77)
    assert hal.malloc(0, size, byref(p)) == OUT_OF_MEMORY and p.value == 77
    assert hal.message()
    assert hal.last_error(0) == OK, "a reported failure is not reported again"
    assert hal.free(0, hal.alloc(64)) == OK, "the device is usable afterwards"


def test_blocks_do_not_overlap(hal):
    blocks = sorted(hal.alloc(1000) for _ in range(100))
    assert all(b - a >= 1000 for a, b in pairwise(blocks))
    for p in blocks:
        hal.do.free(0, p)


def test_free_of_null(hal):
    assert hal.free(0, None) == OK


def test_free_twice(hal):
    p = hal.alloc(256)
    assert hal.free(0, p) == OK
    assert hal.free(0, p) == INVALID_ARGUMENT
    assert hal.message()


def test_free_of_foreign_memory(hal):
    buffer = ctypes.create_string_buffer(64)
    assert hal.free(0, ctypes.addressof(buffer)) == INVALID_ARGUMENT


def test_free_of_an_interior_pointer(hal, block):
    assert hal.free(0, block + 64) == INVALID_ARGUMENT
    hal.write(block, b"still here")
    assert hal.read(block, 10) == b"still here"


@pytest.mark.devices(2)
def test_free_on_the_wrong_device(hal, block):
    assert hal.free(1, block) == INVALID_ARGUMENT


def test_memory_is_given_back(hal):
    hal.do.device_sync(0)
    size = 64 << 20
    before, _ = hal.memory()
    p = hal.alloc(size)
    during, _ = hal.memory()
    hal.do.free(0, p)
    after, _ = hal.memory()
    assert before - during >= size // 2 and after >= before - size // 4


@pytest.mark.devices(2)
def test_devices_have_their_own_memory(hal):
    a, b = hal.alloc(64, 0), hal.alloc(64, 1)
    assert hal.pointer(a).device == 0 and hal.pointer(b).device == 1
    hal.do.free(0, a)
    hal.do.free(1, b)


def test_pointer_info_of_host_memory(hal):
    buffer = ctypes.create_string_buffer(64)
    info = hal.pointer(ctypes.addressof(buffer))
    assert (info.kind, info.device, info.base, info.size) == (UNKNOWN, -1, None, 0)
    assert hal.pointer(None).kind == UNKNOWN


def test_pointer_info_of_freed_memory(hal):
    p = hal.alloc(1 << 22)
    hal.do.free(0, p)
    assert hal.pointer(p).kind == UNKNOWN


def test_pointer_info_of_an_older_caller(hal, block):
    info = PointerInfo(struct_size=PointerInfo.base.offset, base=77)
    assert hal.pointer_info(block, byref(info)) == OK
    assert (info.kind, info.device, info.base) == (DEVICE, 0, 77)


@pytest.mark.needs("pinned")
def test_pinned_memory(hal):
    p = hal.pinned(5000)
    info = hal.pointer(p + 4999)
    assert (info.kind, info.device, info.base, info.size) == (PINNED, -1, p, 5000)
    ctypes.memset(p, 7, 5000)
    d = hal.alloc(5000)
    hal.do.copy_async(0, d, p, 5000, H2D, None)
    hal.do.stream_sync(0, None)
    ctypes.memset(p, 0, 5000)
    hal.do.copy_async(0, p, d, 5000, D2H, None)
    hal.do.stream_sync(0, None)
    assert ctypes.string_at(p, 5000) == b"\x07" * 5000
    hal.do.free(0, d)
    assert hal.host_free(p) == OK
    assert hal.pointer(p).kind == UNKNOWN


@pytest.mark.needs("pinned")
def test_pinned_errors(hal):
    p = c_void_p(77)
    assert hal.host_malloc(0, byref(p)) == INVALID_ARGUMENT and p.value == 77
    assert hal.host_malloc(64, None) == INVALID_ARGUMENT
    assert hal.host_malloc(1 << 60, byref(p)) == OUT_OF_MEMORY and p.value == 77
    assert hal.host_free(None) == OK
    buffer = ctypes.create_string_buffer(64)
    assert hal.host_free(ctypes.addressof(buffer)) == INVALID_ARGUMENT
    q = hal.pinned(64)
    assert hal.host_free(q) == OK and hal.host_free(q) == INVALID_ARGUMENT


@pytest.mark.needs("pinned")
def test_pinned_and_device_memory_are_freed_by_their_own_entry(hal, block):
    p = hal.pinned(64)
    assert hal.free(0, p) == INVALID_ARGUMENT
    assert hal.host_free(block) == INVALID_ARGUMENT
    hal.do.host_free(p)


@pytest.mark.needs("alias")
def test_host_alias_sees_the_same_bytes(hal, block):
    a, b = c_void_p(), c_void_p()
    hal.do.host_alias(block, byref(a))
    hal.do.host_alias(block + 100, byref(b))
    assert b.value - a.value == 100
    hal.write(block, b"through the device")
    assert ctypes.string_at(a.value, 18) == b"through the device"
    ctypes.memmove(a.value, b"through the alias!", 18)
    assert hal.read(block, 18) == b"through the alias!"


@pytest.mark.needs("alias")
def test_host_alias_errors(hal, block):
    buffer = ctypes.create_string_buffer(8)
    out = c_void_p(77)
    assert hal.host_alias(ctypes.addressof(buffer), byref(out)) == INVALID_ARGUMENT and out.value == 77
    assert hal.host_alias(block, None) == INVALID_ARGUMENT


@pytest.mark.parametrize("n", [1, 3, 4096, 1 << 20, 5_000_001])
def test_copies_round_trip(hal, n):
    data = os.urandom(n)
    a, b = hal.alloc(n), hal.alloc(n)
    hal.write(a, data)
    hal.do.copy_async(0, b, a, n, D2D, None)
    assert hal.read(b, n) == data
    hal.do.free(0, a)
    hal.do.free(0, b)


def test_copy_host_to_host_in_stream_order(hal):
    a, b = ctypes.create_string_buffer(b"abc", 4), ctypes.create_string_buffer(4)
    hal.do.copy_async(0, ctypes.addressof(b), ctypes.addressof(a), 4, H2H, None)
    hal.do.stream_sync(0, None)
    assert b.value == b"abc"


@pytest.mark.devices(2)
def test_copy_between_devices(hal):
    a, b = hal.alloc(100, 0), hal.alloc(100, 1)
    hal.write(a, b"x" * 100)
    for device in (0, 1):  # either device may carry it out
        hal.do.fill_async(1, b, 0, 100, None)
        hal.do.stream_sync(1, None)
        hal.do.copy_async(device, b, a, 100, D2D, None)
        hal.do.stream_sync(device, None)
        assert hal.read(b, 100, 1) == b"x" * 100
    hal.do.free(0, a)
    hal.do.free(1, b)


def test_interior_pointers(hal, block):
    hal.do.fill_async(0, block, 0, 4096, None)
    hal.write(block + 100, b"inside")
    assert hal.read(block + 98, 10) == b"\0\0inside\0\0"


def test_copy_of_nothing(hal, block):
    hal.write(block, b"keep")
    for kind in (H2D, D2H, D2D, H2H):
        assert hal.copy_async(0, None, None, 0, kind, None) == OK
    assert hal.fill_async(0, None, 1, 0, None) == OK
    assert hal.read(block, 4) == b"keep"


@pytest.mark.parametrize("kind", [0, 5, -1, 1000])
def test_copy_kind_that_does_not_exist(hal, block, kind):
    buffer = ctypes.create_string_buffer(64)
    assert hal.copy_async(0, block, ctypes.addressof(buffer), 64, kind, None) == INVALID_ARGUMENT
    assert str(kind) in hal.message() or "kind" in hal.message()


@pytest.mark.parametrize("side", ["dst", "src"])
def test_copy_with_null(hal, block, side):
    arguments = (None, block) if side == "dst" else (block, None)
    assert hal.copy_async(0, *arguments, 64, D2D, None) == INVALID_ARGUMENT


@pytest.mark.needs("ranges")
@pytest.mark.parametrize(
    ("kind", "device_dst", "device_src"),
    [
        (H2D, False, False),
        (H2D, True, True),
        (D2H, True, True),
        (D2H, False, False),
        (D2D, True, False),
        (H2H, True, False),
    ],
)
def test_copy_kind_that_contradicts_the_pointers(hal, block, kind, device_dst, device_src):
    buffer = ctypes.create_string_buffer(64)
    address = ctypes.addressof(buffer)
    dst, src = block if device_dst else address, block if device_src else address
    assert hal.copy_async(0, dst, src, 64, kind, None) == INVALID_ARGUMENT
    assert "memory" in hal.message()


@pytest.mark.needs("ranges")
def test_ranges_outside_a_block(hal, block):
    buffer = ctypes.create_string_buffer(8192)
    address = ctypes.addressof(buffer)
    assert hal.copy_async(0, block, address, 4097, H2D, None) == INVALID_ARGUMENT
    assert hal.copy_async(0, address, block + 1, 4096, D2H, None) == INVALID_ARGUMENT
    assert hal.fill_async(0, block + 4096, 0, 1, None) == INVALID_ARGUMENT
    assert hal.fill_async(0, block, 0, (1 << 64) - 1, None) == INVALID_ARGUMENT
    assert hal.fill_async(0, block, 0, 4096, None) == OK


@pytest.mark.needs("ranges")
def test_use_of_freed_memory(hal):
    p = hal.alloc(64)
    hal.do.free(0, p)
    assert hal.fill_async(0, p, 0, 64, None) == INVALID_ARGUMENT


@pytest.mark.needs("ranges")
@pytest.mark.devices(2)
def test_copy_on_the_wrong_device(hal, block):
    buffer = ctypes.create_string_buffer(64)
    assert hal.copy_async(1, block, ctypes.addressof(buffer), 64, H2D, None) == INVALID_ARGUMENT
    assert hal.fill_async(1, block, 0, 64, None) == INVALID_ARGUMENT


@pytest.mark.parametrize("value", [0, 1, 0x7F, 0xFF, 0x1A5, -1])
def test_fill_uses_the_low_byte(hal, block, value):
    hal.do.fill_async(0, block, value, 4096, None)
    assert hal.read(block, 4096) == bytes([value & 0xFF]) * 4096


def test_fill_of_a_part(hal, block):
    hal.do.fill_async(0, block, 1, 100, None)
    hal.do.fill_async(0, block + 10, 2, 5, None)
    assert hal.read(block, 100) == b"\1" * 10 + b"\2" * 5 + b"\1" * 85


def test_fill_of_null(hal):
    assert hal.fill_async(0, None, 0, 8, None) == INVALID_ARGUMENT


@pytest.mark.needs("copy2d")
def test_copy2d(hal, block):
    host = ctypes.create_string_buffer(bytes(range(64)), 64)
    hal.do.fill_async(0, block, 0, 4096, None)
    hal.do.copy2d_async(0, block, 32, ctypes.addressof(host), 16, 10, 4, H2D, None)  # 4 rows of 10, pitch 16 -> 32
    data = hal.read(block, 128)
    for row in range(4):
        assert data[row * 32 : row * 32 + 10] == bytes(range(row * 16, row * 16 + 10))
        assert data[row * 32 + 10 : row * 32 + 32] == b"\0" * 22


@pytest.mark.needs("copy2d")
def test_copy2d_errors(hal, block):
    host = ctypes.create_string_buffer(4096)
    address = ctypes.addressof(host)
    assert hal.copy2d_async(0, block, 8, address, 16, 10, 4, H2D, None) == INVALID_ARGUMENT
    assert hal.copy2d_async(0, block, 16, address, 8, 10, 4, H2D, None) == INVALID_ARGUMENT
    assert hal.copy2d_async(0, block, 16, address, 16, 10, 4, 9, None) == INVALID_ARGUMENT
    assert hal.copy2d_async(0, block, 16, address, 16, 0, 4, H2D, None) == OK
    assert hal.copy2d_async(0, block, 16, address, 16, 10, 0, H2D, None) == OK


@pytest.mark.needs("copy2d", "ranges")
def test_copy2d_ranges(hal, block):
    host = ctypes.create_string_buffer(1 << 16)
    assert hal.copy2d_async(0, block, 1024, ctypes.addressof(host), 1024, 1024, 5, H2D, None) == INVALID_ARGUMENT
    huge = 1 << 62
    assert hal.copy2d_async(0, block, huge, ctypes.addressof(host), huge, 1024, 64, H2D, None) == INVALID_ARGUMENT
