"""Rows of malformed fields that several routes share, and what a row is. See bad_requests.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from tests.server.support import tokenizer

VOCAB = tokenizer().vocab_size
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
LARK = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}


class All(NamedTuple):
    """A row's value that is several fields."""

    fields: dict[str, Any]


# The field that the error names, and its value. "a[0].b" and "a.b" are places in the value of `a`.
Row = tuple[str | None, Any]


def check_shape(status: int, body: Any, expected: int = 400) -> dict[str, Any]:
    """The error object of an answer that must be one, in OpenAI's shape."""
    assert status == expected, body
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert error["type"] in ("invalid_request_error", "authentication_error", "rate_limit_error", "server_error")
    for leak in ("Traceback", str(Path(__file__).resolve().parents[2]), "site-packages", "0x", ".py"):
        assert leak not in error["message"]
    return error  # type: ignore[no-any-return]


def check_anthropic(status: int, body: Any, expected: int = 400) -> dict[str, Any]:
    assert status == expected, body
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error" and body["request_id"]
    assert set(body["error"]) == {"type", "message"} and body["error"]["type"].endswith(("_error", "_too_large"))
    return body["error"]  # type: ignore[no-any-return]


def check_ollama(status: int, body: Any, expected: int = 400) -> dict[str, Any]:
    assert status == expected, body
    assert set(body) == {"error"} and isinstance(body["error"], str)
    return {"message": body["error"]}


def check_tei(status: int, body: Any, expected: int = 400) -> dict[str, Any]:
    assert status == expected, body
    assert set(body) == {"error", "error_type"} and all(isinstance(each, str) for each in body.values())
    return {"message": body["error"]}


@dataclasses.dataclass(frozen=True)
class Family:
    """good: a body that is answered with a 200, into which each row puts its value.

    check: (status, body, expected status) -> the error's `message`, and its `param` where the shape has one; where it
    has none the message names the field. any_type: its content type may be any.
    """

    path: str
    good: dict[str, Any]
    rows: list[Row]
    check: Any = check_shape
    any_type: bool = False

    def body(self, row: Row) -> dict[str, Any]:
        name, value = row
        if isinstance(value, All):
            return {**self.good, **value.fields}
        assert name is not None
        return {**self.good, name.replace("[", ".").split(".")[0]: value}


def nested(depth: int, inner: Any = 1) -> Any:
    """Lists in lists."""
    for _ in range(depth):
        inner = [inner]
    return inner


def deep_schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def function(**fields: Any) -> dict[str, Any]:
    """A tool; `f` unless the fields say otherwise."""
    return {"type": "function", "function": {"name": "f", **fields}}


def message(role: str = "user", content: Any = "hi", **fields: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content, **fields}]


def json_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


NO_LIST_OF_IDS: list[Any] = ["x", {"a": 1}, 5.5, True, [[3]], ["3"], [3.5], [None], [True], [-1], [VOCAB], [2**63]]

