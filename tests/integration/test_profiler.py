"""torch.profiler on flagos: operators with their times, record_function, traces; which backend served."""

import json
import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

import torch_fl


@pytest.fixture
def work(device):
    x = torch.randn(64, 64, device=device, requires_grad=True)

    def run():
        with record_function("my region"):
            y = (x @ x).relu()
        y.sum().backward()
        torch_fl.flagos.synchronize()

    return run


def test_operators_and_regions_have_times(work):
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
        work()
    rows = {row.key: row for row in prof.key_averages()}
    for name in ("aten::mm", "aten::relu", "my region", "autograd::engine::evaluate_function: MmBackward0"):
        assert rows[name].count >= 1 and rows[name].cpu_time_total > 0, name
    shapes = {str(row.input_shapes) for row in prof.key_averages(group_by_input_shape=True) if row.key == "aten::mm"}
    assert "[[64, 64], [64, 64]]" in shapes
    assert "aten::mm" in prof.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)


def test_operators_appear_once(device):
    """Relabelled kernels run below the operator: they are not counted as operators of their own."""
    x = torch.ones(8, 8, device=device)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        for _ in range(5):
            x @ x
    assert {row.key: row.count for row in prof.key_averages()}["aten::mm"] == 5


def test_region_contains_its_operators(work):
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        work()
    (region,) = [event for event in prof.events() if event.name == "my region"]
    inside = [
        event.name
        for event in prof.events()
        if region.time_range.start <= event.time_range.start and event.time_range.end <= region.time_range.end
    ]
    assert "aten::mm" in inside and "aten::relu" in inside


def test_chrome_trace(work, tmp_path):
    with profile(activities=[ProfilerActivity.CPU], with_stack=True) as prof:
        work()
    path = tmp_path / "trace.json"
    prof.export_chrome_trace(str(path))
    names = {event.get("name") for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]}
    assert {"aten::mm", "my region"} <= names


def test_schedule_and_steps(work):
    ready = []
    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=1, warmup=1, active=2, repeat=1),
        on_trace_ready=lambda prof: ready.append({row.key: row.count for row in prof.key_averages()}),
    ) as prof:
        for _ in range(5):
            work()
            prof.step()
    assert len(ready) == 1 and ready[0]["my region"] == 2


def test_all_supported_activities(work):
    """What a script passes that was written for any device."""
    with profile(activities=torch.profiler.supported_activities()) as prof:
        work()
    assert any(row.key == "aten::mm" for row in prof.key_averages())


def test_legacy_autograd_profiler(work):
    with torch.autograd.profiler.profile() as prof:
        work()
    assert any(row.key == "aten::mm" for row in prof.key_averages())


def test_memory_of_the_profile(device):
    """Who took how much of the device's memory, and that it came back; nothing of what was free before."""
    freed = [torch.ones(1000 * n, device=device) for n in range(1, 9)]
    torch.flagos.empty_cache()
    del freed  # they wait in the allocator, which needs memory from the device now and gives them up
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        x = torch.ones(1 << 20, device=device)
        y = x + 1
        del x
    rows = {row.key: row for row in prof.key_averages()}
    assert 4 << 20 <= rows["aten::add"].device_memory_usage < 5 << 20
    assert 4 << 20 <= rows["aten::ones"].device_memory_usage < 5 << 20
    assert rows["[memory]"].device_memory_usage <= -4 << 20 and y.numel() == 1 << 20
    assert "Mem" in prof.key_averages().table(sort_by="self_device_memory_usage")


BOTH = [ProfilerActivity.CPU, ProfilerActivity.PrivateUse1]


def device_time(row):
    return getattr(row, "device_time_total", None) or getattr(row, "cuda_time_total", 0)


def test_operators_have_device_times(work):
    """The device's spans hang at the operators that caused them, forward and backward, and add up for regions."""
    with profile(activities=BOTH) as prof:
        work()
    rows = {}
    for row in prof.key_averages():
        rows[row.key] = max(device_time(row), rows.get(row.key, 0))
    for name in ("aten::mm", "aten::relu", "aten::threshold_backward", "MmBackward0", "my region"):
        assert rows[name] > 0, (name, rows)
    assert rows["MmBackward0"] < rows["aten::mm"] and rows["my region"] > rows["aten::relu"]
    table = prof.key_averages().table(sort_by="self_device_time_total", row_limit=10)
    assert "Self FLAGOS" in table and "aten::mm" in table


def test_device_time_is_counted_once(device):
    x = torch.randn(200, 200, device=device)
    torch_fl.flagos.synchronize()
    with profile(activities=BOTH) as prof:
        torch.linalg.multi_dot([x, x, x, x])
        torch_fl.flagos.synchronize()
    ours = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CPU]
    spans = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.PrivateUse1]
    total = sum(e.time_range.elapsed_us() for e in spans)
    assert total > 0 and sum(e.self_device_time_total for e in ours) == pytest.approx(total, rel=1e-3)


def test_copies_have_spans_and_streams(device):
    side = torch_fl.flagos.Stream()
    host = torch.ones(1 << 20).pin_memory()
    with profile(activities=BOTH) as prof:
        with torch_fl.flagos.stream(side):
            host.to(device, non_blocking=True)
        side.synchronize()
    (copy,) = [e for e in prof.events() if e.name.startswith("Memcpy HtoD")]
    assert copy.time_range.elapsed_us() > 0
    (op,) = [e for e in prof.events() if e.name == "aten::copy_"]
    assert [k.name for k in op.kernels] == [copy.name] and op.device_time_total > 0
    assert op.time_range.start - 1000 < copy.time_range.start < op.time_range.end + 1e6


