"""The copying CPU fallback: right, counted, warned about once, refused in strict mode."""

import threading
import warnings

import pytest
import torch

import torch_fl
from tests.common.process import check_python, run_python

# operator -> (call, what makes it special)
ROUTED = {
    "add.Tensor": lambda x: x + x,
    "add_.Tensor": lambda x: x.clone().add_(x),
    "mm": lambda x: torch.mm(x, x),
    "mm.out": lambda x: torch.mm(x, x, out=torch.empty(0, device=x.device)),
    "sum.dim_IntList": lambda x: x.sum(0),
    "sort.stable": lambda x: x.sort(0).values,
    "cat": lambda x: torch.cat([x, x.t()]),
    "relu_": lambda x: x.clone().relu_(),
    "native_layer_norm": lambda x: torch.nn.functional.layer_norm(x, (4,)),
    "index.Tensor": lambda x: x[torch.tensor([0, 2], device=x.device), :],
    "_fused_sgd_": lambda x: fused_sgd(x),
    "max.dim": lambda x: x.max(1).indices,
    "normal_": lambda x: (
        x.clone().normal_(generator=torch.Generator(x.device).manual_seed(1))
        if x.is_flagos
        else x.clone().normal_(generator=torch.Generator().manual_seed(1))
    ),
    "where.self": lambda x: torch.where(x > 0, x, -x),
    "clamp.Tensor": lambda x: x.clamp(torch.zeros(4, device=x.device)),
    "_softmax": lambda x: x.softmax(-1),
}


def fused_sgd(x):
    """An operator that changes lists of tensors."""
    parameter, gradient = x.clone(), torch.ones_like(x)
    torch._fused_sgd_(
        [parameter],
        [gradient],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=0.5,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
    return parameter


@pytest.fixture(autouse=True)
def forget():
    yield
    for op in ROUTED:
        torch_fl.set_route(op, None)
    torch_fl.fallbacks(reset=True)


@pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")
@pytest.mark.parametrize("op", ROUTED)
def test_computes_and_counts(op, device):
    x = torch.linspace(-2, 2, 16).reshape(4, 4)
    expected = ROUTED[op](x)
    torch_fl.fallbacks(reset=True)
    torch_fl.set_route(op, "cpu")
    actual = ROUTED[op](x.to(device))
    assert actual.is_flagos
    torch.testing.assert_close(actual.cpu(), expected)
    assert torch_fl.fallbacks() == {op: 1}
    ROUTED[op](x.to(device))
    assert torch_fl.fallbacks() == {op: 2}
    torch_fl.set_route(op, None)
    ROUTED[op](x.to(device))
    assert torch_fl.fallbacks() == {op: 2}, "the old route came back but the call still fell back"
    assert torch_fl.fallbacks(reset=True) == {op: 2} and torch_fl.fallbacks() == {}


def test_warned_once_per_operator():
    check_python(
        """
        import warnings
        import torch, torch_fl
        torch_fl.set_route("mul.Tensor", "cpu")
        torch_fl.set_route("exp", "cpu")
        x = torch.ones(3, device="flagos")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(5):
                x * x
            x.exp()
        texts = [str(w.message) for w in caught]
        assert len(texts) == 2, texts
        assert "mul" in texts[0] and "CPU" in texts[0] and "explain" in texts[0], texts
        assert "exp" in texts[1], texts
        """
    )


@pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")
def test_strict_raises_and_names_the_operator(device):
    x = torch.ones(2, device=device)
    torch_fl.set_route("mul.Tensor", "cpu")
    with torch_fl.strict():
        with pytest.raises(RuntimeError) as error:
            x * x
        text = str(error.value).split("\n")[0]
        assert "mul.Tensor" in text and "CPU" in text and "strict" in text and "explain" in text, text
        assert (x + x).tolist() == [2, 2]
        with torch_fl.strict(False):
            assert (x * x).tolist() == [1, 1]
        with pytest.raises(RuntimeError, match="strict"):
            x * x
    assert (x * x).tolist() == [1, 1]


def test_strict_from_the_environment():
    code = "import torch; x = torch.ones(2, device='flagos'); print((x + x).sum().item()); x * x"
    result = run_python(code, FLAGOS_STRICT="1", FLAGOS_OP_mul__Tensor="cpu")
    assert result.returncode != 0 and "mul.Tensor" in result.stderr and result.stdout.strip() == "4.0"
    assert run_python(code, FLAGOS_STRICT="1").returncode == 0


@pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")
def test_gradients_pass_through_a_fallback(device):
    torch_fl.set_route("mm", "cpu")
    results = []
    for where in ("cpu", device):
        x = torch.arange(4.0).reshape(2, 2).to(where).requires_grad_()
        (x @ x).square().sum().backward()
        results.append(x.grad.cpu())
    assert torch.equal(*results)
    assert torch_fl.fallbacks()["mm"] >= 3  # forward and two products backward


@pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")
def test_result_on_the_second_device():
    if torch.flagos.device_count() < 2:
        pytest.skip("needs two devices")
    torch_fl.set_route("mul.Tensor", "cpu")
    x = torch.ones(2, device="flagos:1")
    assert (x * 3).device.index == 1 and (x * 3).tolist() == [3, 3]


@pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")
def test_errors_of_the_cpu_kernel_come_through(device):
    torch_fl.set_route("mm", "cpu")
    x = torch.ones(2, 3, device=device)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        torch.mm(x, x)
    assert torch.mm(x, x.t()).tolist() == [[3, 3], [3, 3]]


@pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")
def test_counts_are_exact_under_threads(device):
    torch_fl.set_route("mul.Tensor", "cpu")
    torch_fl.fallbacks(reset=True)
    x = torch.ones(2, device=device)

    def work():
        with warnings.catch_warnings():
            for _ in range(100):
                torch.mul(x, x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch_fl.fallbacks() == {"mul.Tensor": 400}


def test_ordinary_work_never_falls_back(device):
    """A small training step touches none of it."""
    if torch_fl.chip() not in ("host", "cuda"):
        pytest.skip("chips without native torch kernels may fall back")
    torch_fl.fallbacks(reset=True)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(3)
    )
    model = model.to(device)
    with torch_fl.strict():
        loss = torch.nn.functional.cross_entropy(
            model(torch.randn(2, 1, 8, 8, device=device)), torch.tensor([0, 2], device=device)
        )
        loss.backward()
        torch.optim.AdamW(model.parameters()).step()
    assert torch_fl.fallbacks() == {}
