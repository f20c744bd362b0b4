"""From outcomes to verdicts: the kernels of FlagGems 5.0.2 that are known to be wrong come out wrong or limited."""

import itertools
import json

import pytest
import torch

from tests.common import judge_limits, judge_run
from tests.common.judge_limits import FLAGS, Outcome, features, verdict
from torch_fl import flaggems

DENSE = list(FLAGS)
# What must not be promised, per operator: a limit that must be there, or "wrong". From kernels of sm_90.
KNOWN_WRONG = {
    "mul.Tensor": {"same_shape", "same_dtype", "contiguous"},
    "fill_.Scalar": {"contiguous"},
    "zero_": {"contiguous"},
    "zero": "wrong",
    "sqrt": {"contiguous"},
    "cat": {"several"},
    "sum": {"-int8", "-int16", "-int32"},
    "sum.dim_IntList": {"-int8", "-int16", "-int32"},
    "_softmax_backward_data": {"contiguous"},
    "_log_softmax_backward_data": {"contiguous"},
    "index.Tensor": "wrong",
    "eq.Tensor": {"-int64", "-float64"},
    "arange": "wrong",
}


def case(state="passed", dtypes=("float32",), without=(), numel=64, message="values differ", label="a case", **fields):
    flags = [flag for flag in DENSE if flag not in without]
    return Outcome(label, state, list(dtypes), flags, numel, "" if state == "passed" else message, **fields)


def dense(*dtypes, count=4):
    return [case(dtypes=[d]) for d in dtypes for _ in range(count)]


def loose(*dtypes):
    """Passing cases that need none of the limits which hold for what no case tried."""
    return [case(dtypes=[d], without=[flag]) for d in dtypes for flag in judge_limits.TRIED]


RECORDED = {
    "mul.Tensor": [
        *dense("float32", "float16"),
        case("failed", without=["same_shape"]),
        case("failed", without=["contiguous"], message="result: strides are (1, 4), expected (4, 1)"),
        case("failed", dtypes=["float32", "float16"], without=["same_dtype"]),
    ],
    "fill_.Scalar": [*dense("float32", "int64"), case("failed", without=["contiguous"])],
    "zero_": [*dense("float32", "int64"), case("failed", without=["contiguous"])],
    "zero": [case("failed", message="memory of argument 0 after the call: values differ") for _ in range(8)],
    "sqrt": [*dense("float32"), case("failed", without=["contiguous"]), case("failed", dtypes=["int64"])],
    "cat": [*dense("float32"), case("failed", without=["several"]), case("failed", without=["nonempty"])],
    "sum": [
        *dense("float32", "int64"),
        *(case("failed", dtypes=[d], message="dtype is") for d in ("int8", "int16", "int32")),
    ],
    "sum.dim_IntList": [
        *dense("float32", "int64"),
        *(case("failed", dtypes=[d], message="dtype is") for d in ("int8", "int16", "int32")),
    ],
    "_softmax_backward_data": [*dense("float32"), case("failed", without=["contiguous"])],
    "_log_softmax_backward_data": [*dense("float32"), case("failed", without=["contiguous"])],
    "index.Tensor": [*dense("float32"), *(case("failed") for _ in range(3))],
    "eq.Tensor": [*dense("float32", "bool"), *(case("failed", dtypes=[d]) for d in ("int64", "float64"))],
    "arange": [*(case(dtypes=[], numel=0) for _ in range(4)), case("failed", dtypes=[], numel=0)],
}


def keeps_promise(entry: dict, known) -> bool:
    """Whether the verdict does not promise what is known to be wrong."""
    if entry["verdict"] != "right":
        return True
    limits = entry.get("limits", {})
    if known == "wrong":
        return False
    return all(
        limit[1:] not in limits.get("dtypes", [limit[1:]]) if limit.startswith("-") else limits.get(limit, False)
        for limit in known
    )


@pytest.mark.parametrize("op", sorted(KNOWN_WRONG))
def test_what_is_known_to_be_wrong(op):
    entry = verdict(RECORDED[op])
    assert keeps_promise(entry, KNOWN_WRONG[op]), entry
    assert entry["verdict"] == ("wrong" if KNOWN_WRONG[op] == "wrong" else "right"), entry
    assert entry["why"] and entry["reproducer"]


def test_a_verdict_that_promises_too_much_is_noticed():
    assert not keeps_promise({"verdict": "right", "limits": {"dtypes": ["float32"]}}, {"contiguous"})
    assert not keeps_promise({"verdict": "right", "limits": {"dtypes": ["int8"]}}, {"-int8"})
    assert not keeps_promise({"verdict": "right"}, {"-int8"}) and not keeps_promise({"verdict": "right"}, "wrong")


