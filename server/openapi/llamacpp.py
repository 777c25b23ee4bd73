"""llama.cpp's own API, and the lists of models that LM Studio's clients ask for."""

from __future__ import annotations

from server.openapi.openai import GENERATION, IDS, SCHEMA, TOKEN, prompts
from server.openapi.words import (
    ANYTHING,
    NULL,
    OBJECT,
    Json,
    alternatives,
    array,
    boolean,
    constant,
    either,
    get,
    gives,
    integer,
    number,
    plain_events,
    post,
    ref,
    refused,
    string,
    takes,
)
from server.protocol.completions import MAX_PROMPTS
from server.protocol.generation import MAX_CHOICES
from server.protocol.llamacpp import HINTS, MAX_FIELD, MAX_FIELDS, MAX_FILES, REFUSALS, SAME

_PAIR = {"type": "array", "prefixItems": [either(integer(0), string()), either(number(-100, 100), constant(False))]}
_PROBABILITY = {"id": integer(0), **TOKEN}
_TIMINGS = gives(
    {
        "cache_n": integer(0),
        **{
            f"{what}_{figure}": schema
            for what in ("prompt", "predicted")
            for figure, schema in (
                ("n", integer(0)),
                ("ms", number(0)),
                ("per_token_ms", number(0)),
                ("per_second", number(0)),
            )
        },
    }
)
_ENDING: Json = {
    "model": string(),
    "stop_type": constant("eos", "limit", "word"),
    "stopping_word": string(),
    "generation_settings": OBJECT,
    "prompt": string(),
    "has_new_line": boolean(),
    "truncated": constant(False),
    "tokens_cached": integer(0),
    "timings": _TIMINGS,
}
_SAID: Json = {
    "index": integer(0),
    "id_slot": constant(-1),
    "tokens_predicted": integer(0),
    "tokens_evaluated": integer(0),
    "content": string(),
    "tokens": IDS,
    "stop": boolean(),
}
_PROBABILITIES: Json = {
    "completion_probabilities": array(gives({**_PROBABILITY, "top_logprobs": array(gives(_PROBABILITY))}))
}
_QUANTIZATION = gives({"name": string(), "bits_per_weight": number()})

_FIELDS: Json = {
    **{name: GENERATION[name] for name in SAME if name in GENERATION},
    "stop": either(constant(""), GENERATION["stop"]),
    "grammar": string("As anywhere; an empty one is none."),
    "json_schema": SCHEMA,
    "logit_bias": either(GENERATION["logit_bias"], array(_PAIR)),
    "n_predict": integer(-1, about="-1: until the model stops; 0: only the prompt."),
    "n_probs": alternatives(),
    "repeat_penalty": GENERATION["repeat_penalty"],
    "repeat_last_n": integer(-1, about="0 turns penalties off; else they are of the whole text."),
    "return_tokens": boolean("Ids come beside the text."),
    "timings_per_token": boolean("Every event of a stream has its timings."),
    **dict.fromkeys(HINTS, ANYTHING | {"description": "Changes nothing here."}),
    **refused(REFUSALS),
    "n_cmpl": integer(1, MAX_CHOICES, "Answers to each prompt; the body is a list of them then."),
    "response_fields": array(
        string(most=MAX_FIELD), "Paths of what an ended answer tells, as `timings/prompt_n`.", most=MAX_FIELDS
    ),
}
_TEXT = takes({"prompt_string": string()}, {"multimodal_data": array(NULL, most=0)})
_MIXED = array(either(integer(0), string()), "Ids and texts are one prompt.", least=1)

SCHEMAS: Json = {
    "NativeRequest": takes(
        {"prompt": either(prompts(MAX_PROMPTS), _TEXT, _MIXED, array(either(_MIXED, _TEXT, string())))}, _FIELDS
    ),
    "InfillRequest": takes(
        {"input_prefix": string("Before the hole."), "input_suffix": string("Behind it.")},
        {
            **_FIELDS,
            "prompt": string("What is in the hole already, behind the prefix."),
            "input_extra": array(
                takes({"text": string()}, {"filename": string()}), "Other files that may help.", most=MAX_FILES
            ),
        },
    ),
    "Native": gives({**_SAID, **_ENDING}, _PROBABILITIES),
    "NativePiece": gives(_SAID, {**_ENDING, **_PROBABILITIES}),
    "LMStudioModel": gives(
        {
            "id": string(),
            "object": constant("model"),
            "type": constant("llm", "embeddings"),
            "publisher": string(),
            "arch": string(),
            "compatibility_type": string(),
            "quantization": string(),
            "state": constant("loaded"),
            "max_context_length": integer(1),
            "loaded_context_length": integer(1),
            "capabilities": array(constant("tool_use")),
        }
    ),
    "LMStudioModels": gives({"object": constant("list"), "data": array(ref("LMStudioModel"), least=1)}),
    "LMStudioCards": gives(
        {
            "models": array(
                gives(
                    {
                        "type": constant("llm", "embedding"),
                        "publisher": string(),
                        "key": string(),
                        "display_name": string(),
                        "architecture": string(),
                        "quantization": _QUANTIZATION,
                        "size_bytes": integer(0),
                        "params_string": string(),
                        "loaded_instances": array(
                            gives({"id": string(), "config": gives({"context_length": integer(1)})})
                        ),
                        "max_context_length": integer(1),
                        "format": string(),
                        "capabilities": gives({"vision": constant(False), "trained_for_tool_use": boolean()}),
                        "description": NULL,
                    }
                ),
                least=1,
            )
        }
    ),
}

# `response_fields` picks, from whatever depth: what is left is the client's to know.
_ANSWER = either(ref("Native"), array(ref("Native")), OBJECT, array(OBJECT))

PATHS: Json = {
    "/completion": post(
        "The text that goes on from a prompt, or from each of several.",
        "NativeRequest",
        _ANSWER,
        examples=(
            {"prompt": "Once upon a time", "n_predict": 4, "temperature": 0, "n_probs": 2, "return_tokens": True},
            {"prompt": [5, "a", 6], "n_predict": 2, "n_cmpl": 2},
            {"prompt": [{"prompt_string": "a"}, "b"], "n_predict": 2, "stream": True},
            {"prompt": ["a", "b"], "n_predict": 2, "logit_bias": [[5, False], ["e", 1.5]], "cache_prompt": True},
            {"prompt": [5, 6, 7], "n_predict": 3, "stream": True, "timings_per_token": True, "seed": -1},
        ),
        streamed=plain_events("NativePiece"),
    ),
    "/infill": post(
        "The text between what is before a hole and what is behind it, of models that have tokens for it.",
        "InfillRequest",
        _ANSWER,
        examples=(
            {"input_prefix": "def f():\n", "input_suffix": "\nreturn x", "prompt": "  ", "n_predict": 4},
            {
                "input_prefix": "a",
                "input_suffix": "b",
                "input_extra": [{"filename": "x.py", "text": "c"}, {"text": "d"}],
                "n_predict": 2,
                "stream": True,
            },
        ),
        streamed=plain_events("NativePiece"),
    ),
    "/lora-adapters": get("None.", array(OBJECT, most=0)),
    "/api/v0/models": get("The served model, once for each of its names.", "LMStudioModels"),
    "/api/v0/models/{id}": get("The served model by one of its names.", "LMStudioModel"),
    "/api/v1/models": get("The served model, once for each of its names.", "LMStudioCards"),
}
