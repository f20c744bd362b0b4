"""Bad input: one clear error that names the thing and the cure, and nothing half done."""

import pytest
import torch

import torch_fl
from tests.common.devices import memory_in_use
from tests.common.process import error_line, run_python

two_devices = pytest.mark.skipif(torch_fl.flagos.device_count() < 2, reason="needs two devices")


# What the kernel finds in the values of an index. A GPU finds it by an assert that ends the process, flagos or not.
by_the_kernel = pytest.mark.skipif(torch_fl.chip() == "cuda", reason="a GPU's assert would end the process")


def message(error):
    """The error's first line, which has to be enough."""
    return str(error.value).split("\n")[0]


@pytest.mark.parametrize(
    "mix",
    [
        lambda a, c: a + c,
        lambda a, c: c + a,
        lambda a, c: torch.mm(a.view(2, 2), c.view(2, 2)),
        lambda a, c: a.add_(c),
        lambda a, c: c.add_(a),
        lambda a, c: torch.cat([a, c]),
        lambda a, c: torch.where(a > 0, a, c),
        lambda a, c: torch.add(a, a, out=c),
        lambda a, c: torch.nn.functional.linear(a.view(2, 2), c.view(2, 2)),
        lambda a, c: torch.nn.functional.embedding(torch.tensor([0]), a.view(2, 2)),
        lambda a, c: torch.nn.functional.layer_norm(a, (4,), c),
        lambda a, c: torch.addcmul(a, a, c),
        lambda a, c: torch._foreach_add([a], [c]),
        lambda a, c: a.scatter_(0, torch.tensor([0]), 1.0),
        lambda a, c: torch.dot(a, c),
    ],
)
def test_mixing_cpu_and_flagos(mix, device):
    a, c = torch.arange(1.0, 5.0, device=device), torch.arange(1.0, 5.0)
    with pytest.raises(RuntimeError) as error:
        mix(a, c)
    text = message(error)
    assert "device" in text and "cpu" in text and "flagos:0" in text, text
    assert a.tolist() == c.tolist() == [1.0, 2.0, 3.0, 4.0], "something was half done"
    assert a._version == 0 and c._version == 0


def test_cpu_scalars_and_indices_are_allowed(device):
    a = torch.arange(4.0, device=device)
    assert (a + torch.tensor(1.0)).tolist() == [1, 2, 3, 4]
    assert (torch.tensor(2.0) * a).is_flagos
    assert a[torch.tensor([0, 3])].tolist() == [0, 3]
    a[torch.tensor([True, False, False, False])] = 9
    assert a[0].item() == 9
    a[1:] = torch.zeros(3)
    assert a.tolist() == [9, 0, 0, 0]


@two_devices
@pytest.mark.parametrize(
    "mix", [lambda a, b: a + b, lambda a, b: a.mul_(b), lambda a, b: torch.stack([a, b]), lambda a, b: torch.dot(a, b)]
)
def test_wrong_device_index(mix):
    a, b = torch.ones(3, device="flagos:0"), torch.ones(3, device="flagos:1")
    with pytest.raises(RuntimeError) as error:
        mix(a, b)
    text = message(error)
    assert "same device" in text and "flagos:0" in text and "flagos:1" in text, text
    assert a.tolist() == [1, 1, 1] and (a + b.to(a.device)).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "use",
    [
        lambda x, g: torch.rand(3, generator=g, device=x.device),
        lambda x, g: x.normal_(generator=g),
        lambda x, g: torch.bernoulli(x, generator=g),
        lambda x, g: torch.randperm(4, generator=g, device=x.device),
        lambda x, g: torch.multinomial(x, 1, generator=g),
    ],
)
def test_generator_of_another_device(use, device):
    x = torch.full((3,), 0.5, device=device)
    with pytest.raises(RuntimeError) as error:
        use(x, torch.Generator())
    assert "generator" in message(error) and "cpu" in message(error) and "flagos" in message(error), message(error)
    assert x.tolist() == [0.5] * 3
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, generator=torch.Generator(device=device))


@pytest.mark.parametrize("size", [(-1,), (2, -3), (1 << 62, 1 << 62), (1 << 63 - 1,), (1 << 60,)])
def test_negative_and_huge_sizes(size, device):
    before = memory_in_use()
    with pytest.raises((RuntimeError, OverflowError)) as error:
        torch.empty(size, device=device)
    text = message(error)
    assert any(word in text for word in ("negative", "overflow", "memory", "large", "big", "size")), text
    assert memory_in_use() == before
    assert torch.ones(2, device=device).sum().item() == 2


