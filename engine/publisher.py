"""Publisher: from a committed step to the streams; and what the engine keeps of each request between its steps.

Owned by the Engine, on the loop thread. Tokens go through a request's detokenizer into its TokenStream, and the HTTP
handlers take them from there.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.clock import Clock, Timer
from engine.failures import raise_fatal
from engine.forward import BoolArray, ForwardOutput
from engine.lora.tally import LoraTally
from engine.metrics import EngineMetrics
from engine.pace import Pace
from engine.recorder import Recorder
from engine.request import Adapter, FinishReason
from engine.scheduling.batch import StepResult
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, SequenceStatus
from engine.scheduling.slots import IndexArray
from engine.stream import TokenLogprob, TokenStream
from engine.text.detokenizer import IncrementalDetokenizer

logger = logging.getLogger("oneloop.engine")

_NO_NUMBER = "The model computed no number for this request."
_NO_TEXT = "The text of this request could not be written."


class NoText:
    """The detokenizer where there is no text: of an engine without a tokenizer, of a request for a vector."""

    stop_reason: str | None = None

    def push(self, token_ids: list[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""


NO_TEXT = NoText()


class Listener:
    """What the engine keeps of one request: its stream, its text state, and when it was last flushed.

    num_sent: tokens, prompt included, that need not be published any more.
    """

    __slots__ = (
        "detokenizer",
        "expires_at",
        "flushed_at",
        "has_stop_strings",
        "logprobs",
        "num_accepted",
        "num_sent",
        "per_token",
        "request_id",
        "sequence",
        "stream",
        "timer",
    )

    def __init__(self, sequence: Sequence, stream: TokenStream, detokenizer: IncrementalDetokenizer | NoText) -> None:
        request = sequence.request
        self.request_id = request.request_id
        self.sequence = sequence  # until the end
        self.stream = stream
        self.detokenizer = detokenizer
        self.has_stop_strings = bool(request.sampling.stop)
        # A request that nobody watches costs nothing per token, unless a stop string may end it.
        self.per_token = request.stream or self.has_stop_strings
        self.num_sent = sequence.num_prompt_tokens
        # Generated tokens that the request's constraint has seen.
        self.num_accepted = 0
        # Of tokens not published yet.
        self.logprobs: list[TokenLogprob] = []
        self.flushed_at = -math.inf
        self.expires_at = math.inf
        self.timer: Timer | None = None


class Publisher:
    """`listeners`: one for every request that has not ended, by its id."""

    def __init__(self, scheduler: Scheduler, metrics: EngineMetrics, clock: Clock, pace: Pace) -> None:
        """pace: how often streams are flushed while more is on its way."""
        self.listeners: dict[str, Listener] = {}
        self._scheduler = scheduler
        self._metrics = metrics
        self._clock = clock
        self.pace = pace
        # By slot: when its stream was last flushed, inf where nobody reads it; and where a stop string may end it.
        self._flushed_at: npt.NDArray[np.float64] = np.full(scheduler.limits.num_slots, -math.inf)
        self._searching: BoolArray = np.zeros(scheduler.limits.num_slots, np.bool_)
        self._num_searching = 0
        self._published_at = -math.inf
        # While somebody looks.
        self.recorder: Recorder | None = None
        # With forced tokens that are not published yet.
        self._jumped: list[Sequence] = []
        # Requests whose end somebody waits for.
        self._awaited: set[str] = set()
        self._awaited_ended: asyncio.Event = asyncio.Event()
        # By version of an adapter that somebody waits to be unused: one of its requests has ended.
        self._ended_of: dict[int, asyncio.Event] = {}
        # Where adapters are served, who counts what was done for them.
        self.lora_tally: LoraTally | None = None
        # Where prompts' pages are kept for other servers, who does so; returns what their readers must know.
        self.keep_pages: Callable[[Sequence], dict[str, Any] | None] | None = None
        # Where prompts' pages outlive this process, who sees to it.
        self.on_prompt: Callable[[Sequence], None] | None = None
        # What the weights are called that the next tokens come from.
        self.weight_version = "default"

    def name_weights(self, version: str) -> None:
        """Tokens from now on come from weights of that name; at rest only, or where only the name changes."""
        if version != self.weight_version:
            for listener in self.listeners.values():
                sequence = listener.sequence
                generated = sequence.num_tokens - sequence.num_prompt_tokens
                listener.stream.versions.append((self.weight_version, generated))
            self.weight_version = version

    def add(self, sequence: Sequence, stream: TokenStream, detokenizer: IncrementalDetokenizer | NoText) -> Listener:
        listener = Listener(sequence, stream, detokenizer)
        sequence.listener = listener
        self._num_searching += listener.has_stop_strings
        self.listeners[sequence.request.request_id] = listener
        return listener

    async def all_ended(self) -> None:
        """Wait for the end of every request that is here now."""
        self._awaited = set(self.listeners)
        self._awaited_ended.clear()
        await self._awaited_ended.wait()

    def requests(self) -> Iterable[tuple[Adapter | None, bool]]:
        """Of each that has not ended: its adapter, and whether it runs."""
        for listener in self.listeners.values():
            sequence = listener.sequence
            yield sequence.request.adapter, sequence.status is SequenceStatus.RUNNING

    def has_adapter(self, version: int) -> bool:
        """Whether a request that has not ended is for this version of an adapter."""
        adapters = (listener.sequence.request.adapter for listener in self.listeners.values())
        return any(adapter is not None and adapter.version == version for adapter in adapters)

    async def adapter_unused(self, version: int) -> None:
        """Wait until no request is for this version of an adapter; nobody may come with it any more."""
        while self.has_adapter(version):
            ended = self._ended_of.setdefault(version, asyncio.Event())
            await ended.wait()

    def jumped(self, listener: Listener, count: int) -> None:
        """A grammar forced `count` tokens on a request; they are published with the next step."""
        self._metrics.generation_tokens += count
        self._on_first_token(listener.sequence, self._clock.now())
        self._enter(listener.sequence)
        self._jumped.append(listener.sequence)

    def attach(self, result: StepResult, output: ForwardOutput) -> None:
        """Give each stream what a step computed beside its token."""
        if result.logprobs or result.prompt_logprobs:
            self._attach_logprobs(result, output)
        for sequence, place in result.pooled:
            sequence.listener.stream.pooled = output.pooled[place]

    def publish(self, result: StepResult) -> None:
        """Hand a step's tokens to the streams, and those that were forced since."""
        slots, metrics, now = result.slots, self._metrics, self._clock.now()
        scheduler, owners = self._scheduler, self._scheduler.slot_owners
        for sequence in self._jumped:
            listener = sequence.listener
            if listener.per_token and sequence.finish_reason is None:
                self._flush(listener, sequence.token_ids[listener.num_sent :].tolist(), now, hand_over=True)
        self._jumped.clear()
        if len(slots):
            metrics.generation_tokens += result.num_new
            gaps = result.gaps
            first = np.isnan(gaps)
            if first.any():
                # Finished rows have left their slot already; their listeners are asked below.
                for slot in (slots if result.counts is None else np.repeat(slots, result.counts))[first].tolist():
                    if (sequence := owners[slot]) is not None:
                        self._on_first_token(sequence, now)
                        self._enter(sequence)
                gaps = gaps[~first]
            metrics.observe_inter_token(gaps)
            if self.recorder is not None and self.recorder.left:
                self.recorder.gaps(gaps)
            rows, hand_over = self._due(slots, now)
            due = slots[rows]
            for slot, token, length, hands in zip(
                due.tolist(),
                result.token_ids[rows].tolist(),
                scheduler.known_lengths[due].tolist(),
                hand_over,
                strict=True,
            ):
                sequence = owners[slot]
                if sequence is None or sequence.finish_reason is not None:
                    continue
                listener = sequence.listener
                sent = listener.num_sent
                tokens = [token] if sent == length - 1 else scheduler.known_tokens[slot, sent:length].tolist()
                self._flush(listener, tokens, now, hand_over=hands)
        for sequence in result.finished:
            if sequence.finish_reason is FinishReason.ERROR:
                self._metrics.on_failure("not_a_number")
                self.end(sequence.listener, _NO_NUMBER)
                continue
            if sequence.listener.stream.first_token_at is None:
                self._on_first_token(sequence, now)
            self.end(sequence.listener)

    def break_off(self, listener: Listener, domain: str, sentence: str) -> None:
        """In an `except`: what is one request's own has failed, so that request ends with an error and no other."""
        logger.exception("request %s failed by its %s", listener.request_id, domain)
        if listener.request_id in self.listeners:
            self._metrics.on_failure(domain)
            self._scheduler.finish(listener.sequence, FinishReason.ERROR, None)
            self.end(listener, sentence)

    def _enter(self, sequence: Sequence) -> None:
        """It has its first token in a slot that was another's."""
        slot, listener = sequence.slot, sequence.listener
        self._flushed_at[slot] = listener.flushed_at if sequence.request.stream else math.inf
        self._searching[slot] = listener.has_stop_strings

    def _due(self, slots: IndexArray, now: float) -> tuple[IndexArray, list[bool]]:
        """Rows of a step whose text is wanted now, as indices; and which of them are handed to their readers.

        First tokens, and those behind which nothing is on its way, never wait.
        """
        flushed_at = self._flushed_at.take(slots)
        listened = flushed_at < math.inf
        due = self.pace.due(flushed_at, listened, now - self._published_at, now)
        self._published_at = now
        due |= ~self._scheduler.still_in_flight(slots)
        due |= flushed_at == -math.inf
        due &= listened
        # Where a stop string may come the text is wanted with every token, whoever reads it.
        rows = np.flatnonzero(due | self._searching.take(slots) if self._num_searching else due)
        return rows, due[rows].tolist()

    def _flush(self, listener: Listener, tokens: list[int], now: float, *, hand_over: bool) -> None:
        try:
            self._write(listener, tokens, now, hand_over=hand_over)
        except BaseException as error:
            raise_fatal(error)
            self.break_off(listener, "text", _NO_TEXT)

    def _write(self, listener: Listener, tokens: list[int], now: float, *, hand_over: bool) -> None:
        """Turn a stream's new tokens into text, and hand over what there is."""
        sequence, stream, detokenizer = listener.sequence, listener.stream, listener.detokenizer
        logprobs = listener.logprobs
        if logprobs:
            listener.logprobs = []
        text, wanted = _text_of(listener, tokens)
        listener.num_sent += len(wanted)
        stream.push(text, wanted, logprobs[: len(wanted)])
        if detokenizer.stop_reason is not None:
            self._scheduler.finish(sequence, FinishReason.STOP, detokenizer.stop_reason)
            sequence.cut(listener.num_sent)
            self.end(listener)
        elif hand_over and sequence.request.stream:
            listener.flushed_at = self._flushed_at[sequence.slot] = now
            stream.flush()

    def end(self, listener: Listener, error: str | None = None, *, status: int = 500) -> None:
        """The terminal event of a request, with whatever it had not published yet. status: of an error."""
        request_id, stream = listener.request_id, listener.stream
        if self.listeners.pop(request_id, None) is None:
            return
        sequence = listener.sequence
        self._num_searching -= listener.has_stop_strings
        if listener.timer is not None:
            listener.timer.cancel()
        if self._awaited:
            self._awaited.discard(request_id)
            if not self._awaited:
                self._awaited_ended.set()
        adapter = sequence.request.adapter
        if adapter is not None and adapter.version in self._ended_of:
            self._ended_of.pop(adapter.version).set()
        reason = sequence.finish_reason
        assert reason is not None
        stream.num_cached_tokens, stream.draft_counts = sequence.num_cached_tokens, sequence.draft_counts
        stream.versions.append((self.weight_version, sequence.num_tokens - sequence.num_prompt_tokens))
        detokenizer = listener.detokenizer
        # Who is aborted gets what was computed for it, too: a rollout goes on from there.
        if reason is not FinishReason.ERROR and error is None:
            try:
                tokens = sequence.token_ids[listener.num_sent :].tolist()
                text, tokens = _text_of(listener, tokens) if tokens else ("", tokens)
                if detokenizer.stop_reason is None:
                    tail = detokenizer.finish()
                    # Cut off by its length amid a character: half of one is nothing that a client could use.
                    text += tail if reason is FinishReason.STOP else tail.removesuffix("\ufffd")
                else:
                    reason, sequence.stop_reason = FinishReason.STOP, detokenizer.stop_reason
                    sequence.cut(listener.num_sent + len(tokens))
                stream.push(text, tokens, listener.logprobs[: len(tokens)])
            except BaseException as failure:
                raise_fatal(failure)
                logger.exception("request %s failed by its text", request_id)
                self._metrics.on_failure("text")
                reason, error = FinishReason.ERROR, _NO_TEXT
        if sequence.num_tokens > sequence.num_prompt_tokens:
            # A grammar may end a request before its first token is published.
            self._on_first_token(sequence, self._clock.now())
        self._observe_end(listener, reason)
        transfer = sequence.request.transfer
        ended_well = error is None and reason in (FinishReason.STOP, FinishReason.LENGTH)
        if ended_well and transfer is not None and transfer.keep and self.keep_pages is not None:
            stream.kv_transfer_params = self.keep_pages(sequence)
        if ended_well and sequence.request.constraint is not None and self.on_prompt is not None:
            # A grammar may have known the first token before the prompt was computed.
            self.on_prompt(sequence)
        if error is not None:
            reason = FinishReason.ERROR
        # Steps in flight find the listener by its sequence. Both ways it would be a circle, which stays, with prompt
        # and answer, until the garbage collector goes through everything.
        del listener.sequence
        stream.finish(reason, sequence.stop_reason, error, status=status)

    def _on_first_token(self, sequence: Sequence | None, now: float) -> None:
        if sequence is None or sequence.listener.stream.first_token_at is not None:
            return
        listener = sequence.listener
        listener.stream.first_token_at = now
        listener.stream.num_cached_tokens = sequence.num_cached_tokens
        self._metrics.prompt_tokens += sequence.num_prompt_tokens
        if self.recorder is not None:
            self.recorder.first_token(sequence.request.request_id, now - sequence.arrived_at)
        admitted = sequence.admitted_at or now
        self._metrics.on_first_token(
            now - sequence.arrived_at,
            admitted - sequence.arrived_at,
            now - admitted,
            stream=sequence.request.stream,
        )
        if self.on_prompt is not None:
            self.on_prompt(sequence)

    def _observe_end(self, listener: Listener, reason: FinishReason) -> None:
        sequence, now = listener.sequence, self._clock.now()
        listener.stream.finished_at, listener.stream.admitted_at = now, sequence.admitted_at
        if self.recorder is not None:
            request_id, num_output = sequence.request.request_id, sequence.num_tokens - sequence.num_prompt_tokens
            self.recorder.event(request_id, "tokens", num_output)
            self.recorder.finished(request_id, reason.value)
        first = listener.stream.first_token_at
        self._metrics.on_finished(
            reason,
            num_prompt=sequence.num_prompt_tokens,
            num_output=sequence.num_tokens - sequence.num_prompt_tokens,
            num_cached=sequence.num_cached_tokens,
            e2e=now - sequence.arrived_at,
            decode_time=now - first if first is not None else None,
            max_tokens=sequence.request.sampling.max_tokens,
            queue_time=(sequence.admitted_at or now) - sequence.arrived_at,
            stream=sequence.request.stream,
        )
        if (adapter := sequence.request.adapter) is not None and self.lora_tally is not None:
            num_output = sequence.num_tokens - sequence.num_prompt_tokens
            self.lora_tally.finished(adapter.name, sequence.num_prompt_tokens, num_output)

    def publish_failure(self, result: StepResult) -> None:
        # What exactly failed is for the log: it may name paths and addresses.
        for sequence in result.finished:
            self._metrics.on_failure("forward")
            self.end(sequence.listener, "The model failed to compute this request.")

    def end_all(self, error: str) -> None:
        """The engine is beyond repair: every stream ends with an error event."""
        for listener in list(self.listeners.values()):
            listener.sequence.finish_reason = FinishReason.ERROR
            self.end(listener, error)

    def _attach_logprobs(self, result: StepResult, output: ForwardOutput) -> None:
        """Give each listener the log-probabilities of its new token, and of its prompt's tokens."""
        calls = [(one, partial(_attach_logprob, one, output, index, token)) for one, index, token in result.logprobs]
        calls += [(one, partial(_attach_prompt_logprobs, one, output, index)) for one, index in result.prompt_logprobs]
        for sequence, attach in calls:
            try:
                attach()
            except BaseException as error:
                raise_fatal(error)
                sentence = "The log-probabilities of this request could not be told."
                self.break_off(sequence.listener, "logprobs", sentence)


