"""POST /v1/responses: its body as a chat's, so that `parse_chat` reads what both have in common, and its input items.

Pure but for the store, which earlier turns come from. Many items are read in a thread of their own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

from server.protocol.body import Body, aside, check_nesting, invalid
from server.protocol.chat import EFFORTS, parse_chat
from server.protocol.errors import ApiError
from server.protocol.generation import Plan
from server.protocol.history import newest_turn
from server.protocol.ignored import ignore
from server.protocol.naming import in_words_of
from server.protocol.refusals import refuse
from server.protocol.response_items import ADDED_TOOLS, CONFIGURATION, Flat, as_messages, read_item, turn_of
from server.protocol.tool_fields import Declared
from server.protocol.tool_search import NAME as SEARCH
from server.protocol.tool_search import OUTPUT as FOUND
from server.protocol.tool_search import as_function, found_tools, is_client_search
from server.state import State

Json = dict[str, Any]

LOGPROBS = "message.output_text.logprobs"
# Reasoning items bring their whole text along, so nothing has to be carried in secret.
INCLUDES = (LOGPROBS, "reasoning.encrypted_content")
# Names of things to include are short and few.
_MAX_INCLUDES = 64
# What chat has under another name.
MOVED = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "logprobs": "include",
    "functions": "tools",
    "function_call": "tool_choice",
}
# What this API has and this server has not, and what only chat has, with the values that ask for nothing.
REFUSALS: dict[str, tuple[object, ...]] = {
    "conversation": (),
    "prompt": (),
    "moderation": (),
    "previous_input_messages": ([],),
    "enable_response_messages": (False,),
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_prompt_text": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}
# Wishes that change no word of the answer: how a provider runs it, bills it or keeps it.
HINTS = (
    "service_tier",
    "prompt_cache_retention",
    "prompt_cache_options",
    "context_management",
    "background_options",
    "access_programs",
    "image",
)
# Our name of a field and this API's, for errors: what describes a tool stands beside its type here.
NAMES = (
    MOVED
    | {
        "prompt": "input",
        "response_format.json_schema": "text.format",
        "tool_choice.allowed_tools": "tool_choice",
    }
    | {
        f"{place}.{kind}": place.replace("allowed_tools.", "")
        for place in ("tools[]", "tools[].tools[]", "tool_choice", "tool_choice.allowed_tools.tools[]")
        for kind in ("function", "custom")
    }
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the answer tells of its request.

    fields: of the Response object. items: the whole input, earlier turns included. owner: whom the response is kept
    for, None where it is not kept. searches: the client runs searches for tools. background: it goes on without it.
    """

    fields: Json
    items: list[Json]
    owner: str | None
    searches: bool
    background: bool = False


async def parse_response(body: Body, state: State, response_id: str, owner: str) -> tuple[Plan, Asked]:
    """Raises RequestError for anything that cannot be served, under this API's names of fields."""
    store, background = _read_store(body, state), body.boolean("background", False)
    if background and not store:
        raise invalid("background", "needs `store` to be true, and a server that keeps responses")
    chat, items = await read_chat(body, state, owner)
    fields = _read_fields(body)
    with in_words_of(NAMES):
        plan = await parse_chat(chat, state, response_id)
        if fields["truncation"] == "auto":
            flat = Declared(chat.raw("tools")).flat
            plan = await _truncated(chat, items, fields["instructions"], flat, state, plan)
    searches = any(map(is_client_search, fields["tools"]))
    return plan, Asked(fields | {"store": store}, items, owner if store else None, searches, background)


async def read_chat(body: Body, state: State, owner: str) -> tuple[Body, list[Json]]:
    """The body that asks a chat for the same, and all input items. Everything beside them keeps its name and place.

    In a thread where that may take long; a small body may go on from a large conversation.
    """
    read = partial(_read_chat, body, state, owner)
    return await (asyncio.to_thread(read) if body.has("previous_response_id") else aside(body, read))


