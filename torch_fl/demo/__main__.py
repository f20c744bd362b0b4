"""`python -m torch_fl.demo`: trains a small Qwen3 model on flagos, generates text, and checks both against the CPU.

With --model it loads a real Qwen3 folder instead and generates from it; --train then trains that one too.
"""

import argparse
import copy
import json
import sys
import time

PROMPT = "The following statement"


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m torch_fl.demo",
        description="Train and run a transformer on flagos, and check it against the CPU.",
    )
    parser.add_argument("--model", metavar="PATH", help="folder of a Qwen3 model (config, safetensors, tokenizer)")
    parser.add_argument("--train", action="store_true", help="train; always on without --model")
    parser.add_argument("--steps", type=int, help="training steps (default 300, with --model 5)")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue")
    parser.add_argument("--tokens", type=int, default=96, help="tokens to generate (default 96)")
    parser.add_argument("--dtype", default="auto", help="data type of --model's weights (default: as stored)")
    parser.add_argument("--graph", action="store_true", help="greedy generation with a static cache, as one graph")
    parser.add_argument("--device", default="flagos", help="device to run on (default flagos)")
    parser.add_argument("--compare-steps", type=int, default=20, help="training steps repeated on the CPU (default 20)")
    parser.add_argument("--no-compare", action="store_true", help="skip the comparison with the CPU")
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON; - is standard output")
    arguments = parser.parse_args(argv)
    if arguments.steps is None:
        arguments.steps = 5 if arguments.model else 300
    if arguments.steps < 1 or arguments.tokens < 1:
        parser.error("--steps and --tokens must be at least 1")
    arguments.train = arguments.train or not arguments.model
    return arguments


def run(arguments, show):
    """Does the work; returns the result as a dictionary. `show` prints a line."""
    import contextlib

    import torch
    import transformers

    from torch_fl.demo import screen, workload

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device(arguments.device)
    on_flagos = device.type == "flagos"
    result = {"device": str(device), "torch": torch.__version__, "checks": {}}
    if on_flagos:
        import torch_fl

        result["chip"] = torch_fl.chip()
        result["device_name"] = torch_fl.flagos.get_device_name(device)
        torch_fl.fallbacks(reset=True)
        torch_fl.flagos.reset_peak_memory_stats(device)
    screen.header(result, show)

    if arguments.model:
        model, tokenizer = workload.load_model(arguments.model, arguments.dtype)
    else:
        tokenizer = workload.ByteTokenizer()
        model = workload.build_model(workload.small_config())
    result["parameters"] = sum(p.numel() for p in model.parameters())
    reference = None if arguments.no_compare else copy.deepcopy(model)
    prompt = tokenizer.encode(arguments.prompt)
    show(f"model     {type(model).__name__}, {result['parameters']:,} parameters, {model.dtype}")

    model = model.to(device)
    counting = torch_fl.count_ops() if on_flagos else contextlib.nullcontext()
    batch, length, lr = (1, 128, 1e-5) if arguments.model else (8, 128, 2e-3)

    def data(steps):
        text = workload.corpus()
        return workload.batches(tokenizer.encode(text[:400_000] if arguments.model else text), steps, batch, length)

    with counting as counts:
        if arguments.train:
            with screen.progress(arguments.steps, f"training on {device}") as bar:

                def on_step(step, loss):
                    bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                    bar.update()

                trained = workload.train(model, data(arguments.steps), device, lr, on_step)
            result["train"] = {
                "steps": arguments.steps,
                "losses": trained.losses,
                "tokens_per_second": trained.tokens_per_second,
                "seconds": trained.seconds,
            }
            screen.training(result["train"], show)
            if not arguments.model:
                result["checks"]["loss has clearly fallen"] = trained.has_fallen()
        greedy = workload.generate_graphed if arguments.graph else workload.generate
        generated = greedy(model, prompt, arguments.tokens, device)
        torch.manual_seed(0)
        sampled = workload.generate(model, prompt, arguments.tokens, device, temperature=0.7)
    result["generate"] = {
        "prompt": arguments.prompt,
        "text": tokenizer.decode(generated.tokens),
        "sampled": tokenizer.decode(sampled.tokens),
        "tokens": generated.tokens,
        "tokens_per_second": generated.tokens_per_second,
    }
    screen.generation(result["generate"], show)
    if on_flagos:
        result["memory"] = {
            "peak_allocated": torch_fl.flagos.max_memory_allocated(device),
            "peak_reserved": torch_fl.flagos.max_memory_reserved(device),
        }
        result["ops_by_backend"] = counts.by_backend()
        result["top_ops"] = counts.rows()[:8]
        result["fallbacks"] = torch_fl.fallbacks()
        result["checks"]["no operator fell back to the CPU"] = not result["fallbacks"]
        screen.device_work(result, show)
    if reference is not None:
        compare(arguments, result, model, reference, prompt, data, lr, show)
    return result


