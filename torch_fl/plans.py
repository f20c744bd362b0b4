"""Launch plans: the second call of a FlagGems operator with some signature is recorded, later ones are replayed in C++.

Replays need no Python and no GIL. What is in a plan, what it is looked up by and what cannot have one is in
docs/flaggems.md. Here is the part that watches a call (csrc/aten/plan has the rest): the operators that run inside
it, through a dispatch mode, and the kernels that are launched, through Triton's launcher, the one point that every
launch of a compiled kernel passes.

    torch_fl.plans.counts()   per operator: hits, misses, plans, calls that cannot have a plan, by reason
    FLAGOS_PLAN=0             no plans; plans.use(False) at run time
    FLAGOS_PLAN_VERIFY=1      every replay is checked against the Python call; plans.verify(True) at run time
"""

import ctypes
import functools
import struct
import sys
import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_fl import _C

_TRITON = "3.6."  # the versions whose launcher is known
_BASE_ARGUMENTS = 4  # packed metadata, launch metadata, enter hook, exit hook: then the kernel's own
_TENSOR_MAP = 128  # bytes of a tensor map, and where it lies in the object that holds it

_thread = threading.local()  # .watch: the Watch of the call that this thread records
_state: dict[str, str] = {}  # "why": why there are no plans


def counts() -> dict[str, dict]:
    """What became of the calls of each operator that runs FlagGems' Python kernels."""
    return dict(_C._plan_counts())


def use(on: bool) -> bool:
    """Switches plans on or off for the process; returns how it was."""
    if on and "flag_gems" in sys.modules:  # kernels that were loaded while plans were off
        hook()
    return _C._set_plans(on)


def verify(on: bool) -> bool:
    """Checks every replay against the Python call, which costs more than no plans at all; returns how it was."""
    return _C._set_verifying_plans(on)


def clear() -> None:
    """Forgets every plan and every count."""
    _C._clear_plans()


def unavailable() -> str:
    """Why calls are not recorded in this process; '' when they are, or when no kernel has been loaded yet."""
    return _state.get("why", "")


# ---- watching a call -----------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Tells a recorder which operators run inside a call and which kernels it launches."""

    def __init__(self, recorder, device: int):
        super().__init__()
        self.recorder = recorder
        self.device = device
        torch.cuda.init()  # before it there are no generators, and flagos can run without it
        self.generator = torch.cuda.default_generators[device]
        self.random = self._random_state()
        self.outer = getattr(_thread, "watch", None)
        if self.outer is not None:  # an operator that a kernel calls on a flagos tensor of its own
            recorder.refuse("runs inside the recording of another call", again=True)
            self.outer.recorder.refuse("calls another operator of flagos")
        _thread.watch = self
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        _thread.watch = self.outer
        if self._random_state() != self.random:
            self.recorder.refuse("draws random numbers")

    def _random_state(self):
        return self.generator.initial_seed(), self.generator.get_offset()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = func._schema
        if _composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        self.recorder.operation(schema.name, schema.overload_name, args, kwargs, result)
        return result

    def launch(self, launcher, original, grid, stream, function, arguments):
        """A kernel is launched by this thread; `arguments` as the launcher takes them, metadata first."""
        recorder = self.recorder
        before = recorder.allocations()
        original(launcher, *grid, stream, function, *arguments)
        if grid[0] * grid[1] * grid[2] == 0 or recorder.refused():
            return
        signature = getattr(launcher, "flagos_signature", None)
        if signature is None:
            return recorder.refuse("its kernel was first launched before torch_fl looked at Triton")
        if stream != torch._C._cuda_getCurrentRawStream(self.device) or torch.cuda.current_device() != self.device:
            return recorder.refuse("launches on another stream or device than the call's")
        if launcher.profile_scratch_size > 0:
            return recorder.refuse("its kernel is being profiled")
        scratch = 0
        if launcher.global_scratch_size > 0:
            made = recorder.allocations()[len(before) :]
            if len(made) != 1:
                return recorder.refuse("its kernel has scratch memory of unknown origin")
            scratch = _aligned(made[0][0], launcher.global_scratch_align)
        (warps, ctas, shared), *_ = arguments[:_BASE_ARGUMENTS]
        try:
            parameters = list(_parameters(signature, launcher.flagos_tensor_maps, arguments[_BASE_ARGUMENTS:]))
        except (TypeError, ValueError, OverflowError, KeyError) as error:
            return recorder.refuse(f"its kernel has a parameter that is not understood ({error})")
        parameters += [_address(scratch), _address(0)]
        recorder.launch(
            function, grid, warps, ctas, shared, bool(launcher.launch_cooperative_grid), bool(launcher.launch_pdl),
            parameters,
        )  # fmt: skip


@functools.cache
def _composite(func) -> bool:
    """Whether torch composes it of other operators, which this mode then sees one by one."""
    name = func._schema.name + ("." + func._schema.overload_name if func._schema.overload_name else "")
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd") and not any(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CUDA", "CompositeExplicitAutograd")
    )


