"""POST /v1/embeddings: prompts to vectors, in OpenAI's shape."""

from __future__ import annotations

import base64

from aiohttp import web

from server.answers.base import plain_usage
from server.pooling import Vector, pool, shaped, written
from server.protocol.body import read_body
from server.protocol.embeddings import parse_embedding
from server.protocol.errors import json_response
from server.short_forms import with_short_forms
from server.state import REQUEST_ID, STATE


async def embeddings(request: web.Request) -> web.Response:
    state = request.app[STATE]
    plan = await parse_embedding(await read_body(request), state)
    vectors = await pool(request, f"embd-{request[REQUEST_ID]}", plan.prompts, plan.pooling, plan.terms)

    def item(index: int, vector: Vector) -> dict[str, object]:
        vector = shaped(vector, plan.dimensions, normalize=plan.normalize)
        numbers = base64.b64encode(vector.astype("<f4").tobytes()).decode() if plan.base64 else vector
        return {"object": "embedding", "index": index, "embedding": numbers}

    items = await written(vectors, item)
    usage = plain_usage(sum(map(len, plan.prompts)))
    return json_response({"object": "list", "data": items, "model": plan.model, "usage": usage})


ROUTES = with_short_forms((("POST", "/v1/embeddings", embeddings),))
