"""Sampling extras over the wire, with the demo model on the CPU: shapes, alignment, and what each field does."""

from __future__ import annotations

import functools
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch

from engine.executor.cpu import CPUExecutor
from engine.forward import Limits
from engine.models.generation import GenerationDefaults
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.text.detokenizer import IncrementalDetokenizer
from server.protocol.generation import bad_word_ids
from tests.server.support import DEMO, Live, live, served_model, text_of, tokenizer

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = "The little fox – it was quick 🦊 – ran over the hill."


@functools.cache
def model() -> CausalLM:
    torch.set_num_threads(1)
    config = read_spec(DEMO)
    assert config.vocab_size >= tokenizer().vocab_size
    return load_model(config, DEMO, dtype=torch.float32, device=torch.device("cpu"))


def device(limits: Limits) -> CPUExecutor:
    return CPUExecutor(model(), limits, dtype=torch.float32)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Live]:
    async with live(make_device=device, num_pages=512) as server:
        yield server


@functools.cache
def whole_logprobs(ids: tuple[int, ...]) -> torch.Tensor:
    """[len(ids), vocab]: log-probabilities of what comes after each id, by transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    reference = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(reference(torch.tensor([ids])).logits[0], -1)


async def test_chat_logprobs_align_with_the_text(server: Live) -> None:
    body = {"messages": HI, "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    _, whole = await server.post(CHAT, {**body, "return_token_ids": True})
    [choice] = whole["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == len(choice["token_ids"]) == whole["usage"]["completion_tokens"]
    for entry, token_id in zip(content, choice["token_ids"], strict=True):
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(entry["bytes"]) == tokenizer().token_bytes(token_id)
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 3
        # Greedy: the token is the first of its alternatives, with the very same number.
        assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "logprob", "bytes")}
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
    said = b"".join(bytes(entry["bytes"]) for entry in content).decode(errors="replace")
    assert said.startswith(choice["message"]["content"].rstrip("\ufffd"))

    events = await server.events(CHAT, body)
    streamed = [
        entry for chunk in events[1:-1] for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content
    assert text_of(events) == choice["message"]["content"]
    assert events[0]["choices"][0]["logprobs"] is None
    _, plain = await server.post(CHAT, {**body, "logprobs": False, "top_logprobs": 0})
    assert plain["choices"][0]["logprobs"] is None
    assert plain["choices"][0]["message"] == choice["message"]
    _, bare = await server.post(CHAT, {**body, "top_logprobs": 0})
    assert all(entry["top_logprobs"] == [] for entry in bare["choices"][0]["logprobs"]["content"])


async def test_the_real_client_reads_logprobs(server: Live) -> None:
    async with server.openai() as client:
        whole = await client.chat.completions.create(
            model="demo", messages=HI, max_tokens=4, logprobs=True, top_logprobs=2, seed=1
        )
        stream = await client.chat.completions.create(
            model="demo", messages=HI, max_tokens=4, logprobs=True, top_logprobs=2, seed=1, stream=True
        )
        parts = [choice.logprobs.content async for chunk in stream for choice in chunk.choices if choice.logprobs]
        assert whole.choices[0].logprobs is not None
        assert [entry for part in parts for entry in part] == whole.choices[0].logprobs.content
        old = await client.completions.create(model="demo", prompt="Once", max_tokens=4, logprobs=2, echo=True)
        assert old.choices[0].logprobs.token_logprobs[0] is None


@pytest.mark.parametrize("prompt", ["text", "ids"])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo_scores_the_prompt_as_transformers_does(server: Live, prompt: str, stream: bool) -> None:
    ids = tokenizer().encode(TEXT)
    body = {
        "prompt": TEXT if prompt == "text" else ids,
        "max_tokens": 5,
        "temperature": 0,
        "logprobs": 2,
        "echo": True,
        "ignore_eos": True,
    }
    if stream:
        choices = [chunk["choices"][0] for chunk in (await server.events(COMPLETIONS, body))[:-1]]
        text = "".join(choice["text"] for choice in choices)
        found: dict[str, list[Any]] = {}
        for choice in choices:
            for name, values in (choice["logprobs"] or {}).items():
                found[name] = found.get(name, []) + values
    else:
        answer = await server.complete(**body)
        text, found = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]
        assert answer["usage"]["prompt_tokens"] == len(ids) and answer["usage"]["completion_tokens"] == 5
    assert set(found) == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}
    assert text.startswith(TEXT)
    expected = whole_logprobs(tuple(ids))
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"]) == len(ids) + 5
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    for place in range(1, len(ids)):
        value, top = found["token_logprobs"][place], found["top_logprobs"][place]
        assert value == pytest.approx(float(expected[place - 1, ids[place]]), abs=1e-4)
        assert max(top.values()) == pytest.approx(float(expected[place - 1].max()), abs=1e-4)
        assert top[found["tokens"][place]] == value and 2 <= len(top) <= 3
    # Offsets are places in the text: where a token is whole characters, it stands there.
    assert found["text_offset"] == sorted(found["text_offset"])
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert token.startswith(("bytes:", "<|")) or text[offset:].startswith(token)
    assert any(token.startswith("bytes:\\x") for token in found["tokens"])
    for place in range(len(ids), len(ids) + 5):
        top = found["top_logprobs"][place]
        # Greedy, and lm-eval tests it by equality.
        assert found["token_logprobs"][place] == max(top.values())


async def test_echo_without_logprobs_and_of_several_prompts(server: Live) -> None:
    answer = await server.complete(["One", "Two"], max_tokens=2, echo=True, n=2, temperature=0, seed=1)
    texts = [choice["text"] for choice in answer["choices"]]
    assert [text[:3] for text in texts] == ["One", "One", "Two", "Two"]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    events = await server.events(
        COMPLETIONS, {"prompt": ["One", "Two"], "max_tokens": 2, "echo": True, "n": 2, "temperature": 0}
    )
    assert [text_of(events, index) for index in range(4)] == texts
    messages = [*HI, {"role": "assistant", "content": "The capital"}]
    chat = {"messages": messages, "continue_final_message": True, "max_tokens": 4, "temperature": 0, "echo": True}
    _, whole = await server.post(CHAT, chat)
    assert whole["choices"][0]["message"]["content"].startswith("The capital")
    assert text_of(await server.events(CHAT, chat)) == whole["choices"][0]["message"]["content"]


async def test_one_choice_scores_the_prompt_for_all(server: Live) -> None:
    ids = tokenizer().encode(TEXT * 3)
    answer = await server.complete(ids, max_tokens=2, echo=True, logprobs=0, n=3, prompt_logprobs=1)
    computed = server.engine.scheduler.counters.prefill_tokens
    assert computed < 2 * len(ids), "the other choices share the pages"
    heads = [choice["logprobs"]["token_logprobs"][: len(ids)] for choice in answer["choices"]]
    assert heads[0] == heads[1] == heads[2] and None not in heads[0][1:]
    assert len({str(choice["prompt_logprobs"]) for choice in answer["choices"]}) == 1
    again = await server.complete(ids, max_tokens=2, echo=True, logprobs=0)
    # Its prompt is computed again, cached or not.
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids)] == pytest.approx(heads[0][1:], abs=1e-4)


async def test_prompt_logprobs_have_vllms_shape(server: Live) -> None:
    ids = tokenizer().encode(TEXT)
    answer = await server.complete(ids, max_tokens=1, prompt_logprobs=2)
    found = answer["choices"][0]["prompt_logprobs"]
    expected = whole_logprobs(tuple(ids))
    assert len(found) == len(ids) and found[0] is None
    for place, named in enumerate(found[1:], 1):
        own = named[str(ids[place])]
        assert own["logprob"] == pytest.approx(float(expected[place - 1, ids[place]]), abs=1e-4)
        assert 2 <= len(named) <= 3
        assert set(own) == {"logprob", "rank", "decoded_token"}
        assert sorted(entry["rank"] for entry in named.values())[:2] == [1, 2]
    one = await server.complete([5], max_tokens=1, prompt_logprobs=0)
    assert one["choices"][0]["prompt_logprobs"] == [None]
    _, chat = await server.post(CHAT, {"messages": HI, "max_tokens": 1, "prompt_logprobs": 0})
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


async def test_bias_bans_and_allowed_ids(server: Live) -> None:
    async def ids(**fields: Any) -> list[int]:
        answer = await server.complete(
            "Once upon a time", max_tokens=20, temperature=0, return_token_ids=True, ignore_eos=True, **fields
        )
        return list(answer["choices"][0]["token_ids"])

    plain = await ids()
    assert await ids(logit_bias={"77": 100}) == [77] * 20
    banned = await ids(logit_bias={str(plain[0]): -100})
    assert plain[0] not in banned
    assert set(await ids(allowed_token_ids=[50, 60, 70])) <= {50, 60, 70}
    penalised = await ids(frequency_penalty=2, presence_penalty=2, repetition_penalty=1.5)
    assert len(set(penalised)) >= len(set(plain)) and len(set(penalised)) > 10
    # So little that a float32 is zero.
    assert await ids(repetition_penalty=5e-324) == await ids(repetition_penalty=1e-6) != plain
    text = tokenizer().decode(plain)
    word = next(word for word in text.split() if word.isalpha() and len(word) > 2)
    without = tokenizer().decode(await ids(bad_words=[word]))
    assert word not in without.split() and word in text
    free = await server.complete("Once", max_tokens=4, temperature=0, allowed_token_ids=[2, 9], min_tokens=4)
    assert free["usage"]["completion_tokens"] == 4


def test_bad_words_stand_with_and_without_a_space() -> None:
    found = bad_word_ids(tokenizer(), ["fox", " fox", "\t"])
    texts = [tokenizer().decode(list(ids)) for ids in found]
    assert sorted(texts) == [" ", " fox", "fox"]


async def test_the_models_own_repetition_penalty_is_the_default() -> None:
    defaults = GenerationDefaults(repetition_penalty=1.8)
    async with live(make_device=device, num_pages=512, model=served_model(generation_defaults=defaults)) as server:
        body = {"max_tokens": 30, "temperature": 0, "ignore_eos": True}
        default = await server.complete("a a a a", **body)
        asked = await server.complete("a a a a", **body, repetition_penalty=1.8)
        off = await server.complete("a a a a", **body, repetition_penalty=1)
    assert default["choices"] == asked["choices"] != off["choices"]


async def test_best_of_returns_the_likeliest_per_token(server: Live) -> None:
    body = {"max_tokens": 8, "temperature": 1.5, "seed": 11, "ignore_eos": True, "logprobs": 0}
    all_of_them = await server.complete("Once", **body, n=6)
    best = await server.complete("Once", **body, n=2, best_of=6)
    hidden = await server.complete("Once", **{**body, "logprobs": None}, n=2, best_of=6)

    def score(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return math.fsum(values) / len(values)

    ranked = sorted(all_of_them["choices"], key=score, reverse=True)
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert [choice["text"] for choice in hidden["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert all(choice["logprobs"] is None for choice in hidden["choices"])
    # All that was generated is paid for.
    assert best["usage"]["completion_tokens"] == 48 and best["usage"]["prompt_tokens"] == 1
    assert (await server.complete("Once", max_tokens=1, best_of=2, n=2, stream=False))["usage"][
        "completion_tokens"
    ] == 2


async def test_tokens_as_ids(server: Live) -> None:
    fields: dict[str, Any] = {"return_tokens_as_token_ids": True, "return_token_ids": True, "max_tokens": 3}
    answer = await server.complete("Once", logprobs=1, **fields)
    [choice] = answer["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top)
    _, chat = await server.post(CHAT, {"messages": HI, "logprobs": True, **fields})
    [choice] = chat["choices"]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == [
        f"token_id:{token}" for token in choice["token_ids"]
    ]


async def test_impossible_tokens_have_a_number(server: Live) -> None:
    """Raw log-probabilities may be -inf, which JSON does not know; and masks do not show in them."""
    answer = await server.complete("Once", max_tokens=2, allowed_token_ids=[400, 401], logprobs=5, temperature=0)
    found = answer["choices"][0]["logprobs"]
    for value, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
        assert -9999.0 <= value < 0 and len(top) == 6 and value == min(top.values())


async def test_stop_strings_and_multibyte_text_keep_their_order(server: Live) -> None:
    """Every token has its entry, whether its text came, was held back or was cut off."""
    body = {"prompt": TEXT[:20], "max_tokens": 30, "seed": 5, "logprobs": 1, "stop": ["e "], "return_token_ids": True}
    answer = await server.complete(**body)
    [choice] = answer["choices"]
    assert len(choice["token_ids"]) == len(choice["logprobs"]["tokens"])
    detokenizer = IncrementalDetokenizer(tokenizer(), [], served_sampling())
    assert detokenizer.push(choice["token_ids"]).startswith(choice["text"])
    events = await server.events(COMPLETIONS, body)
    tokens = [token for chunk in events[:-1] for token in (chunk["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
    assert tokens == choice["logprobs"]["tokens"]


def served_sampling() -> Any:
    from engine.request import SamplingParams

    return SamplingParams()


async def test_a_prompt_is_scored_without_an_answer(server: Live) -> None:
    """What lm-eval asks for: `max_tokens` 0 with `echo`."""
    body = {"prompt": "Once upon a time", "echo": True, "logprobs": 1}
    [whole] = (await server.complete(max_tokens=0, **body))["choices"]
    [longer] = (await server.complete(max_tokens=1, **body))["choices"]
    scores, more = whole["logprobs"], longer["logprobs"]
    assert whole["text"] == "".join(scores["tokens"]) == "Once upon a time"
    assert scores == {name: values[:-1] for name, values in more.items()}
    events = await server.events("/v1/completions", {"max_tokens": 0, **body})
    assert text_of(events) == "Once upon a time"
    streamed = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert [token for piece in streamed if piece for token in piece["tokens"]] == scores["tokens"]
