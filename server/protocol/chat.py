"""POST /v1/chat/completions: a JSON body becomes a Plan; messages become one prompt by the model's own template.

/tokenize reads messages here too, so that both see the same prompt.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import orjson

from engine.request import RequestError
from server.protocol.body import Body, check_nesting, invalid
from server.protocol.generation import Plan, make_plan, read_common
from server.protocol.refusals import CHAT_REFUSALS, not_supported, refuse
from server.state import State

_ROLES = ("system", "developer", "user", "assistant", "tool")
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# What the template gets from us and nobody else.
_RESERVED_KWARGS = frozenset(
    {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
)
# Rendering walks the whole conversation; beyond this size it is done in the tokenizer's pool.
_INLINE_BYTES = 16 * 1024


async def parse_chat(body: Body, state: State, response_id: str) -> Plan:
    """Raises RequestError for anything that cannot be served."""
    name = "max_tokens"
    if (wanted := body.integer("max_completion_tokens", None, 1)) is not None:
        name = "max_completion_tokens"
        if body.integer("max_tokens", wanted, 1) != wanted:
            raise invalid("max_tokens", "and `max_completion_tokens` differ; give one of them")
    common = read_common(body, state, name, state.model.generation_defaults.max_new_tokens)
    _check_tool_choice(body)
    refuse(body, CHAT_REFUSALS)
    prompt = await encode_messages(body, state)
    return make_plan(state, common, response_id, [prompt], chat=True)


async def encode_messages(body: Body, state: State) -> list[int]:
    """The prompt of `messages`, `tools` and the template's options."""
    template, tokenizer = state.model.chat_template, state.tokenizer
    messages = _read_messages(body.raw("messages"))
    tools = _read_tools(body.raw("tools"))
    kwargs = _read_template_kwargs(body)
    continue_final = body.boolean("continue_final_message", False)
    add_generation = body.boolean("add_generation_prompt", not continue_final)
    if continue_final and add_generation:
        raise invalid("continue_final_message", "and `add_generation_prompt` cannot both be true")
    add_special_tokens = body.boolean("add_special_tokens", False)
    if template is None:
        raise RequestError("This model has no chat template; use /v1/completions.", param="messages")
    render = partial(
        template.render,
        messages if template.accepts_parts else [_with_joined_parts(message) for message in messages],
        tools=tools,
        add_generation_prompt=add_generation,
        continue_final_message=continue_final,
        kwargs=kwargs,
    )
    if body.size <= _INLINE_BYTES:
        text = render()
    else:
        text = await asyncio.get_running_loop().run_in_executor(tokenizer.pool, render)
    return await tokenizer.encode_async(text, add_special_tokens=add_special_tokens)


def _read_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "must be a list with at least one message")
    check_nesting("messages", messages)
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _read_message(message: Any, where: str) -> dict[str, Any]:
    """A message as templates want it: content never null, arguments of tool calls as objects."""
    if not isinstance(message, dict):
        raise invalid(where, "must be an object")
    role = message.get("role")
    if role not in _ROLES:
        raise invalid(f"{where}.role", f"must be one of {', '.join(_ROLES)}")
    # Templates of open models know no developer and would drop the message without a word.
    read: dict[str, Any] = message | {"role": "system" if role == "developer" else role}
    for name in ("name", "tool_call_id", "reasoning", "reasoning_content"):
        if not isinstance(message.get(name), str | None):
            raise invalid(f"{where}.{name}", "must be a string")
    calls = message.get("tool_calls")
    if calls is not None:
        if role != "assistant" or not isinstance(calls, list):
            raise invalid(f"{where}.tool_calls", "must be a list, in a message of the assistant")
        read["tool_calls"] = [_read_tool_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    content = message.get("content")
    if content is None:
        if not calls:
            raise invalid(f"{where}.content", "is required, unless the assistant calls tools")
        # Not null: templates add it to strings.
        read["content"] = ""
    else:
        read["content"] = _read_content(content, f"{where}.content")
    return read


def _read_content(content: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, "must be a string or a list of parts")
    parts: list[dict[str, str]] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise invalid(f"{where}[{index}]", "must be an object with a `type`")
        if kind != "text":
            raise invalid(f"{where}[{index}]", f"is of type {kind[:40]!r}; this model reads text only")
        if not isinstance(part.get("text"), str):
            raise invalid(f"{where}[{index}].text", "must be a string")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _with_joined_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message for a template that can only read strings."""
    content = message["content"]
    if isinstance(content, str):
        return message
    return message | {"content": "\n".join(part["text"] for part in content)}


def _read_tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(where, "must be an object with a `function` that has a `name`")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # Templates print an object as JSON and would quote a string twice. What the model garbled stays text.
        try:
            parsed = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            parsed = None
        if isinstance(parsed, dict):
            check_nesting(f"{where}.function.arguments", parsed)
            arguments = parsed
    elif arguments is not None and not isinstance(arguments, dict):
        raise invalid(f"{where}.function.arguments", "must be a string of JSON")
    function = function | {"arguments": {} if arguments is None else arguments}
    return {**call, "function": function}


def _read_tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list) or not tools:
        raise invalid("tools", "must be a list with at least one tool")
    check_nesting("tools", tools)
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict):
            raise invalid(f"tools[{index}]", "must be an object of type `function` with a `function`")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise invalid(f"tools[{index}].function.name", "must be a non-empty string")
        if not isinstance(function.get("parameters"), dict | None):
            raise invalid(f"tools[{index}].function.parameters", "must be an object")
    return tools


def _check_tool_choice(body: Body) -> None:
    choice, has_tools = body.raw("tool_choice"), body.has("tools")
    if choice is not None and not has_tools and choice != "none":
        raise invalid("tool_choice", "is only allowed when `tools` are given")
    if choice not in (None, "none", "auto"):
        if choice != "required" and not isinstance(choice, dict):
            raise invalid("tool_choice", "must be none, auto, required or a named function")
        # Forcing a call takes a grammar.
        raise not_supported("tool_choice")
    # Without tools there are no calls at all.
    if not body.boolean("parallel_tool_calls", True) and has_tools:
        raise not_supported("parallel_tool_calls")


def _read_template_kwargs(body: Body) -> dict[str, Any]:
    kwargs = dict(body.object("chat_template_kwargs") or {})
    if reserved := _RESERVED_KWARGS.intersection(kwargs):
        raise invalid("chat_template_kwargs", f"must not set `{min(reserved)}`")
    effort = body.choice("reasoning_effort", _EFFORTS)
    if effort is not None:
        # The three names that templates use for it; an explicit argument wins.
        thinks = effort != "none"
        kwargs = {"reasoning_effort": effort, "enable_thinking": thinks, "thinking": thinks} | kwargs
    return kwargs
