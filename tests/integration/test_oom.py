"""Running out of device memory: the caches go first, then a torch.OutOfMemoryError that says it all."""

import gc
import json
import traceback
from pathlib import Path

import pytest
import torch

import torch_fl
from tests.common.process import check_python
from torch_fl import _C

ROOT = Path(__file__).resolve().parents[2]
flagos = torch_fl.flagos
MIB = 1 << 20
on_host = pytest.mark.skipif(torch_fl.chip() != "host", reason="drives the simulated host chip")
on_hal = pytest.mark.skipif(torch_fl.chip() == "cuda", reason="checks our own allocator's text")


@pytest.fixture
def faults(clean_slate):
    flagos.empty_cache()
    yield _C._sim.set_fail
    _C._sim.set_fail("")


def mib(n):
    return torch.empty(n * MIB, dtype=torch.uint8, device="flagos")


def error_type_and_recovery(limit):
    keep = mib(100)
    with pytest.raises(torch.OutOfMemoryError):
        mib(200)
    assert keep.untyped_storage().nbytes() == 100 * MIB
    assert torch.ones(10, device="flagos").sum().item() == 10
    del keep
    mib(200)  # fits once the other one is gone


def text_says_who_holds_what(limit):
    keep = mib(100)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        mib(200)
    text = str(caught.value)
    assert "\n" not in text
    assert "Tried to allocate 200.00 MiB on flagos:0" in text
    assert f"{flagos.memory_allocated() / MIB:.2f} MiB in tensors" in text
    assert f"may reserve {limit / MIB:.2f} MiB" in text
    assert "free of" in text
    assert "delete tensors" in text
    del keep


def caches_are_freed_first(limit):
    del_me = [mib(40) for _ in range(4)]
    del del_me
    before = torch.accelerator.memory_stats()
    x = mib(200)  # only without the cached 160 MiB
    after = torch.accelerator.memory_stats()
    assert x.numel() == 200 * MIB
    assert after["num_alloc_retries"] == before["num_alloc_retries"] + 1
    assert after["num_ooms"] == before["num_ooms"]


def counted(limit):
    before = torch.accelerator.memory_stats()["num_ooms"]
    with pytest.raises(torch.OutOfMemoryError):
        mib(300)
    assert torch.accelerator.memory_stats()["num_ooms"] == before + 1


def operator_results_run_out_too(limit):
    x = mib(100)
    allocated = flagos.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError):
        torch.cat([x, x])
    assert flagos.memory_allocated() == allocated


def backward_runs_out_and_recovers(limit):
    x = torch.ones(10 * MIB, device="flagos", requires_grad=True)  # 40 MiB
    y = x * 2 + x.exp()
    keep = []
    with pytest.raises(torch.OutOfMemoryError):
        while True:
            keep.append(mib(20))
    with pytest.raises(torch.OutOfMemoryError):
        y.sum().backward()
    keep.clear()
    del y
    (x * 2).sum().backward()
    assert x.grad[0].item() == 2


WITH_LITTLE = (
    error_type_and_recovery,
    pytest.param(text_says_who_holds_what, marks=on_hal),
    caches_are_freed_first,
    counted,
    operator_results_run_out_too,
    backward_runs_out_and_recovers,
)


def with_little_memory():
    """Runs the checks, each with 256 MiB besides what the libraries hold; check -> its traceback."""
    failed = {}
    for check in (getattr(entry, "values", [entry])[0] for entry in WITH_LITTLE):
        torch.ones(4, device="flagos").sum().item()
        gc.collect()
        flagos.empty_cache()
        limit = 256 * MIB + flagos.memory_reserved()
        flagos.set_per_process_memory_fraction(limit / flagos.mem_get_info()[1])
        try:
            check(limit)
        except BaseException:  # pytest.raises fails with one
            failed[check.__name__] = traceback.format_exc()
        flagos.set_per_process_memory_fraction(1.0)
    print(json.dumps(failed))


@pytest.fixture(scope="module")
def failures():
    """In a process of their own: what other tests hold, in blocks with room beside it, would count for the limit."""
    code = f"import runpy\nrunpy.run_path({__file__!r})['with_little_memory']()"
    return json.loads(check_python(code, PYTHONPATH=str(ROOT)).splitlines()[-1])


@pytest.mark.parametrize("check", WITH_LITTLE, ids=lambda check: check.__name__)
def test_with_little_memory(check, failures):
    assert check.__name__ not in failures, failures[check.__name__]


def test_fraction_is_checked():
    for bad in (-0.1, 1.5):
        with pytest.raises(ValueError, match="fraction"):
            flagos.set_per_process_memory_fraction(bad)
    assert flagos.get_per_process_memory_fraction() == 1.0


def test_huge_sizes():
    with pytest.raises(RuntimeError):
        torch.empty(1 << 61, dtype=torch.uint8, device="flagos")
    with pytest.raises(RuntimeError):
        torch.empty(-1, device="flagos")
    assert torch.ones(3, device="flagos").sum().item() == 3


@on_host
def test_the_chip_says_no_once(faults):
    faults("malloc@1=OUT_OF_MEMORY")
    assert mib(100).numel() == 100 * MIB


@on_host
def test_the_chip_says_no_twice(faults):
    faults("malloc@1=OUT_OF_MEMORY;malloc@2=OUT_OF_MEMORY")
    with pytest.raises(torch.OutOfMemoryError, match="and says: "):
        mib(100)
    faults("")
    assert mib(100).numel() == 100 * MIB


@on_host
def test_pinned_memory_runs_out(faults):
    faults("host_malloc@1=OUT_OF_MEMORY;host_malloc@2=OUT_OF_MEMORY")
    with pytest.raises(torch.OutOfMemoryError, match="allocating pinned memory"):
        torch.empty(33 * MIB, dtype=torch.uint8).pin_memory()
    faults("")
    assert torch.empty(33 * MIB, dtype=torch.uint8).pin_memory().is_pinned()
