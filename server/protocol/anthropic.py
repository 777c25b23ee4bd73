"""POST /v1/messages: Anthropic's body becomes a chat's, which becomes a Plan; and errors in Anthropic's shape.

What both APIs know is read by chat.py; here are only the fields and the blocks that have another form.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.request import RequestError
from server.protocol.anthropic_tools import client_tool
from server.protocol.body import Body, aside, check_nesting, invalid
from server.protocol.chat import EFFORTS, encode_messages, is_begun, is_last_of_assistant, parse_chat
from server.protocol.errors import message_with_field
from server.protocol.generation import Plan, read_model, room_for, with_max_tokens
from server.protocol.history import Turn, newest_turn, of_result, read_part, read_parts
from server.protocol.ignored import ignore
from server.protocol.refusals import refuse
from server.protocol.tool_fields import read_tools
from server.state import State

# Our name of a field and Anthropic's, for errors.
NAMES = {
    "prompt": "messages",
    "stop": "stop_sequences",
    "user": "metadata.user_id",
    "thinking_token_budget": "thinking.budget_tokens",
    "reasoning_effort": "output_config.effort",
    "response_format.json_schema": "output_config.format",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "tools[].function": "tools[]",
    "tools[].function.parameters": "tools[].input_schema",
    "tool_choice.function": "tool_choice",
    "messages[].tool_calls[].function": "messages[].tool_calls[]",
}
# Means here what it means in a chat.
SAME = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "stream",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "cache_salt",
    "priority",
    "speculative",
    "max_draft_tokens",
    "kv_transfer_params",
)
REFUSALS: dict[str, tuple[object, ...]] = {
    "vllm_xargs": ({},),
}
# Wishes that change no word of the answer, or that only Anthropic's own servers could meet: with the values that ask
# for nothing.
HINTS: dict[str, tuple[object, ...]] = {
    "container": (),
    "context_management": ({}, {"edits": []}),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
}
# Of a message that continues a conversation, by its role.
ROLES: dict[str, str] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
THINKING = ("enabled", "adaptive", "between_tools", "disabled")
# Chat templates' names for their switch.
_SWITCHES = ("enable_thinking", "thinking")
# What Claude Code puts in front of its system prompt. It changes with every conversation, tells a model nothing and
# would keep all that follows out of the prefix cache.
_BILLING = "x-anthropic-billing-header"
MAX_EFFORT = 64
FORCED = ("any", "tool")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the answer has to know beside the Plan.

    max_tokens: the client's, which may be more than the context has room for. shows_thinking: the text of thinking
    blocks is sent.
    """

    max_tokens: int
    shows_thinking: bool


async def parse_messages(body: Body, state: State, response_id: str) -> tuple[Plan, Wanted]:
    """Raises RequestError for anything that cannot be served, in our names of the fields."""
    max_tokens = body.integer("max_tokens", None, 1)
    if max_tokens is None:
        raise invalid("max_tokens", "is required")
    thinking = body.object("thinking") or {}
    chat = await aside(body, partial(_to_chat, body, state))
    budget = chat.get("thinking_token_budget")
    if state.reasoning_family is None:
        # Agents ask every model to think; one that does not keeps any budget.
        chat["thinking_token_budget"] = None
    plan = await parse_chat(Body(chat, body.size), state, response_id)
    transfer = plan.requests[0].transfer
    if transfer is not None and transfer.keep:
        # Routers ask the prefiller for one token, with any budget; it says one anyway.
        return plan, Wanted(max_tokens, thinking.get("display") != "omitted")
    if budget is not None and budget >= max_tokens:
        raise invalid("thinking.budget_tokens", "must be less than `max_tokens`")
    # Clients must send a number and send a large one, whatever the model; Anthropic has a stop reason for what ends
    # at the context's end instead.
    plan = with_max_tokens(plan, lambda request: min(max_tokens, max(1, room_for(state, request.prompt_token_ids))))
    return plan, Wanted(max_tokens, thinking.get("display") != "omitted")


