"""The OpenAPI 3.1 document: every route, every field that is read, every shape that is answered.

Written by hand beside the code and held against it by tests/server/test_openapi.py, which walks the routes, records
the fields that are read, and validates real answers. A route is one entry of PATHS. Pure; served by endpoints/docs.py.
"""

from __future__ import annotations

import re
from typing import Any

from server.protocol.body import MAX_NESTING
from server.protocol.chat import EFFORTS, ROLES
from server.protocol.completions import DEFAULT_MAX_TOKENS, MAX_LOGPROBS, MAX_PROMPTS
from server.protocol.generation import (
    MAX_BAD_WORD_LENGTH,
    MAX_BAD_WORDS,
    MAX_BEST_OF,
    MAX_CHOICES,
    MAX_SALT_LENGTH,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
)
from server.protocol.refusals import CHAT_REFUSALS, COMPLETION_REFUSALS
from server.protocol.structured_fields import BACKENDS
from server.protocol.tool_fields import MAX_TOOLS

Json = dict[str, Any]

# ---- words: a schema is made by one call, and `about` is what a reader is told


def integer(low: int | None = None, high: int | None = None, about: str = "") -> Json:
    return _limited("integer", {"minimum": low, "maximum": high}, about)


def number(low: float | None = None, high: float | None = None, about: str = "", *, above: bool = False) -> Json:
    """above: `low` itself is excluded."""
    return _limited("number", {"exclusiveMinimum" if above else "minimum": low, "maximum": high}, about)


def string(about: str = "", *, least: int | None = None, most: int | None = None) -> Json:
    return _limited("string", {"minLength": least, "maxLength": most}, about)


def boolean(about: str = "") -> Json:
    return _limited("boolean", {}, about)


def array(items: Json, about: str = "", *, least: int | None = None, most: int | None = None) -> Json:
    return _limited("array", {"items": items, "minItems": least, "maxItems": most}, about)


def mapping(values: Json, about: str = "") -> Json:
    """An object with keys of the client's choice."""
    return _limited("object", {"additionalProperties": values}, about)


def constant(*values: object, about: str = "") -> Json:
    return {"enum": list(values)} | ({"description": about} if about else {})


def either(*schemas: Json, about: str = "") -> Json:
    return {"anyOf": list(schemas)} | ({"description": about} if about else {})


def ref(name: str) -> Json:
    """One of SCHEMAS."""
    return {"$ref": f"#/components/schemas/{name}"}


def takes(required: Json, optional: Json | None = None, about: str = "") -> Json:
    """What a client sends: a null is an absent field, and fields that are not known are not looked at."""
    fields = required | {name: either(schema, {"type": "null"}) for name, schema in (optional or {}).items()}
    return _limited("object", {"required": list(required) or None, "properties": fields}, about)


def gives(required: Json, optional: Json | None = None, about: str = "") -> Json:
    """What the server answers: these fields and no others; the optional ones only where they were asked for."""
    fields = required | (optional or {})
    return _limited(
        "object", {"required": list(required) or None, "properties": fields, "additionalProperties": False}, about
    )


def _limited(kind: str, limits: Json, about: str) -> Json:
    schema = {"type": kind} | {name: value for name, value in limits.items() if value is not None}
    return schema | ({"description": about} if about else {})


NULL: Json = {"type": "null"}
ANYTHING: Json = {}
OBJECT: Json = {"type": "object"}


# ---- what is asked

