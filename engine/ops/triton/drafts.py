"""Which drafts were right, in one launch: the last token of every sequence of a step in which each draft is a row.

Called by ops/sampling/device.py, whose `accept` in torch is the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.ops.triton.pdl import launch_options, overlap

# Rows that are looked at in one go.
BLOCK = 32


@triton.jit
def _accept(token_ids_ptr, drawn_ptr, slots_ptr, last_token_ptr, num_rows, BLOCK: tl.constexpr, PDL: tl.constexpr):
    overlap(PDL)
    row = tl.program_id(0)
    if tl.load(token_ids_ptr + row) >= 0:
        return  # a draft: the row where its sequence begins sees to it
    # The first row behind it that is no right draft; that of another sequence brings -1, which nobody draws.
    end, searches = row + 1, True
    while searches:
        draft = end + tl.arange(0, BLOCK)
        inside = draft < num_rows
        token = tl.load(token_ids_ptr + draft, mask=inside, other=-1)
        before = tl.load(drawn_ptr + draft - 1, mask=inside, other=0)
        right = (token >= 0) & (token == before)
        found = tl.min(tl.where(right, BLOCK, tl.arange(0, BLOCK)), axis=0)
        end += found
        searches = found == BLOCK
    slot = tl.load(slots_ptr + row).to(tl.int64)
    tl.store(last_token_ptr + slot, tl.maximum(tl.load(drawn_ptr + end - 1), 0))  # it may have drawn no numbers


def accept_drafts(token_ids: Tensor, drawn: Tensor, slots: Tensor, last_token: Tensor) -> None:
    """See `accept`."""
    rows = token_ids.shape[0]
    _accept[(rows,)](token_ids, drawn, slots, last_token, rows, BLOCK=BLOCK, num_warps=1, **launch_options())