async def count_tokens(body: Body, state: State) -> int:
    """Tokens of the prompt that the same body would make for parse_messages."""
    chat = Body(await aside(body, partial(_to_chat, body, state)), body.size)
    read_model(chat, state.model)
    _, prompt = await encode_messages(chat, state, read_tools(chat))
    return len(prompt)


def error_body(error: RequestError, request_id: str | None) -> dict[str, object]:
    """The JSON object of an error, as Anthropic writes it."""
    status, message = error.status, message_with_field(error)
    if error.code == "context_length_exceeded":
        # Agents look for these words before they make the conversation shorter.
        message = f"prompt is too long: {error}"
    kind = ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def _to_chat(body: Body, state: State) -> dict[str, Any]:
    """The body of the chat that says the same, without `max_tokens`."""
    refuse(body, REFUSALS)
    for name, neutral in HINTS.items():
        if body.has(name) and body.raw(name) not in neutral:
            ignore(name)
    chat: dict[str, Any] = {name: body.raw(name) for name in SAME}
    chat["stop"] = body.raw("stop_sequences")
    if not isinstance(chat["stop"], list | None):
        raise invalid("stop_sequences", "must be a list of strings")
    chat["user"] = body.inner("metadata").string("metadata.user_id", None)
    chat["tools"] = _read_tools(body.raw("tools"))
    chat |= _read_tool_choice(body)
    chat |= _read_thinking(body, state)
    messages = _read_messages(body.raw("messages"))
    last = messages[-1]
    if is_last_of_assistant(last):
        # Anthropic's way to begin an answer for the model.
        chat["continue_final_message"] = begun = is_begun(last, state)
        if not begun and len(messages) > 1:
            messages.pop()
    chat["messages"] = _read_system(body.raw("system")) + messages
    return chat


