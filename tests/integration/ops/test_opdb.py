"""op_db on flagos against the CPU: every OpInfo, in forward, backward, out= and in-place.

By default each operator runs with float32 (or the first dtype it has) and one more dtype chosen by a hash of its
name, two samples plus the awkward layouts.
--full runs every dtype with six samples; sweep.py does that with crash isolation.
"""

import zlib

import pytest
import torch
from known_failures import KNOWN_FAILURES

import torch_fl
from tests.common import opdb

OPS = opdb.ops_by_name()


def dtypes_for(op, full):
    dtypes = opdb.cpu_dtypes(op)
    if full:
        return dtypes
    first = opdb.parse_dtypes("first", op)
    others = [d for d in dtypes if d not in first]
    return first + others[zlib.crc32(opdb.op_name(op).encode()) % len(others) :][:1] if others else first


@pytest.mark.anyplatform
@pytest.mark.parametrize("name", sorted(OPS))
def test_matches_cpu(name, device, request):
    op = OPS[name]
    full = request.config.getoption("--full")
    before = torch_fl.fallbacks()
    unexpected, cases = [], 0
    for dtype in dtypes_for(op, full):
        results = opdb.check_op(op, dtype, str(device), samples=6 if full else 2)
        text = str(dtype).split(".")[1]
        for mode, result in results.items():
            cases += result.cases
            unexpected += [
                f"{text} {mode} {failure['case']}: {failure['message']}"
                for failure in result.failures
                if not any(k.covers(name, text, mode, failure["case"], torch_fl.chip()) for k in KNOWN_FAILURES)
            ]
    assert not unexpected, f"{len(unexpected)} of {cases} cases differ from the CPU:\n" + "\n".join(unexpected[:10])
    if torch_fl.chip() in ("host", "cuda"):
        reached = {k: v for k, v in torch_fl.fallbacks().items() if v > before.get(k, 0)}
        assert not reached, f"reached the copying CPU fallback: {reached}"


@pytest.mark.anyplatform
def test_negative_control(device):
    """Perturbed inputs must turn the checks red; otherwise nothing above means anything."""
    red = total = 0
    for name in ("add", "mul", "mm", "nn.functional.gelu", "sum", "cat", "nn.functional.layer_norm", "exp"):
        for result in opdb.check_op(OPS[name], torch.float32, str(device), samples=2, corrupt=True).values():
            red += len(result.failures)
            total += result.cases
    assert red > total / 2, f"only {red} of {total} cases noticed inputs that were 2 % off"
