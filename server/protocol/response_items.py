"""The input items of /v1/responses: read into the shape that they are stored and told in, and as a chat's messages.

An item of a kind that is not known here is kept as it came. As messages, calls and their outputs of any kind are calls
and results; text of the others is shown; the rest is left out. Pure.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from typing import Any

import orjson

from server.custom_calls import INPUT
from server.protocol.body import invalid
from server.protocol.history import Turn, of_result, read_part, read_parts, texts_in
from server.protocol.ignored import clean, ignore
from server.protocol.sealed import unseal

Json = dict[str, Any]
# The flat name of a function by its namespace, None without one, and its own name.
Flat = Callable[[str | None, str], str]

# Items that say nothing to the model: tools that a developer adds, and settings for the answers from there on.
ADDED_TOOLS, CONFIGURATION = "additional_tools", "configuration_update"
ROLES = ("user", "assistant", "system", "developer")
_MAX_ID_LENGTH = 128
# Where a call of a kind that is not known here has its arguments.
_ARGUMENTS = ("arguments", INPUT, "action", "operation", "actions")
# What comes of calls that clients run; a result may be sent without the id of its call.
_OUTPUTS_OF_CALLS = ("function_call_output", "custom_tool_call_output")
# What items of kinds that are not known here may say in words.
_TEXTS = ("content", "summary", "text", "code", "outputs", "results")
_OUTPUTS = ("output", "tools", "content", "result")


def turn_of(item: Any) -> Turn:
    """What an item, of the client's or of ours, is to the turns of a conversation."""
    kind = item.get("type") if isinstance(item, dict) else None
    if isinstance(kind, str) and kind != "message":
        if kind.endswith("_output"):
            return "result"
        return "assistant" if kind.endswith("_call") or kind == "reasoning" else "other"
    role = item.get("role") if isinstance(item, dict) else None
    return "user" if role == "user" else "assistant" if role == "assistant" else "other"


def read_item(value: Json, where: str, newest: bool) -> Json:
    """An item in the shape that it is stored and told in. newest: it is the user's newest turn."""
    kind = "message" if value.get("type") is None else value["type"]
    if not isinstance(kind, str) or not kind:
        raise invalid(f"{where}.type", "must be a non-empty string")
    if kind == "message":
        prefix, fields = "msg", _read_message(value, where, newest)
    elif kind in _READERS:
        prefix, read = _READERS[kind]
        fields = read(value, where)
    else:
        prefix, fields = "item", value
    return {**fields, "type": kind, "id": _id(value, where, prefix)}


def as_messages(items: Collection[Json], instructions: str | None, flat: Flat) -> list[Json]:
    """A chat's messages. Reasoning, text and calls of one turn of the assistant are one message, in that order."""
    messages: list[Json] = [] if instructions is None else [{"role": "system", "content": instructions}]
    names: dict[str, str] = {}
    calls: dict[str, str] = {}
    # Calls whose results have not come yet, in their order: all, and by the names of functions.
    waiting: dict[str, None] = {}
    of_name: dict[str, dict[str, None]] = {}
    for item in items:
        kind = item["type"]
        if kind == "message":
            _say(messages, item)
        elif kind == "reasoning":
            turn = _turn(messages, kind)
            thought = turn.get("reasoning", "") + _text(item["content"] or item["summary"])
            turn.update(reasoning=thought, reasoning_content=thought)
        elif (call := _as_call(item, flat)) is not None:
            of_name.get(names.get(call["id"], ""), {}).pop(call["id"], None)
            names[call["id"]] = call["function"]["name"]
            # Results of a local shell name the item.
            calls[item["id"]] = call["id"]
            if kind != "mcp_call":
                waiting[call["id"]] = of_name.setdefault(call["function"]["name"], {})[call["id"]] = None
            _turn(messages, "call").setdefault("tool_calls", []).append(call)
            if kind == "mcp_call":
                # Another server ran it, and its result is in the same item.
                _add_result(messages, names, call["id"], _as_text(item.get("output") or item.get("error")), kind)
        elif (found := _output_id(item)) is not None:
            call_id = found if found in names else calls.get(found, found)
            if item.get("call_id") is None and call_id not in names and kind in _OUTPUTS_OF_CALLS:
                # One that does not say whose it is names its function, or comes in the order of the calls.
                name = item.get("name")
                call_id = next(iter((of_name.get(name) if isinstance(name, str) else None) or waiting), call_id)
            waiting.pop(call_id, None)
            of_name.get(names.get(call_id, ""), {}).pop(call_id, None)
            _add_result(messages, names, call_id, _output_text(item), kind)
        elif kind in (ADDED_TOOLS, CONFIGURATION):
            # What they say is read apart.
            continue
        elif (summary := unseal(item)) is not None:
            messages.append({"role": "user", "content": f"[summary of the conversation until here]\n{summary}"})
        elif said := texts_in([item.get(name) for name in _TEXTS]):
            ignore("input", kind)
            messages.append({"role": "user", "content": "\n".join([f"[{clean(kind)}]", *said])})
        else:
            ignore("input", kind)
    return messages


