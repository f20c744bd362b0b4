"""Compares what an operator did on a device with what it did on the CPU: values, metadata, aliasing.

Every function raises Mismatch with one line that says what differs.
"""

from __future__ import annotations

import math

import torch

from tests.common.samples import is_plain, tensors_in


class Mismatch(AssertionError):
    """The device's result differs from the CPU's."""


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's values on the CPU, with lazy conj and neg applied."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    return tensor.resolve_conj().resolve_neg() if is_plain(tensor) else tensor


def bit_equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bytes (so NaN equals the same NaN, and 0.0 differs from -0.0). Both plain, on the CPU, of one dtype."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if actual.numel() == 0:
        return True
    return torch.equal(bytes_of(actual), bytes_of(expected))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor on the CPU as one row of bytes."""
    # clone: contiguous() leaves a stride other than 1 on a dimension of size 1, which view(dtype) refuses
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same_values(actual, expected, where: str, rtol=None, atol=None) -> bool:
    """True when bit-equal, False when equal within tolerance; Mismatch otherwise."""
    host, reference = to_host(actual), to_host(expected)
    if is_plain(host) and is_plain(reference) and bit_equal(host, reference):
        return True
    try:
        torch.testing.assert_close(host, reference, rtol=rtol, atol=atol, equal_nan=True, check_stride=False)
    except (AssertionError, RuntimeError, TypeError, NotImplementedError, ValueError) as error:
        raise Mismatch(f"{where}: values differ: {first_lines(error)}") from None
    return not is_plain(host)


def first_lines(error: BaseException, limit: int = 300) -> str:
    """An error's text as one line."""
    return f"{type(error).__name__}: {' | '.join(str(error).split(chr(10)))}"[:limit]


def metadata(tensor: torch.Tensor) -> dict:
    """What the CPU's result and the device's must have in common besides values."""
    data = {"dtype": tensor.dtype, "layout": tensor.layout, "requires_grad": tensor.requires_grad}
    if tensor.is_nested:
        return data
    data["shape"] = tuple(tensor.shape)
    if is_plain(tensor):
        # A stride of a dimension with at most one element, or of an empty tensor, is not observable but is compared
        # too: the same kernel computes it from the same input.
        data.update(
            stride=tuple(tensor.stride()),
            offset=tensor.storage_offset(),
            conj=tensor.is_conj(),
            neg=tensor.is_neg(),
        )
    return data


def same_metadata(actual: torch.Tensor, expected: torch.Tensor, device: str, where: str, skip=()) -> None:
    got, want = metadata(actual), metadata(expected)
    for key, value in want.items():
        if key not in skip and got.get(key) != value:
            raise Mismatch(f"{where}: {key} is {got.get(key)}, the CPU's is {value}")
    if actual.device.type != torch.device(device).type:
        raise Mismatch(f"{where}: is on {actual.device}, expected {device}")


def storage_id(tensor: torch.Tensor):
    """Identity of the storage, None when the tensor has none."""
    if not is_plain(tensor):
        return None
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


def alias_pattern(outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> list[tuple]:
    """For each output: is it one of the inputs (by object), which inputs and earlier outputs share its storage."""
    before = list(inputs)
    pattern = []
    for output in outputs:
        same = next((i for i, other in enumerate(before) if other is output), None)
        mine = storage_id(output)
        shared = tuple(i for i, other in enumerate(before) if mine is not None and storage_id(other) == mine)
        pattern.append((same, shared))
        before.append(output)
    return pattern


def same_results(actual, expected, device, where="output", rtol=None, atol=None, values=True, skip=()) -> bool:
    """Compares two nests of results; returns whether all tensors were bit-equal."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(actual, torch.Tensor):
            raise Mismatch(f"{where}: is a {type(actual).__name__}, the CPU's is a Tensor")
        same_metadata(actual, expected, device, where, skip)
        return same_values(actual, expected, where, rtol, atol) if values else True
    if isinstance(expected, (tuple, list)):
        if not isinstance(actual, (tuple, list)) or len(actual) != len(expected):
            raise Mismatch(f"{where}: has another structure than the CPU's")
        if type(actual) is not type(expected):
            raise Mismatch(f"{where}: is a {type(actual).__name__}, the CPU's is a {type(expected).__name__}")
        pairs = enumerate(zip(actual, expected, strict=True))
        return all([same_results(a, e, device, f"{where}[{i}]", rtol, atol, values, skip) for i, (a, e) in pairs])
    if isinstance(expected, dict):
        if not isinstance(actual, dict) or actual.keys() != expected.keys():
            raise Mismatch(f"{where}: has other keys than the CPU's")
        return all(
            [same_results(actual[k], e, device, f"{where}[{k}]", rtol, atol, values, skip) for k, e in expected.items()]
        )
    if isinstance(expected, torch.device):
        if isinstance(actual, torch.device) and actual.type == torch.device(device).type:
            return True
        raise Mismatch(f"{where}: is {actual}, expected a {device} device")
    if isinstance(expected, (int, float, complex)) and not isinstance(expected, bool) and values:
        if type(actual) is not type(expected):
            raise Mismatch(f"{where}: is a {type(actual).__name__}, the CPU's is a {type(expected).__name__}")
        try:
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            raise Mismatch(f"{where}: {first_lines(error)}") from None
        return actual == expected or (isinstance(expected, float) and math.isnan(expected))
    if values and type(expected).__eq__ is not object.__eq__ and actual != expected:
        raise Mismatch(f"{where}: is {actual!r}, the CPU's is {expected!r}")
    return True


def same_inputs_after(actual, expected) -> None:
    """An operator must have left (or changed) its inputs as the CPU's did."""
    got, want = tensors_in(actual), tensors_in(expected)
    for index, (a, e) in enumerate(zip(got, want, strict=True)):
        same_metadata(a, e, a.device.type, f"input {index} after the call")
        same_values(a, e, f"input {index} after the call")
