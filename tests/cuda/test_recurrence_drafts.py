"""Recurrent states of sequences whose drafts are rows: Triton's kernels and torch's forms against decoding, token by
token; by Triton's interpreter, or on the GPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    # Read when a kernel is defined, so it comes before the import below.
    os.environ["TRITON_INTERPRET"] = "1"

from engine.ops.recurrence import torch_causal_conv  # noqa: E402
from engine.ops.state import RowsOnDevice, StatePlan  # noqa: E402
from engine.ops.triton import recurrence  # noqa: E402
from tests.cuda.test_triton import a_recurrence, close, randn  # noqa: E402

SLOTS = 9
# Of each sequence: its slot, its drafts, and how many of them are right; two prompts stand behind, of 3 and 20 tokens.
SEQUENCES = [(4, 3, 1), (2, 0, 0), (7, 5, 5), (1, 2, 0), (5, 0, 0), (3, 1, 1)]
PROMPTS = [(6, 3), (8, 20)]


def tensor(values: Any) -> Tensor:
    return torch.tensor(np.array(values), dtype=torch.int32, device=DEVICE)


def laid_out() -> tuple[list[int], list[int], list[int]]:
    """Slots, drafts and what was drawn behind each of the drafted rows."""
    slots, drafts, drawn = [], [], []
    for slot, count, right in SEQUENCES:
        own = [10 + slot + nth for nth in range(count)]
        slots += [slot] * (1 + count)
        drafts += [-1, *own]
        # Behind a wrong draft some are what comes next, and count for nothing.
        drawn += [*own[:right], 5, *own[right + 1 :], 6][: 1 + count]
    return slots, drafts, drawn


def plans(with_prompts: bool) -> tuple[StatePlan, StatePlan]:
    """Of a step, and of what comes after it."""
    slots, drafts, drawn = laid_out()
    known, behind = tensor(drafts), tensor([*drawn, 99, 99])
    most = 1 + max(count for _, count, _ in SEQUENCES)
    if with_prompts:
        every = np.array([*slots, *(slot for slot, _ in PROMPTS)], np.int32)
        indptr = np.cumsum([0, *[1] * len(slots), *(count for _, count in PROMPTS)]).astype(np.int32)
        step = StatePlan(every, indptr, len(slots)).on(tensor(every), tensor(indptr), known, most)
    else:
        step = StatePlan.of_decodes(tensor(slots), known, most)
    rows = RowsOnDevice(tensor(slots), None, most, most, known, behind)
    return step, StatePlan(np.zeros(0, np.int32), np.zeros(0, np.int32), len(slots), rows)


def one_by_one(run: Any, states: Tensor, with_prompts: bool) -> tuple[dict[int, Any], Tensor]:
    """What each token brings, by its row, and the states behind right drafts. run(rows of the input, states, plan)."""
    found, after = {}, states.clone()
    row = 0
    for slot, count, right in SEQUENCES:
        state = states.clone()
        for nth in range(1 + count):
            found[row] = run([row], state, StatePlan.of_decodes(tensor([slot])))
            if nth == right:
                after[slot] = state[slot]
            row += 1
    for slot, count in PROMPTS if with_prompts else ():
        for _ in range(count):
            found[row] = run([row], after, StatePlan.of_decodes(tensor([slot])))
            row += 1
    return found, after


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("with_prompts", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions(dtype: torch.dtype, with_prompts: bool, by_kernel: bool) -> None:
    channels, taps = 150, 4
    step, settled = plans(with_prompts)
    tokens = len(laid_out()[0]) + (sum(count for _, count in PROMPTS) if with_prompts else 0)
    x = randn(tokens, 2 * channels, dtype=dtype)[:, :channels]
    weight, bias = randn(taps, channels, seed=1), randn(channels, seed=2)
    before = randn(SLOTS, taps - 1, channels, dtype=dtype, seed=3)

    def convolve(rows: Any, states: Tensor, plan: StatePlan) -> Tensor:
        assert plan.device is not None
        if by_kernel:
            return recurrence.causal_conv(x[rows], weight, bias, states, plan.device, silu=True)
        return torch_causal_conv(x[rows], weight, bias, states, plan, silu=True)

    expected, after = one_by_one(convolve, before, with_prompts)
    states = before.clone()
    out = convolve(slice(None), states, step)
    for row, each in expected.items():
        assert torch.equal(out[row], each[0]) if by_kernel else close(out[row], each[0]), row
    for slot, count, _ in SEQUENCES:
        if count:
            assert torch.equal(states[slot], before[slot]), "a sequence with drafts has another state already"
    convolve(slice(0, len(laid_out()[0])), states, settled)
    assert torch.equal(states[1:], after[1:])


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("with_prompts", [True, False])
@pytest.mark.parametrize("delta", [True, False])
def test_recurrences(delta: bool, with_prompts: bool, by_kernel: bool) -> None:
    what, (key_heads, heads, key_dim, value_dim) = a_recurrence(delta)
    step, settled = plans(with_prompts)
    tokens = len(laid_out()[0]) + (sum(count for _, count in PROMPTS) if with_prompts else 0)
    keys, values = key_heads * key_dim, heads * value_dim
    q, k, v = randn(tokens, 2 * keys + values).split([keys, keys, values], 1)
    steps, share = randn(tokens, 2 * heads, seed=8).split(heads, 1)
    before = randn(SLOTS, heads, key_dim, value_dim, seed=9)

    def recur(rows: Any, states: Tensor, plan: StatePlan) -> Tensor:
        given = (*(each[rows] for each in (q, k, v, steps)), share[rows] if delta else None)
        assert plan.device is not None
        if by_kernel:
            return recurrence.recur(what, *given, states, plan.device)
        return what.by_torch(*given, states, plan)

    expected, after = one_by_one(recur, before, with_prompts)
    states = before.clone()
    out = recur(slice(None), states, step)
    for row, each in expected.items():
        assert torch.equal(out[row], each[0]) if by_kernel else close(out[row], each[0]), row
    for slot, count, _ in SEQUENCES:
        if count:
            assert torch.equal(states[slot], before[slot]), "a sequence with drafts has another state already"
    recur(slice(0, len(laid_out()[0])), states, settled)
    assert torch.equal(states[1:], after[1:]) if by_kernel else close(states[1:], after[1:])
