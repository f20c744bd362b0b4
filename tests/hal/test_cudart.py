"""The cudart-shaped chip without a GPU: over a stand-in runtime (fake_cudart.cc), it passes the conformance suite; and
what only it has to do: finding libraries, the current device, error numbers, functions that a runtime lacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hal_abi import HERE, ROOT


@pytest.fixture(scope="module")
def fake(compiler, library):
    def build(*definitions):
        name = "libfakecudart" + "".join(d.split("=")[0].lower() for d in definitions) + ".so"
        link = (library.path, f"-Wl,-rpath,{Path(library.path).parent}", "-Wall", "-Wextra", "-Werror")
        return str(compiler.shared(HERE / "fake_cudart.cc", name, *definitions, flags=link))

    return build


def conformance(library, **environment):
    tests = sorted(str(p) for p in HERE.glob("test_conform_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hal-chip", "cuda"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FLAGOS_")}
    result = subprocess.run(
        [*command, "--hal-lib", library.path, *tests],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert int(result.stdout.rsplit(" passed", 1)[0].split()[-1]) >= 150


@pytest.mark.parametrize("validate", ["0", "1"])
def test_suite_over_the_stand_in(library, fake, validate):
    conformance(library, FLAGOS_CUDART=fake(), FLAGOS_HAL_VALIDATE=validate)


def test_suite_without_the_optional_functions(library, fake):
    """Rows instead of 2-D copies, a sync instead of host functions: the calls still do what they promise."""
    tests = ["test_conform_memory.py", "test_conform_lifecycle.py", "test_conform_threads.py"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FLAGOS_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hal-chip", "cuda"]
        + ["--hal-lib", library.path, *(str(HERE / t) for t in tests), "-k", "not test_peer_access"],
        env={**clean, "FLAGOS_CUDART": fake("WITHOUT_OPTIONAL")},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout[-4000:]


PRELUDE = """
from ctypes import *
hal = library.open('cuda')
runtime = CDLL(os.environ['FLAGOS_CUDART'])
runtime.fake_cudart_calls.restype = c_long
def fail(name, error): runtime.fake_cudart_fail(name.encode(), error)
def calls(name): return runtime.fake_cudart_calls(name.encode())
def current():
    device = c_int(-1)
    runtime.cudaGetDevice(byref(device))
    return device.value
"""


@pytest.fixture
def run(script, fake):
    def run(code, **environment):
        result = script(PRELUDE + code, FLAGOS_CUDART=fake(), **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_device_description(run):
    code = "i = hal.info(1); print(i.name, i.arch, i.driver_version, i.runtime_version, i.major, i.warp_size)"
    assert run(code) == "b'Fake GPU (simulated)' b'sm_90' b'12.8' b'12.4' 9 32\n"


def test_callers_current_device_is_untouched(run):
    run("""
for mine in (0, 1):
    runtime.cudaSetDevice(mine)
    for device in (0, 1):
        p, s, e = hal.alloc(64, device), hal.stream(device), hal.event(device, TIMING)
        hal.write(p, b'x' * 64, device, s)
        hal.do.event_record(device, e, s)
        hal.do.event_sync(device, e)
        hal.do.device_sync(device)
        hal.memory(device)
        hal.malloc(device, 0, byref(c_void_p()))
        hal.malloc(device, 1 << 60, byref(c_void_p()))
        hal.do.event_destroy(device, e)
        hal.do.stream_destroy(device, s)
        hal.do.free(device, p)
        assert current() == mine, (mine, device)
""")


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (1, "INVALID_ARGUMENT"),
        (2, "OUT_OF_MEMORY"),
        (35, "UNAVAILABLE"),
        (100, "UNAVAILABLE"),
        (101, "INVALID_ARGUMENT"),
        (217, "UNSUPPORTED"),
        (400, "NOT_FOUND"),
        (700, "DEVICE_LOST"),
        (719, "DEVICE_LOST"),
        (801, "UNSUPPORTED"),
        (900, "FAILED_PRECONDITION"),
        (909, "TIMEOUT"),
        (12345, "INTERNAL"),
    ],
)
def test_error_numbers(run, number, status):
    out = run(f"fail('StreamSynchronize', {number}); print(STATUS[hal.stream_sync(0, None)], hal.message())")
    assert out.startswith(f"{status} stream_sync: cudaStreamSynchronize returned {number}: ")


def test_reported_errors_are_not_reported_again(run):
    run("""
