"""nn.Module on flagos: identity of parameters in .to(), tied weights, .data =, buffers, hooks, state dicts."""

import pytest
import torch
from torch import nn


def test_to_keeps_parameter_identity(device):
    """Otherwise optimizers built before .to() train nothing, and tied weights come apart."""
    model = nn.Linear(3, 2)
    weight, bias = model.weight, model.bias
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.to(device)
    assert model.weight is weight and model.bias is bias and weight.is_flagos
    before = weight.detach().clone()
    model(torch.ones(1, 3, device=device)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    model.cpu()
    assert model.weight is weight and weight.device.type == "cpu"
    assert torch.equal(weight, before.cpu() - 1)


def test_tied_weights_stay_tied(device):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    model = Tied()
    allocated = torch.flagos.memory_allocated()
    model.to(device)
    assert model.head.weight is model.embed.weight
    assert len(list(model.parameters())) == 1
    assert torch.flagos.memory_allocated() - allocated < 1024, "the shared weight was moved twice"
    model(torch.tensor([1, 2], device=device)).sum().backward()
    assert model.head.weight.grad is model.embed.weight.grad
    model.to(torch.bfloat16)
    assert model.head.weight is model.embed.weight and model.head.weight.dtype is torch.bfloat16


def test_gradients_move_along(device):
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    model.to(device)
    assert model.weight.grad.is_flagos and model.weight.grad.tolist() == [[1, 1], [1, 1]]


def test_data_assignment(device):
    parameter = nn.Parameter(torch.ones(2, device=device))
    alias = parameter.detach()
    parameter.data = torch.full((3,), 5.0, device=device)
    assert parameter.shape == (3,) and parameter.is_flagos and parameter.requires_grad
    assert alias.tolist() == [1.0, 1.0]
    parameter.data = torch.zeros(2)  # to another device, as .cpu() on a module does
    assert parameter.device.type == "cpu"
    parameter.data = parameter.data.to(device)
    assert parameter.is_flagos
    parameter.data.add_(3)
    assert parameter.tolist() == [3.0, 3.0] and parameter._version == 0


def test_buffers_and_dtype(device):
    model = nn.BatchNorm1d(3).to(device)
    assert all(b.is_flagos for b in model.buffers())
    model(torch.randn(8, 3, device=device))
    assert model.num_batches_tracked.item() == 1 and model.running_mean.abs().sum().item() > 0
    model.half()
    assert model.running_mean.dtype is torch.float16 and model.num_batches_tracked.dtype is torch.int64
    model.to(device, torch.float32, non_blocking=True)
    assert model.weight.dtype is torch.float32


def test_channels_last_module(device):
    model = nn.Conv2d(3, 4, 3).to(device, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8, device=device).to(memory_format=torch.channels_last)
    y = model(x)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.cpu(), model.cpu()(x.cpu()))


def test_meta_and_to_empty(device):
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    model.to_empty(device=device)
    assert model.weight.is_flagos and model.weight.shape == (2, 3)
    with pytest.raises(NotImplementedError, match="meta"):
        nn.Linear(2, 2, device="meta").to(device)


def test_load_state_dict_from_cpu_and_assign(device):
    state = {k: torch.full_like(v, 2.0) for k, v in nn.Linear(2, 2).state_dict().items()}
    model = nn.Linear(2, 2, device=device)
    model.load_state_dict(state)
    assert model.weight.is_flagos and model.weight.sum().item() == 8
    model.load_state_dict({k: v.to(device) * 2 for k, v in state.items()}, assign=True)
    assert model.weight.sum().item() == 16


def test_hooks_and_parametrization(device):
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)).to(device)
    seen = []
    model.register_forward_hook(lambda m, i, o: seen.append(o.device.type))
    model.register_full_backward_hook(lambda m, i, o: seen.append(o[0].device.type))
    model(torch.ones(2, 3, device=device, requires_grad=True)).sum().backward()
    assert seen == ["flagos", "flagos"]
    assert model.parametrizations.weight.original0.grad.is_flagos


def test_initializers_follow_the_seed(device):
    def make():
        torch.manual_seed(5)
        return nn.init.xavier_uniform_(torch.empty(4, 4, device=device))

    assert torch.equal(make(), make())
    assert nn.init.orthogonal_(torch.empty(4, 4, device=device)).det().abs().item() == pytest.approx(1, abs=1e-4)
    assert nn.init.trunc_normal_(torch.empty(100, device=device), a=-1, b=1).abs().max().item() <= 1


def test_dropout_trains_and_evaluates(device):
    layer = nn.Dropout(0.5).to(device)
    x = torch.ones(1000, device=device)
    kept = (layer(x) != 0).float().mean().item()
    assert 0.4 < kept < 0.6
    assert torch.equal(layer.eval()(x), x)


def test_deepcopy_of_a_module(device):
    import copy

    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).to(device)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone[0].weight.zero_()
    assert clone[0].weight.is_flagos and model[0].weight.abs().sum().item() > 0


def test_parameter_list_of_mixed_devices(device):
    parameters = nn.ParameterList([torch.ones(2), torch.ones(2, device=device)])
    assert [p.device.type for p in parameters] == ["cpu", "flagos"]
    parameters.to(device)
    assert all(p.is_flagos for p in parameters)


def test_vector_to_parameters_views(device):
    model = nn.Linear(3, 2).to(device)
    flat = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(flat * 2, model.parameters())
    torch.testing.assert_close(nn.utils.parameters_to_vector(model.parameters()), flat * 2)


def test_flatten_parameters_of_an_rnn_keeps_values(device):
    lstm = nn.LSTM(3, 4, 2)
    expected = [p.detach().clone() for p in lstm.parameters()]
    lstm.to(device).flatten_parameters()
    for p, e in zip(lstm.parameters(), expected, strict=True):
        assert torch.equal(p.cpu(), e)
