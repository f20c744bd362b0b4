"""Finding and choosing chips: names, probing, out-of-tree libraries, and every way in which they can be wrong."""

import ctypes
import os
import subprocess
import sys

import pytest
from hal_abi import HERE, NOT_FOUND, OK, ROOT, STATUS, Table

SOURCE = HERE / "small_chip.cc"


@pytest.fixture
def build(compiler):
    def build(name, *definitions):
        return compiler.shared(SOURCE, f"lib{name}.so", *definitions)

    return build


def choose(script, name=None, **environment):
    """On a machine with a GPU that GPU is hidden: the chips that are present are those that a test builds."""
    environment = {"CUDA_VISIBLE_DEVICES": "", **environment}
    result = script(f"status, text = library.choose({name!r}); print(STATUS[status], text)", **environment)
    assert result.returncode == 0, result.stderr
    status, _, text = result.stdout.strip().partition(" ")
    return status, text


def test_host_is_known(library):
    assert "host" in library.chips()
    assert library.dll.flagos_chip_name(-1) is None
    assert library.dll.flagos_chip_name(10_000) is None


def test_choice_by_name_and_by_environment(script):
    assert choose(script, "host") == ("OK", "host")
    assert choose(script, FLAGOS_ACCELERATOR="host") == ("OK", "host")
    assert choose(script, FLAGOS_ACCELERATOR="") == choose(script)


def test_name_beats_the_environment(script):
    assert choose(script, "host", FLAGOS_ACCELERATOR="nonsense") == ("OK", "host")


@pytest.mark.parametrize("typed", ["hots", "Host", "hos", "hoost"])
def test_unknown_name_names_the_nearest(script, typed):
    status, text = choose(script, FLAGOS_ACCELERATOR=typed)
    assert status == "NOT_FOUND"
    assert f'"{typed}"' in text and "FLAGOS_ACCELERATOR" in text and 'did you mean "host"?' in text


def test_unknown_name_lists_the_known(script):
    status, text = choose(script, "something else entirely")
    assert status == "NOT_FOUND" and "known chips:" in text and "host" in text and "did you mean" not in text


def test_open_reports_the_same(library):
    assert library.choose("hots")[0] == NOT_FOUND
    with pytest.raises(Exception, match=r'NOT_FOUND: no chip is named "hots"'):
        library.open("hots")
    assert library.dll.flagos_open(b"host", None) == STATUS.index("INVALID_ARGUMENT")


def test_choose_cuts_at_the_buffer(library):
    buffer = ctypes.create_string_buffer(3)
    assert library.dll.flagos_choose(b"host", buffer, 3) == OK
    assert buffer.value == b"ho"
    assert library.dll.flagos_choose(b"host", None, 0) == STATUS.index("INVALID_ARGUMENT")


def test_one_real_chip_is_chosen(script, build):
    assert choose(script, FLAGOS_HAL_PATH=str(build("one"))) == ("OK", "small")


def test_absent_chip_is_not_chosen(script, build):
    path = str(build("absent", "PROBE=FLAGOS_UNAVAILABLE"))
    assert choose(script, FLAGOS_HAL_PATH=path) == ("OK", "host")


def test_simulated_chip_is_only_chosen_by_name(script, build):
    path = str(build("simulated", 'VENDOR="nobody (simulated)"'))
    assert choose(script, FLAGOS_HAL_PATH=path) == ("OK", "host")
    assert choose(script, FLAGOS_HAL_PATH=path, FLAGOS_ACCELERATOR="small") == ("OK", "small")


def test_two_chips_present(script, build):
    other = build("two", 'NAME="other"')
    paths = f"{build('one')}:{other}"
    status, text = choose(script, FLAGOS_HAL_PATH=paths)
    assert status == "FAILED_PRECONDITION"
    assert "small, other" in text and "FLAGOS_ACCELERATOR=small" in text
    assert choose(script, FLAGOS_HAL_PATH=paths, FLAGOS_ACCELERATOR="other") == ("OK", "other")


