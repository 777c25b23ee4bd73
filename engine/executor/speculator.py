"""Speculator: the slots of an executor that speculate: their lengths, texts and drafts, and what came of a step.

At the end of a step all tokens are known, and drafts are made for the next. A step's speculating rows are made from
what is known here; staging has but upper bounds. The CPU's worker runs steps one after another; what a GPU does with
two of them in flight is in cuda_drafts.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from engine.executor.tables import SlotTables
from engine.forward import Accepted, ForwardInput, ForwardOutput, Int32Array, Limits, Staging
from engine.speculation.base import FirstOf, Proposer, Text
from engine.speculation.paged import LateProposer


@dataclass(slots=True)
class Positions:
    """What is sampled in a step. rows, tokens int64 [p]: row of the step and index of the token that each position
    follows; a speculating row has one for each of its tokens. before: of each, the drafts of its row that are not
    known to be right; None where nothing speculates.
    """

    rows: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    before: list[Sequence[int]] | None = None

    def __len__(self) -> int:
        return len(self.rows)


def sampled_positions(step: ForwardInput) -> Positions:
    """Of a step as it runs: a speculating row has as many tokens as row_len says."""
    staging, rows = step.staging, step.num_rows
    ends = staging.qo_indptr[1 : rows + 1].astype(np.int64)
    sampling = np.flatnonzero(staging.row_samples[:rows])
    if not step.num_speculating_rows:
        return Positions(sampling, ends[sampling] - 1)
    first, last = step.num_decode_rows, step.num_decode_rows + step.num_speculating_rows
    counts = np.where((sampling >= first) & (sampling < last), staging.row_len[sampling], 1)
    row = np.repeat(sampling, counts)
    offsets = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    tokens = np.repeat(ends[sampling] - counts, counts) + offsets
    before: list[Sequence[int]] = []
    for begin, end, speculates in zip(
        ends[sampling] - staging.row_len[sampling], ends[sampling], (sampling >= first) & (sampling < last), strict=True
    ):
        drafts = staging.token_ids[begin + 1 : end].tolist() if speculates else []
        before += [drafts[:index] for index in range(len(drafts) + 1)]
    return Positions(row, tokens, before)


def mask_places(rows: Int32Array, positions: Positions) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which masks count, and the positions that they are for. rows: of TokenMasks, where a speculating row stands as
    often as it might have had tokens."""
    first = np.searchsorted(positions.rows, rows)
    nth = np.arange(len(rows)) - np.searchsorted(rows, rows)
    place = first + nth
    inside = place < len(positions)
    inside[inside] = positions.rows[place[inside]] == rows[inside]
    return np.flatnonzero(inside), place[inside]


