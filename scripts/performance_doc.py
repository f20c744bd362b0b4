"""Fills the tables of docs/performance.md from benchmarks/results/*.json. `--check` only says whether it is up to date.

The document holds pairs of markers, <!-- table NAME --> and <!-- end -->; what stands between them is made here, the
rest is written by hand. A result file that is missing leaves the sentence that says how to make it.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = "docs/performance.md"
RESULTS = "benchmarks/results"
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rows(header, lines) -> list[str]:
    """A Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines),
    ]


def made_on(data) -> str:
    """The device that a result is about: the GPU, or the CPU behind the simulated chip."""
    where = data.get("where") or data.get("versions") or {}
    on_gpu = where.get("chip") == "cuda" and "gpu" in where
    return where.get("made_on") or data.get("device") or (where["gpu"] if on_gpu else where.get("cpu")) or "unknown"


def place(data) -> str:
    """Where a result was made, as a line."""
    where = data.get("where") or data.get("versions") or {}
    said = [made_on(data), f"torch {where.get('torch')}"]
    said += [f"chip {where['chip']}"] if "chip" in where else []
    said += [f"transformers {where['transformers']}"] if "transformers" in where else []
    return "Made on: " + ", ".join(str(part) for part in said if part) + "."


def dispatch(data) -> list[str]:
    first, second = data["pair"]
    lines, worst = [], []
    for mode, part in data["modes"].items():
        summary, operators = part["summary"], part["operators"]
        if "worst" not in summary:
            lines.append((mode, "no result", "", "", ""))
            continue
        bad = f"{summary['worst']}: {operators[summary['worst']]['pairs']}"
        count = f"{summary['operators']} of {summary['asked'] - 1}" if "asked" in summary else summary["operators"]
        lines.append((mode, count, summary["median_pairs"], bad, summary.get("third_party", "not measured")))
        worst += [
            (mode, name, row["first_ns"], row["second_ns"], row["pairs"])
            for name, row in sorted(operators.items(), key=lambda item: -item[1].get("pairs", 0))[:6]
            if "error" not in row
        ]
    return [
        *rows(("mode", "operators", f"median {second} / {first}", "worst", "operator of another library"), lines),
        "",
        *rows(("mode", "slowest against stock", f"{first}, ns", f"{second}, ns", "ratio"), worst),
    ]


def qwen3(data) -> list[str]:
    names = {
        "decode": "eager decode, tokens/s",
        "graph": "graph-captured decode, tokens/s",
        "train": "training, 2 x 256 tokens, steps/s",
    }
    lines, notes = [], []
    for part, result in data["parts"].items():
        speed = result.get("tokens_per_second") or result.get("steps_per_second")
        if not speed:
            lines.append((names[part], "no result", "", "", ""))
            continue
        spread = f"{speed['ratio_low']:.3f} to {speed['ratio_high']:.3f}, {speed['pairs']} pairs"
        lines.append((names[part], f"{speed['first']:.1f}", f"{speed['second']:.1f}", f"{speed['ratio']:.3f}", spread))
        for name in ("tokens_equal", "losses_bit_equal"):
            if name in result:
                notes.append(f"{part}: {name.replace('_', ' ')}: {'yes' if result[name] else 'NO'}")
        if "share_of_roofline" in result:
            share, top = 100 * result["share_of_roofline"], result["roofline_tokens_per_second"]
            notes.append(f"{part}: {share:.0f} % of the memory roofline ({top:.0f} tokens/s at the measured bandwidth)")
        if "leading_tokens_as_eager" in result:
            counts = zip(data["pair"], result["leading_tokens_as_eager"], strict=True)
            same = ", ".join(f"{device} {count}" for device, count in counts)
            notes.append(f"{part}: leading tokens that eager decoding chooses, of {result['tokens_compared']}: {same}")
        if "times_eager" in result:
            notes.append(f"{part}: {result['times_eager']} times eager decoding")
        for name in ("peak_allocated", "peak_reserved"):
            if name in result:
                notes.append(f"{part}: {name.replace('_', ' ')}, flagos / stock: {result[name]['ratio']:.4f}")
    header = ("", *data["pair"], "ratio", "spread")
    return [*rows(header, lines), "", *(f"* {note}" for note in notes)]


