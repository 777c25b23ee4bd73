"""Norms and rotary embedding of q and k and the write of k and v into the paged cache, in one launch instead of ten.

Called per layer by ops/attention/device.py on CUDA tensors; `DeviceAttention.write` in torch is the reference. And the
rotary embedding alone, in place, of what is written some other way: ops/rope.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.triton.pdl import launch_options, overlap

# Heads of one program: 8 heads of 128 are 2 KB of bf16.
BLOCK_HEADS = 8


@triton.jit
def _rope_and_write(
    q_ptr,
    k_ptr,
    v_ptr,
    q_out_ptr,
    k_pool_ptr,
    v_pool_ptr,
    cos_sin_ptr,
    q_gain_ptr,
    k_gain_ptr,
    positions_ptr,
    slots_ptr,
    q_stride,
    k_stride,
    v_stride,
    k_cell,
    v_cell,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROT: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    overlap(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = dim < DIM
    # Heads count through q, then k, then v.
    is_q = (head < HEADS) & inside
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS) & inside
    is_v = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS) & inside
    q_at = q_ptr + token * q_stride + head * DIM
    k_at = k_ptr + token * k_stride + (head - HEADS) * DIM
    v_at = v_ptr + token * v_stride + (head - HEADS - KV_HEADS) * DIM
    q = tl.load(q_at + dim, mask=is_q, other=0.0).to(tl.float32)
    k = tl.load(k_at + dim, mask=is_k, other=0.0).to(tl.float32)
    v = tl.load(v_at + dim, mask=is_v, other=0.0)
    if NORM:
        q_scale = 1.0 / tl.sqrt(tl.sum(q * q, axis=1, keep_dims=True) / DIM + eps)
        k_scale = 1.0 / tl.sqrt(tl.sum(k * k, axis=1, keep_dims=True) / DIM + eps)
        q *= q_scale * tl.load(q_gain_ptr + dim, mask=inside, other=0.0).to(tl.float32)
        k *= k_scale * tl.load(k_gain_ptr + dim, mask=inside, other=0.0).to(tl.float32)
    if ROT > 0:
        half: tl.constexpr = ROT // 2
        turned = dim < ROT
        partner = tl.where(dim < half, dim + half, dim - half)
        sign = tl.where(dim < half, -1.0, 1.0)
        angle = tl.where(dim < half, dim, dim - half)
        position = tl.load(positions_ptr + token).to(tl.int64)
        table = cos_sin_ptr + position * ROT
        cos = tl.load(table + angle, mask=turned, other=1.0)
        sin = tl.load(table + half + angle, mask=turned, other=0.0)
        q_partner = tl.load(q_at + partner, mask=is_q & turned, other=0.0).to(tl.float32)
        k_partner = tl.load(k_at + partner, mask=is_k & turned, other=0.0).to(tl.float32)
        if NORM:
            q_partner *= q_scale * tl.load(q_gain_ptr + partner, mask=turned, other=0.0).to(tl.float32)
            k_partner *= k_scale * tl.load(k_gain_ptr + partner, mask=turned, other=0.0).to(tl.float32)
        q = q * cos + sign * q_partner * sin
        k = k * cos + sign * k_partner * sin
    slot = tl.load(slots_ptr + token).to(tl.int64)
    tl.store(q_out_ptr + token * HEADS * DIM + head * DIM + dim, q.to(q_out_ptr.dtype.element_ty), mask=is_q)
    # Rounded to the model's dtype first, as the torch reference does.
    k = k.to(k_ptr.dtype.element_ty).to(k_pool_ptr.dtype.element_ty)
    tl.store(k_pool_ptr + slot * k_cell + (head - HEADS) * DIM + dim, k, mask=is_k)
    v = v.to(v_pool_ptr.dtype.element_ty)
    tl.store(v_pool_ptr + slot * v_cell + (head - HEADS - KV_HEADS) * DIM + dim, v, mask=is_v)


def rope_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor | None,
    positions: Tensor,
    kv_slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """q [T, Hq, D], k and v [T, Hkv, D] -> turned q, contiguous. k, turned, and v go to the cells `kv_slots` [T].

    cos_sin: see ops/rope.py, None where nothing is to be turned. Pools [pages, page_size, Hkv, D] of any dtype, whose
    cells may be part of wider ones. norms: weights [D] of the RMS norms of a head of q and of k, which come first, and
    their epsilon. out: for q.
    """
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    for x in (q, k, v):
        assert x.stride(2) == 1 and x.stride(1) == dim
    for pool in (k_pool, v_pool):
        assert pool.stride()[2:] == (dim, 1) and pool.stride(0) == pool.shape[1] * pool.stride(1)
    if out is None:
        out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    assert out.is_contiguous() and out.shape == q.shape
    q_gain, k_gain, eps = norms or (q, q, 0.0)
    grid = (tokens, triton.cdiv(heads + 2 * kv_heads, BLOCK_HEADS))
    _rope_and_write[grid](
        q,
        k,
        v,
        out,
        k_pool,
        v_pool,
        cos_sin if cos_sin is not None else q,
        q_gain,
        k_gain,
        positions,
        kv_slots,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        k_pool.stride(1),
        v_pool.stride(1),
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        ROT=0 if cos_sin is None else cos_sin.shape[1],
        NORM=norms is not None,
        BLOCK_H=BLOCK_HEADS,
        BLOCK_D=triton.next_power_of_2(dim),
        num_warps=4,
        **launch_options(),
    )
    return out


@triton.jit
def _rotate(
    q_ptr,
    k_ptr,
    cos_sin_ptr,
    positions_ptr,
    q_stride,
    q_head,
    k_stride,
    k_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    overlap(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = dim < HALF
    # Heads count through q, then k.
    is_q, is_k = (head < HEADS) & inside, (head >= HEADS) & (head < HEADS + KV_HEADS) & inside
    q_at = q_ptr + token * q_stride + head * q_head + dim
    k_at = k_ptr + token * k_stride + (head - HEADS) * k_head + dim
    table = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF) + dim
    cos, sin = tl.load(table, mask=inside, other=1.0), tl.load(table + HALF, mask=inside, other=0.0)
    first = tl.load(q_at, mask=is_q, other=0.0).to(tl.float32)
    second = tl.load(q_at + HALF, mask=is_q, other=0.0).to(tl.float32)
    tl.store(q_at, (first * cos - second * sin).to(q_ptr.dtype.element_ty), mask=is_q)
    tl.store(q_at + HALF, (second * cos + first * sin).to(q_ptr.dtype.element_ty), mask=is_q)
    first = tl.load(k_at, mask=is_k, other=0.0).to(tl.float32)
    second = tl.load(k_at + HALF, mask=is_k, other=0.0).to(tl.float32)
    tl.store(k_at, (first * cos - second * sin).to(k_ptr.dtype.element_ty), mask=is_k)
    tl.store(k_at + HALF, (second * cos + first * sin).to(k_ptr.dtype.element_ty), mask=is_k)


def rotate(q: Tensor, k: Tensor | None, cos_sin: Tensor, positions: Tensor) -> None:
    """See `apply_rope` in ops/rope.py: in place, of heads and tokens at any distance."""
    assert q.stride(2) == 1 and (k is None or k.stride(2) == 1) and cos_sin.is_contiguous()
    tokens, heads, _ = q.shape
    half, kv_heads = cos_sin.shape[1] // 2, 0 if k is None else k.shape[1]
    other = q if k is None else k
    _rotate[(tokens, triton.cdiv(heads + kv_heads, BLOCK_HEADS))](
        q,
        other,
        cos_sin,
        positions,
        q.stride(0),
        q.stride(1),
        other.stride(0),
        other.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        BLOCK_H=BLOCK_HEADS,
        BLOCK_D=triton.next_power_of_2(half),
        num_warps=4,
        **launch_options(),
    )
