"""Where memory comes from: recorded history in the form of torch's viewer; pools that a program makes."""

import gc
import pickle
import threading

import pytest
import torch
from torch.cuda import _memory_viz

import torch_fl

MIB = 1 << 20
memory = torch.flagos.memory


@pytest.fixture
def recording():
    def start(**options):
        memory._record_memory_history(clear_history=True, **options)

    yield start
    memory._record_memory_history(enabled=None, clear_history=True)


def trace(device=0):
    return memory._snapshot()["device_traces"][device]


def events_of(address, events):
    return [event["action"] for event in events if event.get("addr") == address]


def functions(frames):
    return [frame["name"] for frame in frames]


def allocate_in_a_function():
    return torch.ones(3 * MIB, device="flagos:0")


def test_events_have_their_call_stacks(recording, device):
    torch.flagos.empty_cache()
    recording(stacks="python")
    x = allocate_in_a_function()
    address, size = x.data_ptr(), x.nbytes
    del x
    torch.flagos.empty_cache()
    events = trace()
    assert events_of(address, events) == ["segment_alloc", "alloc", "free_requested", "free_completed", "segment_free"]
    alloc = next(e for e in events if e["action"] == "alloc" and e["addr"] == address)
    assert alloc["size"] >= size and "allocate_in_a_function" in functions(alloc["frames"])
    frame = next(f for f in alloc["frames"] if f["name"] == "allocate_in_a_function")
    assert frame["filename"].endswith("test_memory_history.py") and frame["line"] > 0
    freed = next(e for e in events if e["action"] == "free_completed" and e["addr"] == address)
    assert "test_events_have_their_call_stacks" in functions(freed["frames"])
    times = [event["time_us"] for event in events]
    assert times == sorted(times)


def test_live_blocks_and_segments_have_their_call_stacks(recording, device):
    torch.flagos.empty_cache()
    recording(enabled="state", stacks="python")
    x = allocate_in_a_function()
    snapshot = memory._snapshot("flagos:0")
    (segment,) = [s for s in snapshot["segments"] if s["address"] == x.data_ptr()]
    assert "allocate_in_a_function" in functions(segment["frames"])
    assert "allocate_in_a_function" in functions(segment["blocks"][0]["frames"])
    # torch's own allocator keeps the last one
    assert len(snapshot["device_traces"][0]) <= (torch_fl.chip() == "cuda"), "enabled='state' keeps no events"
    memory._record_memory_history(enabled=None)
    y = allocate_in_a_function()
    (segment,) = [s for s in memory.memory_snapshot() if s["address"] == y.data_ptr()]
    assert segment["blocks"][0]["frames"] == []


def test_context_says_what_has_a_call_stack(recording, device):
    of_alloc = torch_fl.chip() == "cuda"  # torch's own allocator shows a block's allocation where it knows no better
    for context, stacks in ((None, (False, False)), ("alloc", (True, of_alloc)), ("all", (True, True))):
        recording(context=context, stacks="python")
        x = allocate_in_a_function()
        del x
        events = {event["action"]: bool(event.get("frames")) for event in trace()}
        assert (events["alloc"], events["free_completed"]) == stacks, context


def test_stacks_with_cpp_frames(recording, device):
    recording(stacks="all")
    x = allocate_in_a_function()
    names = functions(next(e for e in reversed(trace()) if e.get("addr") == x.data_ptr())["frames"])
    assert "allocate_in_a_function" in names and any("::" in name for name in names)


def test_history_is_bounded_and_can_stop(recording, device):
    recording(max_entries=10, stacks="python")
    for _ in range(20):
        torch.ones(4, device=device)
    assert len(trace()) == 10
    memory._record_memory_history(enabled=None)
    before = len(trace())
    torch.ones(4, device=device)
    assert len(trace()) == before


def test_out_of_memory_is_an_event(recording, device):
    recording(stacks="python")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    (event,) = [e for e in trace() if e["action"] == "oom"]
    assert event["size"] >= 1 << 50 and event["device_free"] > 0 and event["frames"]


@pytest.mark.skipif(torch_fl.chip() != "host", reason="holds a stream of the simulated device")
def test_freeing_waits_for_other_streams(recording, device):
    sim, side = torch_fl._C._sim, torch.flagos.Stream()
    recording(stacks="python")
    sim.hold(side.stream_id, 0)
    x = torch.ones(3 * MIB, device=device)
    address = x.data_ptr()
    x.record_stream(side)
    del x
    assert events_of(address, trace())[-1] == "free_requested"
    sim.release()
    side.synchronize()
    torch.ones(1, device=device)  # the allocator asks for the events here
    assert events_of(address, trace())[-1] == "free_completed"


