"""Checks of the backend flagos_python, run by test_flaggems_python.py in a process that finds the stand-in flag_gems.

Prints a JSON object: name of the check -> "" or what went wrong.
"""

import json
import sys
import threading
import traceback
import warnings

import torch

import torch_fl

assert "flag_gems" not in sys.modules, "flag_gems was imported before the first call"


def routed(*ops):
    return torch_fl.route(dict.fromkeys(ops, "flagos_python"))


def same(op, call, *args):
    """`call` on flagos tensors runs FlagGems' kernel of `op` once and gives what it gives on the CPU."""
    import flag_gems

    expected = call(*args)
    moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.flagos(), args)
    flag_gems.CALLS.clear()
    with routed(op):
        got = call(*moved)
    assert flag_gems.CALLS.count(op) == 1, flag_gems.CALLS
    got, expected = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (got, expected))
    for g, e in zip(got, expected, strict=True):
        assert g.is_flagos
        torch.testing.assert_close(g.cpu(), e)


def random(*size):
    return torch.randn(size)


def check_forward():
    same("mm", torch.mm, random(3, 4), random(4, 5))
    same("mm", torch.mm, random(4, 3).t(), random(4, 5))
    same("add.Tensor", torch.add, random(3, 1), random(4))
    same("add.Tensor", lambda a: a + 2, random(3))
    same("add.Tensor", lambda a, b: torch.add(a, b, alpha=3), random(3), random(3))


def check_in_place_returns_the_same_object():
    x = random(4, 4).flagos()
    expected = x.cpu().relu()
    with routed("relu_"):
        y = torch.relu_(x)
        torch.relu_(x[1:3, ::2])
    assert y is x and torch.equal(x.cpu(), expected)
    version = x._version
    with routed("relu_"):
        x.relu_()
    assert x._version == version + 1


def check_out():
    a, b = random(3, 4), random(4, 5)
    out = torch.empty(0, device="flagos")
    with routed("mm.out"):
        returned = torch.mm(a.flagos(), b.flagos(), out=out)
    assert returned is out
    torch.testing.assert_close(out.cpu(), a @ b)


def check_lists_and_optional_arguments():
    same("cat", lambda a, b: torch.cat([a, b, a], 1), random(2, 3), random(2, 4))
    same("index.Tensor", lambda a, i: a[:, i], random(3, 4), torch.tensor([0, 2]))
    for bounds in ({"min": 0.1}, {"max": 0.2}, {"min": -0.1, "max": 0.3}):
        same("clamp", lambda a, bounds=bounds: torch.clamp(a, **bounds), random(9))


def check_keyword_arguments_and_dtypes():
    import flag_gems

    same("sum.dim_IntList", lambda a: torch.sum(a, (0, 2), dtype=torch.float64), random(2, 3, 4))
    assert flag_gems.SEEN["sum"] == ([0, 2], False, torch.float64), flag_gems.SEEN


def check_tuple_results():
    same("max.dim", lambda a: torch.max(a, 1), random(3, 4))
    same("sort.stable", lambda a: torch.sort(a, stable=True, descending=True), random(3, 4))


def check_random_numbers_follow_the_seed():
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        with routed("normal_"):
            draws += [torch.empty(8, device="flagos").normal_().cpu() for _ in range(2)]
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3]) and not torch.equal(draws[0], draws[1])
    generator = torch.Generator(device="flagos").manual_seed(7)
    with routed("normal_"):
        own = torch.empty(8, device="flagos").normal_(generator=generator).cpu()
    expected = torch.empty(8, device="flagos").normal_(generator=generator.manual_seed(7)).cpu()
    assert torch.equal(own, expected), "another generator"


def check_exceptions_name_the_operator():
    x = random(3).flagos()
    for _ in range(3):
        try:
            with routed("exp"):
                torch.exp(x)
        except ValueError as error:
            assert str(error) == "no exp today"
            assert any("exp" in note and "flagos_python" in note for note in error.__notes__), error.__notes__
        else:
            raise AssertionError("no exception")
    torch.testing.assert_close(torch.exp(x).cpu(), x.cpu().exp())
    try:
        with routed("sigmoid"):
            torch.sigmoid(x)
    except TypeError as error:
        assert "sigmoid" in str(error) and "int" in str(error) and "Tensor" in str(error), error
    else:
        raise AssertionError("7 was taken for a tensor")


