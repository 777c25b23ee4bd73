"""Adapters' kernels: by Triton's interpreter, or on the GPU where there is one, against the formula."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda.test_triton import DEVICE, NARROW, randn  # first: it says how kernels are to run

from engine.ops.lora import Branch, Factors, Replaced, Rows, StackedSites  # isort: skip
from engine.ops import lora_device  # isort: skip
from engine.ops.linear import Linear  # isort: skip
from engine.ops.activation import Clamped  # isort: skip
from engine.ops.experts import torch_mix_experts  # isort: skip
from engine.ops.lora_device import FIELDS, NO_ROW, ROWS, UNIT, DeviceSite, Grouped, Shelf, SiteShape  # isort: skip
from engine.ops.triton import lora as kernels  # isort: skip
from engine.ops.triton import experts as experts_kernels  # isort: skip

CAPACITY = 3
# The interpreter takes its time: there inputs are summed in parts of 32.
INPUTS = (80, 50) if DEVICE.type == "cpu" else (1200, 530)
# Three parts of one layer, the sizes of no block; inputs of several splits; then one part of a size that no 16 divides.
FUSED = SiteShape(INPUTS[0], 150 + 16 + 20, ((0, 150), (150, 166), (166, 186)), 24)
PLAIN = SiteShape(INPUTS[1], 75, ((0, 75),), 20)


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels, "LEAST_SPLIT", 32)
        monkeypatch.setattr(kernels, "BLOCK_K_BYTES", 64)


def an_adapter(
    shapes: dict[int, SiteShape], rank: int, seed: int, parts: int = 9
) -> tuple[dict[int, Branch], list[Tensor]]:
    """Branches by site, of the first `parts` parts, and what they come to: B A [out, in] of each shape."""
    branches, whole = {}, []
    for number, shape in shapes.items():
        factors, total = [], torch.zeros(shape.out_features, shape.in_features)
        for part, (first, end) in enumerate(shape.parts[:parts]):
            down = randn(rank, shape.in_features, seed=seed + part).cpu() * shape.in_features**-0.5
            up = randn(end - first, rank, seed=seed + 10 + part).cpu() * rank**-0.5
            factors.append(Factors(first, down, up))
            total[first:end] = up @ down
        branches[number] = Branch(shape.in_features, shape.out_features, factors)
        whole.append(total)
    return branches, whole


def a_shelf(dtype: torch.dtype) -> tuple[Shelf, list[DeviceSite], dict[int, list[Tensor]]]:
    """Three adapters: of full rank, of a rank and parts that are fewer, and one that only the second layer has."""
    shelf = Shelf([FUSED, PLAIN], CAPACITY, dtype)
    # What nobody wrote is not to be read.
    shelf.memory = torch.full((CAPACITY, shelf.room), float("nan"), dtype=dtype, device=DEVICE)
    shelf.table = torch.zeros((CAPACITY + 1, 2 * FIELDS), dtype=torch.int32, device=DEVICE)
    whole = {}
    for index, made in {
        1: an_adapter({0: FUSED, 1: PLAIN}, 20, 1),
        2: an_adapter({0: FUSED, 1: PLAIN}, 4, 2, parts=1),
        3: an_adapter({1: PLAIN}, 17, 3),
    }.items():
        data, table = shelf.pack(made[0])
        shelf.memory[index - 1, : len(data)] = data.to(DEVICE)
        shelf.table[index] = table.to(DEVICE)
        whole[index] = made[1]
    whole[3].insert(0, torch.zeros(FUSED.out_features, FUSED.in_features))
    return shelf, [DeviceSite(shelf, number, DEVICE) for number in range(2)], whole


def grouped(ids: list[int], blocks: int | None = None) -> Grouped:
    blocks = lora_device.num_blocks(len(ids), CAPACITY) if blocks is None else blocks
    order, owners = np.zeros(blocks * ROWS, np.int32), np.zeros(blocks, np.int32)
    lora_device.group(np.array(ids, np.int32), order, owners)
    return Grouped(torch.from_numpy(order).to(DEVICE), torch.from_numpy(owners).to(DEVICE))


IDS = [0, 2, 1, 0, 1, 3, 1, 0, 2, *[1] * 32, 3]


def test_rows_are_grouped_by_adapter() -> None:
    rows = grouped(IDS)
    assert len(rows.owners) == lora_device.num_blocks(len(IDS), CAPACITY)
    found = {}
    for block, owner in enumerate(rows.owners.tolist()):
        own = [row for row in rows.order[block * ROWS : (block + 1) * ROWS].tolist() if row != NO_ROW]
        assert bool(own) == (owner > 0)
        found.update(dict.fromkeys(own, owner))
    assert found == {row: index for row, index in enumerate(IDS) if index}
    assert grouped([0] * 5).owners.tolist() == [-1] * 3
    rng = np.random.default_rng(0)
    for count in (1, 2, 31, 32, 33, 100):  # any split fits
        for _ in range(20):
            grouped(rng.integers(0, CAPACITY + 1, count).tolist())


@pytest.mark.parametrize(
    ("way", "dtype"),
    [("torch", NARROW[0]), ("kernels", NARROW[0]), ("kernels", NARROW[1]), ("halves", NARROW[1])],
)
def test_every_row_gets_what_its_adapter_adds(way: str, dtype: torch.dtype) -> None:
    _, sites, whole = a_shelf(dtype)
    rows = grouped(IDS)
    for number, site in enumerate(sites):
        # Of wider memory, as parts of a fused result are.
        x = randn(len(IDS), 2 * site.shape.in_features, dtype=dtype)[:, : site.shape.in_features]
        y = randn(len(IDS), site.shape.out_features, dtype=dtype, seed=1)
        expected = y.float()
        for row, index in enumerate(IDS):
            if index:
                expected[row] += whole[index][number].to(DEVICE) @ x[row].float()
        before = y.clone()
        if way == "torch":
            lora_device.torch_add(site, x, y, rows)
        else:
            site.by_kernels(x, y, rows, halves=way == "halves")
        # Factors are rounded to the layer's type, and so is the sum.
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
        untouched = [row for row, index in enumerate(IDS) if not index or (index == 3 and number == 0)]
        assert torch.equal(y[untouched], before[untouched])


def test_a_row_has_the_same_bits_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (site, _), _ = a_shelf(NARROW[1])
    x, y = (randn(len(IDS), n, dtype=NARROW[1], seed=n) for n in (FUSED.in_features, FUSED.out_features))
    together = y.clone()
    site.by_kernels(x, together, grouped(IDS))
    for row in (1, 2, 41):
        alone = y[row : row + 1].clone()
        site.by_kernels(x[row : row + 1], alone, grouped([IDS[row]]))
        assert torch.equal(alone[0], together[row]), row
    # Many blocks, whose programs go through all inputs.
    monkeypatch.setattr(kernels, "FEW_BLOCKS", 0)
    again = y.clone()
    site.by_kernels(x, again, grouped(IDS, blocks=8))
    assert torch.equal(again, together)


def test_rows_that_are_not_there_are_not_touched() -> None:
    """A graph may be warmed up while what lies there is of a larger step."""
    _, (site, _), _ = a_shelf(torch.float32)
    rows = grouped(IDS)
    x, y = randn(len(IDS), FUSED.in_features), torch.zeros(len(IDS), FUSED.out_features, device=DEVICE)
    site.by_kernels(x[:3], y[:3], rows)
    assert y[1:3].abs().sum() > 0 and not y[3:].any()


def test_an_adapter_whose_factors_cross_parts_is_taken_apart() -> None:
    """As one with a single A for all parts is, or one of outputs in another order."""
    down, up = randn(6, INPUTS[0]).cpu(), randn(186, 6, seed=1).cpu()
    up[:150, 3:] = 0
    shelf = Shelf([FUSED], 1, torch.float32)
    data, table = shelf.pack({0: Branch(INPUTS[0], 186, [Factors(0, down, up)])})
    assert table.tolist() == [1, UNIT, 0, 0, 0] and len(data) == UNIT + FUSED.size(UNIT)
    shelf.memory, shelf.table = data[None].to(DEVICE), torch.stack((table * 0, table)).to(DEVICE)
    x, y = randn(4, INPUTS[0]), torch.zeros(4, 186, device=DEVICE)
    lora_device.torch_add(DeviceSite(shelf, 0, DEVICE), x, y, grouped([1, 0, 1, 1]))
    expected = (x.cpu() @ (up @ down).T).to(DEVICE)
    expected[1] = 0
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def a_shelf_of(shape: SiteShape, branches: list[Branch], dtype: torch.dtype) -> DeviceSite:
    """Adapters 1, 2, ... at one layer."""
    shelf = Shelf([shape], len(branches), dtype, room=1 << 17)
    packed = [shelf.pack({0: branch}) for branch in branches]
    shelf.memory = torch.full((len(branches), shelf.room), float("nan"), dtype=dtype, device=DEVICE)
    shelf.table = torch.zeros((len(branches) + 1, FIELDS), dtype=torch.int32, device=DEVICE)
    for index, (data, table) in enumerate(packed, 1):
        shelf.memory[index - 1, : len(data)] = data.to(DEVICE)
        shelf.table[index] = table.to(DEVICE)
    return DeviceSite(shelf, 0, DEVICE)


@pytest.mark.parametrize(("way", "dtype"), [("torch", NARROW[0]), ("kernels", NARROW[0]), ("kernels", NARROW[1])])
def test_gains_and_offsets(way: str, dtype: torch.dtype) -> None:
    """With factors and without, and without each other; they are not rounded to the layer's type."""
    out = FUSED.out_features
    gain, offset = (randn(out, seed=seed).cpu() for seed in (5, 6))
    made = an_adapter({0: FUSED}, 7, 1)[0][0]
    factors = [Factors(first, down, up) for first, down, up in made.matrices()]
    given = [(factors, gain, offset), ([], None, offset), (factors[:1], gain, None)]
    branches = [
        Branch(FUSED.in_features, out, each, gain=own_gain, offset=own_offset) for each, own_gain, own_offset in given
    ]
    site = a_shelf_of(FUSED, branches, dtype)
    x, y = (randn(len(IDS), n, dtype=dtype, seed=n) for n in (FUSED.in_features, out))
    expected = y.float()
    for row, index in enumerate(IDS):
        if index:
            each, own_gain, own_offset = given[index - 1]
            before = expected[row].clone()
            for factor in each:
                up, down = factor.up.to(DEVICE), factor.down.to(DEVICE)
                expected[row, factor.first : factor.first + len(up)] += up @ (down @ x[row].float())
            expected[row] += 0 if own_gain is None else own_gain.to(DEVICE) * before
            expected[row] += 0 if own_offset is None else own_offset.to(DEVICE)
    if way == "torch":
        lora_device.torch_add(site, x, y, grouped(IDS))
    else:
        site.by_kernels(x, y, grouped(IDS))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)