# Schemas that nobody can be held to, under each of the names that take one.
BAD_SCHEMAS: list[Any] = [
    5,
    [],
    True,
    "{",
    "[]",
    "5",
    {"type": "nothing"},
    {"type": 5},
    {"type": ["string", "nothing"]},
    {"properties": 5},
    {"type": "object", "properties": {"a": 5}},
    {"$ref": "#/$defs/none"},
    {"$ref": "#/$defs/missing"},
    {"$ref": 5},
    {"$ref": "#/a/0/b"},
    {"items": {"$ref": "#nothing"}},
    {"$dynamicRef": ["#"]},
    {"type": "string", "enum": []},
    {"type": "integer", "minimum": 5, "maximum": 1},
    {"type": "string", "minLength": 5, "maxLength": 1},
    {"type": "array", "minItems": -1},
    {"type": "string", "pattern": 5},
    deep_schema(100),
    {"type": "object", "properties": {"a": json.loads("[" * 80 + "]" * 80)}},
    {"allOf": [{"type": "string", "pattern": f"{letter}.*"} for letter in "abcdefghijkl"]},
    {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(5001)}},
    {"type": "string", "const": "x" * 300_000},
]
BAD_REGEXES: list[Any] = [
    5, "", ["a"], {"a": 1}, True, "(", ")", "[", "a{2,1}", "*", "a**b(", "(?P<", "\\", "(?=a)b", "(?!a)b", "(?<=a)b",
    "(a)\\1", "[z-a]", "\\p{NoSuchClass}", "(?P<n>a)(?P=n)", "a" * 70_000,
]  # fmt: skip
BAD_GRAMMARS: list[Any] = [
    5, "", ["start: \"a\""], {"start": "a"}, True, "start: nothing", "start: \"a", "nothing: \"a\"",
    "start: /(/", "start: /(?=a)b/", "start: \"a\" start: \"b\"", "%import nothing.NOTHING\nstart: NOTHING",
    "root ::= nothing", "root ::= \"a", "root ::= [z-a]", "no grammar at all", "start: " + "\"a\" " * 20_000,
    "\n".join(f"r{index} ::= \"a\"" for index in range(600)),
]  # fmt: skip
BAD_CHOICES: list[Any] = [5, "a", [], [""], ["a", ""], [5], [None], [["a"]], {"a": 1}, True, ["a"] * 8193]
ANY = {"type": "any_text"}
BAD_TAGS: list[Any] = [
    5,
    "{",
    "[]",
    [],
    {},
    {"format": 5},
    {"format": {}},
    {"format": {"type": "nothing"}},
    {"format": {"type": "tag"}},
    {"format": {"type": "tag", "begin": 5, "content": ANY, "end": "x"}},
    {"format": {"type": "tag", "begin": "a", "content": None, "end": "x"}},
    {"format": {"type": "tag", "begin": "a", "content": ANY, "end": 5}},
    {"format": {"type": "sequence", "elements": []}},
    {"format": {"type": "sequence", "elements": 5}},
    {"format": {"type": "or", "elements": [5]}},
    {"format": {"type": "const_string"}},
    {"format": {"type": "regex", "pattern": ""}},
    {"format": {"type": "regex", "pattern": "("}},
    {"format": {"type": "grammar", "grammar": "start: nothing"}},
    {"format": {"type": "json_schema", "json_schema": 5}},
    {"format": {"type": "json_schema", "json_schema": {"$ref": "http://127.0.0.1/x"}}},
    {"format": {"type": "triggered_tags", "triggers": [], "tags": []}},
    {"format": {"type": "triggered_tags", "triggers": ["<"], "tags": [{"begin": "x", "content": ANY, "end": ""}]}},
    {"format": {"type": "tags_with_separator", "separator": 5, "tags": []}},
    {"structures": [{"begin": "<a>", "schema": {}, "end": "</a>"}], "triggers": 5},
    {"format": nested(100)},
]

# What both generating routes read alike.
STRUCTURE: list[Row] = [
    *(("guided_json", schema) for schema in BAD_SCHEMAS),
    *(("json_schema", schema) for schema in BAD_SCHEMAS),
    *(("structured_outputs.json", {"json": schema}) for schema in BAD_SCHEMAS),
    *(("response_format.json_schema.schema", json_schema(schema)) for schema in BAD_SCHEMAS),
    *(("guided_regex", regex) for regex in BAD_REGEXES),
    *(("regex", regex) for regex in BAD_REGEXES),
    *(("structured_outputs.regex", {"regex": regex}) for regex in BAD_REGEXES),
    *(("guided_grammar", grammar) for grammar in BAD_GRAMMARS),
    *(("ebnf", grammar) for grammar in BAD_GRAMMARS),
    *(("structured_outputs.grammar", {"grammar": grammar}) for grammar in BAD_GRAMMARS),
    *(("guided_choice", choices) for choices in BAD_CHOICES),
    *(("structured_outputs.choice", {"choice": choices}) for choices in BAD_CHOICES),
    *(("structural_tag", tag) for tag in BAD_TAGS),
    *(("structured_outputs.structural_tag", {"structural_tag": tag}) for tag in BAD_TAGS),
    *(("structural_tag.structures", {"structures": value, "triggers": ["<"]}) for value in (5, [5], {})),
    *(("response_format.type", {"type": kind}) for kind in ("xml", "", 5, None, ["text"], "JSON_OBJECT")),
    *(("response_format", value) for value in (5, "json_object", [], True, {"type": "structural_tag"})),
    *(("response_format.json_schema", {"type": "json_schema", "json_schema": value}) for value in (5, "x", [])),
    *(("response_format.json_schema", {"type": "json_schema", "json_schema": value}) for value in (None, {})),
    *(("response_format.json_schema.name", json_schema({}, name=name)) for name in (5, "", "a b", "x" * 65, "é")),
    ("response_format.json_schema.description", json_schema({}, description=5)),
    *(("response_format.json_schema.strict", json_schema({}, strict=value)) for value in ("yes", 1, [])),
    ("response_format.json_schema.schema", json_schema({"uniqueItems": True, "minItems": 4}, strict=True)),
    ("response_format.json_schema.schema", json_schema({"type": "string", "pattern": "("}, strict=True)),
    *(("structured_outputs", value) for value in ("x", 5, [], {"json": {}, "regex": "a"}, {"json_object": False})),
    ("structured_outputs.json_object", {"json_object": 1}),
    ("structured_outputs.disable_any_whitespace", {"json": {}, "disable_any_whitespace": 1}),
    ("structured_outputs.disable_additional_properties", {"json": {}, "disable_additional_properties": True}),
    ("structured_outputs.whitespace_pattern", {"json": {}, "whitespace_pattern": 5}),
    ("structured_outputs.whitespace_pattern", {"json": {}, "whitespace_pattern": ""}),
    *(("guided_json_object", value) for value in (1, "yes", [])),
    *(("guided_whitespace_pattern", All({"guided_json": {}, "guided_whitespace_pattern": v})) for v in (5, "", [" "])),
    ("guided_whitespace_pattern", " "),  # beside nothing
    *(("guided_decoding_backend", value) for value in (5, "", "magic", ["auto"])),
    ("guided_choice", All({"guided_regex": "a", "guided_choice": ["b"]})),
    ("regex", All({"response_format": {"type": "json_object"}, "regex": "a"})),
    *(
        (name, All({"guided_regex": "a+", name: value}))
        for name, value in [("min_tokens", 1), ("ignore_eos", True), ("allowed_token_ids", [5])]
    ),
]

