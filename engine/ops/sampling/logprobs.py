"""Log-probabilities of rows of logits: the normaliser, the most probable tokens, and a token's rank.

Called by the CPU executor's thread, through extras.py. A row's figures do not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.forward import Int32Array

Float32Array = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.int64]

# Logits of a prompt's positions are made in slices of so many numbers (32 MB), however long the prompt is.
SLICE_ELEMENTS = 1 << 23
# At least so many of the most probable are looked for: most sampled tokens are among them, and their rank is known.
MIN_TOP = 8


@dataclass(slots=True)
class Normalised:
    """What is known of rows before their tokens are: log of the sum of exponentials, and the best logits.

    lse float32 [m]; top_ids int32 and top float32 [m, k], best first and of equals the lowest id; k is at least
    what was asked for.
    """

    lse: Float32Array
    top_ids: Int32Array
    top: Float32Array


def normalise(logits: Tensor, rows: IndexArray, k: int) -> Normalised:
    """float32 [R, V], int64 [m] -> the figures of these rows."""
    vocab = logits.shape[1]
    k = min(max(k, MIN_TOP), vocab)
    chosen = logits if len(rows) == len(logits) else logits[torch.from_numpy(rows)]
    # Not logsumexp: it cuts a single row among the threads, and the last bit would depend on how many there are.
    best = chosen.amax(-1)
    lse = best - torch.log_softmax(chosen, -1).amax(-1)
    top, ids = chosen.topk(k, dim=-1)
    # Of equals the lowest id: a stable sort of what is sorted by id.
    ids, order = ids.sort(dim=-1)
    top, again = top.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return Normalised(lse.numpy(), ids.gather(1, again).to(torch.int32).numpy(), top.numpy())


def ranks(logits: Tensor, rows: IndexArray, values: Float32Array, found: Normalised) -> Int32Array:
    """How many logits of the row are above each value, plus one. values: one of each row."""
    out: Int32Array = ((found.top > values[:, None]).sum(-1) + 1).astype(np.int32)
    # Below the k-th best only a count of the row can tell.
    below = np.flatnonzero(values < found.top[:, -1])
    if len(below):
        limit = torch.from_numpy(values[below])[:, None]
        out[below] = (logits[torch.from_numpy(rows[below])] > limit).sum(-1).numpy() + 1
    return out


def of_targets(
    hidden: Tensor, make_logits: Callable[[Tensor], Tensor], targets: Int32Array, k: int, vocab: int
) -> tuple[Float32Array, Int32Array, Int32Array, Float32Array]:
    """Log-probabilities, ranks, top ids and top log-probabilities of given next tokens: [n, hidden], int32 [n].

    At most SLICE_ELEMENTS logits exist at a time.
    """
    parts: list[tuple[Float32Array, Int32Array, Int32Array, Float32Array]] = []
    size = max(1, SLICE_ELEMENTS // vocab)
    for start in range(0, len(targets), size):
        logits = make_logits(hidden[start : start + size]).contiguous()
        wanted = targets[start : start + len(logits)]
        rows = np.arange(len(logits), dtype=np.int64)
        values = logits.numpy()[rows, wanted]
        found = normalise(logits, rows, k)
        parts.append(
            (
                values - found.lse,
                ranks(logits, rows, values, found),
                found.top_ids[:, :k],
                found.top[:, :k] - found.lse[:, None],
            )
        )
    return (
        np.concatenate([part[0] for part in parts]),
        np.concatenate([part[1] for part in parts]),
        np.concatenate([part[2] for part in parts]),
        np.concatenate([part[3] for part in parts]),
    )
