"""What is known about FlagGems' Python kernels: which there are, which are right, within which limits. Data, no code.

`ops_VERSION.txt` lists the operators of a version, one per line.

`verdicts_VERSION_CHIP[_ARCHITECTURE].json` says what scripts/judge_flaggems.py found there:

    {"flaggems": "5.0.2", "chip": "cuda", "arch": "sm90", "device": "the device it was found on", "torch": "2.11.0",
     "ops": {"silu":  {"verdict": "right"},
             "zero_": {"verdict": "right", "limits": {"contiguous": true}, "why": "writes from data_ptr on"},
             "cat":   {"verdict": "wrong", "why": "one tensor comes back itself", "reproducer": "torch.cat([x])"}}}

A right kernel may serve by default; within its limits, when it has some, and other calls go to the next backend. A
wrong one, and one without a verdict, serves only when it is asked for by name. Limits: dtypes (names), max_numel,
contiguous, unexpanded (no stride of 0 in a dimension of several elements), aligned (elements start on 16 bytes),
nonempty, nonscalar (no tensor without dimensions), same_shape, same_dtype, several (tensors, not one), defaults (names
of arguments that must have their default).
"""

import json
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
NEWEST = "5.0.2"
# FLAGGEMS_DB_URL for what its tuners find: gone with the process, and one for all of its threads; with "sqlite://" each
# would have another database, without the tables that the first one made.
PRIVATE_TUNING = "sqlite:///file:flaggems?mode=memory&cache=shared&uri=true"
VERDICTS = ("right", "wrong", "unjudged", "unusable")


# FlagGems' name -> torch's, where FlagGems leaves an overload out that torch has.
RENAMED = {name: f"{name}.Tensor" for name in ("bitwise_left_shift", "bitwise_right_shift", "copysign")}

# Operators of FlagGems that no route can send anywhere, and why.
NO_ROUTE = {
    "copy_": "copies are torch_fl's own, because they also go between devices",
    "max_pool2d_backward": "torch calls it on no chip of ours; the gradient is max_pool2d_with_indices_backward's",
}


class Judgement(NamedTuple):
    verdict: str  # one of VERDICTS
    why: str
    limits: dict


def operators(version: str | None) -> list[str]:
    """The operators of a FlagGems version, by torch's names; of the newest known one when this version's list is
    missing."""
    path = FOLDER / f"ops_{version}.txt"
    if not path.exists():
        path = FOLDER / f"ops_{NEWEST}.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [RENAMED.get(line, line) for line in lines if line and not line.startswith("#")]


def architecture(chip: str) -> str:
    """What verdicts depend on besides the chip: sm_90 brings kernels of its own, for example."""
    if chip == "cuda":
        from torch_fl import _cuda

        capability = _cuda.capability()
        return f"sm{capability[0]}{capability[1]}" if capability else ""
    return ""


def verdict_file(version: str | None, chip: str) -> Path:
    """Where the verdicts for this machine are, or would be."""
    return FOLDER / ("_".join(filter(None, ("verdicts", version, chip, architecture(chip)))) + ".json")


def judgements(version: str | None, chip: str, path: str | Path | None = None) -> dict[str, Judgement]:
    """The verdicts for a version and chip, or those of the file `path`; none when nobody has judged them."""
    path = Path(path) if path else verdict_file(version, chip)
    if not path.exists():
        return {}
    found = {}
    for op, entry in json.loads(path.read_text(encoding="utf-8"))["ops"].items():
        if entry.get("verdict") not in VERDICTS:
            raise ValueError(f"{path}: {op}: verdict {entry.get('verdict')!r}; expected one of {', '.join(VERDICTS)}")
        found[op] = Judgement(entry["verdict"], entry.get("why", ""), entry.get("limits", {}))
    return found
