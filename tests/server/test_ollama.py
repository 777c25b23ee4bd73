"""Ollama's routes as its clients read them: lines of JSON, whole answers, real durations, errors in its shape."""

from __future__ import annotations

import asyncio
import datetime
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from engine.models.generation import GenerationDefaults
from engine.request import FinishReason
from engine.stream import Delta, TokenStream
from server.answers.ollama import OllamaAnswer
from server.protocol.body import Body
from server.protocol.generation import Plan
from server.protocol.ollama import FLAG_HINTS, Wanted, parse
from tests.server.dictate import dictated
from tests.server.support import BOUND_S, Live, cuts, live, served_model, teach, tokenizer, until
from tests.server.test_logprobs import device

CHAT = "/api/chat"
GENERATE = "/api/generate"
HI: list[Any] = [{"role": "user", "content": "hi"}]
GREEDY = {"temperature": 0, "num_predict": 120}
BODY: dict[str, Any] = {"model": "demo", "messages": HI, "options": GREEDY}
PROMPT: dict[str, Any] = {"model": "demo", "prompt": "hi", "options": GREEDY}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
DURATIONS = ("load_duration", "prompt_eval_duration", "eval_duration")


def check_error(status: int, body: Any, expected: int = 400) -> str:
    assert status == expected, body
    assert set(body) == {"error"} and isinstance(body["error"], str) and "Traceback" not in body["error"]
    return str(body["error"])


def read(line: dict[str, Any]) -> tuple[str, str, list[Any]]:
    """Text, thinking and calls of a line, or of a whole answer."""
    datetime.datetime.fromisoformat(line["created_at"])
    said = line.get("message", line)
    assert "message" not in line or said["role"] == "assistant"
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in said.get("tool_calls", [])]
    return said["content" if "message" in line else "response"], said.get("thinking", ""), calls


def joined(lines: list[dict[str, Any]]) -> dict[str, Any]:
    text, thinking = "", ""
    calls: list[Any] = []
    for line in lines:
        assert line["done"] is (line is lines[-1])
        piece = read(line)
        text, thinking, calls = text + piece[0], thinking + piece[1], calls + piece[2]
    return {"text": text, "thinking": thinking, "calls": calls, **ending(lines[-1])}


def ending(last: dict[str, Any]) -> dict[str, Any]:
    """Durations are positive and add up; the rest can be compared."""
    assert all(type(last[name]) is int and last[name] >= 0 for name in (*DURATIONS, "total_duration"))
    assert last["prompt_eval_duration"] > 0
    assert abs(sum(last[name] for name in DURATIONS) - last["total_duration"]) < 10
    return {name: last[name] for name in ("model", "done_reason", "prompt_eval_count", "eval_count")}