def test_the_shipped_verdicts():
    """Those of the GPU that the known ones are from."""
    path = flaggems.FOLDER / "verdicts_5.0.2_cuda_sm90.json"
    if not path.exists():
        pytest.skip("no verdicts of an sm_90 GPU are in the package yet")
    data = json.loads(path.read_text())
    wrong = {op: data["ops"][op] for op, known in KNOWN_WRONG.items() if not keeps_promise(data["ops"][op], known)}
    assert not wrong
    assert data["device"] and data["date"] and data["tolerances"]
    assert all(entry["verdict"] == "right" or entry["why"] for entry in data["ops"].values())


def test_no_limit_without_a_failure():
    entry = verdict([*dense("float32", "int64"), *loose("float32"), case(without=["contiguous", "same_shape"])])
    assert entry == {"verdict": "right", "limits": {"dtypes": ["float32", "int64"]}, "cases": 13, "passed": 13}


def test_what_no_case_tried_is_not_promised():
    limits = verdict([*dense("float32"), case(without=["nonscalar"])])["limits"]
    assert limits == {"dtypes": ["float32"], "contiguous": True, "nonempty": True}
    failed = case("failed", without=["same_shape"])
    assert verdict([*dense("float32"), case(without=["contiguous"]), failed])["limits"] == {
        "dtypes": ["float32"], "same_shape": True, "unexpanded": True, "nonempty": True, "nonscalar": True
    }  # fmt: skip
    expanded = case("failed", without=["contiguous", "unexpanded"])  # where a transposed tensor passes
    passed = [o for o in loose("float32") if "unexpanded" in o.flags]
    assert verdict([*dense("float32"), *passed, expanded])["limits"] == {"dtypes": ["float32"], "unexpanded": True}
    assert "limits" not in verdict([case(dtypes=[]) for _ in range(3)])  # no tensors


def test_a_layout_is_to_blame_where_the_dtype_passes_without_it():
    """Other dtypes that it was not tried with are no way out, but those that pass with it are."""
    broadcast = case("failed", without=["same_shape"], label="x float32 0 broadcast")
    numbers = [case(dtypes=[d], without=["same_shape"], label=f"x {d} 1") for d in ("int64", "int32", "int8") * 2]
    entry = verdict([*dense("float32"), *loose("float32"), *numbers, broadcast])
    assert entry["limits"] == {"dtypes": ["float32"], "same_shape": True}
    tried = [case(dtypes=[d], without=["same_shape"], label=f"x {d} 0 broadcast") for d in ("int64", "int32", "int8")]
    entry = verdict([*dense("float32"), *loose("int64"), *numbers, broadcast, *tried])
    assert entry["limits"] == {"dtypes": ["int32", "int64", "int8"]}


def test_the_smallest_limits_that_keep_most():
    """One dtype is to blame, not the layout that its case happens to have."""
    failed = [case("failed", dtypes=["float64"], without=["contiguous"]), case("failed", dtypes=["float64"])]
    strided = [case(without=["contiguous"]) for _ in range(5)]
    assert verdict([*dense("float32"), *loose("float32"), *strided, *failed])["limits"] == {"dtypes": ["float32"]}


def test_a_size_is_a_limit_only_when_nothing_else_is():
    large = case("failed", numel=1 << 20)
    limits = verdict([*dense("float32"), *loose("float32"), large])["limits"]
    assert limits == {"dtypes": ["float32"], "max_numel": (1 << 20) - 1}


def test_a_start_elsewhere_is_to_blame_only_where_the_kernel_says_so():
    """Tensors with strides begin elsewhere, too, so that the limit would keep out failures of another kind."""
    strided = case("failed", without=["contiguous", "aligned"])
    passed = [*dense("float32"), *loose("float32")]
    assert verdict([*passed, strided])["limits"] == {"dtypes": ["float32"], "contiguous": True}
    said = case("failed", without=["aligned"], message="raises AssertionError: base must be 16-byte aligned")
    assert verdict([*passed, said])["limits"] == {"dtypes": ["float32"], "aligned": True}


def test_two_arguments_that_must_have_their_defaults():
    passed = [*dense("float32"), *loose("float32"), *(case(changed=["a"], label=str(i)) for i in range(3))]
    failed = [case("failed", changed=[name, "a"]) for name in ("b", "c")]
    assert verdict([*passed, *failed])["limits"] == {"dtypes": ["float32"], "defaults": ["b", "c"]}


