"""Every name that docs/device_api.md calls present does what it does in torch.cuda: one exercise per name.

A name without an exercise fails, and so does an exercise without a name; tests of the single subjects go deeper.
"""

import contextlib
import gc
import inspect

import device_api_doc
import pytest
import torch

import torch_fl
from torch_fl.flagos import _absent

f = torch_fl.flagos
accelerator = torch.accelerator
MIB = 1 << 20
TWICE = "template <typename T> T twice(T x) { return x + x; }"
TABLE = [row for row in device_api_doc.rows() if row.ours]


@contextlib.contextmanager
def grown(read):
    """The number that `read` gives is at least 12 MiB larger while a tensor of 12 MiB lives, which no cache holds."""
    f.empty_cache()
    before = read()
    x = torch.ones(3 * MIB, device="flagos")
    assert read() >= before + 12 * MIB
    yield
    del x


def grows(read):
    f.empty_cache()
    with grown(read):
        pass


def peaks(reset):
    def exercise():
        gc.collect()  # or tensors of earlier tests may go between two readings
        x = torch.ones(4 * MIB, device="flagos")
        del x
        high = f.max_memory_allocated()
        reset()
        assert f.max_memory_allocated() == f.memory_allocated() < high

    return exercise


def only_cuda(use):
    """Works on the chip cuda (or lacks its monitoring library), refuses in one sentence elsewhere."""

    def exercise():
        if torch_fl.chip() == "cuda":
            try:
                use()
            except (ModuleNotFoundError, RuntimeError) as error:
                assert any(words in str(error).lower() for words in ("nvml", "nvidia-ml")), error
        else:
            with pytest.raises((NotImplementedError, RuntimeError), match=f"chip {torch_fl.chip()}"):
                use()

    return exercise


def is_module(name, member):
    def exercise():
        assert inspect.ismodule(getattr(f, name)) and hasattr(getattr(f, name), member)

    return exercise


def restores_rng(get, put):
    state = get()
    first = torch.rand(3, device="flagos")
    put(state)
    assert torch.equal(first, torch.rand(3, device="flagos"))


def repeats(seed):
    seed(7)
    first = torch.rand(3, device="flagos")
    seed(7)
    assert torch.equal(first, torch.rand(3, device="flagos"))


def reseeds(seed):
    before = f.initial_seed()
    seed()
    assert f.initial_seed() != before


def on_stream(stream):
    """Work on a stream, joined to the current one by an event."""
    with f.stream(stream):
        assert f.current_stream() == stream
        x = torch.ones(8, device="flagos") * 2
    f.current_stream().wait_event(stream.record_event())
    assert x.sum().item() == 16


def events():
    first, second = f.Event(enable_timing=True), f.Event(enable_timing=True)
    first.record()
    torch.ones(8, device="flagos").sum()
    second.record()
    second.synchronize()
    assert first.query() and first.elapsed_time(second) >= 0


def pinned(reset, key):
    x = torch.ones(MIB, dtype=torch.uint8).pin_memory()
    assert f.host_memory_stats()["allocated_bytes.current"] >= MIB
    del x
    reset()
    stats = f.host_memory_stats()
    assert stats[f"allocated_bytes.{key}"] == (stats["allocated_bytes.current"] if key == "peak" else 0)


def accumulated(reset):
    torch.ones(8, device="flagos")
    assert f.memory_stats()["allocation.all.allocated"] > 0
    reset()
    assert f.memory_stats()["allocation.all.allocated"] == 0


def raw_memory():
    before = f.memory_allocated()
    for stream in (None, f.Stream(), f.Stream()._native_handle(), 0):
        address = f.caching_allocator_alloc(1000, stream=stream)
        assert address and f.memory_allocated() >= before + 1000
        f.caching_allocator_delete(address)
    assert f.memory_allocated() == before
    with pytest.raises(TypeError, match="expected a stream"):
        f.caching_allocator_alloc(1000, stream="default")


