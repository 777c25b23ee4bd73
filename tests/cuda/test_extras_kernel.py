"""Penalties of rows that are drafts: the kernel, its reference, and counting by hand; by Triton's interpreter, or on
the GPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    # Read when a kernel is defined, so it comes before the import below.
    os.environ["TRITON_INTERPRET"] = "1"

from engine.ops.sampling.device_extras import torch_adjust  # noqa: E402
from engine.ops.triton import extras  # noqa: E402

SLOTS, VOCAB = 5, 2100
PENALTIES = [[0, 0, 0], [0.5, 0, 0], [0.2, 0.3, -0.4], [0, 1, 0], [0, 0, 2]]


def rows_of(seed: int) -> tuple[list[int], list[int]]:
    """Slots of rows, and the draft that each is of: texts of one, two and seven rows, and two rows of prompts, which
    are no drafts whatever stands there."""
    rng = np.random.default_rng(seed)
    slots, drafts = [], []
    for slot, count in zip(rng.permutation(SLOTS).tolist(), (2, 7, 1, 3), strict=False):
        slots += [slot] * count
        # Few ids, so that they come twice, and at the ends of the kernel's blocks.
        drafts += [-1, *rng.choice([0, 5, 2047, 2048, VOCAB - 1], count - 1).tolist()]
    return [*slots, 2, 4], drafts


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_each_row_counts_the_drafts_before_it(biased: bool, seed: int) -> None:
    slots, drafts = rows_of(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(slots), VOCAB, generator=generator).to(DEVICE)
    bias = torch.randn(SLOTS, VOCAB, generator=generator).to(DEVICE) if biased else None
    counts = torch.randint(0, 2, (SLOTS, VOCAB), generator=generator, dtype=torch.int32).to(DEVICE)
    prompt = (torch.rand(SLOTS, VOCAB, generator=generator) < 0.3).to(DEVICE)
    tables: Any = bias, counts, prompt, torch.tensor(PENALTIES, device=DEVICE, dtype=torch.float32)
    given = logits, torch.tensor(slots, device=DEVICE)
    there = torch.tensor(drafts, dtype=torch.int32, device=DEVICE)
    kept = counts.clone()
    ours, theirs = extras.adjust(*given, *tables, there), torch_adjust(*given, *tables, there, 8)
    begin = 0
    for row, slot in enumerate(slots):
        begin = row if row >= len(drafts) or drafts[row] < 0 else begin
        after = counts.clone()
        for draft in drafts[begin + 1 : row + 1] if row < len(drafts) else []:
            after[slot, draft] += 1
        alone = torch_adjust(logits[row : row + 1], given[1][row : row + 1], bias, after, *tables[2:])
        assert torch.equal(theirs[row], alone[0])
        assert torch.allclose(ours[row], alone[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, kept), "what is tried is not counted"
