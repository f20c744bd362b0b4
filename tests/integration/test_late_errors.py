"""Errors that surface long after their cause name the last operators, whatever call they surface in.

Work on the device is asynchronous: what fails is an innocent call, often one that waits. On the simulated chip a fault
is put into the wait itself, on the null CUDA into the function of CUDA that waits.
"""

import pytest
import torch

import torch_fl
from tests.common import null_cuda
from tests.common.process import check_python

flagos = torch_fl.flagos

# what waits -> the entry of the HAL in which it waits, the function of CUDA (None: the null CUDA's cannot fail)
WAITS = {
    "torch.flagos.synchronize()": ("device_sync", "cudaDeviceSynchronize"),
    "torch.accelerator.synchronize()": ("device_sync", "cudaDeviceSynchronize"),
    "torch.flagos.current_stream().synchronize()": ("stream_sync", "cudaStreamSynchronize"),
    "torch.flagos.current_stream().query()": ("stream_query", "cudaStreamQuery"),
    "event.synchronize()": ("event_sync", "cudaEventSynchronize"),
    "event.query()": ("event_query", "cudaEventQuery"),
    "torch.flagos.current_stream().record_event(event)": ("event_record", "cudaEventRecord"),
    "torch.flagos.Stream().wait_event(event)": ("stream_wait_event", None),
    "x.sum().item()": ("stream_sync", "cudaStreamSynchronize"),
    "x.cpu()": ("stream_sync", "cudaStreamSynchronize"),
    "x.tolist()": ("stream_sync", "cudaStreamSynchronize"),
    "x.copy_(torch.ones(4))": ("stream_sync", "cudaStreamSynchronize"),
    "y.copy_(x, non_blocking=True)": ("copy_async", "cudaMemcpyAsync"),
}


@pytest.mark.skipif(torch_fl.chip() != "host", reason="faults are injected into the simulated device")
@pytest.mark.parametrize("wait", WAITS)
def test_whatever_waits_names_the_last_operators(wait, device):
    x, y = torch.ones(4, device=device), torch.empty(4).pin_memory()
    event = flagos.Event()
    event.record()
    x.sinh()
    torch_fl._C._sim.set_fail(f"{WAITS[wait][0]}@1=INTERNAL")
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
    """Error 700 is an illegal memory access. When every call fails in the end, the process still ends by itself."""
    calls = {wait: function for wait, (_, function) in WAITS.items() if function}
    said = check_python(
        f"""
        import torch, torch_fl
        from tests.common import null_cuda
        x, y = torch.ones(4, device="flagos"), torch.empty(4).pin_memory()
        event = torch.flagos.Event()
        event.record()
        x.sinh()
        for wait, function in {calls!r}.items():
            null_cuda.library().null_cuda_fail(function.encode(), 700)
            try:
                eval(wait)
            except torch.AcceleratorError as error:
                print(wait, "|", str(error).replace("\\n", " "))
            else:
                raise AssertionError(wait + " did not fail")
        null_cuda.library().null_cuda_break(700)
        """,
        **null_cuda.environment(),
    )
    lines = dict(line.split(" | ", 1) for line in said.splitlines())
    assert list(lines) == list(calls)
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