def fraction():
    assert f.get_per_process_memory_fraction() == 1.0
    try:
        f.set_per_process_memory_fraction(0.25)
        assert f.get_per_process_memory_fraction() == 0.25
        f.empty_cache()
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(f.mem_get_info()[1] // 2, dtype=torch.uint8, device="flagos")
    finally:
        f.set_per_process_memory_fraction(1.0)


def snapshot():
    x = torch.ones(MIB, device="flagos")
    segments = f.memory_snapshot()
    holders = [s for s in segments if s["address"] <= x.data_ptr() < s["address"] + s["total_size"]]
    assert len(holders) == 1 and holders[0]["blocks"]


def pool():
    mine = f.MemPool()
    with f.use_mem_pool(mine):
        x = torch.ones(MIB, device="flagos")
    assert any(s["address"] <= x.data_ptr() < s["address"] + s["total_size"] for s in mine.snapshot())


def sync_debug():
    assert f.get_sync_debug_mode() == 0
    with pytest.raises((RuntimeError, ValueError), match="invalid value"):
        f.set_sync_debug_mode("loud")
    x = torch.ones(4, device="flagos")
    pinned = torch.ones(4).pin_memory()
    waiting = [lambda: x.sum().item(), x.nonzero, lambda: x[x > 0], x.cpu, lambda: torch.ones(4).to("flagos")]
    try:
        f.set_sync_debug_mode("error")
        assert f.get_sync_debug_mode() == 2
        for wait in waiting:
            with pytest.raises(RuntimeError, match=r"synchroniz|makes the host wait"):
                wait()
        y = (x + 1).relu() @ x  # nobody waits for these
        pinned.to("flagos", non_blocking=True)
        f.synchronize()
        f.set_sync_debug_mode(1)
        with pytest.warns(UserWarning, match=r"synchroniz|makes the host wait"):
            assert y.item() == 8
    finally:
        f.set_sync_debug_mode("default")
    assert f.get_sync_debug_mode() == 0 and x.sum().item() == 4


def devices(choose, current):
    last = f.device_count() - 1
    choose(last)
    assert current() == last
    assert torch.empty(1, device="flagos").device.index == last
    choose(0)


def device_block(make):
    last = f.device_count() - 1
    with make(last):
        assert f.current_device() == last
    assert f.current_device() == 0


def device_of():
    x = torch.ones(1, device=f"flagos:{f.device_count() - 1}")
    with f.device_of(x):
        assert f.current_device() == x.device.index


def scaler():
    s = f.amp.GradScaler(init_scale=8.0)
    assert s.scale(torch.ones(1, device="flagos")).item() == 8.0


def autocast():
    x = torch.ones(2, 2, device="flagos")
    with f.amp.autocast(dtype=torch.bfloat16):
        assert (x @ x).dtype is torch.bfloat16


def custom(wrap_forward, wrap_backward):
    class Twice(torch.autograd.Function):
        @staticmethod
        @wrap_forward
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @wrap_backward
        def backward(ctx, g):
            return g * 2

    x = torch.ones(2, device="flagos", requires_grad=True)
    Twice.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2]


def properties():
    p = f.get_device_properties(0)
    assert p.total_memory == f.mem_get_info(0)[1] and p.name == f.get_device_name(0)
    assert f.get_device_capability(0) == (p.major, p.minor)


def summary():
    text = f.memory_summary()
    assert "flagos:0" in text and "reserved" in text and len(f.memory_summary(abbreviated=True)) < len(text)


def nested(flat, tree):
    name = next(name for name in flat() if name.count(".") >= 1)
    level = tree()
    for part in name.split("."):
        level = level[part]
    assert isinstance(level, (int, float))


def check(condition):
    assert condition


def legacy_tensor(kind):
    """A type of before dtype and device: made, converted to and recognised by it."""

    def exercise():
        made, like = kind([[1, 0]]), torch.tensor([[1, 0]], dtype=kind.dtype, device="flagos")
        assert made.is_flagos and torch.equal(made, like) and kind(2, 3).shape == (2, 3) and kind().numel() == 0
        assert made.type() == f"{kind.__module__}.{kind.__qualname__}"
        assert isinstance(made, kind) and not isinstance(made.cpu(), kind) and not isinstance(made.cfloat(), kind)
        for name in (kind, made.type()):
            assert torch.equal(torch.tensor([[1.0, 0.0]]).type(name), like)

    return exercise