_IDS = array(integer(0))
_SCHEMA = either(OBJECT, string(), about="A JSON Schema (only references within it), or a string of one.")
_REGEX = string(least=1, about="A regular expression that the whole text keeps.")
_GRAMMAR = string(least=1, about="Lark, or EBNF (`root ::= ...`).")
_CHOICE = array(string(least=1), least=1, about="The text is one of these.")
_TAG = either(OBJECT, string(), about="A structural tag.")
_STRUCTURE: Json = {
    "response_format": either(
        takes({"type": constant("text")}),
        takes({"type": constant("json_object")}, {"schema": _SCHEMA}),
        takes(
            {
                "type": constant("json_schema"),
                "json_schema": takes(
                    {"schema": _SCHEMA},
                    {"name": string(least=1, most=64), "description": string(), "strict": boolean()},
                ),
            },
        ),
        takes({"type": constant("json_schema"), "schema": _SCHEMA}, {"strict": boolean(), "json_schema": NULL}),
        takes({"type": constant("structural_tag")}, about="With the fields of a structural tag beside it."),
    ),
    "structured_outputs": takes(
        {},
        {
            "json": _SCHEMA,
            "regex": _REGEX,
            "choice": _CHOICE,
            "grammar": _GRAMMAR,
            "json_object": boolean(),
            "structural_tag": _TAG,
            "disable_any_whitespace": boolean(),
            "disable_additional_properties": constant(False),
            "whitespace_pattern": string(least=1, most=1024),
        },
        "vLLM's: exactly one of json, regex, choice, grammar, json_object, structural_tag.",
    ),
    "guided_json": _SCHEMA,
    "guided_regex": _REGEX,
    "guided_choice": _CHOICE,
    "guided_grammar": _GRAMMAR,
    "guided_json_object": boolean(),
    "guided_whitespace_pattern": string(least=1, most=1024),
    "guided_decoding_backend": constant(*BACKENDS),
    "json_schema": _SCHEMA,
    "regex": _REGEX,
    "ebnf": _GRAMMAR,
    "structural_tag": _TAG,
}
_SAMPLING: Json = {
    "temperature": number(0, 2, "0 is greedy. The model's own default, else 1."),
    "top_p": number(0, 1, above=True),
    "top_k": integer(-1, about="-1 and 0 are off."),
    "min_p": number(0, 1),
    "seed": integer(-(2**63), 2**64 - 1, "The same seed gives the same text in any batch, streamed or not."),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0, 2, above=True),
    "logit_bias": mapping(number(-100, 100), "By token id."),
    "allowed_token_ids": array(integer(0), least=1),
    "bad_words": array(string(least=1, most=MAX_BAD_WORD_LENGTH), most=MAX_BAD_WORDS),
    "stop": either(
        string(least=1, most=MAX_STOP_LENGTH),
        array(string(least=1, most=MAX_STOP_LENGTH), most=MAX_STOP_STRINGS),
    ),
    "stop_token_ids": _IDS,
    "ignore_eos": boolean(),
    "include_stop_str_in_output": boolean(),
    "skip_special_tokens": boolean(),
    "spaces_between_special_tokens": boolean(),
    "min_tokens": integer(0, about="At most max_tokens."),
}
_MODEL: Json = {"model": string("A name of /v1/models; the served model without it.")}
_GENERATION: Json = {
    **_MODEL,
    **_SAMPLING,
    **_STRUCTURE,
    "n": integer(1, MAX_CHOICES),
    "best_of": integer(1, MAX_BEST_OF, "At least `n`; equal to it in a stream."),
    "stream": boolean(),
    "stream_options": takes(
        {}, {"include_usage": boolean(), "continuous_usage_stats": boolean()}, "Only where `stream` is true."
    ),
    "echo": boolean(),
    "prompt_logprobs": integer(0, MAX_TOP_LOGPROBS, "Not in a stream."),
    "return_token_ids": boolean(),
    "return_tokens_as_token_ids": boolean(),
    "add_special_tokens": boolean(),
    "cache_salt": string(least=1, most=MAX_SALT_LENGTH, about="Prefixes are shared among equal salts only."),
    "request_id": string(least=1, most=128, about="Comes back as X-Request-Id."),
}


def refused(refusals: dict[str, tuple[object, ...]]) -> Json:
    """Fields that clients know and this server does not honour yet: with the values that ask for nothing."""
    return {name: constant(*neutral, about="Not supported yet.") if neutral else NULL
            for name, neutral in refusals.items()}  # fmt: skip


