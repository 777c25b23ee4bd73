"""POST /v1/chat/completions: a JSON body becomes a Plan; messages become one prompt by the model's own template.

/tokenize reads messages here too, so that both see the same prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import orjson

from engine.config import RESERVED_TEMPLATE_KWARGS
from engine.request import RequestError
from engine.text.chat_template import ChatTemplate
from engine.text.grammar.spec import GrammarSpec
from engine.text.template_shape import text_of
from server.custom_calls import INPUT
from server.messages import Reading
from server.parsers.base import ReasoningFamily, ReasoningState, ReasoningStyle, ToolFamily, make_call_id
from server.parsers.raw import raw_family
from server.protocol.body import Body, aside, check_nesting, invalid
from server.protocol.generation import Plan, make_plan, read_common
from server.protocol.history import Turn, newest_turn, of_result, read_parts, texts_in
from server.protocol.ignored import ignore
from server.protocol.refusals import CHAT_REFUSALS, refuse
from server.protocol.structure import make_structure
from server.protocol.structured_fields import read_grammar, with_calls
from server.protocol.tool_fields import ToolPlan, call_format, forced_calls, read_tools
from server.state import State

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What each is to the turns of a conversation.
_TURNS: dict[str, Turn] = {"user": "user", "assistant": "assistant", "tool": "result", "function": "result"}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Rendering walks the whole conversation; beyond this size it is done in the tokenizer's pool. 4 kB take about 0.5 ms.
INLINE_BYTES = 4 * 1024


async def parse_chat(body: Body, state: State, response_id: str) -> Plan:
    """Raises RequestError for anything that cannot be served."""
    name = "max_tokens"
    if (wanted := body.integer("max_completion_tokens", None, -1)) is not None:
        name = "max_completion_tokens"
        if body.integer("max_tokens", wanted, -1) != wanted:
            raise invalid("max_tokens", "and `max_completion_tokens` differ; give one of them")
    logprobs = _read_logprobs(body, state.model.max_logprobs)
    most = state.model.generation_defaults.max_new_tokens
    common = await aside(body, partial(read_common, body, state, name, most, logprobs))
    tools = await aside(body, partial(read_tools, body))
    spec = await aside(body, partial(_read_spec, body, tools, state))
    budget = _read_budget(body, state)
    prediction = await aside(body, partial(_read_prediction, body))
    refuse(body, CHAT_REFUSALS)
    if body.has("web_search_options"):
        # A hosted tool that nobody forces, as others are among the tools.
        ignore("web_search_options")
    text, prompt, thinking, reasoning = await _encode(body, state, tools, state.reasoning_family)
    echoes = [_echo(body, state)] if common.echo else None
    reading, style = None, _read_style(body, reasoning)
    # A forced call of a family that reads both begins with the call itself.
    thinks = None if tools.is_forced and reasoning is not None and reasoning.whole else reasoning
    if tools.reads_calls or reasoning is not None:
        reads = reasoning if tools.raw is None else thinks
        reading = Reading(
            _family(tools, state) if tools.reads_calls else None,
            reads,
            reads is not None and thinking == "inside",
            tools.callable,
            None if tools.parallel and tools.raw is None else 1,
            style,
            tools.refused,
            tools.custom.keys(),
            tools.origins,
        )
    structure = await make_structure(state, common.sampling, spec, reasoning=thinks, thinking=thinking, budget=budget)
    plan = make_plan(
        state, common, response_id, [prompt], chat=True, echoes=echoes, structure=structure, reading=reading
    )
    plan = await _with_prediction(plan, prediction, state)
    return replace(plan, prompt_text=text) if body.boolean("return_prompt_text", False) else plan


def _read_prediction(body: Body) -> str | None:
    """OpenAI's `prediction`: what the answer may repeat."""
    given = body.raw("prediction")
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("type") != "content":
        raise invalid("prediction", 'must be an object with the type "content"')
    content = given.get("content")
    if isinstance(content, list) and content:
        for index, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise invalid(f"prediction.content[{index}]", "must be a part of type text")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise invalid("prediction.content", "must be a string or a list of text parts")
    return content