def legacy_storage(kind):
    def exercise():
        made = kind([1, 0])
        assert made.device.type == "flagos" and made.dtype is kind.dtype and made.tolist() == [1, 0]
        assert made.type() == f"torch.flagos.{kind.__name__}" and isinstance(made, torch.storage.TypedStorage)
        x = torch.ones(3, dtype=kind.dtype, device="flagos")
        assert isinstance(x.storage(), kind) and not isinstance(x.cpu().storage(), kind)

    return exercise


EXERCISES = {
    **{name: legacy_tensor(getattr(f, name)) for name in f.legacy.__all__ if name.endswith("Tensor")},
    **{name: legacy_storage(getattr(f, name)) for name in f.legacy.__all__ if name.endswith("Storage")},
    # devices
    "can_device_access_peer": lambda: check(isinstance(f.can_device_access_peer(0, f.device_count() - 1), bool)),
    "current_device": lambda: check(f.current_device() == 0),
    "device": lambda: device_block(f.device),
    "device_count": lambda: check(f.device_count() == accelerator.device_count() > 0),
    "device_of": device_of,
    "get_arch_list": lambda: check(all(isinstance(arch, str) for arch in f.get_arch_list())),
    "get_device_capability": properties,
    "get_device_name": properties,
    "get_device_properties": properties,
    "has_half": lambda: check(torch.ones(1, device="flagos").half().dtype is torch.half and f.has_half),
    "init": lambda: check(f.init() is None and f.is_initialized()),
    "ipc_collect": lambda: check(f.ipc_collect() is None),
    "is_available": lambda: check(f.is_available() is True),
    "is_bf16_supported": lambda: check(f.is_bf16_supported() and torch.ones(1, device="flagos").bfloat16().sum() == 1),
    "is_initialized": lambda: check(f.init() is None and f.is_initialized() is True),
    "is_tf32_supported": lambda: check(f.is_tf32_supported() in ((True, False) if torch_fl.chip() == "cuda" else (0,))),
    "set_device": lambda: devices(f.set_device, f.current_device),
    "synchronize": lambda: check(f.synchronize() is None and f.current_stream().query()),
    # modules
    "amp": is_module("amp", "autocast"),
    "graphs": is_module("graphs", "CUDAGraph"),
    "memory": is_module("memory", "empty_cache"),
    "random": is_module("random", "manual_seed"),
    "streams": is_module("streams", "Stream"),
    # streams and events
    "Event": events,
    "ExternalStream": lambda: on_stream(f.ExternalStream(f.Stream()._native_handle())),
    "Stream": lambda: on_stream(f.Stream()),
    "StreamContext": lambda: check(isinstance(f.stream(f.Stream()), f.StreamContext)),
    "current_stream": lambda: check(f.current_stream() == f.default_stream()),
    "default_stream": lambda: check(f.default_stream().stream_id == 0),
    "get_stream_from_external": lambda: on_stream(f.get_stream_from_external(f.Stream()._native_handle())),
    "is_current_stream_capturing": lambda: check(f.is_current_stream_capturing() is False),
    "set_stream": lambda: (f.set_stream(s := f.Stream()), check(f.current_stream() == s), f.set_stream(None)),
    "stream": lambda: on_stream(f.Stream(priority=-1)),
    # memory
    "caching_allocator_alloc": raw_memory,
    "caching_allocator_delete": raw_memory,
    "device_memory_used": lambda: check(0 <= f.device_memory_used() <= f.mem_get_info()[1]),
    "empty_cache": lambda: (torch.ones(MIB, device="flagos"), f.empty_cache(), check(f.memory_reserved() < 64 * MIB)),
    "get_allocator_backend": lambda: check(f.get_allocator_backend() in ("native", "cudaMallocAsync")),
    "get_per_process_memory_fraction": fraction,
    "host_memory_stats": lambda: pinned(f.reset_peak_host_memory_stats, "peak"),
    "host_memory_stats_as_nested_dict": lambda: nested(f.host_memory_stats, f.host_memory_stats_as_nested_dict),
    "max_memory_allocated": peaks(f.reset_peak_memory_stats),
    "max_memory_cached": lambda: check(f.max_memory_cached() == f.max_memory_reserved()),
    "memory_cached": lambda: grows(f.memory_cached),
    "max_memory_reserved": lambda: check(f.max_memory_reserved() >= f.memory_reserved()),
    "mem_get_info": lambda: check(0 < f.mem_get_info()[0] <= f.mem_get_info()[1]),
    "memory_allocated": lambda: grows(f.memory_allocated),
    "memory_reserved": lambda: grows(f.memory_reserved),
    "memory_snapshot": snapshot,
    "memory_stats": lambda: grows(lambda: f.memory_stats()["active_bytes.all.current"]),
    "memory_stats_as_nested_dict": lambda: nested(f.memory_stats, f.memory_stats_as_nested_dict),
    "memory_summary": summary,
    "reset_accumulated_host_memory_stats": lambda: pinned(f.reset_accumulated_host_memory_stats, "freed"),
    "reset_accumulated_memory_stats": lambda: accumulated(f.reset_accumulated_memory_stats),
    "reset_max_memory_allocated": peaks(f.reset_max_memory_allocated),
    "reset_max_memory_cached": peaks(f.reset_max_memory_cached),
    "reset_peak_host_memory_stats": lambda: pinned(f.reset_peak_host_memory_stats, "peak"),
    "reset_peak_memory_stats": peaks(f.reset_peak_memory_stats),
    "set_per_process_memory_fraction": fraction,
    # random numbers
    "default_generators": lambda: check(f.default_generators[0].device == torch.device("flagos:0")),
    "get_rng_state": lambda: restores_rng(f.get_rng_state, f.set_rng_state),
    "get_rng_state_all": lambda: restores_rng(f.get_rng_state_all, f.set_rng_state_all),
    "initial_seed": lambda: (f.manual_seed(11), check(f.initial_seed() == 11)),
    "manual_seed": lambda: repeats(f.manual_seed),
    "manual_seed_all": lambda: repeats(f.manual_seed_all),
    "seed": lambda: reseeds(f.seed),
    "seed_all": lambda: reseeds(f.seed_all),
    "set_rng_state": lambda: restores_rng(f.get_rng_state, f.set_rng_state),
    "set_rng_state_all": lambda: restores_rng(f.get_rng_state_all, f.set_rng_state_all),
    # automatic precision
    "GradScaler": scaler,
    "autocast": autocast,
    "custom_bwd": lambda: custom(f.amp.custom_fwd, f.amp.custom_bwd),
    "custom_fwd": lambda: custom(f.amp.custom_fwd(cast_inputs=torch.float32), f.amp.custom_bwd),
    # the vendor's monitoring and debugging
    "clock_rate": only_cuda(lambda: f.clock_rate()),
    "get_sync_debug_mode": sync_debug,
    "jiterator": only_cuda(lambda: f.jiterator._create_jit_fn(TWICE)(torch.ones(2, device="flagos"))),
    "list_gpu_processes": only_cuda(lambda: f.list_gpu_processes()),
    "memory_usage": only_cuda(lambda: f.memory_usage()),
    "power_draw": only_cuda(lambda: f.power_draw()),
    "set_sync_debug_mode": sync_debug,
    "temperature": only_cuda(lambda: f.temperature()),
    "utilization": only_cuda(lambda: f.utilization()),
    # pools; more in tests/integration/test_memory_history.py
    "MemPool": pool,
    "use_mem_pool": pool,
    # graphs; tests/integration/test_graphs.py replays them
    "CUDAGraph": only_cuda(lambda: f.CUDAGraph()),
    "graph": only_cuda(lambda: f.graph(f.CUDAGraph())),
    "graph_pool_handle": only_cuda(lambda: f.graph_pool_handle()),
    "make_graphed_callables": only_cuda(
        lambda: f.make_graphed_callables(torch.nn.Linear(2, 2).flagos(), (torch.ones(2, 2, device="flagos"),))
    ),
}