def test_out_of_memory(device):
    total = torch.flagos.mem_get_info()[1]
    before = memory_in_use()
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(total * 2, dtype=torch.uint8, device=device)
    text = str(error.value)
    ours = ("flagos", "in tensors", "reserved", "free")
    torch_s = ("CUDA out of memory", "is allocated by PyTorch", "reserved", "free")
    for words in torch_s if torch_fl.chip() == "cuda" else ours:
        assert words in text, text
    assert memory_in_use() == before
    assert torch.ones(10, device=device).sum().item() == 10


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: torch.mm(x, torch.ones(3, 3, device=x.device)), ("mat1", "2x2", "3x3")),
        (lambda x: x.view(7), ("shape", "7")),
        (lambda x: x + torch.ones(3, device=x.device), ("size", "3")),
        (lambda x: x[5], ("index 5", "out of bounds")),
        (lambda x: x.sum(4), ("Dimension out of range", "4")),
        (lambda x: torch.cat([x, torch.ones(3, 3, device=x.device)]), ("Sizes of tensors must match",)),
        pytest.param(
            lambda x: x.index_select(0, torch.tensor([9], device=x.device)), ("index", "range"), marks=by_the_kernel
        ),
        (lambda x: x.long().bitwise_and(x), ("float", "bitwise_and")),
        pytest.param(
            lambda x: torch.nn.functional.embedding(torch.tensor([9], device=x.device), x),
            ("index", "range"),
            marks=by_the_kernel,
        ),
        (lambda x: torch.linalg.inv(torch.zeros(2, 2, device=x.device)), ("singular",)),
        (lambda x: torch.linalg.cholesky(-x), ("not positive-definite",)),
        (lambda x: x.to("flagos:77"), ("flagos:77",)),
        (lambda x: torch.add(x, x, out=torch.empty(2, 2, dtype=torch.int32, device=x.device)), ("can't be cast",)),
        (lambda x: x.numpy(), ("flagos", "cpu")),
        pytest.param(
            lambda x: x.gather(0, torch.full((1, 2), 5, device=x.device)),
            ("index 5", "out of bounds"),
            marks=by_the_kernel,
        ),
    ],
)
def test_kernel_errors_are_the_cpu_s(call, words, device):
    x = torch.ones(2, 2, device=device)
    with pytest.raises((RuntimeError, IndexError, TypeError, torch.linalg.LinAlgError)) as error:
        call(x)
    for word in words:
        assert word.lower() in str(error.value).lower(), str(error.value)
    assert x.tolist() == [[1, 1], [1, 1]] and (x + 1).sum().item() == 8


def test_error_type_equals_the_cpu_s(device):
    """Same type and same first line: user code that catches one catches the other."""
    calls = [
        lambda w: torch.ones(2, 3, device=w) @ torch.ones(2, 3, device=w),
        lambda w: torch.ones(2, device=w).unflatten(0, (3, 3)),
        lambda w: torch.nn.functional.conv2d(torch.ones(1, 1, 2, 2, device=w), torch.ones(1, 1, 3, 3, device=w)),
        lambda w: torch.ones(2, device=w).resize_(-1),
        lambda w: torch.linspace(0, 1, -1, device=w),
        lambda w: torch.ones(2, 2, device=w).softmax(5),
        lambda w: torch.empty(0, device=w).max(),
        lambda w: torch.ones(2, device=w).item(),
        lambda w: bool(torch.ones(2, device=w)),
    ]
    if torch_fl.chip() != "cuda":  # by the kernel
        calls += [
            lambda w: torch.ones(2, device=w)[[5]],
            lambda w: torch.nn.functional.cross_entropy(torch.ones(2, 3, device=w), torch.tensor([5, 0], device=w)),
        ]
    for k, call in enumerate(calls):
        errors = []
        for where in ("cpu", device):
            with pytest.raises(Exception) as error:
                call(where)
            errors.append((type(error.value), message(error).replace("flagos:0", "cpu")))
        assert errors[0][0] is errors[1][0], (k, errors)
        assert errors[0][1][:60] == errors[1][1][:60], (k, errors)


