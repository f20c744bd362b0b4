"""graph_decode generates what the model's generate does, in few kernels, and leaves the model as it was."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import torch_fl
from tests.common import null_cuda
from tests.common.process import check_python
from torch_fl.flagos import decode

pytest.importorskip("transformers", reason="transformers is not installed (requirements/demo.txt)")
cuda = pytest.mark.cuda
ROOT = Path(__file__).resolve().parents[2]


def build(dtype=torch.float32, **changes):
    from torch_fl.demo import workload

    config = workload.small_config(hidden_size=96, intermediate_size=256, num_hidden_layers=2, **changes)
    return workload.build_model(config).to("flagos", dtype)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.mark.parametrize("batch", [1, 2])
def test_equals_generate(model, device, batch):
    decoder = torch.flagos.graph_decode(model, max_length=45, batch=batch)
    assert decoder.uses_graph == (torch_fl.chip() == "cuda")
    for length in (5, 1, 9):  # the later prompts reuse the recording
        ids = torch.randint(0, 256, (batch, length)).to(device)
        expected = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
        )
        assert torch.equal(decoder.generate(ids, 20), expected)


@cuda
def test_equals_its_eager_step(model, device):
    ids = torch.randint(0, 256, (1, 7)).to(device)
    results = [torch.flagos.graph_decode(model, 64, graph=graph).generate(ids, 40) for graph in (True, False)]
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 6}, {"attn_implementation": "eager"}], ids=str)
def test_chooses_what_the_model_finds_best(device, dtype, changes):
    """To rounding: where the model's own logits of two tokens are that close, either may be chosen."""
    model = build(dtype, **changes)
    ids = torch.randint(0, 256, (1, 7)).to(device)
    fused, plain = (torch.flagos.graph_decode(model, 64, fuse_norms=fuse) for fuse in (True, False))
    assert (fused.fused_norms, plain.fused_norms) == (9, 0)
    for decoder in (fused, plain):
        tokens = decoder.generate(ids, 40)
        with torch.no_grad():
            logits = model(tokens).logits[:, 6:-1].float()
        short = logits.amax(-1) - logits.gather(-1, tokens[:, 7:, None])[..., 0]
        assert short.max() <= 16 * torch.finfo(dtype).eps * logits.abs().max()
    if torch_fl.chip() == "host":  # which has no fused kernel: the fused form is the same arithmetic there
        assert torch.equal(fused.generate(ids, 40), plain.generate(ids, 40))


def test_refuses_what_does_not_fit(model, device):
    decoder = torch.flagos.graph_decode(model, 16, graph=False)
    ids = torch.zeros((1, 10), dtype=torch.long, device=device)
    with pytest.raises(ValueError, match="10 prompt tokens and 7 new ones do not fit max_length 16"):
        decoder.generate(ids, 7)
    with pytest.raises(ValueError, match=r"expected prompts of shape \(1, length\), got \(2, 10\)"):
        decoder.prefill(ids.expand(2, 10))
    if torch_fl.chip() != "cuda":
        with pytest.raises(RuntimeError, match="records no graphs"):
            torch.flagos.graph_decode(model, 16, graph=True)


def test_refuses_a_window_shorter_than_the_text():
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = MistralConfig(**shape, num_attention_heads=2, num_key_value_heads=1, sliding_window=24)
    model = MistralForCausalLM(config).to("flagos")
    torch.flagos.graph_decode(model, 24)
    with pytest.raises(ValueError, match="needs layers that keep all of 25 tokens, one of this model keeps 24"):
        torch.flagos.graph_decode(model, 25)


# ---- attention and norms of the step -------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_of_one_query(device, groups):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = (torch.randn(3, n, m, 8, device=device) for n, m in ((4, 1), (groups, 16), (groups, 16)))
    mask = torch.zeros(1, 1, 1, 16, device=device)
    mask[..., 11:] = -torch.inf
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // groups
    for options in ({}, {"scaling": 0.3}, {"position_bias": torch.randn(1, 4, 1, 16, device=device)}):
        expected, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        found, _ = decode.one_query_attention(module, query, key, value, mask, **options)
        torch.testing.assert_close(found, expected)


class Norm(torch.nn.Module):
    """As in most models; the others differ from it in one thing each."""

    def __init__(self, weight=None, eps=1e-6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(32) if weight is None else weight)
        self.eps = eps

    def normed(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self.weight * self.normed(x).to(x.dtype)


class PlainRMSNorm(Norm):
    pass


class OneMoreRMSNorm(Norm):
    def forward(self, x):
        return (1 + self.weight) * self.normed(x).to(x.dtype)


class RoundedOnceRMSNorm(Norm):
    def forward(self, x):
        return (self.weight * self.normed(x)).to(x.dtype)


class EpsOutsideRMSNorm(Norm):
    def normed(self, x):
        x = x.float()
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class GatedRMSNorm(Norm):
    def forward(self, x, gate=None):
        return super().forward(x)


class BiasedRMSNorm(Norm):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(32))


