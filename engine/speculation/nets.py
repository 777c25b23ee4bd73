"""What computes drafts where nobody looks at them: a draft model or a head, in shapes that the host knows.

Made at start; run by the executor of a GPU (engine/executor/cuda_drafter.py) on its stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from engine.models.parts.decoder import CausalLM
from engine.ops.attention.base import AttentionBackend, AttentionSpec
from engine.speculation.hidden import Head
from engine.speculation.vocabulary import VocabularyMap

# Draws a token int32 [R] from each row of logits [R, V].
Pick = Callable[[Tensor], Tensor]


class Net(Protocol):
    """width: of the hidden states that it reads, one for each token: what came before it; 0 where it reads none, and
    then a token's K and V have its own position, else the one before. aux_layers: see LateProposer. weights: what holds
    them, its layers among it."""

    width: int
    aux_layers: tuple[int, ...]
    attention_spec: AttentionSpec
    weights: CausalLM | Head

    def fuse(self, hidden: Tensor, aux: list[Tensor]) -> Tensor:
        """The target's hidden states [T, H] -> what `forward` reads [T, width]."""
        ...

    def forward(
        self, token_ids: Tensor, hidden: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> Tensor:
        """Tokens of the target's vocabulary int32 [T] -> hidden states [T, ...]."""
        ...

    def tokens(self, hidden: Tensor, pick: Pick | None) -> Tensor:
        """[R, ...] -> int32 [R]: tokens of the target's vocabulary, the most probable ones; or, of a draft model, those
        that `pick` draws. One that the target lacks becomes another."""
        ...

    def use(self, target: object) -> None:
        """The target has other weights: this model."""
        ...


class ModelNet:
    """A draft model."""

    width = 0
    aux_layers: tuple[int, ...] = ()

    def __init__(self, model: CausalLM, vocabulary: VocabularyMap | None, device: torch.device) -> None:
        self._model = model
        self.weights: CausalLM | Head = model
        self.attention_spec = model.attention_spec
        self._to_draft = self._to_target = None
        if vocabulary is not None:
            self._to_draft = torch.from_numpy(vocabulary.to_draft).to(device)
            self._to_target = torch.from_numpy(vocabulary.to_target.clip(min=0)).to(device)

    def fuse(self, hidden: Tensor, aux: list[Tensor]) -> Tensor:
        """See Net."""
        raise AssertionError("a draft model reads no hidden states")

    def forward(
        self, token_ids: Tensor, hidden: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> Tensor:
        """See Net."""
        if self._to_draft is not None:
            token_ids = self._to_draft.index_select(0, token_ids.long())
        return self._model.forward(token_ids, positions, attention)

    def tokens(self, hidden: Tensor, pick: Pick | None) -> Tensor:
        """See Net."""
        logits = self._model.raw_logits(hidden)
        own = logits.argmax(-1) if pick is None else pick(logits)
        return own.int() if self._to_target is None else self._to_target.index_select(0, own.long())

    def use(self, target: object) -> None:
        """See Net."""


class HeadNet:
    """A head that goes on from the target's hidden states."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self.weights: CausalLM | Head = head
        self.width = head.width
        self.aux_layers = head.aux_layers
        self.attention_spec = head.attention_spec

    def fuse(self, hidden: Tensor, aux: list[Tensor]) -> Tensor:
        """See Net. Rows without numbers become others: their K and V would spoil whoever has their pages next."""
        return torch.nan_to_num(self._head.fuse(hidden, aux), nan=0.0, posinf=0.0, neginf=0.0)

    def forward(
        self, token_ids: Tensor, hidden: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> Tensor:
        """See Net."""
        assert hidden is not None
        return self._head.forward(token_ids, hidden, positions, attention)

    def tokens(self, hidden: Tensor, pick: Pick | None) -> Tensor:
        """See Net."""
        return self._head.tokens(hidden).int()

    def use(self, target: object) -> None:
        """See Net."""
        self._head.use(target)
