"""engine/ops/sampling: draws against the exact filtered distribution (numpy, written apart); what they depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from engine.forward import SAMPLING_DTYPE
from engine.ops import native
from engine.ops.sampling.sampler import process, sample, uniform

Floats = npt.NDArray[np.float64]
DRAWS = 20_000


def params(rows: int, **fields: Any) -> npt.NDArray[Any]:
    """Sampling rows; greedy unless told otherwise."""
    table = np.zeros(rows, SAMPLING_DTYPE)
    table["top_p"] = 1.0
    table["stop_ids"] = -1
    for name, value in fields.items():
        table[name] = value
    return table


def exact(logits: Floats, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Floats:
    """The distribution after HF's warpers, in their order."""
    x = logits / temperature
    if top_k:
        x = np.where(x < np.sort(x)[-min(top_k, len(x))], -np.inf, x)
    p = np.exp(x - x.max())
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        ahead = np.cumsum(p[order]) - p[order]
        p[order[1:][ahead[1:] >= top_p]] = 0
        p /= p.sum()
    if min_p:
        p[p < min_p * p.max()] = 0
    return p / p.sum()


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.6},
    {"top_p": 0.97},
    {"min_p": 0.2},
    {"top_k": 12, "top_p": 0.8},
    {"top_k": 20, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.15},
    {"top_k": 15, "top_p": 0.95, "min_p": 0.05},
    {"top_k": 10_000},
    {"top_p": 1e-6},
    {"min_p": 1.0},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_draws_follow_the_filtered_distribution(mode: str, filters: dict[str, Any], temperature: float) -> None:
    rng = np.random.default_rng(7)
    logits = (2 * rng.standard_normal(50)).astype(np.float32)
    p = exact(logits.astype(np.float64), temperature, **filters)
    table = params(DRAWS, temperature=temperature, seed=rng.integers(0, 2**64, DRAWS, np.uint64), **filters)
    tokens = sample(torch.from_numpy(np.tile(logits, (DRAWS, 1))), table, np.full(DRAWS, 3, np.int32))
    counts = np.bincount(tokens, minlength=50)
    assert not counts[p == 0].any(), "a filtered id was drawn"
    expected = p * DRAWS
    common = expected >= 5
    rest = ~common & (p > 0)
    observed = np.append(counts[common], counts[rest].sum())
    expected = np.append(expected[common], expected[rest].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    # Five standard deviations of a chi-square: a right sampler fails once in a million runs, and the seed is fixed.
    assert statistic <= freedom + 5 * np.sqrt(2 * max(freedom, 1)) + 5


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_large_vocabularies_keep_exactly_the_filtered_ids(mode: str, filters: dict[str, Any]) -> None:
    """Peaked and flat rows: the search for candidates must go as deep as the filters reach."""
    rng = np.random.default_rng(1)
    for spread in (0.01, 1.0, 6.0):
        logits = (spread * rng.standard_normal(3001)).astype(np.float32)
        p = exact(logits.astype(np.float64), 1.0, **filters)
        cumulative = np.cumsum(p)
        draws = 400
        table = params(draws, temperature=1.0, seed=np.arange(draws), **filters)
        positions = np.arange(draws, dtype=np.int32)
        tokens = sample(torch.from_numpy(np.tile(logits, (draws, 1))), table, positions)
        u = uniform(table["seed"], positions)
        wanted = np.searchsorted(cumulative, u, side="right")
        # Rounding may move a draw that falls on a border to a neighbour among the kept ids.
        wrong = np.flatnonzero(tokens != wanted)
        near = np.minimum(
            np.abs(cumulative[tokens[wrong]] - u[wrong]), np.abs(cumulative[tokens[wrong] - 1] - u[wrong])
        )
        assert (near < 2e-5).all() and len(wrong) <= draws // 20


def test_greedy_takes_the_lowest_id_of_a_tie(mode: str) -> None:
    logits = torch.zeros(4, 1001)
    logits[0, [700, 30, 999]] = 2.0
    logits[1] = -torch.inf
    logits[1, 1000] = -5.0
    logits[3, 0] = 1e-30
    assert sample(logits, params(4), np.zeros(4, np.int32)).tolist() == [30, 1000, 0, 0]


def test_ties_at_the_kth_stay_and_at_top_p_the_lowest_ids_stay(mode: str) -> None:
    logits = np.array([1.0, 3.0, 1.0, 1.0, 0.0], np.float32)
    draws = 500
    for filters, allowed in [({"top_k": 2}, {0, 1, 2, 3}), ({"top_p": 0.75}, {0, 1}), ({"top_p": 0.8}, {0, 1, 2})]:
        table = params(draws, temperature=1.0, seed=np.arange(draws), **filters)
        tokens = sample(torch.from_numpy(np.tile(logits, (draws, 1))), table, np.zeros(draws, np.int32))
        assert set(tokens.tolist()) == allowed


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_what_is_drawn_from_is_the_filtered_distribution(mode: str, filters: dict[str, Any]) -> None:
    logits = torch.from_numpy((3 * np.random.default_rng(8).standard_normal((4, 300))).astype(np.float32))
    table = params(4, temperature=[0.7, 0.0, 1.6, 0.7], seed=range(4), **filters)
    table["min_length"], table["num_stop_ids"], table["stop_ids"][:, 0] = 5, 1, 17
    at, rows = np.array([9, 9, 9, 2], np.int32), np.array([3, 1, 2], np.int64)
    found = process(logits.clone(), rows, table, at).double().softmax(-1).numpy()
    own = logits.double().numpy()
    own[3, 17] = -np.inf
    assert found[0, 17] == 0
    np.testing.assert_allclose(found[0], exact(own[3], 0.7, **filters), rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(found[1], exact(own[1], 1.0), rtol=1e-4)  # greedy: no filter has a say
    np.testing.assert_allclose(found[2], exact(own[2], float(np.float32(1.6)), **filters), rtol=1e-4, atol=1e-12)


def test_nothing_is_drawn_that_has_no_probability(mode: str) -> None:
    logits, table, positions = mixed(400, 500)
    drawn = sample(logits.clone(), table, positions)
    found = process(logits, np.arange(400, dtype=np.int64), table, positions)
    assert torch.isfinite(found[torch.arange(400), torch.from_numpy(drawn).long()]).all()


def mixed(rows: int, vocab: int) -> tuple[torch.Tensor, npt.NDArray[Any], npt.NDArray[np.int32]]:
    rng = np.random.default_rng(5)
    table = params(
        rows, temperature=rng.choice([0.0, 0.5, 1.0, 2.0], rows), seed=rng.integers(0, 2**64, rows, np.uint64)
    )
    table["top_k"] = rng.choice([0, 3, 40], rows)
    table["top_p"] = rng.choice([1.0, 0.5, 0.95], rows)
    table["min_p"] = rng.choice([0.0, 0.1], rows)
    logits = torch.from_numpy((3 * rng.standard_normal((rows, vocab))).astype(np.float32))
    return logits, table, rng.integers(0, 5000, rows).astype(np.int32)


def test_a_draw_depends_on_its_own_row_alone(mode: str) -> None:
    logits, table, positions = mixed(60, 777)
    together = sample(logits.clone(), table, positions)
    alone = [int(sample(logits[i : i + 1].clone(), table[i : i + 1], positions[i : i + 1])[0]) for i in range(60)]
    assert together.tolist() == alone
    order = np.random.default_rng(0).permutation(60)
    torch.set_num_threads(2)
    assert sample(logits[torch.from_numpy(order)], table[order], positions[order]).tolist() == together[order].tolist()


def test_native_and_torch_agree(kernels: native.Library) -> None:
    logits, table, positions = mixed(400, 500)
    fast = sample(logits.clone(), table, positions)
    with native.disabled():
        plain = sample(logits.clone(), table, positions)
    assert (fast == plain).mean() > 0.99, "but for draws on a border"


def test_seed_and_position_make_the_draw(mode: str) -> None:
    logits = torch.zeros(1, 4096)
    table = params(1, temperature=1.0, seed=11)

    def at(position: int, seed: int) -> int:
        table["seed"] = seed
        return int(sample(logits.clone(), table, np.array([position], np.int32))[0])

    assert [at(p, 11) for p in range(20)] == [at(p, 11) for p in range(20)]
    assert len({at(p, 11) for p in range(20)}) > 15
    assert len({at(3, seed) for seed in range(20)}) > 15


def test_uniform_is_what_the_kernels_draw(mode: str) -> None:
    """A flat row of 2^12 ids reads the number back to 12 bits, seeds up to 2^64 - 1 included."""
    seeds = np.array([0, 1, 2**63, 2**64 - 1] * 50, np.uint64)
    positions = np.arange(200, dtype=np.int32) * 7919
    u = uniform(seeds, positions)
    table = params(200, temperature=1.0, seed=seeds)
    tokens = sample(torch.zeros(200, 4096), table, positions)
    assert np.abs(tokens - np.floor(u * 4096)).max() <= 1
    big = uniform(np.arange(100_000, dtype=np.uint64), np.zeros(100_000, np.int32))
    assert abs(big.mean() - 0.5) < 0.005 and abs(big.var() - 1 / 12) < 0.002


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_length_masks_stop_ids(mode: str, temperature: float) -> None:
    logits = torch.zeros(3, 10)
    logits[:, [4, 6]] = 50.0
    logits[:, 2] = 25.0
    table = params(3, temperature=temperature, min_length=8, num_stop_ids=2)
    table["stop_ids"][:, :2] = [4, 6]
    positions = np.array([7, 8, 3], np.int32)
    tokens = sample(logits, table, positions)
    assert tokens[0] == 2 and tokens[2] == 2 and tokens[1] in (4, 6)


def test_masked_ids_are_never_drawn(mode: str) -> None:
    logits = torch.full((300, 5000), -torch.inf)
    logits[:, [17, 4990]] = torch.tensor([1.0, 1.5])
    for filters in ({}, {"top_p": 0.99}, {"top_k": 100}, {"min_p": 0.01}, {"top_k": 4, "top_p": 0.999}):
        table = params(300, temperature=1.0, seed=np.arange(300), **filters)
        assert set(sample(logits.clone(), table, np.zeros(300, np.int32)).tolist()) == {17, 4990}


@pytest.mark.parametrize("temperature", [1e-6, 1e-42, 100.0])
def test_extreme_temperatures(mode: str, temperature: float) -> None:
    logits = torch.randn(20, 100)
    table = params(20, temperature=temperature, seed=np.arange(20))
    tokens = sample(logits.clone(), table, np.zeros(20, np.int32))
    assert (tokens >= 0).all() and (tokens < 100).all()
    if temperature < 1:
        assert tokens.tolist() == logits.argmax(-1).tolist()
