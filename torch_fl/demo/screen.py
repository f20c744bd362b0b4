"""What the demo prints: one block per part of its work. `show` prints a line."""

import sys

BARS = "▁▂▃▄▅▆▇█"


def curve(values, width=60):
    """The values as a row of bars; neighbours are averaged when there are more than `width`."""
    count = min(width, len(values))
    means = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((value - low) * scale)] for value in means)


def header(result, show):
    chip = f", chip {result['chip']}: {result['device_name']}" if "chip" in result else ""
    show(f"device    {result['device']}{chip} (torch {result['torch']})")


def training(train, show):
    losses = train["losses"]
    show(f"training  {train['steps']} steps, {train['tokens_per_second']:,.0f} tokens/s")
    show(f"loss      {losses[0]:.3f} {curve(losses)} {losses[-1]:.3f}")


def generation(generate, show):
    show(f"generated {len(generate['tokens'])} tokens, {generate['tokens_per_second']:.1f} tokens/s")
    for title, key in (("greedy", "text"), ("sampled", "sampled")):
        for number, line in enumerate((generate["prompt"] + generate[key]).splitlines()):
            show(f"  {title if number == 0 else '':<8}| {line}")


def device_work(result, show):
    memory = result["memory"]
    show(
        f"memory    at most {memory['peak_allocated'] / 2**20:.0f} MiB in tensors, "
        f"{memory['peak_reserved'] / 2**20:.0f} MiB held"
    )
    calls = ", ".join(f"{backend} {count:,}" for backend, count in sorted(result["ops_by_backend"].items()))
    show(f"operators {calls or 'none counted'}")
    show("          most called: " + ", ".join(f"{op} {count:,}" for op, _, count in result["top_ops"]))
    fallbacks = ", ".join(f"{op} {count}" for op, count in sorted(result["fallbacks"].items()))
    show(f"fallbacks {fallbacks or 'none'}")


def progress(total, title):
    """A progress bar; where nobody watches, a line now and then."""
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit="step", leave=False, mininterval=0.2 if sys.stderr.isatty() else 20)
