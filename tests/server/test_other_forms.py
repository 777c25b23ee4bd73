"""Calls in forms that are not the model's own: other tags, other fields, no mark at all. Only declared tools make some.

Every text is read whole, one character at a time and in random pieces.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from server.parsers.base import ToolCallArguments
from tests.server.test_parsers import DS_ALL, DS_CALL, DS_CLOSE, DS_END, DS_SEP, Call, check, parser, run

TEXT = {"type": "string"}
TOOLS: dict[str, Any] = {
    "f": {"type": "object", "properties": {"cmd": TEXT, "n": {"type": "integer"}, "id": TEXT}},
    "now": {"type": "object", "properties": {}},
    "put": {"type": "object", "properties": {"value": {"type": "object"}, "args": {"type": "object"}}},
    "mcp.f": {"type": "object", "properties": {"cmd": TEXT}},
}
LS = '{"cmd": "ls"}'
F: Call = ("f", LS)
NOW: Call = ("now", "{}")
OBJECT = f'{{"name": "f", "arguments": {LS}}}'
FUNCTION = "<function=f>\n<parameter=cmd>\nls\n</parameter>\n</function>"
NAMED_FUNCTION = '<function name="f">\n<parameter name="cmd">\nls\n</parameter>\n</function>'
ANYBODY = '{"name": "Bob", "arguments": {"age": 3}}'
TAG = "<|python_tag|>"
KIMI = tuple(
    f"<|tool_call{name}|>" for name in ("s_section_begin", "s_section_end", "_begin", "_argument_begin", "_end")
)


def tagged(inner: str) -> str:
    return f"<tool_call>\n{inner}\n</tool_call>"


# Parser, text, content, calls.
ROWS: list[tuple[str, str, str, list[Call]]] = [
    # A namespace before the name, which is none of a declared name's own.
    ("hermes", tagged(f'{{"name": "functions.f", "arguments": {LS}}}'), "", [F]),
    ("hermes", tagged(f'{{"name": "tools.f", "arguments": {LS}}}'), "", [F]),
    ("hermes", tagged(f'{{"name": "mcp.f", "arguments": {LS}}}'), "", [("mcp.f", LS)]),
    ("hermes", tagged(f'{{"name": "functions.nobody", "arguments": {LS}}}'), "", [("functions.nobody", LS)]),
    ("qwen3_coder", tagged(FUNCTION.replace("=f>", "=functions.f>")), "", [F]),
    ("mistral", f"[TOOL_CALLS]functions.f{LS}", "", [F]),
    ("pythonic", "[functions.f(cmd='ls')]", "", [F]),
    ("llama3_json", f'{{"name": "functions.f", "parameters": {LS}}}', "", [F]),
    ("deepseek_v31", f"{DS_CALL}functions.f{DS_SEP}{LS}{DS_CLOSE}", "", [F]),
    ("gemma4", '<|tool_call>call:functions.f{cmd:<|"|>ls<|"|>}<tool_call|>', "", [F]),
    # Arguments beside the name, and by other keys.
    ("hermes", tagged('{"name": "f", "cmd": "ls"}'), "", [F]),
    ("hermes", tagged('{"cmd": "ls", "name": "f"}'), "", [F]),
    ("hermes", tagged('{"n": 1, "name": "f", "cmd": "ls"}'), "", [("f", '{"n": 1, "cmd": "ls"}')]),
    ("hermes", tagged('{"name": "f", "x": [1, {"y": 2}]}'), "", [("f", '{"x": [1, {"y": 2}]}')]),
    ("hermes", tagged('{"name": "nobody", "x": 1}'), "", [("nobody", '{"x": 1}')]),
    ("hermes", tagged('{"id": "7", "name": "now", "type": "function"}'), "", [NOW]),
    ("hermes", tagged('{"id": "7", "name": "f"}'), "", [("f", '{"id": "7"}')]),
    (
        "hermes",
        tagged(f'{{"name": "f", "why": "C:\\d", "arguments": {LS}}}'),
        "",
        [("f", f'{{"why": "C:\\d", "arguments": {LS}}}')],
    ),
    ("hermes", tagged(f'{{"name": "f", "why": "so", "arguments": {LS}}}'), "", [F]),
    ("hermes", tagged('{"name": "f", "cmd": "C:\\dir"}'), "", [("f", '{"cmd": "C:\\dir"}')]),
    ("hermes", tagged('{"function": {"name": "f", "cmd": "ls"}}'), "", [F]),
    ("hermes", tagged('[{"name": "f", "cmd": "ls"}, {"name": "now"}]'), "", [F, NOW]),
    *(
        ("hermes", tagged(f'{{"{name}": "f", "{arguments}": {LS}}}'), "", [F])
        for name in ("name", "tool", "tool_name", "function", "function_name")
        for arguments in ("arguments", "parameters", "args", "input", "params", "tool_input")
    ),
    ("hermes", tagged('{"name": "put", "args": {"a": 1}}'), "", [("put", '{"args": {"a": 1}}')]),
    ("hermes", tagged(f'{{"f": {LS}}}'), "", [F]),
    ("hermes", tagged(f'{{"nobody": {LS}}}'), tagged(f'{{"nobody": {LS}}}'), []),
    ("hermes", tagged(f'{{"name": f, "arguments": {LS}}}'), "", [F]),
    ("hermes", tagged('{"name": "f", "arguments": "ls"}'), "", [("f", '"ls"')]),
    ("hermes", tagged('{"name": "f", "arguments": "{\\"cmd\\": \\"ls\\"}"}'), "", [F]),
    ("hermes", tagged('{"name": "f", "arguments": "{\\"cmd\\": ls}"}'), "", [("f", '{"cmd": ls}')]),
    # Other spellings inside of the tag.
    ("hermes", tagged(f"{{{OBJECT}}}"), "", [F]),
    ("hermes", tagged("<tool_call>\n" + OBJECT), "", [F]),
    ("hermes", f"<tool_call>\n{OBJECT}\n<tool_call>\n", "", [F]),
    ("hermes", tagged(FUNCTION), "", [F]),
    ("hermes", tagged(NAMED_FUNCTION), "", [F]),
    ("hermes", tagged(f"f({LS})"), "", [F]),
    ("hermes", tagged("f(cmd='ls')"), "", [F]),
    ("hermes", tagged(f"f\n{LS}"), "", [F]),
    ("hermes", tagged(f"nobody\n{LS}"), tagged(f"nobody\n{LS}"), []),
    # Without the tag.
    ("hermes", OBJECT, "", [F]),
    ("hermes", f"\n{OBJECT}\n</tool_call>", "", [F]),
    ("hermes", f"{OBJECT}\n{OBJECT}", "", [F, F]),
    ("hermes", f"[{OBJECT}, {OBJECT}]", "", [F, F]),
    ("hermes", f"```json\n{OBJECT}\n```", "", [F]),
    ("hermes", f"```json\n{OBJECT}\n```\nDone.", "\nDone.", [F]),
    ("hermes", ANYBODY, ANYBODY, []),
    ("hermes", f"[{ANYBODY}]", f"[{ANYBODY}]", []),
    ("hermes", f"```json\n{ANYBODY}\n```", f"```json\n{ANYBODY}\n```", []),
    ("hermes", '{"name": "f", "age": 3}', '{"name": "f", "age": 3}', []),
    ("hermes", "```python\nprint(1)\n```", "```python\nprint(1)\n```", []),
    ("hermes", "[1, 2]", "[1, 2]", []),
    ("hermes", f"So: {OBJECT}", f"So: {OBJECT}", []),
    ("hermes", f"So:\n```json\n{OBJECT}\n```", f"So:\n```json\n{OBJECT}\n```", []),
    *(
        ("hermes", f"So <{name}>\n{OBJECT}\n</{name}>", "So", [F])
        for name in ("tools", "tool", "function_call", "function_calls")
    ),
    ("hermes", f"<tools>\n{ANYBODY}\n</tools>", f"<tools>\n{ANYBODY}\n</tools>", []),
    ("hermes", f"So {FUNCTION}", "So", [F]),
    ("hermes", f'<function name="f">{LS}</function>', "", [F]),
    ("hermes", f"<function=f>{LS}</function>", "", [F]),
    ("hermes", "<function=nobody>{}</function>", "<function=nobody>{}</function>", []),
    # Qwen3-Coder: names as attributes, JSON in its tag, parameters as tags.
    ("qwen3_coder", tagged(NAMED_FUNCTION), "", [F]),
    ("qwen3_coder", NAMED_FUNCTION, "", [F]),
    ("qwen3_coder", tagged(NAMED_FUNCTION.replace('"f"', '"nobody"')), "", [("nobody", LS)]),
    ("qwen3_coder", '<function name="x">', '<function name="x">', []),
    ("qwen3_coder", tagged(FUNCTION.replace("=cmd", " name='cmd'")), "", [F]),
    ("qwen3_coder", tagged(NAMED_FUNCTION.replace("</parameter>\n", "")), "", [F]),
    ("qwen3_coder", tagged(OBJECT), "", [F]),
    ("qwen3_coder", tagged(f"[{OBJECT}, {OBJECT}]"), "", [F, F]),
    ("qwen3_coder", tagged(OBJECT) + "\n" + tagged(FUNCTION), "", [F, F]),
    ("qwen3_coder", tagged("<function=f>\n<cmd>ls</cmd>\n<n>3</n>\n</function>"), "", [("f", '{"cmd": "ls", "n": 3}')]),
    ("qwen3_coder", tagged("<function=f>\n<b></cmd><cmd>l<b>s</cmd></b>\n<c></function>"), "", [("f", "{}")]),
    ("qwen3_coder", tagged("<function=f>\n<c></cmd><cmd>l<c></cmd></b>\n</function>"), "", [("f", '{"cmd": "l<c>"}')]),
    ("qwen3_coder", tagged("<function=f>\n<b>ls</b>\n</function>"), "", [("f", "{}")]),
    # Lines of another system, blanks in tags, tags that close themselves.
    ("qwen3_coder", tagged(FUNCTION).replace("\n", "\r\n"), "", [F]),
    ("qwen3_coder", tagged(FUNCTION.replace("ls", "a\n")).replace("\n", "\r\n"), "", [("f", '{"cmd": "a\\r\\n"}')]),
    ("qwen3_coder", tagged(FUNCTION.replace("\nls", "\rls")), "", [("f", '{"cmd": "\\rls"}')]),
    ("qwen3_coder", tagged(FUNCTION.replace("\nls\n", "\r")), "", [("f", '{"cmd": ""}')]),
    ("qwen3_coder", tagged(FUNCTION.replace("=f", " = f").replace("=cmd", " = cmd")), "", [F]),
    ("qwen3_coder", tagged(FUNCTION.replace("=f", " =f").replace("=cmd", "= cmd ")), "", [F]),
    ("qwen3_coder", FUNCTION.replace("=f", " = f"), "", [F]),
    ("qwen3_coder", "if <function = x> then", "if <function = x> then", []),
    ("qwen3_coder", tagged("<function=now/>"), "", [NOW]),
    ("qwen3_coder", tagged("<function=now />") + "Done.", "Done.", [NOW]),
    # None at all, where no text is wanted.
    ("qwen3_coder", tagged(FUNCTION.replace("cmd", "n").replace("ls", "null")), "", [("f", '{"n": null}')]),
    ("qwen3_coder", tagged(FUNCTION.replace("cmd", "n").replace("ls", "None")), "", [("f", '{"n": null}')]),
    ("qwen3_coder", tagged(FUNCTION.replace("ls", "null")), "", [("f", '{"cmd": "null"}')]),
    ("glm45", tagged(OBJECT), "", [F]),
    ("glm45", f"<tool_call>f\n{LS}\n</tool_call>", "", [F]),
    ("glm45", f"<tool_call>nobody\n{LS}\n</tool_call>", f"<tool_call>nobody\n{LS}\n</tool_call>", []),
    # Llama 3: Python and code behind the tag, text and fences around an object.
    ("llama3_json", f'{TAG}f(cmd="ls")', "", [F]),
    ("llama3_json", f'{TAG}f.call(cmd="ls")', "", [F]),
    ("llama3_json", f"{TAG}f({LS})", "", [F]),
    ("llama3_json", f'{TAG}[f(cmd="ls"), now()]', "", [F, NOW]),
    ("llama3_json", f'{TAG}f(cmd="ls"); now()', "", [F, NOW]),
    ("llama3_json", f'So.\n{TAG}f(cmd="ls")\nnow.call()', "So.", [F, NOW]),
    ("llama3_json", f"{TAG}[{OBJECT}, {OBJECT}]", "", [F, F]),
    ("llama3_json", f"{TAG}nobody(x=1)", f"{TAG}nobody(x=1)", []),
    ("llama3_json", f"{TAG}print(1)", f"{TAG}print(1)", []),
    ("llama3_json", f"[{OBJECT}, {OBJECT}]", "", [F, F]),
    ("llama3_json", f"[{ANYBODY}]", f"[{ANYBODY}]", []),
    ("llama3_json", '{"name": "f", "cmd": "ls"}', "", [F]),
    ("llama3_json", f"So <function=f>{LS}</function><function=now>{{}}</function>", "So", [F, NOW]),
    ("llama3_json", "<function=nobody>{}</function>", "<function=nobody>{}</function>", []),
    ("llama3_json", '{"name": "f", "age": 3}', '{"name": "f", "age": 3}', []),
    ("llama3_json", f"So: {OBJECT}", "So:", [F]),
    ("llama3_json", f"So: {OBJECT}; {OBJECT} I used {{f}}.", "So: I used {f}.", [F, F]),
    ("llama3_json", f"So: {ANYBODY} or {OBJECT}", f"So: {ANYBODY} or {OBJECT}", []),
    ("llama3_json", f'{{"calls": [{OBJECT}]}}', f'{{"calls": [{OBJECT}]}}', []),
    ("llama3_json", f"```json\n{OBJECT}\n```", "", [F]),
    ("llama3_json", f"```json\n{ANYBODY}\n```", f"```json\n{ANYBODY}\n```", []),
    # One object of all arguments, in Python.
    ("pythonic", f"[f({LS})]", "", [F]),
    ("pythonic", "[f({'cmd': 'ls'}), now({})]", "", [F, NOW]),
    ("pythonic", f"[f(**{LS})]", "", [F]),
    ("pythonic", '[f({"command": "ls"})]', "", [("f", '{"command": "ls"}')]),
    ("pythonic", '[put({"a": 1})]', "", [("put", '{"value": {"a": 1}}')]),
    ("pythonic", '[put({"a": 1}, {"b": 2})]', "", [("put", '{"value": {"a": 1}, "args": {"b": 2}}')]),
    ("lfm2", f"<|tool_call_start|>[f({LS})]<|tool_call_end|>", "", [F]),
    ("pythonic", "[f(cmd='ls'),]", "", [F]),
    ("pythonic", "[f(cmd='ls') now()]", "", [F, NOW]),
    # GLM and Qwen3-Coder: Python, a name alone, tags that do not end, a section that is missing.
    ("glm47", "<tool_call>f(cmd='ls')</tool_call>", "", [F]),
    ("glm47", "<tool_call>now", "", [NOW]),
    ("glm47", "<tool_call>nobody", "<tool_call>nobody", []),
    ("qwen3_coder", tagged(FUNCTION.replace("=f>", "=f")), "", [F]),
    ("qwen3_coder", tagged(FUNCTION.replace("=cmd>", "=cmd")), "", [F]),
    ("qwen3_coder", tagged(FUNCTION.replace("=cmd>", "=\ncmd>").replace("=f>", "=\nf\n>")), "", [F]),
    ("minimax_m2", 'So <invoke name="f"><parameter name="cmd">ls</parameter></invoke>', "So", [F]),
    ("minimax_m2", '<invoke name="x"></invoke>', '<invoke name="x"></invoke>', []),
    # Mistral: a word before the list, no list, nothing behind the name.
    ("mistral", f"[TOOL_CALLS] so [{OBJECT}]", "", [F]),
    ("mistral", f"[TOOL_CALLS]{OBJECT}, {OBJECT}", "", [F, F]),
    ("mistral", "[TOOL_CALLS]now[TOOL_CALLS]now", "", [NOW, NOW]),
    ("mistral", f"[TOOL_CALLS]f({LS})", "", [F]),
    ("mistral", "[TOOL_CALLS]f(cmd='ls')[TOOL_CALLS]now()", "", [F, NOW]),
    ("mistral", "[TOOL_CALLS]nobody(x=1)", "[TOOL_CALLS]nobody(x=1)", []),
    # Kimi K2: noise in the section, none in it, no mark before the arguments, a number alone for an id.
    ("kimi_k2", f"{KIMI[0]} so {KIMI[2]}functions.f:0{KIMI[3]}{LS}{KIMI[4]}{KIMI[1]}", "", [F]),
    ("kimi_k2", f"So{KIMI[0]}{KIMI[1]}Hi", "SoHi", []),
    ("kimi_k2", f"{KIMI[2]}functions.f:0\n{LS}{KIMI[4]}", "", [F]),
    ("kimi_k2", f'{KIMI[2]}0{KIMI[3]}{{"cmd": "ls", "n": 1}}{KIMI[4]}', "", [("f", '{"cmd": "ls", "n": 1}')]),
    ("kimi_k2", f"{KIMI[2]}0{KIMI[3]}{LS}{KIMI[4]}", f"{KIMI[2]}0{KIMI[3]}{LS}{KIMI[4]}", []),
    # Gemma 4: marks that are missing or doubled.
    ("gemma4", 'So\ncall:f{cmd:<|"|>ls<|"|>}', "So", [F]),
    ("gemma4", '<call>f{cmd:<|"|>ls<|"|>}', "", [F]),
    ("gemma4", '<|tool_call>:call:f{cmd:<|"|>ls<|"|>}', "", [F]),
    ("gemma4", '<|tool_call>f{cmd:<|"|>ls<|"|>}<tool_call|>', "", [F]),
    ("gemma4", f"<|tool_call>{OBJECT}<tool_call|>", "", [F]),
    ("gemma4", '<|tool_call>call:f{cmd:<|"|>ls<tool_call|>', "", [F]),
    (
        "gemma4",
        '<|tool_call>call:f{cmd:<|"|>a <tool_call|> b<|"|>}<tool_call|>',
        "",
        [("f", '{"cmd": "a <tool_call|> b"}')],
    ),
    ("gemma4", "I call:f once, and call:nobody{x:1}", "I call:f once, and call:nobody{x:1}", []),
    # DeepSeek: marks that are missing, misspelt or in another version's order.
    *(
        (name, f"{DS_ALL}{DS_CALL}{inner}{DS_CLOSE}{DS_END}", "", [F])
        for name in ("deepseek_v3", "deepseek_v31")
        for inner in (
            f"f{LS}",
            f"f\n{LS}",
            f"f\n```json\n{LS}\n```",
            f"function\nf\n```json\n{LS}\n```",
            f"functionf\n```json\n{LS}\n```",
            f"f{DS_SEP}```json\n{LS}\n```",
            f"function{DS_SEP}f{LS}",
            OBJECT,
        )
    ),
    ("deepseek_v3", f"{DS_ALL}{DS_CALL}now{DS_CLOSE}{DS_END}", "", [NOW]),
    ("deepseek_v3", f"{DS_CALL}nobody{LS}{DS_CLOSE}", f"{DS_CALL}nobody{LS}{DS_CLOSE}", []),
    ("deepseek_v31", f"{DS_ALL}f{DS_SEP}{LS}{DS_CLOSE}{DS_END}", "", [F]),
    *(
        ("deepseek_v3", f"{begin}function{DS_SEP}f\n```json\n{LS}\n```{DS_CLOSE}{DS_END}", "", [F])
        for begin in (
            "<｜tool▁calls｜>",
            "<｜tool_calls_begin｜>",
            "<｜tool calls begin｜>",
            "<｜tool\\_calls\\_begin｜>",
        )
    ),
]


@pytest.mark.parametrize("name", sorted({row[0] for row in ROWS}))
def test_forms(name: str) -> None:
    for _, text, content, calls in (row for row in ROWS if row[0] == name):
        check(name, None, text, (content, "", calls), tools=TOOLS)
        check(name, None, text, (content, "", calls), tools=TOOLS, buffer_calls=True)


@pytest.mark.parametrize("tool", ["python", "ipython", "code_interpreter"])
def test_code_for_an_interpreter(tool: str) -> None:
    tools = {**TOOLS, tool: {"type": "object", "properties": {"n": {"type": "integer"}, "code": TEXT}}}
    code = 'import os\nprint("a\\n")'
    check("llama3_json", None, TAG + code, ("", "", [(tool, json.dumps({"code": code}))]), tools=tools)
    check("llama3_json", None, f'{TAG}f(cmd="ls")', ("", "", [F]), tools=tools)


def test_a_name_that_may_not_be_called() -> None:
    for text in (tagged(OBJECT), tagged(OBJECT.replace('"f"', '"functions.f"'))):
        check("hermes", None, text, (text, "", []), tools={}, refused=("f",))


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "cmd": "'),
        ("llama3_json", '{"name": "f", "cmd": "'),
        ("hermes", '{"f": {'),
    ],
)
def test_arguments_beside_the_name_stream(name: str, begin: str) -> None:
    text = begin.replace('{"f": {', '<tool_call>{"f": {"cmd": "') + 100 * "word "
    events = run(parser(name, tools=TOOLS), list(text))
    assert sum(isinstance(event, ToolCallArguments) for event in events) > 400


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "qwen3_coder"])
def test_what_is_no_call_is_not_held_back(name: str) -> None:
    """A long answer in JSON goes out from its first key or name on."""
    for begin in ('{"title": "', '{"name": "Bob", "text": "', '```json\n{"title": "', "<function name="):
        made = parser(name, tools=TOOLS)
        made.push(begin)
        assert made.push(2000 * "x"), begin


@pytest.mark.parametrize("element", ["<a>", "<cmd>", "</cmd><cmd>", "<a{}>"])
def test_elements_that_never_end_are_read_in_time(element: str) -> None:
    """For each of them a search of all that follows would be quadratic."""
    text = "".join(element.format(number) for number in range(20_000))
    begun = time.process_time()
    run(parser("qwen3_coder", tools=TOOLS), [f"<tool_call>\n<function=f>\n{text}\n</function>\n</tool_call>"])
    assert time.process_time() - begun < 2
