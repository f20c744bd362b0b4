"""The C ABI as compilers see it: frozen offsets, valid C99 and C++17/20, and the same layout in hal_abi.py."""

import ctypes
import re
import shutil
import subprocess

import pytest
from hal_abi import ENTRIES, HERE, ROOT, STATUS, DeviceInfo, PointerInfo, Table

HEADER = ROOT / "include/flagos.h"


@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_offsets_are_frozen(compiler, standard):
    flags = [f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", ROOT / "include"]
    result = compiler.run(*flags, HERE / "abi_layout.cc")
    assert result.returncode == 0, result.stderr


def test_a_moved_member_is_noticed(compiler, tmp_path):
    (tmp_path / "flagos.h").write_text(HEADER.read_text().replace("  int32_t major, minor;", "  int64_t major, minor;"))
    result = compiler.run("-std=c++17", "-fsyntax-only", "-I", tmp_path, HERE / "abi_layout.cc")
    assert result.returncode != 0 and "has moved" in result.stderr


def test_header_is_c99(tmp_path):
    if not shutil.which("cc"):
        pytest.skip("no C compiler on this machine")
    source = tmp_path / "use.c"
    source.write_text(
        "#include <flagos.h>\n"
        "const flagos_hal* flagos_hal_get(uint32_t abi_major) { return abi_major == FLAGOS_ABI_MAJOR ? NULL : NULL; }\n"
    )
    flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", str(ROOT / "include")]
    result = subprocess.run(["cc", *flags, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_entry_of_the_header_is_frozen_and_known_here():
    body = re.search(r"typedef struct flagos_hal \{(.*?)\} flagos_hal;", HEADER.read_text(), re.S).group(1)
    entries = re.findall(r"\(\*(\w+)\)\(", re.sub(r"void \(\*fn\)", "", body))
    assert entries == list(ENTRIES)
    layout = (HERE / "abi_layout.cc").read_text()
    listed = (ROOT / "accelerator/entries.inc").read_text()
    for entry in entries:
        assert f"AT(flagos_hal, {entry}, {getattr(Table, entry).offset});" in layout
    assert re.findall(r"^FLAGOS_ENTRY\((\w+),", listed, re.M) == entries


def test_python_layout_matches():
    layout = (HERE / "abi_layout.cc").read_text()
    for name, structure in (("flagos_device_info", DeviceInfo), ("flagos_pointer_info", PointerInfo)):
        assert f"sizeof({name}) == {ctypes.sizeof(structure)}" in layout
        for member, offset in re.findall(rf"AT\({name}, (\w+), (\d+)\)", layout):
            assert getattr(structure, member).offset == int(offset)


def test_status_codes_match():
    found = re.findall(r"FLAGOS_(\w+) = (\d+)", re.search(r"enum flagos_status \{(.*?)\}", HEADER.read_text(), re.S)[1])
    assert [name for name, _ in found] == STATUS and [int(n) for _, n in found] == list(range(len(STATUS)))


def test_the_library_has_no_torch_and_no_vendor_library(library):
    if not shutil.which("readelf"):
        pytest.skip("no readelf on this machine")
    text = subprocess.run(["readelf", "-d", library.path], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*?)\]", text)
    assert needed and all(re.match(r"(libc|libm|libdl|libpthread|libstdc\+\+|libgcc_s|ld-linux)", n) for n in needed)


def test_only_the_c_abi_is_exported(library):
    if not shutil.which("nm"):
        pytest.skip("no nm on this machine")
    text = subprocess.run(["nm", "-D", "--defined-only", library.path], capture_output=True, text=True).stdout
    names = [line.split()[2] for line in text.splitlines() if line.split()[1] in "TDB"]
    assert names and all(name.startswith("flagos_") for name in names), names
