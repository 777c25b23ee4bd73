"""engine/ops/attention: random mixed batches over random page layouts against dense float64 attention."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.executor.tables import PagedMetadata
from engine.forward import Limits
from engine.groups import Chunk, MemoryGroup, plan_groups
from engine.ops import native
from engine.ops.attention import coded
from engine.ops.attention.base import AttentionSpec, LayerAttention, create_backend
from engine.ops.attention.sequence import attend_sequence
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
    kv_dtype: torch.dtype | None = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        spec = self.layer_of(0)

        def draw(tokens: int, heads: int, dim: int) -> Tensor:
            return torch.randn(tokens, heads, dim, generator=generator).to(self.dtype)

        for start, length in self.rows:
            self.keys.append(draw(start + length, spec.num_kv_heads, spec.head_dim))
            self.values.append(draw(start + length, spec.num_kv_heads, spec.value_dim))
            self.queries.append(draw(length, spec.num_heads, spec.head_dim))
            if spec.values_in_keys:
                self.values[-1] = self.keys[-1][:, :, : spec.value_dim]

    def layer_of(self, number: int) -> LayerAttention:
        layer = self.spec.layers[number]
        assert layer is not None
        return layer

    @property
    def sinks(self) -> Tensor | None:
        """Of every layer that has some."""
        layer = self.layer_of(0)
        return torch.linspace(-3, 3, layer.num_heads) if layer.sinks else None

    def run(
        self, chosen: list[int], layout_seed: int = 0, layer: int = 0, cos_sin: Tensor | None = None
    ) -> list[Tensor]:
        """The rows `chosen` as one step: [length, Hq * D] each."""
        rng = np.random.default_rng(layout_seed)
        spec, size = self.layer_of(layer), self.page_size
        counts = [-(-sum(self.rows[i]) // size) for i in chosen]
        num_pages = sum(counts) + 3
        backend = create_backend(
            "torch_paged", self.spec, num_pages=num_pages, page_size=size, dtype=self.dtype, kv_dtype=self.kv_dtype
        )
        assert isinstance(backend, Backend)
        # What no row owns must never be read; -1 is no number as a scale.
        for pool in (*backend.k_pools, *backend.v_pools):
            pool.fill_(-1 if self.kv_dtype == torch.int8 else float("nan"))
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
            place = backend._places[layer]
            assert place is not None
            for pool, scales, data in (
                (place.k_pool, place.k_scales, self.keys[i]),
                (place.v_pool, place.v_scales, self.values[i]),
            ):
                if place.k_scales is None:
                    pool.flatten(0, 1)[old] = data[:start].to(pool.dtype)
                elif scales is not None:
                    split = coded.split_of(spec) if pool is place.k_pool else spec.value_dim
                    pool.flatten(0, 1)[old], scales.flatten(0, 1)[old] = coded.to_codes(data[:start], split)
        # Beside one another, as a projection gives them.
        parts = [
            [self.queries[i].flatten(1), *(x[i][self.rows[i][0] :].flatten(1) for x in (self.keys, self.values))]
            for i in chosen
        ]
        qkv = torch.cat([torch.cat(part, 1) for part in parts])
        sizes = [part.shape[1] for part in parts[0]]
        dims = spec.head_dim, spec.head_dim, spec.value_dim
        q, k, v = (x.unflatten(1, (-1, dim)) for x, dim in zip(qkv.split(sizes, 1), dims, strict=True))
        backend.plan(metadata)
        out = backend.forward(layer, q, k, None if spec.values_in_keys else v, cos_sin, sinks=self.sinks)
        assert out.shape == (len(qkv), spec.num_heads * spec.value_dim) and out.dtype == self.dtype
        return list(out.split(lengths.tolist()))

    def exact(self, i: int, layer: int = 0) -> Tensor:
        """Dense attention in float64."""
        spec, (start, length) = self.layer_of(layer), self.rows[i]
        group = spec.num_heads // spec.num_kv_heads
        kept, kept_values = self.keys[i], self.values[i]
        if self.kv_dtype == torch.int8:
            split = coded.split_of(spec)
            kept = coded.to_numbers(*coded.to_codes(kept, split), split)
            own = coded.to_numbers(*coded.to_codes(kept_values, spec.value_dim), spec.value_dim)
            kept_values = kept[:, :, : spec.value_dim] if spec.values_in_keys else own
        elif self.kv_dtype is not None:
            kept, kept_values = kept.to(self.kv_dtype), kept_values.to(self.kv_dtype)
        keys = kept.double().repeat_interleave(group, 1).transpose(0, 1)
        values = kept_values.double().repeat_interleave(group, 1).transpose(0, 1)
        scores = self.queries[i].double().transpose(0, 1) @ keys.transpose(1, 2) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        position, column = torch.arange(start, start + length)[:, None], torch.arange(start + length)
        mask = column <= position
        if isinstance(spec.window, Chunk):
            mask &= column // spec.window == position // spec.window
        elif spec.window is not None:
            mask &= column > position - spec.window
        scores = scores.masked_fill(~mask, float("-inf"))
        if self.sinks is not None:
            scores = torch.cat((scores, self.sinks.double()[:, None, None].expand(-1, length, 1)), -1)
        weights = scores.softmax(-1)[..., : start + length]
        return (weights @ values).transpose(0, 1).reshape(length, -1)


def spec(heads: int, kv_heads: int, dim: int, window: int | None = None, softcap: float | None = None) -> AttentionSpec:
    return AttentionSpec.alike(2, heads, kv_heads, dim, dim**-0.5, (None, window) if window else None, softcap)


SHAPES = [(4, 2, 64), (4, 1, 64), (3, 3, 16), (8, 2, 80), (2, 1, 20), (14, 2, 8), (7, 1, 128), (2, 2, 256)]


def assert_close(got: Tensor, exact: Tensor, most: float | None = None) -> None:
    limit = most or (2e-6 if got.dtype == torch.float32 else 1.2e-2)
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


# Heads, KV heads, dim, value dim, whether values are in keys, sinks, window.
KINDS = {
    "sinks": (6, 2, 32, 32, False, True, None),
    "sinks and a window": (6, 2, 20, 20, False, True, 40),
    "wide keys": (4, 2, 48, 32, False, False, None),
    "wide values": (4, 1, 16, 40, False, True, 100),
    "values in keys": (5, 1, 72, 64, True, False, None),
    "most of a key is no value": (80, 1, 40, 12, True, False, None),
    "chunks": (6, 2, 32, 32, False, False, Chunk(100)),
    "chunks of one": (4, 2, 16, 16, False, False, Chunk(1)),
}


def layer_of(kind: str) -> LayerAttention:
    heads, kv_heads, dim, value_dim, inside, sinks, window = KINDS[kind]
    return LayerAttention(heads, kv_heads, dim, value_dim, dim**-0.5, window, sinks=sinks, values_in_keys=inside)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_other_shapes_and_sinks(mode: str, kind: str, dtype: torch.dtype) -> None:
    layer = layer_of(kind)
    rows = [(1200, 1), (0, 1), (90, 1), (0, 130), (530, 75), (3, 2)]
    case = Case(AttentionSpec((layer,)), 16, rows, dtype)
    for i, got in enumerate(case.run(list(range(len(rows))))):
        assert_close(got, case.exact(i))


@pytest.mark.parametrize("kind", ["sinks and a window", "wide values", "values in keys", "chunks"])
def test_other_shapes_depend_on_nothing_but_their_context(kernels: native.Library, kind: str) -> None:
    case = Case(AttentionSpec((layer_of(kind),)), 16, [(1500, 1), (300, 150), (0, 70)], torch.bfloat16, 3)
    batch = case.run([0, 1, 2])
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for i in range(3):
            assert torch.equal(case.run([i], layout_seed=9 + i)[0], batch[i]), (i, threads)
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", [*KINDS, "odd"])
def test_eight_bits_of_each_token_are_what_is_attended_to(mode: str, kind: str) -> None:
    """As exact as floats are, of the numbers that the codes stand for; and the same bits in any company and chunks."""
    layer = LayerAttention(9, 3, 23, 23, 0.2, 300, softcap=20.0) if kind == "odd" else layer_of(kind)
    rows = [(1200, 1), (0, 1), (90, 1), (0, 130), (530, 75), (3, 2)]
    for dtype in DTYPES:
        case = Case(AttentionSpec((layer,)), 16, rows, dtype, kv_dtype=torch.int8)
        batch = case.run(list(range(len(rows))))
        for i, got in enumerate(batch):
            # Queries have sixteen bits there.
            assert_close(got, case.exact(i), 5e-5 if dtype == torch.float32 else None)
        if mode == "native":
            torch.set_num_threads(2)
            for i in (0, 4):
                assert torch.equal(case.run([i], layout_seed=9 + i)[0], batch[i])
            torch.set_num_threads(1)
            single = Case(case.spec, 7, [(530 + 20, 1)], dtype, kv_dtype=torch.int8)
            single.keys, single.values = [case.keys[4][:551]], [case.values[4][:551]]
            single.queries = [case.queries[4][20:21]]
            assert torch.equal(single.run([0])[0][0], batch[4][20])


# Beside activations of another dtype: heads that are read in place and such that are widened first.
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.float16)],
)
@pytest.mark.parametrize("kind", [*KINDS, "in place", "two in place", "odd"])
def test_sixteen_bits_of_each_number_are_what_is_attended_to(
    mode: str, kind: str, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    """As exact as if they had been computed like that; and the same bits in any company and chunks."""
    shapes = {
        "in place": (9, 3, 64, 64, 0.1, 300),
        "two in place": (4, 2, 128, 64, 0.1),
        "odd": (9, 3, 23, 23, 0.2, 300),
    }
    layer = LayerAttention(*shapes[kind], softcap=20.0) if kind in shapes else layer_of(kind)
    rows = [(1200, 1), (0, 1), (90, 1), (0, 130), (530, 75), (3, 2)]
    case = Case(AttentionSpec((layer,)), 16, rows, dtype, kv_dtype=kv_dtype)
    batch = case.run(list(range(len(rows))))
    for i, got in enumerate(batch):
        assert_close(got, case.exact(i))
    if mode == "native":
        for i in (0, 4):
            torch.set_num_threads(2)
            assert torch.equal(case.run([i], layout_seed=9 + i)[0], batch[i])
            torch.set_num_threads(1)
        single = Case(case.spec, 7, [(530 + 20, 1)], dtype, kv_dtype=kv_dtype)
        single.keys, single.values = [case.keys[4][:551]], [case.values[4][:551]]
        single.queries = [case.queries[4][20:21]]
        assert torch.equal(single.run([0])[0][0], batch[4][20])


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.bfloat16, torch.float16])
def test_what_is_kept_is_the_same_everywhere(kernels: native.Library, kv_dtype: torch.dtype) -> None:
    """What the kernel writes of a step, bit for bit what torch makes of it; of odd numbers, too."""
    layer = LayerAttention(4, 2, 21, 21, 1.0)
    backends = [
        Backend(AttentionSpec((layer,)), num_pages=2, page_size=8, dtype=torch.float32, kv_dtype=kv_dtype)
        for _ in range(2)
    ]
    k, v = torch.randn(2, 7, 2, 21, generator=torch.Generator().manual_seed(2)) * 3
    k[0, 0, 3], k[1, 1], k[2, 0, 20], k[3] = torch.inf, 0.0, torch.nan, 1e-37
    v[0], v[1, :, 2], v[2] = 3e38, -127.0, v[2] * 1e-20
    # Halfway between two of float16, below its normal numbers, and at its largest.
    v[4] = (
        torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-25, 2.1 * 2**-20, -65519, 65520])
        .repeat(6)
        .view(2, 21)
    )
    steps = PagedMetadata(Limits(1, 64, 64, 8, 2, 10))
    steps.num_rows = 1
    steps.qo_indptr = np.array([0, 7], np.int32)
    steps.kv_indptr, steps.kv_indices = np.array([0, 1], np.int32), np.array([1], np.int32)
    steps.kv_len = steps.last_page_len = np.array([7], np.int32)
    steps.positions = np.arange(7, dtype=np.int32)
    steps.kv_slots = np.arange(8, 15)
    for backend, by in zip(backends, (contextlib.nullcontext(), native.disabled()), strict=True):
        with by:
            backend.plan(steps)
            backend.forward(0, torch.zeros(7, 4, 21), k, v)
    for name in ("k_pool", "v_pool") if kv_dtype != torch.int8 else ("k_pool", "k_scales", "v_pool", "v_scales"):
        one, other = (getattr(backend._places[0], name) for backend in backends)
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)) or torch.equal(
            one.nan_to_num(9.0), other.nan_to_num(9.0)
        ), name
    assert float(backends[0].v_pools[0][1, 1, 2]) == -127


def test_eight_bits_take_half_of_sixteen() -> None:
    for heads, dim in ((3, 64), (8, 64), (8, 128), (4, 256)):
        one = AttentionSpec.alike(30, heads, heads, dim, 1.0)
        assert one.kv_bytes_per_token(torch.bfloat16) / one.kv_bytes_per_token(torch.int8) > 1.9


def test_layers_of_different_shapes_share_buffers(mode: str) -> None:
    """Two groups, a layer without K and V, and one that reads another's: each answers as it does alone."""
    full = LayerAttention(4, 1, 32, 32, 1.0)
    windowed = LayerAttention(4, 2, 24, 24, 0.2, 10)
    reading = LayerAttention(8, 2, 24, 24, 0.2, 10, reads=4)
    layers = (windowed, None, full, windowed, windowed, full, windowed, reading)
    spec = AttentionSpec(layers)
    assert spec.owners == [0, 2, 3, 4, 5, 6] and spec.common is None
    groups = plan_groups([10, None, 10, 10, None, 10], 4096)
    assert groups == (MemoryGroup(None, (1, 4)), MemoryGroup(10, (0, 2)), MemoryGroup(10, (3, 5)))
    # Two buffers, each as wide as two heads of 24.
    assert spec.buffer_widths(groups) == [(48, 48)] * 2
    assert spec.kv_bytes_per_token(torch.float32, groups) == 4 * 4 * 48
    backend = Backend(spec, num_pages=12, page_size=4, dtype=torch.float32, groups=groups)
    steps = [PagedMetadata(Limits(2, 64, 64, 4, 16, 10)) for _ in groups]
    # One sequence of nine tokens, then its tenth; of each group on pages of its own.
    for tokens in (range(9), range(9, 10)):
        count = len(tokens)
        for pages, metadata in zip(([1, 7, 4], [2, 8, 5], [3, 9, 6]), steps, strict=True):
            metadata.num_rows = 1
            metadata.qo_indptr = np.array([0, count], np.int32)
            metadata.kv_indptr, metadata.kv_indices = np.array([0, 3], np.int32), np.array(pages, np.int32)
            metadata.kv_len = np.array([tokens[-1] + 1], np.int32)
            metadata.last_page_len = metadata.kv_len - 8
            metadata.positions = np.array(tokens, np.int32)
            slots = np.array(pages)[metadata.positions // 4] * 4 + metadata.positions % 4
            metadata.kv_slots = slots.astype(np.int64)
        backend.plan(*steps)
        table = torch.rand(16, 8, generator=torch.Generator().manual_seed(4))
        for number, layer in spec.attending.items():
            generator = torch.Generator().manual_seed(number if layer.reads is None else layer.reads)
            kv = [torch.randn(10, layer.num_kv_heads, layer.head_dim, generator=generator) for _ in range(2)]
            q = torch.randn(count, layer.num_heads, layer.head_dim, generator=generator)
            turned = q.clone(), kv[0].clone()
            apply_rope(turned[0], None, table, torch.from_numpy(metadata.positions))
            apply_rope(turned[1], None, table, torch.arange(10))
            k, v = (x[list(tokens)] for x in kv)
            if layer.reads is None:
                got = backend.forward(number, q, k, v, table)
            else:
                got = backend.forward(number, q, None, None, table)
            last = tokens[-1] + 1
            exact = attend_sequence(layer, turned[0], turned[1][:last], kv[1][:last], None)
            assert torch.allclose(got, exact.flatten(1), atol=1e-5), (number, tokens)


def test_large_scores_stay_finite(mode: str) -> None:
    """Scores of several hundred: everything but the best key vanishes."""
    case = Case(AttentionSpec.alike(2, 4, 2, 32, 20.0), 16, [(600, 1), (0, 70)], torch.float32)
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
    one = AttentionSpec.alike(1, 2, 1, 16, 0.25)
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
