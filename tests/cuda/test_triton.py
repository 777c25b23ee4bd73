"""Every Triton kernel against its torch reference: by Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    # Read when a kernel is defined, so it comes before the imports below.
    os.environ["TRITON_INTERPRET"] = "1"

from engine.forward import NO_NUMBERS, SAMPLING_DTYPE  # noqa: E402
from engine.ops.activation import torch_gate_and_mul  # noqa: E402
from engine.ops.attention.device import decode_inputs  # noqa: E402
from engine.ops.experts import torch_mix_experts  # noqa: E402
from engine.ops.gated import torch_gated_product  # noqa: E402
from engine.ops.norm import Normed, torch_rms_norm  # noqa: E402
from engine.ops.recurrence import Recurrence, torch_causal_conv, torch_gate, torch_gated_norm  # noqa: E402
from engine.ops.rope import torch_rotate  # noqa: E402
from engine.ops.sampling import sampler  # noqa: E402
from engine.ops.sampling.device import accept, draw_by_torch, torch_sample, uniform  # noqa: E402
from engine.ops.sampling.device_extras import torch_adjust  # noqa: E402
from engine.ops.sampling.layout import WORDS  # noqa: E402
from engine.ops.skinny import BLOCKS, torch_skinny_product  # noqa: E402
from engine.ops.state import RowsOnDevice, StatePlan  # noqa: E402
from engine.ops.triton import (  # noqa: E402
    activation,
    drafts,
    experts,
    extras,
    gated,
    norm,
    pdl,
    prepare,
    recurrence,
    rope,
    sampling,
    skinny,
)
from tests.cuda.pairs import crossed  # noqa: E402


def patch_language_once() -> None:
    """The interpreter patches triton's language at every call from a kernel, too, more than half of its time."""
    from triton import language
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:
        return

    def patch_once(fn: Any) -> Any:
        # A kernel names `triton.language`, the library's own functions `triton.language.core`.
        seen = [each for each in fn.__globals__.values() if each is language or each is language.core]
        return scope() if all(each.static_print is print for each in seen) else patch(fn)

    interpreter._patch_lang = patch_once


if DEVICE.type == "cpu":
    patch_language_once()

