"""Several devices: copies between them, autograd across them, streams and current devices, threads that each drive one.

What needs only a second device runs wherever there are two (the host chip simulates two); the rest needs two GPUs.
"""

import copy
import threading

import pytest
import torch
from torch.nn.parallel import parallel_apply

import torch_fl


@pytest.fixture(autouse=True)
def two_devices():
    count = torch.flagos.device_count()
    if count < 2:
        pytest.skip(f"needs two devices, the chip {torch_fl.chip()} has {count} here")


DEVICES = ("flagos:0", "flagos:1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("non_blocking", [False, True])
def test_copies_between_devices(dtype, non_blocking):
    x = torch.arange(1 << 12).reshape(64, 64).to(dtype)
    a = x.to(DEVICES[0])
    b = a.to(DEVICES[1], non_blocking=non_blocking)
    assert b.device == torch.device(DEVICES[1]) and torch.equal(b.cpu(), x)
    c = torch.empty(64, 64, dtype=dtype, device=DEVICES[0]).t()
    c.copy_(b, non_blocking=non_blocking)
    assert torch.equal(c.cpu(), x)
    assert torch.equal(b[::2, 1::3].to(DEVICES[0]).cpu(), x[::2, 1::3])


def test_copies_are_ordered_with_both_current_streams():
    """The source may still be written, and the destination still be read, when the copy is asked for."""
    side0, side1 = torch.flagos.Stream(DEVICES[0]), torch.flagos.Stream(DEVICES[1])
    for k in range(20):
        with torch.flagos.stream(side0):
            a = torch.zeros(1 << 18, device=DEVICES[0])
            a.fill_(k)
            with torch.flagos.stream(side1):
                b = torch.full((1 << 18,), -1.0, device=DEVICES[1])
                b.copy_(a)
                a.fill_(-2)  # behind the copy, on the source's stream
                result = b * 1
        side1.synchronize()
        side0.synchronize()
        assert result.eq(k).all(), k


def test_autograd_across_devices():
    w0 = torch.randn(8, 8).to(DEVICES[0]).requires_grad_()
    w1 = torch.randn(8, 8).to(DEVICES[1]).requires_grad_()
    x = torch.randn(4, 8)
    y = ((x.to(DEVICES[0]) @ w0).relu().to(DEVICES[1]) @ w1).square().mean()
    y.backward()
    c0, c1 = (w.detach().cpu().requires_grad_() for w in (w0, w1))
    ((x @ c0).relu() @ c1).square().mean().backward()
    assert w0.grad.device == torch.device(DEVICES[0]) and w1.grad.device == torch.device(DEVICES[1])
    torch.testing.assert_close(w0.grad.cpu(), c0.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w1.grad.cpu(), c1.grad, rtol=1e-4, atol=1e-5)


def test_results_stay_on_the_device_of_the_arguments():
    x = torch.ones(4, device=DEVICES[1])
    assert torch.flagos.current_device() == 0
    for y in (x + 1, x.sum(), torch.cat([x, x]), x.sort()[1], torch.empty_like(x), x.nonzero(), torch.rand_like(x)):
        assert y.device == torch.device(DEVICES[1])
    assert torch.flagos.current_device() == 0


def test_mixed_devices_are_refused():
    a, b = (torch.ones(3, device=d) for d in DEVICES)
    with pytest.raises(RuntimeError, match="same device"):
        a + b


def test_random_numbers_per_device():
    torch.manual_seed(3)
    draws = [torch.rand(8, device=d).cpu() for d in DEVICES]
    torch.flagos.manual_seed_all(3)
    assert [torch.equal(torch.rand(8, device=d).cpu(), x) for d, x in zip(DEVICES, draws, strict=True)] == [True, True]
    state = torch.flagos.get_rng_state(1)
    torch.rand(8, device=DEVICES[0])
    assert torch.equal(torch.flagos.get_rng_state(1), state)


def test_threads_that_each_drive_a_device():
    """As torch.nn.DataParallel does: one thread and one replica per device, gradients gathered on the first."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    x = torch.randn(64, 16)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    replicas = [copy.deepcopy(model).to(d) for d in DEVICES]
    errors = []

    def work(index):
        try:
            torch.flagos.set_device(index)
            replica = replicas[index]
            for _ in range(50):
                replica.zero_grad()
                replica(x[index * 32 : (index + 1) * 32].to("flagos")).sum().backward()
                assert torch.flagos.current_device() == index
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors, errors
    for want, p, q in zip(expected, replicas[0].parameters(), replicas[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad.cpu() + q.grad.cpu(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
def test_peer_access_as_cuda_says():
    for i, j in ((0, 1), (1, 0)):
        assert torch.flagos.can_device_access_peer(i, j) == torch.cuda.can_device_access_peer(i, j)


@pytest.mark.cuda
def test_devices_are_cudas():
    for k in range(torch.flagos.device_count()):
        x = torch.ones(2, device=f"flagos:{k}")
        assert torch.flagos.as_cuda(x).device == torch.device("cuda", k)
        assert torch.flagos.from_cuda(torch.ones(2, device=f"cuda:{k}")).device == torch.device("flagos", k)
        with torch.flagos.device(k):
            assert torch.cuda.current_device() == k


def test_parallel_apply():
    """torch.nn.DataParallel's threads; its scatter and replicate know only cuda, so the replicas are made here."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    x = torch.randn(6, 8)
    replicas = [copy.deepcopy(model).to(d) for d in DEVICES]
    parts = [(part.to(d),) for part, d in zip(x.chunk(2), DEVICES, strict=True)]
    results = parallel_apply(replicas, parts, devices=[0, 1])
    assert [r.device for r in results] == [torch.device(d) for d in DEVICES]
    torch.testing.assert_close(torch.cat([r.cpu() for r in results]), model(x), rtol=1e-4, atol=1e-5)
