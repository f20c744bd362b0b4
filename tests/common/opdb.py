"""Runs OpInfos on a device and on the CPU and compares: forward, backward, out=, in-place.

One call of check_op covers one OpInfo with one dtype in several modes and reuses its samples. A case is one sample in
one mode; cases that the CPU itself fails are counted apart, with the reason, and say nothing about the device.
"""

from __future__ import annotations

import itertools
import re
import warnings
import zlib
from dataclasses import dataclass, field

import torch
from torch.testing._internal.common_device_type import toleranceOverride
from torch.testing._internal.common_methods_invocations import op_db

from tests.common.compare import (
    Mismatch,
    alias_pattern,
    first_lines,
    same_inputs_after,
    same_results,
    storage_id,
)
from tests.common.samples import VARIANTS, copy_tensor, copy_tree, make_variant, tensors_in, tree_map

MODES = ("forward", "backward", "out", "inplace")
OUT_KINDS = ("same", "empty", "strided")

# Results whose values are whatever the memory held: only their metadata is compared.
UNINITIALIZED = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "resize_as_",
}
# The same of single results: the seed and offset of a kernel that drops nothing, and one that no kernel fills.
UNWRITTEN_RESULTS = {"torch.ops.aten._flash_attention_forward": (2, 3)}
# (operator, mode, layout) for which the CPU gives no reference: its kernel reads memory that nobody wrote, divides by
# zero or crashes.
NO_REFERENCE = {
    ("nn.functional.multilabel_margin_loss", "forward", "zero_size"),
    ("nn.functional.multi_margin_loss", "forward", "zero_size"),
    ("native_batch_norm", "backward", "zero_size"),
    ("_native_batch_norm_legit", "backward", "zero_size"),
    ("nn.functional.pdist", "backward", "zero_size"),
}
# Arguments that torch wants on the CPU whatever the device: operator -> positions in args.
CPU_ARGUMENTS = {"tensor_split": (0,)}
# Samples examined per OpInfo before the wanted number is picked evenly from them: enough to reach the unusual ones.
SAMPLE_POOL = 48


@dataclass
class ModeResult:
    """Counts of one mode of one (operator, dtype)."""

    cases: int = 0
    passed: int = 0
    bit_equal: int = 0
    cpu_failed: dict[str, int] = field(default_factory=dict)
    failures: list[dict] = field(default_factory=list)

    def as_dict(self):
        return {k: v for k, v in self.__dict__.items() if v}


def op_name(op) -> str:
    return op.full_name


def ops_by_name() -> dict:
    return {op_name(op): op for op in op_db}


def cpu_dtypes(op) -> list[torch.dtype]:
    return sorted(op.supported_dtypes("cpu"), key=str)


def parse_dtypes(text: str, op) -> list[torch.dtype]:
    """'all', or names separated by commas, or 'first' (float32 when listed)."""
    dtypes = cpu_dtypes(op)
    if text == "all":
        return dtypes
    if text == "first":
        return [torch.float32] if torch.float32 in dtypes else dtypes[:1]
    wanted = [getattr(torch, name) for name in text.split(",")]
    return [dtype for dtype in dtypes if dtype in wanted]


def tolerances(op, dtype) -> tuple[float | None, float | None]:
    """What OpInfo grants this operator and dtype; None: torch.testing's defaults."""
    rtol = atol = None
    for decorator in op.get_decorators("TestCommon", "test_compare_cpu", "cuda", dtype, {}):
        if isinstance(decorator, toleranceOverride) and dtype in decorator.d:
            atol, rtol = decorator.d[dtype].atol, decorator.d[dtype].rtol
    return rtol, atol


def pick_evenly(items: list, count: int) -> list:
    """`count` items: the first, the last and evenly spread ones between."""
    if len(items) <= count:
        return list(enumerate(items))
    step = (len(items) - 1) / max(count - 1, 1)
    return [(i, items[i]) for i in sorted({round(k * step) for k in range(count)})]


@dataclass
class Sample:
    label: str
    input: object
    args: tuple
    kwargs: dict
    process: object  # OpInfo's output_process_fn_grad
    broadcasts: bool
    seed: int

    def nest(self):
        return (self.input, self.args, self.kwargs)


