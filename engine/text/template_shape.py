"""TemplateShape: what a chat template wants messages and tools to look like, and how they are given in that shape.

template_probe.py finds the answers once, at load; `fit` applies them to every conversation. Nothing of a message is
changed that the template takes as it is: two messages become one only where the template would refuse the second or
leave it out. Pure; a caller's messages are never written to.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, Any]

# What stands between two texts that become one.
BETWEEN = "\n\n"
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# The key of arguments that are no JSON object, where a template reads objects alone; /v1/messages answers so, too.
INVALID_JSON = "INVALID_JSON"
# Of arguments that come as text; deeper ones stay text.
_MAX_DEPTH = 64
_ALPHANUMERIC = string.digits + string.ascii_letters
_NINE = re.compile(r"[a-zA-Z0-9]{9}")


@dataclass(frozen=True, slots=True)
class TemplateShape:
    """Answers about one template. The defaults change least: they hold for a template that answers nothing.

    needs_system: a conversation has to begin with a system message; one without gets an empty one.

    parts: the roles whose content may be a list of {"type": "text"} parts. needs_parts: those that cannot read a
    string. omits_tools: without tools the variable must be undefined, not none.

    system: the role is read at all; without it its text goes before the first user's. systems_in_row: two at the
    start; else they are joined. system_by_last_user: it shows only where a user turn ends the conversation; else it
    is put where it would stand then, before the last user's text. system_in_middle: a later one is read; else it
    becomes part of the user turn beside it. developer: the role has a meaning of its own, at the start; else it is
    system's. users_in_row, assistants_in_row: two turns of one role; else they are joined. assistant_first: a
    conversation may begin so, and no_user: do without a user; else an empty user turn is put before.

    calls: tool calls are read as such, or have to be part of the text. flat_calls: the name and arguments are read
    beside the id, not in `function`. arguments: read as an object or as JSON text. loose_arguments: what is no
    object is printed, not an error. call_ids: any, nine alphanumerics (Mistral), or functions.NAME:INDEX (Kimi).
    call_content, empty_content: what stands for no text beside calls, and without any. text_with_calls: text beside
    calls is kept, has to be a turn of its own before them, or is left out: a template that takes no such turn has no
    other place for it, and calls matter more. reasoning_with_calls: reasoning beside text and calls is kept, joined
    with the text, or has no place. parallel_calls: several calls in a turn; else each has a turn, with its result
    behind it.
    reasoning_parts: reasoning is read as a part of the content of type thinking, not as a field. needs_reasoning: an
    answer without the field is refused; one that has none gets an empty one.
    tool_role: results are read. lone_results: one without its call. user_after_tool: a user turn may follow a result;
    else it is part of it.

    calls_first: no other turn may stand between calls and their results; else it is put behind them.

    tools: read as {"type", "function"}, flat, from the system message as JSON text (Phi-4-mini), or not at all. Where
    the template writes calls all the same, declarations are words of the system message.
    tool_fields: declarations as given, or with every description, parameters and type filled in.
    reasoning_open, reasoning_close: what the template writes before and behind a reasoning, white space included;
    empty where it shows none.
    """

    parts: frozenset[str] = frozenset()
    needs_parts: frozenset[str] = frozenset()
    omits_tools: bool = False
    system: bool = True
    needs_system: bool = False
    systems_in_row: bool = True
    system_by_last_user: bool = False
    system_in_middle: bool = True
    developer: bool = False
    users_in_row: bool = True
    assistants_in_row: bool = True
    assistant_first: bool = True
    no_user: bool = True
    calls: Literal["structured", "text"] = "structured"
    flat_calls: bool = False
    arguments: Literal["object", "text"] = "object"
    loose_arguments: bool = True
    call_ids: Literal["any", "nine", "named"] = "any"
    call_content: Literal["absent", "null", "empty"] = "empty"
    empty_content: Literal["empty", "absent", "null", "space", "dropped"] = "empty"
    text_with_calls: Literal["kept", "split", "dropped"] = "kept"
    reasoning_with_calls: Literal["kept", "joined", "dropped"] = "kept"
    reasoning_parts: bool = False
    needs_reasoning: bool = False
    parallel_calls: bool = True
    tool_role: bool = True
    lone_results: bool = True
    user_after_tool: bool = True
    calls_first: bool = False
    tools: Literal["nested", "flat", "system", "words", "lost"] = "nested"
    tool_fields: Literal["given", "filled"] = "given"
    reasoning_open: str = ""
    reasoning_close: str = ""


def fit(
    messages: Sequence[Message], tools: list[Any] | None, shape: TemplateShape, *, keep_last: bool = False
) -> tuple[list[Message], list[Any] | None]:
    """Messages and tools in a template's shape, as copies.

    keep_last: the last message is to be continued, so it stays the last, with a content of its own.
    """
    chat = [_normal(message, shape.developer and not index) for index, message in enumerate(messages)]
    given = chat[-1].get("content") if keep_last else None
    if tools and shape.tools == "words":
        if not _is_system(chat[0]):
            chat.insert(0, {"role": "system", "content": ""})
        chat[0]["content"] = _joined(chat[0].get("content"), _in_words(tools))
    if shape.calls_first:
        chat = _results_first(chat)
    chat, lone = _paired(chat, shape)
    chat = _in_turns(chat, lone, shape, keep_last)
    chat = list(_split(chat, shape, keep_last))
    for index, message in enumerate(chat):
        _dress(message, shape, isinstance(given, str) and index == len(chat) - 1)
    if tools is not None:
        tools = [_declaration(tool, shape) for tool in tools]
        if tools and shape.tools == "system":
            if chat[0].get("role") != "system":
                chat.insert(0, {"role": "system", "content": ""})
            chat[0]["tools"] = json.dumps(tools, ensure_ascii=False)
    return chat, tools


def text_of(content: Any, between: str = "\n") -> str:
    """The text of a content that is none, a string, or a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, list | tuple):
        return ""
    texts = (part.get("text") if isinstance(part, dict) else part for part in content)
    return between.join(text for text in texts if isinstance(text, str))


