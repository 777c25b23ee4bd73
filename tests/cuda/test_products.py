"""Which products of few rows become ours, by what the clock says; and that it changes no token."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.executor.cuda_device import CaptureError
from engine.executor.cuda_products import (
    PAIRS_WIDENED,
    WIDENED,
    choose_codes,
    choose_experts,
    choose_products,
    choose_tiles,
)
from engine.executor.cuda_start import coded_matrices, report_float8
from engine.models.loading.load import load_model
from engine.models.registry import read_spec
from engine.ops import device_coded, gated, native, skinny
from engine.ops.device_coded import DeviceCodedLinear
from engine.ops.experts import CODED_TILES, Mixture
from engine.ops.linear import Linear
from tests.cuda.fake_device import FakeDevice
from tests.cuda.support import SMALL, expected_tokens, make_executor, requests_of, serve, tiny_model

NUM_BLOCKS = len(skinny.BLOCKS)


def choose(linears: list[Linear], device: FakeDevice, seconds: Callable[[int], float]) -> tuple[int, int]:
    """seconds: of candidate 0 (cuBLAS), 1, 2, ... of one shape and number of rows."""
    measured = iter(range(10**6))

    def time(graph: object) -> float:
        return seconds(next(measured) % (NUM_BLOCKS + 1))

    device.time = time  # type: ignore[method-assign]
    with device.on(device.stream()), device.may_block():
        found = choose_products(linears, device)
        device.synchronize_all()
    return found


def some_linears() -> list[Linear]:
    """Two of one shape, one of the same shape with a bias, one gated."""
    weights = [torch.randn(8, 6) for _ in range(4)]
    return [
        Linear(weights[0]),
        Linear(weights[1]),
        Linear(weights[2], torch.randn(8)),
        Linear(weights[3], activation="silu"),
    ]


def test_the_fastest_is_taken_for_every_shape_and_number_of_rows() -> None:
    linears = some_linears()
    assert choose(linears, FakeDevice(0), lambda candidate: (9.0, 7.0, 5.0, 6.0)[candidate]) == (9, 9)
    for linear in linears:
        assert linear.few == dict.fromkeys((1, 2, 4), skinny.BLOCKS[1])


def test_what_is_not_clearly_faster_stays_cublas() -> None:
    linears = some_linears()
    linears[0].few = {1: skinny.BLOCKS[0]}  # of an earlier choice
    assert choose(linears, FakeDevice(0), lambda candidate: (1.0, 0.98, 1.0, 2.0)[candidate]) == (0, 9)
    assert not any(linear.few for linear in linears)


def test_layers_in_other_forms_are_left_alone() -> None:
    linear = Linear(torch.randn(8, 6))
    linear.kind = "native"
    assert choose([linear], FakeDevice(0), float) == (0, 0) and not linear.few


def test_blocks_that_cannot_be_captured_are_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    device, linears = FakeDevice(0), some_linears()
    capture, captures = device.capture, iter(range(10**6))

    def failing(work: Callable[[], object]) -> Any:
        if next(captures) % (NUM_BLOCKS + 1) == 2:
            raise CaptureError("not this one")
        return capture(work)

    device.capture = failing  # type: ignore[method-assign]
    # Only what was captured is timed: cuBLAS and all blocks but the second.
    measured = iter(range(10**6))
    device.time = lambda graph: (9.0, 8.0, 7.0)[next(measured) % NUM_BLOCKS]  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING), device.on(device.stream()), device.may_block():
        assert choose_products(linears, device) == (9, 9)
    assert linears[0].few[1] == skinny.BLOCKS[2] and "not this one" in caplog.text


@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_goes_the_chosen_way_for_its_rows_alone(
    activation: str | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = Linear(torch.randn(8, 6), torch.randn(8) if bias else None, activation)
    seen: list[int] = []

    def noting(x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(len(x))
        return skinny.torch_skinny_product(x, *args[:2], *args[3:])

    monkeypatch.setattr("engine.ops.linear.skinny_product", noting)
    call = linear if activation is None else linear.gated
    inputs = [torch.randn(rows, 6) for rows in (1, 2, 5)]
    before = [call(x) for x in inputs]
    assert not seen
    linear.few = {1: skinny.BLOCKS[0]}
    after = [call(x) for x in inputs]
    assert seen == [1]
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(x, y)


def test_tiles_are_taken_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = some_linears()
    seen: list[int] = []
    monkeypatch.setattr(
        "engine.ops.linear.gated_product",
        lambda x, *args: seen.append(len(x)) or gated.torch_gated_product(x, *args[:3]),
    )
    device = FakeDevice(0)
    device.time = lambda graph: next(seconds)  # type: ignore[method-assign]
    with device.on(device.stream()), device.may_block():
        for taken, times in ((gated.TILES[1], (9.0, 8.0, 7.0)), (None, (1.0, 0.98, 2.0))):
            seconds = iter(times)
            assert choose_tiles(linears, 4096, device) == (int(taken is not None), 1)
            assert [linear.tile for linear in linears] == [None, None, None, taken]
        assert choose_tiles(linears, gated.LEAST_ROWS - 1, device) == (0, 0)
        device.synchronize_all()
    seen.clear()
    linears[3].tile = gated.TILES[0]
    for rows in (gated.LEAST_ROWS - 1, gated.LEAST_ROWS):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(linears[3].gated(x), linears[3].by_blocks(x, None))
    assert seen == [gated.LEAST_ROWS]


def test_tiles_without_room_to_time_them_are_not_taken() -> None:
    linears, device = some_linears(), FakeDevice(0)
    device.launches_until_failure = 2
    with device.on(device.stream()), device.may_block():
        assert choose_tiles(linears, 4096, device) == (0, 1)
    assert linears[3].tile is None


def coded_linears() -> list[DeviceCodedLinear]:
    """Two of one shape and a wider one."""
    found = []
    for columns in (32, 32, 64):
        piece = (0, 8, torch.ones((8, columns), dtype=torch.uint8), torch.ones((8, columns // 32)), None)
        found.append(DeviceCodedLinear("int8", 8, columns, 32, torch.float32, torch.device("cpu"), [piece]))
    return found


def test_codes_are_widened_from_where_that_is_faster() -> None:
    """By the clock: of tiles first, for 16, 32 and 64 rows; then numbers in registers beside numbers first."""
    device, linears, many = FakeDevice(0), coded_linears(), len(device_coded.TILES)
    tiles = [(9.0, 7.0, 8.0, 8.0), (9.0, 9.0, 8.0, 8.5), (1.0, 2.0, 2.0, 2.0)]
    rows_by_rows = [(5.0, 3.0), (5.0, 4.0), (4.9, 5.0)]
    once = [*(seconds for each in tiles for seconds in each), *(seconds for each in rows_by_rows for seconds in each)]
    assert all(len(each) == many for each in tiles)
    seconds = iter(2 * once)
    device.time = lambda graph: next(seconds)  # type: ignore[method-assign]
    with device.on(device.stream()), device.may_block():
        assert choose_codes([Linear(torch.randn(8, 6)), *linears], 4096, device) == 2
        assert next(seconds, None) is None
        device.synchronize_all()
    for linear in linears:
        assert linear.tiles == dict(zip((16, 32, 64), (device_coded.TILES[n] for n in (1, 2, 0)), strict=True))
        assert linear.widen_from == WIDENED[2]
    other = coded_linears()[0]
    other.ways = linears[0].ways
    assert other.tiles == linears[0].tiles and other.widen_from == WIDENED[2]


def test_float8_inputs_are_taken_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the others: by rows of prompts, up to those that a step has; told at start."""
    monkeypatch.setattr(device_coded, "has_scaled_product", lambda dtype, device: True)
    monkeypatch.setattr("engine.executor.cuda_products.WIDENED", ())
    piece = (0, 16, torch.ones((16, 32), dtype=torch.uint8), torch.ones((16, 1)), None)
    given: tuple[Any, ...] = ("e4m3", 16, 32, 32, torch.bfloat16, torch.device("cpu"), [piece])
    linears = [DeviceCodedLinear(*given) for _ in range(3)]
    for linear in linears[1:]:
        linear.take_float8_inputs()
    tiles = [1.0] * len(device_coded.TILES) * 3
    device, rows = FakeDevice(0), []
    device.time = lambda graph: next(seconds)  # type: ignore[method-assign]
    told: list[str] = []
    for timed, most, expected in (([5.0, 4.9, 5.0, 4.0], 4096, 128), ([5.0, 5.0], 100, None)):
        seconds = iter([*tiles, *tiles, *timed])
        with device.on(device.stream()), device.may_block():
            assert choose_codes(linears, most, device) == 2 and next(seconds, None) is None
            device.synchronize_all()
        rows.append([linear.float8_from for linear in linears])
        report_float8(SimpleNamespace(linears=linears), lambda name, text: told.append(text))  # type: ignore[arg-type]
        assert rows[-1] == [None, expected, expected]
    assert told[0].endswith("for 2 of 2 matrices whose checkpoint says so, from 128 rows of a step on")
    assert "for 0 of 2 matrices" in told[1]


