"""Autocast follows CUDA's operator lists, those that torch tests CUDA with; GradScaler with infinities."""

import pytest
import torch
from torch.testing._internal.autocast_test_lists import AutocastTestLists
from torch.utils._pytree import tree_flatten, tree_map

import torch_fl

amp = torch_fl.flagos.amp

# list in torch's file -> (where the function is found, the type autocast computes in; None: the list says)
LISTS = {
    "torch_expect_builtin_promote": (torch, None),
    "methods_expect_builtin_promote": (None, None),
    "torch_fp16": (torch, "lower"),
    "torch_fp32": (torch, torch.float32),
    "torch_need_autocast_promote": (torch, torch.float32),
    "nn_fp16": (torch._C._nn, "lower"),
    "nn_fp32": (torch._C._nn, torch.float32),
    "linalg_fp16": (torch._C._linalg, "lower"),
    "methods_fp16": (None, "lower"),
    "methods_fp32": (None, torch.float32),
}
CUDNN = ("cudnn_convolution", "cudnn_convolution_transpose")


def cast(value, dtype):
    """Floating-point tensors of any nesting in another type, as autocast casts arguments."""
    return tree_map(lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v, value)


def types(value):
    return {v.dtype for v in tree_flatten(value)[0] if isinstance(v, torch.Tensor)}


def same(actual, expected):
    pairs = zip(tree_flatten(actual)[0], tree_flatten(expected)[0], strict=True)
    return all(torch.equal(a, e) if isinstance(a, torch.Tensor) else a == e for a, e in pairs)


def check(entry, module, compute, lower):
    """None, or what is wrong with an operator under autocast."""
    name, args, *rest = entry
    returned = None
    if compute is None:
        returned, rest = rest[0], rest[1:]
    elif rest and isinstance(rest[0], torch.dtype):
        returned, rest = rest[0], rest[1:]
    keywords = next((r for r in rest if isinstance(r, dict)), {})
    dtype = lower if compute == "lower" else compute or torch.float32
    function = getattr(module, name, None) if module is not None else None
    method = getattr(torch.Tensor, name, None)
    calls = [] if function is None else [function]
    calls += [] if method is None else [lambda *a, **k: method(*a, **k)]
    if not calls:
        return f"{name}: neither a function nor a method"
    for call in calls:
        with torch.autocast("flagos", dtype=lower):
            actual = call(*args, **keywords)
        if types(actual) - {returned or dtype}:
            return f"{name}: gave {types(actual)}, expected {returned or dtype}"
        expected = call(*cast(args, dtype), **keywords)
        if not same(actual, expected):
            return f"{name}: the result is not that of arguments cast to {dtype}"
    return None


