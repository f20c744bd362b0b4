"""Every chip: the table itself, opening, devices, memory figures, messages."""

import ctypes
from ctypes import byref, c_int32, c_uint64

import hal_chips as chips
import pytest
from hal_abi import (
    DEVICE_ENTRIES,
    ENTRIES,
    INVALID_ARGUMENT,
    NOT_FOUND,
    OK,
    UNSUPPORTED,
    DeviceInfo,
    HostFn,
    PointerInfo,
    Table,
)

OPTIONAL = {
    "host_malloc",
    "host_free",
    "host_alias",
    "copy2d_async",
    "stream_priority_range",
    "stream_host_func",
    "can_access_peer",
    "enable_peer",
}


def valid_arguments(entry, device):
    """Arguments of the right types; pointers are NULL, which no test here gets as far as using."""
    arguments = [device]
    for kind in ENTRIES[entry][1:]:
        arguments.append(HostFn() if kind is HostFn else 0 if kind in (c_int32, ctypes.c_uint32, c_uint64) else None)
    return arguments


def test_table_header(hal, chip):
    assert hal.table.abi_major == 1
    assert hal.table.struct_size >= ctypes.sizeof(Table)
    assert hal.name == chip and hal.vendor


@pytest.mark.parametrize("entry", sorted(set(ENTRIES) - OPTIONAL))
def test_required_entry_is_present(hal, entry):
    assert hal.has(entry)


@pytest.mark.parametrize("tag", [tag for tag, detect in chips.TAGS.items() if detect])
def test_unsupported_list_is_true(opened, chip, tag):
    listed = tag in chips.UNSUPPORTED.get(chip, {})
    assert chips.TAGS[tag](opened) != listed, "tests/hal/hal_chips.py is wrong about this capability"


def test_unsupported_entries_have_reasons():
    for chip, tags in chips.UNSUPPORTED.items():
        assert set(tags) <= set(chips.TAGS), chip
        assert all(reason.strip() for reason in tags.values())
    assert all(reason.strip() for reason in chips.EXPECTED_FAILURES.values())


def test_pinned_entries_come_together(hal):
    assert hal.has("host_malloc") == hal.has("host_free")


def test_extension_chain_ends(hal):
    types = hal.extensions()
    assert len(types) == len(set(types)) < 100


def test_probe_of_an_open_chip(hal):
    assert hal.probe() == OK


def test_init_again_has_no_effect(hal):
    p = hal.alloc(64)
    assert hal.init() == OK
    assert hal.free(0, p) == OK


def test_device_count(hal):
    assert hal.count() >= 1
    assert hal.device_count(None) == INVALID_ARGUMENT


def test_device_info(hal):
    for device in range(hal.count()):
        info = hal.info(device)
        assert info.name and info.multi_processor_count > 0 and info.warp_size > 0
        assert info.total_memory >= 1 << 20
        assert info.malloc_alignment >= 64 and info.malloc_alignment & (info.malloc_alignment - 1) == 0


def test_device_info_of_an_older_caller(hal):
    """A caller whose structure is shorter gets the fields it knows and nothing beyond them."""
    info = DeviceInfo(struct_size=DeviceInfo.arch.offset, arch=b"untouched")
    assert hal.device_info(0, byref(info)) == OK
    assert info.name == hal.info().name and info.arch == b"untouched"
    assert info.struct_size == DeviceInfo.arch.offset


def test_device_info_without_struct_size(hal):
    assert hal.device_info(0, byref(DeviceInfo())) == INVALID_ARGUMENT
    assert hal.device_info(0, None) == INVALID_ARGUMENT


def test_pointer_info_without_struct_size(hal):
    assert hal.pointer_info(None, byref(PointerInfo())) == INVALID_ARGUMENT
    assert hal.pointer_info(None, None) == INVALID_ARGUMENT


def test_memory_figures(hal):
    free, total = hal.memory()
    assert 0 < free <= total
    assert total <= hal.info().total_memory * 1.01


def test_memory_figures_need_outputs(hal):
    value = c_uint64()
    assert hal.mem_info(0, None, byref(value)) == INVALID_ARGUMENT
    assert hal.mem_info(0, byref(value), None) == INVALID_ARGUMENT


@pytest.mark.parametrize("entry", DEVICE_ENTRIES)
@pytest.mark.parametrize("index", ["negative", "too large"])
def test_wrong_device_index(hal, entry, index):
    if not hal.has(entry):
        pytest.skip(f"{entry} is NULL in this table")
    device = -1 if index == "negative" else hal.count()
    assert getattr(hal, entry)(*valid_arguments(entry, device)) == INVALID_ARGUMENT
    assert str(device) in hal.message() and entry in hal.message()


def test_message_is_per_thread(hal):
    import threading

    assert hal.malloc(0, 0, byref(ctypes.c_void_p())) == INVALID_ARGUMENT
    mine = hal.message()
    seen = []

    def other():
        seen.append(hal.message())
        hal.stream_sync(-7, None)
        seen.append(hal.message())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen[0] == "" and "-7" in seen[1]
    assert hal.message() == mine and mine


def test_device_sync(hal):
    for device in range(hal.count()):
        assert hal.device_sync(device) == OK


def test_last_error_is_clean(hal):
    for device in range(hal.count()):
        assert hal.last_error(device) == OK


@pytest.mark.needs("peer")
@pytest.mark.devices(2)
def test_peer_access(hal):
    can = c_int32(-1)
    assert hal.can_access_peer(0, 1, byref(can)) == OK and can.value in (0, 1)
    expected = (OK,) if can.value else (UNSUPPORTED, INVALID_ARGUMENT)
    assert hal.enable_peer(0, 1) in expected
    assert hal.enable_peer(0, 1) in expected, "enabling twice is not an error"


@pytest.mark.needs("peer")
def test_peer_errors(hal):
    can = c_int32(-1)
    assert hal.can_access_peer(0, hal.count(), byref(can)) == INVALID_ARGUMENT and can.value == -1
    assert hal.can_access_peer(0, 0, None) == INVALID_ARGUMENT
    assert hal.enable_peer(0, -1) == INVALID_ARGUMENT
    assert hal.enable_peer(0, 0) == INVALID_ARGUMENT
    assert hal.can_access_peer(0, 0, byref(can)) == OK and can.value == 0


@pytest.mark.needs("handles")
def test_invented_handles_are_not_found(hal):
    for value in (0x1, 0xDEADBEEF, 0x7FFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF):
        assert hal.stream_sync(0, value) == NOT_FOUND
        assert hal.event_query(0, value) == NOT_FOUND