# Values that are not of a kind.
NOT: dict[str, tuple[Any, ...]] = {
    "number": ("", "0.5", [], {}, True, 1e308),
    "integer": ("", "1", [], {}, True, 0.5, 1e30),
    "boolean": (0, 1.0, "", "false", [], {}),
    "string": (0, True, [], {}),
    "list": (5, "x", {}, True),
    "object": (5, "x", [], True),
}


def wrong_kinds(**names: str) -> list[Row]:
    """Every field of a kind with values of other kinds. names: kind=fields with spaces between."""
    return [(name, value) for kind, fields in names.items() for name in fields.split() for value in NOT[kind]]


TERMS: list[Row] = [
    *wrong_kinds(string="cache_salt user", number="timeout", integer="priority"),
    *(("timeout", value) for value in (0, -1, 1e6 + 1)),
    *(("priority", value) for value in (1, -1, 2**31)),
    ("cache_salt", ""),
]

# Shapes and edges of single fields, beside those of test_errors.py.
SAMPLING: list[Row] = [
    *(
        (name, value)
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        for value in ("", "nan", "0.5", [], {}, [0.5], True, -2.0001, 2.0001, 1e308, -1e308)
    ),
    *(
        (name, value)
        for name in ("n", "max_tokens", "min_tokens", "top_k", "seed", "best_of", "prompt_logprobs")
        for value in ("", "1", [], {}, [1], True, 0.5, 1e30, 2**64, -(2**63) - 1)
    ),
    *(
        (name, value)
        for name in (
            "stream",
            "ignore_eos",
            "echo",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
            "return_token_ids",
            "return_tokens_as_token_ids",
            "add_special_tokens",
        )
        for value in (0, 1.0, "", "false", [], {}, [True])
    ),
    *(("stop", value) for value in (True, 0, {}, [[]], [None], ["a", 5], [["a"]], "x" * 1025, ["x" * 1025])),
    *(("stop_token_ids", value) for value in [*NO_LIST_OF_IDS, list(range(3, 100))]),
    *(("allowed_token_ids", value) for value in NO_LIST_OF_IDS),
    *(("bad_words", value) for value in (5, True, {}, [None], [[]], ["a", ""], [{"a": 1}])),
    *(("logit_bias", value) for value in ("x", 5, True, [[5, 1]], {"5": [1]}, {"5": {}}, {"5": -100.1}, {"5": 1e300})),
    *(("logit_bias", {key: 1}) for key in ("+5", " 5", "5 ", "0x5", "1e2", "5.0", "null", "٥", "-0", "1_0")),
    ("logit_bias", {"5": nested(100)}),
    *((name, value) for name in ("model", "request_id") for value in (0, True, [], {}, [["demo"]])),
    ("request_id", ""),
    ("request_id", "x" * 129),
    *(("cache_salt", value) for value in (True, [], {}, "s" * 129)),
    *(("stream_options", value) for value in ("x", 5, True, [])),
    *(("stream_options", All({"stream": True, "stream_options": value})) for value in ("x", 5, True, [], nested(3))),
    *(
        (f"stream_options.{name}", All({"stream": True, "stream_options": {name: value}}))
        for name in ("include_usage", "continuous_usage_stats")
        for value in (1, 0, "true", [], {})
    ),
    ("stream_options", All({"stream": True, "stream_options": {"x": nested(100)}})),
    ("min_tokens", All({"min_tokens": 3, "max_tokens": 2})),
    ("best_of", All({"n": 3, "best_of": 2})),
    ("best_of", All({"n": 1, "best_of": 2, "stream": True})),
    ("prompt_logprobs", All({"prompt_logprobs": 0, "stream": True})),
    *TERMS,
]

