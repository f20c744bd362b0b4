"""Runs torch's module_db and optim_db on a device and on the CPU and compares results, gradients and state."""

from __future__ import annotations

import warnings

import torch
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_optimizers import optim_db

from tests.common.compare import Mismatch, same_results
from tests.common.opdb import NotCounted, corrupt_, gradient_for, run_case
from tests.common.samples import copy_tensor, copy_tree, tensors_in

MODULE_DTYPES = ("float32", "float64", "bfloat16")
IMPLEMENTATIONS = ("default", "forloop", "foreach", "fused")
OPTIMIZER_STEPS = 4


def module_tasks() -> list[dict]:
    tasks = []
    for info in module_db:
        dtypes = [str(d).split(".")[1] for d in info.dtypes]
        for dtype in [d for d in MODULE_DTYPES if d in dtypes] or dtypes[:1]:
            for training in (True, False):
                tasks.append({"kind": "module", "name": info.name, "dtype": dtype, "training": training})
    return tasks


def optimizer_tasks() -> list[dict]:
    tasks = []
    for info in optim_db:
        for implementation in IMPLEMENTATIONS:
            needs = "foreach" if implementation == "forloop" else implementation
            if needs == "default" or needs in info.supported_impls:
                dtypes = ["float32", "float64"] + ["complex64"] * info.supports_complex
                tasks += [
                    {"kind": "optimizer", "name": info.optim_cls.__name__, "implementation": implementation, "dtype": d}
                    for d in dtypes
                ]
    return tasks


# ---- modules
# ----------------------------------------------------------------------------------------------------------


def build_module(info, module_input, dtype, device, training):
    """Built on the CPU from a fixed seed, then moved: initial values do not depend on the device."""
    torch.manual_seed(0)
    constructor = module_input.constructor_input
    args, kwargs = copy_tree((list(constructor.args), dict(constructor.kwargs)), "cpu")
    module = info.module_cls(*args, **kwargs)
    return module.to(dtype).to(device).train(training)


def run_module(info, module_input, dtype, device, training, corrupt):
    """Outputs, gradients of inputs and parameters, and the buffers afterwards."""
    module = build_module(info, module_input, dtype, device, training)
    forward = module_input.forward_input
    args, kwargs = copy_tree((list(forward.args), dict(forward.kwargs)), device, grad=True)
    if corrupt:
        with torch.no_grad():
            for tensor in [*module.parameters(), *tensors_in((args, kwargs))]:
                if tensor.is_floating_point():
                    corrupt_(tensor)
    torch.manual_seed(1)
    output = module(*args, **kwargs)
    outputs = [t for t in tensors_in(output) if t.requires_grad and t.layout is torch.strided]
    leaves = [t for t in tensors_in((args, kwargs)) if t.requires_grad] + [
        p for p in module.parameters() if p.requires_grad
    ]
    return module, output, outputs, leaves


def check_module(info, module_input, dtype, device, training, corrupt):
    """Two modes at once: yields ('forward', case) and ('backward', case) for run_case."""

    def forward():
        expected = run_module(info, module_input, dtype, "cpu", training, False)[1]
        yield
        module, actual, _, _ = run_module(info, module_input, dtype, device, training, corrupt)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.device.type != torch.device(device).type:
                raise Mismatch(f"{name} stayed on {tensor.device}")
        yield same_results(actual, expected, device)

    def backward():
        def run(where, corrupted):
            module, _, outputs, leaves = run_module(info, module_input, dtype, where, training, corrupted)
            if not outputs or not leaves:
                raise NotCounted("no gradient")
            generator = torch.Generator().manual_seed(2)
            seeds = [gradient_for(t, generator, where) for t in outputs]
            gradients = torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)
            return gradients, [b.detach() for b in module.buffers()]

        expected = run("cpu", False)
        yield
        yield same_results(run(device, corrupt), expected, device, "gradient", skip=("stride",))

    yield "forward", forward
    yield "backward", backward


# ---- optimizers
# -------------------------------------------------------------------------------------------------------


def run_optimizer(info, config, implementation, dtype, device, corrupt):
    """Parameters and state after a few steps with fixed gradients."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 5), (5,), (), (3, 2, 2)] if not info.only_supports_sparse_grads else [(6, 4), (5, 3)]
    if info.optim_cls.__name__ == "Muon":
        shapes = [(4, 5), (6, 3)]
    real = torch.float32 if dtype.is_complex else dtype

    def draw(shape):
        parts = torch.randn(shape + ((2,) if dtype.is_complex else ()), generator=generator, dtype=real)
        return torch.view_as_complex(parts).clone() if dtype.is_complex else parts

    parameters = [copy_tensor(draw(shape), device).requires_grad_() for shape in shapes]
    kwargs = copy_tree(dict(config.kwargs), "cpu")  # a tensor learning rate stays on the CPU, as users have it
    if implementation == "forloop":
        kwargs["foreach"] = False
    elif implementation in ("foreach", "fused"):
        kwargs[implementation] = True
    optimizer = info.optim_cls(parameters, **kwargs)
    for _ in range(OPTIMIZER_STEPS):
        for parameter in parameters:
            gradient = draw(tuple(parameter.shape))
            if info.only_supports_sparse_grads:
                gradient[0] = 0
                gradient = gradient.to_sparse(1)
            parameter.grad = copy_tensor(gradient, device)
            if corrupt and parameter.grad.layout is torch.strided:
                parameter.grad.mul_(-1)
        if info.step_requires_closure:
            optimizer.step(lambda: sum((p.abs() ** 2).sum() for p in parameters))
        else:
            optimizer.step()
    state = [[v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)] for p in parameters]
    return [p.detach() for p in parameters], state, optimizer


def check_optimizer(info, config, implementation, dtype, device, corrupt):
    def step():
        expected, expected_state, _ = run_optimizer(info, config, implementation, dtype, "cpu", False)
        yield
        actual, state, _ = run_optimizer(info, config, implementation, dtype, device, corrupt)
        exact = same_results(actual, expected, device, "parameter")
        # The step counter may live on the CPU or on the device: torch decides by device type.
        moved = [[v.to(device) for v in values] for values in state]
        exact &= same_results(moved, expected_state, device, "state", skip=("stride",))
        yield exact

    yield "step", step


# ---- one task
# ---------------------------------------------------------------------------------------------------------


def check_task(task, device, corrupt=False, at=lambda *_: None):
    """Results of one task: list of (mode, case, kind, detail) with kinds as in opdb.run_case."""
    dtype = getattr(torch, task["dtype"])
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at("inputs", "", "cpu")
        torch.manual_seed(0)
        if task["kind"] == "module":
            info = next(i for i in module_db if i.name == task["name"])
            inputs = info.module_inputs_func(info, "cpu", dtype, True, task["training"])
            groups = [check_module(info, i, dtype, device, task["training"], corrupt) for i in inputs]
        else:
            info = next(i for i in optim_db if i.optim_cls.__name__ == task["name"])
            configs = info.optim_inputs_func(device="cpu")
            groups = [check_optimizer(info, c, task["implementation"], dtype, device, corrupt) for c in configs]
        for index, group in enumerate(groups):
            for mode, start in group:
                if [mode, str(index)] in task.get("skip", []):
                    continue
                at(mode, str(index), "cpu")
                kind, detail = run_case(start, lambda: at(mode, str(index), "device"))  # noqa: B023 (called at once)
                results.append((mode, str(index), kind, detail))
    return results
