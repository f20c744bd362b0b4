"""Each ordering rule of streams, under 20 seeds of random delays: right programs are never wrong, a missing wait shows.

A rule is a program with one wait that can be left out. On chips without random delays only the right program runs.
"""

import contextlib

import pytest
import torch

import torch_fl
from torch_fl import _C

flagos = torch_fl.flagos
SEEDS = range(1, 21)
ROUNDS = 4
SIZE = 4096


class Bench:
    """Two streams and pinned memory; `move` copies on a stream without waiting."""

    def __init__(self):
        self.first, self.second = flagos.Stream(), flagos.Stream()
        self.source = torch.empty(SIZE).pin_memory()
        self.target = torch.empty(SIZE).pin_memory()
        self.x = torch.zeros(SIZE, device="flagos")

    def reset(self, value):
        flagos.synchronize()
        self.source.fill_(value)
        self.target.fill_(-1)
        self.x.fill_(-2)
        flagos.synchronize()

    @staticmethod
    def move(stream, to, source):
        with flagos.stream(stream):
            to.copy_(source, non_blocking=True)

    def arrived(self, value):
        return bool((self.target == value).all())


def through(bench, value, order):
    """source -> x on the first stream, x -> target on the second; `order` has to come in between."""
    bench.reset(value)
    bench.move(bench.first, bench.x, bench.source)
    order()
    bench.move(bench.second, bench.target, bench.x)
    bench.second.synchronize()
    return bench.arrived(value)


def wait_stream(b, value, wait):
    return through(b, value, lambda: b.second.wait_stream(b.first) if wait else None)


def wait_event(b, value, wait):
    return through(b, value, lambda: b.second.wait_event(b.first.record_event()) if wait else None)


def event_wait(b, value, wait):
    return through(b, value, lambda: b.first.record_event().wait(b.second) if wait else None)


def event_synchronize(b, value, wait):
    return through(b, value, lambda: b.first.record_event().synchronize() if wait else None)


def event_query(b, value, wait):
    def order():
        event = b.first.record_event()
        while wait and not event.query():
            pass

    return through(b, value, order)


def stream_synchronize(b, value, wait):
    return through(b, value, lambda: b.first.synchronize() if wait else None)


def stream_query(b, value, wait):
    def order():
        while wait and not b.first.query():
            pass

    return through(b, value, order)


def device_synchronize(b, value, wait):
    return through(b, value, lambda: flagos.synchronize() if wait else None)


def accelerator_synchronize(b, value, wait):
    return through(b, value, lambda: torch.accelerator.synchronize() if wait else None)


def same_stream(b, value, wait):
    """Work on one stream is in order without any wait; on two streams it is not."""
    b.reset(value)
    b.move(b.first, b.x, b.source)
    b.move(b.first if wait else b.second, b.target, b.x)
    b.first.synchronize()
    b.second.synchronize()
    return b.arrived(value)


def host_reads(b, value, wait):
    """A non_blocking copy to pinned memory is finished only after a synchronisation."""
    b.reset(value)
    b.move(b.first, b.x, b.source)
    b.move(b.first, b.target, b.x)
    if wait:
        b.first.synchronize()
    right = b.arrived(value)
    b.first.synchronize()
    return right


def operators(b, value, wait):
    """An operator on another stream sees a copy's result only after a wait."""
    b.reset(value)
    b.move(b.first, b.x, b.source)
    if wait:
        b.second.wait_stream(b.first)
    with flagos.stream(b.second):
        return (b.x * 2).sum().item() == 2 * value * SIZE


def record_stream(b, value, wait):
    """Memory that another stream still reads is not used again, if the stream was recorded."""
    b.reset(value)
    with flagos.stream(b.first):
        y = torch.empty(SIZE, device="flagos")
        y.copy_(b.source, non_blocking=True)
    b.second.wait_stream(b.first)
    b.move(b.second, b.target, y)
    if wait:
        y.record_stream(b.second)
    address = y.data_ptr()
    del y
    with flagos.stream(b.first):
        z = torch.empty(SIZE, device="flagos")
        z.fill_(-3)
    b.second.synchronize()
    assert wait or z.data_ptr() == address
    return b.arrived(value)


def other_device(b, value, wait):
    """An event of one device holds back a stream of another."""
    if flagos.device_count() < 2:
        pytest.skip("needs two devices")
    b.reset(value)
    b.x.fill_(value)
    y = torch.full((SIZE,), -4.0, device="flagos:1")
    flagos.synchronize(0)
    flagos.synchronize(1)
    there = flagos.Stream(device=1)
    b.move(b.first, b.target, b.x)
    if wait:
        there.wait_event(b.first.record_event())
    b.move(there, y, b.target)
    there.synchronize()
    right = bool((y == value).all())
    flagos.synchronize(0)
    return right


def context_manager(b, value, wait):
    """`with stream:` makes a stream current, so that copies in it are in order."""
    b.reset(value)
    with b.first:
        b.x.copy_(b.source, non_blocking=True)
    with b.first if wait else b.second:
        b.target.copy_(b.x, non_blocking=True)
    b.first.synchronize()
    b.second.synchronize()
    return b.arrived(value)


RULES = [
    wait_stream,
    wait_event,
    event_wait,
    event_synchronize,
    event_query,
    stream_synchronize,
    stream_query,
    device_synchronize,
    accelerator_synchronize,
    same_stream,
    host_reads,
    operators,
    record_stream,
    other_device,
    context_manager,
]


@contextlib.contextmanager
def delays(seed):
    if torch_fl.chip() != "host":
        yield
        return
    _C._sim.set_chaos(seed)
    try:
        yield
    finally:
        _C._sim.set_chaos(0)
        flagos.synchronize()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_right_program_is_never_wrong(rule):
    bench = Bench()
    for seed in SEEDS:
        with delays(seed):
            for k in range(ROUNDS):
                assert rule(bench, seed * 100.0 + k, True), f"wrong under seed {seed}, round {k}"


@pytest.mark.skipif(torch_fl.chip() != "host", reason="only the simulated chip can delay work at random")
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_missing_wait_shows(rule):
    bench = Bench()
    wrong = 0
    for seed in SEEDS:
        with delays(seed):
            wrong += sum(not rule(bench, seed * 100.0 + k, False) for k in range(ROUNDS))
    assert wrong > 0, f"{rule.__name__}: {len(SEEDS)} seeds of delays did not show that a wait is missing"
