"""Calls of one aten overload to try a kernel with: from OpInfo samples or written by hand, then made awkward.

Running an OpInfo's samples on the CPU under a dispatch mode shows which overloads they reach and with what arguments,
backward kernels, in-place and out= overloads included. An overload that no sample reaches borrows the calls of an
overload with the same name, or has calls in tests/common/judge_samples.py. Everything is deterministic: the same
operator gives the same cases in every process.
"""

from __future__ import annotations

import json
import os
import re
import signal
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.common import judge_samples, opdb
from tests.common.samples import copy_tree, is_plain, make_variant, tensors_in, tree_map

DTYPES = "float32 float16 bfloat16 int64 float64 int32 bool uint8 int8 int16 complex64".split()
LAYOUTS = "strided offset transposed channels_last zero_size expanded".split()
FEW_LAYOUTS = ("strided", "zero_size")  # for the later dtypes: each kernel has to be compiled for each
CHANGES = ("special", "infinite", "aliased", "mixed", "broadcast", "negative", "scalar")
LARGE = 1500  # columns: more than one block of nearly every kernel
MOST = 1 << 16  # elements of a large case
PER_SOURCE = 8  # calls kept of one OpInfo, mode and dtype


@dataclass
class Case:
    label: str
    args: tuple
    kwargs: dict

    def nest(self):
        return (self.args, self.kwargs)


def overload(op: str):
    """torch.ops.aten's overload of a name such as "add.Tensor"."""
    name, _, which = op.partition(".")
    return getattr(getattr(torch.ops.aten, name), which or "default")


