"""Rank 0: an executor whose model and KV memory are those of all ranks.

Each step's forward is told to the others when it begins here, with its tokens and positions known: they need no slots,
no sampling and no relay. Sampling, penalties, grammars and vectors are this rank's, of logits that all have computed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import StartupError
from engine.distributed import messages
from engine.distributed.adapters import LeadingAdapters
from engine.distributed.members import Members
from engine.distributed.ring import Ring, adapters_layout
from engine.distributed.shared import make_file, seen
from engine.executor.cpu import CPUExecutor
from engine.executor.host_pages import HostPages
from engine.executor.host_pages import Rows as PageRows
from engine.executor.reading import Adapter
from engine.executor.tables import PagedMetadata
from engine.forward import PARTS, BoolArray, DeviceLostError, ForwardInput, ForwardOutput, Int32Array, Limits
from engine.models.parts.decoder import CausalLM, Decoder
from engine.ops.attention.base import AttentionBackend
from engine.ops.lora import Rows
from engine.ops.parallel import ParallelGroup
from engine.ops.ranks import Layout, Ranks, RanksEndedError
from engine.ops.recording import Recordings
from engine.ops.state import States
from engine.speculation.base import Proposer
from engine.speculation.paged import LateProposer

logger = logging.getLogger("oneloop.ranks")

Read = Callable[[Path | None, ParallelGroup], CausalLM]


class Leader:
    """The group, seen from its rank 0. job: what every rank is told at its start, but for its number and its memory.

    read: this rank's part of a model. shares_pages: this rank is to see the pages and states of all.
    """

    def __init__(self, layout: Layout, job: dict[str, Any], read: Read, *, shares_pages: bool = False) -> None:
        self._read = read
        self._expert_parallel: bool = job["expert_parallel"]
        self._on_lost: Callable[[], None] | None = None
        self._closed = False
        # Whose rows are computed now, where adapters are served.
        self._whose: Rows | None = None
        beside = adapters_layout(layout.size)
        file, other = Ranks.make_file(layout), Ranks.make_file(beside)
        self._pages = make_file(layout.size) if shares_pages else None
        try:
            self.ranks = Ranks(file, layout, 0)
            self.beside = Ring(Ranks(other, beside, 0))
            sizes = {"size": layout.size, "message": layout.message, "logits": layout.logits, "slot": layout.slot}
            job = {**job, "file": file, "layout": sizes, "beside": other, "pages": self._pages}
            jobs = [{**job, "rank": rank} for rank in range(1, layout.size)]
            files = (file, other) if self._pages is None else (file, other, self._pages)
            self.members = Members(jobs, files, self._gone)
        except BaseException:
            if self._pages is not None:
                os.close(self._pages)
            raise
        finally:
            for each in (file, other):
                os.close(each)  # mapped by now, and inherited

    def first(self) -> RankedModel:
        """Read the model in all ranks, as they do since they began. Raises StartupError."""
        model = self._read(None, self._group())
        self._gather()
        return RankedModel(model, self)

    def load(self, directory: Path | None) -> RankedModel:
        """Read other weights in all ranks; where one cannot, none has them. Raises StartupError."""
        self._post(do="read", directory=None if directory is None else str(directory))
        model, failure = None, None
        try:
            model = self._read(directory, self._group())
        except StartupError as error:
            failure = error
        except BaseException:
            self.fail()
            raise
        try:
            self._gather()
        except StartupError as error:
            failure = failure or error
        self.command(do="keep", whole=failure is None)
        if failure is not None:
            raise failure
        assert model is not None
        return RankedModel(model, self)

    def _group(self) -> ParallelGroup:
        return ParallelGroup(self.ranks, self.ask, expert_parallel=self._expert_parallel)

    def begin(self, **given: Any) -> dict[str, list[PageRows]] | None:
        """Have the other ranks take memory for pages and states; what of both this one sees, of all of them in their
        order. Raises StartupError."""
        found = self.command(do="begin", **given)
        if self._pages is None:
            return None
        kinds: dict[str, list[PageRows]] = {"pages": [], "states": []}
        try:
            for of_rank in found:
                rows = iter(seen(self._pages, [place for kind in kinds for place in of_rank[kind]]))
                for kind, all_of_it in kinds.items():
                    all_of_it += [next(rows) for _ in of_rank[kind]]
        except OSError as error:
            raise StartupError(f"no memory of other ranks can be seen: {error}") from None
        return kinds

    def command(self, **given: Any) -> list[Any]:
        """Have the other ranks do something, and wait until it is done: what each has found. Raises StartupError where
        one cannot."""
        self._post(**given)
        return self._gather()

    def _post(self, **given: Any) -> None:
        messages.write_text(self.ranks.next_message(), messages.COMMAND, given)
        self.ranks.post()

    def _gather(self) -> list[Any]:
        """The others' answers to what was asked last."""
        self.ranks.arrive()
        try:
            self.ranks.meet()
        except RanksEndedError:
            raise StartupError(self.why()) from None
        answers = [messages.read_text(self.ranks.section(rank)) for rank in range(1, self.ranks.size)]
        failure = next((answer["error"] for answer in answers if answer["error"] is not None), None)
        if failure is not None:
            raise StartupError(failure)
        return [answer["found"] for answer in answers]

    def use(self, model: RankedModel) -> None:
        """The model that computes from now on."""
        adapted = model.own.adapted
        self._whose = None if adapted is None else adapted.rows

    def _adapters(self, count: int) -> Int32Array | None:
        """Of so many rows."""
        if self._whose is None or not self._whose.any:
            return None
        ids = self._whose.ids
        return np.full(count, ids, np.int32) if isinstance(ids, int) else ids

    def ask(self, hidden: Tensor) -> None:
        """The other ranks are to compute their part of logits of these [R, hidden]."""
        bytes_of, count = np.asarray(hidden.view(torch.uint8).reshape(-1).numpy()), len(hidden)
        messages.write_logits(self.ranks.next_message(), count, bytes_of, self._adapters(count))
        self.ranks.post()

    def tell_forward(self, token_ids: Tensor, groups: tuple[PagedMetadata, ...], types: Tensor | None) -> None:
        """The other ranks are to run this."""
        told = None if types is None else types.numpy()
        adapters = self._adapters(len(token_ids))
        messages.write_forward(self.ranks.next_message(), token_ids.numpy(), groups, told, adapters)
        self.ranks.post()

    def tell_states(self, step: ForwardInput, held: BoolArray | None = None, *, moved: bool = False) -> None:
        """The other ranks are to do what States.begin does with this step; see messages.write_states."""
        messages.write_states(self.ranks.next_message(), step, held, moved=moved)
        self.ranks.post()
        if moved or step.num_tokens == 0:
            # No forward follows, or comes behind two of these, in whose sums all meet: the next message but one would
            # be written where this is read.
            self.meet()

    def tell_settled(self, counts: Int32Array) -> None:
        """The other ranks are to do what States.settle does."""
        messages.write_settled(self.ranks.next_message(), counts)
        self.ranks.post()

    def meet(self) -> None:
        """All ranks have read what was told."""
        self.ranks.arrive()
        self.ranks.meet()

    def tell_embedded(self, token_ids: Tensor) -> None:
        """The other ranks are to give their rows of the embedding."""
        messages.write_ids(self.ranks.next_message(), token_ids.to(torch.int32).numpy())
        self.ranks.post()

    @contextlib.contextmanager
    def lost(self) -> Iterator[None]:
        """Ranks that are not at the same place can never meet again."""
        try:
            yield
        except RanksEndedError:
            raise DeviceLostError(self.why()) from None
        except StartupError as error:
            # What another could not do; or why there is none.
            self.fail()
            raise DeviceLostError(str(error)) from None
        except BaseException as error:
            self.fail()
            logger.exception("rank 0 failed amid a step")
            raise DeviceLostError(f"rank 0 failed amid a step: {type(error).__name__}: {error}") from error

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Call it, on any thread, when a rank is gone."""
        self._on_lost = on_lost
        if self.members.gone is not None:
            on_lost()

    def _gone(self, what: str) -> None:
        logger.error("%s", what)
        self._end()
        if self._on_lost is not None:
            self._on_lost()

    def why(self) -> str:
        """What became of the group."""
        return self.members.gone or "the ranks have ended"

    def fail(self) -> None:
        """This rank cannot go on, so none can."""
        self._end()

    def say_beside(self, value: Any) -> list[Any]:
        """See Reading."""
        try:
            return self.beside.exchange(value)
        except RanksEndedError:
            raise StartupError(self.why()) from None

    def _end(self) -> None:
        self.ranks.end()
        self.beside.end()

    def close(self) -> None:
        """End the other ranks. Idempotent."""
        if not self._closed:
            self._closed = True
            self._end()
            self.members.close()
            if self._pages is not None:
                os.close(self._pages)


class RankedModel:
    """A CausalLM of which this rank has a part, and the others theirs. All but the forward and logits is `own`'s: norms
    and heads for vectors are the same in every rank."""

    def __init__(self, own: CausalLM, leader: Leader) -> None:
        self.own = own
        self._leader = leader
        self.config = own.config
        self.attention_spec = own.attention_spec
        self.linears, self.mixtures = own.linears, own.mixtures
        self.adapted = own.adapted

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, types: Tensor | None = None
    ) -> Tensor:
        """See CausalLM."""
        assert isinstance(attention, RankedAttention)
        with self._leader.lost():
            self._leader.tell_forward(token_ids, attention.groups, types)
            return self.own.forward(token_ids, positions, attention.own, types)

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """See Decoder: the stream of residuals is the same in every rank, so this one's will do."""
        return self._decoder.aux_layers

    @aux_layers.setter
    def aux_layers(self, layers: tuple[int, ...]) -> None:
        self._decoder.aux_layers = layers

    @property
    def aux(self) -> list[Tensor]:
        return getattr(self.own, "aux", [])

    def embedded(self, token_ids: Tensor) -> Tensor:
        """See Decoder: for what drafts with the model's embedding."""
        with self._leader.lost():
            self._leader.tell_embedded(token_ids)
            return self._decoder.embedded(token_ids)

    @property
    def _decoder(self) -> Decoder:
        assert isinstance(self.own, Decoder)
        return self.own

    def logits(self, hidden: Tensor) -> Tensor:
        """See CausalLM."""
        with self._leader.lost():
            return self.own.logits(hidden)

    def classify(self, hidden: Tensor) -> Tensor:
        """See CausalLM."""
        return self.own.classify(hidden)

    def project(self, vectors: Tensor) -> Tensor:
        """See CausalLM."""
        return self.own.project(vectors)


