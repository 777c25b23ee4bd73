"""POST /v1/responses: its body as a chat's, so that `parse_chat` reads what both have in common, and its input items.

Pure but for the store, which earlier turns come from. Loop thread.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from engine.request import RequestError
from server.protocol.body import Body, check_nesting, invalid
from server.protocol.chat import parse_chat
from server.protocol.errors import ApiError
from server.protocol.generation import Plan
from server.protocol.refusals import refuse
from server.state import State

Json = dict[str, Any]

LOGPROBS = "message.output_text.logprobs"
# Reasoning items bring their whole text along, so nothing has to be carried in secret.
INCLUDES = (LOGPROBS, "reasoning.encrypted_content")
ROLES = ("user", "assistant", "system", "developer")
_MAX_ID_LENGTH = 128
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
    "background": (False,),
    "background_options": ({},),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
    "access_programs": ({},),
    "image": ({},),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": ("in_memory",),
    "prompt_cache_options": ({}, {"mode": "implicit"}),
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
INNER_REFUSALS: dict[str, tuple[object, ...]] = {
    "reasoning.summary": ("auto",),
    "reasoning.generate_summary": ("auto",),
    "reasoning.mode": ("standard",),
    "reasoning.context": ("auto",),
    "stream_options.include_obfuscation": (False,),
}
# Chat's names in the sentences of its errors, and ours.
_RENAMES = (
    (re.compile(r"\b(?:response_format\.json_schema|response_format)\b"), "text.format"),
    (re.compile(r"\bmax_tokens\b"), "max_output_tokens"),
    (re.compile(r"\breasoning_effort\b"), "reasoning.effort"),
    (re.compile(r"\b(tools\[\d+\]|tool_choice)\.function\b"), r"\1"),
    (re.compile(r"^(?:messages|prompt)\b|(?<=`)messages\b"), "input"),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the answer tells of its request.

    fields: of the Response object. items: the whole input, earlier turns included. owner: whom the response is kept
    for, None where it is not kept.
    """

    fields: Json
    items: list[Json]
    owner: str | None


async def parse_response(body: Body, state: State, response_id: str, owner: str) -> tuple[Plan, Asked]:
    """Raises RequestError for anything that cannot be served, under this API's names of fields."""
    store = _read_store(body, state)
    chat, items = read_chat(body, state, owner)
    fields = _read_fields(body)
    with our_names():
        plan = await parse_chat(chat, state, response_id)
        if fields["truncation"] == "auto":
            plan = await _truncated(chat, items, fields["instructions"], state, plan)
    return plan, Asked(fields | {"store": store}, items, owner if store else None)


def read_chat(body: Body, state: State, owner: str) -> tuple[Body, list[Json]]:
    """The body that asks a chat for the same, and all input items. Everything beside them keeps its name and place."""
    for name, other in MOVED.items():
        if body.has(name):
            raise invalid(name, f"is no field of /v1/responses; it is called `{other}` here")
    refuse(body, REFUSALS)
    text, reasoning, options = (body.inner(name) for name in ("text", "reasoning", "stream_options"))
    for inner in (text, reasoning, options):
        refuse(inner, INNER_REFUSALS)
    if body.has("stream_options") and not body.boolean("stream", False):
        raise invalid("stream_options", "is only allowed when `stream` is true")
    kwargs = body.object("chat_template_kwargs") or {}
    # Templates are all that can make a model say more or less.
    if (verbosity := text.choice("text.verbosity", ("low", "medium", "high"))) is not None:
        kwargs = {"verbosity": verbosity} | kwargs
    items, size = _read_items(body, state, owner)
    with_logprobs = LOGPROBS in _read_include(body)
    if body.raw("top_logprobs") and not with_logprobs:
        raise invalid("top_logprobs", f"needs {LOGPROBS!r} in `include`")
    tools = _chat_tools(body)
    # Clients send the default with nothing to choose from.
    choice = None if not tools and body.raw("tool_choice") == "auto" else body.raw("tool_choice")
    changes = {
        "messages": _messages(items, body.string("instructions", None)),
        "max_tokens": body.integer("max_output_tokens", None, 1),
        "logprobs": with_logprobs,
        "reasoning_effort": reasoning.raw("reasoning.effort"),
        "response_format": _chat_format(text),
        "tools": tools or None,
        "tool_choice": choice,
        "chat_template_kwargs": kwargs,
        **dict.fromkeys(("input", "text", "reasoning", "include", "stream_options", "max_output_tokens")),
    }
    return body.changed(changes, body.size + size), items