def ways(dtypes: tuple[torch.dtype, torch.dtype]) -> list[tuple[str, torch.dtype]]:
    return [("torch", dtypes[0]), ("kernels", dtypes[0]), ("kernels", dtypes[1])]


@pytest.mark.parametrize(("way", "dtype"), ways(NARROW))
def test_outputs_of_an_adapters_own(way: str, dtype: torch.dtype) -> None:
    """All of them, or some in any order with a bias, or none; factors are added to them."""
    size, out = INPUTS[1], 75
    shape = dataclasses.replace(PLAIN, replaced=True)
    every = Replaced(torch.arange(out).flip(0), Linear(randn(out, size, seed=3).cpu() * size**-0.5))
    some = Replaced(torch.tensor([70, 3, 4]), Linear(randn(3, size, seed=4).cpu() * size**-0.5, randn(3, seed=7).cpu()))
    factors = Factors(0, randn(4, size, seed=5).cpu() * size**-0.5, randn(out, 4, seed=6).cpu())
    given: list[tuple[list[Factors], list[Replaced]]] = [([], [every]), ([factors], [some]), ([factors], [])]
    site = a_shelf_of(shape, [Branch(size, out, each, replaced=whole) for each, whole in given], dtype)
    x, y = (randn(len(IDS), n, dtype=dtype, seed=n) for n in (size, out))
    expected = y.float()
    for row, index in enumerate(IDS):
        each, whole = given[index - 1] if index else ([], [])
        for one in whole:
            weight, bias = one.numbers()
            expected[row, one.columns] = (weight @ x[row].float().cpu() + bias).to(DEVICE)
        for factor in each:
            expected[row] += (factor.up @ (factor.down @ x[row].float().cpu())).to(DEVICE)
    if way == "torch":
        lora_device.torch_add(site, x, y, grouped(IDS))
    else:
        site.by_kernels(x, y, grouped(IDS))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("way", "dtype"), ways(NARROW))
