"""Tool calls and reasoning out of text: every family, whole, character by character and in random pieces."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.parsers.base import (
    ContentDelta,
    Event,
    OutputParser,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from server.parsers.registry import REASONING_ALIASES, REASONING_PARSERS, TOOL_ALIASES, TOOL_PARSERS, detect
from tests.text import templates

Call = tuple[str, str]
Outcome = tuple[str, str, list[Call]]

DS_ALL, DS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
DS_CALL, DS_SEP, DS_CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def parser(tool: str | None, reasoning: str | None = None, **options: Any) -> OutputParser:
    ids = itertools.count()
    return OutputParser(
        TOOL_PARSERS[tool] if tool else None,
        REASONING_PARSERS[reasoning] if reasoning else None,
        make_id=lambda: f"id{next(ids)}",
        **options,
    )


def run(made: OutputParser, pieces: list[str]) -> list[Event]:
    events = [event for piece in pieces for event in made.push(piece)]
    return events + made.finish()


def outcome(events: list[Event]) -> Outcome:
    """Content, reasoning and calls, with the order of a call's events checked."""
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    calls: list[Call] = []
    ids: set[str] = set()
    for event in events:
        if isinstance(event, ToolCallStart):
            assert event.index == len(calls)
            assert event.id not in ids
            ids.add(event.id)
            calls.append((event.name, ""))
        elif isinstance(event, ToolCallArguments):
            assert event.index == len(calls) - 1
            assert event.text
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return content, reasoning, calls


def melt(events: list[Event]) -> list[tuple[str, int, str]]:
    """Events in order with neighbours of one kind joined."""
    found: list[tuple[str, int, str]] = []
    for event in events:
        if isinstance(event, ToolCallStart):
            found.append(("start", event.index, event.name))
            continue
        key = (type(event).__name__, event.index if isinstance(event, ToolCallArguments) else 0)
        if found and found[-1][:2] == key:
            found[-1] = (*key, found[-1][2] + event.text)
        else:
            found.append((*key, event.text))
    return found


def cuts(text: str, seed: int) -> list[str]:
    rng = random.Random(seed)
    places = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randrange(1, 12)))) if text else []
    return [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]


def check(tool: str | None, reasoning: str | None, text: str, expected: Outcome, **options: Any) -> None:
    """The expected outcome whatever the pieces are."""
    whole = run(parser(tool, reasoning, **options), [text])
    assert outcome(whole) == expected
    assert melt(run(parser(tool, reasoning, **options), list(text))) == melt(whole)
    for seed in range(5):
        assert melt(run(parser(tool, reasoning, **options), cuts(text, seed))) == melt(whole)


W = ("get_weather", '{"city": "Paris"}')
T = ("get_time", "{}")
WJ = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
WP = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
TRICKY = (
    '{"s": "a \\"}]</tool_call> \\u00e9 é😀 {[", "n": -1.5e-3, "l": [1, [], {}, null, true, false], "o": {"x": {}}}'
)
PRETTY = '{\n    "city": "Paris",\n    "days": 3\n}'


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def named(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "arguments": {arguments}}}'


