"""tests/integration/ops/against_stock.py: what counts as a failure when two devices give other bits."""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration/ops"))

import against_stock


def side(results, deterministic=None, fallbacks=None):
    of = {"op float32": results}
    return SimpleNamespace(
        results=of, deterministic={"op float32": deterministic or {}}, fallbacks={"op float32": fallbacks or {}}
    )


def case(digest, steady=True, total=10.0):
    return ["ok", digest, [total], steady]


def verdict(stock, ours, *deterministic):
    there, here = deterministic or (case("x"), case("y"))
    name = "forward 0"
    return against_stock.judge(side({name: stock}, {name: there}), side({name: ours}, {name: here}))


def test_only_kernels_that_are_not_deterministic_may_differ():
    refused = ["error", "RuntimeError: op does not have a deterministic implementation, but you set"]
    for args, passed, why in (
        ((case("a"), case("a")), 1, None),
        ((case("a"), case("b")), 0, None),
        ((case("a", steady=False), case("b")), 1, "stock varies"),
        ((case("a", steady=False), case("b", total=11.0)), 0, "stock varies"),
        ((case("a"), case("b"), case("c"), case("c")), 1, "the same bits with deterministic algorithms"),
        ((case("a"), case("b"), refused, refused), 1, "no deterministic kernel"),
        ((case("a"), case("b"), ["error", "another one"], ["error", "another one"]), 0, None),
        ((case("a"), ["error", "x"]), 0, None),
    ):
        found = verdict(*args)
        assert found["modes"]["forward"]["passed"] == passed == 1 - len(found["failures"]), args
        assert list(found["unsteady"]) == ([why] if why else []), args
        assert found["modes"]["forward"]["steady"] == (0 if why else 1), args


def test_the_cpu_counts_where_stock_has_a_kernel():
    for stock, counted in ((case("a"), {"op": 2}), (["error", "no kernel"], {})):
        ours = side({"out 0": case("a")}, fallbacks={"out 0": {"op": 2}})
        assert against_stock.judge(side({"out 0": stock}), ours)["cpu_fallbacks"] == counted
