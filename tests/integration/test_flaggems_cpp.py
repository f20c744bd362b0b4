"""The backend flagos (FlagGems' C++ library) against a stand-in with the same exported signatures, without a GPU."""

import ctypes
import functools
import os
import re
import textwrap
from pathlib import Path

import pytest
import torch

import torch_fl
from tests.common import process
from tests.common.programs import compile_cxx, torch_libraries

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests/common/stub_flaggems_cpp.cc"
STUB = ROOT / "tests/common/stub_flag_gems"
# The shipped conf keeps some of the operators native.
check_python, run_python = (
    functools.partial(call, FLAGOS_BACKEND_CONFIG=os.devnull) for call in (process.check_python, process.run_python)
)


def build(folder, *flags):
    """A FlagGems build tree with the stand-in library."""
    (folder / "lib").mkdir()
    libraries = [(torch_libraries(), ["c10", "torch_cpu"])]
    compile_cxx(folder / "lib/liboperators.so", [SOURCE], "-O0", "-shared", "-fPIC", *flags, libraries=libraries)
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return build(tmp_path_factory.mktemp("flaggems"))


def test_calls(tree):
    """Every bound operator runs in the library with torch's results; calls that it is not made for do not reach it."""
    code = f"""
    import ctypes, torch, torch_fl
    stub = ctypes.CDLL({str(tree / "lib/liboperators.so")!r})

    def same(calls, call, *args):
        expected = call(*args)
        moved = [a.flagos() if isinstance(a, torch.Tensor) else a for a in args]
        before = stub.stub_calls()
        got = call(*moved)
        assert stub.stub_calls() - before == calls, (call, stub.stub_calls() - before)
        got, expected = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (got, expected))
        for g, e in zip(got, expected, strict=True):
            assert g.is_flagos
            torch.testing.assert_close(g.cpu(), e)

    # Whole numbers: their products are exact on every chip.
    a, b, c = (torch.randperm(m * n).float().view(m, n) for m, n in ((3, 4), (4, 5), (3, 5)))
    same(1, torch.mm, a, b)
    same(1, torch.mm, a.half(), b.half())
    same(1, torch.mm, a, b[:, ::2])
    same(0, torch.mm, a.double(), b.double())
    if torch_fl.chip() != "cuda":  # torch has no such kernel there
        same(0, torch.mm, a.long(), b.long())
    same(0, torch.mm, a[:0], b)
    same(1, torch.addmm, c, a, b)
    same(1, lambda *x: torch.addmm(*x, beta=2, alpha=0.5), c, a, b)
    same(1, torch.bmm, torch.randn(2, 3, 4), torch.randn(2, 4, 5))
    same(1, lambda i, w: torch.nn.functional.embedding(i, w), torch.tensor([[0, 2], [1, 1]]), torch.randn(4, 8))
    same(1, lambda x: torch.sort(x, 1, True), a)
    same(1, lambda x: torch.sort(x, stable=True), a)
    same(0, torch.argmax, a)
    same(0, torch.softmax, a, 1)
    with torch_fl.route({{"argmax": "flaggems", "max.dim": "flaggems"}}):
        same(1, torch.argmax, a)
        same(1, lambda x: x.argmax(1, keepdim=True), a)
        same(1, lambda x: torch.max(x, 1), a)
    for within, calls in (("[numel>=12]", 1), ("[numel>=999]", 0)):  # a route that looks at the arguments
        torch_fl.set_route("mm", f"flagos {{within}}")
        same(calls, torch.mm, a, b)
    torch_fl.set_route("mm", None)
    out = torch.empty(0, device="flagos")
    before = stub.stub_calls()
    assert torch.mm(a.flagos(), b.flagos(), out=out) is out and torch.equal(out.cpu(), a @ b)
    assert torch.addmm(c.flagos(), a.flagos(), b.flagos(), out=out) is out
    assert stub.stub_calls() == before + 1, "the first one had to be resized, which only torch does"
    assert torch.mm(a.flagos(), b.flagos(), out=out) is out and torch.equal(out.cpu(), a @ b)
    assert stub.stub_calls() == before + 2
    x, y = a.flagos().requires_grad_(), b.flagos()
    (x @ y).sum().backward()
    assert torch.allclose(x.grad.cpu(), b.sum(1).expand(3, 4))
    try:
        torch.mm(x, x)
    except RuntimeError as error:
        assert "shapes" in str(error), error
    else:
        raise AssertionError("mm took 3x4 by 3x4")
    assert torch_fl.is_flaggems_enabled()
    print("done")
    """
    assert check_python(code, FLAGGEMS_DIR=str(tree)) == "done\n"


PROGRAM = """
import torch, torch_fl
x = torch.ones(1, 2, 2, device="flagos")
torch.mm(x[0], x[0])
try:
    torch.bmm(x, x)
    torch.softmax(x, 0)
except RuntimeError as error:
    print(str(error).split(chr(10))[0])
print(torch_fl.explain("bmm"), torch_fl.explain("_softmax"))
"""


