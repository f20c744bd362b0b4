"""DataLoader: pinned batches, non_blocking transfers, workers (fork and spawn), a training epoch."""

import gc
import multiprocessing
import os
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import torch_fl


class Squares(Dataset):
    """Item k is (k, k squared); importable, so that spawned workers find it."""

    def __len__(self):
        return 40

    def __getitem__(self, k):
        return torch.tensor([float(k)]), torch.tensor(float(k * k))


class OnDevice(Squares):
    """A mistake that users make: touching the device in a forked worker."""

    def __getitem__(self, k):
        return torch.ones(1, device="flagos") * k


def epoch(loader, device):
    seen = []
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        assert x.is_flagos
        torch.testing.assert_close((x[:, 0] ** 2).cpu(), y.cpu())
        seen += x[:, 0].tolist()
    return seen


def test_pinned_batches(device):
    loader = DataLoader(Squares(), batch_size=8, pin_memory=True)
    for x, y in loader:
        assert x.is_pinned() and y.is_pinned() and not x.is_flagos
    assert sorted(epoch(loader, device)) == [float(k) for k in range(40)]


@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers(context, pin, device):
    torch.ones(1, device=device)  # the device is in use before the workers start
    loader = DataLoader(Squares(), batch_size=8, num_workers=2, pin_memory=pin, multiprocessing_context=context)
    assert sorted(epoch(loader, device)) == [float(k) for k in range(40)]


def test_device_use_in_a_forked_worker_is_a_clear_error(device):
    torch.ones(1, device=device)
    loader = DataLoader(OnDevice(), batch_size=8, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match=r"forked subprocess.*spawn"):
        next(iter(loader))
    assert torch.ones(2, device=device).sum().item() == 2


def test_shuffle_with_a_generator(device):
    def order(seed):
        loader = DataLoader(Squares(), shuffle=True, generator=torch.Generator().manual_seed(seed))
        return [x.item() for x, _ in loader]

    assert order(0) == order(0) != order(1)


def test_training_epoch_equals_the_cpu_s(device):
    def train(where):
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(where)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for x, y in DataLoader(data, batch_size=8, shuffle=True):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x.to(where)), y.to(where))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    torch.testing.assert_close(train(device), train("cpu"), rtol=1e-5, atol=1e-5)


def test_collate_of_device_tensors_in_the_main_process(device):
    data = TensorDataset(torch.arange(6.0, device=device))
    batches = [x for (x,) in DataLoader(data, batch_size=3)]
    assert all(x.is_flagos for x in batches) and torch.cat(batches).tolist() == [0, 1, 2, 3, 4, 5]


# What a long run must not do: grow. /proc counts the process's own files; workers are its children.
def _in_use():
    gc.collect()
    for worker in multiprocessing.active_children():  # the loader waits for their end, but not for ever
        worker.join(20)
    for thread in threading.enumerate():  # a closed queue tells the thread that fed it to end, and does not wait
        if thread.name.startswith("QueueFeeder"):
            thread.join(20)
    torch.flagos.synchronize()
    torch.flagos.empty_cache()
    torch_fl._C._host_empty_cache()  # what is cached depends on how far the loader was ahead
    sim = getattr(torch_fl._C, "_sim", None)
    device = sim.live(0) if torch_fl.chip() == "host" else torch.flagos.memory_allocated()
    return {
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "workers": len(multiprocessing.active_children()),
        "device memory": device,
        "pinned memory": torch.flagos.host_memory_stats()["allocated_bytes.current"],
    }


def _epochs(number, context, workers, persistent, device):
    loader = DataLoader(
        Squares(), batch_size=4, num_workers=workers, pin_memory=True, multiprocessing_context=context,
        persistent_workers=persistent, prefetch_factor=2,
    )  # fmt: skip
    for _ in range(number):
        assert sorted(epoch(loader, device)) == [float(k) for k in range(40)]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("context", "persistent"),
    [
        ("fork", False),
        ("spawn", True),
        pytest.param("fork", True, marks=pytest.mark.slow),
        pytest.param("spawn", False, marks=pytest.mark.slow),
    ],
)
def test_four_workers_and_pinned_memory_for_three_epochs(context, persistent, device):
    """No hang (the timeout), and what the first run needs is all that the second needs."""
    _epochs(3, context, 4, persistent, device)
    before = _in_use()
    _epochs(3, context, 4, persistent, device)
    after = _in_use()
    if persistent:  # torch itself keeps such workers' Process objects, with two pipes each, until exit
        before["open files"] += 2 * 4
    assert {name: (before[name], after[name]) for name in before if before[name] != after[name]} == {}


def test_leaving_an_epoch_early_leaves_nothing_behind(device):
    def leave():
        loader = DataLoader(Squares(), batch_size=2, num_workers=4, pin_memory=True, multiprocessing_context="fork")
        for x, _ in loader:
            x.to(device, non_blocking=True)
            break

    leave()
    before = _in_use()
    for _ in range(2):
        leave()
    after = _in_use()
    assert after["workers"] == 0
    assert {name: (before[name], after[name]) for name in before if before[name] < after[name]} == {}