def cpu_takes(op: str, nest, seconds: int = 20) -> bool:
    """Whether the CPU takes a call: what it refuses, or dies of, may be an illegal access elsewhere. Asked in a forked
    process, because some kernels write where they should not before they are through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are other threads: the child calls none of them
        child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    signal.alarm(seconds)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    refused = 1
    try:
        args, kwargs = copy_tree(nest, "cpu")
        with torch.no_grad():
            overload(op)(*args, **kwargs)
        refused = 0
    except NotImplementedError:  # not known to be wrong
        refused = 0
    finally:
        os._exit(refused)


def plain_name(func) -> str:
    name = func._schema.name.split("::")[1]
    return name if func._overloadname == "default" else f"{name}.{func._overloadname}"


class _Recorder(TorchDispatchMode):
    """Notes the overloads that are called, and the arguments of those that are wanted."""

    def __init__(self, wanted=(), most=PER_SOURCE):
        super().__init__()
        self.names: set[str] = set()
        self.wanted, self.most, self.calls = set(wanted), most, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = plain_name(func)
        self.names.add(name)
        if name in self.wanted and len(self.calls) < self.most:
            nest = copy_tree((tuple(args), dict(kwargs)), "cpu")
            self.calls.append((name, *tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, nest)))
        return func(*args, **kwargs)


def run_opinfo(name: str, dtype: torch.dtype, modes, recorder: _Recorder, samples: int = 6) -> None:
    """Runs an OpInfo on the CPU with the recorder on."""
    op = opdb.ops_by_name()[name]
    modes = [mode for mode in modes if opdb.has_mode(op, dtype, mode)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            chosen = opdb.make_samples(op, dtype, samples, "backward" in modes, False)
        except Exception:  # samples that cannot be made say nothing
            return
        checker = opdb.Checker(op, dtype, "cpu")
        for mode in modes:
            for _, start in opdb.cases_of(checker, chosen, mode):
                try:
                    steps = start()
                    with recorder:
                        next(steps)
                except Exception:  # the CPU's own failure
                    continue


def reached_by(name: str) -> dict[str, list[str]]:
    """{mode: overloads that an OpInfo reaches}."""
    op = opdb.ops_by_name()[name]
    dtypes = opdb.cpu_dtypes(op)
    found = {}
    for mode in opdb.MODES:
        recorder = _Recorder()
        for dtype in [torch.float32] if torch.float32 in dtypes else dtypes[:1]:
            run_opinfo(name, dtype, [mode], recorder, 4)
        found[mode] = sorted(recorder.names)
    return found


def _index_file(folder: Path, pattern: str) -> Path:
    return folder / f"index_{torch.__version__}_{zlib.crc32(pattern.encode()):x}.json"


def make_index(folder: Path, pattern: str, feed) -> None:
    """Writes which of the OpInfos that `pattern` fits reach which overloads, unless it is there. `feed` runs tasks
    {"opinfo": name} with reached_by(), as workers.run_tasks does."""
    path = _index_file(folder, pattern)
    if path.exists():
        return
    found = {}
    tasks = [{"opinfo": name} for name in opdb.ops_by_name() if re.search(pattern, name)]
    feed(tasks, lambda task, answer: found.update({task["opinfo"]: answer["reached"]}), lambda crash: None)
    if len(found) < 0.9 * len(tasks):
        raise RuntimeError(f"only {len(found)} of {len(tasks)} OpInfos could be looked at")
    path.write_text(json.dumps(found, sort_keys=True))


def load_index(folder: Path, pattern: str = "") -> dict:
    """{OpInfo: {mode: overloads that it reaches}}"""
    return json.loads(_index_file(folder, pattern).read_text())


# ---- borrowing -----------------------------------------------------------------------------------------------------


def relatives(op: str) -> list[str]:
    """Overloads whose calls can be made into calls of `op`: the same name, or that without the in-place underscore."""
    base = op.partition(".")[0].rstrip("_") if not op.startswith("_") else op.partition(".")[0]
    found = []
    for name in (base, base + "_"):
        packet = getattr(torch.ops.aten, name, None)
        for which in packet.overloads() if packet else ():
            if (other := name if which == "default" else f"{name}.{which}") != op:
                found.append(other)
    return found


def borrow(op: str, other: str, args: tuple, kwargs: dict):
    """(args, kwargs) for `op` from a call of `other`; None when they do not fit."""
    target, source = overload(op)._schema, overload(other)._schema
    given = {a.name: v for a, v in zip(source.arguments, args, strict=False)} | kwargs
    positional = [v for a, v in zip(source.arguments, args, strict=False)]
    made, keywords = [], {}
    for index, argument in enumerate(target.arguments):
        if argument.is_out:
            result = overload(other)(*copy_tree(args, "cpu"), **copy_tree(kwargs, "cpu"))
            if not isinstance(result, torch.Tensor):
                return None
            keywords[argument.name] = torch.empty_like(result)
            continue
        if argument.name in given:
            value = given[argument.name]
        elif index < len(positional) and not argument.kwarg_only:
            value = positional[index]
        elif argument.has_default_value():
            continue
        else:
            return None
        kind = str(argument.type)
        if kind == "Tensor" and isinstance(value, (int, float)):
            value = torch.tensor(value)
        elif kind == "number" and isinstance(value, torch.Tensor):
            if value.numel() == 0:
                return None
            value = value.flatten()[0].item()
        if argument.kwarg_only:
            keywords[argument.name] = value
        elif len(made) == index:
            made.append(value)
        else:
            keywords[argument.name] = value
    return tuple(made), keywords


# ---- changes -------------------------------------------------------------------------------------------------------


def _first(nest, fits):
    return next((t for t in tensors_in(nest) if fits(t)), None)


def _map_tensors(nest, change):
    """The nest with change(tensor, position) for each of its tensors; None when nothing changed."""
    position, changed = -1, False

    def apply(leaf):
        nonlocal position, changed
        if not isinstance(leaf, torch.Tensor) or not is_plain(leaf):
            return leaf
        position += 1
        result = change(leaf, position)
        changed |= result is not leaf
        return result

    result = tree_map(apply, nest)
    return result if changed else None


def _large(nest):
    """Every tensor's last dimension repeated: beyond one block of a kernel. What must be small, the reference says."""
    sizes = [t.shape[-1] for t in tensors_in(nest) if t.dim()]
    longest = max(sizes, default=0)

    def grow(t, _):
        if not t.dim() or t.shape[-1] != longest or longest == 0 or t.stride()[-1:] != (1,):
            return t
        times = max(2, LARGE // longest)
        if t.numel() * times > MOST:
            return t
        return t.repeat(*[1] * (t.dim() - 1), times)

    return _map_tensors(nest, grow)


def _special(nest, infinite=False):
    """NaN, signed zero, halves, 3e4 and 1e-4; integers above 2^24 and the largest. Or infinities."""
    first = _first(nest, lambda t: t.numel() > 0 and t.dtype not in (torch.bool,) and not t.is_complex())
    if first is None:
        return None

    def change(t, _):
        if t.dtype is not first.dtype or t.numel() < 2 or not t.is_contiguous():
            return t
        if t.is_floating_point():
            values = [float("nan"), -0.0, 3e4, -3e4, 1e-4, -1.5, 0.5, 2.5]
            if infinite:
                values = [float("inf"), -float("inf")]
        elif infinite:
            return t
        else:
            limits = torch.iinfo(t.dtype)
            values = [limits.max, limits.min, min(limits.max, 2**24 + 1), 0, 1]
        new = t.clone()
        n = min(len(values), t.numel())
        new.view(-1)[:n] = torch.tensor(values[:n], dtype=t.dtype)
        return new

    return _map_tensors(nest, change)


def _aliased(nest):
    """A second tensor of the first one's type and size becomes the first one itself."""
    first = _first(nest, lambda t: True)

    def change(t, position):
        return first if position and t is not first and (t.shape, t.dtype) == (first.shape, first.dtype) else t

    return _map_tensors(nest, change) if first is not None else None


def _mixed(nest):
    """The second tensor in another dtype of the same kind."""
    other = {torch.float32: torch.float16, torch.float16: torch.float32, torch.int64: torch.int32}
    first = _first(nest, lambda t: True)

    def change(t, position):
        return t.to(other[t.dtype]) if position == 1 and t.dtype is first.dtype and t.dtype in other else t

    return _map_tensors(nest, change) if first is not None else None


def _broadcast(nest):
    """The second tensor with one row where the first one has many; both keep their dimensions."""
    first = _first(nest, lambda t: True)

    def change(t, position):
        return t[:1].clone() if position == 1 and t.shape == first.shape and t.dim() and len(t) > 1 else t

    return _map_tensors(nest, change) if first is not None else None


def _negative(nest):
    """Indices counted from the end."""
    tensors = tensors_in(nest)
    if len(tensors) < 2 or tensors[0].dtype is torch.int64 or not tensors[0].dim():
        return None
    return _map_tensors(nest, lambda t, p: -1 - t.abs() % 2 if p and t.dtype is torch.int64 and t.numel() else t)


def _scalar(nest):
    """Tensors without dimensions."""
    return _map_tensors(nest, lambda t, _: t.flatten()[0].clone() if t.dim() and t.numel() else t)


_CHANGES = {
    "special": _special,
    "infinite": lambda nest: _special(nest, infinite=True),
    "aliased": _aliased,
    "mixed": _mixed,
    "broadcast": _broadcast,
    "negative": _negative,
    "scalar": _scalar,
}


def _variants(case: Case, names):
    for name in names:
        with torch.no_grad():
            try:
                nest = _CHANGES[name](case.nest()) if name in _CHANGES else make_variant(name, case.nest())
            except (RuntimeError, TypeError, IndexError):
                continue
        if nest is not None:
            yield Case(f"{case.label} {name}", *nest)


# ---- all cases -----------------------------------------------------------------------------------------------------


def _signature(nest):
    def described(x):
        return (x.dtype, *x.shape, x.stride(), x.storage_offset()) if isinstance(x, torch.Tensor) else x

    return repr(tree_map(described, nest))


def cases(op: str, index: dict, dtypes=DTYPES, most: int = 100) -> list[Case]:
    """The cases of an overload. `index` says which OpInfos reach which overloads: {OpInfo: {mode: overloads}}.

    The first dtype that there is, float32 as a rule, in full breadth; the next two with fewer samples in every layout,
    the others in some."""
    known = set(torch._C._dispatch_get_all_op_names())
    wanted = {op}
    sources = _sources(index, wanted)
    if not sources:
        wanted = {other for other in relatives(op) if f"aten::{other}" in known}
        sources = _sources(index, wanted)
    sources.sort(key=lambda s: (_distance(op, s[0]), s))
    by_dtype = {}
    for dtype in dtypes:
        found = [Case(f"by hand {dtype} {i}", *call) for i, call in enumerate(_written(op, getattr(torch, dtype)))]
        for name, mode in sources[:4]:
            info = opdb.ops_by_name()[name]
            if getattr(torch, dtype) not in opdb.cpu_dtypes(info):
                continue
            recorder = _Recorder(wanted)
            run_opinfo(name, getattr(torch, dtype), [mode], recorder)
            for i, (other, args, kwargs) in enumerate(recorder.calls):
                try:
                    nest = (args, kwargs) if other == op else borrow(op, other, args, kwargs)
                except Exception:  # the other overload does not take these arguments
                    continue
                if nest is not None:
                    found.append(Case(f"{name} {mode} {dtype} {i}", *nest))
        if found:
            by_dtype[dtype] = found
    return _mix(op, by_dtype, most)


def _written(op, dtype):
    """The calls by hand; those of `mm` serve `mm.out`, too, which has the same kernel as a rule, and one more, whose
    result has to be resized."""
    base, _, which = op.rpartition(".")
    found = judge_samples.calls(op, dtype)
    if found or which != "out":
        return found
    borrowed = [borrow(op, base, *call) for call in judge_samples.calls(base, dtype)]
    borrowed = [call for call in borrowed if call is not None]
    return borrowed + [(args, {**kwargs, "out": kwargs["out"].new_empty(0)}) for args, kwargs in borrowed[:1]]


def _sources(index, wanted):
    return sorted((name, mode) for name, by_mode in index.items() for mode, ops in by_mode.items() if wanted & set(ops))


def _distance(op, opinfo):
    """OpInfos named like the operator come first."""
    base = op.partition(".")[0].strip("_")
    name = opinfo.rpartition(".")[2]
    return 0 if name == base else 1 if base in name or name in base else 2


def _mix(op, by_dtype, most):
    """Rounds over dtypes, so that a cut leaves something of each; the first dtype with all its variants first."""
    generator = torch.Generator().manual_seed(zlib.crc32(op.encode()))
    chosen: list[Case] = []
    seen = set()

    def take(case):
        signature = _signature(case.nest())
        room = len(chosen) < most or case.label.endswith("large")
        if room and (signature not in seen or case.label.split()[-1] in _CHANGES):
            seen.add(signature)
            chosen.append(case)

    for round_, count in enumerate((4, 2, 4)):
        for position, calls in enumerate(by_dtype.values()):
            order = torch.randperm(len(calls), generator=generator).tolist()
            by_hand = sum(case.label.startswith("by hand") for case in calls)  # they take no other call's place
            start = calls[: by_hand + count] if round_ == 0 else [calls[i] for i in order[:count]]
            largest = max(start, key=_elements)
            for case in start:
                take(case)
                if position == 0 or (case is largest and round_ == 0):
                    for variant in _variants(case, (*CHANGES, *(LAYOUTS if position < 3 else FEW_LAYOUTS))):
                        take(variant)
    for calls in by_dtype.values():  # last: the slowest
        for case in sorted(calls, key=_elements)[-2:]:
            if (nest := _large(case.nest())) is not None:
                take(Case(f"{case.label} large", *nest))
    return chosen


def _elements(case):
    return sum(t.numel() for t in tensors_in(case.nest()))
