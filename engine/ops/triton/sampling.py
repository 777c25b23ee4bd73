"""Greedy tokens, and draws by one uniform number a row: two launches for a batch, four where some row filters.

The vocabulary is cut into segments: the first kernel finds each segment's maximum and mass, the second picks the
segment and then the token. Rows with top_k, top_p or min_p are then drawn anew: the third kernel counts and weighs
what lies within some distances of the best, the fourth lists what lies within the least that will do, finds in the
list the logits at which the filters end, and draws from what is left. Nothing of a row depends on the others. Logits
are read in the model's dtype, parameters by slot, and tokens go where the next step looks for them, so that a step has
no launch beside these. A row with a NaN, or with nothing finite, says so in place of its token. Called by
ops/sampling/device.py, whose `torch_sample` is the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.forward import NO_NUMBERS
from engine.ops.sampling.layout import (
    MIN_LENGTH,
    MIN_P,
    NUM_STOP_IDS,
    SEED,
    STOP_IDS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    WORDS,
)
from engine.ops.triton.pdl import launch_options, overlap

SEGMENT = 4096
# Distances from the best logit, in units of the temperature: 1/16 times the powers of 1.5, which float32 holds exactly.
DEPTHS = 16
# Listed tokens that are looked at in one go.
LISTED = 2048


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
    x = tl.load(logits_ptr + row * vocab + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    stops = tl.where(position < tl.load(params_ptr + MIN_LENGTH), tl.load(params_ptr + NUM_STOP_IDS), 0)
    for index in range(stops):
        x = tl.where(ids == tl.load(params_ptr + STOP_IDS + index), -float("inf"), x)
    return x


@triton.jit
def _finite(top):
    """What is subtracted before exp: -inf minus -inf would be NaN."""
    return tl.where((top > -float("inf")) & (top < float("inf")), top, 0.0)


@triton.jit
def _inverse(temperature):
    """Finite: zero times infinity would be NaN."""
    return 1.0 / tl.where(temperature > 0.0, tl.maximum(temperature, 1e-30), 1.0)


@triton.jit
def _segments(
    logits_ptr,
    params_ptr,
    slots_ptr,
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
    PDL: tl.constexpr,
):
    overlap(PDL)
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    params_ptr += tl.load(slots_ptr + row).to(tl.int64) * WORDS
    position = tl.load(positions_ptr + row)
    x = _logits_of(logits_ptr, params_ptr, row, segment, position, vocab, MIN_LENGTH, NUM_STOP_IDS, STOP_IDS, SEGMENT)
    top = tl.max(x, axis=0)
    temperature = tl.load(params_ptr + TEMPERATURE).to(tl.float32, bitcast=True)
    inverse = _inverse(temperature)
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
def _uniform(seed_ptr, position):
    """See ops/sampling/device.py."""
    low = tl.load(seed_ptr).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    seed = (high << 32) | low
    counter = (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    bits = _mix(_mix(seed + 0x9E3779B97F4A7C15) + counter)
    return (bits >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _note(token, told, row, slots_ptr, where_ptr, last_token_ptr, out_ptr, SCATTER: tl.constexpr):
    """Leave a row's token for the next step, and what the host is told."""
    tl.store(last_token_ptr + tl.load(slots_ptr + row), token)
    tl.store(out_ptr + (tl.load(where_ptr + row) if SCATTER else row), told)


@triton.jit
def _choose(
    logits_ptr,
    params_ptr,
    slots_ptr,
    positions_ptr,
    tops_ptr,
    sums_ptr,
    args_ptr,
    where_ptr,
    last_token_ptr,
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
    SCATTER: tl.constexpr,
    MASKED: tl.constexpr,
    NO_NUMBERS: tl.constexpr,
    PDL: tl.constexpr,
):
    overlap(PDL)
    row = tl.program_id(0).to(tl.int64)
    params_ptr += tl.load(slots_ptr + row).to(tl.int64) * WORDS
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
    inverse = _inverse(temperature)
    scales = tl.exp((tops - _finite(top)) * inverse)
    masses = (tl.load(sums_ptr + at, mask=inside, other=0.0) * scales).to(tl.float64)
    ends = tl.cumsum(masses, axis=0)
    total = tl.sum(masses, axis=0)
    target = _uniform(params_ptr + SEED, position) * total
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
    token = tl.where(sane, drawn, greedy).to(tl.int32)
    # A NaN is in its segment's sum, whatever the maximum made of it.
    insane = (total != total) | (top == float("inf"))
    if not MASKED:
        insane = insane | (top == -float("inf"))
    told = tl.where(insane, NO_NUMBERS, token).to(tl.int32)
    _note(token, told, row, slots_ptr, where_ptr, last_token_ptr, out_ptr, SCATTER)


