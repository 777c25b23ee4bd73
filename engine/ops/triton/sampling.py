"""Greedy tokens, and draws by one uniform number a row, without filters: two launches for a batch.

The vocabulary is cut into segments: the first kernel finds each segment's maximum and mass, the second picks the
segment and then the token. Called by ops/sampling/device.py, whose `torch_sample` is the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.sampling.device import MIN_LENGTH, NUM_STOP_IDS, SEED, STOP_IDS, TEMPERATURE, WORDS

SEGMENT = 4096


@triton.jit
def _logits_of(
    logits_ptr,
    params_ptr,
    row,
    segment,
    position,
    vocab,
    MIN_LENGTH: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """A segment of a row, stop ids masked while the row is too short to stop."""
    ids = segment * SEGMENT + tl.arange(0, SEGMENT)
    x = tl.load(logits_ptr + row * vocab + ids, mask=ids < vocab, other=-float("inf"))
    stops = tl.where(position < tl.load(params_ptr + MIN_LENGTH), tl.load(params_ptr + NUM_STOP_IDS), 0)
    for index in range(stops):
        x = tl.where(ids == tl.load(params_ptr + STOP_IDS + index), -float("inf"), x)
    return x


@triton.jit
def _finite(top):
    """What is subtracted before exp: -inf minus -inf would be NaN."""
    return tl.where((top > -float("inf")) & (top < float("inf")), top, 0.0)


@triton.jit
def _segments(
    logits_ptr,
    params_ptr,
    positions_ptr,
    tops_ptr,
    sums_ptr,
    args_ptr,
    vocab,
    num_segments,
    WORDS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    MIN_LENGTH: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    params_ptr += row * WORDS
    position = tl.load(positions_ptr + row)
    x = _logits_of(logits_ptr, params_ptr, row, segment, position, vocab, MIN_LENGTH, NUM_STOP_IDS, STOP_IDS, SEGMENT)
    top = tl.max(x, axis=0)
    temperature = tl.load(params_ptr + TEMPERATURE).to(tl.float32, bitcast=True)
    inverse = 1.0 / tl.where(temperature > 0.0, temperature, 1.0)
    weights = tl.exp((x - _finite(top)) * inverse)
    at = row * num_segments + segment
    tl.store(tops_ptr + at, top)
    tl.store(sums_ptr + at, tl.sum(weights, axis=0))
    index = tl.arange(0, SEGMENT)
    tl.store(args_ptr + at, segment * SEGMENT + tl.min(tl.where(x == top, index, SEGMENT), axis=0))


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _choose(
    logits_ptr,
    params_ptr,
    positions_ptr,
    tops_ptr,
    sums_ptr,
    args_ptr,
    out_ptr,
    vocab,
    num_segments,
    WORDS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SEED: tl.constexpr,
    MIN_LENGTH: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    params_ptr += row * WORDS
    position = tl.load(positions_ptr + row)
    number = tl.arange(0, BLOCK)
    inside = number < num_segments
    at = row * num_segments + number
    tops = tl.load(tops_ptr + at, mask=inside, other=-float("inf"))
    top = tl.max(tops, axis=0)
    args = tl.load(args_ptr + at, mask=inside, other=0)
    greedy = tl.min(tl.where((tops == top) & inside, args, 2147483647), axis=0)
    greedy = tl.where(greedy < vocab, greedy, 0)  # nothing but NaN

    temperature = tl.load(params_ptr + TEMPERATURE).to(tl.float32, bitcast=True)
    inverse = 1.0 / tl.where(temperature > 0.0, temperature, 1.0)
    scales = tl.exp((tops - _finite(top)) * inverse)
    masses = (tl.load(sums_ptr + at, mask=inside, other=0.0) * scales).to(tl.float64)
    ends = tl.cumsum(masses, axis=0)
    total = tl.sum(masses, axis=0)
    low = tl.load(params_ptr + SEED).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(params_ptr + SEED + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    seed = (high << 32) | low
    counter = (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    bits = _mix(_mix(seed + 0x9E3779B97F4A7C15) + counter)
    target = (bits >> 11).to(tl.float64) * 1.1102230246251565e-16 * total
    # The first segment whose end lies beyond the target; the last that has any mass where rounding leaves none.
    last_segment = tl.max(tl.where(masses > 0.0, number, 0), axis=0)
    segment = tl.minimum(tl.sum((ends <= target).to(tl.int32), axis=0), last_segment)
    left = target - tl.sum(tl.where(number < segment, masses, 0.0), axis=0)

    x = _logits_of(logits_ptr, params_ptr, row, segment, position, vocab, MIN_LENGTH, NUM_STOP_IDS, STOP_IDS, SEGMENT)
    weights = tl.exp((x - _finite(top)) * inverse).to(tl.float64)
    index = tl.arange(0, SEGMENT)
    last = tl.max(tl.where(weights > 0.0, index, 0), axis=0)
    chosen = tl.sum((tl.cumsum(weights, axis=0) <= left).to(tl.int32), axis=0)
    drawn = segment * SEGMENT + tl.minimum(chosen, last)
    sane = (temperature > 0.0) & (top > -float("inf")) & (top < float("inf"))
    tl.store(out_ptr + row, tl.where(sane, drawn, greedy).to(tl.int32))


def sample_rows(logits: Tensor, params: Tensor, positions: Tensor) -> Tensor:
    """float32 [R, V], int32 [R, WORDS], int32 [R] -> int32 [R]; top_k, top_p and min_p are not looked at."""
    rows, vocab = logits.shape
    assert logits.dtype == torch.float32 and logits.is_contiguous() and params.is_contiguous()
    segments = triton.cdiv(vocab, SEGMENT)
    shape, device = (rows, segments), logits.device
    tops = torch.empty(shape, dtype=torch.float32, device=device)
    sums = torch.empty(shape, dtype=torch.float32, device=device)
    args = torch.empty(shape, dtype=torch.int32, device=device)
    out = torch.empty(rows, dtype=torch.int32, device=device)
    places = {
        "WORDS": WORDS,
        "TEMPERATURE": TEMPERATURE,
        "MIN_LENGTH": MIN_LENGTH,
        "NUM_STOP_IDS": NUM_STOP_IDS,
        "STOP_IDS": STOP_IDS,
        "SEGMENT": SEGMENT,
    }
    _segments[(rows, segments)](logits, params, positions, tops, sums, args, vocab, segments, num_warps=8, **places)
    _choose[(rows,)](
        logits,
        params,
        positions,
        tops,
        sums,
        args,
        out,
        vocab,
        segments,
        SEED=SEED,
        BLOCK=triton.next_power_of_2(segments),
        num_warps=8,
        **places,
    )
    return out
