"""Sampling on the device, in fixed shapes and without a look at any value on the host, so that a graph can hold it.

Draws what ops/sampling/sampler.py draws: the inverse of the distribution function in order of token ids, at the
uniform number of (seed, position). Called by the CUDA executor on its compute stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.forward import NO_NUMBERS, NULL_SLOT
from engine.ops.sampling.layout import (
    MIN_LENGTH,
    MIN_P,
    NUM_STOP_IDS,
    NUM_STOPS,
    SEED,
    STOP_IDS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)
from engine.ops.triton.runtime import on_gpu


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_MIX_1, _MIX_2, _GOLDEN = (_signed(v) for v in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15))


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 wraps, and >> must not carry the sign."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _MIX_1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _MIX_2
    return z ^ ((z >> 31) & (2**33 - 1))


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """int64 [R] (the bits of the seed), int [R] -> float64 [R] in [0, 1), 53 bits."""
    bits = _mix(_mix(seeds + _GOLDEN) + (positions.long() + 1) * _GOLDEN)
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def draw(
    logits: Tensor,
    params: Tensor,
    slots: Tensor,
    positions: Tensor,
    last_token: Tensor,
    out: Tensor,
    where: Tensor | None = None,
    *,
    filtered: bool,
    masked: bool = False,
) -> None:
    """A token for each row of logits [R, V], to `last_token` by slot and to `out` [R], or where `where` says in it.

    params int32 [slots, WORDS]: rows of SAMPLING_DTYPE; slots, where int32 or int64 [R]; last_token, out int32.
    positions int32 [R]: index in its sequence of each new token. filtered: some row has top_k, top_p or min_p; without,
    those fields are not looked at. `out` says NO_NUMBERS of rows in which there is a NaN or nothing finite;
    `last_token` has some token of the vocabulary. masked: what a row may not say is -inf already, all of it maybe.
    """
    if on_gpu(logits):
        from engine.ops.triton.sampling import sample_rows

        sample_rows(logits, params, slots, positions, last_token, out, where, filtered=filtered, masked=masked)
        return
    draw_by_torch(logits, params, slots, positions, last_token, out, where, filtered=filtered, masked=masked)


def draw_by_torch(
    logits: Tensor,
    params: Tensor,
    slots: Tensor,
    positions: Tensor,
    last_token: Tensor,
    out: Tensor,
    where: Tensor | None,
    *,
    filtered: bool,
    masked: bool,
) -> None:
    """`draw` without kernels of ours."""
    slots = slots.long()
    tokens = torch_sample(logits.float(), params.index_select(0, slots), positions, filtered=filtered)
    last_token.index_copy_(0, slots, tokens)
    tops = logits.amax(-1)  # NaN where there is one
    sane = torch.isfinite(tops) | (tops == -torch.inf) if masked else torch.isfinite(tops)
    tokens = torch.where(sane, tokens, NO_NUMBERS)
    if where is None:
        out.copy_(tokens)
    else:
        out.index_copy_(0, where.long(), tokens)


def accept(token_ids: Tensor, drawn: Tensor, slots: Tensor, last_token: Tensor) -> None:
    """Of rows that bring drafts, set `last_token` int32 [slots] to what was drawn last in a row of right ones.

    token_ids int32 [B]: -1 where a sequence begins, followed by its drafts, one a row; drawn, slots int32, B or more:
    what was drawn after each, and whose it is. A draft is right where all before it are and it equals what was drawn
    after the token before it.
    """
    if on_gpu(drawn):
        from engine.ops.triton.drafts import accept_drafts

        accept_drafts(token_ids, drawn, slots, last_token)
        return
    drawn, slots = drawn[: len(token_ids)], slots[: len(token_ids)]
    _, last = rows_that_count(token_ids, drawn)
    # One row of each slot; the others, as those of padding, write to the slot that is nobody's.
    where = torch.where(last, slots, NULL_SLOT)
    last_token.index_copy_(0, where.long(), drawn.clamp(min=0))  # some rows may have drawn no numbers


def rows_that_count(token_ids: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B] each: of `accept`'s rows, those that follow right drafts alone, and the last one of each sequence.
    drawn int32 [B]."""
    begins = token_ids < 0
    index = torch.arange(len(token_ids), device=token_ids.device)
    wrong = torch.where(~begins & (token_ids != drawn.roll(1)), index, -1).cummax(0).values
    right = wrong < torch.where(begins, index, -1).cummax(0).values
    # The next row is of the same sequence, and right.
    goes_on = torch.cat(((right & ~begins)[1:], right.new_zeros(1)))
    return right, right & ~goes_on


