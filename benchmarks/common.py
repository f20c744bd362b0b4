"""What the benchmarks share: where a result was made, workers in processes of their own, a time budget, result files.

A worker for a stock device never loads torch_fl: once flagos is registered it is torch's accelerator, and stock CUDA
autograd in the same process can then fail inside torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = "RESULT "  # opens the one line of a worker's output that holds its JSON


def is_stock(device: str) -> bool:
    return not device.startswith("flagos")


def load(device: str) -> None:
    """Makes the device known to torch in this process."""
    if is_stock(device):
        return
    import torch_fl  # noqa: F401


def synchronize(device: str) -> None:
    import torch

    if device != "cpu":
        torch.get_device_module(device).synchronize()


def peaks(device: str) -> dict:
    """Peak bytes allocated and reserved on a device; empty for the CPU."""
    import torch

    if device == "cpu":
        return {}
    module = torch.get_device_module(device)
    return {"peak_allocated": module.max_memory_allocated(), "peak_reserved": module.max_memory_reserved()}


def where(device: str) -> dict:
    """What a result file must say about where it was made."""
    import torch

    data = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }
    for name in ("transformers", "triton"):
        if importlib.util.find_spec(name):
            data[name] = importlib.metadata.version(name)
    if not is_stock(device):
        import torch_fl

        data["chip"] = torch_fl.chip()
    if torch.cuda.is_available():
        data["gpu"] = torch.cuda.get_device_name(0)
        data["cuda"] = torch.version.cuda
    return data


class Budget:
    """Seconds that a benchmark may take in all."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def run_worker(script: str, arguments: list[str], device: str, budget: Budget, enough: float = 5.0) -> dict:
    """Runs `script --worker ... --device device` in a process; its result, or {"error": why there is none}."""
    if budget.left() < enough:
        return {"device": device, "error": f"not started: {budget.left():.0f} s of the time limit were left"}
    environment = dict(os.environ)
    if is_stock(device):
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    command = [sys.executable, script, "--device", device, *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=budget.left())
    except subprocess.TimeoutExpired:
        return {"device": device, "error": "stopped at the time limit"}
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return {"device": device, **json.loads(line[len(RESULT) :])}
    said = done.stderr.strip().splitlines()[-3:] or ["nothing on stderr"]
    return {"device": device, "error": f"exit code {done.returncode}: " + " | ".join(said)}


def give(result: dict) -> None:
    """A worker's result, to the process that started it."""
    print(RESULT + json.dumps(result), flush=True)


def alternate(script: str, arguments: list[str], devices: list[str], rounds: int, budget: Budget, show=print) -> list:
    """`rounds` pairs of workers, one per device; who goes first alternates. [[first's result, second's], ...]."""
    pairs = []
    for k in range(rounds):
        pair = {}
        for device in devices if k % 2 == 0 else devices[::-1]:
            pair[device] = run_worker(script, arguments, device, budget)
            show(f"  {device}: {pair[device].get('error') or 'done'}")
        pairs.append([pair[device] for device in devices])
        if budget.left() < 5:
            break
    return pairs


def ratio(pairs: list[tuple[float, float]]) -> dict:
    """Medians of the two sides and of the pairwise ratios second / first."""
    first, second = zip(*pairs, strict=True)
    return {
        "first": statistics.median(first),
        "second": statistics.median(second),
        "ratio": round(statistics.median(b / a for a, b in pairs), 4),
        "ratio_low": round(min(b / a for a, b in pairs), 4),
        "ratio_high": round(max(b / a for a, b in pairs), 4),
        "pairs": len(pairs),
    }


def save(out: str | None, name: str, data: dict) -> None:
    """Writes a result file; called after every part, so that a time limit loses only the last one."""
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
