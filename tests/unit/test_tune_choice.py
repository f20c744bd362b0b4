"""From measurements to routes: the rules of torch_fl/tuning/choose.py, without a device."""

import pytest

from torch_fl.tuning import choose, trial
from torch_fl.tuning.choose import Row, decide, portable
from torch_fl.tuning.measure import Clock, noise_of


def row(host=1.0, device=1.0, *, low=64, dtype="float32", calls=10, noise=0.02, backend="flagos_python", **more):
    clocks = {backend: (Clock(host, noise), Clock(device, noise))}
    high = 8 * low - 1 if low else 0
    values = {"native": "cuda", "default": "flagos_python", "host": 1e-5, "device": 1e-5, "clocks": clocks, **more}
    return Row("silu", dtype, low, high, calls, **values)


def lines(rows, clock="both"):
    return decide(rows, clock).lines


FLAGGEMS, NATIVE = [("flagos_python", "")], [("native", "")]


@pytest.mark.parametrize(
    ("host", "device", "expected"),
    [
        (0.5, 0.5, FLAGGEMS),
        (1.0, 0.5, FLAGGEMS),  # as fast on one clock, faster on the other
        (1.01, 0.9, FLAGGEMS),  # slower by less than the noise
        (1.1, 0.5, NATIVE),  # a gain on the device that the host pays for
        (0.5, 1.1, NATIVE),
        (0.99, 0.99, NATIVE),  # within the noise
        (2.0, 2.0, NATIVE),
    ],
)
def test_one_group(host, device, expected):
    assert lines([row(host, device)]) == expected


def test_one_clock_alone():
    assert lines([row(1.5, 0.5)], "device") == FLAGGEMS and lines([row(1.5, 0.5)], "host") == NATIVE
    assert lines([row(0.5, 1.5)], "host") == FLAGGEMS


def test_noise_keeps_native():
    assert lines([row(0.8, 0.8, noise=0.05)]) == FLAGGEMS and lines([row(0.8, 0.8, noise=0.3)]) == NATIVE


def test_no_line_where_native_is_the_default():
    assert lines([row(2, 2, default="cuda")]) == []
    assert lines([row(0.5, 0.5, default="cuda")]) == FLAGGEMS


def test_sizes():
    small, middle, large = row(3, 3, low=8), row(0.5, 0.5, low=64), row(0.4, 0.4, low=512)
    assert lines([large, small, middle]) == [("flagos_python", "dtype=float32 numel>=64"), *NATIVE]
    assert lines([row(0.5, 0.5, low=8), row(3, 3, low=64)]) == [
        ("flagos_python", "dtype=float32 numel>=8 numel<=63"),
        *NATIVE,
    ]
    hole = [row(0.5, 0.5, low=8), row(3, 3, low=64), row(0.5, 0.5, low=512)]
    assert [c for _, c in lines(hole)] == ["dtype=float32 numel>=8 numel<=63", "dtype=float32 numel>=512", ""]


def test_dtypes():
    assert lines([row(0.5, 0.5), row(3, 3, dtype="float16")]) == [("flagos_python", "dtype=float32"), *NATIVE]


def test_conditions_have_their_price():
    """A route with conditions makes the native calls slower; when that costs more than it gains, there is none."""
    assert len(lines([row(0.5, 0.5), row(3, 3, low=512, passing=1.05)])) == 2
    assert lines([row(0.5, 0.5, calls=1), row(3, 3, low=512, calls=1000, passing=1.3)]) == NATIVE
    assert lines([row(0.5, 0.5), row(3, 3, low=512, passing=float("inf"))]) == NATIVE


def test_two_backends_may_share_an_operator():
    first, second = row(0.5, 0.5, low=8, backend="flagos"), row(0.5, 0.5, low=64)
    assert sorted(lines([first, second])) == [
        ("flagos", "dtype=float32 numel>=8 numel<=63"),
        ("flagos_python", "dtype=float32 numel>=64"),
        ("native", ""),
    ]