async def stream(server: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with server.http.post(server.url + path, json=body) as response:
        raw = await response.read()
        assert response.status == 200, raw
        assert response.headers["Content-Type"].startswith("application/x-ndjson")
    assert raw.endswith(b"\n")
    return [json.loads(line) for line in raw.splitlines()]


async def both_ways(server: Live, path: str, body: dict[str, Any]) -> dict[str, Any]:
    status, whole = await server.post(path, {**body, "stream": False})
    assert status == 200, whole
    found = joined([whole])
    # Streaming is the default.
    assert joined(await stream(server, path, body)) == found
    return found


async def say(server: Live, text: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    _, first = await server.post(path, {**body, "stream": False, "options": {"num_predict": 1}})
    teach(server, text, first["prompt_eval_count"])
    return await both_ways(server, path, body)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_last_message_of_the_assistant_begins_the_answer(server: Live, stream: bool) -> None:
    question = {"role": "user", "content": "hi"}
    for begun, ending in (
        ({"content": "I say"}, "assistant\nI say"),
        ({"content": "I say", "images": []}, "assistant\nI say"),
        # A turn that was cut before it said anything is nothing to go on with; and this model shows no thoughts.
        ({"content": ""}, "user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ({"thinking": "so"}, "user\nhi<|im_end|>\n<|im_start|>assistant\n"),
    ):
        body = {"messages": [question, {"role": "assistant", **begun}], "stream": stream}
        with dictated(server, " so") as requests:
            async with server.http.post(server.url + CHAT, json=body) as response:
                lines = [json.loads(line) for line in (await response.read()).splitlines()]
        assert response.status == 200, lines
        assert "".join(line["message"]["content"] for line in lines) == " so"
        assert tokenizer().decode(requests[0].prompt_token_ids, skip_special_tokens=False).endswith(ending)


async def test_text_and_why_it_ended(server: Live) -> None:
    for path, body in ((CHAT, BODY), (GENERATE, PROMPT)):
        found = await say(server, "Grüße, 🦊 fox!", path, body)
        assert found["text"] == "Grüße, 🦊 fox!" and found["done_reason"] == "stop"
        found = await say(server, "One two three", path, {**body, "options": {**GREEDY, "stop": [" th"]}})
        assert found["text"] == "One two" and found["done_reason"] == "stop"
        found = await say(server, "One two three", path, {**body, "options": {**GREEDY, "num_predict": 2}})
        assert found["done_reason"] == "length" and found["eval_count"] == 2
    # A raw prompt is the model's own text.
    found = await say(server, " a time", GENERATE, {**PROMPT, "prompt": "Once upon", "raw": True})
    assert found["text"] == " a time" and found["prompt_eval_count"] == len(tokenizer().encode("Once upon"))
    await server.all_free()


async def test_generate_is_a_chat_of_one_turn(server: Live) -> None:
    turns = [{"role": "system", "content": "Be kind."}, *HI]
    _, chat = await server.post(CHAT, {**BODY, "messages": turns, "stream": False})
    _, generate = await server.post(GENERATE, {**PROMPT, "system": "Be kind.", "stream": False})
    assert read(chat)[0] == read(generate)[0] and chat["prompt_eval_count"] == generate["prompt_eval_count"]


async def test_how_far_it_goes() -> None:
    model = served_model(generation_defaults=GenerationDefaults(max_new_tokens=7))
    async with live(model=model) as server:

        async def counts(**options: Any) -> int:
            body = {**BODY, "options": {"temperature": 0, **options}, "stream": False}
            _, answer = await server.post(CHAT, body)
            return int(answer["prompt_eval_count"] + answer["eval_count"])

        prompt = await counts(num_predict=1) - 1
        assert await counts() == prompt + 7
        for endless in (-1, -2, 0, -1.0):
            assert await counts(num_predict=endless) == 512
        # More than the server has is what the server has.
        for num_ctx in (512, 513, 4096, 131072.0, 10**9):
            assert await counts(num_predict=-1, num_ctx=num_ctx) == 512
            assert await counts(num_predict=5, num_ctx=num_ctx) == prompt + 5
        assert await counts(num_predict=-1, num_ctx=64) == await counts(num_predict=100, num_ctx=64) == 64
        assert await counts(num_predict=5, num_ctx=64) == prompt + 5
        message = check_error(*await server.post(CHAT, {**BODY, "options": {"num_ctx": prompt}}))
        assert f"maximum context length is {prompt} tokens" in message and "`options.num_ctx`" in message
        assert await counts(num_predict=10**6) == 512
        for path, body, name in ((CHAT, BODY, "messages"), (GENERATE, PROMPT, "prompt")):
            long = {"messages": [{"role": "user", "content": "w " * 600}], "prompt": "w " * 600}
            assert f"`{name}`" in check_error(*await server.post(path, body | long))


async def test_tools_come_whole(server: Live) -> None:
    body = {**BODY, "tools": [TOOL]}
    found = await say(server, f"Look.\n{CALL}\n{CALL}", CHAT, body)
    assert found["text"] == "Look." and found["calls"] == [("get_weather", {"city": "Paris"})] * 2
    # One that is cut off is a call with what the model said of it.
    said = len(tokenizer().encode(CALL.partition("Paris")[0]))
    found = await say(server, CALL, CHAT, {**body, "options": {**GREEDY, "num_predict": said}})
    assert found["calls"] == [("get_weather", {"INVALID_JSON": '{"city": "'})]
    assert found["text"] == "" and found["done_reason"] == "length"
    assert (await say(server, CALL, CHAT, {**BODY, "tools": []}))["text"] == CALL


async def test_a_conversation_is_the_prompt_that_a_chat_makes(server: Live) -> None:
    """Ids of calls are made up where Ollama has none, and results find theirs."""
    source = (
        "{% for m in messages %}[{{ m.role }}:{{ m.name }}:{{ m.tool_call_id }}:"
        "{{ m.reasoning_content }}:{{ m.content }}"
        "{% for c in m.tool_calls %}<{{ c.id }} {{ c.function.name }}>{% endfor %}]{% endfor %}"
    )
    template = type(served_model().chat_template)({"default": source}, {})  # type: ignore[misc]
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g", "f")]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "thinking": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_name": "g", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "mine", **calls[0]}]},
        {"role": "tool", "tool_call_id": "mine", "content": "3"},
    ]
    async with live(model=served_model(chat_template=template), tool_call_parser="hermes") as server:
        plan = await parse(Body({**BODY, "messages": messages}), server.state, "x", chat=True)
        assert plan is not None
        assert tokenizer().decode(plan.requests[0].prompt_token_ids) == (
            "[user::::x][assistant:::Hm.:<call00000 f><call00001 g><call00002 f>][tool:g:call00001::1]"
            "[tool:f:call00000::2][assistant::::<mine f>][tool:f:mine::3]"
        )


