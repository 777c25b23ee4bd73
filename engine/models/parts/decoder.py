"""The one decoder that all families are: embedding, layers, final norm, output layer.

Built at start by loading/; run by the executor's thread, one step after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.clock import RangeOf, in_range
from engine.models.parts.attention import Attention
from engine.models.parts.dense import Mlp, UngatedMlp
from engine.models.parts.experts import BesideDense, make_experts
from engine.models.parts.latent import Latent
from engine.models.parts.layer_input import PREFIX, LayerEnd, OwnInputs
from engine.models.parts.norm import NoNorm, Norm, make_norm
from engine.models.parts.rope import rope_table
from engine.models.parts.source import Source
from engine.models.spec import (
    DenseAndExperts,
    Experts,
    LatentAttention,
    LayerInput,
    LayerSpec,
    Mixer,
    ModelSpec,
    NormSpec,
    RopeSpec,
    Ungated,
)
from engine.ops.attention.base import AttentionBackend, AttentionSpec, LayerAttention
from engine.ops.linear import Linear, Product, computed
from engine.ops.norm import Normed, plain

# Of all tensors but the output layer's.
EMBEDDING = PREFIX + "embed_tokens.weight"


class CausalLM(Protocol):
    """A loaded model, as executors know it. Not thread safe: one thread runs it."""

    config: ModelSpec
    attention_spec: AttentionSpec
    linears: list[Linear]

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """Integers [T] and [T] -> hidden states [T, hidden_size] after the final norm, in the model's dtype."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden_size] -> float32 [R, vocab_size]. Never called where config.headless is set."""
        ...

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """The same in the model's dtype where nothing is done to them after the product: for who reads them once."""
        ...

    def decode(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """`forward`, and `raw_logits` of every token."""
        ...

    def name_layers(self, range_of: RangeOf) -> None:
        """Put every layer's parts into named ranges of a profiler's time line from now on."""
        ...


class Layer:
    """One decoder layer: the parts, put together by Decoder.forward."""

    def __init__(
        self, spec: LayerSpec, source: Source, index: int, hidden_size: int, own: LayerInput | None = None
    ) -> None:
        prefix = f"{PREFIX}layers.{index}."

        def norm(spec: NormSpec | None) -> Norm | None:
            return make_norm(spec, source, prefix, hidden_size) if spec is not None else None

        self.input_norm = norm(spec.mixer_norm) or NoNorm()
        mixer = spec.mixer
        self.attention: Attention | Latent
        if isinstance(mixer, LatentAttention):
            self.attention = Latent(mixer, source, index, prefix, hidden_size)
        else:
            self.attention = Attention(mixer, source, index, prefix, hidden_size)
        self.attention_out_norm = norm(spec.mixer_out_norm)
        self.mlp_norm = norm(spec.feed_forward_norm) or NoNorm()
        self.mlp: Callable[[Tensor | Normed], Tensor | Product]
        if isinstance(spec.feed_forward, Experts):
            self.mlp = make_experts(spec.feed_forward, source, prefix, hidden_size)
        elif isinstance(spec.feed_forward, DenseAndExperts):
            self.mlp = BesideDense(spec.feed_forward, source, prefix, hidden_size)
        elif isinstance(spec.feed_forward, Ungated):
            self.mlp = UngatedMlp(spec.feed_forward, source, prefix, hidden_size)
        else:
            assert spec.feed_forward is not None, "a layer without a feed-forward has no part yet"
            self.mlp = Mlp(spec.feed_forward, source, prefix, hidden_size)
        self.parallel = spec.parallel
        self.residual_scale = spec.residual_scale if spec.residual_scale != 1.0 else None
        self.mlp_out_norm = norm(spec.feed_forward_out_norm)
        self.end: LayerEnd | None = None
        if own is not None or spec.end_scale is not None:
            self.end = LayerEnd(own, spec.end_scale, source, index, hidden_size)


def _attention_spec(spec: ModelSpec) -> AttentionSpec:
    """What a backend must be built for."""
    return AttentionSpec(tuple(_layer_attention(layer.mixer) for layer in spec.layers))


def _layer_attention(mixer: Mixer) -> LayerAttention | None:
    """What a layer's keys and values are; None for one that keeps none. One case for each kind of mixer that does."""
    if isinstance(mixer, LatentAttention):
        heads, width = mixer.num_heads, mixer.head_dim
        return LayerAttention(heads, 1, width, mixer.latent_dim, mixer.scale, values_in_keys=True)
    return LayerAttention(
        mixer.num_heads,
        mixer.num_kv_heads,
        mixer.head_dim,
        mixer.value_dim or mixer.head_dim,
        mixer.scale,
        mixer.window,
        mixer.softcap,
        sinks=mixer.sinks is not None,
        reads=mixer.reads,
    )


class Decoder:
    """A CausalLM. config: what it is. attention_spec: what its attention backend must be built for."""

    def __init__(self, spec: ModelSpec, source: Source, max_model_len: int) -> None:
        self.config = spec
        self.attention_spec = _attention_spec(spec)
        vocab, hidden = spec.vocab_size, spec.hidden_size
        # The largest tensor first: what it needs beside itself while it is prepacked is then the only thing held.
        self._lm_head: Linear | None = None
        if not spec.headless:
            self._lm_head = source.output_layer(vocab, hidden, tied=spec.tie_word_embeddings, bias=spec.head_bias)
        self._embedding: Tensor | None = None
        if self._lm_head is None or not spec.tie_word_embeddings:
            self._embedding = source.tensor(EMBEDDING, (vocab, hidden))
        # Rounded to the model's dtype, as the gemmas were trained.
        scale = torch.tensor(spec.embedding_scale, dtype=source.dtype).item()
        self._embedding_scale = scale if scale != 1.0 else None
        self._logit_scale = spec.logit_scale if spec.logit_scale != 1.0 else None
        self._logit_softcap = spec.logit_softcap
        self._layers = [
            Layer(layer, source, index, hidden, spec.layer_input) for index, layer in enumerate(spec.layers)
        ]
        self._own_inputs: OwnInputs | None = None
        if spec.layer_input is not None:
            self._own_inputs = OwnInputs(spec.layer_input, spec.num_layers, source, hidden)
        self._norm = make_norm(spec.final_norm, source, PREFIX, hidden)

        tables: dict[RopeSpec | None, Tensor | None] = {None: None}
        for rope in spec.ropes:
            tables[rope] = rope_table(rope, spec.max_position_embeddings, max_model_len, source.device)
        # Each layer with its rope table and the norm that follows it: its residual addition is part of that norm.
        following = [layer.input_norm for layer in self._layers[1:]] + [self._norm]
        own = [tables[layer.mixer.rope] for layer in spec.layers]
        self._steps = list(zip(self._layers, own, following, strict=True))
        # For what the start says of them.
        self.linears = source.linears

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """int32 or int64 [T], [T] -> [T, hidden_size] after the final norm.

        `attention` has planned the step, and turns q and k by the positions of that plan: `positions` are the
        same ones, for a layer that does anything else by them.
        """
        return plain(self._run(token_ids, positions, attention))

    def _run(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor | Normed:
        """The same, the final norm to be taken where it need not be yet."""
        embedding = self._embedding
        if embedding is None:
            assert self._lm_head is not None
            residual = self._lm_head.rows(token_ids)
        else:
            residual = F.embedding(token_ids, embedding)
        if self._embedding_scale is not None:
            residual = residual.mul_(self._embedding_scale)
        own = None if self._own_inputs is None else self._own_inputs(token_ids, residual)
        return self._through_layers(residual, own, positions, attention)

    def _through_layers(
        self, residual: Tensor, own: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> Tensor | Normed:
        """The embedding [T, hidden], whose memory is written over, and the layers' own inputs."""
        x = self._layers[0].input_norm.later(residual)
        for layer, table, following in self._steps:
            if layer.parallel:
                y = computed(layer.attention(x, table, positions, attention)).add_(computed(layer.mlp(x)))
                x, residual = following.add(y, residual)
                continue
            y = layer.attention(x, table, positions, attention)
            if layer.attention_out_norm is not None:
                y = layer.attention_out_norm(y)
            if layer.residual_scale is not None:
                y = computed(y) * layer.residual_scale
            x, residual = layer.mlp_norm.add(y, residual)
            y = layer.mlp(x)
            if layer.mlp_out_norm is not None:
                y = layer.mlp_out_norm(y)
            if layer.residual_scale is not None:
                y = computed(y) * layer.residual_scale
            if layer.end is None:
                x, residual = following.add(y, residual)
            else:
                residual = layer.end(residual.add_(computed(y)), own)
                x = following.later(residual)
        return x

    def name_layers(self, range_of: RangeOf) -> None:
        """See CausalLM. Costs nothing until it is called."""
        for index, layer in enumerate(self._layers):
            for part in ("attention", "mlp"):
                setattr(layer, part, in_range(getattr(layer, part), f"layer {index} {part}", range_of))

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden_size] -> float32 [R, vocab_size]."""
        return self.raw_logits(hidden).float()

    def raw_logits(self, hidden: Tensor | Normed) -> Tensor:
        """See CausalLM."""
        assert self._lm_head is not None, "a model without an output layer has no logits"
        logits = self._lm_head(hidden)
        if self._logit_scale is not None:
            logits = logits.float() * self._logit_scale
        if self._logit_softcap is not None:
            logits = torch.tanh(logits.float() / self._logit_softcap) * self._logit_softcap
        return logits

    def decode(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """See CausalLM."""
        return self.raw_logits(self._run(token_ids, positions, attention))
