#!/usr/bin/env python3
"""Qwen3-0.6B architecture, random weights, bf16: prefill, decoding and training on flagos under four sets of routes.

    python benchmarks/tuned.py --out benchmarks/results --limit 900     # on a GPU with flag_gems installed
    python benchmarks/tuned.py --size small --limit 120 --out FOLDER    # tries it on a machine without one
    python -m tests.common.null_cuda python benchmarks/tuned.py --conf benchmarks/results/tuned.json --steps 0
                  # host time alone: the null CUDA's kernels take no time, and compute nothing that could be verified.
                  # Its memset does: where FlagGems' kernels fill memory, training looks faster than it is

Routes: `native` (no FlagGems), `again` (the same once more: what noise makes of equal routes), `shipped` (what
scripts/make_backends_conf.py makes of the tuner's measurements; with --conf the chip's conf in torch_fl/), `all` (no
conf: every FlagGems kernel that is judged right), `tuned` (what torch_fl.tune() and its trial() make of this very
workload, first of all; --conf takes a finished one). One process, on one core while it is timed, and one model; in each
round every set of routes takes a turn at a part, in random order, and is compared with native in the same round. A turn
begins with work that is not timed: the first calls after a change of routes decide anew. Then each set decodes and
trains from the same start: its tokens must be ones that native, given the same text, finds as good as its own; its
losses must stay within LOSS_TOLERANCE of native's.

tuned.json holds figures, device, versions and every measurement of the tuner; scripts/make_backends_conf.py turns it
into torch_fl/backends.conf.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import torch  # noqa: E402

from benchmarks import common, qwen3  # noqa: E402
from scripts import make_backends_conf  # noqa: E402

ROUTES = ("native", "again", "shipped", "all", "tuned")
PARTS = ("prefill", "decode", "train")
TURN = 8  # tokens
TRIAL = 0.4  # of the tuner's time, for what it makes of its measurements
LOSS_TOLERANCE = 2e-2  # relative; bf16 resolves 8e-3
TOKEN_MARGIN = 0.25  # standard deviations of the logits between native's best token and the one that was taken
SHAPES = {"full": {"prefill": (4, 512), "train": (2, 256)}, "small": {"prefill": (2, 32), "train": (2, 16)}}


class Workload:
    """One model; each method is one part, and returns its speed (more is better)."""

    def __init__(self, size: str, tokens: int):
        self.size, self.tokens = size, tokens
        self.model = qwen3.build(size, "flagos")
        self.start = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        vocabulary = qwen3.SIZES[size]["vocab_size"]
        generator = torch.Generator().manual_seed(2)
        shapes = SHAPES[size]
        self.text = torch.randint(0, vocabulary, shapes["prefill"], generator=generator).to("flagos")
        self.data = [torch.randint(0, vocabulary, shapes["train"], generator=generator).to("flagos") for _ in range(4)]
        self.decoder = qwen3.Decoder(self.model, "flagos", vocabulary)
        self.restart()

    def restart(self) -> None:
        """The weights and the optimizer of the beginning."""
        self.model.load_state_dict(self.start)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)
        self.steps = 0

    def _timed(self, work, units: int) -> float:
        work()
        torch.flagos.synchronize()
        begin = time.perf_counter()
        work()
        torch.flagos.synchronize()
        return units / (time.perf_counter() - begin)

    @torch.no_grad()
    def prompt(self):
        return self.model(input_ids=self.text, use_cache=False)

    def generate(self) -> float:
        """Seconds of TURN tokens, without those of the prompt."""
        self.decoder.begin()
        self.decoder.steps(1)
        return self.decoder.steps(TURN)

    def prefill(self) -> float:
        return self._timed(self.prompt, self.text.numel())

    def decode(self) -> float:
        return TURN / self.generate()

    def train(self) -> float:
        return self._timed(self.step, 1)

    def step(self):
        batch = self.data[self.steps % len(self.data)]
        self.steps += 1
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def losses(self, steps: int) -> list[float]:
        self.restart()
        found = [self.step() for _ in range(steps)]
        return [float(loss) for loss in found]

    @torch.no_grad()
    def margin(self, tokens: list[int]) -> float:
        """How much better, in standard deviations, the model finds another token than each of these, at worst."""
        after = torch.tensor([tokens], device="flagos")
        text = torch.cat([self.decoder.prompt, after], 1)
        logits = self.model(input_ids=text, use_cache=False).logits[0, self.decoder.prompt.shape[1] - 1 : -1].float()
        taken = logits.gather(1, after[0][:, None])[:, 0]
        return float(((logits.max(1).values - taken) / logits.std(1)).max())


# ---- routes --------------------------------------------------------------------------------------------------------


def native_conf() -> str:
    """A conf that holds back every FlagGems kernel that would serve by default."""
    import torch_fl
    from torch_fl.tuning.observe import choice

    return "".join(f"{op} = native\n" for op in torch_fl.get_registered_ops() if choice(op))


class Routes:
    """The sets of routes as conf files; `load` puts one in force."""

    def __init__(self, folder: Path, load):
        from torch_fl import routing

        self.load = load
        self.paths = {"shipped": routing.default_conf(routing.chip())}
        self.folder = folder
        self.add("native", native_conf())
        self.paths["again"] = self.paths["native"]
        self.add("all", "")

    def add(self, name: str, text: str) -> None:
        path = self.folder / f"{name}.conf"
        path.write_text(text)
        self.paths[name] = path

    def use(self, name: str) -> None:
        self.load(self.paths[name])


def finished_conf(path: Path) -> str:
    """A conf, or that of an earlier run's tuned.json."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return text
    from torch_fl.tuning import Tuned

    return Tuned.from_dict(json.loads(text)["tuning"]).conf()


