"""The C ABI of include/flagos.h for Python: structures, signatures, and a thin wrapper around a chip's table."""

import ctypes
from ctypes import POINTER, byref, c_char, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint16, c_uint32, c_uint64
from ctypes import c_void_p as ptr
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

STATUS = (
    "OK INVALID_ARGUMENT OUT_OF_MEMORY NOT_FOUND UNAVAILABLE UNSUPPORTED NOT_READY FAILED_PRECONDITION TIMEOUT "
    "DEVICE_LOST INTERNAL"
).split()
(
    OK,
    INVALID_ARGUMENT,
    OUT_OF_MEMORY,
    NOT_FOUND,
    UNAVAILABLE,
    UNSUPPORTED,
    NOT_READY,
    FAILED_PRECONDITION,
    TIMEOUT,
    DEVICE_LOST,
    INTERNAL,
) = range(11)
H2D, D2H, D2D, H2H = 1, 2, 3, 4
UNKNOWN, DEVICE, PINNED = 0, 1, 2
TIMING = 1
GRAPH = 1
HostFn = ctypes.CFUNCTYPE(None, ptr)


class DeviceInfo(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("multi_processor_count", c_int32),
        ("name", c_char * 128),
        ("arch", c_char * 32),
        ("driver_version", c_char * 32),
        ("runtime_version", c_char * 32),
        ("total_memory", c_uint64),
        ("major", c_int32),
        ("minor", c_int32),
        ("warp_size", c_int32),
        ("max_threads_per_multi_processor", c_int32),
        ("malloc_alignment", c_uint64),
    ]


class PointerInfo(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("kind", c_int32),
        ("device", c_int32),
        ("reserved", c_int32),
        ("base", ptr),
        ("size", c_uint64),
    ]


class Extension(ctypes.Structure):
    pass


Extension._fields_ = [("struct_size", c_uint32), ("type", c_uint32), ("next", POINTER(Extension))]

ENTRIES = {
    "probe": [],
    "init": [],
    "shutdown": [],
    "last_message": [],
    "device_count": [POINTER(c_int32)],
    "device_info": [c_int32, POINTER(DeviceInfo)],
    "mem_info": [c_int32, POINTER(c_uint64), POINTER(c_uint64)],
    "malloc": [c_int32, c_uint64, POINTER(ptr)],
    "free": [c_int32, ptr],
    "host_malloc": [c_uint64, POINTER(ptr)],
    "host_free": [ptr],
    "pointer_info": [ptr, POINTER(PointerInfo)],
    "host_alias": [ptr, POINTER(ptr)],
    "copy_async": [c_int32, ptr, ptr, c_uint64, c_int32, ptr],
    "copy2d_async": [c_int32, ptr, c_uint64, ptr, c_uint64, c_uint64, c_uint64, c_int32, ptr],
    "fill_async": [c_int32, ptr, c_int32, c_uint64, ptr],
    "stream_create": [c_int32, c_int32, POINTER(ptr)],
    "stream_destroy": [c_int32, ptr],
    "stream_sync": [c_int32, ptr],
    "stream_query": [c_int32, ptr],
    "stream_native_handle": [c_int32, ptr, POINTER(ptr)],
    "stream_priority_range": [c_int32, POINTER(c_int32), POINTER(c_int32)],
    "stream_host_func": [c_int32, ptr, HostFn, ptr],
    "event_create": [c_int32, c_uint32, POINTER(ptr)],
    "event_destroy": [c_int32, ptr],
    "event_record": [c_int32, ptr, ptr],
    "event_sync": [c_int32, ptr],
    "event_query": [c_int32, ptr],
    "event_elapsed_ms": [c_int32, ptr, ptr, POINTER(c_float)],
    "stream_wait_event": [c_int32, ptr, ptr],
    "device_sync": [c_int32],
    "can_access_peer": [c_int32, c_int32, POINTER(c_int32)],
    "enable_peer": [c_int32, c_int32],
    "last_error": [c_int32],
}
# Entries that act on a device, with arguments that are valid in number and type; used to try each one wrongly.
DEVICE_ENTRIES = [name for name, types in ENTRIES.items() if types and types[0] is c_int32]


class Table(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("abi_major", c_uint16),
        ("abi_minor", c_uint16),
        ("name", c_char_p),
        ("vendor", c_char_p),
        *[(name, ptr) for name in ENTRIES],
        ("extensions", POINTER(Extension)),
    ]


class HalError(Exception):
    """A call that had to succeed did not."""


