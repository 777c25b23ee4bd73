"""Speculation over the wire, with the demo model on the CPU: predictions, hints in every family, and usage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch

from engine.config import SpeculationOptions
from engine.executor.cpu import CPUExecutor
from engine.forward import Limits
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.speculation.registry import make_proposer
from tests.server.support import DEMO, Live, live

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "What is the capital of France?"}]
PLAIN = {"messages": HI, "temperature": 0, "max_tokens": 40, "ignore_eos": True}


# What pays is a question of the clock, and of no answer here.
OPTIONS = SpeculationOptions(method="ngram", num_draft_tokens=8, adaptive=False)


@functools.cache
def model() -> CausalLM:
    torch.set_num_threads(1)
    return load_model(read_spec(DEMO), DEMO, dtype=torch.float32, device=torch.device("cpu"))


def device(limits: Limits) -> CPUExecutor:
    limits = dataclasses.replace(limits, max_draft_tokens=8)
    return CPUExecutor(model(), limits, dtype=torch.float32, proposer=make_proposer(OPTIONS))


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Live]:
    async with live(make_device=device, num_pages=512, speculation=OPTIONS) as server:
        yield server


def details(answer: dict[str, Any]) -> tuple[int, int]:
    counts = answer["usage"]["completion_tokens_details"]
    return counts["accepted_prediction_tokens"], counts["rejected_prediction_tokens"]


async def test_a_prediction_changes_no_word_and_usage_says_what_it_was_worth(server: Live) -> None:
    _, plain = await server.post(CHAT, {**PLAIN, "speculative": False})
    text = plain["choices"][0]["message"]["content"]
    assert "accepted_prediction_tokens" not in plain["usage"]["completion_tokens_details"]

    async def ask(content: Any, **fields: Any) -> dict[str, Any]:
        status, answer = await server.post(
            CHAT, {**PLAIN, "prediction": {"type": "content", "content": content}, **fields}
        )
        assert status == 200, answer
        assert {choice["message"]["content"] for choice in answer["choices"]} == {text}
        assert answer["usage"]["completion_tokens"] == 40 * len(answer["choices"])
        return answer

    # The model cuts its text otherwise than the tokenizer would, here and there.
    assert details(await ask(text))[0] >= 15
    parts = [{"type": "text", "text": text[:20]}, {"type": "text", "text": text[20:]}]
    assert details(await ask(parts))[0] >= 15
    assert details(await ask(text, n=2))[0] >= 30
    assert details(await ask(text, speculative=False)) == (0, 0)
    assert details(await ask(text, max_draft_tokens=0)) == (0, 0)
    assert details(await ask("something else"))[0] <= 40
    await ask("")
    body = {**PLAIN, "prediction": {"type": "content", "content": text}, "stream_options": {"include_usage": True}}
    events = await server.events(CHAT, body)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-2]) == text
    assert details(events[-2])[0] >= 15
    async with server.http.get(f"{server.url}/metrics") as response:
        metrics = await response.text()
    assert "vllm:spec_decode_num_accepted_tokens_per_pos_total" in metrics


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("prediction", "text", "prediction"),
        ("prediction", {"content": "text"}, "prediction"),
        ("prediction", {"type": "other", "content": "text"}, "prediction"),
        ("prediction", {"type": "content"}, "prediction.content"),
        ("prediction", {"type": "content", "content": 3}, "prediction.content"),
        ("prediction", {"type": "content", "content": []}, "prediction.content"),
        ("prediction", {"type": "content", "content": [{"type": "image_url"}]}, "prediction.content[0]"),
        ("prediction", {"type": "content", "content": [{"type": "text", "text": "a"}, "b"]}, "prediction.content[1]"),
        ("speculative", "no", "speculative"),
        ("max_draft_tokens", -1, "max_draft_tokens"),
        ("max_draft_tokens", 129, "max_draft_tokens"),
        ("max_draft_tokens", True, "max_draft_tokens"),
    ],
)
async def test_what_is_no_hint(server: Live, field: str, value: Any, param: str) -> None:
    status, answer = await server.post(CHAT, {**PLAIN, field: value})
    assert status == 400 and answer["error"]["param"] == param, answer


async def test_every_family_takes_the_hints(server: Live) -> None:
    hints = {"speculative": True, "max_draft_tokens": 3}
    said = "one two three one two three one two three"
    for path, body in (
        ("/v1/completions", {"prompt": said, "max_tokens": 8}),
        ("/v1/messages", {"model": "demo", "messages": HI, "max_tokens": 8}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 8}),
        ("/completion", {"prompt": said, "n_predict": 8}),
    ):
        status, answer = await server.post(path, {**body, **hints})
        assert status == 200, (path, answer)
        status, answer = await server.post(path, {**body, "max_draft_tokens": "many"})
        assert status == 400 and "max_draft_tokens" in str(answer), (path, answer)
    asked = {"text": said, "sampling_params": {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}}
    _, plain = await server.post("/generate", {**asked, "speculative": False})
    status, answer = await server.post("/generate", asked)
    assert status == 200 and answer["output_ids"] == plain["output_ids"]
    assert "spec_verify_ct" not in plain["meta_info"]
    if "spec_verify_ct" in (meta := answer["meta_info"]):
        assert meta["spec_accept_length"] == 1 + meta["spec_num_correct_drafts"] / meta["spec_verify_ct"]


async def test_where_nothing_speculates_a_prediction_is_a_hint_to_nobody() -> None:
    async with live() as server:
        asked = {**PLAIN, "max_tokens": 5}
        _, plain = await server.post(CHAT, asked)
        status, answer = await server.post(CHAT, {**asked, "prediction": {"type": "content", "content": "Paris"}})
        assert status == 200 and answer["choices"] == plain["choices"] and details(answer) == (0, 0)
        status, _ = await server.post(CHAT, {**asked, "prediction": {"type": "content", "content": 3}})
        assert status == 400
