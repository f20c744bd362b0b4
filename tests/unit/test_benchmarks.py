"""The judgement of the benchmarks: what a result file says when the devices differ, fail or run out of time."""

import argparse
import json
import os
import subprocess
import sys

import make_backends_conf
import pytest

import torch_fl
from benchmarks import common, dispatch, instructions, memory, qwen3, threads, tuned


def speed(device, value, tokens=(1, 2, 3)):
    return {"device": device, "tokens_per_second": value, "tokens": list(tokens)}


def start(device, losses=("0x1.0p+0",), peak=1000):
    return {"device": device, "losses": list(losses), "peak_allocated": peak}


def turns(cuda, flagos):
    return [[qwen3.merge_train([{"seconds": ms / 1e3}] * 2) for ms in (cuda, flagos)]]


def test_ratio_is_the_median_of_pairs():
    # One side slows down together with the other: the ratio of medians would be far off.
    r = common.ratio([(10, 11), (100, 110), (1, 1.1)])
    assert r["ratio"] == 1.1 and r["pairs"] == 3 and r["first"] == 10


def test_other_tokens_are_seen():
    same = qwen3.judge_speeds([[speed("cuda", 10), speed("flagos", 12)]])
    assert same["tokens_equal"] and same["tokens_per_second"]["ratio"] == 1.2 and not same["errors"]
    assert not qwen3.judge_speeds([[speed("cuda", 10), speed("flagos", 12, (1, 2, 4))]])["tokens_equal"]


def test_other_losses_are_seen():
    good = qwen3.judge_train(turns(11.0, 5.0), [[start("cuda"), start("flagos", peak=1010)]])
    assert good["losses_bit_equal"] and good["peak_allocated"]["ratio"] == 1.01
    assert good["steps_per_second"]["ratio"] == 2.2 and good["ms_per_step"] == [11.0, 5.0]
    other = [[start("cuda"), start("flagos", losses=["0x1.1p+0"])]]
    assert not qwen3.judge_train(turns(1.0, 1.0), other)["losses_bit_equal"]


def test_graphs_are_compared_with_eager_decoding_and_with_the_roofline():
    start = {"tokens": [1] * (qwen3.PROMPT + 8), "graph": True, "fused_norms": 9}
    starts = [[start | {"as_eager": 8}, start | {"as_eager": 7}], [start, start]]  # the first generation compares
    pairs = [[{"tokens_per_second": 500.0}, {"tokens_per_second": 600.0}]]
    eager = qwen3.judge_speeds([[speed("cuda", 40), speed("flagos", 50)]])
    result = qwen3.judge_graph(pairs, starts, {"device": "flagos", "tokens_per_second": 1000.0}, eager)
    assert (result["times_eager"], result["share_of_roofline"], result["graph"]) == (12.0, 0.6, [True, True])
    assert result["tokens_equal"] and not result["errors"]
    assert (result["fused_norms"], result["leading_tokens_as_eager"], result["tokens_compared"]) == ([9, 9], [8, 7], 8)
    assert qwen3.judge_graph(pairs, starts, {"error": "no bandwidth"}, eager)["errors"] == ["no bandwidth"]


def test_a_failed_worker_is_reported_and_not_counted():
    pairs = [
        [speed("cuda", 10), {"device": "flagos", "error": "exit code 1"}],
        [speed("cuda", 10), speed("flagos", 9)],
    ]
    result = qwen3.judge_speeds(pairs)
    assert result["errors"] == ["exit code 1"] and result["tokens_per_second"]["pairs"] == 1
    assert "tokens_per_second" not in qwen3.judge_speeds(pairs[:1])