DTYPES = [torch.float32, torch.bfloat16]
# The interpreter cannot multiply matrices of bfloat16.
NARROW = [torch.float32, torch.bfloat16 if DEVICE.type == "cuda" else torch.float16]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Up to the last place of the dtype: both compute in float32 and round once."""
    tolerance = 1e-5 if ours.dtype == torch.float32 else 1e-2
    return bool(torch.allclose(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 64])
def test_rms_norm(dtype: torch.dtype, width: int) -> None:
    # A slice of wider rows, as one half of a fused projection is.
    x, weight = randn(5, 2 * width, dtype=dtype)[:, :width], randn(width, dtype=dtype, seed=1)
    assert close(norm.rms_norm(x, weight, 1e-5), torch_rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = randn(5, 48, dtype=dtype), randn(5, 48, dtype=dtype, seed=1), randn(48, dtype=dtype, seed=2)
    total = residual + x
    out, kept = norm.add_rms_norm(x, residual, weight, 1e-5)
    assert kept.data_ptr() == residual.data_ptr() and close(kept, total)
    assert close(out, torch_rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_gate_and_mul(dtype: torch.dtype, gelu: bool) -> None:
    x = 3 * randn(3, 2 * 1100, dtype=dtype)
    assert close(activation.gate_and_mul(x, gelu=gelu), torch_gate_and_mul(x, gelu=gelu))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rot"), [(6, 2, 8, 8), (4, 4, 12, 4), (8, 1, 16, 0)])
def test_rope_and_write_kv(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, rot: int, normed: bool) -> None:
    tokens, pages, page_size = 5, 4, 4
    qkv = randn(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    cos_sin = randn(32, rot, seed=4) if rot else None
    positions = torch.tensor([0, 7, 31, 7, 2], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([9, 15, 0, 4, 2], device=DEVICE)
    expected_q, expected_k, norms = q.clone(), k.clone(), None
    if normed:  # weights of a type of their own, as with an offset
        norms = randn(dim, dtype=dtype, seed=7), randn(dim, seed=8), 1e-2
        expected_q, expected_k = (torch_rms_norm(x, w, 1e-2) for x, w in zip((q, k), norms, strict=False))
    if cos_sin is not None:
        torch_rotate(expected_q, cos_sin, positions)
        torch_rotate(expected_k, cos_sin, positions)
    pools = [randn(pages, page_size, kv_heads, dim, dtype=dtype, seed=s) for s in (5, 6)]
    before = [pool.clone() for pool in pools]
    out = rope.rope_and_write_kv(q, k, v, cos_sin, positions, slots, *pools, norms)
    assert out.is_contiguous() and close(out, expected_q)
    for pool, old, new in zip(pools, before, (expected_k, v), strict=True):
        flat, old_flat = pool.view(-1, kv_heads, dim), old.view(-1, kv_heads, dim)
        assert close(flat[slots], new)
        others = [i for i in range(pages * page_size) if i not in slots.tolist()]
        assert torch.equal(flat[others], old_flat[others]), "a cell was written that is nobody's"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rot"), [(6, 1, 12, 12), (9, 2, 16, 8), (4, 0, 8, 8)])
def test_rotate(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, rot: int) -> None:
    """Ends of wider heads, in place; what is before them, and past the part that turns, stays."""
    before = 20
    both = [randn(5, count, before + dim, dtype=dtype) for count in (heads, kv_heads) if count]
    q, k = both[0][..., before:], both[1][..., before:] if kv_heads else None
    cos_sin = randn(32, rot, seed=4)
    positions = torch.tensor([0, 7, 31, 7, 2], dtype=torch.int32, device=DEVICE)
    expected = [each.clone() for each in both]
    for each in expected:
        torch_rotate(each[..., before:], cos_sin, positions)
    rope.rotate(q, k, cos_sin, positions)
    for ours, theirs in zip(both, expected, strict=True):
        assert close(ours, theirs) and torch.equal(ours[..., :before], theirs[..., :before])
        assert torch.equal(ours[..., before + rot :], theirs[..., before + rot :])


@pytest.mark.parametrize(
    ("activation_name", "rows", "blocks", "dtype"),
    crossed([None, "silu", "gelu_tanh"], [1, 3, 4], [(2, 32, 1), BLOCKS[0]], DTYPES),
    ids=str,
)
def test_skinny_product(
    dtype: torch.dtype, blocks: tuple[int, int, int], rows: int, activation_name: str | None
) -> None:
    """Sizes that fit no block, and rows of x that are part of wider ones."""
    out_features, in_features = 26, 72
    x = randn(rows, 2 * in_features, dtype=dtype)[:, :in_features]
    weight, bias = 0.1 * randn(out_features, in_features, dtype=dtype, seed=1), randn(out_features, dtype=dtype, seed=2)
    for added in (None, bias):
        ours = skinny.skinny_product(x, weight, added, blocks, activation_name)
        expected = torch_skinny_product(x, weight, added, activation_name)
        assert ours.shape == (rows, out_features // (2 if activation_name else 1)) and close(ours, expected)


@pytest.mark.parametrize(("rows", "blocks", "dtype"), crossed([1, 3], [(2, 32, 1), BLOCKS[0]], DTYPES), ids=str)
def test_skinny_product_takes_a_norm_and_a_residual_along(
    dtype: torch.dtype, blocks: tuple[int, int, int], rows: int
) -> None:
    """Each alone and both; a norm whose weights are of another type, a residual whose rows are part of wider ones."""
    out_features, in_features = 26, 72
    x = 3 * randn(rows, 2 * in_features, dtype=dtype)[:, :in_features]
    weight, bias = 0.1 * randn(out_features, in_features, dtype=dtype, seed=1), randn(out_features, dtype=dtype, seed=2)
    for gain in (randn(in_features, dtype=dtype, seed=3), randn(in_features, seed=4), None):
        source: Tensor | Normed = x if gain is None else Normed(x, gain, 1e-2)
        norm = None if gain is None else (gain, 1e-2)
        for activation_name in (None, "silu") if gain is not None else ():
            ours = skinny.skinny_product(x, weight, bias, blocks, activation_name, norm)
            assert close(ours, torch_skinny_product(source, weight, bias, activation_name))
        stream = randn(rows, 2 * out_features, dtype=dtype, seed=5)
        before, residual = stream.clone(), stream[:, :out_features]
        expected = torch_skinny_product(source, weight, bias, None, residual.clone())
        ours = skinny.skinny_product(x, weight, bias, blocks, None, norm, residual)
        assert ours is residual and close(ours, expected)
        assert torch.equal(stream[:, out_features:], before[:, out_features:])


@pytest.mark.parametrize(("rows", "in_features", "activation_name"), crossed([2, 3, 4], [2048, 8192], [None, "silu"]))
def test_skinny_product_over_real_rows(rows: int, in_features: int, activation_name: str | None) -> None:
    """As many numbers as a product of Llama-3.2-1B sums, in all block sizes."""
    x, weight = randn(rows, in_features), in_features**-0.5 * randn(16, in_features, seed=1)
    expected = torch_skinny_product(x, weight, None, activation_name)
    for blocks in BLOCKS:
        assert close(skinny.skinny_product(x, weight, None, blocks, activation_name), expected)


@pytest.mark.parametrize(
    ("activation_name", "tile", "dtype"),
    crossed(["silu", "gelu_tanh"], [(16, 32, 64, 1, 2), (32, 16, 128, 1, 2)], NARROW),
    ids=str,
)
def test_gated_product(dtype: torch.dtype, tile: tuple[int, int, int, int, int], activation_name: str) -> None:
    """Sizes that fit no tile; more tiles of rows than go together; rows that are part of wider ones."""
    rows, inner, in_features = 9 * tile[0] + 5, 45, 40
    x = randn(rows, 2 * in_features, dtype=dtype)[:, :in_features]
    weight = 0.1 * randn(2 * inner, in_features, dtype=dtype, seed=1)
    for bias in (None, randn(2 * inner, dtype=dtype, seed=2)):
        ours = gated.gated_product(x, weight, bias, activation_name, tile)
        assert ours.shape == (rows, inner) and close(ours, torch_gated_product(x, weight, bias, activation_name))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("normalize", [False, True])
def test_route(normalize: bool) -> None:
    logits = randn(7, 20)[:, :11]
    logits[3, :] = float("nan")
    logits[4, 2] = logits[4, 6] = 9.0
    ours, shares = experts.route(logits, 3, normalize=normalize)
    assert ours.dtype == torch.int32 and int(ours.min()) >= 0 and int(ours.max()) < 11
    expected = torch.softmax(logits, -1).topk(3, -1)
    values = expected.values / expected.values.sum(-1, keepdim=True) if normalize else expected.values
    sane = [0, 1, 2, 5, 6]
    assert torch.equal(ours[sane].long(), expected.indices[sane]) and close(shares[:3], values[:3])
    assert ours[4, :2].tolist() == [2, 6], "of equals the first"


@pytest.mark.parametrize(("tokens", "num_experts", "chosen"), [(1, 8, 2), (2, 8, 8), (40, 5, 3), (700, 6, 2)])
def test_sorted_pairs_fill_blocks_of_one_expert(tokens: int, num_experts: int, chosen: int) -> None:
    """Every pair stands once, in order, in a block of its expert; the other places hold a number that is no pair."""
    rows, pairs = 16, tokens * chosen
    generator = torch.Generator().manual_seed(tokens)
    picked = torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :chosen].int().to(DEVICE)
    if tokens > 600:
        picked[:, 0] = 1  # more than one block of pairs for one, and none for another
        picked[:, 1] = picked[:, 1].clamp(min=3)
    order, owners = experts.sort_pairs(picked, num_experts, rows)
    flat, used, found = picked.view(-1).tolist(), 0, []
    for block, owner in zip(order.view(-1, rows).tolist(), owners.tolist(), strict=True):
        if owner < 0:
            continue
        assert not found or used == len(found), "blocks in use come first"
        here = [pair for pair in block if pair != pairs]
        assert here and all(flat[pair] == owner for pair in here) and here == sorted(here)
        found.append(here)
        used += 1
    assert sorted(pair for here in found for pair in here) == list(range(pairs))
    assert owners.tolist()[used:] == [-1] * (len(owners) - used)
    assert used == sum(-(-flat.count(expert) // rows) for expert in range(num_experts))


# The interpreter multiplies the bits of bf16 as if they were integers.
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    ("tokens", "num_experts", "chosen", "activation_name", "normalize"),
    [(1, 4, 2, "silu", True), (3, 8, 3, "gelu_tanh", False), (40, 4, 2, "silu", True)],
)
def test_mix_experts(
    dtype: torch.dtype, tokens: int, num_experts: int, chosen: int, activation_name: str, normalize: bool
) -> None:
    hidden, inner = 40, 24
    x, logits = randn(tokens, 2 * hidden, dtype=dtype)[:, :hidden], randn(tokens, num_experts, dtype=dtype, seed=1)
    gate_up = 0.3 * randn(num_experts, 2 * inner, hidden, dtype=dtype, seed=2)
    down = 0.3 * randn(num_experts, hidden, inner, dtype=dtype, seed=3)
    arguments = (x, logits, gate_up, down, chosen, activation_name)
    ours = experts.mix_experts(*arguments, normalize=normalize, tile=experts.Tile(16, 16, 32 * dtype.itemsize, 1))
    expected = torch_mix_experts(*arguments, normalize=normalize)
    # The reference rounds gate and up before they are multiplied.
    error = (ours.float() - expected.float()).norm() / expected.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2) and ours.shape == x.shape and ours.is_contiguous()
    by_rule = experts.mix_experts(*arguments, normalize=normalize)
    assert close(by_rule, ours)


@pytest.mark.parametrize("tokens", [1, 30])
def test_experts_of_which_some_are_here(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks that have them add up is what one has that has all; what nobody wrote is nobody's."""
    x, logits = randn(tokens, 40), randn(tokens, 6, seed=1)
    gate_up, down = 0.3 * randn(6, 48, 40, seed=2), 0.3 * randn(6, 40, 24, seed=3)
    biases = randn(6, 48, seed=4), randn(6, 40, seed=5)
    options: dict[str, Any] = {"normalize": True, "tile": experts.Tile(16, 16, 128, 1)}
    whole = torch_mix_experts(x, logits, gate_up, down, 3, "silu", normalize=True, biases=biases)
    empty = torch.empty
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", lambda *shape, **given: empty(*shape, **given).fill_(-(2**31) + 99))
        patched.setattr(torch, "empty_like", lambda like, **given: empty(like.shape, dtype=like.dtype).fill_(torch.nan))
        parts = []
        for first, end in ((0, 1), (1, 4), (4, 6)):
            own = gate_up[first:end].contiguous(), down[first:end].contiguous(), 3, "silu"
            given: dict[str, Any] = {"biases": tuple(each[first:end] for each in biases), "held": (first, end)}
            parts.append(experts.mix_experts(x, logits, *own, **options, **given))
            assert close(parts[-1], torch_mix_experts(x, logits, *own, normalize=True, **given))
    assert close(parts[0] + parts[1] + parts[2], whole)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("penalised", [False, True])