async def _with_prediction(plan: Plan, prediction: str | None, state: State) -> Plan:
    """Drafts are tried, and never change the answer: where the server tries none it is a hint to nobody."""
    if prediction is None:
        return plan
    tokens: tuple[int, ...] = ()
    limits = state.engine.limits
    if limits.max_draft_tokens and plan.requests[0].speculate:
        ids = await state.tokenizer.encode_async(prediction, add_special_tokens=False)
        tokens = tuple(token for token in ids if token < limits.vocab_size)[: limits.max_model_len]
    return replace(plan, requests=[replace(request, prediction=tokens) for request in plan.requests])


def _read_spec(body: Body, tools: ToolPlan, state: State) -> GrammarSpec | None:
    """The grammar of an answer: calls, a structure, or one of both."""
    spec, family, reasoning = read_grammar(body), state.tool_family, state.reasoning_family
    if not tools.reads_calls:
        return spec
    if tools.raw is not None:
        return tools.raw[1]
    if family is None:
        if tools.is_forced or state.options.tool_call_parser != "none":
            raise RequestError(
                "This model does not support tools: its chat template shows no format that this server knows. "
                "Start the server with --tool-call-parser to name one.",
                param="tool_choice" if tools.is_forced else "tools",
            )
        return spec
    if tools.is_forced:
        return forced_calls(tools, family)
    if spec is None or (reasoning is not None and reasoning.whole):
        # Of the latter the grammar rules the final message alone, and a call is a message of its own.
        return spec
    return with_calls(spec, call_format(tools, family))


def _family(tools: ToolPlan, state: State) -> ToolFamily | None:
    """How the output writes its calls."""
    if tools.raw is None:
        return state.tool_family
    return raw_family(tools.raw[0], make_call_id if state.tool_family is None else state.tool_family.make_id)


def _read_budget(body: Body, state: State) -> int | None:
    """Most tokens of reasoning, by vLLM's name or SGLang's; the server's own default without one, -1 is no limit."""
    given = {name: body.integer(name, None, -1) for name in ("thinking_token_budget", "max_thinking_tokens")}
    budgets = [(name, value) for name, value in given.items() if value is not None]
    if not budgets:
        return state.options.reasoning_budget
    name, budget = budgets[0]
    if budgets[-1][1] != budget:
        raise invalid(budgets[-1][0], f"and `{name}` differ; give one of them")
    if state.reasoning_family is None:
        raise invalid(name, "needs a model that reasons, and this one's chat template shows no reasoning")
    return None if budget == -1 else budget


def _read_style(body: Body, reasoning: ReasoningFamily | None) -> ReasoningStyle:
    """vLLM's `include_reasoning`, SGLang's `separate_reasoning` and `stream_reasoning`: all true by default."""
    include, separate, stream = (
        body.boolean(name, True) for name in ("include_reasoning", "separate_reasoning", "stream_reasoning")
    )
    if not separate and reasoning is not None and reasoning.whole:
        raise invalid("separate_reasoning", "must be true for this model: its messages are read by their channels")
    if not include:
        return "hidden"
    if not separate:
        return "inline"
    return "apart" if stream else "held"


def _read_logprobs(body: Body, most: int) -> int | None:
    wanted = body.boolean("logprobs", False)
    top = body.integer("top_logprobs", None, 0, most)
    if top and not wanted:
        raise invalid("top_logprobs", "needs `logprobs` to be true")
    return (top or 0) if wanted else None


def _echo(body: Body, state: State) -> str:
    """vLLM's `echo` of a chat: the text of a last message of the assistant, which the answer goes on with."""
    last = body.raw("messages")[-1]
    if last["role"] != "assistant" or not body.boolean("continue_final_message", False):
        return ""
    content = _read_content(last.get("content") or "", "messages[-1].content", False)
    if isinstance(content, str):
        return content
    template = state.model.chat_template
    # As the template got it.
    return text_of(content, "" if template is None or "assistant" in template.shape.parts else "\n")


