"""Which parsers a chat template asks for, by what it writes.

A past call is put through the template, and the marks around it in what comes out tell the family: a template's
source alone holds instructions, and tags that it cuts out or writes for results. Where a template writes no past calls
its source is asked. A family is known by marks that must be there and others that must not: tags such as <tool_call>
are shared by many. What no row fits has no parser, as a wrong one reads calls as content and content as calls.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

from engine.request import RequestError

Render = Callable[[list[dict[str, Any]], list[dict[str, Any]]], str]
# Family, marks that must be there, marks that must not. The first row that fits.
Row = tuple[str, tuple[str, ...], tuple[str, ...]]

TOOL_ROWS: tuple[Row, ...] = (
    ("harmony", ("<|channel|>", "<|start|>"), ()),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json"), ()),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",), ()),
    ("deepseek_v32", ("｜DSML｜", "function_calls>"), ()),
    ("deepseek_v4", ("｜DSML｜", "tool_calls>"), ()),
    ("muse_glimmer", ("<atem:function_calls>", "<atem:invoke"), ()),
    ("gigachat35", ("｜GCML｜", "tool_calls>"), ()),
    ("gigachat3", ("function call", "<|role_sep|>"), ()),
    ("solar_open", ("<|tool_call:begin|>", "<|tool_call:args|>"), ()),
    ("solar_open2", ("<|tool_call:start|>", "<|tool_arg:start|>"), ()),
    ("k2_horizon", ("<ifm|tool_call>", "<ifm|arg_key>"), ()),
    ("dots", ("<dots_function_call>", "<invoke name="), ()),
    ("minicpm5", ("<function name=", "<param name="), ()),
    ("step3", ("<｜tool_calls_begin｜>", "<steptml:"), ()),
    ("kimi_k3", ("<|open|>", "<|sep|>", "argument"), ()),
    ("kimi_k2", ("<|tool_calls_section_begin|>",), ()),
    # Its first template declares tools and writes no calls.
    ("kimi_k2", ("tool_declare<|im_middle|>",), ()),
    ("minimax_m3", ("]<]minimax[>[",), ()),
    ("minimax_m2", ("<minimax:tool_call>",), ()),
    ("seed_oss", ("<seed:tool_call>",), ()),
    ("gemma4", ("<|tool_call>call:",), ()),
    ("functiongemma", ("<start_function_call>",), ()),
    ("mistral_v11", ("[TOOL_CALLS]", "[ARGS]"), ()),
    ("mistral", ("[TOOL_CALLS]",), ()),
    ("cohere_command3", ("<|START_ACTION|>",), ()),
    ("command_r", ("Action:", "```json", "tool_name"), ()),
    ("apertus", ("<|tools_prefix|>",), ()),
    ("nemotron_json", ("<TOOLCALL>",), ()),
    ("internlm", ("<|action_start|>", "<|plugin|>"), ()),
    ("lfm2", ("<|tool_call_start|>",), ()),
    ("lfm2", ("<|tool_list_start|>",), ()),
    # Its later templates write declarations alone.
    ("lfm2", ("List of tools: [", "keep_past_thinking"), ()),
    ("granite", ("<|tool_call|>", "<|start_of_role|>"), ()),
    ("granite-20b-fc", ("<function_call>", "<|function_call_library|>"), ()),
    ("phi4_mini_json", ("functools[",), ()),
    ("longcat", ("<longcat_tool_call>",), ("<longcat_arg_key>",)),
    ("olmo3", ("<function_calls>",), ("<invoke", "<parameter")),
    ("hy_v3", ("<tool_call>", "<tool_sep>", "<arg_key>"), ()),
    ("hy_v3_opensource", ("<tool_call:opensource>", "<tool_sep:opensource>"), ()),
    ("glm47", ("<tool_call>", "</arg_key><arg_value>"), ()),
    ("glm45", ("<tool_call>", "<arg_key>", "<arg_value>"), ()),
    ("qwen3_coder", ("<function=", "<parameter="), ()),
    ("hunyuan_a13b", ("<tool_calls>[", '"name"'), ("<arg_key>", "<invoke")),
    ("minimax", ("<tool_calls>\n{", '"name"', "</tool_calls>"), ("<arg_key>", "<invoke")),
    (
        "hermes",
        ("<tool_call>", '"name"'),
        ("<arg_key>", "<function=", "<function ", "<tool_calls>", "<invoke", "<parameter", "<|tool_call"),
    ),
    ("pythonic", ("<|header_start|>", "<|python_start|>"), ()),
)
_LLAMA = ("<|start_header_id|>", "<|header_start|>")
_PYTHONIC = re.compile(r"func_name\d?\(\s*params_name")

REASONING_ROWS: tuple[Row, ...] = (
    ("harmony", ("<|channel|>", "<|start|>"), ()),
    ("mistral", ("[THINK]",), ()),
    ("gemma4", ("<|channel>",), ()),
    ("seed_oss", ("<seed:think>",), ()),
    ("minimax_m3", ("<mm:think>",), ()),
    # Its tags are put together from their names.
    ("kimi_k3", ("<|open|>", "<|sep|>", "think"), ()),
    ("cohere_command3", ("<|START_THINKING|>",), ()),
    ("muse_glimmer", ("<atem:", "to=self"), ()),
    ("solar_open2", ("<|think:start|>",), ()),
    ("solar_open", ("<|think|>", "<|begin|>"), ()),
    ("k2_horizon", ("<ifm|think>",), ()),
    ("apertus", ("<|inner_prefix|>",), ()),
    ("granite", ("Here is my thought process:", "<|start_of_role|>"), ()),
    ("granite_think", ("<response>", "<think>", "<|start_of_role|>"), ()),
    ("ernie45", ("<response>", "</think>", "<|begin_of_sentence|>"), ()),
    ("hunyuan_a13b", ("<answer>", "<think>", "<|extra_0|>"), ()),
    ("hunyuan_a13b", ("<answer>", "<think>", "<｜hy_"), ()),
    # Its tags are put together from a name and an ending.
    ("hy_v3_opensource", ("<think{}>", ":opensource"), ()),
    ("qwen3", ("<think>", "enable_thinking"), ()),
    ("qwen3", ("</think>", "enable_thinking"), ()),
    ("deepseek_r1", ("<think>",), ()),
    ("deepseek_r1", ("</think>",), ()),
)

_USER, _NAME, _RESULT = "qzxasked", "qzxfunction", "qzxresult"
_ARGUMENTS = {"qzxtext": "qzxvalue", "qzxnumber": 7}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A function.",
        "parameters": {
            "type": "object",
            "properties": {
                "qzxtext": {"type": "string", "description": "Text."},
                "qzxnumber": {"type": "integer", "description": "A number."},
            },
            "required": ["qzxtext"],
        },
    },
}


def detect(source: str, render: Render | None = None) -> tuple[str | None, str | None]:
    """Tool and reasoning parser of a model with such a template; None where it writes nothing known.

    render: the template itself, from messages and tools to text.
    """
    # Quotes and line breaks as the strings in the source stand for them.
    plain = source.replace('\\"', '"').replace("\\'", "'").replace("\\n", "\n")
    written = None if render is None else _written_call(render)
    tools = None if written is None else _first(TOOL_ROWS, written)
    return tools or _first(TOOL_ROWS, plain) or _llama(plain), _first(REASONING_ROWS, plain)


def _first(rows: tuple[Row, ...], text: str) -> str | None:
    for name, needed, forbidden in rows:
        if all(mark in text for mark in needed) and not any(mark in text for mark in forbidden):
            return name
    return None


def _llama(source: str) -> str | None:
    """Llama 3 has no marks of its own around calls."""
    if not any(mark in source for mark in _LLAMA):
        return None
    if _PYTHONIC.search(source):
        return "pythonic"
    return "llama3_json" if '"parameters"' in source and '"name"' in source else None


def _written_call(render: Render) -> str | None:
    """What the template writes of a past call; None where it writes none, or refuses the conversation."""
    # Some templates take arguments as text, and some write calls only where there is no content.
    for arguments, content in itertools.product((_ARGUMENTS, json.dumps(_ARGUMENTS)), ("", None)):
        call = {"id": "probe0000", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
        answer = {"role": "assistant", "content": content, "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": "probe0000", "name": _NAME, "content": _RESULT}
        for conversation in ([answer, result], [answer]):
            try:
                text = render([{"role": "user", "content": _USER}, *conversation], [_TOOL])
            except RequestError:
                continue
            text = text.rpartition(_USER)[2].partition(_RESULT)[0]
            if _NAME in text and "qzxvalue" in text:
                return text
    return None