def tune(workload: Workload, routes: Routes, budget: float, clock: str):
    """The report on one pass over all parts, tried on them; its conf becomes the set `tuned`."""
    import torch_fl

    parts = (workload.prompt, workload.generate, workload.step)
    routes.use("native")
    with torch_fl.tune(budget=budget * (1 - TRIAL), clock=clock, progress=True) as tuning:
        for part in parts:
            part()
    with quiet():
        report = tuning.trial(*parts, budget=budget * TRIAL)
    routes.add("tuned", report.conf())
    return report


# ---- the run -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet():
    """One core for the process, and no collection of garbage meanwhile."""
    cores = common.last_cores(None)
    gc.collect()
    gc.freeze()
    gc.disable()
    common.keep_to(os.getpid(), common.last_cores(1))
    try:
        yield
    finally:
        common.keep_to(os.getpid(), cores)
        gc.enable()
        gc.unfreeze()


def measure(workload: Workload, routes: Routes, part: str, rounds: int, budget: common.Budget) -> dict:
    """{routes: {ratio to native, the bounds of that median with 95 % confidence, ...}} over as many rounds as there is
    time for."""
    from torch_fl.tuning import trial

    run = getattr(workload, part)
    for name in ROUTES:  # compiles, and records launch plans
        routes.use(name)
        for _ in range(3):
            run()
    speeds: dict[str, list] = {name: [] for name in ROUTES}
    order, shuffle = list(ROUTES), random.Random(0).shuffle
    while len(speeds["native"]) < rounds and (budget.left() > 0 or not speeds["native"]):
        shuffle(order)
        for name in order:
            routes.use(name)
            speeds[name].append(run())
    result = {}
    for name, own in speeds.items():
        pairs = list(zip(speeds["native"], own, strict=True))
        median = trial.speed(mine / native for native, mine in pairs)
        result[name] = {**common.ratio(pairs), "median_low": round(median.low, 4), "median_high": round(median.high, 4)}
    return result


