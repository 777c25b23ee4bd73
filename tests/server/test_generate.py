"""Chat and completions over the wire: shapes, order of a stream, usage, choices, stop strings, sameness."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from engine.models.generation import GenerationDefaults
from engine.text.long_texts import MIN_PACKED
from tests.server.support import Live, live, served_model, text_of, tokenizer

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def scripted(server: Live, text: str) -> None:
    """Make the model say `text` over and over."""
    server.device.script = tokenizer().encode(text, add_special_tokens=False)


async def test_chat_response_has_openais_shape(server: Live) -> None:
    status, body = await server.post(CHAT, {"model": "demo", "messages": HI, "max_tokens": 3})
    assert status == 200
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion" and body["model"] == "demo"
    [choice] = body["choices"]
    assert choice["message"]["role"] == "assistant" and isinstance(choice["message"]["content"], str)
    assert choice["finish_reason"] == "length" and choice["index"] == 0 and choice["logprobs"] is None
    assert choice["stop_reason"] is None and choice["matched_stop"] is None
    usage = body["usage"]
    assert usage["completion_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_chat_stream_order(server: Live) -> None:
    events = await server.events(CHAT, {"messages": HI, "max_tokens": 5})
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]  # the key is in every chunk
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert "stop_reason" in chunks[-1]["choices"][0] and "matched_stop" in chunks[-1]["choices"][0]
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_is_the_last_chunk_and_null_before(server: Live) -> None:
    body = {"messages": HI, "max_tokens": 5, "stream_options": {"include_usage": True}}
    events = await server.events(CHAT, body)
    *chunks, last, done = events
    assert done == "[DONE]" and last["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["usage"]["completion_tokens"] == 5
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_continuous_usage_counts_up_from_zero(server: Live) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await server.events(CHAT, {"messages": HI, "max_tokens": 5, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in events[:-1]]
    assert counts[0] == 0 and counts[-1] == 5 and counts == sorted(counts)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("extra", [{"temperature": 0}, {"seed": 7}, {"seed": 2**63, "top_k": 5, "top_p": 0.9}])
async def test_streamed_text_equals_unstreamed(server: Live, path: str, extra: dict[str, Any]) -> None:
    body = {"messages": HI, "prompt": "hi", "max_tokens": 40, **extra}
    _, whole = await server.post(path, body)
    events = await server.events(path, body)
    choice = whole["choices"][0]
    assert text_of(events) == (choice["message"]["content"] if path == CHAT else choice["text"]) != ""


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_have_seeds_of_their_own(server: Live, stream: bool) -> None:
    async def texts(n: int, seed: int) -> list[str]:
        body = {"messages": HI, "max_tokens": 12, "n": n, "seed": seed}
        if not stream:
            _, whole = await server.post(CHAT, body)
            assert [choice["index"] for choice in whole["choices"]] == list(range(n))
            assert whole["usage"]["completion_tokens"] == 12 * n
            return [choice["message"]["content"] for choice in whole["choices"]]
        events = await server.events(CHAT, body)
        roles = [chunk["choices"][0]["index"] for chunk in events[:-1] if "role" in chunk["choices"][0].get("delta")]
        assert sorted(roles) == list(range(n))
        ends = [chunk["choices"][0]["index"] for chunk in events[:-1] if chunk["choices"][0]["finish_reason"]]
        assert sorted(ends) == list(range(n))
        return [text_of(events, index) for index in range(n)]

    four = await texts(4, 5)
    assert len(set(four)) == 4
    assert await texts(4, 5) == four
    assert (await texts(2, 5)) == four[:2]  # a choice does not depend on how many there are
    assert (await texts(1, 5)) == four[:1]
    assert await texts(4, 6) != four


async def test_choices_meet_in_the_cache(server: Live) -> None:
    prompt = list(range(3, 103))
    first = await server.complete(prompt, max_tokens=1, n=3)
    assert first["usage"]["prompt_tokens"] == 100
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    again = await server.complete(prompt, max_tokens=1)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    salted = await server.complete(prompt, max_tokens=1, cache_salt="tenant")
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_the_four_forms_of_a_prompt(server: Live) -> None:
    ids = tokenizer().encode("hello there")
    one = await server.complete("hello there", max_tokens=4, temperature=0)
    assert one["id"].startswith("cmpl-") and one["object"] == "text_completion"
    for prompt in (["hello there"], ids, [ids]):
        body = await server.complete(prompt, max_tokens=4, temperature=0)
        assert body["choices"] == one["choices"]
    many = await server.complete(["hello there", "other"], max_tokens=4, temperature=0, n=2)
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in many["choices"][:2]] == [one["choices"][0]["text"]] * 2
    assert many["usage"]["prompt_tokens"] == len(ids) + len(tokenizer().encode("other"))


async def test_completion_defaults_to_16_tokens_where_they_fit(server: Live) -> None:
    assert (await server.complete("hello"))["usage"]["completion_tokens"] == 16
    assert (await server.complete([5] * 505))["usage"]["completion_tokens"] == 7


async def test_chat_defaults_to_the_end_of_the_context_or_the_models_word(server: Live) -> None:
    _, body = await server.post(CHAT, {"messages": HI})
    assert body["usage"]["total_tokens"] == 512
    model = served_model(generation_defaults=GenerationDefaults(temperature=0.0, max_new_tokens=9))
    async with live(model=model) as other:
        _, body = await other.post(CHAT, {"messages": HI})
        assert body["usage"]["completion_tokens"] == 9
        _, greedy = await other.post(CHAT, {"messages": HI, "temperature": 0})
        assert greedy["choices"] == body["choices"]  # the model's temperature applied


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_are_cut_off_or_kept(server: Live, stream: bool) -> None:
    scripted(server, "one two three four five. ")

    async def ask(**fields: Any) -> tuple[str, dict[str, Any]]:
        body = {"prompt": "x", "max_tokens": 60, **fields}
        if not stream:
            choice = (await server.complete(**body))["choices"][0]
            return choice["text"], choice
        events = await server.events(COMPLETIONS, body)
        return text_of(events), events[-2]["choices"][0]

    text, choice = await ask(stop=["zzz", "hree fo"])
    assert text.endswith("two t") and "hree" not in text
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == choice["matched_stop"] == "hree fo"
    text, _ = await ask(stop="hree fo", include_stop_str_in_output=True)
    assert text.endswith("two three fo")
    token = server.device.script[2] if server.device.script else 0
    _, choice = await ask(stop_token_ids=[token])
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == token
    text, choice = await ask(stop="never", max_tokens=20)
    assert choice["finish_reason"] == "length" and len(text) > 20


async def test_eos_ends_and_can_be_ignored() -> None:
    async with live(eos_rate=0.2) as server:
        body = await server.complete("a prompt", max_tokens=200, temperature=0)
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] < 200
        body = await server.complete("a prompt", max_tokens=200, temperature=0, ignore_eos=True)
        assert body["usage"]["completion_tokens"] == 200


async def test_a_character_is_never_split(server: Live) -> None:
    text = "🦜ぱ語𐍈é"
    server.device.script = [token for char in text for token in tokenizer().encode(char, add_special_tokens=False)]
    assert len(server.device.script) > len(text), "the tokenizer must split some of these characters"
    length = len(server.device.script)
    # Where the prompt ends decides where in the script the output starts: try every phase.
    for start in range(1, length + 1):
        body = {"prompt": [5] * start, "max_tokens": 4 * length}
        events = await server.events(COMPLETIONS, body)
        pieces = [chunk["choices"][0]["text"] for chunk in events[:-1]]
        whole = "".join(pieces)
        assert text in whole
        assert "\ufffd" not in whole[len(text) : -len(text)]
        assert whole == (await server.complete(**body))["choices"][0]["text"]


async def test_return_prompt_text(server: Live) -> None:
    body = {"messages": HI, "max_tokens": 3, "return_prompt_text": True}
    _, rendered = await server.post("/apply-template", {"messages": HI})
    _, whole = await server.post(CHAT, body)
    first, *others = (event for event in await server.events(CHAT, body) if isinstance(event, dict))
    assert whole["prompt_text"] == first["prompt_text"] == rendered["prompt"] != ""
    assert not any("prompt_text" in event for event in others)


async def test_return_token_ids(server: Live) -> None:
    prompt = tokenizer().encode("hi there")
    body = await server.complete(prompt, max_tokens=5, seed=1, return_token_ids=True)
    choice = body["choices"][0]
    assert choice["prompt_token_ids"] == prompt and len(choice["token_ids"]) == 5
    fields = {"prompt": prompt, "max_tokens": 5, "seed": 1, "return_token_ids": True}
    events = await server.events(COMPLETIONS, fields)
    assert [token for chunk in events[:-1] for token in chunk["choices"][0]["token_ids"]] == choice["token_ids"]
    assert [chunk["choices"][0].get("prompt_token_ids") for chunk in events[:-1]][:2] == [prompt, None]
    events = await server.events(CHAT, {"messages": HI, "max_tokens": 5, "return_token_ids": True})
    _, whole = await server.post(CHAT, {"messages": HI, "max_tokens": 5, "return_token_ids": True})
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert len(whole["choices"][0]["token_ids"]) == 5


async def test_messages_render_alike_however_they_are_written(server: Live) -> None:
    async def tokens(**fields: Any) -> list[int]:
        status, body = await server.post("/tokenize", fields)
        assert status == 200, body
        return body["tokens"]

    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    expected = await tokens(messages=plain)
    developer = [{"role": "developer", "content": "Be brief."}, plain[1]]
    assert await tokens(messages=developer) == expected
    parts = [plain[0], {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "ann"}]
    assert await tokens(messages=parts) == expected
    assert (
        await tokens(messages=plain, add_generation_prompt=False)
        == expected[: -len(tokenizer().encode("<|im_start|>assistant\n"))]
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    as_object = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    told = [*plain, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    also = [*plain, {"role": "assistant", "content": "", "tool_calls": [as_object]}, {"role": "tool", "content": "4"}]
    assert await tokens(messages=told) == await tokens(messages=also)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert len(await tokens(messages=plain, tools=[tool])) > len(expected)
    status, body = await server.post(
        CHAT, {"messages": told, "tools": [tool], "tool_choice": "auto", "max_tokens": 2, "reasoning_effort": "low"}
    )
    assert status == 200, body
    prefill = [*plain, {"role": "assistant", "content": "Well,"}]
    continued = await tokens(messages=prefill, continue_final_message=True)
    assert tokenizer().decode(continued, skip_special_tokens=False).endswith("Well,")


async def test_long_conversations_are_rendered_off_the_loop() -> None:
    async with live(model=served_model(max_model_len=32768)) as server:
        messages = [{"role": "user", "content": "word " * 5000}]
        status, body = await server.post(CHAT, {"messages": messages, "max_tokens": 1})
        assert status == 200 and body["usage"]["prompt_tokens"] > 4000


async def test_what_a_prompt_of_many_ids_is_asked_is_answered() -> None:
    """They are kept as an array, which is no list to whoever shows them, compares them or puts something behind."""
    async with live(model=served_model(max_model_len=65536)) as server:
        text = "Once upon a time there was a fox. " * 2000
        ids = tokenizer().encode(text)
        assert len(ids) > MIN_PACKED
        asked = {"max_tokens": 2, "return_token_ids": True}
        for prompt in (text, ids):
            status, body = await server.post(COMPLETIONS, {"prompt": prompt, "echo": True, "logprobs": 0, **asked})
            assert status == 200, body
            [choice] = body["choices"]
            assert choice["prompt_token_ids"] == ids and choice["text"].startswith(text)
            assert choice["logprobs"]["tokens"][0] == "Once"
        status, body = await server.post(COMPLETIONS, {"prompt": [ids, ids], "n": 2, "best_of": 3, "max_tokens": 1})
        assert status == 200 and body["usage"]["prompt_tokens"] == 2 * len(ids)
        messages = [{"role": "user", "content": text}]
        status, body = await server.post(CHAT, {"messages": messages, **asked})
        assert status == 200 and text in tokenizer().decode(body["prompt_token_ids"])
        for path, name in (("/tokenize", "tokens"), (f"{CHAT}/render", "token_ids")):
            status, found = await server.post(path, {"messages": messages})
            assert status == 200 and found[name] == body["prompt_token_ids"]
        sampling = {"max_new_tokens": 2}
        status, body = await server.post(
            "/generate", {"text": text, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        )
        assert status == 200 and body["meta_info"]["prompt_tokens"] == len(ids)
        status, body = await server.post("/completion", {"prompt": ["Well,", text], "n_predict": 1})
        assert status == 200, body


async def test_a_model_without_template_says_so() -> None:
    async with live(model=served_model(chat_template=None)) as server:
        status, body = await server.post(CHAT, {"messages": HI})
        assert status == 400 and "no chat template" in body["error"]["message"]
        assert (await server.complete("hi", max_tokens=1))["usage"]["completion_tokens"] == 1


async def test_unknown_fields_nulls_and_neutral_values_are_fine(server: Live) -> None:
    body = {
        "messages": HI,
        "max_tokens": 2,
        "user": "ann",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "made_up": [[[]]],
        "n": None,
        "temperature": None,
        "stop": None,
        "stop_token_ids": [],
        "logit_bias": {},
        "logprobs": False,
        "top_logprobs": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1,
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "best_of": 1,
        "top_k": -1,
        "priority": 0,
        "stream_options": None,
        "max_completion_tokens": 2,
        "echo": False,
    }
    status, answer = await server.post(CHAT, body)
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 2


async def test_min_tokens_and_integral_floats(server: Live) -> None:
    body = await server.complete("x", max_tokens=16.0, min_tokens=16)
    assert body["usage"]["completion_tokens"] == 16


async def test_the_real_client(server: Live) -> None:
    async with server.openai() as client:
        assert [model.id async for model in client.models.list()] == ["demo", "org/demo"]
        assert (await client.models.retrieve("org/demo")).owned_by == "oneloop"
        whole = await client.chat.completions.create(model="demo", messages=HI, max_tokens=8, seed=3, n=2)
        stream = await client.chat.completions.create(
            model="demo",
            messages=HI,
            max_tokens=8,
            seed=3,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        texts, usage = ["", ""], None
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
            usage = chunk.usage or usage
        assert texts == [choice.message.content for choice in whole.choices]
        assert usage is not None and whole.usage is not None
        assert usage.completion_tokens == whole.usage.completion_tokens == 16
        completion = await client.completions.create(model="demo", prompt="a", max_tokens=3, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in completion])


async def test_64_streams_at_once(server: Live) -> None:
    async def one(index: int) -> None:
        body = {
            "prompt": [index + 3] * (index + 1),
            "max_tokens": index + 1,
            "temperature": 0,
            "stream_options": {"include_usage": True},
        }
        *_, usage, done = events = await server.events(COMPLETIONS, body)
        assert done == "[DONE]"
        assert usage["usage"]["prompt_tokens"] == usage["usage"]["completion_tokens"] == index + 1
        texts[index] = text_of(events)

    texts: dict[int, str] = {}
    await asyncio.gather(*(one(index) for index in range(64)))
    await server.all_free()
    for index in (0, 31, 63):  # the same alone
        body = await server.complete([index + 3] * (index + 1), max_tokens=index + 1, temperature=0)
        assert body["choices"][0]["text"] == texts[index]


async def test_namespaces_and_defaults_reach_the_engine(server: Live) -> None:
    seen = []
    submit = server.engine.submit
    server.engine.submit = lambda request: seen.append(request) or submit(request)  # type: ignore[method-assign,func-returns-value]
    await server.complete("a", max_tokens=1, cache_salt="s", top_k=10**12, temperature=1e-9, stop="x", seed=-1)
    [request] = seen
    assert request.namespace == "s" and not request.stream
    sampling = request.sampling
    assert sampling.temperature == 0.0 and sampling.top_k == tokenizer().vocab_size and sampling.stop == ("x",)
    assert dataclasses.replace(sampling, seed=None).seed is None and sampling.seed == -1
