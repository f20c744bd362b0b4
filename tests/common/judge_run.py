"""Runs one case of a kernel against the native kernel, both on flagos, and says what came of it.

Compared: structure, dtype, sizes, strides, values, which results share memory with which arguments, and every byte of
the arguments' storages afterwards, so that a kernel which writes beyond its view is seen.

Tolerances: a floating-point result passes when it is within TOLERANCES of the native kernel's, or, where both are
compared with the CPU's result in double precision, when its largest error is at most twice the native kernel's (plus
one rounding). Everything else must be equal. Kernels of random numbers are compared by DISTRIBUTION.
"""

from __future__ import annotations

import zlib

import torch

from tests.common import judge_cases
from tests.common.compare import Mismatch, alias_pattern, bit_equal, first_lines, to_host
from tests.common.judge_limits import STRIDES, Outcome, features
from tests.common.samples import copy_tree, is_plain, tensors_in, tree_map

BACKEND = "flagos_python"
# (relative, absolute) to the native result; sums, products and means of many numbers need more than one rounding.
TOLERANCES = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.complex64: (1e-5, 1e-5),
}
# Operators whose results are random: compared by mean and standard deviation over DRAWS numbers.
RANDOM = set(
    """
bernoulli_.float exponential_ multinomial native_dropout normal.Tensor_float normal.Tensor_Tensor normal.float_Tensor
normal_ rand rand_like randn randn_like randperm uniform_
""".split()
)
DRAWS = 4000
AS_ACCURATE = 2  # a result may be so many times as far from the exact one as the native kernel's is
CONFIGURATIONS = 2  # of a kernel that has a tuner, which cases run with
MANY = 1000  # numbers from which on a distribution is looked at
# What the interpreter, or this judge's stand-in for a device, cannot do; no fault of the kernel.
LIMITATIONS = (
    "Interpret",
    "interpret",
    "is_cuda",
    "CUDA",
    "cuda",
    "CPU only",
    "numpy data itemsize",
    "too many values to unpack (expected 2)",
)


def described_tolerances() -> dict:
    """The tolerances in words, for the file of verdicts."""
    pairs = {str(d).split(".")[1]: f"{r:g} relative, {a:g} absolute" for d, (r, a) in TOLERANCES.items()}
    return {
        **pairs,
        "else": f"an error of at most {AS_ACCURATE} x the native kernel's against double precision",
        "integers, bool": "equal",
        "random": f"mean within 6 standard errors and deviation within 20 % of {DRAWS} numbers; seeds reproduce",
    }


