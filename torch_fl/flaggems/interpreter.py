"""FlagGems without a GPU: its kernels run under Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors.

For the host chip, so that the path of flagos_python and FlagGems' own logic can be tested anywhere. It is slow, and it
says nothing about what a compiler makes of the kernels.

flag_gems expects a vendor's device module, a tuner that measures and a launcher that caches binaries. load() puts
modules of ours where it looks for them, in sys.modules, before it is imported; neither SQLAlchemy nor a CUDA driver is
needed.
"""

import contextlib
import functools
import hashlib
import importlib
import inspect
import re
import sys
import textwrap
import types

import torch

VENDOR = "nvidia"  # whose generic kernels are used
DTYPES_WRONG_HERE = ("bfloat16",)  # Triton 3.6 rounds to it without carrying into the exponent


class PhiloxState:
    """A generator as FlagGems reads one, seed and offset in 16 bytes; drawn from torch's CPU generator each time."""

    def get_state(self):
        return torch.stack([torch.randint(2**31, ()), torch.zeros((), dtype=torch.int64)]).view(torch.uint8)

    def set_state(self, state):
        pass


class Device:
    """What FlagGems asks of torch.cuda."""

    default_generators = (PhiloxState(),)

    @staticmethod
    def device(_):
        return contextlib.nullcontext()

    _DeviceGuard = device

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def is_available():
        return False

    @staticmethod
    def synchronize(*_):
        pass

    @staticmethod
    def get_device_name(*_):
        return "Triton interpreter"

    @staticmethod
    def get_device_capability(*_):
        return (0, 0)

    @staticmethod
    def get_device_properties(*_):
        return types.SimpleNamespace(
            name="Triton interpreter", major=0, minor=0, multi_processor_count=4, L2_cache_size=2**22
        )


class DeviceDetector:
    """Stands for flag_gems.runtime.backend.device.DeviceDetector."""

    @functools.cache
    def __new__(cls, *_):
        self = super().__new__(cls)
        backend = sys.modules["flag_gems.runtime.backend"]
        backend.torch_device_object, backend.device_name = Device, "cpu"
        self.info = backend.get_vendor_info(VENDOR)
        self.vendor_name, self.name, self.dispatch_key = VENDOR, "cpu", "CPU"
        self.vendor = sys.modules["flag_gems.runtime.common"].vendors[VENDOR.upper()]
        self.vendor_list = [VENDOR]
        self.device_count = 1
        self.support_fp64 = self.support_bf16 = self.support_int64 = True
        return self


# ---- launching -----------------------------------------------------------------------------------------------------


def libentry():
    """Stands for flag_gems.utils.libentry.libentry: every call goes to the interpreter."""
    return lambda function: function


def libtuner(configs, key, prune_configs_by=None, reset_to_zero=None, restore_value=None, **_):
    """Stands for flag_gems.utils.libentry.libtuner."""
    import triton

    return triton.autotune(configs, key, prune_configs_by, reset_to_zero, restore_value)


def driver():
    """What Triton asks of a driver when it tunes: the first configuration is as good as any."""
    from triton.backends.driver import DriverBase

    class Interpreter(DriverBase):
        is_active = classmethod(lambda cls: True)
        map_python_to_cpp_type = get_current_target = None

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_benchmarker(self):
            return lambda call, quantiles, **_: [1.0] * len(quantiles)

    return Interpreter()


# ---- the device's mathematical functions ---------------------------------------------------------------------------


def _elementwise(function):
    """A function of CUDA's libdevice, computed by torch in double precision."""

    def call(*arguments, **_):
        import numpy
        from triton import language
        from triton.runtime.interpreter import TensorHandle, interpreter_semantic

        tensors = [interpreter_semantic.to_tensor(a) for a in arguments]
        kind = next((t.dtype for t in tensors if t.dtype.is_floating()), language.float32)
        arrays = numpy.broadcast_arrays(*(t.handle.data for t in tensors))
        found = function(*(torch.from_numpy(a.astype(numpy.float64)) for a in arrays)).numpy()
        if found.dtype == bool:
            kind, found = language.int32, found.astype(numpy.int32)
        found = found.astype(
            {16: numpy.float16, 32: found.dtype if found.dtype == numpy.int32 else numpy.float32}.get(
                kind.primitive_bitwidth, numpy.float64
            )
        )
        shape = next((t.type for t in tensors if t.type.is_block()), None)
        return language.tensor(
            TensorHandle(found, kind), language.block_type(kind, list(found.shape)) if shape else kind
        )

    return call


FUNCTIONS = {
    name: _elementwise(getattr(torch, name))
    for name in (
        "abs acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh erf erfc exp exp2 expm1 floor fmod hypot "
        "isinf isnan log log10 log1p log2 pow rsqrt signbit sin sinh sqrt tan tanh trunc"
    ).split()
}
FUNCTIONS["rint"] = FUNCTIONS["nearbyint"] = _elementwise(torch.round)
FUNCTIONS["isfinited"] = FUNCTIONS["finitef"] = _elementwise(torch.isfinite)
FUNCTIONS["lgamma"] = _elementwise(torch.lgamma)
FUNCTIONS["div_rn"] = _elementwise(torch.div)
FUNCTIONS["div_rz"] = _elementwise(torch.div)
FUNCTIONS["fma"] = _elementwise(lambda a, b, c: a * b + c)
FUNCTIONS["rcp_rn"] = _elementwise(torch.reciprocal)


