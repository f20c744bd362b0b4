"""Tracing: make_fx, FakeTensor, torch.fx, TorchScript and export see flagos operators and devices."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import torch_fl


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.norm = torch.nn.BatchNorm2d(2)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


@pytest.fixture
def net(device):
    torch.manual_seed(0)
    return Net().to(device).eval()


@pytest.fixture
def x(device):
    return torch.randn(2, 1, 4, 4, device=device)


def test_symbolic_trace(net, x):
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_of_forward_and_backward(mode, net, x):
    def step(x):
        loss = net(x).square().sum()
        return loss, *torch.autograd.grad(loss, [net.head.weight, net.conv.weight])

    graph = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    targets = {str(node.target) for node in graph.graph.nodes}
    assert {"aten.convolution.default", "aten.convolution_backward.default"} <= targets, targets
    for actual, expected in zip(graph(x), step(x), strict=True):
        assert actual.is_flagos
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)  # cuDNN may take another algorithm


def test_make_fx_keeps_the_device_of_factories(device):
    graph = make_fx(lambda x: x + torch.arange(3, device=device))(torch.ones(3, device=device))
    (node,) = [n for n in graph.graph.nodes if "arange" in str(n.target)]
    assert node.kwargs["device"] == torch.device("flagos") or node.kwargs["device"] == torch.device("flagos", 0)


def test_fake_training_step_takes_no_memory(device):
    before = torch_fl.flagos.memory_allocated()
    with FakeTensorMode() as mode:
        net = torch.nn.Linear(1 << 14, 1 << 14, device=device)
        loss = net(torch.empty(64, 1 << 14, device=device)).sum()
        loss.backward()
        assert net.weight.grad.device == torch.device("flagos", 0) and net.weight.grad.shape == net.weight.shape
    assert torch_fl.flagos.memory_allocated() == before
    real = torch.ones(2, device=device)
    fake = mode.from_tensor(real)
    assert fake.device == real.device


def test_fake_tensors_refuse_other_devices(device):
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"device"):
        torch.ones(2, device=device) + torch.ones(2)


def test_jit_trace_and_script(device):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()).to(device).eval()
    x = torch.randn(3, 4, device=device)
    assert torch.equal(torch.jit.trace(net, x)(x), net(x))
    assert torch.equal(torch.jit.script(net)(x), net(x))


def test_jit_script_of_a_convolution(net, x):
    assert torch.equal(torch.jit.script(net)(x), net(x))


def test_jit_trace_of_a_convolution(net, x):
    assert torch.equal(torch.jit.trace(net, x)(x), net(x))


def test_export(net, x):
    program = torch.export.export(net, (x,))
    assert any("conv" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), net(x))


def test_functionalized_graph_of_in_place_code(device):
    def fn(x):
        y = x.clone()
        y[0].add_(1)
        return y.mul_(2)

    graph = make_fx(torch.func.functionalize(fn))(torch.zeros(3, device=device))
    names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert not any(name.split(".")[1].endswith("_") for name in names), names
    assert graph(torch.zeros(3, device=device)).tolist() == [2, 0, 0]


def test_flop_counter(net, x):
    from torch.utils.flop_counter import FlopCounterMode

    def count(net, x):
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
        return counter.get_total_flops()

    assert count(net, x) == count(Net(), x.cpu()) > 0


def test_benchmark_timer(device):
    from torch.utils.benchmark import Timer

    x = torch.ones(4, device=device)
    measured = Timer("x + 1", globals={"x": x}).timeit(5)
    assert 0 < measured.mean < 5


def test_anomaly_mode_shows_the_forward_call(device):
    x = torch.zeros(2, device=device, requires_grad=True)
    with pytest.warns(UserWarning, match="forward call that caused the error"), torch.autograd.detect_anomaly():
        y = (x.sqrt() * 0).sum()
        with pytest.raises(RuntimeError, match=r"SqrtBackward0.* returned nan"):
            y.backward()