def test_codes_whose_kernels_cannot_be_built_are_widened_always(caplog: pytest.LogCaptureFixture) -> None:
    device, linears = FakeDevice(0), coded_linears()

    def failing(work: Callable[[], object]) -> Any:
        raise CaptureError("no such kernel")

    device.capture = failing  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING), device.on(device.stream()), device.may_block():
        assert choose_codes(linears, 4096, device) == 2
    assert all(linear.widen_from == 0 for linear in linears) and "no such kernel" in caplog.text


def mixtures_of(count: int) -> list[Mixture]:
    """Of int8 gates and ups, and downs that are numbers; the last of more experts."""
    found = []
    for experts in (4,) * (count - 1) + (8,):
        gate_up = device_coded.codes_of("int8", 32 * experts, 32, 32, torch.device("cpu"), [])
        found.append(Mixture(experts, 2, gate_up, torch.ones(experts, 32, 16), "silu", torch.float32))
    return found


def test_experts_are_widened_from_where_that_is_faster() -> None:
    """By the clock: tiles of 16 and of 64 pairs, then numbers in registers beside numbers first."""
    device, mixtures = FakeDevice(0), mixtures_of(3)
    tiles = [(9.0, 7.0, 8.0), (9.0, 9.0, 8.0)]
    assert all(len(each) == len(CODED_TILES) for each in tiles)
    by_pairs = [(5.0, 3.0), (5.0, 4.0), (4.9, 5.0)]
    once = [*(seconds for each in tiles for seconds in each), *(seconds for each in by_pairs for seconds in each)]
    seconds = iter(2 * once)
    device.time = lambda graph: next(seconds)  # type: ignore[method-assign]
    plain = Mixture(4, 2, torch.ones(4, 32, 32), torch.ones(4, 32, 16), "silu", torch.float32)
    with device.on(device.stream()), device.may_block():
        assert choose_experts([plain, *mixtures], 4096, device) == 2
        assert next(seconds, None) is None
        device.synchronize_all()
    for mixture in mixtures:
        assert mixture.ways == ({16: CODED_TILES[1], 64: CODED_TILES[2]}, PAIRS_WIDENED[2] * mixture.count)
    assert plain.widen_from == 0


