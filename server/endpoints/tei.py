"""POST /embed, /embed_all, /predict, /similarity and GET /info, in the shapes of text-embeddings-inference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from aiohttp import web

from engine.models.spec import Classifier
from engine.request import Pooling
from server.endpoints.info import version
from server.pooling import Vector, pool, shaped, shares, written
from server.protocol.body import read_body
from server.protocol.embeddings import MAX_INPUTS
from server.protocol.errors import json_response
from server.protocol.naming import in_words_of
from server.protocol.tei import (
    EMBED_NAMES,
    SIMILARITY_NAMES,
    error_body,
    parse_embed,
    parse_embed_all,
    parse_predict,
    parse_similarity,
)
from server.scoring import cosine
from server.state import REQUEST_ID, STATE


async def embed(request: web.Request) -> web.Response:
    """The vector of each text."""
    state, body = request.app[STATE], await read_body(request)
    with in_words_of(EMBED_NAMES):
        plan = await parse_embed(body, state)
        vectors = await pool(request, f"embd-{request[REQUEST_ID]}", plan.prompts, plan.pooling, plan.terms)
    return json_response(
        await written(vectors, lambda _, each: shaped(each, plan.dimensions, normalize=plan.normalize))
    )


async def embed_all(request: web.Request) -> web.Response:
    """The vectors of each text's tokens."""
    state, body = request.app[STATE], await read_body(request)
    with in_words_of(EMBED_NAMES):
        plan = await parse_embed_all(body, state)
        vectors = await pool(request, f"embd-{request[REQUEST_ID]}", plan.prompts, Pooling("all"), plan.terms)
    return json_response(await written(vectors, lambda _, each: np.ascontiguousarray(each)))


async def predict(request: web.Request) -> web.Response:
    """The labels of each text, or pair, the most probable first."""
    state, body = request.app[STATE], await read_body(request)
    with in_words_of(EMBED_NAMES):
        plan = await parse_predict(body, state)
        rated = await pool(request, f"classify-{request[REQUEST_ID]}", plan.prompts, plan.poolings, plan.terms)
    answers = await written(rated, lambda _, numbers: _labelled(shares(numbers, plan.activation), plan.labels))
    return json_response(answers if plan.many else answers[0])


async def similarity(request: web.Request) -> web.Response:
    """The cosine of one text's vector and each of the others'."""
    state, body = request.app[STATE], await read_body(request)
    with in_words_of(SIMILARITY_NAMES):
        plan = await parse_similarity(body, state)
        vectors = await pool(request, f"embd-{request[REQUEST_ID]}", plan.prompts, plan.pooling, plan.terms)
    first = shaped(vectors[0], plan.dimensions, normalize=True)
    return json_response(
        await written(vectors[1:], lambda _, each: cosine(first, shaped(each, plan.dimensions, normalize=True)))
    )


async def info(request: web.Request) -> web.Response:
    """What is served, and how much of it at once."""
    state = request.app[STATE]
    abilities, options = state.model.abilities, state.engine.config
    head = abilities.classifier
    kind: dict[str, object] = {}
    if head is not None and head.pooling != "all":  # /predict is of whole texts
        kind["reranker" if abilities.ranks else "classifier"] = _label_table(head)
    elif abilities.embedding is not None:
        kind["embedding"] = {"pooling": "last_token" if abilities.embedding == "last" else abilities.embedding}
    limits = state.engine.limits
    return json_response(
        {
            "model_id": state.model.names[0],
            "model_sha": None,
            "model_dtype": state.model.model_config.dtype if options.model.dtype == "auto" else options.model.dtype,
            "model_type": kind,
            "max_concurrent_requests": options.scheduler.max_queued_requests,
            "max_input_length": state.model.max_model_len,
            "max_batch_tokens": limits.max_num_batched_tokens,
            "max_batch_requests": limits.max_num_seqs,
            "max_client_batch_size": MAX_INPUTS,
            "auto_truncate": False,
            "tokenization_workers": 1,
            "version": version(),
        }
    )


def _labelled(numbers: Vector, labels: Sequence[str]) -> list[dict[str, object]]:
    """The best first; equals stand in the order of their labels."""
    order = np.argsort(-numbers, kind="stable").tolist()
    return [{"score": float(numbers[index]), "label": labels[index]} for index in order]


def _label_table(head: Classifier) -> dict[str, object]:
    return {
        "id2label": {str(index): label for index, label in enumerate(head.labels)},
        "label2id": {label: index for index, label in enumerate(head.labels)},
    }


ERROR_SHAPE = error_body
ROUTES = (
    ("POST", "/embed", embed),
    ("POST", "/embed_all", embed_all),
    ("POST", "/predict", predict),
    ("POST", "/similarity", similarity),
    ("GET", "/info", info),
)
