"""Starting up: what an import does, what the autoload does, and what a failed start leaves behind.

Each case is a process of its own, because a device name is registered once per process.
"""

import os
import subprocess
import sys

import pytest


def run(code, **environment):
    """Runs code in a fresh process and returns it."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def passes(code, **environment):
    result = run(code, **environment)
    assert result.returncode == 0, result.stderr
    return result


BROKEN = {"FLAGOS_BACKEND_CONFIG": "/nonexistent/routes.conf"}


@pytest.mark.parametrize(
    "code",
    [
        "import torch; assert torch.ones(2, device='flagos').sum().item() == 2",  # autoload
        "import torch_fl, torch; assert torch_fl.flagos is torch.flagos",
        "import torch, torch_fl; assert torch_fl.flagos is torch.flagos",
    ],
)
def test_import_in_any_order_prints_nothing(code):
    result = passes(code)
    assert result.stdout == "" and result.stderr == ""


def test_without_autoload_torch_knows_nothing_until_torch_fl_is_imported():
    passes(
        "import torch, sys; assert 'torch_fl' not in sys.modules and not hasattr(torch, 'flagos')\n"
        "import torch_fl; assert torch.ones(1, device='flagos').is_flagos",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )


def test_import_creates_no_context():
    passes(
        "import torch, torch_fl; assert not torch.flagos.is_initialized()\n"
        "assert not torch_fl._C._has_primary_context(0)\n"
        "torch.manual_seed(0); assert not torch.flagos.is_initialized()\n"
        "torch.ones(1, device='flagos'); assert torch.flagos.is_initialized() and torch.flagos._initialized"
    )


def test_generated_methods():
    passes(
        "import torch; t = torch.ones(2).flagos(); assert t.is_flagos and t.device == torch.device('flagos:0')\n"
        "assert torch.ones(2).flagos(1).device.index == 1\n"
        "m = torch.nn.Linear(2, 2).flagos(); assert m.weight.is_flagos\n"
        "s = torch.ones(2).untyped_storage().flagos(); assert s.is_flagos\n"
        "p = torch.nn.utils.rnn.pack_sequence([torch.ones(2, 1)]).flagos(); assert p.data.is_flagos"
    )


def test_a_failed_start_leaves_torch_working():
    result = passes("import torch; print(torch.ones(2).sum().item())", **BROKEN)
    assert result.stdout == "2.0\n" and result.stderr == ""


def test_a_failed_start_gives_its_reason_when_the_device_is_asked_for():
    result = run("import torch\nassert not torch.flagos.is_available()\ntorch.ones(2, device='flagos')", **BROKEN)
    assert result.returncode != 0
    assert "/nonexistent/routes.conf" in result.stderr.splitlines()[-1]


def test_a_failed_start_raises_on_explicit_import():
    for code in ("import torch_fl", "import torch, torch_fl"):
        result = run(code, **BROKEN)
        assert result.returncode != 0
        assert "/nonexistent/routes.conf" in result.stderr.splitlines()[-1], result.stderr


def test_stock_features_survive_a_failed_start():
    """Seeding, autograd and pinned-memory questions do not trip over the stand-in device."""
    passes(
        "import torch; torch.manual_seed(3); x = torch.ones(2, requires_grad=True); (x * x).sum().backward()\n"
        "assert x.grad.tolist() == [2.0, 2.0]; assert not torch.accelerator.is_available()\n"
        "loader = torch.utils.data.DataLoader(torch.arange(4), batch_size=2); assert len(list(loader)) == 2\n"
        "with torch.random.fork_rng(): torch.rand(1)",
        **BROKEN,
    )


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FLAGOS_ACCELERATOR", "no_such_chip", "no_such_chip"),
        ("FLAGOS_STRICT", "maybe", "FLAGOS_STRICT=maybe"),
        ("FLAGOS_OP_mm", "no_such_backend", "no_such_backend"),
        ("FLAGOS_OP_no_such_op", "cpu", "no_such_op"),
    ],
)
def test_bad_settings_are_named(variable, value, words):
    result = run("import torch_fl", TORCH_DEVICE_BACKEND_AUTOLOAD="0", **{variable: value})
    assert result.returncode != 0
    assert words in result.stderr.splitlines()[-1], result.stderr


def test_doctor_passes():
    result = subprocess.run([sys.executable, "-m", "torch_fl", "doctor"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all checks passed" in result.stdout


def test_routes_command():
    command = [sys.executable, "-m", "torch_fl", "routes"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert listed.returncode == 0 and "mm.out" in listed.stdout
    explained = subprocess.run([*command, "mm"], capture_output=True, text=True, timeout=120)
    assert explained.returncode == 0 and "->" in explained.stdout
