"""A mixture of experts with its weights stacked: the form that a GPU multiplies without asking the host for counts.

Called by models/parts/experts.py on the executor's stream. No value is read on the host and every shape depends on the
number of tokens alone, so that a graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.activation import Clamped, activated, by_rows
from engine.ops.device_coded import Codes, torch_numbers
from engine.ops.lora import StackedSites
from engine.ops.triton.runtime import on_gpu

# The matrices of all experts, below one another where they are codes.
Stack = Tensor | Codes
Activation = str | Clamped
Biases = tuple[Tensor | None, Tensor | None]
# Where adapters add something to gate and up, and to down.
Adapted = tuple[StackedSites, StackedSites]
# Of all experts those [first, end) that are here, where ranks have some each; None: all are.
Held = tuple[int, int] | None
# Columns and warps of a program's tile of the result, and loads under way.
CodedTile = tuple[int, int, int]
CODED_TILES: tuple[CodedTile, ...] = ((32, 4, 4), (64, 8, 3), (32, 8, 4))
# Rows of a tile, and from how many pairs of an expert, on average, there are more.
CODED_ROWS, CODED_MANY = (16, 64), 24


def choose_experts(logits: Tensor, chosen: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """[N, experts] -> the experts of each token int64 [N, chosen], best first, and their shares float32.

    normalize: shares of the chosen add up to 1.
    """
    shares, experts = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(chosen, dim=-1)
    if normalize:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return experts, shares


def mix_experts(
    x: Tensor,
    logits: Tensor,
    gate_up: Stack,
    down: Stack,
    chosen: int,
    activation: Activation,
    *,
    normalize: bool,
    biases: Biases = (None, None),
    coded: tuple[int, CodedTile] | None = None,
    adapted: Adapted | None = None,
    held: Held = None,
) -> Tensor:
    """x [N, hidden] -> [N, hidden]: each token's best `chosen` experts, added up by share in float32, rounded once.

    logits [N, experts]: of the router. gate_up: matrices [2 * inner, hidden], down: [hidden, inner]; biases of either:
    [experts, rows]. activation: "silu", "gelu_tanh" or Clamped. An expert's own result is rounded to the dtype.
    coded: rows of a block of pairs, one of CODED_ROWS, and its tile, where codes are to be widened in registers; None:
    they become numbers first. adapted: where rows have adapters. held: matrices are of these alone, and what the others
    add is left out.
    """
    if on_gpu(x):
        from engine.ops.triton import experts as kernels

        return kernels.mix_experts(
            x,
            logits,
            gate_up,
            down,
            chosen,
            activation,
            normalize=normalize,
            biases=biases,
            coded=coded,
            adapted=adapted,
            held=held,
        )
    given = (x, logits, gate_up, down, chosen, activation)
    return torch_mix_experts(*given, normalize=normalize, biases=biases, adapted=adapted, held=held)


def torch_mix_experts(
    x: Tensor,
    logits: Tensor,
    gate_up: Stack,
    down: Stack,
    chosen: int,
    activation: Activation,
    *,
    normalize: bool,
    biases: Biases = (None, None),
    adapted: Adapted | None = None,
    held: Held = None,
) -> Tensor:
    """The same in torch: every expert computes every token and counts with its share, mostly 0."""
    experts, shares = choose_experts(logits, chosen, normalize=normalize)
    first, end = held or (0, logits.shape[1])
    count = end - first
    spread = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, experts, shares)
    total = torch.zeros_like(x, dtype=torch.float32)

    def product(x: Tensor, stack: Stack, bias: Tensor | None, number: int, added: StackedSites | None) -> Tensor:
        y = F.linear(x.float(), matrix_of(stack, number, count).float())
        y = (y if bias is None else y + bias[number].float()).to(x.dtype)
        if added is not None:  # every token is a row of every expert
            added.device.of_expert(number).add(x, y, added.rows.on_device)
        return y

    above, below = adapted or (None, None)
    for number in range(count):
        inner = activated(product(x, gate_up, biases[0], number, above), activation)
        total.addcmul_(product(inner, down, biases[1], number, below).float(), spread[:, first + number, None])
    return total.to(x.dtype)


def matrix_of(stack: Stack, number: int, count: int) -> Tensor:
    """One of `count`, [rows, columns]; float32 where it is codes."""
    if isinstance(stack, Tensor):
        return stack[number]
    rows = stack.codes.shape[0] // count
    ids = torch.arange(number * rows, (number + 1) * rows, device=stack.codes.device)
    return torch_numbers(stack, torch.float32, ids)


class Mixture:
    """All experts of a layer, whose matrices are numbers or codes.

    gate_up [experts, 2 * inner, hidden], gates first, down [experts, hidden, inner]: or codes of these below one
    another. dtype: of inputs and outputs. chosen: experts of a token. tiles, widen_from: how codes are multiplied, by
    rows of a block of pairs and from how many pairs on numbers first; a clock says (executor/cuda_products.py). Until
    then always, which is what takes most memory. adapted: where adapters are served. total, held: of the experts of all
    ranks, of which `count` are here.
    """

    def __init__(
        self,
        count: int,
        chosen: int,
        gate_up: Stack,
        down: Stack,
        activation: Activation,
        dtype: torch.dtype,
        biases: Biases = (None, None),
        total: int | None = None,
        held: Held = None,
    ) -> None:
        self.total, self.held = total or count, held
        self.count, self.chosen, self.dtype = count, chosen, dtype
        self.gate_up, self.down, self.biases = gate_up, down, biases
        self.activation = activation
        self.tiles: dict[int, CodedTile] = dict.fromkeys(CODED_ROWS, CODED_TILES[0])
        self.widen_from = 0
        self.adapted: Adapted | None = None

    @property
    def hidden_size(self) -> int:
        return self.gate_up.shape[2] if isinstance(self.gate_up, Tensor) else self.gate_up.in_features

    @property
    def forms(self) -> list[str]:
        """Of what stays codes: of gate and up, and of down."""
        return [stack.form for stack in (self.gate_up, self.down) if not isinstance(stack, Tensor)]

    @property
    def shape(self) -> tuple[object, ...]:
        """Two that are the same in this are as quick as each other."""
        stacks = (self.gate_up, self.down)
        sizes = [tuple(s.shape) if isinstance(s, Tensor) else (s.form, *s.codes.shape, *s.scale.shape) for s in stacks]
        return self.count, self.total, self.chosen, self.dtype, self.activation, self.biases[0] is not None, *sizes

    @property
    def num_bytes(self) -> int:
        """Of its matrices."""
        return sum(s.nbytes if isinstance(s, Tensor) else s.num_bytes for s in (self.gate_up, self.down))

    @property
    def ways(self) -> tuple[dict[int, CodedTile], int]:
        """See Linear.ways."""
        return self.tiles, self.widen_from

    @ways.setter
    def ways(self, found: tuple[dict[int, CodedTile], int]) -> None:
        self.tiles, self.widen_from = found

    def __call__(self, x: Tensor, logits: Tensor, chosen: int, *, normalize: bool) -> Tensor:
        """See mix_experts."""
        pairs = len(x) * chosen
        rows = coded_rows(pairs, self.total)
        by_codes = self.forms and pairs < self.widen_from
        return self.mix(x, logits, (rows, self.tiles[rows]) if by_codes else None, chosen, normalize=normalize)

    def mix(
        self,
        x: Tensor,
        logits: Tensor,
        coded: tuple[int, CodedTile] | None,
        chosen: int | None = None,
        *,
        normalize: bool = True,
    ) -> Tensor:
        """In the way that is given."""
        given = (x, logits, self.gate_up, self.down, chosen or self.chosen, self.activation)
        adapted = self.adapted if self.adapted is not None and self.adapted[0].used else None
        options: Any = {"biases": self.biases, "adapted": adapted, "held": self.held}
        return mix_experts(*given, normalize=normalize, coded=coded, **options)


def coded_rows(pairs: int, num_experts: int) -> int:
    """Of a block of pairs, where codes are widened in registers: with few, the weights are read."""
    return CODED_ROWS[pairs >= CODED_MANY * num_experts]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """How a token's experts follow from the router's logits; the fields are those of models.spec.Router.

    bias, expert_scale: float32 [experts], or None.
    """

    chosen: int
    normalize: bool
    score: Literal["softmax", "sigmoid"] = "softmax"
    bias: Tensor | None = None
    groups: int = 1
    groups_chosen: int = 1
    group_best: int = 2
    scale: float = 1.0
    minimum: float = 0.0
    expert_scale: Tensor | None = None
    softcap: float | None = None
    near: float | None = None

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[N, experts] -> the experts of each token int64 [N, chosen], best first, and their shares float32."""
        if self._is_plain:
            return choose_experts(logits, self.chosen, normalize=self.normalize)
        if self.near is not None:
            return self._among_near(logits.float(), self.near)
        if self.softcap is not None:
            logits = by_rows(torch.tanh, logits / self.softcap) * self.softcap
        scores = logits.float()
        scores = scores.softmax(dim=-1) if self.score == "softmax" else by_rows(torch.sigmoid, scores)
        # By the logits where they are in the order of the scores, of which many may be 1.
        rated = logits.float() if self.bias is None and self.groups == 1 else scores
        rated = rated if self.bias is None else rated + self.bias
        if self.groups > 1:
            grouped = rated.reshape(len(rated), self.groups, -1)
            best = grouped.topk(min(self.group_best, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
            kept = torch.zeros_like(best, dtype=torch.bool).scatter_(
                1, best.topk(self.groups_chosen, dim=-1).indices, True
            )
            rated = grouped.masked_fill(~kept[:, :, None], -torch.inf).reshape(rated.shape)
        experts = rated.topk(self.chosen, dim=-1).indices
        shares = scores.gather(1, experts)
        if self.normalize:
            shares = shares / shares.sum(dim=-1, keepdim=True).clamp_min(max(self.minimum, 1e-20))
        if self.expert_scale is not None:
            shares = shares * self.expert_scale[experts]
        return experts, shares * self.scale

    def _among_near(self, logits: Tensor, near: float) -> tuple[Tensor, Tensor]:
        """One expert after the other, each with its share of a softmax over those near it that are left."""
        experts, shares = [], []
        left = logits
        for _ in range(self.chosen):
            best, expert = left.max(dim=-1, keepdim=True)
            far = (best - logits) / torch.maximum(logits.abs(), best) > near
            shares.append(left.masked_fill(far, -torch.inf).softmax(dim=-1).gather(1, expert))
            experts.append(expert)
            left = left.scatter(1, expert, -torch.inf)
        return torch.cat(experts, 1), torch.cat(shares, 1) * self.scale

    def mix(self, x: Tensor, logits: Tensor, mixture: Mixture) -> Tensor:
        """See mix_experts."""
        if self._is_plain:
            return mixture(x, logits, self.chosen, normalize=self.normalize)
        experts, shares = self(logits)
        # Logits by which the kernel comes to the same experts and the same shares, up to their sum.
        logs = shares.clamp_min(1e-30).log()
        given = torch.full_like(logits, -torch.inf, dtype=torch.float32).scatter_(1, experts, logs)
        mixed = mixture(x, given, self.chosen, normalize=True)
        return (mixed * shares.sum(dim=-1, keepdim=True)).to(x.dtype)

    def mix_of_scaled(self, x: Tensor, logits: Tensor, mixture: Mixture) -> Tensor:
        """The sum of a token's experts, each of which reads it times its share."""
        experts, shares = self(logits)
        total = torch.zeros_like(x, dtype=torch.float32)
        for place in range(self.chosen):
            scaled = (x * shares[:, place, None]).to(x.dtype)
            one = torch.full_like(logits, -torch.inf, dtype=torch.float32).scatter_(1, experts[:, place, None], 0.0)
            total += mixture(scaled, one, 1, normalize=True)
        return total.to(x.dtype)

    @property
    def _is_plain(self) -> bool:
        """What the kernels do by themselves."""
        return (
            self.score == "softmax"
            and self.bias is None
            and self.groups == 1
            and self.scale == 1.0
            and self.expert_scale is None
            and self.softcap is None
            and self.near is None
        )
