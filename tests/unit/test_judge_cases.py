"""The calls that the judge of FlagGems' kernels makes of written ones: what is changed, that nothing is drawn anew."""

import torch

from tests.common import judge_cases


def by_kind(op):
    found = {}
    for case in judge_cases.cases(op, {}, ["float32", "float16", "int64"]):
        found.setdefault(case.label.split()[-1], case)
    return found


def test_two_tensors_of_one_rank():
    kinds = by_kind("mul.Tensor")
    assert {"special", "mixed", "broadcast", "aliased", "strided", "zero_size"} <= set(kinds)
    assert [tuple(t.shape) for t in kinds["broadcast"].args] == [(4, 5), (1, 5)]
    assert [t.dtype for t in kinds["mixed"].args] == [torch.float32, torch.float16]
    again = by_kind("mul.Tensor")
    assert all(torch.equal(a, b) for a, b in zip(kinds["0"].args, again["0"].args, strict=True))


def test_indices_from_the_end_in_each_type():
    indices = [index for case in judge_cases.cases("index.Tensor", {}, ["float16"]) for index in case.args[1]]
    assert {index.dtype for index in indices if index.numel() and int(index.min()) < 0} == {torch.int64, torch.int32}


def test_the_dtype_of_a_range_follows_from_its_numbers():
    ends = [case.args[0] for case in judge_cases.cases("arange", {}, ["float32"]) if "dtype" not in case.kwargs]
    assert 2.5 in ends and 7 in ends


def test_written_calls_serve_the_overload_that_writes_into_a_tensor():
    sizes = {tuple(case.kwargs["out"].shape) for case in judge_cases.cases("mm.out", {}, ["float32"])}
    results = {tuple(torch.mm(*call).shape) for call, _ in judge_cases._written("mm", torch.float32)}
    assert results | {(0,)} <= sizes  # the last has to be resized
    assert judge_cases._written("round.out", torch.float32) == []


def test_written_calls_take_no_sample_s_place():
    cases = judge_cases.cases("addmm", {"addmm": {"forward": ["addmm"]}}, ["float32"])
    expected = [f"by hand float32 {i}" for i in range(5)] + [f"addmm forward float32 {i}" for i in range(4)]
    assert set(expected) <= {case.label for case in cases}
