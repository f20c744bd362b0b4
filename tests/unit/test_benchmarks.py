"""The judgement of the benchmarks: what a result file says when the devices differ, fail or run out of time."""

import json
import os
import subprocess
import sys

import make_backends_conf
import pytest

import torch_fl
from benchmarks import common, memory, qwen3, threads, tuned


def speeds(device, values, tokens=(1, 2, 3)):
    return {"device": device, "tokens_per_second": list(values), "tokens": list(tokens)}


def train(device, losses=("0x1.0p+0",), ms=(10.0, 12.0, 11.0), peak=1000):
    return {"device": device, "ms_per_step": list(ms), "losses": list(losses), "peak_allocated": peak}


def test_ratio_is_the_median_of_pairs():
    # One side slows down together with the other: the ratio of medians would be far off.
    r = common.ratio([(10, 11), (100, 110), (1, 1.1)])
    assert r["ratio"] == 1.1 and r["pairs"] == 3 and r["first"] == 10


def test_other_tokens_are_seen():
    same = qwen3.judge_speeds([[speeds("cuda", [10]), speeds("flagos", [12])]])
    assert same["tokens_equal"] and same["tokens_per_second"]["ratio"] == 1.2 and not same["errors"]
    assert not qwen3.judge_speeds([[speeds("cuda", [10]), speeds("flagos", [12], (1, 2, 4))]])["tokens_equal"]


def test_other_losses_are_seen():
    good = qwen3.judge_train([[train("cuda"), train("flagos", ms=[5.0] * 3, peak=1010)]])
    assert good["losses_bit_equal"] and good["peak_allocated"]["ratio"] == 1.01
    assert good["steps_per_second"]["ratio"] == 2.2  # 11 ms against 5
    assert not qwen3.judge_train([[train("cuda"), train("flagos", losses=["0x1.1p+0"])]])["losses_bit_equal"]


def test_a_failed_worker_is_reported_and_not_counted():
    pairs = [
        [speeds("cuda", [10]), {"device": "flagos", "error": "exit code 1"}],
        [speeds("cuda", [10]), speeds("f", [9])],
    ]
    result = qwen3.judge_speeds(pairs)
    assert result["errors"] == ["exit code 1"] and result["tokens_per_second"]["pairs"] == 1
    assert "tokens_per_second" not in qwen3.judge_speeds(pairs[:1])


def worker(tmp_path, text):
    script = tmp_path / "worker.py"
    script.write_text(text)
    return str(script)


def test_workers(tmp_path):
    good = worker(tmp_path, 'import sys; print(\'noise\'); print(\'RESULT {"a": 1, "argv": "%s"}\' % sys.argv[-1])')
    assert common.run_worker(good, ["last"], "cpu", common.Budget(60)) == {"device": "cpu", "a": 1, "argv": "last"}
    bad = worker(tmp_path, "raise ValueError('no kernel')")
    assert "exit code 1" in (error := common.run_worker(bad, [], "cpu", common.Budget(60))["error"])
    assert "no kernel" in error
    slow = worker(tmp_path, "import time; time.sleep(60)")
    assert "time limit" in common.run_worker(slow, [], "cpu", common.Budget(1), enough=0)["error"]
    assert "not started" in common.run_worker(good, [], "cpu", common.Budget(0))["error"]


def test_stock_workers_do_not_load_torch_fl(tmp_path):
    script = worker(tmp_path, "import sys, torch; print('RESULT {\"loaded\": %d}' % ('torch_fl' in sys.modules))")
    assert common.run_worker(script, [], "cuda", common.Budget(120)) == {"device": "cuda", "loaded": 0}


def test_wrong_results_in_threads_are_errors():
    def work(number):
        if number == 2:
            raise AssertionError("gave 7")

    seconds, errors = threads.in_threads(4, work)
    assert errors == ["thread 2: AssertionError: gave 7"] and seconds >= 0


def test_memory_is_compared():
    assert memory.compare("train", {"peak_allocated": 100}, {"peak_allocated": 101}) == {"peak_allocated": 1.01}
    assert memory.compare("allocate", {"ns": {"64": 200}}, {"ns": {"64": 50}}) == {"64": 0.25}


# ---- tuned routes --------------------------------------------------------------------------------------------------


def outcome(losses=(2.0, 1.0), tokens=(1, 2)):
    return {"losses": list(losses), "tokens": list(tokens)}


def test_tokens_and_losses_of_a_set_of_routes_are_judged():
    good = tuned.judge(outcome((2.01, 1.0)), outcome(), 0.1)
    assert good["tokens_plausible"] and good["losses_within_tolerance"] and good["loss_apart"] == 0.005
    assert not tuned.judge(outcome((2.0, 1.1)), outcome(), 0.1)["losses_within_tolerance"]
    wrong = tuned.judge(outcome(tokens=(7, 7)), outcome(), 4.0)
    assert not wrong["tokens_plausible"] and not wrong["tokens_equal"]


def tuned_result(ratio=1.02, plausible=True, default="flagos_python"):
    def row(op, ratio):
        clocks = {"flagos_python": [{"ratio": ratio, "noise": 0.02}] * 2}
        values = {"native": "cuda", "default": default, "host": 1e-5, "device": 1e-5, "clocks": clocks, "refused": {}}
        return {"op": op, "dtype": "bfloat16", "low": 8, "high": 63, "calls": 4, **values, "wrong": []}

    return {
        "tuning": {
            "where": {"device": "Some GPU", "chip": "cuda", "torch": "2.11.0"},
            "clock": "both",
            "left_out": {"normal_": "draws random numbers"},
            "rows": [row("silu", 0.5), row("mm", 2.0)],
        },
        "verify": {"tuned": {"tokens_plausible": plausible, "losses_within_tolerance": True}},
        "parts": {"prefill": {"native": {"spread": 0.01}, "tuned": {"ratio": ratio}}},
    }


def test_the_shipped_conf_is_made_of_a_measurement():
    lines = make_backends_conf.conf(tuned_result()).splitlines()
    routes = [line for line in lines if not line.startswith("#") and line]
    assert routes == ["mm = native", "normal_ = native"]
    assert "#   silu" in lines and any("Some GPU" in line for line in lines) and any("1.02" in line for line in lines)


def test_no_conf_is_made_of_a_bad_measurement():
    assert make_backends_conf.refusal(tuned_result()) == ""
    assert "slower than native: prefill 0.95" in make_backends_conf.refusal(tuned_result(ratio=0.95))
    assert make_backends_conf.refusal(tuned_result(ratio=0.995)) == "", "within native's own spread"
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
