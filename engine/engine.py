"""Engine: the one task that schedules, launches, commits and publishes; and the door through which requests come.

Lives on the loop thread. Below it everything is synchronous. It owns the streams: tokens go from a committed step
through the detokenizer into each request's TokenStream, and the HTTP handlers take them from there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import random
from collections import deque

import numpy as np
from numpy.typing import NDArray

from engine.clock import Clock, MonotonicClock
from engine.config import EngineConfig
from engine.executor.base import Executor, StepHandle
from engine.forward import DeviceLostError, ForwardError, ForwardOutput
from engine.metrics import EngineMetrics, EngineStats
from engine.request import FinishReason, QueueFullError, Request, TokenConstraint, UnavailableError
from engine.scheduling.batch import Batch
from engine.scheduling.scheduler import Scheduler, StepResult
from engine.scheduling.sequence import Sequence
from engine.stream import TokenLogprob, TokenStream
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger("oneloop.engine")


class _NoText:
    """The detokenizer where there is no text: of an engine without a tokenizer, of a request for a vector."""

    stop_reason: str | None = None

    def push(self, token_ids: list[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""


NO_TEXT = _NoText()


class _Listener:
    """What the engine keeps of one request: its stream, its text state, and when things happened."""

    __slots__ = (
        "detokenizer",
        "first_token_at",
        "flushed_at",
        "has_stop_strings",
        "logprobs",
        "num_accepted",
        "num_published",
        "per_token",
        "sequence",
        "stream",
    )

    def __init__(self, sequence: Sequence, stream: TokenStream, detokenizer: IncrementalDetokenizer | _NoText) -> None:
        request = sequence.request
        self.sequence = sequence
        self.stream = stream
        self.detokenizer = detokenizer
        self.has_stop_strings = bool(request.sampling.stop)
        # A request that nobody watches costs nothing per token, unless a stop string may end it.
        self.per_token = request.stream or self.has_stop_strings
        self.num_published = 0
        # Generated tokens that the request's constraint has seen.
        self.num_accepted = 0
        # Of tokens not published yet.
        self.logprobs: list[TokenLogprob] = []
        self.first_token_at: float | None = None
        self.flushed_at = -math.inf


class Engine:
    """`submit` requests, `abort` them, and let `run` turn them into tokens until it is cancelled.

    tokenizer None: streams carry token ids and no text (benchmarks).
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        tokenizer: Tokenizer | None,
        *,
        eos_token_ids: tuple[int, ...] = (),
        metrics: EngineMetrics | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config
        self.executor = executor
        self.limits = executor.limits
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.clock: Clock = clock or MonotonicClock()
        self.metrics = metrics or EngineMetrics(model_name="model", max_model_len=executor.limits.max_model_len)
        self.metrics.bind(self.stats)
        self.scheduler = Scheduler(
            executor.limits, config.scheduler, config.cache, executor.staging, self.clock, eos_token_ids
        )
        self.depth = 2 if config.scheduler.overlap else 1
        self.draining = False
        self.failed = False
        self._rng = rng or random.Random()
        self._flush_interval = config.stream.flush_interval_ms / 1000.0
        self._listeners: dict[str, _Listener] = {}
        self._wake: asyncio.Event = asyncio.Event()
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self._progress_at = self.clock.now()

    # ---- the door

    def submit(self, request: Request) -> TokenStream:
        """Queue a request. Raises RequestError (400, 429 or 503) for one that is not taken."""
        if self.failed:
            raise UnavailableError("The engine has failed and is shutting down.")
        if self.draining:
            raise UnavailableError("The server is shutting down and takes no new requests.")
        if self.scheduler.num_waiting >= self.config.scheduler.max_queued_requests:
            self.metrics.on_rejected("queue_full")
            raise QueueFullError("Too many requests are waiting; please retry later.")
        assert request.request_id not in self._listeners, "request ids are unique"
        if request.sampling.seed is None and request.sampling.temperature > 0:
            sampling = dataclasses.replace(request.sampling, seed=self._rng.getrandbits(63))
            request = dataclasses.replace(request, sampling=sampling)
        sequence = self.scheduler.submit(request)
        stream = TokenStream(request.request_id, sequence.num_prompt_tokens, self.abort)
        detokenizer = (
            NO_TEXT
            if self.tokenizer is None or request.pooling is not None
            else IncrementalDetokenizer(self.tokenizer, request.prompt_token_ids, request.sampling)
        )
        listener = _Listener(sequence, stream, detokenizer)
        sequence.listener = listener
        self._listeners[request.request_id] = listener
        if self._idle.is_set():
            self._idle.clear()
            self._progress_at = self.clock.now()
        self._wake.set()
        return stream

    def abort(self, request_id: str) -> None:
        """End a request now; nothing happens if it has ended or never was."""
        listener = self._listeners.get(request_id)
        if listener is None:
            return
        self.scheduler.abort(listener.sequence)
        self._end(listener)
        # An idle loop has nothing to commit, so it must be told that the sequence is gone.
        self._wake.set()

    def flush_cache(self) -> bool:
        """Forget every cached prefix. False, and nothing done, while requests run or wait."""
        if self.scheduler.has_work:
            return False
        self.scheduler.kv_cache.flush()
        return True

    def drain(self) -> None:
        """Take no new requests; what was accepted goes on."""
        self.draining = True

    async def drained(self) -> None:
        """Wait until nothing is left to do."""
        await self._idle.wait()

    def seconds_since_progress(self) -> float:
        """How long work has been standing still; 0 while idle."""
        return 0.0 if self._idle.is_set() else self.clock.now() - self._progress_at

    def stats(self) -> EngineStats:
        """A snapshot for /metrics and /server_info."""
        cache, counters, metrics = self.scheduler.kv_cache, self.scheduler.counters, self.metrics
        metrics.prefix_cache_queries = counters.prefix_cache_queries
        metrics.prefix_cache_hits = counters.prefix_cache_hits
        metrics.num_preemptions = counters.num_preemptions
        metrics.evicted_pages = cache.num_evicted_pages
        used = cache.num_pages - cache.num_available
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_used_pages=used,
            num_total_pages=cache.num_pages,
            page_size=cache.page_size,
            num_evictable_pages=cache.num_evictable,
        )

    # ---- the loop

    async def run(self) -> None:
        """Serve until cancelled. Returns only by raising: what it raises means that the process must end."""
        in_flight: deque[tuple[Batch, StepHandle]] = deque()
        scheduler, executor = self.scheduler, self.executor
        try:
            while True:
                batch = scheduler.schedule()  # N+1, while N runs on the device
                if batch is not None:
                    self.metrics.on_step(batch.num_tokens)
                    in_flight.append((batch, executor.submit(batch.forward_input)))
                if not in_flight:
                    if not scheduler.has_work:
                        self._idle.set()
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                if len(in_flight) == self.depth or batch is None:
                    done, handle = in_flight.popleft()
                    self._provide_masks(done, handle)
                    try:
                        output = await executor.wait(handle)
                    except ForwardError as error:
                        logger.error("a step failed and its requests with it: %s", error)
                        result = scheduler.fail(done, error)
                        self._provide_masks_of_next(in_flight)
                        self._publish_failure(result)
                    else:
                        result = scheduler.commit(done, output)
                        # First, for a grammar may end its request in the next line.
                        if result.logprobs or result.prompt_logprobs:
                            _attach_logprobs(result, output)
                        for sequence, place in result.pooled:
                            sequence.listener.stream.pooled = output.pooled[place]
                        # The device may be waiting for these: before the streams.
                        self._provide_masks_of_next(in_flight)
                        self._publish(result)
                    self._progress_at = self.clock.now()
                    # A device that is always ahead must not keep the sockets from being served.
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._fail_all(error)
            raise
        finally:
            # A worker that waits for a mask would never end.
            for batch, _ in in_flight:
                if batch.forward_input.masks is not None:
                    batch.forward_input.masks.release()

    def _provide_masks_of_next(self, in_flight: deque[tuple[Batch, StepHandle]]) -> None:
        if in_flight:
            self._provide_masks(*in_flight[0])

    def _provide_masks(self, batch: Batch, handle: StepHandle) -> None:
        """Tell the oldest step in flight what its constrained rows may sample: all before it is committed now."""
        masks = batch.forward_input.masks
        if masks is None or masks.is_ready:
            return
        for bits, (_, sequence) in zip(masks.bits, batch.constrained, strict=True):
            constraint = sequence.request.constraint
            listener = sequence.listener
            assert constraint is not None
            try:
                for token in sequence.token_ids[sequence.num_prompt_tokens + listener.num_accepted :].tolist():
                    constraint.accept(token)
                    listener.num_accepted += 1
                if not sequence.is_finished and _may_go_on(constraint, bits):
                    continue
                if not sequence.is_finished and constraint.error is not None:
                    self.scheduler.finish(sequence, FinishReason.ERROR, None)
                    sentence = f"The grammar of this request failed: {constraint.error}."
                    self._end(listener, sentence, bad_request=True)
            except Exception:
                # One grammar that breaks is one request's error.
                logger.exception("the grammar of request %s failed", sequence.request.request_id)
                self.scheduler.finish(sequence, FinishReason.ERROR, None)
                self._end(listener, "The grammar of this request failed.")
            if not sequence.is_finished:
                self.scheduler.finish(sequence, FinishReason.STOP, None)
                self._end(listener)
            bits.fill(0xFFFFFFFF)  # an overrun row: whatever it samples is dropped
        masks.release()
        self.executor.provide_masks(handle)

    def _publish(self, result: StepResult) -> None:
        """Hand a step's tokens to the streams."""
        slots, metrics, now = result.slots, self.metrics, self.clock.now()
        if len(slots):
            metrics.generation_tokens += len(slots)
            gaps = result.gaps
            first = np.isnan(gaps)
            if first.any():
                # Finished rows have left their slot already; their listeners are asked below.
                for slot in slots[first].tolist():
                    self._on_first_token(self.scheduler.slot_owners[slot], now)
                gaps = gaps[~first]
            metrics.observe_inter_token(gaps)
            busy = self.scheduler.still_in_flight(slots)
            wait_allowed = bool(busy.all())
            owners, interval = self.scheduler.slot_owners, self._flush_interval
            for row, slot in enumerate(slots.tolist()):
                sequence = owners[slot]
                if sequence is None:
                    continue
                listener = sequence.listener
                if not listener.per_token or sequence.finish_reason is not None:
                    continue
                if (
                    listener.has_stop_strings
                    or now - listener.flushed_at >= interval
                    or not (wait_allowed or busy[row])
                ):
                    self._flush(listener, now)
        for sequence in result.finished:
            if sequence.listener.first_token_at is None:
                self._on_first_token(sequence, now)
            self._end(sequence.listener)

    def _flush(self, listener: _Listener, now: float) -> None:
        """Turn a stream's new tokens into text and hand them over."""
        sequence, stream = listener.sequence, listener.stream
        tokens = sequence.token_ids[sequence.num_prompt_tokens + listener.num_published :].tolist()
        listener.num_published += len(tokens)
        logprobs, listener.logprobs = listener.logprobs, []
        stream.push(listener.detokenizer.push(tokens), tokens, logprobs)
        if listener.detokenizer.stop_reason is not None:
            self.scheduler.finish(sequence, FinishReason.STOP, listener.detokenizer.stop_reason)
            self._end(listener)
        elif sequence.request.stream:
            listener.flushed_at = now
            stream.flush()

    def _end(self, listener: _Listener, error: str | None = None, *, bad_request: bool = False) -> None:
        """The terminal event of a request, with whatever it had not published yet."""
        sequence, stream = listener.sequence, listener.stream
        if self._listeners.pop(sequence.request.request_id, None) is None:
            return
        reason = sequence.finish_reason
        assert reason is not None
        stream.num_cached_tokens = sequence.num_cached_tokens
        detokenizer = listener.detokenizer
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            tokens = sequence.output_token_ids[listener.num_published :]
            text = detokenizer.push(tokens) if tokens else ""
            if detokenizer.stop_reason is None:
                tail = detokenizer.finish()
                # Cut off by its length amid a character: half of one is nothing that a client could use.
                text += tail.removesuffix("\ufffd") if reason is FinishReason.LENGTH else tail
            else:
                reason, sequence.stop_reason = FinishReason.STOP, detokenizer.stop_reason
            stream.push(text, tokens, listener.logprobs)
        self._observe_end(listener, reason)
        stream.finish(reason, sequence.stop_reason, error, bad_request=bad_request)

    def _on_first_token(self, sequence: Sequence | None, now: float) -> None:
        if sequence is None or sequence.listener.first_token_at is not None:
            return
        listener = sequence.listener
        listener.first_token_at = now
        listener.stream.num_cached_tokens = sequence.num_cached_tokens
        self.metrics.prompt_tokens += sequence.num_prompt_tokens
        admitted = sequence.admitted_at or now
        self.metrics.on_first_token(
            now - sequence.arrived_at,
            admitted - sequence.arrived_at,
            now - admitted,
            stream=sequence.request.stream,
        )

    def _observe_end(self, listener: _Listener, reason: FinishReason) -> None:
        sequence, now = listener.sequence, self.clock.now()
        first = listener.first_token_at
        self.metrics.on_finished(
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

    def _publish_failure(self, result: StepResult) -> None:
        # What exactly failed is for the log: it may name paths and addresses.
        for sequence in result.finished:
            self._end(sequence.listener, "The model failed to compute this request.")

    def _fail_all(self, error: BaseException) -> None:
        """The engine is beyond repair: every stream ends with an error event."""
        self.failed = True
        what = "the device was lost" if isinstance(error, DeviceLostError) else "internal error"
        for listener in list(self._listeners.values()):
            listener.sequence.finish_reason = FinishReason.ERROR
            self._end(listener, f"The engine failed: {what}")
        self._idle.set()


def _may_go_on(constraint: TokenConstraint, bits: NDArray[np.uint32]) -> bool:
    """Write what may be sampled; False where nothing may: the grammar has ended, or failed."""
    if constraint.is_free:
        bits.fill(0xFFFFFFFF)
        return True
    # A grammar that has failed calls itself finished as well.
    if constraint.error is not None or constraint.is_finished:
        return False
    constraint.mask_into(bits)
    return constraint.error is None


def _attach_logprobs(result: StepResult, output: ForwardOutput) -> None:
    """Give each listener the log-probabilities of its new token, and of its prompt's tokens."""
    step = output.logprobs
    for sequence, index in result.logprobs:
        assert step is not None
        wanted = sequence.request.sampling.logprobs or 0
        token = int(output.token_ids[step.rows[index]])
        sequence.listener.logprobs.append(
            TokenLogprob(
                token,
                float(step.token_logprobs[index]),
                int(step.ranks[index]),
                tuple(
                    zip(step.top_ids[index, :wanted].tolist(), step.top_logprobs[index, :wanted].tolist(), strict=True)
                ),
            )
        )
    for sequence, index in result.prompt_logprobs:
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
