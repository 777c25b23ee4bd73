"""The kinds of grammars, bad specs that are one request's 400, and compiling off the loop."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import threading
import weakref
from typing import Any

import jsonschema
import pytest

from engine.request import RequestError
from engine.text.grammar.compiler import GrammarCompiler
from engine.text.grammar.spec import MAX_GRAMMAR_CHARACTERS, GrammarSpec, Kind
from engine.text.grammar.state import Grammar
from tests.text.grammars import EOS, LARK, compiler, spec, walk, words
from tests.text.schemas import SCHEMAS
from tests.work import counted

# One refusal takes a million at most.
MAX_CALLS = 5_000_000


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "byte_fallback_no_strip", "byte_level_regex"])
def test_every_kind_of_tokenizer(kind: str) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "é": {"enum": ["x", "日本"]}},
        "required": ["name", "é"],
    }
    grammar = compiler(kind).compile(spec("json_schema", schema))
    for seed in range(10):
        text, ids = walk(grammar, random.Random(seed), kind, force=seed % 2 == 0)
        jsonschema.validate(json.loads(text), schema)
        assert text.encode() == b"".join(map(words(kind).token_bytes, ids))


def test_json_object() -> None:
    grammar = compiler().compile(GrammarSpec("json_object"))
    for seed in range(20):
        assert isinstance(json.loads(walk(grammar, random.Random(seed))[0]), dict)


@pytest.mark.parametrize(
    "pattern", [r"\d{3}-\d{4}", r"^[a-c]+$", "a|bc", r"\w+@\w+\.com", "é+", r"a\$", "/x/", r"(yes|no)\n?"]
)
def test_regex(pattern: str) -> None:
    grammar = compiler().compile(GrammarSpec("regex", pattern))
    for seed in range(10):
        assert re.fullmatch(pattern, walk(grammar, random.Random(seed))[0])


@pytest.mark.parametrize(
    "choices",
    [
        ["yes", "no"],
        ["a", "ab", "abc"],
        ["日本", "</s>", 'q"', "\n", "a\\b", "<tool_call>"],
        [f"c{i}" for i in range(999)],
    ],
)
def test_choice(choices: list[str]) -> None:
    grammar = compiler().compile(spec("choice", choices))
    seen = {walk(grammar, random.Random(seed), force=seed % 2 == 0)[0] for seed in range(30)}
    assert seen <= set(choices) and len(seen) > 1


GBNF = 'root ::= "SELECT " name ("," name)* " FROM " name\nname ::= [a-z] [a-z]*'


@pytest.mark.parametrize("text", [LARK, GBNF])
def test_grammar(text: str) -> None:
    grammar = compiler().compile(GrammarSpec("grammar", text))
    for seed in range(10):
        assert re.fullmatch(r"SELECT [a-z]+(,[a-z]+)* FROM [a-z]+", walk(grammar, random.Random(seed))[0])


def deep(levels: int) -> dict[str, Any]:
    return {"items": deep(levels - 1)} if levels else {}


def chain(links: int) -> dict[str, Any]:
    steps = {
        f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}, "required": ["x"]}
        for i in range(links)
    }
    return {"$ref": "#/$defs/a0", "$defs": {**steps, f"a{links}": {"type": "integer"}}}


REFUSED: list[tuple[Kind, Any]] = [
    ("json_schema", "not json"),
    ("json_schema", "[]"),
    ("json_schema", "3"),
    ("json_schema", "false"),
    ("json_schema", '"\ud800"'),
    ("json_schema", {"type": "strin"}),
    ("json_schema", {"minimum": "x"}),
    ("json_schema", {"properties": {"a": 3}}),
    ("json_schema", {"properties": {"a": [1]}}),
    ("json_schema", {"anyOf": [None]}),
    ("json_schema", {"enum": []}),
    ("json_schema", {"type": "integer", "minimum": 5, "maximum": 4}),
    ("json_schema", {"type": "string", "pattern": "(a"}),
    ("json_schema", {"type": "string", "maxLength": -1}),
    ("json_schema", {"required": ["a"], "type": "object", "properties": {"a": False}}),
    ("json_schema", {"$ref": "https://example.com/schema.json"}),
    ("json_schema", {"$ref": "other.json#/a"}),
    ("json_schema", {"$ref": 3}),
    ("json_schema", {"properties": {"a": {"$ref": "file:///etc/passwd"}}}),
    ("json_schema", {"$ref": "#/$defs/missing"}),
    ("json_schema", {"$dynamicRef": "http://x/#a"}),
    ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    ("json_schema", deep(80)),
    ("json_schema", chain(1500)),
    ("json_schema", "[" * 100_000 + "]" * 100_000),
    ("json_schema", {"anyOf": [{"const": index} for index in range(6000)]}),
    ("json_schema", {"enum": ["x" * 300_000]}),
    ("json_schema", {"allOf": [{"type": "string", "pattern": f"a{{{index}}}"} for index in range(30)]}),
    ("regex", "(a"),
    ("regex", "(?=a)b"),
    ("regex", "a{2,1}"),
    ("regex", "(" * 5000 + ")" * 5000),
    ("regex", "a" * 100_000),
    ("choice", "[]"),
    ("choice", "{}"),
    ("choice", '["a", 3]'),
    ("choice", '[""]'),
    ("choice", json.dumps(["a"] * 9000)),
    ("grammar", " "),
    ("grammar", "start: missing"),
    ("grammar", 'root ::= "a" | other'),
    ("grammar", 'root ::= "a'),
    ("grammar", "root ::= ("),
    ("grammar", "start: " + "(" * 3000 + '"a"' + ")" * 3000),
    ("grammar", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000),
    ("grammar", "\n".join(["root ::= a0", *(f"a{i} ::= a{i + 1}" for i in range(600)), 'a600 ::= "x"'])),
    ("grammar", 'start: "a"\n' * 8000),
    ("grammar", 'start: "' + "a" * 70_000 + '"'),
    ("grammar", "start: start"),
    ("structural_tag", "3"),
    ("structural_tag", {}),
    ("structural_tag", {"type": "sequence"}),
    ("structural_tag", {"type": "sequence", "elements": [3]}),
    ("structural_tag", {"type": "magic"}),
    ("structural_tag", {"type": "const_string"}),
    ("structural_tag", {"type": "regex", "pattern": ""}),
    ("structural_tag", {"type": "tag", "begin": "a"}),
    ("structural_tag", {"type": "tag", "begin": 3, "content": {"type": "any_text"}, "end": ""}),
    ("structural_tag", {"type": "triggered_tags", "triggers": [], "tags": []}),
    (
        "structural_tag",
        {
            "type": "triggered_tags",
            "triggers": ["x"],
            "tags": [{"begin": "y", "content": {"type": "any_text"}, "end": ""}],
        },
    ),
    ("structural_tag", {"type": "json_schema"}),
    ("structural_tag", {"type": "json_schema", "json_schema": {"$ref": "http://x"}}),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refusals(number: int) -> None:
    kind, value = REFUSED[number]
    with pytest.raises(RequestError) as error, counted() as work:
        compiler().compile(spec(kind, value, param="here"))
    assert work.num_calls < MAX_CALLS
    message = str(error.value)
    assert error.value.status == 400 and message.endswith(".") and len(message) < 400 and "\n" not in message


async def test_compiling_on_the_loop_is_cached_and_shared() -> None:
    made = GrammarCompiler(words(), [EOS], words().vocab_size, cache_entries=2)
    try:
        first, second = await asyncio.gather(*(made.compile_async(spec("json_schema", SCHEMAS[0])) for _ in range(2)))
        assert first is second is await made.compile_async(spec("json_schema", SCHEMAS[0], param="another"))
        for value in ("a", "b"):
            await made.compile_async(spec("choice", [value]))
        assert await made.compile_async(spec("json_schema", SCHEMAS[0])) is not first
        with pytest.raises(RequestError, match="regular expression"):
            await made.compile_async(GrammarSpec("regex", "("))
        with pytest.raises(RequestError):
            await made.compile_async(GrammarSpec("regex", "("))
    finally:
        made.close()


async def test_a_refusal_goes_without_the_collector() -> None:
    """Its traceback names whoever waits for it, and with them the whole request."""
    made = GrammarCompiler(words(), [EOS], words().vocab_size)
    gc.collect()
    gc.disable()
    try:
        try:
            await made.compile_async(GrammarSpec("regex", "("))
            pytest.fail("it was taken")
        except RequestError as error:
            left = weakref.ref(error)
        assert (await made.compile_async(GrammarSpec("regex", "a"))).warnings == ()  # the thread has gone on
        assert left() is None
    finally:
        gc.enable()
        made.close()


async def test_deep_rules_do_not_end_the_process() -> None:
    """The library recurses along them; on a thread of the usual size this is a crash."""
    made = GrammarCompiler(words(), [EOS], words().vocab_size)
    try:
        rules = "\n".join(["start: a0", *(f"a{i}: a{i + 1}" for i in range(4500)), 'a4500: "x"'])
        assert len(rules) < MAX_GRAMMAR_CHARACTERS
        grammar = await made.compile_async(GrammarSpec("grammar", rules))
        state = grammar.state()
        state.accept(words().encode("x", add_special_tokens=False)[0])
        assert state.is_finished
    finally:
        made.close()


async def test_a_compilation_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made = GrammarCompiler(words(), [EOS], words().vocab_size, timeout_s=0.1)
    quick, released = made.compile, threading.Event()

    def compile(spec: GrammarSpec) -> Grammar:
        if spec.text == "slow":
            released.wait(60)
        return quick(spec)

    monkeypatch.setattr(made, "compile", compile)
    made.warm()
    try:
        slow = [made.compile_async(GrammarSpec("regex", "slow", param=str(number))) for number in range(3)]
        results = await asyncio.gather(*slow, return_exceptions=True)
        assert all(isinstance(result, RequestError) and "longer than 0.1 s" in str(result) for result in results)
        monkeypatch.setattr(made, "_timeout_s", 60.0)
        # Another thread has taken over.
        assert (await made.compile_async(GrammarSpec("regex", "quick"))).warnings == ()
        released.set()
        assert (await made.compile_async(GrammarSpec("regex", "slow"))).warnings == ()
    finally:
        released.set()
        made.close()


async def test_a_hundred_compile_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it waits while they do is bench.structured's to say."""
    made = GrammarCompiler(words(), [EOS], words().vocab_size)
    compile, threads = made.compile, []

    def told(spec: GrammarSpec) -> Grammar:
        threads.append(threading.get_ident())
        return compile(spec)

    monkeypatch.setattr(made, "compile", told)
    try:
        await asyncio.gather(*(made.compile_async(spec("json_schema", schema)) for schema in SCHEMAS[-100:]))
        assert len(threads) > 90 and threading.get_ident() not in threads
    finally:
        made.close()