class Speculator:
    """See the module. Only the thread that runs the steps touches it."""

    def __init__(
        self, limits: Limits, proposer: Proposer | None, late: LateProposer | None, tables: SlotTables
    ) -> None:
        self._limits = limits
        both = [each for each in (proposer, late) if each is not None]
        assert both, "drafts need a proposer"
        self._early = proposer
        self._late = late
        # Then the host sees what it drafts when a step runs or has ended: `as_it_runs` has but their number.
        self._on_device = late is not None and late.on_device
        self._proposer = FirstOf(both)  # to be told
        if late is not None:
            late.bind(tables)
        # Tokens of a slot, in whole pages, that it surely has memory for.
        self._reserved: Int32Array = np.zeros(limits.num_slots, np.int32)
        # Tokens of a slot that have been computed and are right.
        self._length: Int32Array = np.zeros(limits.num_slots, np.int32)
        self._texts: dict[int, Text] = {}
        self._drafts: dict[int, list[int]] = {}
        # Slots for whose text as it is nothing was looked for yet.
        self._unproposed: set[int] = set()
        # Of steps as they run, in turn.
        self._stagings = Staging(limits), Staging(limits)
        # Of the step that runs, as it was given.
        self._given_len: Int32Array = self._stagings[0].row_len

    def apply(self, step: ForwardInput) -> None:
        """Take over whose slots speculate."""
        for slot in step.staging.sampling_slot[: step.num_sampling_diffs].tolist():
            self._drafts.pop(slot, None)
            self._unproposed.discard(slot)
            self._reserved[slot] = 0
            if self._texts.pop(slot, None) is not None:
                self._proposer.stop(slot)
        for told in step.speculations:
            text = Text(told.history.tolist(), told.namespace, told.prediction)
            self._texts[told.slot] = text
            self._proposer.start(told.slot, text)

    def length(self, slots: npt.NDArray[np.integer[Any]]) -> Int32Array:
        """int32 [n]: tokens of these slots that have been computed and are right, as far as steps have ended."""
        lengths: Int32Array = self._length[slots]
        return lengths

    def drop(self, slots: Collection[int]) -> None:
        """The drafts of these slots are in a step, and in no other."""
        for slot in slots:
            self._drafts[slot] = []

    def num_drafts(self, slot: int) -> int:
        """That are held for its next row."""
        return len(self._drafts.get(slot, ()))

    def as_it_runs(
        self,
        step: ForwardInput,
        last_token: Int32Array,
        *,
        starts: Int32Array | None = None,
        room: int | None = None,
    ) -> ForwardInput:
        """The step with the starts, lengths and drafts that speculating rows have. Valid until the next but one's.

        starts: int32 [slots], where the caller knows better where a slot's next row begins. room: most drafts of all
        rows; the first rows get theirs first, which are looked for now where `finish` did not.
        """
        given, rows, page = step.staging, step.num_rows, self._limits.page_size
        slots = given.row_slot[:rows]
        held = -(-(given.row_start[:rows] + given.row_len[:rows]) // page) * page
        self._reserved[slots] = np.maximum(self._reserved[slots], held)
        if not step.num_speculating_rows:
            return step
        if room:
            self._draft_open(step)
        self._draft_late(step, room)
        own = self._stagings[step.step & 1]
        self._given_len = given.row_len
        room = step.num_tokens if room is None else room
        first, last = step.num_decode_rows, step.num_decode_rows + step.num_speculating_rows
        for name in ("row_slot", "row_start", "row_len", "row_samples"):
            getattr(own, name)[:rows] = getattr(given, name)[:rows]
        slots = given.row_slot[first:last]
        # Never beyond what is reserved, whatever went wrong before.
        known = self._length if starts is None else starts
        own.row_start[first:last] = np.minimum(known[slots], given.row_start[first:last])
        ids = [given.token_ids[:first]]
        for row, slot in enumerate(slots.tolist(), first):
            drafts = self._drafts.get(slot, [])[: min(int(given.row_len[row]) - 1, room)]
            room -= len(drafts)
            own.row_len[row] = 1 + len(drafts)
            ids.append(np.array([last_token[slot], *drafts], np.int32))
        ids.append(given.token_ids[given.qo_indptr[last] : step.num_tokens])
        own.qo_indptr[0] = 0
        np.cumsum(own.row_len[:rows], out=own.qo_indptr[1 : rows + 1])
        tokens = int(own.qo_indptr[rows])
        np.concatenate(ids, out=own.token_ids[:tokens])
        return dataclasses.replace(step, staging=own, num_tokens=tokens)

    def _draft_open(self, step: ForwardInput) -> None:
        """For rows that may have drafts, where nothing was looked for, and nobody must have seen them before."""
        staging, first = step.staging, step.num_decode_rows
        rows = np.arange(first, first + step.num_speculating_rows)
        rows = rows[staging.row_len[rows] > 1]
        if step.masks is not None:
            rows = rows[~np.isin(rows, step.masks.rows)]
        slots = [slot for slot in staging.row_slot[rows].tolist() if slot in self._unproposed]
        if slots:
            self._draft_early(slots)

    def _draft_early(self, slots: Sequence[int]) -> None:
        self._unproposed.difference_update(slots)
        if self._early is not None:
            most = [self._room(slot) for slot in slots]
            self._drafts.update(zip(slots, self._early.propose(slots, most), strict=True))

    def _draft_late(self, step: ForwardInput, room: int | None) -> None:
        """For rows that have room and no drafts, where nobody must have seen them before: of what is drafted on the
        device the host sees them as the step runs. room: see `as_it_runs`."""
        if self._late is None:
            return
        left = step.num_tokens if room is None else room
        staging, first = step.staging, step.num_decode_rows
        rows = np.arange(first, first + step.num_speculating_rows)
        if step.masks is not None and not self._on_device:
            rows = rows[~np.isin(rows, step.masks.rows)]
        most = {}
        for slot, count in zip(staging.row_slot[rows].tolist(), staging.row_len[rows].tolist(), strict=True):
            held = len(self._drafts.get(slot, ()))
            own = min(held or count - 1, count - 1, left)
            left -= own
            if own > 0 and not held and slot in self._texts:
                most[slot] = own
        if most:
            self._drafts.update(zip(most, self._late.propose(list(most), list(most.values())), strict=True))

    def count(self, step: ForwardInput, positions: Positions, drawn: Int32Array) -> npt.NDArray[np.bool_] | None:
        """bool [positions]: whether a draw became a token: all drafts before it are what was drawn. None: all."""
        if not step.num_speculating_rows:
            return None
        staging = step.staging
        taken = np.ones(len(positions), np.bool_)
        follows = np.flatnonzero(positions.rows[1:] == positions.rows[:-1])
        for index in follows.tolist():
            # Of one row: the token after this one's is a draft.
            right = staging.token_ids[positions.tokens[index + 1]] == drawn[index]
            taken[index + 1] = taken[index] and right
        return taken

    def finish(
        self,
        step: ForwardInput,
        positions: Positions,
        drawn: Int32Array,
        taken: npt.NDArray[np.bool_] | None,
        output: ForwardOutput,
        hidden: Tensor | None = None,
        aux: Sequence[Tensor] = (),
        wanted: Collection[int] | None = None,
    ) -> None:
        """After the step as it ran: remember what came of it, draft for the next, and report.

        wanted: slots to draft for; None for all.
        hidden, aux: see LateProposer.follow; None where there is no late one.
        """
        staging, rows = step.staging, step.num_rows
        first, last = step.num_decode_rows, step.num_decode_rows + step.num_speculating_rows
        slots = staging.row_slot[:rows]
        self._length[slots] = staging.row_start[:rows] + staging.row_len[:rows]
        new: dict[int, list[int]] = {}
        for index, (row, token) in enumerate(zip(positions.rows.tolist(), drawn.tolist(), strict=True)):
            if taken is None or taken[index]:
                new.setdefault(row, []).append(token)
        if first != last:
            counts = np.array([len(new.get(row, ())) for row in range(first, last)], np.int32)
            self._length[slots[first:last]] = staging.row_start[first:last] + counts
        own: list[int] = []
        for row, slot in enumerate(slots.tolist()):
            if (text := self._texts.get(slot)) is not None:
                self._grow(step, row, slot, text, new.get(row, []))
                own.append(row)
        if self._late is not None and own:
            assert hidden is not None or self._on_device
            self._late.follow(step, own, hidden, list(aux))
        drafting = {int(slots[row]): row for row in own if row in new}
        if wanted is not None:
            drafting = {slot: row for slot, row in drafting.items() if slot in wanted}
        self._draft(step, drafting)
        output.new_drafts = [
            (row, np.array(self._drafts[slot], np.int32)) for slot, row in drafting.items() if row >= last
        ]
        if first != last:
            output.accepted = self._accepted(step, new)

    def _draft(self, step: ForwardInput, rows: dict[int, int]) -> None:
        """For the next rows of these slots; rows: those that they had."""
        slots = list(rows)
        self._draft_early(slots)
        if self._late is None or self._on_device or step.masks is None:
            return
        # The host makes masks for drafts that it has seen.
        constrained = set(step.masks.rows.tolist())
        slots = [slot for slot in slots if rows[slot] in constrained and not self._drafts[slot]]
        most = []
        for slot in slots:
            row = rows[slot] - step.num_decode_rows
            # As many as were asked for last: each of them costs.
            asked = self._limits.max_draft_tokens
            if 0 <= row < step.num_speculating_rows:
                asked = max(1, int(self._given_len[rows[slot]]) - 1)
            most.append(min(asked, self._room(slot), int(self._reserved[slot] - self._length[slot])))
        if slots:
            self._drafts.update(zip(slots, self._late.propose(slots, most), strict=True))

    def _room(self, slot: int) -> int:
        """Drafts that the context has room for behind the last token, each of which must be followed by one."""
        return min(self._limits.max_draft_tokens, self._limits.max_model_len - int(self._length[slot]) - 2)

    def _grow(self, step: ForwardInput, row: int, slot: int, text: Text, new: list[int]) -> None:
        """Put what a row brought into its slot's text."""
        staging, tokens = step.staging, text.tokens
        if row < step.num_decode_rows + step.num_speculating_rows:
            kept = len(tokens)
            tokens += new
        else:
            start = int(staging.row_start[row])
            chunk = staging.token_ids[staging.qo_indptr[row] : staging.qo_indptr[row + 1]].tolist()
            end = start + len(chunk)
            same = tokens[start:end] == chunk
            if same and not new:
                return  # what stands behind it is still to come
            kept = end if same else start
            del tokens[kept:]
            if not same:
                tokens += chunk
            tokens += new
        self._drafts[slot] = []
        self._unproposed.add(slot)
        self._proposer.advance(slot, kept)

    def _accepted(self, step: ForwardInput, new: dict[int, list[int]]) -> Accepted:
        first, count, most = step.num_decode_rows, step.num_speculating_rows, self._limits.max_draft_tokens
        staging = step.staging
        found = Accepted(
            np.zeros(count, np.int32),
            np.full((count, 1 + most), -1, np.int32),
            staging.row_len[first : first + count] - 1,
            np.full((count, most), -1, np.int32),
        )
        for index in range(count):
            tokens = new.get(first + index, [])
            found.counts[index] = len(tokens)
            found.tokens[index, : len(tokens)] = tokens
            drafts = self._drafts.get(int(staging.row_slot[first + index]), [])
            found.drafts[index, : len(drafts)] = drafts
        return found
