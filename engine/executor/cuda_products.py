"""Which products are ours: every shape of weight is timed once at start, cuBLAS beside our blocks and tiles.

Blocks are for few rows, where the weight is read; tiles for many of gate and up, where the activation comes with them.

Called by CUDAExecutor before graphs are captured, so that they hold the faster way. Loop thread; blocks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.executor.cuda_device import DeviceLayer
from engine.ops import device_coded
from engine.ops.device_coded import DeviceCodedLinear
from engine.ops.experts import CODED_MANY, CODED_ROWS, CODED_TILES, CodedTile, Mixture, coded_rows
from engine.ops.gated import LEAST_ROWS, TILES, Tile
from engine.ops.linear import Linear
from engine.ops.skinny import BLOCKS, Blocks

logger = logging.getLogger("oneloop.cuda")
W = TypeVar("W", Blocks, Tile, device_coded.Tile, bool)
L = TypeVar("L", bound=Linear)

# Weights of one shape are read in turn, at least so many bytes of them, or they would come from the L2 cache.
BYTES_READ = 2**28
# Ours must need at most this much of cuBLAS's time: less is within what two measurements differ by.
WORTH = 0.97
COUNTS = (1, 2, 4)
# Of a prompt's step, at which tiles are timed.
MANY_ROWS = 2048
# At which codes that become numbers in registers are timed beside those that become numbers first.
WIDENED = (32, 64, 128, 256, 512)
# At which products with inputs of float8 are timed beside the others, where the checkpoint is for them: of prompts.
FLOAT8_ROWS = (64, 128, 256, 512, 1024, 2048)
# As WIDENED, by pairs of an expert, on average.
PAIRS_WIDENED = (8, 16, 32, 64, 128, 256)


def choose_products(linears: Iterable[Linear], layer: DeviceLayer) -> tuple[int, int]:
    """Fill in `Linear.few` for batches of 1, 2 and 4 rows. On the current stream, inside `may_block`.

    Returns how many (shape, rows) are ours, of how many. Weights that are the same in shape share a choice.
    """
    groups, ours = _by_shape(linears), 0
    for group in groups:
        sample, found = _sample(group), {}
        for rows in COUNTS:
            x = _input(sample, rows, layer)
            found[rows] = _best(
                {blocks: partial(_blocked, sample, x, blocks) for blocks in (None, *BLOCKS)}, rows, layer
            )
        few = {rows: blocks for rows, blocks in found.items() if blocks is not None}
        ours += len(few)
        for linear in group:
            linear.few = few
    return ours, len(COUNTS) * len(groups)


def choose_tiles(linears: Iterable[Linear], most_rows: int, layer: DeviceLayer) -> tuple[int, int]:
    """Fill in `Linear.tile` of gate and up, by steps of MANY_ROWS rows, or of most_rows where no step has more.

    Like choose_products; returns how many shapes are ours, of how many.
    """
    groups = _by_shape(each for each in linears if each.activation is not None)
    rows, ours = min(MANY_ROWS, most_rows), 0
    if rows < LEAST_ROWS:
        return 0, 0
    for group in groups:
        tile = None
        # The results of such a pass are large, and most of the memory is taken by now.
        with suppress(torch.OutOfMemoryError):
            sample = _sample(group)
            x = _input(sample, rows, layer)
            tile = _best({tile: partial(_tiled, sample, x, tile) for tile in (None, *TILES)}, rows, layer)
        ours += tile is not None
        for linear in group:
            linear.tile = tile
    return ours, len(groups)


def choose_codes(linears: Iterable[Linear], most_rows: int, layer: DeviceLayer) -> int:
    """Fill in `tiles` and `widen_from` of layers whose weights are codes. Returns how many shapes there are.

    Like choose_products. Steps have up to most_rows rows.
    """
    kept = [linear for linear in linears if isinstance(linear, DeviceCodedLinear)]
    groups = _grouped(kept, lambda linear: (linear.codes.form, linear.has_float8_inputs, *_shape(linear)))
    for group in groups:
        sample = _sample(group)
        tiles: dict[int, device_coded.Tile] = {}
        for rows in device_coded.TILE_ROWS:
            x = _input(sample, rows, layer)
            tile = _best({tile: partial(_by_codes, sample, x, tile) for tile in device_coded.TILES}, rows, layer)
            if tile is not None:
                tiles[rows] = tile
        # Where no tile could be built, always numbers first.
        widen_from = most_rows + 1 if len(tiles) == len(device_coded.TILE_ROWS) else 0
        for rows in WIDENED if widen_from else ():
            if rows > most_rows:
                break
            x, tile = _input(sample, rows, layer), tiles[device_coded.tile_rows(rows)]
            ways = {None: partial(_widened, sample, x), tile: partial(_by_codes, sample, x, tile)}
            # None is taken where ours is not clearly quicker.
            if _best(ways, rows, layer) is None:
                widen_from = rows
                break
        for linear in group:
            linear.tiles.update(tiles)
            linear.widen_from = widen_from
        if sample[0].has_float8_inputs:
            found = _float8_from(sample, most_rows, layer)
            for linear in group:
                linear.float8_from = found
    return len(groups)


def _float8_from(sample: list[DeviceCodedLinear], most_rows: int, layer: DeviceLayer) -> int | None:
    """The fewest rows of FLOAT8_ROWS of which the product with float8 inputs is clearly quicker; None: never."""
    for rows in FLOAT8_ROWS:
        if rows > most_rows:
            return None
        x = _input(sample, rows, layer)
        ways: dict[bool | None, Callable[[], None]] = {
            None: partial(_by_wide, sample, x),
            True: partial(_by_float8, sample, x),
        }
        if _best(ways, rows, layer):
            return rows
    return None


def choose_experts(mixtures: Iterable[Mixture], most_rows: int, layer: DeviceLayer) -> int:
    """Fill in `ways` of mixtures of experts whose matrices are codes. Returns how many shapes there are.

    Like choose_codes, by tokens that give an expert so many pairs on average.
    """
    groups = _grouped((each for each in mixtures if each.forms), lambda mixture: mixture.shape)
    for group in groups:
        first = group[0]
        sample = group[: max(1, -(-BYTES_READ // first.num_bytes))]

        def tokens_of(pairs: int, first: Mixture = first) -> int:
            return min(max(1, pairs * first.total // first.chosen), most_rows)

        tiles: dict[int, CodedTile] = {}
        for rows, pairs in zip(CODED_ROWS, (1, CODED_MANY), strict=True):
            tokens = tokens_of(pairs)
            x, logits = _routed(first, tokens, layer)
            tile = _best(
                {tile: partial(_mixed, sample, x, logits, (rows, tile)) for tile in CODED_TILES}, tokens, layer
            )
            if tile is not None:
                tiles[rows] = tile
        # Where no tile could be built, always numbers first.
        widen_from = most_rows * first.chosen + 1 if len(tiles) == len(CODED_ROWS) else 0
        for pairs in PAIRS_WIDENED if widen_from else ():
            tokens = tokens_of(pairs)
            rows = coded_rows(tokens * first.chosen, first.total)
            x, logits = _routed(first, tokens, layer)
            ways: dict[CodedTile | None, Callable[[], None]] = {
                None: partial(_mixed, sample, x, logits, None),
                tiles[rows]: partial(_mixed, sample, x, logits, (rows, tiles[rows])),
            }
            if _best(ways, tokens, layer) is None:
                widen_from = tokens * first.chosen
                break
            if tokens == most_rows:
                break
        for mixture in group:
            mixture.ways = {**mixture.tiles, **tiles}, widen_from
    return len(groups)


def to_words(ways: Any) -> Any:
    """What the clock has found of a layer (`ways`), as JSON has it."""
    if isinstance(ways, dict):
        return {"": [[to_words(key), to_words(value)] for key, value in ways.items()]}
    return [to_words(each) for each in ways] if isinstance(ways, tuple) else ways


def of_words(words: Any) -> Any:
    """The same again."""
    if isinstance(words, dict):
        return {of_words(key): of_words(value) for key, value in words[""]}
    return tuple(of_words(each) for each in words) if isinstance(words, list) else words


def _routed(mixture: Mixture, tokens: int, layer: DeviceLayer) -> tuple[Tensor, Tensor]:
    """So many, which go to any experts."""
    x = layer.zeros((tokens, mixture.hidden_size), mixture.dtype)
    logits = layer.zeros((tokens, mixture.total), mixture.dtype)
    layer.launch(x.normal_)
    layer.launch(logits.normal_)
    return x, logits


def _mixed(sample: list[Mixture], x: Tensor, logits: Tensor, coded: tuple[int, CodedTile] | None) -> None:
    for mixture in sample:
        mixture.mix(x, logits, coded)


def _by_shape(linears: Iterable[Linear]) -> list[list[Linear]]:
    return _grouped((linear for linear in linears if linear.kind == "torch"), _shape)


def _grouped(linears: Iterable[L], key: Callable[[L], object]) -> list[list[L]]:
    groups: dict[object, list[L]] = {}
    for linear in linears:
        groups.setdefault(key(linear), []).append(linear)
    return list(groups.values())


def _shape(linear: Linear) -> tuple[object, ...]:
    return linear.out_features, linear.in_features, linear.dtype, linear.has_bias, linear.activation


def _by_codes(sample: list[DeviceCodedLinear], x: Tensor, tile: device_coded.Tile) -> None:
    for linear in sample:
        linear.by_codes(x, tile)


def _by_wide(sample: list[DeviceCodedLinear], x: Tensor) -> None:
    for linear in sample:
        linear.by_wide(x)


def _by_float8(sample: list[DeviceCodedLinear], x: Tensor) -> None:
    for linear in sample:
        linear.by_float8(x)


def _widened(sample: list[DeviceCodedLinear], x: Tensor) -> None:
    for linear in sample:
        linear.by_cublas(x)


def _sample(group: list[L]) -> list[L]:
    return group[: max(1, -(-BYTES_READ // group[0].num_bytes))]


def _input(sample: Sequence[Linear], rows: int, layer: DeviceLayer) -> Tensor:
    x = layer.zeros((rows, sample[0].in_features), sample[0].dtype)
    layer.launch(x.normal_)
    return x


def _blocked(sample: list[Linear], x: Tensor, blocks: Blocks | None) -> None:
    """One pass over the weights."""
    for linear in sample:
        linear.by_blocks(x, blocks)


def _tiled(sample: list[Linear], x: Tensor, tile: Tile | None) -> None:
    for linear in sample:
        linear.by_tile(x, tile)


def _best(ways: dict[W | None, Callable[[], None]], rows: int, layer: DeviceLayer) -> W | None:
    """The one that takes least inside a graph; None: cuBLAS."""
    best, choice = math.inf, None
    for way, work in ways.items():
        try:
            seconds = _seconds(work, layer) / (1.0 if way is None else WORTH)
        except Exception as error:
            if layer.is_lost(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            logger.warning("no product of %d rows in blocks of %s: %s", rows, way, error)
            continue
        if seconds < best:
            best, choice = seconds, way
    return choice


def _seconds(work: Callable[[], None], layer: DeviceLayer) -> float:
    inferring = torch.inference_mode()(work)
    layer.launch(inferring)  # builds and loads the kernels, which a capture must not
    return layer.time(layer.capture(inferring))
