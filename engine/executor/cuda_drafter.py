"""A draft model or a head on the device: its drafts go from its launches into the step's, and the host sees them when
the step has ended, or while it runs where a grammar needs them.

It keeps keys and values of its own in the pages of the target's sequences. Before a step it reads, by the shapes of
decoding, the tokens that it has not read yet (every token a row), then goes on from the last of each sequence, one
launch a draft; both are graphs. Prompts are read chunk by chunk behind the target's. What it has read is noted as it
is launched: a step that fails forgets it. Where several ranks compute together each has all of it, rank 0 says what is
read, and all take rank 0's drafts. Owned by the CUDA executor, loop thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.executor.cuda_buffers import CudaHandle, Side, widened
from engine.executor.cuda_device import DeviceLayer
from engine.executor.cuda_graph import GraphCache, GraphKey
from engine.executor.cuda_group import RankGroup
from engine.executor.tables import SlotTables
from engine.forward import NULL_SLOT, ForwardInput, Int32Array, Limits
from engine.ops.attention.device import DecodeStep, DeviceAttention, MixedStep, Ragged, decode_inputs
from engine.ops.sampling.device import draw as draw_tokens
from engine.speculation.base import Text
from engine.speculation.nets import Net

# Tokens of a text that is not drafted for are read when there are so many: each launch reads all weights.
BEHIND = 8
# Rows of a reading: slot, index of the token, token, drafts wanted behind it; then slots that go on, and of the step's
# rows with drafts which they are, and where their tokens lie.
_SLOT, _INDEX, _TOKEN, _WANTED, _CHAIN, _ROW, _PLACE = range(7)


@dataclass(slots=True)
class Drafts:
    """What drafts on a device, before there is a drafter. attention: as many pages as the target has; by_torch: makes
    another, where this one would need a plan for each draft. See DeviceDrafter; probabilistic: drafts are drawn."""

    net: Net
    attention: DeviceAttention
    by_torch: Callable[[], DeviceAttention]
    group: int
    context: int
    probabilistic: bool = False


@dataclass(slots=True)
class _Slot:
    """done: tokens of the text that are read, -1 before it is known from where on. fed: of the drafts behind the first
    `at` tokens those that were read, too."""

    text: Text
    done: int = -1
    at: int = 0
    fed: int = 0


@dataclass(slots=True)
class Reading:
    """What is to be launched before a step. rows: (slot, index, token, drafts wanted). made: by slot. longest: tokens
    of the longest text, drafts included. spots: rows of the step on the device that are drafts of slots of `made`, and
    which draft of which slot each is."""

    rows: list[tuple[int, int, int, int]] = field(default_factory=list)
    made: dict[int, int] = field(default_factory=dict)
    longest: int = 1
    spots: list[tuple[int, int, int]] = field(default_factory=list)

    def words(self) -> Int32Array:
        """All of it, for another rank."""
        parts = self.rows, list(self.made.items()), self.spots
        head = np.array([self.longest, *map(len, parts)], np.int32)
        return np.concatenate([head, *(np.array(part, np.int32).reshape(-1) for part in parts)])

    @classmethod
    def of_words(cls, words: Int32Array) -> Reading:
        """The same."""
        longest, *counts = words[:4].tolist()
        cuts = np.cumsum([4, *(count * width for count, width in zip(counts, (4, 2, 3), strict=True))]).tolist()
        rows, made, spots = (
            words[begin:end].reshape(-1, width).tolist()
            for begin, end, width in zip(cuts[:-1], cuts[1:], (4, 2, 3), strict=True)
        )
        return cls([(a, b, c, d) for a, b, c, d in rows], dict(made), longest, [(a, b, c) for a, b, c in spots])


def _around(limits: Limits) -> int:
    """Positions of a slot whose hidden states are kept: what is not read yet, and what the steps in flight add."""
    return 2 * BEHIND + 4 * (1 + limits.max_draft_tokens)


class DeviceDrafter:
    """A LateProposer. drafts.group: of the target's memory groups, whose pages hold its keys and values, too; context:
    tokens that the net can read. tables: the device's page tables [groups, slots, pages]; sampling: its parameters by
    slot. mode: of graphs. filters: which slots draw with one. ranks: where this is one of several."""

    on_device = True

    def __init__(
        self,
        drafts: Drafts,
        limits: Limits,
        layer: DeviceLayer,
        *,
        tables: Tensor,
        sampling: Tensor,
        filters: npt.NDArray[np.bool_],
        mode: str,
        ranks: RankGroup | None = None,
    ) -> None:
        self.net = net = drafts.net
        self.attention = drafts.attention
        self._limits, self._layer = limits, layer
        self._page_tables, self._sampling = tables, sampling
        self._group, self._context = drafts.group, drafts.context
        # Of drafts that are drawn.
        self._filters = filters if drafts.probabilistic else None
        # Where a head's K and V of a token are: one position before.
        self._shift = int(net.width > 0)
        self._most = max(1, limits.max_draft_tokens)
        wide = widened(limits)
        self._rows = wide.max_num_seqs
        self.graphs = GraphCache(layer, mode, self._rows, limits.max_pages_per_seq)
        self._ranks = ranks
        if ranks is not None:
            # What a head asks its target for is a sum of all ranks.
            self.graphs.agree = ranks.agreed
        self._slots: dict[int, _Slot] = {}
        # Of slots whose prompts are read, and up to which token.
        self._reads: npt.NDArray[np.bool_] = np.zeros(limits.num_slots, np.bool_)
        self._read_to: Int32Array = np.full(limits.num_slots, -1, np.int32)
        # Of slots that are another's already than who is known here.
        self._passed_on: npt.NDArray[np.bool_] = np.zeros(limits.num_slots, np.bool_)
        # Everybody's prompts are: a trial of the largest step.
        self.reads_all = False
        self._reading = Reading()
        # Each array on a multiple of 16 bytes: kernels are compiled anew for pointers that are not so aligned.
        self._stride = -(-self._rows // 4) * 4
        words = self._stride * (_PLACE + 1)
        self._host = [layer.pinned(4 * words).view(torch.int32) for _ in range(2)]
        self._image = [layer.zeros((words,), torch.int32) for _ in range(2)]
        slots = limits.num_slots
        # By slot: its drafts, how many there are and shall be, and the index of the token before them.
        self._drafts = layer.zeros((slots * self._most,), torch.int32)
        self._count, self._wanted, self._index, self._drawn = (layer.zeros((slots,), torch.int32) for _ in range(4))
        # Hidden states: what drafts go on from, and the target's by position, around.
        self._around = _around(limits)
        dtype = self.attention.dtype
        self._state = layer.zeros((slots, net.width), dtype)
        self._ring = layer.zeros((slots * self._around, net.width), dtype)

    @staticmethod
    def num_bytes(net: Net, limits: Limits, dtype: torch.dtype) -> int:
        """What hidden states take beside the cache, by slot."""
        return limits.num_slots * (1 + _around(limits)) * net.width * dtype.itemsize

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """See LateProposer."""
        return self.net.aux_layers

    @property
    def reads_hidden(self) -> bool:
        """Whether steps must keep their hidden states for it."""
        return self.net.width > 0

    # ---- what a proposer is told

    def bind(self, tables: SlotTables) -> None:
        """See LateProposer."""

    def start(self, slot: int, text: Text) -> None:
        """See Proposer."""
        self._slots[slot] = _Slot(text)
        self._passed_on[slot] = False

    def stop(self, slot: int) -> None:
        """See Proposer."""
        self._slots.pop(slot, None)

    def advance(self, slot: int, kept: int) -> None:
        """See Proposer."""
        state = self._slots[slot]
        if kept < state.done:
            state.done, state.fed = kept, 0

    def use(self, target: Any) -> None:
        """See LateProposer."""
        self.net.use(target)

    @property
    def pools(self) -> list[Tensor]:
        """See LateProposer."""
        return list(self.attention.buffers)

    def release(self) -> None:
        """See LateProposer."""
        self.attention.release()

    def allocate(self) -> None:
        """See LateProposer."""
        self.attention.allocate()

    def cleanse(self, tables: Tensor) -> None:
        """See DeviceAttention; of pages [groups, P] of the target's."""
        own = tables[self._group : self._group + 1]
        self._layer.launch(lambda: self.attention.cleanse(own))

    def follow(self, step: ForwardInput, rows: Sequence[int], hidden: Tensor | None, aux: list[Tensor]) -> None:
        """See LateProposer; of hidden states nothing, which the device keeps."""
        staging = step.staging
        for row in rows:
            slot = int(staging.row_slot[row])
            state = self._slots[slot]
            end = int(staging.row_start[row] + staging.row_len[row])
            if row >= step.num_decode_rows + step.num_speculating_rows:
                state.done = min(end, self._context)
            elif state.fed:  # drafts that came true
                state.done = state.at + min(state.fed, len(state.text.tokens) - state.at - 1)
            state.fed = 0

    def lose(self, slots: Int32Array) -> None:
        """A step with these slots has failed: what it was to read may not be there."""
        self._read_to[slots] = -1
        for slot in slots.tolist():
            if (state := self._slots.get(slot)) is not None:
                state.done, state.fed = -1, 0

    def has_drafts(self, slots: Int32Array) -> npt.NDArray[np.bool_]:
        """bool [n]: for which it would have some."""
        found = (self._slots.get(slot) for slot in slots.tolist())
        return np.array([s is not None and s.done >= 0 and len(s.text.tokens) < self._context for s in found], np.bool_)

    # ---- before a step

    def begin(self, step: ForwardInput, told: Sequence[int]) -> None:
        """A step is laid out. told: slots that speculate from it on."""
        fresh = step.staging.sampling_slot[: step.num_sampling_diffs]
        self._reads[fresh], self._read_to[fresh], self._passed_on[fresh] = False, -1, True
        self._reads[np.array(told, np.intp)] = True
        self._reading = Reading()

    def propose(self, slots: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        """See Proposer: of each draft that there will be, some number."""
        reading, found = self._reading, []
        for slot, count in zip(slots, most, strict=True):
            state = self._slots.get(slot)
            count = 0 if state is None else min(count, self._most, self._context - len(state.text.tokens))
            if state is None or count <= 0 or not self._read(slot, state, wanted=count):
                found.append([])
                continue
            state.at, state.fed = state.done, 0 if self._shift else count - 1
            reading.made[slot] = count
            reading.longest = max(reading.longest, state.done + count)
            found.append([0] * count)
        return found

    def _read(self, slot: int, state: _Slot, wanted: int = 0) -> bool:
        """Put what is left of a text into the reading, the last token once more where drafts are wanted. False: not all
        of it has room."""
        tokens, rows = state.text.tokens, self._reading.rows
        end = min(len(tokens), self._context)
        if state.done < 0:
            return False
        begin = min(state.done, end - 1) if wanted else state.done
        if self._shift:
            # What went round since is lost, and is guessed without.
            begin = max(begin, 1, end + 2 * (1 + self._most) - self._around)
        to = min(end, begin + self._rows - len(rows))
        rows += [(slot, index, tokens[index], 0) for index in range(begin, to)]
        state.done = max(state.done, to)
        self._reading.longest = max(self._reading.longest, to)
        if to < end or begin >= end:
            return False
        if wanted:
            rows[-1] = (*rows[-1][:3], wanted)
        return True

    def lay_out(self, step: ForwardInput, given: ForwardInput) -> Reading | None:
        """What is launched before a step, once its rows are known. step: as it runs; given: of the scheduler."""
        reading = self._reading
        for slot in given.staging.row_slot[: given.num_decode_rows + given.num_speculating_rows].tolist():
            state, has_room = self._slots.get(slot), len(reading.rows) < self._rows
            if state is None or self._passed_on[slot] or slot in reading.made or state.done < 0 or not has_room:
                continue
            if self._read_to[slot] > state.done:
                continue  # by the step in flight, whose prompt it is; of its hidden states but the last one is kept
            if len(state.text.tokens) - state.done >= BEHIND:
                self._read(slot, state)
        if not reading.rows:
            return None
        staging, first = step.staging, step.num_decode_rows
        for row in range(first, first + step.num_speculating_rows):
            slot, at = int(staging.row_slot[row]), int(staging.qo_indptr[row])
            if slot in reading.made:
                reading.spots += [(at + 1 + nth, slot, nth) for nth in range(int(staging.row_len[row]) - 1)]
        return reading

    # ---- launches, on the compute stream

    def launch(self, reading: Reading, side: Side, send: Callable[[int, Tensor, Tensor, int], None]) -> Tensor | None:
        """Read and draft, and put the drafts where the step has its tokens. send: (parity, to, source, words). Returns
        them, int32 [spots]; None where there are none."""
        parity = side.parity
        host: Int32Array = self._host[parity].numpy()
        each = [host[start : start + self._stride] for start in range(0, len(host), self._stride)]
        rows = np.array(reading.rows, np.int32)
        count = len(rows)
        pages = -(-reading.longest // self._limits.page_size)
        kind = "read"
        if reading.made:
            kind = "greedy"
            if self._filters is not None:
                kind = "filtered" if self._filters[list(reading.made)].any() else "drawn"
        key = self.graphs.key(count, pages, parity, kind)
        for number, fill in ((_SLOT, NULL_SLOT), (_INDEX, self._shift), (_TOKEN, 0), (_WANTED, 0)):
            each[number][:count] = rows[:, number]
            each[number][count : key.size] = fill
        # Those that want most first, so that the others end behind them.
        wanted = sorted(reading.made.items(), key=lambda item: -item[1])
        each[_CHAIN][:] = NULL_SLOT
        each[_CHAIN][: len(wanted)] = [slot for slot, _ in wanted]
        for place, (row, slot, nth) in enumerate(reading.spots):
            each[_ROW][place], each[_PLACE][place] = row, slot * self._most + nth
        send(parity, self._image[parity], self._host[parity], len(host))
        self._launch(key)
        for nth in range(1, wanted[0][1] if wanted else 0):
            going_on = sum(most > nth for _, most in wanted)
            self._launch(self.graphs.key(going_on, pages, parity, f"{kind}, next"))
        if not reading.spots:
            return None
        number = len(reading.spots)
        at, where = (self._part(parity, each, number) for each in (_ROW, _PLACE))
        found = self._layer.zeros((number,), torch.int32)

        def fill_in() -> None:
            drafts = self._drafts.index_select(0, where.long())
            # Whatever another rank's kernels made of theirs.
            found.copy_(drafts if self._ranks is None else self._ranks.taken_of_first(drafts))
            side.token_ids.index_copy_(0, at.long(), found)

        self._layer.launch(fill_in)
        return found

    def _part(self, parity: int, number: int, length: int) -> Tensor:
        start = number * self._stride
        return self._image[parity][start : start + length]

    def _launch(self, key: GraphKey) -> None:
        def work() -> None:
            with torch.inference_mode():
                self._run(key)

        self.attention.prepare_decode(key.size, key.width)
        graph = self.graphs.get(key)
        if graph is None and self.graphs.note_use(key):
            graph = self.graphs.capture(key, work)
        if graph is None:
            self._layer.launch(work)
        else:
            self.graphs.replay(graph)

    def settle(self, by_torch: Callable[[], DeviceAttention]) -> None:
        """Find out which kernels there are. Blocks."""
        self.attention.settle(self._layer.synchronize_all)
        if self.attention.decode_needs_plan(1):
            # One plan a step is all that a wrapper has memory for.
            self.attention.release()
            self.attention = by_torch()
            self.attention.settle(self._layer.synchronize_all)

    def describe(self) -> str:
        """One line for the start-up table."""
        at_once = f"up to {self._most} a row, seen by the host only where a grammar needs them"
        return f"{at_once}; attention {self.attention.describe()}"

    def warm_up(self) -> None:
        """Run all that is launched once, on padding: its kernels are there before a client waits for them."""
        kinds = ["greedy"] if self._filters is None else ["drawn", "filtered"]
        for kind in ("read", *kinds, *(f"{each}, next" for each in kinds)):
            key = self.graphs.key(1, 1, 0, kind)
            self._layer.launch(self._image[0].zero_)
            index = self._part(0, _INDEX, key.size)
            self._layer.launch(lambda index=index: index.fill_(self._shift))
            self.attention.prepare_decode(key.size, key.width)
            self._layer.launch(lambda key=key: self._run(key))

    def _run(self, key: GraphKey) -> None:
        """The device's side of a launch. Shapes depend on the key alone."""
        size, _, parity, kind, _ = key
        if kind.endswith(", next"):
            self._go_on(key, self._part(parity, _CHAIN, size), kind.removesuffix(", next"))
            return
        slots, index, tokens, wanted = (self._part(parity, each, size) for each in range(4))
        positions = index - self._shift
        hidden = None
        if self.net.width:
            hidden = self._ring.index_select(0, slots.long() * self._around + positions.long() % self._around)
        out = self._forward(key, slots, positions, tokens, hidden)
        if kind == "read":
            return
        ends = torch.where(wanted > 0, slots, NULL_SLOT).long()
        chosen = self._choose(out, ends, index + 1, kind)
        self._drafts.index_copy_(0, ends * self._most, chosen)
        self._count.index_copy_(0, ends, wanted.clamp(max=1))
        self._wanted.index_copy_(0, ends, wanted)
        self._index.index_copy_(0, ends, index)
        if self.net.width:
            self._state.index_copy_(0, ends, out)

    def _go_on(self, key: GraphKey, names: Tensor, kind: str) -> None:
        """One draft more of each slot that wants one; the others become nobody's."""
        wide = names.long()
        count = self._count.index_select(0, wide)
        live = count < self._wanted.index_select(0, wide)
        slots = torch.where(live, names, NULL_SLOT)
        wide = slots.long()
        count = torch.where(live, count, 1)
        index = torch.where(live, self._index.index_select(0, wide) + count, self._shift)
        place = torch.where(live, wide * self._most + count, 0)
        tokens = self._drafts.index_select(0, (place - 1).clamp(min=0))
        hidden = self._state.index_select(0, wide) if self.net.width else None
        out = self._forward(key, slots, index - self._shift, tokens, hidden)
        self._drafts.index_copy_(0, place, self._choose(out, wide, index + 1, kind))
        self._count.index_copy_(0, wide, torch.where(live, count + 1, 0))
        if self.net.width:
            self._state.index_copy_(0, wide, out)

    def _forward(
        self, key: GraphKey, slots: Tensor, positions: Tensor, tokens: Tensor, hidden: Tensor | None
    ) -> Tensor:
        nothing = slots[:0]
        tokens, kv_len, kv_slots, tables = decode_inputs(
            self._page_tables,
            self._drawn,
            slots,
            positions,
            nothing,
            nothing,
            key.width,
            self._limits.page_size,
            tokens,
        )
        group = slice(self._group, self._group + 1)
        step = DecodeStep(positions, kv_slots[group], tables[group], kv_len, key.side)
        return self.net.forward(tokens, hidden, positions, self.attention.decode(step))

    def _choose(self, out: Tensor, slots: Tensor, index: Tensor, kind: str) -> Tensor:
        """int32 [R], of the target's vocabulary. index: of each in its text."""
        if kind == "greedy":
            return self.net.tokens(out, None)

        def pick(logits: Tensor) -> Tensor:
            drawn = torch.empty_like(index)
            given = logits, self._sampling, slots, index, self._drawn, drawn
            draw_tokens(*given, filtered=kind == "filtered")
            return drawn.clamp(min=0)

        return self.net.tokens(out, pick)

    # ---- prompts, and hidden states

    def keep(self, hidden: Tensor, aux: list[Tensor], slots: Tensor, positions: Tensor) -> None:
        """The target's hidden states [R, H] of these slots' tokens there; inside a launch or a capture."""
        where = slots.long() * self._around + positions.long() % self._around
        self._ring.index_copy_(0, where, self.net.fuse(hidden, aux))

    def keep_step(
        self, hidden: Tensor, aux: list[Tensor], slots: Tensor, starts: Tensor, indptr: Tensor, before: Tensor
    ) -> None:
        """The same of a step's rows, of any length: of their last tokens. before [T, width]: becomes what stands before
        each token: of those that begin a row what was kept."""
        fused, indptr = self.net.fuse(hidden, aux), indptr.long()
        before[1:].copy_(fused[:-1])
        first, last = indptr[:-1], indptr[1:] - 1
        ends = starts + (last - first)
        from_, to = (slots.long() * self._around + each % self._around for each in ((starts - 1).clamp(min=0), ends))
        before.index_copy_(0, first, self._ring.index_select(0, from_))
        self._ring.index_copy_(0, to, fused.index_select(0, last))

    def read_prompts(
        self,
        step: ForwardInput,
        side: Side,
        tables: SlotTables,
        before: Tensor | None,
        handle: CudaHandle,
        send: Callable[[Sequence[npt.NDArray[Any]]], list[Tensor]],
    ) -> None:
        """Behind the target's forward, the rows of a step that are no decode rows. before: see `keep_step`. send:
        brings arrays to the device, on the compute stream."""
        staging, first, page = side.staging, step.num_decode_rows, self._limits.page_size
        slots = staging.row_slot[first : step.num_rows]
        starts = staging.row_start[first : step.num_rows]
        ends = np.minimum(starts + staging.row_len[first : step.num_rows], self._context)
        # Of what comes before a text that was found in the cache no hidden state is known. Tokens that were forced come
        # behind a step that kept one.
        read = self._read_to[slots]
        known = ((read >= 0) & (read <= starts)) | (self._shift == 0)
        begins = np.where(known, starts, starts + 1)
        self._read_to[slots] = ends
        rows = np.flatnonzero((ends > begins) & (self._reads[slots] | self.reads_all))
        if not len(rows):
            return
        slots, begins, ends = slots[rows], begins[rows], ends[rows]
        counts = ends - begins
        row = np.repeat(np.arange(len(rows)), counts)
        indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        index = begins[row] + np.arange(indptr[-1], dtype=np.int32) - indptr[row]
        source = (staging.qo_indptr[first : step.num_rows][rows] - starts[rows])[row] + index
        positions = (index - self._shift).astype(np.int32)
        lengths = (ends - self._shift).astype(np.int32)
        pages = -(-lengths // page)
        table = tables.page_tables[self._group]
        cells = (table[slots[row], positions // page] * page + positions % page).astype(np.int32)
        width = int(pages.max())
        indices = table[slots, :width][np.arange(width) < pages[:, None]].astype(np.int32)
        first_pages = np.concatenate(([0], np.cumsum(pages))).astype(np.int32)
        arrays = [staging.token_ids[source], positions, cells, source.astype(np.int32), indices]
        ids, where, cells_there, from_, indices_there, *on_device = send([*arrays, indptr, first_pages, lengths])
        host = [indptr, first_pages, lengths - (pages - 1) * page, lengths]
        pinned = []
        for array in host:
            pinned.append(self._layer.pinned(4 * len(array)).view(torch.int32))
            pinned[-1].numpy()[:] = array
        handle.keep += pinned
        starts_there, first_there, lengths_there = on_device
        ragged = Ragged([indices_there], *pinned, (starts_there, first_there, lengths_there))
        mixed = MixedStep(where, [cells_there], ragged, ragged, 0, side.parity)
        attention = self.attention.mixed(mixed)

        def work() -> None:
            with torch.inference_mode():
                hidden = None if before is None else before.index_select(0, from_.long())
                self.net.forward(ids, hidden, where, attention)

        self._layer.launch(work)
