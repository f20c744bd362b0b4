"""Qwen3 training on flagos: losses, gradients and weights against the CPU, over the same batches.

    pytest tests/integration/test_qwen3_train.py --model PATH --steps N
Without --model it is the same architecture with random weights.
"""

import copy

import pytest
import torch

import torch_fl
from torch_fl.demo import workload

pytest.importorskip("transformers", reason="transformers is not installed (requirements/demo.txt)")


@pytest.fixture(scope="module")
def setting(request):
    folder = request.config.getoption("--model")
    if folder:
        model, tokenizer = workload.load_model(folder)
        return {"model": model, "tokenizer": tokenizer, "batch": 1, "length": 128, "lr": 1e-5}
    model = workload.build_model(workload.small_config(hidden_size=96, intermediate_size=256, num_hidden_layers=2))
    return {"model": model, "tokenizer": workload.ByteTokenizer(), "batch": 4, "length": 64, "lr": 2e-3}


def data(setting, steps):
    tokens = setting["tokenizer"].encode(workload.corpus()[:200_000])
    return workload.batches(tokens, steps, setting["batch"], setting["length"])


def tolerance(model):
    """On the simulated host the kernels are the CPU's own; elsewhere they round differently."""
    if torch_fl.chip() == "host":
        return {"rtol": 0, "atol": 0}
    return {"rtol": 2e-3, "atol": 2e-4} if model.dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}


@pytest.fixture(scope="module")
def runs(setting, request):
    """The same training on flagos and on the CPU: (models, results)."""
    steps = request.config.getoption("--steps")
    torch_fl.fallbacks(reset=True)
    here = copy.deepcopy(setting["model"]).to("flagos")
    result = workload.train(here, data(setting, steps), torch.device("flagos"), setting["lr"])
    fallbacks = torch_fl.fallbacks()
    there = copy.deepcopy(setting["model"])
    reference = workload.train(there, data(setting, steps), torch.device("cpu"), setting["lr"])
    return here, result, there, reference, fallbacks


@pytest.mark.anyplatform
def test_losses_equal_the_cpu(runs):
    here, result, _, reference, _ = runs
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(reference.losses), **tolerance(here))


@pytest.mark.anyplatform
def test_losses_fall(runs):
    losses = runs[1].losses
    if len(losses) < 10:
        pytest.skip("fewer than 10 steps say nothing about the trend (--steps)")
    assert sum(losses[-5:]) / 5 < losses[0] - 0.02


@pytest.mark.anyplatform
def test_weights_after_training_equal_the_cpu(runs):
    here, result, there, _, _ = runs
    if torch_fl.chip() != "host" and len(result.losses) > 20:
        pytest.skip("rounding differs between chips and grows with the steps (--steps 20 compares weights)")
    expected = dict(there.named_parameters())
    for name, parameter in here.named_parameters():
        torch.testing.assert_close(
            parameter.detach().cpu(), expected[name].detach(), **tolerance(here), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.anyplatform
def test_gradients_of_one_step_equal_the_cpu(setting):
    tokens = next(data(setting, 1))
    there = copy.deepcopy(setting["model"])
    here = copy.deepcopy(setting["model"]).to("flagos")
    there(input_ids=tokens, labels=tokens).loss.backward()
    on_device = tokens.to("flagos")
    here(input_ids=on_device, labels=on_device).loss.backward()
    expected = dict(there.named_parameters())
    for name, parameter in here.named_parameters():
        assert parameter.grad.is_flagos, name
        torch.testing.assert_close(parameter.grad.cpu(), expected[name].grad, **tolerance(here))


@pytest.mark.anyplatform
def test_gradient_checkpointing_changes_nothing(setting, device):
    tokens = next(data(setting, 1)).to(device)
    plain = copy.deepcopy(setting["model"]).to(device).train()
    saving = copy.deepcopy(setting["model"]).to(device).train()
    saving.gradient_checkpointing_enable()
    losses = []
    for model in (plain, saving):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad.cpu(), **tolerance(plain), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.anyplatform
def test_bfloat16_autocast_trains(setting, device):
    model = copy.deepcopy(setting["model"]).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting["lr"])
    tokens = next(data(setting, 1)).to(device)
    losses = []
    for _ in range(5):
        with torch.autocast("flagos", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.anyplatform
def test_no_operator_falls_back(runs):
    assert runs[4] == {}
