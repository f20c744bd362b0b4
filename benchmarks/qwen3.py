#!/usr/bin/env python3
"""Qwen3-0.6B architecture, random weights, bf16: decoding and training on a stock device and on flagos.

    python benchmarks/qwen3.py --out benchmarks/results                    # cuda against flagos on a GPU
    python benchmarks/qwen3.py --size small --pair cpu,flagos --limit 120  # tries it on a machine without one

Parts: `decode` decodes eagerly; `graph` replays the decode step as one graph, stock captured by the same code, and says
how many leading tokens are those of eager decoding on the same device, since the recorded step fuses norms; `train`
takes AdamW steps and compares the losses of the first ten bit by bit, and peak memory. Each device has a process of its
own, and they take turns of one token, one training step or one replayed text on one core of the machine, another one
in each generation of processes, so that a pair sees the same machine even where others share it and its cores change
their speed twofold within a second; only one works at a time. Figures are medians over pairs, and those of each
generation are listed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import torch  # noqa: E402

from benchmarks import common  # noqa: E402

PARTS = ("decode", "graph", "train")
PROMPT = 64
CORES = 4  # of the machine, for both processes
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
    def begin(self) -> None:
        """Reads the prompt."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        logits = self.model(input_ids=self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.chosen = [logits[:, -1:].argmax(-1)]

    @torch.no_grad()
    def step(self) -> None:
        logits = self.model(input_ids=self.chosen[-1], past_key_values=self.cache, use_cache=True).logits
        self.chosen.append(logits[:, -1:].argmax(-1))

    def steps(self, tokens: int) -> float:
        """Seconds that the next tokens take."""
        common.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(tokens):
            self.step()
        common.synchronize(self.device)
        return time.perf_counter() - start

    def round(self, tokens: int):
        """(tokens per second, the tokens) of one continuation of the prompt; the prompt itself is not timed."""
        self.begin()
        speed = tokens / self.steps(tokens)
        return speed, torch.cat(self.chosen, 1)[0].tolist()


# ---- a worker's side -----------------------------------------------------------------------------------------------


