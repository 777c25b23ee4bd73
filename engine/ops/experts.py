"""A mixture of experts with its weights stacked: the form that a GPU multiplies without asking the host for counts.

Called by models/parts/experts.py on the executor's stream. No value is read on the host and every shape depends on the
number of tokens alone, so that a graph can hold it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.activation import GATED_ACTIVATIONS
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
