"""Calls written by hand for the judge of FlagGems' kernels: overloads that no OpInfo sample reaches, and known traps.

`CALLS[operator](make)` gives calls, `make(*size)` a CPU tensor of the dtype that is wanted. They join those that
tests/common/judge_cases.py takes from OpInfo samples, and are varied like them.
"""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def _maker(dtype: torch.dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def make(*size):
        if dtype is torch.bool:
            return torch.rand(size, generator=generator) > 0.5
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(size, dtype=torch.float64, generator=generator).to(dtype)
        return torch.randint(0 if dtype is torch.uint8 else -9, 9, size, generator=generator).to(dtype)

    make.dtype = dtype
    return make


def calls(op: str, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    """[(args, kwargs)] for an operator in a dtype; none when there is no hand-written call."""
    row = CALLS.get(op)
    if row is None:
        return []
    function, dtypes = row if isinstance(row, tuple) else (row, FLOATS)
    return list(function(_maker(dtype, 7))) if dtypes is None or dtype in dtypes else []


def _plain(*arguments, **keywords):
    return arguments, keywords


def _depthwise(make):
    for channels, size, kernel, stride, padding in ((4, 9, 3, 1, 1), (2, 8, 5, 2, 2), (3, 7, 1, 1, 0)):
        image, weight = make(2, channels, size, size), make(channels, 1, kernel, kernel)
        for bias in (None, make(channels)):
            yield _plain(image, weight, [kernel] * 2, bias, [stride] * 2, [padding] * 2, [1, 1])


def _flash(make):
    for queries, keys, heads, width, causal in ((16, 16, 2, 64, False), (33, 33, 4, 64, True), (8, 70, 2, 128, False)):
        q, k = make(2, queries, heads, width), make(2, keys, heads, width)
        yield _plain(q, k, make(2, keys, heads, width), None, None, queries, keys, 0.0, causal, False)


def _grouped(make):
    yield _plain(make(3, 16, 32), make(3, 32, 16))
    ends = torch.tensor([16, 32, 48], dtype=torch.int32)
    yield _plain(make(48, 32), make(3, 32, 16), ends)
    yield _plain(make(48, 32), make(3, 32, 64), ends)


def _products(*batch, vector=False, added=False):
    """Sizes of zero, and sizes at which kernels may describe memory to the hardware, which then wants strides and
    starts of 16 bytes."""

    def products(make):
        odd_strides = make(*batch, 32, 5).transpose(-1, -2)
        others = [make(*batch, *size) for size in ((16, 32), (2, 0), (2, 4), (0, 4))]
        for first, columns in zip([odd_strides, *others], (16, 16, 3, 0, 3), strict=True):
            rows, inner = first.shape[-2:]
            tail = () if vector else (columns,)
            yield _plain(*([make(*batch, rows, *tail)] if added else []), first, make(*batch, inner, *tail))

    return products


def _index_put(make):
    rows, columns = torch.tensor([0, 2, 1]), torch.tensor([1, 1, 3])
    for accumulate in (False, True):
        yield _plain(make(4, 5), [rows], make(3, 5), accumulate)
        yield _plain(make(4, 5), [rows, columns], make(3), accumulate)
        yield _plain(make(4, 5, 2), [rows, columns], make(3, 2), accumulate)
        yield _plain(make(4, 5), [rows, -1 - columns], make(3), accumulate)


def _bicubic(make):
    for size, wanted, corners in (((1, 2, 8, 8), [4, 4], False), ((2, 1, 5, 7), [10, 3], True)):
        yield _plain(make(*size), wanted, corners)
    yield _plain(make(1, 3, 6, 6), [9, 9], False, 1.5, 1.5)
    yield _plain(make(2, 3, 4, 4), [6, 6], False, 1.7, 1.7)  # which is not 6 / 4


def _bicubic_backward(make):
    yield _plain(make(1, 2, 4, 4), [4, 4], [1, 2, 8, 8], False)
    yield _plain(make(2, 1, 10, 3), [10, 3], [2, 1, 5, 7], True)
    yield _plain(make(1, 3, 9, 9), [9, 9], [1, 3, 6, 6], False)


def _weight_norm(make):
    yield _plain(make(6, 5), make(6, 1).abs() + 1, 0)
    yield _plain(make(4, 3, 3), make(4, 1, 1).abs() + 1, 0)
    yield _plain(make(6, 5), make(1, 5).abs() + 1, 1)


def _weight_norm_backward(make):
    for (v, g, dim), _ in _weight_norm(make):
        keep = v.dim() - 1 if dim else 0
        norms = v.float().norm(dim=[d for d in range(v.dim()) if d != keep], keepdim=True).to(v.dtype)
        yield _plain(make(*v.shape), v, g, norms, dim)


def _dropout(make):
    for p, train in ((0.3, True), (0.5, True), (0.0, True), (0.5, False)):
        yield _plain(make(40, 50), p, train)


def _replication(make):
    yield _plain(make(1, 2, 3, 4, 5), [1, 2, 1, 0, 2, 1])
    yield _plain(make(2, 3, 4, 5), [0, 1, 2, 0, 1, 1])


def _modes(make):
    for mode in (None, "floor", "trunc"):
        for divisor in (2, -3, 2.5):
            yield ((make(5, 6), divisor), {"rounding_mode": mode})
            yield ((make(33), divisor), {"rounding_mode": mode})


def _true(make):
    yield _plain(torch.ones(3, 4, dtype=make.dtype))
    yield _plain(torch.ones((), dtype=make.dtype))
    yield _plain(torch.ones(3000, dtype=make.dtype))


def _all_true(make):
    yield from _true(make)
    for size in ((4, 5), (2000,)):
        yield _plain(make(*size))


def _no_dimensions(make):
    yield _plain(make(), dim=0)


def _range(make):
    for least, most in ((None, None), (1, 100), (0, None)):
        yield _plain(7, least, most, make(1))


def _random(make):
    yield _plain(make(60, 70))
    yield _plain(make(5))
    yield _plain(make(3, 4, 5).transpose(0, 2))


def _permutations(make):
    for n in (0, 1, 17, 4096):
        yield ((n,), {"dtype": make.dtype, "device": torch.device("cpu")})


def _copies(make):
    for size in ((), (3,), (4, 5), (2, 3, 4)):
        yield _plain(make(*size))
    yield _plain(make(4, 5).t())


# What reference results are known to go wrong with: a list of one tensor, indices from the end, small integers whose
# sum needs a wider type, values that a float32 cannot tell apart.
def _one_tensor(make):
    yield _plain([make(3, 4)])
    yield _plain([make(5)], 0)


def _negative_index(make):
    for index in (torch.tensor([-1, 0, 1]), torch.tensor([[-1], [-2]])):
        yield _plain(make(4, 5), [index])
    yield _plain(make(4, 5), [torch.tensor([-1, 0, 1], dtype=torch.int32)])


def _pairs(make):
    yield _plain(make(4, 5), make(4, 5))


def _ends(make):
    yield ((5,), {"dtype": make.dtype, "device": torch.device("cpu")})
    if make.dtype is torch.float32:  # the dtype follows from the number
        for end in (7, 2.5, 4097, 0):
            yield ((end,), {"device": torch.device("cpu")})


def _starts(make):
    for start, end in ((1, 9), (-2.5, 3.0), (0.5, 1000.5)) if make.dtype is torch.float32 else ():
        yield ((start, end), {"device": torch.device("cpu")})


def _steps(make):
    for numbers in ((0, 1, 0.25), (5, -3, -2), (0.5, 900.0, 0.5)) if make.dtype is torch.float32 else ():
        yield (numbers, {"device": torch.device("cpu")})


def _truth(make):
    for x in (make(4, 5) / 4, torch.tensor([0.0, -0.0, 0.3, -0.9, 1e-4], dtype=make.dtype)):
        yield ((x,), {"dtype": torch.bool})


def _windows_beyond(make):
    yield _plain(make(1, 2, 1, 9), [1, 7], [1, 3], [0, 0], True)
    yield _plain(make(2, 3, 9, 9), [3], [2], [1], True, False, 2)


def _one_number(make):
    yield _plain(make(2, 3, 9, 9), make(2, 3, 9, 9), [3, 3], [1, 1], [1], False, False, 2)
    yield _plain(make(2, 3, 3, 3), make(2, 3, 9, 9), [3], [], [0], False, True, None)


def _first_dimension(make):
    for x in (make(5, 10, 5), make(7, 4)):
        yield _plain(x, 0)


def _whole_size(make):
    """Indices as many as elements, where a kernel may leave the copy that it has made of the argument."""
    for dim, size in ((0, (5, 4)), (1, (5, 4)), (1, (3, 4, 5))):
        yield _plain(make(*size), dim, torch.arange(make(*size).numel()).reshape(size) % size[dim], make(*size))


def _no_matrices(make):
    yield _plain(make(0, 7, 5))
    yield _plain(make(3, 0, 5))


def _many(make):
    ones = torch.ones(1000, dtype=make.dtype)
    yield _plain(ones)
    yield _plain(ones.reshape(10, 100))


def _close(make):
    if make.dtype is torch.int64:
        yield _plain(torch.tensor([2**24 + 1, 2**40 + 1]), torch.tensor([2**24, 2**40]))
    if make.dtype is torch.float64:
        yield _plain(
            torch.tensor([1 + 1e-12, 3.0, 2**24 + 1], dtype=make.dtype), torch.tensor([1.0, 3.0, 2**24]).double()
        )


def _close_swapped(make):
    for (a, b), keywords in _close(make):
        yield (b, a), keywords


CALLS = {
    "_assert_async": (_true, (*FLOATS, torch.bool, torch.int64)),
    "_conv_depthwise2d": _depthwise,
    "_flash_attention_forward": (_flash, (torch.float16, torch.bfloat16)),
    "_functional_sym_constrain_range_for_size": (_range, (torch.float32, torch.float16, torch.int64)),
    "_grouped_mm": (_grouped, (torch.bfloat16,)),
    "_index_put_impl_": _index_put,
    "_is_all_true": (_all_true, (torch.bool,)),
    "_upsample_bicubic2d_aa": _bicubic,
    "_upsample_bicubic2d_aa_backward": _bicubic_backward,
    "_weight_norm_interface": _weight_norm,
    "_weight_norm_interface_backward": _weight_norm_backward,
    "aminmax": (_no_dimensions, (*FLOATS, *INTEGERS)),
    "lift_fresh_copy": (_copies, None),
    "mm": _products(),
    "addmm": _products(added=True),
    "bmm": _products(3),
    "baddbmm": _products(3, added=True),
    "mv": _products(vector=True),
    "addmv": _products(vector=True, added=True),
    "_to_copy": _truth,
    "avg_pool2d": _windows_beyond,
    "avg_pool2d_backward": _one_number,
    "scatter_add_": (_whole_size, (*FLOATS, torch.int64)),
    "sort": _first_dimension,
    **dict.fromkeys(("triu", "triu_", "tril", "tril_"), (_no_matrices, None)),
    "upsample_bicubic2d": _bicubic,
    "native_dropout": _dropout,
    "rand_like": _random,
    "randperm": (_permutations, (torch.int64, torch.int32, torch.int16, torch.float32)),
    "replication_pad3d": _replication,
    "div.Scalar_mode": _modes,
    "div_.Scalar_mode": _modes,
    **{f"{name}.Tensor": (_pairs, None) for name in ("add", "mul", "sub", "div")},
    "arange": (_ends, (*FLOATS, torch.int64, torch.int32)),
    "arange.start": _starts,
    "arange.start_step": _steps,
    "cat": (_one_tensor, None),
    "index.Tensor": (_negative_index, None),
    "sum": (_many, None),
    "eq.Tensor": (_close, None),
    "ne.Tensor": (_close, None),
    "gt.Tensor": (_close, None),
    "ge.Tensor": (_close, None),
    "lt.Tensor": (_close_swapped, None),
    "le.Tensor": (_close_swapped, None),
}
