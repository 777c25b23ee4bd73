"""Nothing that the executor launches depends on luck: every pair of accesses is ordered, and memory outlives its use.

By a device with vector clocks, so that one run is enough; and each mistake that is one of order is found by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from engine.executor.cuda import CUDAExecutor, CudaHandle, Side
from engine.executor.cuda_graph import GraphKey
from engine.forward import Limits
from engine.request import Request
from tests.cuda.ordered_device import HOST, OrderedDevice
from tests.cuda.support import HYBRID, LATENT, SMALL, make_executor, requests_of, serve, tiny_model
from tests.cuda.test_failures import EXTRAS
from tests.cuda.test_mutants import MUTANTS
from tests.executor.driver import GREEDY, Driver, decode, prefill

A = [5, 6, 7, 8, 9, 10, 11]


def asked(seed: int, extras: bool) -> list[Request]:
    requests = requests_of(seed, 6)
    if not extras:
        return requests
    return [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, **EXTRAS[number % len(EXTRAS)]))
        for number, request in enumerate(requests)
    ]


def read_results(executor: CUDAExecutor, device: OrderedDevice) -> None:
    """The host looks at the tokens of a step when it has waited for it."""
    wait = executor.wait

    async def noting(handle: Any) -> Any:
        output = await wait(handle)
        clock = device._tick(HOST)
        device.note(handle.side.result_host[: handle.num_rows], HOST, clock, writes=False, what="looks at the tokens")
        return output

    executor.wait = noting  # type: ignore[method-assign]


async def findings(
    attention: str,
    extras: bool,
    seed: int = 1,
    kind: type[CUDAExecutor] = CUDAExecutor,
    limits: Limits = SMALL,
    **options: Any,
) -> Counter[str]:
    """What is not ordered while requests are served, whatever becomes of them."""
    device = OrderedDevice(seed)
    executor = make_executor(limits, device=device, attention=attention, kind=kind, **options)
    if executor.graphs.mode == "start":
        executor.capture_at_start()
    read_results(executor, device)
    try:
        await asyncio.wait_for(serve(executor, asked(seed, extras)), 60)
    except Exception:
        assert kind is not CUDAExecutor
    return device.found


@pytest.mark.parametrize("attention", ["torch", "xqa", "wrapper"])
@pytest.mark.parametrize(("mode", "extras"), [("lazy", False), ("lazy", True), ("start", True), ("off", True)])
async def test_everything_is_ordered(attention: str, extras: bool, mode: str) -> None:
    assert not await findings(attention, extras, cuda_graph=mode)


@pytest.mark.parametrize(("mode", "heads"), [("lazy", 4), ("start", 4), ("lazy", 6)])
async def test_latents_are_ordered(mode: str, heads: int) -> None:
    model = tiny_model(json.dumps({**LATENT, "num_attention_heads": heads, "num_key_value_heads": heads}))
    assert not await findings("latent", True, cuda_graph=mode, model=model)


async def test_recurrent_states_are_ordered() -> None:
    limits = dataclasses.replace(SMALL, num_snapshots=3)
    assert not await findings("torch", True, limits=limits, model=tiny_model(json.dumps(HYBRID)))


def test_what_was_done_with_memory_ends_with_it() -> None:
    """A slice's new value comes as a number in memory of its own, whose address another tensor has next."""
    device = OrderedDevice()
    memory = torch.zeros(3)
    device.current = device.stream()
    device.kernel(lambda: memory.__setitem__(slice(1, 2), 5.0))
    assert list(device._accesses) == [memory.untyped_storage().data_ptr()]


class NoKeep(CUDAExecutor):
    """Arrays of a step are let go of when they are sent, though its work still reads them."""

    def _send_arrays(self, arrays: Sequence[npt.NDArray[Any]], handle: CudaHandle) -> list[Tensor]:
        sent = super()._send_arrays(arrays, handle)
        handle.keep.clear()
        return sent


class KeptTillLaunched(CUDAExecutor):
    """What a step brings home is let go of before it is copied."""

    def _finish(self, side: Side, handle: CudaHandle) -> None:
        super()._finish(side, handle)
        handle.keep.clear()
        handle.downloads.clear()


class PlansBehindOneAnother(CUDAExecutor):
    """Graphs are captured at start without a look at what the last plan's copy has read."""

    def capture_at_start(self, progress: Any = None) -> None:
        with self.layer.may_block():
            for key in self.graphs.at_start():
                self._warm_up(key, capture=True)


@pytest.mark.parametrize(
    "name",
    [
        "no upload wait",
        "no compute wait",
        "done before the download",
        "does not wait",
        "one graph for both sides",
        "shared image",
        "shared metadata",
        "shared pinned metadata",
        "shared tokens",
        "shared pinned output",
        "one prefill wrapper",
        "one plan memory",
    ],
)
@pytest.mark.filterwarnings("ignore")
async def test_a_mistake_of_order_is_found_at_once(name: str) -> None:
    kind, attention = MUTANTS[name]
    assert await findings(attention, extras=False, kind=kind)


@pytest.mark.parametrize("kind", [NoKeep, KeptTillLaunched])
async def test_memory_that_is_let_go_of_too_early_is_found(kind: type[CUDAExecutor]) -> None:
    found = await findings("torch", extras=True, kind=kind)
    assert any("is let go of" in each for each in found), found


async def test_plans_behind_one_another_are_found() -> None:
    assert await findings("wrapper", extras=False, kind=PlansBehindOneAnother, cuda_graph="start")


async def test_a_warm_up_that_fails_half_way_leaves_all_in_order() -> None:
    """At every launch of it; then a step of the same parity comes."""
    for number in range(1, 5):
        device = OrderedDevice(number)
        executor = make_executor(SMALL, device=device)
        driver = Driver(executor)
        await driver.run([prefill(1, A)], {1: [1, 2, 3, 4]}, {1: GREEDY})
        for parity in (0, 1):
            device.launches_until_failure = number
            key = GraphKey(1, executor.graphs.widths[0], parity, "plain")
            with contextlib.suppress(torch.OutOfMemoryError):
                executor._warm_up(key, capture=False)
            device.launches_until_failure = -1
            await driver.run([decode(1, 7 + parity)])
        executor.close()
        assert not device.found, number