async def test_an_image_is_an_error_in_the_newest_turn_alone(server: Live) -> None:
    for content in ("look", "", None):
        seen = {"role": "user", "content": content, "images": ["aGk=", "aGk="]}
        for messages in ([seen], [{"role": "user", "content": "x"}, seen]):
            message = check_error(*await server.post(CHAT, {**BODY, "messages": messages}))
            assert f"`messages[{len(messages) - 1}].images`" in message and "text only" in message
        messages = [seen, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"}]
        plan = await parse(Body({**BODY, "messages": messages}), server.state, "x", chat=True)
        assert plan is not None
        shown = tokenizer().decode(plan.requests[0].prompt_token_ids)
        assert shown.count("[image left out: this model reads text only]") == 1 and (content or "") in shown


async def test_thinking() -> None:
    async with live(reasoning_parser="qwen3") as server:
        for path, body in ((CHAT, BODY), (GENERATE, PROMPT)):
            for think in ({}, {"think": True}, {"think": "high"}):
                found = await say(server, "<think>\nHm.\n</think>\n\nYes!", path, {**body, **think})
                assert (found["thinking"], found["text"]) == ("Hm.", "Yes!")
    source = "{{ enable_thinking }} {{ reasoning_effort }}"
    template = type(served_model().chat_template)({"default": source}, {})  # type: ignore[misc]
    async with live(model=served_model(chat_template=template), reasoning_parser="qwen3") as server:
        for think, text in ((True, "True "), (False, "False "), ("low", "True low")):
            plan = await parse(Body({**BODY, "think": think}), server.state, "x", chat=True)
            assert plan is not None and tokenizer().decode(plan.requests[0].prompt_token_ids) == text


async def test_formats(server: Live) -> None:
    options = {"temperature": 1, "seed": 3, "num_predict": 200}
    for path, body in ((CHAT, BODY), (GENERATE, PROMPT), (GENERATE, {**PROMPT, "raw": True})):
        found = await both_ways(server, path, {**body, "format": SCHEMA, "options": options})
        assert json.loads(found["text"])["city"] in ("Paris", "Oslo")
        assert (await both_ways(server, path, {**body, "format": ""}))["eval_count"] == 120
    plan = await parse(Body({**BODY, "format": "json"}), server.state, "x", chat=True)
    assert plan is not None and plan.requests[0].constraint is not None


async def test_options_reach_the_sampler(server: Live) -> None:
    options = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.5,
        "min_p": 0.25,
        "seed": 9,
        "repeat_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "num_keep": 4,
        "mirostat": 0,
        "unheard_of": 1,
    }
    plan = await parse(Body({**PROMPT, "options": options, "keep_alive": "5m"}), server.state, "x", chat=False)
    assert plan is not None
    sampling = plan.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 7, 0.5, 0.25)
    assert (sampling.seed, sampling.repetition_penalty) == (9, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)


