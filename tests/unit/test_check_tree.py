"""The house-rule checker finds each kind of offence, and lets what is right pass."""

import subprocess

import check_tree
import environment_doc
import pytest

ENV = '// table\nFLAGOS_ENV("FLAGOS_STRICT", "0", "meaning")\n'


@pytest.fixture
def tree(tmp_path):
    """Makes a working copy from {name: text} and returns its Tree."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)

    def make(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return check_tree.Tree(tmp_path)

    return make


def module(body):
    return f'"""A module."""\n{body}\n'


# (rule, files that break it, words of the problem, files that keep it)
CASES = [
    ("line_count", {"csrc/a.cc": "//\n" * 501}, "501 lines", {"csrc/a.cc": "//\n" * 500}),
    ("line_count", {"csrc/aten/route.h": "//\n" * 251}, "at most 250", {"csrc/aten/route.h": "//\n" * 250}),
    ("line_width", {"a.py": "#" * 121}, "121 columns", {"a.py": "#" * 120, "a.md": "x" * 200}),
    ("purpose", {"csrc/a.h": "#pragma once\n"}, "csrc/a.h", {"csrc/a.h": "// a.h: for tests.\n#pragma once\n"}),
    ("purpose", {"a.py": "# comment\nx = 1\n"}, "a.py", {"a.py": module("x = 1"), "b.py": ""}),
    ("purpose", {"a.sh": "#!/bin/sh\nset -e\n"}, "a.sh", {"a.sh": "#!/bin/sh\n# For tests.\nset -e\n"}),
    ("purpose", {"CMakeLists.txt": "project(x)\n"}, "CMakeLists.txt", {"CMakeLists.txt": "# The build.\n"}),
    ("no_generated_source", {"a.so": ""}, "build product", {"a.cc": "// the generated file list is elsewhere\n"}),
    ("no_generated_source", {"a.cc": "// Do not edit\n"}, "generated source", {"a.py": module("")}),
    ("no_local_places", {"README.md": "see /home/somebody/x"}, "/home/somebody", {"README.md": "see ~/x"}),
    ("hal_includes", {"accelerator/a.cc": "#include <cuda_runtime.h>\n"}, "cuda_runtime.h", {}),
    ("hal_includes", {"accelerator/a.cc": "#include <c10/core/Device.h>\n"}, "c10", {}),
    ("hal_includes", {"include/flagos.h": '#include "acl/acl.h"\n'}, "acl/acl.h", {}),
    (
        "hal_includes",
        {"accelerator/a.cc": '#include "csrc/x.h"\n', "csrc/x.h": "//\n"},
        "layer above",
        {
            "accelerator/a.cc": '#include <dlfcn.h>\n#include "cuda/table.h"\n#include "flagos.h"\n',
            "accelerator/cuda/table.h": "//\n",
            "include/flagos.h": "//\n",
            "csrc/x.cc": "#include <ATen/ATen.h>\n",
        },
    ),
    (
        "torch_assignments",
        {"torch_fl/a.py": module("import torch\ntorch.cuda.x = 1"), "torch_fl/patches.py": module("TABLE = []")},
        "a.py:3",
        {"torch_fl/a.py": module("import torch\nx = torch.ones(1)"), "torch_fl/patches.py": module("TABLE = []")},
    ),
    ("torch_assignments", {"torch_fl/a.py": module("import torch\nsetattr(torch, 'x', 1)")}, "assigns", {}),
    ("torch_assignments", {"torch_fl/a.py": module("from torch import Tensor\nTensor.x = 1")}, "assigns", {}),
    ("torch_assignments", {"torch_fl/a.py": module("import torch.nn as nn\nnn.Module.x = 1")}, "assigns", {}),
    ("torch_assignments", {"torch_fl/patches.py": module("TABLE: list = [1, 2, 3, 4]")}, "4 patches", {}),
    (
        "environment_reads",
        {"csrc/a.cc": 'x = std::getenv("A");\n'},
        "flagos_env()",
        {"accelerator/env.cc": "getenv(name)\n", "csrc/a.cc": "flagos_env(x) // not getenv(\n"},
    ),
    ("environment_reads", {"torch_fl/a.py": module("import os\nos.environ['A']")}, "os.environ", {}),
    (
        "environment_names",
        {"accelerator/env.inc": ENV, "csrc/a.cc": 'flagos_env("FLAGOS_NEW")'},
        "FLAGOS_NEW",
        {"accelerator/env.inc": ENV, "csrc/a.cc": 'flagos_env("FLAGOS_STRICT")'},
    ),
    ("environment_names", {"accelerator/env.inc": ENV, "torch_fl/a.py": '_env.get("FLAGOS_NEW")'}, "FLAGOS_NEW", {}),
    ("environment_document", {"accelerator/env.inc": ENV}, "docs/environment.md", {}),
    ("environment_document", {"accelerator/env.inc": ENV, "docs/environment.md": "old"}, "not up to date", {}),
    ("conf_operators", {"torch_fl/b.conf": "mmm = cpu\n"}, "no operator mmm", {"torch_fl/b.conf": "mm = cpu # x\n"}),
    ("conf_operators", {"torch_fl/b.conf": "mm cpu\n"}, "expected", {"torch_fl/b.conf": "# mm cpu\n"}),
    ("conf_operators", {"torch_fl/b.conf": "mm = cpu\nmm = cuda\n"}, "twice", {"torch_fl/b.conf": "mm.out=cpu\n"}),
    (
        "public_names",
        {"torch_fl/__init__.py": module("__all__ = ['a']"), "scripts/public_names.txt": "# names\n"},
        "torch_fl.a: public",
        {"torch_fl/__init__.py": module("__all__ = ['a']"), "scripts/public_names.txt": "# names\ntorch_fl.a\n"},
    ),
    (
        "public_names",
        {"torch_fl/__init__.py": module("__all__ = []"), "scripts/public_names.txt": "torch_fl.gone\n"},
        "does not exist any more",
        {},
    ),
    (
        "skips_have_reasons",
        {"tests/a.py": module("pytest.skip()")},
        "without a reason",
        {"tests/a.py": module("pytest.skip('no GPU')\n@pytest.mark.xfail(reason='bug')\ndef f(): pass")},
    ),
    ("skips_have_reasons", {"tests/a.py": module("@pytest.mark.skip\ndef f(): pass")}, "pytest.mark.skip", {}),
    ("skips_have_reasons", {"tests/a.py": module("x = pytest.mark.skipif(True)")}, "skipif", {}),
    ("skips_have_reasons", {"tests/a.py": module("pytest.importorskip('x')")}, "importorskip", {}),
]


@pytest.mark.parametrize(
    ("name", "bad", "words", "good"), CASES, ids=[f"{case[0]}-{number}" for number, case in enumerate(CASES)]
)
def test_rule(tree, tmp_path, name, bad, words, good):
    rule = getattr(check_tree, name)
    problems = rule(tree(bad))
    assert any(words in problem for problem in problems), problems
    for file in bad:
        (tmp_path / file).unlink()
    if good:
        assert rule(tree(good)) == []


def test_every_rule_is_tested():
    assert {case[0] for case in CASES} == {rule.__name__ for rule in check_tree.RULES}


def test_environment_document_accepts_what_it_makes(tree, tmp_path):
    copy = tree({"accelerator/env.inc": ENV})
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "environment.md").write_text(environment_doc.render(tmp_path))
    assert check_tree.environment_document(copy) == []


def test_an_unknown_rule_is_refused(capsys):
    assert check_tree.main(["no_such_rule"]) == 2
    assert "no_such_rule" in capsys.readouterr().out
