"""torch.flagos is called as torch.cuda is: parameters, the names frameworks look up, a docstring for each name."""

import inspect

import pytest
import torch

# What FSDP, checkpointing, FakeTensor, DataLoader and torch.amp look up on a device module.
FRAMEWORKS = """_dump_snapshot _exchange_device _get_device_index _initialized _is_in_bad_fork _lazy_init
_maybe_exchange_device _record_memory_history _snapshot get_amp_supported_dtype is_autocast_enabled""".split()


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_name_that_frameworks_look_up(name):
    assert hasattr(torch.flagos, name)


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    "name",
    # Which names exist is the matter of test_device_api.py; newer releases of torch have more than 2.11.
    [n for n in torch.cuda.__all__ if hasattr(torch.flagos, n) and inspect.isfunction(getattr(torch.cuda, n))],
)
def test_parameters_are_called_alike(name):
    """Code that names its arguments runs on both devices."""
    theirs = parameters(getattr(torch.cuda, name))
    assert parameters(getattr(torch.flagos, name))[: len(theirs)] == theirs


def test_public_names_are_documented():
    silent = [
        name
        for name in torch.flagos.__all__
        if callable(getattr(torch.flagos, name)) and not inspect.getdoc(getattr(torch.flagos, name))
    ]
    assert silent == []
