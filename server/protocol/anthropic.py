"""POST /v1/messages: Anthropic's body becomes a chat's, which becomes a Plan; and errors in Anthropic's shape.

What both APIs know is read by chat.py; here are only the fields and the blocks that have another form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.request import RequestError
from server.protocol.body import Body, check_nesting, invalid
from server.protocol.chat import encode_messages, parse_chat
from server.protocol.errors import message_with_field
from server.protocol.generation import Plan, read_model, room_for, with_max_tokens
from server.protocol.refusals import refuse, refuse_in
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
    ".function.parameters": ".input_schema",
    ".function": "",
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
)
REFUSALS: dict[str, tuple[object, ...]] = {
    "container": (),
    # The last keeps everything that it could clear.
    "context_management": ({}, {"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
}
# Of a tool: where Anthropic's own servers would have to do something.
TOOL_REFUSALS: dict[str, tuple[object, ...]] = {
    "defer_loading": (False,),
    "allowed_callers": ([], ["direct"]),
    "input_examples": ([],),
}
THINKING = ("enabled", "adaptive", "disabled")
EFFORTS = ("low", "medium", "high", "xhigh", "max")
DISPLAYS = ("summarized", "omitted")
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
    chat = _to_chat(body)
    budget = chat.get("thinking_token_budget")
    if budget is not None and budget >= max_tokens:
        raise invalid("thinking.budget_tokens", "must be less than `max_tokens`")
    if state.reasoning_family is None:
        # Agents ask every model to think; one that does not keeps any budget.
        chat["thinking_token_budget"] = None
    plan = await parse_chat(Body(chat, body.size), state, response_id)
    # Clients must send a number and send a large one, whatever the model; Anthropic has a stop reason for what ends
    # at the context's end instead.
    plan = with_max_tokens(plan, lambda request: min(max_tokens, max(1, room_for(state, request.prompt_token_ids))))
    return plan, Wanted(max_tokens, thinking.get("display") != "omitted")


async def count_tokens(body: Body, state: State) -> int:
    """Tokens of the prompt that the same body would make for parse_messages."""
    chat = Body(_to_chat(body), body.size)
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


def _to_chat(body: Body) -> dict[str, Any]:
    """The body of the chat that says the same, without `max_tokens`."""
    refuse(body, REFUSALS)
    chat: dict[str, Any] = {name: body.raw(name) for name in SAME}
    chat["stop"] = body.raw("stop_sequences")
    if not isinstance(chat["stop"], list | None):
        raise invalid("stop_sequences", "must be a list of strings")
    chat["user"] = body.inner("metadata").string("metadata.user_id", None)
    tools = _read_tools(body.raw("tools"))
    if tools:
        chat["tools"] = tools
    chat |= _read_tool_choice(body)
    chat |= _read_thinking(body)
    chat["messages"] = messages = _read_system(body.raw("system")) + _read_messages(body.raw("messages"))
    # Anthropic's way to begin an answer for the model.
    chat["continue_final_message"] = messages[-1]["role"] == "assistant"
    if messages[-1].get("tool_calls"):
        raise invalid("messages", "ends with a `tool_use`; its `tool_result` must follow")
    return chat


def _read_thinking(body: Body) -> dict[str, Any]:
    """`thinking` and `output_config` as the chat's template arguments, budget, effort and response_format."""
    fields, config = body.inner("thinking"), body.inner("output_config")
    chat: dict[str, Any] = {"reasoning_effort": config.choice("output_config.effort", EFFORTS)}
    kwargs = body.object("chat_template_kwargs") or {}
    kind = fields.choice("thinking.type", THINKING)
    if body.has("thinking"):
        if kind is None:
            raise invalid("thinking.type", f"must be one of {', '.join(THINKING)}")
        fields.choice("thinking.display", DISPLAYS)
        kwargs = {"enable_thinking": kind != "disabled", "thinking": kind != "disabled"} | kwargs
        budget = fields.integer("thinking.budget_tokens", None, 1)
        if (budget is None) == (kind == "enabled"):
            raise invalid("thinking.budget_tokens", "is required for the type enabled, and for no other")
        chat["thinking_token_budget"] = budget
    chat["chat_template_kwargs"] = kwargs
    # The second is the name that it had in beta.
    form = config.object("output_config.format")
    if form is None:
        form = body.object("output_format")
    if form is not None:
        if form.get("type") != "json_schema":
            raise invalid("output_config.format.type", "must be json_schema")
        chat["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.get("schema"), "strict": True}}
    return chat


def _read_tools(tools: Any) -> list[dict[str, Any]]:
    """An empty list is no tools, as for Anthropic."""
    if not isinstance(tools, list | None):
        raise invalid("tools", "must be a list")
    read: list[dict[str, Any]] = []
    for index, tool in enumerate(tools or []):
        where = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise invalid(where, "must be an object")
        kind = tool.get("type")
        if kind is not None and kind != "custom":
            raise invalid(where, f"is of type {str(kind)[:64]!r}; this server has no tools of its own")
        refuse_in(where, tool, TOOL_REFUSALS)
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
    return [{"role": "system", "content": _read_texts(system, "system")}]


def _read_texts(content: Any, where: str) -> str | list[dict[str, str]]:
    """A string, or text blocks as a chat's parts."""
    if isinstance(content, str):
        return content
    return [_read_text(block, f"{where}[{index}]") for index, block in enumerate(_blocks(content, where))]


def _blocks(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise invalid(where, "must be a string or a list with at least one block")
    for index, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise invalid(f"{where}[{index}]", "must be an object with a `type`")
    return content


def _read_text(block: dict[str, Any], where: str) -> dict[str, str]:
    if block["type"] != "text":
        raise invalid(where, f"is of type {block['type'][:40]!r}, which this server cannot read here")
    if not isinstance(block.get("text"), str):
        raise invalid(f"{where}.text", "must be a string")
    return {"type": "text", "text": block["text"]}


def _read_messages(messages: Any) -> list[dict[str, Any]]:
    """As a chat has them: results of tools are messages of their own, and neighbours of one role are one turn."""
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "must be a list with at least one message")
    check_nesting("messages", messages)
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant", "system"):
            raise invalid(f"{where}.role", "must be one of user, assistant, system")
        for index, block in enumerate(_blocks(message.get("content"), f"{where}.content")):
            _read_block(turns, names, role, block, f"{where}.content[{index}]")
    for turn in turns:
        parts = turn["content"]
        # Templates that read strings alone are given strings where that is all that was said.
        if isinstance(parts, list) and len(parts) < 2:
            turn["content"] = parts[0]["text"] if parts else ""
    return turns


def _read_block(
    turns: list[dict[str, Any]], names: dict[str, str], role: str, block: dict[str, Any], where: str
) -> None:
    """Add a block to the turns. names: of tools by the id of their use."""
    kind = block["type"]
    if role == "user" and kind == "tool_result":
        turns.append(_read_result(block, names, where))
        return
    if not turns or turns[-1]["role"] != role:
        turns.append({"role": role, "content": []})
    turn = turns[-1]
    if role == "assistant" and kind == "thinking":
        if not isinstance(block.get("thinking"), str):
            raise invalid(f"{where}.thinking", "must be a string")
        turn["reasoning_content"] = turn.get("reasoning_content", "") + block["thinking"]
    elif role == "assistant" and kind == "tool_use":
        name, use = block.get("name"), block.get("id")
        if not isinstance(name, str) or not isinstance(use, str):
            raise invalid(where, "must have a `name` and an `id`")
        if not isinstance(block.get("input"), dict):
            raise invalid(f"{where}.input", "must be an object")
        names[use] = name
        call = {"id": use, "type": "function", "function": {"name": name, "arguments": block["input"]}}
        turn.setdefault("tool_calls", []).append(call)
    else:
        turn["content"].append(_read_text(block, where))


def _read_result(block: dict[str, Any], names: dict[str, str], where: str) -> dict[str, Any]:
    use, content = block.get("tool_use_id"), block.get("content")
    if not isinstance(use, str):
        raise invalid(f"{where}.tool_use_id", "must be a string")
    told = "" if content is None or content == [] else _read_texts(content, f"{where}.content")
    if block.get("is_error") is not None and not isinstance(block["is_error"], bool):
        raise invalid(f"{where}.is_error", "must be true or false")
    if block.get("is_error"):
        # Chat templates have no place for this, and the model must know.
        told = f"Error: {told}" if isinstance(told, str) else [{"type": "text", "text": "Error:"}, *told]
    turn = {"role": "tool", "tool_call_id": use, "content": told}
    # Some templates write it beside the result.
    return turn | ({"name": names[use]} if use in names else {})
