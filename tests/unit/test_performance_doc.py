"""docs/performance.md holds what the committed results say, and every table can be made from a result file."""

import json

import performance_doc
import pytest

RATIO = {"first": 40.0, "second": 44.0, "ratio": 1.1, "ratio_low": 1.05, "ratio_high": 1.2, "pairs": 24}
WHERE = {"torch": "2.11.0", "gpu": "some GPU", "chip": "cuda"}
RESULTS = {
    "dispatch": {
        "pair": ["cuda", "flagos"],
        "versions": WHERE,
        "modes": {
            "no_grad": {
                "summary": {"operators": 2, "median_ratio": 0.95, "median_pairs": 0.96, "worst": "cat (list)"},
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
            "pair": {"errors": [], "tokens_per_second": RATIO, "tokens_equal": True},
            "graph": {
                "errors": [],
                "tokens_per_second": RATIO,
                "share_of_roofline": 0.61,
                "roofline_tokens_per_second": 3000.0,
            },
            "train": {"errors": [], "steps_per_second": RATIO, "losses_bit_equal": False},
            "decode": {"errors": ["stopped at the time limit"]},
        },
    },
    "threads": {"where": WHERE, "parts": {"calls": {"flagos": {"calls": 1000, "per_second": 5.0, "errors": ["x"]}}}},
    "memory": {
        "pair": ["cuda", "flagos"],
        "where": WHERE,
        "parts": {"train": {"ratio": {"peak_allocated": 1.0}}, "allocate": {"ratio": {"64": 0.3}}, "churn": {}},
    },
    "import_time": {
        "where": WHERE,
        **{k: {"median": 0.1, "low": 0.09, "high": 0.2} for k in ("torch", "torch_fl", "first_use")},
    },
}
SAYS = {
    "dispatch": ("0.96", "cat (list): 1.04"),
    "qwen3": ("1.100", "61 % of the memory roofline", "losses bit equal: NO", "no result"),
    "threads": ("1000", "| 1 |"),
    "memory": ("peak allocated | 1.0", "64 bytes | 0.3"),
    "import_time": ("0.100",),
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


def test_missing_results_and_unknown_tables(tmp_path):
    assert "No result yet" in performance_doc.render("<!-- table qwen3 -->\n<!-- end -->", tmp_path)
    with pytest.raises(ValueError, match="no table is called nothing"):
        performance_doc.render("<!-- table nothing -->\n<!-- end -->", tmp_path)


def test_every_table_is_in_the_document():
    text = (performance_doc.ROOT / performance_doc.DOCUMENT).read_text(encoding="utf-8")
    assert {m[2] for m in performance_doc.BLOCK.finditer(text)} == set(performance_doc.TABLES)
