"""Vectors of prompts out of the hidden states of a step: the last token's, the mean of all, or a few log-probabilities.

Shared by the CPU and the CUDA executor, each on the thread or stream that runs its forwards, in the order of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.forward import ForwardInput
from engine.request import Pooling


@dataclass(frozen=True, slots=True)
class PooledChunk:
    """A PooledRow with its place, read from the staging set at launch: `length` tokens from `first` on in the step's,
    from `start` on in the sequence."""

    pooling: Pooling
    ends: bool
    slot: int
    start: int
    first: int
    length: int


def pooled_chunks(step: ForwardInput) -> list[PooledChunk]:
    """Those of a step, in the order of its pooled rows."""
    staging = step.staging
    return [
        PooledChunk(
            pooled.pooling,
            pooled.ends,
            int(staging.row_slot[pooled.row]),
            int(staging.row_start[pooled.row]),
            int(staging.qo_indptr[pooled.row]),
            int(staging.row_len[pooled.row]),
        )
        for pooled in step.pooled
    ]


class Pooler:
    """Keeps the sums of prompts that come in chunks, float32 [hidden_size] by seq slot.

    A sum begins anew with a prompt; one that never ends (an aborted request) is forgotten with its slot's next.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def run(self, chunks: Sequence[PooledChunk], hidden: Tensor, logits: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """hidden [T, hidden_size] of the step; logits: of the model. A float32 vector for each chunk that ends."""
        vectors: list[Tensor] = []
        for chunk in chunks:
            pooling, end = chunk.pooling, chunk.first + chunk.length
            if pooling.kind == "mean":
                total = self._add(chunk, hidden[chunk.first : end])
                if chunk.ends:
                    vectors.append(total / (chunk.start + chunk.length))
                else:
                    self._sums[chunk.slot] = total
            elif pooling.kind == "last":
                vectors.append(hidden[end - 1].to(torch.float32, copy=True))
            else:
                shares = torch.log_softmax(logits(hidden[end - 1 : end])[0], dim=-1)
                vectors.append(torch.stack([shares[token] for token in pooling.token_ids]))
        return vectors

    def _add(self, chunk: PooledChunk, rows: Tensor) -> Tensor:
        """The sum of a prompt's rows up to the end of this chunk.

        On the CPU one row after the other, which numpy does along an outer axis: chunks change no bit of a mean.
        """
        before = self._sums.pop(chunk.slot, None)
        rows = rows.float()
        if chunk.start:
            # Nothing there: the step with the chunk before this one failed, and nobody waits for this one's mean.
            known = torch.full_like(rows[0], math.nan) if before is None else before
            rows = torch.cat([known[None], rows])
        if rows.is_cpu:
            return torch.from_numpy(np.add.reduce(rows.numpy(), axis=0))
        return rows.sum(dim=0)