def limit_tuning(most: int) -> None:
    """A kernel's tuner measures nothing: it takes one of `most` of its configurations, spread over all of them.

    Which one is drawn by the arguments, so that the cases of an operator are judged with several configurations, and
    each of them with the same one in every run. One that the device cannot launch is passed over, as the tuner does."""
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return
    prune, bench = Autotuner.prune_configs, Autotuner._bench

    def prune_configs(self, *arguments, **keywords):
        configs = list(prune(self, *arguments, **keywords))
        configs = configs[:: max(1, -(-len(configs) // most))]
        values = [words("", ((v,), {})) for v in self.nargs.values() if isinstance(v, (torch.Tensor, int, float))]
        start = zlib.crc32(" ".join(values).encode()) % len(configs)
        self.found = False
        return configs[start:] + configs[:start]

    def _bench(self, *arguments, **keywords):
        if self.found:
            return [float("inf")] * 3
        times = bench(self, *arguments, **keywords)
        self.found = times[0] != float("inf")
        return times

    def once(kernel_call, quantiles):
        kernel_call()
        return [0.0] * 3

    Autotuner.prune_configs, Autotuner._bench = prune_configs, _bench
    Autotuner.do_bench = property(lambda self: once)


def words(op: str, nest) -> str:
    """The call in words: mm(float32[3,4], float32[4,5] strides (1,4))."""

    def text(value):
        if isinstance(value, torch.Tensor):
            size = ",".join(map(str, value.shape))
            strides = "" if value.is_contiguous() else f" strides {tuple(value.stride())}"
            return f"{str(value.dtype).split('.')[1]}[{size}]{strides}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(text, value)) + "]"
        return str(value)

    args, kwargs = nest
    return f"{op}({', '.join([*map(text, args), *(f'{k}={text(v)}' for k, v in kwargs.items())])})"[:300]


def _storage_bytes(tensor):
    flat = tensor.detach().new_empty(0)
    storage = tensor.untyped_storage()
    flat.set_(storage, 0, (storage.nbytes() // tensor.element_size(),), (1,))
    return to_host(flat)


def _same_values(actual, expected, where, exact_reference=None):
    got, want = to_host(actual), to_host(expected)
    if bit_equal(got, want):
        return
    if not (want.is_floating_point() or want.is_complex()):
        raise Mismatch(f"{where}: {int((got != want).sum())} of {want.numel()} values differ")
    relative, absolute = TOLERANCES.get(want.dtype, (0, 0))
    try:
        torch.testing.assert_close(got, want, rtol=relative, atol=absolute, equal_nan=True)
    except AssertionError as error:
        if exact_reference is not None and _as_accurate(got, want, exact_reference):
            return
        raise Mismatch(f"{where}: values differ: {first_lines(error)}") from None


def _as_accurate(got, want, reference):
    """Whether `got` is at most twice as far from `reference` as `want` is; NaN and infinities in the same places."""
    if reference.shape != want.shape or not reference.is_floating_point():
        return False
    got, native = got.double(), want.double()
    finite = native.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.equal(native[~finite].isnan(), got[~finite].isnan()):
        return False
    got, native, reference = got[finite], native[finite], reference[finite]
    scale = reference.abs().max() if reference.numel() else reference.new_zeros(())
    slack = scale * torch.finfo(want.dtype).eps
    return bool((got - reference).abs().max() <= AS_ACCURATE * (native - reference).abs().max() + slack)


def _double(op, nest):
    """The result in double precision on the CPU; None when there is none."""

    def widen(leaf):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and is_plain(leaf):
            return leaf.double()
        return torch.float64 if leaf in (torch.float32, torch.float16, torch.bfloat16) else leaf

    try:
        args, kwargs = tree_map(widen, copy_tree(nest, "cpu"))
        return tensors_in(judge_cases.overload(op)(*args, **kwargs))
    except Exception:
        return None


def _call(op, nest, seed=0):
    torch.manual_seed(seed)
    args, kwargs = nest
    with torch.no_grad():
        return judge_cases.overload(op)(*args, **kwargs)


def _metadata(actual, expected, where):
    if actual.dtype is not expected.dtype:
        raise Mismatch(f"{where}: dtype is {actual.dtype}, expected {expected.dtype}")
    if actual.shape != expected.shape:
        raise Mismatch(f"{where}: size is {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.device != expected.device:
        raise Mismatch(f"{where}: is on {actual.device}, expected {expected.device}")
    if expected.numel():
        for n, a, e in zip(expected.shape, actual.stride(), expected.stride(), strict=True):
            if n > 1 and a != e:
                raise Mismatch(f"{where}: {STRIDES} {actual.stride()}, expected {expected.stride()}")


def _compare(op, nest, case_kind, actual, expected, arguments, arguments_native):
    got, want = tensors_in(actual), tensors_in(expected)
    if len(got) != len(want):
        raise Mismatch(f"{len(got)} results, expected {len(want)}")
    if not want and actual != expected:
        raise Mismatch(f"is {actual!r}, expected {expected!r}")
    pattern, pattern_native = (alias_pattern(r, tensors_in(a)) for r, a in ((got, arguments), (want, arguments_native)))
    if pattern != pattern_native:
        raise Mismatch("a result shares memory with an argument, or does not, unlike the native kernel's")
    reference = None
    for index, (a, e) in enumerate(zip(got, want, strict=True)):
        where = f"result {index}" if len(want) > 1 else "result"
        _metadata(a, e, where)
        if op in RANDOM:
            continue
        try:
            _same_values(a, e, where)
        except Mismatch:
            reference = reference or _double(op, nest) or []
            if case_kind == "infinite":  # where the native kernel finds no number there is nothing to compare with
                a, e = (torch.where(to_host(e).isnan(), 0, to_host(t)) for t in (a, e))
            _same_values(a, e, where, reference[index] if index < len(reference) else None)
    written = {id(t) for t in got}
    for index, (a, e) in enumerate(zip(tensors_in(arguments), tensors_in(arguments_native), strict=True)):
        if op in RANDOM and id(a) in written:
            continue
        if a.dtype is not e.dtype or a.shape != e.shape:
            raise Mismatch(f"argument {index} changed its dtype or size")
        if id(a) not in written or not a.is_contiguous():
            _same_values(_storage_bytes(a), _storage_bytes(e), f"memory of argument {index} after the call")


def facts_of(op, nest) -> dict:
    dtypes = []
    tree_map(lambda leaf: dtypes.append(leaf) if isinstance(leaf, torch.dtype) else None, nest)
    return {**features(tensors_in(nest), dtypes), "changed": changed(op, nest)}


def changed(op, nest) -> list[str]:
    """The arguments that are no tensors, have a default, and another value."""
    args, kwargs = nest
    arguments = judge_cases.overload(op)._schema.arguments
    given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
    with_default = {a.name: a.default_value for a in arguments if a.has_default_value() and a.name in given}
    return sorted(
        n for n, d in with_default.items() if not tensors_in([given[n]]) and (d, type(d)) != (given[n], type(given[n]))
    )


def judge(op: str, case, interpreted: bool, at_kernel=lambda: None) -> Outcome | None:
    """What came of a case; None when the CPU or the native kernel refuses it, so that it says nothing. at_kernel() is
    called when they are through."""
    import torch_fl

    nest = case.nest()
    facts = facts_of(op, nest)
    if not judge_cases.cpu_takes(op, nest):
        return None
    try:
        arguments_native = copy_tree(nest, "flagos")
        expected = _call(op, arguments_native)
        arguments = copy_tree(nest, "flagos")
        torch.flagos.synchronize()
    except torch.AcceleratorError:
        raise
    except Exception:
        return None

    def outcome(state, message=""):
        return Outcome(case.label, state, message=message[:300], call=words(op, nest), **facts)

    at_kernel()
    try:
        with torch_fl.route({op: BACKEND}):
            actual = _call(op, arguments)
        _compare(op, nest, case.label.split()[-1], actual, expected, arguments, arguments_native)
        if op in RANDOM and any(t.numel() >= MANY for t in tensors_in(actual)):
            distribution(op, nest, torch_fl)
    except Mismatch as error:
        torch.flagos.synchronize()  # a kernel that failed after what was compared: its own case is to blame
        return outcome("failed", str(error))
    except torch.AcceleratorError:
        raise
    except Exception as error:
        torch.flagos.synchronize()  # likewise
        text = f"raises {first_lines(error, 250)}"
        if interpreted and any(word in text for word in LIMITATIONS):
            return outcome("limitation", f"Triton's interpreter: {text}")
        return outcome("failed", text)
    return outcome("passed")


def distribution(op, nest, torch_fl):
    """The same numbers after the same seed, others in the next call, and the native kernel's mean and deviation."""

    def draw(seed, again=False):
        arguments = copy_tree(nest, "flagos")
        with torch_fl.route({op: BACKEND}):
            result = _call(op, arguments, seed)
            if again:
                args, kwargs = copy_tree(nest, "flagos")
                result = judge_cases.overload(op)(*args, **kwargs)
        return to_host(tensors_in(result)[0]).double().flatten()

    def native(seed):
        return to_host(tensors_in(_call(op, copy_tree(nest, "flagos"), seed))[0]).double().flatten()

    if torch.equal(native(1), native(2)):  # not random with these arguments
        return
    first = draw(1)
    if first.numel() < 64 or first.unique().numel() < 2:
        return
    if not torch.equal(first, draw(1)):
        raise Mismatch("the same seed gives other numbers")
    if torch.equal(first, draw(1, again=True)):
        raise Mismatch("two calls in a row give the same numbers")
    times = max(1, DRAWS // first.numel())
    mine = torch.cat([draw(seed) for seed in range(times)])
    theirs = torch.cat([native(seed) for seed in range(times)])
    deviation = theirs.std()
    error = 6 * deviation / theirs.numel() ** 0.5
    if (mine.mean() - theirs.mean()).abs() > error or (mine.std() - deviation).abs() > 0.2 * deviation:
        raise Mismatch(
            f"mean {mine.mean():.4g} and deviation {mine.std():.4g} of {mine.numel()} numbers, "
            f"the native kernel's are {theirs.mean():.4g} and {deviation:.4g}"
        )
