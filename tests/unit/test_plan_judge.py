"""The comparison of a replay with the call it was recorded from: own memory, numbers, bytes."""

import torch

from tests.common.plan_judge import after_effects, difference, own_memory_agrees, scaled

A, B, C = 4096, 8192, 12288


def test_own_memory():
    recorded = [(0, A), (1, A), (1, B), (2, C), (3, C)]
    assert own_memory_agrees(recorded, recorded) == ""
    # C begins when A is not used any more, so both may lie in one place; B is still used by nobody later either.
    assert own_memory_agrees([(0, A), (1, A), (1, B), (2, A), (3, A)], recorded) == ""
    assert "one temporary lies in two places" in own_memory_agrees([(0, A), (1, C), (1, B), (2, B), (3, B)], recorded)
    assert "in use lie in one place" in own_memory_agrees([(0, A), (1, A), (1, A), (2, C), (3, C)], recorded)
    assert "expected 5" in own_memory_agrees(recorded[:-1], recorded)


def test_scaled():
    x = torch.ones(2)
    assert scaled(((x, 2, True), {"p": 3}), 2) is None
    args, kwargs = scaled(((x, 0.25, 2), {"eps": 1e-5, "big": float("inf")}), 2.0)
    assert args == (x, 0.5, 2) and kwargs == {"eps": 2e-5, "big": float("inf")}


def test_bytes():
    def row(x):
        return after_effects(x, ())

    x = torch.tensor([1.0, float("nan"), -0.0])
    assert difference(row(x), row(x.clone())) == ""
    assert "1 of 12 bytes differ" in difference(row(x), row(x.abs()))
    assert difference(row(x), row(x.double())) and difference(row(x), row(x[None])) and difference([], row(x))