def test_chrome_trace_has_the_device(work, tmp_path):
    with profile(activities=BOTH) as prof:
        work()
    path = tmp_path / "trace.json"
    prof.export_chrome_trace(str(path))
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    kernels = [e for e in events if e.get("cat") == "kernel"]
    operators = {e["args"]["External id"]: e["name"] for e in events if e.get("cat") == "cpu_op"}
    assert "aten::mm" in {operators.get(k["args"].get("External id")) for k in kernels}
    assert all(k["dur"] >= 0 for k in kernels)


@pytest.mark.skipif(torch_fl.chip() == "cuda", reason="CUPTI's own runtime calls are the arrows' starts there")
def test_chrome_trace_has_arrows_from_the_operators_to_the_device(device, tmp_path):
    """Each piece of work has an arrow: from a launch that lies inside its operator, to the work on the device."""
    side, host = torch_fl.flagos.Stream(), torch.ones(1 << 16).pin_memory()
    with profile(activities=BOTH) as prof:
        with torch_fl.flagos.stream(side):
            x = host.to(device, non_blocking=True)
        torch_fl.flagos.current_stream().wait_stream(side)
        x.requires_grad_().exp().sum().backward()  # in autograd's thread
    prof.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    arrows = [e for e in events if e.get("cat") == "ac2g"]
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy")]
    launches = [e for e in events if e.get("cat") == "privateuse1_runtime"]
    assert {"flagosLaunchKernel", "flagosMemcpyAsync"} == {e["name"] for e in launches}
    assert len(work) == len(launches) == len(arrows) / 2 >= 4 and len({e["tid"] for e in launches}) == 2
    operators = {e["args"]["External id"]: e for e in events if e.get("cat") == "cpu_op"}
    for item in work:
        number = item["args"]["correlation"]
        (launch,) = [e for e in launches if e["args"]["correlation"] == number]
        start, end = sorted((a for a in arrows if a["id"] == number), key=lambda a: a["ph"], reverse=True)
        assert (start["ph"], end["ph"]) == ("s", "f")
        assert (start["pid"], start["tid"], start["ts"]) == (launch["pid"], launch["tid"], launch["ts"])
        assert (end["pid"], end["tid"], end["ts"]) == (item["pid"], item["tid"], item["ts"])
        operator = operators[item["args"]["External id"]]
        assert (operator["pid"], operator["tid"]) == (launch["pid"], launch["tid"])
        assert operator["ts"] <= launch["ts"] <= operator["ts"] + operator["dur"]


def test_key_averages_sorted_by_device_time(device):
    """The table's first operator is the one with the most of the device's time."""
    big, small = torch.randn(300, 300, device=device), torch.ones(4, device=device)
    with profile(activities=BOTH) as prof:
        for _ in range(3):
            small.exp()
            big.mm(big)
        torch_fl.flagos.synchronize()
    averages = prof.key_averages()
    table = averages.table(sort_by="self_device_time_total", row_limit=2)  # the operator, and its work
    assert "aten::mm" in table and "aten::exp" not in table
    rows = [row for row in averages if row.key in ("aten::mm", "aten::exp")]
    assert {row.key: row.count for row in rows} == {"aten::mm": 3, "aten::exp": 3}
    assert all(0 < row.self_device_time_total <= device_time(row) for row in rows)


def test_profiles_one_after_the_other(device):
    """A profile has its own spans only, and none are kept while no profile runs."""
    x = torch.ones(32, 32, device=device)
    for names in (("aten::mm",), ("aten::exp", "aten::mul")):
        with profile(activities=BOTH) as prof:
            for name in names:
                getattr(torch, name.removeprefix("aten::"))(x, *([] if name == "aten::exp" else [x]))
            torch_fl.flagos.synchronize()
        found = {e.name for e in prof.events() if e.kernels}
        assert found == set(names)
        x @ x


def test_profile_while_other_threads_work(device):
    """Their spans may be in the profile or not; nothing breaks and ours are right."""
    stop = threading.Event()

    def other():
        y = torch.ones(8, 8, device=device)
        while not stop.is_set():
            y = (y @ y).clamp(max=1)

    threads = [threading.Thread(target=other) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            x = torch.ones(16, 16, device=device)
            with profile(activities=BOTH) as prof:
                (x + 1).exp()
            (exp,) = [e for e in prof.events() if e.name == "aten::exp"]
            assert all("exp" in kernel.name for kernel in exp.kernels)
            # Kineto looks for a kernel's operator while it reads CUPTI's buffers one after the other. That of a busy
            # process may come before the one which names the operator; then the kernel is nobody's, on cuda as well.
            assert len(exp.kernels) in ((0, 1) if torch_fl.chip() == "cuda" else (1,))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_events_without_kineto(work):
    with torch.autograd.profiler.profile(use_device="flagos", use_kineto=False) as prof:
        work()
    assert {row.key: row for row in prof.key_averages()}["aten::mm"].device_time_total > 0


def test_backends_are_annotated_when_asked_for(device):
    x = torch.ones(8, 8, device=device)

    def names():
        with profile(activities=[ProfilerActivity.CPU]) as prof:
            x @ x
        return {event.name for event in prof.events()}

    backend = next(step.backend for step in torch_fl.explain("mm") if step.chosen)
    with torch_fl.profile_backends():
        assert f"flagos::mm[{backend}]" in names()
        with torch_fl.route(mm="cpu"), pytest.warns(UserWarning, match="runs on the CPU"):
            assert "flagos::mm[cpu]" in names()
        x @ x  # no profiler: nothing to annotate
    assert not any(name.startswith("flagos::") for name in names())
