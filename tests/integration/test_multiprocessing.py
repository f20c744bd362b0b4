"""Sharing between processes: what works for device tensors, and one clear error for what does not.

Workers of a DataLoader that return CPU tensors are in test_dataloader.py.
"""

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


class RowsOnDevice(Rows):
    def __getitem__(self, k):
        return torch.full((16,), float(k), device="flagos")


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
    """As on CUDA it changes nothing and is no error, so that scripts for any device can call it."""
    model = torch.nn.Linear(3, 2).to(device)
    before = model.weight.tolist()
    assert model.share_memory() is model and model.weight.share_memory_() is model.weight
    assert model.weight.is_flagos and model.weight.tolist() == before


def test_a_queue_passes_the_error_on_to_who_waits(device):
    queue = multiprocessing.get_context("spawn").Queue()
    queue.put([torch.arange(4.0, device=device), "more"])
    with pytest.raises(RuntimeError, match=r"flagos cannot be sent to another process.*tensor\.cpu\(\)"):
        queue.get(timeout=60)
    queue.put("next")
    assert queue.get(timeout=60) == "next"
    queue.close()
    queue.join_thread()


@pytest.mark.timeout(200)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("pin", [False, True])
def test_device_tensors_of_a_loader_s_worker_are_a_clear_error(pin, device):
    """A spawned worker may use the device, but what it returns has to be on the CPU; nobody waits for ever."""
    loader = DataLoader(RowsOnDevice(), num_workers=1, pin_memory=pin, multiprocessing_context="spawn")
    with pytest.raises(RuntimeError, match=r"cannot be sent to another process|Pin memory thread"):
        next(iter(loader))


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
