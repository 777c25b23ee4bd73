"""Vectors of prompts out of the hidden states of a step: one token's, one of all, or a few log-probabilities; and what
heads make of them.

Shared by the CPU and the CUDA executor, each on the thread or stream that runs its forwards, in the order of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.forward import ForwardInput
from engine.models.spec import ModelSpec
from engine.request import Pooling


class Heads(Protocol):
    """What is needed of a CausalLM."""

    @property
    def config(self) -> ModelSpec: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def classify(self, hidden: Tensor) -> Tensor: ...

    def project(self, vectors: Tensor) -> Tensor: ...


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


def token_types(chunks: Sequence[PooledChunk], num_tokens: int) -> Tensor | None:
    """int64 [num_tokens]: 1 from where the second text of a pair begins; None where there is no pair."""
    if not any(chunk.pooling.second for chunk in chunks):
        return None
    types = torch.zeros(num_tokens, dtype=torch.int64)
    for chunk in chunks:
        if chunk.pooling.second:
            end = chunk.first + chunk.length
            types[min(end, chunk.first + max(0, chunk.pooling.second - chunk.start)) : end] = 1
    return types


def shape_of(pooling: Pooling, spec: ModelSpec, num_tokens: int) -> tuple[int, ...]:
    """Of the answer to a prompt of so many tokens."""
    if pooling.kind == "logprobs":
        return (len(pooling.token_ids),)
    width = spec.projections[-1].size if spec.projections else spec.hidden_size
    if pooling.classify:
        assert spec.classifier is not None
        width = len(spec.classifier.labels)
    if pooling.kind == "all":
        return (num_tokens, width if pooling.classify else spec.hidden_size)
    return (width,)


class Pooler:
    """Keeps what prompts that come in chunks have brought so far, float32 by seq slot.

    use_slots: is told whose rows the model gets next: a seq slot for each, or one for all of them; it is so inside the
    context that it returns.
    It begins anew with a prompt; one that never ends (an aborted request) is forgotten with its slot's next.
    """

    def __init__(self, use_slots: Callable[[list[int]], AbstractContextManager[None]]) -> None:
        self._before: dict[int, Tensor] = {}
        self._use_slots = use_slots

    def run(self, chunks: Sequence[PooledChunk], hidden: Tensor, model: Heads, *, apart: bool = False) -> list[Tensor]:
        """hidden [T, hidden_size] of the step. A float32 vector for each chunk that ends, see `shape_of`. apart: heads
        compute each on its own."""
        vectors: list[Tensor] = []
        slots: list[int] = []
        classified: list[int] = []
        projected: list[int] = []
        for chunk in chunks:
            pooling, end = chunk.pooling, chunk.first + chunk.length
            late = False
            if pooling.needs_all:
                rows = hidden[chunk.first : end].float()
                late = pooling.classify and model.config.classifier is not None and model.config.classifier.late
                if late:
                    with self._use_slots([chunk.slot]):
                        rows = model.classify(rows)
                vector = self._add(chunk, rows)
                if not chunk.ends:
                    continue
            elif pooling.kind == "last":
                vector = hidden[end - 1].to(torch.float32, copy=True)
            else:
                with self._use_slots([chunk.slot]):
                    shares = torch.log_softmax(model.logits(hidden[end - 1 : end])[0], dim=-1)
                vector = torch.stack([shares[token] for token in pooling.token_ids])
            if pooling.classify and not late:
                classified.append(len(vectors))
            elif pooling.kind not in ("all", "logprobs") and model.config.projections:
                projected.append(len(vectors))
            vectors.append(vector)
            slots.append(chunk.slot)
        for head, indices in ((model.classify, classified), (model.project, projected)):
            for some in [[index] for index in indices] if apart else [indices]:
                self._put_through(head, vectors, slots, some)
        return vectors

    def _put_through(
        self, head: Callable[[Tensor], Tensor], vectors: list[Tensor], slots: list[int], indices: list[int]
    ) -> None:
        """Replace these vectors, or matrices of them, by what a head makes of them, all at once."""
        if not indices:
            return
        parts = [vectors[index].view(-1, vectors[index].shape[-1]) for index in indices]
        with self._use_slots([slots[index] for index, part in zip(indices, parts, strict=True) for _ in part]):
            made = head(torch.cat(parts)).split_with_sizes([len(part) for part in parts])
        for index, rows in zip(indices, made, strict=True):
            vectors[index] = rows.reshape(*vectors[index].shape[:-1], -1).clone()

    def _add(self, chunk: PooledChunk, rows: Tensor) -> Tensor:
        """What a prompt has brought up to the end of this chunk; the answer where it ends."""
        kind, length = chunk.pooling.kind, chunk.start + chunk.length
        before = self._before.pop(chunk.slot, None)
        if kind == "weightedmean":
            places = torch.arange(chunk.start + 1, length + 1, device=rows.device, dtype=torch.float32)
            rows = rows * places[:, None]
        if chunk.start:
            # Nothing there: the step with the chunk before this one failed, and nobody waits for this one's answer.
            known = torch.full_like(rows[:1], math.nan) if before is None else before
            rows = torch.cat([known, rows])
        if kind == "cls":
            rows = rows[:1]
        elif kind == "max":
            rows = rows.amax(dim=0, keepdim=True)
        elif kind != "all":
            rows = _sum(rows)[None]
        if not chunk.ends:
            self._before[chunk.slot] = rows.clone()
            return rows
        if kind == "all":
            return rows.clone()
        divisor = {"mean": length, "weightedmean": length * (length + 1) / 2, "mean_sqrt_len": math.sqrt(length)}
        return rows[0] / divisor.get(kind, 1)


def _sum(rows: Tensor) -> Tensor:
    """On the CPU one row after the other, which numpy does along an outer axis: chunks change no bit of a mean."""
    if rows.is_cpu:
        return torch.from_numpy(np.add.reduce(rows.numpy(), axis=0))
    return rows.sum(dim=0)
