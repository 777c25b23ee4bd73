"""Fields of structured output and of tools: what is read, what is refused, and that forced calls can be read back."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from engine.request import RequestError
from engine.text.grammar.spec import GrammarSpec
from server.parsers.registry import TOOL_PARSERS
from server.protocol.body import Body
from server.protocol.structured_fields import FIELDS, read_grammar, with_calls
from server.protocol.tool_fields import ToolPlan, call_format, forced_calls, read_tools
from tests.server.test_parsers import melt, outcome, parser, run
from tests.text.grammars import compiler, walk

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
TAG = {"type": "const_string", "value": "x"}
OLD_TAG = {
    "type": "structural_tag",
    "triggers": ["<f"],
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
}

READ: list[tuple[dict[str, Any], tuple[str, str] | None]] = [
    ({}, None),
    ({"response_format": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, ("json_object", "")),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, ("json_schema", TEXT)),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        ("json_schema", TEXT),
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": None}}},
        ("json_schema", TEXT),
    ),
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, ("json_schema", TEXT)),
    (
        {"response_format": {"type": "structural_tag", "format": TAG}},
        ("structural_tag", '{"type":"const_string","value":"x"}'),
    ),
    ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", TEXT)),
    ({"structured_outputs": {"json": TEXT}}, ("json_schema", TEXT)),
    ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, ("choice", '["a","b"]')),
    ({"structured_outputs": {"grammar": "start: A"}}, ("grammar", "start: A")),
    ({"structured_outputs": {"json_object": True}}, ("json_object", "")),
    ({"structured_outputs": {"json_object": False, "regex": "a"}}, ("regex", "a")),
    (
        {"structured_outputs": {"structural_tag": json.dumps({"format": TAG})}},
        ("structural_tag", '{"type":"const_string","value":"x"}'),
    ),
    ({"guided_json": SCHEMA}, ("json_schema", TEXT)),
    ({"guided_json": TEXT, "guided_decoding_backend": "auto"}, ("json_schema", TEXT)),
    ({"guided_regex": "a"}, ("regex", "a")),
    ({"guided_choice": ["a"]}, ("choice", '["a"]')),
    ({"guided_grammar": "root ::= a"}, ("grammar", "root ::= a")),
    ({"guided_json_object": True}, ("json_object", "")),
    ({"guided_json_object": False}, None),
    ({"json_schema": TEXT}, ("json_schema", TEXT)),
    ({"regex": "a"}, ("regex", "a")),
    ({"ebnf": "root ::= a"}, ("grammar", "root ::= a")),
    ({"grammar": "root ::= a"}, ("grammar", "root ::= a")),
    ({"grammar": ""}, None),
    ({"grammar": "", "json_schema": TEXT}, ("json_schema", TEXT)),
]


@pytest.mark.parametrize(("fields", "expected"), READ)
def test_grammars_that_are_read(fields: dict[str, Any], expected: tuple[str, str] | None) -> None:
    spec = read_grammar(Body(fields))
    assert (spec and (spec.kind, spec.text)) == expected
    assert set(fields) <= FIELDS


def test_options_of_grammars() -> None:
    def read(**fields: Any) -> GrammarSpec:
        spec = read_grammar(Body(fields))
        assert spec is not None
        return spec

    def format(**more: Any) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, **more}}

    assert read(response_format=format(strict=True)).strict
    assert not read(response_format=format(strict=False)).strict
    assert not read(response_format=format()).strict
    assert read(structured_outputs={"json": SCHEMA}).strict
    assert not read(structured_outputs={"json": SCHEMA, "disable_any_whitespace": True}).any_whitespace
    assert read(structured_outputs={"json": SCHEMA, "whitespace_pattern": " ?"}).whitespace_pattern == " ?"
    assert read(guided_json=SCHEMA, guided_whitespace_pattern=" ").whitespace_pattern == " "
    spec = read(response_format=OLD_TAG)
    assert json.loads(spec.text)["type"] == "triggered_tags"
    compiler().compile(spec)


REFUSED_GRAMMARS: list[dict[str, Any]] = [
    {"response_format": "json"},
    {"response_format": []},
    {"response_format": {}},
    {"response_format": {"type": "yaml"}},
    {"response_format": {"type": 3}},
    {"response_format": {"type": ["text"]}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": 3}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": 3, "schema": {}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x" * 65, "schema": {}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": "{"}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "description": 3}}},
    {"response_format": {"type": "structural_tag"}},
    {"response_format": {"type": "structural_tag", "structures": 3}},
    {"response_format": {"type": "structural_tag", "structures": [3]}},
    {"structured_outputs": "json"},
    {"structured_outputs": {}},
    {"structured_outputs": {"json_object": False}},
    {"structured_outputs": {"json_object": "yes"}},
    {"structured_outputs": {"regex": "a", "choice": ["a"]}},
    {"structured_outputs": {"regex": ""}},
    {"structured_outputs": {"regex": 3}},
    {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"choice": "a"}},
    {"structured_outputs": {"choice": [1]}},
    {"structured_outputs": {"choice": [""]}},
    {"structured_outputs": {"json": 3}},
    {"structured_outputs": {"json": "[1]"}},
    {"structured_outputs": {"regex": "a", "whitespace_pattern": 3}},
    {"structured_outputs": {"regex": "a", "disable_any_whitespace": 3}},
    {"structured_outputs": {"structural_tag": "{"}},
    {"structured_outputs": {"structural_tag": {"x": 1}}},
    {"guided_json": SCHEMA, "guided_regex": "a"},
    {"guided_regex": "a", "response_format": {"type": "json_object"}},
    {"guided_json": SCHEMA, "guided_decoding_backend": "magic"},
    {"guided_json": SCHEMA, "guided_whitespace_pattern": 3},
    {"guided_json_object": "x"},
    {"ebnf": ["x"]},
    {"regex": {}},
    {"json_schema": "no"},
]


@pytest.mark.parametrize("fields", REFUSED_GRAMMARS)
def test_grammars_that_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as error:
        read_grammar(Body(fields))
    assert error.value.status == 400 and error.value.param


# ---- tools


def tool(name: Any = "f", parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def named(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


TWO = [tool("f", SCHEMA), tool("g")]
PLANS: list[tuple[dict[str, Any], tuple[str, str | None, bool, set[str]]]] = [
    ({}, ("none", None, True, set())),
    ({"tool_choice": "none"}, ("none", None, True, set())),
    ({"tool_choice": None, "tools": None, "parallel_tool_calls": False}, ("none", None, True, set())),
    ({"tools": TWO}, ("auto", None, True, {"f", "g"})),
    ({"tools": TWO, "tool_choice": "none"}, ("none", None, True, {"f", "g"})),
    ({"tools": TWO, "tool_choice": "auto", "parallel_tool_calls": False}, ("auto", None, False, {"f", "g"})),
    ({"tools": TWO, "tool_choice": "required"}, ("required", None, True, {"f", "g"})),
    ({"tools": TWO, "tool_choice": named("g")}, ("required", "g", False, {"g"})),
    ({"tools": TWO, "tool_choice": {"type": "function", "name": "g"}}, ("required", "g", False, {"g"})),
    ({"tools": TWO, "tool_choice": allowed("auto", "f")}, ("auto", None, True, {"f"})),
    ({"tools": TWO, "tool_choice": allowed("required", "f", "g")}, ("required", None, True, {"f", "g"})),
]


@pytest.mark.parametrize(("fields", "expected"), PLANS)
def test_tool_plans(fields: dict[str, Any], expected: tuple[str, str | None, bool, set[str]]) -> None:
    plan = read_tools(Body(fields))
    assert (plan.mode, plan.named, plan.parallel, set(plan.callable)) == expected
    assert plan.reads_calls == (expected[0] != "none")
    assert plan.is_forced == (expected[0] == "required")


REFUSED_TOOLS: list[dict[str, Any]] = [
    {"tools": [], "tool_choice": "required"},
    {"tools": {}},
    {"tools": "f"},
    {"tools": [3]},
    {"tools": [{}]},
    {"tools": [{"type": "retrieval"}], "tool_choice": "required"},
    {"tools": TWO, "tool_choice": {"type": "retrieval"}},
    {"tools": [{"type": "function"}]},
    {"tools": [{"type": "function", "function": 3}]},
    {"tools": [tool("")]},
    {"tools": [tool(None)]},
    {"tools": [tool("a b")]},
    {"tools": [tool("é")]},
    {"tools": [tool("x" * 129)]},
    {"tools": [tool("f"), tool("f")]},
    {"tools": [tool("f", [])]},
    {"tools": [tool("f", description=3)]},
    {"tools": [tool("f", strict="x")]},
    {"tools": [tool(f"f{index}") for index in range(1025)]},
    {"tool_choice": "required"},
    {"tool_choice": named("f")},
    {"tools": TWO, "tool_choice": "always"},
    {"tools": TWO, "tool_choice": 3},
    {"tools": TWO, "tool_choice": []},
    {"tools": TWO, "tool_choice": {}},
    {"tools": TWO, "tool_choice": {"type": "function"}},
    {"tools": TWO, "tool_choice": named(3)},
    {"tools": TWO, "tool_choice": named("h")},
    {"tools": TWO, "tool_choice": {"type": "custom", "custom": {"name": "f"}}},
    {"tools": TWO, "tool_choice": allowed("auto")},
    {"tools": TWO, "tool_choice": allowed("none", "f")},
    {"tools": TWO, "tool_choice": allowed("auto", "h")},
    {"tools": TWO, "tool_choice": {"type": "allowed_tools"}},
    {"tools": TWO, "parallel_tool_calls": "yes"},
]


@pytest.mark.parametrize("fields", REFUSED_TOOLS)
def test_tools_that_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as error:
        read_tools(Body(fields))
    assert error.value.status == 400 and error.value.param


# ---- forced calls

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "where": {"$ref": "#/$defs/where"},
        "alert": {"type": ["boolean", "null"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"where": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}},
}
OPTIONAL: dict[str, Any] = {
    "properties": {"x": {"type": "integer"}, "y": {"enum": ["a", 1]}},
    "additionalProperties": False,
}
TOOLS = [tool("get_weather", WEATHER, strict=True), tool("set-it", OPTIONAL), tool("now")]
SCHEMAS = {"get_weather": WEATHER, "set-it": {"type": "object", **OPTIONAL}, "now": {"type": "object"}}


# What ends free text in the formats that have any.
CLOSING = {
    "qwen3_coder": "\n</parameter>\n",
    "deepseek_v32": "</｜DSML｜parameter>\n",
    "deepseek_v4": "</｜DSML｜parameter>\n",
    "minimax_m2": "</parameter>\n",
    "minimax_m3": "]<]minimax[>[</city>",
    "seed_oss": "</parameter>\n",
    "gigachat35": "</｜GCML｜parameter>\n",
    "dots": "</parameter>\n",
    "minicpm5": "</param>",
    "muse_glimmer": "</atem:parameter>\n",
    "k2_horizon": "</ifm|arg_value>\n",
    "solar_open2": "<|tool_arg:end|>\n",
    "step3": "</steptml:parameter>\n",
    "glm45": "</arg_value>\n",
    "glm47": "</arg_value>",
    "hy_v3": "</arg_value>\n",
    "hy_v3_opensource": "</arg_value:opensource>\n",
    "kimi_k3": "<|close|>argument<|sep|>",
    "gemma4": '<|"|>',
    "functiongemma": "<escape>",
}


@pytest.mark.parametrize("name", TOOL_PARSERS)
@pytest.mark.parametrize("choice", ["required", named("get_weather"), named("set-it"), named("now")])
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_are_read_back(name: str, choice: Any, parallel: bool) -> None:
    """Whatever is sampled under a forced call's grammar is calls and nothing else, and their arguments are valid."""
    plan = read_tools(Body({"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": parallel}))
    spec = forced_calls(plan, TOOL_PARSERS[name])
    assert spec is not None
    grammar = compiler().compile(spec)
    most = 0
    for seed in range(12):
        closing = CLOSING.get(name, "").encode()
        text, _ = walk(grammar, random.Random(seed), force=seed % 2 == 0, closing=closing)
        events = run(parser(name, tools=plan.callable), [text])
        content, reasoning, calls = outcome(events)
        assert (content, reasoning) == ("", ""), text
        assert calls
        most = max(most, len(calls))
        for called, arguments in calls:
            assert called in plan.callable
            jsonschema.validate(json.loads(arguments), SCHEMAS[called])
        assert melt(run(parser(name, tools=plan.callable), list(text))) == melt(events)
    assert parallel or most == 1
    if isinstance(choice, dict):
        assert most == 1


