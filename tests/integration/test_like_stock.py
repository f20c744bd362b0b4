"""flagos on a chip that is CUDA does what cuda does, case by case: launches, results, versions, errors.

On the null CUDA, so without a GPU: tests/common/stock_checks.py runs once as cuda and once as flagos.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.common import null_cuda
from tests.common.process import check_python

ROOT = Path(__file__).resolve().parents[2]
CHECKS = ROOT / "tests/common/stock_checks.py"

# What flagos does otherwise, and why.
BETTER = {
    r"ctc_loss mean cpu \w+ torch.int32 3": "torch divides by lengths on the CPU there, and fails",
    r"lazy_copy (?!plain plain).* to (host|device) .*": "torch loses lazy bits between host and device (copy.cc)",
    r"lazy_move (conj|neg|both) (cpu|to|tolist|pinned)": "torch loses lazy bits between host and device (copy.cc)",
}
# Lines of the log that torch could do without: they count on neither side.
NEEDLESS = {
    r"ctc_loss \w+ (\w+ device|device cpu) .*": (
        r"copy \d+ bytes 0->-2 ",
        "torch asks MIOpen with copies of targets and lengths",
    ),
}
# Where only the calls of cuDNN count.
OTHER_CASTS = {
    r"recurrent_with autocast": "torch copies all weights into a buffer of half precision, flagos casts one by one",
}


def run(device):
    environment = null_cuda.environment() | {"PYTHONPATH": str(ROOT)}
    if device == "cuda":
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    code = f"import runpy, sys; sys.argv[1:] = [{device!r}]; runpy.run_path({str(CHECKS)!r}, run_name='__main__')"
    return json.loads(check_python(code, timeout=600, **environment).splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    why = null_cuda.missing()
    if why:
        pytest.skip(f"no null CUDA: {why}")
    null_cuda.build()
    with ThreadPoolExecutor() as pool:
        return dict(zip(("cuda", "flagos"), pool.map(run, ("cuda", "flagos")), strict=True))


def in_flagos_words(text):
    text = re.sub(r"\bcuda\b(?!\.(?!\w*Tensor))", "flagos", text)
    return re.sub(r"\bCUDA(?=\w+Type)", "flagos", text)


def first_difference(expected, here):
    for key in sorted(expected.keys() | here.keys()):
        a, b = expected.get(key), here.get(key)
        if key == "log" and a is not None and b is not None:
            a, b = next(((x, y) for x, y in zip(a, b, strict=False) if x != y), (len(a), len(b)))
        if a != b:
            return f"{key}\n  cuda   {str(a)[:400]}\n  flagos {str(b)[:400]}"
    return ""


def groups():
    return re.findall(r"^@case\(.*?^def (\w+)\(", CHECKS.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("group", groups())
def test_like_cuda(group, found):
    stock, ours = found["cuda"], found["flagos"]
    names = [name for name in stock if name.split(" ")[0] == group]
    assert names
    differences = []
    for name in names:
        expected, here = stock[name], ours[name]
        if "error" in expected:
            expected = expected | {"error": [expected["error"][0], in_flagos_words(expected["error"][1])]}
        if "error" in here:  # torch has two names for a tensor's type, one of them where a device says cuda
            kind = re.sub(r"\bflagos(\w+)Type\b", r"torch.flagos.\1Tensor", here["error"][1])
            here = here | {"error": [here["error"][0], kind]}
        lines = {pattern: line for pattern, (line, _) in NEEDLESS.items()}
        for pattern, line in [*lines.items(), *dict.fromkeys(OTHER_CASTS, "(?!cudnn)").items()]:
            if re.fullmatch(pattern, name):
                expected, here = (
                    x | {"log": [entry for entry in x.get("log", []) if not re.match(line, entry)]}
                    for x in (expected, here)
                )
        if here != expected and not any(re.fullmatch(pattern, name) for pattern in BETTER):
            differences.append(f"{name}: {first_difference(expected, here)}")
    assert not differences, f"{len(differences)} of {len(names)}\n" + "\n".join(differences[:5])


def test_other_library_on_the_cpu_fallback():
    """An operator without a CUDA kernel, which cuda refuses: flagos copies, counts changes, refuses mixed devices."""
    why = null_cuda.missing()
    if why:
        pytest.skip(f"no null CUDA: {why}")
    code = """
        import torch, warnings
        warnings.simplefilter("ignore")
        library = torch.library.Library("fallback_checks", "DEF")
        library.define("lists(Tensor[] xs) -> Tensor[]")
        library.define("change_(Tensor(a!)[] xs) -> ()")
        library.impl("lists", lambda xs: [x + 1 for x in xs], "CPU")
        library.impl("change_", lambda xs: [x.add_(1) for x in xs] and None, "CPU")
        x = torch.ones(3, device="flagos")
        assert len(torch.ops.fallback_checks.lists([x, torch.tensor(1.0)])) == 2
        torch.ops.fallback_checks.change_([x])
        assert x._version == 1, x._version
        try:
            torch.ops.fallback_checks.lists([x, torch.ones(2)])
        except RuntimeError as error:
            print(error)
    """
    said = check_python(code, **null_cuda.environment())
    assert "at least two devices, flagos:0 and cpu! (when checking arguments of fallback_checks::lists)" in said
