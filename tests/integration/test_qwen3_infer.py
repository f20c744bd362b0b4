"""Qwen3 inference on flagos: transformers' own model, greedy and sampled, against the CPU.

    pytest tests/integration/test_qwen3_infer.py --model PATH    # Qwen3-0.6B, or any Qwen3 folder
Without --model it is the same architecture with random weights.
"""

import copy

import pytest
import torch

import torch_fl
from torch_fl.demo import workload

pytest.importorskip("transformers", reason="transformers is not installed (requirements/demo.txt)")

PROMPT = "The quick brown fox"
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def loaded(request):
    folder = request.config.getoption("--model")
    if folder:
        model, tokenizer = workload.load_model(folder)
    else:
        tokenizer = workload.ByteTokenizer()
        model = workload.build_model(workload.small_config())
    return model, tokenizer.encode(PROMPT)


@pytest.fixture(scope="module")
def pair(loaded):
    """The model on the CPU, and a copy of it on flagos."""
    model, prompt = loaded
    return model, copy.deepcopy(model).to("flagos"), prompt


def tolerance(model):
    """On the simulated host the kernels are the CPU's own; elsewhere they round differently."""
    if torch_fl.chip() == "host":
        return {"rtol": 0, "atol": 0}
    return {"rtol": 1e-3, "atol": 1e-3} if model.dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}


@pytest.mark.anyplatform
def test_every_parameter_and_buffer_is_on_the_device(pair):
    _, model, _ = pair
    elsewhere = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if not t.is_flagos]
    assert elsewhere == []


@pytest.mark.anyplatform
def test_logits_equal_the_cpu(pair, device):
    reference, model, prompt = pair
    ids = torch.tensor([prompt])
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
        actual = model(input_ids=ids.to(device)).logits
    assert actual.device.type == "flagos"
    torch.testing.assert_close(actual.cpu(), expected, **tolerance(reference))


@pytest.mark.anyplatform
def test_greedy_tokens_equal_the_cpu(pair, device):
    reference, model, prompt = pair
    expected = workload.generate(reference, prompt, NEW_TOKENS, torch.device("cpu")).tokens
    actual = workload.generate(model, prompt, NEW_TOKENS, device).tokens
    if torch_fl.chip() == "host" or reference.dtype == torch.float32:
        assert actual == expected
    else:  # in half precision a near tie may go either way; what comes after it is another text
        assert workload.common_prefix(actual, expected) >= 8
    assert len(actual) == NEW_TOKENS


@pytest.mark.anyplatform
def test_cached_decoding_equals_recomputing(pair, device):
    _, model, prompt = pair
    tokens = workload.generate(model, prompt, 8, device).tokens
    ids = torch.tensor([prompt + tokens[:-1]]).to(device)
    with torch.no_grad():
        again = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].argmax(-1)
    if model.dtype == torch.float32:
        assert again.tolist() == tokens
    else:
        assert workload.common_prefix(again.tolist(), tokens) >= 4


@pytest.mark.anyplatform
def test_sampling_repeats_with_the_seed(pair, device):
    _, model, prompt = pair
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(workload.generate(model, prompt, NEW_TOKENS, device, temperature=1.0).tokens)
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


@pytest.mark.anyplatform
def test_batch_with_padding(pair, device):
    """A left-padded batch gives each row what it gives alone."""
    reference, model, prompt = pair
    short = prompt[:5]
    width = len(prompt)
    ids = torch.tensor([prompt, [0] * (width - len(short)) + short])
    mask = torch.tensor([[1] * width, [0] * (width - len(short)) + [1] * len(short)])
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask).logits[:, -1]
        actual = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, -1]
    torch.testing.assert_close(actual.cpu(), expected, **tolerance(reference))


@pytest.mark.anyplatform
def test_no_operator_falls_back(pair, device):
    _, model, prompt = pair
    torch_fl.fallbacks(reset=True)
    workload.generate(model, prompt, 4, device)
    assert torch_fl.fallbacks() == {}
