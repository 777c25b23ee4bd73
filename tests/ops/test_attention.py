"""engine/ops/attention: random mixed batches over random page layouts against dense float64 attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.executor.tables import PagedMetadata
from engine.forward import Limits
from engine.ops import native
from engine.ops.attention.base import AttentionSpec, create_backend
from engine.ops.attention.torch_paged import Backend
from engine.ops.rope import apply_rope

DTYPES = [torch.float32, torch.bfloat16]


@dataclass
class Case:
    """Rows with `start` tokens in the pool already and `length` new ones, over shuffled pages of one pool."""

    spec: AttentionSpec
    page_size: int
    rows: list[tuple[int, int]]
    dtype: torch.dtype
    seed: int = 0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        spec = self.spec

        def draw(tokens: int, heads: int) -> Tensor:
            return torch.randn(tokens, heads, spec.head_dim, generator=generator).to(self.dtype)

        for start, length in self.rows:
            self.keys.append(draw(start + length, spec.num_kv_heads))
            self.values.append(draw(start + length, spec.num_kv_heads))
            self.queries.append(draw(length, spec.num_heads))

    def run(
        self, chosen: list[int], layout_seed: int = 0, layer: int = 0, cos_sin: Tensor | None = None
    ) -> list[Tensor]:
        """The rows `chosen` as one step: [length, Hq * D] each."""
        rng = np.random.default_rng(layout_seed)
        spec, size = self.spec, self.page_size
        counts = [-(-sum(self.rows[i]) // size) for i in chosen]
        num_pages = sum(counts) + 3
        backend = create_backend("torch_paged", spec, num_pages=num_pages, page_size=size, dtype=self.dtype)
        assert isinstance(backend, Backend)
        # What no row owns must never be read.
        for pool in (*backend.k_pools, *backend.v_pools):
            pool.fill_(float("nan"))
        pages = np.split(rng.permutation(np.arange(1, num_pages + 1))[: sum(counts)], np.cumsum(counts)[:-1])
        metadata = PagedMetadata(Limits(len(chosen), 4096, 4096, size, num_pages, 10))
        lengths = np.array([self.rows[i][1] for i in chosen], np.int32)
        kv_len = np.array([sum(self.rows[i]) for i in chosen], np.int32)
        metadata.num_rows = len(chosen)
        metadata.qo_indptr = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        metadata.kv_indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        metadata.kv_indices = np.concatenate(pages).astype(np.int32)
        metadata.kv_len = kv_len
        metadata.last_page_len = kv_len - (np.array(counts, np.int32) - 1) * size
        metadata.positions = np.concatenate(
            [np.arange(start, start + n) for start, n in (self.rows[i] for i in chosen)]
        ).astype(np.int32)
        slots = [row[np.arange(k) // size] * size + np.arange(k) % size for row, k in zip(pages, kv_len, strict=True)]
        metadata.kv_slots = np.concatenate(
            [slot[self.rows[i][0] :] for slot, i in zip(slots, chosen, strict=True)]
        ).astype(np.int64)
        for slot, i in zip(slots, chosen, strict=True):
            start, old = self.rows[i][0], torch.from_numpy(slot[: self.rows[i][0]].astype(np.int64))
            for pool, data in ((backend.k_pools[layer], self.keys[i]), (backend.v_pools[layer], self.values[i])):
                pool.view(-1, spec.num_kv_heads, spec.head_dim)[old] = data[:start]
        qkv = torch.cat(
            [
                torch.cat((self.queries[i], self.keys[i][self.rows[i][0] :], self.values[i][self.rows[i][0] :]), 1)
                for i in chosen
            ]
        )
        q, k, v = qkv.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        backend.plan(metadata)
        out = backend.forward(layer, q, k, v, cos_sin)
        assert out.shape == (len(qkv), spec.num_heads * spec.head_dim) and out.dtype == self.dtype
        return list(out.split(lengths.tolist()))

    def exact(self, i: int, layer: int = 0) -> Tensor:
        """Dense attention in float64."""
        spec, (start, length) = self.spec, self.rows[i]
        group = spec.num_heads // spec.num_kv_heads
        keys = self.keys[i].double().repeat_interleave(group, 1).transpose(0, 1)
        values = self.values[i].double().repeat_interleave(group, 1).transpose(0, 1)
        scores = self.queries[i].double().transpose(0, 1) @ keys.transpose(1, 2) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        position, column = torch.arange(start, start + length)[:, None], torch.arange(start + length)
        mask = column <= position
        window = spec.window[layer] if spec.window else None
        if window is not None:
            mask &= column > position - window
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return (weights @ values).transpose(0, 1).reshape(length, -1)


def spec(heads: int, kv_heads: int, dim: int, window: int | None = None, softcap: float | None = None) -> AttentionSpec:
    return AttentionSpec(2, heads, kv_heads, dim, dim**-0.5, (None, window) if window else None, softcap)


SHAPES = [(4, 2, 64), (4, 1, 64), (3, 3, 16), (8, 2, 80), (2, 1, 20), (14, 2, 8), (7, 1, 128), (2, 2, 256)]


def assert_close(got: Tensor, exact: Tensor) -> None:
    limit = 2e-6 if got.dtype == torch.float32 else 1.2e-2
    assert (got.double() - exact).abs().max() <= limit * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_batches_match_dense_attention(mode: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(sum(shape))
    for seed, page_size in enumerate((1, 3, 16)):
        rows = [(int(rng.integers(0, 150)), 1) for _ in range(3)]
        rows += [(int(rng.integers(0, 100)), int(rng.integers(2, 90))) for _ in range(2)] + [(0, 1), (63, 1), (64, 1)]
        case = Case(spec(*shape), page_size, rows, dtype, seed)
        for i, got in enumerate(case.run(list(range(len(rows))), seed)):
            assert_close(got, case.exact(i))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 5, 64, 100, 700])
def test_sliding_window(mode: str, window: int, dtype: torch.dtype) -> None:
    case = Case(spec(4, 2, 32, window), 16, [(1200, 1), (90, 1), (0, 200), (530, 75), (3, 1)], dtype)
    for layer in (0, 1):
        for i, got in enumerate(case.run(list(range(5)), layer=layer)):
            assert_close(got, case.exact(i, layer))


@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap(mode: str, softcap: float) -> None:
    case = Case(spec(4, 2, 32, 50, softcap), 16, [(600, 1), (0, 70), (65, 3)], torch.float32)
    for layer in (0, 1):
        for i, got in enumerate(case.run([0, 1, 2], layer=layer)):
            assert_close(got, case.exact(i, layer))


def test_large_scores_stay_finite(mode: str) -> None:
    """Scores of several hundred: everything but the best key vanishes."""
    case = Case(AttentionSpec(2, 4, 2, 32, 20.0), 16, [(600, 1), (0, 70)], torch.float32)
    for i, got in enumerate(case.run([0, 1])):
        assert (got.double() - case.exact(i)).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_depends_on_nothing_but_its_context(kernels: native.Library, dtype: torch.dtype) -> None:
    """Bit for bit: alone, in a batch, on other pages, with more threads (split contexts), as decode or in a chunk."""
    for window in (None, 200):
        case = Case(spec(6, 2, 48, window), 16, [(1500, 1), (511, 1), (512, 1), (300, 150), (0, 70), (40, 1)], dtype, 3)
        layer = 0 if window is None else 1
        batch = case.run(list(range(6)), layer=layer)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for i in range(6):
                assert torch.equal(case.run([i], layout_seed=9 + i, layer=layer)[0], batch[i]), (i, threads)
            reversed_batch = case.run([5, 4, 3, 2, 1, 0], layout_seed=4, layer=layer)
            assert all(torch.equal(a, b) for a, b in zip(reversed_batch[::-1], batch, strict=True))
        torch.set_num_threads(1)
        for page_size in (1, 7):
            other = Case(case.spec, page_size, case.rows, dtype, 3)
            assert all(torch.equal(a, b) for a, b in zip(other.run(list(range(6)), layer=layer), batch, strict=True))
        start, length = case.rows[3]
        for j in (0, 1, 77, length - 1):
            single = Case(case.spec, 16, [(start + j, 1)], dtype)
            single.keys, single.values = [case.keys[3][: start + j + 1]], [case.values[3][: start + j + 1]]
            single.queries = [case.queries[3][j : j + 1]]
            assert torch.equal(single.run([0], layer=layer)[0][0], batch[3][j]), j


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_rope_is_apply_rope(mode: str, dtype: torch.dtype) -> None:
    angles = torch.arange(200)[:, None] / 100 ** (torch.arange(0, 24, 2) / 24)
    table = torch.cat((angles.cos(), angles.sin()), -1).float()
    rows = [(0, 1), (0, 30), (0, 130)]
    plain, turned = (Case(spec(4, 2, 32), 16, rows, dtype) for _ in range(2))
    for i, (_, length) in enumerate(rows):
        apply_rope(turned.queries[i], turned.keys[i], table, torch.arange(length))
    for got, expected in zip(plain.run([0, 1, 2], cos_sin=table), turned.run([0, 1, 2]), strict=True):
        assert torch.equal(got, expected)


def test_pages_written_in_a_step_can_be_read_in_it(mode: str) -> None:
    """Two rows share a prefix whose pages the first one writes in this very step."""
    limits = Limits(2, 64, 64, 4, 16, 10)
    one = AttentionSpec(1, 2, 1, 16, 0.25)
    backend = Backend(one, num_pages=16, page_size=4, dtype=torch.float32)
    metadata = PagedMetadata(limits)
    metadata.num_rows = 2
    metadata.qo_indptr = np.array([0, 10, 12], np.int32)
    metadata.kv_indptr = np.array([0, 3, 6], np.int32)
    metadata.kv_indices = np.array([5, 2, 7, 5, 2, 9], np.int32)
    metadata.kv_len = np.array([10, 10], np.int32)
    metadata.last_page_len = np.array([2, 2], np.int32)
    metadata.positions = np.concatenate((np.arange(10), [8, 9])).astype(np.int32)
    pages = np.array([5] * 4 + [2] * 4 + [7] * 2 + [9] * 2)
    metadata.kv_slots = (pages * 4 + metadata.positions % 4).astype(np.int64)
    q, k, v = torch.randn(12, 2, 16), torch.randn(12, 1, 16), torch.randn(12, 1, 16)
    for x in (q, k, v):
        x[10:] = x[8:10]
    backend.plan(metadata)
    out = backend.forward(0, q, k, v)
    assert torch.allclose(out[10:], out[8:10], atol=1e-6)
