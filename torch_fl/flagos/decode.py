"""graph_decode: the decode step of a transformers model as one graph.

Generating a token eagerly launches a thousand small kernels, and the host is slower than the GPU. With a static
key-value cache every step does the same work at the same addresses, so it can be recorded once. The recorded step also
chooses the token, feeds it back and advances the position: between two tokens the host only replays.
"""

import contextlib

import torch


class GraphedDecoder:
    """Greedy generation with a static cache and, where the device records graphs, one replay per token.

    model: a causal language model of transformers, on the device already. batch: sequences at a time. max_length: most
    tokens of prompt and continuation together. graph: False runs the same step eagerly; None decides by the device.
    """

    def __init__(self, model, max_length: int, batch: int = 1, graph: bool | None = None):
        from transformers import StaticCache

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
        self._cache = StaticCache(config=model.config, max_cache_len=max_length)
        self._tokens = torch.zeros((batch, max_length), dtype=torch.long, device=self.device)
        self._position = torch.zeros((1,), dtype=torch.long, device=self.device)
        self._slots = torch.arange(max_length, device=self.device)
        self._graph = None

    @torch.no_grad()
    def _step(self) -> None:
        """Reads the token at the position, writes the next one behind it, advances. No host decision in between."""
        token = self._tokens.index_select(1, self._position)
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
        """What one new token may see, made on the device: transformers would look at the position on the host."""
        seen = (self._slots <= self._position).view(1, 1, 1, -1)
        if self.model.config._attn_implementation == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=self.model.dtype).masked_fill_(~seen, torch.finfo(self.model.dtype).min)

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


def graph_decode(model, max_length: int, batch: int = 1, graph: bool | None = None) -> GraphedDecoder:
    """A decoder that replays the model's decode step as one graph: `graph_decode(model, 512).generate(ids, 100)`."""
    return GraphedDecoder(model, max_length, batch, graph)


__all__ = ["GraphedDecoder", "graph_decode"]
