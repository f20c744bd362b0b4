"""LSTM, GRU and RNN: core picks fused cells for this device type that the CPU does not have."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torch_fl

# cuDNN's activations round otherwise than the CPU's: in single precision torch's own tests grant it 5e-5, which is for
# values below 1; gradients here are sums of many. In double precision it has to be exact (test_equals_the_cpu).
TOLERANCE = {"rtol": 1e-4, "atol": 5e-5} if torch_fl.chip() == "cuda" else {"rtol": 1e-5, "atol": 1e-6}
CONFIGS = {
    "plain": {},
    "layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True, "batch_first": True},
    "no_bias": {"bias": False},
    "dropout": {"num_layers": 2, "dropout": 0.3},
}


def run(kind, where, packed=False, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    module = kind(4, 3, **kwargs).to(where, dtype)
    x = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(1)).to(where, dtype).requires_grad_()
    torch.manual_seed(2)
    if packed:
        lengths = torch.tensor([5, 3])
        sequence = pack_padded_sequence(x, lengths, batch_first=kwargs.get("batch_first", False))
        out, state = module(sequence)
        out = pad_packed_sequence(out)[0]
    else:
        out, state = module(x)
    states = state if isinstance(state, tuple) else (state,)
    (out.square().sum() + sum(s.sum() for s in states)).backward()
    return [t.detach().cpu() for t in (out, *states, x.grad, *(p.grad for p in module.parameters()))]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=["lstm", "gru", "rnn"])
def test_equals_the_cpu(kind, config, device):
    if config == "dropout" and torch_fl.chip() != "host":
        pytest.skip("dropout draws the CPU's numbers on the simulated chip only")
    for dtype, tolerance in ((torch.float64, {"rtol": 1e-7, "atol": 1e-7}), (torch.float32, TOLERANCE)):
        here, there = (run(kind, where, dtype=dtype, **CONFIGS[config]) for where in (device, "cpu"))
        for a, e in zip(here, there, strict=True):
            torch.testing.assert_close(a, e, **tolerance)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=["lstm", "gru", "rnn"])
def test_dropout_follows_the_seed(kind, device):
    once, again, without = (run(kind, device, num_layers=2, dropout=p) for p in (0.3, 0.3, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True)) and not torch.equal(once[0], without[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=["lstm", "gru", "rnn"])
def test_packed_sequences(kind, device):
    for a, e in zip(run(kind, device, packed=True), run(kind, "cpu", packed=True), strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


def test_lstm_with_projection(device):
    for a, e in zip(run(nn.LSTM, device, proj_size=2), run(nn.LSTM, "cpu", proj_size=2), strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell], ids=["lstm", "gru", "rnn"])
def test_cells(kind, device):
    results = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        cell = kind(4, 3).to(where)
        x = torch.ones(2, 4).to(where).requires_grad_()
        state = None
        for _ in range(3):
            state = cell(x, state)
        last = state[0] if isinstance(state, tuple) else state
        last.sum().backward()
        results.append([last.detach().cpu(), x.grad.cpu(), cell.weight_ih.grad.cpu()])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_inference_mode(kind, device):
    """No autograd kernel runs here, so the backend's own kernel has to exist too."""
    torch.manual_seed(0)
    module = kind(4, 3)
    x = torch.randn(5, 2, 4)
    with torch.inference_mode():
        expected = module(x)[0]
        actual = module.to(device)(x.to(device))[0]
    torch.testing.assert_close(actual.cpu(), expected)


def test_double_backward(device):
    results = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        cell = nn.GRUCell(3, 3).double().to(where)
        x = torch.ones(1, 3, dtype=torch.float64).to(where).requires_grad_()
        (first,) = torch.autograd.grad(cell(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append(second.cpu())
    torch.testing.assert_close(results[1], results[0])


def test_autocast(device):
    module = nn.LSTM(4, 3).to(device)
    with torch.autocast("flagos", dtype=torch.bfloat16):
        out, _ = module(torch.ones(5, 2, 4, device=device))
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.is_flagos for p in module.parameters())
