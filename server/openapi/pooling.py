"""/v1/embeddings, /score, /rerank, /classify and /pooling: prompts to vectors and to numbers."""

from __future__ import annotations

from server.openapi.openai import IDS, MODEL, TERMS, prompts
from server.openapi.tei import CUTTING
from server.openapi.words import (
    ANYTHING,
    Json,
    array,
    boolean,
    constant,
    either,
    gives,
    integer,
    number,
    post,
    ref,
    refused,
    string,
    takes,
)
from server.protocol.classes import TASKS
from server.protocol.embeddings import INPUT_TYPES, MAX_INPUTS
from server.protocol.refusals import CLASSIFIER_REFUSALS, EMBEDDING_REFUSALS, RANK_REFUSALS, SCORE_REFUSALS
from server.protocol.scores import MAX_LABELS, SIDES

_TEXT = either(string(least=1), takes({"text": string(least=1)}))
_TEXTS = either(_TEXT, array(_TEXT, least=1, most=MAX_INPUTS))
_CUT = either(constant(-1), integer(1), about="What is longer is cut off its end; -1 is the context.")
_COMMON: Json = {**MODEL, **TERMS, **refused(SCORE_REFUSALS)}
# What a model with a classifier of one label reads besides.
_RANKS: Json = {
    **_COMMON,
    **refused(RANK_REFUSALS),
    "truncate_prompt_tokens": _CUT,
    "use_activation": boolean("Of models with a classifier; without it scores are its own numbers."),
    "activation": boolean("An older name of the same."),
}
_PROMPTS: Json = {
    "prompt_name": string("One of the model's own prompts, which texts are put behind."),
    "input_type": constant(*INPUT_TYPES, about="The same by what sentence-transformers calls such texts."),
}
_POOLED: Json = {
    **MODEL,
    **TERMS,
    **_PROMPTS,
    "add_special_tokens": boolean(),
    "truncate_prompt_tokens": _CUT,
    "use_activation": boolean("false: numbers as the model has them."),
    "activation": boolean("An older name of the same."),
    **refused(CLASSIFIER_REFUSALS),
}
_INSTRUCTION: Json = {"instruction": string("What makes a document relevant; for models with score tokens.")}
_LABELS: Json = {
    "query": either(string(), IDS),
    "items": either(string(), array(either(string(), IDS), least=1, most=MAX_INPUTS)),
    "label_token_ids": array(integer(0), least=1, most=MAX_LABELS),
}

_LIST: Json = {"id": string(), "object": constant("list"), "created": integer(0), "model": string()}