def enter_device_index():
    last = accelerator.device_count() - 1
    with accelerator.device_index(last):
        assert f.current_device() == last
    assert f.current_device() == 0


ACCELERATOR = {
    "current_accelerator": lambda: check(accelerator.current_accelerator() == torch.device("flagos")),
    "current_device_idx": lambda: check(accelerator.current_device_idx() == 0),
    "current_device_index": lambda: check(accelerator.current_device_index() == 0),
    "get_device_capability": lambda: check(torch.float32 in accelerator.get_device_capability()["supported_dtypes"]),
    "current_stream": lambda: check(accelerator.current_stream() == f.current_stream()),
    "device_count": lambda: check(accelerator.device_count() == f.device_count()),
    "device_index": enter_device_index,
    "empty_cache": lambda: (torch.ones(MIB, device="flagos"), accelerator.empty_cache(), snapshot()),
    "get_memory_info": lambda: check(accelerator.get_memory_info()[1] == f.mem_get_info()[1]),
    "is_available": lambda: check(accelerator.is_available()),
    "max_memory_allocated": lambda: check(accelerator.max_memory_allocated() == f.max_memory_allocated()),
    "max_memory_reserved": lambda: check(accelerator.max_memory_reserved() == f.max_memory_reserved()),
    "memory_allocated": lambda: grows(accelerator.memory_allocated),
    "memory_reserved": lambda: grows(accelerator.memory_reserved),
    "memory_stats": lambda: grows(lambda: accelerator.memory_stats()["active_bytes.all.current"]),
    "reset_accumulated_memory_stats": lambda: accumulated(accelerator.reset_accumulated_memory_stats),
    "reset_peak_memory_stats": peaks(accelerator.reset_peak_memory_stats),
    "set_device_idx": lambda: devices(accelerator.set_device_idx, f.current_device),
    "set_device_index": lambda: devices(accelerator.set_device_index, f.current_device),
    "set_stream": lambda: (accelerator.set_stream(s := f.Stream()), check(f.current_stream() == s)),
    "synchronize": lambda: check(accelerator.synchronize() is None and f.current_stream().query()),
}