class OneDeviceRMSNorm(Norm):
    def forward(self, x):
        if x.device.type == "cpu":
            raise RuntimeError("has no CPU kernel")
        return super().forward(x)


OTHERS = [
    Norm,
    OneMoreRMSNorm,
    RoundedOnceRMSNorm,
    EpsOutsideRMSNorm,
    GatedRMSNorm,
    BiasedRMSNorm,
    OneDeviceRMSNorm,
    lambda: torch.nn.RMSNorm(32, eps=1e-6),
]


def test_only_norms_that_compute_the_same_are_fused(device):
    model = torch.nn.Sequential(*[PlainRMSNorm(), PlainRMSNorm(torch.rand(32))], *[make() for make in OTHERS])
    model.to(device, torch.bfloat16)
    assert [module for module, _ in decode._fused_norms(model, torch.bfloat16)] == [model[0], model[1]]
    model[0].forward = lambda x: x  # somebody's own
    assert [module for module, _ in decode._fused_norms(model, torch.bfloat16)] == [model[1]]
    with decode._forwards([(model[0], abs)]):
        assert model[0](torch.tensor(-1)) == 1
    assert model[0](torch.tensor(-1)) == -1
    x = torch.randn(5, 32, device=device, dtype=torch.bfloat16)
    ((module, fused),) = decode._fused_norms(model, torch.bfloat16)
    torch.testing.assert_close(fused(x), module(x), rtol=2**-7, atol=0)


class ScaledRMSNorm(Norm):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return super().forward(x) * self.scale


def test_every_norm_is_tried_by_itself_and_in_the_models_dtype():
    model = torch.nn.Sequential(ScaledRMSNorm(1.0), ScaledRMSNorm(3.0), PlainRMSNorm()).to(torch.bfloat16)
    model[2].float()  # its result is float32, whatever its input
    assert [module for module, _ in decode._fused_norms(model, torch.bfloat16)] == [model[0]]


def state(model):
    return model.config._attn_implementation, [name for name, m in model.named_modules() if "forward" in vars(m)]


def test_the_model_is_left_as_it_was(device):
    model = build()
    ids = torch.randint(0, 256, (1, 7)).to(device)
    before, logits = state(model), model(ids).logits
    decoder = torch.flagos.graph_decode(model, 32, graph=False)
    decoder.generate(ids, 3)
    assert state(model) == before == ("sdpa", [])
    seen = []

    def fail(module, args):
        seen.append(state(model))
        raise KeyError("in the last norm")

    handle = model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="in the last norm"):
        decoder.step()
    handle.remove()
    assert seen[0][0] != "sdpa" and len(seen[0][1]) == 9
    assert state(model) == before and torch.equal(model(ids).logits, logits)


# ---- what the step launches ----------------------------------------------------------------------------------------

# Of a Qwen3 layer: 8 for its four norms, 7 matrix products, 10 for rotary positions, 2 into the cache, attention,
# SiLU and its product, and 2 additions. Once for all layers: choosing and writing the token, the embedding, the tables
# of the rotary positions, the mask, the last norm and the logits.
LAUNCHES_OF_A_LAYER, LAUNCHES_ONCE = 32, 20

STEP = """
import json, sys, torch
from benchmarks import qwen3
from tests.common import null_cuda
device = sys.argv[1]
if device == "flagos":
    import torch_fl
torch.backends.cuda.enable_cudnn_sdp(False)  # it asks the driver for more than the null CUDA has
logs = []
for layers in (1, 2):
    qwen3.SIZES["small"]["num_hidden_layers"] = layers
    decoder = qwen3.decoder_source().graph_decode(qwen3.build("small", device), max_length=45, graph=False)
    decoder.generate(torch.zeros(1, 9, dtype=torch.long, device=device), 3)
    logs.append(null_cuda.launches(decoder.step)[0])
print(json.dumps(logs))
"""


def logs_of(device):
    environment = null_cuda.environment() | {"PYTHONPATH": str(ROOT)}
    if device == "cuda":
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    said = check_python(f"import sys; sys.argv[1:] = [{device!r}]\n{STEP}", **environment)
    # Which addresses a stream's handle has is anybody's guess; setting a handle of cuBLAS up launches nothing.
    logs = [[re.sub(r"0x[0-9a-f]+", "*", line) for line in log] for log in json.loads(said.splitlines()[-1])]
    return [[line for line in log if not line.startswith("cublasSet")] for log in logs]


@pytest.mark.skipif(null_cuda.missing() is not None, reason=f"no null CUDA: {null_cuda.missing()}")
def test_launches():
    null_cuda.build()
    with ThreadPoolExecutor() as pool:
        stock, ours = pool.map(logs_of, ("cuda", "flagos"))
    assert ours == stock
    one, two = map(len, ours)
    assert two - one <= LAUNCHES_OF_A_LAYER and 2 * one - two <= LAUNCHES_ONCE, (one, two)
