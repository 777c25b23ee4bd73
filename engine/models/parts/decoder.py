"""The one model that all families are: embedding, layers, final norm, output layer or heads.

Built at start by loading/; run by the executor's thread, one step after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.clock import RangeOf, in_range
from engine.models.mixers import (
    GatedDelta,
    LatentAttention,
    Mamba2,
    Mixer,
    NormSpec,
    PagedMixer,
    RopeSpec,
    ShortConv,
    SideBySide,
)
from engine.models.parts.attention import Attention
from engine.models.parts.dense import make_mlp
from engine.models.parts.encoder import whole_layer
from engine.models.parts.experts import BesideDense, make_experts
from engine.models.parts.heads import Head
from engine.models.parts.latent import Latent
from engine.models.parts.layer_input import LayerEnd, OwnInputs
from engine.models.parts.norm import NoNorm, Norm, make_norm
from engine.models.parts.recurrent import DeltaNet, Mamba, ShortConvolution
from engine.models.parts.rope import rope_table
from engine.models.parts.source import PREFIX, Source
from engine.models.spec import DenseAndExperts, Experts, FeedForward, LayerInput, LayerSpec, ModelSpec
from engine.ops import native
from engine.ops.attention.base import AttentionBackend, AttentionSpec, LayerAttention
from engine.ops.attention.packed import Backend as Packed
from engine.ops.experts import Mixture
from engine.ops.linear import Linear, Product, computed
from engine.ops.lora import Branch, Rows
from engine.ops.norm import Normed, plain


def embedding_name(spec: ModelSpec) -> str:
    """Of the tensor whose rows tokens begin as."""
    return f"{PREFIX}{spec.embedding.tokens}.weight"


# A layer's mixer: x, its rope table, positions and where the step's memory is -> what it adds.
Mixing = Callable[[Tensor | Normed, Tensor | None, Tensor, AttentionBackend], Tensor | Product]


class Adapted(Protocol):
    """The places of a model that adapters change (loading/adapted.py), as executors know them."""

    rows: Rows

    def put(self, index: int, branches: Mapping[str, Branch]) -> None:
        """An adapter takes an index, with branches by the names of its sites. Whoever had it is gone."""
        ...

    def take_over(self, other: Any) -> None:
        """Hold what another model of the same spec held."""
        ...


class CausalLM(Protocol):
    """A loaded model, as executors know it. Not thread safe: one thread runs it."""

    config: ModelSpec
    attention_spec: AttentionSpec
    linears: list[Linear]
    mixtures: list[Mixture]
    # What LoRA adapters change; None where the model was loaded without places for them.
    adapted: Adapted | None

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, types: Tensor | None = None
    ) -> Tensor:
        """Integers [T] and [T] -> hidden states [T, hidden_size] after the final norm, in the model's dtype.

        types: of the tokens, int64 [T], where config.embedding has types and some are not 0.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden_size] -> float32 [R, vocab_size]. Never called where config.headless is set."""
        ...

    def classify(self, hidden: Tensor) -> Tensor:
        """Float32 [R, hidden_size] -> float32 [R, labels], by config.classifier."""
        ...

    def project(self, vectors: Tensor) -> Tensor:
        """Float32 [R, hidden_size] -> float32 [R, width], by config.projections."""
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
        self,
        spec: LayerSpec,
        source: Source,
        index: int,
        prefix: str,
        hidden_size: int,
        own: LayerInput | None = None,
    ) -> None:
        def norm(spec: NormSpec | None) -> Norm | None:
            return make_norm(spec, source, prefix, hidden_size) if spec is not None else None

        self.input_norm = norm(spec.mixer_norm) or NoNorm()
        self.mlp: Callable[[Tensor | Normed], Tensor | Product] | None = None
        self.attention: Mixing
        if spec.mixer is not None:
            self.attention = _make_mixer(spec.mixer, source, index, prefix, hidden_size)
            if spec.feed_forward is not None:
                self.mlp = _make_feed_forward(spec.feed_forward, source, prefix, hidden_size)
        else:
            assert spec.feed_forward is not None, "a layer of nothing"
            alone = _make_feed_forward(spec.feed_forward, source, prefix, hidden_size)
            self.attention = lambda x, table, positions, attention: alone(x)
        self.attention_out_norm = norm(spec.mixer_out_norm)
        self.mlp_norm = norm(spec.feed_forward_norm) or NoNorm()
        self.parallel = spec.parallel
        self.beside_norm = self.mlp_norm if spec.parallel and spec.feed_forward_norm is not None else None
        self.residual_scale = spec.residual_scale if spec.residual_scale != 1.0 else None
        self.post_norm = spec.post_norm
        self.mlp_out_norm = norm(spec.feed_forward_out_norm)
        self.whole = whole_layer(spec, self.attention, self.mlp, (self.attention_out_norm, self.mlp_out_norm))
        self.end: LayerEnd | None = None
        if own is not None or spec.end_scale is not None:
            self.end = LayerEnd(own, spec.end_scale, source, index, prefix, hidden_size)


def _make_mixer(mixer: Mixer, source: Source, index: int, prefix: str, hidden_size: int) -> Mixing:
    """The part for it: of x, the layer's rope table, positions and where the step's memory is."""
    if isinstance(mixer, SideBySide):
        parts = [_make_mixer(each, source, index, prefix, hidden_size) for each in mixer.mixers]
        return Together(parts, mixer)
    if isinstance(mixer, GatedDelta):
        return DeltaNet(mixer, source, index, prefix, hidden_size)
    if isinstance(mixer, ShortConv):
        return ShortConvolution(mixer, source, index, prefix, hidden_size)
    if isinstance(mixer, Mamba2):
        return Mamba(mixer, source, index, prefix, hidden_size)
    if isinstance(mixer, LatentAttention):
        return Latent(mixer, source, index, prefix, hidden_size)
    return Attention(mixer, source, index, prefix, hidden_size)


class Together:
    """Mixers side by side, see SideBySide."""

    def __init__(
        self,
        parts: list[Mixing],
        spec: SideBySide,
    ) -> None:
        self._parts = list(zip(parts, spec.input_scales, spec.output_scales, strict=True))

    def __call__(
        self, x: Tensor | Normed, table: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        x = plain(x)
        results = [
            computed(part(x * before if before != 1.0 else x, table, positions, attention)) * after
            for part, before, after in self._parts
        ]
        total = results[0]
        for result in results[1:]:
            total = total.add_(result)
        return total


def _make_feed_forward(
    spec: FeedForward, source: Source, prefix: str, hidden_size: int
) -> Callable[[Tensor | Normed], Tensor | Product]:
    """The part for it."""
    if isinstance(spec, Experts):
        return make_experts(spec, source, prefix, hidden_size)
    if isinstance(spec, DenseAndExperts):
        return BesideDense(spec, source, prefix, hidden_size)
    return make_mlp(spec, source, prefix, hidden_size)


def _attention_spec(spec: ModelSpec) -> AttentionSpec:
    """What a backend must be built for."""
    return AttentionSpec(tuple(layer_attention(layer.paged) for layer in spec.layers))


def layer_attention(mixer: PagedMixer | None) -> LayerAttention | None:
    """What a layer's keys and values are; None for one that keeps none. One case for each kind of mixer that does."""
    if mixer is None:
        return None
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
        bidirectional=mixer.bidirectional,
    )


