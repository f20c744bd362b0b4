"""torch.flagos: the device module, used as torch.cuda is.

One file per subject; this one gathers the names. Functions that torch.accelerator has work through it, so they follow
the same registrations in C++ as `torch.accelerator` itself.
"""

from torch_fl.flagos import (
    _absent,
    _lazy,
    _sharing,
    amp,
    decode,
    graphs,
    interop,
    jiterator,
    legacy,
    memory,
    monitor,
    pools,
    random,
    streams,
)
from torch_fl.flagos._device import (
    _exchange_device,
    _get_device_index,
    _maybe_exchange_device,
    can_device_access_peer,
    current_device,
    device,
    device_count,
    device_of,
    get_arch_list,
    get_device_capability,
    get_device_name,
    get_device_properties,
    ipc_collect,
    is_available,
    is_bf16_supported,
    set_device,
    synchronize,
)
from torch_fl.flagos._lazy import _is_in_bad_fork, _lazy_init, init, is_initialized
from torch_fl.flagos.amp import (
    GradScaler,
    get_amp_supported_dtype,
    get_autocast_dtype,
    is_autocast_enabled,
    set_autocast_dtype,
    set_autocast_enabled,
)
from torch_fl.flagos.decode import *  # noqa: F403
from torch_fl.flagos.graphs import *  # noqa: F403
from torch_fl.flagos.interop import *  # noqa: F403
from torch_fl.flagos.legacy import *  # noqa: F403
from torch_fl.flagos.memory import *  # noqa: F403
from torch_fl.flagos.memory import _dump_snapshot, _record_memory_history, _snapshot
from torch_fl.flagos.monitor import *  # noqa: F403
from torch_fl.flagos.pools import *  # noqa: F403
from torch_fl.flagos.random import *  # noqa: F403
from torch_fl.flagos.random import _get_generator, _get_rng_state_offset, _set_rng_state_offset
from torch_fl.flagos.streams import *  # noqa: F403

has_half = True
_sharing.register()


def __getattr__(name):
    if name == "_initialized":  # read by torch.utils.checkpoint; a plain attribute would not follow the state
        return _lazy.is_initialized()
    why = _absent.reason(name)
    raise AttributeError(f"module 'torch.flagos' has no attribute {name!r}" + (f": {why}" if why else ""))


__all__ = [
    "GradScaler",
    "amp",
    "can_device_access_peer",
    "current_device",
    "decode",
    "device",
    "device_count",
    "device_of",
    "get_amp_supported_dtype",
    "get_arch_list",
    "get_autocast_dtype",
    "get_device_capability",
    "get_device_name",
    "get_device_properties",
    "graphs",
    "has_half",
    "init",
    "interop",
    "ipc_collect",
    "is_autocast_enabled",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "jiterator",
    "legacy",
    "memory",
    "monitor",
    "pools",
    "random",
    "set_autocast_dtype",
    "set_autocast_enabled",
    "set_device",
    "streams",
    "synchronize",
    *decode.__all__,
    *graphs.__all__,
    *interop.__all__,
    *legacy.__all__,
    *memory.__all__,
    *monitor.__all__,
    *pools.__all__,
    *random.__all__,
    *streams.__all__,
]
