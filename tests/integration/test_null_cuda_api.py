"""torch.flagos beside torch.cuda in one process on the null CUDA: what is the same thing under two names agrees.

Kernels do nothing there, so no result of one is looked at. One process runs every check.
"""

import inspect
import json

import pytest

import torch_fl
from tests.common import null_cuda
from tests.common.process import check_python, run_python

pytestmark = pytest.mark.skipif(null_cuda.missing() is not None, reason=f"no null CUDA: {null_cuda.missing()}")


def properties():
    import torch

    ours, theirs = torch.flagos.get_device_properties(0), torch.cuda.get_device_properties(0)
    names = [name for name in dir(theirs) if not name.startswith("_")]
    assert len(names) > 10 and {name for name in names if getattr(ours, name) != getattr(theirs, name)} == set()
    assert torch.flagos.get_device_capability() == torch.cuda.get_device_capability()
    assert torch.flagos.mem_get_info() == torch.cuda.mem_get_info()


def random_states():
    """Equal seeds and equal calls leave equal states, so the kernels get equal seeds and offsets."""
    import torch

    def state(module, device):
        module.manual_seed(7)
        x = torch.empty(1000, device=device)
        torch.nn.functional.dropout(x, 0.3)
        x.normal_()
        torch.randint(9, (5, 5), device=device)
        torch.bernoulli(x)
        return module.get_rng_state()

    ours, theirs = state(torch.flagos, "flagos"), state(torch.cuda, "cuda")
    torch.flagos.manual_seed(7)
    assert torch.equal(ours, theirs) and not torch.equal(ours, torch.flagos.get_rng_state())
    generator = torch.Generator("flagos").manual_seed(3)
    torch.rand(10, device="flagos", generator=generator)
    again = torch.Generator("cuda").manual_seed(3)
    torch.rand(10, device="cuda", generator=again)
    assert torch.equal(generator.get_state(), again.get_state())


def streams():
    import torch

    for priority in (0, -1):
        stream = torch.flagos.Stream(priority=priority)
        assert stream.priority == priority
        with torch.flagos.stream(stream):
            there = torch.cuda.current_stream()
            assert (there.stream_id, there.cuda_stream) == (stream.stream_id, stream.cuda_stream)
            assert there.priority == priority
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        assert torch.flagos.current_stream().cuda_stream == torch.cuda.current_stream().cuda_stream
    made = torch.cuda.Stream()
    assert torch.flagos.ExternalStream(made.cuda_stream).cuda_stream == made.cuda_stream
    assert torch.flagos.current_stream() == torch.flagos.default_stream()


def memory():
    import torch

    x = torch.empty(3 << 20, device="flagos")
    y = torch.empty(5 << 20, device="cuda")
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "memory_cached", "memory_stats"):
        ours, theirs = getattr(torch.flagos, name)(), getattr(torch.cuda, name)()
        assert ours == theirs, name
    assert torch.flagos.host_memory_stats() == torch.cuda.host_memory_stats()
    segments = {s["address"] for s in torch.flagos.memory_snapshot()}
    assert segments == {s["address"] for s in torch.cuda.memory_snapshot()} and len(segments) >= 2
    torch.flagos.set_per_process_memory_fraction(0.5)
    assert torch.cuda.get_per_process_memory_fraction() == 0.5
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.flagos.get_per_process_memory_fraction() == 1.0
    pool = torch.flagos.MemPool()
    with torch.flagos.use_mem_pool(pool):
        z = torch.empty(1 << 20, device="flagos")
    (segment,) = torch.cuda.memory_snapshot(pool.id)
    assert segment["address"] <= z.data_ptr() < segment["address"] + segment["total_size"]
    del x, y, z
    torch.flagos.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()


def modes():
    import torch

    torch.flagos.set_sync_debug_mode("warn")
    assert torch.cuda.get_sync_debug_mode() == torch.flagos.get_sync_debug_mode() == 1
    torch.cuda.set_sync_debug_mode(0)
    assert torch.flagos.get_sync_debug_mode() == 0
    assert not torch.flagos.is_current_stream_capturing()
    graph = torch.flagos.CUDAGraph()
    with torch.flagos.graph(graph):
        assert torch.flagos.is_current_stream_capturing() and torch.cuda.is_current_stream_capturing()
        torch.zeros(8, device="flagos").add_(1)
    graph.replay()
    torch.flagos.synchronize()