def test_adjust(biased: bool, penalised: bool) -> None:
    rows, slots, vocab = 3, 5, 2100
    logits = randn(rows, vocab)
    before = logits.clone()
    bias = randn(slots, vocab, seed=1)
    bias[2, ::3] = float("-inf")
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(0, 3, (slots, vocab), generator=generator, dtype=torch.int32).to(DEVICE)
    prompt = (torch.rand(slots, vocab, generator=generator) < 0.3).to(DEVICE)
    penalties = torch.tensor([[0, 0, 0], [0.5, 0, 0], [0.2, 0.3, -0.4], [0, 1, 0], [0, 0, 2]], device=DEVICE)
    arguments = (
        logits,
        torch.tensor([2, 4, 1], device=DEVICE),
        bias if biased else None,
        *((counts, prompt, penalties) if penalised else (None, None, None)),
    )
    ours = extras.adjust(*arguments)
    assert close(ours, torch_adjust(*arguments)) and torch.equal(logits, before)
    assert (ours is logits) == (not biased and not penalised)


@pytest.mark.parametrize(("groups", "width", "given_some"), [(1, 280, True), (3, 275, False), (3, 275, True)])
def test_prepare(groups: int, width: int, given_some: bool) -> None:
    slots, pages, rows = 6, 300, 3
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(1, 90, (groups, slots, pages), dtype=torch.int32, generator=generator).to(DEVICE)
    last = torch.arange(100, 100 + slots, dtype=torch.int32, device=DEVICE)
    last_group = (groups - 1) * slots * pages
    values = [[5, 2, 0], [17, 1099, 0], [0, last_group + 5 * pages + 4, 0], [0, 77, 0]]
    arguments = [torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in values]
    theirs_table = table.cpu().clone()
    given = torch.tensor([-1, 0, 77], dtype=torch.int32, device=DEVICE) if given_some else None
    theirs = decode_inputs(
        theirs_table, last.cpu(), *(a.cpu() for a in arguments), width, 4, None if given is None else given.cpu()
    )
    ours = prepare.prepare(table, last, *arguments, width, 4, given)
    assert ours[0].tolist() == ([105, 0, 77] if given_some else [105, 102, 100])
    assert torch.equal(table.cpu(), theirs_table) and len(ours[0]) == rows
    flat = [[*each[:2], *each[2], *each[3]] for each in (ours, theirs)]
    assert len(flat[0]) == 2 + 2 * groups
    for mine, other in zip(*flat, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine.cpu(), other)
        assert mine.data_ptr() % 16 == 0, "a kernel would be compiled anew for it"


