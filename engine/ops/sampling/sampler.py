"""One token per row of logits: greedy or drawn, with temperature, top_k, top_p and min_p in HF's order.

Called by the CPU executor's thread. A draw is the inverse of the distribution function, in order of token ids, at a
uniform number hashed from (seed, position): nothing else of the batch can change it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.forward import SAMPLING_DTYPE, Int32Array
from engine.ops import native

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sample(logits: Tensor, params: npt.NDArray[Any], positions: Int32Array) -> Int32Array:
    """float32 [R, V], SAMPLING_DTYPE [R], int32 [R] -> int32 [R].

    positions: index in its sequence of each new token. temperature <= 0 is greedy, and the lowest id wins a tie.
    While a position is below the row's min_length its stop_ids are masked (in `logits`, in place).
    top_k keeps all ids that tie with the k-th; top_p keeps the likeliest ids until their mass reaches it, at
    least one; min_p drops what is less likely than min_p times the likeliest.
    """
    rows, vocab = logits.shape
    library = native.library()
    if library is None or not logits.is_cpu or logits.dtype != torch.float32 or not logits.is_contiguous():
        return torch_sample(logits, params, positions)
    assert params.dtype == SAMPLING_DTYPE and params.dtype.itemsize == 96
    params, positions = np.ascontiguousarray(params), np.ascontiguousarray(positions, np.int32)
    assert len(params) == rows and len(positions) == rows
    out = np.empty(rows, np.int32)
    library.by_work(2 * rows * vocab).ol_sample(
        logits.data_ptr(),
        rows,
        vocab,
        params.ctypes.data,
        positions.ctypes.data,
        out.ctypes.data,
        torch.get_num_threads(),
    )
    return out


def uniform(seeds: npt.NDArray[np.uint64], positions: Int32Array) -> npt.NDArray[np.float64]:
    """[R], [R] -> [R] in [0, 1), 53 bits: two rounds of splitmix64's finaliser over seed and position."""

    def mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    with np.errstate(over="ignore"):
        counter = (positions.astype(np.int64).astype(np.uint64) + np.uint64(1)) * _GOLDEN
        bits = mix(mix(np.asarray(seeds, np.uint64) + _GOLDEN) + counter)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def torch_sample(logits: Tensor, params: npt.NDArray[Any], positions: Int32Array) -> Int32Array:
    """The same without the native kernels: sorts the rows that filter."""
    params, positions = np.asarray(params), np.asarray(positions, np.int32)
    masked = np.flatnonzero((positions < params["min_length"]) & (params["num_stop_ids"] > 0))
    for row in masked:
        ids = params["stop_ids"][row][: params["num_stop_ids"][row]]
        logits[int(row), torch.from_numpy(ids[(ids >= 0) & (ids < logits.shape[1])].astype(np.int64))] = -torch.inf
    out: Int32Array = torch.argmax(logits, dim=-1).to(torch.int32).cpu().numpy()
    drawn = np.flatnonzero(params["temperature"] > 0)
    if not len(drawn):
        return out
    params, vocab = params[drawn], logits.shape[1]
    index = torch.from_numpy(drawn).to(logits.device)

    def column(values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.float64)).to(logits.device)[:, None]

    x = logits[index].double()
    x = (x - x.amax(-1, keepdim=True)) / column(params["temperature"])
    k = np.where((params["top_k"] > 0) & (params["top_k"] < vocab), params["top_k"], vocab)
    if (k < vocab).any():
        best = x.topk(int(k[k < vocab].max()), dim=-1).values
        place = torch.from_numpy(np.minimum(k, best.shape[1]).astype(np.int64) - 1).to(x.device)[:, None]
        floor = best.gather(1, place).masked_fill(column(k) >= vocab, -torch.inf)
        x = x.masked_fill(x < floor, -torch.inf)
    weights = x.exp()
    if (params["top_p"] < 1).any():
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        ahead = ordered.cumsum(-1) - ordered
        keep = ahead < column(params["top_p"]) * weights.sum(-1, keepdim=True)
        keep |= column(params["top_p"]) >= 1
        keep[:, 0] = True
        weights = weights * torch.zeros_like(keep).scatter_(1, order, keep)
    weights = weights.masked_fill(weights < column(params["min_p"]), 0.0)
    mass = weights.cumsum(-1)
    target = column(uniform(params["seed"], positions[drawn])) * mass[:, -1:]
    chosen = (mass <= target).sum(-1)
    # Rounding may leave the target at the very end: the last id with any weight then.
    last = vocab - 1 - torch.argmax((weights > 0).flip(-1).to(torch.int8), dim=-1)
    out[drawn] = torch.minimum(chosen, last).to(torch.int32).cpu().numpy()
    return out