def test_nothing_is_forced_where_the_model_may_choose() -> None:
    for choice in ("auto", "none"):
        assert forced_calls(read_tools(Body({"tools": TOOLS, "tool_choice": choice})), TOOL_PARSERS["hermes"]) is None
    assert forced_calls(ToolPlan(), TOOL_PARSERS["hermes"]) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"guided_json": SCHEMA},
        {"guided_choice": ["yes", "no"]},
        {"guided_regex": "[ab]{3}"},
        {"guided_grammar": 'start: "a" "b"'},
    ],
)
def test_a_structure_or_calls(fields: dict[str, Any]) -> None:
    plan = read_tools(Body({"tools": TOOLS[1:]}))
    spec = read_grammar(Body(fields))
    assert spec is not None
    grammar = compiler().compile(with_calls(spec, call_format(plan, TOOL_PARSERS["hermes"])))
    seen = set()
    for seed in range(30):
        content, _, calls = outcome(run(parser("hermes"), [walk(grammar, random.Random(seed))[0]]))
        assert bool(content) != bool(calls)
        seen.add(bool(calls))
    assert seen == {True, False}


def test_only_one_call_where_parallel_ones_are_not_wanted() -> None:
    text = '<tool_call>{"name": "f"}</tool_call>' * 3
    assert outcome(run(parser("hermes", max_calls=1), list(text))) == ("", "", [("f", "{}")])
    made = parser("hermes", max_calls=1)
    run(made, [text])
    assert made.num_calls == 1


@pytest.mark.parametrize("strict", [None, False, True])
@pytest.mark.parametrize("strict_answer", [False, True])
def test_each_schema_is_judged_by_itself(strict: bool | None, strict_answer: bool) -> None:
    """A tool that is not strict never makes a request fail; one that is names its keyword and place."""
    tags = {"type": "array", "items": {"type": "object"}, "uniqueItems": True}
    function = {"name": "f", "strict": strict, "parameters": {"type": "object", "properties": {"tags": tags}}}
    answer: dict[str, Any] = {"type": "json_object"}
    if strict_answer:
        answer = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"type": "object"}}}
    tools = [{"type": "function", "function": {"name": "g"}}, {"type": "function", "function": function}]
    body = Body({"tools": tools, "response_format": answer})
    plan, spec = read_tools(body), read_grammar(body)
    assert spec is not None
    joined = with_calls(spec, call_format(plan, TOOL_PARSERS["hermes"]))
    if strict:
        with pytest.raises(RequestError, match=r"`tools\[1\].function.parameters` .*`properties.tags.uniqueItems`"):
            compiler().compile(joined)
    else:
        assert any("uniqueItems" in warning for warning in compiler().compile(joined).warnings)
