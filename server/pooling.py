"""Prompts to vectors through the engine, for embeddings and for scores. Loop thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import orjson
from aiohttp import web

from engine.request import Pooling, SamplingParams
from server.answers.base import raise_early
from server.protocol.generation import Terms, check_count
from server.responder import names_of, submitted
from server.state import STATE

Vector = npt.NDArray[np.float32]

_NO_SAMPLING = SamplingParams(temperature=0.0)
# Below this a vector has no direction; it stays as it is.
_TINY = 1e-12
# Vectors that are written between two turns of the loop: about a millisecond of work.
_AT_ONCE = 32


async def pool(
    request: web.Request,
    response_id: str,
    prompts: Sequence[Sequence[int]],
    pooling: Pooling | list[Pooling],
    terms: Terms,
) -> list[Vector]:
    """The vector of every prompt. pooling: of all, or of each. Raises RequestError for what cannot be served; then none
    of them is."""
    state = request.app[STATE]
    check_count(state, len(prompts))
    each = pooling if isinstance(pooling, list) else [pooling] * len(prompts)
    requests = [
        terms.request(f"{response_id}-{index}", prompt, _NO_SAMPLING, stream=False, pooling=own)
        for index, (prompt, own) in enumerate(zip(prompts, each, strict=True))
    ]
    vectors: list[Vector] = []
    async with submitted(state, requests, names_of(request, response_id)) as streams:
        for stream in streams:
            raise_early(await stream.collect())
            assert stream.pooled is not None
            vectors.append(stream.pooled)
    return vectors


def shaped(vector: Vector, dimensions: int, *, normalize: bool) -> Vector:
    """Its first numbers, and those at length 1 where that is asked for."""
    vector = np.ascontiguousarray(vector[:dimensions])
    return scaled(vector) if normalize else vector


async def written(vectors: list[Vector], item: Callable[[int, Vector], object]) -> list[orjson.Fragment]:
    """JSON of what `item` makes of each vector and its index; arrays are written as numbers."""
    items: list[orjson.Fragment] = []
    for index, vector in enumerate(vectors):
        items.append(orjson.Fragment(orjson.dumps(item(index, vector), option=orjson.OPT_SERIALIZE_NUMPY)))
        if len(items) % _AT_ONCE == 0:
            await asyncio.sleep(0)
    return items


def shares(numbers: Vector, activation: str) -> Vector:
    """What a classifier's numbers are shares of: float64 along the last axis."""
    wide = numbers.astype(np.float64)
    if activation == "sigmoid":
        wide = 0.5 + 0.5 * np.tanh(wide / 2)
    elif activation == "softmax":
        wide = np.exp(wide - wide.max(axis=-1, keepdims=True))
        wide /= wide.sum(axis=-1, keepdims=True)
    return wide.astype(np.float32)


def scaled(vector: Vector) -> Vector:
    """The vector at length 1."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return (vector / max(length, _TINY)).astype(np.float32)
