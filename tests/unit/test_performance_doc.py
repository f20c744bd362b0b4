"""docs/performance.md holds what the committed results say, and every table can be made from a result file."""

import json

import performance_doc
import pytest

RATIO = {"first": 40.0, "second": 44.0, "ratio": 1.1, "ratio_low": 1.05, "ratio_high": 1.2, "pairs": 24}
WHERE = {"torch": "2.11.0", "cpu": "some CPU", "gpu": "some GPU", "chip": "cuda", "made_on": "some GPU"}
RESULTS = {
    "dispatch": {
        "pair": ["cuda", "flagos"],
        "where": WHERE,
        "modes": {
            "no_grad": {
                "summary": {
                    "operators": 2,
                    "asked": 5,
                    "median_ratio": 0.95,
                    "median_pairs": 0.96,
                    "worst": "cat (list)",
                    "third_party": 1.12,
                },
                "operators": {
                    "mm": {"first_ns": 9000, "second_ns": 8600, "pairs": 0.955},
                    "cat (list)": {"first_ns": 7000, "second_ns": 7300, "pairs": 1.04},
                    "broken": {"error": "no such operator"},
                },
            }
        },
    },
    "qwen3": {
        "pair": ["cuda", "flagos"],
        "where": WHERE,
        "parts": {
            "decode": {"errors": ["stopped at the time limit"]},
            "graph": {
                "errors": [],
                "tokens_per_second": RATIO,
                "share_of_roofline": 0.61,
                "roofline_tokens_per_second": 3000.0,
                "leading_tokens_as_eager": [190, 187],
                "tokens_compared": 190,
            },
            "train": {"errors": [], "steps_per_second": RATIO, "losses_bit_equal": False},
        },
    },
    "threads": {"where": WHERE, "parts": {"calls": {"flagos": {"calls": 1000, "per_second": 5.0, "errors": ["x"]}}}},
    "memory": {
        "pair": ["cuda", "flagos"],
        "where": WHERE,
        "parts": {"train": {"ratio": {"peak_allocated": 1.0}}, "allocate": {"ratio": {"64": RATIO}}, "churn": {}},
    },
    "import_time": {
        "where": WHERE,
        **{k: {"median": 0.1, "low": 0.09, "high": 0.2} for k in ("torch", "torch_fl", "first_use")},
    },
    "opdb_cuda": {
        "versions": WHERE,
        "tasks": 6052,
        "pairs": 6000,
        "modes": {"forward": {"cases": 200, "passed": 199, "percent": 99.5, "steady": 190, "bit_equal": 189}},
        "cpu_fallbacks": {"histc": 2},
    },
    "opdb_flagos_py": {
        "where": WHERE,
        "modes": {"forward": {"cases": 200, "passed": 199, "percent": 99.5}},
        "pairs": 60,
        "tasks": 70,
        "served": {"mm": 3},
    },
    "plans_cuda": {
        "where": WHERE,
        "operators": {"refused": 2},
        "replays equal": 7,
        "replays compared": 8,
        "calls": {"raises": 1},
    },
    "tuned": {
        "where": WHERE,
        "parts": {"train": {"native": RATIO, "tuned": RATIO | {"median_low": 1.08, "median_high": 1.12}}},
        "verify": {"tuned": {"tokens_plausible": False, "loss_apart": 0.1, "losses_within_tolerance": False}},
        "tuning": {
            "trial": {"taken": "host", "rounds": 9, "speeds": {"host": [{"ratio": 1.25}, {"ratio": 1.5}]}},
            "routes": {
                "cos": {"lines": ["cos = flagos_python"], "host": 0.7, "device": 0.8},
                "mm": {"lines": ["mm = native"], "host": 1.0, "device": 1.0},
            },
        },
    },
    "tests_cuda": {
        "versions": WHERE,
        "finished": False,
        "totals": {"passed": 7, "failed": 1},
        "files": {"a.py": {"passed": 7}, "b.py": {"failed": 1}},
        "failures": {"b.py::test_b": "assert 1 == 2"},
    },
    "tests_two_gpus": {
        "versions": WHERE,
        "finished": True,
        "totals": {"passed": 8},
        "files": {"d.py": {}},
        "failures": {},
    },
    "hal_cuda": {"versions": WHERE, "finished": True, "totals": {"passed": 9}, "files": {"c.py": {}}, "failures": {}},
    "training_steps_null_cuda": {
        "where": WHERE,
        "rows": [
            {"state": "stock", "forward": 50, "backward": 40, "optimizer": 10},
            {"state": "now", "forward": 60, "backward": 40, "optimizer": 10},
        ],
    },
}
RESULTS["tuned_null_cuda"] = {"where": WHERE, "parts": RESULTS["tuned"]["parts"]}
COUNTS = {"first": 800, "second": 1000, "in_torch_fl": 300, "plus": 200, "ratio": 1.25}
RESULTS["instructions_null_cuda"] = {"pair": ["cuda", "flagos"], "where": WHERE, "rows": {"mm": COUNTS}}
RESULTS["instructions_qwen3_null_cuda"] = RESULTS["instructions_null_cuda"]
SAYS = {
    "dispatch": ("2 of 4", "0.96", "cat (list): 1.04", "1.12"),
    "qwen3": ("1.100", "61 % of the memory roofline", "losses bit equal: NO", "no result", "of 190: cuda 190"),
    "threads": ("1000", "| 1 |"),
    "memory": ("peak allocated | 1.0", "of 64 bytes and its release | 1.1"),
    "import_time": ("0.100",),
    "opdb_cuda": ("199 | 99.50 | 189 of 190", "6000 of 6052", "on the CPU fallback: 1"),
    "opdb_flagos_py": ("| forward | 200 | 199 | 99.500", "60 of 70", "1 operators by FlagGems"),
    "plans_cuda": ("| refused | 2", "7 of 8", "only with plans: 1"),
    "tuned": (
        "| train | tuned | 1.100 | 1.080 to 1.120 | 1.05 to 1.20, 24 pairs",
        "tokens WRONG",
        "TOO FAR",
        "host 1.250, 1.500 of",
        "| cos | 0.70 | 0.80 |",
    ),
    "tuned_null_cuda": ("| train | tuned | 1.100",),
    "tests_cuda": ("| 2 | 7 | 1 | 0", "cut off", "b.py::test_b: assert 1 == 2"),
    "tests_two_gpus": ("| 1 | 8 |",),
    "hal_cuda": ("| 1 | 9 |",),
    "training_steps_null_cuda": ("| now | 60 | 40 | 10 | 1.1 |",),
    "instructions_null_cuda": ("| mm | 800 | 1000 | 300 | 1.25 |",),
    "instructions_qwen3_null_cuda": ("of flagos's in torch_fl",),
}


