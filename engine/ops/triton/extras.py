"""Biases and penalties of a row's logits in one launch instead of fifteen. Called by ops/sampling/device_extras.py on
CUDA tensors; `torch_adjust` there is the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.triton.pdl import launch_options, overlap

BLOCK = 2048


@triton.jit(do_not_specialize=["num_drafts"])
def _adjust(
    logits_ptr,
    slots_ptr,
    bias_ptr,
    counts_ptr,
    prompt_ptr,
    penalties_ptr,
    drafts_ptr,
    out_ptr,
    vocab,
    num_drafts,
    BIASED: tl.constexpr,
    PENALISED: tl.constexpr,
    DRAFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    overlap(PDL)
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = ids < vocab
    slot = tl.load(slots_ptr + row)
    at = slot * vocab + ids
    x = tl.load(logits_ptr + row * vocab + ids, mask=mask, other=0.0)
    if BIASED:
        x += tl.load(bias_ptr + at, mask=mask, other=0.0)
    if PENALISED:
        counts = tl.load(counts_ptr + at, mask=mask, other=0)
        if DRAFTED:
            # Of this row and of those before it, up to where its sequence begins.
            back, counting = row, row < num_drafts
            while counting:
                draft = tl.load(drafts_ptr + back)
                counts += (ids == draft).to(tl.int32)
                counting = draft >= 0
                back -= 1
        seen = (counts > 0) | (tl.load(prompt_ptr + at, mask=mask, other=0) > 0)
        repetition = 1.0 + tl.load(penalties_ptr + slot * 3)
        x = tl.where(seen, tl.where(x > 0.0, x / repetition, x * repetition), x)
        x -= tl.load(penalties_ptr + slot * 3 + 1) * counts.to(tl.float32)
        x -= tl.load(penalties_ptr + slot * 3 + 2) * (counts > 0).to(tl.float32)
    tl.store(out_ptr + row * vocab + ids, x, mask=mask)


def adjust(
    logits: Tensor,
    slots: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    prompt: Tensor | None,
    penalties: Tensor | None,
    drafts: Tensor | None = None,
) -> Tensor:
    """See `torch_adjust`."""
    if bias is None and counts is None:
        return logits
    rows, vocab = logits.shape
    assert logits.is_contiguous() and logits.dtype == torch.float32
    out = torch.empty_like(logits)
    drafted = counts is not None and drafts is not None
    # What is counted is held over a loop: more of it would leave no registers for a second block.
    block = BLOCK // 2 if drafted else BLOCK
    _adjust[(rows, triton.cdiv(vocab, block))](
        logits,
        slots,
        logits if bias is None else bias,
        logits if counts is None else counts,
        logits if prompt is None else prompt.view(torch.uint8),
        logits if penalties is None else penalties,
        slots if drafts is None else drafts,
        out,
        vocab,
        0 if drafts is None else drafts.shape[0],
        BIASED=bias is not None,
        PENALISED=counts is not None,
        DRAFTED=drafted,
        BLOCK=block,
        num_warps=4,
        **launch_options(),
    )
    return out
