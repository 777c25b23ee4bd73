"""How well documents answer a query: pairs of texts to numbers, through the engine. Loop thread.

A model with a classifier of one label, or with score tokens, reads a pair as one prompt, and its score is that number,
or the odds of "yes"; any other that embeds is asked for the vectors of both texts, and their score is the cosine.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from aiohttp import web

from engine.models.spec import Classifier
from engine.request import Pooling
from engine.text.chat_template import ChatTemplate
from server.pooling import Vector, pool, scaled, shares
from server.protocol.chat import INLINE_BYTES
from server.protocol.embeddings import embedding_of
from server.protocol.prompts import encode_pairs, encode_prompts
from server.protocol.scores import ScorePlan
from server.state import STATE, State

# The prompt that Qwen3-Reranker was trained on, where the chat template does not read the roles query and document.
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


async def run_scores(request: web.Request, plan: ScorePlan, response_id: str) -> tuple[list[float], int]:
    """The score of every pair, and the tokens that were read."""
    state = request.app[STATE]
    tokens, head = state.model.abilities.score_tokens, state.model.abilities.classifier
    if head is not None and state.model.abilities.ranks:
        prompts, poolings = await _pairs_for(state, head, plan)
        rated = await pool(request, response_id, prompts, poolings, plan.terms)
        activation = "none" if plan.raw else head.activation
        return [float(shares(numbers, activation)[0]) for numbers in rated], sum(map(len, prompts))
    if tokens is not None:
        prompts = await _pair_prompts(state, plan)
        rated = await pool(request, response_id, prompts, Pooling("logprobs", tokens), plan.terms)
        return [odds(logprobs) for logprobs in rated], sum(map(len, prompts))
    # A text that stands in several pairs is embedded once.
    texts = list(dict.fromkeys(text for pair in plan.pairs for text in pair))
    prompts = await encode_prompts(state, texts, add_special_tokens=True)
    vectors = await pool(request, response_id, prompts, embedding_of(state.model), plan.terms)
    found = {text: scaled(vector) for text, vector in zip(texts, vectors, strict=True)}
    return [cosine(found[one], found[other]) for one, other in plan.pairs], sum(map(len, prompts))


async def _pairs_for(state: State, head: Classifier, plan: ScorePlan) -> tuple[Sequence[Sequence[int]], list[Pooling]]:
    """Each pair as the tokenizer joins two texts, or as the chat template does where it reads queries and documents."""
    assert head.pooling != "all"
    if _knows_pairs(state.model.chat_template):
        prompts = await _pair_prompts(state, plan)
        return prompts, [Pooling(head.pooling, classify=True)] * len(prompts)
    encoded = await encode_pairs(state, plan.pairs, plan.most)
    poolings = [Pooling(head.pooling, classify=True, second=second) for _, second in encoded]
    return [ids for ids, _ in encoded], poolings


def _knows_pairs(template: ChatTemplate | None) -> bool:
    """The convention of sentence-transformers and vLLM: messages with the roles query and document."""
    source = "" if template is None else template.source
    return all(re.search(f"[\"']{role}[\"']", source) for role in ("query", "document"))


async def _pair_prompts(state: State, plan: ScorePlan) -> Sequence[Sequence[int]]:
    """Each pair as the model's chat template writes it."""
    template = state.model.chat_template
    assert template is not None, "checked at start"
    has_roles = _knows_pairs(template)

    def render() -> list[str]:
        return [
            template.render(_messages(pair, plan.instruction, has_roles), kwargs={"enable_thinking": False})
            for pair in plan.pairs
        ]

    if plan.size <= INLINE_BYTES:
        texts: Sequence[str] = render()
    else:
        texts = await asyncio.get_running_loop().run_in_executor(state.tokenizer.pool, render)
    return await encode_prompts(state, texts, add_special_tokens=False)


def _messages(pair: tuple[str, str], instruction: str | None, has_roles: bool) -> list[dict[str, Any]]:
    """has_roles: the convention of sentence-transformers and vLLM, system being the instruction."""
    query, document = pair
    if has_roles:
        system = [{"role": "system", "content": instruction}] if instruction is not None else []
        return [*system, {"role": "query", "content": query}, {"role": "document", "content": document}]
    content = f"<Instruct>: {instruction or INSTRUCTION}\n\n<Query>: {query}\n\n<Document>: {document}"
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": content}]


def cosine(one: Vector, other: Vector) -> float:
    """Of two vectors of length 1; rounding must not lead out of -1..1."""
    return min(1.0, max(-1.0, float(np.dot(one.astype(np.float64), other.astype(np.float64)))))


def odds(logprobs: Vector) -> float:
    """P(yes) / (P(yes) + P(no)) of their two log-probabilities; a logistic function that cannot overflow."""
    return 0.5 + 0.5 * math.tanh((float(logprobs[0]) - float(logprobs[1])) / 2)
