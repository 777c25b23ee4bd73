"""Speculator: the slots of a CPU executor that speculate: their lengths, texts and drafts, and what came of a step.

The worker runs steps one after another, so at the end of one it knows all tokens, and drafts for the next. A step's
speculating rows are made from what is known here; staging has but upper bounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.forward import Accepted, ForwardInput, ForwardOutput, Int32Array, Limits, Staging
from engine.speculation.base import Proposer, Text


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
    """See the module. Only the worker touches it."""

    def __init__(self, limits: Limits, proposer: Proposer) -> None:
        self._limits = limits
        self._proposer = proposer
        # Tokens of a slot that have been computed and are right.
        self._length: Int32Array = np.zeros(limits.num_slots, np.int32)
        self._texts: dict[int, Text] = {}
        self._drafts: dict[int, list[int]] = {}
        self._staging = Staging(limits)

    def apply(self, step: ForwardInput) -> None:
        """Take over whose slots speculate."""
        for slot in step.staging.sampling_slot[: step.num_sampling_diffs].tolist():
            self._drafts.pop(slot, None)
            if self._texts.pop(slot, None) is not None:
                self._proposer.stop(slot)
        for told in step.speculations:
            text = Text(told.history.tolist(), told.namespace, told.prediction)
            self._texts[told.slot] = text
            self._proposer.start(told.slot, text)

    def as_it_runs(self, step: ForwardInput, last_token: Int32Array) -> ForwardInput:
        """The step with the starts, lengths and drafts that speculating rows have. Valid until the next one's."""
        if not step.num_speculating_rows:
            return step
        given, own, rows = step.staging, self._staging, step.num_rows
        first, last = step.num_decode_rows, step.num_decode_rows + step.num_speculating_rows
        for name in ("row_slot", "row_start", "row_len", "row_samples"):
            getattr(own, name)[:rows] = getattr(given, name)[:rows]
        slots = given.row_slot[first:last]
        # Never beyond what is reserved, whatever went wrong before.
        own.row_start[first:last] = np.minimum(self._length[slots], given.row_start[first:last])
        ids = [given.token_ids[:first]]
        for row, slot in enumerate(slots.tolist(), first):
            drafts = self._drafts.get(slot, [])[: int(given.row_len[row]) - 1]
            own.row_len[row] = 1 + len(drafts)
            ids.append(np.array([last_token[slot], *drafts], np.int32))
        ids.append(given.token_ids[given.qo_indptr[last] : step.num_tokens])
        own.qo_indptr[0] = 0
        np.cumsum(own.row_len[:rows], out=own.qo_indptr[1 : rows + 1])
        tokens = int(own.qo_indptr[rows])
        np.concatenate(ids, out=own.token_ids[:tokens])
        return dataclasses.replace(step, staging=own, num_tokens=tokens)

    def count(self, step: ForwardInput, positions: Positions, drawn: Int32Array) -> npt.NDArray[np.bool_] | None:
        """bool [positions]: whether the draw became a token: all drafts before it are what was drawn there. None: all."""
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
    ) -> None:
        """After the step as it ran: remember what came of it, draft for the next, and report."""
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
        drafting: list[tuple[int, int]] = []
        for row, slot in enumerate(slots.tolist()):
            if (text := self._texts.get(slot)) is None:
                continue
            self._grow(step, row, slot, text, new.get(row, []))
            if row in new:
                drafting.append((row, slot))
        drafts = self._proposer.propose([slot for _, slot in drafting], [self._room(slot) for _, slot in drafting])
        for (row, slot), draft in zip(drafting, drafts, strict=True):
            self._drafts[slot] = draft
            if row >= last:
                output.new_drafts.append((row, np.array(draft, np.int32)))
        if first != last:
            output.accepted = self._accepted(step, new)

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
