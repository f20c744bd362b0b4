"""torch.profiler on flagos: operators with their times, record_function, traces; which backend served."""

import json

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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        x = torch.ones(1 << 20, device=device)
        y = x + 1
        del x, y
    assert any(row.key == "aten::add" for row in prof.key_averages())