def decoder_source():
    """torch_fl/flagos/decode.py, loaded alone: a process of a stock device must not import torch_fl."""
    spec = importlib.util.spec_from_file_location("graph_decode_source", ROOT / "torch_fl" / "flagos" / "decode.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def common_start(a: list, b: list) -> int:
    """How many leading items of two lists of one length agree."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


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


class Work:
    """What a worker can be asked."""

    def __init__(self, options):
        common.load(options.device)
        torch.set_num_threads(1)  # it is timed on one core
        self.size, self.device, self.full = options.size, options.device, options.size == "full"
        self.vocabulary = SIZES[options.size]["vocab_size"]

    def start_decode(self, tokens):
        self.model = build(self.size, self.device)
        self.eager = Decoder(self.model, self.device, self.vocabulary)
        for _ in range(2):
            self.eager.round(tokens)
        self.tokens = tokens

    def decode(self):
        """One turn: a token; after so many of them the prompt, which is not timed, is read again."""
        if len(self.eager.chosen) > self.tokens:
            self.eager.begin()
        seconds = self.eager.steps(1)
        return {"seconds": seconds, "token": int(self.eager.chosen[-1])}

    def start_graph(self, compare):
        """Records; `compare`: decodes the same eagerly, which takes a while, to say how many leading tokens agree."""
        length = 256 if self.full else PROMPT + 16
        self.steps = length - PROMPT - 2
        self.decoder = decoder_source().graph_decode(self.model, max_length=length)
        text = self.decoder.generate(self.eager.prompt, self.steps)[0].tolist()
        self.graph()
        made = {"tokens": text, "graph": self.decoder.uses_graph, "fused_norms": self.decoder.fused_norms}
        if compare:
            eager = self.eager.round(self.steps - 1)[1]
            made["as_eager"] = common_start(text[PROMPT:], eager)
        return made

    def graph(self):
        self.decoder.prefill(self.eager.prompt)
        common.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.steps):
            self.decoder.step()
        common.synchronize(self.device)
        return {"tokens_per_second": self.steps / (time.perf_counter() - start)}

    def roofline(self):
        """What reading every weight once per token would allow."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        speed = bandwidth(self.device, 1 << 30 if self.full else 1 << 24)
        return {"weight_bytes": weights, "bandwidth_bytes_per_second": speed, "tokens_per_second": speed / weights}

    def start_train(self):
        """The first ten steps: their losses, and the peaks of memory since before the model."""
        self.model = self.eager = self.decoder = None
        common.forget(self.device)
        self.model = build(self.size, self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)
        generator = torch.Generator().manual_seed(2)
        self.data = [
            torch.randint(0, self.vocabulary, (2, 256), generator=generator).to(self.device) for _ in range(10)
        ]
        losses = [float(self.step(batch)).hex() for batch in self.data]
        return {"losses": losses, **common.peaks(self.device)}

    def step(self, batch):
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def train(self):
        """One turn: a step."""
        self.data.append(self.data.pop(0))
        common.synchronize(self.device)
        start = time.perf_counter()
        self.step(self.data[-1])
        common.synchronize(self.device)
        return {"seconds": time.perf_counter() - start}


# ---- both sides ----------------------------------------------------------------------------------------------------


class Answers:
    """What the workers of all generations answered, in pairs: by part, and what comes once in a generation."""

    def __init__(self):
        self.pairs = {part: [] for part in PARTS}
        self.starts = {part: [] for part in PARTS}
        self.roofline = None


def merge_decode(turns: list[dict]) -> dict:
    """A pair's tokens from its turns."""
    seconds = sum(turn["seconds"] for turn in turns)
    return {"tokens_per_second": len(turns) / seconds, "tokens": [turn["token"] for turn in turns]}


def merge_train(turns: list[dict]) -> dict:
    return {"steps_per_second": len(turns) / sum(turn["seconds"] for turn in turns)}


MERGE = {"decode": merge_decode, "train": merge_train}


def run_generation(options, devices, core, generation, budget, answers, save) -> None:
    """One process per device, through all parts, which have equal shares of what is left of the generation's time.
    They start on all of CORES, and are timed on one of them."""
    script = str(Path(__file__).resolve())
    parts = [part for part in PARTS if part in options.parts.split(",")]
    each = -(-options.pairs // options.processes)
    with common.workers(script, ["--size", options.size], devices, CORES) as pair:
        if "decode" in parts or "graph" in parts:
            answers.starts["decode"].append(common.both(pair, "start_decode", budget, tokens=options.tokens))
        for number, part in enumerate(parts):
            if part != "decode":
                given = {"compare": not answers.starts[part]} if part == "graph" else {}
                answers.starts[part].append(common.both(pair, f"start_{part}", budget, **given))
            share = common.Budget(generation.left() / (len(parts) - number))
            turns = {"decode": options.tokens, "train": options.steps}.get(part, 1)
            with common.kept_to(pair, core):
                made = common.alternate(pair, part, each, share, budget, turns, MERGE.get(part))
            answers.pairs[part] += [[one | {"process": pair[0].process.pid} for one in two] for two in made]
            if part == "graph" and answers.roofline is None:
                answers.roofline = pair[1].ask("roofline", budget)
            save()


# ---- judgement -----------------------------------------------------------------------------------------------------


def judge_speeds(pairs, starts=(), name="tokens_per_second") -> dict:
    """The ratio over pairs, and whether both devices chose the same tokens wherever they named them."""
    complete = common.good(pairs)
    result = {"errors": sorted({*common.errors(pairs), *common.errors(starts)})}
    if complete:
        speeds = [tuple(one[name] for one in pair) for pair in complete]
        result |= {name: common.ratio(speeds), "all": speeds}
        processes = [pair[0].get("process") for pair in complete]
        result["generations"] = [
            common.ratio([s for s, p in zip(speeds, processes, strict=True) if p == process])["ratio"]
            for process in dict.fromkeys(processes)
        ]
    named = [pair for pair in [*complete, *common.good(starts)] if "tokens" in pair[0]]
    if named:
        result["tokens_equal"] = all(a["tokens"] == b["tokens"] for a, b in named)
    return result


def judge_graph(pairs, starts, roofline, decode) -> dict:
    """Of graph-captured decoding: also what was captured, whether it chooses the tokens of eager decoding on the same
    device, and how its speed compares with that and with reading every weight."""
    result = judge_speeds(pairs, starts)
    if common.good(starts):
        first = common.good(starts)[0]
        result |= {name: [one[name] for one in first] for name in ("graph", "fused_norms")}
        if all("as_eager" in one for one in first):
            result["leading_tokens_as_eager"] = [one["as_eager"] for one in first]
            result["tokens_compared"] = len(first[0]["tokens"]) - PROMPT
    speed = result.get("tokens_per_second")
    if speed and "tokens_per_second" in decode:
        result["times_eager"] = round(speed["second"] / decode["tokens_per_second"]["second"], 2)
    if roofline and "error" in roofline:
        result["errors"].append(roofline["error"])
    elif speed and roofline:
        result |= {f"roofline_{k}": v for k, v in roofline.items() if k != "device"}
        result["share_of_roofline"] = round(speed["second"] / roofline["tokens_per_second"], 3)
    return result


def judge_train(pairs, starts) -> dict:
    result = judge_speeds(pairs, starts, "steps_per_second")
    if "all" in result:
        result["ms_per_step"] = [round(statistics.median(1e3 / pair[k] for pair in result["all"]), 3) for k in (0, 1)]
    complete = common.good(starts)
    if complete:
        result["losses"] = [float.fromhex(x) for x in complete[0][1]["losses"]]
        result["losses_bit_equal"] = all(a["losses"] == b["losses"] for a, b in complete)
        for name in ("peak_allocated", "peak_reserved"):
            if all(name in one for one in complete[0]):
                values = [max(pair[k][name] for pair in complete) for k in (0, 1)]
                result[name] = {"first": values[0], "second": values[1], "ratio": round(values[1] / values[0], 4)}
    return result


def judge(answers, parts) -> dict:
    decode = judge_speeds(answers.pairs["decode"], answers.starts["decode"])
    results = {
        "decode": decode,
        "graph": judge_graph(answers.pairs["graph"], answers.starts["graph"], answers.roofline, decode),
        "train": judge_train(answers.pairs["train"], answers.starts["train"]),
    }
    return {part: results[part] for part in PARTS if part in parts}


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
        "generations",
        "tokens_equal",
        "losses_bit_equal",
        "share_of_roofline",
        "times_eager",
        "graph",
        "fused_norms",
        "leading_tokens_as_eager",
        "tokens_compared",
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
    parser.add_argument("--pairs", type=int, default=48, help="pairs per part, over all processes")
    parser.add_argument("--processes", type=int, default=6, help="generations of processes")
    parser.add_argument("--tokens", type=int, default=16, help="tokens per pair of eager decoding, and of a text")
    parser.add_argument("--steps", type=int, default=3, help="training steps per pair")
    parser.add_argument("--limit", type=float, default=440, help="seconds for everything")
    parser.add_argument("--out", help="folder for qwen3.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        common.serve(Work(options))
        return 0
    devices = options.pair.split(",")
    if len(devices) != 2 or set(options.parts.split(",")) - set(PARTS):
        parser.error(f"--pair takes two devices, --parts some of {', '.join(PARTS)}")
    budget = common.Budget(options.limit)
    common.load(devices[1])
    data = {"what": "Qwen3-0.6B architecture, random bf16 weights; see benchmarks/qwen3.py", "pair": devices}
    data |= {"size": options.size, "where": common.where(devices[1]), "limit": options.limit, "parts": {}}
    print(", ".join(f"{k} {v}" for k, v in data["where"].items()), flush=True)
    answers = Answers()
    cores = common.last_cores(CORES)

    def save():
        data["parts"] = judge(answers, options.parts.split(","))
        common.save(options.out, "qwen3.json", data)

    for number in range(options.processes):
        if number and budget.left() < 30:
            print(f"{number} of {options.processes} generations: the time is over", flush=True)
            break
        generation = common.Budget((budget.left() - 10) / (options.processes - number))  # the last turn needs time too
        core = cores[-1 - number % len(cores)]
        run_generation(options, devices, core, generation, budget, answers, save)
    save()
    for part, result in data["parts"].items():
        show_part(part, devices, result)
    return 1 if any(result["errors"] or "all" not in result for result in data["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
