"""Attention in both directions over whole texts on a GPU; keeps nothing between steps.

A text is one row of a step, from its first token to its last. All layers use one buffer of K and one of V in turn, a
cell a token. Texts of about one length (up to the same power of two) are attended by one operation: what padding that
takes is of attention alone, which is the small part of an encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.attention.base import AttentionSpec, LayerAttention
from engine.ops.attention.device import DeviceAttention, MixedStep, Ragged, StepAttention
from engine.ops.attention.sequence import attend_sequence

# Texts are padded to a power of two, and at least to this.
LEAST = 16


class Texts(NamedTuple):
    """Texts that are attended together. places int32 [texts * length]: the token in each place of the padded texts, a
    text's last one in those of padding. lengths int32 [texts]."""

    length: int
    places: Tensor
    lengths: Tensor


class Backend(DeviceAttention):
    """See the module. max_tokens: of one step."""

    name = "packed"

    def __init__(self, spec: AttentionSpec, *, max_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self._cells = torch.arange(max_tokens, dtype=torch.int32, device=device)
        super().__init__(spec, num_pages=max_tokens - 1, page_size=1, dtype=dtype, device=device)
        assert all(layer.bidirectional and layer.reads is None for layer in self.layers.values())
        self.group_of = dict.fromkeys(self.layers, 0)

    def allocate(self) -> None:
        """See DeviceAttention."""
        widths = [layer.widths for layer in self.layers.values()]
        self.k_pools, self.v_pools, self.buffers = {}, {}, []
        keys, values = (
            torch.zeros((self.num_pages + 1, 1, max(each)), dtype=self.dtype, device=self.device)
            for each in zip(*widths, strict=True)
        )
        for number, layer in self.layers.items():
            heads = layer.num_kv_heads
            for pools, pool, dim in ((self.k_pools, keys, layer.head_dim), (self.v_pools, values, layer.value_dim)):
                pools[number] = pool[..., : heads * dim].unflatten(2, (heads, dim))

    def cleanse(self, tables: Tensor) -> None:
        """Nothing is kept."""

    def describe(self) -> str:
        """See DeviceAttention."""
        return "torch, over whole texts"

    def mixed(self, step: MixedStep) -> StepAttention:
        """See DeviceAttention."""
        assert not step.num_decodes
        return PackedAttention(self, step, self._cells)


class PackedAttention(StepAttention):
    """Of a step of whole texts."""

    step: MixedStep

    def __init__(self, backend: Backend, step: MixedStep, cells: Tensor) -> None:
        tokens = len(step.positions)
        super().__init__(backend, dataclasses.replace(step, kv_slots=[cells[:tokens]]))
        indptr = step.rows.qo_indptr.numpy()
        lengths = np.diff(indptr)
        assert (step.rows.kv_len.numpy() == lengths).all(), "a text must be whole"
        self._rows, self._tokens = step.rows, tokens
        kinds = np.maximum(LEAST, 2 ** np.ceil(np.log2(lengths)).astype(np.int64))
        arrays, sizes = [], []
        where, before = np.empty(tokens, np.int32), 0
        for length in np.unique(kinds).tolist():
            rows = np.flatnonzero(kinds == length)
            column = np.arange(length)
            own = np.minimum(column, lengths[rows, None] - 1)
            # Where each token's result lies among all padded texts.
            places = indptr[rows, None] + own
            seen = column < lengths[rows, None]
            where[places[seen]] = (before + np.arange(places.size).reshape(places.shape))[seen]
            before += places.size
            sizes.append(length)
            arrays += [places.astype(np.int32).ravel(), lengths[rows].astype(np.int32)]
        assert step.send is not None
        self._where, *sent = step.send([where, *arrays])
        self._texts = [Texts(*each) for each in zip(sizes, sent[::2], sent[1::2], strict=True)]
        self._biases: dict[tuple[int, int | None], Tensor] = {}

    def attend(self, layer: int, q: Tensor, out: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        """See StepAttention."""
        shape = self.backend.layers[layer]
        keys, values = (pool[layer][: self._tokens, 0] for pool in (self.backend.k_pools, self.backend.v_pools))
        if shape.softcap is None and sinks is None:
            parts = [self._together(shape, texts, q, keys, values) for texts in self._texts]
            result = (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, self._where)
        else:
            result = torch.cat(_one_by_one(shape, self._rows, q, keys, values, sinks))
        return result if out is None else out.copy_(result)

    def _together(self, shape: LayerAttention, texts: Texts, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[texts * length, Hq, Dv]."""
        count = len(texts.lengths)
        given = (
            x.index_select(0, texts.places).unflatten(0, (count, texts.length)).transpose(1, 2)
            for x in (q, keys, values)
        )
        result = F.scaled_dot_product_attention(
            *given, attn_mask=self._bias(shape, texts), scale=shape.scale, enable_gqa=True
        )
        return result.transpose(1, 2).flatten(0, 1)

    def _bias(self, shape: LayerAttention, texts: Texts) -> Tensor:
        """What is added to scores, [texts, 1, 1 or length, length]: the same for all layers of one window."""
        window = shape.window
        assert window is None or isinstance(window, int)
        key = texts.length, window
        found = self._biases.get(key)
        if found is None:
            column = torch.arange(texts.length, device=texts.lengths.device)
            seen = (column < texts.lengths[:, None])[:, None, None]
            if window is not None:
                seen = seen & ((column - column[:, None]).abs() < window)
                # A row of padding may see nothing of its text, and softmax of nothing is no number.
                seen = seen | (column == column[:, None])
            bias = torch.zeros(seen.shape, dtype=self.backend.dtype, device=seen.device)
            found = self._biases[key] = bias.masked_fill(~seen, -torch.inf)
        return found


def _one_by_one(
    shape: LayerAttention, rows: Ragged, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None
) -> Sequence[Tensor]:
    parts, first = [], 0
    for length, _, _ in rows.sizes():
        own = slice(first, first + length)
        parts.append(attend_sequence(shape, q[own], keys[own], values[own], sinks))
        first += length
    return parts
