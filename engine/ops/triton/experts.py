"""A mixture of experts in six launches, four for a single token: route, sort the pairs of (token, expert) by expert,
multiply block by block, weigh. Called by ops/experts.py on CUDA tensors; `torch_mix_experts` there is the reference.
Matrices that are codes are multiplied by coded_experts.py, or become numbers some experts at a time (WIDENED_BYTES).

The host knows no count. An expert's pairs fill up whole blocks of rows, and as many blocks are launched as the worst
split of the pairs needs; those that nobody needs end at once. So shapes depend on the number of tokens alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.activation import activated
from engine.ops.triton.coded import widened
from engine.ops.triton.coded_experts import multiply_codes
from engine.ops.triton.gates import NONE, Pairs, gate_of, gated
from engine.ops.triton.pdl import launch_options, overlap

if TYPE_CHECKING:  # which asks for this module late
    from engine.ops.experts import Activation, Adapted, Biases, CodedTile, Held, Stack

# Pairs that a program looks through at a time, and columns that one adds up.
BLOCK_PAIRS, BLOCK_COLUMNS = 1024, 1024
# Of codes that become numbers before a product, so many at once.
WIDENED_BYTES = 2**28


class Tile(NamedTuple):
    """Rows of pairs, columns, and bytes of K of a program's products."""

    rows: int
    columns: int
    k_bytes: int
    num_warps: int
    num_stages: int = 3


# By the average number of pairs of an expert: with few, the weights are read; with many, the sums fill the registers.
TILES = ((128, Tile(128, 128, 128, 8)), (24, Tile(64, 128, 128, 4)), (0, Tile(16, 64, 256, 4)))


@triton.jit
def _route(
    logits_ptr,
    experts_ptr,
    shares_ptr,
    stride,
    num_experts,
    first,
    held,
    CHOSEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHOSEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """SOME: `held` experts from `first` on are here, and count from 0 on; others are -1."""
    overlap(PDL)
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCK)
    left = tl.load(logits_ptr + row * stride + number, mask=number < num_experts, other=-float("inf")).to(tl.float32)
    top = tl.max(left, axis=0)
    total = tl.sum(tl.exp(left - top), axis=0)
    place = tl.arange(0, BLOCK_CHOSEN)
    experts = tl.zeros((BLOCK_CHOSEN,), tl.int32)
    shares = tl.zeros((BLOCK_CHOSEN,), tl.float32)
    for index in range(CHOSEN):
        best = tl.max(left, axis=0)
        expert = tl.min(tl.where(left == best, number, BLOCK), axis=0)
        expert = tl.minimum(expert, num_experts - 1)  # NaN equals nothing, and no memory may be read for it
        experts = tl.where(place == index, expert, experts)
        shares = tl.where(place == index, tl.exp(best - top) / total, shares)
        left = tl.where(number == expert, -float("inf"), left)
    if NORMALIZE:
        shares = shares / tl.sum(shares, axis=0)
    if SOME:
        experts = tl.where((experts >= first) & (experts < first + held), experts - first, -1)
    tl.store(experts_ptr + row * CHOSEN + place, experts, mask=place < CHOSEN)
    tl.store(shares_ptr + row * CHOSEN + place, shares, mask=place < CHOSEN)