# tool parser, text, content, calls
GOOD: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", "Hello there.", "Hello there.", []),
    ("hermes", "", "", []),
    ("hermes", " \n two  spaces \n", " \n two  spaces \n", []),
    ("hermes", hermes(WJ), "", [W]),
    ("hermes", hermes(WJ, named("get_time", "{}")), "", [W, T]),
    ("hermes", "Let me look.\n" + hermes(WJ), "Let me look.", [W]),
    ("hermes", "Let me look.\n\n" + hermes(WJ) + "\nDone.", "Let me look.\nDone.", [W]),
    ("hermes", f"<tool_call>{WJ}</tool_call>", "", [W]),
    ("hermes", f"<tool_call>{WJ}", "", [W]),
    ("hermes", f"<tool_call>\n{WJ}\n<tool_call>\n{WJ}\n</tool_call>", "", [W, W]),
    ("hermes", hermes(named("f", TRICKY)), "", [("f", TRICKY)]),
    ("hermes", hermes(named("f", PRETTY)), "", [("f", PRETTY)]),
    ("hermes", hermes('{"arguments": {"city": "Paris"}, "name": "get_weather"}'), "", [W]),
    ("hermes", hermes('{"name": "get_time"}'), "", [T]),
    ("hermes", hermes('{"name": "get_time", "arguments": null}'), "", [T]),
    ("hermes", hermes('{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}'), "", [W]),
    ("hermes", hermes('{"id": 7, "type": "function", ' + WJ[1:]), "", [W]),
    ("hermes", hermes(WJ[:-1] + ', "id": "x", "why": ["because"]}'), "", [W]),
    ("hermes", hermes(WP), "", [W]),
    ("hermes", hermes('{"type": "function", "function": ' + WJ + "}"), "", [W]),
    ("hermes", hermes(named("f", '{"a": "line\nbreak\tand tab"}')), "", [("f", '{"a": "line\\nbreak\\tand tab"}')]),
    ("hermes", "a < b <tool <tool_cal " + hermes(WJ), "a < b <tool <tool_cal", [W]),
    ("hermes", "a <tool_call", "a <tool_call", []),
    (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        "",
        [W],
    ),
    ("qwen3_coder", "ok\n<tool_call>\n<function=get_time>\n</function>\n</tool_call>", "ok", [T]),
    (
        "qwen3_coder",
        "<function=f>\n<parameter=n>\n3\n</parameter>\n"
        '<parameter=s>\n1 < 2\n"q"\n</parameter>\n<parameter=b>\nTrue\n</parameter>\n</function>',
        "",
        [("f", '{"n": 3, "s": "1 < 2\\n\\"q\\"", "b": true}')],
    ),
    ("qwen3_coder", "<tool_call>\n<function=get_time>\n</function>\n</tool_call>\n" * 2, "", [T, T]),
    ("llama3_json", WP, "", [W]),
    ("llama3_json", WJ, "", [W]),
    ("llama3_json", f"<|python_tag|>{WP}", "", [W]),
    ("llama3_json", f"Sure.<|python_tag|>{WP}", "Sure.", [W]),
    ("llama3_json", f"{WP}; {WP}", "", [W, W]),
    ("llama3_json", f"{WP}\n{WP}", "", [W, W]),
    ("llama3_json", f"{WP}, {WP}", "", [W, W]),
    ("llama3_json", '{"type": "function", "name": "get_time", "parameters": {}}', "", [T]),
    ("llama3_json", '{"function": "get_time", "parameters": {}}', "", [T]),
    ("llama3_json", f"\n {WP}\n", "", [W]),
    ("llama3_json", f"{WP} and more", " and more", [W]),
    ("llama3_json", "It is {nice}.", "It is {nice}.", []),
    ("pythonic", '[get_weather(city="Paris")]', "", [W]),
    ("pythonic", '[get_weather(city="Paris"), get_time()]', "", [W, T]),
    ("pythonic", "[get_weather(city='Paris')]", "", [W]),
    ("pythonic", "<|python_start|>[get_time()]<|python_end|>", "", [T]),
    ("pythonic", 'See:<|python_start|>[get_weather(city="Paris")]<|python_end|>', "See:", [W]),
    (
        "pythonic",
        "[f(a=1, b=-2.5, c=True, d=None, e=[1, 'x, )'], g={'k': (1, 2)}, h=true)]",
        "",
        [("f", '{"a": 1, "b": -2.5, "c": true, "d": null, "e": [1, "x, )"], "g": {"k": [1, 2]}, "h": true}')],
    ),
    ("pythonic", "[a.b(x='it\\'s é')]", "", [("a.b", '{"x": "it\'s é"}')]),
    ("pythonic", "[f( a = 1 , b = 2 , )]", "", [("f", '{"a": 1, "b": 2}')]),
    ("pythonic", "[1, 2, 3] is a list", "[1, 2, 3] is a list", []),
    ("pythonic", "[link](http://x)", "[link](http://x)", []),
    ("mistral", f"[TOOL_CALLS][{WJ}]", "", [W]),
    ("mistral", f"[TOOL_CALLS] [{WJ}, {WJ}]", "", [W, W]),
    ("mistral", f"Hm.[TOOL_CALLS] {WJ}", "Hm.", [W]),
    ("mistral", '[TOOL_CALLS]get_weather{"city": "Paris"}', "", [W]),
    ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", [W]),
    ("mistral", '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris"}', "", [W]),
    ("mistral_v11", '[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]get_time{}', "", [W, T]),
    ("mistral", '[TOOL_CALLS][{"name": "get_time", "arguments": {}, "id": "abcdefghi"}]', "", [T]),
    (
        "deepseek_v3",
        f'{DS_ALL}{DS_CALL}function{DS_SEP}get_weather\n```json\n{{"city": "Paris"}}\n```{DS_CLOSE}{DS_END}',
        "",
        [W],
    ),
    (
        "deepseek_v3",
        f"I look.{DS_ALL}"
        + "\n".join([f"{DS_CALL}function{DS_SEP}get_time\n```json\n{{}}\n```{DS_CLOSE}"] * 2)
        + DS_END,
        "I look.",
        [T, T],
    ),
    ("deepseek_v31", f'{DS_ALL}{DS_CALL}get_weather{DS_SEP}{{"city": "Paris"}}{DS_CLOSE}{DS_END}', "", [W]),
    ("deepseek_v31", f"{DS_ALL}" + f"{DS_CALL}get_time{DS_SEP}{{}}{DS_CLOSE}" * 3 + DS_END, "", [T, T, T]),
    ("deepseek_v31", f"{DS_CALL}get_time{DS_SEP}{{}}", "", [T]),
    (
        "harmony",
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        "",
        [W],
    ),
    ("harmony", "<|channel|>final<|message|>Hi!<|return|>", "Hi!", []),
    (
        "harmony",
        "<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_time<|message|>{}<|call|>",
        "I look.",
        [T],
    ),
    ("harmony", "<|start|>assistant to=functions.get_time<|channel|>commentary json<|message|>{}", "", [T]),
    ("harmony", "plain words", "plain words", []),
]