def _text_of(listener: Listener, tokens: list[int]) -> tuple[str, list[int]]:
    """The text of new tokens; and those of them that come before its end, where a stop string is met."""
    detokenizer = listener.detokenizer
    if len(tokens) == 1 or not listener.has_stop_strings:
        return detokenizer.push(tokens), tokens
    text = ""
    for count, token in enumerate(tokens, 1):
        text += detokenizer.push([token])
        if detokenizer.stop_reason is not None:
            return text, tokens[:count]
    return text, tokens


def _attach_logprob(sequence: Sequence, output: ForwardOutput, index: int, token: int) -> None:
    step = output.logprobs
    assert step is not None
    wanted = sequence.request.sampling.logprobs or 0
    top = zip(step.top_ids[index, :wanted].tolist(), step.top_logprobs[index, :wanted].tolist(), strict=True)
    sequence.listener.logprobs.append(
        TokenLogprob(token, float(step.token_logprobs[index]), int(step.ranks[index]), tuple(top))
    )


def _attach_prompt_logprobs(sequence: Sequence, output: ForwardOutput, index: int) -> None:
    chunk = output.prompt_logprobs[index]
    wanted = sequence.request.sampling.prompt_logprobs or 0
    stream = sequence.listener.stream
    if stream.prompt_logprobs is None:
        stream.prompt_logprobs = []
    tokens = sequence.token_ids
    for i in range(len(chunk.token_logprobs)):
        place = chunk.first + i
        # The first token has none; a retracted sequence computes its prompt again, and the output after it.
        if place - 1 != len(stream.prompt_logprobs) or place >= sequence.num_prompt_tokens:
            continue
        top = zip(chunk.top_ids[i, :wanted].tolist(), chunk.top_logprobs[i, :wanted].tolist(), strict=True)
        stream.prompt_logprobs.append(
            TokenLogprob(int(tokens[place]), float(chunk.token_logprobs[i]), int(chunk.ranks[i]), tuple(top))
        )
