"""The operators of the inference path, each against the CPU: what a decoder-only language model calls to generate."""

import pytest
import torch
from torch.nn import functional as F

import torch_fl

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def data(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def ids(n=6, high=50):
    return torch.randint(high, (2, n), generator=torch.Generator().manual_seed(3))


# name -> function of (device, dtype); tensors are made on the CPU and moved, so both sides see the same numbers
CASES = {
    "embedding": lambda d, t: F.embedding(ids().to(d), data(50, 16, dtype=t).to(d)),
    "linear": lambda d, t: F.linear(data(2, 6, 16, dtype=t).to(d), data(32, 16, dtype=t, seed=1).to(d)),
    "linear_bias": lambda d, t: F.linear(
        data(2, 16, dtype=t).to(d), data(8, 16, dtype=t).to(d), data(8, dtype=t).to(d)
    ),
    "mm": lambda d, t: data(5, 7, dtype=t).to(d) @ data(7, 3, dtype=t).to(d),
    "mm_transposed": lambda d, t: data(7, 5, dtype=t).to(d).t() @ data(3, 7, dtype=t).to(d).t(),
    "bmm": lambda d, t: torch.bmm(data(4, 5, 6, dtype=t).to(d), data(4, 6, 2, dtype=t).to(d)),
    "addmm": lambda d, t: torch.addmm(data(3, dtype=t).to(d), data(5, 7, dtype=t).to(d), data(7, 3, dtype=t).to(d)),
    "baddbmm": lambda d, t: torch.baddbmm(
        data(2, 3, 3, dtype=t).to(d), data(2, 3, 4, dtype=t).to(d), data(2, 4, 3, dtype=t).to(d)
    ),
    "mv": lambda d, t: data(5, 7, dtype=t).to(d) @ data(7, dtype=t).to(d),
    "rms_norm": lambda d, t: F.rms_norm(data(2, 6, 16, dtype=t).to(d), (16,), data(16, dtype=t).to(d)),
    "rms_norm_by_hand": lambda d, t: (lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(t))(
        data(2, 16, dtype=t).to(d)
    ),
    "layer_norm": lambda d, t: F.layer_norm(data(2, 6, 16, dtype=t).to(d), (16,)),
    "silu": lambda d, t: F.silu(data(2, 16, dtype=t).to(d)),
    "gelu": lambda d, t: F.gelu(data(2, 16, dtype=t).to(d), approximate="tanh"),
    "swiglu": lambda d, t: F.silu(data(2, 16, dtype=t).to(d)) * data(2, 16, dtype=t, seed=1).to(d),
    "softmax": lambda d, t: data(2, 4, 8, dtype=t).to(d).softmax(-1),
    "softmax_float": lambda d, t: F.softmax(data(2, 8, dtype=t).to(d), -1, dtype=torch.float32).to(t),
    "log_softmax": lambda d, t: data(2, 8, dtype=t).to(d).log_softmax(-1),
    "sdpa": lambda d, t: F.scaled_dot_product_attention(
        *(data(1, 2, 6, 8, dtype=t, seed=s).to(d) for s in range(3)), is_causal=True
    ),
    "rotary": lambda d, t: (
        lambda x: x * data(6, 8, dtype=t).cos().to(d) + rotate_half(x) * data(6, 8, dtype=t).sin().to(d)
    )(data(1, 2, 6, 8, dtype=t).to(d)),
    "outer_angles": lambda d, t: (
        torch.outer(torch.arange(6.0).to(d), 1e4 ** -(torch.arange(0, 8, 2).to(d) / 8)).cos().to(t)
    ),
    "causal_mask": lambda d, t: torch.full((6, 6), float("-inf"), device=d).triu(1).to(t),
    "masked_fill": lambda d, t: data(3, 4, dtype=t).to(d).masked_fill((torch.arange(4) > 2).to(d), -1.0),
    "where": lambda d, t: torch.where(
        (data(3, 4) > 0).to(d), data(3, 4, dtype=t).to(d), torch.zeros((), dtype=t, device=d)
    ),
    "cat": lambda d, t: torch.cat([data(1, 2, 3, 8, dtype=t).to(d), data(1, 2, 1, 8, dtype=t).to(d)], -2),
    "repeat_kv": lambda d, t: data(1, 2, 3, 4, dtype=t).to(d)[:, :, None].expand(1, 2, 3, 3, 4).reshape(1, 6, 3, 4),
    "index_copy": lambda d, t: (
        torch.zeros(1, 2, 8, 4, dtype=t)
        .to(d)
        .index_copy_(2, torch.tensor([3, 4]).to(d), data(1, 2, 2, 4, dtype=t).to(d))
    ),
    "slice_assign": lambda d, t: [z := torch.zeros(2, 8, dtype=t).to(d), z[:, 2:4].copy_(data(2, 2, dtype=t).to(d))][0],
    "split_qkv": lambda d, t: torch.cat(
        [p.contiguous().view(-1) for p in data(2, 24, dtype=t).to(d).split([8, 8, 8], -1)]
    ),
    "view_transpose": lambda d, t: data(2, 6, 16, dtype=t).to(d).view(2, 6, 4, 4).transpose(1, 2).contiguous(),
    "cumsum": lambda d, t: torch.ones(2, 6, dtype=torch.int64).to(d).cumsum(-1) - 1,
    "argmax": lambda d, t: data(2, 50, dtype=t).to(d).argmax(-1),
    "topk": lambda d, t: data(2, 50, dtype=t).to(d).topk(5).values,
    "sort": lambda d, t: data(2, 50, dtype=t).to(d).sort(descending=True).values,
    "nucleus": lambda d, t: (lambda s: (s.softmax(-1).cumsum(-1) <= 0.7).sum(-1))(
        data(2, 50).to(d).sort(descending=True).values
    ),
    "gather": lambda d, t: data(2, 50, dtype=t).to(d).gather(1, ids().to(d)),
    "scatter": lambda d, t: torch.zeros(2, 50, dtype=t).to(d).scatter(1, ids().to(d), 1.0),
    "index_last": lambda d, t: data(2, 6, 8, dtype=t).to(d)[:, -1, :],
    "index_tensor": lambda d, t: data(2, 6, 8, dtype=t).to(d)[torch.arange(2).to(d), torch.tensor([5, 2]).to(d)],
    "eq_any": lambda d, t: (ids().to(d)[:, :, None] == torch.tensor([1, 2]).to(d)).any(-1),
    "isin": lambda d, t: torch.isin(ids().to(d), torch.tensor([1, 2, 7]).to(d)),
    "cross_entropy": lambda d, t: F.cross_entropy(data(12, 50, dtype=t).to(d), ids().view(-1).to(d)),
    "mean_pow": lambda d, t: data(2, 16, dtype=t).to(d).pow(2).mean(-1, keepdim=True),
    "einsum": lambda d, t: torch.einsum(
        "bhqd,bhkd->bhqk", data(1, 2, 3, 4, dtype=t).to(d), data(1, 2, 5, 4, dtype=t).to(d)
    ),
    "conv1d": lambda d, t: F.conv1d(data(1, 4, 8, dtype=t).to(d), data(4, 1, 3, dtype=t).to(d), groups=4, padding=2),
    "arange_positions": lambda d, t: torch.arange(3, 9, device=d)[None].expand(2, -1),
    "clamp": lambda d, t: data(2, 8, dtype=t).to(d).clamp(-0.5, 0.5),
    "one_hot": lambda d, t: F.one_hot(ids(high=5).to(d), 5),
    "pad": lambda d, t: F.pad(data(2, 3, dtype=t).to(d), (1, 2), value=7.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_cpu(name, dtype, device):
    with torch.inference_mode():
        expected = CASES[name]("cpu", dtype)
        actual = CASES[name](device, dtype)
    assert actual.is_flagos and actual.dtype is expected.dtype
    # A GPU's fused attention lays its result out as (batch, sequence, head, number), each of its kernels as it likes.
    assert actual.stride() == expected.stride() or (name == "sdpa" and torch_fl.chip() != "host")
    torch.testing.assert_close(actual.cpu(), expected)


def test_sampling_follows_the_seed(device):
    probabilities = data(2, 50).softmax(-1).to(device)
    draws = []
    for _ in range(2):
        torch.manual_seed(11)
        draws.append(torch.multinomial(probabilities, 3).tolist())
    assert draws[0] == draws[1]
    torch.manual_seed(12)
    assert torch.multinomial(probabilities, 3).tolist() != draws[0]


def test_greedy_loop_with_a_cache(device):
    """A toy decoder with a growing key-value cache: tokens equal the CPU's."""

    def generate(where):
        embedding, projection = data(50, 16).to(where), data(16, 50, seed=1).to(where)
        keys = values = torch.empty(1, 1, 0, 16, device=where)
        token, tokens = torch.tensor([[7]], device=where), []
        with torch.no_grad():
            for _ in range(12):
                x = F.embedding(token, embedding)[:, None]
                keys, values = torch.cat([keys, x], 2), torch.cat([values, x * 0.5], 2)
                h = F.scaled_dot_product_attention(x, keys, values)[:, 0, -1]
                token = (h @ projection).argmax(-1, keepdim=True)
                tokens.append(token.item())
        return tokens

    tokens = generate(device)
    assert tokens == generate("cpu") and len(set(tokens)) > 1