class Library:
    """libflagos.so."""

    def __init__(self, path):
        self.path = str(path)
        self.dll = dll = ctypes.CDLL(self.path)
        dll.flagos_open.argtypes = [c_char_p, POINTER(POINTER(Table))]
        dll.flagos_choose.argtypes = [c_char_p, ctypes.c_char_p, c_size_t]
        dll.flagos_chip_name.restype = c_char_p
        dll.flagos_chip_report.argtypes = [c_char_p, c_char_p, c_size_t]
        dll.flagos_chip_report.restype = c_size_t
        dll.flagos_status_name.restype = c_char_p
        dll.flagos_last_message.restype = c_char_p
        dll.flagos_env.argtypes = [c_char_p]
        dll.flagos_env.restype = c_char_p
        dll.flagos_sim_set_fail.argtypes = [c_char_p]
        dll.flagos_sim_calls.argtypes = [c_char_p]
        dll.flagos_sim_calls.restype = c_uint64
        dll.flagos_sim_set_chaos.argtypes = [c_uint64]
        dll.flagos_sim_set_chaos.restype = None
        dll.flagos_sim_live.argtypes = [c_int, POINTER(c_uint64), POINTER(c_uint64)]

    def message(self):
        return self.dll.flagos_last_message().decode()

    def open(self, name=None):
        table = POINTER(Table)()
        status = self.dll.flagos_open(name.encode() if name else None, byref(table))
        if status != OK:
            raise HalError(f"{STATUS[status]}: {self.message()}")
        return Hal(table.contents)

    def choose(self, name=None):
        """(status, chip name or message)"""
        buffer = ctypes.create_string_buffer(64)
        status = self.dll.flagos_choose(name.encode() if name else None, buffer, 64)
        return status, buffer.value.decode() if status == OK else self.message()

    def chips(self):
        return [self.dll.flagos_chip_name(i).decode() for i in range(self.dll.flagos_chip_count())]

    def report(self, name=None):
        name = name.encode() if name else None
        buffer = ctypes.create_string_buffer(self.dll.flagos_chip_report(name, None, 0) + 1)
        self.dll.flagos_chip_report(name, buffer, len(buffer))
        return buffer.value.decode()

    def set_fail(self, plan):
        return self.dll.flagos_sim_set_fail(plan.encode() if plan is not None else None)

    def calls(self, entry):
        return self.dll.flagos_sim_calls(entry.encode())

    def live(self, device):
        blocks, size = c_uint64(), c_uint64()
        if self.dll.flagos_sim_live(device, byref(blocks), byref(size)) != OK:
            raise HalError(self.message())
        return blocks.value, size.value


class Hal:
    """A chip's table. hal.malloc(...) is the raw entry and returns a status; hal.do.malloc(...) must succeed; the
    lower-case helpers without a C name (alloc, stream, read, ...) are for tests that are about something else."""

    def __init__(self, table):
        self.table = table
        self.name = table.name.decode()
        self.vendor = table.vendor.decode()
        for name, types in ENTRIES.items():
            address = getattr(table, name)
            result = c_char_p if name == "last_message" else c_int
            setattr(self, name, ctypes.CFUNCTYPE(result, *types)(address) if address else None)
        self.do = Checked(self)

    def message(self):
        return self.last_message().decode()

    def has(self, entry):
        return getattr(self, entry) is not None

    def extensions(self):
        found, item = [], self.table.extensions
        while item:
            found.append(item.contents.type)
            item = item.contents.next
        return found

    def count(self):
        value = c_int32()
        self.do.device_count(byref(value))
        return value.value

    def info(self, device=0):
        info = DeviceInfo(struct_size=ctypes.sizeof(DeviceInfo))
        self.do.device_info(device, byref(info))
        return info

    def memory(self, device=0):
        free, total = c_uint64(), c_uint64()
        self.do.mem_info(device, byref(free), byref(total))
        return free.value, total.value

    def alloc(self, size, device=0):
        p = ptr()
        self.do.malloc(device, size, byref(p))
        return p.value

    def pinned(self, size):
        p = ptr()
        self.do.host_malloc(size, byref(p))
        return p.value

    def pointer(self, p):
        info = PointerInfo(struct_size=ctypes.sizeof(PointerInfo))
        self.do.pointer_info(p, byref(info))
        return info

    def stream(self, device=0, priority=0):
        p = ptr()
        self.do.stream_create(device, priority, byref(p))
        return p.value

    def event(self, device=0, flags=0):
        p = ptr()
        self.do.event_create(device, flags, byref(p))
        return p.value

    def write(self, dst, data, device=0, stream=None):
        buffer = ctypes.create_string_buffer(bytes(data), len(data))
        self.do.copy_async(device, dst, ctypes.addressof(buffer), len(data), H2D, stream)
        self.do.stream_sync(device, stream)

    def read(self, src, n, device=0, stream=None):
        buffer = ctypes.create_string_buffer(n)
        self.do.copy_async(device, ctypes.addressof(buffer), src, n, D2H, stream)
        self.do.stream_sync(device, stream)
        return buffer.raw


class Checked:
    def __init__(self, hal):
        self._hal = hal

    def __getattr__(self, name):
        entry = getattr(self._hal, name)

        def call(*arguments):
            status = entry(*arguments)
            if status != OK:
                raise HalError(f"{name}: {STATUS[status]}: {self._hal.message()}")

        return call
