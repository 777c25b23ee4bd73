"""Planted bugs: each is a mistake that a GPU would punish only now and then. The fake device must catch every one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.executor.base import StepHandle
from engine.executor.cuda import CUDAExecutor, CudaHandle, Side
from engine.executor.cuda_graph import GraphKey
from engine.executor.fake_checks import poison_staging
from engine.forward import ForwardInput, ForwardOutput
from tests.cuda.fake_device import FakeDevice, FakeEvent
from tests.cuda.support import SMALL, expected_tokens, make_executor, requests_of, serve, tiny_model

IMAGES = ("block", "row_slot", "row_start", "table_index", "table_page", "sampling_slot", "sampling")


class NoUploadWait(CUDAExecutor):
    """The compute stream does not wait for its inputs."""

    def _send(self, side: Side, num_bytes: int, num_meta: int = 0) -> None:
        super()._send(side, num_bytes, num_meta)
        side.uploaded = FakeEvent()  # the one that is waited for was never recorded


class NoComputeWait(CUDAExecutor):
    """The download does not wait for the tokens."""

    def _finish(self, side: Side, handle: CudaHandle) -> None:
        computed, side.computed = side.computed, FakeEvent()
        with self.layer.on(self._compute):
            self.layer.record(computed)
        with self.layer.on(self._download):
            self.layer.download(side.result_host[: handle.num_rows], side.out[: handle.num_rows])
            self.layer.record(side.done)
        side.computed = computed


class DoneBeforeDownload(CUDAExecutor):
    """The step counts as done when its tokens are computed, not when they are on the host."""

    def _finish(self, side: Side, handle: CudaHandle) -> None:
        layer = self.layer
        with layer.on(self._compute):
            layer.record(side.computed)
        with layer.on(self._download):
            layer.wait(side.computed)
            layer.record(side.done)
            layer.download(side.result_host[: handle.num_rows], side.out[: handle.num_rows])


class DoesNotWait(CUDAExecutor):
    """`wait` returns at once."""

    async def wait(self, handle: StepHandle) -> ForwardOutput:
        assert isinstance(handle, CudaHandle)
        self._in_flight -= 1
        await asyncio.sleep(0)
        return ForwardOutput(handle.side.result[: handle.num_rows], handle.step)


class WaitsOnTheLoop(CUDAExecutor):
    """The loop thread blocks on the event itself."""

    async def wait(self, handle: StepHandle) -> ForwardOutput:
        assert isinstance(handle, CudaHandle)
        self.layer.synchronize(handle.side.done)
        return await super().wait(handle)


class RefilledEarly(CUDAExecutor):
    """The scheduler takes its staging set back when the step is launched."""

    def submit(self, forward_input: ForwardInput) -> CudaHandle:
        handle = super().submit(forward_input)
        poison_staging(forward_input.staging)
        return handle


class NoPadding(CUDAExecutor):
    """Rows that fill up a graph's batch keep what an earlier step left in them."""

    @staticmethod
    def _pad(side: Side, rows: int, size: int, num_diffs: int) -> int:
        return num_diffs


class OneGraphForBothSides(CUDAExecutor):
    """Graphs read the buffers of even steps, also in odd ones."""

    def _launch_decode(self, *args: Any) -> Any:
        key = self.graphs.key
        self.graphs.key = lambda *a: GraphKey(*key(*a)[:2], 0, a[3])  # type: ignore[method-assign]
        return super()._launch_decode(*args)


class NoTableDiffs(CUDAExecutor):
    """A decode step forgets the pages that it brings."""

    @staticmethod
    def _pad(side: Side, rows: int, size: int, num_diffs: int) -> int:
        side.first_index[:size] = 0
        side.first_page[:size] = 0
        return CUDAExecutor._pad(side, rows, size, 0)


def sharing(*names: str) -> type[CUDAExecutor]:
    """Both sides have the same one of these."""

    class Sharing(CUDAExecutor):
        __doc__ = f"Both sides share {names[0]}."

        def _make_sides(self) -> tuple[Side, Side]:
            first, second = super()._make_sides()
            for name in names:
                setattr(second, name, getattr(first, name))
            return first, second

    return Sharing