@pytest.mark.parametrize(("tool", "text", "content", "calls"), GOOD)
@pytest.mark.parametrize("buffer_calls", [False, True])
def test_outputs(tool: str, text: str, content: str, calls: list[Call], buffer_calls: bool) -> None:
    check(tool, None, text, (content, "", calls), buffer_calls=buffer_calls)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


# What is no call is content to the letter.
BAD: list[tuple[str, str]] = [
    ("hermes", "<tool_call>\nnot json\n</tool_call>"),
    ("hermes", "text\n<tool_call>\n{}\n</tool_call>\n"),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call> tail'),
    ("hermes", '<tool_call>{"name": "f'),
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call><tool_call></tool_call>"),
    ("hermes", "<tool_call>" + '{"function":' * 1500 + "</tool_call>"),
    ("qwen3_coder", "<tool_call>\n{}\n</tool_call>"),
    ("qwen3_coder", "<function=>x</function>"),
    ("qwen3_coder", "<function=two words>"),
    ("llama3_json", '{"answer": 42}'),
    ("llama3_json", '{"name": "Bob", "age": 3}'),
    ("llama3_json", '{"name": "Bob"'),
    ("llama3_json", "{"),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("pythonic", "[]"),
    ("pythonic", "[f(x)]"),
    ("pythonic", "[f(a=open('x'))]"),
    ("pythonic", "[f(a={1, 2})]"),
    ("pythonic", "[f(a=b'x')]"),
    ("pythonic", "[f(a=[1e999, None])]"),
    ("pythonic", "[f"),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS][]"),
    ("mistral", "[TOOL_CALLS] what?"),
    ("mistral", "[TOOL_CALLS]name"),
    ("deepseek_v3", f"{DS_ALL}nothing{DS_END}"),
    ("deepseek_v31", f"{DS_CALL}{'f' * 300}{DS_SEP}{{}}"),
]


@pytest.mark.parametrize(("tool", "text"), BAD)
@pytest.mark.parametrize("buffer_calls", [False, True])
def test_malformed_calls_are_content(tool: str, text: str, buffer_calls: bool) -> None:
    check(tool, None, text, (text, "", []), buffer_calls=buffer_calls)