_FUNCTION = takes(
    {"name": string(least=1, most=128)}, {"description": string(), "parameters": OBJECT, "strict": boolean()}
)
_TOOL = takes({"type": constant("function"), "function": _FUNCTION})
_PICK = takes({"type": constant("function"), "function": takes({"name": string()})})
_TOOLS: Json = {
    "tools": array(_TOOL, least=1, most=MAX_TOOLS),
    "tool_choice": either(
        constant("none", "auto", "required"),
        _PICK,
        takes(
            {
                "type": constant("allowed_tools"),
                "allowed_tools": takes({"mode": constant("auto", "required"), "tools": array(_PICK, least=1)}),
            }
        ),
    ),
    "parallel_tool_calls": boolean(),
}
_TEXT_PART = takes({"type": constant("text"), "text": string()})
_MESSAGE = takes(
    {"role": constant(*ROLES)},
    {
        "content": either(string(), array(_TEXT_PART)),
        "name": string(),
        "tool_call_id": string(),
        "reasoning": string(),
        "reasoning_content": string(),
        "tool_calls": array(
            takes({"function": takes({"name": string()}, {"arguments": either(string(), OBJECT)})}, {"id": string()})
        ),
    },
)
_TEMPLATE: Json = {
    "chat_template_kwargs": mapping(ANYTHING, f"For the model's template; nested at most {MAX_NESTING} deep."),
    "reasoning_effort": constant(*EFFORTS),
    "add_generation_prompt": boolean(),
    "continue_final_message": boolean(),
    "add_special_tokens": boolean(),
}
_PROMPT = either(
    string(),
    array(string(), least=1, most=MAX_PROMPTS),
    array(integer(0), least=1),
    array(array(integer(0), least=1), least=1, most=MAX_PROMPTS),
)

_TOKENIZE_COMMON: Json = {**_MODEL, "add_special_tokens": boolean(), "return_token_strs": boolean()}

# ---- what is answered

_INTEGER_IDS = array(integer(0))
_TOKEN = {"token": string(), "logprob": number(), "bytes": array(integer(0, 255))}
_PROMPT_LOGPROBS = array(
    either(NULL, mapping(gives({"logprob": number(), "rank": integer(1), "decoded_token": string()})))
)
_FINISH = constant("stop", "length", "tool_calls", "abort")
_STOPPED: Json = {name: either(string(), integer(), NULL) for name in ("stop_reason", "matched_stop")}
_REASONING: Json = {"reasoning": string(), "reasoning_content": string()}


def _answer(kind: str, choice: Json, optional: Json | None = None) -> Json:
    head = {"id": string(), "object": constant(kind), "created": integer(0), "model": string()}
    return gives(head | {"choices": array(choice)}, optional)


