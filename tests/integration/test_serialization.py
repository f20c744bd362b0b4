"""torch.save and torch.load, pickle, copy, map_location, weights_only, mmap."""

import copy
import io
import pickle

import pytest
import torch

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint8,
    torch.float8_e4m3fn,
]


def round_trip(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_keeps_device_and_bits(dtype, device):
    source = torch.arange(24, dtype=torch.uint8).to(dtype).reshape(2, 3, 4)
    loaded = round_trip(source.to(device))
    assert loaded.device == torch.device("flagos:0") and loaded.dtype is dtype
    assert torch.equal(loaded.cpu().view(torch.uint8), source.view(torch.uint8))


def test_layout_and_sharing_survive(device):
    base = torch.arange(12.0, device=device).reshape(3, 4)
    data = {"base": base, "view": base[1:], "transposed": base.t()}
    loaded = round_trip(data)
    assert loaded["transposed"].stride() == (1, 4) and loaded["view"].storage_offset() == 4
    loaded["base"][1, 0] = 99
    assert loaded["view"][0, 0].item() == 99 and loaded["transposed"][0, 1].item() == 99


@pytest.mark.parametrize("where", ["cpu", "flagos", "flagos:0", "meta"])
def test_map_location(where, device):
    loaded = round_trip({"x": torch.ones(3, device=device)}, map_location=where)
    assert loaded["x"].device.type == where.split(":")[0]


def test_map_location_to_second_device(device):
    if torch.flagos.device_count() < 2:
        pytest.skip("needs two devices")
    assert round_trip(torch.ones(3, device=device), map_location="flagos:1").device.index == 1
    assert round_trip(torch.ones(3, device="flagos:1")).device.index == 1
    assert round_trip(torch.ones(3, device="flagos:1"), map_location={"flagos:1": "flagos:0"}).device.index == 0


def test_cpu_file_to_device(device):
    assert round_trip(torch.ones(3), map_location=device).is_flagos


def test_missing_device_in_file(device):
    buffer = io.BytesIO()
    torch.save(torch.ones(3, device=device), buffer)
    data = buffer.getvalue().replace(b"flagos:0", b"flagos:9")
    with pytest.raises(RuntimeError, match=r"(?i)flagos device 9.*device_count.*map_location"):
        torch.load(io.BytesIO(data))


def test_weights_only_and_state_dict(tmp_path, device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).to(device)
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    state = torch.load(path, weights_only=True)
    assert all(t.is_flagos for t in state.values())
    fresh = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).to(device)
    fresh.load_state_dict(state)
    x = torch.randn(5, 4, device=device)
    assert torch.equal(fresh(x), model(x))


def test_mmap(tmp_path, device):
    path = tmp_path / "x.pt"
    torch.save(torch.arange(1000.0), path)
    assert torch.load(path, mmap=True, map_location=device).sum().item() == 499500


def test_parameter_and_requires_grad(device):
    parameter = torch.nn.Parameter(torch.ones(2, device=device))
    loaded = round_trip(parameter)
    assert isinstance(loaded, torch.nn.Parameter) and loaded.requires_grad and loaded.is_flagos


def test_legacy_format(device):
    buffer = io.BytesIO()
    torch.save(torch.arange(4.0, device=device), buffer, _use_new_zipfile_serialization=False)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).cpu(), torch.arange(4.0))


def test_pickle_and_deepcopy(device):
    x = torch.arange(6.0, device=device).reshape(2, 3).t()
    for clone in (pickle.loads(pickle.dumps(x)), copy.deepcopy(x)):
        assert clone.is_flagos and clone.stride() == x.stride() and torch.equal(clone, x)
        assert clone.data_ptr() != x.data_ptr()
    shallow = copy.copy(x)
    assert shallow.data_ptr() == x.data_ptr()
    a, b = copy.deepcopy([x, x[:1]])
    b.fill_(7)
    assert (a[0] == 7).all(), "deepcopy lost the sharing of storage"


def test_sparse_round_trip(device):
    x = torch.eye(3).to_sparse().to(device)
    loaded = round_trip(x)
    assert loaded.is_sparse and loaded.is_flagos and torch.equal(loaded.to_dense().cpu(), torch.eye(3))


def test_optimizer_state(device):
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = round_trip(optimizer.state_dict())
    assert state["state"][0]["exp_avg"].is_flagos
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3, device=device))])
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], state["state"][0]["exp_avg"])


def test_rng_state_in_checkpoint(device):
    torch.manual_seed(3)
    state = round_trip({"rng": torch.flagos.get_rng_state()}, map_location="cpu")
    expected = torch.rand(4, device=device)
    torch.flagos.set_rng_state(state["rng"])
    assert torch.equal(torch.rand(4, device=device), expected)
