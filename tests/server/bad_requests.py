"""Malformed requests as tables: what is sent, and the field that the 4xx has to name. Run by test_errors.py.

A route of another family joins in by a `Family` of its own in FAMILIES; a new field is one row.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from server.protocol.ollama import FLAG_HINTS, NUMBER_HINTS
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
    *(("response_format.type", {"type": kind}) for kind in ("json", "", 5, None, ["text"], "JSON_OBJECT")),
    *(("response_format", value) for value in (5, "json_object", [], True, {"type": "structural_tag"})),
    *(("response_format.json_schema", {"type": "json_schema", "json_schema": value}) for value in (5, "x", [])),
    *(("response_format.json_schema", {"type": "json_schema", "json_schema": value}) for value in (None, {})),
    *(("response_format.json_schema.name", json_schema({}, name=name)) for name in (5, "", "a b", "x" * 65, "é")),
    ("response_format.json_schema.description", json_schema({}, description=5)),
    *(("response_format.json_schema.strict", json_schema({}, strict=value)) for value in ("yes", 1, [])),
    ("response_format.json_schema.schema", json_schema({"uniqueItems": True}, strict=True)),
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
    *(("guided_decoding_backend", value) for value in (5, "", "xgrammar", ["auto"])),
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
    *(("tools[0]", [value]) for value in (None, 5, "f", [], {}, {"type": "function"}, {"function": {"name": "f"}})),
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

TOKENIZE: list[Row] = [
    ("prompt", All({"prompt": None})),
    *(("prompt", value) for value in (5, True, [], ["x"], [3], {})),
    ("prompt", All({"prompt": "x", "messages": HI})),
    *(("add_special_tokens", value) for value in (0, "yes", [], {})),
    *(("return_token_strs", value) for value in (0, "yes", [], {})),
    *(("model", value) for value in (5, True, [], {})),
]
# `prompt: None` takes the good body's prompt away.
TOKENIZE_CHAT: list[Row] = [
    (name, All({"prompt": None, name.replace("[", ".").split(".")[0]: value}))
    for name, value in CHAT
    if name is not None and name.startswith("messages") and value != [] and not isinstance(value, All)
]
DETOKENIZE: list[Row] = [
    ("tokens", All({"tokens": None})),
    *(("tokens", value) for value in NO_LIST_OF_IDS),
    *(("skip_special_tokens", value) for value in (0, "yes", [], {})),
    *(("model", value) for value in (5, True, [], {})),
]

MESSAGES: list[Row] = [
    *wrong_kinds(
        string="model",
        number="temperature top_p",
        integer="max_tokens top_k",
        boolean="stream",
        list="messages stop_sequences tools",
        object="metadata tool_choice thinking output_config chat_template_kwargs",
    ),
    *(row for row in TERMS if row[0] in ("cache_salt", "priority")),
    *(("metadata.user_id", {"user_id": value}) for value in NOT["string"]),
    *(("temperature", value) for value in (-0.1, 2.1)),
    *(("max_tokens", value) for value in (None, 0, -1)),
    ("messages", []),
    *(("messages[0].role", [{"role": role, "content": "x"}]) for role in (None, "", "tool", 5, [])),
    *(("messages[0].content", message(content=value)) for value in (5, {})),
    *(("messages[0].content[0]", message(content=[value])) for value in (None, 5, "x", {}, {"type": "image"})),
    ("messages[1].content[0]", [*HI, *message(content=[{"type": "document", "source": {"type": "base64"}}])]),
    ("messages[0].content[0]", message("assistant", [{"type": "tool_use"}])),
    ("messages[0].content[0].tool_use_id", message(content=[{"type": "tool_result", "content": "x"}])),
    ("messages", message(extra=nested(100))),
    ("system", [{"type": "x", "content": nested(600)}]),
    *(("system", value) for value in (5, True, {})),
    *(("tools[0]", [value]) for value in (None, 5, "f")),
    *(("tools[0].type", [{"type": value}]) for value in (5, "", [])),
    ("tool_choice", All({"tools": [{"type": "web_search_20250305"}], "tool_choice": {"type": "any"}})),
    *(("tools[0].input_schema", [{"name": "f", "input_schema": value}]) for value in (None, 5, "x", [])),
    ("tools[0].name", [{"input_schema": {}}]),
    *(("tool_choice.type", {"type": value}) for value in (None, "", "required", 5)),
    ("tool_choice.name", {"type": "tool"}),
    *(("thinking.type", {"type": value}) for value in (None, "", "on", 5)),
    *(("thinking.budget_tokens", {"type": "enabled", "budget_tokens": value}) for value in (None, 0, -1, "5", 10**6)),
    ("output_config.effort", {"effort": 5}),
    *(("output_config.format.type", {"format": value}) for value in ({}, {"type": "xml"})),
    ("output_config.format.type", All({"output_format": {}})),
]
RESPONSES: list[Row] = [
    # Of what the answer repeats also what nobody reads, deeper than it could be written.
    ("tools", [{"type": "function", "name": "f", "more": nested(300)}]),
    ("tools", [{"type": "web_search", "more": nested(600)}]),
    ("tool_choice", {"type": "function", "name": "f", "more": nested(300)}),
    ("metadata", {"more": nested(300)}),
    ("text.format", {"format": {"type": "text", "more": nested(300)}}),
    *(row for row in SAMPLING if row[0] in ("temperature", "top_p", "min_p", "seed", "logit_bias")),
    *TERMS,
    *wrong_kinds(
        string="model instructions previous_response_id prompt_cache_key safety_identifier",
        integer="max_output_tokens top_logprobs",
        boolean="stream store parallel_tool_calls include_reasoning separate_reasoning stream_reasoning",
        list="tools include",
        object="text reasoning metadata stream_options",
    ),
    *(("input", value) for value in (None, 5, True, {}, [])),
    *(("input[0]", [value]) for value in (5, "x", [], True)),
    *(("input[0].role", [{"role": role, "content": "x"}]) for role in (None, "", "tool", 5)),
    *(("input[0].type", [{"type": kind}]) for kind in ("", [], 5)),
    # Nothing but what is left out.
    *(("input", [{"type": kind}]) for kind in ("web_search_call", "compaction", "a\r\nb: c")),
    *(("input[0].content", message(content=value)) for value in (5, {})),
    *(("input[0].content[0]", message(content=[value])) for value in (None, 5, "x", {}, {"type": "input_image"})),
    ("input", message(extra=nested(100))),
    *(("input[0].call_id", [{"type": kind, "name": "f"}]) for kind in ("function_call_output", "custom_tool_call")),
    ("previous_response_id", "resp_none"),
    *(("include[0]", [value]) for value in (5, "", None, [])),
    ("include", ["x"] * 65),
    *(("tools[0]", [value]) for value in (None, 5, "f", {}, {"type": ""})),
    *(("tools[0].name", [{"type": kind, "name": name}]) for kind in ("custom", "namespace") for name in (None, 5, "")),
    ("tools[0].format.syntax", [{"type": "custom", "name": "c", "format": LARK | {"syntax": "x"}}]),
    ("tools[0].tools[1].name", [{"type": "namespace", "name": "n", "tools": [TOOL | {"name": "f"}] * 1 + [TOOL]}]),
    *(
        ("tool_choice", All({"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": kind}}))
        for kind in ("web_search", "mcp", "computer")
    ),
    *(("tools[0].name", [{"type": "function", "name": name}]) for name in (None, 5, "", "a b")),
    ("text.verbosity", {"verbosity": "huge"}),
    ("truncation", "some"),
    *((name, 5) for name in ("messages", "max_tokens", "response_format", "n", "background")),
    # Its model does not reason.
    *((name, value) for name in ("thinking_token_budget", "max_thinking_tokens") for value in (5, -2, "5", True)),
]
OLLAMA: list[Row] = [
    *wrong_kinds(string="model", boolean="stream logprobs", integer="top_logprobs", object="options"),
    *(("format", value) for value in (5, True, [], "xml", {"type": "nothing"}, {"$ref": "#/missing"})),
    *(
        (f"options.{name}", {name: value})
        for name in ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty")
        for value in ("", "0.5", [], {}, True, -2.1, 2.1)
    ),
    *((f"options.{name}", {name: value}) for name in ("top_k", "seed") for value in NOT["integer"]),
    *(("options.num_predict", {"num_predict": value}) for value in (*NOT["integer"], -3)),
    *(("options.num_ctx", {"num_ctx": value}) for value in (*NOT["integer"], 0, -1)),
    *(("options.repeat_last_n", {"repeat_last_n": value}) for value in (*NOT["integer"], -2)),
    *(("options.stop", {"stop": value}) for value in (5, {}, [5], [""])),
    *((f"options.{name}", {name: value}) for name in NUMBER_HINTS for value in ("", "1", [], {}, True)),
    *((f"options.{name}", {name: value}) for name in FLAG_HINTS for value in ("", "true", [], {}, 1)),
    *(("options.mirostat", {"mirostat": value}) for value in ("0", False, {})),
    *(("options.tfs_z", {"tfs_z": value}) for value in (0, 0.5, "1", True)),
    *(("options.rope_frequency_base", {"rope_frequency_base": value}) for value in (1e6, "x")),
    *(("options.rope_frequency_scale", {"rope_frequency_scale": value}) for value in (0.5, "x")),
    *(("options.penalize_newline", {"penalize_newline": value, "repeat_penalty": 1.1}) for value in (False, 0, "", [])),
    *(("keep_alive", value) for value in (True, [], {}, "", "soon", "5 m", "1x", "m", "--1", "nan", "1e3s", "٥m")),
    *(("think", value) for value in (5, [], "deep", True)),
]
_OLLAMA_KEPT: list[Row] = [
    *wrong_kinds(string="model name", object="options"),
    *(("options.num_ctx", {"num_ctx": value}) for value in (*NOT["integer"], 0)),
    *(("options.num_gpu", {"num_gpu": value}) for value in ("1", True)),
    *(("keep_alive", value) for value in (True, [], "soon")),
]
OLLAMA_EMBED: list[Row] = [
    *_OLLAMA_KEPT,
    *wrong_kinds(boolean="truncate", integer="dimensions"),
    *(("input", value) for value in (5, True, {}, [5], ["a", ""], ["a", None], [["a"]], ["a"] * 2049)),
    *(("dimensions", value) for value in (-1, 2)),
    ("input", All({"input": "w " * 600, "truncate": False})),
    ("options.num_ctx", All({"input": "w " * 60, "truncate": False, "options": {"num_ctx": 8}})),
]
OLLAMA_OLD_EMBED: list[Row] = [
    *_OLLAMA_KEPT,
    *wrong_kinds(string="prompt"),
    ("prompt", All({"prompt": "w " * 600})),
    ("options.num_ctx", All({"prompt": "w " * 60, "options": {"num_ctx": 8}})),
]
GENERATE: list[Row] = [
    *wrong_kinds(boolean="stream return_text_in_logprobs return_logprob"),
    *(("text", value) for value in (None, 5, True, {}, [], [5], [["a"]], ["a"] * 1025)),
    *(("input_ids", All({"text": None, "input_ids": value})) for value in (5, "x", {}, [-1], [VOCAB], ["a"], [[]])),
    *(("sampling_params", value) for value in (5, "x", [{}], True)),
    *(
        (f"sampling_params.{name}", {name: value})
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        for value in ("", "0.5", [], {}, True, -2.1, 2.1)
    ),
    *(("sampling_params.n", {"n": value}) for value in (*NOT["integer"], 0)),
    *(("sampling_params.max_new_tokens", {"max_new_tokens": value}) for value in (*NOT["integer"], -2)),
    *(("sampling_params.stop", {"stop": value}) for value in (5, {}, [5], [""])),
    *(("sampling_params.regex", {"regex": value}) for value in BAD_REGEXES if value != ""),
    *(("sampling_params.json_schema", {"json_schema": value}) for value in BAD_SCHEMAS),
    ("top_logprobs_num", All({"return_logprob": True, "top_logprobs_num": 21})),
    ("top_logprobs_num", 5),
    ("rid", 5),
    *(("priority", value) for value in (*NOT["integer"], 1)),
    ("image_data", ["http://127.0.0.1/x.png"]),
]

EMBEDDINGS: list[Row] = [
    *TERMS,
    *wrong_kinds(
        string="model encoding_format",
        integer="dimensions truncate_prompt_tokens",
        boolean="normalize add_special_tokens",
    ),
    *(
        ("input", value)
        for value in (
            None, "", [], ["a", ""], [""], ["a", 5], [[]], [[5], []], [5, "a"], [-1], [VOCAB], [True], [1.5],
            {"text": "a"}, 5, ["a"] * 2049, [[5]] * 2049,
        )
    ),
    ("encoding_format", "hex"),
    # Its model was trained for one length.
    *(("dimensions", value) for value in (0, -1, 2)),
    *(("truncate_prompt_tokens", value) for value in (0, -2, 513)),
    ("messages", HI),
    ("truncation_side", "left"),
    ("embed_dtype", "float16"),
    ("endianness", "big"),
]  # fmt: skip
SCORE: list[Row] = [
    *TERMS,
    *wrong_kinds(string="model instruction"),
    *(("text_1", value) for value in (None, 5, "", [], {}, [[]], ["a", "b"])),
    *(("text_2", value) for value in (None, 5, "", [], ["b", 5], ["b", ""], {"image": "x"}, ["b"] * 2049)),
    ("text_1", All({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]})),
    ("queries", All({"text_1": None, "queries": 5, "documents": "x"})),
    ("lora_path", "x"),
]
LABELS: list[Row] = [
    *TERMS,
    *wrong_kinds(string="model", boolean="apply_softmax item_first"),
    *(("label_token_ids", value) for value in (5, [], "5", [-1], [VOCAB], [True], [5] * 129)),
    *(("items", value) for value in (5, [], {}, [5], [None], [[5]], ["a", [5]], ["a"] * 2049)),
    ("items", All({"query": [5], "items": [[-1]]})),
    ("items", All({"query": "", "items": ["a", ""]})),
    *(("items", All({"query": value})) for value in (5, None, ["a"], {})),
]
RERANK: list[Row] = [
    *TERMS,
    *wrong_kinds(string="model instruction", integer="top_n", boolean="return_documents"),
    *(("query", value) for value in (None, "", 5, ["a"], {})),
    *(("documents", value) for value in (None, [], 5, "", [5], [""], [{"title": "x"}], ["a"] * 2049)),
    ("top_n", -1),
    ("truncate_prompt_tokens", 5),
    ("max_tokens_per_doc", 5),
    ("rank_fields", ["title"]),
]
NATIVE: list[Row] = [
    *TERMS,
    *wrong_kinds(string="model grammar", integer="n_predict n_probs repeat_last_n seed top_k"),
    *wrong_kinds(number="temperature top_p min_p repeat_penalty presence_penalty frequency_penalty"),
    *wrong_kinds(boolean="stream ignore_eos return_tokens timings_per_token"),
    *(
        ("prompt", value)
        for value in (None, 5, [], {}, [["x"]], [[]], ["x", 5], [VOCAB], [True], {"prompt_string": "x"})
    ),
    *(("n_predict", value) for value in (-2, 10**30)),
    *(("n_probs", value) for value in (-1, 10**6)),
    *(("stop", value) for value in (5, [5], [""], ["x"] * 17)),
    *(
        ("logit_bias[0]", [value])
        for value in (5, [], [5], [5, 1, 1], [True, 1], [None, 1], [5, True], [5, "x"], [[], 1])
    ),
    *(("logit_bias", value) for value in ([[5, 101]], [[VOCAB, 1]], [[-1, 1]], {"x": 1}, "x")),
    *(("json_schema", value) for value in (5, [], "x")),
    *(("mirostat", value) for value in (1, 2)),
    ("dry_multiplier", 0.5),
    ("lora", [{"id": 0, "scale": 1}]),
]
ABORT: list[Row] = [
    ("rid", All({"rid": None})),
    *((name, value) for name in ("rid", "request_ids") for value in (5, True, {}, "", [""], [5], [["x"]])),
    *wrong_kinds(boolean="abort_all"),
]
WEIGHTS: list[Row] = [
    *wrong_kinds(string="model_path load_format weight_version", boolean="flush_cache abort_all_requests"),
    *(("model_path", value) for value in (None, "", "a\0b", "x" * 4000, "x" * 4097, "/no/such/directory")),
    ("load_format", "gguf"),
    ("flush_cache", False),
    *(("weight_version", value) for value in ("", "x" * 129)),
]

FAMILIES: list[Family] = [
    Family("/v1/completions", {"prompt": "x", "max_tokens": 1}, SAMPLING + STRUCTURE + COMPLETION),
    Family("/v1/chat/completions", {"messages": HI, "max_tokens": 1}, SAMPLING + STRUCTURE + CHAT),
    Family("/tokenize", {"prompt": "x"}, TOKENIZE + TOKENIZE_CHAT),
    Family("/detokenize", {"tokens": [5]}, DETOKENIZE),
    Family("/v1/chat/completions/render", {"messages": HI}, [row for row in TOKENIZE_CHAT if row[0] != "messages[0]"]),
    Family("/v1/messages", {"messages": HI, "max_tokens": 1}, MESSAGES, check_anthropic),
    Family(
        "/v1/messages/count_tokens", {"messages": HI}, wrong_kinds(string="model", list="messages"), check_anthropic
    ),
    Family("/v1/responses", {"input": "x", "max_output_tokens": 1}, RESPONSES),
    Family("/v1/responses/input_tokens", {"input": "x"}, wrong_kinds(string="model instructions", list="tools")),
    Family("/api/chat", {"messages": HI, "stream": False, "options": {"num_predict": 1}}, OLLAMA, check_ollama, True),
    Family(
        "/api/generate", {"prompt": "x", "stream": False, "options": {"num_predict": 1}}, OLLAMA, check_ollama, True
    ),
    Family("/api/show", {}, wrong_kinds(string="model name"), check_ollama, True),
    Family("/api/embed", {"input": "x"}, OLLAMA_EMBED, check_ollama, True),
    Family("/api/embeddings", {"prompt": "x"}, OLLAMA_OLD_EMBED, check_ollama, True),
    Family("/api/pull", {"stream": False}, wrong_kinds(string="model name", boolean="stream"), check_ollama, True),
    Family("/v1/embeddings", {"input": "x"}, EMBEDDINGS),
    Family("/score", {"text_1": "a", "text_2": "b"}, SCORE),
    Family("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [5]}, LABELS),
    Family("/rerank", {"query": "a", "documents": ["b"]}, RERANK),
    Family("/abort_request", {"rid": "unknown"}, ABORT),
    Family("/update_weights_from_disk", {"model_path": "."}, WEIGHTS),
    Family("/completion", {"prompt": "x", "n_predict": 1}, NATIVE),
    Family("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 1}}, GENERATE),
]

# Bodies that are no JSON object, for every route that reads one.
RAW: list[bytes] = [
    b"",
    b" ",
    b"{",
    b"}",
    b"[]",
    b"[{}]",
    b"null",
    b"true",
    b'"x"',
    b"5",
    b"{}{}",
    b"{} {}",
    b"{'prompt': 'x'}",
    b"{prompt: 1}",
    b"{1: 2}",
    b'{"prompt"}',
    b'{"prompt":}',
    b'{"prompt" "x"}',
    b'{"prompt": "x"',
    b'{"prompt": "x}',
    b'{"prompt": "x",}',
    b'{,"prompt": "x"}',
    b'{"prompt": [1,]}',
    b'{"prompt": "x"} trailing',
    b'{"prompt": "x"} // comment',
    b'/* comment */ {"prompt": "x"}',
    *(
        b'{"prompt": "x", "temperature": %s}' % number
        for number in (
            b"NaN", b"nan", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"+1", b"01", b".5", b"5.", b"0x10", b"1_0",
            b"1e", b"--1", b"True", b"None", b"undefined", b"1" * 400, b"9" * 400 + b".5",
        )
    ),
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\xc3"}',
    b'{"prompt": "\xc0\xaf"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\xf4\x90\x80\x80"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\udc00\\ud800"}',
    b'{"prompt": "\\u12"}',
    b'{"prompt": "\\x41"}',
    b'{"\xff": 1}',
    b'{"prompt": "a\nb"}',
    b'{"prompt": "a\x00b"}',
    b'\xef\xbb\xbf{"prompt": "x"}',
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
    '{"prompt": "x"}'.encode("utf-16"),
    '{"prompt": "x"}'.encode("utf-32"),
    b"\x00" * 100,
    b"\x1f\x8b" + b"\x00" * 30,
    b"prompt=x&max_tokens=1",
    b"--x\r\nContent-Disposition: form-data; name=prompt\r\n\r\nx\r\n--x--",
]  # fmt: skip

MEDIA_TYPES = (
    "text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/jsonp", "application/json+x", "application/octet-stream", "application", "json", "*/*", "x" * 200,
)  # fmt: skip
ENCODINGS = ("br", "zstd", "compress", "gzip, gzip", "deflate, gzip", "identity, gzip", "utf-8", "*", "x" * 200)
# (method, path, status)
NO_ROUTES: list[tuple[str, str, int]] = [
    *(("GET", path, 404) for path in ("/nowhere", "/v1x", "/v2/models", "/v1/chat", "//", "/v1//models", "/%00")),
    *(
        ("POST", path, 404)
        for path in ("/v1/nowhere", "/v1/completions//", "/V1/completions", "/engines/x/completions")
    ),
    ("GET", "/v1/models/no/such", 404),
    ("GET", "/v1/models/%2e%2e%2fetc%2fpasswd", 404),
    *((method, "/v1/completions", 405) for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD", "TRACE")),
    *((method, "/v1/models", 405) for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS")),
    *(("POST", path, 405) for path in ("/health", "/ready", "/metrics", "/version", "/server_info", "/v1/models/demo")),
    *(
        ("GET", path, 405)
        for path in (
            "/tokenize",
            "/v1/completions/",
            "/completion",
            "/start_profile",
            "/abort_request",
            "/pause",
            "/v1/embeddings",
        )
    ),
]