class RankedAttention:
    """An AttentionBackend over this rank's part of the KV memory; what it plans is told to the others."""

    def __init__(self, own: AttentionBackend) -> None:
        self.own = own
        self.groups: tuple[PagedMetadata, ...] = ()

    @property
    def states(self) -> States | None:
        return self.own.states

    @states.setter
    def states(self, states: States | None) -> None:
        self.own.states = states

    @property
    def recordings(self) -> Recordings | None:
        return self.own.recordings

    @recordings.setter
    def recordings(self, recordings: Recordings | None) -> None:
        self.own.recordings = recordings

    @property
    def k_pools(self) -> list[Tensor]:
        return list(getattr(self.own, "k_pools", ()))

    @property
    def v_pools(self) -> list[Tensor]:
        return list(getattr(self.own, "v_pools", ()))

    def release(self) -> None:
        """See AttentionBackend."""
        self.own.release()

    def allocate(self) -> None:
        """See AttentionBackend."""
        self.own.allocate()

    def plan(self, *groups: PagedMetadata) -> None:
        """See AttentionBackend."""
        self.groups = groups
        self.own.plan(*groups)

    def forward(self, layer: int, *given: Any, **options: Any) -> Tensor:
        """See AttentionBackend."""
        return self.own.forward(layer, *given, **options)


