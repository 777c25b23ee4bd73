"""The engine with rows that speculate, on the fake device: every answer is what it is without drafts, to the token."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from engine.config import EngineConfig, SchedulerOptions, SpeculationOptions
from engine.engine import Engine
from engine.executor.fake import FakeExecutor
from engine.forward import Limits
from engine.request import FinishReason, Request
from engine.stream import Delta, TokenStream
from tests.test_engine import EOS, MODEL, TOKENIZER, VOCAB, Alternating, ask, collect


@asynccontextmanager
async def running(
    *, drafts: int, overlap: bool = True, accuracy: float = 0.9, unseen: bool = False
) -> AsyncIterator[Engine]:
    limits = Limits(8, 256, 256, 16, 256, VOCAB, max_draft_tokens=drafts)
    executor = FakeExecutor(limits, MODEL, draft_accuracy=accuracy, unseen_drafts=unseen)
    options = SchedulerOptions(max_num_seqs=8, max_num_batched_tokens=256, overlap=overlap)
    speculation = SpeculationOptions(method="ngram", num_draft_tokens=drafts, adaptive=False)
    config = EngineConfig(scheduler=options, speculation=speculation)
    engine = Engine(config, executor, TOKENIZER, eos_token_ids=(EOS,))
    task = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        task.cancel()
        await asyncio.wait({task})


async def answers(requests: list[Request], **options: Any) -> tuple[list[Delta], list[TokenStream], Engine]:
    async with running(**options) as engine:
        streams = [engine.submit(request) for request in requests]
        return await asyncio.gather(*map(collect, streams)), streams, engine


def requests() -> list[Request]:
    """Of each kind that something of an answer hangs on; made anew, for constraints remember."""
    whole = [ask(f"plain{i}", [i, 5, 6], stream=i % 2 == 0, max_tokens=30 + i) for i in range(2)]
    hot = [ask("hot", [7, 8], temperature=1.0, seed=3, max_tokens=30, logprobs=2)]
    counted = [ask("counted", [9, 8], presence_penalty=0.5, max_tokens=30)]
    bound = dataclasses.replace(ask("bound", [11, 2], max_tokens=40), constraint=Alternating(23))
    wrong = dataclasses.replace(ask("wrong", [12, 2], max_tokens=40), constraint=Alternating(40, wrong_at=19))
    broken = dataclasses.replace(ask("broken", [13, 2], max_tokens=40), constraint=Alternating(40, broken_at=17))
    alone = dataclasses.replace(ask("alone", [14, 2], max_tokens=20), speculate=False)
    few = dataclasses.replace(ask("few", [15, 2], max_tokens=20), max_draft_tokens=1)
    return [*whole, *hot, *counted, bound, wrong, broken, alone, few]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("drafts", "unseen"), [(1, False), (7, False), (7, True)])
async def test_answers_are_those_without_drafts(overlap: bool, drafts: int, unseen: bool) -> None:
    plain, _, _ = await answers(requests(), drafts=0, overlap=overlap)
    drafted, streams, engine = await answers(requests(), drafts=drafts, overlap=overlap, unseen=unseen)
    for request, one, other in zip(requests(), plain, drafted, strict=True):
        failed = one.finish_reason is FinishReason.ERROR
        assert other.finish_reason is one.finish_reason and other.error == one.error, request.request_id
        # What came before an error depends on when it was flushed.
        assert failed or (other.token_ids, other.text) == (one.token_ids, one.text), request.request_id
        assert failed or other.logprobs == one.logprobs
    counts = {request.request_id: stream.draft_counts for request, stream in zip(requests(), streams, strict=True)}
    assert counts["alone"] == (0, 0, 0) and counts["few"][0] <= counts["few"][2]
    speculation = engine.scheduler.speculation
    assert speculation is not None and engine.scheduler.kv_cache.num_available == 256
    assert 0 < counts["plain0"][1] <= counts["plain0"][0]
    assert speculation.num_accepted_tokens > 0.3 * speculation.num_draft_tokens
    text = engine.metrics.render().decode()
    for name, value in (("drafts", speculation.num_drafts), ("draft_tokens", speculation.num_draft_tokens)):
        assert f'vllm:spec_decode_num_{name}_total{{engine="0",model_name="model"}} {float(value)}' in text
    assert 'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="model",position="0"}' in text
    assert "vllm:inter_token_latency_seconds_count" in text


class UntilAFifth(Alternating):
    """Anything goes on but an id that five divides: that is the end."""

    def mask_into(self, mask: np.ndarray) -> None:
        mask.fill(0xFFFFFFFF)

    @property
    def is_finished(self) -> bool:
        return bool(self.seen) and self.seen[-1] % 5 == 0


@pytest.mark.parametrize("unseen", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
async def test_a_draft_that_would_end_a_grammar_and_is_wrong_ends_nothing(overlap: bool, unseen: bool) -> None:
    def bound() -> list[Request]:
        return [dataclasses.replace(ask(f"r{i}", [i, 2], max_tokens=30), constraint=UntilAFifth(99)) for i in range(24)]

    plain, _, _ = await answers(bound(), drafts=0, overlap=overlap)
    drafted, _, engine = await answers(bound(), drafts=3, overlap=overlap, accuracy=0.5, unseen=unseen)
    assert engine.scheduler.speculation is not None and engine.scheduler.speculation.num_draft_tokens > 24
    for one, other in zip(plain, drafted, strict=True):
        assert other.finish_reason is one.finish_reason and other.token_ids == one.token_ids, other.error


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
async def test_a_stop_string_amid_a_run_ends_the_text_there(stream: bool, overlap: bool) -> None:
    whole = (await answers([ask("whole", [1, 2, 3], max_tokens=40)], drafts=0))[0][0]
    for at in range(0, len(whole.text) - 4, 9):
        stop = whole.text[at : at + 3]
        asked = [ask("a", [1, 2, 3], max_tokens=40, stop=(stop,), stream=stream, logprobs=0)]
        plain, _, _ = await answers(asked, drafts=0, overlap=overlap)
        drafted, streams, engine = await answers(asked, drafts=7, overlap=overlap, accuracy=1.0)
        assert drafted == plain and drafted[0].stop_reason == stop
        assert streams[0].num_output_tokens == len(plain[0].token_ids) == len(drafted[0].logprobs)
        assert streams[0].draft_counts[0] > 0 or len(plain[0].token_ids) < 3
        assert engine.metrics.finished[FinishReason.STOP] == 1


async def test_where_nothing_speculates_nothing_is_counted() -> None:
    _, streams, engine = await answers([ask("a", [1, 2, 3])], drafts=0)
    assert streams[0].draft_counts == (0, 0, 0) and engine.scheduler.speculation is None
    assert b"spec_decode" not in engine.metrics.render()
