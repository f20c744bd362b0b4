"""Which FlagGems operators can have a launch plan, and whether their replays launch what the Python calls launch.

Runs on the null CUDA of the tests, so it needs no GPU: launches are compared, results are not. Arguments are those with
which PyTorch's own operator samples call an operator, in several layouts.

    python benchmarks/plan_sweep.py --json FILE
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

DTYPES = (torch.float32, torch.int64, torch.bool)


def plain_name(function) -> str:
    name = str(function._schema.name).removeprefix("aten::")
    return name + ("." + function._schema.overload_name if function._schema.overload_name else "")


class Collect(TorchDispatchMode):
    """Keeps the first calls, of different signatures, of each wanted operator."""

    def __init__(self, wanted, most):
        super().__init__()
        self.wanted, self.most = wanted, most
        self.calls = collections.defaultdict(dict)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = plain_name(function)
        if name in self.wanted:
            calls = self.calls[name]
            text = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: (t.dtype, t.shape, t.stride()), (args, kwargs)
            )
            if len(calls) < self.most and str(text) not in calls:
                keep = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach(), (args, kwargs))
                calls[str(text)] = (function, *keep)
        return function(*args, **kwargs)


def samples(opinfo, dtype):
    differentiable = dtype.is_floating_point and opinfo.supports_autograd
    for sample in list(opinfo.sample_inputs("cpu", dtype, requires_grad=differentiable))[:12]:
        yield sample, differentiable


def collect(wanted, most) -> dict:
    mode = Collect(wanted, most)
    for opinfo in op_db:
        for dtype in DTYPES:
            if dtype not in opinfo.dtypes:
                continue
            try:
                for sample, differentiable in samples(opinfo, dtype):
                    arguments = (sample.input, *sample.args)
                    with mode:
                        result = opinfo.op(*arguments, **sample.kwargs)
                        if differentiable and isinstance(result, torch.Tensor) and result.requires_grad:
                            result.sum().backward()
                    if opinfo.inplace_variant and isinstance(sample.input, torch.Tensor):
                        with mode, torch.no_grad():
                            opinfo.inplace_variant(sample.input.detach().clone(), *sample.args, **sample.kwargs)
                    if opinfo.supports_out and isinstance(result, torch.Tensor):
                        with mode, torch.no_grad():
                            opinfo.op(*arguments, **sample.kwargs, out=torch.empty_like(result))
            except Exception:  # a sample that this torch cannot run on the CPU
                continue
    return mode.calls


LAYOUTS = ("as it is", "shifted", "transposed", "equal")


def place(call, layout):
    """The arguments on flagos, in memory of their own; None when the layout changes nothing."""
    moved, last, changed = {}, {}, layout == "as it is"

    def move(t):
        nonlocal changed
        if t.dim() == 0 and t.device.type == "cpu" and t._is_zerotensor():
            return t
        if id(t) in moved:
            return moved[id(t)]
        if layout == "equal" and (t.dtype, t.shape) in last and t.numel():
            changed = True
            return last[t.dtype, t.shape]
        offset = 1 if layout == "shifted" and t.numel() else 0
        strides = t.stride()
        if layout == "transposed" and t.dim() >= 2 and t.is_contiguous() and t.numel():
            strides = t.mT.contiguous().mT.stride()
        changed |= offset > 0 or strides != t.stride()
        room = offset + 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True)) if t.numel() else 0
        base = torch.empty(room, dtype=t.dtype, device="flagos")
        made = base.as_strided(t.shape, strides, offset) if t.numel() else torch.empty_like(t, device="flagos")
        made.copy_(t)
        moved[id(t)] = last[t.dtype, t.shape] = made
        return made

    arguments = torch.utils._pytree.tree_map_only(torch.Tensor, move, call[1:])
    arguments = torch.utils._pytree.tree_map_only(torch.device, lambda d: torch.device("flagos", 0), arguments)
    return arguments if changed else None


def sweep(options) -> dict:
    import torch_fl
    from tests.common.plan_judge import judge

    warnings.simplefilter("ignore")
    torch.ones(1, device="flagos")
    routed = {row.op for row in torch_fl.routes()}
    kernels = torch_fl.integration.kernels()
    wanted = {op for op, row in kernels.items() if op in routed and row[0] != "unusable"}
    calls = collect(wanted, options.calls)
    # One configuration instead of dozens: nothing is measured here, and each has to be compiled.
    from triton.runtime.autotuner import Autotuner

    Autotuner.prune_configs = lambda self, keywords: self.configs[:1]
    started = time.time()
    table, verdicts, unequal = {}, collections.Counter(), []
    reasons = collections.Counter()
    for op in sorted(wanted):
        if options.only and op not in options.only:
            continue
        rows = collections.Counter()
        for call in calls.get(op, {}).values():
            for layout in LAYOUTS:
                if time.time() - started > options.seconds:
                    break
                try:
                    first, second = place(call, layout), place(call, layout)
                    if first is None:
                        continue
                    with torch_fl.route({op: "flagos_python"}):
                        verdict, why = judge(op, call[0], first, second)
                except Exception as error:
                    verdict, why = "raises", f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
                rows[verdict if verdict != "refused" else f"refused: {why}"] += 1
                verdicts[verdict] += 1
                if verdict == "refused":
                    reasons[why] += 1
                if verdict == "unequal":
                    unequal.append({"op": op, "layout": layout, "why": why[:600]})
        table[op] = dict(rows) if rows else {"not run": 1}
        print(f"{op:32} {dict(rows)}", flush=True)
    operators = collections.Counter()
    for rows in table.values():
        operators[
            "unequal" if "unequal" in rows else "recordable, every replay equal" if "equal" in rows
            else "refused" if any(r.startswith("refused") for r in rows) else "raises or not run"
        ] += 1  # fmt: skip
    return {
        "what": "null CUDA: launches compared, no GPU",
        "flag_gems": torch_fl.integration.installed_version(),
        "torch": torch.__version__,
        "operators": dict(operators),
        "not routable": len(kernels) - len(wanted),
        "calls": dict(verdicts),
        "replays equal": f"{verdicts['equal']} of {verdicts['equal'] + verdicts['unequal']}",
        "refused calls by reason": dict(reasons.most_common()),
        "unequal": unequal,
        "by operator": table,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--calls", type=int, default=3, help="signatures per operator (default 3)")
    parser.add_argument("--seconds", type=float, default=36000, help="stop to begin calls after so long")
    parser.add_argument("--only", nargs="*", help="operators; default: all that are routable")
    options = parser.parse_args()
    from tests.common import null_cuda

    if not null_cuda.active():
        environment = os.environ | null_cuda.environment() | {"FLAGGEMS_DB_URL": "sqlite://"}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode
    result = sweep(options)
    print({key: value for key, value in result.items() if key != "by operator"})
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return bool(result["unequal"])


if __name__ == "__main__":
    sys.exit(main())
