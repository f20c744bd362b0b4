"""Checks of launch plans, run by test_plans.py in a process on the null CUDA that finds tests/common/stub_plan_gems.

Prints a JSON object: name of the check -> "" or what went wrong.
"""

import json
import sys
import threading
import traceback

import torch

import torch_fl
from tests.common import null_cuda
from tests.common.plan_judge import judge, readable

OPS = ("add.Tensor", "add_.Tensor", "silu", "sigmoid", "tanh", "exp", "neg")
ADD, ADD_ = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor
SILU = torch.ops.aten.silu.default


def random(*size):
    return torch.randn(*size, device="flagos")


def counts(op):
    return torch_fl.plans.counts()[op]


def equal(op, function, make):
    assert judge(op, function, make(), make()) == ("equal", "")


def check_replays_launch_what_the_call_launches():
    for make in (
        lambda: random(4, 8),
        lambda: random(4, 8).t(),
        lambda: random(33)[1:],
        lambda: random(8, 8)[2:, ::2],
        lambda: random(0, 3),
    ):
        equal("add.Tensor", ADD, lambda make=make: ((make(), make()), {"alpha": 2}))
        equal("silu", SILU, lambda make=make: ((make(),), {}))
    equal("add.Tensor", ADD, lambda: ((random(4, 1), random(8)), {}))
    equal("add.Tensor", ADD, lambda: ((random(4), 2.5), {}))
    equal("add_.Tensor", ADD_, lambda: ((random(4, 8), random(4, 8)), {}))
    for first, second in (
        ((random(3), random(3)), (random(3), random(3))),
        ((random(6)[1:],) * 2, (random(6)[1:],) * 2),
    ):
        assert judge("add_.Tensor", ADD_, (first, {}), (second, {}), values=True) == ("equal", "")


def check_equal_operands():
    def twice():
        x = random(16)
        return (x, x), {}

    equal("add.Tensor", ADD, twice)
    equal("add_.Tensor", ADD_, twice)


def check_a_replay_runs_no_python():
    import flag_gems

    x, y = random(4), random(4)
    for _ in range(2):
        x + y
    flag_gems.CALLS.clear()
    before = counts("add.Tensor")["hits"]
    z = x + y
    assert flag_gems.CALLS == [] and counts("add.Tensor")["hits"] == before + 1
    assert z.is_flagos and z.shape == x.shape and z.dtype == x.dtype


def check_what_makes_another_plan():
    import flag_gems

    def python_calls(*arguments, **keywords):
        flag_gems.CALLS.clear()
        ADD(*arguments, **keywords)
        return len(flag_gems.CALLS)

    x, y = random(33), random(33)
    for _ in range(3):
        ADD(x[:32], y[:32])
    assert python_calls(x[:32], y[:32]) == 0
    other = [
        ((x[:31], y[:31]), {}),  # sizes
        ((x[1:], y[:32]), {}),  # alignment
        ((x[:32], x[:32]), {}),  # the same memory
        ((x[:32], x[1:]), {}),  # overlapping memory
        ((x[:32:2], y[:32:2]), {}),  # strides
        ((x[:32], 1), {}),
        ((x[:32], 1.0), {}),
        ((x[:32], True), {}),
        ((x[:32], y[:32]), {"alpha": 2}),
        ((x[:32], y[:32]), {"alpha": 2.0}),
    ]
    for arguments, keywords in other:
        assert python_calls(*arguments, **keywords) == 1, (arguments, keywords)
    torch.set_default_dtype(torch.float64)
    try:
        assert python_calls(x[:32], y[:32]) == 1
    finally:
        torch.set_default_dtype(torch.float32)
    assert python_calls(x[:32], y[:32]) == 0


def sums(x, y, alphas):
    """How many of the calls ran in Python."""
    import flag_gems

    flag_gems.CALLS.clear()
    for alpha in alphas:
        ADD(x, y, alpha=alpha)
    return len(flag_gems.CALLS)


def check_numbers_that_change():
    """The third value makes the plan for all values of its class; parameters follow."""
    x, y = random(40), random(40)
    assert sums(x, y, (0.3, 0.31, 0.32)) == 3
    assert sums(x, y, (0.33, 0.4, 0.01, 0.32)) == 0 and counts("add.Tensor")["patched"] == 3
    assert sums(x, y, (0.5, 0.7, -0.3, 1.0, 1e30, float("inf"), 3, 0.0, -0.0)) == 9, "another class has no plan yet"
    for alpha in (0.35, 0.36):
        replayed, result = null_cuda.launches(lambda a=alpha: ADD(x, y, alpha=a), addresses=True)
        replayed, _ = readable(replayed, (x, y), result)
        assert torch_fl.plans.use(False)
        expected, result = null_cuda.launches(lambda a=alpha: ADD(x, y, alpha=a), addresses=True)
        torch_fl.plans.use(True)
        assert replayed == readable(expected, (x, y), result)[0]


def check_whole_numbers_that_change():
    """As a float32 beyond 2^24 they are not what was asked for: another class."""
    x, y = random(41), random(41)
    assert sums(x, y, (3, 5, 7)) == 3 and sums(x, y, (9, 11)) == 0
    assert sums(x, y, (16, 2**24 + 1, 2**31, 2**31 + 16, 1, 2)) == 6


def check_numbers_that_no_parameter_follows():
    x = random(42)
    for number in (2.5, 2.6, 2.7, 2.8, 2.9):
        x + number
    assert counts("add.Tensor")["patched"] == 0, counts("add.Tensor")
    assert counts("add.Tensor")["apart"] == {"an operator inside gets other numbers": 1}, counts("add.Tensor")