BROKEN = {
    "missing_symbol": (["EXPORT=another_name"], ["required symbol missing: flagos_hal_get"]),
    "other_major": (["MAJOR=7"], ["built for HAL ABI 7.0", "this libflagos has 1.0", "rebuild"]),
    "returns_null": (["RETURNS_NULL"], ["flagos_hal_get(1) returned NULL", "HAL ABI 1.0"]),
    "short_table": (["STRUCT_SIZE=64"], ["struct_size is 64", str(ctypes.sizeof(Table))]),
    "no_malloc": (["WITHOUT=malloc"], ["required entries are NULL: malloc"]),
    "no_name": (["WITHOUT=name"], ["no name"]),
    "name_taken": (['NAME="host"'], ['"host" is taken', "built in as host"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_library(script, build, kind):
    definitions, words = BROKEN[kind]
    path = build(kind, *definitions)
    status, text = choose(script, FLAGOS_HAL_PATH=str(path))
    assert status == "FAILED_PRECONDITION", "the wish in FLAGOS_HAL_PATH is not ignored"
    for word in (*words, str(path), "FLAGOS_HAL_PATH"):
        assert word in text
    # Naming a chip that is fine works, and the report still tells of the broken one.
    result = script("print(library.open('host').name); print(library.report())", FLAGOS_HAL_PATH=str(path))
    assert result.returncode == 0 and words[0] in result.stdout


def test_library_that_does_not_exist(script):
    status, text = choose(script, FLAGOS_HAL_PATH="/nowhere/libchip.so")
    assert status == "FAILED_PRECONDITION" and "/nowhere/libchip.so" in text and "No such file" in text


def test_unknown_name_mentions_a_broken_library(script):
    status, text = choose(script, "mychip", FLAGOS_HAL_PATH="/nowhere/libchip.so")
    assert status == "NOT_FOUND" and "/nowhere/libchip.so" in text


def test_a_failing_init_names_chip_library_and_reason(script, build):
    path = build("failing", "INIT=FLAGOS_INTERNAL")
    result = script("library.open('small')", FLAGOS_HAL_PATH=str(path))
    assert result.returncode == 1
    for word in ('chip "small"', str(path), "INTERNAL", "smallInit returned 42"):
        assert word in result.stderr


def test_report(script, build):
    path = build("absent", "PROBE=FLAGOS_UNAVAILABLE")
    result = script("print(library.report()); print('--'); print(library.report('host'))", FLAGOS_HAL_PATH=str(path))
    everything, _, one = result.stdout.partition("--")
    assert "host (torch_fl (simulated)), built in as host" in everything and "probe: OK" in everything
    assert f"small (a vendor), {path}" in everything
    assert "probe: UNAVAILABLE: no device node /dev/small" in everything
    assert "host" in one and "small" not in one


def test_report_of_an_unknown_chip(library):
    assert library.report("nonsense").startswith("no chip is named nonsense")


def test_environment_outside_the_table_aborts(script):
    result = script("print(library.dll.flagos_env(b'FLAGOS_OP_mm')); library.dll.flagos_env(b'HOME')", FLAGOS_OP_mm="x")
    assert result.returncode == -6 and "HOME is read but not listed in accelerator/env.inc" in result.stderr


def test_status_names(library):
    names = [library.dll.flagos_status_name(i).decode() for i in range(len(STATUS))]
    assert names == STATUS
    assert library.dll.flagos_status_name(99) == b"unknown status"


def test_opening_twice_gives_the_same_table(library):
    a, b = library.open("host"), library.open("host")
    assert ctypes.addressof(a.table) == ctypes.addressof(b.table)


def test_skeleton_passes_the_suite(library, compiler):
    """The out-of-tree build of accelerator/_template, loaded through FLAGOS_HAL_PATH, driven by this very suite."""
    path = compiler.shared(
        ROOT / "accelerator/_template/hal.cc", "libtemplate.so", flags=("-Wall", "-Wextra", "-Werror")
    )
    tests = sorted(str(p) for p in HERE.glob("test_conform_*.py"))
    for validate in ("0", "1"):
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hal-chip", "template"]
            + ["--hal-lib", library.path, *tests],
            env={**os.environ, "FLAGOS_HAL_PATH": str(path), "FLAGOS_HAL_VALIDATE": validate},
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
        assert int(result.stdout.rsplit(" passed", 1)[0].split()[-1]) >= 80
