"""Ranks as threads of one process: for what does not need processes of their own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.ops.parallel import ParallelGroup
from engine.ops.ranks import Layout, Ranks, RanksEndedError

T = TypeVar("T")


def together(size: int, work: Callable[[Ranks], T], *, slot: int = 1 << 16, logits: int = 1 << 16) -> list[T]:
    """What `work` gives in each rank of a group; what one of them raises."""
    layout = Layout(size, 1 << 20, logits, slot)
    file = Ranks.make_file(layout)
    every = [Ranks(file, layout, rank) for rank in range(size)]
    os.close(file)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(ranks: Ranks) -> None:
        try:
            results[ranks.rank] = work(ranks)
        except BaseException as error:
            if not isinstance(error, RanksEndedError):
                errors.append(error)
            ranks.end()

    threads = [threading.Thread(target=run, args=(ranks,)) for ranks in every]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class RankModel:
    """A rank's part of a model, whose logits only rank 0 has; all ranks ask for the same ones."""

    def __init__(self, own: CausalLM, group: ParallelGroup) -> None:
        self.own, self._group = own, group
        self.config, self.attention_spec = own.config, own.attention_spec

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Any) -> Tensor:
        attention.recordings = None  # one thread of a process records at a time, and here ranks are threads
        return self.own.forward(token_ids, positions, attention)

    def logits(self, hidden: Tensor) -> Tensor:
        if self._group.rank == 0:
            return self.own.logits(hidden)
        assert self._group.output is not None
        self._group.output.answer(hidden)
        return torch.empty(0)


def load_part(
    directory: Path,
    ranks: Ranks,
    dtype: torch.dtype = torch.float32,
    *,
    expert_parallel: bool = False,
    **options: Any,
) -> RankModel:
    group = ParallelGroup(ranks, lambda hidden: None, expert_parallel=expert_parallel)
    spec = read_spec(directory)
    return RankModel(
        load_model(spec, directory, dtype=dtype, device=torch.device("cpu"), group=group, **options), group
    )
