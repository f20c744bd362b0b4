"""Environment variables, read only through the table accelerator/env.inc (C++ uses the same table).

A name that the table lacks is an error, so docs/environment.md, which is made from the table, stays complete.
"""

import difflib
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


class Variable(NamedTuple):
    name: str  # ends in '_' when it is a prefix
    default: str
    meaning: str


# FLAGOS_ENV("NAME", "default", "meaning"): like C++, adjacent strings are one, and a line may break anywhere.
_ENTRY = re.compile(r'^FLAGOS_ENV\(((?:[^()"]|"(?:[^"\\]|\\.)*")*)\)', re.MULTILINE)
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|(,)')


def parse(text: str) -> tuple[Variable, ...]:
    """The entries of a table's text."""
    variables = []
    for entry in _ENTRY.findall(text):
        fields = [""]
        for string, comma in _TOKEN.findall(entry):
            if comma:
                fields.append("")
            else:
                fields[-1] += string.replace('\\"', '"')
        if len(fields) != len(Variable._fields):
            raise ValueError(f"env.inc: expected name, default and meaning in FLAGOS_ENV({entry})")
        variables.append(Variable(*fields))
    return tuple(variables)


@lru_cache(maxsize=1)
def table() -> tuple[Variable, ...]:
    """Every variable, in the order of the file."""
    here = Path(__file__).resolve().parent
    # Installed beside this file; in a working copy it is where C++ includes it from.
    for path in (here / "env.inc", here.parent / "accelerator" / "env.inc"):
        if path.exists():
            return parse(path.read_text(encoding="utf-8"))
    raise FileNotFoundError(f"env.inc is missing beside {__file__}: the installation of torch_fl is incomplete")


def raw(name: str) -> str | None:
    """The variable's value; None when it is unset."""
    if name not in {variable.name for variable in table()}:
        raise KeyError(f"{name} is not in accelerator/env.inc: add it there with its default and meaning")
    return os.environ.get(name)


def set_default(name: str, value: str) -> None:
    """Sets a variable for other libraries of this process, unless the user has set it."""
    if raw(name) is None:
        os.environ[name] = value


def get(name: str) -> str | None:
    """The variable's value; None when it is unset or empty."""
    return raw(name) or None


def flag(name: str) -> bool:
    """A switch: unset, empty, 0 and OFF are false, 1 and ON are true; anything else is an error."""
    value = get(name)
    if value is None or value.upper() in ("0", "OFF"):
        return False
    if value.upper() in ("1", "ON"):
        return True
    raise ValueError(f"{name}={value}: expected 1 or 0")


def with_prefix(prefix: str) -> dict[str, str]:
    """Every set variable that begins with a prefix of the table, without the prefix."""
    if prefix not in {variable.name for variable in table()} or not prefix.endswith("_"):
        raise KeyError(f"{prefix} is not a prefix in accelerator/env.inc")
    return {name[len(prefix) :]: value for name, value in os.environ.items() if name.startswith(prefix) and value}


def misspelt() -> dict[str, str]:
    """Set variables that the table lacks, with the name in it that each is nearly."""
    known = [variable.name for variable in table()]
    prefixes = tuple(name for name in known if name.endswith("_"))
    found = {}
    for name in sorted(os.environ):
        if name.startswith("FLAGOS_") and name not in known and not name.startswith(prefixes):
            for near in difflib.get_close_matches(name, known, 1, 0.8):
                found[name] = near
    return found
