"""/v1/responses: OpenAI's Responses API."""

from __future__ import annotations

from server.openapi.openai import GENERATION, HELLO, KEPT, OTHER_TOOL, PREDICTION, SCHEMA, TEMPLATE, THINKING, TOKEN
from server.openapi.words import (
    ANYTHING,
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
    mapping,
    named_events,
    number,
    post,
    ref,
    refused,
    string,
    takes,
)
from server.protocol.compaction import REFUSALS as COMPACTION_REFUSALS
from server.protocol.refusals import CHAT_REFUSALS
from server.protocol.response_items import ROLES
from server.protocol.responses import HINTS, INCLUDES, MOVED, REFUSALS

_TEXT = takes({"type": constant("input_text", "output_text", "text"), "text": string()})
_OTHER = takes({"type": string(least=1)}, about="Of any other kind: named in the text, or left out.")
_CONTENT = either(string(), array(either(_TEXT, takes({"type": constant("refusal"), "refusal": string()}), _OTHER)))
_ID: Json = {"id": string(most=128)}
_ITEM = either(
    takes({"role": constant(*ROLES), "content": _CONTENT}, {"type": constant("message"), **_ID}),
    takes(
        {"type": constant("function_call"), "call_id": string(), "name": string(), "arguments": string()},
        {"namespace": string(), **_ID},
    ),
    takes(
        {"type": constant("custom_tool_call"), "call_id": string(), "name": string(), "input": string()},
        {"namespace": string(), **_ID},
    ),
    takes(
        {"type": constant("function_call_output", "custom_tool_call_output"), "call_id": string()},
        {"output": _CONTENT, **_ID},
    ),
    takes({"type": constant("reasoning")}, {"summary": array(OBJECT), "content": array(OBJECT), **_ID}),
    takes({"id": string()}, {"type": constant("item_reference")}),
    takes({"type": string(least=1)}, _ID, "Of any other kind: calls, results and text are shown."),
)
_FORMAT = either(
    takes({"type": constant("text", "json_object")}),
    takes({"type": constant("json_schema"), "schema": SCHEMA}, {"name": string(), "strict": boolean()}),
)
_PICK = takes({"type": constant("function", "custom"), "name": string()}, {"namespace": string()})
_FUNCTION = takes(
    {"type": constant("function"), "name": string(least=1, most=128)},
    {"description": string(), "parameters": OBJECT, "strict": boolean()},
)
_CUSTOM = takes(
    {"type": constant("custom"), "name": string(least=1, most=128)},
    {
        "description": string(),
        "format": either(
            takes({"type": constant("text")}),
            takes(
                {"type": constant("grammar"), "syntax": constant("lark", "regex"), "definition": string(least=1)},
            ),
        ),
    },
)
_UNKNOWN = takes({"type": string(least=1)}, about="Of any other type: left out.")
_NAMESPACE = takes(
    {"type": constant("namespace"), "name": string(least=1)},
    {"description": string(), "tools": array(either(_FUNCTION, _CUSTOM, _UNKNOWN))},
)
# What makes the prompt.
_PROMPT: Json = {
    "model": GENERATION["model"],
    "instructions": string(),
    "previous_response_id": string(),
    "max_output_tokens": integer(1),
    "include": array(string(least=1), f"Known: {', '.join(INCLUDES)}."),
    "top_logprobs": alternatives(),
    "tools": array(either(_FUNCTION, _CUSTOM, _NAMESPACE, _UNKNOWN)),
    "tool_choice": either(
        constant("none", "auto", "required"),
        _PICK,
        takes({"type": constant("namespace"), "name": string()}),
        takes({"type": constant("tool_search")}, about="Of a search that the client runs."),
        takes(
            {
                "type": constant("allowed_tools"),
                "mode": constant("auto", "required"),
                "tools": array(either(_PICK, OTHER_TOOL), least=1),
            }
        ),
    ),
    "parallel_tool_calls": boolean(),
    "text": takes({}, {"format": _FORMAT, "verbosity": constant("low", "medium", "high")}),
    "reasoning": takes({}, {"effort": TEMPLATE["reasoning_effort"]}),
    "chat_template_kwargs": TEMPLATE["chat_template_kwargs"],
    "add_special_tokens": boolean(),
    "stream": boolean(),
    "stream_options": OBJECT,
    **dict.fromkeys(HINTS, ANYTHING | {"description": "Changes nothing here."}),
    **{name: NULL | {"description": f"Called `{other}` here."} for name, other in MOVED.items()},
    **refused(REFUSALS),
}
_REQUEST: Json = {
    # All that a chat has beside it.
    **{name: value for name, value in (GENERATION | THINKING).items() if name not in _PROMPT},
    **{name: value for name, value in refused(CHAT_REFUSALS).items() if name not in _PROMPT},
    **_PROMPT,
    "prediction": PREDICTION,
    "web_search_options": ANYTHING | {"description": "Changes nothing here."},
    "store": boolean(),
    "background": boolean(),
    "metadata": mapping(string(most=512)),
    "max_tool_calls": integer(1),
    "prompt_cache_key": string(),
    "safety_identifier": string(),
    "truncation": constant("auto", "disabled"),
}
_INPUT: Json = {"input": either(string(), array(_ITEM, least=1))}

