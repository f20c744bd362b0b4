"""The demo's command line, run as a user runs it: on random weights, and on a model folder from disk."""

import json
import os
import subprocess
import sys

import pytest

import torch_fl
from torch_fl.demo import workload

transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements/demo.txt)")


def demo(*arguments, **environment):
    command = [sys.executable, "-m", "torch_fl.demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen3 folder as they are published: config, safetensors, tokenizer; the weights are random."""
    from tokenizers import ByteLevelBPETokenizer

    path = tmp_path_factory.mktemp("qwen3")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([workload.corpus()[:100_000]], vocab_size=500, show_progress=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer).save_pretrained(path)
    config = workload.small_config(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    workload.build_model(config).save_pretrained(path)
    return path


@pytest.mark.anyplatform
def test_random_weights(tmp_path):
    result = demo("--steps", 3, "--tokens", 4, "--json", tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text())
    # Three steps are too few for the loss to have clearly fallen, and the demo says so.
    assert result.returncode == 1, result.stdout + result.stderr
    assert written["checks"].pop("loss has clearly fallen") is False
    assert all(written["checks"].values()), written["checks"]
    assert written["chip"] == torch_fl.chip()
    assert written["fallbacks"] == {}
    assert sum(written["ops_by_backend"].values()) > 1000
    assert written["memory"]["peak_allocated"] > 0
    assert len(written["train"]["losses"]) == 3 and len(written["generate"]["tokens"]) == 4


@pytest.mark.anyplatform
def test_model_folder_generates_and_trains(folder):
    result = demo("--model", folder, "--train", "--steps", 2, "--tokens", 5, "--prompt", "A class", "--json", "-")
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads(result.stdout)
    assert written["generate"]["prompt"] == "A class"
    assert len(written["train"]["losses"]) == 2
    assert written["comparison"]["greedy_tokens_equal"] == 5
    if torch_fl.chip() == "host":
        assert written["comparison"]["losses_bit_equal"] == 2


@pytest.mark.anyplatform
def test_model_folder_without_training(folder):
    result = demo("--model", folder, "--tokens", 3, "--no-compare", "--json", "-")
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads(result.stdout)
    assert "train" not in written and "comparison" not in written


@pytest.mark.anyplatform
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/nonexistent"], "/nonexistent has no config.json"),
        (["--steps", "0"], "--steps and --tokens must be at least 1"),
        (["--device", "flagos:7"], "flagos:7"),
    ],
)
def test_bad_arguments_give_one_line(arguments, words):
    result = demo(*arguments)
    assert result.returncode != 0
    assert words in result.stderr.splitlines()[-1], result.stderr