class OnePrefillWrapper(CUDAExecutor):
    """FlashInfer plans every step in the same pinned buffer."""

    def _launch_mixed(self, *args: Any) -> Any:
        prefills = self.attention._prefills
        for window, parity in prefills:
            prefills[window, parity] = prefills[window, 0]
        return super()._launch_mixed(*args)


class OneDecodeWrapper(CUDAExecutor):
    """The same, in decode steps."""

    def _launch_decode(self, *args: Any) -> Any:
        decodes = self.attention._decodes
        prepare = self.attention.prepare_decode

        def shared(size: int, width: int) -> None:
            prepare(size, width)
            for key in decodes:
                decodes[key] = decodes[(*key[:3], 0)]

        self.attention.prepare_decode = shared
        return super()._launch_decode(*args)


class _OneForBoth(dict[Any, Any]):
    def setdefault(self, key: Any, default: Any = None) -> Any:
        return super().setdefault(key[0], default)


class OnePlanMemory(CUDAExecutor):
    """Decode wrappers of both parities plan in the same memory."""

    def __init__(self, *args: Any, **options: Any) -> None:
        args[3]._plan_memory = _OneForBoth()
        super().__init__(*args, **options)


class HostIndices(CUDAExecutor):
    """The page indices reach `plan` as host memory, which would make it wait."""

    def _launch_mixed(self, forward_input: ForwardInput, side: Side, *args: Any) -> Any:
        meta, side.meta = side.meta, side.meta_host
        try:
            return super()._launch_mixed(forward_input, side, *args)
        finally:
            side.meta = meta


MUTANTS: dict[str, tuple[type[CUDAExecutor], str]] = {
    "no upload wait": (NoUploadWait, "torch"),
    "no compute wait": (NoComputeWait, "torch"),
    "done before the download": (DoneBeforeDownload, "torch"),
    "does not wait": (DoesNotWait, "torch"),
    "waits on the loop": (WaitsOnTheLoop, "torch"),
    "staging refilled early": (RefilledEarly, "torch"),
    "no padding": (NoPadding, "torch"),
    "one graph for both sides": (OneGraphForBothSides, "torch"),
    "no table diffs": (NoTableDiffs, "torch"),
    "shared image": (sharing(*IMAGES), "torch"),
    "shared metadata": (sharing("meta"), "torch"),
    "shared pinned metadata": (sharing("meta_host"), "torch"),
    "shared tokens": (sharing("out"), "torch"),
    "shared pinned output": (sharing("result_host", "result"), "torch"),
    "one prefill wrapper": (OnePrefillWrapper, "xqa"),
    "one decode wrapper": (OneDecodeWrapper, "wrapper"),
    "one plan memory": (OnePlanMemory, "wrapper"),
    "host indices": (HostIndices, "xqa"),
}


async def outcome(kind: type[CUDAExecutor], attention: str, seed: int) -> str:
    """What becomes of a run: "right", or how it shows that something is wrong."""
    requests = requests_of(seed, 6)
    device = FakeDevice(seed, (0.0, 0.5)[seed % 2])
    executor = make_executor(SMALL, device=device, attention=attention, kind=kind)
    try:
        tokens = await asyncio.wait_for(serve(executor, requests), 30)
    except BaseException as error:
        return type(error).__name__
    return "right" if tokens == [expected_tokens(tiny_model(), r) for r in requests] else "wrong tokens"


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.filterwarnings("ignore")
async def test_mutant_is_caught(name: str) -> None:
    kind, attention = MUTANTS[name]
    for seed in range(8):
        if await outcome(kind, attention, seed) != "right":
            return
    pytest.fail(f"{name}: nothing noticed")


@pytest.mark.parametrize("attention", ["torch", "xqa", "wrapper"])
async def test_without_a_mutant_nothing_is_caught(attention: str) -> None:
    assert [await outcome(CUDAExecutor, attention, seed) for seed in range(2)] == ["right", "right"]
