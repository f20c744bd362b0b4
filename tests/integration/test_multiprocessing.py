"""Sharing between processes: what works for device tensors, and one clear error for what does not."""

import multiprocessing
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing
from torch.utils.data import DataLoader, Dataset

import torch_fl


def double(queue_in, queue_out, received):
    x = queue_in.get()
    queue_out.put((x.flagos() * 2).cpu())
    received.wait(100)  # the sender of a CPU tensor has to live until it has arrived


def fill(shared):
    shared.fill_(7)


class Rows(Dataset):
    """Importable, so that spawned workers find it."""

    def __len__(self):
        return 64

    def __getitem__(self, k):
        return torch.full((16,), float(k))


def test_cpu_tensors_travel_between_processes_that_use_the_device(device):
    torch.ones(1, device=device)
    context = torch.multiprocessing.get_context("spawn")
    there, back, received = context.Queue(), context.Queue(), context.Event()
    process = context.Process(target=double, args=(there, back, received))
    process.start()
    there.put(torch.arange(4.0))
    result = back.get(timeout=100).clone()
    received.set()
    process.join(60)
    assert process.exitcode == 0 and result.tolist() == [0, 2, 4, 6]


def test_shared_cpu_memory(device):
    shared = torch.zeros(4).share_memory_()
    process = multiprocessing.get_context("spawn").Process(target=fill, args=(shared,))
    process.start()
    process.join(100)
    assert process.exitcode == 0 and shared.to(device).tolist() == [7] * 4


def test_share_memory_of_a_device_tensor(device):
    """As on CUDA: it says that it is shared and does nothing, or it refuses in one sentence."""
    x = torch.ones(3, device=device)
    try:
        assert x.share_memory_() is x
    except (NotImplementedError, RuntimeError) as error:
        assert "flagos" in str(error) or "device" in str(error)
    assert x.tolist() == [1, 1, 1]


def test_sending_a_device_tensor_is_one_clear_error(device):
    x = torch.arange(4.0, device=device)
    for value in (x, [x[1:]], x.untyped_storage(), torch.nn.Parameter(x)):
        with pytest.raises(RuntimeError, match=r"flagos cannot be sent to another process.*tensor\.cpu\(\)"):
            ForkingPickler.dumps(value)
    assert torch.equal(pickle.loads(pickle.dumps(x)), x)  # by value it works


def test_sending_cpu_tensors_is_torch_s(device):
    x = torch.arange(4.0)
    again = pickle.loads(bytes(ForkingPickler.dumps(x)))
    again[0] = 9
    assert x[0] == 9


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_with_workers_and_pinned_memory_neither_hangs_nor_leaks(context, device):
    def epochs(count):
        for _ in range(count):
            seen = 0.0
            for batch in loader:
                seen += batch.to(device, non_blocking=True)[:, 0].sum().item()
            assert seen == sum(range(64))
        torch_fl.flagos.synchronize()
        return torch_fl.flagos.memory_allocated(), torch_fl.flagos.host_memory_stats()["allocated_bytes.current"]

    loader = DataLoader(
        Rows(), batch_size=8, num_workers=4, pin_memory=True, multiprocessing_context=context, prefetch_factor=2
    )
    first = epochs(1)
    device_bytes, host_bytes = epochs(2)
    assert device_bytes == first[0] and host_bytes <= 2 * first[1]


def test_prefetching_on_a_second_stream(device):
    """Batches are copied on their own stream while the previous one is worked on, in the order of an event."""
    flagos = torch_fl.flagos
    copying = flagos.Stream()

    def prefetched(loader):
        ahead = None
        for batch in loader:
            with flagos.stream(copying):
                moved = batch.to(device, non_blocking=True)
                ready = copying.record_event()
            if ahead is not None:
                yield take(*ahead)
            ahead = moved, ready
        yield take(*ahead)

    def take(batch, ready):
        flagos.current_stream().wait_event(ready)
        batch.record_stream(flagos.current_stream())
        return batch

    loader = DataLoader(Rows(), batch_size=8, pin_memory=True)
    assert [b[0, 0].item() for b in prefetched(loader)] == [0, 8, 16, 24, 32, 40, 48, 56]
