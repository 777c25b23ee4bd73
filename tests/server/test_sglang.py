"""/generate as SGLang's clients read it: one prompt or many, `meta_info`, log-probabilities, cumulative streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from server.protocol.body import Body
from server.protocol.sglang import parse_generate
from tests.server.support import BOUND_S, Live, live, teach, tokenizer
from tests.server.test_errors import check_shape
from tests.server.test_logprobs import device, whole_logprobs

GENERATE = "/generate"
GREEDY = {"temperature": 0, "max_new_tokens": 8}


async def ask(server: Live, **fields: Any) -> Any:
    status, answer = await server.post(GENERATE, fields)
    assert status == 200, answer
    return answer


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    """What two runs have in common: ids, times and what the cache had are their own."""
    meta = {k: v for k, v in answer["meta_info"].items() if k not in ("e2e_latency", "id", "cached_tokens")}
    return {"text": answer["text"], "output_ids": answer["output_ids"], "meta_info": meta}


async def streamed(server: Live, **fields: Any) -> list[Any]:
    """The last state of each request of a stream, each event's being a prolongation of the one before."""
    events = await server.events(GENERATE, fields)
    assert events[-1] == "[DONE]"
    last: dict[int, Any] = {}
    for event in events[:-1]:
        index = event.get("index", 0)
        before = last.get(index)
        if before is not None:
            assert event["text"].startswith(before["text"])
            assert event["output_ids"][: len(before["output_ids"])] == before["output_ids"]
            assert before["meta_info"]["finish_reason"] is None and "e2e_latency" not in before["meta_info"]
        last[index] = event
    assert all(event["meta_info"]["finish_reason"] for event in last.values())
    return [last[index] for index in sorted(last)]


async def test_one_prompt(server: Live) -> None:
    answer = await ask(server, text="Once upon", sampling_params=GREEDY, rid="mine")
    meta = answer["meta_info"]
    assert set(answer) == {"text", "output_ids", "meta_info"} and meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 8} and meta["completion_tokens"] == 8
    assert meta["prompt_tokens"] == len(tokenizer().encode("Once upon")) and meta["cached_tokens"] == 0
    assert meta["e2e_latency"] > 0
    # Cut off by its length amid a character.
    assert answer["text"] == tokenizer().decode(answer["output_ids"], skip_special_tokens=True).removesuffix("\ufffd")
    by_ids = await ask(server, input_ids=tokenizer().encode("Once upon"), sampling_params=GREEDY)
    assert without_times(by_ids) == without_times(answer) and by_ids["meta_info"]["id"] != "mine"
    [last] = await streamed(server, text="Once upon", sampling_params=GREEDY)
    assert "index" not in last and without_times(last) == without_times(answer)
    # The default of SGLang's own.
    assert (await ask(server, text="x"))["meta_info"]["completion_tokens"] == 128


async def test_why_it_ended(server: Live) -> None:
    teach(server, "One two three", len(tokenizer().encode("x")))
    eos = tokenizer().eos_token_ids[0]
    for params, text, matched in (
        ({}, "One two three", eos),
        ({"stop": [" th"]}, "One two", " th"),
        ({"stop": " th", "no_stop_trim": False}, "One two", " th"),
    ):
        for answer in (
            await ask(server, text="x", sampling_params=params),
            (await streamed(server, text="x", sampling_params=params))[0],
        ):
            assert answer["text"] == text
            assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}
    token = tokenizer().encode("One two three", add_special_tokens=False)[1]
    answer = await ask(server, text="x", sampling_params={"stop_token_ids": [token]})
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}


async def test_many_prompts(server: Live) -> None:
    texts = ["Once upon", "x", "Hello there, you"]
    alone = [await ask(server, text=text, sampling_params=GREEDY) for text in texts]
    answers = await ask(server, text=texts, sampling_params=GREEDY, rid="mine")
    assert [answer["meta_info"]["id"] for answer in answers] == ["mine_0", "mine_1", "mine_2"]
    assert list(map(without_times, answers)) == list(map(without_times, alone))
    ids = [tokenizer().encode(text) for text in texts]
    params = [{**GREEDY, "max_new_tokens": size} for size in (1, 2, 3)]
    answers = await ask(server, input_ids=ids, sampling_params=params, rid=["a", "b", "c"])
    assert [answer["output_ids"] for answer in answers] == [
        one["output_ids"][:size] for one, size in zip(alone, (1, 2, 3), strict=True)
    ]
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b", "c"]
    lasts = await streamed(server, input_ids=ids, sampling_params=params)
    assert [last["index"] for last in lasts] == [0, 1, 2]
    assert list(map(without_times, lasts)) == list(map(without_times, answers))
    # A list of one is a list.
    assert len(await ask(server, text=["x"], sampling_params=GREEDY)) == 1
    await server.all_free()


