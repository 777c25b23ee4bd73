"""Proposers that go on from the target's hidden states: EAGLE-3 and the multi-token layers that checkpoints bring.

At position i such a head reads the target's hidden state there and the token at i + 1, and says what comes at i + 2; it
goes on from its own hidden state. So what it keeps of a position depends on the next token, too: of a prefix that was
found in the cache, the last position may have been computed with another one, which costs a little acceptance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.executor.tables import SlotTables
from engine.forward import ForwardInput
from engine.ops.attention.base import AttentionBackend, AttentionSpec
from engine.ops.experts import Mixture
from engine.ops.linear import Linear
from engine.speculation.base import Text
from engine.speculation.paged import PagedCache, Piece, batches


class Head(Protocol):
    """The weights of such a proposer. aux_layers: see LateProposer. width: of what it reads, `size` below. linears,
    mixtures: as a CausalLM's."""

    aux_layers: tuple[int, ...]
    width: int
    linears: list[Linear]
    mixtures: list[Mixture]
    attention_spec: AttentionSpec

    def fuse(self, hidden: Tensor, aux: list[Tensor]) -> Tensor:
        """The target's hidden states [T, H] -> what `forward` reads [T, size]."""
        ...

    def forward(self, token_ids: Tensor, hidden: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """The next tokens int32 [T] and the hidden states before them [T, size] -> hidden states [T, size]."""
        ...

    def use(self, target: Any) -> None:
        """The target has other weights: this model."""
        ...

    def tokens(self, hidden: Tensor) -> Tensor:
        """[R, size] -> int64 [R]: the most probable token of the target's vocabulary."""
        ...


@dataclass(slots=True)
class _Slot:
    """done: positions whose K and V are there, -1 before it is known from where on. pending: hidden states [n, size] of
    the positions from `done` on; where the text is known, there is at least one."""

    text: Text
    done: int = -1
    pending: Tensor | None = None


class HiddenDrafts:
    """A LateProposer around a head. context: tokens that it can read."""

    on_device = False

    def __init__(self, head: Head, cache: PagedCache, *, context: int) -> None:
        self._head = head
        self._cache = cache
        self._context = context
        self._slots: dict[int, _Slot] = {}

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """See LateProposer."""
        return self._head.aux_layers

    def bind(self, tables: SlotTables) -> None:
        """See LateProposer."""
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
        # A position's pair needs the token behind it.
        if state.pending is not None:
            known = max(0, kept - state.done)
            if known < len(state.pending):
                state.pending = state.pending[:known] if known else None
        if 0 <= kept - 1 < state.done:
            state.done, state.pending = kept - 1, None

    def use(self, target: Any) -> None:
        """See LateProposer."""
        self._head.use(target)

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
        """See LateProposer. All but the last position of a chunk is run at once; the others wait for `propose`."""
        assert hidden is not None
        staging, limits = step.staging, self._cache.limits
        pieces = []
        fused = self._head.fuse(hidden, aux)
        sources: dict[int, Tensor] = {}
        for row in rows:
            slot, start = int(staging.row_slot[row]), int(staging.row_start[row])
            state = self._slots[slot]
            first = int(staging.qo_indptr[row])
            # Of drafts that were wrong nothing counts.
            end = min(start + int(staging.row_len[row]), len(state.text.tokens) - 1)
            if state.done < 0:
                state.done = start
            held = 0 if state.pending is None else len(state.pending)
            skip = state.done + held - start
            if skip < 0:  # a hole: what was between is lost, and is guessed without
                state.done, state.pending, skip = start, None, 0
            if start + skip < end:
                new = fused[first + skip : first + end - start]
                state.pending = new.clone() if state.pending is None else torch.cat([state.pending, new])
            waiting = 0 if state.pending is None else len(state.pending)
            is_chunk = row >= step.num_decode_rows + step.num_speculating_rows
            if state.pending is not None and waiting > (1 if is_chunk else limits.page_size):
                tokens = state.text.tokens[state.done + 1 : state.done + waiting]
                pieces.append(Piece(slot, state.done, tokens))
                sources[slot] = state.pending[: waiting - 1]
                state.done, state.pending = state.done + waiting - 1, state.pending[waiting - 1 :].clone()
        self._run(pieces, sources)

    def _run(self, pieces: list[Piece], sources: dict[int, Tensor]) -> dict[int, Tensor]:
        """sources: hidden states of each slot's piece. [1, size] of each slot: behind its last token."""
        found: dict[int, Tensor] = {}
        begins = {piece.slot: piece.start for piece in pieces}
        for batch in batches(pieces, self._cache.limits.max_num_batched_tokens):
            ids, positions, ends = self._cache.plan(batch)
            parts = []
            for piece in batch:
                at = piece.start - begins[piece.slot]
                parts.append(sources[piece.slot][at : at + len(piece.tokens)])
            out = self._head.forward(ids, torch.cat(parts), positions, self._cache.attention)[ends]
            found |= {piece.slot: out[index : index + 1] for index, piece in enumerate(batch)}
        return found

    def propose(self, slots: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        """See Proposer."""
        found: dict[int, list[int]] = {}
        wanted: dict[int, int] = {}
        pieces: list[Piece] = []
        sources: dict[int, Tensor] = {}
        for slot, count in zip(slots, most, strict=True):
            state = self._slots[slot]
            tokens = state.text.tokens
            count = min(count, self._context - len(tokens))
            # The pairs must reach up to the last token.
            if count <= 0 or state.pending is None or state.done + len(state.pending) != len(tokens) - 1:
                continue
            pieces.append(Piece(slot, state.done, tokens[state.done + 1 :]))
            sources[slot] = state.pending
            # The last one is kept: where nothing comes of the next step, it is needed again.
            state.done, state.pending = len(tokens) - 2, state.pending[-1:]
            wanted[slot], found[slot] = count, []
        hidden = self._run(pieces, sources)
        while hidden:
            names = list(hidden)
            chosen = self._head.tokens(torch.cat(list(hidden.values()))).tolist()
            for slot, token in zip(names, chosen, strict=True):
                found[slot].append(token)
            pieces = [
                Piece(slot, len(self._slots[slot].text.tokens) - 2 + len(found[slot]), found[slot][-1:])
                for slot in names
                if len(found[slot]) < wanted[slot]
            ]
            hidden = self._run(pieces, hidden)
        return [found.get(slot, []) for slot in slots]