def test_accept() -> None:
    """Runs of all lengths, longer than a block too, right to the end or not, the last row of all among them."""
    rng = np.random.default_rng(1)
    for longest in (4, 4, 4, 4, 4, 4, 100, 100):
        tokens, slots = [], []
        for slot in range(1, rng.integers(2, 6)):
            tokens += [-1, *rng.integers(0, 50, rng.integers(0, longest)).tolist()]
            slots += [slot] * (len(tokens) - len(slots))
        drawn = [*tokens[1:], 7]
        for row in rng.integers(0, len(drawn), rng.integers(0, 4)).tolist():
            drawn[row] = 51
        drawn = [8 if token < 0 else token for token in drawn]
        given = [torch.tensor(each, dtype=torch.int32) for each in (tokens, [*drawn, 3], [*slots, 0])]
        theirs = torch.full((7,), -5, dtype=torch.int32)
        ours = theirs.to(DEVICE)
        accept(*given, theirs)
        drafts.accept_drafts(*(each.to(DEVICE) for each in given), ours)
        # What padding rows write goes to the slot that is nobody's.
        assert ours.tolist()[1:] == theirs.tolist()[1:]


def params_of(rows: int, filters: bool = False, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    params = np.zeros(rows, SAMPLING_DTYPE)
    params["temperature"] = rng.choice([0.0, 0.3, 1.0, 2.5], rows)
    params["top_p"], params["stop_ids"] = 1.0, -1
    params["seed"] = rng.integers(0, 2**64, rows, dtype=np.uint64)
    if filters:
        params["top_k"] = rng.choice([0, 1, 3, 10**6], rows)
        params["top_p"] = rng.choice([1.0, 0.9, 0.3, 1e-6], rows)
        params["min_p"] = rng.choice([0.0, 0.05, 0.5, 1.0], rows)
    params["min_length"] = rng.choice([0, 50], rows)
    params["num_stop_ids"] = rng.integers(0, 4, rows)
    for row in params:
        row["stop_ids"][: row["num_stop_ids"]] = rng.integers(0, 40, row["num_stop_ids"])
    return params


def on_device(params: np.ndarray) -> Tensor:
    return torch.from_numpy(params.view(np.int32).reshape(len(params), WORDS).copy()).to(DEVICE)


def test_the_uniform_number_is_the_cpus() -> None:
    rng = np.random.default_rng(0)
    seeds, positions = rng.integers(0, 2**64, 500, dtype=np.uint64), rng.integers(0, 2**20, 500).astype(np.int32)
    ours = uniform(torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(positions)).numpy()
    assert np.array_equal(ours, sampler.uniform(seeds, positions))


@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_torch_on_the_device_draws_what_the_cpu_draws(filters: bool, seed: int) -> None:
    rows, vocab = 40, 40 if seed % 2 else 997
    logits, params = 3 * randn(rows, vocab, seed=seed), params_of(rows, filters, seed)
    positions = np.random.default_rng(seed).integers(0, 100, rows).astype(np.int32)
    # Ties at the border of a filter.
    logits[::3] = logits[::3].round()
    expected = sampler.sample(logits.cpu().clone(), params, positions)
    ours = torch_sample(logits, on_device(params), torch.from_numpy(positions).to(DEVICE), filtered=filters)
    assert ours.tolist() == expected.tolist()


def sample_rows(logits: Tensor, params: np.ndarray, positions: Tensor, *, filtered: bool) -> list[int]:
    """Rows find their parameters by slot; a token lies there for the next step, and at its place among the results."""
    rows = len(logits)
    where = torch.arange(rows, dtype=torch.int32)
    slots = rows - where
    table = on_device(np.concatenate((params[:1], params[::-1])))
    slots, where = slots.to(DEVICE), (where * 7 % rows if rows % 7 else where).to(DEVICE)
    last, out = (torch.full((count,), -9, dtype=torch.int32, device=DEVICE) for count in (rows + 1, rows))
    scattered = torch.full_like(out, -9)
    before = logits.clone()
    sampling.sample_rows(logits, table, slots, positions, last, out, None, filtered=filtered, masked=True)
    assert torch.equal(logits, before) and last[0] == -9 and torch.equal(last[slots], out)
    if logits.numel() < 20_000:  # the interpreter takes its time
        given = logits, table, slots.long(), positions, last, scattered, where
        sampling.sample_rows(*given, filtered=filtered, masked=True)
        assert torch.equal(scattered[where.long()], out) and torch.equal(last[slots], out)
    return out.tolist()


# The last two are of Llama 3 and Qwen: 32 and 38 segments, of which the second kernel sums a block of 32 and of 64.
@pytest.mark.parametrize("seed", range(5))
def test_sample_rows(seed: int) -> None:
    rows, vocab = (12, 12, 12, 6, 6)[seed], (40, 4096, 9000, 128256, 151936)[seed]
    logits, params = 3 * randn(rows, vocab, seed=seed), params_of(rows, seed=seed)
    logits[1] = logits[1].round()
    logits[2, :] = float("-inf")
    logits[3, 5:] = float("-inf")
    positions = torch.from_numpy(np.random.default_rng(seed).integers(0, 100, rows).astype(np.int32)).to(DEVICE)
    expected = torch_sample(logits, on_device(params), positions, filtered=False)
    assert sample_rows(logits, params, positions, filtered=False) == expected.tolist()


@pytest.mark.filterwarnings("ignore:All-NaN", "ignore:invalid value")  # numpy's, in the interpreter
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("filtered", [False, True])
def test_rows_without_numbers_are_told(filtered: bool, masked: bool) -> None:
    """By a kernel, and by torch where there is none; what the next step reads is a token all the same."""
    rows, vocab = 8, 9001
    logits, params = 3 * randn(rows, vocab), params_of(rows, filtered)
    params["temperature"] = (0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0)
    logits[1, 8999] = logits[3, 17] = float("nan")
    logits[2] = float("nan")
    logits[4, 5000] = float("inf")
    logits[5] = float("-inf")  # of a masked row nothing may be left
    logits[7, 1:] = float("-inf")
    slots, positions = torch.arange(1, rows + 1, device=DEVICE), torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    table = on_device(np.concatenate((params[:1], params)))
    insane = [1, 2, 3, 4] if masked else [1, 2, 3, 4, 5]
    for sample in (sampling.sample_rows, draw_by_torch):
        last, out = (torch.full((count,), -9, dtype=torch.int32, device=DEVICE) for count in (rows + 1, rows))
        sample(logits, table, slots, positions, last, out, None, filtered=filtered, masked=masked)
        assert [row for row, token in enumerate(out.tolist()) if token == NO_NUMBERS] == insane
        assert all(0 <= token < vocab for token in last[1:].tolist())
        sane = [row for row in range(rows) if row not in insane]
        assert torch.equal(out[sane], last[1:][sane])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seed", "rows", "vocab"), [(0, 15, 40), (1, 15, 1000), (2, 5, 9001)])
def test_filtered_rows_draw_what_the_cpu_draws(dtype: torch.dtype, seed: int, rows: int, vocab: int) -> None:
    """Ties at borders, rows all equal, biased away but for a few ids, spread wide and hardly at all."""
    generator = np.random.default_rng(seed)
    logits, params = 3 * randn(rows, vocab, seed=seed), params_of(rows, True, seed)
    params["top_k"] = generator.choice([0, 0, 1, 40, vocab - 1, 10**6], rows)
    params["top_p"] = generator.choice([1.0, 0.95, 0.5, 1e-6, 0.0], rows)
    params["min_p"] = generator.choice([0.0, 0.0, 0.05, 1.0], rows)
    params["temperature"] = generator.choice([0.0, 1e-42, 1e-6, 0.3, 1.0, 2.5, 100.0], rows)
    logits[::3] = logits[::3].round()  # with zeros of both signs
    logits[::7] = logits[::7, :1]
    logits[1::7, 5:] = float("-inf")
    logits[2::14] = float("-inf")
    logits[3::14] *= 20
    logits[4::14] *= 0.001
    logits = logits.to(dtype)
    positions = generator.integers(0, 100, rows).astype(np.int32)
    expected = sampler.sample(logits.cpu().float(), params, positions)
    there = torch.from_numpy(positions).to(DEVICE)
    assert sample_rows(logits, params, there, filtered=True) == expected.tolist()
    # A row alone is drawn as in the batch.
    for row in range(0, rows, 9):
        one = slice(row, row + 1)
        assert sample_rows(logits[one], params[one], there[one], filtered=True) == [int(expected[row])]


def test_filtered_rows_as_chats_ask_for_them() -> None:
    """On a GPU of Llama 3's vocabulary."""
    vocab = 128256 if DEVICE.type == "cuda" else 12000
    logits, params = (3 * randn(2, vocab)).bfloat16(), params_of(2)
    params["temperature"], params["top_p"], params["top_k"] = (1.0, 0.6), (0.95, 0.9), (0, 40)
    positions = np.array([7, 100], np.int32)
    expected = sampler.sample(logits.cpu().float(), params, positions)
    assert sample_rows(logits, params, torch.from_numpy(positions).to(DEVICE), filtered=True) == expected.tolist()


@pytest.mark.parametrize(
    ("filters", "allowed"),
    [
        ({"top_k": 2}, {1, 2, 3, 5}),
        ({"top_p": 0.75}, {1, 2}),
        ({"top_p": 0.8}, {1, 2, 3}),
        ({"top_p": 0.0}, {1}),
        ({"min_p": 0.1}, {1, 2, 3, 5}),
        ({"top_k": 2, "top_p": 0.86, "min_p": 0.0}, {1, 2, 3}),
        ({"top_k": 4, "top_p": 0.95, "min_p": 0.5}, {1}),
        ({"top_k": 1, "top_p": 0.5}, {1}),
    ],
    ids=str,
)
def test_the_filters_allow_what_the_cpus_do(filters: dict[str, float], allowed: set[int]) -> None:
    """Exactly the allowed ids are drawn; of ties with a border all stay for top_k, the lowest ids for top_p."""
    row = torch.tensor([-40.0, 3.0, 1.0, 1.0, 0.0, 1.0, float("-inf")])

    def drawn(seeds: list[int], filters: dict[str, float]) -> tuple[Any, Tensor, Any, list[int]]:
        params = params_of(len(seeds))
        params["temperature"], params["seed"], params["min_length"] = 1.0, seeds, 0
        for name, value in filters.items():
            params[name] = value
        logits, positions = row.repeat(len(seeds), 1), np.zeros(len(seeds), np.int32)
        return params, logits, positions, sampler.sample(logits, params, positions).tolist()

    # Seeds that draw every id there is without a filter, and every allowed one with it.
    many = list(range(200))
    free, held = (np.array(drawn(many, each)[3]) for each in ({}, filters))
    assert set(held) == allowed and set(free) == {1, 2, 3, 4, 5}
    seeds = sorted({int(seed) for ids in (free, held) for each in set(ids) for seed in np.flatnonzero(ids == each)[:2]})
    params, logits, positions, expected = drawn(seeds, filters)
    ours = sample_rows(logits.to(DEVICE), params, torch.from_numpy(positions).to(DEVICE), filtered=True)
    assert set(ours) == allowed and ours == expected


@pytest.mark.parametrize(
    ("backend", "arch", "dependent"),
    [("cuda", 80, False), ("cuda", 90, True), ("cuda", 120, True), ("hip", "gfx942", False)],
)
def test_launches_depend_on_one_another_from_hopper_on(
    backend: str, arch: object, dependent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch and the kernel must agree: one that starts early and does not wait reads what is not there yet."""
    target = SimpleNamespace(backend=backend, arch=arch)
    monkeypatch.setattr(pdl.triton.knobs.runtime, "interpret", False)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setattr(pdl.triton.runtime, "driver", driver)
    options = pdl.launch_options.__wrapped__()
    assert options["PDL"] == options.get("launch_pdl", False) == dependent


# Decode rows, then prompts: one shorter than the taps, one of more than a program's tokens. Slots in no order.
LENGTHS = {5: 1, 2: 1, 7: 2, 1: 19, 4: 3}


def plan_of(lengths: dict[int, int], num_decodes: int) -> StatePlan:
    slots = np.array(list(lengths), np.int32)
    indptr = np.cumsum([0, *lengths.values()]).astype(np.int32)
    return StatePlan(slots, indptr, num_decodes).on(*(torch.from_numpy(x).to(DEVICE) for x in (slots, indptr)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("taps", "silu", "biased"), [(4, True, False), (3, False, True)])
def test_causal_conv(dtype: torch.dtype, taps: int, silu: bool, biased: bool) -> None:
    channels, plan = 150, plan_of(LENGTHS, 2)
    x = randn(sum(LENGTHS.values()), 2 * channels, dtype=dtype)[:, :channels]
    weight, bias = randn(taps, channels, seed=1), randn(channels, seed=2) if biased else None
    states = randn(9, taps - 1, channels, dtype=dtype, seed=3)
    theirs = states.clone()
    expected = torch_causal_conv(x, weight, bias, theirs, plan, silu=silu)
    assert plan.device is not None
    out = recurrence.causal_conv(x, weight, bias, states, plan.device, silu=silu)
    assert close(out, expected) and torch.equal(states, theirs)
    # A step of a graph, twice: what the first leaves behind, the second reads.
    once = StatePlan.of_decodes(plan.device.slots)
    assert once.device is not None
    for _ in range(2):
        expected = torch_causal_conv(x[:5], weight, bias, theirs, once, silu=silu)
        out = recurrence.causal_conv(x[:5], weight, bias, states, once.device, silu=silu)
        assert close(out, expected) and torch.equal(states, theirs)


def a_recurrence(delta: bool) -> tuple[Recurrence, tuple[int, int, int, int]]:
    key_heads, heads, key_dim, value_dim = 2, 4, 12, 20
    rate, step_bias, skip = (randn(heads, seed=seed) for seed in (5, 6, 7))
    sizes = {"key_heads": key_heads, "heads": heads, "key_dim": key_dim, "value_dim": value_dim}
    if delta:
        return Recurrence(delta=True, **sizes, rate=rate.exp(), step_bias=step_bias), (2, 4, 12, 20)
    steps = (0.01, 3.0)
    made = Recurrence(delta=False, **sizes, rate=rate.exp(), step_bias=step_bias - 4, skip=skip, steps=steps)
    return made, (2, 4, 12, 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [True, False])
def test_recurrence(dtype: torch.dtype, delta: bool) -> None:
    what, (key_heads, heads, key_dim, value_dim) = a_recurrence(delta)
    plan, tokens = plan_of(LENGTHS, 2), sum(LENGTHS.values())
    keys, values = key_heads * key_dim, heads * value_dim
    qkv = randn(tokens, 2 * keys + values, dtype=dtype)
    q, k, v = qkv.split([keys, keys, values], 1)
    step, share = randn(tokens, 2 * heads, dtype=dtype, seed=8).split(heads, 1)
    states = randn(9, heads, key_dim, value_dim, seed=9)
    theirs = states.clone()
    given = q, k, v, step, share if delta else None
    expected = what.by_torch(*given, theirs, plan)
    assert plan.device is not None
    out = recurrence.recur(what, *given, states, plan.device)
    assert close(out, expected) and torch.allclose(states, theirs, rtol=1e-4, atol=1e-5)
    once = StatePlan.of_decodes(plan.device.slots)
    assert once.device is not None
    given = tuple(None if x is None else x[:5] for x in given)
    expected = what.by_torch(*given, theirs, once)
    assert close(recurrence.recur(what, *given, states, once.device), expected)
    # Cut otherwise, a prompt leaves the same bits.
    whole, parts = randn(2, 9, heads, key_dim, value_dim, seed=10)
    parts.copy_(whole)
    slots = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    row = tuple(None if x is None else x[:7] for x in (q, k, v, step, share if delta else None))
    for state, cuts in ((whole, (0, 7)), (parts, (0, 2, 3, 7))):
        for first, last in itertools.pairwise(cuts):
            indptr = torch.tensor([0, last - first], dtype=torch.int32, device=DEVICE)
            part = tuple(None if x is None else x[first:last] for x in row)
            recurrence.recur(what, *part, state, RowsOnDevice(slots, indptr, last - first))
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(dtype: torch.dtype) -> None:
    both = 3 * randn(3, 2 * 1100, dtype=dtype)
    x, gate = both.chunk(2, 1)
    for silu in (False, True):
        assert close(recurrence.gate(x, gate, silu=silu), torch_gate(x, gate, silu=silu))
    for weight, parts in ((randn(275, seed=1), 4), (randn(1100, seed=1), 4), (randn(1100, seed=2), 1)):
        for first in (False, True):
            ours = recurrence.gated_norm(x, gate, weight, 1e-5, parts, gate_first=first)
            assert close(ours, torch_gated_norm(x, gate, weight, 1e-5, parts, gate_first=first))