def test_serves_by_default_and_logs(tree):
    result = run_python(PROGRAM, FLAGGEMS_DIR=str(tree), FLAGOS_LOG_DISPATCH="1")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "[flagos dispatch] mm -> flagos\n" in result.stderr
    assert f"[flagos dispatch] _softmax -> {torch_fl.chip()}\n" in result.stderr


def test_the_log_and_the_counts_name_who_serves(tree):
    code = """
    import torch, torch_fl
    x = torch.ones(4, 4, device="flagos")
    for y in (x, x.double()):
        torch.mm(y, y)
    with torch_fl.count_ops() as counts:
        torch.mm(x, x), torch.mm(y, y), torch.mm(y, y)
    print(sorted(row for row in counts.rows() if row[0] == "mm"))
    """
    result = run_python(code, FLAGGEMS_DIR=str(tree), FLAGOS_LOG_DISPATCH="1")
    chip = torch_fl.chip()
    served = re.findall(r"dispatch\] mm -> (\w+)", result.stderr)
    assert served == ["flagos", chip, "flagos", chip, chip], result.stderr[-2000:]
    assert result.stdout == f"{sorted([('mm', 'flagos', 1), ('mm', chip, 2)])}\n"


def test_refused_operator_asked_for_by_name(tree):
    out = check_python(PROGRAM, FLAGGEMS_DIR=str(tree), FLAGOS_OP__softmax="flaggems")
    assert "backend not registered: _softmax -> flagos" in out and "128 columns" in out


def test_missing_symbol(tmp_path):
    """A library that lacks one function serves the others."""
    folder = build(tmp_path, "-DSTUB_WITHOUT_BMM")
    result = run_python(PROGRAM, FLAGGEMS_DIR=str(folder), FLAGOS_OP_bmm="flagos", FLAGOS_LOG_DISPATCH="1")
    assert result.returncode == 0 and "mm -> flagos\n" in result.stderr, result.stderr[-2000:]
    assert "backend not registered: bmm -> flagos" in result.stdout and "lacks _ZN9flag_gems3bmm" in result.stdout


def test_library_that_cannot_be_loaded(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/liboperators.so").write_text("not a library")
    out = check_python(PROGRAM, FLAGGEMS_DIR=str(tmp_path), FLAGOS_OP_bmm="flagos")
    assert "backend not registered: bmm -> flagos" in out and "cannot be loaded" in out and "liboperators.so" in out


def test_no_library(tmp_path):
    out = check_python(PROGRAM, FLAGGEMS_DIR=str(tmp_path), FLAGOS_OP_bmm="flagos")
    assert "was not found" in out and str(tmp_path) in out
    hidden = "import sys; sys.modules['flag_gems'] = None\n" + textwrap.dedent(PROGRAM)
    out = check_python(hidden, FLAGGEMS_DIR=None, FLAGOS_OP_bmm="flagos", PYTHONPATH=str(ROOT))
    assert "backend not registered: bmm -> flagos" in out and "FLAGGEMS_DIR" in out


def test_wrong_version(tree, tmp_path):
    (tmp_path / "flag_gems-4.2.dist-info").mkdir()
    (tmp_path / "flag_gems-4.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: flag_gems\nVersion: 4.2\n")
    (tmp_path / "flag_gems").mkdir()
    (tmp_path / "flag_gems/__init__.py").write_text("")
    code = PROGRAM
    out = check_python(code, FLAGGEMS_DIR=str(tree), FLAGOS_OP_bmm="flagos", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "backend not registered" in out and "4.2" in out and "5.0.2" in out


def test_library_beside_the_installed_package(tree, tmp_path):
    (tmp_path / "flag_gems/lib").mkdir(parents=True)
    (tmp_path / "flag_gems/__init__.py").write_text("")
    (tmp_path / "flag_gems/lib/liboperators.so").symlink_to(tree / "lib/liboperators.so")
    code = "import torch_fl\nprint(next(r.backend for r in torch_fl.routes() if r.op == 'mm'))"
    assert check_python(code, FLAGGEMS_DIR=None, PYTHONPATH=f"{tmp_path}:{ROOT}") == "flagos\n"


def test_stream_api():
    """FlagGems asks this library for the stream to launch on."""
    library = ctypes.CDLL(str(Path(torch_fl._C.__file__).parent / "libstream_api.so"))
    current = library.GetCurrentStream
    current.argtypes, current.restype = [ctypes.c_int], ctypes.c_void_p

    def handle(stream):
        return torch_fl._C._stream_native_handle(stream.stream_id, stream.device_index, stream.device_type)

    stream = torch.flagos.Stream()
    with torch.flagos.stream(stream):
        assert current(0) == handle(stream)
    assert (current(0) or 0) == handle(torch.flagos.current_stream())
    assert current(-1) is None and current(10_000) is None
