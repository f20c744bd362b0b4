"""The only place that assigns into torch: a table, each line with its reason and when it can go. At most three lines.

scripts/check_tree.py checks that no other file assigns into torch, and tests/unit/test_check_tree.py that this table
stays short. An entry is (object, attribute, make(original) -> replacement, reason, until).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.dlpack import DLDeviceType

from torch_fl import _recurrent


class Patch(NamedTuple):
    owner: Any
    attribute: str
    make: Callable[[Any], Any]
    reason: str
    until: str


def _autocast_passes(keys):
    """The keys that a new higher-order operator passes on; those that exist already are told one by one."""
    key = torch._C.DispatchKey.AutocastPrivateUse1
    for operator in torch._ops._higher_order_ops.values():
        if key not in operator.py_kernels:
            operator.fallthrough(key)
    return keys if key in keys else [*keys, key]


def _dlpack_device(original):
    @functools.wraps(original)
    def __dlpack_device__(self):
        if self.device.type == "flagos":
            return DLDeviceType.kDLExtDev, self.device.index
        return original(self)

    return __dlpack_device__


def _flatten_parameters(original):
    @functools.wraps(original)
    def flatten_parameters(self):
        weights = self._flat_weights
        if weights and all(type(w) in (torch.Tensor, torch.nn.Parameter) and w.is_flagos for w in weights):
            _recurrent.flatten_parameters(self)
        else:
            original(self)

    return flatten_parameters


TABLE: list[Patch] = [
    Patch(
        torch.Tensor,
        "__dlpack_device__",
        _dlpack_device,
        'torch compares the device type with the literal "privateuse1", which a renamed device never equals, so '
        "torch.from_dlpack(flagos_tensor) raises",
        "torch asks for the backend's registered name there",
    ),
    Patch(
        torch._ops,
        "_HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS",
        _autocast_passes,
        "under autocast, torch.cond, while_loop, map and the like find no kernel for AutocastPrivateUse1: the list of "
        "keys they pass on names CPU, CUDA and XPU only",
        "torch's list has AutocastPrivateUse1, or a device can name its key",
    ),
    Patch(
        torch.nn.RNNBase,
        "flatten_parameters",
        _flatten_parameters,
        "torch flattens weights that say cuda only; without it cuDNN copies every weight in every call",
        "torch asks what cuDNN accepts in C++, as the layers themselves do",
    ),
]

MAXIMUM = 3
_applied = False


def apply() -> None:
    """Applies the table once."""
    global _applied
    if _applied:
        return
    if len(TABLE) > MAXIMUM:
        raise RuntimeError(f"patches.py has {len(TABLE)} entries; at most {MAXIMUM} are allowed")
    for patch in TABLE:
        setattr(patch.owner, patch.attribute, patch.make(getattr(patch.owner, patch.attribute)))
    _applied = True