def check_a_kernel_that_calls_its_own_operator():
    import flag_gems

    same("silu", torch.nn.functional.silu, random(3))
    torch.testing.assert_close(flag_gems.SEEN["silu"], torch.nn.functional.silu(torch.ones(2)))


def check_autograd_is_kept():
    a, b = random(3, 4), random(4, 5)
    grads = []
    for device in ("cpu", "flagos"):
        x, y = (t.clone().to(device).requires_grad_() for t in (a, b))
        with routed("mm", "mul.Tensor", "silu"):
            torch.nn.functional.silu(x @ y * 2).sum().backward()
        grads.append((x.grad.cpu(), y.grad.cpu()))
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right)


def check_threads():
    failures = []
    torch_fl.set_route("mm", "flagos_python")

    def work(seed):
        try:
            a = torch.full((4, 4), float(seed))
            x = a.flagos()
            for _ in range(50):
                assert torch.equal((x @ x).cpu(), a @ a)
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch_fl.set_route("mm", None)
    assert not failures, failures[0]


def check_results_outlive_the_call():
    """Python may keep what it was given; the next call must not change it under its feet."""
    import flag_gems

    kept = []
    rows = dict(row[:2] for row in flag_gems._FULL_CONFIG)
    integration = sys.modules["torch_fl.integration"]
    assert set(integration._functions) == set(rows)
    x, y = random(3).flagos(), random(4).flagos()
    original = torch.mul
    try:
        torch.mul = lambda a, b: (kept.append(a), original(a, b))[1]
        with routed("mul.Tensor"):
            x * 2
            y * 3
    finally:
        torch.mul = original
    assert [tuple(k.shape) for k in kept] == [(3,), (4,)]
    assert torch.equal(kept[0].cpu(), x.cpu()) and torch.equal(kept[1].cpu(), y.cpu())


def backend_of(op):
    return next(r.backend for r in torch_fl.routes() if r.op == op)


def check_verdicts():
    assert backend_of("mul.Tensor") == backend_of("sqrt") == "flagos_python"
    native = backend_of("mm")
    assert native == torch_fl.chip() == backend_of("neg"), "an unjudged or wrong kernel serves by default"
    assert torch_fl.is_flaggems_enabled()
    reasons = {step.backend: step.reason for step in torch_fl.explain("neg")}
    assert "wrong" in reasons["flagos_python"] and "returns zeros" in reasons["flagos_python"], reasons
    assert "not judged" in str(torch_fl.explain("mm"))
    assert "within" in str(torch_fl.explain("sqrt")) and "contiguous" in str(torch_fl.explain("sqrt"))
    assert "gradient" in str(torch_fl.integration.kernels()["rms_norm"])


def check_limits_go_to_the_next_backend():
    import flag_gems

    x = random(4, 4).abs()
    for t, by_flaggems in (
        (x, True),
        (x.half(), True),
        (x.double(), False),
        (x.t(), False),
        (x[:, :0], False),
    ):
        flag_gems.CALLS.clear()
        moved = t.flagos() if t.is_contiguous() else x.flagos().t()
        torch.testing.assert_close(torch.sqrt(moved).cpu(), torch.sqrt(t))
        assert flag_gems.CALLS == (["sqrt"] if by_flaggems else []), (t.dtype, t.shape, t.stride())
    assert torch_fl.report()["outside_limits"] == {"sqrt": 3}, torch_fl.report()["outside_limits"]
    with torch_fl.count_ops() as counts:  # under the backend that really serves
        for t in (x, x.double(), x.double()):
            torch.sqrt(t.flagos())
    rows = {backend: (calls, seconds) for op, backend, calls, seconds in counts.timed_rows() if op == "sqrt"}
    assert rows["flagos_python"][0] == 1 and rows[torch_fl.chip()][0] == 2, rows
    assert all(seconds > 0 for _, seconds in rows.values())