def out_norm(norm: Norm | None) -> Norm:
    """That of a layer whose norms follow its sums: it has both."""
    assert norm is not None
    return norm


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
        if self._lm_head is None or not spec.tie_word_embeddings:
            self._embedding = source.embedding(embedding_name(spec), vocab, hidden)
        else:
            self._embedding = self._lm_head
        beside = spec.embedding
        self._positions = self._types = None
        if beside.positions is not None:
            self._positions = source.tensor(f"{PREFIX}{beside.positions}.weight", (beside.num_positions, hidden))
        if beside.types is not None:
            self._types = source.tensor(f"{PREFIX}{beside.types}.weight", (beside.num_types, hidden))
        self._embedding_norm = make_norm(beside.norm, source, PREFIX, hidden) if beside.norm is not None else None
        # Rounded to the model's dtype, as the gemmas were trained.
        scale = torch.tensor(spec.embedding_scale, dtype=source.dtype).item()
        self._embedding_scale = scale if scale != 1.0 else None
        self._logit_scale = spec.logit_scale if spec.logit_scale != 1.0 else None
        self._logit_softcap = spec.logit_softcap
        self._layers = [
            Layer(layer, source, index, PREFIX + spec.layer_names.format(index), hidden, spec.layer_input)
            for index, layer in enumerate(spec.layers)
        ]
        self._own_inputs: OwnInputs | None = None
        if spec.layer_input is not None:
            self._own_inputs = OwnInputs(spec.layer_input, spec.num_layers, source, hidden)
        self._norm = make_norm(spec.final_norm, source, PREFIX, hidden) if spec.final_norm is not None else NoNorm()
        self._classifier = Head(spec.classifier.steps, source, hidden) if spec.classifier is not None else None
        self._projections = Head(spec.projections, source, hidden) if spec.projections else None

        tables: dict[RopeSpec | None, Tensor | None] = {None: None}
        for rope in spec.ropes:
            tables[rope] = rope_table(rope, spec.max_position_embeddings, max_model_len, source.device)
        # Each layer with its rope table and the norm that follows it: its residual addition is part of that norm.
        following = [layer.input_norm for layer in self._layers[1:]] + [self._norm]
        own = [tables[layer.paged.rope if layer.paged is not None else None] for layer in spec.layers]
        self._steps = list(zip(self._layers, own, following, strict=True))
        # For what the start says of them.
        self.linears = source.linears
        self.mixtures = source.mixtures
        # For a draft model that reads them: the stream of residuals before these layers (the number of layers: behind
        # the last), as the last step had it [T, hidden_size].
        self.aux_layers: tuple[int, ...] = ()
        self.aux: list[Tensor] = []
        weights = sum(linear.out_features * linear.in_features for linear in self.linears)
        self._heavy = weights // 8 >= native.HOLD_GIL_BELOW
        self.adapted: Adapted | None = None

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, types: Tensor | None = None
    ) -> Tensor:
        """int32 or int64 [T], [T] -> [T, hidden_size] after the final norm.

        `attention` has planned the step, and turns q and k by the positions of that plan: `positions` are the
        same ones, for a layer that does anything else by them.
        """
        return plain(self._run(token_ids, positions, attention, types))

    def _run(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, types: Tensor | None = None
    ) -> Tensor | Normed:
        """The same, the final norm to be taken where it need not be yet."""
        residual = self._embedding.rows(token_ids)
        if self._embedding_scale is not None:
            residual = residual.mul_(self._embedding_scale)
        if self._types is not None:
            residual = residual.add_(self._types[0] if types is None else F.embedding(types, self._types))
        if self._positions is not None:
            places = positions + self.config.embedding.first_position
            residual = residual.add_(F.embedding(places, self._positions))
        if self._embedding_norm is not None:
            residual = self._embedding_norm(residual)
        own = None if self._own_inputs is None else self._own_inputs(token_ids, residual)
        adapted = self.adapted is not None and self.adapted.rows.any
        # What goes into held rows' states is kept as it comes by.
        held = attention.states is not None and attention.states.plan.held is not None
        if attention.recordings is None or own is not None or adapted or held or self.aux_layers:
            return self._through_layers(residual, own, positions, attention)

        def layers(x: Tensor) -> Tensor:
            return plain(self._through_layers(x, None, positions, attention))

        return attention.recordings.run(self, residual, layers, releases=self._heavy)

    def _through_layers(
        self, residual: Tensor, own: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> Tensor | Normed:
        """The embedding [T, hidden], whose memory is written over, and the layers' own inputs."""
        x = self._layers[0].input_norm.later(residual)
        wanted = self.aux_layers
        if wanted:
            self.aux = []
        for index, (layer, table, following) in enumerate(self._steps):
            if index in wanted:
                self.aux.append(residual.clone())
            if layer.parallel:
                assert layer.mlp is not None
                beside = x if layer.beside_norm is None else layer.beside_norm.later(residual)
                y = computed(layer.attention(x, table, positions, attention)).add_(computed(layer.mlp(beside)))
                x, residual = following.add(y, residual)
                continue
            if layer.whole is not None and isinstance(attention, Packed) and attention.takes_layers:
                x = residual = attention.through(layer.whole, residual)
                continue
            if layer.post_norm:
                x, _ = out_norm(layer.attention_out_norm).add(layer.attention(x, table, positions, attention), residual)
                residual = plain(x)
                x, _ = out_norm(layer.mlp_out_norm).add(layer.mlp(residual), residual)
                x = residual = plain(x)
                continue
            y = layer.attention(x, table, positions, attention)
            if layer.attention_out_norm is not None:
                y = layer.attention_out_norm(y)
            if layer.residual_scale is not None:
                y = computed(y) * layer.residual_scale
            if layer.mlp is None:
                x, residual = following.add(y, residual)
                continue
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
        if len(self._layers) in wanted:
            self.aux.append(residual.clone())
        return x

    def embedded(self, token_ids: Tensor) -> Tensor:
        """int32 [T] -> [T, hidden_size]: rows of the embedding, as they are."""
        return self._embedding.rows(token_ids)

    def name_layers(self, range_of: RangeOf) -> None:
        """See CausalLM. Costs nothing until it is called."""
        for index, layer in enumerate(self._layers):
            layer.whole = None  # its parts are one
            for part in ("attention", "mlp") if layer.mlp is not None else ("attention",):
                setattr(layer, part, in_range(getattr(layer, part), f"layer {index} {part}", range_of))

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden_size] -> float32 [R, vocab_size]."""
        return self.raw_logits(hidden).float()

    def classify(self, hidden: Tensor) -> Tensor:
        """See CausalLM."""
        assert self._classifier is not None, "the model has no classifier"
        return self._classifier(hidden)

    def project(self, vectors: Tensor) -> Tensor:
        """See CausalLM."""
        return vectors if self._projections is None else self._projections(vectors)

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
