"""POST /classify and /pooling, as vLLM has them: labels of texts, and what else a model makes of texts and tokens."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence

from aiohttp import web

from server.answers.base import plain_usage
from server.pooling import Vector, pool, scaled, shares, written
from server.protocol.body import read_body
from server.protocol.classes import classifier_of, parse_classify, parse_pooling
from server.protocol.errors import json_response
from server.state import REQUEST_ID, STATE


async def classify(request: web.Request) -> web.Response:
    """The most probable label of each text, and the shares of all."""
    state = request.app[STATE]
    plan = await parse_classify(await read_body(request), state)
    response_id = f"classify-{request[REQUEST_ID]}"
    rated = await pool(request, response_id, plan.prompts, plan.pooling, plan.terms)
    labels = classifier_of(state.model).labels

    def item(index: int, numbers: Vector) -> dict[str, object]:
        probs = shares(numbers, plan.activation)
        return {"index": index, "label": labels[int(probs.argmax())], "probs": probs, "num_classes": len(probs)}

    return _answer(response_id, plan.model, await written(rated, item), plan.prompts)


async def pooling(request: web.Request) -> web.Response:
    """A vector of each text, or one of each of its tokens."""
    state = request.app[STATE]
    plan = await parse_pooling(await read_body(request), state)
    response_id = f"pool-{request[REQUEST_ID]}"
    vectors = await pool(request, response_id, plan.prompts, plan.pooling, plan.terms)

    def item(index: int, vector: Vector) -> dict[str, object]:
        vector = shares(vector, plan.activation)
        vector = scaled(vector) if plan.normalize else vector
        data = base64.b64encode(vector.astype("<f4").tobytes()).decode() if plan.base64 else vector
        return {"index": index, "object": "pooling", "data": data}

    return _answer(response_id, plan.model, await written(vectors, item), plan.prompts)


def _answer(response_id: str, model: str, items: Sequence[object], prompts: Sequence[Sequence[int]]) -> web.Response:
    return json_response(
        {
            "id": response_id,
            "object": "list",
            "created": int(time.time()),
            "model": model,
            "data": items,
            "usage": plain_usage(sum(map(len, prompts)), 0),
        }
    )


ROUTES = tuple(
    ("POST", prefix + path, handler)
    for path, handler in (("/classify", classify), ("/pooling", pooling))
    for prefix in ("", "/v1")
)
