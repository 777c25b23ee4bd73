"""POST /score and /rerank: a JSON body becomes pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.request import Pooling, RequestError
from server.protocol.body import Body, are_token_ids, invalid
from server.protocol.embeddings import MAX_INPUTS, read_most
from server.protocol.generation import Terms, read_model, read_terms
from server.protocol.prompts import encode_prompts
from server.protocol.refusals import CLASSIFIER_REFUSALS, RANK_REFUSALS, SCORE_REFUSALS, refuse
from server.state import State

MAX_LABELS = 128
# vLLM's names of the two sides of a pair.
SIDES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """pairs: (query, document). instruction: what makes a document relevant, None for the default. size: the body's.

    Of a classifier: raw: its numbers, not shares of 1. most: tokens beyond which a pair is cut.
    """

    model: str
    pairs: list[tuple[str, str]]
    instruction: str | None
    terms: Terms
    size: int
    raw: bool = False
    most: int | None = None


@dataclass(frozen=True, slots=True)
class RerankPlan:
    """num_results: how many are answered with, the best first."""

    score: ScorePlan
    num_results: int
    return_documents: bool


@dataclass(frozen=True, slots=True)
class LabelPlan:
    """SGLang's form of /v1/score: the probabilities of tokens after each prompt. relative: among themselves."""

    model: str
    prompts: Sequence[Sequence[int]]
    pooling: Pooling
    relative: bool
    terms: Terms


def parse_score(body: Body, state: State) -> ScorePlan:
    """Raises RequestError for anything that cannot be served."""
    names = next((names for names in SIDES if all(map(body.has, names))), SIDES[0])
    first, second = (_texts(body.raw(name), name) for name in names)
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise invalid(names[0], f"and `{names[1]}` must pair up: input lengths must be either 1:1, 1:N or N:N")
    return _plan(body, state, list(zip(first, second, strict=True)))


def parse_rerank(body: Body, state: State) -> RerankPlan:
    """Raises RequestError for anything that cannot be served."""
    query = body.string("query", None)
    if not query:
        raise invalid("query", "must be a non-empty string")
    documents = _texts(body.raw("documents"), "documents")
    # vLLM's 0 is "all of them", as is no number at all.
    top_n = body.integer("top_n", 0, 0) or len(documents)
    return_documents = body.boolean("return_documents", True)
    plan = _plan(body, state, [(query, document) for document in documents])
    return RerankPlan(plan, min(top_n, len(documents)), return_documents)


def _plan(body: Body, state: State, pairs: list[tuple[str, str]]) -> ScorePlan:
    model, abilities = read_model(body, state.model), state.model.abilities
    if abilities.score_tokens is None and abilities.embedding is None and not abilities.ranks:
        raise RequestError(
            "This model does not score: nothing in its directory says how. Start the server with --score-tokens YES NO "
            "(a generative reranker), with --pooling last or mean (the cosine of embeddings), or with another model.",
            param="model",
        )
    refuse(body, RANK_REFUSALS | (CLASSIFIER_REFUSALS if abilities.ranks else SCORE_REFUSALS))
    body.string("user", None)
    instruction = body.string("instruction", None)
    if instruction is not None and abilities.score_tokens is None:
        raise invalid("instruction", "needs a model that reads it: this one compares embeddings")
    plan = ScorePlan(model, pairs, instruction, read_terms(body, state), body.size)
    if not abilities.ranks:
        return plan
    return replace(plan, raw=read_raw(body), most=read_most(body, state.model.max_model_len))


def read_raw(body: Body) -> bool:
    """vLLM's word, and its older one."""
    return not body.boolean("use_activation", body.boolean("activation", True))


def _texts(value: Any, name: str) -> list[str]:
    """A text or a list of them; each may be an object with a `text`, as rerankers take documents."""
    items = value if isinstance(value, list) else [value]
    given = [item.get("text") if isinstance(item, dict) else item for item in items]
    texts = [text for text in given if isinstance(text, str) and text]
    if not texts or len(texts) < len(given):
        raise invalid(name, "must be a non-empty string or a list of such (or of objects with a `text`)")
    if len(texts) > MAX_INPUTS:
        raise invalid(name, f"must hold at most {MAX_INPUTS} texts")
    return texts


async def parse_labels(body: Body, state: State) -> LabelPlan:
    """SGLang's fields: query, items, label_token_ids, apply_softmax, item_first. Raises RequestError."""
    model, vocab_size = read_model(body, state.model), state.model.model_config.vocab_size
    if not state.model.abilities.needs_head:
        raise RequestError("This model has no output layer, so it rates no tokens.", param="model")
    refuse(body, SCORE_REFUSALS)
    labels = body.raw("label_token_ids")
    if not labels or not are_token_ids(labels, vocab_size) or len(labels) > MAX_LABELS:
        raise invalid("label_token_ids", f"must be 1 to {MAX_LABELS} token ids from 0 to {vocab_size - 1}")
    query, items = body.raw("query"), body.raw("items")
    items = [items] if isinstance(items, str) else items
    if not isinstance(items, list) or not 0 < len(items) <= MAX_INPUTS:
        raise invalid("items", f"must be a string or a list of 1 to {MAX_INPUTS} items")
    item_first = body.boolean("item_first", False)
    if isinstance(query, str) and all(isinstance(item, str) for item in items):
        texts = [item + query if item_first else query + item for item in items]
        prompts = await encode_prompts(state, texts, add_special_tokens=True)
    elif are_token_ids(query, vocab_size) and all(are_token_ids(item, vocab_size) for item in items):
        prompts = [item + query if item_first else query + item for item in items]
    else:
        raise invalid("items", "and `query` must both be text or both token ids of the model")
    if not all(prompts):
        raise invalid("items", "and `query` must not both be empty")
    return LabelPlan(
        model=model,
        prompts=prompts,
        pooling=Pooling("logprobs", tuple(labels)),
        relative=body.boolean("apply_softmax", False),
        terms=read_terms(body, state),
    )
