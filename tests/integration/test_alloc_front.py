"""The front before the CUDA allocator: nothing but the time of a call tells that it is there.

The first part builds tests/unit/alloc_front_test.cc, which drives the front over an allocator of its own and needs no
GPU. The second part, on the chip cuda, has one test per rule.
"""

import gc
import json
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest
import torch

import torch_fl
from tests.common.process import check_python, run_python
from tests.common.programs import compile_cxx, torch_libraries

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(torch.__file__).parent
cuda = pytest.mark.cuda
MIB = 1 << 20

# ---- without a GPU


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("alloc_front") / "test"
    sources = ["tests/unit/alloc_front_test.cc", "csrc/runtime/cuda_alloc_front.cc"]
    return compile_cxx(out, sources, "-O2", "-g", libraries=[(torch_libraries(), ["c10"])])


def run(program, *args, **env):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTORCH_")} | env
    return subprocess.run([program, *args], capture_output=True, text=True, timeout=300, env=environment)


def test_checks(program):
    done = run(program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 19


def test_other_rounding(program):
    done = run(program, "roundup", PYTORCH_ALLOC_CONF="roundup_power2_divisions:4")
    assert done.returncode == 0 and done.stdout.count("ok ") == 1, done.stdout + done.stderr


def test_cost(program):
    """The budget of one allocate and free is 150 ns, the driver's and the stream's part included."""
    assert min(float(run(program, "bench").stdout.split()[-2]) for _ in range(3)) < 150


def test_every_virtual_function_is_forwarded():
    """A function that a new PyTorch release adds would otherwise silently do what the base class does."""
    header = PACKAGE / "include/c10/cuda/CUDACachingAllocator.h"
    if not header.exists():
        pytest.skip("this torch has no CUDA headers")
    body = header.read_text().split("class CUDAAllocator : public")[1].split("\n};")[0]
    base = (PACKAGE / "include/c10/core/CachingDeviceAllocator.h").read_text()
    body += base.split("struct C10_API DeviceAllocator")[1]
    body = re.sub(r"//[^\n]*", "", body)
    names = set(re.findall(r"virtual[^;{}()]*?(\w+)\(", body)) - {"DeviceAllocator"}
    assert len(names) > 35, names
    source = (ROOT / "csrc/runtime/cuda_allocator.cc").read_text()
    missing = {n for n in names if not re.search(rf"\b{n}\([^;]*?\)( const)? override", source)}
    assert not missing


# ---- with a GPU


def tensor(nbytes, device="flagos"):
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def address_of_freed(nbytes, device="flagos"):
    t = tensor(nbytes, device)
    return t.data_ptr()


def segments():
    return torch.cuda.memory._snapshot()["segments"]


def block_at(address):
    """(segment, block) of the snapshot that holds an address."""
    for segment in segments():
        at = segment["address"]
        for block in segment["blocks"]:
            if at <= address < at + block["size"]:
                return segment, block
            at += block["size"]
    return None, None


@cuda
def test_the_front_serves_flagos_and_not_cuda():
    gc.collect()
    address = address_of_freed(5000)
    plain = tensor(5000, "cuda")
    assert plain.data_ptr() != address  # for the native allocator the block is taken
    assert tensor(4700).data_ptr() == address
    assert address_of_freed(5000, "cuda") != address


@cuda
def test_results_of_kernels_come_from_the_front():
    x = torch.ones(1000, device="flagos")
    address = (x + 1).data_ptr()
    plain = torch.ones(1000, device="cuda")
    assert plain.data_ptr() != address
    assert (x * 3).data_ptr() == address


STATISTICS = """
    import gc, json, threading, torch, torch_fl
    gc.disable()
    device, out = "flagos", []
    keys = ("allocation", "active", "allocated_bytes", "active_bytes", "requested_bytes")
    def look():
        stats = torch.flagos.memory_stats()
        out.append({k: v for k, v in stats.items() if k.split(".")[0] in keys})
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(6):
        x = torch.randn(32 + 7 * step, 64).to(device)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 2:
            look()
            torch.flagos.reset_peak_memory_stats()
        if step == 4:
            torch.flagos.reset_accumulated_memory_stats()
    look()
    sizes = [(i * 7919) % 300_000 + 1 for i in range(400)] + [(i * 104729) % 5_000_000 + 1 for i in range(60)]
    held = {}
    for i, n in enumerate(sizes * 3):
        held[i % 97] = torch.empty(n, dtype=torch.uint8, device=device if i % 5 else "cuda")
        if i % 200 == 0:
            look()
    worker = threading.Thread(target=held.clear)
    worker.start()
    worker.join()
    look()
    torch.flagos.empty_cache()
    look()
    print(json.dumps(out))
"""


@cuda
@pytest.mark.parametrize("settings", [None, "expandable_segments:True"])
def test_statistics_are_those_without_the_front(settings):
    """Current values, peaks, and what was ever allocated and freed.

    Bytes of the large pool depend on where the native allocator finds a block, which may be up to 1 MiB longer than the
    request, so that for them a part of the difference is allowed that no wrong sum would keep to.
    """
    with_front, without = (
        json.loads(check_python(STATISTICS, FLAGOS_ALLOC_FRONT=on, PYTORCH_CUDA_ALLOC_CONF=settings))
        for on in ("1", "0")
    )
    assert len(with_front) == len(without) > 8
    for k, (a, b) in enumerate(zip(with_front, without, strict=True)):
        for key in a:
            statistic, pool, _ = key.split(".")
            slack = 0
            if pool != "small_pool" and statistic in ("allocated_bytes", "active_bytes"):
                slack = 0.05 * b[key] + MIB
            assert abs(a[key] - b[key]) <= slack, (k, key, a[key], b[key])


@cuda
@pytest.mark.parametrize("largest", [900_000, 3_000_000, 40_000_000])
def test_reserved_memory_is_no_more_than_without_the_front(largest):
    code = f"""
        import torch, torch_fl
        held = {{}}
        for i in range(20000):
            held[i % 61] = torch.empty((i * 7919) % {largest} + 1, dtype=torch.uint8, device="flagos")
        print(torch.flagos.max_memory_reserved())
    """
    with_front, without = (int(check_python(code, FLAGOS_ALLOC_FRONT=on)) for on in ("1", "0"))
    assert with_front <= without * 1.1 + 4 * MIB


@cuda
def test_empty_cache_gives_back_what_any_thread_freed():
    torch.flagos.empty_cache()
    before = torch.flagos.memory_reserved()
    freed, leave = threading.Event(), threading.Event()

    def work():
        with torch.flagos.stream(torch.flagos.Stream()):
            held = [tensor(MIB) for _ in range(40)]
            del held
        freed.set()
        leave.wait()

    worker = threading.Thread(target=work)
    worker.start()
    freed.wait()
    assert torch.flagos.memory_reserved() > before
    torch.flagos.empty_cache()
    leave.set()
    worker.join()
    assert torch.flagos.memory_reserved() <= before


@cuda
def test_an_ended_thread_leaves_nothing_behind():
    torch.flagos.empty_cache()
    before = torch.flagos.memory_allocated(), torch.flagos.memory_reserved()
    worker = threading.Thread(target=lambda: [tensor(n * 1000) for n in range(1, 50)].clear())
    worker.start()
    worker.join()
    assert torch.flagos.memory_allocated() == before[0]
    torch.flagos.empty_cache()
    assert torch.flagos.memory_reserved() <= before[1]


@cuda
def test_out_of_memory_takes_what_waits_first():
    """Also: the memory fraction counts what waits as reserved, but never refuses memory because of it."""
    code = """
        import torch, torch_fl
        torch.zeros(1, device="flagos")
        total = torch.flagos.mem_get_info()[1]
        torch.flagos.set_per_process_memory_fraction(256 * 2**20 / total)
        held = [torch.empty(2**20, dtype=torch.uint8, device="flagos") for _ in range(60)]
        del held
        large = torch.empty(230 * 2**20, dtype=torch.uint8, device="flagos")
        assert torch.flagos.memory_stats()["num_ooms"] == 0
        try:
            torch.empty(100 * 2**20, dtype=torch.uint8, device="flagos")
        except torch.OutOfMemoryError as error:
            print("refused", str(error)[:60])
    """
    assert "refused" in check_python(code)


@cuda
def test_a_capture_and_a_pool_have_their_own_memory():
    waiting = address_of_freed(3000)
    before = tensor(6000)
    graph = torch.flagos.CUDAGraph()
    x = torch.ones(750, device="flagos")
    with torch.flagos.graph(graph):
        y = x + 1  # 3000 bytes
        inner = tensor(3000)
        address = before.data_ptr()
        del before  # freed meanwhile: the native allocator's at once
    assert waiting not in (y.data_ptr(), inner.data_ptr())
    for t in (y, inner):
        assert tuple(block_at(t.data_ptr())[0]["segment_pool_id"]) != (0, 0)
    assert block_at(address)[1]["state"] == "inactive"
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        t = tensor(3000)
    assert tuple(block_at(t.data_ptr())[0]["segment_pool_id"]) == tuple(pool.id)
    u = tensor(3000)
    assert tuple(block_at(u.data_ptr())[0]["segment_pool_id"]) == (0, 0)


@cuda
def test_record_stream_delays_reuse():
    side = torch.flagos.Stream()
    t = tensor(7000)
    address = t.data_ptr()
    with torch.flagos.stream(side):
        torch.cuda._sleep(200_000_000)
    t.record_stream(side)
    del t
    assert all(address_of_freed(7000) != address for _ in range(3))
    assert torch.flagos.memory_stats()["active.all.current"] > torch.flagos.memory_stats()["allocation.all.current"]
    side.synchronize()
    u = tensor(7000)
    u.record_stream(torch.flagos.current_stream())  # its own stream: nothing to wait for
    address = u.data_ptr()
    del u
    assert tensor(7000).data_ptr() == address


@cuda
def test_streams_keep_their_blocks():
    side = torch.flagos.Stream()
    with torch.flagos.stream(side):  # memory for it: when the native allocator has to get some, the front gives back
        address_of_freed(9000)
    main_address = address_of_freed(9000)
    with torch.flagos.stream(side):
        side_address = address_of_freed(9000)
    assert main_address != side_address
    assert tensor(9000).data_ptr() == main_address  # a change of stream loses nothing
    with torch.flagos.stream(side):
        t = tensor(9000)
    assert t.data_ptr() == side_address
    del t  # freed while another stream is current: it still goes to its own
    assert tensor(9000).data_ptr() == main_address


@cuda
def test_devices_keep_their_blocks():
    if torch.flagos.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = address_of_freed(9000, "flagos:0"), address_of_freed(9000, "flagos:1")
    assert tensor(9000, "flagos:0").data_ptr() == first and tensor(9000, "flagos:1").data_ptr() == second
    before = torch.flagos.memory_allocated(0)
    held = tensor(9000, "flagos:1")
    assert torch.flagos.memory_allocated(0) == before and held.device.index == 1


@cuda
def test_a_snapshot_shows_waiting_blocks_as_inactive():
    t = tensor(2000)
    address = t.data_ptr()
    del t
    assert block_at(address)[1] is None or block_at(address)[1]["state"] == "inactive"
    address_of_freed(2000)
    u = tensor(1600)  # in the block of the request before
    segment, block = block_at(u.data_ptr())
    assert (block["state"], block["size"], block["requested_size"]) == ("active_allocated", 2048, 1600)
    assert segment["requested_size"] == sum(b["requested_size"] for b in segment["blocks"] if b["state"] != "inactive")


@cuda
def test_a_history_has_every_call():
    address_of_freed(12000)
    torch.cuda.memory._record_memory_history()
    try:
        for _ in range(5):
            tensor(12000)
        trace = torch.cuda.memory._snapshot()["device_traces"][torch.flagos.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    actions = [entry["action"] for entry in trace if entry["size"] == 12288 or entry["size"] == 12000]
    assert actions.count("alloc") == 5 and actions.count("free_completed") == 5
    address = address_of_freed(12000)
    plain = tensor(12000, "cuda")  # the front is back
    assert plain.data_ptr() != address and tensor(12000).data_ptr() == address


@cuda
def test_the_memory_profiler_sees_every_call():
    from torch.profiler import ProfilerActivity, profile

    address_of_freed(13000)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        for _ in range(5):
            tensor(13000)
    sizes = [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes.count(13312) == 5 and sizes.count(-13312) == 5


@cuda
def test_sharing_with_another_process_names_the_right_block():
    tensor(4000).fill_(1)
    t = tensor(4000).fill_(7)
    segment, _ = block_at(t.data_ptr())
    shared = torch.flagos.as_cuda(t).untyped_storage()._share_cuda_()
    _, _, size, offset = shared[:4]
    assert size == 4000 and offset == t.data_ptr() - segment["address"]


@cuda
def test_a_forked_child_frees_nothing_and_ends():
    code = """
        import os, torch, torch_fl
        held = [torch.empty(1000 * n, dtype=torch.uint8, device="flagos") for n in range(1, 20)]
        torch.empty(5000, device="flagos")
        child = os.fork()
        if child == 0:
            held.clear()
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        held[0].fill_(1)
        print(int(held[0].sum()))
    """
    assert check_python(code, timeout=60).split() == ["1000"]


@cuda
def test_a_wrong_switch_is_an_error():
    done = run_python("import torch, torch_fl; torch.zeros(1, device='flagos')", FLAGOS_ALLOC_FRONT="maybe")
    assert done.returncode != 0 and "FLAGOS_ALLOC_FRONT=maybe: expected 1 or 0" in done.stderr


@cuda
def test_many_threads():
    """Blocks of eight threads and two streams, written and checked: no block has two owners."""
    torch.flagos.synchronize()
    wrong = []

    def work(k):
        with torch.flagos.stream(torch.flagos.Stream() if k % 2 else torch.flagos.default_stream()):
            held = {}
            for i in range(3000):
                slot = (i * 31 + k) % 17
                old = held.pop(slot, None)
                if old is not None and i % 50 == 0 and not bool(old[0].eq(old[1]).all()):
                    wrong.append((k, i))
                held[slot] = (torch.full(((i * 53) % 400 + 1,), float(k), device="flagos"), float(k))

    workers = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert torch_fl.chip() == "cuda"
