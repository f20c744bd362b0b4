"""Every injected HAL fault becomes one clean Python exception: nothing leaks and the device works afterwards.

For each piece of work the entries of the HAL that it calls are counted once; then each entry is made to fail at its
first, middle and last call.
"""

import gc

import pytest
import torch

import torch_fl
from tests.common.process import check_python

pytestmark = pytest.mark.skipif(torch_fl.chip() != "host", reason="faults are injected into the simulated device")

sim = torch_fl._C._sim

ENTRIES = """mem_info device_info malloc free
host_malloc host_free pointer_info host_alias copy_async copy2d_async fill_async
stream_create stream_destroy stream_sync stream_query stream_native_handle stream_priority_range stream_host_func
event_create event_destroy event_record event_sync event_query event_elapsed_ms stream_wait_event device_sync
can_access_peer enable_peer last_error""".split()

# Calls whose failure need not surface, with the reason; "entry in work" means only there. Everything else must raise.
QUIET = {
    "event_create in copies": "a pinned block that cannot be recorded is waited for instead",
    "event_record in copies": "a pinned block that cannot be recorded is waited for instead",
    "event_create in streams_and_events": "the last ones are of freed blocks, which are waited for instead",
    "event_record in streams_and_events": "the last ones are of freed blocks, which are waited for instead",
    "event_destroy": "called from destructors, which cannot raise",
    "host_free": "called from destructors, which cannot raise",
    "stream_query": "only asked whether cached memory may be reused: a failure means 'not yet'",
    "event_query": "only asked whether cached memory may be reused: a failure means 'not yet'",
    "last_error": "called while another error is being reported",
    "pointer_info": "a pointer that cannot be looked up counts as ordinary host memory",
}


def create():
    return [
        torch.empty(300_000, device="flagos"),
        torch.zeros(5, device="flagos"),
        torch.ones(9 << 20, device="flagos"),
    ]


def copies():
    host = torch.arange(1000.0)
    there = host.to("flagos")
    pinned = host.pin_memory()
    again = pinned.to("flagos", non_blocking=True)
    back = torch.empty_like(host).pin_memory()
    back.copy_(again, non_blocking=True)
    torch.flagos.synchronize()
    assert torch.equal(there.cpu(), host) and torch.equal(back, host)


def operators():
    x = torch.ones(64, 64, device="flagos")
    return (x @ x + 1).relu().sum().item(), torch.cat([x, x]).sort().values[0, 0].item()


def between_devices():
    if torch.flagos.device_count() > 1:
        x = torch.ones(1000, device="flagos:0").to("flagos:1").to("flagos:0")
        assert x.sum().item() == 1000


def streams_and_events():
    stream = torch.flagos.Stream()
    start, end = (torch.flagos.Event(enable_timing=True) for _ in range(2))
    start.record()
    with torch.flagos.stream(stream):
        stream.wait_event(start)
        x = torch.full((1000,), 2.0).pin_memory().to("flagos", non_blocking=True)
        end.record(stream)
    x.record_stream(torch.flagos.current_stream())
    end.synchronize()
    assert start.elapsed_time(end) >= 0 and end.query() and stream.query()
    torch.flagos.current_stream().wait_stream(stream)
    stream.synchronize()
    assert x.sum().item() == 2000


def free_and_empty():
    held = [torch.empty(1 << 20, device="flagos") for _ in range(4)]
    del held
    torch.flagos.empty_cache()


def questions():
    torch.flagos.mem_get_info()
    torch.flagos.synchronize()
    torch.ones(3).pin_memory().is_pinned()
    if torch.flagos.device_count() > 1:
        torch.flagos.can_device_access_peer(0, 1)


def resize():
    x = torch.arange(10.0, device="flagos")
    x.resize_(1 << 20)
    x.untyped_storage().resize_(0)
    x.untyped_storage().resize_(400)


def backward():
    weight = torch.ones(32, 32, device="flagos", requires_grad=True)
    (weight @ weight).sum().backward()
    assert weight.grad[0, 0].item() == 64


