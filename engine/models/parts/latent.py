"""Multi-head latent attention: queries and the cache meet in the space of the latents.

A head's keys are never made: q_nope W_k is multiplied with the latent itself, and W_v is taken of the weighted sum of
latents. So the cache holds a latent and one turned key a token, and a row's sums do not depend on how its prompt was
cut. Run by the executor's thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.mixers import LatentAttention
from engine.models.parts.attention import query_factors
from engine.models.parts.norm import make_norm
from engine.models.parts.rope import split_pairs
from engine.models.parts.source import Source
from engine.ops.attention.base import AttentionBackend
from engine.ops.heads import HeadLinear
from engine.ops.linear import Product
from engine.ops.norm import Normed, plain
from engine.ops.rope import apply_rope


class Latent:
    """Projections down and up, norms between them, rope, attention over latents, projection.

    layer: its number, by which the backend knows it. prefix: of its tensors.
    """

    def __init__(self, spec: LatentAttention, source: Source, layer: int, prefix: str, hidden_size: int) -> None:
        heads, nope, latent = spec.num_heads, spec.nope_dim, spec.latent_dim
        wide = nope + spec.rope_dim
        self._layer, self._spec = layer, spec
        self._rank = spec.query_rank or 0
        # Rows of what goes up to queries, and of what goes down, with interleaved pairs in the order of split halves.
        query_order = down_order = None
        if spec.rope is not None and spec.rope.interleaved:
            pairs = split_pairs(1, spec.rope_dim, spec.rope_dim)
            head = torch.cat((torch.arange(nope), nope + pairs))
            query_order = (torch.arange(heads)[:, None] * wide + head).view(-1)
            before = self._rank + latent
            down_order = torch.cat((torch.arange(before), before + pairs))
        names, rows = [prefix + spec.down], [spec.head_dim]
        self._q_norm = None
        if spec.query_rank is not None:
            assert spec.q_norm is not None
            self._q_norm = make_norm(spec.q_norm, source, prefix, spec.query_rank)
            names, rows = [prefix + spec.query[0], *names], [spec.query_rank, *rows]
        # Both in one product, where queries go down, too.
        self._down = source.linear(names, rows, hidden_size, bias=spec.bias, order=down_order)
        into = spec.query_rank or hidden_size
        self._query = source.linear([prefix + spec.query[-1]], [heads * wide], into, order=query_order)
        self._latent_norm = make_norm(spec.latent_norm, source, prefix, latent)
        up = source.tensor(f"{prefix}{spec.up}.weight", (heads * (nope + spec.value_dim), latent))
        keys, values = up.view(heads, -1, latent).split_with_sizes([nope, spec.value_dim], 1)
        to_latent, to_value = HeadLinear(keys.transpose(1, 2)), HeadLinear(values)
        self._to_latent, self._to_value = source.adapted_heads(prefix + spec.up, to_latent, to_value)
        del up, keys, values  # the output layer is to find that memory free
        self._output = source.linear([prefix + spec.output], [hidden_size], heads * spec.value_dim, bias=spec.bias)

    def __call__(
        self, x: Tensor | Normed, table: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> Tensor | Product:
        """[T, hidden] -> [T, hidden]. table: of `rope_table`."""
        spec, latent = self._spec, self._spec.latent_dim
        x = plain(x)
        down = self._down(x)
        tokens = down.shape[0]
        below = x if self._q_norm is None else self._q_norm(down[:, : self._rank])
        q = self._query(below).view(tokens, spec.num_heads, -1)
        # One buffer each, as the cache has a token: the latent, then what is turned.
        k = down[:, self._rank :]
        k[:, :latent] = self._latent_norm(k[:, :latent])
        k = k[:, None]
        queries = q.new_empty((tokens, spec.num_heads, spec.head_dim))
        self._to_latent(q[..., : spec.nope_dim], queries[..., :latent])
        queries[..., latent:] = q[..., spec.nope_dim :]
        if table is not None:
            apply_rope(queries[..., latent:], k[..., latent:], table, positions)
        if spec.query_scale is not None:
            queries *= query_factors(spec.query_scale, positions).to(q.dtype)[:, :, None]
        mixed = attention.forward(self._layer, queries, k, None).view(tokens, spec.num_heads, latent)
        values = q.new_empty((tokens, spec.num_heads, spec.value_dim))
        return self._output.later(self._to_value(mixed, values).view(tokens, -1))
