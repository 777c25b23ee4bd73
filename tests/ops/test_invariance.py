"""engine/ops/invariance.py: row tiles found for products whose bits depend on the number of rows, and kept to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.ops import invariance, linear, native
from engine.ops.attention.base import AttentionSpec
from engine.ops.invariance import RowTile, find_row_tile, promise
from engine.ops.linear import Linear

OUT, IN = 300, 64
SPEC = AttentionSpec.alike(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)


def in_classes(class_of: Callable[[int], int], seen: list[int] | None = None) -> invariance.Multiply:
    """A product like oneDNN's: counts of rows fall into classes, and each class sums in an order of its own."""
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))

    def multiply(x: Tensor) -> Tensor:
        if seen is not None:
            seen.append(len(x))
        order = torch.randperm(IN, generator=torch.Generator().manual_seed(int(class_of(len(x)))))
        total = torch.zeros(len(x), OUT)
        for column in order.tolist():
            total += x[:, column, None].float() * weight[:, column]
        return total.to(x.dtype)

    return multiply


CLASSES: dict[str, tuple[Callable[[int], int], RowTile | None]] = {
    "one": (lambda rows: 0, RowTile(128)),
    "up-to-128": (lambda rows: rows > 128, RowTile(128)),
    "up-to-32": (lambda rows: 1 if rows == 33 else 2 * (rows > 33), RowTile(32)),
    "by-16": (lambda rows: (rows - 1) // 16, RowTile(16)),
    "one-row": (lambda rows: rows == 1, RowTile(128, 2)),
    "every": (lambda rows: rows, RowTile(16, 16)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_finds_the_tile(name: str, dtype: torch.dtype) -> None:
    class_of, expected = CLASSES[name]
    assert find_row_tile(in_classes(class_of), IN, OUT, dtype) == expected


def test_place_in_the_call_counts() -> None:
    """A product whose last rows are summed by other code keeps no promise, at any tile."""
    plain = in_classes(lambda rows: 0)
    other = in_classes(lambda rows: 1)
    assert find_row_tile(lambda x: torch.cat([plain(x[:-1]), other(x[-1:])]), IN, OUT, torch.float32) is None


def test_threads_count(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    multiply = in_classes(lambda rows: torch.get_num_threads())
    assert find_row_tile(multiply, IN, OUT, torch.float32) is None
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("tile", [RowTile(16), RowTile(16, 16), RowTile(64), RowTile(32, 2)])
def test_tiles_give_a_row_the_same_bits(tile: RowTile) -> None:
    seen: list[int] = []
    classes = (lambda rows: rows) if tile.rows == tile.least else (lambda rows: tile.least <= rows <= tile.rows)
    multiply = in_classes(classes, seen)
    x = torch.randn(150, IN)
    alone = torch.cat([tile.apply(multiply, row[None]) for row in x[:20]])
    for rows in (0, 1, 2, 15, 16, 17, 32, 33, 150):
        whole = tile.apply(multiply, x[:rows])
        assert whole.shape == (rows, OUT) and torch.equal(whole[:20], alone[:rows])
    assert torch.equal(tile.apply(multiply, x[3:90])[:17], alone[3:])
    assert set(seen) <= {0, *range(tile.least, tile.rows + 1)}


@pytest.mark.parametrize("kind", ["torch", "onednn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_layers(
    kernels: native.Library, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this machine's libraries do, the prepared layer keeps the promise, and says by what."""
    monkeypatch.setattr(linear, "SMALL_WEIGHT", 0)
    if kind == "onednn" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        kind = "torch"
    layer = Linear(torch.randn(768, 512).to(dtype), torch.randn(768).to(dtype))
    layer.prepare(kind=kind, deterministic=True)
    assert layer.kind == "native" or layer.row_tile is not None
    x = torch.randn(200, 512).to(dtype)
    alone = torch.cat([layer(row[None]) for row in x])
    for rows in (2, 7, 16, 31, 33, 128, 129, 200):
        assert torch.equal(layer(x[:rows]), alone[:rows]), rows
    promised, how = promise([layer], SPEC, dtype)
    assert promised and how == ("native kernels" if layer.row_tile is None else f"row tile {layer.row_tile}")


def test_small_layers_take_our_kernels(kernels: native.Library) -> None:
    layer = Linear(torch.randn(8, 64))
    layer.prepare(kind="torch", deterministic=True)
    assert layer.kind == "native"


def test_words(kernels: native.Library) -> None:
    layer = Linear(torch.randn(8, 64))
    half = AttentionSpec.alike(num_layers=1, num_heads=512, num_kv_heads=2, head_dim=16, scale=0.25)
    assert promise([], half, torch.float32) == (False, "no native attention for 256 heads on one of keys")
    assert promise([], SPEC, torch.float16) == (False, "no native kernels for float16")
    assert promise([layer], SPEC, torch.float32) == (False, "torch multiplies [8, 64] without a row tile")
    layer.row_tile = RowTile(128)
    other = Linear(torch.randn(8, 64))
    other.row_tile = RowTile(16, 2)
    assert promise([layer], SPEC, torch.float32) == (True, "row tile 128")
    assert promise([layer, other, layer], SPEC, torch.float32) == (True, "row tile 128 and 2 to 16")
    with native.disabled():
        assert promise([], SPEC, torch.float32)[1].startswith("no native kernels: ")