# As Ollama's page about its API has it.
ALL_OPTIONS = {
    "num_keep": 5,
    "seed": 42,
    "num_predict": 100,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.0,
    "typical_p": 0.7,
    "repeat_last_n": 33,
    "temperature": 0.8,
    "repeat_penalty": 1.2,
    "presence_penalty": 1.5,
    "frequency_penalty": 1.0,
    "penalize_newline": True,
    "stop": ["\n", "user:"],
    "numa": False,
    "num_ctx": 1024,
    "num_batch": 2,
    "num_gpu": 1,
    "main_gpu": 0,
    "use_mmap": True,
    "num_thread": 8,
}
# Each changes nothing.
HINTS: list[dict[str, Any]] = [
    *({"num_gpu": value} for value in (-1, 0, 1, 99, 999.0, None)),
    *({"num_thread": value} for value in (0, 1, 8, 64)),
    *({"num_batch": value} for value in (1, 2, 512, 2048)),
    *({"num_keep": value} for value in (-1, 0, 4, 5, 24)),
    *({"main_gpu": value} for value in (0, 1)),
    *({name: value} for name in FLAG_HINTS for value in (True, False, None)),
    *({"repeat_last_n": value} for value in (-1, 0, 33, 64, 2048, None)),
    *({"repeat_last_n": 64, "repeat_penalty": value} for value in (1, 1.0, None)),
    *({"penalize_newline": value} for value in (True, False, None)),
    *({"typical_p": value} for value in (0.7, 1, 1.0, None)),
    *({"tfs_z": value} for value in (1, 1.0, 0.5, None)),
    {"mirostat": 0, "mirostat_tau": 0.8, "mirostat_eta": 0.6},
    {"mirostat_tau": 5.0, "mirostat_eta": 0.1},
    *({"rope_frequency_base": 0, "rope_frequency_scale": value} for value in (0, 1.0, None)),
    *({"num_ctx": value} for value in (512, 1024, 8192, 10**9, None)),
    *({"stop": value} for value in ("", [], None)),
    {"seed": None, "top_k": None, "num_predict": None, "temperature": None},
    {"unheard_of": [1], "num_gqa": 8},
]


async def test_the_example_of_all_options(server: Live) -> None:
    for path, body in ((CHAT, BODY), (GENERATE, PROMPT), (GENERATE, {**PROMPT, "raw": True})):
        for more in ({}, {"low_vram": False, "vocab_only": False, "use_mlock": False, "f16_kv": True}):
            found = await both_ways(server, path, {**body, "options": {**ALL_OPTIONS, **more}})
            assert 0 < found["eval_count"] <= 100
    plan = await parse(Body({**PROMPT, "options": ALL_OPTIONS}), server.state, "x", chat=False)
    assert plan is not None
    sampling = plan.requests[0].sampling
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.2, 1.5, 1.0)
    assert (sampling.stop, sampling.seed, sampling.max_tokens) == (("\n", "user:"), 42, 100)


async def test_hints_change_nothing(server: Live) -> None:
    for chat, body in ((True, BODY), (False, PROMPT), (False, {**PROMPT, "raw": True})):
        plain = await parse(Body({**body, "options": {}}), server.state, "x", chat=chat)
        assert plain is not None
        for options in HINTS:
            hinted = await parse(Body({**body, "options": options}), server.state, "x", chat=chat)
            assert hinted is not None
            [one], [other] = hinted.requests, plain.requests
            assert one.sampling == other.sampling and one.prompt_token_ids == other.prompt_token_ids, options
    for options in HINTS:
        for path in (CHAT, GENERATE):
            assert (await server.post(path, {"options": options}))[0] == 200, options
    assert server.device.num_steps == 0


