"""Optimizers on flagos: default, for-loop, foreach and fused give the CPU's numbers; gradients stay on the device."""

import pytest
import torch

FUSED = {"Adam", "AdamW", "SGD", "Adagrad"}
OPTIMIZERS = ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


def train(name, where, **kwargs):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).to(where)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05, **kwargs)
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).to(where)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()], optimizer


@pytest.mark.parametrize("implementation", ["default", "forloop", "foreach", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_cpu_s(name, implementation, device):
    if implementation == "fused" and name not in FUSED:
        pytest.skip(f"torch has no fused {name}")
    choice = {"default": {}, "forloop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    actual, _ = train(name, device, **choice[implementation])
    expected, _ = train(name, "cpu", foreach=False)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
    start, _ = train(name, "cpu", foreach=False, maximize=True)
    assert any(not torch.allclose(a, s) for a, s in zip(actual, start, strict=True)), "training changed nothing"


def test_state_is_on_the_device(device):
    _, optimizer = train("AdamW", device)
    for state in optimizer.state.values():
        assert state["exp_avg"].is_flagos and state["exp_avg_sq"].is_flagos


def test_foreach_is_the_default(device):
    """torch chooses foreach for accelerators; a for-loop would launch thousands of small kernels."""
    from torch.optim.optimizer import _default_to_fused_or_foreach

    parameter = torch.nn.Parameter(torch.ones(2, device=device))
    assert _default_to_fused_or_foreach([parameter], differentiable=False, use_fused=False)[1]


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clip_grad_norm_stays_on_the_device(foreach, device):
    parameters = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.full((3,), 2.0, device=device)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=foreach)
    assert norm.is_flagos, "the norm was computed on the CPU"
    torch.testing.assert_close(norm.item(), (12 * 4.0) ** 0.5)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    assert clipped.is_flagos
    torch.testing.assert_close(clipped.item(), 1.0, rtol=1e-4, atol=1e-4)


def test_clip_grad_value(device):
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    parameter.grad = torch.tensor([-5.0, 0.1, 5.0], device=device)
    torch.nn.utils.clip_grad_value_([parameter], 1.0)
    torch.testing.assert_close(parameter.grad.cpu(), torch.tensor([-1.0, 0.1, 1.0]))


def test_mixed_devices_in_one_optimizer(device):
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, device=device))]
    optimizer = torch.optim.Adam(parameters, lr=0.5, foreach=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameters[1].is_flagos
    torch.testing.assert_close(parameters[0], parameters[1].cpu())


def test_capturable(device):
    parameter = torch.nn.Parameter(torch.ones(2, device=device))
    optimizer = torch.optim.Adam([parameter], lr=0.1, capturable=True, foreach=True)
    for _ in range(3):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert optimizer.state[parameter]["step"].is_flagos and optimizer.state[parameter]["step"].item() == 3
    torch.testing.assert_close(parameter.detach().cpu(), torch.full((2,), 0.7), rtol=1e-4, atol=1e-4)


def test_lbfgs_and_sparse_adam(device):
    parameter = torch.nn.Parameter(torch.full((3,), 4.0, device=device))
    optimizer = torch.optim.LBFGS([parameter], line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (parameter - 1).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    torch.testing.assert_close(parameter.detach().cpu(), torch.ones(3), rtol=1e-4, atol=1e-4)
    results = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(10, 4, sparse=True).to(where)
        optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            embedding(torch.tensor([1, 3, 3], device=where)).sum().backward()
            optimizer.step()
        results.append(embedding.weight.detach().cpu())
    torch.testing.assert_close(results[1], results[0])
    assert not torch.equal(results[1][1], results[1][0])


def test_learning_rate_schedule_and_param_groups(device):
    a, b = (torch.nn.Parameter(torch.ones(1, device=device)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    for _ in range(2):
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close((a.item(), b.item()), (1 - 0.11, 1 - 0.55), rtol=1e-5, atol=1e-5)