fail('MemsetAsync', 700)
p = hal.alloc(64)
assert hal.fill_async(0, p, 0, 64, None) == DEVICE_LOST
assert hal.last_error(0) == OK and runtime.cudaGetLastError() == 0
hal.stream_query(0, None)
assert runtime.cudaGetLastError() == 0
""")


def test_not_ready_leaves_no_error_behind(run):
    run("""
fail('StreamQuery', 600)
assert hal.stream_query(0, None) == NOT_READY
assert runtime.cudaGetLastError() == 0
""")


def test_failed_free_keeps_the_block(run):
    run("""
p = hal.alloc(64)
fail('Free', 700)
assert hal.free(0, p) == DEVICE_LOST
assert hal.pointer(p).kind == DEVICE and hal.free(0, p) == OK
""")


def test_out_of_memory_says_what_is_free(run):
    out = run("print(STATUS[hal.malloc(0, 1 << 40, byref(c_void_p()))], hal.message())")
    assert out.startswith("OUT_OF_MEMORY malloc: cudaMalloc returned 2: out of memory (device 0: asked for 1099")


def test_copies_between_devices_use_the_peer_function(run):
    run("""
a, b, c = hal.alloc(64, 0), hal.alloc(64, 1), hal.alloc(64, 0)
hal.do.copy_async(0, c, a, 64, D2D, None)
assert calls('MemcpyPeerAsync') == 0
hal.do.copy_async(0, b, a, 64, D2D, None)
assert calls('MemcpyPeerAsync') == 1
""")


def test_probe_creates_nothing(script, fake):
    code = """
assert 'cuda' in library.report('cuda')
runtime = ctypes.CDLL(os.environ['FLAGOS_CUDART'])
runtime.fake_cudart_calls.restype = ctypes.c_long
for name in ('SetDevice', 'Malloc', 'MemGetInfo', 'GetDeviceCount', 'StreamCreateWithPriority'):
    assert runtime.fake_cudart_calls(name.encode()) == 0, name
"""
    result = script(code, FLAGOS_CUDART=fake())
    assert result.returncode == 0, result.stderr


def test_stand_in_is_used_only_by_name(script, fake):
    result = script("print(library.choose(), library.choose('cuda'))", FLAGOS_CUDART=fake())
    assert result.stdout == "(0, 'host') (0, 'cuda')\n"


def test_no_device_at_init(script, fake):
    code = """
runtime = ctypes.CDLL(os.environ['FLAGOS_CUDART'])
runtime.fake_cudart_fail(b'GetDeviceCount', 100)
try:
    library.open('cuda')
except HalError as error:
    print(error)
library.open('cuda')
"""
    result = script(code, FLAGOS_CUDART=fake())
    assert result.returncode == 0, result.stderr
    assert "UNAVAILABLE" in result.stdout and "cudaGetDeviceCount returned 100" in result.stdout


def test_missing_required_function(script, fake):
    path = fake("WITHOUT_REQUIRED")
    result = script("library.open('cuda')", FLAGOS_CUDART=path)
    assert result.returncode == 1
    assert path in result.stderr and "required symbol missing: cudaMalloc" in result.stderr


def test_library_that_does_not_exist(script):
    result = script("library.open('cuda')", FLAGOS_CUDART="/nowhere/libcudart.so")
    assert result.returncode == 1
    assert "UNAVAILABLE" in result.stderr and "tried: /nowhere/libcudart.so: " in result.stderr


def test_no_gpu(script):
    if list(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists():
        pytest.skip("this machine has a GPU's device node")
    result = script("print(library.choose()); print(library.report('cuda')); library.open('cuda')")
    assert "(0, 'host')" in result.stdout and "probe: UNAVAILABLE: no device node /dev/nvidia0" in result.stdout
    assert "UNAVAILABLE" in result.stderr


@pytest.mark.parametrize("value", ["", "-1", "-1,0"])
def test_hidden_gpus(script, value):
    result = script("print(library.report('cuda'))", CUDA_VISIBLE_DEVICES=value)
    assert "probe: UNAVAILABLE: CUDA_VISIBLE_DEVICES hides every GPU" in result.stdout


def test_forked_child(run):
    run("""
hal.alloc(64)
pid = os.fork()
if pid == 0:
    status = hal.malloc(0, 64, byref(c_void_p()))
    os._exit(0 if status == FAILED_PRECONDITION and 'spawn' in hal.message() else 1)
assert os.waitpid(pid, 0)[1] == 0
""")
