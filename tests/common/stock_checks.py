"""Cases that must do on flagos what they do on cuda: the same launches, results, versions and errors.

Run by test_like_stock.py on the null CUDA, once as cuda without torch_fl and once as flagos:

    python tests/common/stock_checks.py cuda|flagos

Prints a JSON object: name of the case -> what was seen. Every case runs twice and the second time counts, because what
is made once (states, handles, layouts) is no part of it.
"""

import itertools
import json
import re
import sys
import warnings

import torch
import torch.nn.functional as F

from tests.common import list_operators, null_cuda

CASES = {}


def case(*rows):
    """Registers a function of (device, *row) for every row: lists of values whose products are the rows."""

    def register(function):
        for row in itertools.product(*rows):
            CASES[" ".join([function.__name__, *map(str, row)])] = lambda device, row=row: function(device, *row)
        return function

    return register


def described(x):
    if isinstance(x, torch.Tensor):
        kind = x.device.type.replace("flagos", "cuda")
        return [str(x.dtype), list(x.shape), list(x.stride()), kind, x.is_conj(), x.is_neg()]
    if isinstance(x, (list, tuple)):
        return [described(y) for y in x]
    return repr(x)


def seen(function, device):
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            log, result = null_cuda.launches(lambda: function(device))
            # Which addresses a stream handle or an event has is anybody's guess.
            found = {"log": [re.sub(r"0x[0-9a-f]{5,}", "*", line) for line in log], "result": described(result)}
        except Exception as error:
            found = {"error": [type(error).__name__, str(error).split("\nException raised from")[0]]}
    return found | {"warnings": [str(w.message) for w in caught]}


def versions(*values):
    lists = [x if isinstance(x, list) else [x] for x in values]
    return [t._version for x in lists for t in x if isinstance(t, torch.Tensor)]


def randn(device, *size, dtype=torch.float32, grad=True):
    return torch.randn(*size, device=device, dtype=dtype, requires_grad=grad)


def with_backward(outputs, *leaves):
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    seeds = [torch.ones_like(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)]


# ---- cuDNN -----------------------------------------------------------------------------------------------------------


@case([(2, 3), (2, 3, 4), (2, 3, 4, 4), (2, 3, 2, 4, 4)], [torch.float32, torch.float16, torch.bfloat16], [True, False])
def batch_norm(device, shape, dtype, training):
    x = randn(device, *shape, dtype=dtype)
    bn = torch.nn.BatchNorm2d(3, device=device).train(training)
    out = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training)
    return [*with_backward(out, x, bn.weight, bn.bias), bn.running_mean, bn.running_var]


@case([(0,), (0, 3), (0, 3, 4), (2, 0, 4), (2, 3, 0, 4)], [True, False])
def batch_norm_empty(device, shape, affine):
    x = randn(device, *shape)
    channels = shape[1] if len(shape) > 1 else 3
    weight = randn(device, channels) if affine else None
    mean = torch.zeros(channels, device=device)
    return with_backward(torch.batch_norm(x, weight, weight, mean, mean, True, 0.1, 1e-5, True), x)


@case(["mean", "weight", "none in evaluation", "eps", "channels last", "no bias", "1 dimension"])
def batch_norm_with(device, what):
    x, mean, weight, bias = (randn(device, *s, grad=False) for s in ((2, 3, 4, 4), (3,), (3,), (3,)))
    training, eps = True, 1e-5
    if what == "mean":
        mean = mean[:2]
    elif what == "weight":
        weight = weight[:2]
    elif what == "none in evaluation":
        mean, training = None, False
    elif what == "eps":
        eps = 1e-9
    elif what == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif what == "no bias":
        bias = None
    else:
        x = x[0, 0, 0]
    return torch._batch_norm_impl_index(x, weight, bias, mean, mean, training, 0.1, eps, True)


@case([True, False], ["bilinear", "nearest", "bicubic"], ["zeros", "border"], [torch.float32, torch.float16])
def grid_sample(device, align, mode, padding, dtype):
    x, grid = randn(device, 2, 3, 4, 4, dtype=dtype), randn(device, 2, 5, 5, 2, dtype=dtype)
    return with_backward(F.grid_sample(x, grid, mode, padding, align), x, grid)


@case([(2, 1025, 2, 2), (0, 3, 4, 4), (2, 3, 2, 2, 2)])
def grid_sample_of(device, shape):
    grid = randn(device, shape[0], *[3] * (len(shape) - 2), len(shape) - 2)
    return F.grid_sample(randn(device, *shape), grid, align_corners=True)


KINDS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "tanh": torch.nn.RNN, "relu": torch.nn.RNN}