def compare(arguments, result, model, reference, prompt, data, lr, show):
    """Repeats the first training steps and the greedy generation on the CPU."""
    import torch

    from torch_fl.demo import screen, workload

    cpu = torch.device("cpu")
    # On the simulated host chip the kernels are the CPU's own, so every bit has to agree; elsewhere only the values.
    exact = result["device"] == "cpu" or result.get("chip") == "host"
    checks = result["checks"]
    comparison = result["comparison"] = {"exact_expected": exact}
    if arguments.train:
        steps = min(arguments.steps, arguments.compare_steps)
        with screen.progress(steps, "the same on the CPU") as bar:
            # The step count does not change the first batches: they come from one seeded stream.
            there = workload.train(reference, data(steps), cpu, lr, lambda step, loss: bar.update())
        here = result["train"]["losses"][:steps]
        comparison["steps"] = steps
        comparison["losses_bit_equal"] = sum(a == b for a, b in zip(here, there.losses, strict=True))
        comparison["cpu_losses"] = there.losses
        comparison["cpu_train_tokens_per_second"] = there.tokens_per_second
        if exact:
            checks[f"first {steps} losses bit-equal to the CPU's"] = comparison["losses_bit_equal"] == steps
        else:
            tolerance = 2e-2 if model.dtype != torch.float32 else 2e-3
            close = all(abs(a - b) <= tolerance * abs(b) for a, b in zip(here, there.losses, strict=True))
            checks[f"first {steps} losses within {tolerance:g} of the CPU's"] = close
    twin = copy.deepcopy(model).to(cpu)
    on_cpu = workload.generate(twin, prompt, arguments.tokens, cpu)
    same = workload.common_prefix(result["generate"]["tokens"], on_cpu.tokens)
    comparison["greedy_tokens_equal"] = same
    comparison["cpu_generate_tokens_per_second"] = on_cpu.tokens_per_second
    total = len(on_cpu.tokens)
    if exact or model.dtype == torch.float32:
        checks[f"{total} greedy tokens identical to the CPU's"] = same == total == len(result["generate"]["tokens"])
    show(
        f"CPU       training {comparison.get('cpu_train_tokens_per_second', 0):,.0f} tokens/s, "
        f"generating {on_cpu.tokens_per_second:.1f} tokens/s, {same} of {total} greedy tokens identical"
    )


def main(argv=None) -> int:
    arguments = parse(argv)
    start = time.monotonic()
    to_stdout = arguments.json == "-"

    def show(line):
        print(line, file=sys.stderr if to_stdout else sys.stdout, flush=True)

    try:
        result = run(arguments, show)
    except (FileNotFoundError, ModuleNotFoundError, RuntimeError, ValueError) as error:
        print(f"torch_fl.demo: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    result["seconds"] = time.monotonic() - start
    for name, passed in result["checks"].items():
        show(f"{'ok  ' if passed else 'FAIL'}      {name}")
    show(f"done in {result['seconds']:.0f} s")
    if arguments.json:
        text = json.dumps(result, indent=1)
        if to_stdout:
            print(text)
        else:
            with open(arguments.json, "w", encoding="utf-8") as file:
                file.write(text + "\n")
    return 0 if all(result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
