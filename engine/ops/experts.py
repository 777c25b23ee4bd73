"""A mixture of experts with its weights stacked: the form that a GPU multiplies without asking the host for counts.

Called by models/parts/experts.py on the executor's stream. No value is read on the host and every shape depends on the
number of tokens alone, so that a graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.activation import GATED_ACTIVATIONS, by_rows
from engine.ops.triton.runtime import on_gpu


def choose_experts(logits: Tensor, chosen: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """[N, experts] -> the experts of each token int64 [N, chosen], best first, and their shares float32.

    normalize: shares of the chosen add up to 1.
    """
    shares, experts = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(chosen, dim=-1)
    if normalize:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return experts, shares


def mix_experts(
    x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, chosen: int, activation: str, *, normalize: bool
) -> Tensor:
    """x [N, hidden] -> [N, hidden]: each token's best `chosen` experts, added up by share in float32, rounded once.

    logits [N, experts]: of the router. gate_up [experts, 2 * inner, hidden], down [experts, hidden, inner].
    activation: one of GATED_ACTIVATIONS. An expert's own result is rounded to the dtype.
    """
    if on_gpu(x):
        from engine.ops.triton import experts as kernels

        return kernels.mix_experts(x, logits, gate_up, down, chosen, activation, normalize=normalize)
    return torch_mix_experts(x, logits, gate_up, down, chosen, activation, normalize=normalize)


def torch_mix_experts(
    x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, chosen: int, activation: str, *, normalize: bool
) -> Tensor:
    """The same in torch: every expert computes every token and counts with its share, mostly 0."""
    experts, shares = choose_experts(logits, chosen, normalize=normalize)
    spread = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, experts, shares)
    total = torch.zeros_like(x, dtype=torch.float32)
    activate = GATED_ACTIVATIONS[activation]
    for number in range(gate_up.shape[0]):
        output = F.linear(activate(F.linear(x, gate_up[number])), down[number])
        total.addcmul_(output.float(), spread[:, number, None])
    return total.to(x.dtype)


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

    def mix(self, x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
        """See mix_experts."""
        if self._is_plain:
            return mix_experts(x, logits, gate_up, down, self.chosen, activation, normalize=self.normalize)
        experts, shares = self(logits)
        # Logits by which the kernel comes to the same experts and the same shares, up to their sum.
        logs = shares.clamp_min(1e-30).log()
        given = torch.full_like(logits, -torch.inf, dtype=torch.float32).scatter_(1, experts, logs)
        mixed = mix_experts(x, given, gate_up, down, self.chosen, activation, normalize=True)
        return (mixed * shares.sum(dim=-1, keepdim=True)).to(x.dtype)

    def mix_of_scaled(self, x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
        """The sum of a token's experts, each of which reads it times its share."""
        experts, shares = self(logits)
        total = torch.zeros_like(x, dtype=torch.float32)
        for place in range(self.chosen):
            scaled = (x * shares[:, place, None]).to(x.dtype)
            one = torch.full_like(logits, -torch.inf, dtype=torch.float32).scatter_(1, experts[:, place, None], 0.0)
            total += mix_experts(scaled, one, gate_up, down, 1, activation, normalize=True)
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