def threads(data) -> list[str]:
    lines = []
    for part, devices in data["parts"].items():
        for device, result in devices.items():
            count = next((result[k] for k in ("calls", "backward", "tensors") if k in result), 0)
            problems = len(result.get("errors", [])) + ("error" in result)
            lines.append((part, device, count, f"{result.get('per_second', 0):.0f}", problems))
    return rows(("part", "device", "count", "per second", "errors"), lines)


def memory(data) -> list[str]:
    lines = []
    for part, result in data["parts"].items():
        for name, value in result.get("ratio", {}).items():
            if part == "allocate":
                spread = f"{value['first']:.0f} ns, {value['second']:.0f} ns, {value['pairs']} pairs"
                lines.append((part, f"torch.empty of {name} bytes and its release", value["ratio"], spread))
            else:
                lines.append((part, name.replace("_", " "), value, ""))
    return rows(("part", "measure", f"{data['pair'][1]} / {data['pair'][0]}", ""), lines)


def import_time(data) -> list[str]:
    names = {"torch": "import torch", "torch_fl": "import torch_fl after it", "first_use": "first tensor"}
    lines = [(text, *(f"{data[name][k]:.3f}" for k in ("median", "low", "high"))) for name, text in names.items()]
    return rows(("", "median, s", "low", "high"), lines)


def opdb(data) -> list[str]:
    lines = [
        (mode, row["cases"], row["passed"], f"{row['percent'] or 0:.2f}", f"{row['bit_equal']} of {row['steady']}")
        for mode, row in data["modes"].items()
    ]
    operators = data.get("cpu_fallbacks", {})
    varying = [f"{why}: {len(cases)}" for why, cases in data.get("unsteady", {}).items()]
    return [
        *rows(("mode", "cases that stock passes", "passed", "%", "bit-equal of the deterministic"), lines),
        "",
        f"* {data['pairs']} of {data['tasks']} (operator, dtype) pairs",
        f"* operators on the CPU fallback: {len(operators)}",
        f"* cases of kernels that are not deterministic, compared by sums: {', '.join(varying) or 'none'}",
    ]


def tests(data) -> list[str]:
    names = ("passed", "failed", "error", "xfailed", "skipped")
    lines = [(len(data["files"]), *(data["totals"].get(name, 0) for name in names))]
    said = [f"* {name}: {message.splitlines()[0][:120]}" for name, message in data["failures"].items()]
    cut = [] if data["finished"] else ["", "The run was cut off."]
    return [*rows(("files", *names), lines), *cut, "", *said][: 20 + len(cut)]


def tuned(data) -> list[str]:
    lines = [
        (
            part,
            name,
            f"{row['ratio']:.3f}",
            f"{row['median_low']:.3f} to {row['median_high']:.3f}",
            f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}, {row['pairs']} pairs",
        )
        for part, routes in data["parts"].items()
        for name, row in routes.items()
        if name != "native"
    ]
    judged = [
        f"* {name}: tokens {'plausible' if row['tokens_plausible'] else 'WRONG'}, losses {row['loss_apart']:.5f} of "
        f"native's apart at most{'' if row['losses_within_tolerance'] else ': TOO FAR'}"
        for name, row in data.get("verify", {}).items()
        if name != "native"
    ]
    tuning = data.get("tuning", {})
    if trial := tuning.get("trial"):
        tried = [f"{name} " + ", ".join(f"{p['ratio']:.3f}" for p in parts) for name, parts in trial["speeds"].items()]
        judged.append(
            f"* tuned took the routes by the clock `{trial['taken']}`, after {trial['rounds']} rounds of the parts "
            f"under the routes of each: {'; '.join(tried)} of native's speed"
        )
    won = [
        (op, f"{route['host']:.2f}", f"{route['device']:.2f}")
        for op, route in tuning.get("routes", {}).items()
        if any("flagos" in line for line in route["lines"])
    ]
    table = rows(("operators that tuned gives to FlagGems", "host time of native's", "device time of native's"), won)
    return [
        *rows(("part", "routes", "of native's speed", "95 % interval", "single rounds"), lines),
        "",
        *judged,
        *(["", *table] if won else []),
    ]


def plans(data) -> list[str]:
    lines = list(data["operators"].items())
    return [
        *rows(("operators", "count"), lines),
        "",
        f"* replays equal: {data['replays equal']} of {data['replays compared']}",
        f"* calls that raise only with plans: {data['calls'].get('raises', 0)}",
    ]


