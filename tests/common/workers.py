"""Runs tasks in worker processes so that a crash or a hang costs one case and not the run.

A worker is the calling script itself, started with `--worker`. It reads tasks (JSON lines) on stdin and answers on a
pipe of its own: {"at": ...} before each dangerous step and {"done": ...} at the end of a task. Whatever the operators
print goes to the worker's stderr file, whose tail becomes part of a crash record.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from tests.common.compare import first_lines

START = 120.0  # seconds that a process may need until its first step, or in one that it calls "start"
LATE = 5.0  # seconds after the end of a run in which a task that has begun may still answer


class Channel:
    """The worker's side: yields tasks, sends progress and results."""

    def __init__(self):
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def tasks(self):
        for line in sys.stdin:
            yield json.loads(line)

    def _send(self, message):
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def at(self, *where):
        self._send({"at": where})

    def done(self, result):
        self._send({"done": result})


def leave(error: Exception) -> None:
    """Ends a worker to which the device is lost."""
    print(first_lines(error), file=sys.stderr, flush=True)
    os._exit(3)


class Crash:
    """A worker died (or hung) during a task."""

    def __init__(self, task, at, how, tail):
        self.task, self.at, self.how, self.tail = task, at, how, tail


class _Worker:
    def __init__(self, command, env):
        self.stderr = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, env=env, bufsize=0
        )
        self.buffer = b""

    def send(self, task):
        self.process.stdin.write((json.dumps(task) + "\n").encode())

    def receive(self, timeout):
        """The next message; None at the end of the pipe; TimeoutError."""
        fd = self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            if not select.select([fd], [], [], timeout)[0]:
                raise TimeoutError
            chunk = os.read(fd, 1 << 16)
            if not chunk:
                return None
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def end(self):
        """Kills the worker and says how it ended, with the last lines it wrote."""
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.stderr.seek(0, os.SEEK_END)
        self.stderr.seek(max(0, self.stderr.tell() - 2000))
        tail = self.stderr.read().decode(errors="replace").strip().split("\n")[-6:]
        self.stderr.close()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return how, tail

    def close(self, patience: float = 30.0):
        self.process.stdin.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.stderr.close()


def run_tasks(
    command: list[str],
    tasks: list,
    on_result: Callable,
    on_crash: Callable[[Crash], object | None],
    jobs: int = 1,
    timeout: float = 120.0,
    env: dict | None = None,
    end: float = float("inf"),
) -> None:
    """Feeds tasks to `jobs` workers. on_crash may return what remains of the task; it is run by a fresh worker.
    `timeout` is the longest silence of a worker, in seconds. Callbacks are called one at a time. No task is begun after
    `end` (time.monotonic); one that has no answer LATE seconds after it is given up, as if it had never begun.
    Strings hash alike in all workers: some samples are made of sets."""
    env = {**(os.environ if env is None else env), "PYTHONHASHSEED": "0"}
    todo: queue.Queue = queue.Queue()
    for task in tasks:
        todo.put(task)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def serve():
        worker = None
        try:
            while not errors and time.monotonic() < end:
                try:
                    task = todo.get_nowait()
                except queue.Empty:
                    return
                while task is not None and time.monotonic() < end:
                    worker = worker or _Worker(command, env)
                    task, alive = one(worker, task)
                    if not alive:
                        worker = None
        except BaseException as error:  # handed to the caller below
            errors.append(error)
        finally:
            if worker is not None:
                worker.close(30.0 if time.monotonic() < end else 2.0)

    def patience(at):
        longest = timeout if at and at[0] != "start" else max(timeout, START)
        return min(longest, max(0.0, end + LATE - time.monotonic()))

    def one(worker, task):
        """(what remains of the task, whether the worker lives)"""
        at, hung = None, False
        try:
            worker.send(task)
            while message := worker.receive(patience(at)):
                if "done" in message:
                    with lock:
                        on_result(task, message["done"])
                    return None, True
                at = message["at"]
        except TimeoutError:
            hung = True
        except BrokenPipeError:
            pass
        if time.monotonic() > end + LATE - 1:
            worker.process.kill()
            worker.end()
            return None, False
        how, tail = worker.end()
        with lock:
            return on_crash(Crash(task, at, f"no answer for {timeout:.0f} s" if hung else how, tail)), False

    threads = [threading.Thread(target=serve) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
