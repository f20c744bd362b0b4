"""Fixtures of the integration tests: the device, and a clean slate between tests.

Without FLAGOS_BACKEND_CONFIG a machine with MetaX hardware runs on backends_metax.conf, every other one on the default.
It is set before torch_fl is imported, because routes are read once, at import.
"""

import os
import sys
from pathlib import Path

METAX_DEVICE = Path("/dev/mxcd")
if METAX_DEVICE.exists() and not os.environ.get("FLAGOS_BACKEND_CONFIG"):
    import importlib.util

    package = Path(importlib.util.find_spec("torch_fl").origin).parent
    os.environ["FLAGOS_BACKEND_CONFIG"] = str(package / "backends_metax.conf")

import pytest
import torch

import torch_fl
from tests.common import null_cuda

torch.backends.cudnn.allow_tf32 = False  # results are compared with the CPU's, which are not rounded to ten bits
if null_cuda.active():
    torch.backends.cuda.enable_cudnn_sdp(False)  # it asks the driver for more than the null CUDA has

# Marks that name a chip or a backend, with what has to be there for the test to run.
CHIP_MARKS = ("cuda", "metax", "ascend")


def absent(mark):
    """Why tests with this mark cannot run here, or None when they can."""
    chip = torch_fl.chip()
    if mark in CHIP_MARKS:
        return None if chip == mark else f"needs the chip {mark}; this process runs on {chip}"
    backends = {row.backend for row in torch_fl.routes()}
    name = {"flaggems": "flagos", "flaggems_python": "flagos_python"}[mark]
    return None if name in backends else f"no operator is routed to {name} in this process"


def pytest_collection_modifyitems(config, items):
    reasons = {}
    for item in items:
        platform_marks = {m.name for m in item.iter_markers()} & {*CHIP_MARKS, "flaggems", "flaggems_python"}
        # anyplatform beside a platform mark means: also everywhere.
        if platform_marks and not item.get_closest_marker("anyplatform"):
            for mark in platform_marks:
                if mark not in reasons:
                    reasons[mark] = absent(mark)
            if all(reasons[m] for m in platform_marks):
                item.add_marker(pytest.mark.skip(reason="; ".join(sorted(reasons[m] for m in platform_marks))))
        if item.get_closest_marker("slow") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --full"))


def pytest_runtest_logfinish(nodeid, location):
    """An illegal access or an assert on a GPU fails everything in its process from then on. With pytest-xdist another
    process takes over; without it the rest of the run would say nothing."""
    if torch_fl.chip() != "cuda" or not torch_fl._C._has_primary_context(0):
        return
    try:
        torch_fl.flagos.synchronize()
    except RuntimeError as error:
        print(f"{nodeid} lost the device: {error}", file=sys.stderr, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)
        pytest.exit(f"{nodeid} lost the device", returncode=3)


@pytest.fixture
def device():
    """The device under test."""
    return torch.device("flagos")


@pytest.fixture(autouse=True)
def clean_slate():
    """Seeds every test alike and leaves device 0 current."""
    torch.manual_seed(0)
    yield
    if torch_fl.flagos.current_device() != 0:
        torch_fl.flagos.set_device(0)


@pytest.fixture(autouse=True, scope="module")
def default_routes():
    """Takes routes back that a file set and left, before the next file of the process runs."""
    yield
    for row in torch_fl.routes():
        if row.origin == "set_route":
            torch_fl.set_route(row.op, None)