def plain(value: Any) -> Any:
    """A copy made of JSON's types alone, so that a template finds no method on anything."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _normal(message: Message, developer: bool) -> Message:
    """Without nulls, which templates print as "None", and with the reasoning under every name that templates read.

    developer: the role may stay, which it may where the template knows it, at the start.
    """
    chat: Message = {key: plain(value) for key, value in message.items() if value is not None}
    if chat.get("role") == "developer" and not developer:
        chat["role"] = "system"
    if not isinstance(chat.get("tool_calls"), list) or not chat["tool_calls"]:
        # Templates ask whether there are any by whether the key is there.
        chat.pop("tool_calls", None)
    reasoning = next((chat[name] for name in REASONING_FIELDS if name in chat), None)
    if reasoning is not None:
        _set_reasoning(chat, reasoning)
    return chat


def _set_reasoning(message: Message, reasoning: Any) -> None:
    for name in REASONING_FIELDS:
        if reasoning is None:
            message.pop(name, None)
        else:
            message[name] = reasoning


# ---- calls and their results


def _paired(chat: list[Message], shape: TemplateShape) -> tuple[list[Message], set[int]]:
    """Calls with ids, and results with the id and the name of their call; and which results have none."""
    lone: set[int] = set()
    # By id as the client wrote it: the name and the id that the template gets.
    known: dict[str, tuple[str, str]] = {}
    waiting: list[str] = []
    number = 0
    for index, message in enumerate(chat):
        if "tool_calls" in message:
            calls = [_call(call) for call in message["tool_calls"]]
            for call in calls:
                name = str(call["function"].get("name", ""))
                own = call["id"] if isinstance(call.get("id"), str) and call["id"] else f"call{number:05d}"
                call["id"] = _id(own, name, number, shape)
                known[own] = (name, call["id"])
                waiting.append(own)
                number += 1
            message["tool_calls"] = calls
            if shape.calls == "text":
                del message["tool_calls"]
                written = "\n".join(_as_text(call) for call in calls)
                message["content"] = _joined(message.get("content"), written)
        elif message.get("role") == "tool":
            own = message.get("tool_call_id")
            if not own and waiting:
                # Results that do not say whose they are name their tool, or come in the order of the calls.
                own = next((one for one in waiting if known[one][0] == message.get("name")), waiting[0])
            if not isinstance(own, str) or own not in known:
                lone.add(index)
                if isinstance(own, str):
                    message["tool_call_id"] = _id(own, str(message.get("name", "")), number, shape)
                continue
            if own in waiting:
                waiting.remove(own)
            name, message["tool_call_id"] = known[own]
            message.setdefault("name", name)
    return chat, lone


def _call(call: Any) -> Message:
    """A call with its `function`, whatever it came as."""
    call = dict(call) if isinstance(call, dict) else {}
    function = call.get("function")
    if not isinstance(function, dict):
        function = {name: call.pop(name) for name in ("name", "arguments") if name in call}
    return {**call, "type": call.get("type") or "function", "function": dict(function)}


def _id(own: str, name: str, number: int, shape: TemplateShape) -> str:
    if shape.call_ids == "nine":
        return own if _NINE.fullmatch(own) else _nine(own)
    if shape.call_ids == "named":
        return own if re.fullmatch(rf"functions\.{re.escape(name)}:\d+", own) else f"functions.{name}:{number}"
    return own


def _nine(own: str) -> str:
    """Nine alphanumerics that stand for an id: the same ones in the call, its result and every later turn."""
    number = int.from_bytes(hashlib.sha256(own.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    digits = []
    for _ in range(9):
        number, digit = divmod(number, len(_ALPHANUMERIC))
        digits.append(_ALPHANUMERIC[digit])
    return "".join(digits)


def _as_text(call: Message) -> str:
    """A call for a template that knows none: what most models were shown when their template had no words for it."""
    function = call["function"]
    arguments = _arguments(function.get("arguments"), "object", True)
    return json.dumps({"name": function.get("name", ""), "arguments": arguments}, ensure_ascii=False)


def _arguments(value: Any, want: str, loose: bool) -> Any:
    """The arguments of a call as an object or as text. Text that the client sent stays as the model wrote it."""
    if value is None or (isinstance(value, str) and not value.strip()):
        value = {}
    if want == "text":
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return value
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
            if "\\u" in value:
                # Half of a pair of surrogates is no character that a prompt could have.
                json.dumps(parsed, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict) and _is_flat(parsed):
            return parsed
    # What the model garbled stays as it is where the template can print it.
    return value if loose else {INVALID_JSON: value}


def _is_flat(value: Any) -> bool:
    """Whether a value is nested no deeper than what walks it may follow."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            children: Iterable[Any] = item.values() if isinstance(item, dict) else item
            inner.extend(child for child in children if isinstance(child, dict | list))
        if not inner:
            return True
        level = inner
    return False


