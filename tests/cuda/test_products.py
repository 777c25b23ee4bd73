"""Which products of few rows become ours, by what the clock says; and that it changes no token."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.executor.cuda_device import CaptureError
from engine.executor.cuda_products import choose_products
from engine.ops import skinny
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


@pytest.mark.parametrize("seed", range(2))
async def test_tokens_stay_the_same(seed: int) -> None:
    """The fake clock throws dice, so some products are ours."""
    requests, model = requests_of(seed), tiny_model()
    executor = make_executor(SMALL, device=FakeDevice(seed))
    try:
        ours, shapes = executor.choose_products()
        assert 0 < ours <= shapes == 3 * 5  # qkv, output, gate and up, down, logits
        tokens = await serve(executor, requests)
    finally:
        for linear in model.linears:  # other tests have this model, too
            linear.few = {}
    assert tokens == [expected_tokens(model, request) for request in requests]
