"""POST /v1/embeddings: prompts to vectors, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
import orjson
from aiohttp import web

from server.endpoints.short import with_short_forms
from server.pooling import Vector, pool, scaled
from server.protocol.body import read_body
from server.protocol.embeddings import EmbeddingPlan, parse_embedding
from server.protocol.errors import json_response
from server.state import REQUEST_ID, STATE

# Vectors that are written between two turns of the loop: about a millisecond of work.
_AT_ONCE = 32


async def embeddings(request: web.Request) -> web.Response:
    state = request.app[STATE]
    plan = await parse_embedding(await read_body(request), state)
    vectors = await pool(request, f"embd-{request[REQUEST_ID]}", plan.prompts, plan.pooling, plan.terms)
    items: list[orjson.Fragment] = []
    for index, vector in enumerate(vectors):
        items.append(_item(index, vector, plan))
        if len(items) % _AT_ONCE == 0:
            await asyncio.sleep(0)
    num_tokens = sum(map(len, plan.prompts))
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return json_response({"object": "list", "data": items, "model": plan.model, "usage": usage})


def _item(index: int, vector: Vector, plan: EmbeddingPlan) -> orjson.Fragment:
    vector = np.ascontiguousarray(vector[: plan.dimensions])
    if plan.normalize:
        vector = scaled(vector)
    written = base64.b64encode(vector.astype("<f4").tobytes()).decode() if plan.base64 else vector
    item = {"object": "embedding", "index": index, "embedding": written}
    return orjson.Fragment(orjson.dumps(item, option=orjson.OPT_SERIALIZE_NUMPY))


ROUTES = with_short_forms((("POST", "/v1/embeddings", embeddings),))
