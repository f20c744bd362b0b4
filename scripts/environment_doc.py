"""Makes docs/environment.md from accelerator/env.inc. `--check` only says whether the file is up to date."""

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = "docs/environment.md"


def table(root: Path = ROOT):
    """The entries of env.inc, parsed by the code that the product uses (loaded alone: it must not import torch)."""
    spec = importlib.util.spec_from_file_location("torch_fl_env", ROOT / "torch_fl" / "_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parse((root / "accelerator" / "env.inc").read_text(encoding="utf-8"))


def render(root: Path = ROOT) -> str:
    lines = [
        "# Environment variables",
        "",
        "All that torch_fl reads at run time. Made from `accelerator/env.inc` by `scripts/environment_doc.py`; change",
        "that table, not this file. Variables of the build are in the README.",
        "",
        "| variable | default | meaning |",
        "|---|---|---|",
    ]
    for variable in table(root):
        cells = (f"`{variable.name}`", variable.default or "unset", variable.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the file is not up to date")
    arguments = parser.parse_args()
    document = ROOT / DOCUMENT
    if arguments.check:
        if not document.exists() or document.read_text(encoding="utf-8") != render():
            print(f"{DOCUMENT} is not up to date: run python scripts/environment_doc.py", file=sys.stderr)
            return 1
        return 0
    document.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
