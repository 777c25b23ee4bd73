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
from engine.ops import native

Float32Array = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.int64]

# Logits of a prompt's positions are made in slices of so many numbers (32 MB), however long the prompt is.
SLICE_ELEMENTS = 1 << 23
# At least so many of the most probable are looked for: most sampled tokens are among them, and their rank is known.
MIN_TOP = 8


@dataclass(slots=True)
class Normalised:
    """What is known of rows before their tokens are: log of the sum of exponentials, and the best logits.

    log_sum float32 [m]: log of the sum of exp(logit - best), a number of 0 to log(V). top_ids int32 and top
    float32 [m, k]: best first, of equals the lowest id; k is at least what was asked for.
    """

    log_sum: Float32Array
    top_ids: Int32Array
    top: Float32Array

    def logprobs(self, logits: Float32Array) -> Float32Array:
        """Of logits [m] or [m, n] of the rows. The best is taken away first: that loses no digits near 0."""
        if logits.ndim == 1:
            return (logits - self.top[:, 0]) - self.log_sum
        return (logits - self.top[:, :1]) - self.log_sum[:, None]


def normalise(logits: Tensor, rows: IndexArray, k: int) -> Normalised:
    """float32 [R, V], int64 [m] -> the figures of these rows."""
    vocab = logits.shape[1]
    k = min(max(k, MIN_TOP), vocab)
    library = _library(logits)
    if library is None:
        return _torch_normalise(logits[torch.from_numpy(rows)], k)
    rows, m = np.ascontiguousarray(rows, np.int64), len(rows)
    found = Normalised(np.empty(m, np.float32), np.empty((m, k), np.int32), np.empty((m, k), np.float32))
    library.by_work(2 * m * vocab).ol_normalise(
        logits.data_ptr(),
        vocab,
        rows.ctypes.data,
        m,
        k,
        found.log_sum.ctypes.data,
        found.top_ids.ctypes.data,
        found.top.ctypes.data,
        torch.get_num_threads(),
    )
    return found


def _library(logits: Tensor) -> native.Library | None:
    usable = logits.is_cpu and logits.dtype == torch.float32 and logits.is_contiguous()
    return native.library() if usable else None


def _torch_normalise(logits: Tensor, k: int) -> Normalised:
    """The same without the native kernels, a row at a time."""
    # Not logsumexp: it cuts a single row among the threads, and the last bit would depend on how many there are.
    log_sum = -torch.log_softmax(logits, -1).amax(-1)
    top_ids = np.empty((len(logits), k), np.int32)
    floors = logits.topk(k, dim=-1).values[:, -1]
    for index, (row, floor) in enumerate(zip(logits, floors, strict=True)):
        # All that tie with the k-th, in order of their ids: topk takes any of them.
        ids = (row >= floor).nonzero()[:, 0]
        order = row[ids].sort(descending=True, stable=True).indices[:k]
        top_ids[index] = ids[order].numpy()
    return Normalised(log_sum.numpy(), top_ids, logits.gather(1, torch.from_numpy(top_ids).long()).numpy())


def ranks(logits: Tensor, rows: IndexArray, values: Float32Array, found: Normalised) -> Int32Array:
    """How many logits of the row are above each value, plus one. values: one of each row."""
    out: Int32Array = ((found.top > values[:, None]).sum(-1) + 1).astype(np.int32)
    # Below the k-th best only a count of the row can tell.
    below = np.flatnonzero(values < found.top[:, -1])
    if not len(below):
        return out
    library = _library(logits)
    if library is None:
        limit = torch.from_numpy(values[below])[:, None]
        out[below] = (logits[torch.from_numpy(rows[below])] > limit).sum(-1).numpy() + 1
        return out
    counted = np.empty(len(below), np.int32)
    asked, limits = np.ascontiguousarray(rows[below], np.int64), np.ascontiguousarray(values[below], np.float32)
    vocab = logits.shape[1]
    library.by_work(len(below) * vocab // 2).ol_ranks(
        logits.data_ptr(),
        vocab,
        asked.ctypes.data,
        len(below),
        limits.ctypes.data,
        counted.ctypes.data,
        torch.get_num_threads(),
    )
    out[below] = counted
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
                found.logprobs(values),
                ranks(logits, rows, values, found),
                found.top_ids[:, :k],
                found.logprobs(found.top[:, :k]),
            )
        )
    return (
        np.concatenate([part[0] for part in parts]),
        np.concatenate([part[1] for part in parts]),
        np.concatenate([part[2] for part in parts]),
        np.concatenate([part[3] for part in parts]),
    )