_OUTPUT_TEXT = gives(
    {
        "type": constant("output_text"),
        "text": string(),
        "annotations": array(ANYTHING, most=0),
        "logprobs": array(gives(TOKEN | {"top_logprobs": array(gives(TOKEN))})),
    }
)
_REASONING_TEXT = gives({"type": constant("reasoning_text"), "text": string()})
_STATUS: Json = {"status": constant("in_progress", "completed", "incomplete")}
_CALL: Json = {"call_id": string(), "name": string()}
_OUTPUT = either(
    gives(
        {"id": string(), "type": constant("message"), "role": constant("assistant"), "content": array(_OUTPUT_TEXT)}
        | _STATUS
    ),
    gives(
        {"id": string(), "type": constant("reasoning"), "summary": array(OBJECT), "content": array(_REASONING_TEXT)}
        | _STATUS
    ),
    *(
        gives(
            {"id": string(), "type": constant(kind), **_CALL, field: string(), **_STATUS},
            {"namespace": string("Of a function in a namespace.")},
        )
        for kind, field in (("function_call", "arguments"), ("custom_tool_call", "input"))
    ),
    gives(
        {"id": string(), "type": constant("tool_search_call"), "call_id": string(), "execution": constant("client")}
        | {"arguments": OBJECT}
        | _STATUS
    ),
)
_USAGE = gives(
    {
        "input_tokens": integer(0),
        "input_tokens_details": gives({"cached_tokens": integer(0), "cache_write_tokens": integer(0)}),
        "output_tokens": integer(0),
        "output_tokens_details": gives({"reasoning_tokens": integer(0)}),
        "total_tokens": integer(0),
    }
)
_NO_STRING = either(string(), NULL)
_NO_INTEGER = either(integer(0), NULL)
_RESPONSE = gives(
    {
        "id": string(),
        "object": constant("response"),
        "created_at": integer(0),
        "completed_at": _NO_INTEGER,
        "status": constant("queued", "in_progress", "completed", "incomplete", "failed", "cancelled"),
        "background": boolean(),
        "error": either(gives({"code": constant("server_error", "invalid_prompt"), "message": string()}), NULL),
        "incomplete_details": either(gives({"reason": constant("max_output_tokens")}), NULL),
        "model": string(),
        "output": array(_OUTPUT),
        "temperature": number(0, 2),
        "top_p": number(0, 1),
        "usage": either(_USAGE, NULL),
        "store": boolean(),
        "instructions": _NO_STRING,
        "max_output_tokens": _NO_INTEGER,
        "max_tool_calls": _NO_INTEGER,
        "metadata": mapping(string()),
        "parallel_tool_calls": boolean(),
        "presence_penalty": number(-2, 2),
        "frequency_penalty": number(-2, 2),
        "previous_response_id": _NO_STRING,
        "prompt_cache_key": _NO_STRING,
        "reasoning": gives({"effort": _NO_STRING, "summary": _NO_STRING}),
        "safety_identifier": _NO_STRING,
        "service_tier": constant("default"),
        "text": gives({"format": OBJECT, "verbosity": string()}),
        "tool_choice": either(string(), OBJECT),
        "tools": array(OBJECT),
        "top_logprobs": integer(0),
        "truncation": constant("auto", "disabled"),
        "user": _NO_STRING,
    },
    {"kv_transfer_params": KEPT},
)
_PART: Json = {"item_id": string(), "output_index": integer(0), "content_index": integer(0)}
_SAID = either(_OUTPUT_TEXT, _REASONING_TEXT)
_LOGPROBS = {"logprobs": _OUTPUT_TEXT["properties"]["logprobs"]}
_OF_CALL: Json = {"item_id": string(), "output_index": integer(0)}
# By the type of an event.
_EVENTS: Json = {
    **{
        f"response.{word}": {"response": ref("Response")}
        for word in ("created", "in_progress", "completed", "incomplete", "failed")
    },
    "response.output_item.added": {"output_index": integer(0), "item": _OUTPUT},
    "response.output_item.done": {"output_index": integer(0), "item": _OUTPUT},
    "response.content_part.added": {**_PART, "part": _SAID},
    "response.content_part.done": {**_PART, "part": _SAID},
    "response.output_text.delta": {**_PART, "delta": string(), **_LOGPROBS},
    "response.output_text.done": {**_PART, "text": string(), **_LOGPROBS},
    "response.reasoning_text.delta": {**_PART, "delta": string()},
    "response.reasoning_text.done": {**_PART, "text": string()},
    "response.function_call_arguments.delta": {**_OF_CALL, "delta": string()},
    "response.function_call_arguments.done": {**_OF_CALL, "name": string(), "arguments": string()},
    "response.custom_tool_call_input.delta": {**_OF_CALL, "delta": string()},
    "response.custom_tool_call_input.done": {**_OF_CALL, "input": string()},
}