async def test_penalties_and_seeds_as_ollama_means_them(server: Live) -> None:
    async def sampling(**options: Any) -> Any:
        plan = await parse(Body({**PROMPT, "options": options}), server.state, "x", chat=False)
        assert plan is not None
        return plan.requests[0].sampling

    penalties = {"repeat_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    for window in (-1, 1, 64, 4096, None):
        found = await sampling(repeat_last_n=window, **penalties)
        assert (found.repetition_penalty, found.presence_penalty, found.frequency_penalty) == (1.5, 0.5, -0.5)
    for window in (0, 0.0):
        assert not (await sampling(repeat_last_n=window, penalize_newline=False, **penalties)).has_penalties
    assert (await sampling(seed=-1)).seed is None and (await sampling(seed=0)).seed == 0
    for options in ({"repeat_penalty": 1.1}, {"presence_penalty": 1}, {"frequency_penalty": -1}):
        body = {**PROMPT, "options": {**options, "penalize_newline": False}}
        assert "`options.penalize_newline`" in check_error(*await server.post(GENERATE, body))


FOR_EVER = (None, -1, -1.0, 300, 0.5, "-1", "300", "5m", "24h", "1h30m", "1.5h", "-1m", "-1s", "100ms", "+5m")
AT_ONCE = (0, 0.0, "0", "0s", "0m", "0h0m0s", "-0s", "0.0")


async def test_nothing_to_answer_loads_the_model_or_unloads_it(server: Live) -> None:
    for path, body in ((CHAT, {"messages": []}), (CHAT, {}), (GENERATE, {}), (GENERATE, {"prompt": ""})):
        for reason, values in (("load", FOR_EVER), ("unload", AT_ONCE)):
            for value in values:
                fields = {"model": "demo", "keep_alive": value, **body}
                status, answer = await server.post(path, fields)
                assert status == 200 and answer["done"] is True and answer["done_reason"] == reason, fields
                assert read(answer) == ("", "", [])
    assert server.device.num_steps == 0
    # Beside a prompt it is about what comes behind the answer.
    for path, body in ((CHAT, BODY), (GENERATE, PROMPT)):
        for value in (0, "0s", -1, "5m"):
            found = {**body, "options": {"num_predict": 1}, "keep_alive": value, "stream": False}
            status, answer = await server.post(path, found)
            assert status == 200 and answer["done_reason"] == "length"


async def test_how_the_text_falls_into_pieces_changes_nothing() -> None:
    rng = random.Random(8)
    async with live(reasoning_parser="qwen3") as server:
        plan = await parse(Body({**BODY, "tools": [TOOL]}), server.state, "x", chat=True)
        assert isinstance(plan, Plan)

        def answer() -> OllamaAnswer:
            stream = TokenStream("x", 5, lambda _: None, 1.0)
            stream.first_token_at, stream.finished_at = 2.0, 4.0
            return OllamaAnswer(server.state, plan, [stream], wanted=Wanted("demo", True, 0.5))

        for text in (f"<think>Hm.</think>Look. {CALL}\n{CALL} Done.", "a <tool_ b", CALL[:-30], "x"):
            for _ in range(20):
                pieces = cuts(text, rng)
                whole = answer().whole([Delta(text, [1] * len(pieces), FinishReason.LENGTH)])
                streamed = answer()
                raw = b""
                for count, piece in enumerate(pieces, 1):
                    reason = FinishReason.LENGTH if count == len(pieces) else None
                    raw += streamed.delta(0, Delta(piece, [1], reason))
                lines = [json.loads(line) for line in (raw + streamed.closing()).splitlines()]
                assert joined(lines) == joined([whole])
                assert [whole[name] for name in DURATIONS] == [500_000_000, 1_000_000_000, 2_000_000_000]


# ---- errors

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": ["hi"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "messages[0].images"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "images": "aGk="}]}, "messages[0].images"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x", "thinking": 5}]}, "messages[0].thinking"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "messages[0].tool_calls[0]"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls"),
    (CHAT, {"tools": 5}, "tools"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0]"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    (GENERATE, {"prompt": 5}, "prompt"),
    (GENERATE, {"system": 5}, "system"),
    (GENERATE, {"raw": 5}, "raw"),
    (GENERATE, {"raw": True, "system": "x"}, "system"),
    (GENERATE, {"raw": True, "think": True}, "think"),
    (GENERATE, {"raw": True, "top_logprobs": 3}, "top_logprobs"),
    (GENERATE, {"template": "x"}, "template"),
    (GENERATE, {"context": [1]}, "context"),
    (GENERATE, {"suffix": 5}, "suffix"),
    (GENERATE, {"suffix": "x", "system": "x"}, "system"),
    # The demo model has no tokens for it.
    (GENERATE, {"suffix": "x"}, "suffix"),
    (GENERATE, {"images": ["aGk="]}, "images"),
    *(
        (path, fields, name)
        for path in (CHAT, GENERATE)
        for fields, name in [
            ({"stream": "no"}, "stream"),
            ({"format": "xml"}, "format"),
            ({"format": 5}, "format"),
            ({"format": {"type": 5}}, "format"),
            ({"think": "a lot"}, "think"),
            ({"think": 5}, "think"),
            ({"think": True}, "think"),
            ({"options": 5}, "options"),
            ({"options": {"temperature": 3}}, "options.temperature"),
            ({"options": {"top_k": -7}}, "options.top_k"),
            ({"options": {"num_predict": -3}}, "options.num_predict"),
            ({"options": {"num_predict": "9"}}, "options.num_predict"),
            ({"options": {"repeat_penalty": 0}}, "options.repeat_penalty"),
            ({"options": {"stop": [""]}}, "options.stop"),
            ({"options": {"seed": 1.5}}, "options.seed"),
            ({"options": {"num_ctx": 0}}, "options.num_ctx"),
            ({"options": {"mirostat": "1"}}, "options.mirostat"),
        ]
    ),
]


