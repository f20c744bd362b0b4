"""The build's choices (README.md, "Installing it elsewhere") reach the running package."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys, types
sys.modules["torch_fl._build"] = types.SimpleNamespace({choices})
import torch
import torch_fl
print({result})
"""


def run(choices, result, **env):
    code = CODE.format(choices=choices, result=result)
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **env}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("switch, backend", [("FLAGGEMS_KERNEL", "flagos"), ("FLAGGEMS_PYTHON", "flagos_python")])
def test_left_out(switch, backend):
    other = {"FLAGGEMS_KERNEL": "FLAGGEMS_PYTHON", "FLAGGEMS_PYTHON": "FLAGGEMS_KERNEL"}[switch]
    choices = f"ACCELERATOR='', {switch}=False, {other}=True"
    done = run(choices, f"[s.reason for s in torch_fl.explain('mm') if s.backend == '{backend}'][0]")
    assert done.stdout.strip() == f"left out of this build ({switch}=OFF)", done.stderr


def test_default_chip_of_the_build():
    choices = "ACCELERATOR='metax', FLAGGEMS_KERNEL=True, FLAGGEMS_PYTHON=True"
    done = run(choices, "torch_fl.chip()")
    assert done.returncode != 0 and "metax" in done.stderr
    done = run(choices, "torch_fl.chip()", FLAGOS_ACCELERATOR="host")
    assert done.stdout.strip() == "host", done.stderr
