"""The device: names, indices, current device, where results land."""

import threading

import pytest
import torch

import torch_fl

two_devices = pytest.mark.skipif(torch_fl.flagos.device_count() < 2, reason="needs two devices")


def test_name_and_module():
    assert torch.device("flagos").type == "flagos"
    assert torch.device("flagos", 1) == torch.device("flagos:1")
    assert torch.flagos is torch_fl.flagos
    assert torch.flagos.is_available()
    assert torch.flagos.device_count() >= 1
    assert torch.get_device_module("flagos") is torch.flagos
    assert torch.accelerator.current_accelerator().type == "flagos"


def test_generated_methods():
    x = torch.arange(6.0)
    y = x.flagos()
    assert y.is_flagos and not x.is_flagos
    assert y.device == torch.device("flagos:0")
    assert torch.equal(y.cpu(), x)
    module = torch.nn.Linear(2, 3).flagos()
    assert module.weight.is_flagos and isinstance(module.weight, torch.nn.Parameter)
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]).flagos()
    assert packed.data.is_flagos
    storage = x.untyped_storage().flagos()
    assert storage.device.type == "flagos" and storage.nbytes() == x.untyped_storage().nbytes()


def test_repr_shows_device_and_values(device):
    text = repr(torch.tensor([1.5, -2.0], device=device))
    assert "flagos:0" in text and "1.5000" in text and "-2.0000" in text


@pytest.mark.parametrize(
    "make",
    [
        lambda d: torch.empty(3, device=d),
        lambda d: torch.zeros(3, device=d),
        lambda d: torch.ones(3, device=d),
        lambda d: torch.full((3,), 2.0, device=d),
        lambda d: torch.arange(3, device=d),
        lambda d: torch.linspace(0, 1, 3, device=d),
        lambda d: torch.eye(3, device=d),
        lambda d: torch.tensor([1, 2, 3], device=d),
        lambda d: torch.as_tensor([1.0], device=d),
        lambda d: torch.rand(3, device=d),
        lambda d: torch.randn(3, device=d),
        lambda d: torch.randint(9, (3,), device=d),
        lambda d: torch.randperm(3, device=d),
        lambda d: torch.tril_indices(3, 3, device=d),
        lambda d: torch.empty_strided((2, 2), (1, 2), device=d),
        lambda d: torch.scalar_tensor(1.0, device=d),
        lambda d: torch.hann_window(4, device=d),
        lambda d: torch.complex(torch.ones(2, device=d), torch.ones(2, device=d)),
        lambda d: torch.zeros(3, device="cpu").new_ones(2, device=d),
        lambda d: torch.zeros_like(torch.ones(2), device=d),
    ],
)
def test_factories(make, device):
    assert make(device).device == torch.device("flagos:0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("periodic", [True, False])
def test_kaiser_window(periodic, dtype, device):
    for n in (0, 1, 5, 64):
        window = torch.kaiser_window(n, periodic, 3.0, dtype=dtype, device=device)
        assert window.is_flagos
        torch.testing.assert_close(window.cpu(), torch.kaiser_window(n, periodic, 3.0, dtype=dtype))


def test_new_memory_in_deterministic_mode(device):
    """Holds what shows that nobody wrote it, as on torch's own devices, unless that is switched off."""
    torch.use_deterministic_algorithms(True)
    try:
        one = torch.ones(5, device=device)
        made = [torch.empty(64, device=device), torch.empty_strided((3, 2), (1, 3), device=device)]
        made += [torch.empty_like(one), one.new_empty(4), torch.empty(3, dtype=torch.complex64, device=device)]
        assert all(bool(t.isnan().all()) for t in made)
        assert torch.empty(3, dtype=torch.int16, device=device).tolist() == [2**15 - 1] * 3
    finally:
        torch.use_deterministic_algorithms(False)


def test_default_device(device):
    with torch.device(device):
        assert torch.ones(2).is_flagos
        assert torch.nn.Linear(2, 2).weight.is_flagos
    assert not torch.ones(2).is_flagos
    torch.set_default_device(device)
    try:
        assert torch.zeros(1).is_flagos
    finally:
        torch.set_default_device(None)


@two_devices
def test_current_device_follows_guard():
    assert torch.flagos.current_device() == 0
    with torch.flagos.device(1):
        assert torch.flagos.current_device() == 1
        assert torch.ones(1, device="flagos").device.index == 1
        with pytest.raises(RuntimeError, match="flagos:7"), torch.flagos.device(7):
            pass
        assert torch.flagos.current_device() == 1
    assert torch.flagos.current_device() == 0


@two_devices
def test_result_is_on_the_argument_s_device():
    x = torch.arange(4.0, device="flagos:1")
    assert torch.flagos.current_device() == 0
    for result in (
        x + 1,
        x.sum(),
        torch.cat([x, x]),
        x[1:],
        x.clone(),
        torch.zeros_like(x),
        x.sort().values,
        x.to(torch.int32),
    ):
        assert result.device == torch.device("flagos:1")
    assert torch.flagos.current_device() == 0


@two_devices
def test_current_device_is_per_thread():
    torch.flagos.set_device(1)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.flagos.current_device()))
    thread.start()
    thread.join()
    assert seen == [0]
    torch.flagos.set_device(0)


def test_bad_index():
    with pytest.raises(RuntimeError, match=r"flagos:99 does not exist: this machine has \d"):
        torch.flagos.set_device(99)
    assert torch.flagos.current_device() == 0
    torch.flagos.set_device(-1)  # means "leave it", as in torch.cuda
    assert torch.flagos.current_device() == 0


def test_tensor_on_missing_device():
    count = torch.flagos.device_count()
    with pytest.raises(RuntimeError, match=rf"flagos:{count}.*{count}"):
        torch.ones(2, device=f"flagos:{count}")
    assert torch.equal(torch.ones(2, device="flagos").cpu(), torch.ones(2))


def test_properties():
    properties = torch.flagos.get_device_properties(0)
    free, total = torch.flagos.mem_get_info(0)
    assert 0 < free <= total
    assert properties.total_memory == total
    assert torch.flagos.get_device_name(0) == properties.name != ""


def test_synchronize(device):
    x = torch.ones(1000, device=device)
    y = x * 2
    torch.flagos.synchronize()
    torch.accelerator.synchronize()
    assert y.sum().item() == 2000
