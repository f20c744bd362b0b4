"""The host chip's memory protection: reading a flagos tensor's address on the host faults and says why; it never yields
wrong data. FLAGOS_HOST_PROTECT=0 turns that off."""

import ctypes
import shutil
import signal
import subprocess

import pytest
import torch

import torch_fl
from tests.common.process import check_python, run_python

pytestmark = pytest.mark.skipif(torch_fl.chip() != "host", reason="only the simulated device protects its memory")

HOST = {"FLAGOS_ACCELERATOR": "host"}


def dies(code, **env):
    """The process must be killed by SIGSEGV after one line that names the cause."""
    result = run_python("import torch\n" + code, **HOST, **env)
    assert result.returncode == -signal.SIGSEGV, (result.returncode, result.stdout, result.stderr[-500:])
    lines = [line for line in result.stderr.split("\n") if line.startswith("flagos: ")]
    assert len(lines) == 1 and "device memory" in lines[0] and ".cpu()" in lines[0], result.stderr[-500:]
    assert "wrong data" not in result.stdout
    return lines[0]


def test_ctypes_read():
    line = dies(
        "import ctypes; x = torch.ones(4, device='flagos')\n"
        "print('wrong data', ctypes.c_float.from_address(x.data_ptr()).value)"
    )
    assert "flagos:0" in line and "0x" in line


def test_ctypes_write():
    dies(
        "import ctypes; x = torch.ones(4, device='flagos')\n"
        "ctypes.c_float.from_address(x.data_ptr()).value = 3; print('wrong data')"
    )


def test_second_device_is_named():
    if torch.flagos.device_count() < 2:
        pytest.skip("needs two devices")
    assert "flagos:1" in dies("import ctypes; ctypes.string_at(torch.ones(4, device='flagos:1').data_ptr(), 4)")


def test_memmove_and_numpy_from_address():
    dies(
        "import ctypes; x = torch.ones(4, device='flagos'); b = bytearray(16)\n"
        "ctypes.memmove((ctypes.c_char * 16).from_buffer(b), x.data_ptr(), 16); print('wrong data')"
    )
    pytest.importorskip("numpy", reason="needs numpy")
    dies(
        """
import numpy as np
x = torch.ones(4, device="flagos")
class Array:
    __array_interface__ = {"shape": (4,), "typestr": "<f4", "data": (x.data_ptr(), False), "version": 3}
print("wrong data", np.asarray(Array()).sum())
"""
    )


def test_c_extension(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = tmp_path / "sum.c"
    source.write_text("float sum4(const float* x) { return x[0] + x[1] + x[2] + x[3]; }\n")
    library = tmp_path / "libsum.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    prepare = f"""
import ctypes
sum4 = ctypes.CDLL({str(library)!r}).sum4
sum4.restype, sum4.argtypes = ctypes.c_float, [ctypes.c_void_p]
x = torch.ones(4, device="flagos")
"""
    dies(prepare + "print('wrong data', sum4(x.data_ptr()))")
    result = run_python("import torch\n" + prepare + "y = x.cpu(); print(sum4(y.data_ptr()))", **HOST)
    assert result.stdout.strip() == "4.0", result.stderr


def test_numpy_is_refused_before_any_fault(device):
    x = torch.ones(3, device=device)
    numpy = pytest.importorskip("numpy", reason="needs numpy")
    for use in (lambda: x.numpy(), lambda: numpy.asarray(x), lambda: memoryview(x), lambda: numpy.from_dlpack(x)):
        with pytest.raises((TypeError, RuntimeError, BufferError, ValueError)):
            use()


def test_other_faults_are_left_alone():
    """A segmentation fault elsewhere must not be blamed on us, and an earlier handler must still run."""
    result = run_python("import torch, ctypes\ntorch.ones(1, device='flagos')\nctypes.string_at(8)", **HOST)
    assert result.returncode == -signal.SIGSEGV and "flagos: the host touched" not in result.stderr
    result = run_python(
        "import faulthandler; faulthandler.enable()\nimport torch, ctypes\n"
        "x = torch.ones(1, device='flagos')\nctypes.string_at(x.data_ptr())",
        **HOST,
    )
    assert result.returncode == -signal.SIGSEGV
    assert "flagos: the host touched" in result.stderr and "Fatal Python error" in result.stderr


def test_protection_can_be_turned_off():
    result = run_python(
        "import torch, ctypes\nx = torch.full((4,), 2.5, device='flagos')\n"
        "torch.flagos.synchronize()\nprint(ctypes.c_float.from_address(x.data_ptr()).value)",
        FLAGOS_HOST_PROTECT="0",
        **HOST,
    )
    assert result.returncode == 0 and result.stdout.strip() == "2.5", result.stderr[-500:]


def test_freed_memory_is_not_readable_either():
    dies(
        """
import ctypes
x = torch.ones(1 << 20, device="flagos")
p = x.data_ptr()
del x
torch.flagos.empty_cache()
print("wrong data", ctypes.c_float.from_address(p).value)
"""
    )


def test_fresh_memory_is_nan():
    """Reading what nobody wrote shows at once instead of looking like zeros."""
    check_python("import torch; assert torch.empty(1 << 10, device='flagos').isnan().all().item()", **HOST)


def test_data_ptr_is_a_device_address(device):
    """The address differs from where the bytes are readable, and views differ by their offsets."""
    x = torch.arange(8.0, device=device)
    assert x.data_ptr() and x[2:].data_ptr() == x.data_ptr() + 8
    assert x.untyped_storage().data_ptr() == x.data_ptr()
    assert ctypes.sizeof(ctypes.c_void_p) == 8