SCHEMAS: Json = {
    "ResponseRequest": takes(_INPUT, _REQUEST),
    # What comes after the prompt is not looked into.
    "InputTokensRequest": takes(
        _INPUT,
        {
            **_PROMPT,
            "stream": ANYTHING,
            "top_logprobs": ANYTHING,
            "text": takes({}, {"format": OBJECT, "verbosity": constant("low", "medium", "high")}),
        },
    ),
    # What says how an answer looks changes nothing of a summary.
    # What says how an answer looks, or where it is kept, says nothing of a summary.
    "CompactRequest": takes(
        {},
        _REQUEST
        | _INPUT
        | dict.fromkeys(("store", "text", "include", "top_logprobs", "stream_options", "tool_choice"), ANYTHING)
        | {"stream": constant(False)}
        | refused(COMPACTION_REFUSALS),
    ),
    "Compaction": gives(
        {
            "id": string(),
            "object": constant("response.compaction"),
            "created_at": integer(0),
            "output": array(
                either(
                    gives({"id": string(), "type": constant("message"), "role": constant("user")} | _STATUS)
                    | {"additionalProperties": True},
                    gives({"id": string(), "type": constant("compaction"), "encrypted_content": string()}),
                )
            ),
            "usage": _USAGE,
        }
    ),
    "Response": _RESPONSE,
    "ResponseEvent": either(
        *(gives({"type": constant(kind), "sequence_number": integer(0), **fields}) for kind, fields in _EVENTS.items())
    ),
    "InputItems": gives(
        {
            "object": constant("list"),
            "data": array(OBJECT),
            "first_id": _NO_STRING,
            "last_id": _NO_STRING,
            "has_more": boolean(),
        }
    ),
}

_TOOL: Json = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
_FORCED: Json = {"input": "Hello", "tools": [_TOOL], "tool_choice": "required", "max_output_tokens": 100}

PATHS: Json = {
    "/v1/responses": post(
        "A response to a text or to a list of items.",
        "ResponseRequest",
        "Response",
        examples=(
            {"input": "What is 17 + 25?", "temperature": 0, "max_output_tokens": 20},
            {"input": HELLO, "stream": True, "max_output_tokens": 5, "store": False},
            {"input": HELLO, "include": [INCLUDES[0]], "top_logprobs": 1, "max_output_tokens": 5, "stream": True},
            _FORCED,
            {**_FORCED, "stream": True},
        ),
        streamed=named_events("ResponseEvent"),
    ),
    "/v1/responses/input_tokens": post(
        "How many tokens the input of a response takes.",
        "InputTokensRequest",
        gives({"object": constant("response.input_tokens"), "input_tokens": integer(0)}),
        examples=({"input": "Hello"}, {"input": "Hello", "stream": True, "stream_options": {}}),
    ),
    "/v1/responses/compact": post(
        "A conversation made shorter: what the user said, and a summary.",
        "CompactRequest",
        "Compaction",
        examples=({"input": "Hello", "max_output_tokens": 5}, {"input": HELLO, "max_output_tokens": 5}),
    ),
    "/v1/responses/{response_id}": get(
        "A response that was kept, or runs in the background; with `stream`, the events of the latter behind a number.",
        "Response",
        query={"stream": constant("false", "true"), "starting_after": integer(0)},
    )
    | delete("Forget a response.", gives({"id": string(), "object": constant("response"), "deleted": constant(True)})),
    "/v1/responses/{response_id}/cancel": post("End a response that runs in the background.", None, "Response"),
    "/v1/responses/{response_id}/input_items": get(
        "The items that a response was made from.",
        "InputItems",
        query={"limit": integer(1, 100), "order": constant("asc", "desc"), "after": string(least=1)},
    ),
}