def is_last_of_assistant(message: Any) -> bool:
    """Whether a conversation's last message is the assistant's word, and no call."""
    return isinstance(message, dict) and message.get("role") == "assistant" and not message.get("tool_calls")


def is_begun(message: dict[str, Any], state: State) -> bool:
    """Whether there is something in such a message that an answer can go on with. A thought is where the model thinks;
    of a turn that was cut there may be nothing."""
    thought = message.get("reasoning_content") if state.reasoning_family is not None else None
    return bool(message.get("content") or thought)


async def encode_messages(body: Body, state: State, tools: ToolPlan) -> tuple[str, Sequence[int]]:
    """The prompt of `messages`, `tools` and the template's options, as text and as ids."""
    text, ids, _, _ = await _encode(body, state, tools, None)
    return text, ids


async def _encode(
    body: Body, state: State, tools: ToolPlan, reasoning: ReasoningFamily | None
) -> tuple[str, Sequence[int], ReasoningState, ReasoningFamily | None]:
    """encode_messages, and where the prompt leaves the model in its reasoning: "none" where no family is given; with
    the family as the prompt has opened it."""
    template, tokenizer = state.model.chat_template, state.tokenizer
    messages = await aside(body, partial(_read_messages, body.raw("messages")))
    kwargs = _read_template_kwargs(body, state.options.default_chat_template_kwargs)
    continue_final = body.boolean("continue_final_message", False)
    add_generation = body.boolean("add_generation_prompt", not continue_final)
    if continue_final and add_generation:
        raise invalid("continue_final_message", "and `add_generation_prompt` cannot both be true")
    add_special_tokens = body.boolean("add_special_tokens", False)
    if template is None:
        raise RequestError("This model has no chat template; use /v1/completions.", param="messages")
    options: dict[str, Any] = {
        # Who must not call is told of nothing to call.
        "tools": tools.tools if tools.reads_calls else None,
        "add_generation_prompt": add_generation,
        "continue_final_message": continue_final,
        "kwargs": kwargs,
    }
    render = partial(_render, template, messages, options, reasoning)
    if body.size <= INLINE_BYTES:
        text, thinking, reasoning = render()
    else:
        text, thinking, reasoning = await asyncio.get_running_loop().run_in_executor(tokenizer.pool, render)
    return text, await tokenizer.prompt_ids(text, add_special_tokens=add_special_tokens), thinking, reasoning


def _render(
    template: ChatTemplate, messages: list[dict[str, Any]], options: dict[str, Any], reasoning: ReasoningFamily | None
) -> tuple[str, ReasoningState, ReasoningFamily | None]:
    text = template.render(messages, **options)
    if reasoning is None or not reasoning.has_marks(text):
        return text, "none", reasoning
    thinking = reasoning.follow(text, template.find_turn(text, messages, **options))
    return text, thinking, reasoning.opened_by(text) if thinking == "inside" else reasoning


def _read_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "must be a list with at least one message")
    check_nesting("messages", messages)
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    newest = newest_turn([_TURNS.get(role, "other") if isinstance(role, str) else "other" for role in roles])
    return [_read_message(message, f"messages[{index}]", index == newest) for index, message in enumerate(messages)]