@pytest.mark.parametrize("lower", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", LISTS)
def test_cuda_s_operator_lists(group, lower, device):
    module, compute = LISTS[group]
    entries = getattr(AutocastTestLists(device), group)
    if compute != "lower":  # the 16-bit arguments of these lists are of the type that autocast computes in
        entries = tree_map(lambda v: v.to(lower) if getattr(v, "dtype", None) is torch.float16 else v, entries)
    wrong = []
    for entry in entries:
        if entry[0] in CUDNN and torch_fl.chip() != "cuda":
            continue  # kernels of cuDNN by name
        if entry[0] == "einsum":
            continue  # torch leaves its entry out too; see test_einsum
        try:
            problem = check(entry, module, compute, lower)
        except Exception as error:
            problem = f"{entry[0]}: {type(error).__name__}: {error}"
        wrong += [problem] if problem else []
    assert entries and wrong == [], "\n".join(wrong)


def test_einsum(device):
    x = torch.randn(2, 3, 4, 5, device=device)
    with torch.autocast("flagos", dtype=torch.bfloat16):
        assert torch.einsum("bkhd,bqhd->bqkh", x, x).dtype is torch.bfloat16


def test_binary_cross_entropy_is_refused(device):
    x = torch.rand(3, device=device)
    with torch.autocast("flagos", dtype=torch.float16), pytest.raises(RuntimeError, match=r"unsafe.*autocast"):
        torch.nn.functional.binary_cross_entropy(x, x)


def test_nested_regions(device):
    x = torch.ones(2, 2, device=device)
    with torch.autocast("flagos", dtype=torch.bfloat16):
        with torch.autocast("flagos", dtype=torch.float16):
            assert (x @ x).dtype is torch.float16
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert (x @ x).dtype is torch.float16 and (x.cpu() @ x.cpu()).dtype is torch.bfloat16
        assert (x @ x).dtype is torch.bfloat16


@pytest.mark.parametrize("enabled", [True, False])
def test_cache_is_a_choice(enabled, device):
    weight = torch.randn(4, 4, device=device, requires_grad=True)
    with torch.autocast("flagos", dtype=torch.bfloat16, cache_enabled=enabled):
        outs = [weight @ weight.detach() for _ in range(2)]
    casts = [out.grad_fn.next_functions[0][0] for out in outs]
    assert (casts[0] is casts[1]) == enabled


def test_state_of_the_device_module(device):
    flagos = torch_fl.flagos
    default = flagos.get_autocast_dtype()
    try:
        flagos.set_autocast_dtype(torch.float16)
        flagos.set_autocast_enabled(True)
        x = torch.ones(2, 2, device=device)
        assert flagos.is_autocast_enabled() and (x @ x).dtype is torch.float16
    finally:
        flagos.set_autocast_enabled(False)
        flagos.set_autocast_dtype(default)
    assert not flagos.is_autocast_enabled() and set(flagos.get_amp_supported_dtype()) >= {torch.float16, torch.bfloat16}


@pytest.mark.parametrize("name", ["cond", "while_loop", "map_impl", "associative_scan"])
def test_higher_order_operators(name, device):
    x = torch.randn(4, 4, device=device)
    call = {
        "cond": lambda op: op(True, lambda a: (a @ a,), lambda a: (a,), (x,))[0],
        "while_loop": lambda op: op(
            lambda i, a: i < 2, lambda i, a: (i + 1, (a @ a).float()), (torch.zeros((), device=device), x), ()
        )[1],
        "map_impl": lambda op: op(lambda a: (a * 2,), (x,), ())[0],
        "associative_scan": lambda op: op(lambda a, b: [a + b], [x], ())[0],
    }[name]
    operator = getattr(torch.ops.higher_order, name)
    expected = call(operator)
    with torch.autocast("flagos", dtype=torch.bfloat16):
        actual = call(operator)
    assert actual.dtype is (torch.bfloat16 if name == "cond" else torch.float32)  # the body runs under autocast too
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.1)


def test_custom_fwd_casts_inputs(device):
    class Sum(torch.autograd.Function):
        @staticmethod
        @amp.custom_fwd(cast_inputs=torch.float32)
        def forward(ctx, x, y):
            assert not torch.is_autocast_enabled("flagos")
            assert x.dtype is torch.float32 and y.dtype is torch.int64
            return x @ x + y

        @staticmethod
        @amp.custom_bwd
        def backward(ctx, g):
            return g, None

    x = torch.ones(2, 2, device=device, dtype=torch.float16, requires_grad=True)
    with torch.autocast("flagos", dtype=torch.float16):
        assert Sum.apply(x, torch.ones(2, 2, dtype=torch.int64, device=device)).dtype is torch.float32


def scaled_training(where, kind):
    """Losses, scales and weights of a training whose third step overflows."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], device=where))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(where.type, init_scale=16.0, growth_interval=2, growth_factor=4.0)
    history = []
    for step in range(6):
        optimizer.zero_grad()
        loss = (weight * weight).sum() * ({"inf": float("inf"), "nan": float("nan")}[kind] if step == 2 else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([weight], 1.0, foreach=step % 2 == 0)
        scaler.step(optimizer)
        scaler.update()
        history.append((scaler.get_scale(), weight.tolist()))
    return history, scaler.state_dict()


@pytest.mark.parametrize("kind", ["inf", "nan"])
def test_grad_scaler_skips_what_overflows(kind, device):
    actual, state = scaled_training(device, kind)
    expected, expected_state = scaled_training(torch.device("cpu"), kind)
    assert [scale for scale, _ in actual] == [scale for scale, _ in expected] == [16, 64, 32, 32, 128, 128]
    assert actual[2][1] == actual[1][1] and actual[3][1] != actual[2][1]
    torch.testing.assert_close([w for _, w in actual], [w for _, w in expected])
    assert state == expected_state
    restored = torch.amp.GradScaler("flagos")
    restored.load_state_dict(state)
    assert restored.get_scale() == 128


def test_grad_scaler_passes_found_inf_to_fused_optimizers(device):
    weight = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("flagos", init_scale=4.0)
    scaler.scale((weight * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [1, 1, 1] and scaler.get_scale() == 2
    optimizer.zero_grad()
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    assert weight[0].item() < 1