def _read_thinking(body: Body, state: State) -> dict[str, Any]:
    """`thinking` and `output_config` as the chat's template arguments, budget, effort and response_format.

    The model thinks where it is asked to, and not where it must call a tool at once; what a model that always thinks
    has thought without being asked is not shown.
    """
    fields, config = body.inner("thinking"), body.inner("output_config")
    chat: dict[str, Any] = {"reasoning_effort": _read_effort(config)}
    kind = fields.choice("thinking.type", THINKING)
    fields.string("thinking.display", None)
    asked, budget = kind in ("enabled", "adaptive"), None
    if kind == "between_tools":
        # Once it has results to think about.
        asked = _ends_in_result(body.raw("messages"))
    if body.has("thinking"):
        if kind is None:
            raise invalid("thinking.type", f"must be one of {', '.join(THINKING)}")
        budget = fields.integer("thinking.budget_tokens", None, 1)
        if budget is None and kind == "enabled":
            raise invalid("thinking.budget_tokens", "is required for the type enabled")
    thinks = asked
    if asked and (body.raw("tool_choice") or {}).get("type") in FORCED:
        # Anthropic excludes the one by the other.
        ignore("thinking")
        thinks = False
    # An operator's own default holds for those who say nothing.
    set_by_operator = () if body.has("thinking") else state.options.default_chat_template_kwargs
    switches = {name: thinks for name in _SWITCHES if name not in set_by_operator}
    chat["chat_template_kwargs"] = switches | (body.object("chat_template_kwargs") or {})
    chat["include_reasoning"] = asked
    if kind == "enabled" and thinks:
        chat["thinking_token_budget"] = budget
    elif (body.raw("tool_choice") or {}).get("type") in FORCED:
        # Where the template has no switch.
        chat["thinking_token_budget"] = 0
    # The second is the name that it had in beta.
    form = config.object("output_config.format")
    if form is None:
        form = body.object("output_format")
    if form is not None:
        if form.get("type") != "json_schema":
            raise invalid("output_config.format.type", "must be json_schema")
        chat["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.get("schema"), "strict": True}}
    return chat


def _ends_in_result(messages: Any) -> bool:
    """Whether results of tools are what the model is to answer. messages: not looked at yet."""
    turns = [_turn_of(message) for message in messages] if isinstance(messages, list) else []
    return any(turn == "result" for turn in turns[-1:])


def _read_effort(config: Body) -> str | None:
    """An effort that is newer than this server is the highest that it knows: new ones have been above the others."""
    effort = config.string("output_config.effort", None, most=MAX_EFFORT)
    if effort is None or effort in EFFORTS:
        return effort
    ignore("output_config.effort", effort)
    return EFFORTS[-1]


def _read_tools(tools: Any) -> list[dict[str, Any]]:
    """Each in its place, so that errors name the client's own.

    Of those that Anthropic defines, clients run some; the others have another type, and the chat leaves them out. Tools
    that are to be loaded only when a search has found them (`defer_loading`) can be called at once: nobody searches
    here, and a tool that is declared and shown needs no search.
    """
    if not isinstance(tools, list | None):
        raise invalid("tools", "must be a list")
    read: list[dict[str, Any]] = []
    for index, tool in enumerate(tools or []):
        where = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise invalid(where, "must be an object")
        kind = tool.get("type")
        if kind is not None and (not isinstance(kind, str) or not kind):
            raise invalid(f"{where}.type", "must be a non-empty string")
        if kind is not None and (defined := client_tool(kind)) is not None:
            read.append({"type": "function", "function": {"name": tool.get("name"), **defined}})
            continue
        if kind not in (None, "custom"):
            # Not by its type alone: chat has one that is called function.
            read.append({"type": f"tool.{kind}" if kind in ("function", "namespace") else kind})
            continue
        if not isinstance(tool.get("input_schema"), dict):
            raise invalid(f"{where}.input_schema", "must be an object")
        function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
        function |= {name: tool[name] for name in ("description", "strict") if tool.get(name) is not None}
        read.append({"type": "function", "function": function})
    return read


def _read_tool_choice(body: Body) -> dict[str, Any]:
    if not body.has("tool_choice"):
        return {}
    fields = body.inner("tool_choice")
    kind = fields.choice("tool_choice.type", (*CHOICES, "tool"))
    if kind is None:
        raise invalid("tool_choice.type", f"must be one of {', '.join(CHOICES)}, tool")
    chat: dict[str, Any] = {"parallel_tool_calls": not fields.boolean("tool_choice.disable_parallel_tool_use", False)}
    if kind == "tool":
        name = fields.string("tool_choice.name", None)
        if name is None:
            raise invalid("tool_choice.name", "is required")
        return chat | {"tool_choice": {"type": "function", "function": {"name": name}}}
    return chat | {"tool_choice": CHOICES[kind]}


# ---- messages


def _read_system(system: Any) -> list[dict[str, Any]]:
    if system is None or system == "" or system == []:
        return []
    check_nesting("system", system)
    kept = [text for text in map(_without_billing, _read_texts(system, "system")) if text is not None]
    if not kept:
        return []
    return [{"role": "system", "content": _as_content(kept)}]


def _without_billing(text: str) -> str | None:
    """A block of the system prompt; None for the billing block, which is one line long."""
    if not text.startswith(_BILLING):
        return text
    ignore("system", _BILLING)
    return text.partition("\n")[2].lstrip("\n") or None


def _read_texts(content: Any, where: str) -> list[str]:
    return read_parts(_blocks(content, where), where)


def _as_content(texts: list[str]) -> str | list[dict[str, str]]:
    """Templates that read strings alone are given strings where that is all that was said."""
    return [{"type": "text", "text": text} for text in texts] if len(texts) > 1 else "".join(texts)


def _blocks(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if content is None:
        # A turn that was cut before it said anything.
        return []
    if not isinstance(content, list):
        raise invalid(where, "must be a string or a list of blocks")
    for index, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str) or not block["type"]:
            raise invalid(f"{where}[{index}]", "must be an object with a `type`")
    return content


def _read_messages(messages: Any) -> list[dict[str, Any]]:
    """As a chat has them: results of tools are messages of their own, and neighbours of one role are one turn."""
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "must be a list with at least one message")
    check_nesting("messages", messages)
    kinds = [_turn_of(message) for message in messages]
    # A last turn of the assistant's is only the beginning of the answer.
    newest = newest_turn(kinds[:-1] if kinds[-1] == "assistant" else kinds)
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise invalid(f"{where}.role", f"must be one of {', '.join(ROLES)}")
        blocks = _blocks(message.get("content"), f"{where}.content")
        if not blocks:
            _turn(turns, ROLES[role])
        for index, block in enumerate(blocks):
            _read_block(turns, names, ROLES[role], block, f"{where}.content[{index}]", number == newest)
    for turn in turns:
        turn["content"] = _as_content(turn["content"])
    return turns


