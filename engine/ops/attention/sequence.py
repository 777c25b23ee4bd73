"""Attention of one sequence in plain torch: what both backends fall back on where they have no kernel of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.attention.base import AttentionSpec


def attend_sequence(spec: AttentionSpec, window: int | None, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [N, Hq, D], the last N tokens of keys and values [L, Hkv, D] -> [N, Hq, D], causal.

    window: tokens that a query sees, itself included; None for all.
    """
    queries, keys, values = q.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1)
    length = keys.shape[1]
    position = torch.arange(length - q.shape[0], length, device=q.device)[:, None]
    column = torch.arange(length, device=q.device)
    mask = column <= position
    if window is not None:
        mask = mask & (column > position - window)
    if spec.softcap is None:
        result = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, scale=spec.scale, enable_gqa=True
        )[0]
    else:
        group = spec.num_heads // spec.num_kv_heads
        scores = queries.float() @ keys.float().repeat_interleave(group, 0).transpose(1, 2) * spec.scale
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        result = (weights @ values.float().repeat_interleave(group, 0)).to(q.dtype)
    return result.transpose(0, 1)