SCHEMAS: Json = {
    "Error": gives(
        {
            "error": gives(
                {
                    "message": string(least=1),
                    "type": constant(
                        "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
                    ),
                    "param": either(string(), NULL),
                    "code": either(string(), NULL),
                }
            )
        }
    ),
    "Usage": gives(
        {
            "prompt_tokens": integer(0),
            "completion_tokens": integer(0),
            "total_tokens": integer(0),
            "prompt_tokens_details": gives({"cached_tokens": integer(0)}),
        }
    ),
    "ChatRequest": takes(
        {"messages": array(_MESSAGE, least=1)},
        {
            **_GENERATION,
            **_TOOLS,
            **_TEMPLATE,
            "max_completion_tokens": integer(1),
            "max_tokens": integer(1, about="The same under its older name."),
            "logprobs": boolean(),
            "top_logprobs": integer(0, MAX_TOP_LOGPROBS, "Needs `logprobs`."),
            **refused(CHAT_REFUSALS),
        },
    ),
    "CompletionRequest": takes(
        {"prompt": _PROMPT},
        {
            **_GENERATION,
            "max_tokens": integer(1, about=f"{DEFAULT_MAX_TOKENS} where that fits."),
            "logprobs": integer(0, MAX_LOGPROBS),
            **refused(COMPLETION_REFUSALS),
        },
    ),
    "TokenizeRequest": either(
        takes({"prompt": string()}, {**_TOKENIZE_COMMON, "messages": NULL}),
        takes({"messages": array(_MESSAGE, least=1)}, {**_TOKENIZE_COMMON, **_TOOLS, **_TEMPLATE, "prompt": NULL}),
    ),
    "DetokenizeRequest": takes({"tokens": _IDS}, {**_MODEL, "skip_special_tokens": boolean()}),
    "ToolCall": gives(
        {
            "id": string(),
            "type": constant("function"),
            "function": gives({"name": string(), "arguments": string()}),
        }
    ),
    "ChatLogprobs": gives({"content": array(gives(_TOKEN | {"top_logprobs": array(gives(_TOKEN))}))}),
    "Logprobs": gives(
        {
            "text_offset": array(integer(0)),
            "token_logprobs": array(either(number(), NULL)),
            "tokens": array(string()),
            "top_logprobs": array(either(mapping(number()), NULL)),
        }
    ),
    "Chat": _answer(
        "chat.completion",
        gives(
            {
                "index": integer(0),
                "message": gives(
                    {"role": constant("assistant"), "content": either(string(), NULL)},
                    {**_REASONING, "tool_calls": array(ref("ToolCall"), least=1)},
                ),
                "logprobs": either(ref("ChatLogprobs"), NULL),
                "finish_reason": _FINISH,
                **_STOPPED,
            },
            {"token_ids": _INTEGER_IDS},
        ),
        {"usage": ref("Usage"), "prompt_token_ids": _INTEGER_IDS, "prompt_logprobs": _PROMPT_LOGPROBS},
    ),
    "ChatChunk": _answer(
        "chat.completion.chunk",
        gives(
            {
                "index": integer(0),
                "delta": gives(
                    {},
                    {
                        "role": constant("assistant"),
                        "content": string(),
                        **_REASONING,
                        "tool_calls": array(
                            gives(
                                {
                                    "index": integer(0),
                                    "function": gives({"arguments": string()}, {"name": string()}),
                                },
                                {"id": string(), "type": constant("function")},
                            )
                        ),
                    },
                ),
                "logprobs": either(ref("ChatLogprobs"), NULL),
                "finish_reason": either(_FINISH, NULL),
            },
            {**_STOPPED, "token_ids": _INTEGER_IDS},
        ),
        {"usage": either(ref("Usage"), NULL), "prompt_token_ids": _INTEGER_IDS},
    ),
    "Completion": _answer(
        "text_completion",
        gives(
            {
                "index": integer(0),
                "text": string(),
                "logprobs": either(ref("Logprobs"), NULL),
                "finish_reason": either(_FINISH, NULL, about="null in the chunks of a stream but the last."),
            },
            {
                **_STOPPED,
                "token_ids": _INTEGER_IDS,
                "prompt_token_ids": _INTEGER_IDS,
                "prompt_logprobs": _PROMPT_LOGPROBS,
            },
        ),
        {"usage": either(ref("Usage"), NULL)},
    ),
    "Tokens": gives(
        {
            "count": integer(0),
            "max_model_len": integer(1),
            "tokens": _INTEGER_IDS,
            "token_strs": either(array(string()), NULL),
        }
    ),
    "Text": gives({"prompt": string(), "text": string()}, about="The text under vLLM's name and SGLang's."),
    "Model": gives(
        {
            "id": string(),
            "object": constant("model"),
            "created": integer(0),
            "owned_by": constant("oneloop"),
            "root": string(),
            "parent": NULL,
            "max_model_len": integer(1),
        }
    ),
    "Models": gives({"object": constant("list"), "data": array(ref("Model"), least=1)}),
    "Server": gives({"name": constant("oneloop"), "version": string(), "models": array(string(), least=1)}),
    "Version": gives({"version": string()}),
    "Done": gives({"success": constant(True)}, {"message": string(), "file": string()}),
}


# ---- routes


def get(summary: str, answer: Json | str | None, *, kind: str = "application/json") -> Json:
    """A route without a body. answer: its schema, the name of one, or None for an empty answer."""
    return {"get": _operation(summary, None, {} if answer is None else {kind: _media(answer)}, [])}


def post(
    summary: str,
    request: Json | str | None,
    answer: Json | str,
    *,
    examples: list[Json] | None = None,
    events: str | None = None,
    error: str = "Error",
) -> Json:
    """A route that reads a JSON object. request, answer: schemas or names of them.

    events: the name of the schema of one event of a stream. examples: good bodies; the tests send each of them.
    """
    content = {"application/json": _media(answer)}
    if events is not None:
        chunk = string() | {"contentMediaType": "application/json", "contentSchema": ref(events)}
        event = takes({"data": either(chunk, constant("[DONE]"))}, about="Each event; the last one's data is [DONE].")
        content["text/event-stream"] = {"schema": event}
    return {"post": _operation(summary, request, content, examples or [], error)}


def _media(schema: Json | str) -> Json:
    return {"schema": ref(schema) if isinstance(schema, str) else schema}


def _operation(
    summary: str, request: Json | str | None, content: Json, examples: list[Json], error: str = "Error"
) -> Json:
    failed = {"description": "An error.", "content": {"application/json": _media(error)}}
    answered: Json = {"description": "The answer."} | ({"content": content} if content else {})
    operation: Json = {"summary": summary, "responses": {"200": answered, "4XX": failed, "5XX": failed}}
    if request is not None:
        body = _media(request)
        if examples:
            body["examples"] = {f"example {index}": {"value": value} for index, value in enumerate(examples, 1)}
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    return operation