def test_rows_of_embeddings(way: str, dtype: torch.dtype) -> None:
    """Factors that are looked up, rows of some tokens, a whole table with factors, and nothing."""
    tokens, width = 150, 75
    shape = SiteShape(tokens, width, ((0, width),), 20, is_table=True)
    factors = Factors(0, randn(5, tokens, seed=1).cpu(), randn(width, 5, seed=2).cpu() * 0.3)
    listed = {token: row for row, token in enumerate([*range(140, 0, -2), 145])}
    rows, table = randn(len(listed), width, seed=3).cpu(), randn(tokens, width, seed=4).cpu()
    given: list[dict[str, Any]] = [{}, {"table": listed, "table_rows": rows}, {"table_rows": table}]
    branches = [
        Branch(tokens, width, [factors] if number != 1 else [], looked_up=True, **one)
        for number, one in enumerate(given)
    ]
    site = a_shelf_of(shape, branches, dtype)
    ids = torch.tensor([(7 * row) % tokens for row in range(len(IDS))], dtype=torch.int32, device=DEVICE)
    y = randn(len(IDS), width, dtype=dtype)
    expected = y.float()
    for row, index in enumerate(IDS):
        token = int(ids[row])
        if index == 2 and token in listed:
            expected[row] = rows[listed[token]].to(DEVICE)
        if index == 3:
            expected[row] = table[token].to(DEVICE)
        if index in (1, 3):
            expected[row] += (factors.up @ factors.down[:, token]).to(DEVICE)
    if way == "torch":
        lora_device.torch_look_up(site, ids, y, grouped(IDS))
    else:
        site.look_up_by_kernel(ids, y, grouped(IDS))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ["silu", Clamped(7.0, 1.702)])