def recurrent_layer(device, kind, dtype=torch.float32, **options):
    if kind == "relu":
        options["nonlinearity"] = "relu"
    return KINDS[kind](3, 4, 2, **options).to(device, dtype)


@case(
    KINDS,
    ["plain", "bias=False", "bidirectional=True", "batch_first=True", "dropout=0.5", "proj_size=2"],
    [torch.float32, torch.float16],
)
def recurrent(device, kind, option, dtype):
    if option == "proj_size=2" and kind != "lstm":
        return None
    layer = recurrent_layer(device, kind, dtype, **({} if option == "plain" else eval(f"dict({option})")))
    x = randn(device, 5, 2, 3, dtype=dtype)
    output, state = layer(x)
    weights = [(w.untyped_storage().nbytes(), w.storage_offset()) for w in layer.parameters()]
    return with_backward([output, *(state if kind == "lstm" else [state])], x, *layer.parameters()), weights


@case(KINDS, [True, False], [torch.float32, torch.float64, torch.bfloat16])
def recurrent_packed(device, kind, bidirectional, dtype):
    layer = recurrent_layer(device, kind, dtype, bidirectional=bidirectional)
    x = randn(device, 5, 3, 3, dtype=dtype)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [5, 4, 2])
    return with_backward(layer(packed)[0].data, x, *layer.parameters())


RECURRENT = ["unflattened", "no_grad", "eval", "inference", "cudnn off", "no tf32", "autocast", "empty"]


@case([*RECURRENT, "input size", "state size"])
def recurrent_with(device, what):
    layer = recurrent_layer(device, "lstm", dropout=0.5)
    x = randn(device, 5, 0 if what == "empty" else 2, 4 if what == "input size" else 3)
    if what == "unflattened":
        params = [p.detach().clone().requires_grad_() for p in layer.parameters()]
        state = [torch.zeros(2, 2, 4, device=device)] * 2
        return with_backward(torch.lstm(x, state, params, True, 2, 0.0, True, False, False)[0], x, *params)
    if what == "no_grad":
        with torch.no_grad():
            return layer(x)
    if what == "eval":
        return with_backward(layer.eval()(x)[0], x)
    if what == "inference":
        with torch.inference_mode():
            return layer(x)
    if what == "cudnn off":
        with torch.backends.cudnn.flags(enabled=False):
            return layer(x)
    if what == "no tf32":
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return with_backward(layer(x)[0], x, *layer.parameters())
    if what == "autocast":
        with torch.autocast(device, torch.float16):
            output = layer(x)[0]
        return [str(g.dtype) for g in with_backward(output, x, *layer.parameters())]
    if what == "state size":
        return layer(x, [torch.zeros(2, 2, 5, device=device)] * 2)
    return layer(x)


@case(["twice", "seeded between", "moved twice", "deepcopy", "state_dict"])
def recurrent_state(device, what):
    import copy

    layer, x = recurrent_layer(device, "gru", dropout=0.5), randn(device, 5, 2, 3)
    first = layer(x)[0]
    if what == "seeded between":
        torch.manual_seed(1)
    elif what == "moved twice":
        layer = layer.cpu().to(device)
    elif what == "deepcopy":
        layer = copy.deepcopy(layer)
    elif what == "state_dict":
        layer.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()})
    return [first, layer(x)[0]]


@case(["none", "mean", "sum"], ["list", "cpu", "device"], ["cpu", "device"], [torch.int32, torch.int64], [2, 3])
def ctc_loss(device, reduction, lengths, targets, dtype, dim):
    x = randn(device, *(5, 2, 4)[: 1 if dim == 2 else 3], *([4] if dim == 2 else [])).log_softmax(-1)
    many = 1 if dim == 2 else 2
    t = torch.tensor([1, 2, 1, 3][: 2 * many], dtype=dtype, device="cpu" if targets == "cpu" else device)
    sizes = [(5,) * many, (2,) * many]
    if lengths != "list":
        sizes = [torch.tensor(s, dtype=dtype, device="cpu" if lengths == "cpu" else device) for s in sizes]
    return with_backward(F.ctc_loss(x, t, *sizes, reduction=reduction), x)


@case([1, 2, 3], [torch.float32, torch.bfloat16], [True, False])
def convolution(device, dims, dtype, transposed):
    kind = ("ConvTranspose" if transposed else "Conv") + f"{dims}d"
    layer = getattr(torch.nn, kind)(4, 4, 3, stride=2, groups=2).to(device, dtype)
    x = randn(device, 2, 4, *[8] * dims, dtype=dtype)
    return with_backward(layer(x), x, *layer.parameters())


# ---- other choices by the device's name ------------------------------------------------------------------------------


