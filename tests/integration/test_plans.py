"""Launch plans on the null CUDA, with a stand-in for FlagGems whose Triton kernels are compiled and never run."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from tests.common import null_cuda
from tests.common.process import check_python

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "tests/common/stub_plan_gems"
CHECKS = ROOT / "tests/common/plan_checks.py"


@pytest.fixture(scope="module")
def results():
    why = null_cuda.missing()
    if why:
        pytest.skip(f"no null CUDA: {why}")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = null_cuda.environment() | {
        "PYTHONPATH": os.pathsep.join([str(STUB), str(ROOT)]),
        "FLAGOS_PLAN": None,
        "FLAGOS_PLAN_VERIFY": None,
    }
    code = f"import runpy; runpy.run_path({str(CHECKS)!r}, run_name='__main__')"
    return json.loads(check_python(code, timeout=300, **environment).splitlines()[-1])


@pytest.mark.parametrize("name", re.findall(r"^def (check_\w+)", CHECKS.read_text(), re.MULTILINE))
def test_check(name, results):
    assert results[name] == ""
