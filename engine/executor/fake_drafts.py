"""How the fake device speculates: rows with drafts as rows of one token each, and drafts that are right by a seed.

A draft is what the fake would draw next, or that plus one; which of the two depends on the place and the tokens alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from engine.executor.fake_memory import MASK, POSITION, ROUND, mix_int
from engine.forward import Accepted, ForwardInput, Int32Array, RowSpeculation


class Oracle(Protocol):
    """Draws the next token of one sequence from its tokens alone. position: of that token."""

    @property
    def position(self) -> int: ...

    def push(self, token: int) -> None: ...

    def token(self) -> int: ...

    def copy(self) -> Oracle: ...


@dataclass(slots=True)
class Spread:
    """A step whose speculating rows have become a row for each position.

    step: of those rows; its staging is a copy. drafts: of each speculating row. first: where its rows begin.
    places: rows of the step for each of the masks' rows, -1 for a position that the row does not have.
    """

    step: ForwardInput
    drafts: list[list[int]]
    first: list[int]
    places: list[int]


def spread(
    forward_input: ForwardInput, last_token: list[int], lengths: list[int], held: dict[int, list[int]]
) -> Spread:
    """lengths: by slot, tokens that are computed before the step; the next one is `last_token`."""
    staging, rows = forward_input.staging, forward_input.num_rows
    begin = forward_input.num_decode_rows
    end = begin + forward_input.num_speculating_rows
    slots: list[int] = []
    starts: list[int] = []
    lens: list[int] = []
    samples: list[bool] = []
    tokens: list[int] = []
    drafts: list[list[int]] = []
    first: list[int] = []
    places_of: list[list[int]] = []
    for row in range(rows):
        slot, start, length = (int(array[row]) for array in (staging.row_slot, staging.row_start, staging.row_len))
        own = staging.token_ids[staging.qo_indptr[row] : staging.qo_indptr[row + 1]].tolist()
        if begin <= row < end:
            exact = lengths[slot]
            assert 0 <= exact <= start, f"slot {slot} has {exact} tokens, more than the {start} that it might have"
            brings = held.get(slot, [])[: length - 1]
            drafts.append(brings)
            first.append(len(slots))
            places_of.append([*range(len(slots), len(slots) + 1 + len(brings)), *[-1] * (length - 1 - len(brings))])
            for place, token in enumerate([last_token[slot], *brings]):
                slots.append(slot)
                starts.append(exact + place)
                lens.append(1)
                samples.append(False)
                tokens.append(token)
            continue
        places_of.append([len(slots)])
        slots.append(slot)
        starts.append(start)
        lens.append(length)
        samples.append(bool(staging.row_samples[row]))
        tokens += own
    places: list[int] = []
    if forward_input.masks is not None:
        for row in dict.fromkeys(forward_input.masks.rows.tolist()):
            places += places_of[row]
        assert len(places) == len(forward_input.masks.rows), "a mask is missing, or one too many"
    copy: Any = SimpleNamespace(
        row_slot=np.array(slots, np.int32),
        row_start=np.array(starts, np.int32),
        row_len=np.array(lens, np.int32),
        row_samples=np.array(samples, np.bool_),
        token_ids=np.array(tokens, np.int32),
        qo_indptr=np.concatenate([np.zeros(1, np.int32), np.cumsum(lens, dtype=np.int32)]).astype(np.int32),
    )
    step = dataclasses.replace(
        forward_input,
        staging=copy,
        num_rows=len(slots),
        num_tokens=len(tokens),
        num_speculating_rows=0,
        pooled=[dataclasses.replace(one, row=places_of[one.row][0]) for one in forward_input.pooled],
    )
    return Spread(step, drafts, first, places)


def accept(drafts: list[list[int]], sampled: list[list[int]], most: int) -> tuple[Accepted, list[list[int]]]:
    """sampled: of each row, what was drawn at each position. Returns what counts of it, and those tokens by row."""
    accepted = Accepted(
        counts=np.zeros(len(drafts), np.int32),
        tokens=np.full((len(drafts), 1 + most), -1, np.int32),
        num_drafted=np.array([len(one) for one in drafts], np.int32),
        drafts=np.full((len(drafts), most), -1, np.int32),
    )
    kept = []
    for row, (ours, drawn) in enumerate(zip(drafts, sampled, strict=True)):
        right = next((place for place, draft in enumerate(ours) if draft != drawn[place]), len(ours))
        accepted.counts[row] = 1 + right
        accepted.tokens[row, : 1 + right] = drawn[: 1 + right]
        kept.append(drawn[: 1 + right])
    return accepted, kept


class Drafter:
    """The drafts that each slot's next row brings, in `held`. accuracy: how many of them are right. unseen: those of
    rows under a grammar are told by `tell` alone."""

    def __init__(self, vocab_size: int, most: int, accuracy: float, unseen: bool) -> None:
        self.unseen = unseen
        self.held: dict[int, list[int]] = {}
        self._vocab_size, self._most, self._accuracy = vocab_size, most, accuracy
        self._fresh: dict[int, Oracle] = {}
        self._oracles: dict[int, Oracle] = {}
        self._history: dict[int, list[int]] = {}
        # Slots of a failed step: what follows it, until they are filled again, is of no use to anybody.
        self.lost: set[int] = set()

    def drop(self, slot: int) -> None:
        for kept in (self.held, self._fresh, self._oracles, self._history):
            kept.pop(slot, None)

    def begin(self, given: RowSpeculation, oracle: Oracle) -> None:
        """A slot speculates. oracle: of no token yet."""
        self.lost.discard(given.slot)
        assert given.slot not in self._fresh, "a slot's speculation comes once, with its sampling row"
        self._fresh[given.slot], self._oracles[given.slot] = oracle, oracle.copy()
        self._history[given.slot] = given.history.tolist()

    def speculates(self, slot: int) -> bool:
        return slot in self._fresh

    def hides(self, step: ForwardInput, row: int) -> bool:
        """Whether what is drafted behind a row is not told at the end of its step."""
        return self.unseen and step.masks is not None and row in step.masks.rows

    async def tell(self, step: ForwardInput) -> list[tuple[int, Int32Array]]:
        """See Executor.unseen_drafts, of a step that has not run yet."""
        assert step.masks is not None
        first, staging = step.num_decode_rows, step.staging
        last = first + step.num_speculating_rows
        rows = [row for row in dict.fromkeys(step.masks.rows.tolist()) if first <= row < last]
        held = [self.held.get(int(staging.row_slot[row]), [])[: int(staging.row_len[row]) - 1] for row in rows]
        return [(row, np.array(drafts, np.int32)) for row, drafts in zip(rows, held, strict=True)]

    def chunk(self, slot: int, start: int, tokens: list[int]) -> None:
        """Known tokens were computed; whatever was sampled from their first place on means nothing."""
        oracle, history = self._oracles[slot], self._history[slot]
        assert len(history) >= start, f"slot {slot} speculates from {len(history)} tokens, and goes on at {start}"
        if oracle.position > start:
            oracle = self._oracles[slot] = self._fresh[slot].copy()
        for token in history[oracle.position : start]:
            oracle.push(token)
        history[start : start + len(tokens)] = tokens
        for token in tokens:
            oracle.push(token)

    def sampled(self, slot: int, position: int, tokens: list[int]) -> list[int]:
        """New tokens, the first for `position`. Returns the drafts behind them."""
        oracle = self._oracles[slot]
        assert oracle.position == position, f"slot {slot} samples for {position} after {oracle.position} tokens"
        del self._history[slot][position:]
        self._history[slot] += tokens
        for token in tokens:
            oracle.push(token)
        self.held[slot] = drafts = self._draft(oracle.copy(), tokens[-1])
        return drafts

    def _draft(self, oracle: Oracle, last: int) -> list[int]:
        drafts: list[int] = []
        for _ in range(mix_int((oracle.position * POSITION + last) & MASK) % (self._most + 1)):
            token = oracle.token()
            if mix_int((oracle.position * POSITION + token + ROUND) & MASK) >> 11 >= int(self._accuracy * 2**53):
                token = (token + 1) % self._vocab_size
            drafts.append(token)
            oracle.push(token)
        return drafts