def _turn_of(message: Any) -> Turn:
    if not isinstance(message, dict):
        return "other"
    role, content = message.get("role"), message.get("content")
    if role == "user" and isinstance(content, list):
        kinds = [block.get("type") for block in content if isinstance(block, dict)]
        # What comes with a result was put there by the program that ran the tool.
        return "result" if "tool_result" in kinds else "user"
    return "user" if role == "user" else "assistant" if role == "assistant" else "other"


def _turn(turns: list[dict[str, Any]], role: str) -> dict[str, Any]:
    """The last turn where it is of this role, else a new one. Its content is a list of texts."""
    if not turns or turns[-1]["role"] != role:
        turns.append({"role": role, "content": []})
    return turns[-1]


def _read_block(
    turns: list[dict[str, Any]], names: dict[str, str], role: str, block: dict[str, Any], where: str, newest: bool
) -> None:
    """Add a block to the turns. names: of tools by the id of their use."""
    kind = block["type"]
    if kind == "tool_result" and role != "assistant":
        result = _read_result(block, names, where)
        if result["tool_call_id"] in names:
            turns.append(result)
        else:
            # Templates look for the call of a result: where there is none, the user tells of it.
            _turn(turns, "user")["content"] += ["[tool_result]", *result["content"]]
        return
    turn = _turn(turns, role)
    if role == "assistant" and kind == "thinking":
        thought = block.get("thinking")
        if not isinstance(thought, str | None):
            raise invalid(f"{where}.thinking", "must be a string")
        turn["reasoning_content"] = turn.get("reasoning_content", "") + (thought or "")
    elif role == "assistant" and kind == "tool_use":
        name, use, given = block.get("name"), block.get("id"), block.get("input")
        if not isinstance(name, str) or not isinstance(use, str):
            raise invalid(where, "must have a `name` and an `id`")
        if not isinstance(given, dict | str | None):
            raise invalid(f"{where}.input", "must be an object")
        names[use] = name
        call = {"id": use, "type": "function", "function": {"name": name, "arguments": given or {}}}
        turn.setdefault("tool_calls", []).append(call)
    elif (text := read_part(block, where, newest=newest)) is not None:
        turn["content"].append(text)


def _read_result(block: dict[str, Any], names: dict[str, str], where: str) -> dict[str, Any]:
    """A turn of a tool. Its content is a list of texts."""
    use, content = block.get("tool_use_id"), of_result(block.get("content"))
    if not isinstance(use, str):
        raise invalid(f"{where}.tool_use_id", "must be a string")
    texts = [content] if isinstance(content, str) else _read_texts(content, f"{where}.content")
    if block.get("is_error") is not None and not isinstance(block["is_error"], bool):
        raise invalid(f"{where}.is_error", "must be true or false")
    if block.get("is_error"):
        # Chat templates have no place for this, and the model must know.
        texts = [f"Error: {''.join(texts)}"] if len(texts) < 2 else ["Error:", *texts]
    turn = {"role": "tool", "tool_call_id": use, "content": texts}
    # Some templates write it beside the result.
    return turn | ({"name": names[use]} if use in names else {})