@case(["softmax", "log_softmax"], [torch.float16, torch.bfloat16], [torch.float32, torch.float64, None])
def softmax(device, name, dtype, result):
    x = randn(device, 3, 5, dtype=dtype)
    with torch.no_grad():
        getattr(torch, name)(x, 0, dtype=result, out=torch.empty(3, 5, device=device, dtype=result or dtype))
    return with_backward(getattr(torch, name)(x, -1, dtype=result), x)


@case([0, 1, -1], [torch.float32, torch.float16])
def weight_norm(device, dim, dtype):
    v, g = randn(device, 3, 4, dtype=dtype), randn(device, *[(3, 1), (1, 4), (1, 4)][dim], dtype=dtype)
    return with_backward(torch._weight_norm(v, g, dim), v, g)


TRANSFORMS = "fft ifft rfft irfft hfft ihfft fft2 ifft2 rfft2 irfft2 hfft2 ihfft2 fftn ifftn rfftn irfftn hfftn ihfftn"


@case(TRANSFORMS.split(), [torch.float16, torch.complex32], ["exact", "empty", "strided", "wrong"])
def half_transform_out(device, name, dtype, out):
    transform = getattr(torch.fft, name)
    halved = "irfft" in name or ("hfft" in name and "ihfft" not in name)
    x = torch.randn(4, 8, 9 if halved else 8, device=device).to(dtype)  # lengths have to be powers of two
    result = transform(x)
    of = {"exact": result.shape, "empty": (0,), "strided": (*result.shape, 2), "wrong": result.shape}[out]
    into = torch.empty(of, dtype=torch.int32 if out == "wrong" else result.dtype, device=device)
    if out == "strided":
        into = into[..., 0]
    assert transform(x, out=into) is into
    return into