def _say(messages: list[Json], item: Json) -> None:
    """A message of any role."""
    text, role = _text(item["content"]), item["role"]
    if role == "assistant":
        _turn(messages, "message")["content"] = text
    else:
        messages.append({"role": "user" if role == "user" else "system", "content": text})


def _add_result(messages: list[Json], names: dict[str, str], call_id: str, text: str, kind: str) -> None:
    """What came of a call. Templates look for the call of a result: where there is none, the user tells of it."""
    if call_id in names:
        messages.append({"role": "tool", "tool_call_id": call_id, "name": names[call_id], "content": text})
    elif text:
        messages.append({"role": "user", "content": f"[{clean(kind)}]\n{text}"})


# ---- reading


def _read_message(value: Json, where: str, newest: bool) -> Json:
    role = value.get("role")
    if role not in ROLES:
        raise invalid(f"{where}.role", f"must be one of {', '.join(ROLES)}")
    # A turn may have been cut before it said anything.
    content = [] if value.get("content") is None else value["content"]
    parts = _read_content(content, f"{where}.content", role == "assistant", newest)
    return {"role": role, "status": "completed", "content": parts}


def _read_content(content: Any, where: str, of_assistant: bool, newest: bool) -> list[Json]:
    """The text of a message or of a function's output."""
    if isinstance(content, str):
        texts = [content]
    elif isinstance(content, list):
        texts = read_parts(content, where, newest=newest)
    else:
        raise invalid(where, "must be a string or a list of parts")
    if of_assistant:
        return [{"type": "output_text", "text": text, "annotations": [], "logprobs": []} for text in texts]
    return [{"type": "input_text", "text": text} for text in texts]


def _read_call(value: Json, where: str) -> Json:
    arguments = value.get("arguments")
    if isinstance(arguments, dict):
        arguments = orjson.dumps(arguments).decode()
    if not isinstance(arguments, str | None):
        raise invalid(f"{where}.arguments", "must be a string")
    return {**_named(value, where), "arguments": arguments or ""}


def _read_custom_call(value: Json, where: str) -> Json:
    if not isinstance(value.get(INPUT), str | None):
        raise invalid(f"{where}.input", "must be a string")
    return {**_named(value, where), INPUT: value.get(INPUT) or ""}


def _named(value: Json, where: str) -> Json:
    """What calls of functions and of custom tools have in common."""
    if value.get("call_id") is None and isinstance(value.get("id"), str):
        # Some send back an item's own id alone.
        value = {**value, "call_id": value["id"]}
    named = {"status": "completed", **{name: _string(value, name, where) for name in ("call_id", "name")}}
    return named | ({"namespace": _string(value, "namespace", where)} if value.get("namespace") else {})


def _read_output(value: Json, where: str) -> Json:
    output = of_result(value.get("output")) or ""
    if isinstance(output, list):
        output = _read_content(output, f"{where}.output", False, False)
    call_id = None if value.get("call_id") is None else _string(value, "call_id", where)
    name = {"name": value["name"]} if isinstance(value.get("name"), str) else {}
    return {"status": "completed", "call_id": call_id, "output": output, **name}


