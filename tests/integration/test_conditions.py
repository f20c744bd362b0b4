"""Routes for some calls only, whatever kinds of arguments the tensors come in."""

import pytest
import torch

import torch_fl

SMALL, LARGE = (2, 2), (3, 3)
CALLS = {
    "cat": lambda size, d: torch.cat([torch.ones(size, device=d), torch.ones(size, device=d)]),
    "clamp.Tensor": lambda size, d: torch.clamp(torch.ones(1, device=d), min=torch.full(size, 2.0, device=d)),
    "where.self": lambda size, d: torch.where(torch.ones(1, device=d) > 0, torch.ones(size, device=d), 2),
    "index.Tensor": lambda size, d: torch.ones(size, device=d)[torch.zeros(1, dtype=torch.long, device=d)],
    "sqrt_": lambda size, d: torch.ones(size, device=d).sqrt_(),
    "mul.out": lambda size, d: torch.mul(torch.ones(size, device=d), 2, out=torch.empty(size, device=d)),
}


@pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")
@pytest.mark.parametrize("op", CALLS)
def test_every_kind_of_argument(op, device):
    """The largest tensor decides, and results, counts and the fallback's list name who served."""
    call = CALLS[op]
    torch_fl.set_route(op, "cpu [numel>=9]")
    try:
        for size, backend in ((SMALL, torch_fl.chip()), (LARGE, "cpu")):
            torch_fl.fallbacks(reset=True)
            with torch_fl.count_ops() as counts:
                result = call(size, device)
            assert (op, backend, 1) in counts.rows(), counts.rows()
            assert torch_fl.fallbacks().get(op, 0) == (backend == "cpu")
            assert result.tolist() == call(size, "cpu").tolist()
    finally:
        torch_fl.set_route(op, None)


@pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")
def test_the_first_tensors_dtype_decides(device):
    torch_fl.set_route("where.self", "cpu [dtype=bool]")
    x = torch.ones(3, device=device)
    try:
        with torch_fl.count_ops() as counts:
            torch.where(x > 0, x, x)
        assert ("where.self", "cpu", 1) in counts.rows()
        torch_fl.set_route("where.self", "cpu [dtype=float32]")
        with torch_fl.count_ops() as counts:
            torch.where(x > 0, x, x)
        assert ("where.self", torch_fl.chip(), 1) in counts.rows()
    finally:
        torch_fl.set_route("where.self", None)


@pytest.mark.filterwarnings("ignore:.*runs on the CPU:UserWarning")
def test_a_threads_own_route_with_a_condition(device):
    x, y = torch.ones(2, device=device), torch.ones(9, device=device)
    with torch_fl.route({"sqrt": "cpu [numel>=9]"}), torch_fl.count_ops() as counts:
        torch.sqrt(x), torch.sqrt(y)
    assert {("sqrt", torch_fl.chip(), 1), ("sqrt", "cpu", 1)} <= set(counts.rows())
