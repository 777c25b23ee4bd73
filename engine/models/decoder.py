"""The one decoder that all families are: embedding, layers, final norm, output layer.

Built at start by `registry.load_model`; run by the executor's thread, one step after another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.clock import RangeOf, in_range
from engine.models.config import ModelConfig
from engine.models.layers import Layer, Norm
from engine.models.rope import rope_table
from engine.models.weights import EMBEDDING, Weights
from engine.ops.attention.base import AttentionBackend, AttentionSpec
from engine.ops.linear import Linear
from engine.ops.norm import Normed, plain


class Decoder:
    """A CausalLM (see registry.py). attention_spec: what its attention backend must be built for."""

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        self.config = config
        self.attention_spec = AttentionSpec(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.attention_scale,
            window=config.windows if any(config.windows) else None,
            softcap=config.attention_softcap,
        )
        vocab, hidden = config.vocab_size, config.hidden_size
        # The largest tensor first: what it needs beside itself while it is prepacked is then the only thing held.
        self._lm_head: Linear | None = None
        if not config.headless:
            self._lm_head = weights.output_layer(vocab, hidden, tied=config.tie_word_embeddings)
        self._embedding: Tensor | None = None
        if self._lm_head is None or not config.tie_word_embeddings:
            self._embedding = weights.tensor(EMBEDDING, (vocab, hidden))
        # Rounded to the model's dtype, as the gemmas were trained.
        scale = torch.tensor(config.embedding_scale, dtype=weights.dtype).item()
        self._embedding_scale = scale if scale != 1.0 else None
        self._logit_softcap = config.logit_softcap
        self._layers = [Layer(config, weights, index) for index in range(config.num_layers)]
        self._norm = Norm(weights, "model.norm", hidden, config.rms_norm_eps, config.norm_offset)

        native = config.max_position_embeddings
        table = rope_table(config.rope, native, max_model_len, weights.device)
        tables = [table] * config.num_layers
        if config.local_rope is not None:
            local = rope_table(config.local_rope, native, max_model_len, weights.device)
            tables = [local if flag else table for flag in config.local_rope_layers]
        # Each layer with its rope table and the norm that follows it: its residual addition is part of that norm.
        following = [layer.input_norm for layer in self._layers[1:]] + [self._norm]
        self._steps = list(zip(self._layers, tables, following, strict=True))
        # For what the start says of them.
        self.linears = weights.linears

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """int32 or int64 [T], [T] -> [T, hidden_size] after the final norm.

        `attention` has planned the step, and turns q and k by the positions of that plan: `positions` are the
        same ones, for a family that adds positions anywhere else.
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
        x = self._layers[0].input_norm.later(residual)
        for layer, table, following in self._steps:
            y = layer.attention(x, table, attention)
            if layer.attention_out_norm is not None:
                y = layer.attention_out_norm(y)
            x, residual = layer.mlp_norm.add(y, residual)
            y = layer.mlp(x)
            if layer.mlp_out_norm is not None:
                y = layer.mlp_out_norm(y)
            x, residual = following.add(y, residual)
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
        if self._logit_softcap is not None:
            logits = torch.tanh(logits.float() / self._logit_softcap) * self._logit_softcap
        return logits

    def decode(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """See CausalLM."""
        return self.raw_logits(self._run(token_ids, positions, attention))
