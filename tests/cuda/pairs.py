"""Which combinations of options a kernel is tried with: all on a GPU (`make test-gpu`), where each takes a moment.

Triton's interpreter takes up to a second for each: there as few as let every two values meet.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch


def crossed(*levels: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Of each combination one value a level."""
    every = list(itertools.product(*(range(len(level)) for level in levels)))
    chosen = every if torch.cuda.is_available() else _in_pairs(every)
    return [tuple(level[index] for level, index in zip(levels, each, strict=True)) for each in chosen]


def _in_pairs(every: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Greedily: always that which brings most pairs that were not there."""

    def pairs(each: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(each), 2))

    left = set().union(*map(pairs, every))
    chosen = []
    while left:
        chosen.append(max(every, key=lambda each: len(pairs(each) & left)))
        left -= pairs(chosen[-1])
    return chosen