def _module(name, **contents):
    module = types.ModuleType(name, doc=__doc__)
    module.__dict__.update(contents)
    sys.modules[name] = module
    return module


def _jit(function=None, **options):
    """Stands for triton.jit."""
    from triton.runtime.interpreter import InterpretedFunction

    if function is None:
        return lambda function: _jit(function, **options)
    function.__globals__.setdefault("_language", sys.modules["triton.language"])  # the interpreter patches it there
    kernel = InterpretedFunction(function, **options)
    kernel.__module__, kernel.__globals__ = function.__module__, function.__globals__
    source = textwrap.dedent(inspect.getsource(function))
    kernel.src = source[re.search(r"^def ", source, re.MULTILINE).start() :]
    kernel.cache_key = hashlib.sha256(kernel.src.encode()).hexdigest()
    return kernel


def _dtype_limit(sign):
    """Stands for flag_gems.utils.limits.get_dtype_max and get_dtype_min."""

    def limit(dtype):
        dtype = getattr(dtype, "value", dtype)
        if dtype.is_floating():
            return sign * float("inf")
        unsigned = dtype.is_int_unsigned()
        if sign < 0:
            return 0 if unsigned else -(2 ** (dtype.int_bitwidth - 1))
        return 2 ** (dtype.int_bitwidth - (not unsigned)) - 1

    return limit


def _logical(absorbing):
    """`and` (absorbing False) or `or` (True) as the compiler takes them: elementwise when a tensor is among them."""

    def combine(*operands):
        from triton.language import tensor

        value = operands[0]()
        for operand in operands[1:]:
            if not isinstance(value, tensor):
                if bool(value) is absorbing:
                    return value
                value = operand()
                continue
            other = operand()
            value = value.logical_or(other) if absorbing else value.logical_and(other)
        return value

    return combine


def _negation(value):
    from triton.language import tensor

    return value.logical_not() if isinstance(value, tensor) else not value


def _operators(before):
    """A transformer of kernels that also makes `and`, `or` and `not` what the compiler makes of them."""
    import ast

    class Transformer(type(before)):
        def visit_BoolOp(self, node):
            self.generic_visit(node)
            name = "_logical_or" if isinstance(node.op, ast.Or) else "_logical_and"
            nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
            return ast.Call(ast.Name(name, ast.Load()), [ast.Lambda(nothing, v) for v in node.values], [])

        def visit_UnaryOp(self, node):
            self.generic_visit(node)
            if not isinstance(node.op, ast.Not):
                return node
            return ast.Call(ast.Name("_logical_not", ast.Load()), [node.operand], [])

        def visit_Assign(self, node):
            self.generic_visit(node)
            return super().visit_Assign(node)

    return Transformer()


def _patch_interpreter():
    """Changes in Triton 3.6's interpreter: the only things of others that are replaced for good."""
    from triton.runtime import interpreter

    # It leaves `and`, `or` and `not` to Python, for which every block of values is true. Kernels see its globals.
    interpreter._logical_and, interpreter._logical_or = _logical(False), _logical(True)
    interpreter._logical_not = _negation
    interpreter.FunctionRewriter.ast_transformer = _operators(interpreter.FunctionRewriter.ast_transformer)

    def patch(tensor, scope, before=interpreter._patch_lang_tensor):
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    # Since 2.4 numpy refuses to take an array of one element for an integer.
    interpreter._patch_lang_tensor = patch
    # Arguments are on the CPU already; some are FlagGems' strided buffers, which cannot be copied.
    interpreter.GridExecutor._init_args_hst = lambda self, arguments, keywords: (arguments, keywords)
    interpreter.GridExecutor._restore_args_dev = lambda self, *_: None


@functools.cache
def load():
    """The module flag_gems, imported so that it runs without a GPU."""
    import triton
    from triton.runtime import jit

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    triton.runtime.driver.set_active(driver())
    _patch_interpreter()
    _module("flag_gems.runtime.backend.device", DeviceDetector=DeviceDetector)
    _module("flag_gems.utils.libentry", libentry=libentry, libtuner=libtuner)
    _module("flag_gems.utils.limits", get_dtype_max=_dtype_limit(1), get_dtype_min=_dtype_limit(-1))
    _module("triton.language.extra.cpu")
    _module("triton.language.extra.cpu.libdevice", **FUNCTIONS)
    # While its kernels are defined: FlagGems asserts that they are compiled ones, and reads two of their attributes.
    before = triton.jit, jit.JITFunction
    triton.jit, jit.JITFunction = _jit, jit.KernelInterface
    try:
        return importlib.import_module("flag_gems")
    finally:
        triton.jit, jit.JITFunction = before
