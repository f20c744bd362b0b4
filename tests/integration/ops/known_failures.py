"""What the op_db sweep is known to fail on, each entry with its cause. An entry that no longer fails is an error.

op: OpInfo's full name (name, or name.variant). dtypes, cases (shell patterns): None means any. chip: the chip on
which it fails, None means every one.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class KnownFailure:
    op: str
    mode: str
    reason: str
    dtypes: tuple[str, ...] | None = None
    cases: tuple[str, ...] | None = None
    chip: str | None = "host"

    def covers(self, op: str, dtype: str, mode: str, case: str, chip: str) -> bool:
        return (
            (op, mode) == (self.op, self.mode)
            and (self.dtypes is None or dtype in self.dtypes)
            and (self.cases is None or any(fnmatchcase(case, pattern) for pattern in self.cases))
            and (self.chip is None or self.chip == chip)
        )


KNOWN_FAILURES: tuple[KnownFailure, ...] = (
    KnownFailure(
        "nn.functional.max_pool1d",
        "forward",
        "torch's max_pool1d asks for is_cpu() and has a kernel with other strides there; CUDA goes our way too",
        cases=("*/transposed",),
        chip=None,
    ),
    KnownFailure(
        "nn.functional.max_pool1d",
        "forward",
        "torch's CPU kernel reads a lazily negated input without negating it; ours gives the right values",
        cases=("*/neg",),
        chip=None,
    ),
)
