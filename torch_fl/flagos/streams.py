"""Streams and events: torch.Stream and torch.Event, bound to the device flagos."""

import ctypes

import torch

from torch_fl import _C
from torch_fl.flagos._device import _checked_index
from torch_fl.flagos._device import device as device_guard
from torch_fl.flagos.graphs import _cuda_stream


class Stream(torch.Stream):
    """A queue of work on one device. A lower priority number is more urgent; it is clamped to the chip's range."""

    def __new__(cls, device=None, priority: int = 0, **ids):
        if ids:  # stream_id, device_index, device_type: a handle on a stream that exists
            return super().__new__(cls, **ids)
        return super().__new__(cls, torch.device("flagos", _checked_index(device)), priority=priority)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """(least urgent, most urgent) priority."""
        return _C._stream_priority_range()

    @property
    def priority(self) -> int:
        """What the stream was made with, within the chip's range."""
        return _cuda_stream(self).priority if _C._chip() == "cuda" else _C._hal_stream_priority(self.stream_id)

    @property
    def cuda_stream(self) -> int:
        """The native handle on the chip cuda, for code that takes one of torch.cuda's streams."""
        if _C._chip() != "cuda":
            raise AttributeError(f"a stream of the chip {_C._chip()} is no cuda_stream; native_handle is its own")
        return self._native_handle()

    def record_event(self, event=None):
        """Records an event behind the work queued so far; makes one when none is given."""
        if event is None:
            event = Event()
        event.record(self)
        return event

    def wait_event(self, event) -> None:
        """Later work on this stream waits for the event."""
        event.wait(self)

    def wait_stream(self, stream) -> None:
        """Later work on this stream waits for what is queued on the other one now."""
        self.wait_event(stream.record_event())

    def _native_handle(self) -> int:
        return _C._stream_native_handle(self.stream_id, self.device_index, self.device_type)

    @property
    def _as_parameter_(self):
        return ctypes.c_void_p(self._native_handle())

    def __eq__(self, other):
        return isinstance(other, torch.Stream) and super().__eq__(other)

    def __hash__(self):
        return super().__hash__()

    def __repr__(self):
        return f"torch.flagos.Stream(device={self.device} stream_id={self.stream_id})"


class ExternalStream(Stream):
    """A stream made outside torch, by its native handle. Whoever made it keeps it alive."""

    def __new__(cls, stream_ptr: int, device=None, **ids):
        if ids:
            return super().__new__(cls, **ids)
        return super().__new__(cls, **_ids(_C._external_stream(stream_ptr, _checked_index(device))))


class _EventType(type):
    def __instancecheck__(cls, obj):
        return isinstance(obj, torch.Event) and obj.device.type == "flagos"

    def __getattr__(cls, name):  # Event.record and the like, unbound
        return getattr(torch.Event, name)


class Event(metaclass=_EventType):
    """A point in the work of a stream, to wait for, or (with enable_timing) to measure from.

    Makes torch.Event objects: torch.Event.elapsed_time and torch.Stream.wait_event refuse those of a subclass.
    """

    def __new__(
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ):
        if interprocess:
            raise NotImplementedError("flagos events cannot be shared between processes; pass interprocess=False")
        if external:
            raise NotImplementedError("flagos events are not recorded outside of graphs; pass external=False")
        return torch.Event("flagos", enable_timing=enable_timing, blocking=blocking)


def _ids(triple):
    stream_id, device_index, device_type = triple
    return {"stream_id": stream_id, "device_index": device_index, "device_type": device_type}


def current_stream(device=None) -> Stream:
    """The calling thread's current stream of a device."""
    return Stream(**_ids(_C._current_stream(_checked_index(device))))


def default_stream(device=None) -> Stream:
    """The stream that is current unless another one is chosen."""
    return Stream(**_ids(_C._default_stream(_checked_index(device))))


def set_stream(stream) -> None:
    """Makes a stream current, and its device with it. None changes nothing."""
    if stream is not None:
        torch._C._accelerator_setStream(stream)


def get_stream_from_external(data_ptr: int, device=None) -> ExternalStream:
    """A stream made outside torch, by its native handle."""
    return ExternalStream(data_ptr, device)


class StreamContext:
    """Makes a stream current inside a `with` block; None changes nothing."""

    def __init__(self, stream):
        self.stream = stream
        self._device = None
        self._previous = None

    def __enter__(self):
        if self.stream is None:
            return self
        self._device = device_guard(self.stream.device)
        self._device.__enter__()
        self._previous = current_stream(self.stream.device)
        set_stream(self.stream)
        return self

    def __exit__(self, *exception):
        if self.stream is None:
            return False
        set_stream(self._previous)
        self._device.__exit__(*exception)
        return False


def stream(stream) -> StreamContext:
    """Context manager that makes `stream` current."""
    return StreamContext(stream)


__all__ = [
    "Event",
    "ExternalStream",
    "Stream",
    "StreamContext",
    "current_stream",
    "default_stream",
    "get_stream_from_external",
    "set_stream",
    "stream",
]