# ---- turns


def _joined(one: Any, other: Any) -> Any:
    """Two contents as one."""
    texts = [text for text in (text_of(one), text_of(other)) if text]
    return BETWEEN.join(texts)


def _in_turns(chat: list[Message], lone: set[int], shape: TemplateShape, keep_last: bool) -> list[Message]:
    """The conversation in the order of roles that the template takes.

    A system message that the template would refuse in the middle is folded into the user turn beside it, as text: the
    one before it, else the one that follows. To hoist it into the first message would change the start of the prompt,
    and with it all that the prefix cache knows of the conversation.
    """
    num_leading = next((index for index, message in enumerate(chat) if not _is_system(message)), len(chat))
    leading, out = chat[:num_leading], list[Message]()
    # Texts on their way to the next user turn.
    waiting: list[str] = []
    if not shape.system:
        waiting = [text for message in leading if (text := text_of(message.get("content")))]
        leading = []
    elif len(leading) > 1 and not shape.systems_in_row:
        whole = BETWEEN.join(text for message in leading if (text := text_of(message.get("content"))))
        leading = [{**leading[0], "content": whole}]

    def add_user(message: Message) -> None:
        last = out[-1] if out else {}
        if last.get("tool_calls") and not shape.user_after_tool:
            # Of calls that were never answered, what the user said is the answer.
            last = {"role": "tool", "tool_call_id": last["tool_calls"][-1]["id"], "content": ""}
            out.append(last)
        if (last.get("role") == "user" and not shape.users_in_row) or (
            last.get("role") == "tool" and not shape.user_after_tool
        ):
            last["content"] = _joined(last.get("content"), message.get("content"))
        else:
            out.append(message)

    def flush() -> None:
        if waiting:
            add_user({"role": "user", "content": BETWEEN.join(waiting)})
            waiting.clear()

    for index, message in enumerate(chat[num_leading:], num_leading):
        role = message.get("role")
        folds = (_is_system(message) and not shape.system_in_middle) or (
            role == "tool" and (not shape.tool_role or (index in lone and not shape.lone_results))
        )
        if folds:
            text = text_of(message.get("content"))
            if text and out and out[-1].get("role") == "user":
                out[-1]["content"] = _joined(out[-1].get("content"), text)
            elif text:
                waiting.append(text)
        elif role == "user":
            if waiting:
                message["content"] = _joined(BETWEEN.join(waiting), message.get("content"))
                waiting.clear()
            add_user(message)
        elif role == "tool":
            # What waits stays behind the results of a call.
            out.append(message)
        else:
            flush()
            is_last = keep_last and index == len(chat) - 1
            if role == "assistant" and shape.empty_content == "dropped" and not is_last and _is_empty(message):
                continue
            if role == "assistant" and out and out[-1].get("role") == "assistant" and not shape.assistants_in_row:
                _join_assistants(out[-1], message)
            else:
                out.append(message)
    flush()
    first = out[0].get("role") if out else None
    lacks_user = not shape.no_user and all(message.get("role") != "user" for message in out)
    if (first in ("assistant", "tool") and not shape.assistant_first) or lacks_user or not (leading or out):
        out.insert(0, {"role": "user", "content": ""})
    if shape.needs_system and not leading:
        leading = [{"role": "system", "content": ""}]
    if leading and shape.system_by_last_user and out and out[-1].get("role") != "user":
        asked = next((message for message in reversed(out) if message.get("role") == "user"), None)
        if asked is not None:
            asked["content"] = _joined(leading[0].get("content"), asked.get("content"))
            leading = []
    return leading + out


