"""Device memory: statistics, reuse, streams, giving the cache back, raw allocations, snapshots."""

import gc
import threading

import pytest
import torch

import torch_fl
from torch_fl import _C

flagos = torch_fl.flagos
MIB = 1 << 20
on_hal = pytest.mark.skipif(
    torch_fl.chip() == "cuda", reason="states figures of our own allocator, CUDA brings its own"
)
on_host = pytest.mark.skipif(torch_fl.chip() != "host", reason="drives the simulated host chip")


@pytest.fixture(autouse=True)
def empty(clean_slate):
    gc.collect()
    flagos.synchronize()
    flagos.empty_cache()
    yield
    if torch_fl.chip() == "host":
        _C._sim.release()
        _C._sim.set_fail("")


def stats(name, field="current", pool="all"):
    return torch.accelerator.memory_stats()[f"{name}.{pool}.{field}"]


def test_torch_accelerator_memory_works():
    before = torch.accelerator.memory_allocated()
    x = torch.empty(3 * MIB, dtype=torch.uint8, device="flagos")
    assert torch.accelerator.memory_allocated() - before >= 3 * MIB
    assert torch.accelerator.max_memory_allocated() >= before + 3 * MIB
    assert torch.accelerator.memory_reserved() >= torch.accelerator.memory_allocated()
    del x
    assert torch.accelerator.memory_allocated() == before
    free, total = torch.accelerator.get_memory_info()
    assert 0 < free <= total


def test_counts_follow_tensors():
    count, requested = stats("allocation"), stats("requested_bytes")
    tensors = [torch.empty(n, dtype=torch.uint8, device="flagos") for n in (1, 511, 513, 5000)]
    assert stats("allocation") == count + 4
    assert stats("requested_bytes") == requested + 1 + 511 + 513 + 5000
    del tensors
    assert stats("allocation") == count
    assert stats("requested_bytes") == requested


def test_results_of_operators_are_counted():
    x = torch.ones(1000, device="flagos")
    before = stats("allocation")
    y = x + x
    assert stats("allocation") == before + 1
    del y
    assert stats("allocation") == before


def test_peaks():
    flagos.reset_peak_memory_stats()
    base = flagos.memory_allocated()
    x = torch.empty(8 * MIB, dtype=torch.uint8, device="flagos")
    del x
    assert flagos.memory_allocated() == base
    assert flagos.max_memory_allocated() >= base + 8 * MIB
    flagos.reset_peak_memory_stats()
    assert flagos.max_memory_allocated() == base


def test_accumulated():
    flagos.reset_accumulated_memory_stats()
    x = torch.empty(10, device="flagos")
    assert stats("allocation", "allocated") == 1
    assert stats("allocation", "freed") == 0
    del x
    assert stats("allocation", "freed") == 1


def test_freed_memory_is_reused_at_once():
    x = torch.empty(100, device="flagos")
    address = x.data_ptr()
    del x
    assert torch.empty(100, device="flagos").data_ptr() == address


def test_empty_cache_gives_memory_back():
    before = flagos.memory_reserved()  # not nothing: libraries have workspaces
    x = torch.empty(64 * MIB, dtype=torch.uint8, device="flagos")
    del x
    assert flagos.memory_reserved() >= before + 64 * MIB
    flagos.empty_cache()
    assert flagos.memory_reserved() <= before


@on_host
def test_the_chip_holds_what_we_reserve():
    x = torch.empty(64 * MIB, dtype=torch.uint8, device="flagos")
    assert _C._sim.live(0)[1] == flagos.memory_reserved(0)
    del x
    flagos.empty_cache()
    assert _C._sim.live(0)[1] == flagos.memory_reserved(0)


@on_hal
def test_segments_are_shared_and_merged():
    tensors = [torch.empty(100 * 1024, dtype=torch.uint8, device="flagos") for _ in range(15)]
    reserved = flagos.memory_reserved()
    del tensors
    x = torch.empty(MIB, dtype=torch.uint8, device="flagos")  # needs neighbours merged
    assert flagos.memory_reserved() == reserved
    assert x.untyped_storage().nbytes() == MIB