_HELLO: list[Json] = [{"role": "user", "content": "What is 17 + 25?"}]
_WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_INFO = get("Resolved options as they were at start, and the engine's state now.", OBJECT)
_FLUSH = "Forget every cached prefix; 400 while requests run or wait."
_TOKENIZE = post(
    "Ids of a prompt, or of messages as a chat would render them.",
    "TokenizeRequest",
    "Tokens",
    examples=[{"prompt": "Hello"}, {"messages": _HELLO, "tools": [_WEATHER], "return_token_strs": True}],
)
_DETOKENIZE = post("Text of token ids.", "DetokenizeRequest", "Text", examples=[{"tokens": [5, 6, 7]}])

PATHS: Json = {
    "/v1/chat/completions": post(
        "The next message of a chat.",
        "ChatRequest",
        "Chat",
        events="ChatChunk",
        examples=[
            {"messages": _HELLO, "temperature": 0},
            {"messages": _HELLO, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 8},
            {"messages": _HELLO, "logprobs": True, "top_logprobs": 2, "n": 2, "max_tokens": 4, "stream": True},
            {"messages": _HELLO, "logprobs": True, "prompt_logprobs": 1, "return_token_ids": True, "max_tokens": 4},
            {"messages": _HELLO, "response_format": {"type": "json_object"}, "max_tokens": 20},
            {"messages": _HELLO, "tools": [_WEATHER], "tool_choice": "required", "max_tokens": 100},
            {"messages": _HELLO, "tools": [_WEATHER], "tool_choice": "required", "stream": True, "max_tokens": 100},
        ],
    ),
    "/v1/completions": post(
        "The text that goes on from a prompt.",
        "CompletionRequest",
        "Completion",
        events="Completion",
        examples=[
            {"prompt": "Once upon a time", "temperature": 0},
            {"prompt": ["a", "b"], "n": 2, "stream": True, "stream_options": {"include_usage": True}},
            {"prompt": [5, 6, 7], "echo": True, "logprobs": 2, "max_tokens": 3, "return_token_ids": True},
            {"prompt": [[5, 6], [7]], "echo": True, "logprobs": 0, "max_tokens": 3, "stream": True},
            {"prompt": "x", "best_of": 3, "prompt_logprobs": 2, "stop": ["e"], "return_tokens_as_token_ids": True},
            {"prompt": "x", "stream": True, "return_token_ids": True, "max_tokens": 3},
        ],
    ),
    "/tokenize": _TOKENIZE,
    "/v1/tokenize": _TOKENIZE,
    "/detokenize": _DETOKENIZE,
    "/v1/detokenize": _DETOKENIZE,
    "/v1/models": get("The served model, once for each of its names.", "Models"),
    "/v1/models/{id}": get("The served model by one of its names.", "Model"),
    "/health": get("200 while the engine makes progress.", None),
    "/ready": get("The same.", None),
    "/metrics": get("Prometheus text.", string(), kind="text/plain"),
    "/": get("What this is.", "Server"),
    "/v1": get("What this is.", "Server"),
    "/version": get("The version.", "Version"),
    "/server_info": _INFO,
    "/get_server_info": _INFO,
    "/load": get("How many requests run or wait.", gives({"server_load": integer(0)})),
    "/flush_cache": get(_FLUSH, "Done") | post(_FLUSH, None, "Done"),
    "/reset_prefix_cache": get(_FLUSH, "Done") | post(_FLUSH, None, "Done"),
    "/start_profile": post("Record what the device does (CUDA, --profile-dir).", None, "Done"),
    "/stop_profile": post("Write the trace.", None, "Done"),
    "/openapi.json": get("This document.", OBJECT),
}


def document(version: str, root_path: str = "") -> Json:
    """The whole document; root_path: what a proxy puts before the paths."""
    paths: Json = {}
    for path, item in PATHS.items():
        variables = re.findall(r"\{(\w+)\}", path)
        parameters = [{"name": name, "in": "path", "required": True, "schema": string(least=1)} for name in variables]
        paths[path] = {
            method: {"operationId": re.sub(r"\W+", "_", f"{method}{path}").strip("_"), **operation}
            | ({"parameters": parameters} if parameters else {})
            for method, operation in item.items()
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "oneloop", "version": version, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "servers": [{"url": root_path.rstrip("/") or "/"}],
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Where --api-key is set."}},
        },
    }