@triton.jit
def _filters(
    params_ptr, top, vocab, TEMPERATURE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr
):
    """top_k (0 without), top_p (1 without), min_p (0 without); without any where the row is greedy."""
    temperature = tl.load(params_ptr + TEMPERATURE).to(tl.float32, bitcast=True)
    drawn = (temperature > 0.0) & (top > -float("inf")) & (top < float("inf"))
    top_k = tl.load(params_ptr + TOP_K)
    top_k = tl.where(drawn & (top_k > 0) & (top_k < vocab), top_k, 0)
    top_p = tl.load(params_ptr + TOP_P).to(tl.float32, bitcast=True)
    top_p = tl.where(drawn & (top_p < 1.0), top_p, 1.0)
    min_p = tl.load(params_ptr + MIN_P).to(tl.float32, bitcast=True)
    min_p = tl.where(drawn & (min_p > 0.0), min_p, 0.0)
    return top_k, top_p, min_p


@triton.jit
def _depths(
    logits_ptr,
    params_ptr,
    slots_ptr,
    positions_ptr,
    tops_ptr,
    counts_ptr,
    masses_ptr,
    vocab,
    num_segments,
    WORDS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    MIN_LENGTH: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTHS: tl.constexpr,
    PDL: tl.constexpr,
):
    """How many of a segment, and with what mass, lie within each distance of the row's best."""
    overlap(PDL)
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    params_ptr += tl.load(slots_ptr + row).to(tl.int64) * WORDS
    number = tl.arange(0, BLOCK)
    tops = tl.load(tops_ptr + row * num_segments + number, mask=number < num_segments, other=-float("inf"))
    top = tl.max(tops, axis=0)
    top_k, top_p, _ = _filters(params_ptr, top, vocab, TEMPERATURE, TOP_K, TOP_P, MIN_P)
    if (top_k == 0) & (top_p >= 1.0):
        return
    inverse = _inverse(tl.load(params_ptr + TEMPERATURE).to(tl.float32, bitcast=True))
    position = tl.load(positions_ptr + row)
    x = _logits_of(logits_ptr, params_ptr, row, segment, position, vocab, MIN_LENGTH, NUM_STOP_IDS, STOP_IDS, SEGMENT)
    distance = (top - x) * inverse
    weights = tl.exp(-distance)
    at = (row * num_segments + segment) * DEPTHS
    depth = 0.0625
    for index in range(DEPTHS):
        near = distance <= depth
        tl.store(counts_ptr + at + index, tl.sum(near.to(tl.int32), axis=0))
        tl.store(masses_ptr + at + index, tl.sum(tl.where(near, weights, 0.0), axis=0))
        depth *= 1.5