def _read_message(message: Any, where: str, newest: bool) -> dict[str, Any]:
    """A message that is one; ChatTemplate gives it the shape that the model's template wants."""
    if not isinstance(message, dict):
        raise invalid(where, "must be an object")
    role = message.get("role")
    if role not in ROLES:
        raise invalid(f"{where}.role", f"must be one of {', '.join(ROLES)}")
    # OpenAI's older word for a tool.
    read: dict[str, Any] = message | {"role": "tool" if role == "function" else role}
    for name in ("name", "tool_call_id", "reasoning", "reasoning_content"):
        if not isinstance(message.get(name), str | None):
            raise invalid(f"{where}.{name}", "must be a string")
    calls = message.get("tool_calls")
    if calls is None and role == "assistant" and isinstance(message.get("function_call"), dict):
        # The same in its older form.
        calls = [{"function": read.pop("function_call")}]
    if not calls and isinstance(calls, list | None):
        # An empty list is no calls, and templates ask whether there is one.
        read.pop("tool_calls", None)
    else:
        if role != "assistant" or not isinstance(calls, list):
            raise invalid(f"{where}.tool_calls", "must be a list, in a message of the assistant")
        found = [_read_tool_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
        read["tool_calls"] = [call for call in found if call is not None]
    content = message.get("content")
    if read["role"] == "tool":
        content = of_result(content)
    if role == "assistant":
        content = _read_thoughts(content, read)
    if content is None and role == "assistant" and isinstance(message.get("refusal"), str):
        # What the assistant would not say, it said.
        content = message["refusal"]
    # Null is an empty turn: agents keep what an answer had besides its text, and send it back without one.
    if content is not None:
        read["content"] = _read_content(content, f"{where}.content", newest)
    elif role != "assistant":
        read["content"] = ""
    return read


def _read_thoughts(content: Any, read: dict[str, Any]) -> Any:
    """The parts of an answer that are its text. Thoughts, as Mistral's API writes them, become the reasoning, as do
    those that gateways keep beside the content; its calls over again, as frameworks keep them for Anthropic's API, are
    dropped."""
    beside = (read.get(name) for name in ("reasoning_details", "thinking_blocks"))
    kept = next((parts for parts in beside if isinstance(parts, list)), [])
    thoughts = [text for part in kept if isinstance(part, dict) for text in _thoughts_of(part)]
    rest: list[Any] = []
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("thinking", "reasoning"):
            thoughts += [] if kept else _thoughts_of(part)
        elif not (kind in ("tool_use", "tool_call", "function_call") and read.get("tool_calls")):
            rest.append(part)
    if thoughts and read.get("reasoning_content") is None and read.get("reasoning") is None:
        read["reasoning_content"] = read["reasoning"] = "".join(thoughts)
    return rest if isinstance(content, list) else content


def _thoughts_of(part: dict[str, Any]) -> list[str]:
    return texts_in([part.get(name) for name in ("thinking", "reasoning", "text", "summary", "content")])


def _read_content(content: Any, where: str, newest: bool) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, "must be a string or a list of parts")
    return [{"type": "text", "text": text} for text in read_parts(content, where, newest=newest)]


def _read_tool_call(call: Any, where: str) -> dict[str, Any] | None:
    """A call as templates want it; None for one of a type that is none of a client's tools."""
    kind = call.get("type") if isinstance(call, dict) else None
    if kind == "custom" and isinstance(custom := call.get("custom"), dict):
        if not isinstance(custom.get("name"), str) or not isinstance(custom.get("input"), str | None):
            raise invalid(f"{where}.custom", "must have a `name` and an `input` that are strings")
        # As a custom tool is declared to the model.
        given = {INPUT: custom.get("input") or ""}
        rest = {name: value for name, value in call.items() if name != "custom"}
        return rest | {"type": "function", "function": {"name": custom["name"], "arguments": given}}
    if isinstance(kind, str) and kind not in ("", "function") and "function" not in call:
        ignore("tool_calls", kind)
        return None
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(where, "must be an object with a `function` that has a `name`")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # The text goes on as it is, for some templates want it so; what the model garbled does, too.
        try:
            parsed = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            parsed = None
        if isinstance(parsed, dict):
            check_nesting(f"{where}.function.arguments", parsed)
    elif not isinstance(arguments, dict | None):
        raise invalid(f"{where}.function.arguments", "must be a string of JSON")
    return dict(call)


def _read_template_kwargs(body: Body, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The template's options: the server's defaults, then what an effort means, then the client's own."""
    kwargs = dict(body.object("chat_template_kwargs") or {})
    if reserved := RESERVED_TEMPLATE_KWARGS.intersection(kwargs):
        raise invalid("chat_template_kwargs", f"must not set `{min(reserved)}`")
    effort = body.choice("reasoning_effort", EFFORTS)
    if effort is not None:
        # The three names that templates use for it; an explicit argument wins.
        thinks = effort != "none"
        kwargs = {"reasoning_effort": effort, "enable_thinking": thinks, "thinking": thinks} | kwargs
    return {**defaults, **kwargs}