COMPLETION: list[Row] = [
    ("suffix", 5),
    *(("prompt", All({"prompt": prompt, "suffix": "x"})) for prompt in ([5], [[5], [6]])),
    *(
        ("prompt", value)
        for value in (True, 5.5, {}, [[]], [[[3]]], [["a"], "b"], [None, "a"], ["a", [3]], [[3], "a"], [3, [3]])
    ),
    *(("prompt", [value]) for value in (2**63, -(2**31), 1e3, VOCAB, False)),
    *(("logprobs", value) for value in ("1", 1.5, [], {}, False, 2**64)),
]

CHAT: list[Row] = [
    *(("messages", value) for value in (5, True, {}, "", [])),
    *(("messages[0]", [value]) for value in (None, 5, "hi", [], True)),
    *(("messages[0].role", [{"role": role, "content": "x"}]) for role in (None, "", "USER", "robot", 5, {}, [])),
    *(("messages[0].content", message(content=value)) for value in (5, True, {}, {"text": "x"}, 5.5)),
    *(("messages[0].content[0]", message(content=[value])) for value in (None, 5, "x", [], {}, {"type": 5})),
    *(
        ("messages[0].content[1]", message(content=[{"type": "text", "text": "x"}, {"type": kind, kind: {"url": url}}]))
        for kind in ("image_url", "video_url", "audio_url", "file", "input_audio", "document", "")
        for url in ("http://127.0.0.1:1/x.png", "file:///etc/passwd", "data:image/png;base64,AAAA")
    ),
    *(("messages[0].content[0].text", message(content=[{"type": "text", "text": v}])) for v in (5, [], {})),
    *(
        (f"messages[0].{name}", message(**{name: value}))
        for name in ("name", "tool_call_id", "reasoning", "reasoning_content")
        for value in (5, True, [], {})
    ),
    *(("messages[0].tool_calls", message("assistant", tool_calls=value)) for value in (5, "x", {}, True)),
    *(("messages[0].tool_calls", message(role, tool_calls=[CALL])) for role in ("user", "system", "tool")),
    *(
        ("messages[0].tool_calls[0]", message("assistant", tool_calls=[value]))
        for value in (None, 5, [], {}, {"function": 5}, {"function": {"name": 5}}, {"name": "f", "arguments": "{}"})
    ),
    *(
        (
            "messages[0].tool_calls[0].function.arguments",
            message("assistant", tool_calls=[{"function": {"name": "f", "arguments": value}}]),
        )
        for value in (5, True, [], [1], json.dumps({"a": nested(100)}))
    ),
    ("messages", message(extra=nested(100))),
    ("messages[2].role", [*HI, *HI, {"role": "nobody", "content": "x"}]),
    *(("tools", value) for value in (5, "x", True, {}, [TOOL] * 1025)),
    *(("tools[0]", [value]) for value in (None, 5, "f", [], {}, {"type": "function"}, {"function": 5})),
    *(("tools[0]", [{"type": kind, "function": {"name": "f"}}]) for kind in ("", 5, None, "custom")),
    *(("tools[0].custom.name", [{"type": "custom", "custom": {"name": name}}]) for name in (None, 5, "", "a b")),
    *(
        ("tools[0].custom.format.type", [{"type": "custom", "custom": {"name": "c", "format": value}}])
        for value in (5, "text", [], {"type": "bnf"}, {"type": 5})
    ),
    ("tools[0].custom.format.syntax", [{"type": "custom", "custom": {"name": "c", "format": LARK | {"syntax": "x"}}}]),
    *(
        ("tools[0].custom.format.grammar.definition", [{"type": "custom", "custom": {"name": "c", "format": value}}])
        for value in ({"type": "grammar", "grammar": {"syntax": "lark", "definition": v}} for v in (None, 5, "", []))
    ),
    *(
        (
            "tools[0].custom.format.definition",
            All({"tools": [{"type": "custom", "custom": {"name": "c", "format": value}}], "tool_choice": "required"}),
        )
        for value in (LARK | {"definition": "start: nothing"}, LARK | {"syntax": "regex", "definition": "("})
    ),
    *(("tools[0].name", [{"type": "namespace", "name": value}]) for value in (None, 5, "")),
    ("tools[0].tools", [{"type": "namespace", "name": "n", "tools": 5}]),
    ("tools[0].tools[0].function.name", [{"type": "namespace", "name": "n", "tools": [function(name="a b")]}]),
    *(("tools[0]", [{"type": "function", "function": value}]) for value in (None, 5, "f", [])),
    *(("tools[0].function.name", [function(name=name)]) for name in (None, 5, "", "a b", "é", "x" * 129, "a/b", [])),
    ("tools[1].function.name", [TOOL, TOOL]),
    *(("tools[0].function.description", [function(description=value)]) for value in (5, True, [], {})),
    *(("tools[0].function.parameters", [function(parameters=value)]) for value in (5, "x", [], True)),
    *(("tools[0].function.strict", [function(strict=value)]) for value in (1, "yes", [])),
    ("tools", [function(parameters={"x": nested(100)})]),
    *(
        ("tools", All({"tools": [function(parameters=schema)], "tool_choice": "required"}))
        for schema in BAD_SCHEMAS
        if isinstance(schema, dict)
    ),
    *(("tool_choice", All({"tools": [TOOL], "tool_choice": value})) for value in (5, True, [], {}, "", "any", "f")),
    *(("tool_choice", All({"tools": [TOOL], "tool_choice": {"type": kind}})) for kind in (5, "", "tool", None)),
    *(
        ("tool_choice", All({"tools": [TOOL, {"type": kind}], "tool_choice": {"type": kind}}))
        for kind in ("web_search", "file_search", "mcp", "x\n\u2028y" * 50)
    ),
    ("tool_choice", All({"tools": [{"type": "web_search"}], "tool_choice": "required"})),
    *(
        ("tool_choice.function.name", All({"tools": [TOOL], "tool_choice": {"type": "function", "function": value}}))
        for value in (None, 5, "f", {}, {"name": 5}, [])
    ),
    ("tool_choice", All({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}})),
    *(("tool_choice", value) for value in ("required", {"type": "function", "function": {"name": "f"}})),
    *(
        ("tool_choice.allowed_tools.tools", All({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", **value}}))
        for value in ({}, {"allowed_tools": {}}, {"allowed_tools": 5}, {"allowed_tools": {"tools": []}}, {"tools": 5})
    ),
    *(
        (
            "tool_choice.allowed_tools.mode",
            All({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": [TOOL], "mode": mode}}),
        )
        for mode in (None, "none", 5, "")
    ),
    *(("parallel_tool_calls", All({"tools": [TOOL], "parallel_tool_calls": value})) for value in (0, "yes", [], {})),
    *(
        (name, All({"tools": [TOOL], "tool_choice": "required", name: value}))
        for name, value in [("min_tokens", 3), ("ignore_eos", True), ("allowed_token_ids", [5])]
    ),
    *(("logprobs", value) for value in (0, "true", [], {})),
    *(("top_logprobs", All({"logprobs": True, "top_logprobs": value})) for value in (-1, 21, 0.5, "1", True, [], {})),
    ("top_logprobs", All({"logprobs": False, "top_logprobs": 1})),
    *(("max_completion_tokens", value) for value in (-2, 0.5, "", [], {}, True, 1e30)),
    ("max_tokens", All({"max_tokens": 4, "max_completion_tokens": 5})),
    *(("reasoning_effort", value) for value in ("", "HIGH", 5, True, [], {})),
    *(("chat_template_kwargs", value) for value in (5, True, [], "{}")),
    *(
        ("chat_template_kwargs", {name: None})
        for name in ("messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize")
    ),
    *((name, value) for name in ("add_generation_prompt", "continue_final_message") for value in (0, "", [], {})),
    ("continue_final_message", All({"continue_final_message": True, "add_generation_prompt": True})),
]
