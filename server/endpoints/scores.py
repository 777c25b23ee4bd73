"""POST /score and /rerank under all their names: how well documents answer a query, in the shapes of vLLM, Jina and
Cohere; and SGLang's /v1/score, which rates tokens of the client's choice."""

from __future__ import annotations

import time

import numpy as np
from aiohttp import web

from server.answers.base import plain_usage
from server.pooling import pool
from server.protocol.body import Body, read_body
from server.protocol.errors import OWN_SHAPE, json_response
from server.protocol.naming import in_words_of
from server.protocol.scores import parse_labels, parse_rerank, parse_score
from server.protocol.tei import RERANK_NAMES, error_body, parse_texts
from server.scoring import run_scores
from server.state import REQUEST_ID, STATE


async def score(request: web.Request) -> web.Response:
    """One score for each pair, in order."""
    state, body = request.app[STATE], await read_body(request)
    response_id = f"score-{request[REQUEST_ID]}"
    if body.has("label_token_ids"):
        return await _rate_labels(request, body, response_id)
    plan = parse_score(body, state)
    scores, num_tokens = await run_scores(request, plan, response_id)
    return json_response(
        {
            "id": response_id,
            "object": "list",
            "created": int(time.time()),
            "model": plan.model,
            "data": [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)],
            "usage": plain_usage(num_tokens, 0),
        }
    )


async def rerank(request: web.Request) -> web.Response:
    """The best documents first; equals stand in the order in which they came."""
    state, body = request.app[STATE], await read_body(request)
    response_id = f"rerank-{request[REQUEST_ID]}"
    if body.has("texts"):
        request[OWN_SHAPE] = error_body
        return await _rerank_texts(request, body, response_id)
    plan = parse_rerank(body, state)
    scores, num_tokens = await run_scores(request, plan.score, response_id)
    results: list[dict[str, object]] = []
    for index in sorted(range(len(scores)), key=lambda index: -scores[index])[: plan.num_results]:
        result: dict[str, object] = {"index": index, "relevance_score": scores[index]}
        if plan.return_documents:
            result["document"] = {"text": plan.score.pairs[index][1]}
        results.append(result)
    return json_response(
        {"id": response_id, "model": plan.score.model, "results": results, "usage": plain_usage(num_tokens, 0)}
    )


async def _rerank_texts(request: web.Request, body: Body, response_id: str) -> web.Response:
    """The shape of text-embeddings-inference: a list."""
    with in_words_of(RERANK_NAMES):
        plan = parse_texts(body, request.app[STATE])
        scores, _ = await run_scores(request, plan.score, response_id)
    ranks: list[dict[str, object]] = []
    for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
        text = {"text": plan.score.pairs[index][1]} if plan.return_documents else {}
        ranks.append({"index": index, "score": scores[index], **text})
    return json_response(ranks)


async def _rate_labels(request: web.Request, body: Body, response_id: str) -> web.Response:
    plan = await parse_labels(body, request.app[STATE])
    rated = await pool(request, response_id, plan.prompts, plan.pooling, plan.terms)
    scores = []
    for logprobs in rated:
        shares = np.exp(logprobs.astype(np.float64) - (logprobs.max() if plan.relative else 0.0))
        scores.append((shares / shares.sum() if plan.relative else shares).tolist())
    usage = plain_usage(sum(map(len, plan.prompts)), 0)
    return json_response({"object": "scoring", "model": plan.model, "scores": scores, "usage": usage})


ROUTES = tuple(
    ("POST", path, handler)
    for handler, paths in (
        (score, ("/score", "/v1/score")),
        (rerank, ("/rerank", "/v1/rerank", "/v2/rerank")),
    )
    for path in paths
)