@triton.jit
def _count(experts_ptr, counts_ptr, pairs, BLOCK: tl.constexpr, PDL: tl.constexpr):
    overlap(PDL)
    expert = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        total += (tl.load(experts_ptr + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(total, axis=0))


@triton.jit
def _sort(
    experts_ptr,
    counts_ptr,
    order_ptr,
    owners_ptr,
    pairs,
    num_experts,
    num_blocks,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program lays out the pairs of one expert, in order, and the number `pairs` where its last block has room."""
    overlap(PDL)
    expert = tl.program_id(0)
    number = tl.arange(0, EXPERTS)
    blocks = (tl.load(counts_ptr + number, mask=number < num_experts, other=0) + ROWS - 1) // ROWS
    begin = tl.sum(tl.where(number < expert, blocks, 0), axis=0)
    end = begin + tl.sum(tl.where(number == expert, blocks, 0), axis=0)
    used = tl.sum(blocks, axis=0)
    offset = tl.arange(0, BLOCK)
    for first in range(0, num_blocks, BLOCK):
        block = first + offset
        tl.store(owners_ptr + block, tl.zeros((BLOCK,), tl.int32) + expert, mask=(block >= begin) & (block < end))
        if expert == num_experts - 1:
            tl.store(owners_ptr + block, tl.full((BLOCK,), -1, tl.int32), mask=(block >= used) & (block < num_blocks))
    at = begin * ROWS
    for first in range(0, pairs, BLOCK):
        pair = first + offset
        mine = (tl.load(experts_ptr + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
        tl.store(order_ptr + at + tl.cumsum(mine, axis=0) - 1, pair, mask=mine > 0)
        at += tl.sum(mine, axis=0)
    rest = at + tl.arange(0, ROWS)
    tl.store(order_ptr + rest, tl.zeros((ROWS,), tl.int32) + pairs, mask=rest < end * ROWS)


@triton.jit(do_not_specialize=["begin", "experts"])
def _multiply(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    owners_ptr,
    begin,
    experts,
    pairs,
    x_stride,
    out_features,
    in_features,
    limit,
    alpha,
    PER_ROW: tl.constexpr,
    SORTED: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Row pair // PER_ROW of x times the weight of the pair's expert, to row `pair` of out.

    weight_ptr: of the `experts` from `begin` on; pairs of others are left alone."""
    overlap(PDL)
    block = tl.program_id(0)
    owner = tl.load(owners_ptr + block)
    if (owner < begin) | (owner >= begin + experts):
        return
    expert = (owner - begin).to(tl.int64)
    row = tl.arange(0, ROWS)
    if SORTED:
        pair = tl.load(order_ptr + block * ROWS + row)
        valid = pair < pairs
    else:  # a block for each pair
        pair = block + tl.zeros((ROWS,), tl.int32)
        valid = row == 0
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (pair // PER_ROW).to(tl.int64)[:, None] * x_stride + k[None, :]
    size = tl.cast(out_features, tl.int64) * in_features
    weight_at = (
        weight_ptr + expert * size * (2 if GATE != NONE else 1) + n.to(tl.int64)[None, :] * in_features + k[:, None]
    )
    inside = n[None, :] < out_features
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    up = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for first in range(0, in_features, BLOCK_K):
        left = in_features - first
        x = tl.load(x_at + first, mask=valid[:, None] & (k[None, :] < left), other=0.0)
        weight = tl.load(weight_at + first, mask=inside & (k[:, None] < left), other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
        if GATE != NONE:
            weight = tl.load(weight_at + size + first, mask=inside & (k[:, None] < left), other=0.0)
            up = tl.dot(x, weight, up, input_precision="ieee")
    if BIAS:
        bias_at = bias_ptr + owner.to(tl.int64) * out_features * (2 if GATE != NONE else 1) + n
        total += tl.load(bias_at, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
        if GATE != NONE:
            up += tl.load(bias_at + out_features, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    if GATE != NONE:
        total = gated(total, up, limit, alpha, GATE)
    out_at = out_ptr + pair.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=valid[:, None] & inside)


@triton.jit
def _weigh(
    y_ptr,
    shares_ptr,
    experts_ptr,
    out_ptr,
    width,
    CHOSEN: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """SOME: of experts that are not here nothing was written."""
    overlap(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for index in range(CHOSEN):
        pair = row * CHOSEN + index
        written = width
        if SOME:
            written = tl.where(tl.load(experts_ptr + pair) >= 0, width, 0)
        y = tl.load(y_ptr + pair * width + column, mask=column < written, other=0.0).to(tl.float32)
        total += tl.load(shares_ptr + pair) * y
    tl.store(out_ptr + row * width + column, total.to(out_ptr.dtype.element_ty), mask=column < width)


def tile_for(pairs: int, num_experts: int) -> Tile:
    """By the number of tokens, so that a graph's is fixed."""
    return next(tile for least, tile in TILES if pairs >= least * num_experts)


def route(logits: Tensor, chosen: int, *, normalize: bool, held: Held = None) -> tuple[Tensor, Tensor]:
    """[N, experts] -> experts int32 [N, chosen], best first, lowest first of equals; their shares float32. held: those
    that are here, which count from 0 on; others are -1."""
    tokens, num_experts = logits.shape
    assert logits.stride(1) == 1 and chosen <= num_experts
    first, end = held or (0, num_experts)
    experts = torch.empty((tokens, chosen), dtype=torch.int32, device=logits.device)
    shares = torch.empty((tokens, chosen), dtype=torch.float32, device=logits.device)
    _route[(tokens,)](
        logits,
        experts,
        shares,
        logits.stride(0),
        num_experts,
        *(first, end - first),
        CHOSEN=chosen,
        NORMALIZE=normalize,
        SOME=held is not None,
        BLOCK=triton.next_power_of_2(num_experts),
        BLOCK_CHOSEN=triton.next_power_of_2(chosen),
        num_warps=1,
        **launch_options(),
    )
    return experts, shares


def sort_pairs(experts: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """int32 [N, chosen] -> order int32 [blocks * rows], pairs by expert; owners int32 [blocks], an expert or -1."""
    pairs, device = experts.numel(), experts.device
    num_blocks = pairs // rows + min(num_experts, pairs)
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    order = torch.empty(num_blocks * rows, dtype=torch.int32, device=device)
    owners = torch.empty(num_blocks, dtype=torch.int32, device=device)
    _count[(num_experts,)](experts, counts, pairs, BLOCK=BLOCK_PAIRS, num_warps=4, **launch_options())
    _sort[(num_experts,)](
        experts,
        counts,
        order,
        owners,
        pairs,
        num_experts,
        num_blocks,
        ROWS=rows,
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK=BLOCK_PAIRS,
        num_warps=4,
        **launch_options(),
    )
    return order, owners


def multiply(
    x: Tensor,
    stack: Stack,
    bias: Tensor | None,
    pairs: Pairs,
    per_row: int,
    activation: Activation | None,
    num_experts: int,
    tile: Tile,
    coded: CodedTile | None,
) -> Tensor:
    """x [N, in] -> [pairs, width]: row pair // per_row times the matrix of the pair's expert; gate and up with their
    activation. coded: how codes are multiplied; None: they become numbers first."""
    is_numbers = isinstance(stack, Tensor)
    rows = stack.shape[1] if isinstance(stack, Tensor) else stack.codes.shape[0] // num_experts
    width = rows // (1 if activation is None else 2)
    out = torch.empty((pairs.count, width), dtype=x.dtype, device=x.device)
    if not isinstance(stack, Tensor) and coded is not None:
        multiply_codes(x, stack, bias, pairs, per_row, activation, num_experts, tile.rows, coded, out)
        return out
    each = num_experts if is_numbers else experts_at_once(rows * x.shape[1] * x.dtype.itemsize)
    gate, limit, alpha = gate_of(activation)
    for begin in range(0, num_experts, each):
        end = min(begin + each, num_experts)
        some = stack if isinstance(stack, Tensor) else widened(stack, x.dtype, rows=(begin * rows, end * rows))
        assert some.is_contiguous()
        _multiply[(pairs.owners.shape[0], triton.cdiv(width, tile.columns))](
            x,
            some,
            some if bias is None else bias,
            out,
            pairs.order,
            pairs.owners,
            begin,
            end - begin,
            pairs.count,
            x.stride(0),
            width,
            x.shape[1],
            limit,
            alpha,
            PER_ROW=per_row,
            SORTED=pairs.is_sorted,
            GATE=gate,
            BIAS=bias is not None,
            ROWS=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.k_bytes // x.dtype.itemsize,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **launch_options(),
        )
    return out


def _with_adapters(
    x: Tensor,
    gate_up: Stack,
    down: Stack,
    biases: Biases,
    pairs: Pairs,
    experts: Tensor,
    activation: Activation,
    how: tuple[int, Tile, CodedTile | None],
    adapted: Adapted,
) -> tuple[Tensor, Tensor]:
    """[pairs, inner] and [pairs, hidden]: gate and up wait for their adapters before the activation."""
    above, below = (each.device for each in adapted)
    chosen = experts.shape[1]
    count = how[0]
    rows = above.pairs_of(experts, count, adapted[0].rows.on_device, sort_pairs)
    both = multiply(x, gate_up, biases[0], pairs, chosen, None, *how)
    above.add_pairs(x, both, rows, count, chosen)
    inner = activated(both, activation)
    y = multiply(inner, down, biases[1], pairs, 1, None, *how)
    below.add_pairs(inner, y, rows, count, 1)
    return inner, y


def experts_at_once(num_bytes: int) -> int:
    """Whose matrices become numbers together, of which each takes so many bytes."""
    return max(1, WIDENED_BYTES // num_bytes)


def mix_experts(
    x: Tensor,
    logits: Tensor,
    gate_up: Stack,
    down: Stack,
    chosen: int,
    activation: Activation,
    *,
    normalize: bool,
    biases: Biases = (None, None),
    tile: Tile | None = None,
    coded: tuple[int, CodedTile] | None = None,
    adapted: Adapted | None = None,
    held: Held = None,
) -> Tensor:
    """See ops/experts.py. tile: for tests."""
    (tokens, hidden), num_experts = x.shape, logits.shape[1]
    assert x.stride(1) == 1
    experts, shares = route(logits, chosen, normalize=normalize, held=held)
    count = tokens * chosen
    if coded is not None:
        tile = tile or next(each for _, each in TILES if each.rows == coded[0])
    tile = tile or tile_for(count, num_experts)
    if held is not None:
        num_experts = held[1] - held[0]
    # A token's experts differ, so there is nothing to bring together.
    pairs = Pairs(experts, experts.view(-1), count, is_sorted=tokens > 1)
    if pairs.is_sorted:
        order, owners = sort_pairs(experts, num_experts, tile.rows)
        pairs = pairs._replace(order=order, owners=owners)
    how = (num_experts, tile, None if coded is None else coded[1])
    if adapted is None:
        inner = multiply(x, gate_up, biases[0], pairs, chosen, activation, *how)
        y = multiply(inner, down, biases[1], pairs, 1, None, *how)
    else:
        inner, y = _with_adapters(x, gate_up, down, biases, pairs, experts, activation, how, adapted)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _weigh[(tokens, triton.cdiv(hidden, BLOCK_COLUMNS))](
        *(y, shares, experts, out, hidden),
        CHOSEN=chosen,
        SOME=held is not None,
        BLOCK=BLOCK_COLUMNS,
        num_warps=4,
        **launch_options(),
    )
    return out
