"""FaultyExecutor: an executor whose device misbehaves by plan, so that what the engine promises can be tried.

`--debug-faults SPEC` puts it round whatever executor serves; the simulator and the tests do the same. A plan is a
function of its seed and of the steps' numbers alone. Loop thread.

SPEC: kinds with their settings, "raise:p=0.01;nan:step=40;slow:p=0.1,s=0.5;seed=7". Kinds: slow (by `s` seconds),
hang (a step that never ends), raise and oom (the step fails), nan (a row computes no numbers), corrupt (a row samples
no token that there is), lost (the device is gone). When: with probability `p` a step, at `step`, or wherever the
token `token` is computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from prometheus_client.core import CounterMetricFamily, Metric

from engine.config import StartupError
from engine.executor.base import Executor, PageMemory, StepHandle
from engine.forward import PARTS, DeviceLostError, ForwardError, ForwardInput, ForwardOutput, Int32Array

KINDS = ("slow", "hang", "raise", "oom", "nan", "corrupt", "lost")
_SETTINGS = {"p": float, "s": float, "step": int, "token": int}


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind, and when: see the module. seconds: of slow."""

    kind: str
    probability: float = 0.0
    step: int | None = None
    token: int | None = None
    seconds: float = 0.1


@dataclass(frozen=True, slots=True)
class FaultPlan:
    faults: tuple[Fault, ...]
    seed: int = 0


def parse_faults(spec: str) -> FaultPlan:
    """Raises StartupError for what is no such plan."""
    faults, seed = [], 0
    for part in filter(None, (piece.strip() for piece in spec.split(";"))):
        kind, _, rest = part.partition(":")
        if kind.startswith("seed="):
            seed = _number(kind, "seed", kind.removeprefix("seed="), int)
            continue
        if kind not in KINDS:
            raise StartupError(f"--debug-faults: '{kind}' is none of {', '.join(KINDS)}")
        given: dict[str, Any] = {}
        for setting in filter(None, rest.split(",")):
            name, _, text = setting.partition("=")
            if name not in _SETTINGS:
                raise StartupError(f"--debug-faults: '{name}' is none of {', '.join(_SETTINGS)} ({kind})")
            given[name] = _number(kind, name, text, _SETTINGS[name])
        if not given.keys() & {"p", "step", "token"}:
            raise StartupError(f"--debug-faults: {kind} does not say when (p, step or token)")
        if not 0.0 <= given.get("p", 0.0) <= 1.0 or not 0.0 <= given.get("s", 0.0) < 1e6:
            raise StartupError(f"--debug-faults: {kind}: p is from 0 to 1, and s seconds")
        faults.append(Fault(kind, given.get("p", 0.0), given.get("step"), given.get("token"), given.get("s", 0.1)))
    if not faults:
        raise StartupError("--debug-faults names no fault")
    return FaultPlan(tuple(faults), seed)


def _number(kind: str, name: str, text: str, of: type) -> Any:
    try:
        return of(text)
    except ValueError:
        raise StartupError(f"--debug-faults: {kind}: {name} is no number: '{text}'") from None


class FaultyExecutor:
    """`inner`, with the faults of a plan. num_injected: of each kind, so far."""

    def __init__(self, inner: Executor, plan: FaultPlan) -> None:
        self.inner = inner
        self.plan = plan
        self.limits = inner.limits
        self.staging = inner.staging
        self.num_injected = dict.fromkeys(KINDS, 0)
        # Of steps in flight: the faults that are due, with the row that each is of.
        self._due: dict[int, list[tuple[Fault, int]]] = {}

    def __getattr__(self, name: str) -> Any:
        # What one kind of executor has beside the protocol.
        return getattr(self.inner, name)

    def submit(self, forward_input: ForwardInput) -> StepHandle:
        """See Executor."""
        step, random = forward_input.step, Random(f"{self.plan.seed} {forward_input.step}")
        due = []
        for fault in self.plan.faults:
            row = random.randrange(forward_input.num_rows)
            if random.random() < fault.probability or step == fault.step:
                due.append((fault, row))
            elif fault.token is not None and (found := _row_of(forward_input, fault.token)) is not None:
                due.append((fault, found))
        if due:
            self._due[step] = due
        return self.inner.submit(forward_input)

    def families(self) -> Iterable[Metric]:
        """For EngineMetrics."""
        family = CounterMetricFamily("oneloop_injected_faults", "Faults by --debug-faults, by kind.", labels=["kind"])
        for kind, count in self.num_injected.items():
            family.add_metric([kind], count)
        yield family

    def unseen_drafts(self, handle: StepHandle) -> Awaitable[list[tuple[int, Int32Array]]] | None:
        """See Executor."""
        return self.inner.unseen_drafts(handle)

    def provide_masks(self, handle: StepHandle) -> None:
        """See Executor."""
        self.inner.provide_masks(handle)

    async def wait(self, handle: StepHandle) -> ForwardOutput:
        """See Executor."""
        due = self._due.pop(handle.step, [])
        for fault, _ in due:
            if fault.kind in ("slow", "hang"):
                self.num_injected[fault.kind] += 1
                await asyncio.sleep(fault.seconds if fault.kind == "slow" else float(2**40))
        return self._spoil(due, await self.inner.wait(handle))

    def resolve(self, handle: Any) -> ForwardOutput:
        """`wait` of a fake device, without an event loop (and without what takes time)."""
        due = self._due.pop(handle.step, [])
        inner: Any = self.inner
        return self._spoil(due, inner.resolve(handle))

    def _spoil(self, due: list[tuple[Fault, int]], output: ForwardOutput) -> ForwardOutput:
        for fault, row in due:
            if fault.kind in ("slow", "hang"):
                continue
            self.num_injected[fault.kind] += 1
            if fault.kind == "lost":
                raise DeviceLostError("by --debug-faults")
            if fault.kind in ("raise", "oom"):
                raise ForwardError("by --debug-faults: " + ("out of memory" if fault.kind == "oom" else "raised"))
            if fault.kind == "nan":
                output.broken = [*output.broken, row]
            elif output.token_ids[row] >= 0:
                output.token_ids[row] = self.limits.vocab_size + row
        return output

    def sleep(self, level: int, parts: Collection[str] = PARTS) -> None:
        """See Executor."""
        self.inner.sleep(level, parts)

    def wake_up(self, directory: Any = None, parts: Collection[str] = PARTS) -> None:
        """See Executor."""
        self.inner.wake_up(directory, parts)

    def load_weights(self, directory: Any) -> None:
        """See Executor."""
        self.inner.load_weights(directory)

    def read_adapter(self, path: Any) -> Any:
        """See Executor."""
        return self.inner.read_adapter(path)

    def drop_adapters(self, indices: Sequence[int]) -> None:
        """See Executor."""
        self.inner.drop_adapters(indices)

    def page_memory(self) -> PageMemory:
        """See Executor."""
        return self.inner.page_memory()

    def state_memory(self) -> PageMemory | None:
        """See Executor."""
        return self.inner.state_memory()

    def close(self) -> None:
        """See Executor."""
        self.inner.close()


def _row_of(step: ForwardInput, token: int) -> int | None:
    places = np.flatnonzero(step.staging.token_ids[: step.num_tokens] == token)
    if not len(places):
        return None
    return int(np.searchsorted(step.staging.qo_indptr[1 : step.num_rows + 1], places[0], side="right"))
