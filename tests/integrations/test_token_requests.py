"""Dynamo's words as ours and back; the real runtime is in tests/scale/workers."""

from __future__ import annotations

from typing import Any

import pytest

from engine.integrations.token_requests import Chunks, TokenRequest, read, without_eos
from engine.models.generation import GenerationDefaults
from engine.request import FinishReason, RequestError, SamplingParams
from engine.stream import Delta, TokenLogprob, TokenStream
from server.logprobs import LOWEST, Spelling

OWN = GenerationDefaults(temperature=0.5, top_k=7, max_new_tokens=9)
VOCABULARY = 100


def understood(token_ids: Any = (1, 2), **given: Any) -> TokenRequest:
    return read(given, list(token_ids), OWN, VOCABULARY)


def test_what_is_missing_is_the_models_own() -> None:
    wanted = understood(sampling_options={"temperature": None, "seed": None}, stop_conditions={"max_tokens": None})
    assert wanted.sampling == SamplingParams(temperature=0.5, top_k=7, max_tokens=9)
    assert (wanted.token_ids, wanted.model, wanted.structure, wanted.namespace, wanted.priority) == (
        [1, 2],
        "",
        None,
        "",
        0,
    )


def test_everything_has_its_place() -> None:
    wanted = understood(
        model="demo",
        sampling_options={"n": 1, "temperature": 0.25, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "seed": 3},
        stop_conditions={
            "max_tokens": 4,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop": ["x"],
            "stop_token_ids": [5],
            "stop_token_ids_hidden": [6, 5],
            "stop_token_ids_visible": None,
        },
        output_options={"logprobs": 2, "prompt_logprobs": 0, "skip_special_tokens": True},
        extra_args={
            "sampling_options": {"allowed_token_ids": [8, 9], "bad_words_token_ids": [[8]], "logit_bias": {"9": 5}},
            "nvext": {"cache_salt": "mine"},
        },
        routing={"priority": 4},
    )
    assert wanted.sampling == SamplingParams(
        temperature=0.25, top_p=0.5, top_k=0, min_p=0.1, seed=3, max_tokens=4, min_tokens=2, ignore_eos=True,
        stop_token_ids=(5, 6), logprobs=2, prompt_logprobs=0, allowed_token_ids=(8, 9), bad_words=((8,),),
        logit_bias=((9, 5),),
    )  # fmt: skip
    assert (wanted.model, wanted.namespace, wanted.priority) == ("demo", "mine", -4)
    assert without_eos(wanted.sampling, (6, 7)).stop_token_ids == (5,)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"json": {"type": "object"}}, "json_schema", '{"type":"object"}'),
        ({"json": '{"type":"object"}', "whitespace_pattern": " *"}, "json_schema", '{"type":"object"}'),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ["a", "b"]}, "choice", '["a","b"]'),
        ({"grammar": "start: /a/"}, "grammar", "start: /a/"),
    ],
)
def test_structures(given: dict[str, Any], kind: str, text: str) -> None:
    spec = understood(sampling_options={"guided_decoding": given}).structure
    assert spec is not None and (spec.kind, spec.text) == (kind, text)
    assert spec.whitespace_pattern == given.get("whitespace_pattern")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [VOCABULARY]}, "token_ids"),
        ({"token_ids": [True]}, "token_ids"),
        ({"multi_modal_data": {"image": []}}, "multi_modal_data"),
        ({"prefill_result": {"a": 1}}, "prefill_result"),
        ({"bootstrap_info": {"a": 1}}, "bootstrap_info"),
        ({"sampling_options": []}, "sampling_options"),
        ({"sampling_options": {"n": 2}}, "n"),
        ({"sampling_options": {"best_of": 2}}, "best_of"),
        ({"sampling_options": {"use_beam_search": True}}, "use_beam_search"),
        ({"sampling_options": {"length_penalty": 2.0}}, "length_penalty"),
        ({"sampling_options": {"temperature": 3}}, "temperature"),
        ({"sampling_options": {"seed": "x"}}, "seed"),
        ({"sampling_options": {"guided_decoding": {"json": {}}}, "require_reasoning": True}, "guided_decoding"),
        ({"extra_args": {"sampling_options": {"logprob_token_ids": [1]}}}, "logprob_token_ids"),
        ({"extra_args": {"sampling_options": {"logit_bias": {"x": 1}}}}, "logit_bias"),
        ({"stop_conditions": {"max_thinking_tokens": 5}}, "max_thinking_tokens"),
        ({"stop_conditions": {"max_tokens": 0}}, "max_tokens"),
        ({"stop_conditions": {"ignore_eos": 1}}, "ignore_eos"),
        ({"stop_conditions": {"stop_token_ids": 4}}, "stop_token_ids"),
        ({"stop_conditions": {"stop_token_ids": [[4]]}}, "stop_token_ids"),
        ({"extra_args": {"sampling_options": {"allowed_token_ids": 5}}}, "allowed_token_ids"),
        ({"extra_args": {"sampling_options": {"bad_words_token_ids": [5]}}}, "bad_words_token_ids"),
        ({"extra_args": {"sampling_options": {"logit_bias": {"9": "x"}}}}, "logit_bias"),
        ({"sampling_options": {"temperature": "hot"}}, "temperature"),
        ({"output_options": {"logprobs": 21}}, "logprobs"),
        ({"routing": {"priority": "high"}}, "priority"),
        ({"nvext": {"cache_salt": 7}}, "cache_salt"),
        ({"nvext": {"cache_salt": "x" * 1025}}, "cache_salt"),
        ({"model": 5}, "model"),
    ],
)
def test_what_cannot_be_done_is_named(given: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        understood(**given)
    assert caught.value.param == param


def test_chunks() -> None:
    wanted = understood(output_options={"logprobs": 1, "prompt_logprobs": 0})
    stream = TokenStream("r", 2, lambda name: None)
    stream.num_cached_tokens, stream.prompt_logprobs = 1, [TokenLogprob(2, -1.0, 3)]
    chunks = Chunks(wanted, stream, Spelling(None, False))
    entries = [TokenLogprob(5, -0.5, 1, ((5, -0.5),)), TokenLogprob(6, float("-inf"), 4, ((5, -0.25),))]
    stream.num_output_tokens = 2
    first = chunks.next(Delta(token_ids=[5, 6], logprobs=entries))
    assert (first["token_ids"], first["index"], first["log_probs"]) == ([5, 6], 0, [-0.5, LOWEST])
    ranks = [[(one["rank"], one["token_id"], one["logprob"]) for one in each] for each in first["top_logprobs"]]
    assert ranks == [[(1, 5, -0.5)], [(1, 5, -0.25), (4, 6, LOWEST)]]
    assert "finish_reason" not in first
    for reason, word in (
        (FinishReason.STOP, "stop"),
        (FinishReason.LENGTH, "length"),
        (FinishReason.ABORT, "cancelled"),
    ):
        last = chunks.next(Delta(finish_reason=reason))
        assert (last["token_ids"], last["finish_reason"]) == ([], word)
        assert last["completion_usage"] == {
            "prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4, "prompt_tokens_details": {"cached_tokens": 1}
        }  # fmt: skip
        told = last["engine_data"]["prompt_logprobs"]
        assert told == [None, {"2": {"logprob": -1.0, "rank": 3, "decoded_token": "token_id:2"}}]
