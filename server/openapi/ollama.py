"""/api/*: Ollama's API."""

from __future__ import annotations

from server.openapi.openai import HELLO, MESSAGE, OTHER_TOOL, SAMPLING, TOKEN, TOOL, WEATHER
from server.openapi.words import (
    NULL,
    OBJECT,
    Json,
    alternatives,
    array,
    boolean,
    constant,
    delete,
    either,
    get,
    gives,
    integer,
    lines,
    mapping,
    number,
    post,
    refused,
    string,
    takes,
)
from server.protocol.embeddings import MAX_INPUTS
from server.protocol.ollama import EFFORTS, ENDLESS, FLAG_HINTS, NUMBER_HINTS, OPTION_REFUSALS, OPTIONS, REFUSALS

# Ollama's names of what a chat has, too.
_PARAMETERS: Json = {
    **{theirs: SAMPLING[ours] for theirs, ours in OPTIONS.items() if ours not in ("max_tokens", "stop")},
    "num_predict": integer(min(ENDLESS), about="0 and below: until the model stops."),
    "stop": either(constant(""), SAMPLING["stop"]),
}
_HINT = "Taken, and changes nothing."
# What is read even where there is nothing to answer.
_HINTS: Json = {
    "num_ctx": integer(1, about="At most the server's own counts."),
    "repeat_last_n": integer(-1, about="0 turns penalties off; else they are of the whole text."),
    "penalize_newline": boolean("true, where there is a penalty."),
    **{name: number(about=_HINT) for name in NUMBER_HINTS},
    **{name: boolean(_HINT) for name in FLAG_HINTS},
    **refused(OPTION_REFUSALS),
}
_NAME: Json = {"model": string(), "name": string("The same under its older name.")}
_COMMON: Json = {
    **_NAME,
    "stream": boolean("true unless it is said."),
    "format": either(constant("json", ""), OBJECT, about="json, or a JSON schema."),
    "options": takes({}, {**_PARAMETERS, **_HINTS}),
    "keep_alive": either(number(), string(), about="Seconds, or a duration as 5m; 0 without a prompt is unload."),
    "think": either(boolean(), constant(*EFFORTS)),
    "logprobs": boolean(),
    "top_logprobs": alternatives(),
    **refused(REFUSALS),
}
_KEPT: Json = {"keep_alive": _COMMON["keep_alive"], "options": takes({}, _HINTS)}
# What is read of a request that only loads the model.
_LOADING: Json = {
    **{name: schema for name, schema in _COMMON.items() if name not in ("think", "logprobs", "top_logprobs")},
    "options": takes({}, _HINTS),
}
_MESSAGE = takes(
    {"role": MESSAGE["properties"]["role"]},
    {
        "content": string(),
        "thinking": string(),
        "images": array(string(), "In the newest turn an error, before it a bracketed word."),
        "tool_name": string(),
        "tool_call_id": string(),
        "tool_calls": array(takes({"function": takes({"name": string()}, {"arguments": OBJECT})}, {"id": string()})),
    },
)

_HEAD: Json = {"model": string(), "created_at": string()}
_ENDING: Json = {
    "done_reason": constant("stop", "length", "load", "unload"),
    **{
        name: integer(0)
        for name in (
            "total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count",
            "eval_duration",
        )
    },
    "logprobs": array(gives(TOKEN | {"top_logprobs": array(gives(TOKEN))})),
}  # fmt: skip
_CALL = gives({"id": string(), "function": gives({"index": integer(0), "name": string(), "arguments": OBJECT})})
_SAID = gives(
    {"role": constant("assistant"), "content": string()}, {"thinking": string(), "tool_calls": array(_CALL, least=1)}
)
_DETAILS = gives(
    {
        "parent_model": string(),
        "format": string(),
        "family": string(),
        "families": array(string()),
        "parameter_size": string(),
        "quantization_level": string(),
    }
)
_ABLE = array(constant("completion", "tools", "thinking", "insert", "embedding"))
_CARD: Json = {
    "name": string(),
    "model": string(),
    "modified_at": string(),
    "size": integer(0),
    "digest": string(),
    "details": _DETAILS,
}

_SUFFIX = string("What is to follow the answer; of models that can fill in the middle (capability `insert`).")