async def test_several_choices(server: Live) -> None:
    params = {"n": 2, "temperature": 1, "sampling_seed": 5, "max_new_tokens": 6}
    one = await ask(server, text="x", sampling_params=params)
    assert len(one) == 2 and one[0]["output_ids"] != one[1]["output_ids"]
    both = await ask(server, text=["x", "y"], sampling_params=params)
    assert list(map(without_times, both[:2])) == list(map(without_times, one)) and len(both) == 4
    assert [answer["meta_info"]["prompt_tokens"] for answer in both] == [1, 1, 1, 1]
    lasts = await streamed(server, text=["x", "y"], sampling_params=params)
    assert list(map(without_times, lasts)) == list(map(without_times, both))


async def test_sampling_params_reach_the_sampler(server: Live) -> None:
    params = {
        "max_new_tokens": 9,
        "min_new_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.25,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.5,
        "sampling_seed": 4,
        "stop": ["a"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logit_bias": {"5": 1},
        "regex": "",
        "unheard_of": 1,
    }
    plan, _ = await parse_generate(Body({"text": "x", "sampling_params": params}), server.state, "id")
    sampling = plan.requests[0].sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.seed) == (9, 3, 4)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.5, 7, 0.25)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.5)
    assert sampling.stop == ("a",) and sampling.stop_token_ids == (7,) and sampling.ignore_eos
    assert not sampling.skip_special_tokens and not sampling.spaces_between_special_tokens
    assert sampling.logit_bias == ((5, 1.0),)
    salted, _ = await parse_generate(Body({"text": ["x", "y"], "cache_salt": ["a", "b"]}), server.state, "id")
    assert [request.namespace for request in salted.requests] == ["a", "b"]
    for structure in ({"regex": "[ab]{3}"}, {"ebnf": 'root ::= "ab"'}, {"json_schema": '{"const": 5}'}):
        [last] = await streamed(server, text="x", sampling_params={**GREEDY, **structure})
        assert without_times(last) == without_times(
            await ask(server, text="x", sampling_params={**GREEDY, **structure})
        )
        assert last["text"] in ("5", "ab") or set(last["text"]) <= set("ab")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"text": None}, "text"),
    ({"input_ids": [5]}, "text"),
    ({"text": 5}, "text"),
    ({"text": []}, "text"),
    ({"text": [5]}, "text"),
    ({"text": ["x"] * 1025}, "text"),
    ({"text": None, "input_ids": "x"}, "input_ids"),
    ({"text": None, "input_ids": []}, "input_ids"),
    ({"text": None, "input_ids": ["x"]}, "input_ids"),
    ({"text": None, "input_ids": [-1]}, "input_ids"),
    ({"text": None, "input_ids": [10**9]}, "input_ids"),
    ({"text": None, "input_ids": [[5], "x"]}, "input_ids"),
    ({"text": None, "input_ids": [[5], []]}, "input_ids"),
    ({"sampling_params": 5}, "sampling_params"),
    ({"sampling_params": [{}]}, "sampling_params"),
    ({"text": ["x", "y"], "sampling_params": [{}]}, "sampling_params"),
    ({"text": ["x", "y"], "sampling_params": [{}, 5]}, "sampling_params"),
    ({"text": ["x", "y"], "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params.n"),
    ({"sampling_params": {"max_new_tokens": -2}}, "sampling_params.max_new_tokens"),
    ({"bootstrap_room": 7}, "bootstrap_room"),
    ({"sampling_params": {"min_new_tokens": -1}}, "sampling_params.min_new_tokens"),
    ({"sampling_params": {"temperature": 9}}, "sampling_params.temperature"),
    ({"sampling_params": {"top_p": 0}}, "sampling_params.top_p"),
    ({"sampling_params": {"sampling_seed": "x"}}, "sampling_params.sampling_seed"),
    ({"sampling_params": {"stop": [""]}}, "sampling_params.stop"),
    ({"sampling_params": {"stop_regex": "a+"}}, "sampling_params.stop_regex"),
    ({"sampling_params": {"beam_width": 2}}, "sampling_params.beam_width"),
    ({"sampling_params": {"no_stop_trim": True}}, "sampling_params.no_stop_trim"),
    ({"sampling_params": {"regex": "("}}, "sampling_params.regex"),
    ({"sampling_params": {"json_schema": "{"}}, "sampling_params.json_schema"),
    ({"sampling_params": {"regex": "a", "ebnf": "b"}}, "sampling_params.ebnf"),
    ({"stream": 1}, "stream"),
    ({"rid": 5}, "rid"),
    ({"rid": "x" * 129}, "rid"),
    ({"rid": ["a"]}, "rid"),
    ({"return_logprob": 1}, "return_logprob"),
    ({"return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
    ({"top_logprobs_num": 2}, "top_logprobs_num"),
    ({"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
    ({"return_logprob": True, "logprob_start_len": 2}, "logprob_start_len"),
    ({"return_text_in_logprobs": 1}, "return_text_in_logprobs"),
    ({"token_ids_logprob": [5]}, "token_ids_logprob"),
    ({"input_embeds": [[0.5]]}, "input_embeds"),
    ({"image_data": "x"}, "image_data"),
    ({"lora_path": "x"}, "lora_path"),
    ({"return_hidden_states": True}, "return_hidden_states"),
    ({"custom_logit_processor": "x"}, "custom_logit_processor"),
]


async def test_bad_bodies_are_refused_and_name_the_field(server: Live) -> None:
    for fields, name in REFUSED:
        async with asyncio.timeout(BOUND_S):
            status, answer = await server.post(GENERATE, {"text": "x", **fields})
        assert status != 200, fields
        error = check_shape(status, answer)
        assert error["param"] == name, (fields, error)
        assert "`prompt`" not in error["message"] and "`max_tokens`" not in error["message"]
        await ask(server, text="x", sampling_params={"max_new_tokens": 1})
    error = check_shape(*await server.post(GENERATE, {"input_ids": [5] * 512}))
    assert "maximum context length is 512 tokens" in error["message"] and error["param"] == "input_ids"
    await server.all_free()


async def test_more_than_the_queue_holds_is_no_429() -> None:
    async with live(max_queued_requests=3) as server:
        check_shape(*await server.post(GENERATE, {"text": ["x"] * 4}))
        assert len(await ask(server, text=["x"] * 3, sampling_params=GREEDY)) == 3


# ---- with a model that means something


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[Live]:
    async with live(make_device=device, num_pages=512) as server:
        yield server


async def test_logprobs(demo: Live) -> None:
    text = "Once upon a time"
    ids = tokenizer().encode(text)
    fields: dict[str, Any] = {"text": text, "sampling_params": GREEDY, "return_logprob": True}
    answer = await ask(demo, **fields, logprob_start_len=0, top_logprobs_num=3, return_text_in_logprobs=True)
    meta = answer["meta_info"]
    expected = whole_logprobs(tuple(ids + answer["output_ids"]))
    entries = meta["input_token_logprobs"] + meta["output_token_logprobs"]
    assert entries[0] == [None, ids[0], "Once"] and [entry[1] for entry in entries] == ids + answer["output_ids"]
    for place, (logprob, token_id, _) in enumerate(entries[1:]):
        assert abs(logprob - float(expected[place, token_id])) < 1e-3
    tops = meta["input_top_logprobs"] + meta["output_top_logprobs"]
    assert tops[0] is None and all(len(top) == 3 for top in tops[1:]) and len(tops) == len(entries)
    assert [top[0] for top in meta["output_top_logprobs"]] == meta["output_token_logprobs"]
    [last] = await streamed(demo, **fields, logprob_start_len=0, top_logprobs_num=3, return_text_in_logprobs=True)
    assert without_times(last) == without_times(answer)
    # A later start: SGLang has null for its first token.
    later = (await ask(demo, **fields, logprob_start_len=2))["meta_info"]
    assert later["input_token_logprobs"] == [
        [None, ids[2], None],
        *([logprob, token_id, None] for logprob, token_id, _ in meta["input_token_logprobs"][3:]),
    ]
    assert "input_top_logprobs" not in later
    plain = (await ask(demo, **fields))["meta_info"]
    assert plain["input_token_logprobs"] == []
    assert [entry[:2] for entry in plain["output_token_logprobs"]] == [
        entry[:2] for entry in meta["output_token_logprobs"]
    ]
    # Asked for one of two prompts, and for all choices of one.
    two = await ask(demo, **{**fields, "text": [text, "x"], "return_logprob": [False, True]})
    assert "output_token_logprobs" not in two[0]["meta_info"] and two[1]["meta_info"]["output_token_logprobs"]
    choices = {**fields, "sampling_params": {**GREEDY, "n": 2}, "logprob_start_len": 0}
    for answers in (await ask(demo, **choices), await streamed(demo, **choices)):
        assert [one["meta_info"]["input_token_logprobs"] for one in answers] == [
            [[*entry[:2], None] for entry in meta["input_token_logprobs"]]
        ] * 2