def _results_first(chat: list[Message]) -> list[Message]:
    """The conversation with every turn that stands between calls and their results behind the results."""
    out: list[Message] = []
    apart: list[Message] = []
    for index, message in enumerate(chat):
        role = message.get("role")
        if role == "tool" or (role != "assistant" and _awaits_result(out) and _has_result(chat[index:])):
            (out if role == "tool" else apart).append(message)
            continue
        out += apart
        apart = []
        out.append(message)
    return out + apart


def _awaits_result(chat: list[Message]) -> bool:
    """Whether calls, or some of their results, end the conversation so far."""
    return bool(chat) and (bool(chat[-1].get("tool_calls")) or chat[-1].get("role") == "tool")


def _has_result(chat: list[Message]) -> bool:
    """Whether a result comes before the assistant's next turn."""
    roles = (message.get("role") for message in chat)
    return next((role for role in roles if role in ("assistant", "tool")), None) == "tool"


def _is_system(message: Message) -> bool:
    return message.get("role") in ("system", "developer")


def _is_empty(message: Message) -> bool:
    return not message.get("tool_calls") and not text_of(message.get("content"))


def _join_assistants(one: Message, other: Message) -> None:
    one["content"] = _joined(one.get("content"), other.get("content"))
    reasoning = _joined(one.get("reasoning_content"), other.get("reasoning_content"))
    _set_reasoning(one, reasoning or None)
    if calls := [*one.get("tool_calls", ()), *other.get("tool_calls", ())]:
        one["tool_calls"] = calls


def _split(chat: list[Message], shape: TemplateShape, keep_last: bool) -> Iterable[Message]:
    """Turns with calls as the template can show all of them: see text_with_calls and parallel_calls."""
    index = 0
    while index < len(chat):
        message = chat[index]
        index += 1
        calls = message.get("tool_calls")
        if not calls or (keep_last and index == len(chat)):
            yield message
            continue
        text = text_of(message.get("content"))
        if shape.reasoning_with_calls != "kept" and (reasoning := message.get("reasoning_content")):
            if shape.reasoning_with_calls == "dropped":
                _set_reasoning(message, None)
            elif text.strip():
                message["content"] = text = _joined(reasoning, text)
                _set_reasoning(message, None)
        if text and shape.text_with_calls != "kept":
            if shape.text_with_calls == "split" and text.strip():
                before = {key: value for key, value in message.items() if key != "tool_calls"}
                _set_reasoning(message, None)
                yield before
            message["content"] = ""
        if shape.parallel_calls or len(calls) == 1:
            yield message
            continue
        results: list[Message] = []
        while index < len(chat) and chat[index].get("role") == "tool":
            results.append(chat[index])
            index += 1
        for number, call in enumerate(calls):
            yield {**message, "tool_calls": [call]} if not number else {"role": "assistant", "tool_calls": [call]}
            own = next((place for place, one in enumerate(results) if one.get("tool_call_id") == call["id"]), None)
            if own is not None:
                yield results.pop(own)
        yield from results