def failed_recording():
    """After a recording that could not end work goes where it went before, and an error waits for cached memory."""
    import ctypes
    import os

    import torch

    null = ctypes.CDLL(os.environ["LD_PRELOAD"].split(":")[0])
    x, pool = torch.ones(4, device="flagos"), torch.flagos.graph_pool_handle()
    for arguments in ({}, {"pool": pool}, {"stream": torch.flagos.Stream(1)}):
        for function in (b"cudaStreamBeginCapture", b"cudaStreamEndCapture"):
            null.null_cuda_fail(function, 901)
            try:
                with torch.flagos.graph(torch.flagos.CUDAGraph(), **arguments):
                    x + 1
            except RuntimeError as error:
                assert "null CUDA" in str(error)
            else:
                raise AssertionError(f"{function} did not fail")
            for device in (1, 0):
                assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
            assert torch.flagos.current_device() == 0
    torch.flagos.empty_cache()
    limit = (256 << 20) + torch.flagos.memory_reserved()
    torch.flagos.set_per_process_memory_fraction(limit / torch.flagos.mem_get_info()[1])
    cached = [torch.empty(40 << 20, dtype=torch.uint8, device="flagos") for _ in range(4)]
    del cached
    torch.empty(200 << 20, dtype=torch.uint8, device="flagos")
    torch.flagos.set_per_process_memory_fraction(1.0)


def profiler():
    """CUPTI needs a driver; what is left are the operators, and the events of the profiler without Kineto."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import torch_fl

    x = torch.empty(8, 8, device="flagos", requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.PrivateUse1]) as prof, torch_fl.profile_backends():
        (x @ x).sum().backward()
    names = [event.name for event in prof.events()]
    assert names.count("flagos::mm[cuda]") == 3 and "MmBackward0" in names
    assert sum(name.startswith("cuda::") for name in names) == 0
    with torch.autograd.profiler.profile(use_device="flagos", use_kineto=False) as prof:
        x @ x
    assert [e.name for e in prof.function_events].count("aten::mm") == 1
    assert all(e.device_time_total >= 0 for e in prof.function_events)


def legacy_types():
    import torch

    for kind in ("Float", "Half", "Long", "Bool"):
        ours, theirs = getattr(torch.flagos, f"{kind}Tensor"), getattr(torch.cuda, f"{kind}Tensor")
        assert ours.dtype is theirs.dtype and ours(2, 3).shape == theirs(2, 3).shape
        assert isinstance(torch.ones(2).type(ours), ours) and not isinstance(torch.ones(2).type(ours), theirs)
        assert ours(2).storage().type() == f"torch.flagos.{kind}Storage"


CHECKS = (properties, random_states, streams, memory, modes, failed_recording, profiler, legacy_types)


@pytest.fixture(scope="module")
def failures():
    """Check -> its traceback, of one process that runs them all."""
    code = "\n".join(inspect.getsource(check) for check in CHECKS)
    code += f"\nfailed = {{}}\nfor check in ({', '.join(check.__name__ for check in CHECKS)}):\n"
    code += "    try: check()\n    except Exception: failed[check.__name__] = traceback.format_exc()\n"
    said = check_python(f"import json, traceback\n{code}print(json.dumps(failed))", **null_cuda.environment(devices=2))
    return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_beside_torch_cuda(check, failures):
    assert check.__name__ not in failures, failures[check.__name__]


def keys(module, device):
    """The keys of each kind of dictionary that says something of memory."""
    import torch

    module.memory._record_memory_history()
    try:
        kept = [torch.empty(1000, device=device), torch.empty(10).pin_memory()]
        snapshot = module.memory._snapshot()
    finally:
        module.memory._record_memory_history(enabled=None)
    del kept
    events = [event for trace in snapshot["device_traces"] for event in trace if event["action"] == "alloc"]
    segment = snapshot["segments"][0]
    return {
        "memory_stats": sorted(module.memory_stats()),
        "host_memory_stats": sorted(module.host_memory_stats()),
        "snapshot": sorted(snapshot),
        "segment": sorted(segment),
        "block": sorted(segment["blocks"][0]),
        "event": sorted(events[-1]),
    }


def test_memory_is_described_with_torch_s_keys(device):
    """Those of the chip of this process, and torch.cuda's own."""
    code = f"import json, torch\n{inspect.getsource(keys)}\nprint(json.dumps(keys(torch.cuda, 'cuda')))"
    theirs = json.loads(
        check_python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0", **null_cuda.environment()).splitlines()[-1]
    )
    ours = keys(torch_fl.flagos, device)
    assert {name: set(of) - set(ours[name]) for name, of in theirs.items() if set(of) - set(ours[name])} == {}
    assert ours["memory_stats"] == theirs["memory_stats"] and len(theirs["memory_stats"]) > 50


def test_the_doctor_notices_kernels_that_do_nothing():
    code = "import sys, runpy; sys.argv = ['', 'doctor', '--json']; runpy.run_module('torch_fl', run_name='__main__')"
    result = run_python(code, FLAGOS_DISABLE_FLAGGEMS_PY="1", **null_cuda.environment())
    assert result.returncode == 1, result.stderr
    found = json.loads(result.stdout)
    failed = {entry["check"]: entry["lines"][0] for entry in found["checks"] if entry["status"] == "failed"}
    assert found["failed"] == len(failed) and not found["ok"]
    assert {"arithmetic", "autograd"} <= set(failed) and "cuda: exp differs from the CPU" in failed["arithmetic"]
