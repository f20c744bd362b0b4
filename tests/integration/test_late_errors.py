"""Errors that surface long after their cause name the last operators, whatever call they surface in.

Work on the device is asynchronous: what fails is an innocent call, often one that waits. On the simulated chip a fault
is put into the wait itself; on the null CUDA the device breaks, as an illegal access breaks it.
"""

import pytest
import torch

import torch_fl
from tests.common import null_cuda
from tests.common.process import check_python

flagos = torch_fl.flagos

# what waits -> the entry of the HAL in which it waits
WAITS = {
    "torch.flagos.synchronize()": "device_sync",
    "torch.accelerator.synchronize()": "device_sync",
    "torch.flagos.current_stream().synchronize()": "stream_sync",
    "torch.flagos.current_stream().query()": "stream_query",
    "event.synchronize()": "event_sync",
    "event.query()": "event_query",
    "x.sum().item()": "stream_sync",
    "x.cpu()": "stream_sync",
    "x.tolist()": "stream_sync",
    "torch.ones(4).to(x.device)": "stream_sync",
    "y.copy_(x, non_blocking=True)": "copy_async",
}


@pytest.mark.skipif(torch_fl.chip() != "host", reason="faults are injected into the simulated device")
@pytest.mark.parametrize("wait", WAITS)
def test_whatever_waits_names_the_last_operators(wait, device):
    x, y = torch.ones(4, device=device), torch.empty(4).pin_memory()
    event = flagos.Event()
    event.record()
    x.sinh()
    torch_fl._C._sim.set_fail(f"{WAITS[wait]}@1=INTERNAL")
    try:
        with pytest.raises(RuntimeError) as error:
            eval(wait, {"torch": torch, "x": x, "y": y, "event": event})
    finally:
        torch_fl._C._sim.set_fail("")
    line = str(error.value).split("\n")[0]
    assert "INTERNAL" in line and "last operators, newest first: " in line and "sinh" in line, line
    assert x.sum().item() == 4


@pytest.mark.skipif(null_cuda.missing() is not None, reason=f"no null CUDA: {null_cuda.missing()}")
def test_on_cuda_too():
    """Error 700 is an illegal memory access; from then on every call fails."""
    waits = [wait for wait in WAITS if "non_blocking" not in wait]
    said = check_python(
        f"""
        import torch, torch_fl
        from tests.common import null_cuda
        x = torch.ones(4, device="flagos")
        event = torch.flagos.Event()
        event.record()
        x.sinh()
        null_cuda.library().null_cuda_break(700)
        for wait in {waits!r}:
            try:
                eval(wait)
            except torch.AcceleratorError as error:
                print(wait, "|", str(error).replace("\\n", " "))
            else:
                raise AssertionError(wait + " did not fail")
        """,
        **null_cuda.environment(),
    )
    lines = dict(line.split(" | ", 1) for line in said.splitlines())
    assert list(lines) == waits
    for wait, line in lines.items():
        assert "CUDA error" in line and "the error surfaced in" in line and "sinh" in line, f"{wait}: {line}"


@pytest.mark.cuda
@pytest.mark.parametrize("wait", ["torch.flagos.synchronize()", "event.synchronize()", "w.sum().item()", "w.cpu()"])
def test_a_kernel_s_error_at_the_next_wait(wait):
    said = check_python(
        f"""
        import torch
        w = torch.ones(4, 4, device="flagos")
        torch.nn.functional.embedding(torch.tensor([1 << 30], device="flagos"), w)
        event = torch.flagos.Event()
        try:
            event.record()
            {wait}
        except torch.AcceleratorError as error:
            print(error)
        """
    )
    assert "CUDA error" in said and "the error surfaced in" in said and "embedding" in said