def test_devices_are_counted_apart():
    if flagos.device_count() < 2:
        pytest.skip("needs two devices")
    before = flagos.memory_allocated(0), flagos.memory_allocated(1)
    x = torch.empty(5 * MIB, dtype=torch.uint8, device="flagos:1")
    assert x.device.index == 1
    assert flagos.memory_allocated(0) == before[0]
    assert flagos.memory_allocated(1) >= before[1] + 5 * MIB
    assert flagos.current_device() == 0


@on_host
def test_record_stream_keeps_memory_until_the_stream_is_done():
    side = torch.Stream(device="flagos")
    x = torch.empty(5000, device="flagos")
    address = x.data_ptr()
    _C._sim.hold(side.stream_id, side.device_index)
    x.record_stream(side)
    active = stats("active")
    del x
    assert stats("active") == active
    y = torch.empty(5000, device="flagos")
    assert y.data_ptr() != address
    _C._sim.release()
    side.synchronize()
    del y
    torch.empty(1, device="flagos")
    assert stats("active") == active - 1


@on_host
def test_without_record_stream_memory_is_reused():
    """The control of the test above: the held stream alone does not keep the memory."""
    side = torch.Stream(device="flagos")
    x = torch.empty(5000, device="flagos")
    address = x.data_ptr()
    _C._sim.hold(side.stream_id, side.device_index)
    del x
    assert torch.empty(5000, device="flagos").data_ptr() == address


def test_streams_have_their_own_memory():
    x = torch.empty(5000, device="flagos")
    address = x.data_ptr()
    del x
    with flagos.stream(torch.Stream(device="flagos")):
        assert torch.empty(5000, device="flagos").data_ptr() != address


def test_raw_allocations():
    before = flagos.memory_allocated()
    ptr = flagos.caching_allocator_alloc(3 * MIB)
    assert ptr != 0
    assert flagos.memory_allocated() >= before + 3 * MIB
    flagos.caching_allocator_delete(ptr)
    assert flagos.memory_allocated() == before


@on_hal
def test_raw_delete_of_a_foreign_address():
    with pytest.raises(RuntimeError, match="did not come from caching_allocator_alloc"):
        flagos.caching_allocator_delete(12345)


def test_snapshot_adds_up():
    x = torch.empty(1000, dtype=torch.uint8, device="flagos")
    segments = [s for s in flagos.memory_snapshot() if s["device"] == 0]
    assert sum(s["total_size"] for s in segments) == flagos.memory_reserved(0)
    assert sum(s["allocated_size"] for s in segments) == flagos.memory_allocated(0)
    for segment in segments:
        assert sum(b["size"] for b in segment["blocks"]) == segment["total_size"]
    mine = [b for s in segments for b in s["blocks"] if b["address"] == x.data_ptr()]
    assert len(mine) == 1
    assert (mine[0]["state"], mine[0]["requested_size"]) == ("active_allocated", 1000)


def test_zero_bytes():
    before = stats("allocation")
    x = torch.empty(0, device="flagos")
    assert x.data_ptr() == 0
    assert stats("allocation") == before


def test_threads_leave_nothing_behind():
    before = flagos.memory_allocated(), stats("allocation")
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        held = {}
        for i in range(400):
            key = int(torch.randint(20, (), generator=generator))
            if key in held:
                value, tensor = held.pop(key)
                if not bool((tensor == value).all()):
                    wrong.append((seed, i))
            else:
                size = int(torch.randint(1, 3000, (), generator=generator))
                held[key] = (i, torch.full((size,), i, device="flagos"))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    gc.collect()
    assert (flagos.memory_allocated(), stats("allocation")) == before


def test_bad_index_names_the_count():
    with pytest.raises((RuntimeError, ValueError), match=r"flagos:77 does not exist: this machine has \d+"):
        _C._mem_info(77)


@on_host
def test_fault_in_malloc_is_one_error_and_leaves_the_device_usable():
    _C._sim.set_fail("malloc@1=INTERNAL")
    with pytest.raises(RuntimeError, match=r"flagos: allocating device memory failed on flagos:0 \(host\): INTERNAL"):
        torch.empty(100 * MIB, dtype=torch.uint8, device="flagos")
    _C._sim.set_fail("")
    assert torch.ones(10, device="flagos").sum().item() == 10
