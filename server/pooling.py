"""Prompts to vectors through the engine, for embeddings and for scores. Loop thread."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.request import Pooling, Request, SamplingParams
from server.protocol.generation import check_count
from server.responder import raise_early, submitted
from server.state import State

Vector = npt.NDArray[np.float32]

_NO_SAMPLING = SamplingParams(temperature=0.0)
# Below this a vector has no direction; it stays as it is.
_TINY = 1e-12


async def pool(
    state: State, response_id: str, prompts: list[list[int]], pooling: Pooling, namespace: str
) -> list[Vector]:
    """The vector of every prompt. Raises RequestError for what cannot be served; then none of them is."""
    check_count(state, len(prompts))
    requests = [
        Request(f"{response_id}-{index}", prompt, _NO_SAMPLING, False, namespace, pooling=pooling)
        for index, prompt in enumerate(prompts)
    ]
    vectors: list[Vector] = []
    async with submitted(state, requests) as streams:
        for stream in streams:
            raise_early(await stream.collect())
            assert stream.pooled is not None
            vectors.append(stream.pooled)
    return vectors


def scaled(vector: Vector) -> Vector:
    """The vector at length 1."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return (vector / max(length, _TINY)).astype(np.float32)
