"""What a drafting model runs with: its own keys and values in the pages of the target's sequences.

A page of a sequence has one id in both caches, so what the prefix cache finds serves both. Used on the executor's
thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.executor.tables import PagedMetadata, SlotTables
from engine.forward import ForwardInput, Limits, Staging
from engine.groups import MemoryGroup
from engine.ops.attention.base import AttentionBackend, AttentionSpec, create_backend
from engine.speculation.base import Proposer


class LateProposer(Proposer, Protocol):
    """A proposer whose drafts take computing: it is asked when a step begins that has room for them, or at the end of
    the step before where the host must see them first.

    aux_layers: the target's layers, the residual stream before which `follow` wants. on_device: it drafts as the step
    runs, and what it proposes says but how many drafts there will be.
    """

    on_device: bool

    @property
    def aux_layers(self) -> tuple[int, ...]: ...

    def bind(self, tables: SlotTables) -> None:
        """Before anything else: where pages and sampling parameters of slots are."""
        ...

    def follow(self, step: ForwardInput, rows: Sequence[int], hidden: Tensor | None, aux: list[Tensor]) -> None:
        """A step as it ran; rows: those whose slots speculate. Called after their texts have taken up what it brought.

        hidden [tokens, hidden_size]: after the final norm, None where it is on the device; aux: those of aux_layers,
        alike.
        """
        ...

    def use(self, target: Any) -> None:
        """The target has other weights: this model."""
        ...

    @property
    def pools(self) -> list[Tensor]:
        """The cache's memory, [pages, ...] each."""
        ...

    def release(self) -> None:
        """Give the cache's memory back."""
        ...

    def allocate(self) -> None:
        """Have it again."""
        ...


@dataclass(slots=True)
class Piece:
    """Tokens of a slot from a place on. The pages of all of them are the slot's."""

    slot: int
    start: int
    tokens: list[int]


class PagedCache:
    """The backend and what plans its steps. group: of the target's memory groups, whose pages these are."""

    def __init__(self, spec: AttentionSpec, limits: Limits, group: int, dtype: torch.dtype) -> None:
        self.limits = limits
        self.attention: AttentionBackend = create_backend(
            "torch_paged",
            spec,
            num_pages=limits.num_pages,
            page_size=limits.page_size,
            dtype=dtype,
            groups=(MemoryGroup(),),
        )
        self._group = group
        self._staging = Staging(limits)
        self._metadata = PagedMetadata(limits)
        self._tables: SlotTables | None = None

    @property
    def pools(self) -> list[Tensor]:
        """See LateProposer."""
        attention: Any = self.attention
        return [*attention.k_pools, *attention.v_pools]

    def bind(self, tables: SlotTables) -> None:
        """See LateProposer."""
        self._tables = tables

    def plan(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids int32 [T], their positions [T], and int64 [pieces]: where the last token of each is. At most
        max_num_batched_tokens of them, and no slot twice."""
        assert self._tables is not None, "not bound"
        staging, rows = self._staging, len(pieces)
        at = staging.qo_indptr[0] = 0
        for row, piece in enumerate(pieces):
            count = len(piece.tokens)
            staging.row_slot[row], staging.row_start[row], staging.row_len[row] = piece.slot, piece.start, count
            staging.token_ids[at : at + count] = piece.tokens
            at += count
            staging.qo_indptr[row + 1] = at
        step = ForwardInput(0, staging, rows, 0, at, 0, 0)
        self._metadata.build(step, self._tables, self._group)
        self.attention.plan(self._metadata)
        ends = torch.from_numpy(staging.qo_indptr[1 : rows + 1].astype(np.int64) - 1)
        ids = torch.from_numpy(staging.token_ids[:at].copy())
        return ids, torch.from_numpy(np.ascontiguousarray(self._metadata.positions)), ends


def batches(pieces: Sequence[Piece], most: int) -> list[list[Piece]]:
    """The same tokens in steps of at most `most`, a long piece in several of them, in order."""
    found: list[list[Piece]] = []
    batch: list[Piece] = []
    room = most
    for piece in pieces:
        done = 0
        while done < len(piece.tokens):
            if room == 0:
                found.append(batch)
                batch, room = [], most
            count = min(room, len(piece.tokens) - done)
            batch.append(Piece(piece.slot, piece.start + done, piece.tokens[done : done + count]))
            done, room = done + count, room - count
    if batch:
        found.append(batch)
    return found


def full_group(groups: Sequence[MemoryGroup]) -> int | None:
    """The target's memory group that keeps pages of all tokens, None where there is none."""
    return next((index for index, group in enumerate(groups) if group.window is None), None)
