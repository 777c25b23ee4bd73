"""Proposer "draft_model": a smaller model goes on from where the sequence is, most probable token after token.

It runs the chunks that the target runs, into its own cache under the same page ids. Its drafts for all rows of a step
are made together. Drawn drafts (probabilistic) use the target's temperature, filters and random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.executor.tables import SlotTables
from engine.forward import ForwardInput, Int32Array
from engine.models.parts.decoder import CausalLM
from engine.ops.sampling.sampler import sample
from engine.speculation.base import Text
from engine.speculation.paged import PagedCache, Piece, batches
from engine.speculation.vocabulary import VocabularyMap


@dataclass(slots=True)
class _Slot:
    """done: tokens of the text whose K and V are in the cache, -1 before it is known from where on. at, ahead: drafts
    behind the first `at` tokens that were computed, too."""

    text: Text
    done: int = -1
    at: int = 0
    ahead: list[int] = field(default_factory=list)


class DraftModel:
    """A LateProposer. context: tokens that the model can read."""

    on_device = False

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """See LateProposer."""
        return ()

    def __init__(
        self,
        model: CausalLM,
        cache: PagedCache,
        *,
        context: int,
        vocabulary: VocabularyMap | None = None,
        probabilistic: bool = False,
    ) -> None:
        self._model = model
        self._cache = cache
        self._context = context
        self._vocabulary = vocabulary
        self._probabilistic = probabilistic
        self._slots: dict[int, _Slot] = {}
        self._tables: SlotTables | None = None

    def bind(self, tables: SlotTables) -> None:
        """See LateProposer."""
        self._tables = tables
        self._cache.bind(tables)

    def start(self, slot: int, text: Text) -> None:
        """See Proposer."""
        self._slots[slot] = _Slot(text)

    def stop(self, slot: int) -> None:
        """See Proposer."""
        self._slots.pop(slot, None)

    def advance(self, slot: int, kept: int) -> None:
        """See Proposer."""
        state = self._slots[slot]
        if kept < state.at:
            state.ahead = []
        state.done = min(state.done, kept)

    def use(self, target: Any) -> None:
        """See LateProposer."""

    @property
    def pools(self) -> list[Tensor]:
        """See LateProposer."""
        return self._cache.pools

    def release(self) -> None:
        """See LateProposer."""
        self._cache.attention.release()

    def allocate(self) -> None:
        """See LateProposer."""
        self._cache.attention.allocate()

    def follow(self, step: ForwardInput, rows: Sequence[int], hidden: Tensor | None, aux: list[Tensor]) -> None:
        """See LateProposer. Prompts go along chunk by chunk; single tokens wait until they are a page, or needed."""
        staging, pieces = step.staging, []
        for row in rows:
            slot = int(staging.row_slot[row])
            state = self._slots[slot]
            end = int(staging.row_start[row] + staging.row_len[row])
            if state.done < 0:
                state.done = int(staging.row_start[row])
            self._settle(state)
            # Of a speculating row, those whose drafts were right.
            end = min(end, len(state.text.tokens) - 1, self._context)
            is_chunk = row >= step.num_decode_rows + step.num_speculating_rows
            if end - state.done >= (1 if is_chunk else self._cache.limits.page_size):
                pieces.append(Piece(slot, state.done, state.text.tokens[state.done : end]))
                state.done = end
        for batch in batches(pieces, self._cache.limits.max_num_batched_tokens):
            self._hidden(batch)

    def _settle(self, state: _Slot) -> None:
        """Drafts that came true are computed tokens."""
        if state.ahead and state.done >= state.at:
            tokens = state.text.tokens
            while state.done - state.at < len(state.ahead) and state.done < len(tokens):
                if state.ahead[state.done - state.at] != tokens[state.done]:
                    break
                state.done += 1
        state.ahead = []

    def _hidden(self, pieces: Sequence[Piece]) -> Tensor:
        """Of the last token of each."""
        ids, positions, ends = self._cache.plan(pieces)
        if self._vocabulary is not None:
            ids = torch.from_numpy(self._vocabulary.to_draft[ids.numpy()])
        return self._model.forward(ids, positions, self._cache.attention)[ends]

    def propose(self, slots: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        """See Proposer."""
        found: dict[int, list[int]] = {}
        wanted: dict[int, int] = {}
        pieces = []
        for slot, count in zip(slots, most, strict=True):
            state = self._slots[slot]
            length = len(state.text.tokens)
            count = min(count, self._context - length)
            if count <= 0 or state.done < 0:
                continue
            self._settle(state)
            # The last token is always run again: its hidden state is what the first draft comes from.
            state.done = min(state.done, length - 1)
            pieces.append(Piece(slot, state.done, state.text.tokens[state.done :]))
            state.done, state.at = length, length
            wanted[slot], found[slot] = count, []
        for batch in batches(pieces, self._cache.limits.max_num_batched_tokens):
            # A piece that goes on in the next batch says nothing yet.
            hidden = self._hidden(batch)
            ended = [
                index
                for index, piece in enumerate(batch)
                if piece.start + len(piece.tokens) == len(self._slots[piece.slot].text.tokens)
            ]
            self._chain(
                [batch[index].slot for index in ended], hidden[torch.tensor(ended, dtype=torch.int64)], wanted, found
            )
        for slot, drafts in found.items():
            self._slots[slot].ahead = drafts[:-1]
        return [found.get(slot, []) for slot in slots]

    def _chain(self, slots: list[int], hidden: Tensor, wanted: dict[int, int], found: dict[int, list[int]]) -> None:
        """From the hidden state of each slot's last token: draft by draft, those slots together that want more."""
        while slots:
            tokens = self._choose(slots, hidden, found)
            for slot, token in zip(slots, tokens.tolist(), strict=True):
                if token >= 0:
                    found[slot].append(token)
                else:  # the target has no such token
                    wanted[slot] = 0
            slots = [slot for slot in slots if len(found[slot]) < wanted[slot]]
            if slots:
                hidden = self._hidden(
                    [Piece(slot, self._slots[slot].at + len(found[slot]) - 1, found[slot][-1:]) for slot in slots]
                )

    def _choose(self, slots: list[int], hidden: Tensor, found: dict[int, list[int]]) -> Int32Array:
        """The target's ids."""
        logits = self._model.logits(hidden)
        if self._probabilistic:
            assert self._tables is not None
            params = self._tables.sampling[np.array(slots)]
            at = np.array([self._slots[slot].at + len(found[slot]) for slot in slots], np.int32)
            tokens = sample(logits.contiguous(), params, at)
        else:
            tokens = logits.argmax(-1).to(torch.int32).numpy()
        return tokens if self._vocabulary is None else self._vocabulary.to_target[tokens]