def check_a_limit_on_expanded_tensors():
    """A stride of 0 matters only in a dimension of several elements."""
    import flag_gems

    x = random(3, 4).flagos()
    column = x[:, :1]
    for t, by_flaggems in ((x.t(), True), (column.expand(3, 4), False), (x.as_strided((1, 4), (0, 1)), True)):
        flag_gems.CALLS.clear()
        torch.testing.assert_close(torch.mul(t, t).cpu(), torch.mul(t.cpu(), t.cpu()))
        assert flag_gems.CALLS == (["mul.Tensor"] if by_flaggems else []), (t.shape, t.stride(), flag_gems.CALLS)


def check_a_limit_on_the_number_of_tensors():
    import flag_gems

    x = random(3, 4).flagos()
    for tensors, by_flaggems in (([x, x], True), ([x], False), ([x, x[:, :0]], False)):
        flag_gems.CALLS.clear()
        assert torch.equal(torch.cat(tensors, 1).cpu(), torch.cat([t.cpu() for t in tensors], 1))
        assert flag_gems.CALLS == (["cat"] if by_flaggems else []), [t.shape for t in tensors]


def check_conditions_of_a_route():
    import flag_gems

    small, large = random(4).flagos(), random(64).flagos()
    for within, expected in (
        ("", [2, 2]),
        ("[numel>=10]", [0, 2]),
        ("[numel<=10 dtype=float32,float16]", [2, 0]),
        ("[dtype=float64]", [0, 0]),
    ):
        torch_fl.set_route("silu", f"flagos_python {within}")
        seen = []
        for x in (small, large):
            flag_gems.CALLS.clear()
            with torch_fl.count_ops() as counts:
                for _ in range(2):
                    torch.testing.assert_close(torch.nn.functional.silu(x).cpu(), torch.nn.functional.silu(x.cpu()))
            seen.append(flag_gems.CALLS.count("silu"))
            served = {backend: calls for op, backend, calls in counts.rows() if op == "silu"}
            assert served.get("flagos_python", 0) >= seen[-1], served
        assert seen == expected, (within, seen)
    assert "within dtype=float64" in str(torch_fl.explain("silu")), torch_fl.explain("silu")
    torch_fl.set_route("silu", None)


def check_a_composed_operator():
    """torch composes abs of abs.out; a route serves it whole, and without one nothing is changed."""
    import flag_gems

    x = random(3, 4).flagos()
    with torch_fl.count_ops() as counts:
        torch.abs(x)
    assert "abs" not in {op for op, *_ in counts.rows()}, counts.rows()
    assert backend_of("abs") == "composite" and "composes" in str(torch_fl.explain("abs"))
    same("abs", torch.abs, random(3, 4))
    assert (x.cpu().abs() == torch.abs(x).cpu()).all()
    y = x.clone().requires_grad_()
    with routed("abs"):
        flag_gems.CALLS.clear()
        torch.abs(y).sum().backward()
    assert flag_gems.CALLS.count("abs") == 1 and torch.equal(y.grad.cpu(), x.cpu().sign())
    with routed("zeros_like"):
        flag_gems.CALLS.clear()
        assert torch.zeros_like(x).is_flagos and flag_gems.CALLS == ["zeros_like"]
        assert torch.zeros_like(x, device="cpu").device.type == "cpu" and flag_gems.CALLS == ["zeros_like"]


def check_a_wrong_kernel_that_is_forced_warns_once():
    x = torch.ones(2, device="flagos")
    with warnings.catch_warnings(record=True) as seen, routed("neg"):
        warnings.simplefilter("always")
        assert [(-x).tolist() for _ in range(3)] == [[0, 0]] * 3
    assert len(seen) == 1 and "neg" in str(seen[0].message) and "returns zeros" in str(seen[0].message), seen


def check_absent_function():
    """FlagGems' list has it, the installed table has not."""
    try:
        with routed("tanh"):
            torch.tanh(torch.ones(2, device="flagos"))
    except RuntimeError as error:
        assert "backend not registered" in str(error) and "tanh" in str(error)
    else:
        raise AssertionError("no error")


def main():
    results = {}
    torch.mul(torch.ones(1, device="flagos"), 2)  # the first call imports flag_gems
    assert "flag_gems" in sys.modules
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                torch.manual_seed(0)
                check()
                results[name] = ""
            except BaseException:
                results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