# A call that has begun is one to its end, and what is wrong with it is the client's to mend.
BROKEN: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": tru', "", [("f", '{"a": tru')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b\\u00', "", [("f", '{"a": "b\\u00')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call>', "", [("f", '{"a": oops}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}}</tool_call> x', " x", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "", [("f", "[1]")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "no"}</tool_call>', "", [("f", '"no"')]),
    ("hermes", '<tool_call>{"name": "f"', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "argu', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f" "arguments": {}}</tool_call>', "", [("f", "{}")]),
    ("qwen3_coder", "<tool_call><function=f><parameter=x>never closed", "", [("f", '{"x": "never closed"}')]),
    ("pythonic", "[f(a=1, b=@)]", "", [("f", '{"a": 1, "b": "@"}')]),
    ("pythonic", "[f(a='never closed)]", "", [("f", '{"a": "never closed)]"}')]),
    ("mistral", "[TOOL_CALLS][" + WJ + ", oops]", "", [W]),
    ("deepseek_v3", f"{DS_ALL}{DS_CALL}function{DS_SEP}f\n{{}}{DS_CLOSE}", "", [("f", "{}")]),
    (
        "harmony",
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>no json",
        "",
        [("f", "no json")],
    ),
]


@pytest.mark.parametrize(("tool", "text", "content", "calls"), BROKEN)
@pytest.mark.parametrize("buffer_calls", [False, True])
def test_broken_calls(tool: str, text: str, content: str, calls: list[Call], buffer_calls: bool) -> None:
    check(tool, None, text, (content, "", calls), buffer_calls=buffer_calls)


REASONING: list[tuple[str | None, str, bool, str, Outcome]] = [
    (None, "qwen3", False, "<think>\nHm.\n</think>\n\nYes.", ("Yes.", "Hm.", [])),
    (None, "qwen3", False, "Yes.", ("Yes.", "", [])),
    (None, "qwen3", False, "<think>\n\n</think>\n\nYes.\n", ("Yes.\n", "", [])),
    (None, "qwen3", False, "<think>never done \n", ("", "never done \n", [])),
    (None, "qwen3", False, "<thin", ("<thin", "", [])),
    (None, "qwen3", False, " \n<think>a</think>b <think> c", ("b <think> c", "a", [])),
    (None, "deepseek_r1", True, "Hm.\n\nSo.\n</think>\n\nYes.", ("Yes.", "Hm.\n\nSo.", [])),
    (None, "deepseek_r1", True, "<think>\nHm.</think>Yes.", ("Yes.", "Hm.", [])),
    (None, "deepseek_r1", True, "no end </thin", ("", "no end </thin", [])),
    (None, "deepseek_r1", True, "</think>x", ("x", "", [])),
    (None, "mistral", False, "[THINK]a[/THINK]b", ("b", "a", [])),
    ("hermes", "qwen3", False, "<think>\nI need it.\n</think>\n\n" + hermes(WJ), ("", "I need it.", [W])),
    ("hermes", "qwen3", True, "I need it.</think>\nSure.\n" + hermes(WJ, WJ), ("Sure.", "I need it.", [W, W])),
    ("hermes", "qwen3", True, "maybe <tool_call> then</think>x", ("x", "maybe <tool_call> then", [])),
    ("llama3_json", "deepseek_r1", True, "a</think>" + WP, ("", "a", [W])),
    ("deepseek_v31", "deepseek_r1", False, f"{DS_ALL}{DS_CALL}get_time{DS_SEP}{{}}{DS_CLOSE}{DS_END}", ("", "", [T])),
    (
        "harmony",
        "harmony",
        False,
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>Hi.<|return|>",
        ("Hi.", "Think.", []),
    ),
    (
        "harmony",
        "harmony",
        False,
        "<|channel|>analysis<|message|>Think. <|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        ("", "Think.", [W]),
    ),
    (None, "harmony", False, "<|channel|>analysis<|message|>cut off ", ("", "cut off ", [])),
    (None, "harmony", False, "<|channel|>anal", ("", "", [])),
    ("harmony", "harmony", False, "<|channel|>analysis to=python<|message|>print(1)<|call|>", ("", "print(1)", [])),
]


@pytest.mark.parametrize(("tool", "reasoning", "inside", "text", "expected"), REASONING)
def test_reasoning(tool: str | None, reasoning: str, inside: bool, text: str, expected: Outcome) -> None:
    check(tool, reasoning, text, expected, start_inside=inside)


def test_calls_of_undeclared_names() -> None:
    """Calls all the same where nothing but a call begins so; else only the other case of a name is one."""
    tools: dict[str, Any] = {"get_time": {}}
    check("hermes", None, hermes(WJ), ("", "", [W]), tools=tools)
    check("hermes", None, hermes(WJ), (hermes(WJ), "", []), tools=tools, refused={"get_weather"})
    for name in ("x" * 257, "a\\nb", ""):
        check("hermes", None, hermes(named(name, "{}")), (hermes(named(name, "{}")), "", []), tools=tools)
    check("pythonic", None, "[Get_Time()]", ("", "", [("Get_Time", "{}")]), tools=tools)
    call = json.dumps({"name": "other", "parameters": {}})
    check("llama3_json", None, call, (call, "", []), tools=tools)
    check("hermes", None, hermes(named("get_time", "{}")), ("", "", [T]), tools=tools)
    check("pythonic", None, "[other()]", ("[other()]", "", []), tools=tools)


def test_types_of_bare_values_come_from_the_declaration() -> None:
    schema = {"properties": {"s": {"type": "string"}, "e": {"enum": ["1", "2"]}, "n": {"type": "integer"}}}
    text = "<tool_call><function=f>" + "".join(f"<parameter={key}>\n1\n</parameter>" for key in "sen") + "</function>"
    check("qwen3_coder", None, text, ("", "", [("f", '{"s": "1", "e": "1", "n": 1}')]), tools={"f": schema})


def test_arguments_stream_as_they_come() -> None:
    made = parser("hermes")
    assert made.push('<tool_call>\n{"name": "f", "argu') == []
    assert made.push('ments": {"text": "one ') == [
        ToolCallStart(0, "id0", "f"),
        ToolCallArguments(0, '{"text": "one '),
    ]
    assert made.push("two") == [ToolCallArguments(0, "two")]
    assert made.push('"}}\n</tool') == [ToolCallArguments(0, '"}')]
    assert made.push("_call>") == made.finish() == []
    assert made.num_calls == 1


def test_only_possible_markers_are_held_back() -> None:
    made = parser("hermes")
    assert made.push("a <") == [ContentDelta("a")]
    assert made.push("b") == [ContentDelta(" <b")]
    assert made.push(" c") == [ContentDelta(" c")]
    made = parser(None, "qwen3", start_inside=True)
    assert made.push("thinking </th") == [ReasoningDelta("thinking")]
    assert made.push("at") == [ReasoningDelta(" </that")]


def test_ids_are_in_the_shape_that_templates_want() -> None:
    for name, family in TOOL_PARSERS.items():
        first, second = family.make_id(), family.make_id()
        assert first != second
        if name.startswith("mistral"):
            assert len(first) == 9 and first.isalnum()
        else:
            assert first.startswith("call_")


# ---- properties

FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "<tool_call",
    "\n",
    " ",
    "{",
    "}",
    "[",
    "]",
    '"',
    ":",
    ",",
    "a",
    "é",
    "\\",
    "1",
    "-",
    "(",
    ")",
    "=",
    '"name"',
    '"arguments"',
    '"parameters"',
    '{"name": "f", "arguments": {',
    '"a": [1, 2.5, null]',
    "f",
    "f(a=1",
    WJ,
    WP,
    "<|python_tag|>",
    "<|python_start|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[f(",
    DS_ALL,
    DS_CALL,
    DS_SEP,
    DS_CLOSE,
    "```json",
    "```",
    "<|channel|>",
    "<|start|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "analysis",
    "final",
    "commentary to=functions.f ",
    "<think>",
    "</think>",
    "[THINK]",
    "[/THINK]",
    "<function=f>",
    "<parameter=a>",
    "</parameter>",
    "</function>",
    ";",
    "true",
    "nul",
    "\\u00e9",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=14).map("".join)