def _read_chat(body: Body, state: State, owner: str) -> tuple[Body, list[Json]]:
    for name, other in MOVED.items():
        if body.has(name):
            raise invalid(name, f"is no field of /v1/responses; it is called `{other}` here")
    refuse(body, REFUSALS)
    for name in HINTS:
        if body.has(name) and body.raw(name) not in ("auto", "default", [], {}):
            ignore(name)
    text, reasoning = body.inner("text"), body.inner("reasoning")
    body.object("stream_options")
    if body.has("stream_options") and not body.boolean("stream", False):
        raise invalid("stream_options", "is only allowed when `stream` is true")
    kwargs = body.object("chat_template_kwargs") or {}
    # Templates are all that can make a model say more or less.
    if (verbosity := text.choice("text.verbosity", ("low", "medium", "high"))) is not None:
        kwargs = {"verbosity": verbosity} | kwargs
    tools = _chat_tools(body)
    with in_words_of(NAMES):
        declared = Declared(tools)
    flat = declared.flat
    items, size = _read_items(body, state, owner)
    kinds = {ADDED_TOOLS} | ({FOUND} if any(map(is_client_search, body.raw("tools") or [])) else set())
    if found := found_tools(items, declared, _chat_tool, kinds):
        tools += found
        flat = Declared(tools).flat
    with_logprobs = LOGPROBS in _read_include(body)
    if body.raw("top_logprobs") and not with_logprobs:
        raise invalid("top_logprobs", f"needs {LOGPROBS!r} in `include`")
    messages = as_messages(items, body.string("instructions", None), flat)
    if not messages:
        raise invalid("input", "has no item that this model could read")
    updates, effort, form = _updates(items), reasoning.raw("reasoning.effort"), text.object("text.format")
    changes = {
        "messages": messages,
        "max_tokens": body.integer("max_output_tokens", None, 1),
        "logprobs": with_logprobs,
        "reasoning_effort": updates.get("effort") if effort is None else effort,
        "response_format": _chat_format(updates.get("format") if form is None else form),
        "tool_choice": _chat_choice(body),
        "tools": tools or None,
        "chat_template_kwargs": kwargs,
        **dict.fromkeys(("input", "text", "reasoning", "include", "stream_options", "max_output_tokens")),
    }
    return body.changed(changes, body.size + size), items


# ---- fields


def _read_store(body: Body, state: State) -> bool:
    enabled = state.responses.enabled
    if body.boolean("store", False) and not enabled:
        raise invalid("store", "is true, but this server keeps no responses (--response-store-size 0)")
    return body.boolean("store", True) and enabled


def _read_include(body: Body) -> list[str]:
    include = body.raw("include")
    if include is None:
        return []
    if not isinstance(include, list):
        raise invalid("include", "must be a list of strings")
    if len(include) > _MAX_INCLUDES:
        raise invalid("include", f"must have at most {_MAX_INCLUDES} strings")
    for index, name in enumerate(include):
        if not isinstance(name, str) or not name:
            raise invalid(f"include[{index}]", "must be a non-empty string")
        if name not in INCLUDES:
            # Of things that other servers' tools bring along.
            ignore("include", name)
    return include


def _read_fields(body: Body) -> Json:
    """What a Response repeats of its request, checked where nobody else looks at it."""
    text, reasoning = body.inner("text"), body.inner("reasoning")
    return {
        "instructions": body.string("instructions", None),
        "max_output_tokens": body.raw("max_output_tokens"),
        "max_tool_calls": body.integer("max_tool_calls", None, 1),
        "presence_penalty": body.raw("presence_penalty") or 0.0,
        "frequency_penalty": body.raw("frequency_penalty") or 0.0,
        "metadata": _read_metadata(body),
        "parallel_tool_calls": body.boolean("parallel_tool_calls", True),
        "previous_response_id": body.string("previous_response_id", None),
        "prompt_cache_key": body.string("prompt_cache_key", None),
        "reasoning": {"effort": reasoning.raw("reasoning.effort"), "summary": reasoning.raw("reasoning.summary")},
        "safety_identifier": body.string("safety_identifier", None),
        "service_tier": "default",
        "text": {
            "format": text.raw("text.format") or {"type": "text"},
            "verbosity": text.raw("text.verbosity") or "medium",
        },
        "tool_choice": body.raw("tool_choice") or "auto",
        "tools": [
            {"description": None, "parameters": None, "strict": None} | tool if tool.get("type") == "function" else tool
            for tool in body.raw("tools") or []
        ],
        "top_logprobs": body.raw("top_logprobs") or 0,
        "truncation": body.choice("truncation", ("auto", "disabled")) or "disabled",
        "user": body.string("user", None),
    }


def _read_metadata(body: Body) -> Json:
    metadata = body.object("metadata") or {}
    good = len(metadata) <= 16 and all(
        len(key) <= 64 and isinstance(value, str) and len(value) <= 512 for key, value in metadata.items()
    )
    if not good:
        raise invalid("metadata", "must have at most 16 strings of up to 512 characters, under keys of up to 64")
    return metadata


def _updates(items: list[Json]) -> Json:
    """The effort and the format of answers that the last items about them ask for."""
    found: Json = {}
    for item in items:
        if item["type"] == CONFIGURATION:
            reasoning, text = item.get("reasoning"), item.get("text")
            if isinstance(reasoning, dict) and reasoning.get("effort") in EFFORTS:
                found["effort"] = reasoning["effort"]
            if isinstance(text, dict) and isinstance(text.get("format"), dict):
                found["format"] = text["format"]
    return found