@pytest.mark.parametrize("tokens", [1, len(IDS)])
@pytest.mark.parametrize("held", [None, (2, 7)])
def test_experts_of_many_adapters(held: tuple[int, int] | None, tokens: int, activation: Any) -> None:
    """By the kernels as by torch, where every expert computes every token; nobody's rows are as without. held: of eight
    those that are here."""
    count, chosen, hidden, inner, dtype = 5, 2, 48, 32, NARROW[0]
    above, below = (
        SiteShape(hidden, 2 * inner, ((0, inner), (inner, 2 * inner)), 8),
        SiteShape(inner, hidden, ((0, hidden),), 8),
    )
    shelf = Shelf([above] * count + [below] * count, CAPACITY, dtype)
    shelf.memory = torch.full((CAPACITY, shelf.room), float("nan"), dtype=dtype, device=DEVICE)
    shelf.table = torch.zeros((CAPACITY + 1, 2 * count * FIELDS), dtype=torch.int32, device=DEVICE)
    for index in (1, 2, 3):
        # Of the second for one expert alone.
        numbers = [1, count + 1] if index == 2 else range(2 * count)
        data, table = shelf.pack(an_adapter({number: shelf.shapes[number] for number in numbers}, 5, index)[0])
        shelf.memory[index - 1, : len(data)] = data.to(DEVICE)
        shelf.table[index] = table.to(DEVICE)
    rows = Rows()
    ids = IDS[-tokens:]
    rows.any, rows.on_device = True, grouped(ids)
    stacks = StackedSites(rows, ["a"]), StackedSites(rows, ["b"])
    for stack, first in zip(stacks, (0, count), strict=True):
        stack.device = DeviceSite(shelf, first, DEVICE)
    x, logits = randn(tokens, hidden, dtype=dtype), randn(tokens, 8 if held else count, seed=1)
    gate_up, down = (
        randn(count, 2 * inner, hidden, dtype=dtype, seed=2),
        randn(count, hidden, inner, dtype=dtype, seed=3),
    )
    given: Any = (x, logits, gate_up * hidden**-0.5, down * inner**-0.5, chosen, activation)
    expected = torch_mix_experts(*given, normalize=True, adapted=stacks, held=held)
    plain = torch_mix_experts(*given, normalize=True, held=held)
    made = experts_kernels.mix_experts(*given, normalize=True, adapted=stacks, held=held)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    nobodys = [row for row, index in enumerate(ids) if not index]
    torch.testing.assert_close(made[nobodys], plain[nobodys], rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.1
