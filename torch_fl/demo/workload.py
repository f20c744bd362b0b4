"""A Qwen3-architecture language model that trains and generates on any device.

The model is transformers' own Qwen3ForCausalLM, unmodified; the text is the language reference that ships with Python;
nothing is downloaded. Everything random is drawn on the CPU, so that two devices start from the same numbers.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch


class ByteTokenizer:
    """One token per byte of UTF-8."""

    vocab_size = 256
    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: Iterable[int], **ignored) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


@dataclass
class TrainResult:
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def has_fallen(self) -> bool:
        """Whether the mean of the last tenth of the losses is below two thirds of the first loss."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail) < self.losses[0] * 2 / 3


@dataclass
class GenerateResult:
    tokens: list[int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0


def corpus() -> str:
    """English text that is on every machine with Python: the topics of `help()`."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def small_config(vocab_size: int = ByteTokenizer.vocab_size, **changes):
    """The Qwen3 architecture (grouped queries, QK norm, SwiGLU, rotary positions), small enough for two cores."""
    from transformers import Qwen3Config

    values = {
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return Qwen3Config(**{**values, **changes})


def build_model(config, seed: int = 0):
    """A model with random weights, on the CPU."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config).eval()


def load_model(folder: str | Path, dtype: str = "auto"):
    """(model on the CPU, tokenizer) from a folder with config, safetensors and tokenizer. Nothing is fetched."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: expected the folder of a Qwen3 model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def batches(tokens: list[int], steps: int, batch: int, length: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """`steps` batches of random windows of the text, on the CPU."""
    text = torch.tensor(tokens, dtype=torch.long)
    if len(text) <= length:
        raise ValueError(f"the text has {len(text)} tokens; a window of {length} needs more")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - length, (batch,), generator=generator)
        yield torch.stack([text[start : start + length] for start in starts.tolist()])


def synchronize(device: torch.device) -> None:
    """Waits for a device's queued work; the CPU has none."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def train(
    model,
    data: Iterable[torch.Tensor],
    device: torch.device,
    lr: float = 2e-3,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Trains in place with AdamW, one step per batch."""
    model.train()
    # The same optimizer code on every device: by default torch would take a loop on the CPU, foreach elsewhere.
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, foreach=True)
    result = TrainResult()
    for step, batch in enumerate(data):
        start = time.perf_counter()
        tokens = batch.to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result.losses.append(loss.item())
        synchronize(device)
        result.seconds += time.perf_counter() - start
        result.tokens += batch.numel()
        if on_step:
            on_step(step, result.losses[-1])
    model.eval()
    return result


def generate(model, prompt: list[int], new_tokens: int, device: torch.device, temperature: float = 0) -> GenerateResult:
    """Continuation of a prompt with transformers' generate and its key-value cache; greedy at temperature 0."""
    ids = torch.tensor([prompt], dtype=torch.long).to(device)
    choice = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    synchronize(device)
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, pad_token_id=0, **choice
        )
    tokens = output[0, ids.shape[1] :].tolist()
    return GenerateResult(tokens, time.perf_counter() - start)


def generate_graphed(model, prompt: list[int], new_tokens: int, device: torch.device) -> GenerateResult:
    """The greedy continuation with torch.flagos.graph_decode: one graph per token where the chip records graphs."""
    from torch_fl.flagos import graph_decode

    ids = torch.tensor([prompt], dtype=torch.long).to(device)
    decoder = graph_decode(model, max_length=len(prompt) + new_tokens)
    decoder.prefill(ids)  # records
    synchronize(device)
    start = time.perf_counter()
    output = decoder.generate(ids, new_tokens)
    tokens = output[0, ids.shape[1] :].tolist()
    return GenerateResult(tokens, time.perf_counter() - start)


def common_prefix(a: list, b: list) -> int:
    """How many leading items two lists share."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
