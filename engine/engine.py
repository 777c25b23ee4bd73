"""Engine: the one task that schedules, launches, commits and publishes; and the door through which requests come.

Lives on the loop thread. Below it everything is synchronous. It owns the streams: tokens go from a committed step
through the detokenizer into each request's TokenStream, and the HTTP handlers take them from there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import math
import random
from collections import deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.clock import Clock, MonotonicClock, RangeOf, Timer, in_range
from engine.config import EngineConfig
from engine.executor.base import Executor, StepHandle
from engine.forward import DeviceLostError, ForwardError, ForwardOutput
from engine.metrics import EngineMetrics, EngineStats, Rates
from engine.request import FinishReason, QueueFullError, Request, RequestError, TokenConstraint, UnavailableError
from engine.scheduling.batch import Batch
from engine.scheduling.scheduler import Scheduler, StepResult
from engine.scheduling.sequence import Sequence, SequenceStatus
from engine.stream import TokenLogprob, TokenStream
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger("oneloop.engine")

# What becomes of the requests that are there when the engine comes to rest.
PAUSE_MODES = ("abort", "wait", "keep")
MAX_LOOKED_UP = 256


class _NoText:
    """The detokenizer where there is no text: of an engine without a tokenizer, of a request for a vector."""

    stop_reason: str | None = None

    def push(self, token_ids: list[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""


NO_TEXT = _NoText()


class _Listener:
    """What the engine keeps of one request: its stream, its text state, and when it was last flushed."""

    __slots__ = (
        "detokenizer",
        "expires_at",
        "flushed_at",
        "has_stop_strings",
        "logprobs",
        "num_accepted",
        "num_published",
        "per_token",
        "sequence",
        "stream",
        "timer",
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
        self.flushed_at = -math.inf
        self.expires_at = math.inf
        self.timer: Timer | None = None


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
        # For whoever balances load between servers.
        self.rates = Rates(self.metrics, self.clock.now)
        self.scheduler = Scheduler(
            executor.limits, config.scheduler, config.cache, executor.staging, self.clock, eos_token_ids
        )
        self.depth = 2 if config.scheduler.overlap else 1
        self.draining = False
        self.failed = False
        self._rng = rng or random.Random()
        self._flush_interval = config.stream.flush_interval_ms / 1000.0
        self._listeners: dict[str, _Listener] = {}
        # With forced tokens that are not published yet.
        self._jumped: list[_Listener] = []
        self._wake: asyncio.Event = asyncio.Event()
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self._progress_at = self.clock.now()
        # Why nothing is scheduled, and whether the loop has come to rest over it.
        self.is_paused = False
        self.sleep_level = 0
        self._loading = False
        self._stopped = False
        self.weight_version = "default"
        self._weights_directory: Path | None = None  # where others than the first came from
        self._at_rest: asyncio.Event = asyncio.Event()
        self._maintenance = asyncio.Lock()
        # Requests whose end somebody waits for.
        self._awaited: set[str] = set()
        self._awaited_ended: asyncio.Event = asyncio.Event()

    # ---- the door

    def submit(self, request: Request) -> TokenStream:
        """Queue a request. Raises RequestError (400, 429 or 503) for one that is not taken."""
        if self.failed:
            raise UnavailableError("The engine has failed and is shutting down.")
        if self.draining:
            raise UnavailableError("The server is shutting down and takes no new requests.")
        if self.sleep_level:
            raise UnavailableError("The model is asleep; POST /wake_up first.")
        if self.scheduler.num_waiting >= self.config.scheduler.max_queued_requests:
            self.metrics.on_rejected("queue_full")
            raise QueueFullError("Too many requests are waiting; please retry later.")
        assert request.request_id not in self._listeners, "request ids are unique"
        self._check_rows(request)
        if request.sampling.seed is None and request.sampling.temperature > 0:
            sampling = dataclasses.replace(request.sampling, seed=self._rng.getrandbits(63))
            request = dataclasses.replace(request, sampling=sampling)
        sequence = self.scheduler.submit(request)
        stream = TokenStream(request.request_id, sequence.num_prompt_tokens, self.abort, sequence.arrived_at)
        detokenizer = (
            NO_TEXT
            if self.tokenizer is None or request.pooling is not None
            else IncrementalDetokenizer(self.tokenizer, request.prompt_token_ids, request.sampling)
        )
        listener = _Listener(sequence, stream, detokenizer)
        sequence.listener = listener
        self._listeners[request.request_id] = listener
        options = self.config.scheduler
        if (
            options.queue_timeout_s is not None
            or options.request_timeout_s is not None
            or request.timeout_s is not None
        ):
            self._set_timer(listener)
        if self._idle.is_set():
            self._idle.clear()
            self._progress_at = self.clock.now()
        self._wake.set()
        return stream

    def _check_rows(self, request: Request) -> None:
        """A vocabulary may have tokens (a pad that was never trained) that the model's embedding has no row for."""
        rows = self.limits.vocab_size
        if self.tokenizer is None or self.tokenizer.vocab_size <= rows:
            return
        over = next((token_id for token_id in request.prompt_token_ids if token_id >= rows), None)
        if over is not None:
            shown = self.tokenizer.id_to_token(over)
            named = f"{over} ({shown[:80]!r})" if shown else str(over)
            raise RequestError(
                f"The prompt holds the token {named}, which the model cannot read: its embedding has {rows} rows.",
                param="prompt" if request.pooling is None else "input",
            )

    def abort(self, request_id: str) -> None:
        """End a request now; nothing happens if it has ended or never was."""
        listener = self._listeners.get(request_id)
        if listener is None:
            return
        self.scheduler.abort(listener.sequence)
        self._end(listener)
        # An idle loop has nothing to commit, so it must be told that the sequence is gone.
        self._wake.set()

    def abort_all(self) -> None:
        for request_id in list(self._listeners):
            self.abort(request_id)

    def _set_timer(self, listener: _Listener) -> None:
        request, options = listener.sequence.request, self.config.scheduler
        limits = [limit for limit in (request.timeout_s, options.request_timeout_s) if limit is not None]
        if limits:
            listener.expires_at = listener.sequence.arrived_at + min(limits)
        self._on_timer(listener)

    def _on_timer(self, listener: _Listener) -> None:
        """End a request whose time is over, or look again when it is. Costs nothing between submit and then."""
        sequence, now, queue_timeout = listener.sequence, self.clock.now(), self.config.scheduler.queue_timeout_s
        leaves_queue_at = math.inf
        if queue_timeout is not None and sequence.admitted_at is None:
            leaves_queue_at = sequence.arrived_at + queue_timeout
        if now >= listener.expires_at:
            self._expire(listener, 504, f"The request took longer than {now - sequence.arrived_at:.3g} seconds.")
        elif now >= leaves_queue_at:
            self.metrics.on_rejected("queue_timeout")
            self._expire(listener, 503, f"The request waited for {queue_timeout:g} seconds; please retry later.")
        elif (due := min(listener.expires_at, leaves_queue_at)) < math.inf:
            listener.timer = self.clock.call_later(due - now, functools.partial(self._on_timer, listener))

    def _expire(self, listener: _Listener, status: int, sentence: str) -> None:
        self.scheduler.abort(listener.sequence)
        self._end(listener, sentence, status=status)
        self._wake.set()

    def flush_cache(self) -> bool:
        """Forget every cached prefix. False, and nothing done, while requests run or wait."""
        if self.scheduler.has_work:
            return False
        self.scheduler.kv_cache.flush()
        return True

    def drain(self) -> None:
        """Take no new requests; what was accepted goes on, also where it was paused."""
        self.draining = True
        if self.sleep_level:
            self.abort_all()
        self.is_paused = False
        self._settle()
        self._at_rest.set()

    async def drained(self) -> None:
        """Wait until nothing is left to do."""
        await self._idle.wait()

    def seconds_since_progress(self) -> float:
        """How long work has been standing still; 0 while idle, and while it is meant to stand still."""
        return 0.0 if self._idle.is_set() or self._stopped else self.clock.now() - self._progress_at

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

    def name_stages(self, range_of: RangeOf) -> None:
        """Put schedule and commit into named ranges of a profiler's time line. Costs nothing until it is called."""
        for name in ("schedule", "commit"):
            setattr(self.scheduler, name, in_range(getattr(self.scheduler, name), name, range_of))

    def num_waiting_uncached_tokens(self) -> int:
        """Tokens that wait to be computed. The cache is asked about the oldest MAX_LOOKED_UP sequences alone."""
        waiting = [one.sequence for one in self._listeners.values() if one.sequence.status is SequenceStatus.WAITING]
        tokens = sum(sequence.num_tokens for sequence in waiting)
        cache = self.scheduler.kv_cache
        return tokens - sum(
            cache.match_length(sequence.matchable_ids, sequence.request.namespace)
            for sequence in waiting[:MAX_LOOKED_UP]
        )

    # ---- standing still

    async def pause(self, mode: str = "abort") -> None:
        """Come to rest; new requests queue up until `resume`. Returns when nothing is in flight.

        mode: what becomes of those that are there: "abort" ends them, "wait" lets them finish first, "keep" holds
        them in their places.
        """
        async with self._maintenance:
            await self._clear(mode)
            await self._rest()
            self.is_paused = True

    async def resume(self) -> None:
        """Go on after `pause`."""
        async with self._maintenance:
            self.is_paused = False
            self._settle()

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Rest, and give the device's memory back (see Executor.sleep). New requests are refused. mode: as in pause;
        what is kept is computed again after `wake_up`. Raises RequestError while it sleeps at another level.
        """
        await self._undisturbed(self._sleep(level, mode))

    async def wake_up(self) -> None:
        """End of a sleep; nothing happens where there is none. Raises StartupError where memory or weights are lost."""
        await self._undisturbed(self._wake_up())

    async def load_weights(self, directory: Path, *, abort: bool = False, version: str | None = None) -> None:
        """Serve with other weights of the same model, after those who are here have finished (abort: were ended).
        version: what to call them from then on.

        Forgets the prefix cache. Raises StartupError where the weights cannot be used, and RequestError where nobody
        could finish; then the old ones serve on.
        """
        await self._undisturbed(self._load_weights(directory, abort, version))

    async def _sleep(self, level: int, mode: str) -> None:
        if self.sleep_level == level:
            return
        if self.sleep_level:
            raise RequestError(f"The model sleeps at level {self.sleep_level}; wake it up first.", param="level")
        if not self.is_paused or mode == "abort":
            await self._clear(mode)
        self.sleep_level = level
        try:
            await self._rest()
            self._forget()
            await asyncio.to_thread(self.executor.sleep, level)
        except BaseException:
            self.sleep_level = 0
            self._settle()
            raise

    async def _wake_up(self) -> None:
        if self.sleep_level:
            await asyncio.to_thread(self.executor.wake_up, self._weights_directory)
            self.sleep_level = 0
            self._settle()

    async def _load_weights(self, directory: Path, abort: bool, version: str | None) -> None:
        if self.sleep_level:
            raise RequestError("The model is asleep; POST /wake_up first.")
        await self._clear("abort" if abort else "wait")
        self._loading = True
        try:
            await self._rest()
            self._forget()
            await asyncio.to_thread(self.executor.load_weights, directory)
            self._weights_directory = directory
            self.weight_version = version or self.weight_version
        finally:
            self._loading = False
            self._settle()

    async def _undisturbed(self, work: Coroutine[Any, Any, None]) -> None:
        """Let `work` end even where its caller does not wait for it: half asleep is no state to be in."""

        async def run() -> None:
            async with self._maintenance:
                await work

        task = asyncio.ensure_future(run())
        # Somebody must have looked at it, also when the caller has gone.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(task)

    async def _clear(self, mode: str) -> None:
        """What happens to those who are here, before a rest."""
        assert mode in PAUSE_MODES
        if mode == "abort":
            self.abort_all()
        elif mode == "wait" and self._listeners:
            if self._stopped:
                raise RequestError("The engine is paused amid its requests; resume it, or abort them.")
            self.scheduler.hold()
            self._awaited = set(self._listeners)
            self._awaited_ended.clear()
            try:
                await self._awaited_ended.wait()
            except asyncio.CancelledError:
                self.scheduler.let_go()
                self._wake.set()
                raise

    async def _rest(self) -> None:
        """Stop scheduling, and wait until nothing is in flight. A drain does not wait for it, and ends it."""
        if not self.draining:
            self._stopped = True
            self._at_rest.clear()
            self._wake.set()
            try:
                await self._at_rest.wait()
            except asyncio.CancelledError:
                self._settle()
                raise
        if self.failed:
            raise UnavailableError("The engine has failed and is shutting down.")
        if self.draining:
            self._settle()
            raise UnavailableError("The server is shutting down.")

    def _settle(self) -> None:
        """Go on scheduling, unless there is still a reason not to."""
        self._stopped = self.is_paused or self._loading or self.sleep_level > 0
        if not self._stopped:
            self.scheduler.let_go()
        self._progress_at = self.clock.now()
        self._wake.set()

    def _forget(self) -> None:
        """Take every page back; at rest only. Who runs will be computed again."""
        self.scheduler.retract_all()
        self.scheduler.kv_cache.flush()

    # ---- the loop

    async def run(self) -> None:
        """Serve until cancelled. Returns only by raising: what it raises means that the process must end."""
        in_flight: deque[tuple[Batch, StepHandle]] = deque()
        scheduler, executor = self.scheduler, self.executor
        try:
            while True:
                batch = None if self._stopped else scheduler.schedule()  # N+1, while N runs on the device
                if batch is not None:
                    self.metrics.on_step(batch.num_tokens)
                    in_flight.append((batch, executor.submit(batch.forward_input)))
                    if len(in_flight) == 1:
                        self._provide_masks(*in_flight[0])
                if not in_flight:
                    if not scheduler.has_work:
                        self._idle.set()
                    if self._stopped:
                        self._at_rest.set()
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                if len(in_flight) == self.depth or batch is None:
                    done, handle = in_flight.popleft()
                    try:
                        output = await executor.wait(handle)
                    except ForwardError as error:
                        logger.error("a step failed and its requests with it: %s", error)
                        result = scheduler.fail(done, error)
                        if in_flight:
                            self._provide_masks(*in_flight[0])
                        self._publish_failure(result)
                    else:
                        result = scheduler.commit(done, output)
                        # First, for a grammar may end its request in the next line.
                        if result.logprobs or result.prompt_logprobs:
                            _attach_logprobs(result, output)
                        for sequence, place in result.pooled:
                            sequence.listener.stream.pooled = output.pooled[place]
                        # The device may be waiting for these: before the streams.
                        if in_flight:
                            self._provide_masks(*in_flight[0])
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

    def _provide_masks(self, batch: Batch, handle: StepHandle) -> None:
        """Tell the only step in flight what its constrained rows may sample: all before it is committed now."""
        masks = batch.forward_input.masks
        if masks is None:
            return
        for bits, (row, sequence) in zip(masks.bits, batch.constrained, strict=True):
            if not sequence.is_finished:
                try:
                    if self._constrain(batch, row, sequence, bits):
                        continue
                except Exception:
                    # One grammar that breaks is one request's error.
                    logger.exception("the grammar of request %s failed", sequence.request.request_id)
                    self.scheduler.finish(sequence, FinishReason.ERROR, None)
                    self._end(sequence.listener, "The grammar of this request failed.")
            bits.fill(0xFFFFFFFF)  # an overrun row: whatever it samples is dropped
        masks.release()
        self.executor.provide_masks(handle)

    def _constrain(self, batch: Batch, row: int, sequence: Sequence, bits: NDArray[np.uint32]) -> bool:
        """Write what a row may sample; False where its sequence has ended instead."""
        constraint, listener = sequence.request.constraint, sequence.listener
        assert constraint is not None
        _follow(constraint, sequence)
        if _may_go_on(constraint, bits):
            # The mask allows the first forced token alone, so the tokens are the same where nothing is jumped.
            count = self.scheduler.jump(batch, row, constraint.forced_tokens())
            if not count:
                return True
            self.metrics.generation_tokens += count
            self._on_first_token(sequence, self.clock.now())
            self._jumped.append(listener)
            _follow(constraint, sequence)
            if not (sequence.is_finished or constraint.is_finished or constraint.error is not None):
                return True
        if not sequence.is_finished and constraint.error is not None:
            self.scheduler.finish(sequence, FinishReason.ERROR, None)
            self._end(listener, f"The grammar of this request failed: {constraint.error}.", status=400)
        else:
            self.scheduler.finish(sequence, FinishReason.STOP, None)
            self._end(listener)
        return False

    def _publish(self, result: StepResult) -> None:
        """Hand a step's tokens to the streams, and those that were forced since."""
        slots, metrics, now = result.slots, self.metrics, self.clock.now()
        for listener in self._jumped:
            if listener.per_token and listener.sequence.finish_reason is None:
                self._flush(listener, now)
        self._jumped.clear()
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
            if sequence.listener.stream.first_token_at is None:
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

    def _end(self, listener: _Listener, error: str | None = None, *, status: int = 500) -> None:
        """The terminal event of a request, with whatever it had not published yet. status: of an error."""
        sequence, stream = listener.sequence, listener.stream
        request_id = sequence.request.request_id
        if self._listeners.pop(request_id, None) is None:
            return
        if listener.timer is not None:
            listener.timer.cancel()
        if self._awaited:
            self._awaited.discard(request_id)
            if not self._awaited:
                self._awaited_ended.set()
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
        if error is not None:
            reason = FinishReason.ERROR
        stream.finish(reason, sequence.stop_reason, error, status=status)

    def _on_first_token(self, sequence: Sequence | None, now: float) -> None:
        if sequence is None or sequence.listener.stream.first_token_at is not None:
            return
        listener = sequence.listener
        listener.stream.first_token_at = now
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
        listener.stream.finished_at = now
        first = listener.stream.first_token_at
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
        self._at_rest.set()


def _follow(constraint: TokenConstraint, sequence: Sequence) -> None:
    """Tell a constraint the generated tokens that it has not seen yet."""
    listener = sequence.listener
    for token in sequence.token_ids[sequence.num_prompt_tokens + listener.num_accepted :].tolist():
        constraint.accept(token)
        listener.num_accepted += 1


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
