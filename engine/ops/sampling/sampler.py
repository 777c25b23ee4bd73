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


def process(logits: Tensor, rows: npt.NDArray[np.int64], params: npt.NDArray[Any], positions: Int32Array) -> Tensor:
    """What `sample` draws from in some rows: float32 [R, V], int64 [m], as for `sample` -> float32 [m, V].

    (logit - best) / temperature for what the filters keep, -inf for all else. Greedy rows stay as they are: neither
    temperature nor filters have a say in them.
    """
    vocab, m = logits.shape[1], len(rows)
    library = native.library()
    if library is None or not logits.is_cpu or logits.dtype != torch.float32 or not logits.is_contiguous():
        return _torch_process(logits, rows, params, positions)
    params, positions = np.ascontiguousarray(params), np.ascontiguousarray(positions, np.int32)
    rows, out = np.ascontiguousarray(rows, np.int64), torch.empty((m, vocab), dtype=torch.float32)
    library.by_work(2 * m * vocab).ol_process(
        logits.data_ptr(),
        vocab,
        rows.ctypes.data,
        m,
        params.ctypes.data,
        positions.ctypes.data,
        out.data_ptr(),
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
    _mask_stops(logits, params, positions)
    out: Int32Array = torch.argmax(logits, dim=-1).to(torch.int32).cpu().numpy()
    drawn = np.flatnonzero(params["temperature"] > 0)
    if not len(drawn):
        return out
    params, vocab = params[drawn], logits.shape[1]
    weights = _kept(logits[torch.from_numpy(drawn).to(logits.device)], params).exp()
    mass = weights.cumsum(-1)
    target = _column(uniform(params["seed"], positions[drawn]), logits) * mass[:, -1:]
    chosen = (mass <= target).sum(-1)
    # Rounding may leave the target at the very end: the last id with any weight then.
    last = vocab - 1 - torch.argmax((weights > 0).flip(-1).to(torch.int8), dim=-1)
    out[drawn] = torch.minimum(chosen, last).to(torch.int32).cpu().numpy()
    return out


def _torch_process(
    logits: Tensor, rows: npt.NDArray[np.int64], params: npt.NDArray[Any], positions: Int32Array
) -> Tensor:
    params = np.asarray(params)[rows]
    out = logits[torch.from_numpy(rows)].float()
    _mask_stops(out, params, np.asarray(positions, np.int32)[rows])
    drawn = np.flatnonzero((params["temperature"] > 0) & np.isfinite(out.amax(-1).numpy()))
    if len(drawn):
        index = torch.from_numpy(drawn)
        out[index] = _kept(out[index], params[drawn]).float()
    return out


def _mask_stops(logits: Tensor, params: npt.NDArray[Any], positions: Int32Array) -> None:
    masked = np.flatnonzero((positions < params["min_length"]) & (params["num_stop_ids"] > 0))
    for row in masked:
        ids = params["stop_ids"][row][: params["num_stop_ids"][row]]
        logits[int(row), torch.from_numpy(ids[(ids >= 0) & (ids < logits.shape[1])].astype(np.int64))] = -torch.inf


def _column(values: npt.NDArray[Any], beside: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float64)).to(beside.device)[:, None]


def _kept(logits: Tensor, params: npt.NDArray[Any]) -> Tensor:
    """float32 [R, V], of rows that are drawn -> float64: (logit - best) / temperature, -inf for what filters drop."""
    vocab, x = logits.shape[1], logits.double()

    def column(values: npt.NDArray[Any]) -> Tensor:
        return _column(values, logits)

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
        x = x.masked_fill(~torch.zeros_like(keep).scatter_(1, order, keep), -torch.inf)
    return x.masked_fill(weights < column(params["min_p"]), -torch.inf)
