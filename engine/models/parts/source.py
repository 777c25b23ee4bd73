"""Where parts get their tensors from while they build themselves. Implemented in loading/weights.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.ops.experts import Mixture, Stack
from engine.ops.heads import HeadLinear
from engine.ops.linear import Linear
from engine.ops.lora import Rows, StackedSites

# Of the names of all tensors but the output layer's.
PREFIX = "model."


class Source(Protocol):
    """Tensors by name and shape; dtype and device are those of the result unless it is asked for another dtype.

    deterministic: linear layers are to give a row the same bits in any batch. linears: all that were made so far.
    mixtures: of experts, likewise, where these are stacked.
    adapters: whose each row is, where layers can be changed by LoRA adapters; None where they cannot.
    """

    dtype: torch.dtype
    device: torch.device
    deterministic: bool
    linears: list[Linear]
    adapters: Rows | None
    mixtures: list[Mixture]

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """One tensor as the checkpoint has it. dtype: in place of the usual one."""
        ...

    def raw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """uint8: one tensor of bytes as the checkpoint has it."""
        ...

    def stacked(self, names: Sequence[str], rows: Sequence[int], *columns: int) -> Tensor:
        """Several tensors [rows[i], *columns] below one another, as one [sum(rows), *columns]."""
        ...

    def experts(
        self, names: Sequence[str], count: int, rows: int, columns: int, *, order: Tensor | None = None
    ) -> Stack:
        """The weights of modules [rows, columns], as many for each of `count` experts, below one another: [count, all
        rows of one, columns], or codes of that. order: of all rows of one expert."""
        ...

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        bias: bool = False,
        order: Tensor | None = None,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Linear:
        """A ready linear layer from one or several projections of the checkpoint (`NAME.weight`, `NAME.bias`).

        order: the first len(order) rows of the result are rows `order` of the checkpoint. activation: see Linear.
        """
        ...

    def adapted(self, layer: Linear, name: str) -> Linear:
        """A layer that was made of the checkpoint's module `name` in another way, to be changed by adapters, too."""
        ...

    def adapted_heads(
        self, name: str, to_latent: HeadLinear, to_value: HeadLinear
    ) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
        """The same for the two that latent attention makes of module `name`: of its rows for keys, turned, and of its
        rows for values, head by head."""
        ...

    def adapted_experts(
        self, names: Sequence[str], count: int, rows: int, columns: int, order: Tensor | None
    ) -> StackedSites | None:
        """Places for adapters at what `experts` made of the same; None where none are served."""
        ...

    def embedding(self, name: str, count: int, width: int) -> Linear:
        """A table [count, width] of which only `rows` are asked for."""
        ...

    def output_layer(self, vocab: int, hidden: int, *, tied: bool, bias: bool = False) -> Linear:
        """The layer that makes logits; a tied one is the embedding too, and hands out its rows."""
        ...

    def summed(self, part: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A part whose linear layers each rank of a group has a slice of: with its results added up over the ranks."""
        ...
