"""graph_decode: the decode step of a transformers model as one graph.

Generating a token eagerly launches a thousand small kernels, and the host is slower than the GPU. With a static
key-value cache every step does the same work at the same addresses, so it can be recorded once. The recorded step also
chooses the token, feeds it back and advances the position: between two tokens the host only replays.

What a replay takes is then the number of its kernels. The step therefore computes what the model's modules compute in
fewer of them: a mask made once for all layers, attention without copies, one position for all layers of the cache, and
norms in two kernels. The model has these forms only while a step runs in Python, which is while it is recorded.
"""

import contextlib
import copy
import inspect

import torch

ATTENTION = "graph_decode"  # under which transformers knows one_query_attention


class GraphedDecoder:
    """Greedy generation with a static cache and, where the device records graphs, one replay per token.

    model: a causal language model of transformers, on the device already. batch: sequences at a time. max_length: most
    tokens of prompt and continuation together. graph: False runs the same step eagerly; None decides by the device.

    fuse_norms: True computes the RMSNorm modules of the step with torch's fused kernel. It sums the squares of a row in
    float32 as they do, but in another order, so that a value may be rounded differently in its last place and, where
    two tokens are almost equally likely, the other one may be chosen. What is rounded when stays: first the norm to the
    dtype of its input, then its product with the weight. The prompt is always computed by the model's own modules, and
    modules that compute something else than this (1 + weight, one rounding) always run as they are. `fused_norms` says
    how many are fused. With False the step's arithmetic is the model's own, with a static cache and a mask.

    Recording, and stepping without a graph, change the model's norms and its config's attention and put them back: no
    other thread may run the model meanwhile. Replaying does not touch the model.
    """

    def __init__(self, model, max_length: int, batch: int = 1, graph: bool | None = None, fuse_norms: bool = True):
        if max_length < 2 or batch < 1:
            raise ValueError(
                f"graph_decode: max_length must be at least 2 and batch at least 1, got {max_length} and {batch}"
            )
        attention = model.config._attn_implementation
        layers = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        if attention not in ("sdpa", "eager") or layers != {"full_attention"}:
            raise ValueError(
                f"graph_decode: needs full attention by sdpa or eager, this model has {sorted(layers)} by {attention}"
            )
        self.model = model.eval()
        self.max_length = max_length
        self.device = next(model.parameters()).device
        self._capture = _capture_of(self.device)
        if graph and self._capture is None:
            raise RuntimeError(f"graph_decode: {self.device} records no graphs; pass graph=False")
        self.uses_graph = self._capture is not None and graph is not False
        self._tokens = torch.zeros((batch, max_length), dtype=torch.long, device=self.device)
        self._position = torch.zeros((1,), dtype=torch.long, device=self.device)
        self._slots = torch.arange(max_length, device=self.device)
        self._cache = _cache(model.config, max_length, self._position)
        self._norms = _fused_norms(model, model.dtype) if fuse_norms else []
        self.fused_norms = len(self._norms)
        self._graph = None

    @torch.no_grad()
    def _step(self) -> None:
        """Reads the token at the position, writes the next one behind it, advances. No host decision in between."""
        token = self._tokens.index_select(1, self._position)
        with _attention(self.model.config), _forwards(self._norms):
            logits = self.model(
                input_ids=token,
                attention_mask=self._mask(),
                position_ids=self._position.expand(token.shape),
                past_key_values=self._cache,
                use_cache=True,
            ).logits
        self._position.add_(1)
        self._tokens.index_copy_(1, self._position, logits[:, -1:].argmax(-1))

    def _mask(self) -> torch.Tensor:
        """What one new token may see, made on the device: transformers would look at the position on the host.

        To be added, in the dtype of the scores, and in rows of whole eights: torch would make this of other masks, in
        every layer again."""
        rows = torch.zeros(1, 1, 1, -(-self.max_length // 8) * 8, dtype=self.model.dtype, device=self.device)
        return rows[..., : self.max_length].masked_fill_(self._slots > self._position, -torch.inf)

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor) -> None:
        """Starts anew with these prompts (batch x length) and chooses the first token."""
        if ids.dim() != 2 or ids.shape[0] != self._tokens.shape[0]:
            raise ValueError(
                f"graph_decode: expected prompts of shape ({self._tokens.shape[0]}, length), got {tuple(ids.shape)}"
            )
        length = ids.shape[1]
        if not 0 < length < self.max_length:
            raise ValueError(f"graph_decode: a prompt of {length} tokens does not fit max_length {self.max_length}")
        self._record()
        self._start(ids)

    def _start(self, ids):
        length = ids.shape[1]
        self._cache.reset()
        self._position.zero_()
        self._tokens[:, :length] = ids
        positions = torch.arange(length, device=self.device).expand(ids.shape)
        logits = self.model(
            input_ids=ids, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits
        self._tokens[:, length] = logits[:, -1].argmax(-1)
        self._position.fill_(length)

    def step(self) -> None:
        """One more token."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def generate(self, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """Prompts and their greedy continuations, batch x (length + new_tokens), on the device."""
        total = ids.shape[-1] + new_tokens
        if new_tokens < 1 or total > self.max_length:
            raise ValueError(
                f"graph_decode: {ids.shape[-1]} prompt tokens and {new_tokens} new ones do not fit "
                f"max_length {self.max_length}"
            )
        self.prefill(ids)
        for _ in range(new_tokens - 1):
            self.step()
        return self._tokens[:, :total].clone()

    def _record(self) -> None:
        """Records the step at the first prompt, on a prompt of zeros: the addresses count, not the values."""
        if not self.uses_graph or self._graph is not None:
            return
        self._start(torch.zeros((self._tokens.shape[0], 1), dtype=torch.long, device=self.device))
        make_graph, capture, side_stream = self._capture
        with side_stream():
            for _ in range(min(3, self.max_length - 2)):  # lazy libraries and workspaces come up outside the recording
                self._step()
        self._position.fill_(1)
        graph = make_graph()
        with capture(graph):
            self._step()
        self._graph = graph


# ---- the step in fewer kernels -------------------------------------------------------------------------------------


def _cache(config, length: int, position: torch.Tensor):
    """A static cache whose layers write one new token at `position`; those of transformers count each for itself."""
    from transformers import StaticCache
    from transformers.cache_utils import Cache, StaticLayer

    layers = StaticCache(config=config, max_cache_len=length).layers
    room = min(getattr(layer, "max_cache_len", 0) for layer in layers)
    if room < length:
        raise ValueError(f"graph_decode: needs layers that keep all of {length} tokens, one of this model keeps {room}")

    class Layer(StaticLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            if key_states.shape[2] != 1 or not self.is_initialized:
                return super().update(key_states, value_states, *args, **kwargs)
            self.keys.index_copy_(2, position, key_states)
            self.values.index_copy_(2, position, value_states)
            return self.keys, self.values

    return Cache(layers=[Layer(max_cache_len=length) for _ in layers])


def one_query_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """What transformers computes by sdpa, without copies for one new token.

    The queries that share a key-value head become the rows of one attention, so that keys and values need not be
    repeated (with a mask, the kernels that take grouped queries are not fused everywhere); each head becomes a batch of
    its own, so that the result lies in memory as the layer wants it."""
    batch, heads, length, width = query.shape
    ours = length == 1 and attention_mask is not None and attention_mask.shape[:3] == (1, 1, 1)
    if not ours or any(kwargs.get(name) is not None for name in ("softcap", "position_bias")):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    groups = key.shape[1]
    rows = query.reshape(batch * groups, 1, heads // groups, width)
    key, value = key.flatten(0, 1).unsqueeze(1), value.flatten(0, 1).unsqueeze(1)
    mask = attention_mask.to(query.dtype)  # a model may mix dtypes
    result = torch.nn.functional.scaled_dot_product_attention(rows, key, value, mask, dropout, scale=scaling)
    return result.reshape(batch, 1, heads, value.shape[-1]), None


@contextlib.contextmanager
def _attention(config):
    """Lets a model that attends by sdpa do so by one_query_attention."""
    before = config._attn_implementation
    if before != "sdpa" or config.get_text_config() is not config:  # parts of a composed model may differ
        yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, one_query_attention)
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def _forwards(replaced):
    """Gives modules other forwards: pairs of (module, forward)."""
    before = [(module, vars(module).get("forward")) for module, _ in replaced]
    try:
        for module, forward in replaced:
            module.forward = forward
        yield
    finally:
        for module, forward in before:
            if forward is None:  # the class has it
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def _fused_norms(model, dtype) -> list:
    """(module, fused forward) of those RMSNorm modules of a model for which it computes the same. One whose weight has
    another dtype than what flows through the model decides for itself which its result has."""
    candidates = [m for m in model.modules() if _looks_like_rms_norm(m) and m.weight.dtype == dtype]
    return [(module, _fused_forward(module)) for module in candidates if _computes_the_same(module)]


def _eps(module):
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _looks_like_rms_norm(module) -> bool:
    """A module of one weight and one input, called so; torch's own is one kernel already. One whose forward somebody
    has replaced is left to them."""
    return (
        type(module).__name__.endswith("RMSNorm")
        and not isinstance(module, torch.nn.RMSNorm)
        and isinstance(_eps(module), float)
        and [name for name, _ in (*module.named_parameters(), *module.named_buffers())] == ["weight"]
        and module.weight.dim() == 1
        and "forward" not in vars(module)
        and len(inspect.signature(module.forward).parameters) == 1
    )


def _fused_forward(module):
    def forward(x):
        return module.weight * torch.nn.functional.rms_norm(x, module.weight.shape, eps=_eps(module))

    return forward


@torch.no_grad()
def _computes_the_same(module) -> bool:
    """Whether module and fused form agree to one unit in the last place, and nearly everywhere exactly, tried with
    random values on the CPU: one rounding instead of two changes a good part of the last places.

    The weight is random as well, since as ones or zeros it would hide what is done with it, and the rows go down to
    where eps decides."""
    generator = torch.Generator().manual_seed(0)
    dtype, width = module.weight.dtype, module.weight.numel()
    weight = torch.nn.Parameter(torch.randn(width, generator=generator).to(dtype))
    scales = torch.tensor([1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100]).view(-1, 1)
    x = (torch.randn(len(scales), width, generator=generator) * scales).to(dtype)
    try:
        module = copy.deepcopy(module, {id(module.weight): weight})
        expected = module.forward(x)  # a call would run the hooks of the model
    except Exception:  # a module for one kind of device, say
        return False
    found = _fused_forward(module)(x)
    close = found.dtype == expected.dtype and torch.allclose(found, expected, rtol=torch.finfo(dtype).eps, atol=0)
    return close and bool((found == expected).float().mean() > 0.95)


# ---- graphs --------------------------------------------------------------------------------------------------------


def _capture_of(device):
    """(make a graph, record into it, run on a side stream) for a device, or None when it records no graphs."""
    if device.type == "flagos":
        from torch_fl import _C
        from torch_fl.flagos import graphs, streams

        if _C._chip() != "cuda":
            return None
        kinds = graphs.CUDAGraph, graphs.graph, streams
    elif device.type == "cuda":
        kinds = torch.cuda.CUDAGraph, torch.cuda.graph, torch.cuda
    else:
        return None

    @contextlib.contextmanager
    def side_stream():
        module = kinds[2]
        side = module.Stream(device)
        side.wait_stream(module.current_stream(device))
        with module.stream(side):
            yield
        module.current_stream(device).wait_stream(side)

    return kinds[0], kinds[1], side_stream


def graph_decode(
    model, max_length: int, batch: int = 1, graph: bool | None = None, fuse_norms: bool = True
) -> GraphedDecoder:
    """A decoder that replays the model's decode step as one graph: `graph_decode(model, 512).generate(ids, 100)`.

    The arguments are those of GraphedDecoder, which says where the step's arithmetic differs from eager decoding: with
    `fuse_norms` in the order in which the norms sum, and as any static cache with a mask does, where attention may take
    another kernel than without a mask.
    """
    return GraphedDecoder(model, max_length, batch, graph, fuse_norms)


__all__ = ["GraphedDecoder", "graph_decode"]
