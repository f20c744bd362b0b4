#!/usr/bin/env python3
"""Makes torch_fl/backends.conf from what benchmarks/tuned.py has measured.

    python benchmarks/plan_sweep.py --json benchmarks/results/plans_cuda.json
    python benchmarks/tuned.py --out benchmarks/results
    python scripts/make_backends_conf.py benchmarks/results/tuned.json --plans benchmarks/results/plans_cuda.json \
        --out torch_fl/backends.conf

The benchmark times `shipped`, the conf that comes of its measurements here. It also holds on machines without FlagGems,
so it names none of its backends. `native` gets an operator for which the default (a FlagGems kernel that is judged
right) was not faster on the measured calls, with those that do the same in place or into out=; and one of which no call
can have a launch plan, because Python then serves each at several times native's host time. The others get no line, if
the benchmark was faster with them; otherwise they are native, too. Refused when tokens or losses under the tuned routes
are wrong, or when they are surely slower than native: the whole 95 % interval of the median is below 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch_fl import flaggems
from torch_fl.tuning import choose, trial


def refusal(data: dict) -> str:
    """Why no conf may be made of a result; "" when one may."""
    if "tuning" not in data:
        return "it holds no measurements of the tuner (made with --conf?)"
    verdict = data.get("verify", {}).get("tuned")
    if verdict is None or not (verdict["tokens_plausible"] and verdict["losses_within_tolerance"]):
        return "the tuned routes' tokens or losses were not verified"
    if not data["parts"]:
        return "it holds no benchmark"
    for part, rows in data["parts"].items():
        if rows["tuned"]["median_high"] < 1:
            return f"the tuned routes were slower than native: {part} {rows['tuned']['ratio']}"
    return ""


def never_replayed(plans: dict) -> set[str]:
    """The operators of which every call that was tried is refused a launch plan."""
    found = set()
    for op, verdicts in plans["by operator"].items():
        words = {verdict.split(":")[0] for verdict in verdicts}
        if "refused" in words and "equal" not in words:
            found.add(op)
    return found


def functional(op: str) -> str:
    """`add.Tensor` of `add_.Tensor`, `mm` of `mm.out`: as a rule one kernel serves them all."""
    name, _, which = op.partition(".")
    which = which.removesuffix("out").removesuffix("_")
    return ".".join(filter(None, (name.rstrip("_"), which)))


def gained(parts: dict) -> bool:
    """Whether the benchmark was faster with the routes called `shipped`, as trial() asks for it; True before it ran."""
    own = [trial.Speed(r["ratio"], r["median_low"], r["median_high"]) for r in (p["shipped"] for p in parts.values())]
    return not own or trial.pick({"shipped": own}) == "shipped"


def conf(data: dict, plans: dict | None = None) -> str:
    """The text of the conf file."""
    tuning = data["tuning"]
    by_op: dict[str, list[choose.Row]] = {}
    for row in tuning["rows"]:
        by_op.setdefault(row["op"], []).append(choose.Row.from_dict(row))
    native = {op for op, rows in by_op.items() if choose.portable(rows, "both") == "native"}
    native |= set(tuning["left_out"]) - set(by_op)
    better = sorted(op for op in set(by_op) - native if by_op[op][0].default != by_op[op][0].native)
    together = gained(data["parts"])
    if not together:
        native |= set(better)
    # Autograd adds with `add_` where the tuner, who watches, sees `add`.
    native |= {op for op in flaggems.operators(tuning["where"].get("flag_gems")) if functional(op) in native}
    versions = ", ".join(f"{key} {value}" for key, value in tuning["where"].items() if key not in ("device", "chip"))
    figures = ", ".join(f"{part} {rows['tuned']['ratio']}" for part, rows in data["parts"].items())
    lines = [
        "# backends.conf: which backend serves which operator. Used unless FLAGOS_BACKEND_CONFIG names another file.",
        "#",
        "# One `operator = backend` per line; docs/routing.md has the rules. Without a line the first backend",
        "# that has it serves: FlagGems in C++, in Python where judged right, the chip's own kernels, the CPU.",
        "# `python -m torch_fl routes OPERATOR` shows the choice and its reason.",
        "#",
        "# Made by scripts/make_backends_conf.py from benchmarks/tuned.py on",
        f"# {tuning['where']['device']} (chip {tuning['where']['chip']}):",
        f"# {versions}.",
        f"# Tuned routes relative to native there: {figures}.",
        "# `native`: FlagGems' kernel is right, and was not faster in that benchmark or could not be measured in it;",
        "# likewise operators that do the same in place or into out=.",
    ]
    if better:
        why = "and serves where it is installed" if together else "but the benchmark was no faster with all of these"
        lines += [f"# FlagGems' kernel was faster by itself, {why}:", *(f"#   {op}" for op in better)]
    lines += ["", *(f"{op} = native" for op in sorted(native))]
    if slow := sorted(never_replayed(plans) - set(by_op)) if plans else []:
        lines += ["", "# FlagGems' kernel is right, but its calls cannot be replayed from launch plans, so that each"]
        lines += ["# would take Python several times native's host time (benchmarks/plan_sweep.py)."]
        lines += [f"{op} = native" for op in slow]
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="tuned.json of benchmarks/tuned.py")
    parser.add_argument("--plans", type=Path, help="plans_cuda.json of benchmarks/plan_sweep.py")
    parser.add_argument("--out", type=Path, help="the conf file to write (default: print it)")
    options = parser.parse_args(argv)
    data = json.loads(options.result.read_text(encoding="utf-8"))
    why = refusal(data)
    if why:
        print(f"make_backends_conf: {options.result}: {why}", file=sys.stderr)
        return 1
    text = conf(data, json.loads(options.plans.read_text(encoding="utf-8")) if options.plans else None)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
