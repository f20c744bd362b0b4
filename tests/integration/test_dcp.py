"""Checkpoints: torch.distributed.checkpoint in one process, safetensors, files that a torch without torch_fl reads."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import torch_fl
from tests.common.process import check_python


def writer(folder):
    """None: the default one. On a GPU it takes cuda for the device of every tensor, unless it copies none ahead."""
    return dcp.FileSystemWriter(folder, per_thread_copy_ahead=0) if torch_fl.chip() == "cuda" else None


def trained(where, seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.ones(3, 4, device=where)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def step(model, optimizer, where):
    model(torch.linspace(0, 1, 4, device=where)).sum().backward()
    optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_distributed_checkpoint_in_one_process(asynchronous, tmp_path, device):
    model, optimizer = trained(device, 0)
    if asynchronous:
        dcp.async_save(state_of(model, optimizer), checkpoint_id=tmp_path, no_dist=True).result()
    else:
        dcp.save(state_of(model, optimizer), checkpoint_id=tmp_path, storage_writer=writer(tmp_path), no_dist=True)
    fresh, fresh_optimizer = trained(device, 1)
    state = state_of(fresh, fresh_optimizer)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(fresh, fresh_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert all(p.is_flagos for p in fresh.parameters())
    for actual, expected in zip(step(fresh, fresh_optimizer, device), step(model, optimizer, device), strict=True):
        assert torch.equal(actual, expected)


def test_distributed_checkpoint_moves_between_devices(tmp_path, device):
    x = torch.arange(6.0, device=device)
    dcp.save({"x": x}, checkpoint_id=tmp_path, storage_writer=writer(tmp_path), no_dist=True)
    state = {"x": torch.zeros(6)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert state["x"].tolist() == list(range(6))


def test_safetensors_both_ways(tmp_path, device):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {
        "a": torch.arange(6.0, device=device).reshape(2, 3),
        "b": torch.ones(3, dtype=torch.bfloat16, device=device),
        "c": torch.tensor([True, False], device=device),
    }
    path = tmp_path / "model.safetensors"
    safetensors.save_file(tensors, path)
    # safetensors knows a fixed list of device names; a number means the accelerator of the process.
    for where, expected in (("cpu", "cpu"), (0, "flagos:0")):
        loaded = safetensors.load_file(path, device=where)
        assert {str(t.device) for t in loaded.values()} == {expected}
        assert all(
            torch.equal(loaded[k].cpu(), tensors[k].cpu()) and loaded[k].dtype == tensors[k].dtype for k in tensors
        )
    with safetensors.safe_open(path, framework="pt", device=0) as file:
        assert file.get_slice("a")[:, 1].is_flagos and file.get_tensor("b").is_flagos


def test_safetensors_of_a_model_with_tied_weights(tmp_path, device):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).to(device)
    model[1].weight = model[0].weight
    safetensors.save_model(model, tmp_path / "m.safetensors")
    fresh = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).to(device)
    fresh[1].weight = fresh[0].weight
    safetensors.load_model(fresh, tmp_path / "m.safetensors", device=0)
    assert torch.equal(fresh[1].weight, model[0].weight) and fresh[1].weight is fresh[0].weight


def test_file_loads_without_torch_fl(tmp_path, device):
    """With map_location, as a file from a GPU does on a machine without one; weights_only too."""
    model = torch.nn.Linear(3, 2).to(device)
    path = tmp_path / "model.pt"
    torch.save({"model": model.state_dict(), "step": 3}, path)
    expected = model.weight.tolist()
    check_python(
        f"""
        import sys, torch
        assert "torch_fl" not in sys.modules
        for options in (dict(map_location="cpu"), dict(map_location=lambda storage, where: storage),
                        dict(map_location={{"flagos:0": "cpu"}}), dict(map_location="cpu", mmap=True)):
            state = torch.load({str(path)!r}, weights_only=True, **options)
            assert state["model"]["weight"].tolist() == {expected!r} and state["step"] == 3
            assert state["model"]["weight"].device.type == "cpu"
        try:
            torch.load({str(path)!r})
        except RuntimeError as error:
            assert "map_location" in str(error) or "flagos" in str(error), error
        else:
            raise AssertionError("loaded onto a device that is not there")
        """,
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )


def test_cpu_file_of_another_process_loads_on_flagos(tmp_path, device):
    path = tmp_path / "x.pt"
    check_python(f"import torch; torch.save(torch.arange(5.0), {str(path)!r})", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    for where in ("flagos", device, {"cpu": "flagos:0"}, lambda storage, _: storage.flagos()):
        loaded = torch.load(path, map_location=where)
        assert loaded.is_flagos and loaded.sum().item() == 10


def test_whole_training_state_resumes_exactly(tmp_path, device):
    """Weights, optimizer, schedule, scaler and random state: the run after loading equals the run without a break."""

    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), torch.amp.GradScaler("flagos")

    def run(parts, steps):
        model, optimizer, schedule, scaler = parts
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4, device=device)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            losses.append(loss.item())
        return losses

    straight = make()
    run(straight, 2)
    state = {str(i): part.state_dict() for i, part in enumerate(straight)}
    torch.save({**state, "rng": torch_fl.flagos.get_rng_state_all()}, tmp_path / "all.pt")
    expected = run(straight, 3)

    resumed = make()
    torch.rand(7, device=device)
    saved = torch.load(tmp_path / "all.pt", weights_only=True)
    for i, part in enumerate(resumed):
        part.load_state_dict(saved[str(i)])
    torch_fl.flagos.set_rng_state_all(saved["rng"])
    assert run(resumed, 3) == expected