def make_samples(op, dtype, count: int, grad: bool, variants: bool) -> list[Sample]:
    """Deterministic: the same operator, dtype and count give the same samples in every process."""
    seed = zlib.crc32(f"{op_name(op)}/{dtype}".encode())
    torch.manual_seed(seed)
    generate = itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=grad), SAMPLE_POOL)
    chosen = pick_evenly(list(generate), count)
    samples = [
        Sample(str(i), s.input, tuple(s.args), dict(s.kwargs), s.output_process_fn_grad, s.broadcasts_input, seed + i)
        for i, s in chosen
    ]
    if not variants:
        return samples
    # Each layout is applied to one sample: the first from position k on for which it changes something.
    extra = []
    for k, name in enumerate(VARIANTS):
        for j in range(len(samples)):
            base = samples[(k + j) % len(samples)]
            nest = make_variant(name, base.nest())
            if nest is not None:
                extra.append(Sample(f"{base.label}/{name}", *nest, base.process, base.broadcasts, base.seed))
                break
    return samples + extra


class Checker:
    """One OpInfo with one dtype on one device."""

    def __init__(self, op, dtype, device, corrupt=False):
        self.op, self.dtype, self.device, self.corrupt = op, dtype, device, corrupt
        self.rtol, self.atol = tolerances(op, dtype)
        self.values = op_name(op).split(".")[0] not in UNINITIALIZED

    def inputs(self, sample, device, grad=False, corrupt=False):
        if device != "cpu" and not tensors_in(sample.nest()) and "device" not in sample.kwargs:
            raise NotCounted("nothing in this sample names a device")
        nest = copy_tree(sample.nest(), device, grad)
        for position in CPU_ARGUMENTS.get(op_name(self.op), ()):
            args = list(nest[1])
            args[position] = copy_tree(sample.args[position], "cpu")
            nest = (nest[0], tuple(args), nest[2])
        if corrupt:
            with torch.no_grad():
                for tensor in tensors_in(nest):
                    if tensor.dtype is self.dtype:  # not indices: those would leave their range
                        corrupt_(tensor)
        return nest

    def compare(self, actual, expected, where="output", skip=()):
        return same_results(actual, expected, self.device, where, self.rtol, self.atol, self.values, skip)

    # Each mode is a generator function of two halves: `cpu(...)` computes what is expected and may raise, `device(...)`
    # computes and compares. Only errors of the first are forgiven.

    def forward(self, sample):
        def run(device, corrupt=False):
            nest = self.inputs(sample, device, False, corrupt)
            torch.manual_seed(sample.seed)
            output = self.op(nest[0], *nest[1], **nest[2])
            return output, nest, alias_pattern(tensors_in(output), tensors_in(nest))

        expected, nest_cpu, pattern_cpu = run("cpu")
        yield
        actual, nest, pattern = run(self.device, self.corrupt)
        exact = self.compare(actual, expected)
        if pattern != pattern_cpu:
            raise Mismatch(f"aliasing of outputs with inputs is {pattern}, the CPU's is {pattern_cpu}")
        same_inputs_after(nest, nest_cpu)
        yield exact

    def backward(self, sample):
        def run(device, corrupt=False):
            nest = self.inputs(sample, device, True, corrupt)
            torch.manual_seed(sample.seed)
            output = self.op(nest[0], *nest[1], **nest[2])
            if sample.process is not None:
                output = sample.process(output)
            outputs = [t for t in tensors_in(output) if t.requires_grad]
            leaves = [t for t in tensors_in(nest) if t.requires_grad]
            if not outputs or not leaves:
                raise NotCounted("no gradient")
            generator = torch.Generator().manual_seed(sample.seed)
            seeds = [gradient_for(t, generator, device) for t in outputs]
            return outputs, torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)

        outputs_cpu, expected = run("cpu")
        yield
        try:
            outputs, actual = run(self.device, self.corrupt)
        except NotCounted as reason:
            raise Mismatch(f"the CPU gives a gradient, the device: {reason}") from None
        names, names_cpu = ([type(t.grad_fn).__name__ for t in o] for o in (outputs, outputs_cpu))
        # Autograd must see the same graph: a lost grad_fn or a decomposed operator shows here. linear.cc has its own.
        one_step = [t.grad_fn is not None and t.grad_fn.name() == "LinearBackward0" for t in outputs]
        if names != names_cpu and "NativeDropoutBackward0" not in names and not all(one_step):
            raise Mismatch(f"grad_fn is {names}, the CPU's is {names_cpu}")
        yield self.compare(actual, expected, "gradient")

    def out(self, sample, kind):
        def run(device, corrupt=False):
            nest = self.inputs(sample, device, False, corrupt)
            like = self.out_like(sample)
            out = tree_map(lambda t: make_out(t, kind, device), like)
            outs = tensors_in(out)
            views = [t.detach() for t in outs]
            before = [t.data_ptr() for t in outs]
            torch.manual_seed(sample.seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "An output with one or more elements was resized"
                result = self.op(nest[0], *nest[1], **nest[2], out=out)
            results = tensors_in(result)
            facts = {
                "returned objects": [any(r is o for o in outs) for r in results],
                "storages kept": [storage_id(v) == storage_id(o) for v, o in zip(views, outs, strict=True)],
                "storage bytes": [o.untyped_storage().nbytes() for o in outs],
                "moved data": [o.data_ptr() != p for o, p in zip(outs, before, strict=True) if p and kind != "empty"],
                "pointer is the storage's": [
                    o.data_ptr() == v.untyped_storage().data_ptr() + o.storage_offset() * o.element_size()
                    for o, v in zip(outs, views, strict=True)
                    if o.numel()
                ],
                # Not when it is resized: on the CPU resize_output skips the dispatcher, and with it a bump.
                "versions moved": [o._version > 0 for o in outs] if kind == "same" else None,
            }
            return out, facts

        expected, facts_cpu = run("cpu")
        yield
        actual, facts = run(self.device, self.corrupt)
        for name, fact in facts_cpu.items():
            if facts[name] != fact:
                raise Mismatch(f"out={kind}: {name}: {facts[name]}, the CPU's {fact}")
        yield self.compare(actual, expected, f"out={kind}")

    def out_like(self, sample):
        """The CPU's forward result, computed once per sample."""
        if getattr(self, "_like", (None,))[0] is not sample:
            nest = copy_tree(sample.nest(), "cpu")
            torch.manual_seed(sample.seed)
            result = self.op(nest[0], *nest[1], **nest[2])
            if not isinstance(result, torch.Tensor):
                if not (isinstance(result, (tuple, list)) and all(isinstance(t, torch.Tensor) for t in result)):
                    raise NotCounted("no tensor result")
                result = tuple(result) if isinstance(result, tuple) else list(result)
            self._like = (sample, result)
        return self._like[1]

    def inplace(self, sample):
        if sample.broadcasts:
            raise NotCounted("broadcasts its input")
        variant = self.op.inplace_variant

        def run(device, corrupt=False):
            nest = self.inputs(sample, device, False, corrupt)
            target = nest[0]
            if not isinstance(target, (torch.Tensor, list, tuple)):
                raise NotCounted("input is no tensor")
            targets = tensors_in(target)
            views = [t.detach() for t in targets]
            before = [t.data_ptr() for t in targets]
            versions = [t._version for t in targets]
            torch.manual_seed(sample.seed)
            result = variant(target, *nest[1], **nest[2])
            facts = {
                "returns the same object": result is target,
                "version bumps": [t._version - v for t, v in zip(targets, versions, strict=True)],
                "moved data": [t.data_ptr() != p for t, p in zip(targets, before, strict=True)],
                "storages kept": [storage_id(v) == storage_id(t) for v, t in zip(views, targets, strict=True)],
            }
            return result, targets, nest, facts

        expected, targets_cpu, nest_cpu, facts_cpu = run("cpu")
        yield
        actual, targets, nest, facts = run(self.device, self.corrupt)
        for name, fact in facts_cpu.items():
            if facts[name] != fact:
                raise Mismatch(f"{name}: {facts[name]}, the CPU's {fact}")
        exact = self.compare(actual, expected) and self.compare(targets, targets_cpu, "target")
        same_inputs_after(nest, nest_cpu)
        yield exact


class NotCounted(Exception):
    """This sample has no case in this mode."""


def corrupt_(tensor):
    """Negative control: values that a working check must notice."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.numel() == 0:
        return
    try:
        if tensor.dtype is torch.bool:
            tensor.logical_not_()
        elif tensor.is_floating_point() or tensor.is_complex():
            tensor.mul_(1.02)
        else:
            tensor.add_(1)
    except RuntimeError:  # expanded memory cannot be written in place
        pass


def gradient_for(output, generator, device):
    dtype = output.dtype
    if dtype.is_complex:
        value = torch.randn(output.shape, generator=generator, dtype=torch.complex64).to(dtype)
    else:
        value = torch.randn(output.shape, generator=generator).to(dtype)
    if output.layout is not torch.strided:
        raise NotCounted("gradient of a sparse output")
    return copy_tensor(value, device)


def make_out(like, kind, device):
    """An out= tensor for a result like `like`: right size, empty, or right size but strided; filled with ones."""
    if not isinstance(like, torch.Tensor) or like.layout is not torch.strided or like.is_nested:
        raise NotCounted("no strided result")
    if kind == "empty":
        return torch.empty(0, dtype=like.dtype, device=device)
    if kind == "strided":
        return torch.ones((*like.shape, 2), dtype=like.dtype).to(device)[..., 0]
    span = sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) + 1 if like.numel() else 0
    flat = torch.ones(span, dtype=like.dtype).to(device)
    return flat.as_strided(like.shape, like.stride()).detach()


def cases_of(checker, samples, mode):
    """(case label, generator) of every case of a mode."""
    for sample in samples:
        if (op_name(checker.op), mode, sample.label.partition("/")[2]) in NO_REFERENCE:
            continue
        if mode == "out":
            if "/" not in sample.label:
                for kind in OUT_KINDS:
                    yield f"{sample.label}/{kind}", lambda s=sample, k=kind: checker.out(s, k)
        else:
            yield sample.label, lambda s=sample: getattr(checker, mode)(s)


def has_mode(op, dtype, mode) -> bool:
    if mode == "backward":
        return op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
    if mode == "out":
        return op.supports_out
    if mode == "inplace":
        return op.inplace_variant is not None
    return mode == "forward"


def run_case(start, at_device=lambda: None) -> tuple[str, object]:
    """('passed', bit_equal) | ('cpu', reason) | ('failed', message) | ('none', reason)."""
    try:
        steps = start()
        next(steps)
    except NotCounted as reason:
        return "none", str(reason)
    except Exception as error:  # the CPU's own failure, whatever it is
        return "cpu", first_lines(error, 160)
    at_device()
    try:
        return "passed", next(steps)
    except Mismatch as error:
        return "failed", str(error)[:400]
    except NotCounted as reason:
        return "none", str(reason)
    except Exception as error:
        return "failed", "raised " + first_lines(error, 400)


def check_op(op, dtype, device, modes=MODES, samples=6, variants=True, skip=(), corrupt=False, at=lambda *_: None):
    """Results by mode. skip: (mode, case) pairs to leave out; at(mode, case, side) is told before each half of a
    case, so that a crash can be laid at the right door."""
    modes = [mode for mode in modes if has_mode(op, dtype, mode)]
    results = {mode: ModeResult() for mode in modes}
    if not modes:
        return results
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            at("samples", "", "cpu")
            chosen = make_samples(op, dtype, samples, "backward" in modes, variants)
        except Exception as error:
            for result in results.values():
                result.cpu_failed["samples: " + first_lines(error, 120)] = 1
            return results
        checker = Checker(op, dtype, device, corrupt)
        for mode in modes:
            result = results[mode]
            for label, start in cases_of(checker, chosen, mode):
                if (mode, label) in skip:
                    continue
                at(mode, label, "cpu")
                kind, detail = run_case(start, lambda: at(mode, label, "device"))  # noqa: B023 (called at once)
                if kind == "cpu":
                    reason = re.sub(r"\d+", "#", detail)
                    result.cpu_failed[reason] = result.cpu_failed.get(reason, 0) + 1
                elif kind != "none":
                    result.cases += 1
                    result.passed += kind == "passed"
                    result.bit_equal += kind == "passed" and bool(detail)
                    if kind == "failed":
                        result.failures.append({"case": label, "message": detail})
    return results
