"""Attention of one sequence in plain torch: what both backends fall back on where they have no kernel of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.groups import Chunk
from engine.ops.attention.base import LayerAttention


def attend_sequence(layer: LayerAttention, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
    """q [N, Hq, D], the last N tokens of keys [L, Hkv, D] and values [L, Hkv, Dv] -> [N, Hq, Dv], causal or not.

    sinks: float32 [Hq] or None.
    """
    queries, keys, values = q.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1)
    length, window = keys.shape[1], layer.window
    position = torch.arange(length - q.shape[0], length, device=q.device)[:, None]
    column = torch.arange(length, device=q.device)
    mask = torch.ones_like(column <= position) if layer.bidirectional else column <= position
    if isinstance(window, Chunk):
        mask = mask & (column >= position // window * window)
    elif window is not None:
        mask = mask & (column > position - window) & (column < position + window)
    if layer.softcap is None and sinks is None:
        result = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, scale=layer.scale, enable_gqa=True
        )[0]
    else:
        group = layer.num_heads // layer.num_kv_heads
        scores = queries.float() @ keys.float().repeat_interleave(group, 0).transpose(1, 2) * layer.scale
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        weights = softmax_with_sinks(scores.masked_fill(~mask, float("-inf")), sinks)
        result = (weights @ values.float().repeat_interleave(group, 0)).to(q.dtype)
    return result.transpose(0, 1)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """scores float32 [H, N, L], sinks [H] -> weights [H, N, L], which add up to less than 1 where there are sinks."""
    if sinks is None:
        return scores.softmax(-1)
    more = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, more), -1).softmax(-1)[..., :-1]