def test_one_wrong_result_is_enough():
    assert lines([row(0.1, 0.1), row(0.1, 0.1, low=512, wrong=["flagos_python"], clocks={})]) == NATIVE


def test_nothing_measured():
    decision = decide([row(0.1, 0.1, why="no time", clocks={})], "both")
    assert decision.lines == NATIVE and decision.why == "no time"


def test_refused_in_one_group():
    limited = [row(0.5, 0.5), row(clocks={}, dtype="float64", refused={"flagos_python": "outside its limits"})]
    assert lines(limited) == [("flagos_python", "dtype=float32"), *NATIVE]


def test_factories_have_neither_dtype_nor_size():
    assert lines([row(0.5, 0.5, low=0, dtype="")]) == FLAGGEMS


def test_portable_lines_name_no_flaggems():
    assert portable([row(0.5, 0.5)], "both") is None and portable([row(2, 2)], "both") == "native"
    assert portable([row(2, 2, default="cuda")], "both") is None
    assert portable([row(0.5, 0.5, backend="flagos")], "both") == "native"  # the default would be another
    assert portable([row(why="no time", clocks={})], "both") == "native"
    assert portable([row(0.5, 0.5), row(0.5, 1.02, low=512)], "both") is None
    assert portable([row(0.5, 0.5), row(0.5, 1.5, low=512)], "both") == "native"  # another workload's calls
    assert portable([row(0.1, 0.1), row(0.1, 0.1, low=512, wrong=["flagos_python"])], "both") == "native"


def test_rows_survive_json():
    one = row(0.5, 0.7, refused={"flagos": "absent"})
    assert Row.from_dict(one.as_dict()) == one and choose.winner(Row.from_dict(one.as_dict()), "both")


def test_noise_is_the_spread_of_native_against_itself():
    assert noise_of([1.0] * 9) == 0.02  # never below what clocks resolve
    assert noise_of([1.1, 1 / 1.1, 1.0, 1.05, 1.0]) == pytest.approx(0.1)
    assert noise_of([1.0] * 9 + [3.0]) == 0.02  # one in ten may be an accident


def test_a_workload_that_gains_nothing_stays_native():
    rows = [row(0.1, 0.1)]
    assert lines(rows, "native") == NATIVE and lines([row(0.1, 0.1, default="cuda")], "native") == []
    assert "no gain" in decide(rows, "native").why


@pytest.mark.parametrize(("rounds", "low", "high"), [(6, 1, 6), (9, 2, 8), (25, 8, 18), (100, 40, 61)])
def test_the_interval_of_a_median(rounds, low, high):
    """The ranks in tables of the sign test."""
    found = trial.speed(reversed(range(1, rounds + 1)))
    assert (found.low, found.high) == (low, high) and found.low <= found.ratio <= found.high


def test_the_fastest_set_that_is_slower_in_no_part():
    def part(ratio, apart=0.05):
        return trial.Speed(ratio, ratio - apart, ratio + apart)

    fast, mixed, unsure = [part(1.1), part(1.0)], [part(1.5), part(0.9)], [part(1.3, 0.4), part(1.0)]
    assert trial.pick({"host": fast, "both": [part(1.08), part(1.01)], "device": mixed}) == "host"
    assert trial.pick({"device": mixed}) == "native", "it takes from one part what it gives to another"
    assert trial.pick({"both": unsure}) == "native", "nothing is proven"
    assert trial.pick({"both": [part(1.5), part(0.96)]}) == "native", "slower by more than the noise, if not surely"
    assert trial.pick({}) == "native"


def test_too_few_rounds_say_nothing():
    def found(rounds):
        return {"native": [[2.0] * rounds], "host": [[1.0] * rounds]}

    assert trial.speeds(found(trial.LEAST_ROUNDS - 1)) == {}
    assert trial.speeds(found(trial.LEAST_ROUNDS)) == {"host": [trial.Speed(2.0, 2.0, 2.0)]}