def _read_reasoning(value: Json, where: str) -> Json:
    parts = {
        name: _read_texts(value.get(name), f"{where}.{name}", kind)
        for name, kind in (("summary", "summary_text"), ("content", "reasoning_text"))
    }
    if value.get("encrypted_content") is not None and not any(parts.values()):
        # Another server's secret.
        ignore("input", "reasoning.encrypted_content")
    return parts


def _read_texts(parts: Any, where: str, kind: str) -> list[Json]:
    """The parts of a reasoning item."""
    if parts is None:
        return []
    if isinstance(parts, str):
        return [{"type": kind, "text": parts}]
    if not isinstance(parts, list):
        raise invalid(where, f"must be a list of parts of type `{kind}` with a `text`")
    return [{"type": kind, "text": text} for text in read_parts(parts, where)]


# By type: what an id begins with, and the reader of the fields.
_READERS: dict[str, tuple[str, Callable[[Json, str], Json]]] = {
    "function_call": ("fc", _read_call),
    "function_call_output": ("fco", _read_output),
    "custom_tool_call": ("ctc", _read_custom_call),
    "custom_tool_call_output": ("ctco", _read_output),
    "reasoning": ("rs", _read_reasoning),
}


def _id(value: Json, where: str, prefix: str) -> str:
    """The item's own id, or a new one."""
    own = value.get("id")
    if own is None or own == "":
        return f"{prefix}_{uuid.uuid4().hex}"
    if not isinstance(own, str) or len(own) > _MAX_ID_LENGTH:
        raise invalid(f"{where}.id", f"must be a string of 1 to {_MAX_ID_LENGTH} characters")
    return own


def _string(value: Json, name: str, where: str) -> str:
    found = value.get(name)
    if not isinstance(found, str):
        raise invalid(f"{where}.{name}", "must be a string")
    return found


# ---- items as messages


def _turn(messages: list[Json], kind: str) -> Json:
    """The assistant's last message where an item of this kind can still stand in it, else a new one."""
    last = messages[-1] if messages else {"role": "none"}
    full = bool(last.get("content") or last.get("tool_calls"))
    if last["role"] != "assistant" or (full and kind != "call"):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _as_call(item: Json, flat: Flat) -> Json | None:
    """A call of any kind as a chat's; None for what is none, or was made by the server that answered."""
    kind = item["type"]
    call_id = item.get("call_id")
    if call_id is None and kind in ("local_shell_call", "mcp_call"):
        call_id = item["id"]
    if not kind.endswith("_call") or not isinstance(call_id, str):
        return None
    name, namespace = item.get("name"), item.get("namespace")
    name = name if isinstance(name, str) and name else clean(kind.removesuffix("_call"))
    found = next((key for key in _ARGUMENTS if item.get(key) is not None), None)
    arguments = {} if found is None else item[found]
    if found == INPUT or not isinstance(arguments, str | dict):
        arguments = {found: arguments}
    flat_name = flat(namespace if isinstance(namespace, str) else None, name)
    return {"id": call_id, "type": "function", "function": {"name": flat_name, "arguments": arguments}}


def _output_id(item: Json) -> str | None:
    """Whose output an item is."""
    call_id = item["id"] if item.get("call_id") is None else item["call_id"]
    return call_id if item["type"].endswith("_output") and isinstance(call_id, str) else None


def _output_text(item: Json) -> str:
    return next((_as_text(item[name]) for name in _OUTPUTS if item.get(name) is not None), "")


def _as_text(output: Any) -> str:
    """What the output of a call says, whatever its form."""
    if isinstance(output, list):
        return "\n".join(filter(None, map(_as_text, output)))
    if not isinstance(output, dict):
        return output if isinstance(output, str) else ""
    kind = output.get("type")
    if isinstance(kind, str) and kind and kind not in ("function", "namespace", "custom"):
        part = output if isinstance(output.get("text"), str | None) else {"type": kind}
        return read_part(part, "input") or ""
    said = texts_in(output)
    name = output.get("name")
    # The tools that a search has found.
    return "\n".join(said if said or not isinstance(name, str) else [f"[{kind or 'tool'}: {name}]"])


def _text(content: str | list[Json]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
