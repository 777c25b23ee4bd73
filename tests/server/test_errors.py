"""Malformed requests: each is a 4xx in its family's shape without a hang, and the next good request is served.

The tables of single fields are here, the rest of them in bad_requests.py.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import pytest
from yarl import URL

from engine.forward import ForwardError
from tests.server.bad_bytes import ENCODINGS, MEDIA_TYPES, NO_ROUTES, RAW
from tests.server.bad_fields import HI, VOCAB, Family, check_shape
from tests.server.bad_requests import FAMILIES
from tests.server.support import BOUND_S, Live, live, served_model, until

pytestmark = pytest.mark.usefixtures("infills")
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
DEEP: Any = "[" * 100 + "]" * 100

# Fields that both families check, one bad value each; the error names the field.
COMMON: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", [1]),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_p", "0.5"),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", "1"),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("n", 0),
    ("n", 129),
    ("n", -1),
    ("n", 1.5),
    ("n", "2"),
    ("n", True),
    ("max_tokens", -2),
    ("max_tokens", "5"),
    ("max_tokens", 1.5),
    ("max_tokens", 10**30),
    ("min_tokens", -1),
    ("min_tokens", 9),  # max_tokens is 4
    ("min_tokens", "1"),
    ("seed", "1"),
    ("seed", 1.5),
    ("seed", 2**64),
    ("seed", -(2**63) - 1),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a"] * 17),
    ("stop", 5),
    ("stop", [5]),
    ("stop", {"a": 1}),
    ("stop", "a" * 2000),
    ("stop_token_ids", 5),
    ("stop_token_ids", ["5"]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [VOCAB]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", list(range(3, 40))),
    ("ignore_eos", "yes"),
    ("ignore_eos", 1),
    ("skip_special_tokens", "no"),
    ("spaces_between_special_tokens", 0),
    ("include_stop_str_in_output", "x"),
    ("return_token_ids", 1),
    ("add_special_tokens", 1),
    ("stream", "true"),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),  # not streamed
    ("stream_options", {}),
    ("stream_options", [1]),
    ("model", 5),
    ("model", ["demo"]),
    ("cache_salt", ""),
    ("cache_salt", 5),
    ("cache_salt", "s" * 200),
    ("request_id", 5),
    ("best_of", 0),
    ("best_of", 21),
    ("best_of", "2"),
    ("presence_penalty", 2.1),
    ("presence_penalty", False),
    ("frequency_penalty", -3),
    ("frequency_penalty", "1"),
    ("repetition_penalty", 0),
    ("repetition_penalty", 2.5),
    ("repetition_penalty", "x"),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"5": "1"}),
    ("logit_bias", {"5": True}),
    ("logit_bias", {"5": None}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"\u0665": 1}),
    ("logit_bias", {"1.0": 1}),
    ("logit_bias", {"": 1}),
    ("logit_bias", {str(VOCAB): 1}),
    ("logit_bias", {"9" * 5000: 1}),
    ("logit_bias", [1]),
    ("bad_words", "x"),
    ("bad_words", [""]),
    ("bad_words", [5]),
    ("bad_words", ["x"] * 129),
    ("bad_words", ["x" * 257]),
    ("allowed_token_ids", []),
    ("allowed_token_ids", 5),
    ("allowed_token_ids", ["5"]),
    ("allowed_token_ids", [VOCAB]),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", 21),
    ("prompt_logprobs", True),
    ("echo", "yes"),
    ("return_tokens_as_token_ids", 1),
    ("logprob_token_ids", [5]),
    ("use_beam_search", True),
    ("stop_regex", "a+"),
    ("truncate_prompt_tokens", 5),
    ("priority", 1),
    ("response_format", "json"),
    ("structured_outputs", {}),
    ("guided_json", 5),
    ("guided_regex", "("),
    ("guided_choice", []),
    ("guided_grammar", ""),
    ("guided_decoding_backend", "magic"),
    ("regex", "a(b"),
    ("ebnf", "root ::= nothing_of_that_name"),
    ("structural_tag", {}),
    ("lora_path", "x"),
]
COMPLETION_ONLY: list[tuple[str, Any]] = [
    ("prompt", None),
    ("prompt", 5),
    ("prompt", []),
    ("prompt", ""),
    ("prompt", {"a": 1}),
    ("prompt", [1, "a"]),
    ("prompt", ["a", 1]),
    ("prompt", [1.5]),
    ("prompt", [True]),
    ("prompt", [-1]),
    ("prompt", [VOCAB]),
    ("prompt", [[1], []]),
    ("prompt", [[1], ["a"]]),
    ("prompt", [["a"]]),
    ("prompt", [None]),
    ("prompt", [5] * 512),
    ("prompt", "word " * 3000),
    ("prompt", ["a"] * 1025),
    ("prompt", [[5]] * 1025),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", True),
    ("suffix", 5),
    ("prompt_embeds", "AAAA"),
]
CHAT_ONLY: list[tuple[str, Any]] = [
    ("messages", None),
    ("messages", []),
    ("messages", "hi"),
    ("messages", {"role": "user"}),
    ("messages[0]", ["hi"]),
    ("messages[0].role", [{"content": "hi"}]),
    ("messages[0].role", [{"role": "robot", "content": "hi"}]),
    ("messages[0].role", [{"role": 5, "content": "hi"}]),
    ("messages[0].role", [{"role": ["user"], "content": "hi"}]),
    ("messages[0].content", [{"role": "user", "content": 5}]),
    ("messages[0].content", [{"role": "user", "content": {"type": "text", "text": "hi"}}]),
    ("messages[0].content[0]", [{"role": "user", "content": ["hi"]}]),
    ("messages[0].content[0]", [{"role": "user", "content": [{"text": "hi"}]}]),
    ("messages[0].content[0]", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages[0].content[0]", [{"role": "user", "content": [{"type": "input_audio"}]}]),
    ("messages[0].content[0].text", [{"role": "user", "content": [{"type": "text", "text": 5}]}]),
    ("messages[1].role", [*HI, {"role": "x", "content": ""}]),
    ("messages[0].name", [{"role": "user", "content": "hi", "name": 5}]),
    ("messages[0].tool_call_id", [{"role": "tool", "content": "hi", "tool_call_id": 5}]),
    ("messages[0].tool_calls", [{"role": "assistant", "content": "hi", "tool_calls": {}}]),
    ("messages[0].tool_calls[0]", [{"role": "assistant", "content": "hi", "tool_calls": ["x"]}]),
    ("messages[0].tool_calls[0]", [{"role": "assistant", "content": "hi", "tool_calls": [{"function": {}}]}]),
    (
        "messages[0].tool_calls[0].function.arguments",
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}],
    ),
    ("messages", [{"role": "user", "content": "hi", "extra": json.loads(DEEP)}]),
    ("tools", {"a": 1}),
    ("tools[0]", ["x"]),
    ("tools[0]", [{"type": "function"}]),
    ("tools[0].function.name", [{"type": "function", "function": {}}]),
    ("tools[0].function.parameters", [{"type": "function", "function": {"name": "f", "parameters": 5}}]),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": {"x": json.loads(DEEP)}}}]),
    ("tool_choice", "required"),  # without tools
    ("tool_choice", 5),
    ("parallel_tool_calls", "x"),
    ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}),
    ("logprobs", 1),
    ("top_logprobs", 5),  # without logprobs
    ("top_logprobs", -1),
    ("top_logprobs", 21),
    ("top_logprobs", True),
    ("documents", [{"text": "x"}]),
    ("chat_template", "{{ messages }}"),
    ("chat_template_kwargs", "x"),
    ("chat_template_kwargs", {"messages": []}),
    ("chat_template_kwargs", {"x": json.loads(DEEP)}),
    ("add_generation_prompt", "x"),
    ("continue_final_message", 1),
    ("reasoning_effort", "huge"),
    ("reasoning_effort", 5),
    ("max_completion_tokens", -2),
    ("max_completion_tokens", "5"),
    ("modalities", ["audio"]),
    ("include_reasoning", 0),
    ("separate_reasoning", "x"),
    ("stream_reasoning", 1),
    ("thinking_token_budget", -2),
    ("thinking_token_budget", 2.5),
    ("max_thinking_tokens", "5"),
]

SINGLE = [
    Family(COMPLETIONS, {"prompt": "x", "max_tokens": 4}, COMMON + COMPLETION_ONLY),
    Family(CHAT, {"messages": HI, "max_tokens": 4}, COMMON + CHAT_ONLY),
]
TABLES = [*SINGLE, *FAMILIES]


def test_the_tables_are_long_enough() -> None:
    of_fields = {json.dumps((family.path, family.body(row))) for family in TABLES for row in family.rows}
    assert len(of_fields) >= 400
    assert len(of_fields) + len(FAMILIES) * (len(RAW) + len(MEDIA_TYPES) + len(ENCODINGS)) + len(NO_ROUTES) >= 800


@pytest.mark.parametrize("family", TABLES, ids=lambda family: family.path)
async def test_every_malformed_field_is_a_400_that_names_it(server: Live, family: Family) -> None:
    for row in family.rows:
        name, body = row[0], family.body(row)
        where = f"{family.path} {name}: {str(body)[:300]}"
        async with asyncio.timeout(BOUND_S):
            status, answer = await server.post(family.path, body)
        assert status == 400, f"{where}: {status} {str(answer)[:300]}"
        error = family.check(status, answer)
        if error.get("code") == "context_length_exceeded":
            assert "maximum context length is 512 tokens" in error["message"], where
        elif "param" not in error:
            assert f"`{name}`" in error["message"], f"{where}: {error}"
        elif "nested more than" in error["message"]:
            # Found before anything inside of the field is looked at.
            assert f"{name}.".startswith(f"{error['param']}."), f"{where}: {error}"
        else:
            assert error["param"] == name, f"{where}: {error}"
        status, answer = await server.post(family.path, family.good)
        assert status == 200, f"after {where}: {answer}"
    await server.all_free()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.path)
async def test_bodies_that_are_no_json_object(server: Live, family: Family) -> None:
    good = json.dumps(family.good).encode()
    cases: list[tuple[bytes, dict[str, str], int]] = [
        *((raw, {}, 400) for raw in RAW),
        *((good, {"Content_Type": kind}, 200 if family.any_type else 415) for kind in MEDIA_TYPES),
        *((good, {"Content_Encoding": encoding}, 415) for encoding in ENCODINGS),
    ]
    for raw, headers, expected in cases:
        async with asyncio.timeout(BOUND_S):
            status, body = await post_raw(server, family.path, raw, **headers)
        assert status == expected, (raw[:80], headers, body)
        if expected != 200:
            family.check(status, body, expected)
        assert (await server.post(family.path, family.good))[0] == 200, (raw[:80], headers)


async def test_routes_and_methods_that_are_not_there(server: Live) -> None:
    for method, path, expected in NO_ROUTES:
        url = URL(server.url + path, encoded=True)
        async with asyncio.timeout(BOUND_S), server.http.request(method, url, data=b"{}") as response:
            body = await response.read()
        assert response.status == expected, (method, path, body)
        assert ("Allow" in response.headers) == (expected == 405)
        if method != "HEAD":
            check_shape(response.status, json.loads(body), expected)
    await server.complete("x", max_tokens=1)


async def post_raw(server: Live, path: str, raw: Any, **headers: str) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    async with server.http.post(server.url + path, data=raw, headers=headers) as response:
        assert response.headers["Content-Type"].startswith("application/json")
        return response.status, json.loads(await response.read())


async def test_the_last_of_two_fields_counts(server: Live) -> None:
    status, body = await post_raw(server, COMPLETIONS, b'{"prompt":"x","max_tokens":0,"max_tokens":2}')
    assert status == 200 and body["usage"]["completion_tokens"] == 2


async def test_unknown_models_are_404(server: Live) -> None:
    for path, extra in [(CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})]:
        error = check_shape(*await server.post(path, {"model": "gpt-9", **extra}), expected=404)
        assert error["code"] == "model_not_found" and error["param"] == "model"
    async with server.http.get(server.url + "/v1/models/no/such") as response:
        check_shape(response.status, await response.json(), expected=404)


async def test_media_types_and_encodings(server: Live) -> None:
    good = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
    ):
        check_shape(*await post_raw(server, COMPLETIONS, good, Content_Type=kind), expected=415)
    for encoding in ("br", "zstd", "compress", "gzip, gzip"):
        check_shape(*await post_raw(server, COMPLETIONS, good, Content_Encoding=encoding), expected=415)
    status, _ = await post_raw(server, COMPLETIONS, good, Content_Type="application/json; charset=utf-8")
    assert status == 200
    raw_deflate = zlib.compressobj(wbits=-15)
    for encoding, data in [
        ("gzip", gzip.compress(good)),
        ("deflate", zlib.compress(good)),
        ("deflate", raw_deflate.compress(good) + raw_deflate.flush()),
        ("identity", good),
    ]:
        status, body = await post_raw(server, COMPLETIONS, data, Content_Encoding=encoding)
        assert status == 200, body
    for encoding, data in [
        ("gzip", good),
        ("deflate", b"\xff\xff"),
        ("gzip", gzip.compress(good)[:-6]),
        ("gzip", gzip.compress(good) + b"x"),
        ("gzip", b""),
    ]:
        check_shape(*await post_raw(server, COMPLETIONS, data, Content_Encoding=encoding))


async def test_bodies_have_a_limit_before_and_after_inflation() -> None:
    async with live(max_body_bytes=100_000) as server:
        fits = b'{"prompt":"x","max_tokens":1,"pad":"' + b"p" * 90_000 + b'"}'
        assert (await post_raw(server, COMPLETIONS, fits))[0] == 200
        assert (await post_raw(server, COMPLETIONS, gzip.compress(fits), Content_Encoding="gzip"))[0] == 200

        async def chunked() -> Any:
            for _ in range(30):
                yield b" " * 10_000

        bomb = gzip.compress(b" " * 50_000_000, 9)
        assert len(bomb) < 100_000
        for raw, headers in [
            (b" " * 200_000, {}),
            (chunked(), {}),
            (bomb, {"Content_Encoding": "gzip"}),
            (zlib.compress(b" " * 50_000_000, 9), {"Content_Encoding": "deflate"}),
        ]:
            async with asyncio.timeout(BOUND_S):
                status, body = await post_raw(server, COMPLETIONS, raw, **headers)
            assert check_shape(status, body, expected=413)["code"] == "request_too_large"
            await server.complete("x", max_tokens=1)


async def test_prompts_that_do_not_fit(server: Live) -> None:
    for extra in ({"prompt": [5] * 512}, {"prompt": [5] * 512, "max_tokens": 13}):
        error = check_shape(*await server.post(COMPLETIONS, extra))
        assert error["code"] == "context_length_exceeded"
        assert "maximum context length is 512 tokens" in error["message"]
    streamed = {"messages": [{"role": "user", "content": "w " * 600}], "stream": True}
    assert check_shape(*await server.post(CHAT, streamed))["code"] == "context_length_exceeded"


async def test_a_full_queue_is_a_429_and_takes_nothing() -> None:
    async with live(max_queued_requests=4, max_num_seqs=1, model=served_model(max_model_len=64)) as server:
        server.device.gate.clear()
        first = asyncio.create_task(server.complete("x", max_tokens=2, n=4))
        await until(lambda: server.num_requests() == 4)
        async with server.http.post(server.url + COMPLETIONS, json={"prompt": "y", "n": 3}) as response:
            error = check_shape(response.status, await response.json(), expected=429)
            assert error["type"] == "rate_limit_error" and error["code"] == "rate_limit_exceeded"
            assert float(response.headers["Retry-After"]) > 0
        assert server.num_requests() == 4
        error = check_shape(*await server.post(COMPLETIONS, {"prompt": "y", "n": 5}))  # could never be taken
        server.device.gate.set()
        assert len((await first)["choices"]) == 4


async def test_a_failed_step_is_a_500_before_the_first_token_and_an_event_after_it() -> None:
    failing: set[int] = set()

    def fail_on(step: int) -> None:
        if step in failing:
            raise ForwardError("out of luck")

    async with live(fail_on=fail_on) as server:
        for stream in (False, True):
            failing |= set(range(server.device.num_steps, server.device.num_steps + 30))
            error = check_shape(*await server.post(COMPLETIONS, {"prompt": "x", "stream": stream}), expected=500)
            assert error["type"] == "server_error"
            await server.all_free()
        for body in ({}, {"n": 3}):
            # Each is tried by itself, and more than once: a step or two that fail would hurt nobody.
            failing.clear()
            failing |= set(range(server.device.num_steps + 3, server.device.num_steps + 90))
            events = await server.events(CHAT, {"messages": HI, "max_tokens": 20, **body})
            assert events[-1] == "[DONE]"
            check_shape(500, events[-2], expected=500)
            assert all("error" not in event for event in events[:-2])
            await server.all_free()
        failing.clear()
        failing.add(server.device.num_steps + 3)
        whole = await server.complete("x", max_tokens=8, n=3)
        assert [choice["finish_reason"] for choice in whole["choices"]] == ["length"] * 3
        assert (await server.complete("x", max_tokens=2))["usage"]["completion_tokens"] == 2


async def test_a_bug_in_the_server_is_a_500_without_details(server: Live, caplog: pytest.LogCaptureFixture) -> None:
    class Panic(BaseException):
        """As a library that is written in Rust panics."""

    for error in (ZeroDivisionError, Panic):

        def broken(request: object, error: type[BaseException] = error) -> None:
            raise error("secret at 0x1234")

        server.engine.submit = broken  # type: ignore[method-assign,assignment]
        check_shape(*await server.post(COMPLETIONS, {"prompt": "x"}), expected=500)
        assert "secret" in caplog.text
        caplog.clear()