FAMILIES = st.sampled_from([*TOOL_PARSERS])
REASONINGS = st.sampled_from([None, *REASONING_PARSERS])


@settings(max_examples=300, deadline=None)
@given(TEXTS, FAMILIES, REASONINGS, st.booleans(), st.booleans(), st.data())
def test_pieces_change_nothing(
    text: str, tool: str, reasoning: str | None, inside: bool, buffer_calls: bool, data: st.DataObject
) -> None:
    options = {"start_inside": inside, "buffer_calls": buffer_calls}
    whole = melt(run(parser(tool, reasoning, **options), [text]))
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]
    assert melt(run(parser(tool, reasoning, **options), pieces)) == whole
    assert melt(run(parser(tool, reasoning, **options), list(text))) == whole


# Families whose arguments are passed on as they stand.
WRITTEN_AS_JSON = ("hermes", "llama3_json", "mistral", "mistral_v11", "deepseek_v3", "deepseek_v31")


@settings(max_examples=150, deadline=None)
@given(TEXTS, FAMILIES.filter(lambda name: name != "harmony"))
def test_no_text_is_lost(text: str, tool: str) -> None:
    """Without a call the content is the text; with one, content and arguments are found in the text in order."""
    content, _, calls = outcome(run(parser(tool, buffer_calls=True), [text]))
    if not calls:
        assert content == text
    for _, arguments in calls:
        try:
            whole = isinstance(json.loads(arguments), dict)
        except json.JSONDecodeError:
            whole = False
        # A call that breaks or ends in its middle: what the model wrote, for the client to repair.
        assert whole or arguments in text or tool not in WRITTEN_AS_JSON


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_arguments_come_through(value: object, ascii_only: bool, seed: int) -> None:
    arguments = json.dumps({"value": value}, ensure_ascii=ascii_only, indent=seed % 3 or None)
    texts = {
        "hermes": hermes(named("f", arguments)),
        "llama3_json": named("f", arguments),
        "mistral": f"[TOOL_CALLS]f{arguments}",
        "deepseek_v31": f"{DS_CALL}f{DS_SEP}{arguments}{DS_CLOSE}",
        "harmony": f"<|channel|>commentary to=functions.f<|message|>{arguments}<|call|>",
        "pythonic": f"[f(value={value!r})]",
    }
    for tool, text in texts.items():
        content, _, calls = outcome(run(parser(tool), cuts(text, seed)))
        assert content == "" and [name for name, _ in calls] == ["f"]
        assert json.loads(calls[0][1]) == {"value": value}


