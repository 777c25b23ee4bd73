"""Rotary position embedding in place, neox halves, in float32, rounded once.

Called by models/ on the executor's thread; the table comes from models/rope.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import native
from engine.ops.triton.runtime import on_gpu


def apply_rope(q: Tensor, k: Tensor | None, cos_sin: Tensor, positions: Tensor) -> None:
    """Turn q [T, Hq, D] and k [T, Hkv, D], if there is one, in place; both may be the ends of wider heads.

    cos_sin: float32 [max_position, rot], rot / 2 cosines and then as many sines; dimensions past rot stay.
    positions: int32 or int64 [T].
    """
    if on_gpu(q) and q.stride(2) == 1 and (k is None or k.stride(2) == 1):
        from engine.ops.triton.rope import rotate

        rotate(q, k, cos_sin, positions)
        return
    _rotate(q, cos_sin, positions)
    if k is not None:
        _rotate(k, cos_sin, positions)


def _rotate(x: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    library, code = native.library(), native.type_code(x.dtype)
    tokens, heads, _ = x.shape
    if library is None or code is None or not x.is_cpu or x.stride(2) != 1:
        torch_rotate(x, cos_sin, positions)
        return
    assert positions.is_contiguous() and cos_sin.is_contiguous()
    library.by_work(2 * x.numel()).ol_rope(
        code,
        x.data_ptr(),
        x.stride(0),
        tokens,
        heads,
        x.stride(1),
        cos_sin.data_ptr(),
        cos_sin.shape[1],
        positions.data_ptr(),
        positions.dtype == torch.int64,
        torch.get_num_threads(),
    )


def torch_rotate(x: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    """The same in torch, [T, H, D] in place."""
    rot = cos_sin.shape[1]
    cos, sin = cos_sin[positions.long()][:, None, :].chunk(2, dim=-1)
    first, second = x[..., :rot].float().chunk(2, dim=-1)
    x[..., :rot] = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
