#!/usr/bin/env python3
"""Qwen3-0.6B architecture, random weights, bf16: decoding and training on a stock device and on flagos.

    python benchmarks/qwen3.py --out benchmarks/results                    # cuda against flagos on a GPU
    python benchmarks/qwen3.py --size small --pair cpu,flagos --limit 120  # tries it on a machine without one

Parts: `pair` decodes eagerly on both devices in one process, alternating; `train` takes AdamW steps in processes of
their own and compares losses bit by bit and peak memory; `decode` decodes eagerly in processes of their own, and then
replays the decode step as one graph (stock captured by the same code; reported as `graph`). Host timing swings on
shared machines: figures are medians over pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import torch  # noqa: E402

from benchmarks import common  # noqa: E402

PARTS = ("pair", "train", "decode")
PROMPT = 64
SIZES = {
    # The values of the published Qwen3-0.6B configuration.
    "full": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
    },
    "small": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": 512,
    },
}


def build(size: str, device: str):
    """The model with random weights, drawn on the device: the generators of stock and flagos give the same numbers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **SIZES[size], tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)


class Decoder:
    """Eager greedy decoding with transformers' own growing cache."""

    def __init__(self, model, device, vocabulary):
        self.model, self.device = model, device
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(0, vocabulary, (1, PROMPT), generator=generator).to(device)

    @torch.no_grad()
    def round(self, tokens: int):
        """(tokens per second, the tokens) of one continuation of the prompt; the prompt itself is not timed."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        logits = self.model(input_ids=self.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        chosen = [token]
        common.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(tokens):
            logits = self.model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            chosen.append(token)
        common.synchronize(self.device)
        seconds = time.perf_counter() - start
        return tokens / seconds, torch.cat(chosen, 1)[0].tolist()


# ---- workers -------------------------------------------------------------------------------------------------------


def work_pair(options) -> dict:
    devices = options.pair.split(",")
    for device in devices:
        common.load(device)
    vocabulary = SIZES[options.size]["vocab_size"]
    decoders = [Decoder(build(options.size, device), device, vocabulary) for device in devices]
    budget = common.Budget(options.seconds)
    equal = True
    for decoder in decoders * 2:
        decoder.round(options.tokens)
    pairs = []
    while len(pairs) < options.pairs and budget.left() > 0:
        speeds, texts = [0.0, 0.0], [None, None]
        for which in (0, 1) if len(pairs) % 2 else (1, 0):
            speeds[which], texts[which] = decoders[which].round(options.tokens)
        equal &= texts[0] == texts[1]
        pairs.append(speeds)
    return {"pairs": pairs, "tokens_equal": equal}


def decoder_source():
    """torch_fl/flagos/decode.py, loaded alone: a process of a stock device must not import torch_fl."""
    package = importlib.util.find_spec("torch_fl")
    path = Path(next(iter(package.submodule_search_locations))) / "flagos" / "decode.py"
    spec = importlib.util.spec_from_file_location("graph_decode_source", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def work_decode(options) -> dict:
    common.load(options.device)
    model = build(options.size, options.device)
    eager = Decoder(model, options.device, SIZES[options.size]["vocab_size"])
    for _ in range(2):
        eager.round(options.tokens)
    rounds = [eager.round(options.tokens) for _ in range(8)]
    result = {"tokens_per_second": [r[0] for r in rounds], "tokens": rounds[-1][1], **common.peaks(options.device)}

    length = 256 if options.size == "full" else PROMPT + 16
    decoder = decoder_source().graph_decode(model, max_length=length)
    steps = length - PROMPT - 2
    text = decoder.generate(eager.prompt, steps)[0].tolist()
    speeds = []
    for _ in range(8):
        decoder.prefill(eager.prompt)
        common.synchronize(options.device)
        start = time.perf_counter()
        for _ in range(steps):
            decoder.step()
        common.synchronize(options.device)
        speeds.append(steps / (time.perf_counter() - start))
    result["graph"] = {
        "tokens_per_second": speeds,
        "tokens": text,
        "graph": decoder.uses_graph,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "bandwidth": bandwidth(options.device, 1 << 30 if options.size == "full" else 1 << 24),
    }
    return result


def bandwidth(device: str, nbytes: int) -> float:
    """Bytes per second, read and written, of the best of ten device copies."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        common.synchronize(device)
        start = time.perf_counter()
        for _ in range(8):
            target.copy_(source)
        common.synchronize(device)
        best = min(best, (time.perf_counter() - start) / 8)
    return 2 * nbytes / best