def _begin(recorder, device: int):
    """Called by C++ before a call that it wants to have recorded; what comes back is called after it."""
    return Watch(recorder, device).end


# ---- parameters of a compiled kernel -------------------------------------------------------------------------------

_INTEGERS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I"}
_INTEGERS["u64"] = "Q"


def _aligned(address: int, alignment: int) -> int:
    return (address + alignment - 1) // alignment * alignment


def _address(value) -> tuple[bytes, str, int]:
    if value is None:
        value = 0
    elif not isinstance(value, int):
        value = value.data_ptr()
    return struct.pack("<Q", value), "address", 0


def _number(kind: str, value) -> bytes:
    """A number as the launcher's C code packs it."""
    if kind in _INTEGERS:
        return struct.pack("<" + _INTEGERS[kind], int(value))
    if kind in ("fp32", "f32"):
        return bytes(ctypes.c_float(value))
    if kind == "fp64":
        return struct.pack("<d", value)
    if kind == "fp16":
        return struct.pack("<e", value)
    if kind == "bf16":
        return bytes(ctypes.c_float(value))[2:]
    raise TypeError(f"of type {kind}")


def _parameters(signature, tensor_maps, arguments):
    """(bytes, kind, address) per parameter of the compiled function, in its order."""
    tensor_maps = iter(tensor_maps or ())
    for kind, value in zip(signature.values(), arguments, strict=True):
        if isinstance(kind, str) and kind.startswith("tensordesc"):
            yield from _descriptor(value, next(tensor_maps, None))
        else:
            yield from _plain(kind, value)


def _plain(kind, value):
    if isinstance(kind, tuple):
        for inner, item in zip(kind, value, strict=True):
            yield from _plain(inner, item)
    elif kind == "constexpr":
        return
    elif kind.startswith("*"):
        yield _address(value)
    else:
        yield _number(kind, value), "", 0


def _descriptor(value, tensor_map):
    """A tensor descriptor: a tensor map, shape, strides; without the copy engine an address and both of them twice."""
    from triton.backends.nvidia import driver

    if tensor_map is None:
        yield _address(value.base)
        for number in (*value.shape, *value.strides):
            yield _number("i64", number), "", 0
        yield _number("i1", value.padding == "nan"), "", 0
        shape = value.shape
    else:
        holder, *_ = driver.make_tensordesc_arg(value, tensor_map)
        shape = [*value.shape]
        if tensor_map["fp4_padded"]:
            shape[-1] *= 2
        yield ctypes.string_at(id(holder) + _TENSOR_MAP, _TENSOR_MAP), "map", value.base.data_ptr()
    for number in shape:
        yield _number("i32", number), "", 0
    for number in value.strides:
        yield _number("i64", number), "", 0


# ---- Triton --------------------------------------------------------------------------------------------------------


def hook() -> str:
    """Looks at Triton's launches from now on. Returns why it cannot; '' when it does."""
    if "why" not in _state:
        _state["why"] = _hook()
    return _state["why"]


def _hook() -> str:
    try:
        import triton
        from triton import knobs
        from triton.backends.nvidia.driver import CudaLauncher
        from triton.runtime.autotuner import Autotuner
    except ImportError as error:
        return f"Triton's launcher for CUDA cannot be imported: {error}"
    if not triton.__version__.startswith(_TRITON):
        return f"Triton {triton.__version__} is installed, and the launcher of {_TRITON}* is the one that is known"
    hooks = [getattr(getattr(knobs.runtime, f"launch_{when}_hook", None), "calls", None) for when in ("enter", "exit")]
    if not all(isinstance(calls, list) for calls in hooks):
        return "Triton's launch hooks are not where they were expected"
    _watch_launcher(CudaLauncher)
    _watch_tuner(Autotuner)
    _C._hook_plans(_begin, *hooks)
    return ""


def _watch_launcher(launcher_class) -> None:
    make, call = launcher_class.__init__, launcher_class.__call__

    @functools.wraps(make)
    def __init__(self, src, metadata):
        make(self, src, metadata)
        self.flagos_signature = dict(src.signature)
        self.flagos_tensor_maps = getattr(metadata, "tensordesc_meta", None)

    @functools.wraps(call)
    def __call__(self, grid_x, grid_y, grid_z, stream, function, *arguments):
        watch = getattr(_thread, "watch", None)
        if watch is None:
            return call(self, grid_x, grid_y, grid_z, stream, function, *arguments)
        return watch.launch(self, call, (grid_x, grid_y, grid_z), stream, function, arguments)

    launcher_class.__init__, launcher_class.__call__ = __init__, __call__


def _watch_tuner(tuner_class) -> None:
    bench = tuner_class._bench

    @functools.wraps(bench)
    def _bench(self, *arguments, **keywords):
        watch = getattr(_thread, "watch", None)
        if watch is not None:
            watch.recorder.refuse("tunes its kernel", again=True)
        return bench(self, *arguments, **keywords)

    tuner_class._bench = _bench