# ---- which parser

GPT_OSS = "{{ '<|start|>assistant<|channel|>' }}functions.{{ tool.name }}"
QWEN3 = templates.CHATML
DETECTED = {
    "chatml": (templates.CHATML, ("hermes", "qwen3")),
    "llama3": (templates.LLAMA3, ("llama3_json", None)),
    "mistral": (templates.MISTRAL, ("mistral", None)),
    "parts": (templates.PARTS, (None, None)),
    "gpt-oss": (GPT_OSS, ("harmony", "harmony")),
    "deepseek v3": ("<｜tool▁calls▁begin｜> ```json </think>", ("deepseek_v3", "deepseek_r1")),
    "deepseek v3.1": ("<｜tool▁calls▁begin｜> </think> thinking", ("deepseek_v31", "deepseek_r1")),
    "magistral": ("[THINK] [TOOL_CALLS] [ARGS]", ("mistral_v11", "mistral")),
    "qwen3 coder": ("<tool_call>\n<function=example>\n<parameter=x>", ("qwen3_coder", None)),
    "glm": ("<tool_call>{name}\n<arg_key> <think> enable_thinking", (None, "qwen3")),
    "llama 3.2": ("<|start_header_id|> [func_name1(params_name1=params_value1)]", ("pythonic", None)),
}


@pytest.mark.parametrize("name", DETECTED)
def test_detection(name: str) -> None:
    source, expected = DETECTED[name]
    assert detect(source) == expected


def test_names() -> None:
    assert set(TOOL_ALIASES.values()) <= set(TOOL_PARSERS)
    assert set(REASONING_ALIASES.values()) <= set(REASONING_PARSERS)


def test_the_prompt_tells_where_reasoning_starts() -> None:
    family = REASONING_PARSERS["qwen3"]
    assert family.follow("<|im_start|>assistant\n<think>\n") == "inside"
    assert family.follow("<|im_start|>assistant\n<think>\n\n</think>\n\n") == "over"
    assert family.follow("<|im_start|>assistant\n") == "none"
    assert family.follow("<think><|im_start|>assistant\n", 7) == "none"
    assert family.follow("text<think>", 5) == "inside"
    assert REASONING_PARSERS["harmony"].follow("<|start|>assistant") == "none"