SCHEMAS: Json = {
    "EmbeddingRequest": takes(
        {"input": prompts(MAX_INPUTS, least=1)},
        {
            **MODEL,
            **TERMS,
            "encoding_format": constant("float", "base64"),
            "dimensions": integer(1, about="Of models that were trained for shorter vectors."),
            "normalize": boolean("Vectors of length 1; the model's own default."),
            "add_special_tokens": boolean(),
            "truncate_prompt_tokens": _CUT,
            **_PROMPTS,
            **refused(EMBEDDING_REFUSALS),
        },
    ),
    "Embeddings": gives(
        {
            "object": constant("list"),
            "data": array(
                gives(
                    {
                        "object": constant("embedding"),
                        "index": integer(0),
                        "embedding": either(array(number()), string("base64 of little-endian float32.")),
                    }
                ),
                least=1,
            ),
            "model": string(),
            "usage": gives({"prompt_tokens": integer(0), "total_tokens": integer(0)}),
        }
    ),
    "ScoreRequest": either(
        *(takes(dict.fromkeys(names, _TEXTS), {**_RANKS, **_INSTRUCTION}) for names in SIDES),
        takes(_LABELS, {**_COMMON, "apply_softmax": boolean("Among the labels."), "item_first": boolean()}),
    ),
    "RerankRequest": either(
        takes(
            {"query": string(least=1), "documents": _TEXTS},
            {
                "top_n": integer(0, about="0 is all of them."),
                "return_documents": boolean("true unless it is said."),
                **_INSTRUCTION,
                **_RANKS,
            },
        ),
        takes(
            {
                "query": string(least=1),
                "texts": either(string(least=1), array(string(least=1), least=1, most=MAX_INPUTS)),
            },
            {
                "return_text": boolean("false unless it is said."),
                "raw_scores": boolean("Of models with a classifier: its own numbers."),
                **CUTTING,
                **TERMS,
            },
            about="As text-embeddings-inference has it.",
        ),
    ),
    "TextRanks": array(gives({"index": integer(0), "score": number()}, {"text": string()}), least=1),
    "ClassifyRequest": either(
        takes({"input": prompts(MAX_INPUTS, least=1)}, _POOLED),
        takes({"messages": array(ANYTHING, least=1)}, _POOLED),
    ),
    "Classes": gives(
        {
            **_LIST,
            "data": array(
                gives(
                    {
                        "index": integer(0),
                        "label": string(),
                        "probs": array(number(), "By label."),
                        "num_classes": integer(1),
                    }
                ),
                least=1,
            ),
            "usage": ref("ScoreUsage"),
        }
    ),
    "PoolingRequest": takes(
        {"input": prompts(MAX_INPUTS, least=1)},
        {**_POOLED, "task": constant(*TASKS), "encoding_format": constant("float", "base64")},
    ),
    "Pooled": gives(
        {
            **_LIST,
            "data": array(
                gives(
                    {
                        "index": integer(0),
                        "object": constant("pooling"),
                        "data": either(
                            array(number()),
                            array(array(number()), "By token."),
                            string("base64 of little-endian float32."),
                        ),
                    }
                ),
                least=1,
            ),
            "usage": ref("ScoreUsage"),
        }
    ),
    "ScoreUsage": gives({"prompt_tokens": integer(0), "completion_tokens": constant(0), "total_tokens": integer(0)}),
    "Scores": gives(
        {
            "id": string(),
            "object": constant("list"),
            "created": integer(0),
            "model": string(),
            "data": array(gives({"index": integer(0), "object": constant("score"), "score": number()}), least=1),
            "usage": ref("ScoreUsage"),
        }
    ),
    "LabelScores": gives(
        {
            "object": constant("scoring"),
            "model": string(),
            "scores": array(array(number(0, 1)), "By item and label.", least=1),
            "usage": ref("ScoreUsage"),
        }
    ),
    "Ranks": gives(
        {
            "id": string(),
            "model": string(),
            "results": array(
                gives({"index": integer(0), "relevance_score": number()}, {"document": gives({"text": string()})})
            ),
            "usage": ref("ScoreUsage"),
        }
    ),
}

_SCORE = post(
    "How well texts answer a text; or how probable tokens are behind a prompt.",
    "ScoreRequest",
    either(ref("Scores"), ref("LabelScores")),
    examples=(
        *({names[0]: "a question", names[1]: ["an answer", {"text": "another"}]} for names in SIDES),
        {"query": "a or b? ", "items": ["b", "a"], "label_token_ids": [5, 6]},
        {"query": [5], "items": [[6]], "label_token_ids": [5, 6], "apply_softmax": True, "item_first": True},
    ),
)
_RERANK = post(
    "The documents that answer a query, the best first.",
    "RerankRequest",
    either(ref("Ranks"), ref("TextRanks")),
    examples=(
        {"query": "a question", "documents": ["an answer", "another"], "top_n": 1},
        {"query": "a question", "texts": ["an answer", "another"], "return_text": True},
    ),
    error="RerankError",
)

_CLASSIFY = post(
    "The most probable label of each text.",
    "ClassifyRequest",
    "Classes",
    examples=({"input": ["a", "b"]}, {"messages": [{"role": "user", "content": "a"}], "use_activation": False}),
)
_POOLING = post(
    "What the model makes of texts, or of their tokens, as numbers.",
    "PoolingRequest",
    "Pooled",
    examples=({"input": "a", "task": "token_embed"}, {"input": [[5, 6]], "encoding_format": "base64"}),
)

PATHS: Json = {
    "/v1/embeddings": post(
        "The vectors of prompts.",
        "EmbeddingRequest",
        "Embeddings",
        examples=(
            {"input": "Hello"},
            {"input": ["a", "b"], "encoding_format": "base64", "truncate_prompt_tokens": 4},
            {"input": [[5, 6], [7]], "normalize": False},
        ),
    ),
    "/score": _SCORE,
    "/v1/score": _SCORE,
    "/rerank": _RERANK,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/classify": _CLASSIFY,
    "/v1/classify": _CLASSIFY,
    "/pooling": _POOLING,
    "/v1/pooling": _POOLING,
}