@contextlib.contextmanager
def our_names() -> Iterator[None]:
    """Errors of a chat leave this block under this API's names of fields."""
    try:
        yield
    except RequestError as error:
        message, param = str(error), error.param or ""
        for pattern, name in _RENAMES:
            message, param = pattern.sub(name, message), pattern.sub(name, param)
        raise ApiError(error.status, message, param=param or None, code=error.code) from None


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
    for index, name in enumerate(include):
        if name not in INCLUDES:
            raise invalid(f"include[{index}]", f"must be one of {', '.join(INCLUDES)}")
    return include


def _read_fields(body: Body) -> Json:
    """What a Response repeats of its request, checked where nobody else looks at it."""
    text, reasoning = body.inner("text"), body.inner("reasoning")
    return {
        "instructions": body.string("instructions", None),
        "max_output_tokens": body.raw("max_output_tokens"),
        "max_tool_calls": body.integer("max_tool_calls", None, 1),
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
        "tools": [{"parameters": None, "strict": None} | tool for tool in body.raw("tools") or []],
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


def _chat_format(text: Body) -> Json | None:
    """`text.format` as chat's `response_format`: what describes a schema stands beside its type here."""
    given = text.object("text.format")
    if given is None or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": given}


def _chat_tools(body: Body) -> list[Json]:
    """Functions as chat declares them; the tools that OpenAI runs itself are refused by name."""
    tools = body.raw("tools")
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise invalid("tools", "must be a list")
    found: list[Json] = []
    for index, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(kind, str):
            raise invalid(f"tools[{index}]", "must be an object with a `type`")
        if kind != "function":
            raise RequestError(
                f"`tools[{index}]` is of type {kind[:40]!r}; this server has no such tool, only functions.",
                param=f"tools[{index}].type",
            )
        names = ("name", "description", "parameters", "strict")
        found.append({"type": "function", "function": {key: tool[key] for key in names if tool.get(key) is not None}})
    return found


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
    calls = {item["call_id"] for item in previous if item["type"] == "function_call"}
    for index, value in enumerate(given):
        where = f"input[{index}]"
        if not isinstance(value, dict):
            raise invalid(where, "must be an object")
        item = _read_reference(value, where, state, owner) if _is_reference(value) else _read_item(value, where)
        if item["type"] == "function_call":
            calls.add(item["call_id"])
        elif item["type"] == "function_call_output" and item["call_id"] not in calls:
            raise invalid(f"{where}.call_id", "names no function call that came before it")
        items.append(item)
    return items, size


def _is_reference(value: Json) -> bool:
    # A reference may come without its type: it has nothing but an id then.
    return value.get("type") == "item_reference" or (value.get("type") is None and {"id"} == value.keys() - {"type"})


def _read_reference(value: Json, where: str, state: State, owner: str) -> Json:
    name = _string(value, "id", where)
    item = state.responses.get_item(owner, name)
    if item is None:
        raise invalid(f"{where}.id", f"names the item {name[:64]!r}, which is not stored here")
    return item


def _read_item(value: Json, where: str) -> Json:
    """An item in the shape that it is stored and told in."""
    kind = "message" if value.get("type") is None else value["type"]
    read = _READERS.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise invalid(f"{where}.type", f"must be one of {', '.join(_READERS)}, item_reference")
    prefix, fields = read[0], read[1](value, where)
    return {"type": kind, "id": _id(value, where, prefix), **fields}


def _read_message(value: Json, where: str) -> Json:
    role = value.get("role")
    if role not in ROLES:
        raise invalid(f"{where}.role", f"must be one of {', '.join(ROLES)}")
    content = _read_parts(value.get("content"), f"{where}.content", role == "assistant")
    return {"role": role, "status": "completed", "content": content}


def _read_call(value: Json, where: str) -> Json:
    names = ("call_id", "name", "arguments")
    return {"status": "completed", **{name: _string(value, name, where) for name in names}}


def _read_output(value: Json, where: str) -> Json:
    output = value.get("output")
    if not isinstance(output, str):
        output = _read_parts(output, f"{where}.output", False)
    return {"status": "completed", "call_id": _string(value, "call_id", where), "output": output}


def _read_reasoning(value: Json, where: str) -> Json:
    summary = _read_texts(value.get("summary"), f"{where}.summary", "summary_text")
    content = _read_texts(value.get("content"), f"{where}.content", "reasoning_text")
    if not summary and not content and value.get("encrypted_content") is not None:
        raise invalid(f"{where}.encrypted_content", "was not made by this server, which cannot read it")
    return {"summary": summary, "content": content}


# By type: what an id begins with, and the reader of the fields.
_READERS: dict[str, tuple[str, Callable[[Json, str], Json]]] = {
    "message": ("msg", _read_message),
    "function_call": ("fc", _read_call),
    "function_call_output": ("fco", _read_output),
    "reasoning": ("rs", _read_reasoning),
}


def _id(value: Json, where: str, prefix: str) -> str:
    """The item's own id, or a new one."""
    own = value.get("id")
    if own is None:
        return f"{prefix}_{uuid.uuid4().hex}"
    if not isinstance(own, str) or not 0 < len(own) <= _MAX_ID_LENGTH:
        raise invalid(f"{where}.id", f"must be a string of 1 to {_MAX_ID_LENGTH} characters")
    return own


def _string(value: Json, name: str, where: str) -> str:
    found = value.get(name)
    if not isinstance(found, str):
        raise invalid(f"{where}.{name}", "must be a string")
    return found


def _read_parts(content: Any, where: str, of_assistant: bool) -> list[Json]:
    """The text of a message or of a function's output."""
    if isinstance(content, str):
        content = [{"type": "input_text", "text": content}]
    if not isinstance(content, list):
        raise invalid(where, "must be a string or a list of parts")
    parts: list[Json] = []
    for index, part in enumerate(content):
        here = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text", "refusal"):
            what = f"is of type {kind[:40]!r}; this model reads text only" if isinstance(kind, str) else "has no `type`"
            raise invalid(here, what)
        text = _string(part, "refusal" if kind == "refusal" else "text", here)
        if of_assistant:
            parts.append({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
        else:
            parts.append({"type": "input_text", "text": text})
    return parts


def _read_texts(parts: Any, where: str, kind: str) -> list[Json]:
    """The parts of a reasoning item."""
    if parts is None:
        return []
    good = isinstance(parts, list) and all(
        isinstance(part, dict) and part.get("type") == kind and isinstance(part.get("text"), str) for part in parts
    )
    if not good:
        raise invalid(where, f"must be a list of parts of type `{kind}` with a `text`")
    return [{"type": kind, "text": part["text"]} for part in parts]


# ---- items as messages


def _messages(items: Collection[Json], instructions: str | None) -> list[Json]:
    """A chat's messages. Reasoning, text and calls of one turn of the assistant are one message, in that order."""
    messages: list[Json] = [] if instructions is None else [{"role": "system", "content": instructions}]
    names = {item["call_id"]: item["name"] for item in items if item["type"] == "function_call"}
    for item in items:
        kind, call_id = item["type"], item.get("call_id")
        if kind == "function_call_output":
            # Truncation may have left its call out.
            if call_id in names:
                content = _text(item["output"])
                messages.append({"role": "tool", "tool_call_id": call_id, "name": names[call_id], "content": content})
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            calls = _turn(messages, kind).setdefault("tool_calls", [])
            calls.append({"id": call_id, "type": "function", "function": function})
        elif kind == "reasoning":
            turn = _turn(messages, kind)
            thought = turn.get("reasoning", "") + _text(item["content"] or item["summary"])
            turn.update(reasoning=thought, reasoning_content=thought)
        elif item["role"] == "assistant":
            _turn(messages, kind)["content"] = _text(item["content"])
        elif item["role"] == "user":
            messages.append({"role": "user", "content": _text(item["content"])})
        elif [message["role"] for message in messages] == ["system"]:
            # Many templates read one such message, the first.
            messages[0]["content"] += "\n\n" + _text(item["content"])
        else:
            messages.append({"role": "system", "content": _text(item["content"])})
    return messages


def _turn(messages: list[Json], kind: str) -> Json:
    """The assistant's last message where an item of this kind can still stand in it, else a new one."""
    last = messages[-1] if messages else {"role": "none"}
    full = bool(last.get("content") or last.get("tool_calls"))
    if last["role"] != "assistant" or (full and kind != "function_call"):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(content: str | list[Json]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


# ---- truncation


async def _truncated(chat: Body, items: list[Json], instructions: str | None, state: State, whole: Plan) -> Plan:
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
        messages = _messages([*items[:first], *items[starts[middle] :]], instructions)
        tried = await parse_chat(chat.changed({"messages": messages}), state, whole.id)
        if len(tried.requests[0].prompt_token_ids) <= room:
            plan, high = tried, middle
        else:
            low = middle + 1
    return plan
