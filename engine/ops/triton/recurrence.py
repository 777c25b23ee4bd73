"""What layers with a recurrent state compute, one launch each. Called by ops/recurrence.py for CUDA tensors.

The references are the torch forms there. A row's tokens are taken one after another, whatever the row's length: so its
bits depend neither on its company nor on how its prompt was cut. Rows of padding write to slot 0, which is nobody's.
Where drafts are rows (RowsOnDevice), the program of the row where a sequence begins goes over those of its drafts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.state import RowsOnDevice
from engine.ops.triton.pdl import launch_options, overlap

if TYPE_CHECKING:
    from engine.ops.recurrence import Recurrence

# Channels and tokens of a program of the convolution, columns of a state of one warp, elements of a gate.
CHANNELS, TOKENS, COLUMNS, ELEMENTS = 128, 16, 16, 1024
# A program computes the new state from the old one and its own tokens, so these must be as many as the taps.
assert TOKENS >= 8
# What stands for no upper bound of a step.
MOST_STEP = 3.0e38


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    """As torch has it: beyond 20 it is its argument. log(1 + u) is exact for small u, too (Kahan): it is
    u log(w) / (w - 1), with w = 1 + u as it is rounded."""
    u = tl.exp(tl.minimum(x, 20.0))
    w = 1.0 + u
    small = w == 1.0
    return tl.where(x > 20.0, x, tl.where(small, u, tl.log(w) * (u / tl.where(small, 1.0, w - 1.0))))


@triton.jit
def _with_drafts(row, drafts_ptr, drawn_ptr, num_drafted, SETTLES: tl.constexpr, CHAIN: tl.constexpr):
    """Of a row, whether it is no draft, the draft behind it, and the end of all behind it. SETTLES: of right ones."""
    begins = tl.load(drafts_ptr + row, mask=row < num_drafted, other=-1) < 0
    after = tl.arange(0, CHAIN)
    inside = row + 1 + after < num_drafted
    draft = tl.load(drafts_ptr + row + 1 + after, mask=inside, other=-1)
    goes_on = draft >= 0
    if SETTLES:
        goes_on = goes_on & (draft == tl.load(drawn_ptr + row + after, mask=inside, other=-1))
    count = tl.min(tl.where(goes_on, CHAIN, after), axis=0)
    return begins, tl.max(tl.where(after == 0, draft, -1), axis=0), row + 1 + count


@triton.jit(do_not_specialize=["num_drafted"])
def _causal_conv(
    x_ptr,
    weight_ptr,
    bias_ptr,
    states_ptr,
    slots_ptr,
    indptr_ptr,
    drafts_ptr,
    drawn_ptr,
    out_ptr,
    x_stride,
    state_stride,
    channels,
    num_drafted,
    TAPS: tl.constexpr,
    CHAIN: tl.constexpr,
    SETTLES: tl.constexpr,
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_row = channel < channels
    overlap(PDL)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    begin, end = row, row + 1
    if RAGGED:
        begin, end = tl.load(indptr_ptr + row), tl.load(indptr_ptr + row + 1)
    keeps = in_row
    if CHAIN > 0:
        begins, draft, chained = _with_drafts(row, drafts_ptr, drawn_ptr, num_drafted, SETTLES, CHAIN)
        live = begins & (draft >= 0) if SETTLES else begins
        if not live:
            return  # a draft: the row where its sequence begins sees to it
        end = tl.where(row < num_drafted, chained, end)
        if not SETTLES:
            keeps = in_row & (draft + tl.zeros_like(channel) < 0)
    length = end - begin
    start = tl.program_id(2) * TOKENS
    if start < length:
        token = start + tl.arange(0, TOKENS)
        x_rows = x_ptr + begin.to(tl.int64) * x_stride
        states = states_ptr + slot * state_stride
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for tap in tl.static_range(TAPS):
            # Of a token before the row's first: column -1 is the last of the state.
            at = (token + (tap - (TAPS - 1)))[:, None]
            x = tl.load(
                x_rows + at * x_stride + channel[None, :],
                mask=(at >= 0) & (at < length) & in_row[None, :],
                other=0.0,
            ).to(tl.float32)
            before = tl.load(
                states + (at + (TAPS - 1)) * channels + channel[None, :],
                mask=(at < 0) & in_row[None, :],
                other=0.0,
            ).to(tl.float32)
            weight = tl.load(weight_ptr + tap * channels + channel, mask=in_row, other=0.0)
            total += (x + before) * weight[None, :]
        if BIAS:
            total += tl.load(bias_ptr + channel, mask=in_row, other=0.0)[None, :]
        if SILU:
            total = _silu(total)
        tl.store(
            out_ptr + (begin + token).to(tl.int64)[:, None] * channels + channel[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=(token < length)[:, None] & in_row[None, :],
        )
        # Only the first program of a row reads the old state, so it writes the new one, oldest column first: each
        # comes from a later place of the old one, or from x.
        if start == 0:
            tl.debug_barrier()  # other threads of the program may still read it
            for column in tl.static_range(TAPS - 1):
                last = length - (TAPS - 1) + column + tl.zeros((CHANNELS,), tl.int32)
                new = tl.load(x_rows + last * x_stride + channel, mask=(last >= 0) & in_row, other=0.0)
                old = tl.load(states + (last + (TAPS - 1)) * channels + channel, mask=(last < 0) & in_row, other=0.0)
                tl.store(states + column * channels + channel, new + old, mask=keeps)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, rows: RowsOnDevice, *, silu: bool
) -> Tensor:
    """See ops/recurrence.py."""
    taps, channels = weight.shape
    assert x.stride(1) == 1 and taps <= TOKENS and states[0].is_contiguous() and weight.is_contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens = 1 if rows.longest == 1 else TOKENS
    grid = (len(rows.slots), triton.cdiv(channels, CHANNELS), triton.cdiv(rows.longest, tokens))
    _causal_conv[grid](
        x,
        weight,
        weight if bias is None else bias,
        states,
        rows.slots,
        rows.slots if rows.qo_indptr is None else rows.qo_indptr,
        *_drafts_of(rows),
        out,
        x.stride(0),
        states.stride(0),
        channels,
        0 if rows.drafts is None else rows.drafts.shape[0],
        TAPS=taps,
        **_chain_of(rows),
        RAGGED=rows.qo_indptr is not None,
        BIAS=bias is not None,
        SILU=silu,
        TOKENS=tokens,
        CHANNELS=CHANNELS,
        num_warps=4,
        **launch_options(),
    )
    return out


def _drafts_of(rows: RowsOnDevice) -> tuple[Tensor, Tensor]:
    drafts = rows.slots if rows.drafts is None else rows.drafts
    return drafts, drafts if rows.drawn is None else rows.drawn


def _chain_of(rows: RowsOnDevice) -> dict[str, int | bool]:
    """CHAIN: no less than the drafts of a sequence, 0 where there are none."""
    chain = 0 if rows.drafts is None else triton.next_power_of_2(rows.most)
    return {"CHAIN": chain, "SETTLES": rows.drawn is not None}


@triton.jit(do_not_specialize=["num_drafted"])
def _recur(
    q_ptr,
    k_ptr,
    v_ptr,
    step_ptr,
    share_ptr,
    rate_ptr,
    step_bias_ptr,
    skip_ptr,
    states_ptr,
    slots_ptr,
    indptr_ptr,
    drafts_ptr,
    drawn_ptr,
    out_ptr,
    q_stride,
    k_stride,
    v_stride,
    step_stride,
    share_stride,
    state_stride,
    heads,
    heads_of_key,
    key_dim,
    value_dim,
    scale,
    least_step,
    most_step,
    num_drafted,
    DELTA: tl.constexpr,
    SKIP: tl.constexpr,
    CHAIN: tl.constexpr,
    SETTLES: tl.constexpr,
    RAGGED: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    key = tl.arange(0, KEYS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    in_key, in_value = key < key_dim, column < value_dim
    rate, step_bias = tl.load(rate_ptr + head), tl.load(step_bias_ptr + head)
    skip = tl.load(skip_ptr + head) if SKIP else 0.0
    overlap(PDL)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    begin, end = row, row + 1
    if RAGGED:
        begin, end = tl.load(indptr_ptr + row), tl.load(indptr_ptr + row + 1)
    places = states_ptr + slot * state_stride + (head * key_dim + key)[:, None] * value_dim + column[None, :]
    in_state = in_key[:, None] & in_value[None, :]
    keeps = in_state
    if CHAIN > 0:
        begins, draft, chained = _with_drafts(row, drafts_ptr, drawn_ptr, num_drafted, SETTLES, CHAIN)
        live = begins & (draft >= 0) if SETTLES else begins
        if not live:
            return  # a draft: the row where its sequence begins sees to it
        end = tl.where(row < num_drafted, chained, end)
        if not SETTLES:
            keeps = in_state & (draft + tl.zeros_like(column) < 0)[None, :]
    state = tl.load(places, mask=in_state, other=0.0)
    of_key = (head // heads_of_key) * key_dim + key
    of_value = head * value_dim + column
    first = begin.to(tl.int64)
    q_row, k_row, v_row = q_ptr + first * q_stride, k_ptr + first * k_stride, v_ptr + first * v_stride
    step_row, share_row = step_ptr + first * step_stride, share_ptr + first * share_stride
    out_row = out_ptr + first * (heads * value_dim)
    for _ in range(begin, end):
        q = tl.load(q_row + of_key, mask=in_key, other=0.0).to(tl.float32)
        k = tl.load(k_row + of_key, mask=in_key, other=0.0).to(tl.float32)
        v = tl.load(v_row + of_value, mask=in_value, other=0.0).to(tl.float32)
        step = _softplus(tl.load(step_row + head).to(tl.float32) + step_bias)
        step = tl.minimum(tl.maximum(step, least_step), most_step)
        state = state * tl.exp(-rate * step)
        if DELTA:
            q = q * (scale / tl.sqrt(tl.sum(q * q, axis=0) + 1e-6))
            k = k * (1.0 / tl.sqrt(tl.sum(k * k, axis=0) + 1e-6))
            share = tl.load(share_row + head).to(tl.float32)
            d = (v - tl.sum(state * k[:, None], axis=0)) / (1.0 + tl.exp(-share))
        else:
            d = v * step
        state += k[:, None] * d[None, :]
        out = tl.sum(state * q[:, None], axis=0)
        if SKIP:
            out += skip * v
        tl.store(out_row + of_value, out.to(out_ptr.dtype.element_ty), mask=in_value)
        q_row += q_stride
        k_row += k_stride
        v_row += v_stride
        step_row += step_stride
        share_row += share_stride
        out_row += heads * value_dim
    tl.store(places, state, mask=keeps)


def recur(
    what: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    share: Tensor | None,
    states: Tensor,
    rows: RowsOnDevice,
) -> Tensor:
    """See Recurrence."""
    assert all(x.stride(1) == 1 for x in (q, k, v, step)) and states[0].is_contiguous()
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    share = step if share is None else share
    columns = min(COLUMNS, triton.next_power_of_2(what.value_dim))
    least, most = what.steps
    _recur[(len(rows.slots), what.heads, triton.cdiv(what.value_dim, columns))](
        q,
        k,
        v,
        step,
        share,
        what.rate,
        what.step_bias,
        what.rate if what.skip is None else what.skip,
        states,
        rows.slots,
        rows.slots if rows.qo_indptr is None else rows.qo_indptr,
        *_drafts_of(rows),
        out,
        *(x.stride(0) for x in (q, k, v, step, share, states)),
        what.heads,
        what.heads // what.key_heads,
        what.key_dim,
        what.value_dim,
        what.key_dim**-0.5,
        least,
        min(most, MOST_STEP),
        0 if rows.drafts is None else rows.drafts.shape[0],
        DELTA=what.delta,
        SKIP=what.skip is not None,
        **_chain_of(rows),
        RAGGED=rows.qo_indptr is not None,
        KEYS=triton.next_power_of_2(what.key_dim),
        COLUMNS=columns,
        num_warps=1,
        **launch_options(),
    )
    return out


@triton.jit
def _gate(
    x_ptr,
    gate_ptr,
    out_ptr,
    x_stride,
    gate_stride,
    width,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    overlap(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    x = x * _silu(gate) if SILU else x / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + row * width + column, x.to(out_ptr.dtype.element_ty), mask=mask)


def gate(x: Tensor, gate: Tensor, *, silu: bool) -> Tensor:
    """x silu(gate) or x sigmoid(gate), [T, width] each."""
    assert x.stride(1) == gate.stride(1) == 1
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (rows, triton.cdiv(width, ELEMENTS))
    strides = x.stride(0), gate.stride(0)
    _gate[grid](x, gate, out, *strides, width, SILU=silu, BLOCK=ELEMENTS, num_warps=4, **launch_options())
    return out


@triton.jit
def _gated_norm(
    x_ptr,
    gate_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    gate_stride,
    weight_stride,
    width,
    eps,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    mask = column < width
    weight = tl.load(weight_ptr + part * weight_stride + column, mask=mask, other=0.0)
    overlap(PDL)
    at = part * width + column
    x = tl.load(x_ptr + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    gate = _silu(tl.load(gate_ptr + row * gate_stride + at, mask=mask, other=0.0).to(tl.float32))
    if FIRST:
        x = x * gate
    x = x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)) * weight
    if not FIRST:
        x = x * gate
    parts = tl.num_programs(1)
    tl.store(out_ptr + row * (parts * width) + at, x.to(out_ptr.dtype.element_ty), mask=mask)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, parts: int, *, gate_first: bool) -> Tensor:
    """See ops/recurrence.py."""
    assert x.stride(1) == gate.stride(1) == 1
    width = x.shape[1] // parts
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    _gated_norm[(len(x), parts)](
        x,
        gate,
        weight,
        out,
        x.stride(0),
        gate.stride(0),
        0 if weight.numel() == width else width,
        width,
        eps,
        FIRST=gate_first,
        BLOCK=block,
        num_warps=min(16, max(1, block // 256)),
        **launch_options(),
    )
    return out
