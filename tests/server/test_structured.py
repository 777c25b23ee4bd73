"""Structured output over the wire: every spelling, whole and streamed, beside free rows, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest
import pytest_asyncio

from engine.config import StartupError
from engine.request import RequestError
from server.app import build_app
from server.protocol.body import Body
from server.protocol.completions import parse_completion
from server.state import STATE
from tests.server.support import Live, live, parse_events, text_of
from tests.server.test_logprobs import device

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
# Bounded in every place, so that random tokens come to an end.
SMALL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "blue"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 40},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"},
    },
    "required": ["color", "size", "tags", "name"],
    "additionalProperties": False,
}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "city": {"type": "string", "maxLength": 20},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
TIGHT = {"disable_any_whitespace": True}
LARK = 'start: "yes " NUMBER | "no"\nNUMBER: /[0-9]{2}/'
EBNF = 'root ::= "left" | "right"'
TAG = {
    "format": {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": SMALL}, "end": "</a>"}
}


def response_format(schema: Any = SMALL, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, **more}}


def is_small(text: str) -> None:
    jsonschema.validate(json.loads(text), SMALL)


def matches(pattern: str) -> Any:
    def check(text: str) -> None:
        assert re.fullmatch(pattern, text), text

    return check


def is_tagged(text: str) -> None:
    assert text.startswith("<a>") and text.endswith("</a>")
    is_small(text[3:-4])


SPELLINGS: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": response_format()}, is_small),
    ({"response_format": response_format(strict=True)}, is_small),
    ({"response_format": {"type": "json_object", "schema": SMALL}}, is_small),
    ({"response_format": {"type": "json_object", "value": SMALL}}, is_small),
    ({"response_format": {"type": "json", "value": SMALL}}, is_small),
    ({"response_format": {"type": "regex", "value": "(yes|no)"}}, matches("yes|no")),
    ({"response_format": {"type": "grammar", "grammar": 'root ::= "yes" | "no"'}}, matches("yes|no")),
    ({"guided_json": SMALL, "guided_decoding_backend": "xgrammar"}, is_small),
    ({"response_format": {"type": "structural_tag", **TAG}}, is_tagged),
    ({"structured_outputs": {"json": SMALL, **TIGHT}}, is_small),
    ({"structured_outputs": {"json": json.dumps(SMALL), "whitespace_pattern": " ?"}}, is_small),
    ({"structured_outputs": {"regex": "[ab]{3}c"}}, matches("[ab]{3}c")),
    ({"structured_outputs": {"choice": ["tea", "coffee"]}}, matches("tea|coffee")),
    ({"structured_outputs": {"grammar": LARK}}, matches("yes [0-9]{2}|no")),
    ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, is_tagged),
    ({"guided_json": SMALL, "guided_decoding_backend": "auto"}, is_small),
    ({"guided_regex": "x{2,4}"}, matches("x{2,4}")),
    ({"guided_choice": ["a", "b"]}, matches("[ab]")),
    ({"guided_grammar": LARK}, matches("yes [0-9]{2}|no")),
    ({"regex": "[0-9]{1,3}"}, matches("[0-9]{1,3}")),
    ({"ebnf": EBNF}, matches("left|right")),
    ({"json_schema": json.dumps(SMALL)}, is_small),
]


async def both_ways(server: Live, path: str, body: dict[str, Any]) -> str:
    """The text of a request, the same streamed and not."""
    status, whole = await server.post(path, body)
    assert status == 200, whole
    [choice] = whole["choices"]
    text: str = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    events = await server.events(path, body)
    assert events[-1] == "[DONE]" and text_of(events) == text
    assert events[-2]["choices"][0]["finish_reason"] == choice["finish_reason"] == "stop"
    return text


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_every_spelling_is_honoured(server: Live, path: str) -> None:
    prompt: dict[str, Any] = {"prompt": "x"} if path == COMPLETIONS else {"messages": HI}
    for seed, (fields, check) in enumerate(SPELLINGS):
        check(await both_ways(server, path, {**prompt, **fields, "max_tokens": 400, "seed": seed}))
    await server.all_free()


async def test_every_choice_has_a_state_of_its_own_and_free_rows_go_on(server: Live) -> None:
    free = {"prompt": "abc", "max_tokens": 20, "seed": 1}
    alone = await server.complete(**free)
    bound = {"prompt": ["x", "y"], "n": 3, "seed": 5, "max_tokens": 400, "guided_json": SMALL}
    answers = await asyncio.gather(server.complete(**free), server.complete(**bound), server.complete(**bound))
    assert answers[0]["choices"][0]["text"] == alone["choices"][0]["text"]
    texts = [choice["text"] for choice in answers[1]["choices"]]
    for text in texts:
        is_small(text)
    assert len(texts) == 6 and texts[0] != texts[3]
    assert texts == [choice["text"] for choice in answers[2]["choices"]]


async def test_json_object_and_length(server: Live) -> None:
    status, body = await server.post(
        CHAT, {"messages": HI, "response_format": {"type": "json_object"}, "max_tokens": 12, "seed": 2}
    )
    assert status == 200
    assert body["choices"][0]["message"]["content"].lstrip().startswith("{")


REFUSED: list[tuple[str, Any, str]] = [
    ("response_format", response_format({"type": "nothing"}), "JSON schema"),
    ("response_format", response_format({"$ref": "#/$defs/missing"}), "names nothing in it"),
    ("response_format", response_format({"$ref": "#/$defs/none"}), "JSON schema"),
    ("response_format", response_format({"uniqueItems": True, "minItems": 4}, strict=True), "uniqueItems"),
    ("response_format", response_format({"type": "string", "pattern": "("}, strict=True), "JSON schema"),
    ("response_format", response_format({"type": "string", "enum": []}), "JSON schema"),
    ("response_format", response_format(5), "must be an object"),
    ("response_format", {"type": "json_schema"}, "schema"),
    ("response_format", {"type": "xml"}, "must be one of"),
    ("structured_outputs", {"regex": "a", "choice": ["b"]}, "exactly one"),
    ("structured_outputs", {"choice": [""]}, "non-empty"),
    ("structured_outputs", {"grammar": "start: nothing"}, "grammar"),
    ("structured_outputs", {"structural_tag": {"format": {"type": "tag"}}}, "structural tag"),
    ("guided_json", "{", "not valid JSON"),
    ("guided_regex", "(?=a)b", "regular expression"),
    ("ebnf", "no grammar at all", "grammar"),
    ("regex", 5, "non-empty string"),
]


async def test_a_bad_grammar_is_its_own_requests_400(server: Live) -> None:
    going = asyncio.create_task(
        both_ways(server, COMPLETIONS, {"prompt": "x", "guided_json": SMALL, "max_tokens": 400, "seed": 3})
    )
    for path in (CHAT, COMPLETIONS):
        prompt: dict[str, Any] = {"prompt": "x"} if path == COMPLETIONS else {"messages": HI}
        for name, value, words in REFUSED:
            for stream in (False, True):
                status, body = await server.post(path, {**prompt, name: value, "stream": stream})
                assert status == 400, (name, value, body)
                assert body["error"]["param"].startswith(name) and words in body["error"]["message"], body
    is_small(await going)
    # One that proves too complex only after its first mask: it is walked on at the door.
    heavy = {"prompt": "x", "guided_regex": "a{1000000}", "max_tokens": 400}
    status, body = await server.post(COMPLETIONS, heavy)
    assert status == 400 and "regular expression cannot be used: lexer error" in body["error"]["message"]
    async with server.http.post(server.url + COMPLETIONS, json={**heavy, "stream": True}) as response:
        last = parse_events(await response.read())[-2:] if response.status == 200 else [await response.json(), "[DONE]"]
    assert last[0]["error"]["type"] == "invalid_request_error" and last[1] == "[DONE]"
    status, body = await server.post(CHAT, {"messages": HI, "guided_regex": "a", "guided_choice": ["b"]})
    assert status == 400 and "guided_regex" in body["error"]["message"]
    await server.all_free()


@pytest.mark.parametrize(("name", "value"), [("min_tokens", 1), ("ignore_eos", True), ("allowed_token_ids", [5])])
async def test_fields_that_would_fight_with_the_grammar(server: Live, name: str, value: Any) -> None:
    status, body = await server.post(COMPLETIONS, {"prompt": "x", "guided_regex": "ab", name: value})
    assert status == 400 and body["error"]["param"] == name and "structured output" in body["error"]["message"]


async def test_what_a_lenient_schema_leaves_to_the_model_is_logged_once(
    server: Live, caplog: pytest.LogCaptureFixture
) -> None:
    schema = {"type": "string", "minLength": 1, "maxLength": 2, "not": {"format": "date"}}
    with caplog.at_level(logging.WARNING, "oneloop.grammar"):
        for _ in range(2):
            status, body = await server.post(CHAT, {"messages": HI, "response_format": response_format(schema)})
            assert status == 200, body
            assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert sum("not enforced in full" in record.message for record in caplog.records) == 1


async def test_a_model_that_ends_no_text_has_no_grammars(server: Live) -> None:
    model, options = server.state.model, server.state.options
    server.engine.eos_token_ids = ()
    state = build_app(server.engine, model, options)[STATE]
    assert state.compiler is None
    with pytest.raises(RequestError, match="no token that ends a text"):
        await parse_completion(Body({"prompt": "x", "guided_regex": "a"}), state, "cmpl-1")


async def test_an_unknown_parser_ends_the_start(server: Live) -> None:
    model, options = server.state.model, server.state.options
    for name in ("tool_call_parser", "reasoning_parser"):
        bad = dataclasses.replace(options, **{name: "hermez"})
        flag = "--" + name.replace("_", "-")
        with pytest.raises(StartupError, match=rf"{flag} 'hermez' is not known: auto, none, .*harmony"):
            build_app(server.engine, model, bad)


# ---- with a model that means something


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[Live]:
    async with live(make_device=device, num_pages=512) as server:
        yield server


MIA = [{"role": "user", "content": "Write JSON with the keys name, age, city for a person called Mia, 31, from Oslo."}]


async def test_the_demo_model_keeps_the_schema_at_any_temperature(demo: Live) -> None:
    for temperature in (0, 1, 2):
        body = {
            "messages": MIA,
            "temperature": temperature,
            "seed": 7,
            "max_tokens": 200,
            "response_format": response_format(PERSON, strict=True),
        }
        jsonschema.validate(json.loads(await both_ways(demo, CHAT, body)), PERSON)
    status, several = await demo.post(CHAT, {**body, "n": 4})
    assert status == 200
    texts = [choice["message"]["content"] for choice in several["choices"]]
    assert len(set(texts)) == 4
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)


async def test_words_that_the_grammar_needs_may_be_forbidden(demo: Live) -> None:
    """Nothing is left to sample then: that request's error, and nobody else's."""
    body = {"prompt": "x", "guided_regex": "a", "bad_words": ["a"], "max_tokens": 4}
    (status, answer), good = await asyncio.gather(
        demo.post(COMPLETIONS, body), demo.complete("x", guided_regex="ab", max_tokens=9)
    )
    assert status == 400 and "grammar" in answer["error"]["message"], answer
    assert good["choices"][0]["text"] == "ab"


async def test_the_real_client_parses(demo: Live) -> None:
    async with demo.openai() as client:
        answer = await client.chat.completions.create(
            model="demo",
            messages=MIA,  # type: ignore[arg-type]
            temperature=0,
            response_format=response_format(PERSON, strict=True),  # type: ignore[arg-type]
        )
        said = json.loads(answer.choices[0].message.content or "")
        assert said == {"name": "Mia", "age": 31, "city": "Oslo"}
        extra = await client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Is the sky blue?"}],
            extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
            logprobs=True,
            n=2,
        )
        assert all(choice.message.content in ("yes", "no") for choice in extra.choices)
