"""/embed, /embed_all, /predict, /similarity and /info, as text-embeddings-inference has them."""

from __future__ import annotations

from server.openapi.openai import MODEL, TERMS, prompts
from server.openapi.words import (
    Json,
    array,
    boolean,
    constant,
    either,
    get,
    gives,
    integer,
    mapping,
    number,
    post,
    ref,
    string,
    takes,
)
from server.protocol.embeddings import MAX_INPUTS

CUTTING: Json = {
    "truncate": boolean("What is longer than the context is cut off its end."),
    "truncation_direction": constant("Right", "right"),
}
_INPUTS: Json = {"inputs": prompts(MAX_INPUTS, least=1)}
_PROMPT: Json = {"prompt_name": string("One of the model's own prompts, which texts are put behind.")}
_TEXT = string(least=1)
_LABELLED = array(gives({"score": number(), "label": string()}), "The most probable first.", least=1)

SCHEMAS: Json = {
    "TeiError": gives({"error": string(), "error_type": string()}),
    "RerankError": either(ref("Error"), ref("TeiError")),
    "TeiEmbedRequest": takes(
        _INPUTS,
        {
            **_PROMPT,
            **CUTTING,
            **TERMS,
            "normalize": boolean("true unless it is said."),
            "dimensions": integer(1, about="Of models that were trained for shorter vectors."),
        },
    ),
    "TeiEmbedAllRequest": takes(_INPUTS, {**_PROMPT, **CUTTING, **TERMS}),
    "TeiVectors": array(array(number()), "By text.", least=1),
    "TeiTokenVectors": array(array(array(number())), "By text and token.", least=1),
    "TeiPredictRequest": takes(
        {
            "inputs": either(
                _TEXT,
                array(_TEXT, least=1, most=2),
                array(array(_TEXT, least=1, most=2), least=1, most=MAX_INPUTS),
                about="A text, a pair of texts, or a list of lists of one or two.",
            )
        },
        {"raw_scores": boolean("The classifier's own numbers."), **CUTTING, **TERMS, **MODEL},
    ),
    "TeiPrediction": either(_LABELLED, array(_LABELLED, least=1)),
    "TeiSimilarityRequest": takes(
        {
            "inputs": takes(
                {"source_sentence": _TEXT, "sentences": array(_TEXT, least=1, most=MAX_INPUTS - 1)},
            )
        },
        {"parameters": takes({}, {**_PROMPT, **CUTTING}), **TERMS},
    ),
    "TeiLabels": gives({"id2label": mapping(string()), "label2id": mapping(integer(0))}),
    "TeiInfo": gives(
        {
            "model_id": string(),
            "model_sha": {"type": "null"},
            "model_dtype": string(),
            "model_type": gives(
                {},
                {
                    "embedding": gives({"pooling": string()}),
                    "classifier": ref("TeiLabels"),
                    "reranker": ref("TeiLabels"),
                },
            ),
            "max_concurrent_requests": integer(0),
            "max_input_length": integer(1),
            "max_batch_tokens": integer(1),
            "max_batch_requests": integer(1),
            "max_client_batch_size": integer(1),
            "auto_truncate": boolean(),
            "tokenization_workers": integer(1),
            "version": string(),
        }
    ),
}

PATHS: Json = {
    "/embed": post(
        "The vectors of texts.",
        "TeiEmbedRequest",
        "TeiVectors",
        error="TeiError",
        examples=({"inputs": "a"}, {"inputs": ["a", "b"], "truncate": True, "normalize": False}),
    ),
    "/embed_all": post(
        "The vectors of the tokens of texts.",
        "TeiEmbedAllRequest",
        "TeiTokenVectors",
        error="TeiError",
        examples=({"inputs": ["a", "b c"]},),
    ),
    "/predict": post(
        "The labels of texts or pairs of texts.",
        "TeiPredictRequest",
        "TeiPrediction",
        error="TeiError",
        examples=({"inputs": "a"}, {"inputs": ["a", "b"], "raw_scores": True}, {"inputs": [["a"], ["b", "c"]]}),
    ),
    "/similarity": post(
        "How near texts are to one.",
        "TeiSimilarityRequest",
        {"type": "array", "items": number(), "minItems": 1},
        error="TeiError",
        examples=({"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}, "parameters": {"truncate": True}},),
    ),
    "/info": get("What is served, in text-embeddings-inference's shape.", "TeiInfo", error="TeiError"),
}
