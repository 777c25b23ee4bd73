"""/v1/messages: Anthropic's API."""

from __future__ import annotations

from server.openapi.openai import GENERATION, HELLO, KEPT, SCHEMA, TEMPLATE
from server.openapi.words import (
    ANYTHING,
    NULL,
    OBJECT,
    Json,
    array,
    boolean,
    constant,
    either,
    gives,
    integer,
    named_events,
    post,
    ref,
    refused,
    string,
    takes,
)
from server.protocol.anthropic import (
    CHOICES,
    ERROR_TYPES,
    HINTS,
    MAX_EFFORT,
    REFUSALS,
    ROLES,
    SAME,
    THINKING,
)
from server.protocol.refusals import CHAT_REFUSALS

_TEXT = takes({"type": constant("text"), "text": either(string(), NULL)})
_OTHER = takes({"type": string(least=1)}, about="Of any other kind: named in the text, or left out.")
_BLOCK = either(
    _TEXT,
    takes({"type": constant("thinking"), "thinking": string()}),
    takes({"type": constant("tool_use"), "id": string(), "name": string(), "input": OBJECT}),
    takes(
        {"type": constant("tool_result"), "tool_use_id": string()},
        {"content": either(string(), array(either(_TEXT, _OTHER))), "is_error": boolean()},
    ),
    _OTHER,
)
_MESSAGE = takes({"role": constant(*ROLES)}, {"content": either(string(), array(_BLOCK))})
_FORM = takes({"type": constant("json_schema"), "schema": SCHEMA})
_EFFORT = string("low to max; one that is not known is the highest.", least=1, most=MAX_EFFORT)
_REQUEST: Json = {
    # What has the same name and meaning in a chat.
    **{name: GENERATION[name] for name in SAME if name in GENERATION},
    **refused({name: CHAT_REFUSALS[name] for name in SAME if name in CHAT_REFUSALS}),
    "system": either(string(), array(either(_TEXT, _OTHER))),
    "stop_sequences": array(string(least=1)),
    "metadata": takes({}, {"user_id": string()}),
    "tools": array(
        either(
            takes(
                {"name": string(least=1, most=128), "input_schema": OBJECT},
                {"type": constant("custom"), "description": string(), "strict": boolean()},
            ),
            takes({"type": string(least=1)}, about="Anthropic's own: left out, but for what clients run."),
        )
    ),
    "tool_choice": either(
        takes({"type": constant(*CHOICES)}, {"disable_parallel_tool_use": boolean()}),
        takes({"type": constant("tool"), "name": string()}, {"disable_parallel_tool_use": boolean()}),
    ),
    "thinking": takes({"type": constant(*THINKING)}, {"budget_tokens": integer(1), "display": string()}),
    "output_config": takes({}, {"effort": _EFFORT, "format": _FORM}),
    "output_format": _FORM,
    "chat_template_kwargs": TEMPLATE["chat_template_kwargs"],
    **dict.fromkeys(HINTS, ANYTHING | {"description": "Changes nothing here."}),
    **refused(REFUSALS),
}
# Of what says how to go on from the prompt, a count of its tokens reads no more than that it is there.
_UNREAD: Json = {
    **dict.fromkeys((name for name in SAME if name != "model"), ANYTHING),
    "stop_sequences": array(ANYTHING),
}
_ANY_FORM = takes({"type": constant("json_schema")})
_CONFIG = takes({}, {"effort": _EFFORT, "format": _ANY_FORM})
_MESSAGES: Json = {"messages": array(_MESSAGE, least=1)}

_USAGE = gives(
    {
        "input_tokens": integer(0),
        "cache_creation_input_tokens": integer(0),
        "cache_read_input_tokens": integer(0),
        "output_tokens": integer(0),
    }
)
_STOPPED: Json = {
    "stop_reason": either(
        constant("end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"), NULL
    ),
    "stop_sequence": either(string(), NULL),
}
_SAID = either(
    gives({"type": constant("text"), "text": string()}),
    gives({"type": constant("thinking"), "thinking": string(), "signature": string()}),
    gives({"type": constant("tool_use"), "id": string(), "name": string(), "input": OBJECT}),
)
_PIECE = either(
    gives({"type": constant("text_delta"), "text": string()}),
    gives({"type": constant("thinking_delta"), "thinking": string()}),
    gives({"type": constant("signature_delta"), "signature": string()}),
    gives({"type": constant("input_json_delta"), "partial_json": string()}),
)
# By the type of an event.
_EVENTS: Json = {
    "message_start": {"message": ref("Message")},
    "content_block_start": {"index": integer(0), "content_block": _SAID},
    "content_block_delta": {"index": integer(0), "delta": _PIECE},
    "content_block_stop": {"index": integer(0)},
    "message_delta": {"delta": gives(_STOPPED), "usage": _USAGE},
    "message_stop": {},
    "ping": {},
}
_BESIDE: Json = {"message_delta": {"kv_transfer_params": KEPT}}

SCHEMAS: Json = {
    "AnthropicError": gives(
        {
            "type": constant("error"),
            "error": gives(
                {
                    "type": constant(*ERROR_TYPES.values(), "invalid_request_error", "api_error"),
                    "message": string(least=1),
                }
            ),
            "request_id": either(string(), NULL),
        }
    ),
    "MessagesRequest": takes({**_MESSAGES, "max_tokens": integer(1)}, _REQUEST),
    "CountRequest": takes(_MESSAGES, {**_REQUEST, **_UNREAD, "output_config": _CONFIG, "output_format": _ANY_FORM}),
    "Message": gives(
        {
            "id": string(),
            "type": constant("message"),
            "role": constant("assistant"),
            "model": string(),
            "content": array(_SAID),
            "usage": _USAGE,
            **_STOPPED,
        },
        {"kv_transfer_params": KEPT},
    ),
    "MessageEvent": either(
        *(gives({"type": constant(kind), **fields}, _BESIDE.get(kind, {})) for kind, fields in _EVENTS.items()),
        ref("AnthropicError"),
    ),
}

_TOOL: Json = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
_FORCED: Json = {"messages": HELLO, "max_tokens": 100, "tools": [_TOOL], "tool_choice": {"type": "any"}}

PATHS: Json = {
    "/v1/messages": post(
        "The next message of a conversation.",
        "MessagesRequest",
        "Message",
        examples=(
            {"messages": HELLO, "max_tokens": 30, "temperature": 0, "system": "Be kind.", "stop_sequences": ["="]},
            {"messages": HELLO, "max_tokens": 5, "stream": True},
            _FORCED,
            {**_FORCED, "stream": True},
        ),
        streamed=named_events("MessageEvent"),
        error="AnthropicError",
    ),
    "/v1/messages/count_tokens": post(
        "How many tokens a prompt takes.",
        "CountRequest",
        gives({"input_tokens": integer(0)}),
        examples=({"messages": HELLO, "tools": [_TOOL]},),
        error="AnthropicError",
    ),
}
