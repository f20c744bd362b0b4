#!/usr/bin/env python3
"""What a flagos call adds to a 1-element add on the CPU, called from C++: the cost of the route and of relabelling.

    python benchmarks/add_overhead.py --json benchmarks/results/add_overhead_host.json

The two devices take turns batch by batch in one process; the figure is the median of the pairwise differences, because
a shared machine swings. `benchmarks/dispatch.py --add-overhead` is the same call from Python. Needs a C++ compiler.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja is there

import torch  # noqa: E402
from torch.utils.cpp_extension import load  # noqa: E402

from tests.common.devices import versions  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    extension = load("add_overhead", [str(Path(__file__).with_suffix(".cc"))], verbose=False)
    extension.alternate("cpu", "flagos:0", 20, arguments.calls)  # warm
    times = extension.alternate("cpu", "flagos:0", arguments.rounds, arguments.calls)
    cpu, flagos = times[0::2], times[1::2]
    result = {
        "what": "ns per 1-element add called from C++, cpu and flagos in turn",
        "versions": versions("flagos"),
        "protected": os.environ.get("FLAGOS_HOST_PROTECT", "1") != "0",
        "rounds": arguments.rounds,
        "calls": arguments.calls,
        "cpu_ns": round(statistics.median(cpu), 1),
        "flagos_ns": round(statistics.median(flagos), 1),
        "overhead_ns": round(statistics.median(f - c for c, f in zip(cpu, flagos, strict=True)), 1),
        "overhead_ns_of_minima": round(min(flagos) - min(cpu), 1),
    }
    for name, value in result.items():
        print(f"{name:<24} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
