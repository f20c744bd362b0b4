"""transformers.Trainer and accelerate, unmodified, on flagos: train, evaluate, save, resume; losses as on the CPU.

accelerate looks for a fixed list of devices; ACCELERATE_TORCH_DEVICE=flagos in the environment names ours. On a machine
with a GPU TrainingArguments takes cuda before it looks there, so its property has to say flagos.
"""

import os

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def qwen3():
    config = transformers.Qwen3Config(**COMMON, vocab_size=64, num_key_value_heads=2, head_dim=8)
    return transformers.Qwen3ForCausalLM(config), tokens(labels=True)


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **COMMON, vocab_size=64, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32,
    )  # fmt: skip
    # The grouped experts count with histc of int32, which torch has for CUDA only, so not on the simulated chip.
    config._experts_implementation = "eager"
    return transformers.Qwen3MoeForCausalLM(config), tokens(labels=True)


def bert():
    config = transformers.BertConfig(**COMMON, vocab_size=64, max_position_embeddings=32, num_labels=3)
    return transformers.BertForSequenceClassification(config), tokens(labels=False)


def vit():
    config = transformers.ViTConfig(**COMMON, image_size=16, patch_size=8, num_labels=3)
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(k % 3)} for k in range(16)]
    return transformers.ViTForImageClassification(config), data


def t5():
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return transformers.T5ForConditionalGeneration(config), tokens(labels=True)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=16,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    data = [{"input_features": torch.randn(8, 32), "labels": torch.randint(3, 64, (12,))} for _ in range(16)]
    return transformers.WhisperForConditionalGeneration(config), data


def tokens(labels):
    rows = []
    for k in range(16):
        ids = torch.randint(1, 64, (12,))
        rows.append({"input_ids": ids, "attention_mask": torch.ones(12, dtype=torch.long)})
        rows[-1]["labels"] = ids.clone() if labels else torch.tensor(k % 3)
    return rows


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Leaves no variable and no state of accelerate behind."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "flagos")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    forget()
    yield
    forget()


def forget():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class OnFlagos(transformers.TrainingArguments):
    device = property(lambda self: super().device and torch.device("flagos"))


def trainer(make, folder, cpu=False, **options):
    forget()
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu" if cpu else "flagos"
    torch.manual_seed(0)
    model, data = make()
    for module in model.modules():  # dropout draws from another generator on each device
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name, value in list(vars(model.config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(model.config, name, 0.0)
    defaults = {"per_device_train_batch_size": 4, "logging_steps": 1, "report_to": [], "save_strategy": "no"}
    defaults |= {"disable_tqdm": True, "seed": 0, "max_steps": 6, "use_cpu": cpu}
    kind = transformers.TrainingArguments if cpu else OnFlagos
    arguments = kind(output_dir=str(folder), **{**defaults, **options})
    return transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


FAMILIES = [qwen3, qwen3_moe, bert, vit, t5, whisper]


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_twenty_steps_evaluate_save_resume(make, tmp_path):
    """A whole run: 20 steps and evaluations as on the CPU; from the checkpoint of step 10 the same last ten."""
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10, "eval_strategy": "steps", "eval_steps": 10}
    here = trainer(make, tmp_path / "flagos", **options)
    here.train()
    there = trainer(make, tmp_path / "cpu", cpu=True, **options)
    there.train()
    assert len(losses(here)) == 20 and losses(here) == pytest.approx(losses(there), rel=2e-3)
    evaluated = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (here, there)]
    assert len(evaluated[0]) == 2 and evaluated[0] == pytest.approx(evaluated[1], rel=2e-3)
    resumed = {}
    for cpu, where in ((False, "flagos"), (True, "cpu")):
        resumed[where] = trainer(make, tmp_path / where, cpu=cpu, **options)
        resumed[where].train(resume_from_checkpoint=str(tmp_path / where / "checkpoint-10"))
    assert losses(resumed["flagos"]) == pytest.approx(losses(resumed["cpu"]), rel=2e-3)
    # transformers 5 saves some weights under other names than resuming looks for, on every device: the CPU is asked.
    if losses(resumed["cpu"])[-10:] == pytest.approx(losses(there)[-10:], rel=1e-6):
        assert losses(resumed["flagos"])[-10:] == pytest.approx(losses(here)[-10:], rel=1e-6)
        for actual, expected in zip(resumed["flagos"].model.parameters(), here.model.parameters(), strict=True):
            torch.testing.assert_close(actual, expected)
    else:
        assert make in (qwen3_moe, vit)


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_training_equals_the_cpu_s(make, tmp_path):
    here = trainer(make, tmp_path, cpu=False)
    assert here.args.device.type == "flagos"
    here.train()
    assert next(here.model.parameters()).is_flagos
    there = trainer(make, tmp_path, cpu=True)
    there.train()
    assert len(losses(here)) == 6
    assert losses(here) == pytest.approx(losses(there), rel=1e-3)
    assert here.evaluate()["eval_loss"] == pytest.approx(there.evaluate()["eval_loss"], rel=1e-3)


def test_save_and_resume(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 1.0}
    straight = trainer(qwen3, tmp_path / "a", cpu=False, **options)
    straight.train()
    resumed = trainer(qwen3, tmp_path / "a", cpu=False, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(resumed)[-3:] == pytest.approx(losses(straight)[-3:], rel=1e-6)
    straight.save_model(str(tmp_path / "b"))
    again = transformers.Qwen3ForCausalLM.from_pretrained(str(tmp_path / "b")).to("flagos")
    for actual, expected in zip(again.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("option", ["gradient_checkpointing", "dataloader_pin_memory"])
def test_options(option, tmp_path):
    trained = trainer(qwen3, tmp_path, cpu=False, max_steps=3, **{option: True})
    trained.train()
    plain = trainer(qwen3, tmp_path, cpu=False, max_steps=3)
    plain.train()
    assert losses(trained) == pytest.approx(losses(plain), rel=0.02)


def test_bf16(tmp_path, monkeypatch):
    """TrainingArguments(bf16=True) asks a fixed list of devices; accelerate's own variable does not."""
    plain = trainer(qwen3, tmp_path, max_steps=3)
    plain.train()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    mixed = trainer(qwen3, tmp_path, max_steps=3)
    assert mixed.accelerator.mixed_precision == "bf16"
    mixed.train()
    assert losses(mixed) != losses(plain) and losses(mixed) == pytest.approx(losses(plain), rel=0.02)


def test_fp16_is_refused_by_accelerate():
    """It has a fixed list of devices; torch.autocast and torch.amp.GradScaler do it without accelerate."""
    with pytest.raises(ValueError, match="fp16 mixed precision requires a device in"):
        accelerate.Accelerator(mixed_precision="fp16")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_script(precision, tmp_path):
    """The loop of accelerate's documentation."""
    accelerator = accelerate.Accelerator(mixed_precision=precision, gradient_accumulation_steps=2)
    assert accelerator.device.type == "flagos"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.ones(32, 1))
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, batch_size=8))
    seen = []
    for _ in range(4):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.mse_loss(model(x).float(), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0]
    accelerator.save_state(str(tmp_path))
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