def verify(workload: Workload, routes: Routes, steps: int) -> dict:
    """Whether tokens and losses under each set of routes are as good as native's."""
    found = {}
    for name in (name for name in ROUTES if name != "again"):
        routes.use(name)
        losses = workload.losses(steps)
        workload.restart()
        tokens = workload.decoder.round(workload.tokens)[1]
        found[name] = {"losses": losses, "tokens": tokens}
    routes.use("native")
    return {name: judge(one, found["native"], workload.margin(one["tokens"])) for name, one in found.items()}


def judge(one: dict, native: dict, margin: float) -> dict:
    """The verdict on a set's tokens and losses."""
    apart = max(abs(a - b) / abs(b) for a, b in zip(one["losses"], native["losses"], strict=True))
    return {
        **one,
        "tokens_equal": one["tokens"] == native["tokens"],
        "token_margin": round(margin, 4),
        "tokens_plausible": margin <= TOKEN_MARGIN,
        "loss_apart": round(apart, 5),
        "losses_within_tolerance": apart <= LOSS_TOLERANCE,
    }


def show(data: dict) -> None:
    print(f"{'part':<8} {'routes':<8} {'ratio':>7}   {'its 95 % interval':<18} {'pairs':>5}  (above 1: faster)")
    for part, rows in data["parts"].items():
        for name in ROUTES[1:]:
            r = rows[name]
            interval = f"{r['median_low']} to {r['median_high']}"
            print(f"{part:<8} {name:<8} {r['ratio']:>7}   {interval:<18} {r['pairs']:>5}")
    for name, verdict in data.get("verify", {}).items():
        print(
            f"{name:<8} tokens {'plausible' if verdict['tokens_plausible'] else 'WRONG'} (margin "
            f"{verdict['token_margin']}), losses {verdict['loss_apart']} apart"
            f"{'' if verdict['losses_within_tolerance'] else ': TOO FAR'}"
        )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="full")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for everything")
    parser.add_argument("--tune-budget", type=float, help="seconds for the tuner (0.45 of the limit)")
    parser.add_argument("--clock", default="both", help="whose time the tuner looks at: both, host or device")
    parser.add_argument("--conf", help="a tuned conf that is there already, or the tuned.json of an earlier run")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32, help="that are compared")
    parser.add_argument("--steps", type=int, default=10, help="training steps to compare losses of; 0: verify nothing")
    parser.add_argument("--out", help="folder for tuned.json and tuned.conf")
    options = parser.parse_args(argv)
    budget = common.Budget(options.limit)
    common.load("flagos")
    from torch_fl import routing

    parts = options.parts.split(",")
    data = {
        "what": f"{__doc__.splitlines()[0]} See benchmarks/tuned.py.",
        "where": common.where("flagos"),
        "size": options.size,
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as folder, routing.conf_files() as load:
        routes = Routes(Path(folder), load)
        workload = Workload(options.size, options.tokens)
        if options.conf:
            routes.add("tuned", finished_conf(Path(options.conf)))
        else:
            report = tune(workload, routes, options.tune_budget or 0.45 * options.limit, options.clock)
            print(report)
            data["tuning"] = report.as_dict()
            plans = ROOT / "benchmarks/results/plans_cuda.json"
            plans = json.loads(plans.read_text(encoding="utf-8")) if plans.exists() else None
            routes.add("shipped", make_backends_conf.conf(data, plans))
            if options.out:
                Path(options.out).mkdir(parents=True, exist_ok=True)
                report.write(Path(options.out) / "tuned.conf")
        common.save(options.out, "tuned.json", data)
        if options.steps:
            data["verify"] = verify(workload, routes, options.steps)
            common.save(options.out, "tuned.json", data)
        for number, part in enumerate(parts):
            share = common.Budget(max(5.0, budget.left() / (len(parts) - number)))
            with quiet():
                data["parts"][part] = measure(workload, routes, part, options.rounds, share)
            common.save(options.out, "tuned.json", data)
    show(data)
    good = all(v["tokens_plausible"] and v["losses_within_tolerance"] for v in data.get("verify", {}).values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