def drafts_before(token_ids: Tensor) -> Tensor:
    """int64 [B]: of `accept`'s rows, how many of each one's sequence stand before it in the step; all are drafts but
    the first."""
    index = torch.arange(len(token_ids), device=token_ids.device)
    return index - torch.where(token_ids < 0, index, 0).cummax(0).values


def torch_sample(logits: Tensor, params: Tensor, positions: Tensor, *, filtered: bool) -> Tensor:
    """float32 [R, V], int32 [R, WORDS], int32 [R] -> int32 [R], in torch; sorts every row when filtered."""
    vocab = logits.shape[1]
    temperature = params.view(torch.float32)[:, TEMPERATURE : TEMPERATURE + 1]
    x, top, scaled = _scaled(logits, params, positions)
    greedy = x.argmax(-1)
    weights = (_filter(scaled, params) if filtered else scaled).exp()
    mass = weights.cumsum(-1, dtype=torch.float64)
    seeds = params[:, SEED : SEED + 2].contiguous().view(torch.int64)[:, 0]
    target = uniform(seeds, positions)[:, None] * mass[:, -1:]
    chosen = (mass <= target).sum(-1)
    # Rounding may leave the target at the very end: the last id with any weight then.
    last = vocab - 1 - (weights > 0).flip(-1).to(torch.int8).argmax(-1)
    drawn = torch.minimum(chosen, last)
    sane = (temperature[:, 0] > 0) & torch.isfinite(top[:, 0])
    return torch.where(sane, drawn, greedy).to(torch.int32)


def process(logits: Tensor, params: Tensor, positions: Tensor, tokens: Tensor, *, filtered: bool) -> Tensor:
    """What rows are drawn from, as sampler.process has it; logits [R, V] -> float32 [R, V].

    params int32 [R, WORDS], positions int32 [R]: as for `torch_sample`. tokens int [R]: those that were drawn, which
    are kept: where top_p ends the kernels sum in another order.
    """
    temperature = params.view(torch.float32)[:, TEMPERATURE : TEMPERATURE + 1]
    x, top, scaled = _scaled(logits.float(), params, positions)
    if filtered:
        own = tokens.long()[:, None]
        scaled = _filter(scaled, params).scatter(1, own, scaled.gather(1, own))
    return torch.where((temperature > 0) & torch.isfinite(top), scaled, x.where(torch.isfinite(top), 0.0))


def _scaled(logits: Tensor, params: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [R, V] with stop ids masked, their best [R, 1], and (logit - best) / temperature [R, V]."""
    rows, vocab = logits.shape
    temperature = params.view(torch.float32)[:, TEMPERATURE : TEMPERATURE + 1]
    # Masked stop ids: out-of-range ones go to a column that is cut off again.
    ids = params[:, STOP_IDS:].long()
    column = torch.arange(NUM_STOPS, device=logits.device)
    masked = (positions < params[:, MIN_LENGTH])[:, None] & (column < params[:, NUM_STOP_IDS, None])
    ids = torch.where(masked & (ids >= 0) & (ids < vocab), ids, vocab)
    banned = torch.zeros((rows, vocab + 1), dtype=torch.bool, device=logits.device).scatter_(1, ids, True)
    x = logits.masked_fill(banned[:, :vocab], float("-inf"))
    top = x.amax(-1, keepdim=True)
    return x, top, (x - top) / torch.where(temperature > 0, temperature, 1.0)


def _filter(scaled: Tensor, params: Tensor) -> Tensor:
    """Temperature-scaled logits, top 0, with -inf for what top_k, top_p and min_p drop, in this order."""
    vocab = scaled.shape[1]
    floats = params.view(torch.float32)
    top_p, min_p = floats[:, TOP_P : TOP_P + 1], floats[:, MIN_P : MIN_P + 1]
    top_k = params[:, TOP_K : TOP_K + 1].long()
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    top_k = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    floor = ordered.gather(1, top_k - 1)
    weights = ordered.masked_fill(ordered < floor, float("-inf")).exp()
    mass = weights.cumsum(-1, dtype=torch.float64)
    ahead = mass - weights
    keep = (ahead < top_p * mass[:, -1:]) | (top_p >= 1)
    keep[:, 0] = True
    keep &= (weights >= min_p) & (weights > 0)
    keep = torch.zeros_like(keep).scatter_(1, order, keep)
    return scaled.masked_fill(~keep, float("-inf"))