def test_torch_s_viewer_reads_it(recording, device, tmp_path):
    recording()
    keep = [torch.ones(k * MIB, device=device) for k in (1, 3)]
    (torch.ones(64, 64, device=device, requires_grad=True) @ keep[0][:64, None]).sum().backward()
    path = tmp_path / "snapshot.pickle"
    memory._dump_snapshot(str(path))
    snapshot = pickle.loads(path.read_bytes())
    assert "alloc" in _memory_viz.trace(snapshot) and _memory_viz.segsum(snapshot)
    flames = [line.rsplit(" ", 1) for line in _memory_viz.memory(snapshot, lambda lines: lines).splitlines()]
    assert sum(int(size) for place, size in flames if "test_torch_s_viewer_reads_it" in place) >= 16 * MIB
    for plot in (_memory_viz.trace_plot, _memory_viz.segment_plot):
        assert "<script" in plot(snapshot)


def test_threads_record_while_others_take_snapshots(recording, device):
    recording(stacks="python", max_entries=1000)
    failures = []

    def work():
        try:
            for _ in range(200):
                torch.ones(100, device=device) + 1
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory._snapshot()
    for thread in threads:
        thread.join()
    assert not failures and len(trace()) == 1000


def test_wrong_options_are_named(device):
    for options, words in (({"enabled": "some"}, "enabled='some'"), ({"stacks": "c"}, "stacks='c'")):
        with pytest.raises((ValueError, RuntimeError), match=words if torch_fl.chip() != "cuda" else ""):
            memory._record_memory_history(**options)


# ---- pools


def segments(pool):
    return {s["address"]: s["total_size"] for s in pool.snapshot()}


def inside(tensor, found):
    return any(address <= tensor.data_ptr() < address + size for address, size in found.items())


def test_pool_keeps_its_memory_apart(device):
    torch.flagos.empty_cache()
    pool, other = torch.flagos.MemPool(), torch.flagos.MemPool()
    outside = torch.ones(8, device=device)
    with torch.flagos.use_mem_pool(pool):
        small, large = torch.ones(8, device=device), torch.ones(3 * MIB, device=device)
        with torch.flagos.use_mem_pool(other):
            nested = torch.ones(8, device=device)
        again = torch.ones(8, device=device)
    after = torch.ones(8, device=device)
    mine = segments(pool)
    assert all(inside(t, mine) for t in (small, large, again))
    assert not any(inside(t, mine) for t in (outside, nested, after)) and inside(nested, segments(other))
    assert {s["segment_pool_id"] for s in pool.snapshot()} == {tuple(pool.id)}
    assert (small + large[:8] + again).tolist() == [3.0] * 8


def test_pool_s_free_memory_stays_with_it_until_it_ends(device):
    pool = torch.flagos.MemPool()
    with torch.flagos.use_mem_pool(pool):
        x = torch.ones(3 * MIB, device=device)
    address = x.data_ptr()
    del x
    torch.flagos.empty_cache()
    assert address in segments(pool)
    elsewhere = torch.ones(3 * MIB, device=device)
    assert elsewhere.data_ptr() != address
    with torch.flagos.use_mem_pool(pool):
        assert torch.ones(3 * MIB, device=device).data_ptr() == address
    reserved = torch.flagos.memory_reserved()
    del pool
    gc.collect()
    assert torch.flagos.memory_reserved() <= reserved - 12 * MIB


def test_tensors_outlive_their_pool(device):
    pool = torch.flagos.MemPool()
    with torch.flagos.use_mem_pool(pool):
        x = torch.full((1000,), 3.0, device=device)
    del pool
    gc.collect()
    assert x.sum().item() == 3000
    before = torch.flagos.memory_reserved()
    del x
    torch.flagos.empty_cache()
    assert torch.flagos.memory_reserved() < before


def test_pool_is_the_thread_s_and_the_device_s(device):
    pool, found = torch.flagos.MemPool(), []
    with torch.flagos.use_mem_pool(pool, "flagos:0"):
        thread = threading.Thread(target=lambda: found.append(torch.ones(8, device="flagos:0")))
        thread.start()
        thread.join()
        if torch.flagos.device_count() > 1:
            found.append(torch.ones(8, device="flagos:1"))
        x = torch.ones(8, device="flagos:0")
    assert inside(x, segments(pool)) and not any(inside(t, segments(pool)) for t in found)


def test_use_count_and_misuse(device):
    pool = torch.flagos.MemPool()
    before = pool.use_count()
    with pytest.raises(ZeroDivisionError), torch.flagos.use_mem_pool(pool):
        assert pool.use_count() == before + 1
        1 / 0  # noqa: B018
    assert pool.use_count() == before
    if torch_fl.chip() != "cuda":
        with pytest.raises(TypeError, match=r"expected a torch\.flagos\.MemPool"), torch.flagos.use_mem_pool(3):
            pass
        with pytest.raises(NotImplementedError, match="plain pools"):
            torch.flagos.MemPool(use_on_oom=True)