def test_experts_are_timed_by_no_more_tokens_than_a_step_has(caplog: pytest.LogCaptureFixture) -> None:
    device, [mixture] = FakeDevice(0), mixtures_of(1)
    device.time = lambda graph: next(seconds)  # type: ignore[method-assign]
    # Ours are always quicker: up to the largest step, and beyond.
    seconds = iter([9.0, 8.0, 7.0, 9.0, 8.0, 7.0, 5.0, 3.0])
    with device.on(device.stream()), device.may_block():
        assert choose_experts([mixture], 9, device) == 1 and next(seconds, None) is None
        assert mixture.widen_from == 19
        device.capture = failing  # type: ignore[method-assign]
        with caplog.at_level(logging.WARNING):
            assert choose_experts([mixture], 9, device) == 1
        device.synchronize_all()
    assert mixture.widen_from == 0 and "no such kernel" in caplog.text


def failing(work: Callable[[], object]) -> Any:
    raise CaptureError("no such kernel")


async def test_experts_of_codes_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded as they are read, in graphs, with the tokens of the same weights as numbers; counted at start, and read
    anew they go the same ways."""
    from engine.models.parts import experts
    from tests.models.support import make_checkpoint

    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4}
    make_checkpoint(tmp_path, "Qwen3Moe", vocab_size=101, num_experts=4, num_experts_per_tok=2, **sizes)
    monkeypatch.setattr(device_coded, "forms_kept", lambda dtype, device: device_coded.FORMS)
    monkeypatch.setattr(experts, "keeps_experts_stacked", lambda device: True)

    def read() -> Any:
        given: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "max_model_len": 256}
        with native.disabled():
            return load_model(read_spec(tmp_path), tmp_path, quantisation="int4", **given)

    model = read()
    layers = len(model.mixtures)
    assert layers == model.config.num_layers and all(each.forms == ["int4", "int4"] for each in model.mixtures)
    coded = coded_matrices(model)
    assert coded["int4"] - 2 * 4 * layers == sum(
        isinstance(each, DeviceCodedLinear) and each.codes.form == "int4" for each in model.linears
    )
    executor = make_executor(SMALL, device=FakeDevice(1), model=model)
    executor.choose_products()
    requests = requests_of(1)
    tokens = await serve(executor, requests)
    assert tokens == [expected_tokens(model, request) for request in requests]
    model.mixtures[0].widen_from = 77
    executor._faster_mixtures[0] = model.mixtures[0].shape, model.mixtures[0].ways
    assert executor._with_products(read()).mixtures[0].widen_from == 77


async def test_a_model_of_codes_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs, chunks and a captured choice, with the tokens of the same weights as numbers."""
    from tests.models.support import make_checkpoint

    make_checkpoint(tmp_path, "Llama", vocab_size=101, hidden_size=32, intermediate_size=64, num_attention_heads=4)
    monkeypatch.setattr(device_coded, "forms_kept", lambda dtype, device: device_coded.FORMS)
    with native.disabled():
        model = load_model(
            read_spec(tmp_path),
            tmp_path,
            dtype=torch.float32,
            device=torch.device("cpu"),
            quantisation="int8",
            max_model_len=256,
        )
    assert all(isinstance(linear, DeviceCodedLinear) for linear in model.linears) and len(model.linears) > 4
    executor = make_executor(SMALL, device=FakeDevice(1), model=model)
    executor.choose_products()
    requests = requests_of(1)
    tokens = await serve(executor, requests)
    assert tokens == [expected_tokens(model, request) for request in requests]


@pytest.mark.parametrize("seed", range(2))
async def test_tokens_stay_the_same(seed: int) -> None:
    """The fake clock throws dice, so some products are ours."""
    requests, model = requests_of(seed), tiny_model()
    executor = make_executor(SMALL, device=FakeDevice(seed))
    try:
        few, gated = executor.choose_products()
        assert 0 < few[0] <= few[1] == 3 * 5  # qkv, output, gate and up, down, logits
        assert gated == (0, 0)  # its steps have too few rows
        tokens = await serve(executor, requests)
        # Weights that are read later go the same ways.
        other: Any = SimpleNamespace(
            linears=[SimpleNamespace(kind="torch", ways=None) for _ in model.linears], mixtures=[]
        )
        executor._with_products(other)
        assert [linear.ways for linear in other.linears] == [(linear.few, None) for linear in model.linears]
    finally:
        for linear in model.linears:  # other tests have this model, too
            linear.few = {}
    assert tokens == [expected_tokens(model, request) for request in requests]
