"""POST /embed, /embed_all, /predict and /similarity, and its form of /rerank: text-embeddings-inference's bodies become
those of our own routes. Its errors have a shape of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.request import Pooling, RequestError
from server.protocol.body import Body, invalid
from server.protocol.classes import classifier_of
from server.protocol.embeddings import MAX_INPUTS, EmbeddingPlan, parse_embedding
from server.protocol.errors import message_with_field
from server.protocol.generation import Terms, read_terms
from server.protocol.prompts import encode_pairs, encode_prompts
from server.protocol.scores import RerankPlan, parse_rerank
from server.state import State

# Our names of fields to TEI's.
EMBED_NAMES = {"input": "inputs", "truncate_prompt_tokens": "truncate"}
RERANK_NAMES = {"documents": "texts", "use_activation": "raw_scores", "truncate_prompt_tokens": "truncate"}
SIMILARITY_NAMES = {
    "input": "inputs.sentences",
    "truncate_prompt_tokens": "parameters.truncate",
    "prompt_name": "parameters.prompt_name",
    "truncate": "parameters.truncate",
    "truncation_direction": "parameters.truncation_direction",
}
_KINDS = {413: "Validation", 422: "Tokenizer", 424: "Backend", 429: "Overloaded", 503: "Unhealthy"}


@dataclass(frozen=True, slots=True)
class PredictPlan:
    """many: the answer is a list of lists. activation: what the numbers go through."""

    prompts: Sequence[Sequence[int]]
    poolings: list[Pooling]
    labels: tuple[str, ...]
    activation: str
    many: bool
    terms: Terms


async def parse_embed(body: Body, state: State) -> EmbeddingPlan:
    """/embed. Raises RequestError."""
    fields = {"input": body.raw("inputs"), "prompt_name": body.raw("prompt_name"), "dimensions": body.raw("dimensions")}
    # TEI's vectors have length 1 unless it is told otherwise.
    fields |= {"normalize": body.boolean("normalize", True), "truncate_prompt_tokens": _read_cut(body)}
    return await parse_embedding(_with_terms(body, fields), state)


async def parse_embed_all(body: Body, state: State) -> EmbeddingPlan:
    """/embed_all: the same prompts, whose tokens are wanted. Raises RequestError."""
    fields = {"input": body.raw("inputs"), "prompt_name": body.raw("prompt_name"), "normalize": False}
    return await parse_embedding(_with_terms(body, fields | {"truncate_prompt_tokens": _read_cut(body)}), state)


async def parse_similarity(body: Body, state: State) -> EmbeddingPlan:
    """/similarity: the first prompt is the one that the others are compared with. Raises RequestError."""
    inputs, parameters = body.object("inputs") or {}, Body(body.object("parameters") or {})
    source, sentences = inputs.get("source_sentence"), inputs.get("sentences")
    if not isinstance(source, str) or not source:
        raise invalid("inputs.source_sentence", "must be a non-empty string")
    if not isinstance(sentences, list) or not sentences or len(sentences) >= MAX_INPUTS:
        raise invalid("inputs.sentences", f"must be a list of 1 to {MAX_INPUTS - 1} strings")
    if not all(isinstance(text, str) and text for text in sentences):
        raise invalid("inputs.sentences", "must hold non-empty strings")
    fields = {"input": [source, *sentences], "normalize": True, "prompt_name": parameters.raw("prompt_name")}
    fields |= {"truncate_prompt_tokens": _read_cut(parameters)}
    return await parse_embedding(_with_terms(body, fields), state)


async def parse_predict(body: Body, state: State) -> PredictPlan:
    """/predict: a text, a pair of texts, or a list of lists of one or two texts. Raises RequestError."""
    head = classifier_of(state.model)
    given = body.raw("inputs")
    many = isinstance(given, list) and bool(given) and all(isinstance(each, list) for each in given)
    items = given if many else [given]
    if len(items) > MAX_INPUTS:
        raise invalid("inputs", f"must hold at most {MAX_INPUTS} texts")
    texts = [[each] if isinstance(each, str) else each for each in items]
    if not all(
        isinstance(each, list) and 0 < len(each) <= 2 and all(isinstance(text, str) and text for text in each)
        for each in texts
    ):
        raise invalid("inputs", "must be a text, a pair of texts, or a list of lists of one or two texts, none empty")
    most = state.model.max_model_len if _read_cut(body) else None
    raw = body.boolean("raw_scores", False)
    terms = read_terms(body, state)
    alone = [each[0] for each in texts if len(each) == 1]
    singles = iter(await encode_prompts(state, alone, add_special_tokens=True, most=most))
    pairs = iter(await encode_pairs(state, [(each[0], each[1]) for each in texts if len(each) == 2], most))
    encoded = [(next(singles), 0) if len(each) == 1 else next(pairs) for each in texts]
    prompts = [ids for ids, _ in encoded]
    poolings = [Pooling(head.pooling, classify=True, second=second) for _, second in encoded]
    return PredictPlan(prompts, poolings, head.labels, "none" if raw else head.activation, many, terms)


def parse_texts(body: Body, state: State) -> RerankPlan:
    """/rerank with TEI's `texts`. Raises RequestError."""
    texts, ranks = body.raw("texts"), state.model.abilities.ranks
    if isinstance(texts, list) and not all(isinstance(text, str) for text in texts):
        raise invalid("texts", "must hold strings")
    raw, cut = body.boolean("raw_scores", False), _read_cut(body)
    fields = {"query": body.raw("query"), "documents": texts, "return_documents": body.boolean("return_text", False)}
    if ranks:
        fields |= {"use_activation": not raw, "truncate_prompt_tokens": cut}
    elif raw:
        raise invalid("raw_scores", "needs a model with a classifier of one label")
    elif cut:
        raise invalid("truncate", "needs a model with a classifier of one label")
    return parse_rerank(_with_terms(body, fields), state)


def _read_cut(body: Body) -> int | None:
    """For truncate_prompt_tokens: whether what is too long is cut; only ends are."""
    if body.choice("truncation_direction", ("Left", "Right", "left", "right")) in ("Left", "left"):
        raise invalid("truncation_direction", "must be Right: texts are cut off their end")
    return -1 if body.boolean("truncate", False) else None


def _with_terms(body: Body, fields: dict[str, Any]) -> Body:
    """The body of another route, with what any may say beside its fields."""
    beside = {name: body.raw(name) for name in ("cache_salt", "lora_path", "priority", "timeout", "user")}
    return Body(fields | beside, body.size)


def error_body(error: RequestError, request_id: str | None) -> dict[str, object]:
    """The JSON object of an error, as TEI writes it. request_id: goes into a header."""
    kind = _KINDS.get(error.status, "Validation" if error.status < 500 else "Backend")
    return {"error": message_with_field(error), "error_type": kind}
