"""CPUExecutor: runs steps on the host's cores, one after another, on one worker thread beside the event loop.

Owns the KV memory (through its attention backend), the slot tables and the last-token relay; only the worker
touches them. cpu_start.py says how one comes to be.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.config import StartupError
from engine.executor.base import StepHandle
from engine.executor.host_pages import HostPages, Rows
from engine.executor.pooling import Pooler, pooled_chunks, token_types
from engine.executor.speculator import Speculator, mask_places, sampled_positions
from engine.executor.tables import SlotTables, StepMetadata
from engine.forward import (
    FUTURE_TOKEN,
    PARTS,
    DeviceLostError,
    ForwardError,
    ForwardInput,
    ForwardOutput,
    Int32Array,
    Limits,
    Staging,
)
from engine.groups import name_of
from engine.lora.reader import AddUp, read_adapter
from engine.lora.words import AdapterError, AdapterWeights
from engine.models.offload import Weighed
from engine.models.parts.decoder import Adapted
from engine.models.spec import ModelSpec
from engine.ops.attention.base import AttentionBackend, AttentionSpec, create_backend
from engine.ops.sampling.extras import SlotExtras
from engine.ops.sampling.sampler import sample
from engine.ops.state import States, StateSpec, plan_of
from engine.speculation.base import Proposer
from engine.speculation.paged import LateProposer

logger = logging.getLogger(__name__)

# Of the pages and states: to be raised whenever what lies where in them changes.
LAYOUT_VERSION = 1


class Model(Protocol):
    """What is needed of a CausalLM; and its attention_spec, where no backend is given."""

    @property
    def config(self) -> ModelSpec: ...

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, types: Tensor | None = None
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def classify(self, hidden: Tensor) -> Tensor: ...

    def project(self, vectors: Tensor) -> Tensor: ...


class CPUStepHandle:
    """A launched step. The worker sets output or error, then wakes whoever waits."""

    __slots__ = ("_done", "_lock", "_waiters", "began_at", "ended_at", "error", "forward_input", "output", "step")

    def __init__(self, forward_input: ForwardInput) -> None:
        self.step = forward_input.step
        self.forward_input = forward_input
        self.output: ForwardOutput | None = None
        self.error: ForwardError | DeviceLostError | None = None
        self.began_at = self.ended_at = 0.0  # time.monotonic's, once it is done
        self._done = False
        self._lock = threading.Lock()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def finish(self) -> None:
        """On the worker."""
        with self._lock:
            self._done = True
            waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            # RuntimeError: that loop is closed, and nobody waits any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_wake, future)

    async def wait(self) -> None:
        """On an event loop."""
        with self._lock:
            if self._done:
                return
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            self._waiters.append((loop, future))
        await future


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():  # cancelled meanwhile
        future.set_result(None)


class CPUExecutor:
    """An `Executor` around a model in host memory.

    attention: a backend with limits.num_pages + 1 pages; None builds the paged one for model.attention_spec,
    `dtype`, the model's, and kv_dtype, that of the cache (None: the model's). Where limits.num_snapshots is one, the
    model has recurrent states (model.config.states).
    load: reads the model from a directory, None for where `model` came from. proposer, late: what
    drafts, at least one of them where limits.max_draft_tokens is not 0; late: only where the other knows nothing.
    max_lora_rank: of adapters' modules.
    """

    def __init__(
        self,
        model: Model,
        limits: Limits,
        *,
        attention: AttentionBackend | None = None,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        load: Callable[[Path | None], Model] | None = None,
        proposer: Proposer | None = None,
        late: LateProposer | None = None,
        max_lora_rank: int = 64,
    ) -> None:
        if attention is None:
            assert dtype is not None, "the cache needs a dtype"
            spec: AttentionSpec = model.attention_spec  # type: ignore[attr-defined]
            attention = create_backend(
                "packed" if spec.bidirectional else "torch_paged",
                spec,
                num_pages=limits.num_pages,
                page_size=limits.page_size,
                dtype=dtype,
                kv_dtype=kv_dtype,
                groups=limits.groups,
            )
        self._states: States | None = None
        if limits.num_snapshots is not None:
            assert dtype is not None, "states need a dtype"
            states: StateSpec = model.config.states
            self._states = attention.states = States(states, limits, dtype, torch.device("cpu"))
        self.limits = limits
        self.staging: tuple[Staging, Staging] = (Staging(limits), Staging(limits))
        self._model: Model | None = model
        self._load = load
        self._dtype = dtype
        self._max_lora_rank = max_lora_rank
        self._attention: AttentionBackend | None = attention
        self._tables = SlotTables(limits)
        self._adapted: Adapted | None = getattr(model, "adapted", None)
        self._extras = SlotExtras(limits)
        self._pooler = Pooler(self._of_slots)
        self._speculator: Speculator | None = None
        if limits.max_draft_tokens:
            self._speculator = Speculator(limits, proposer, late, self._tables)
        self._late = late
        self._ask_for_aux(model)
        self._metadata = StepMetadata(limits)
        self._last_token = np.zeros(limits.num_slots, np.int32)
        self._token_ids = np.zeros(limits.max_num_batched_tokens, np.int32)
        self._token_tensor = torch.from_numpy(self._token_ids)
        self._weighed = Weighed()
        self._queue: queue.SimpleQueue[CPUStepHandle | None] = queue.SimpleQueue()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="cpu-executor", daemon=True)
        self._worker.start()

    @property
    def page_bytes(self) -> int:
        """What a page takes in all layers of its groups; 0 where nothing is kept, or while it sleeps."""
        pools = [*getattr(self._attention, "k_pools", ()), *getattr(self._attention, "v_pools", ())]
        return sum(pool.nbytes for pool in pools) // (self.limits.num_pages + 1)

    def held_bytes(self) -> dict[str, int]:
        """Bytes of host memory by owner, pages left out. Loop thread."""
        states = {} if self._states is None else {"recurrent states": self._states.num_bytes}
        return {"weights": self._weighed(self._model)} | states

    def submit(self, forward_input: ForwardInput) -> CPUStepHandle:
        """See Executor."""
        assert not self._closed, "submit after close"
        handle = CPUStepHandle(forward_input)
        self._queue.put(handle)
        return handle

    async def wait(self, handle: StepHandle) -> ForwardOutput:
        """See Executor."""
        assert isinstance(handle, CPUStepHandle)
        await handle.wait()
        if handle.error is not None:
            raise handle.error
        assert handle.output is not None
        return handle.output

    def unseen_drafts(self, handle: StepHandle) -> None:
        """See Executor: what is drafted for rows under a grammar is told at the end of the step before."""

    def provide_masks(self, handle: StepHandle) -> None:
        """Nothing to do: the worker waits on the masks themselves."""

    def sleep(self, level: int, parts: Collection[str] = PARTS) -> None:
        """See Executor. The weights are in host memory as it is: level 1 leaves them alone."""
        assert self._attention is not None
        if level == 2 and "weights" in parts:
            self._reader()  # or it would never wake up
            self._model = self._adapted = None
        if "kv_cache" not in parts:
            return
        self._attention.release()
        if self._late is not None:
            self._late.release()
        if self._states is not None:
            self._states.release()

    def wake_up(self, directory: Path | None = None, parts: Collection[str] = PARTS) -> None:
        """See Executor."""
        assert self._attention is not None
        if self._model is None and "weights" in parts:
            self._take(self._reader()(directory))
        if "kv_cache" not in parts:
            return
        self._attention.allocate()
        if self._late is not None:
            self._late.allocate()
        if self._states is not None:
            self._states.allocate()

    def load_weights(self, directory: Path) -> None:
        """See Executor. Old and new weights are in memory for a while."""
        self._take(self._reader()(directory))

    def _take(self, model: Model) -> None:
        """Serve with another model of the same spec, and the adapters that are in place."""
        adapted: Adapted | None = getattr(model, "adapted", None)
        if adapted is not None and self._adapted is not None:
            adapted.take_over(self._adapted)
        if self._late is not None:
            self._late.use(model)
        self._ask_for_aux(model)
        self._model, self._adapted = model, adapted

    def _ask_for_aux(self, model: Any) -> None:
        """What drafts may want to see what some layers read."""
        if self._late is not None and self._late.aux_layers:
            model.aux_layers = self._late.aux_layers

    def _move_states(self, states: States, step: ForwardInput) -> None:
        """First of all, and whatever becomes of the step: the cache counts on what it has saved."""
        states.move(step)

    def _run_states(self, states: States, step: ForwardInput) -> None:
        """A step as it runs comes next."""
        states.run(plan_of(step))

    def _settle_states(self, states: States, counts: Int32Array) -> None:
        """Of each row, that many of its tokens are right."""
        states.settle(counts)

    def _use_slots(self, slots: Sequence[int]) -> None:
        """What is computed next are rows of these seq slots; of one alone, however many."""
        if self._adapted is not None:
            own = self._tables.adapter[slots]
            self._adapted.rows.use(int(own[0]) if len(slots) == 1 else own)

    def _of_slots(self, slots: list[int]) -> contextlib.AbstractContextManager[None]:
        self._use_slots(slots)
        return contextlib.nullcontext()

    def _forget_adapters(self) -> None:
        """What follows is nobody's: drafts are made without adapters."""
        if self._adapted is not None:
            self._adapted.rows.use(0)

    def _reader(self) -> Callable[[Path | None], Model]:
        if self._load is None:
            raise StartupError("this executor has nowhere to read weights from")
        return self._load

    def read_adapter(self, path: Path) -> AdapterWeights:
        """See Executor."""
        return self._read_adapter(path)

    def _read_adapter(self, path: Path, add_up: AddUp | None = None) -> AdapterWeights:
        layers = getattr(self._model, "adapted", None)
        if layers is None:
            raise AdapterError(f"adapter {path.name!r}: the model was loaded without places for adapters, or sleeps")
        return read_adapter(path, layers.whole or layers, self._max_lora_rank, add_up)

    def drop_adapters(self, indices: Sequence[int]) -> None:
        """See Executor."""
        if self._adapted is not None:
            for index in indices:
                self._adapted.put(index, {})

    def page_memory(self) -> HostPages:
        """See Executor."""
        return HostPages(*self._own_pages())

    def _own_pages(self) -> tuple[list[Rows], str]:
        pools = [*getattr(self._attention, "k_pools", ()), *getattr(self._attention, "v_pools", ())]
        if not pools:
            raise StartupError("this model keeps no keys and values, or sleeps")
        dtype, size = str(pools[0].dtype).removeprefix("torch."), self.limits.page_size
        # What drafts has keys and values of its own of the same tokens in the same pages.
        drafts = [] if self._late is None else self._late.pools
        parts = [pool.view(torch.uint8).flatten(1).numpy() for pool in (*pools, *drafts)]
        return parts, f"cpu {LAYOUT_VERSION} {self._dtype} in {dtype} page {size}{name_of(self.limits.groups)}"

    def state_memory(self) -> HostPages | None:
        """See Executor."""
        own = self._own_states()
        return None if own is None else HostPages(*own)

    def _own_states(self) -> tuple[list[Rows], str] | None:
        if self._states is None:
            return None
        if not self.limits.num_snapshots:
            raise StartupError("there is no room for a snapshot of this model's recurrent state beside the pages")
        return [self._states.snapshots.numpy()], f"state {LAYOUT_VERSION} {self._dtype}"

    def close(self) -> None:
        """See Executor. Blocks until the launched steps are through."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        self._worker.join()
        self._model = self._adapted = None
        self._attention = self._states = self._late = self._speculator = None

    def _work(self) -> None:
        with torch.inference_mode():
            while (handle := self._queue.get()) is not None:
                handle.began_at = time.monotonic()
                try:
                    handle.output = self._run(handle.forward_input)
                except (ForwardError, DeviceLostError) as error:
                    handle.error = error
                except Exception as error:
                    logger.exception("step %d failed", handle.step)
                    handle.error = ForwardError(f"{type(error).__name__}: {error}")
                handle.ended_at = time.monotonic()
                handle.finish()
                del handle

    def _run(self, step: ForwardInput) -> ForwardOutput:
        """One step on the worker. The diffs are taken over first: they count even where the step fails."""
        self._tables.apply(step)
        if self._adapted is not None:
            for index, weights in step.adapter_loads:
                self._adapted.put(index, {} if weights is None else weights.branches)
        extras = self._extras
        if step.num_sampling_diffs:
            extras.apply(step)
        states = self._states
        if states is not None:
            self._move_states(states, step)
        speculator = self._speculator
        if speculator is not None:
            speculator.apply(step)
            step = speculator.as_it_runs(step, self._last_token)
        if states is not None:
            self._run_states(states, step)
        rows, tokens = step.num_rows, step.num_tokens
        chosen = np.full(rows, -1, np.int32)
        if tokens == 0:
            return ForwardOutput(chosen, step.step)
        model, attention, staging = self._model, self._attention, step.staging
        assert model is not None and attention is not None
        metadata = self._metadata.build(step, self._tables)
        slots = staging.row_slot[:rows]
        ids = self._token_ids[:tokens]
        ids[:] = staging.token_ids[:tokens]
        decode = ids[: step.num_decode_rows]
        np.copyto(decode, self._last_token[slots[: step.num_decode_rows]], where=decode == FUTURE_TOKEN)
        attention.plan(*self._metadata.of_groups)
        chunks = pooled_chunks(step)
        types = token_types(chunks, tokens) if chunks and model.config.embedding.num_types > 1 else None
        positions_of_tokens = torch.from_numpy(metadata.positions)
        if self._adapted is not None:
            self._adapted.rows.use(np.repeat(self._tables.adapter[slots], staging.row_len[:rows]))
        hidden = everything = model.forward(self._token_tensor[:tokens], positions_of_tokens, attention, types)
        aux: list[Tensor] = getattr(model, "aux", [])
        output = ForwardOutput(chosen, step.step)
        if extras.count and rows > step.num_decode_rows:
            output.prompt_logprobs = extras.prompt_logprobs(step, hidden, model.logits, self._use_slots)
        if chunks:
            vectors = self._pooler.run(chunks, hidden, model)
            output.pooled = [vector.numpy() for vector in vectors]
            ends = [row.row for row in step.pooled if row.ends]
            output.broken = [row for row, one in zip(ends, output.pooled, strict=True) if np.isnan(one).any()]

        places = sampled_positions(step)
        if len(places) == 0:
            if speculator is not None:
                self._forget_adapters()
                speculator.finish(step, places, chosen[:0], None, output, everything, aux)
            return output
        if len(places) != tokens:
            hidden = hidden[torch.from_numpy(places.tokens)]
        sampling_slots = slots[places.rows]
        # The new token's index in its sequence is the length of what is computed before it.
        positions = np.asarray(metadata.positions[places.tokens] + 1, np.int32)
        if self._adapted is not None:
            self._adapted.rows.use(self._tables.adapter[sampling_slots])
        logits, params = model.logits(hidden), self._tables.sampling[sampling_slots]
        sane = torch.isfinite(logits.amax(-1))
        all_sane = bool(sane.all())
        if not all_sane:
            logits = logits.masked_fill(~sane[:, None], 0.0)
        draw = None
        if extras.count:
            logits = logits.contiguous()
            masked = step.masks is not None
            draw = extras.begin(logits, sampling_slots, positions, params, masked=masked, before=places.before)
            if draw is not None:
                logits = draw.logits
        if step.masks is not None:
            # Only here: the forward has not waited for the host's grammars.
            step.masks.wait()
            counting, constrained = map(torch.from_numpy, mask_places(step.masks.rows, places))
            allowed = torch.from_numpy(step.masks.allowed(logits.shape[1]))[counting]
            logits[constrained] = logits[constrained].masked_fill_(~allowed, -torch.inf)
        drawn = sample(logits, params, positions)
        taken = None if speculator is None else speculator.count(step, places, drawn)
        if not all_sane:
            insane = ~sane.numpy() if taken is None else ~sane.numpy() & taken
            output.broken += np.unique(places.rows[insane]).tolist()
        if draw is not None:
            output.logprobs = extras.end(draw, drawn, places.rows, taken)
        if taken is None:
            self._last_token[sampling_slots] = drawn
            chosen[places.rows] = drawn
        else:
            if states is not None:
                self._settle_states(states, np.bincount(places.rows[taken], minlength=rows).astype(np.int32))
            # In order, so that the last of a row stays.
            for row, token in zip(places.rows[taken].tolist(), drawn[taken].tolist(), strict=True):
                chosen[row] = self._last_token[slots[row]] = token
        if speculator is not None:
            self._forget_adapters()
            speculator.finish(step, places, drawn, taken, output, everything, aux)
        return output
