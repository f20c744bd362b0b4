"""The environment table, as Python reads it."""

import pytest

from torch_fl import _env


def test_the_table_has_the_variables_of_the_contract():
    names = {variable.name for variable in _env.table()}
    assert {
        "FLAGOS_ACCELERATOR",
        "FLAGOS_BACKEND_CONFIG",
        "FLAGOS_OP_",
        "FLAGOS_LOG_DISPATCH",
        "FLAGOS_STRICT",
    } <= names


def test_every_entry_has_a_meaning_and_appears_once():
    table = _env.table()
    assert all(variable.meaning for variable in table)
    assert len({variable.name for variable in table}) == len(table)


def test_strings_join_and_lines_may_break():
    text = 'FLAGOS_ENV("A_B", "",\n    "one (two), "\n    "three \\"four\\"")\n// FLAGOS_ENV(comment)\n'
    assert _env.parse(text) == (_env.Variable("A_B", "", 'one (two), three "four"'),)


def test_a_short_entry_is_an_error():
    with pytest.raises(ValueError, match="expected name, default and meaning"):
        _env.parse('FLAGOS_ENV("A", "b")\n')


def test_an_unlisted_name_is_refused():
    with pytest.raises(KeyError, match="FLAGOS_NO_SUCH_THING"):
        _env.get("FLAGOS_NO_SUCH_THING")
    with pytest.raises(KeyError, match="FLAGOS_STRICT"):
        _env.with_prefix("FLAGOS_STRICT")


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("on", True), ("0", False), ("OFF", False), ("", False)])
def test_switches(monkeypatch, value, expected):
    monkeypatch.setenv("FLAGOS_STRICT", value)
    assert _env.flag("FLAGOS_STRICT") is expected


def test_a_switch_refuses_anything_else(monkeypatch):
    monkeypatch.setenv("FLAGOS_STRICT", "maybe")
    with pytest.raises(ValueError, match="FLAGOS_STRICT=maybe: expected 1 or 0"):
        _env.flag("FLAGOS_STRICT")


def test_prefix(monkeypatch):
    monkeypatch.setenv("FLAGOS_OP_mm__out", "cpu")
    assert _env.with_prefix("FLAGOS_OP_")["mm__out"] == "cpu"
