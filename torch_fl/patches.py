"""The only place that assigns into torch: a table, each line with its reason and when it can go. At most three lines.

scripts/check_tree.py checks that no other file assigns into torch, and tests/unit/test_check_tree.py that this table
stays short. An entry is (object, attribute, make(original) -> replacement, reason, until).
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Patch(NamedTuple):
    owner: Any
    attribute: str
    make: Callable[[Any], Any]
    reason: str
    until: str


TABLE: list[Patch] = []

MAXIMUM = 3
_applied = False


def apply() -> None:
    """Applies the table once."""
    global _applied
    if _applied:
        return
    if len(TABLE) > MAXIMUM:
        raise RuntimeError(f"patches.py has {len(TABLE)} entries; at most {MAXIMUM} are allowed")
    for patch in TABLE:
        setattr(patch.owner, patch.attribute, patch.make(getattr(patch.owner, patch.attribute)))
    _applied = True