@pytest.fixture(autouse=True)
def default_stream(clean_slate):
    yield
    f.set_stream(f.default_stream(0))


def test_document_is_current():
    assert (device_api_doc.ROOT / device_api_doc.DOCUMENT).read_text(encoding="utf-8") == device_api_doc.render()


@pytest.mark.parametrize("name", sorted({row.name for row in TABLE if row.module.startswith("torch.cuda")}))
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:TypedStorage")
def test_torch_flagos(name):
    assert name in EXERCISES, f"torch.flagos.{name} is called present, but has no exercise in this file"
    EXERCISES[name]()


@pytest.mark.parametrize("name", sorted({row.name for row in TABLE if row.module.startswith("torch.accelerator")}))
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torch_accelerator(name):
    assert name in ACCELERATOR, f"torch.accelerator.{name} has no exercise in this file"
    ACCELERATOR[name]()


def test_every_name_is_callable_where_torch_cuda_s_is():
    for row in TABLE:
        theirs = getattr(eval(row.module, {"torch": torch}), row.name)
        assert callable(eval(row.ours, {"torch": torch})) == callable(theirs), row


def test_names_that_are_absent():
    absent = [row for row in device_api_doc.rows() if row.ours is None]
    assert [row.name for row in absent if not row.reason] == []
    listed = set(_absent.MISSING) | set(_absent.FOREIGN)
    assert listed == {row.name for row in absent}, "a name of _absent.py is present now, or torch has it no more"
    for name in listed:
        with pytest.raises(AttributeError, match=name) as error:
            getattr(f, name)
        assert _absent.reason(name) in str(error.value)


def test_share_of_names():
    present, meaningful = device_api_doc.share(device_api_doc.rows())
    assert present >= 0.95 * meaningful