class RankedExecutor(CPUExecutor):
    """A CPUExecutor whose steps run in all ranks. others: of pages and states what the other ranks have, where somebody
    is to carry them elsewhere."""

    def __init__(
        self,
        model: RankedModel,
        limits: Limits,
        *,
        attention: AttentionBackend,
        dtype: torch.dtype,
        leader: Leader,
        proposer: Proposer | None = None,
        late: LateProposer | None = None,
        max_lora_rank: int = 64,
        others: dict[str, list[PageRows]] | None = None,
    ) -> None:
        # What drafts does so in this rank: the others see rows of several tokens.
        ranked = RankedAttention(attention)
        load = leader.load
        options: dict[str, Any] = {"load": load, "proposer": proposer, "late": late, "max_lora_rank": max_lora_rank}
        super().__init__(model, limits, attention=ranked, dtype=dtype, **options)
        self._leader = leader
        self._others = others
        leader.use(model)
        self._shared = LeadingAdapters(leader.beside, leader.say_beside)

    def _take(self, model: Any) -> None:
        """See CPUExecutor."""
        super()._take(model)
        self._leader.use(model)

    def read_adapter(self, path: Path) -> Adapter:
        """See Executor."""
        return self._shared.read(path, lambda reading: self._read_adapter(path, reading.add_up))

    def drop_adapters(self, indices: Sequence[int]) -> None:
        """See Executor."""
        super().drop_adapters(indices)
        loads = [[index, 0] for index in indices]
        with contextlib.suppress(StartupError):  # the group is over, which its watch says
            self._leader.command(do="adapters", loads=loads, gone=self._shared.take_gone())

    def _run(self, step: ForwardInput) -> ForwardOutput:
        """See CPUExecutor."""
        if step.adapter_loads:
            loads = [[index, self._shared.of(weights)] for index, weights in step.adapter_loads]
            with self._leader.lost():
                self._leader.command(do="adapters", loads=loads, gone=self._shared.take_gone())
        return super()._run(step)

    def _move_states(self, states: States, step: ForwardInput) -> None:
        """See CPUExecutor."""
        with self._leader.lost():
            self._leader.tell_states(step)
            super()._move_states(states, step)

    def _run_states(self, states: States, step: ForwardInput) -> None:
        """See CPUExecutor. Where rows speculate the others know no more than how many tokens they might have had."""
        super()._run_states(states, step)
        if step.num_speculating_rows:
            with self._leader.lost():
                self._leader.tell_states(step, states.plan.held, moved=True)

    def _settle_states(self, states: States, counts: Int32Array) -> None:
        """See CPUExecutor."""
        if states.plan.held is None:
            return
        with self._leader.lost():
            self._leader.tell_settled(counts)
            super()._settle_states(states, counts)
            self._leader.meet()

    @property
    def page_bytes(self) -> int:
        """What a page takes in all layers of all ranks."""
        return super().page_bytes * self._leader.ranks.size

    @property
    def rank_pids(self) -> list[int]:
        """Of the other ranks' processes."""
        return self._leader.members.pids

    @property
    def ranks(self) -> Ranks:
        """This rank's end of the group."""
        return self._leader.ranks

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Call it, on any thread, when the device is lost, also while nothing runs."""
        self._leader.watch(on_lost)

    def page_memory(self) -> HostPages:
        """See Executor."""
        return self._whole("pages", *self._own_pages())

    def state_memory(self) -> HostPages | None:
        """See Executor."""
        own = self._own_states()
        return None if own is None else self._whole("states", *own)

    def _whole(self, kind: str, parts: list[PageRows], layout: str) -> HostPages:
        assert self._others is not None, "the ranks' memory is their own"
        return HostPages([*parts, *self._others[kind]], f"{self._leader.ranks.size} ranks {layout}")

    def sleep(self, level: int, parts: Collection[str] = PARTS) -> None:
        """See Executor."""
        super().sleep(level, parts)
        self._leader.command(do="sleep", level=level, parts=list(parts))

    def wake_up(self, directory: Path | None = None, parts: Collection[str] = PARTS) -> None:
        """See Executor."""
        super().wake_up(directory, parts)
        if "kv_cache" in parts:
            self._leader.command(do="wake")

    def close(self) -> None:
        """See Executor."""
        super().close()
        self._leader.close()
