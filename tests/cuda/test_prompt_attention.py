"""Attention of prompts by our kernel, against float64: by Triton's interpreter, or on the GPU."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from engine.groups import Chunk  # noqa: E402
from engine.ops.triton.prompts import Tile, prompt_attention  # noqa: E402

CELLS = 16  # of a page
SHORT = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
# (new tokens, all tokens): one alone, one behind others, a whole prompt, and ends within and at the end of a page.
ROWS = [(1, 1), (1, 38), (33, 33), (21, 64), (6, 90)]


def expected_of(
    q: Tensor, keys: Tensor, values: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Of one row, in float64; the scale is 0.3."""
    count, length = len(q), len(keys)
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.double().repeat_interleave(group, 1), values.double().repeat_interleave(group, 1)
    position = torch.arange(length - count, length, device=q.device)[:, None]
    column = torch.arange(length, device=q.device)
    seen = column <= position
    if isinstance(window, Chunk):
        seen = seen & (column // int(window) == position // int(window))
    elif window is not None:
        seen = seen & (position - column < window)
    scores = torch.einsum("nhd,lhd->hnl", q.double(), keys) * 0.3
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, count, 1)], 2)
        values = torch.cat([values, torch.zeros_like(values[:1])])
    return torch.einsum("hnl,lhd->nhd", scores.softmax(2), values)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "more"),
    [
        (8, 2, 32, 32, {}),
        (2, 2, 16, 16, {}),
        (5, 1, 48, 32, {"softcap": 3.0}),
        (8, 2, 16, 16, {"window": 20}),
        (4, 4, 24, 40, {"window": 7, "sinks": True}),
        (5, 1, 16, 16, {"window": Chunk(24), "softcap": 2.0}),
        (8, 2, 16, 16, {"sinks": True}),
        (4, 1, 16, 16, {"window": 200}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, SHORT])
def test_prompts_against_float64(
    heads: int, kv_heads: int, dim: int, value_dim: int, more: dict[str, Any], dtype: torch.dtype
) -> None:
    """With and without earlier context; what is no number lies behind a row, behind its window and in other pages."""
    generator = torch.Generator().manual_seed(heads + dim)
    more, tokens = dict(more), sum(count for count, _ in ROWS)
    counts = [-(-length // CELLS) for _, length in ROWS]
    q = torch.randn(tokens, heads, dim, generator=generator)
    pools = [torch.full((40, CELLS, kv_heads, size), torch.nan) for size in (dim, value_dim)]
    pages = torch.randperm(40, generator=generator)[: sum(counts)].split(counts)
    contexts = []
    for (count, length), row in zip(ROWS, pages, strict=True):
        here = torch.arange(length)
        contexts.append([torch.randn(length, kv_heads, pool.shape[3], generator=generator) for pool in pools])
        seen = here >= 0
        if (window := more.get("window")) is not None:
            first = length - count
            seen = here >= (first // window * int(window) if isinstance(window, Chunk) else first - window + 1)
        for pool, context in zip(pools, contexts[-1], strict=True):
            pool[row[here // CELLS][seen], (here % CELLS)[seen]] = context[seen]
    if more.get("sinks"):
        more["sinks"] = torch.randn(heads, generator=generator).to(DEVICE)
    q, k_pool, v_pool = (each.to(DEVICE, dtype) for each in (q, *pools))
    starts = [[0, *itertools.accumulate(sizes)] for sizes in ([count for count, _ in ROWS], counts)]
    qo_indptr, kv_indptr, kv_len = (
        torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in (*starts, [length for _, length in ROWS])
    )
    indices = torch.cat(pages).int().to(DEVICE)
    known = [more.get(name) for name in ("window", "softcap", "sinks")]
    expected = torch.cat(
        [
            expected_of(own, *(each.to(DEVICE, dtype) for each in context), *known)
            for own, context in zip(q.split([count for count, _ in ROWS]), contexts, strict=True)
        ]
    )
    out = torch.full((tokens, heads, value_dim), torch.nan, dtype=dtype, device=DEVICE)
    for tile in (Tile(16, 16, 4, 1), Tile(64, 32, 4, 2)) if dtype == torch.float32 else (Tile(64, 64, 4, 2),):
        out.fill_(torch.nan)
        where = qo_indptr, kv_indptr, indices, kv_len
        found = prompt_attention(q, k_pool, v_pool, *where, 0.3, max_len=33, out=out, tile=tile, **more)
        assert found is out
        error = (found.double() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
        assert float(error.max()) < (2e-3 if dtype == torch.float32 else 1e-2)