def _chat_format(given: Json | None) -> Json | None:
    """`text.format` as chat's `response_format`: what describes a schema stands beside its type here."""
    if given is None or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": given}


def _chat_tools(body: Body) -> list[Json]:
    """Tools as chat declares them, each in its place, so that errors name the client's own."""
    tools = body.raw("tools")
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise invalid("tools", "must be a list")
    # The answer repeats all of them, what nobody reads as well.
    check_nesting("tools", tools)
    return [_chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _chat_choice(body: Body) -> Any:
    """`tool_choice`, where a search that the client runs is the function that it has become."""
    choice, tools = body.raw("tool_choice"), body.raw("tools")
    if not any(map(is_client_search, tools or [])):
        return choice

    def named(value: Any) -> Any:
        asks = isinstance(value, dict) and value.get("type") == SEARCH
        return {"type": "function", "function": {"name": SEARCH}} if asks else value

    if isinstance(choice, dict) and choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        return {**choice, "tools": [named(tool) for tool in choice["tools"]]}
    return named(choice)


def _chat_tool(tool: Any, where: str) -> Json:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(kind, str) or not kind:
        raise invalid(where, "must be an object with a `type`")
    if kind == "namespace" and isinstance(tool.get("tools"), list) and ".tools" not in where:
        inner = [_chat_tool(one, f"{where}.tools[{index}]") for index, one in enumerate(tool["tools"])]
        return {**tool, "tools": inner}
    if is_client_search(tool):
        return {"type": "function", "function": as_function(tool)}
    names = {"function": ("name", "description", "parameters", "strict"), "custom": ("name", "description", "format")}
    if kind not in names:
        return dict(tool)
    return {"type": kind, kind: {key: tool[key] for key in names[kind] if tool.get(key) is not None}}


# ---- input


def _read_items(body: Body, state: State, owner: str) -> tuple[list[Json], int]:
    """The items of the earlier turns and of this one, each with an id; and the bytes of the former."""
    previous: list[Json] = []
    size = 0
    if (name := body.string("previous_response_id", None)) is not None:
        if not state.responses.enabled:
            raise invalid("previous_response_id", "needs a store; this server runs with --response-store-size 0")
        stored = state.responses.get(owner, name)
        if stored is None:
            raise ApiError(
                400,
                f"Previous response with id {name[:64]!r} not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        previous, size = stored.conversation(), stored.size
    given = body.raw("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise invalid("input", "must be a string or a list with at least one item")
    check_nesting("input", given)
    items = previous
    newest = newest_turn([turn_of(value) for value in given])
    for index, value in enumerate(given):
        where = f"input[{index}]"
        if not isinstance(value, dict):
            raise invalid(where, "must be an object")
        if _is_reference(value):
            item = _read_reference(value, where, state, owner)
        else:
            item = read_item(value, where, index == newest)
        if item is not None:
            items.append(item)
    return items, size


def _is_reference(value: Json) -> bool:
    # A reference may come without its type: it has nothing but an id then.
    return value.get("type") == "item_reference" or (value.get("type") is None and {"id"} == value.keys() - {"type"})


def _read_reference(value: Json, where: str, state: State, owner: str) -> Json | None:
    """The item that is meant; None for one that is not kept here."""
    name = value.get("id")
    if not isinstance(name, str):
        raise invalid(f"{where}.id", "must be a string")
    item = state.responses.get_item(owner, name)
    if item is None:
        ignore("input", "item_reference")
    return item


# ---- truncation


async def _truncated(
    chat: Body, items: list[Json], instructions: str | None, flat: Flat, state: State, whole: Plan
) -> Plan:
    """`truncation: auto`: leave out the oldest turns until the rest fits; system messages before them stay."""
    limits = state.engine.limits
    room = min(limits.max_model_len, limits.max_cached_tokens) - (chat.raw("max_tokens") or 1)
    first = next((i for i, item in enumerate(items) if item.get("role") not in ("system", "developer")), 0)
    starts = [i for i, item in enumerate(items) if i > first and item.get("role") == "user"]
    # Of the turns to begin with, the first that fits: the earlier, the longer.
    plan, low, high = whole, 0, len(starts)
    # Where nothing fits, the engine's own error says so.
    if len(whole.requests[0].prompt_token_ids) <= room:
        return whole
    while low < high:
        middle = (low + high) // 2
        messages = as_messages([*items[:first], *items[starts[middle] :]], instructions, flat)
        tried = await parse_chat(chat.changed({"messages": messages}), state, whole.id)
        if len(tried.requests[0].prompt_token_ids) <= room:
            plan, high = tried, middle
        else:
            low = middle + 1
    return plan
