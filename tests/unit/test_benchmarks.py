"""The judgement of the benchmarks: what a result file says when the devices differ, fail or run out of time."""

from benchmarks import common, memory, qwen3, threads


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