def work_train(options) -> dict:
    common.load(options.device)
    device = options.device
    model = build(options.size, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    generator = torch.Generator().manual_seed(2)
    vocabulary = SIZES[options.size]["vocab_size"]
    data = [torch.randint(0, vocabulary, (2, 256), generator=generator).to(device) for _ in range(10)]
    losses, times = [], []
    for step in range(10 + options.steps):
        batch = data[step % 10]
        common.synchronize(device)
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        common.synchronize(device)
        if step < 10:
            losses.append(float(loss).hex())
        else:
            times.append((time.perf_counter() - start) * 1e3)
    return {"ms_per_step": times, "losses": losses, **common.peaks(device)}


WORK = {"pair": work_pair, "decode": work_decode, "train": work_train}


# ---- judgement -----------------------------------------------------------------------------------------------------


def good(pairs) -> list:
    return [pair for pair in pairs if not any("error" in one for one in pair)]


def errors(pairs) -> list[str]:
    return [one["error"] for pair in pairs for one in pair if "error" in one]


def judge_speeds(pairs) -> dict:
    """Of workers with tokens_per_second: ratio over processes, and whether both devices chose the same tokens."""
    complete = good(pairs)
    result = {"errors": errors(pairs)}
    if complete:
        medians = [tuple(statistics.median(one["tokens_per_second"]) for one in pair) for pair in complete]
        result |= {"tokens_per_second": common.ratio(medians), "processes": medians}
        result["tokens_equal"] = all(a["tokens"] == b["tokens"] for a, b in complete)
    return result


def judge_graph(pairs) -> dict:
    """Of the `graph` half of the decode workers; how it compares with eager decoding and with reading every weight."""
    eager = judge_speeds(pairs)
    pairs = [[one["graph"] for one in pair] for pair in good(pairs)]
    result = judge_speeds(pairs)
    result["errors"] = eager["errors"]
    for pair in pairs[:1]:
        result["times_eager"] = round(result["tokens_per_second"]["second"] / eager["tokens_per_second"]["second"], 2)
        second = pair[1]
        result["graph"] = [one["graph"] for one in pair]
        roofline = second["bandwidth"] / second["weight_bytes"]
        result["roofline_tokens_per_second"] = roofline
        result["bandwidth_bytes_per_second"] = second["bandwidth"]
        result["share_of_roofline"] = round(result["tokens_per_second"]["second"] / roofline, 3)
    return result


def judge_train(pairs) -> dict:
    complete = good(pairs)
    result = {"errors": errors(pairs)}
    if complete:
        # Steps per second, so that above 1 means that the second device is faster, as in the other parts.
        medians = [tuple(1e3 / statistics.median(one["ms_per_step"]) for one in pair) for pair in complete]
        result |= {"steps_per_second": common.ratio(medians), "processes": medians}
        result["ms_per_step"] = [statistics.median(1e3 / pair[k] for pair in medians) for k in (0, 1)]
        result["losses"] = [float.fromhex(x) for x in complete[0][1]["losses"]]
        result["losses_bit_equal"] = all(a["losses"] == b["losses"] for a, b in complete)
        for name in ("peak_allocated", "peak_reserved"):
            if all(name in one for one in complete[0]):
                values = [max(pair[k][name] for pair in complete) for k in (0, 1)]
                result[name] = {"first": values[0], "second": values[1], "ratio": round(values[1] / values[0], 4)}
    return result


def show_part(part: str, devices, result) -> None:
    for error in result.get("errors", []):
        print(f"{part:8} error: {error}")
    for name in ("tokens_per_second", "steps_per_second"):
        if name in result:
            r = result[name]
            print(
                f"{part:8} {name.replace('_', ' ')}: {devices[0]} {r['first']:.2f}, {devices[1]} {r['second']:.2f}, "
                f"ratio {r['ratio']:.3f} ({r['ratio_low']:.3f} to {r['ratio_high']:.3f}, {r['pairs']} pairs)"
            )
    for name in (
        "tokens_equal",
        "losses_bit_equal",
        "share_of_roofline",
        "times_eager",
        "graph",
        "peak_allocated",
        "peak_reserved",
    ):
        if name in result:
            print(f"{part:8} {name.replace('_', ' ')}: {result[name]}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="cuda,flagos", help="two devices: stock, ours")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--pairs", type=int, default=24, help="pairs of rounds in one process")
    parser.add_argument("--rounds", type=int, default=2, help="pairs of processes per part")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per round of eager decoding")
    parser.add_argument("--steps", type=int, default=20, help="timed training steps per process")
    parser.add_argument("--limit", type=float, default=440, help="seconds for everything")
    parser.add_argument("--out", help="folder for qwen3.json")
    parser.add_argument("--worker", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=120, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        with contextlib.redirect_stdout(sys.stderr):
            result = WORK[options.worker](options)
        common.give(result)
        return 0
    devices = options.pair.split(",")
    parts = options.parts.split(",")
    if len(devices) != 2 or set(parts) - set(PARTS):
        parser.error(f"--pair takes two devices, --parts some of {', '.join(PARTS)}")
    budget = common.Budget(options.limit)
    common.load(devices[1])
    data = {"what": "Qwen3-0.6B architecture, random bf16 weights; see benchmarks/qwen3.py", "pair": devices}
    data |= {"size": options.size, "where": common.where(devices[1]), "limit": options.limit, "parts": {}}
    print(", ".join(f"{k} {v}" for k, v in data["where"].items()), flush=True)
    script = str(Path(__file__).resolve())
    passed = ["--size", options.size, "--tokens", str(options.tokens), "--steps", str(options.steps)]
    passed += ["--pair", options.pair, "--pairs", str(options.pairs), "--seconds", str(options.limit / 4)]
    for part in parts:  # each gets what the ones before it have left
        arguments = ["--worker", part, *passed]
        if part == "pair":
            answer = common.run_worker(script, arguments, devices[1], budget)
            result = {"errors": [answer["error"]] if "error" in answer else []}
            if "pairs" in answer:
                result["tokens_per_second"] = common.ratio(answer["pairs"])
                result["tokens_equal"] = answer["tokens_equal"]
            results = {"pair": result}
        else:
            pairs = common.alternate(script, arguments, devices, options.rounds, budget, lambda line: None)
            judges = {"train": {"train": judge_train}, "decode": {"decode": judge_speeds, "graph": judge_graph}}[part]
            results = {name: judge(pairs) for name, judge in judges.items()}
        for name, result in results.items():
            data["parts"][name] = result
            show_part(name, devices, result)
        sys.stdout.flush()
        common.save(options.out, "qwen3.json", data)
    return 1 if any(result["errors"] for result in data["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