# ---- the parts of a message


def _dress(message: Message, shape: TemplateShape, keep: bool) -> None:
    """Content and calls in the form that the template reads. keep: an empty content is a text to go on with."""
    role = message.get("role")
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = [_dressed_call(call, shape) for call in calls]
    if role == "assistant" and shape.needs_reasoning and "reasoning_content" not in message:
        _set_reasoning(message, "")
    content = message.get("content")
    if isinstance(content, list) and _is_text(content) and (calls or role not in shape.parts):
        # Beside calls many templates that read parts elsewhere do not.
        content = text_of(content)
    if shape.reasoning_parts and role == "assistant" and isinstance(message.get("reasoning_content"), str):
        spoken = content if isinstance(content, list) else [{"type": "text", "text": text_of(content)}]
        content = [{"type": "thinking", "thinking": message["reasoning_content"]}]
        content += [part for part in spoken if part != {"type": "text", "text": ""}]
    if content is None or content == [] or content == "":
        content = ""
        if role == "assistant" and not keep:
            form = shape.call_content if calls else shape.empty_content
            if form in ("absent", "null"):
                message.pop("content", None)
                if form == "null":
                    message["content"] = None
                return
            content = " " if form == "space" else ""
    if isinstance(content, str) and role in shape.needs_parts:
        content = [{"type": "text", "text": content}]
    message["content"] = content


def _is_text(parts: list[Any]) -> bool:
    return all(isinstance(part, dict) and part.get("type") == "text" for part in parts)


def _dressed_call(call: Message, shape: TemplateShape) -> Message:
    function = call["function"]
    arguments = _arguments(function.get("arguments"), shape.arguments, shape.loose_arguments)
    function = {**function, "arguments": arguments}
    if shape.flat_calls:
        return {key: value for key, value in call.items() if key != "function"} | function
    return {**call, "function": function}


# ---- tools


def _in_words(tools: list[Any]) -> str:
    """Declarations for a template that shows none."""
    lines = [json.dumps(plain(tool), ensure_ascii=False) for tool in tools]
    return "\n".join(["# Tools", "", "These functions can be called:", *lines])


def _declaration(tool: Any, shape: TemplateShape) -> Any:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        return plain(tool)
    function = {key: plain(value) for key, value in function.items() if value is not None}
    if shape.tool_fields == "filled":
        function.setdefault("description", "")
        function["parameters"] = _filled(function.get("parameters") or {}, "object")
    if shape.tools == "system":
        return function
    rest = {key: plain(value) for key, value in tool.items() if key != "function" and value is not None}
    return rest | function if shape.tools == "flat" else rest | {"function": function}


def _filled(schema: Any, default: str) -> dict[str, Any]:
    """A schema in which each property has a type and a description, and a default among choices is text: some
    templates write them without asking."""
    filled = dict(schema) if isinstance(schema, dict) else {}
    filled.setdefault("type", _type_of(filled, default))
    filled.setdefault("description", "")
    if filled["type"] == "object" and not isinstance(filled.get("properties"), dict):
        filled["properties"] = {}
    if isinstance(filled.get("properties"), dict):
        filled["properties"] = {name: _filled(inner, "string") for name, inner in filled["properties"].items()}
    if isinstance(filled.get("items"), dict):
        filled["items"] = _filled(filled["items"], "string")
    if any(filled.get(name) for name in ("enum", "oneOf")) and not isinstance(filled.get("default", ""), str):
        # Written behind the choices as one of them, without asking whether it is text.
        filled["default"] = json.dumps(filled["default"], ensure_ascii=False)
    return filled


def _type_of(schema: dict[str, Any], default: str) -> str:
    for name in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(name)
        for branch in branches if isinstance(branches, list) else ():
            kind = _type_of(branch, "null") if isinstance(branch, dict) else "null"
            if kind != "null":
                return kind
    if isinstance(schema.get("type"), str):
        return str(schema["type"])
    if "properties" in schema:
        return "object"
    if "items" in schema:
        return "array"
    values = schema.get("enum")
    value = values[0] if isinstance(values, list) and values else schema.get("const")
    kinds: list[tuple[type, str]] = [(str, "string"), (bool, "boolean"), (int, "integer"), (float, "number")]
    return next((name for kind, name in kinds if isinstance(value, kind)), default)