def test_the_document_is_up_to_date():
    assert performance_doc.main(["--check"]) == 0


@pytest.mark.parametrize("name", performance_doc.TABLES)
def test_each_table(name, tmp_path):
    (tmp_path / f"{name}.json").write_text(json.dumps(RESULTS[name]))
    made = performance_doc.render(f"before\n<!-- table {name} -->\nold\n<!-- end -->\nafter\n", tmp_path)
    assert made.startswith(f"before\n<!-- table {name} -->\nMade on: some GPU") and made.endswith(
        "<!-- end -->\nafter\n"
    )
    assert "old" not in made
    for words in SAYS[name]:
        assert words in made, made
    assert performance_doc.render(made, tmp_path) == made


def test_a_table_names_the_device_that_it_is_about(tmp_path):
    """The GPU when the chip is one; on the simulated chip the CPU, whatever GPU the machine has."""
    rows = []
    for name, chip, made_on in (("a", "cuda", None), ("b", "host", None), ("c", "host", "some CPU")):
        where = {**WHERE, "chip": chip, "made_on": made_on}
        (tmp_path / f"{name}.json").write_text(json.dumps({"what": f"{name}; see there", "where": where}))
    made = performance_doc.render("<!-- table manifest -->\n<!-- end -->", tmp_path)
    rows = [line.split(" | ")[1:] for line in made.splitlines() if "json" in line]
    assert rows == [["a", "some GPU |"], ["b", "some CPU |"], ["c", "some CPU |"]]


def test_missing_results_and_unknown_tables(tmp_path):
    assert "No result yet" in performance_doc.render("<!-- table qwen3 -->\n<!-- end -->", tmp_path)
    with pytest.raises(ValueError, match="no table is called nothing"):
        performance_doc.render("<!-- table nothing -->\n<!-- end -->", tmp_path)


def test_every_table_is_in_the_document():
    text = (performance_doc.ROOT / performance_doc.DOCUMENT).read_text(encoding="utf-8")
    assert {m[2] for m in performance_doc.BLOCK.finditer(text)} == {*performance_doc.TABLES, "manifest"}