def against_native(data) -> list[str]:
    lines = [(mode, row["cases"], row["passed"], f"{row['percent']:.3f}") for mode, row in data["modes"].items()]
    return [
        *rows(("mode", "cases that native passes", "passed", "%"), lines),
        "",
        f"* {data['pairs']} of {data['tasks']} (operator, dtype) pairs; {len(data['served'])} operators by FlagGems",
    ]


def instructions(data) -> list[str]:
    first, second = data["pair"]
    lines = [
        (name, row["first"], row["second"], row["in_torch_fl"], row["ratio"]) for name, row in data["rows"].items()
    ]
    return rows(("", first, second, f"of {second}'s in torch_fl", "ratio"), lines)


def training_steps(data) -> list[str]:
    parts = ("forward", "backward", "optimizer")
    lines = []
    for row in data["rows"]:
        if row["state"].startswith("stock"):
            stock = row  # of the rows that follow
        ratio = round(sum(map(row.get, parts)) / sum(map(stock.get, parts)), 3)
        lines.append((row["state"], *(row[part] for part in parts), ratio))
    return rows(("state", *parts, "sum, of stock"), lines)


def manifest(folder: Path) -> list[str]:
    """Every result file, what it holds and the device that it is about."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        what = str(data.get("what", "")).split(";")[0]
        lines.append((f"[{path.name}](../{RESULTS}/{path.name})", what, made_on(data)))
    return rows(("file", "content", "made on"), lines)


TABLES = {
    "dispatch": (dispatch, "python benchmarks/dispatch.py --pair cuda,flagos --out benchmarks/results"),
    "qwen3": (qwen3, "python benchmarks/qwen3.py --out benchmarks/results"),
    "threads": (threads, "python benchmarks/threads.py --out benchmarks/results"),
    "memory": (memory, "python benchmarks/memory.py --out benchmarks/results"),
    "import_time": (import_time, "python benchmarks/import_time.py --out benchmarks/results"),
    "instructions_null_cuda": (instructions, "python benchmarks/instructions.py --out benchmarks/results"),
    "instructions_qwen3_null_cuda": (
        instructions,
        "python benchmarks/instructions.py --model --out benchmarks/results",
    ),
    "training_steps_null_cuda": (training_steps, "python benchmarks/instructions.py --model after every change"),
    "opdb_cuda": (opdb, "python tests/integration/ops/against_stock.py --json benchmarks/results/opdb_cuda.json"),
    "opdb_flagos_py": (against_native, "scripts/gpu_suite.sh OUTDIR opdb_flaggems"),
    "plans_cuda": (plans, "python benchmarks/plan_sweep.py --json benchmarks/results/plans_cuda.json"),
    "tuned": (tuned, "python benchmarks/tuned.py --out benchmarks/results"),
    "tuned_null_cuda": (
        tuned,
        "python -m tests.common.null_cuda python benchmarks/tuned.py --conf benchmarks/results/tuned.json --steps 0",
    ),
    "tests_cuda": (tests, "scripts/gpu_suite.sh OUTDIR tests"),
    "tests_two_gpus": (tests, "scripts/gpu_suite.sh OUTDIR tests"),
    "hal_cuda": (tests, "scripts/gpu_suite.sh OUTDIR hal"),
}


def render(text: str, results: Path) -> str:
    """The document with every table made anew."""

    def fill(match):
        name = match[2]
        if name == "manifest":
            return match[1] + "\n".join(manifest(results)) + "\n" + match[3]
        if name not in TABLES:
            raise ValueError(f"{DOCUMENT}: no table is called {name}; there are {', '.join(TABLES)}")
        make, command = TABLES[name]
        path = results / f"{name}.json"
        if path.exists():
            data = json.loads(path.read_text(encoding="utf-8"))
            lines = [place(data), "", *make(data)]
        else:
            lines = [f"No result yet: `{command}` makes it."]
        return match[1] + "\n".join(lines) + "\n" + match[3]

    return BLOCK.sub(fill, text)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the document is not up to date")
    options = parser.parse_args(argv)
    document = ROOT / DOCUMENT
    text = document.read_text(encoding="utf-8")
    made = render(text, ROOT / RESULTS)
    if options.check:
        if made != text:
            print(f"{DOCUMENT} is not up to date: run python scripts/performance_doc.py", file=sys.stderr)
        return int(made != text)
    document.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