SCHEMAS: Json = {
    "OllamaError": gives({"error": string(least=1)}),
    "OllamaChatRequest": either(
        takes({"messages": array(_MESSAGE, least=1)}, {**_COMMON, "tools": array(either(TOOL, OTHER_TOOL))}),
        takes({}, {**_LOADING, "messages": array(_MESSAGE, most=0)}),
    ),
    "OllamaGenerateRequest": either(
        takes({"prompt": string(least=1)}, {**_COMMON, "system": string(), "raw": boolean(), "suffix": _SUFFIX}),
        takes({}, {**_LOADING, "prompt": constant(""), "system": string(), "raw": boolean(), "suffix": _SUFFIX}),
    ),
    "ShowRequest": takes(
        {}, {**_NAME, **refused({"verbose": (False,), "system": ("",), "template": ("",), "options": ({},)})}
    ),
    "EmbedRequest": takes(
        {},
        {
            **_NAME,
            **_KEPT,
            "input": either(string(), array(string(least=1), most=MAX_INPUTS)),
            "truncate": boolean("Cut what is longer than the context; true unless it is said."),
            "dimensions": integer(0, about="Of models that were trained for shorter vectors."),
        },
    ),
    "OldEmbedRequest": takes({}, {**_NAME, **_KEPT, "prompt": string()}),
    "PullRequest": takes({}, {**_NAME, "stream": _COMMON["stream"]}),
    "Embedded": gives(
        {"model": string(), "embeddings": array(array(number()), "Of length 1 each.")},
        {name: integer(0) for name in ("total_duration", "load_duration", "prompt_eval_count")},
    ),
    "OldEmbedded": gives({"embedding": array(number(), "Not brought to length 1.")}),
    "Pulled": gives({"status": constant("success")}),
    "OllamaChat": gives({**_HEAD, "message": _SAID, "done": boolean()}, _ENDING),
    "OllamaText": gives({**_HEAD, "response": string(), "done": boolean()}, {**_ENDING, "thinking": string()}),
    "Tags": gives({"models": array(gives({**_CARD, "capabilities": _ABLE}))}),
    "Running": gives(
        {
            "models": array(
                gives({**_CARD, "expires_at": string(), "size_vram": integer(0), "context_length": integer(1)})
            )
        }
    ),
    "Shown": gives(
        {
            "modelfile": string(),
            "parameters": string(),
            "template": string(),
            "details": _DETAILS,
            "model_info": mapping(either(string(), number(), NULL)),
            "capabilities": _ABLE,
            "modified_at": string(),
        }
    ),
}

_ERROR = "OllamaError"
_NONE = "An error: there is one model, and it is served."
_SHORT: Json = {"options": {"temperature": 0, "num_predict": 5}}

PATHS: Json = {
    "/api/chat": post(
        "The next message of a chat; an empty list of messages only loads the model.",
        "OllamaChatRequest",
        "OllamaChat",
        examples=(
            {"messages": HELLO, "stream": False, "logprobs": True, "top_logprobs": 1, **_SHORT},
            {"messages": HELLO, "tools": [WEATHER], **_SHORT},
            {"stream": False},
        ),
        streamed=lines("OllamaChat"),
        error=_ERROR,
    ),
    "/api/generate": post(
        "The answer to a prompt, or with `raw` the text that goes on from it.",
        "OllamaGenerateRequest",
        "OllamaText",
        examples=(
            {"prompt": "Hello", "stream": False, "format": "json", **_SHORT},
            {"prompt": "def f():", "suffix": "return x", **_SHORT},
            {"prompt": "Once", "raw": True, "think": False, **_SHORT},
        ),
        streamed=lines("OllamaText"),
        error=_ERROR,
    ),
    "/api/embed": post(
        "The vectors of texts, each of length 1.",
        "EmbedRequest",
        "Embedded",
        examples=({"input": "Hello", "options": {"num_ctx": 64}}, {"input": ["a", "b"], "truncate": False}, {}),
        error=_ERROR,
    ),
    "/api/embeddings": post(
        "The vector of one text; /api/embed came after it.",
        "OldEmbedRequest",
        "OldEmbedded",
        examples=({"prompt": "Hello"}, {"prompt": ""}),
        error=_ERROR,
    ),
    "/api/pull": post(
        "Done, for the model that is served; an error for any other.",
        "PullRequest",
        "Pulled",
        examples=({}, {"stream": False}),
        streamed=lines("Pulled"),
        error=_ERROR,
    ),
    **{path: post(_NONE, None, None, error=_ERROR) for path in ("/api/create", "/api/copy", "/api/push")},
    "/api/blobs/{digest}": post(_NONE, None, None, error=_ERROR),
    "/api/delete": delete(_NONE, None, error=_ERROR),
    "/api/tags": get("The models that there are.", "Tags", error=_ERROR),
    "/api/ps": get("The models that are loaded.", "Running", error=_ERROR),
    "/api/show": post("What the model is.", "ShowRequest", "Shown", examples=({},), error=_ERROR),
    "/api/version": get("The release of Ollama whose API is spoken.", "Version", error=_ERROR),
}
