"""Parts of the core that stand alone: builds schema_test.cc and free_list_test.cc and runs their checks."""

import subprocess

import pytest
import torch

from tests.common.programs import compile_cxx


def build(folder, name, *flags):
    return compile_cxx(folder / name, [f"tests/unit/{name}.cc"], "-O1", "-g", "-Wall", "-Wextra", *flags)


def test_written_arguments_of_every_schema(tmp_path):
    """Every operator of this torch, against what the dispatcher has parsed."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::") and "..." not in str(s)]
    assert len(schemas) > 2000
    program = build(tmp_path, "schema_test")
    text = "".join(f"{schema}\n" for schema in schemas)
    found = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    wrong = []
    for schema, flags in zip(schemas, found, strict=True):
        expected = "".join("01"[bool(a.alias_info and a.alias_info.is_write)] for a in schema.arguments)
        if flags != expected:
            wrong.append((str(schema), flags, expected))
    assert not wrong, wrong[:5]


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_free_list(sanitizer, tmp_path):
    program = build(tmp_path, "free_list_test", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    # The pieces live as long as the process.
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "die_after_fork=0"}
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