@triton.jit
def _key(x):
    """Integers in the order of float32 numbers, of which the two zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _listed(logits_ptr, list_ptr, start, count, top, inverse, LISTED: tl.constexpr):
    """Keys and weights of listed tokens, and which of the block are there."""
    at = start + tl.arange(0, LISTED)
    inside = at < count
    ids = tl.load(list_ptr + at, mask=inside, other=0)
    x = tl.load(logits_ptr + ids, mask=inside, other=-float("inf")).to(tl.float32)
    return _key(x), tl.where(inside, tl.exp((x - top) * inverse), 0.0), inside


@triton.jit
def _border(logits_ptr, list_ptr, count, top, inverse, low, limit, BY_COUNT: tl.constexpr, LISTED: tl.constexpr):
    """The least key of the list above which stands less than `limit`, by count or mass; int64, from `low` on.

    low: a key of the list. Bisection between keys that are there, so what ties with the best costs nothing.
    """
    high = _key(top).to(tl.int64)
    while low < high:
        middle = (low + high) >> 1
        ahead = tl.full((), 0.0, tl.float64)
        under, over = low, high
        for start in range(0, count, LISTED):
            keys, weights, inside = _listed(logits_ptr, list_ptr, start, count, top, inverse, LISTED)
            beyond = inside & (keys > middle)
            ones = beyond.to(tl.float64)
            ahead += tl.sum(ones if BY_COUNT else ones * weights, axis=0)
            wide = keys.to(tl.int64)
            under = tl.maximum(under, tl.max(tl.where(inside & (keys <= middle), wide, low), axis=0))
            over = tl.minimum(over, tl.min(tl.where(beyond, wide, high), axis=0))
        fits = ahead < limit
        high = tl.where(fits, under, high)
        low = tl.where(fits, low, over)
    return high


@triton.jit
def _draw(
    logits_ptr,
    params_ptr,
    slots_ptr,
    positions_ptr,
    tops_ptr,
    sums_ptr,
    counts_ptr,
    masses_ptr,
    list_ptr,
    where_ptr,
    last_token_ptr,
    out_ptr,
    vocab,
    num_segments,
    WORDS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    SEED: tl.constexpr,
    MIN_LENGTH: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTHS: tl.constexpr,
    LISTED: tl.constexpr,
    SCATTER: tl.constexpr,
    PDL: tl.constexpr,
):
    """A token of a row with filters; of other rows nothing is touched."""
    overlap(PDL)
    row = tl.program_id(0).to(tl.int64)
    params_ptr += tl.load(slots_ptr + row).to(tl.int64) * WORDS
    number = tl.arange(0, BLOCK)
    inside = number < num_segments
    tops = tl.load(tops_ptr + row * num_segments + number, mask=inside, other=-float("inf"))
    top = tl.max(tops, axis=0)
    top_k, top_p, min_p = _filters(params_ptr, top, vocab, TEMPERATURE, TOP_K, TOP_P, MIN_P)
    if (top_k == 0) & (top_p >= 1.0) & (min_p == 0.0):
        return
    inverse = _inverse(tl.load(params_ptr + TEMPERATURE).to(tl.float32, bitcast=True))
    position = tl.load(positions_ptr + row)
    sums = tl.load(sums_ptr + row * num_segments + number, mask=inside, other=0.0)
    total = tl.sum((sums * tl.exp((tops - top) * inverse)).to(tl.float64), axis=0)
    if total != total:
        return

    # The least distance that holds all that top_k, or else top_p, keeps.
    farthest = float("inf")
    if (top_k > 0) | (top_p < 1.0):
        depths = tl.arange(0, DEPTHS)
        at = (row * num_segments + number[:, None]) * DEPTHS + depths[None, :]
        counts = tl.sum(tl.load(counts_ptr + at, mask=inside[:, None], other=0), axis=0)
        masses = tl.sum(tl.load(masses_ptr + at, mask=inside[:, None], other=0.0).to(tl.float64), axis=0)
        # Both sums are rounded: a list that is a little too long does no harm, one too short would.
        enough = tl.where(top_k > 0, counts >= top_k, masses >= top_p * total * 1.0001)
        first = tl.min(tl.where(enough, depths, DEPTHS), axis=0)
        depth = 0.0625
        for _ in range(first):
            depth *= 1.5
        farthest = tl.where(first < DEPTHS, depth, farthest)
    # Of a row without top_k no more than min_p keeps: the mass that top_p asks for is known.
    least = tl.where(top_k > 0, 0.0, min_p)

    list_ptr += row * vocab
    listed = 0
    low = _key(top).to(tl.int64)
    for segment in range(num_segments):
        best = tl.load(tops_ptr + row * num_segments + segment)
        if (top - best) * inverse <= farthest:
            x = _logits_of(
                logits_ptr, params_ptr, row, segment, position, vocab, MIN_LENGTH, NUM_STOP_IDS, STOP_IDS, SEGMENT
            )
            weights = tl.exp((x - top) * inverse)
            near = ((top - x) * inverse <= farthest) & (weights > 0.0) & (weights >= least)
            places = listed + tl.cumsum(near.to(tl.int32), axis=0) - 1
            tl.store(list_ptr + places, segment * SEGMENT + tl.arange(0, SEGMENT), mask=near)
            listed += tl.sum(near.to(tl.int32), axis=0)
            low = tl.minimum(low, tl.min(tl.where(near, _key(x), 2147483647), axis=0).to(tl.int64))
    tl.debug_barrier()  # the list is read by other threads than those that wrote it

    logits_ptr += row * vocab
    if (top_k > 0) & (listed > top_k):
        low = _border(logits_ptr, list_ptr, listed, top, inverse, low, top_k.to(tl.float64), True, LISTED)
    ties = tl.full((), 2147483647.0, tl.float64)
    if top_p < 1.0:
        if top_k > 0:
            total = tl.full((), 0.0, tl.float64)
            for start in range(0, listed, LISTED):
                keys, weights, _ = _listed(logits_ptr, list_ptr, start, listed, top, inverse, LISTED)
                total += tl.sum(tl.where(keys >= low, weights, 0.0).to(tl.float64), axis=0)
        limit = top_p.to(tl.float64) * total
        low = _border(logits_ptr, list_ptr, listed, top, inverse, low, limit, False, LISTED)
        ahead, one = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float32)
        for start in range(0, listed, LISTED):
            keys, weights, _ = _listed(logits_ptr, list_ptr, start, listed, top, inverse, LISTED)
            ahead += tl.sum(tl.where(keys > low, weights, 0.0).to(tl.float64), axis=0)
            one = tl.maximum(one, tl.max(tl.where(keys == low, weights, 0.0), axis=0))
        # Of those that tie with the border the lowest ids stay, as many as the mass asks for.
        ties = tl.maximum(tl.ceil((limit - ahead) / one.to(tl.float64)), 1.0)

    mass = tl.full((), 0.0, tl.float64)
    tied = tl.full((), 0.0, tl.float64)
    for start in range(0, listed, LISTED):
        keys, weights, _ = _listed(logits_ptr, list_ptr, start, listed, top, inverse, LISTED)
        equal = (keys == low).to(tl.float64)
        keep = ((keys > low) | ((keys == low) & (tied + tl.cumsum(equal, axis=0) <= ties))) & (weights >= min_p)
        mass += tl.sum(tl.where(keep, weights, 0.0).to(tl.float64), axis=0)
        tied += tl.sum(equal, axis=0)
    target = _uniform(params_ptr + SEED, position) * mass
    # The first token whose end lies beyond the target; the last that is kept where rounding leaves none.
    end, tied = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    chosen, last = 0, 0
    for start in range(0, listed, LISTED):
        keys, weights, inside_list = _listed(logits_ptr, list_ptr, start, listed, top, inverse, LISTED)
        equal = (keys == low).to(tl.float64)
        keep = ((keys > low) | ((keys == low) & (tied + tl.cumsum(equal, axis=0) <= ties))) & (weights >= min_p)
        keep &= inside_list
        kept = tl.where(keep, weights, 0.0).to(tl.float64)
        ends = end + tl.cumsum(kept, axis=0)
        chosen += tl.sum((inside_list & (ends <= target)).to(tl.int32), axis=0)
        last = tl.maximum(last, tl.max(tl.where(keep, start + tl.arange(0, LISTED), 0), axis=0))
        end += tl.sum(kept, axis=0)
        tied += tl.sum(equal, axis=0)
    token = tl.load(list_ptr + tl.minimum(chosen, last))
    _note(token, token, row, slots_ptr, where_ptr, last_token_ptr, out_ptr, SCATTER)


def sample_rows(
    logits: Tensor,
    params: Tensor,
    slots: Tensor,
    positions: Tensor,
    last_token: Tensor,
    out: Tensor,
    where: Tensor | None,
    *,
    filtered: bool,
    masked: bool = False,
) -> None:
    """See `draw` in ops/sampling/device.py."""
    rows, vocab = logits.shape
    assert logits.is_contiguous() and params.is_contiguous()
    segments = triton.cdiv(vocab, SEGMENT)
    block = triton.next_power_of_2(segments)
    shape, device = (rows, segments), logits.device
    tops = torch.empty(shape, dtype=torch.float32, device=device)
    sums = torch.empty(shape, dtype=torch.float32, device=device)
    args = torch.empty(shape, dtype=torch.int32, device=device)
    places = {
        "WORDS": WORDS,
        "TEMPERATURE": TEMPERATURE,
        "MIN_LENGTH": MIN_LENGTH,
        "NUM_STOP_IDS": NUM_STOP_IDS,
        "STOP_IDS": STOP_IDS,
        "SEGMENT": SEGMENT,
        **launch_options(),
    }
    given = logits, params, slots, positions, tops
    results = slots if where is None else where, last_token, out, vocab, segments
    ends = {"SEED": SEED, "BLOCK": block, "SCATTER": where is not None}
    told = {"MASKED": masked, "NO_NUMBERS": NO_NUMBERS}
    _segments[shape](*given, sums, args, vocab, segments, num_warps=8, **places)
    _choose[(rows,)](*given, sums, args, *results, num_warps=8, **places, **ends, **told)
    if not filtered:
        return
    places |= {"TOP_K": TOP_K, "TOP_P": TOP_P, "MIN_P": MIN_P, "DEPTHS": DEPTHS}
    counts = torch.empty((*shape, DEPTHS), dtype=torch.int32, device=device)
    masses = torch.empty((*shape, DEPTHS), dtype=torch.float32, device=device)
    listed = torch.empty((rows, vocab), dtype=torch.int32, device=device)
    _depths[shape](*given, counts, masses, vocab, segments, num_warps=8, BLOCK=block, **places)
    _draw[(rows,)](*given, sums, counts, masses, listed, *results, num_warps=16, LISTED=LISTED, **places, **ends)