def test_no_case_fails_within_the_limits():
    """Whatever the outcomes are."""
    generator = torch.Generator().manual_seed(3)

    def pick(n):
        return int(torch.randint(n, (), generator=generator))

    dtypes = ["float32", "int64", "bool"]
    for _ in range(150):
        outcomes = [
            case("passed" if pick(4) else "failed", [dtypes[pick(3)]], [f for f in FLAGS if not pick(4)], 1 << pick(14))
            for _ in range(12)
        ]
        entry = verdict(outcomes)
        limits = entry.get("limits", {})
        if entry["verdict"] != "right":
            continue
        inside = [
            o
            for o in outcomes
            if set(o.dtypes) <= set(limits["dtypes"])
            and all(flag in o.flags for flag in FLAGS if limits.get(flag))
            and o.numel <= limits.get("max_numel", 1 << 62)
        ]
        assert len(inside) >= judge_limits.ENOUGH and all(o.state == "passed" for o in inside), (outcomes, limits)


def test_unjudged_says_why():
    assert verdict([]) == {"verdict": "unjudged", "why": "not judged: no sample reaches it"}
    assert verdict([], "it hangs")["why"] == "not judged: it hangs"
    assert "only 2 cases" in verdict(dense("float32", count=2), "20 s were over")["why"]
    limited = [case("limitation", message="Triton's interpreter: raises")]
    assert verdict(limited)["why"] == "not judged here: Triton's interpreter: raises"


def test_features():
    x = torch.ones(3, 4)
    assert set(features([x])["flags"]) == set(FLAGS) - {"several"}
    assert features([x, x.t()])["flags"] == ["unexpanded", "nonempty", "nonscalar", "aligned", "same_dtype", "several"]
    assert "unexpanded" not in features([x, torch.ones(1, 4).expand(3, 4)])["flags"]
    assert "aligned" not in features([torch.ones(5)[1:]])["flags"]
    assert "unexpanded" in features([torch.ones(1).as_strided((1, 1), (0, 0))])["flags"]
    assert features([x, torch.ones((), dtype=torch.int64)], [torch.bool]) == {
        "dtypes": ["bool", "float32", "int64"], "flags": ["contiguous", "unexpanded", "nonempty", "aligned", "several"],
        "numel": 12,
    }  # fmt: skip
    for flags in itertools.combinations(FLAGS, 2):
        assert set(flags) <= set(FLAGS)


def test_the_document_names_every_limit():
    text = (flaggems.FOLDER.parents[1] / "docs/flaggems.md").read_text()
    assert [name for name in (*FLAGS, "dtypes", "max_numel") if f"`{name}`" not in text] == []


def test_differences():
    old = {"flaggems": "5.0.2", "chip": "cuda", "arch": "sm90", "ops": {"a": {"verdict": "right"}, "b": {}}}
    new = {**old, "ops": {"a": {"verdict": "wrong", "why": "values differ"}, "b": {}}}
    assert judge_limits.differences(old, old, "ab") == []
    assert judge_limits.differences(old, new, "ab") == ["a: wrong {}, was right {}; values differ"]
    assert judge_limits.differences(old, {**old, "arch": "sm80"}, "ab") == ["arch: sm80, was sm90"]


def test_arguments_that_must_have_their_default():
    """A kernel that refuses one value of an argument serves every dtype without it."""
    cases = [*dense("float32"), *loose("float16"), case("failed", message="raises AssertionError", changed=["sparse"])]
    cases += [case(changed=["padding_idx"]), case("failed", dtypes=["float16"], changed=["padding_idx", "sparse"])]
    entry = verdict(cases)
    assert entry["limits"] == {"dtypes": ["float16", "float32"], "defaults": ["sparse"]}, entry
    assert entry["passed"] == 9


def test_changed_arguments():
    x, index = torch.ones(4, 3), torch.tensor([1, 2])
    assert judge_run.changed("embedding", ((x, index, -1, False, True), {})) == ["sparse"]
    assert judge_run.changed("embedding", ((x, index), {})) == []
    assert judge_run.changed("add.Tensor", ((x, x), {"alpha": 2})) == ["alpha"]
    assert judge_run.changed("mean.dim", ((x, [0]), {"keepdim": False, "dtype": torch.float64})) == ["dtype"]


def test_a_dtype_is_not_to_blame_for_values_that_no_other_one_had():
    cases = [
        *dense("float32"),
        *loose("float16"),
        case("failed", label="x float32 0 negative"),
        case(label="x float32 1 special"),
    ]
    assert verdict(cases)["verdict"] == "wrong"
    other = verdict([*cases, case(dtypes=["float16"], label="x float16 0 negative")])
    assert other["verdict"] == "right" and other["limits"] == {"dtypes": ["float16"]}


def test_reading_beyond_an_empty_tensor_is_no_dtype_s_fault():
    crash = case("failed", dtypes=["int8"], without=["nonempty"], message="CUDA error: an illegal memory access was")
    lucky = [case(dtypes=["float32"], without=["nonempty"])] * 5
    entry = verdict([*dense("float32"), *loose("float32"), *lucky, crash])
    assert entry["limits"] == {"dtypes": ["float32"], "nonempty": True}
