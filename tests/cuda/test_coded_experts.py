"""Mixtures of experts whose matrices stay codes: the kernels against their torch reference, by Triton's interpreter or
on the GPU where there is one."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    # Read when a kernel is defined, so it comes before the imports below.
    os.environ["TRITON_INTERPRET"] = "1"

from engine.ops.activation import Clamped  # noqa: E402
from engine.ops.device_coded import FORMS, Codes, codes_of, codes_of_mxfp4, torch_numbers  # noqa: E402
from engine.ops.experts import CODED_MANY, CODED_TILES, Mixture, coded_rows, torch_mix_experts  # noqa: E402
from engine.ops.mxfp4 import dequantised  # noqa: E402
from engine.ops.triton import coded, experts  # noqa: E402
from tests.cuda.test_coded import NARROW, TABLE, pieces  # noqa: E402

COUNT, HIDDEN, INNER = 3, 128, 96
CLAMPED = Clamped(1.5, 1.7)
# As few programs as there can be: the interpreter runs one after the other.
WAY = (16, (64, 1, 2))


def stack(form: str, rows: int, columns: int, group: int, count: int = COUNT) -> Codes:
    given, table = pieces(form, count * rows, columns, group), TABLE if form == "table" else None
    return codes_of(form, count * rows, columns, group, DEVICE, given, table)


def numbers(codes: Codes, count: int = COUNT) -> Tensor:
    """float32 [count, rows, columns]."""
    return torch_numbers(codes, torch.float32).view(count, -1, codes.in_features)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def check(
    tokens: int,
    gate_up: Codes | Tensor,
    down: Codes | Tensor,
    activation: Any = "silu",
    dtype: torch.dtype = torch.float32,
    *,
    biased: bool = False,
    way: tuple[int, tuple[int, int, int]] | None = WAY,
) -> None:
    """Against every expert's numbers, in float32."""
    x, logits = (normal(tokens, 2 * HIDDEN) / 10).to(dtype)[:, :HIDDEN], normal(tokens, COUNT, seed=1)
    biases = (normal(COUNT, 2 * INNER, seed=2), normal(COUNT, HIDDEN, seed=3)) if biased else (None, None)
    wide = [numbers(each) if isinstance(each, Codes) else each.float() for each in (gate_up, down)]
    arguments = (x.float(), logits, *wide, 2, activation)
    expected = torch_mix_experts(*arguments, normalize=True, biases=biases)
    given = (x, logits, gate_up, down, 2, activation)
    ours = experts.mix_experts(
        *given, normalize=True, biases=biases, coded=way, tile=None if way else experts.Tile(16, 64, 128, 1)
    )
    assert ours.dtype == dtype and ours.shape == (tokens, HIDDEN)
    error = float((ours.float() - expected).norm() / expected.norm())
    assert error < (1e-5 if dtype == torch.float32 else 1e-2), error
    # What stands in for the kernels elsewhere.
    error = float((torch_mix_experts(*given, normalize=True, biases=biases).float() - expected).norm())
    assert error / float(expected.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", [16, 32])
def test_every_form(form: str, group: int) -> None:
    """Several tokens, so that pairs are sorted; inner columns that do not pair in blocks of 32."""
    check(5, stack(form, 2 * INNER, HIDDEN, group), stack(form, HIDDEN, INNER, group))


@pytest.mark.parametrize("form", FORMS)
def test_one_token_in_half_precision(form: str) -> None:
    """A block for each pair."""
    check(1, stack(form, 2 * INNER, HIDDEN, 64), stack(form, HIDDEN, INNER, 32), dtype=NARROW)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("way", [WAY, None])
def test_of_which_some_are_here(tokens: int, way: tuple[int, tuple[int, int, int]] | None) -> None:
    """Of a rank that has the last ones; None: they become numbers first."""
    here = COUNT // 2
    gate_up, down = stack("int4", 2 * INNER, HIDDEN, 32, here), stack("e2m1", HIDDEN, INNER, 32, here)
    x, logits = normal(tokens, HIDDEN) / 10, normal(tokens, COUNT, seed=1)
    logits[0, [0, -1]] = 9.0  # one that is here, and one that is not
    given = (x, logits, gate_up, down, 2, "silu")
    options: dict[str, Any] = {"normalize": True, "held": (COUNT - here, COUNT)}
    tile = None if way else experts.Tile(16, 64, 128, 1)
    ours = experts.mix_experts(*given, **options, coded=way, tile=tile)
    wide = (x, logits, numbers(gate_up, here), numbers(down, here), 2, "silu")
    expected = torch_mix_experts(*wide, **options)
    assert float((ours - expected).norm() / expected.norm()) < 1e-5


def test_activations_and_biases() -> None:
    gate_up, down = stack("e2m1", 2 * INNER, HIDDEN, 32), stack("e2m1", HIDDEN, INNER, 32)
    check(4, gate_up, down, "gelu_tanh")
    check(4, gate_up, down, CLAMPED, biased=True)
    check(1, gate_up, down, CLAMPED, biased=True)


def test_tiles_that_are_larger_and_matrices_of_which_some_are_numbers() -> None:
    codes = stack("int8", 2 * INNER, HIDDEN, 32), stack("int4 and low", HIDDEN, INNER, 32)
    floats = numbers(codes[0]), numbers(codes[1])
    check(70, *codes, way=(64, (32, 1, 2)))
    check(3, codes[0], floats[1])
    check(3, floats[0], codes[1], CLAMPED, biased=True)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_numbers_first(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one expert after the other, of some, of all; matrices that were numbers are multiplied at once."""
    monkeypatch.setattr(experts, "experts_at_once", lambda num_bytes: at_once)
    gate_up, down = stack("e4m3", 2 * INNER, HIDDEN, 32), stack("int4", HIDDEN, INNER, 32)
    check(5, gate_up, down, way=None)
    check(1, gate_up, numbers(down), CLAMPED, biased=True, way=None)


def test_floats_with_biases_and_the_clamped_activation() -> None:
    gate_up, down = normal(COUNT, 2 * INNER, HIDDEN) / 10, normal(COUNT, HIDDEN, INNER, seed=1) / 10
    for tokens in (1, 6):
        check(tokens, gate_up, down, CLAMPED, biased=True, way=None)


def test_experts_that_become_numbers_at_once_are_bounded() -> None:
    assert experts.experts_at_once(experts.WIDENED_BYTES // 3) == 3
    assert experts.experts_at_once(5 * experts.WIDENED_BYTES) == 1


def test_rows_of_codes_as_numbers() -> None:
    codes = stack("int4 and low", 8, HIDDEN, 32)
    assert torch.equal(coded.widened(codes, torch.float32, rows=(8, 19)), torch_numbers(codes, torch.float32)[8:19])


@pytest.mark.parametrize("columns", [64, 96])
@pytest.mark.parametrize("reordered", [False, True])
def test_blocks_of_mxfp4(columns: int, reordered: bool) -> None:
    """Every code and exponent, the least of which stands for a number below bfloat16's normal ones."""
    generator = torch.Generator().manual_seed(columns)
    blocks = torch.randint(0, 256, (2, 130, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.arange(2 * 130 * columns // 32).remainder(250).to(torch.uint8).view(2, 130, -1)
    order = torch.randperm(130, generator=generator) if reordered else None
    codes = codes_of_mxfp4(blocks.to(DEVICE), scales.to(DEVICE), order)
    expected = dequantised(blocks, scales, torch.float32).to(DEVICE)
    found = torch_numbers(codes, torch.float32).view(2, 130, columns)
    assert torch.equal(found, expected if order is None else expected[:, order.to(DEVICE)])
    assert codes.are_paired == (columns == 64) and codes.scale.dtype == torch.bfloat16


def test_a_mixture_goes_by_its_number_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = Mixture(COUNT, 2, stack("e2m1", 2 * INNER, HIDDEN, 32), normal(COUNT, HIDDEN, INNER), "silu", NARROW)
    assert mixture.forms == ["e2m1"] and mixture.hidden_size == HIDDEN
    codes, scales, floats = INNER * HIDDEN, 2 * INNER * HIDDEN // 32 * 4, 4 * INNER * HIDDEN
    assert mixture.num_bytes == COUNT * (codes + scales + floats)
    asked: list[Any] = []
    monkeypatch.setattr("engine.ops.experts.mix_experts", lambda *given, coded, **options: asked.append(coded))

    def tokens(count: int) -> None:
        mixture(torch.zeros(count, HIDDEN), torch.zeros(count, COUNT), 2, normalize=True)

    tokens(1)
    assert asked == [None]  # until a clock has spoken: what takes most memory
    mixture.ways = {16: CODED_TILES[1], 64: CODED_TILES[2]}, 100
    for count in (1, CODED_MANY * COUNT // 2, 50):
        tokens(count)
    assert asked[1:] == [(16, CODED_TILES[1]), (64, CODED_TILES[2]), None]
    assert coded_rows(CODED_MANY * COUNT - 1, COUNT) == 16
    plain = Mixture(COUNT, 2, normal(COUNT, 2 * INNER, HIDDEN), normal(COUNT, HIDDEN, INNER), "silu", NARROW)
    plain.widen_from = 100
    plain(torch.zeros(1, HIDDEN), torch.zeros(1, COUNT), 2, normalize=True)
    assert asked[-1] is None and not plain.forms
