"""Types under the names that torch.cuda keeps from the time before dtype and device: FloatTensor, FloatStorage ...

`torch.flagos.FloatTensor(2, 3)`, `x.type(torch.flagos.FloatTensor)` and isinstance work as with torch.cuda's.
"""

import torch
from torch._utils import classproperty
from torch.storage import _LegacyStorage

_DTYPES = {
    "BFloat16": torch.bfloat16,
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Short": torch.int16,
}


class _TensorType(type):
    """The type of FloatTensor and its like: tensors are not their instances, but seem so."""

    def __instancecheck__(cls, instance):
        return isinstance(instance, torch.Tensor) and instance.type() == cls.__name__

    def __call__(cls, *arguments, **keywords):
        return torch.empty(0, dtype=cls.dtype, device="flagos").new(*arguments, **keywords)


def _tensor_type(kind: str):
    # torch knows a type that is passed to Tensor.type() by its name, which for this reason has the module in it.
    members = {"__module__": "torch.flagos", "dtype": _DTYPES[kind], "layout": torch.strided, "is_flagos": True}
    members |= {"__qualname__": f"{kind}Tensor", "__doc__": f"Tensors of {_DTYPES[kind]} on flagos."}
    return _TensorType(f"torch.flagos.{kind}Tensor", (), members)


def _storage_type(kind: str):
    dtype = classproperty(lambda cls: _DTYPES[kind])
    members = {"__module__": "torch.flagos", "dtype": dtype, "_dtype": dtype}  # torch takes the device from the module
    members["__doc__"] = f"Storages of {_DTYPES[kind]} on flagos."
    return type(_LegacyStorage)(f"{kind}Storage", (_LegacyStorage,), members)


BFloat16Tensor, BFloat16Storage = _tensor_type("BFloat16"), _storage_type("BFloat16")
BoolTensor, BoolStorage = _tensor_type("Bool"), _storage_type("Bool")
ByteTensor, ByteStorage = _tensor_type("Byte"), _storage_type("Byte")
CharTensor, CharStorage = _tensor_type("Char"), _storage_type("Char")
ComplexDoubleStorage, ComplexFloatStorage = _storage_type("ComplexDouble"), _storage_type("ComplexFloat")
DoubleTensor, DoubleStorage = _tensor_type("Double"), _storage_type("Double")
FloatTensor, FloatStorage = _tensor_type("Float"), _storage_type("Float")
HalfTensor, HalfStorage = _tensor_type("Half"), _storage_type("Half")
IntTensor, IntStorage = _tensor_type("Int"), _storage_type("Int")
LongTensor, LongStorage = _tensor_type("Long"), _storage_type("Long")
ShortTensor, ShortStorage = _tensor_type("Short"), _storage_type("Short")

__all__ = [
    "BFloat16Storage",
    "BFloat16Tensor",
    "BoolStorage",
    "BoolTensor",
    "ByteStorage",
    "ByteTensor",
    "CharStorage",
    "CharTensor",
    "ComplexDoubleStorage",
    "ComplexFloatStorage",
    "DoubleStorage",
    "DoubleTensor",
    "FloatStorage",
    "FloatTensor",
    "HalfStorage",
    "HalfTensor",
    "IntStorage",
    "IntTensor",
    "LongStorage",
    "LongTensor",
    "ShortStorage",
    "ShortTensor",
]
