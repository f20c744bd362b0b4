"""Random numbers: one default generator per device."""

from collections.abc import Iterable

import torch

from torch_fl import _C
from torch_fl.flagos._device import _checked_index, current_device, device_count


class _Generators:
    """The default generators by device index, made when they are first asked for."""

    def __len__(self):
        return device_count()

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"flagos:{index} does not exist: this machine has {len(self)} flagos device(s)")
        return _C._default_generator(index % len(self))

    def __iter__(self):
        return (self[index] for index in range(len(self)))


default_generators = _Generators()


def get_rng_state(device="flagos") -> torch.Tensor:
    """State of a device's default generator, as a tensor on the CPU."""
    return default_generators[_checked_index(device)].get_state()


def get_rng_state_all() -> list[torch.Tensor]:
    """States of all devices' default generators."""
    return [generator.get_state() for generator in default_generators]


def set_rng_state(new_state: torch.Tensor, device="flagos") -> None:
    """Puts a state from get_rng_state back."""
    if not isinstance(new_state, torch.Tensor):
        raise TypeError(f"RNG state must be a torch.ByteTensor, got {new_state!r}")
    default_generators[_checked_index(device)].set_state(new_state.cpu())


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    """Puts the states from get_rng_state_all back."""
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


def manual_seed(seed: int) -> None:
    """Seeds the current device's default generator."""
    default_generators[current_device()].manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seeds the default generators of all devices."""
    for generator in default_generators:
        generator.manual_seed(int(seed))


def seed() -> None:
    """Seeds the current device's default generator with a random number."""
    default_generators[current_device()].seed()


def seed_all() -> None:
    """Seeds all devices' default generators with the same random number."""
    if len(default_generators) > 0:
        manual_seed_all(default_generators[0].seed())


def initial_seed() -> int:
    """The seed that the current device's default generator was last given."""
    return default_generators[current_device()].initial_seed()


def _get_generator(device: torch.device) -> torch.Generator:
    return default_generators[_checked_index(device)]


def _get_rng_state_offset(device="flagos") -> int:
    return default_generators[_checked_index(device)].get_offset()


def _set_rng_state_offset(offset: int, device="flagos") -> None:
    default_generators[_checked_index(device)].set_offset(offset)


__all__ = [
    "default_generators",
    "get_rng_state",
    "get_rng_state_all",
    "initial_seed",
    "manual_seed",
    "manual_seed_all",
    "seed",
    "seed_all",
    "set_rng_state",
    "set_rng_state_all",
]
