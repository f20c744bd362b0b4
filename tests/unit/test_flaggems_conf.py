"""backends_flagos_py.conf is what scripts/flaggems_conf.py makes of the verdicts in the package."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("flaggems_conf", ROOT / "scripts/flaggems_conf.py")
flaggems_conf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flaggems_conf)


def verdicts(folder, name, **ops):
    path = folder / f"verdicts_5.0.2_cuda_{name}.json"
    entries = {op.replace("__", "."): {"verdict": verdict} for op, verdict in ops.items()}
    path.write_text(json.dumps({"flaggems": "5.0.2", "device": f"GPU {name}", "ops": entries}))


def lines(text):
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_the_shipped_conf():
    assert flaggems_conf.CONF.read_text() == flaggems_conf.text(flaggems_conf.verdict_files())


def test_only_what_is_right_everywhere(tmp_path):
    assert lines(flaggems_conf.text([])) == []
    verdicts(tmp_path, "sm90", add__Tensor="right", silu="right", neg="wrong", mm="unjudged")
    text = flaggems_conf.text(flaggems_conf.verdict_files(tmp_path))
    assert lines(text) == ["add.Tensor = flagos_python", "silu = flagos_python"] and "GPU sm90" in text
    verdicts(tmp_path, "sm80", add__Tensor="wrong", silu="right")
    assert lines(flaggems_conf.text(flaggems_conf.verdict_files(tmp_path))) == ["silu = flagos_python"]
