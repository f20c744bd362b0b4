"""Runs Python code in a process of its own: for crashes, import-time errors and environment variables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap


def run_python(code: str, timeout: float = 120, **env: str | None) -> subprocess.CompletedProcess:
    """Runs `code`; keyword arguments are environment variables, None removes one. FLAGOS_* of the caller are not
    inherited, so that a test means the same whatever the developer has exported, nor what torch_fl has set for FlagGems
    on the chip of this process."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("FLAGOS_") or k == "FLAGOS_ACCELERATOR"}
    keep = {k: v for k, v in keep.items() if k not in ("GEMS_VENDOR", "FLAGGEMS_DB_URL")}
    for name, value in env.items():
        if value is None:
            keep.pop(name, None)
        else:
            keep[name] = value
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=keep,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def check_python(code: str, timeout: float = 120, **env: str | None) -> str:
    """Like run_python, but the process must succeed; returns its stdout."""
    result = run_python(code, timeout, **env)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def error_line(result: subprocess.CompletedProcess) -> str:
    """The line that names the exception of a process that died of one; what follows it is advice."""
    assert result.returncode != 0, "the process succeeded"
    lines = [line for line in result.stderr.split("\n") if re.match(r"(\w+\.)*\w*(Error|Exception): ", line)]
    assert lines, f"no exception in: {result.stderr[-1000:]}"
    return lines[0]
