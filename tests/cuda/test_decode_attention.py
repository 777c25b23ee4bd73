"""Attention of single tokens by our kernel, against plain torch: by Triton's interpreter, or on the GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from engine.groups import Chunk  # noqa: E402
from engine.ops.triton.attention import Tile, decode_attention, parts_of  # noqa: E402
from tests.cuda.pairs import crossed  # noqa: E402

PAGE = 16
NARROW = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16


def reference(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    tables: Tensor,
    kv_len: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Row by row in float64."""
    found = []
    for row, length in enumerate(kv_len.tolist()):
        first = 0 if window is None else max(0, length - window)
        if isinstance(window, Chunk):
            first = (length - 1) // window * window
        keys, values = (pool[tables[row].long()].flatten(0, 1)[first:length].double() for pool in (k_pool, v_pool))
        group = q.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("hd,lhd->hl", q[row].double(), keys) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], 1)
            values = torch.cat([values, torch.zeros_like(values[:1])])
        found.append(torch.einsum("hl,lhd->hd", scores.softmax(1), values))
    return torch.stack(found)


SHAPES: list[tuple[int, int, int, int, dict[str, Any]]] = [
    (8, 2, 64, 64, {}),
    (8, 2, 64, 64, {"window": 40}),
    (6, 2, 32, 16, {"softcap": 3.0}),
    (4, 2, 16, 16, {"window": Chunk(32)}),
    (4, 4, 48, 48, {"window": 200, "sinks": True}),
    (5, 1, 16, 16, {"softcap": 2.0, "window": 20, "sinks": True}),
]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "more", "parts", "dtype"),
    [(*shape, *rest) for shape, *rest in crossed(SHAPES, [1, 3], [torch.float32, NARROW])],
)
def test_against_torch(
    heads: int, kv_heads: int, dim: int, value_dim: int, more: dict[str, Any], parts: int, dtype: torch.dtype
) -> None:
    """Rows of every length, of one token and of full tables among them; other pages hold what is no number."""
    generator = torch.Generator().manual_seed(heads + dim + parts)
    lengths, width = [1, 16, 37, 80, 112], 7
    rows = len(lengths)
    q = torch.randn(rows, heads, dim, generator=generator)
    pools = [torch.randn(60, PAGE, kv_heads, size, generator=generator) for size in (dim, value_dim)]
    tables = (torch.randperm(59, generator=generator)[: rows * width] + 1).view(rows, width).int()
    for row, length in enumerate(lengths):
        tables[row, -(-length // PAGE) :] = 0
        for pool in pools:  # behind a row's last token
            pool[tables[row, (length - 1) // PAGE].long(), (length - 1) % PAGE + 1 :] = torch.nan
    for pool in pools:
        pool[0] = torch.nan
    if more.get("sinks"):
        more = {**more, "sinks": torch.randn(heads, generator=generator).to(DEVICE)}
    q, k_pool, v_pool = (each.to(DEVICE, dtype) for each in (q, *pools))
    tables, kv_len = tables.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    expected = reference(q, k_pool, v_pool, tables, kv_len, 0.3, **more)
    out = torch.full((rows, heads, value_dim), torch.nan, dtype=dtype, device=DEVICE)
    for tokens in (16, 64) if dtype == torch.float32 or parts > 1 else (32,):
        found = decode_attention(
            q, k_pool, v_pool, tables, kv_len, 0.3, out=out, tile=Tile(tokens), parts=parts, **more
        )
        error = (found.double() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
        assert float(error.max()) < (2e-3 if dtype == torch.float32 else 1e-2)


def test_parts() -> None:
    assert parts_of(8, 64, 1184, 512) == 19, "no part is smaller than a tile"
    assert parts_of(128, 64, 1184, 512) == 4
    assert parts_of(512, 64, 10**6, 512) == parts_of(2048, 64, 10**6, 512) == 1