def save_and_load():
    import io

    buffer = io.BytesIO()
    torch.save(torch.ones(5, device="flagos"), buffer)
    buffer.seek(0)
    assert torch.load(buffer).sum().item() == 5


WORK = [
    create,
    copies,
    operators,
    between_devices,
    streams_and_events,
    free_and_empty,
    questions,
    resize,
    backward,
    save_and_load,
]


def settle():
    """A known state: nothing planned, nothing cached, so that the same work makes the same calls."""
    sim.set_fail("")
    gc.collect()
    torch.flagos.synchronize()
    torch.flagos.empty_cache()
    torch.flagos._host_empty_cache() if hasattr(torch.flagos, "_host_empty_cache") else torch_fl._C._host_empty_cache()


def calls_of(work):
    """entry -> number of calls, for those the work makes."""
    work()  # things made once per process
    settle()
    sim.set_fail("")  # resets the counters
    work()
    counts = {entry: sim.calls(entry) for entry in ENTRIES}
    settle()
    return {entry: n for entry, n in counts.items() if n}


def cases_of(work):
    return [(entry, n) for entry, count in calls_of(work).items() for n in sorted({1, (count + 1) // 2, count})]


def live():
    return [sim.live(k) for k in range(torch.flagos.device_count())]


@pytest.mark.parametrize("work", WORK, ids=lambda w: w.__name__)
def test_each_fault_is_one_clean_exception(work):
    problems = []
    for entry, n in cases_of(work):
        settle()
        blocks, allocated = live(), torch.flagos.memory_allocated()
        sim.set_fail(f"{entry}@{n}=INTERNAL")
        error = None
        try:
            work()
        except Exception as caught:
            error = caught
            text, kind = str(caught), type(caught)
            # The traceback keeps the work's frame, and with it its tensors.
            caught.__traceback__ = None
        where = f"{entry}@{n}"
        if error is None and not {entry, f"{entry} in {work.__name__}"} & QUIET.keys():
            problems.append(f"{where}: raised nothing")
        elif error is not None:
            if not issubclass(kind, RuntimeError):
                problems.append(f"{where}: {kind.__name__}: {text[:200]}")
            elif "INTERNAL" not in text.split("\n")[0] or "flagos" not in text:
                problems.append(f"{where}: unclear: {text[:200]}")
        error = None
        settle()
        if torch.flagos.memory_allocated() != allocated:
            problems.append(f"{where}: {torch.flagos.memory_allocated() - allocated} bytes leaked in tensors")
        if live() != blocks:
            problems.append(f"{where}: device allocations {blocks} -> {live()}")
        try:
            work()
        except Exception as later:
            problems.append(f"{where}: not usable afterwards: {str(later)[:200]}")
    settle()
    assert not problems, "\n".join(problems)


def test_there_are_enough_cases():
    total = sum(len(cases_of(work)) for work in WORK)
    entries = {entry for work in WORK for entry, _ in cases_of(work)}
    assert total >= 60 and len(entries) >= 15, (total, sorted(entries))


@pytest.mark.parametrize("entry", ["event_create", "event_record"])
def test_event_faults_reach_the_user(entry):
    settle()
    event = torch.flagos.Event()
    sim.set_fail(f"{entry}@1=INTERNAL")
    with pytest.raises(RuntimeError, match="INTERNAL"):
        event.record()
    settle()
    event.record()
    event.synchronize()
    assert event.query()


def test_out_of_memory_frees_the_cache_and_retries():
    settle()
    sim.set_fail("malloc@1=OUT_OF_MEMORY")
    x = torch.empty(1 << 20, device="flagos")  # the retry succeeds
    assert x.numel() == 1 << 20 and sim.calls("malloc") >= 2
    del x
    settle()
    blocks = live()
    sim.set_fail(";".join(f"malloc@{k}=OUT_OF_MEMORY" for k in range(1, 9)))
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(1 << 20, device="flagos")
    text = str(error.value)
    assert "MiB" in text or "GiB" in text or "bytes" in text
    assert "in tensors" in text and "the chip" in text, text
    settle()
    assert live() == blocks and torch.empty(1 << 20, device="flagos").numel() == 1 << 20


@pytest.mark.parametrize(
    "status", ["INVALID_ARGUMENT", "UNSUPPORTED", "TIMEOUT", "FAILED_PRECONDITION", "UNAVAILABLE", "NOT_FOUND"]
)
def test_every_status_is_named_in_the_message(status):
    pinned = torch.ones(1000).pin_memory()
    settle()
    sim.set_fail(f"copy_async@1={status}")
    with pytest.raises(RuntimeError, match=rf"flagos:0.*{status}"):
        pinned.to("flagos", non_blocking=True)
    settle()
    assert pinned.to("flagos", non_blocking=True).sum().item() == 1000


def test_lost_device_stays_lost_and_says_so():
    check_python(
        """
        import torch, torch_fl
        sim = torch_fl._C._sim
        x = torch.ones(4, device="flagos")
        other = torch.ones(4, device="flagos:1") if torch.flagos.device_count() > 1 else None
        sim.set_fail("stream_sync@1=DEVICE_LOST")
        allocate = lambda: torch.empty(1 << 22, device="flagos")
        for use in (lambda: x.cpu(), lambda: x + 1, torch.flagos.synchronize, allocate):
            try:
                use()
            except RuntimeError as error:
                assert "DEVICE_LOST" in str(error), error
            else:
                raise AssertionError("a lost device answered")
        if other is not None:
            assert other.sum().item() == 4, "another device was affected"
        sim.set_fail("")
        assert x.sum().item() == 4
        """,
        FLAGOS_ACCELERATOR="host",
    )


def test_fault_plan_from_the_environment():
    check_python(
        """
        import torch
        torch.ones(2, device="flagos")
        failures = 0
        for _ in range(60):
            try:
                torch.empty(3 << 20, dtype=torch.uint8, device="flagos").fill_(1)
                torch.flagos.empty_cache()
            except RuntimeError as error:
                assert "INTERNAL" in str(error), error
                failures += 1
        assert failures == 1, failures
        """,
        FLAGOS_SIM_FAIL="malloc@17=INTERNAL",
        FLAGOS_ACCELERATOR="host",
    )


def test_malformed_plan_names_the_item():
    for plan, word in (
        ("malloc@x=INTERNAL", "malloc@x"),
        ("nope@1=INTERNAL", "nope"),
        ("malloc@1=WHAT", "WHAT"),
        ("malloc", "malloc"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=word):
            sim.set_fail(plan)
    assert torch.ones(2, device="flagos").sum().item() == 2


def test_fault_in_the_backward_thread():
    settle()
    x = torch.ones(64, 64, device="flagos", requires_grad=True)
    y = (x @ x).sum()
    sim.set_fail("stream_sync@2=INTERNAL")
    with pytest.raises(RuntimeError, match="INTERNAL"):
        y.backward()
    settle()
    x.grad = None
    (x @ x).sum().backward()
    assert x.grad[0, 0].item() == 128


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_delays_change_no_result(seed):
    """Seeded delays of stream tasks: a missing wait would read memory too early."""
    settle()
    sim.set_chaos(seed)
    try:
        for k in range(10):
            host = torch.full((20_000,), float(k)).pin_memory()
            stream = torch.flagos.Stream()
            with torch.flagos.stream(stream):
                x = host.to("flagos", non_blocking=True)
                y = x * 2
            torch.flagos.current_stream().wait_stream(stream)
            y.record_stream(torch.flagos.current_stream())
            assert y.sum().item() == 40_000.0 * k
            back = torch.empty(20_000).pin_memory()
            back.copy_(y, non_blocking=True)
            torch.flagos.synchronize()
            assert back[-1].item() == 2.0 * k
    finally:
        sim.set_chaos(0)
