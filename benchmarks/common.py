"""What the benchmarks share: where a result was made, workers in processes of their own, a time budget, result files.

A worker for a stock device never loads torch_fl: once flagos is registered it is torch's accelerator, and stock CUDA
autograd in the same process can then fail inside torch; nor does the stock allocator then have flagos' front before it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
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


def forget(device: str) -> None:
    """Gives cached memory back and starts the peaks anew."""
    import gc

    import torch

    gc.collect()
    if device != "cpu":
        module = torch.get_device_module(device)
        module.synchronize()
        module.empty_cache()
        module.reset_peak_memory_stats()


def where(device: str) -> dict:
    """What a result file must say about where it was made. `made_on` is what tables name: the GPU when one works."""
    import torch

    data = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
    }
    for name in ("transformers", "triton"):
        if importlib.util.find_spec(name):
            data[name] = importlib.metadata.version(name)
    on_gpu = device.startswith("cuda")
    if not is_stock(device):
        import torch_fl

        data["chip"] = torch_fl.chip()
        on_gpu = data["chip"] == "cuda"
    if torch.cuda.is_available():
        data["gpu"] = torch.cuda.get_device_name(0)
        data["cuda"] = torch.version.cuda
    data["made_on"] = data["gpu"] if on_gpu else data["cpu"]
    return data


def cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def compile_operators(name: str, folder: str) -> str:
    """Builds benchmarks/NAME.cc, which registers operators, into `folder`; the library's path."""
    from tests.common.programs import compile_cxx, torch_libraries

    library = f"{folder}/lib{name}.so"
    libraries = [(torch_libraries(), ["c10", "torch_cpu"])]
    compile_cxx(library, [f"benchmarks/{name}.cc"], "-O2", "-fPIC", "-shared", libraries=libraries)
    return library


class Budget:
    """Seconds that a benchmark may take in all."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


# ---- workers -------------------------------------------------------------------------------------------------------


class Worker:
    """A process for one device that does what it is asked to: `script --worker --device device arguments`.

    It stays between questions, so that two devices can take turns within a second of each other, each in a process of
    its own. After an error it is gone, and every further answer is that error. With `cores`, all workers share that
    many of the machine's (the last ones).
    """

    def __init__(self, script: str, arguments: list[str], device: str, cores: int | None = None):
        environment = {**os.environ, "PYTHONHASHSEED": "0"}  # the same dictionaries, so the same luck with them
        if is_stock(device):
            environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        self.device, self.error, self.buffer = device, None, b""
        self.stderr = tempfile.TemporaryFile()
        command = [sys.executable, script, "--worker", "--device", device, *arguments]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, bufsize=0
        )
        self.keep_to(last_cores(cores))  # before it has started its threads

    def keep_to(self, cores: list[int]) -> None:
        """Moves the process with all its threads to some of the machine's cores."""
        self.cores = cores
        keep_to(self.process.pid, cores)

    def tell(self, do: str, **options) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **options}).encode() + b"\n")

    def answer(self, budget: Budget) -> dict:
        """What came of the last question: a result, or {"error": why there is none}."""
        if self.error is None:
            try:
                return {"device": self.device, **self._receive(budget)}
            except (TimeoutError, EOFError) as error:
                self.error = self._end(isinstance(error, TimeoutError))
        return {"device": self.device, "error": self.error}

    def ask(self, do: str, budget: Budget, **options) -> dict:
        self.tell(do, **options)
        return self.answer(budget)

    def _receive(self, budget: Budget) -> dict:
        pipe = self.process.stdout.fileno()
        while True:
            while b"\n" not in self.buffer:
                if not select.select([pipe], [], [], max(0.0, budget.left()))[0]:
                    raise TimeoutError
                chunk = os.read(pipe, 1 << 16)
                if not chunk:
                    raise EOFError
                self.buffer += chunk
            line, self.buffer = self.buffer.split(b"\n", 1)
            if line.startswith(RESULT.encode()):
                return json.loads(line[len(RESULT) :])

    def _end(self, late: bool) -> str:
        if late:
            self.process.kill()
        code = self.process.wait()
        if late:
            return "stopped at the time limit"
        self.stderr.seek(0)
        said = self.stderr.read().decode(errors="replace").strip().splitlines()[-3:] or ["nothing on stderr"]
        return f"exit code {code}: " + " | ".join(said)

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.stderr.close()


def keep_to(process: int, cores) -> None:
    """Moves a process with all its threads to some of the machine's cores."""
    with contextlib.suppress(FileNotFoundError):  # it has ended
        for thread in os.listdir(f"/proc/{process}/task"):
            with contextlib.suppress(ProcessLookupError):  # this one has
                os.sched_setaffinity(int(thread), cores)


def last_cores(count: int | None) -> list[int]:
    """The last of the machine's cores that this process may use; None: all of them."""
    return sorted(os.sched_getaffinity(0))[-(count or 0) :]


@contextlib.contextmanager
def workers(script: str, arguments: list[str], devices: list[str], cores: int | None = None):
    """One worker per device; they start side by side."""
    made = [Worker(script, arguments, device, cores) for device in devices]
    try:
        yield made
    finally:
        for worker in made:
            worker.close()


@contextlib.contextmanager
def kept_to(pair: list[Worker], core: int):
    """Workers take their turns on one core inside, and may use the cores that they had at its end."""
    before = [worker.cores for worker in pair]
    for worker in pair:
        worker.keep_to([core])
    try:
        yield
    finally:
        for worker, cores in zip(pair, before, strict=True):
            worker.keep_to(cores)


def both(pair: list[Worker], do: str, budget: Budget, **options) -> list[dict]:
    """The answers of workers that may work at the same time: nothing that is timed."""
    for worker in pair:
        worker.tell(do, **options)
    return [worker.answer(budget) for worker in pair]


def alternate(
    pair: list[Worker], do: str, rounds: int, share: Budget, budget: Budget, turns: int = 1, merge=None, **options
) -> list[list[dict]]:
    """`rounds` pairs of answers, one worker at work at a time; who goes first alternates. A pair may be made of several
    turns of each worker, of whose answers merge(answers) makes one. No pair is begun after `share` or an error, and
    none is waited for longer than `budget`."""
    pairs: list[list[dict]] = []
    while len(pairs) < rounds and share.left() > 0 and not errors(pairs):
        answers: list[list[dict]] = [[], []]
        for turn in range(turns):
            for which in (0, 1) if (len(pairs) * turns + turn) % 2 else (1, 0):
                answers[which].append(pair[which].ask(do, budget, **options))
            if errors(zip(*answers, strict=True)):
                break
        pairs.append([_whole(one, merge) for one in answers])
    return pairs


def _whole(turns: list[dict], merge) -> dict:
    """A worker's answer in a pair: of its turns the first error, or what they make."""
    failed = next((turn for turn in turns if "error" in turn), None)
    return failed or (merge(turns) if merge else turns[0])


def serve(work) -> None:
    """The worker's side: answers questions by the methods of `work` until there are no more. What the work prints goes
    to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        result = getattr(work, question.pop("do"))(**question)
        out.write(RESULT + json.dumps(result or {}) + "\n")
        out.flush()


# ---- results -------------------------------------------------------------------------------------------------------


def good(pairs) -> list:
    return [pair for pair in pairs if not any("error" in one for one in pair)]


def errors(pairs) -> list[str]:
    return [one["error"] for pair in pairs for one in pair if "error" in one]


def ratio(pairs) -> dict:
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
        part = folder / f".{name}.part"  # replaced in one step: who stops the benchmark finds a whole file
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        part.rename(folder / name)