def check_verification_of_numbers_that_change():
    x, y = random(43), random(43)
    sums(x, y, (0.3, 0.31, 0.32))
    torch_fl.plans.verify(True)
    try:
        assert sums(x, y, (0.33, 0.34)) == 2
    finally:
        torch_fl.plans.verify(False)
    assert sums(x, y, (0.35,)) == 0 and counts("add.Tensor")["refused"] == {}, counts("add.Tensor")


def check_nothing_is_recorded_while_a_graph_is_captured():
    import flag_gems

    x, y = random(44), random(44)
    x + y
    before = counts("add.Tensor")["recorded"]
    stream = torch.flagos.Stream()
    graph = torch.flagos.CUDAGraph()
    with torch.flagos.graph(graph, stream=stream):
        x + y
    assert counts("add.Tensor")["recorded"] == before
    x + y
    assert counts("add.Tensor")["recorded"] == before + 1
    flag_gems.CALLS.clear()
    with torch.flagos.graph(torch.flagos.CUDAGraph(), stream=stream):
        x + y
    assert flag_gems.CALLS == [], "a plan that is there is replayed into a graph"


def check_a_profiler_changes_nothing():
    import flag_gems

    x, y = random(45), random(45)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(2):
            x + y
        flag_gems.CALLS.clear()
        x + y
    assert flag_gems.CALLS == [] and counts("add.Tensor")["hits"] == 1
    assert sum(row.count for row in profile.key_averages() if row.key == "aten::add") == 3


def check_other_tritons_have_no_plans():
    import triton

    assert torch_fl.plans.unavailable() == ""
    version = triton.__version__
    triton.__version__ = "3.7.0"
    try:
        assert "Triton 3.7.0 is installed" in torch_fl.plans._hook()
    finally:
        triton.__version__ = version


def check_refusals():
    x = random(4)
    for _ in range(4):
        torch.sigmoid(x)
        torch.tanh(x)
    assert any("waits for the device" in why for why in counts("sigmoid")["refused"]), counts("sigmoid")
    assert any("returns an argument" in why for why in counts("tanh")["refused"]), counts("tanh")
    assert counts("sigmoid")["plans"] == counts("tanh")["plans"] == 0


def check_in_place_returns_the_same_object():
    x, y = random(4), random(4)
    for _ in range(4):
        version = x._version
        assert x.add_(y) is x and x._version == version + 1
    assert counts("add_.Tensor")["hits"] >= 1


def check_calls_leave_references_as_they_were():
    """Arguments are lent to replays: one reference too few would free them under the caller."""
    x, y = random(7), random(7)
    for _ in range(5):
        x + y, x.add_(y), SILU(x), x + 2.5
        try:
            torch.exp(x)
        except ValueError:
            pass
    assert counts("add_.Tensor")["hits"] >= 3 and counts("silu")["hits"] >= 3
    assert (x._use_count(), y._use_count()) == (1, 1)


def check_a_kernel_that_raises_is_no_failure_of_plans():
    assert judge("exp", torch.ops.aten.exp.default, ((random(4),), {}), ((random(4),), {}))[0] == "unserved"


def check_exceptions():
    for _ in range(4):
        try:
            torch.exp(random(4))
        except ValueError as error:
            assert str(error) == "no exp today"
        else:
            raise AssertionError("no exception")
    assert counts("exp")["plans"] == 0 and counts("exp")["refused"] == {}


def check_a_failing_launch_is_an_error():
    x, y = random(5), random(5)
    for _ in range(3):
        x + y
    null_cuda.library().null_cuda_fail(b"cuLaunchKernelEx", 1)
    try:
        x + y
    except RuntimeError as error:
        assert "cuLaunchKernelEx" in str(error) and "FLAGOS_PLAN=0" in str(error), error
    else:
        raise AssertionError("no error")
    null_cuda.library().cudaGetLastError()  # the stand-in notes it for the run time too, which a real driver does not
    x + y
    assert (x._use_count(), y._use_count()) == (1, 1)


def check_switching_off():
    import flag_gems

    x = random(6)
    for _ in range(3):
        x + x
    flag_gems.CALLS.clear()
    assert torch_fl.plans.use(False)
    x + x
    assert not torch_fl.plans.use(True) and flag_gems.CALLS == ["add.Tensor"]


def check_launch_hooks_see_every_launch():
    from triton import knobs

    x, seen = random(7), []
    for _ in range(3):
        x + x

    def note(metadata):
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    try:
        x + x
    finally:
        knobs.runtime.launch_enter_hook.remove(note)
    assert seen == ["scaled_sum"], seen


def check_verification():
    import flag_gems

    x = torch.arange(8.0).flagos()
    for _ in range(3):
        torch.neg(x)
    torch_fl.plans.verify(True)
    try:
        torch.neg(x)
        assert counts("neg")["plans"] == 1, "a right replay was dropped"
        flag_gems.SECRET.append(torch.arange(8.0, 16.0).cuda())
        torch.neg(x)
    finally:
        torch_fl.plans.verify(False)
        flag_gems.SECRET.clear()
    assert counts("neg")["plans"] == 0 and any("wrong" in why for why in counts("neg")["refused"]), counts("neg")


def check_threads():
    failures, x = [], random(9)

    def work():
        try:
            for i in range(300):
                z = x[: 5 + i % 4] + x[: 5 + i % 4]
                assert z.shape == (5 + i % 4,)
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        torch_fl.set_route("add.Tensor", None)
        torch_fl.set_route("add.Tensor", "flagos_python")
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def main():
    results = {}
    for op in OPS:
        torch_fl.set_route(op, "flagos_python")
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                torch_fl.plans.clear()
                check()
                results[name] = ""
            except BaseException:
                results[name] = traceback.format_exc()
    sys.stdout.flush()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
