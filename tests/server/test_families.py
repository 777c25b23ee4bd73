"""Calls as each family of models writes them: read whole and in pieces, whatever their arguments are, and back.

Every family has a writer of its own in call_writers.py, for the cases that all of them share.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.chat_template import ChatTemplate
from server.parsers.base import ContentDelta, ToolCallArguments, ToolCallStart
from server.parsers.registry import REASONING_PARSERS, TOOL_PARSERS
from tests.server.call_writers import (
    DSML,
    NS,
    WRITERS,
    Arguments,
    Calls,
)
from tests.server.dictate import CUTS, Cut, dictated
from tests.server.support import live, served_model
from tests.server.test_parsers import check, cuts, melt, outcome, parser, run

# Those of the families that other tests are about.
ELSEWHERE = {
    "hermes",
    "qwen3_coder",
    "llama3_json",
    "pythonic",
    "mistral",
    "mistral_v11",
    "deepseek_v3",
    "deepseek_v31",
}
NAMES = sorted(WRITERS)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "zip": {"$ref": "#/$defs/code"},
        "days": {"type": "integer"},
        "ratio": {"type": "number"},
        "deep": {"type": "boolean"},
        "note": {"type": ["string", "null"]},
        "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "where": {
            "type": "object",
            "properties": {"at": {"type": "array", "items": {"type": "number"}}, "name": {"type": "string"}},
        },
        "unit": {"enum": ["C", "F"]},
        "empty": {"type": "string"},
    },
    "$defs": {"code": {"type": "string"}},
}
TOOLS: dict[str, Any] = {"get_weather": SCHEMA, "now": {"type": "object", "properties": {}}}

ARGUMENTS: dict[str, Arguments] = {
    "one": {"city": "Paris"},
    "none": {},
    "types": {"city": "Paris", "days": 3, "ratio": -1.5, "deep": True, "limit": None, "unit": "F"},
    "text that looks like something else": {"city": "true", "zip": "01234"},
    "unicode": {"city": "São Paulo, 北京 😀"},
    "marks": {"city": 'a "b" <c> & {d} [e], f: g; `h` </x>'},
    "lines": {"city": "one\n  two\n\nthree"},
    "backslashes": {"city": "C:\\dir\\n and \\d+"},
    "nested": {"where": {"at": [1, 2.5], "name": "x, {y} [z]"}, "tags": ["a", "b, c"]},
    "an empty text": {"city": "x", "empty": ""},
}
TWO: Calls = [("get_weather", {"city": "Paris", "days": 3}), ("now", {})]


def read(name: str, text: str, **options: Any) -> tuple[str, str, Calls]:
    """What comes of a text, which must be the same however it is cut."""
    options = {"tools": TOOLS, **options}
    events = run(parser(name, **options), [text])
    assert melt(run(parser(name, **options), list(text))) == melt(events)
    for seed in range(4):
        assert melt(run(parser(name, **options), cuts(text, seed))) == melt(events)
    content, reasoning, calls = outcome(events)
    return content, reasoning, [(called, json.loads(arguments)) for called, arguments in calls]


def test_every_family_is_tried() -> None:
    assert set(WRITERS) | ELSEWHERE | {"harmony"} == set(TOOL_PARSERS)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_limit_leaves_of_a_second_call_is_no_content(name: str) -> None:
    text = WRITERS[name](TWO)
    begun = 0
    for end in range(len(text) // 2, len(text)):
        parse = parser(name, tools=TOOLS)
        content, reasoning, calls = outcome([*parse.push(text[:end]), *parse.finish(cut=True)])
        begun = max(begun, len(calls))
        # A call that has begun stays one.
        assert len(calls) == begun, text[:end]
        assert (content.strip() if calls else "", reasoning) == ("", ""), text[:end]
    assert begun == 2


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_arguments(name: str, case: str) -> None:
    given = ARGUMENTS[case]
    text = WRITERS[name]([("get_weather", given)])
    assert read(name, text) == ("", "", [("get_weather", given)])
    assert read(name, text, buffer_calls=True) == ("", "", [("get_weather", given)])


@pytest.mark.parametrize("name", NAMES)
def test_two_calls(name: str) -> None:
    assert read(name, WRITERS[name](TWO)) == ("", "", TWO)
    assert read(name, WRITERS[name]([TWO[0], TWO[0]])) == ("", "", [TWO[0], TWO[0]])


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"xlam"}))
def test_text_around(name: str) -> None:
    text = f"I look it up.\n\n{WRITERS[name](TWO)}"
    assert read(name, text) == ("I look it up.", "", TWO)
    content, _, calls = read(name, text + "\nDone.")
    assert (content.split(), calls) == (["I", "look", "it", "up.", "Done."], TWO)


@pytest.mark.parametrize("name", [name for name in NAMES if TOOL_PARSERS[name].marked])
def test_a_name_that_nobody_declared(name: str) -> None:
    call = ("other", {"city": "Paris", "n": 1})
    assert read(name, WRITERS[name]([call])) == ("", "", [call])
    assert read(name, WRITERS[name]([call]), tools=None) == ("", "", [call])


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_is_cut_off(name: str) -> None:
    """Whatever a limit leaves of a call: once its name is known it is one, and its arguments are a beginning."""
    text = WRITERS[name]([("get_weather", {"city": "Paris in the spring", "days": 31})])
    begun = 0
    last = ""
    for size in range(len(text)):
        made = parser(name, tools=TOOLS)
        events = [*made.push(text[:size]), *made.finish(cut=True)]
        content, _, calls = outcome(events)
        assert len(calls) <= 1
        if not calls:
            # Python that stops in a keyword may yet be anything.
            assert not begun or name in ("lfm2", "olmo3")
            continue
        begun += 1
        called, arguments = calls[0]
        assert (called, content.strip()) == ("get_weather", "")
        plain = arguments.replace(" ", "")
        if name in ("lfm2", "olmo3"):
            continue
        assert plain.startswith(last) or last.startswith(plain), (last, plain)
        last = max(last, plain, key=len)
    assert begun > 20


@pytest.mark.parametrize("name", NAMES)
def test_text_streams(name: str) -> None:
    """The text of an argument goes out before it is complete, where the format shows that it is one."""
    text = WRITERS[name]([("get_weather", {"city": "Paris in the spring"})])
    made = parser(name, tools=TOOLS)
    events = made.push(text[: text.index(" in the")])
    assert isinstance(events[0], ToolCallStart) and events[0].name == "get_weather"
    assert "".join(event.text for event in events[1:] if isinstance(event, ToolCallArguments)).endswith('"Paris')


@pytest.mark.parametrize("name", NAMES)
def test_long_values(name: str) -> None:
    """Text, white space and lists of some size, a character at a time, in time."""
    given = {"city": "x" * 4_000 + "\n" * 1_000 + "y", "tags": ["z"] * 300}
    made = parser(name, tools=TOOLS)
    events = run(made, list(WRITERS[name]([("get_weather", given)])))
    _, _, calls = outcome(events)
    assert [(called, json.loads(arguments)) for called, arguments in calls] == [("get_weather", given)]


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"xlam"}))
def test_only_marks_are_held_back(name: str) -> None:
    made = parser(name, tools=TOOLS)
    assert made.push("an answer, ") == [ContentDelta("an answer,")]
    assert made.push("plain as it is") == [ContentDelta(" plain as it is")]


# What is no call is content to the letter.
NO_CALLS = [
    ("glm45", "The tag <tool_call> is written as it is"),
    ("glm47", "<tool_call> {} </tool_call>"),
    ("minimax_m2", "<minimax:tool_call>\nnothing"),
    ("minimax_m2", 'It writes <invoke name="f"> then'),
    ("minimax_m3", f"{NS}<tool_call>\nnothing"),
    ("deepseek_v32", f"<{DSML}function_calls>\n</{DSML}function_calls>"),
    ("seed_oss", "<seed:tool_call>\n{}"),
    ("step3", "<｜tool_calls_begin｜>\n<｜tool_call_begin｜>code<｜tool_sep｜>"),
    ("kimi_k2", "<|tool_calls_section_begin|>nothing"),
    ("kimi_k2", "<|tool_call_begin|>no id at all<|tool_call_argument_begin|>{}"),
    ("kimi_k3", "<|open|>tools<|sep|>nothing"),
    ("gemma4", "<|tool_call>get_weather"),
    ("gemma4", "<|tool_call>call:f("),
    ("functiongemma", "<start_function_call>f"),
    ("lfm2", "<|tool_call_start|>nothing here"),
    ("lfm2", "<|tool_call_start|>"),
    ("olmo3", "<function_calls>\n</function_calls>"),
    ("granite", "<|tool_call|>text"),
    ("phi4_mini_json", "the functools module"),
    ("phi4_mini_json", "functools[1]"),
    ("hunyuan_a13b", "<tool_calls>[]</tool_calls>"),
    ("apertus", "<|tools_prefix|>[]"),
    ("apertus", '<|tools_prefix|>[{"f": 1}]'),
    ("xlam", '{"answer": 1}'),
    ("xlam", "[1, 2]"),
    ("xlam", "```json\n{}\n```"),
]


@pytest.mark.parametrize(("name", "text"), NO_CALLS)
def test_no_calls(name: str, text: str) -> None:
    assert read(name, text) == (text, "", [])


PARIS = ("get_weather", '{"city": "Paris"}')
# Slips: text, content and calls as they come out.
SLIPS: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    (
        "k2_horizon",
        "<ifm|tool_calls><ifm|tool_call>get_weather<ifm|arg_key>days</ifm|arg_key><ifm|arg_type>integer</ifm|arg_type>"
        "<ifm|arg_value>3</ifm|arg_value></ifm|tool_call></ifm|tool_calls>",
        "",
        [("get_weather", '{"days": 3}')],
    ),
    (
        "k2_horizon",
        '<ifm|tool_calls><ifm|tool_call>{"name": "now", "arguments": {}}</ifm|tool_call></ifm|tool_calls>',
        "",
        [("now", "{}")],
    ),
    (
        "minicpm5",
        '<function name="get_weather"><param name="city"><![CDATA[a\n</param> <b>]]></param></function>',
        "",
        [("get_weather", '{"city": "a\\n</param> <b>"}')],
    ),
    ("minicpm5", '<functionname="get_weather"><paramname="city">Paris</param></function>', "", [PARIS]),
    ("minicpm5", '<function  name="get_weather"><param  name="city">Paris</param></function>', "", [PARIS]),
    ("minicpm5", '<tool_call>\n<function name="now"></function>\n</tool_call>', "", [("now", "{}")]),
    (
        "minicpm5",
        '<function name="get_weather"><param name="city"><![CDATA[Paris]]>\n</param></function>',
        "",
        [PARIS],
    ),
    (
        "minicpm5",
        '<function name="get_weather"><param name="city"><![CDATA[Paris]]></function><function name="now"></function>',
        "",
        [PARIS, ("now", "{}")],
    ),
    (
        "minicpm5",
        '<function name="get_weather"><param name="city"><![CDATA[a]]]]><![CDATA[>b]]></param></function>',
        "",
        [("get_weather", '{"city": "a]]>b"}')],
    ),
    (
        "minicpm5",
        'In XML: <function name="foo">body</function> is how.',
        'In XML: <function name="foo">body</function> is how.',
        [],
    ),
    (
        "k2_horizon",
        "<ifm|tool_calls><ifm|tool_call>get_weather<ifm|arg_key>other</ifm|arg_key><ifm|arg_type>string</ifm|arg_type>"
        "<ifm|arg_value>12345</ifm|arg_value></ifm|tool_call></ifm|tool_calls>",
        "",
        [("get_weather", '{"other": "12345"}')],
    ),
    (
        "k2_horizon",
        "<ifm|tool_calls><ifm|tool_call>get_weather<ifm|arg_key>city</ifm|arg_key><ifm|arg_type>string"
        "<ifm|arg_value>Paris</ifm|arg_value></ifm|tool_call></ifm|tool_calls>",
        "",
        [PARIS],
    ),
    ("solar_open2", "<|tool_call:start|>now<|tool_call:end|>", "", [("now", "{}")]),
    (
        "solar_open2",
        "<|tool_call:start|>get_weather<|tool_arg:start|>city<|tool_arg:value|>Paris<|tool_arg:end|><|tool_call:end|>",
        "",
        [PARIS],
    ),
    ("gigachat3", 'Hi.<|function_call|>{"name": "now", "arguments": {}}', "Hi.", [("now", "{}")]),
    (
        "gigachat3",
        'Hi.<|message_sep|>\n\nfunction call<|role_sep|>\n{"name": "now", "arguments": {}}',
        "Hi.",
        [("now", "{}")],
    ),
    # Missing ends of values and calls.
    ("glm45", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris\n</tool_call>", "", [PARIS]),
    ("glm45", "<tool_call>get_weather\n<arg_key>city<arg_value>Paris</arg_value></tool_call>", "", [PARIS]),
    (
        "glm47",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris<tool_call>now</tool_call>",
        "",
        [PARIS, ("now", "{}")],
    ),
    ("glm47", "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris", "", [PARIS]),
    ("minimax_m2", '<minimax:tool_call><invoke name="get_weather"><parameter name="city">Paris</invoke>', "", [PARIS]),
    (
        "minimax_m2",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris\n<invoke name="now">\n'
        "</minimax:tool_call>",
        "",
        [PARIS, ("now", "{}")],
    ),
    (
        "minimax_m2",
        '<minimax:tool_call><invoke name="get_weather"><parameter name="city">Paris</parameter></invoke>\nDone.',
        "\nDone.",
        [PARIS],
    ),
    (
        "minimax_m2",
        "<minimax:tool_call><invoke name='get_weather'></invoke></minimax:tool_call>",
        "",
        [("get_weather", "{}")],
    ),
    # Tags in a text.
    (
        "minimax_m2",
        '<minimax:tool_call><invoke name="get_weather"><parameter name="city">'
        "the </invoke> tag, </minimax:tool_call> too"
        "</parameter></invoke></minimax:tool_call>",
        "",
        [("get_weather", '{"city": "the </invoke> tag, </minimax:tool_call> too"}')],
    ),
    (
        "glm47",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>a <tool_call> of it, </tool_call> too</arg_value>"
        "</tool_call>",
        "",
        [("get_weather", '{"city": "a <tool_call> of it, </tool_call> too"}')],
    ),
    # Arguments as JSON in place of parameters.
    (
        "deepseek_v32",
        f'<{DSML}function_calls><{DSML}invoke name="get_weather">{{"city": "Paris"}}</{DSML}invoke>'
        f"</{DSML}function_calls>",
        "",
        [PARIS],
    ),
    # What a parameter says of itself, against what the tool does.
    (
        "deepseek_v4",
        f'<{DSML}tool_calls><{DSML}invoke name="get_weather">'
        f'<{DSML}parameter name="days" string="true">3</{DSML}parameter>'
        f'<{DSML}parameter name="city" string="false">7</{DSML}parameter></{DSML}invoke></{DSML}tool_calls>',
        "",
        [("get_weather", '{"days": 3, "city": "7"}')],
    ),
    (
        "seed_oss",
        "<seed:tool_call><function=get_weather><parameter=city>Paris</function></seed:tool_call>",
        "",
        [PARIS],
    ),
    ("seed_oss", "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n", "", [PARIS]),
    (
        "minimax_m3",
        f'{NS}<tool_call>{NS}<invoke name="get_weather">{NS}<city>Paris{NS}</invoke>{NS}</tool_call>',
        "",
        [PARIS],
    ),
    (
        "minimax_m3",
        f'{NS}<tool_call>{NS}<invoke name="get_weather">{NS}<tags>["a", "b"]{NS}</tags>{NS}</invoke>{NS}</tool_call>',
        "",
        [("get_weather", '{"tags": ["a", "b"]}')],
    ),
    ("kimi_k2", '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Paris"}', "", [PARIS]),
    (
        "kimi_k2",
        '<|tool_call_begin|>get_weather<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>',
        "",
        [PARIS],
    ),
    (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|><|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "",
        [("now", "{}")],
    ),
    (
        "kimi_k2",
        "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{oops<|tool_call_end|><|tool_calls_section_end|>",
        "",
        [("now", "{oops")],
    ),
    ("gemma4", '<|tool_call>call:get_weather{city:<|"|>Paris<|"|><tool_call|>', "", [PARIS]),
    ("gemma4", '<|tool_call>call:get_weather{city:<|"|>Paris', "", [PARIS]),
    ("gemma4", '<|tool_call>call:get_weather{"city": "Paris"}<tool_call|>', "", [PARIS]),
    ("gemma4", "<|tool_call>call:get_weather{city:Paris}<tool_call|>", "", [PARIS]),
    (
        "gemma4",
        '<|tool_call>call:get_weather{<|"|>city<|"|>: <|"|>Paris<|"|>}<tool_call|><|tool_response>',
        "",
        [PARIS],
    ),
    (
        "functiongemma",
        "<start_function_call>call:get_weather{days:<escape>3<escape>}",
        "",
        [("get_weather", '{"days": 3}')],
    ),
    ("lfm2", "<|tool_call_start|>[get_weather(city='Paris')", "", [PARIS]),
    (
        "lfm2",
        '<|tool_call_start|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|tool_call_end|>',
        "",
        [PARIS],
    ),
    ("olmo3", "<function_calls>get_weather(city='Paris')", "", [PARIS]),
    (
        "olmo3",
        "<function_calls>\nget_weather(deep=true, limit=null)\n</function_calls>",
        "",
        [("get_weather", '{"deep": true, "limit": null}')],
    ),
    ("granite", '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
    ("phi4_mini_json", 'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}', "", [PARIS]),
    ("apertus", '<|tools_prefix|>[{"get_weather": {"city": "Paris"}}', "", [PARIS]),
    ("xlam", '```json\n[{"name": "get_weather", "arguments": {"city": "Paris"}}]\n```', "", [PARIS]),
    # Its mark is a word of any text.
    ("command_r", "Action: go home.\nAction:\n```json\n[1]\n```", "Action: go home.\nAction:\n```json\n[1]\n```", []),
    ("command_r", 'Action:\n[{"tool_name": "get_weather", "parameters": {"city": "Paris"}}]', "", [PARIS]),
    ("command_r", 'Action: ```\n{"tool_name": "now"}', 'Action: ```\n{"tool_name": "now"}', []),
    (
        "command_r",
        'Plan.\nAction:```json\n[\n    {\n        "tool_name": "get_weather",\n'
        '        "parameters": {"city": "Paris"}\n    }\n]```',
        "Plan.",
        [PARIS],
    ),
    (
        "cohere_command3",
        "<|START_RESPONSE|>Wait.<|END_RESPONSE|><|START_ACTION|>[\n"
        '    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}}\n]<|END_ACTION|>',
        "Wait.",
        [PARIS],
    ),
    (
        "kimi_k3",
        '<|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|><|open|>argument key="a&amp;b" type="number"<|sep|>1'
        "<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>",
        "",
        [("f", '{"a&b": 1}')],
    ),
    (
        "kimi_k3",
        "<|open|>response<|sep|>Wait.<|close|>response<|sep|><|open|>tools<|sep|>"
        '<|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" type="string"<|sep|>Paris'
        "<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|><|end_of_msg|>",
        "Wait.",
        [PARIS],
    ),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), SLIPS)
def test_slips(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    check(name, None, text, (content, "", calls), tools=TOOLS)


# ---- reasoning

# Reasoning, tools, whether the prompt has opened it, text, and content, reasoning and calls of it.
THOUGHTS: list[tuple[str, str | None, bool, str, tuple[str, str, list[tuple[str, str]]]]] = [
    ("gemma4", None, False, "<|channel>thought\nHm.\n<channel|>Yes.", ("Yes.", "Hm.", [])),
    ("gemma4", None, False, "<|channel>Hm.<channel|>Yes.", ("Yes.", "Hm.", [])),
    ("gemma4", None, False, "Yes, <|channel|> is no mark.", ("Yes, <|channel|> is no mark.", "", [])),
    (
        "gemma4",
        "gemma4",
        False,
        '<|channel>thought\nHm.<channel|><|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>',
        ("", "Hm.", [PARIS]),
    ),
    ("seed_oss", None, False, "<seed:think>Hm.</seed:think>Yes.", ("Yes.", "Hm.", [])),
    (
        "seed_oss",
        "seed_oss",
        False,
        "<seed:think>Hm.</seed:think>\n<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
        ("", "Hm.", [("now", "{}")]),
    ),
    (
        "minimax_m3",
        "minimax_m3",
        True,
        f'Hm.</mm:think>{NS}<tool_call>\n{NS}<invoke name="now">{NS}</invoke>\n{NS}</tool_call>',
        ("", "Hm.", [("now", "{}")]),
    ),
    ("minimax_m3", "minimax_m3", False, "</mm:think>Yes.", ("Yes.", "", [])),
    ("cohere_command3", None, True, "Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>", ("Yes.", "Hm.", [])),
    ("cohere_command3", None, True, "Hm.<|END_THINKING|><|START_TEXT|>Yes.<|END_TEXT|>", ("Yes.", "Hm.", [])),
    ("solar_open", None, False, "<|think|>Hm.<|end|><|begin|>assistant<|content|>Yes.<|flush|>", ("Yes.", "Hm.", [])),
    (
        "solar_open",
        "solar_open",
        True,
        "Hm.<|end|><|begin|>assistant<|content|>Yes.<|end|><|begin|>assistant<|tool_calls|><|tool_call:begin|>0"
        "<|tool_call:name|>now<|tool_call:args|>{}<|tool_call:end|><|calls|>",
        ("Yes.", "Hm.", [("now", "{}")]),
    ),
    ("solar_open2", "solar_open2", True, "Hm.<|think:end|>Yes.", ("Yes.", "Hm.", [])),
    ("k2_horizon", None, False, "<ifm|think_fast>Hm.</ifm|think_fast>\nYes.", ("Yes.", "Hm.", [])),
    (
        "muse_glimmer",
        "muse_glimmer",
        False,
        " to=self<|message|>Hm <atem:invoke>.<|eom|><|start|>assistant to=user<|message|>Yes.<|eom|><|start|>assistant"
        ' to=now<|message|><atem:function_calls>\n<atem:invoke name="now.now">\n</atem:invoke>\n'
        "</atem:function_calls><|eot|>",
        ("Yes.", "Hm <atem:invoke>.", [("now", "{}")]),
    ),
    ("muse_glimmer", None, True, "Hm.<|eom|><|start|>assistant to=user<|message|>Yes.<|eot|>", ("Yes.", "Hm.", [])),
    ("muse_glimmer", None, False, "Yes, to=self is plain.", ("Yes, to=self is plain.", "", [])),
    (
        "muse_glimmer",
        "muse_glimmer",
        False,
        " to=user<|message|>The mark <|start|> begins a message, `</atem:function_calls>` ends calls.",
        ("The mark <|start|> begins a message, `</atem:function_calls>` ends calls.", "", []),
    ),
    ("apertus", None, False, "<|inner_prefix|>Hm.<|inner_suffix|>Yes.", ("Yes.", "Hm.", [])),
    ("granite", None, False, "Here is my thought process: Hm. Here is my response: Yes.", ("Yes.", "Hm.", [])),
    ("granite", None, False, "Here's my thought process:\nHm.\n\nHere's my response:\nYes.", ("Yes.", "Hm.", [])),
    ("granite", None, False, "Here is my answer.", ("Here is my answer.", "", [])),
    ("granite_think", None, False, "<think>Hm.</think><response>Yes.</response>", ("Yes.", "Hm.", [])),
    ("ernie45", "hermes", True, "Hm.\n</think>\n\n<response>\nYes.</response>", ("Yes.", "Hm.", [])),
    (
        "ernie45",
        "hermes",
        True,
        'Hm.</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n',
        ("", "Hm.", [("now", "{}")]),
    ),
    ("hy_v3_opensource", None, False, "<think:opensource>Hm.</think:opensource>Yes.", ("Yes.", "Hm.", [])),
    ("hunyuan_a13b", None, False, "<think>\nHm.\n</think>\n<answer>\nYes.</answer>", ("Yes.", "Hm.", [])),
    ("hunyuan_a13b", "hunyuan_a13b", False, "<think>\n\n</think>\n<answer>\nYes.</answer>", ("Yes.", "", [])),
    (
        "kimi_k3",
        "kimi_k3",
        True,
        "Hm.<|close|>think<|sep|><|open|>response<|sep|>Yes.<|close|>response<|sep|><|open|>tools<|sep|>"
        '<|open|>call tool="now" index="1"<|sep|><|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|>',
        ("Yes.", "Hm.", [("now", "{}")]),
    ),
    ("minimax_m2_append_think", None, True, "Hm.\n</think>\n\nYes.", ("<think>Hm.\n</think>\n\nYes.", "", [])),
    ("minimax_m2_append_think", None, False, "Yes.", ("Yes.", "", [])),
]


@pytest.mark.parametrize(("reasoning", "tool", "inside", "text", "expected"), THOUGHTS)
def test_thoughts(reasoning: str, tool: str | None, inside: bool, text: str, expected: Any) -> None:
    check(tool, reasoning, text, expected, start_inside=inside, tools=TOOLS)


def test_every_reasoning_is_tried() -> None:
    assert {name for name, *_ in THOUGHTS} | {"qwen3", "deepseek_r1", "mistral", "harmony"} == set(REASONING_PARSERS)


# ---- properties

FRAGMENTS = [
    *sorted({mark for name in NAMES for mark in TOOL_PARSERS[name].markers}),
    *sorted({mark for family in REASONING_PARSERS.values() for mark in family.markers}),
    *("get_weather", "now", "call:", "function", "functools", "{", "}", "[", "]", "(", ")", ",", ":", "=", '"', "'"),
    *("city", "days", "tags", "item", "Paris", "3", "null", "tru", "\n", " ", "é", "\\", "<", ">", "/", "```", "json"),
    *(
        '<invoke name="now">',
        '<parameter name="city">',
        "</parameter>",
        "</invoke>",
        "<function=now>",
        "<parameter=days>",
    ),
    *(f'<{DSML}invoke name="now">', f'<{DSML}parameter name="city" string="true">', f"</{DSML}invoke>"),
    *(
        '<steptml:invoke name="now">',
        '<steptml:parameter name="tags">',
        "call tool=",
        "argument key=",
        "tools",
        "response",
    ),
    *(f"{NS}<tool_call>", f'{NS}<invoke name="now">', f"{NS}<tags>", f"{NS}<item>", f"{NS}</item>", f"{NS}</invoke>"),
    *("functions.now:0", '{"name": "now", "arguments": {', '{"now": {', "now(", "city='x'", "Here is my response:"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=16).map("".join)


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.sampled_from(NAMES), st.sampled_from([None, *REASONING_PARSERS]), st.booleans(), st.booleans())
def test_pieces_change_nothing(text: str, name: str, reasoning: str | None, inside: bool, cut: bool) -> None:
    """Whatever a model writes, in whatever pieces: the same comes out, and no call is without a name."""

    def read_in(pieces: list[str]) -> list[tuple[str, int, str]]:
        made = parser(name, reasoning, start_inside=inside, tools=TOOLS)
        events = [event for piece in pieces for event in made.push(piece)]
        events += made.finish(cut=cut)
        outcome(events)
        return melt(events)

    whole = read_in([text])
    assert read_in(list(text)) == whole
    for seed in range(3):
        assert read_in(cuts(text, seed)) == whole


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from(NAMES).filter(lambda name: name != "muse_glimmer"))  # it frames its content, too
def test_text_without_calls_is_content(text: str, name: str) -> None:
    content, _, calls = outcome(run(parser(name, tools=TOOLS), [text]))
    wrap = TOOL_PARSERS[name].wrap
    if not calls and not any(mark in text for mark in (*wrap, "_response")):
        assert content == text


NO_JSON = {"minimax_m3", "gemma4", "functiongemma", "lfm2", "olmo3"}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(st.characters(codec="utf-8"), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30), st.sampled_from(NAMES))
def test_any_text_comes_through(value: str, name: str) -> None:
    """Text that holds no mark of the format is itself in the arguments."""
    if any(mark in value for mark in ("<", NS)):
        return
    _, _, calls = outcome(run(parser(name, tools=TOOLS), [WRITERS[name]([("get_weather", {"city": value})])]))
    assert [(called, json.loads(arguments)) for called, arguments in calls] == [("get_weather", {"city": value})]


@settings(max_examples=200, deadline=None)
@given(JSON_VALUES, st.sampled_from(sorted(set(NAMES) - NO_JSON)))
def test_any_value_comes_through(value: Any, name: str) -> None:
    """Lists and objects are JSON in most formats, and any of them is itself in the arguments."""
    if not isinstance(value, list | dict) or "<" in json.dumps(value):
        return
    schema = {"properties": {"v": {"type": ["array", "object"]}}}
    text = WRITERS[name]([("f", {"v": value})])
    _, _, calls = outcome(run(parser(name, tools={"f": schema}), cuts(text, 1)))
    assert [(called, json.loads(arguments)) for called, arguments in calls] == [("f", {"v": value})]


# ---- ids


def test_ids_that_the_model_writes() -> None:
    """They go back into the conversation as they came, and are told apart where the model repeats itself."""
    text = "".join(
        f"<|tool_call_begin|>{written}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        for written in ("functions.now:3", "now:4", "functions.now:3", "now")
    )
    events = run(parser("kimi_k2"), [text])
    ids = [event.id for event in events if isinstance(event, ToolCallStart)]
    assert ids == ["functions.now:3", "functions.now:4", "id0", "id1"]


# ---- through the whole server

WEATHER = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in TOOLS.items()]
SAID = {"city": "São Paulo", "days": 3}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", NAMES)
async def test_calls_through_the_server(name: str, cut: Cut) -> None:
    text = WRITERS[name]([("get_weather", SAID), ("now", {})])
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": WEATHER, "max_tokens": 480}
    model = served_model(chat_template=ChatTemplate({"default": "{{ messages[0].content }}"}, {}))
    async with live(model=model, tool_call_parser=name, reasoning_parser="none") as server:
        with dictated(server, text, cut=cut):
            status, whole = await server.post("/v1/chat/completions", body)
            events = await server.events("/v1/chat/completions", body)
    assert status == 200, whole
    choice = whole["choices"][0]
    found = [call["function"] for call in choice["message"]["tool_calls"]]
    assert [(call["name"], json.loads(call["arguments"])) for call in found] == [("get_weather", SAID), ("now", {})]
    assert choice["finish_reason"] == "tool_calls"
    pieces = ["", ""]
    for event in events:
        for call in event["choices"][0]["delta"].get("tool_calls", ()) if event != "[DONE]" else ():
            pieces[call["index"]] += call["function"].get("arguments", "")
    assert [json.loads(piece) for piece in pieces] == [SAID, {}]