@case(["max", "min", "median", "nanmedian"], [torch.float32, torch.float16, torch.float64], [False, True])
def extreme_backward(device, name, dtype, again):
    x = randn(device, 3, 4, dtype=dtype)
    y = getattr(torch, name)(x * 2)
    (first,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    if again:
        first, *_ = torch.autograd.grad(y, x, torch.ones_like(y))
    return [y, first, y.grad_fn.name()]


@case([torch.float32, torch.float16, torch.complex64, torch.float64], [0.5, 1, 2, float("inf")], [False, True])
def renorm_backward(device, dtype, p, inplace):
    x = randn(device, 3, 4, dtype=dtype)
    y = (x * 2).renorm_(p, 0, 1.0) if inplace else x.renorm(p, 0, 1.0)
    return with_backward(y, x)


@case(["cummax", "cummin"], [torch.float32, torch.float16])
def cumulative_backward(device, name, dtype):
    x = randn(device, 3, 4, dtype=dtype)
    return with_backward(getattr(torch, name)(x, 1)[0], x)


# ---- versions --------------------------------------------------------------------------------------------------------


LIST_OPERATORS = list_operators.operators()


@case(LIST_OPERATORS, [torch.float32, torch.int64])
def list_versions(device, name, dtype):
    with torch.inference_mode():  # whatever is made here is used again outside
        torch._foreach_add_([torch.ones(2, device=device)], 1)
    positional, keyword = list_operators.arguments(LIST_OPERATORS[name], device, dtype)
    LIST_OPERATORS[name](*positional, **keyword)
    return versions(*positional, *keyword.values())


@case(["twice the same", "made in inference mode"])
def list_of(device, what):
    x = torch.ones(3, device=device)
    if what == "made in inference mode":
        with torch.inference_mode():
            x = torch.ones(2, device=device)
    torch._foreach_add_([x, x], 1)
    return versions(x)


# ---- copies, errors --------------------------------------------------------------------------------------------------

BITS = {"plain": lambda t: t, "conj": torch.conj, "neg": torch._neg_view, "both": lambda t: torch._neg_view(t.conj())}


@case(BITS, BITS, ["to host", "to device", "on device"], [True, False], ["", "strided", "other dtype"])
def lazy_copy(device, to, source, way, non_blocking, how):
    a = torch.empty(4, 3, dtype=torch.complex64, device="cpu" if way == "to host" else device)
    b = torch.empty(4, 3, dtype=torch.complex64, device="cpu" if way == "to device" else device)
    if how == "strided":
        b = b.t().contiguous().t()
    elif how == "other dtype":
        b = b.to(torch.complex128)
    a = BITS[to](a)
    a.copy_(BITS[source](b), non_blocking)
    return a


@case(BITS, ["cpu", "clone", "to", "to dtype", "contiguous", "resolve", "tolist", "pinned"])
def lazy_move(device, bits, how):
    x = BITS[bits](torch.zeros(4, 3, dtype=torch.complex64, device=device))
    host = BITS[bits](torch.zeros(4, 3, dtype=torch.complex64))
    ways = {
        "cpu": lambda: x.cpu(),
        "clone": lambda: x.clone(),
        "to": lambda: host.to(device),
        "to dtype": lambda: x.to(torch.complex128),
        "contiguous": lambda: x.t().contiguous(),
        "resolve": lambda: x.resolve_conj().resolve_neg(),
        "tolist": lambda: len(x.tolist()),
        "pinned": lambda: x.to("cpu", non_blocking=True),
    }
    return ways[how]()


ERRORS = {
    "devices": lambda x, host: x + host,
    "devices of a product": lambda x, host: x @ host,
    "devices of a list": lambda x, host: torch.cat([x, host]),
    "devices of a foreach": lambda x, host: torch._foreach_add_([x], [host]),
    "out on the host": lambda x, host: torch.add(x, x, out=host),
    "index": lambda x, host: x[5],
    "index on another device": lambda x, host: host[x.long()],
    "generator": lambda x, host: x.uniform_(generator=torch.Generator()),
    "sizes": lambda x, host: x @ x[:, :2],
    "dtype": lambda x, host: torch.bmm(x[None], x[None].double()),
    "argument": lambda x, host: F.embedding(x, x),
    "embedding on the host": lambda x, host: F.embedding(host.long(), x),
    "singular": lambda x, host: torch.linalg.cholesky(x[:, :2]),
    "not implemented": lambda x, host: torch.linalg.eigvals(x.half()),
    "backward": lambda x, host: x.requires_grad_().sum().backward(host),
    "where": lambda x, host: torch.where(x > 0, host, x),
    "scatter": lambda x, host: x.scatter_(0, host.long(), x),
    "linear": lambda x, host: F.linear(x, host),
    "set_": lambda x, host: x.set_(host),
    "batch norm": lambda x, host: F.batch_norm(x[None], host[0], host[0], training=True),
}


@case(ERRORS)
def error(device, name):
    return ERRORS[name](torch.ones(3, 3, device=device), torch.ones(3, 3))


third_party = torch.library.Library("stock_checks", "DEF")
third_party.define("where(Tensor[] xs) -> Tensor[]")
third_party.define("change_(Tensor(a!)[] xs, int times) -> ()")
third_party.define("change_one_(Tensor(a!) x, int times) -> Tensor(a!)")
third_party.define("change_and_fail_(Tensor(a!) x) -> ()")
SEEN = []


def change(x, times):
    for _ in range(times):
        x.add_(1)
    return x


def change_and_fail(x):
    x.add_(1)
    raise ValueError("after one change")


third_party.impl("where", lambda xs: [SEEN.append([x.device.type for x in xs]), xs[0] + 1][1:], "CUDA")
third_party.impl("change_", lambda xs, times: [change(x, times) for x in xs] and None, "CUDA")
third_party.impl("change_one_", change, "CUDA")
third_party.impl("change_and_fail_", change_and_fail, "CUDA")


@case(["where", "list", "list not changed", "one", "one not changed", "failing"])
def other_library(device, what):
    operators, x, y = torch.ops.stock_checks, torch.ones(3, device=device), torch.ones(2, device=device)
    if what == "where":
        return [operators.where([x, torch.ones(2)]), SEEN[-1]]
    times = 0 if "not" in what else 2
    if what == "failing":
        try:
            operators.change_and_fail_(x)
        except ValueError:
            operators.change_one_(y, 1)  # must not inherit anything
        return versions(y)
    if "list" in what:
        operators.change_([x, y], times)
        return versions([x, y])
    assert operators.change_one_(x, times) is x
    return versions(x)


@case([1, 2], [{}, {"alpha": 3.0}])
def jiterator(device, outputs, options):
    module = torch.cuda.jiterator if device == "cuda" else torch.flagos.jiterator
    if outputs == 1:
        code = "template <typename T> T half_a_sum(T x, T y, T alpha) { return x + alpha * y; }"
        function = module._create_jit_fn(code, alpha=1.0)
    else:
        code = "template <typename T> void both(T x, T y, T alpha, T& a, T& b) { a = x; b = alpha * y; }"
        function = module._create_multi_output_jit_fn(code, 2, alpha=1.0)
    return function(torch.ones(3, 4, device=device), torch.ones(4, device=device), **options)


def main():
    torch.backends.cuda.enable_cudnn_sdp(False)
    device, pattern = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    found = {}
    for name, function in CASES.items():
        if re.search(pattern, name):
            seen(function, device)
            found[name] = seen(function, device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