async def test_bad_bodies_are_400_in_its_shape_and_name_the_field(server: Live) -> None:
    for path, fields, name in REFUSED:
        base = BODY if path == CHAT else PROMPT
        async with asyncio.timeout(BOUND_S):
            message = check_error(*await server.post(path, {**base, **fields}))
        assert f"`{name}`" in message, (path, fields, message)
        assert (await server.post(path, {**base, "options": {"num_predict": 1}, "stream": False}))[0] == 200
    await server.all_free()


async def test_every_error_has_its_shape() -> None:
    async with live(api_keys=("k",)) as server:
        for path in (CHAT, GENERATE, "/api/show"):
            check_error(*await server.post(path, PROMPT), expected=401)
            for method, data, expected in (("GET", b"", 405), ("POST", b"[]", 400), ("POST", b"", 400)):
                headers = {"Authorization": "Bearer k"}
                async with server.http.request(method, server.url + path, data=data, headers=headers) as response:
                    check_error(response.status, await response.json(), expected=expected)
        for path in ("/api/tags", "/api/ps", "/api/version"):
            async with server.http.get(server.url + path) as response:
                check_error(response.status, await response.json(), expected=401)


async def test_one_that_is_aborted_ends_with_an_error(server: Live) -> None:
    async with server.http.post(server.url + CHAT, json={**BODY, "options": {"num_predict": 400}}) as response:
        await response.content.readline()
        [running] = server.state.submitted
        server.engine.abort(running)
        tail = await response.read()
    check_error(400, json.loads(tail.splitlines()[-1]))
    await until(lambda: not server.busy())


# ---- with a model that means something


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[Live]:
    async with live(make_device=device, num_pages=512) as server:
        yield server


async def test_the_demo_model(demo: Live) -> None:
    question = [{"role": "user", "content": "What is 17 + 25?"}]
    assert (await both_ways(demo, CHAT, {**BODY, "messages": question}))["text"] == "17 + 25 = 42"
    assert (await both_ways(demo, GENERATE, {**PROMPT, "prompt": question[0]["content"]}))["text"] == "17 + 25 = 42"
    body = {**BODY, "messages": question, "logprobs": True, "top_logprobs": 2}
    _, whole = await demo.post(CHAT, {**body, "stream": False})
    assert len(whole["logprobs"]) == whole["eval_count"] and len(whole["logprobs"][0]["top_logprobs"]) == 2
    lines = await stream(demo, CHAT, body)
    assert [entry for line in lines for entry in line.get("logprobs", [])] == whole["logprobs"]
    raw = {**PROMPT, "raw": True, "prompt": "Once upon a", "logprobs": True, "top_logprobs": 7, "stream": False}
    _, whole = await demo.post(GENERATE, raw)
    assert whole["logprobs"][0]["token"] == " time" and len(whole["logprobs"][0]["top_logprobs"]) == 7


async def test_samplers_that_ollama_has_not_either_are_told(server: Live) -> None:
    for options, told in (
        ({"mirostat": 1, "typical_p": 0.7}, "options.mirostat, options.typical_p"),
        ({"mirostat": 0}, None),
    ):
        body = {**BODY, "stream": False, "options": {"num_predict": 1, **options}}
        async with server.http.post(server.url + CHAT, json=body) as response:
            assert response.status == 200
            assert response.headers.get("X-Oneloop-Ignored") == told