SCRIPT = """
import os, sys, time
sys.path.append({root!r})
from benchmarks import common

class Work:
    def add(self, a, b):
        print("noise")
        return {{"sum": a + b, "loaded": "torch_fl" in sys.modules, "arguments": sys.argv[1:]}}
    def fail(self):
        raise ValueError("no kernel")
    def sleep(self):
        time.sleep(60)

import torch
common.serve(Work())
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(SCRIPT.format(root=str(common.ROOT)))
    return str(path)


def test_workers_take_turns_and_do_not_load_torch_fl_for_stock(script):
    budget = common.Budget(120)
    with common.workers(script, ["last"], ["cpu", "cuda"]) as pair:
        assert [one["sum"] for one in common.both(pair, "add", budget, a=1, b=2)] == [3, 3]
        pairs = common.alternate(pair, "add", 3, budget, budget, a=2, b=2)
    assert [[(one["device"], one["sum"]) for one in p] for p in pairs] == [[("cpu", 4), ("cuda", 4)]] * 3
    with common.workers(script, [], ["cpu", "cpu"]) as pair:
        merged = common.alternate(pair, "add", 2, budget, budget, 3, lambda turns: {"turns": len(turns)}, a=1, b=1)
        failed = common.alternate(pair, "fail", 2, budget, budget, 3, lambda turns: {"turns": len(turns)})
    assert merged == [[{"turns": 3}] * 2] * 2
    assert len(failed) == 1 and all("no kernel" in one["error"] for one in failed[0])
    assert not pairs[0][1]["loaded"] and pairs[0][1]["arguments"] == ["--worker", "--device", "cuda", "last"]


def test_a_worker_that_fails_or_is_late_is_an_error_from_then_on(script):
    with common.workers(script, [], ["cpu", "cpu"]) as (first, second):
        bad = first.ask("fail", common.Budget(120))
        assert "exit code 1" in bad["error"] and "no kernel" in bad["error"]
        assert first.ask("add", common.Budget(120), a=1, b=1) == bad
        second.ask("add", common.Budget(120), a=1, b=1)
        assert "time limit" in second.ask("sleep", common.Budget(0.5))["error"]
        assert common.alternate([first, second], "add", 5, common.Budget(9), common.Budget(9), a=1, b=1) == [
            [bad, second.answer(common.Budget(1))]
        ]


def test_generations_are_told_apart():
    pairs = [[speed("cuda", 10), speed("flagos", value)] for value in (12, 12, 8, 8)]
    for number, pair in enumerate(pairs):
        pair[0]["process"] = 100 + number // 2
    assert qwen3.judge_speeds(pairs)["generations"] == [1.2, 0.8]


def test_workers_share_the_cores_they_are_given(script):
    with common.workers(script, [], ["cpu", "cpu"], cores=1) as pair:
        assert pair[0].ask("add", common.Budget(120), a=1, b=1)["sum"] == 2
        first, second = (os.sched_getaffinity(worker.process.pid) for worker in pair)
    assert len(first) == 1 and first == second
    with common.workers(script, [], ["cpu", "cpu"]) as pair:
        with common.kept_to(pair, common.last_cores(1)[0]):
            assert [os.sched_getaffinity(worker.process.pid) for worker in pair] == [first, second]
        assert os.sched_getaffinity(pair[0].process.pid) == os.sched_getaffinity(0)


def test_no_turn_is_begun_after_its_share(script):
    with common.workers(script, [], ["cpu", "cpu"]) as pair:
        assert common.alternate(pair, "add", 5, common.Budget(0), common.Budget(60), a=1, b=1) == []


def test_wrong_results_in_threads_are_errors():
    def work(number):
        if number == 2:
            raise AssertionError("gave 7")

    seconds, errors = threads.in_threads(4, work)
    assert errors == ["thread 2: AssertionError: gave 7"] and seconds >= 0


def test_lost_calls_in_threads_are_errors():
    """A product that another thread disturbed is seen at the next check."""
    options = argparse.Namespace(device="cpu", threads=2, calls=2 * threads.SPAN)
    good = threads.multiply(options, common.Budget(60), threads.products, options.calls)
    assert good["calls"] == good["asked"] == options.calls and not good["errors"]

    def one_too_few(x, weight, count):
        return threads.products(x, weight, count - 1)

    bad = threads.multiply(options, common.Budget(60), one_too_few, options.calls)
    assert len(bad["errors"]) == 2 and "after 500 calls" in bad["errors"][0]


def test_memory_is_compared():
    assert memory.compare("train", [({"peak_allocated": 100}, {"peak_allocated": 101})]) == {"peak_allocated": 1.01}
    times = [[{"ns": {"64": 200}}, {"ns": {"64": 50}}]]
    assert memory.compare("allocate", times)["64"]["ratio"] == 0.25


def test_the_operator_of_another_library_is_left_out_of_the_medians():
    rows = {"mm": {"ratio": 0.9, "pairs": 0.9}, "cat": {"error": "x"}, dispatch.THIRD_PARTY: {"ratio": 2, "pairs": 2.0}}
    summary = dispatch.summarize(rows, 3)
    assert summary["operators"] == 1 and summary["median_pairs"] == 0.9 and summary["third_party"] == 2.0
    assert "median_pairs" not in dispatch.summarize({}, 3)


# ---- tuned routes --------------------------------------------------------------------------------------------------


def outcome(losses=(2.0, 1.0), tokens=(1, 2)):
    return {"losses": list(losses), "tokens": list(tokens)}


def test_tokens_and_losses_of_a_set_of_routes_are_judged():
    good = tuned.judge(outcome((2.01, 1.0)), outcome(), 0.1)
    assert good["tokens_plausible"] and good["losses_within_tolerance"] and good["loss_apart"] == 0.005
    assert not tuned.judge(outcome((2.0, 1.1)), outcome(), 0.1)["losses_within_tolerance"]
    wrong = tuned.judge(outcome(tokens=(7, 7)), outcome(), 4.0)
    assert not wrong["tokens_plausible"] and not wrong["tokens_equal"]


def tuned_result(ratio=1.02, plausible=True, default="flagos_python", shipped=1.02):
    def part(ratio):
        return {"ratio": ratio, "median_low": ratio - 0.01, "median_high": ratio + 0.01}

    def row(op, ratio):
        clocks = {"flagos_python": [{"ratio": ratio, "noise": 0.02}] * 2}
        values = {"native": "cuda", "default": default, "host": 1e-5, "device": 1e-5, "clocks": clocks, "refused": {}}
        return {"op": op, "dtype": "bfloat16", "low": 8, "high": 63, "calls": 4, **values, "wrong": []}

    return {
        "tuning": {
            "where": {"device": "Some GPU", "chip": "cuda", "torch": "2.11.0", "flag_gems": "5.0.2"},
            "clock": "both",
            "left_out": {"normal_": "draws random numbers"},
            "rows": [row("silu", 0.5), row("mm", 2.0)],
        },
        "verify": {"tuned": {"tokens_plausible": plausible, "losses_within_tolerance": True}},
        "parts": {"prefill": {"tuned": part(ratio), "shipped": part(shipped)}},
    }


def test_the_shipped_conf_is_made_of_a_measurement():
    lines = make_backends_conf.conf(tuned_result()).splitlines()
    routes = [line for line in lines if not line.startswith("#") and line]
    assert routes == ["mm = native", "mm.out = native", "normal_ = native"]
    assert "#   silu" in lines and any("Some GPU" in line for line in lines) and any("1.02" in line for line in lines)


def test_without_a_gain_in_the_benchmark_the_shipped_conf_is_native():
    lines = make_backends_conf.conf(tuned_result(shipped=1.005)).splitlines()
    assert {"silu = native", "silu_ = native"} <= set(lines) and any("was no faster" in line for line in lines)
    candidate = make_backends_conf.conf(tuned_result() | {"parts": {}}).splitlines()  # what the benchmark is to time
    assert "silu = native" not in candidate


def test_an_operator_stays_native_of_which_calls_were_not_measured_or_have_no_plan():
    result = tuned_result()
    silu = result["tuning"]["rows"][0]
    result["tuning"]["rows"].append(silu | {"low": 64, "high": 511, "clocks": {}, "why": "the time was over"})
    calls = {"tanh": {"equal": 3, "refused: waits": 1}, "rand": {"refused: waits": 4}, "tan": {"outside": 4}}
    lines = make_backends_conf.conf(result, {"by operator": calls}).splitlines()
    routes = [line for line in lines if not line.startswith("#") and line]
    shared = ["mm = native", "mm.out = native", "normal_ = native", "silu = native", "silu_ = native"]
    assert routes == [*shared, "rand = native"]


def test_no_conf_is_made_of_a_bad_measurement():
    assert make_backends_conf.refusal(tuned_result()) == ""
    assert "slower than native: prefill 0.95" in make_backends_conf.refusal(tuned_result(ratio=0.95))
    assert make_backends_conf.refusal(tuned_result(ratio=0.995)) == "", "perhaps as fast"
    assert "not verified" in make_backends_conf.refusal(tuned_result(plausible=False))
    assert "tuner" in make_backends_conf.refusal({"parts": {}})


@pytest.mark.skipif(torch_fl.chip() != "host", reason="tries the benchmark where there is no accelerator")
def test_the_benchmark_of_tuned_routes_runs(tmp_path):
    """At a tiny size, with the stand-in kernels of test_tune: numbers mean nothing, the file must be complete."""
    pytest.importorskip("transformers", reason="transformers is not installed (requirements/demo.txt)")
    stub = common.ROOT / "tests/common/stub_tune_gems"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(stub), str(common.ROOT)]),
        "GEMS_VENDOR": "nvidia",
        "FLAGOS_FLAGGEMS_VERDICTS": str(stub / "benchmark.json"),
    }
    command = [sys.executable, str(common.ROOT / "benchmarks/tuned.py"), "--size", "small", "--out", str(tmp_path)]
    command += ["--limit", "60", "--tune-budget", "20", "--rounds", "2", "--tokens", "4", "--steps", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads((tmp_path / "tuned.json").read_text())
    assert set(data["parts"]) == set(tuned.PARTS) and data["where"]["chip"] == "host"
    for rows in data["parts"].values():
        assert set(rows) == set(tuned.ROUTES) and all(row["ratio"] > 0 for row in rows.values())
        assert rows["native"]["ratio"] == 1
    assert data["verify"]["tuned"]["tokens_equal"] and data["verify"]["tuned"]["loss_apart"] == 0
    assert {row["op"] for row in data["tuning"]["rows"]} == {"mul.Tensor", "cos"}
    assert "mul.Tensor = native" in (tmp_path / "tuned.conf").read_text()


def test_instructions_are_read_from_callgrind(tmp_path):
    """Names are given once and by number afterwards; what a callee took is on a line of its own."""
    (tmp_path / "counts.1").write_text(
        "desc: Trigger: Client Request: flagos/add_\nsummary: 100\n\nob=(1) /x/libtorch_fl.so\nfn=(1) a\n"
        "0 30\ncob=(2) /x/libc.so\ncfn=(2) b\ncalls=1 0\n0 60\n+3 10\n\nob=(2)\nfn=(2)\n0 60\n"
    )
    assert instructions.dump(tmp_path / "counts.1") == ("flagos/add_", 100, 40)
    rows = instructions.table([("cuda/add_", 80, 0), ("flagos/add_", 100, 40)], ["cuda", "flagos"], 10)
    assert rows["add_"] == {"first": 8, "second": 10, "in_torch_fl": 4, "plus": 2, "ratio": 1.25}
