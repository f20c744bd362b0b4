"""What goes wrong with CUDA and what is said about it: one sentence with the cause and the way out."""

import warnings

import pytest
import torch

import torch_fl
from tests.common.process import check_python, run_python
from torch_fl import _cuda

GOOD = _cuda.Facts("2.11.0", torch_cuda="13.0", gpu=True, driver_cuda="13.0", visible=None, built=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": False}, ("no NVIDIA GPU", "/dev/nvidia0")),
        ({"torch_cuda": None}, ("PyTorch 2.11.0 is built without CUDA", "install a CUDA build")),
        ({"visible": ""}, ("CUDA_VISIBLE_DEVICES='' hides every GPU", "unset it")),
        ({"visible": "-1,0"}, ("CUDA_VISIBLE_DEVICES='-1,0' hides every GPU",)),
        ({"driver_cuda": None}, ("libcuda.so.1", "install the driver")),
        ({"driver_cuda": "12.4"}, ("driver is too old", "up to 12.4", "built for CUDA 13.0", "update the driver")),
        ({"built": False}, ("libtorch_fl_cuda.so is missing", "rebuild")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_cause_has_its_sentence(change, words):
    said = _cuda.explain(GOOD._replace(**change))
    assert "\n" not in said and "FLAGOS_ACCELERATOR=host" in said
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"visible": "0"},
        {"driver_cuda": "13.1"},
        {"torch_cuda": "12.8"},
        {"driver_cuda": "12.9", "torch_cuda": "12.8"},
    ],
)
def test_nothing_is_invented(change):
    assert _cuda.explain(GOOD._replace(**change)) is None


def test_only_errors_of_cuda_are_explained():
    other = RuntimeError("flagos: the chip metax does not start")
    assert _cuda.explained(other, "metax") is other
    assert _cuda.explained(other, None) is other


def test_old_cuda_is_warned_about():
    with pytest.warns(UserWarning, match="12.2, which gives wrong results"):
        _cuda.warn_of_version("12.2")
    with pytest.warns(UserWarning, match="12.6, which is not tested; use CUDA 12.8 or newer"):
        _cuda.warn_of_version("12.6")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in ("12.8", "13.0", None):
            _cuda.warn_of_version(fine)


def failure(**env):
    """The line of the error that `import torch_fl` raises; the facts of the doctor follow it."""
    result = run_python("import torch_fl", TORCH_DEVICE_BACKEND_AUTOLOAD="0", **env)
    assert result.returncode != 0, "the chip cuda started"
    lines = [line for line in result.stderr.splitlines() if line.startswith("RuntimeError: ")]
    assert lines, result.stderr
    return lines[-1]


def test_asking_for_cuda_without_a_gpu():
    if _cuda.facts().gpu:
        pytest.skip("this machine has an NVIDIA GPU")
    said = failure(FLAGOS_ACCELERATOR="cuda")
    assert said.startswith("RuntimeError: flagos: ") and "no NVIDIA GPU" in said


@pytest.mark.cuda
def test_invisible_gpu():
    said = failure(FLAGOS_ACCELERATOR="cuda", CUDA_VISIBLE_DEVICES="")
    assert "CUDA_VISIBLE_DEVICES='' hides every GPU" in said


@pytest.mark.cuda
def test_import_and_count_make_no_context():
    check_python(
        """
        import torch, torch_fl
        assert torch_fl.chip() == "cuda"
        assert torch_fl.flagos.device_count() > 0 and torch_fl.flagos.is_available()
        assert not torch.cuda.is_initialized()
        assert not torch_fl._C._has_primary_context(0)
        """
    )


@pytest.mark.cuda
def test_out_of_memory(device):
    kept = torch.ones(4, device=device)
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)out of memory.*Tried to allocate.*GiB") as caught:
        torch.empty(1 << 44, device=device)
    assert "total capacity" in str(caught.value)
    with pytest.raises(torch.OutOfMemoryError):
        kept.expand(1 << 40, 4).contiguous()
    assert (kept + 1).sum().item() == 8


@pytest.mark.cuda
def test_out_of_memory_gives_the_cache_back_first(device):
    """What is cached, by whatever cache, must be used before an allocation fails."""
    free, _ = torch.flagos.mem_get_info()
    size = free // 8
    blocks = [torch.empty(size // 2, dtype=torch.uint8, device=device) for _ in range(12)]
    small = [torch.empty(1 << 18, dtype=torch.uint8, device=device) for _ in range(64)]
    del blocks, small
    big = torch.empty(free // 4 * 3, dtype=torch.uint8, device=device)
    assert big.numel() == free // 4 * 3
    del big
    torch.flagos.empty_cache()


ILLEGAL = """
    import sys, time
    import torch, torch_fl
    w = torch.ones(4, 4, device="flagos")
    torch.flagos.synchronize()
    try:
        {culprit}
        time.sleep(2)          # the error exists by now, but nobody has asked
        w + 1
    except torch.AcceleratorError as error:
        print(error)
    else:
        sys.exit("no error")
"""


@pytest.mark.cuda
def test_an_error_of_an_earlier_kernel_names_the_op_and_the_way_to_the_culprit():
    culprit = 'torch.nn.functional.embedding(torch.tensor([1 << 30], device="flagos"), w)'
    said = check_python(ILLEGAL.format(culprit=culprit))
    assert "CUDA error" in said and "surfaced in aten::add" in said
    assert "CUDA_LAUNCH_BLOCKING=1" in said
    blocking = check_python(ILLEGAL.format(culprit=culprit), CUDA_LAUNCH_BLOCKING="1")
    assert "surfaced in aten::embedding" in blocking or "surfaced in aten::index_select" in blocking


@pytest.mark.cuda
def test_illegal_access_of_a_user_kernel(tmp_path):
    """A third party's kernel writes where nothing is; the next operator says what it found."""
    pytest.importorskip("triton", reason="Triton is not installed")
    kernel = tmp_path / "wild_kernel.py"
    kernel.write_text(
        "import triton\nimport triton.language as tl\n\n@triton.jit\ndef wild(x):\n    tl.store(x + (1 << 40), 1.0)\n"
    )
    culprit = f"sys.path.insert(0, {str(tmp_path)!r}); import wild_kernel; wild_kernel.wild[(1,)](w)"
    said = check_python(ILLEGAL.format(culprit=culprit))
    assert "illegal memory access" in said and "surfaced in aten::add" in said


def test_the_op_is_named_only_for_errors_of_the_device(device):
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, device=device) @ torch.ones(3, device=device)
    assert "surfaced in" not in str(caught.value)
    assert torch_fl.chip()