def test_failed_inplace_changes_nothing(device):
    x = torch.arange(4.0, device=device)
    pointer = x.data_ptr()
    for bad in (
        lambda: x.add_(torch.ones(3, device=device)),
        lambda: x.copy_(torch.ones(5, device=device)),
        lambda: x.index_fill_(0, torch.tensor([9 if torch_fl.chip() != "cuda" else 0.5], device=device), 1),
        lambda: x.resize_(-2),
        lambda: x.unsqueeze_(9),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            bad()
        assert x.tolist() == [0, 1, 2, 3] and x.data_ptr() == pointer and x.shape == (4,)


def test_failed_out_keeps_the_tensor_usable(device):
    out = torch.zeros(2, 2, device=device)
    with pytest.raises(RuntimeError):
        torch.mm(torch.ones(2, 3, device=device), torch.ones(2, 3, device=device), out=out)
    assert out.tolist() == [[0, 0], [0, 0]]
    torch.mm(torch.ones(2, 3, device=device), torch.ones(3, 2, device=device), out=out)
    assert out.tolist() == [[3, 3], [3, 3]]


def test_unsupported_operator_names_itself(device):
    x = torch.ones(1, 1, 2, 2, device=device)
    with pytest.raises(NotImplementedError) as error:
        torch.ops.aten._mps_convolution(x, x, None, [0, 0], [1, 1], [1, 1], 1)
    assert "_mps_convolution" in str(error.value) and "flagos" in str(error.value), str(error.value)


def test_exceptions_keep_no_tensors_alive(device):
    import gc

    gc.collect()
    before = torch.flagos.memory_allocated()
    for _ in range(50):
        x = torch.ones(1000, device=device)
        with pytest.raises(RuntimeError):
            torch.mm(x, x)
        del x
    gc.collect()
    assert torch.flagos.memory_allocated() == before


# ---- at import: a process of its own each
# ---------------------------------------------------------------------------------


def import_error(**env):
    return error_line(run_python("import torch\nimport torch_fl", **env))


def test_unknown_chip():
    line = import_error(FLAGOS_ACCELERATOR="hosst")
    assert '"hosst"' in line and '"host"' in line and "known chips" in line, line


def test_unavailable_chip_says_what_was_tried():
    if torch_fl.chip() == "metax":
        pytest.skip("this machine has the chip")
    text = run_python("import torch_fl", FLAGOS_ACCELERATOR="metax")
    assert text.returncode != 0 and "metax" in text.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FLAGOS_HOST_DEVICES", "zero"),
        ("FLAGOS_HOST_DEVICES", "-1"),
        ("FLAGOS_HOST_MEMORY", "12Q"),
        ("FLAGOS_SIM_FAIL", "malloc@x=FOO"),
    ],
)
def test_malformed_chip_setting(variable, value):
    text = run_python(
        "import torch_fl, torch; torch.ones(1, device='flagos')", **{variable: value, "FLAGOS_ACCELERATOR": "host"}
    )
    last = error_line(text)
    assert variable in last or value in last or "FOO" in last or "@x" in last, last


def test_plain_import_of_torch_survives_a_bad_setting():
    """Autoload must never break `import torch`; the reason appears when the device is asked for."""
    result = run_python(
        """
        import torch
        assert torch.ones(2).sum().item() == 2
        try:
            torch.ones(2, device="flagos")
        except Exception as error:
            print("REASON", error)
        """,
        FLAGOS_ACCELERATOR="nonsense",
    )
    assert result.returncode == 0, result.stderr[-500:]
    # With a GPU the name stays free, so that torch.cuda is as without torch_fl (torch_fl/_unavailable.py).
    said = "nonsense" if torch.cuda.device_count() == 0 else "Expected one of cpu, cuda"
    assert "REASON" in result.stdout and said in result.stdout, result.stdout


def test_memory_that_a_failing_kernel_gave_its_result(device):
    """gather resizes its result and then finds the bad index: the result keeps shape and values in its new memory, and
    nobody else gets its old one while it shows that."""
    x, out = torch.ones(4, 300, device=device), torch.full((10,), 3.0, device=device)
    index = torch.full((4, 300), 999, device=device)
    if torch_fl.chip() == "cuda":
        pytest.skip("an index out of bounds ends a CUDA context; the host's kernel checks it")
    with pytest.raises(Exception, match="out of bounds"):
        torch.gather(x, 1, index, out=out)
    assert out.tolist() == [3] * 10
    others = [torch.zeros(10, device=device) for _ in range(20)]
    out.copy_(torch.full((10,), 5.0).pin_memory(), non_blocking=True)
    torch.flagos.synchronize()
    assert bool((out == 5).all()) and not any(bool(t.any()) for t in others)
