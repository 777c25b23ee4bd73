"""Engine: the one task that schedules, launches, commits and publishes; and the door through which requests come.

Lives on the loop thread. Below it everything is synchronous. What becomes of committed tokens is publisher.py's, what
constrained rows may sample grammar_masks.py's, and standing still on purpose resting.py's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import math
import random
from collections import deque

from engine.admission import Admission
from engine.books import Books
from engine.clock import Clock, MonotonicClock, RangeOf, in_range
from engine.config import EngineConfig
from engine.executor.base import Executor, StepHandle
from engine.forward import DeviceLostError, ForwardError
from engine.grammar_masks import GrammarMasks
from engine.inspection import Inspection
from engine.lora.store import AdapterStore
from engine.lora.tally import LoraTally
from engine.metrics import EngineMetrics, EngineStats, Rates
from engine.pace import LoopWatch, Pace
from engine.publisher import NO_TEXT, Listener, Publisher
from engine.recorder import Recorder, now
from engine.request import OverloadedError, QueueFullError, Request, RequestError, UnavailableError
from engine.resting import Resting
from engine.scheduling.batch import Batch
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, SequenceStatus
from engine.speculation.budgets import DraftBudgets
from engine.stream import TokenStream
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger("oneloop.engine")

MAX_LOOKED_UP = 256


class StalledError(Exception):
    """No step has come to an end for --stall-timeout, and --stall-action is exit."""


class Engine(Resting):
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
        clock = clock or MonotonicClock()
        limits, budgets = executor.limits, None
        if limits.max_draft_tokens:
            budgets = DraftBudgets(limits, config.speculation)
        scheduler = Scheduler(limits, config.scheduler, config.cache, executor.staging, clock, eos_token_ids, budgets)
        self.metrics = metrics or EngineMetrics(model_name="model", max_model_len=executor.limits.max_model_len)
        wait_ms = config.stream.flush_interval_ms
        pace = Pace(None if wait_ms is None else wait_ms / 1000.0)
        publisher = Publisher(scheduler, self.metrics, clock, pace)
        self._watch = LoopWatch(self.metrics, pace, lambda: self._idle.is_set())
        super().__init__(scheduler, executor, publisher, clock)
        self.metrics.drafts = scheduler.speculation
        self.config = config
        self.limits = executor.limits
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.metrics.bind(self.stats)
        # For whoever balances load between servers.
        self.rates = Rates(self.metrics, clock.now)
        self.depth = 2 if config.scheduler.overlap else 1
        options = config.scheduler
        self.admission = Admission(scheduler, options.ttft_slo_s, options.max_queue_wait_s)
        self._masks = GrammarMasks(scheduler, executor, publisher)
        self._rng = rng or random.Random()
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self._books = Books(scheduler.kv_cache, clock, self.metrics, config.check_invariants)
        self._task: asyncio.Task[None] | None = None
        self.stalled = self._lost = False
        self.recorder = Recorder(self._on_watched)
        self.inspection = Inspection(scheduler, publisher)
        if config.lora.enable and executor.limits.max_adapters:
            self.adapters = AdapterStore(
                config.lora,
                executor.read_adapter,
                scheduler.adapters,
                in_use=publisher.has_adapter,
                unused=publisher.adapter_unused,
            )
            scheduler.adapters.on_dropped = self._wake.set
            prefixes = [prefix for prefix in self.metrics.prefixes if prefix != "sglang"]
            publisher.lora_tally = LoraTally(prefixes, config.lora.max_loras, publisher.requests)
            self.metrics.add_families(publisher.lora_tally.collect)

    # ---- the door

    def submit(self, request: Request) -> TokenStream:
        """Queue a request. Raises RequestError (400, 429 or 503) for one that is not taken."""
        if self.failed:
            raise UnavailableError("The engine has failed and is shutting down.")
        if self.draining:
            raise UnavailableError("The server is shutting down and takes no new requests.")
        if self.sleep_level:
            raise UnavailableError("The model is asleep; POST /wake_up first.")
        if self.scheduler.num_waiting + self.scheduler.num_receiving >= self.config.scheduler.max_queued_requests:
            self.metrics.on_rejected("queue_full")
            wait = self.admission.retry_after()
            raise QueueFullError("Too many requests are waiting; please retry later.", retry_after=wait)
        assert request.request_id not in self.publisher.listeners, "request ids are unique"
        self._check_rows(request)
        try:
            self.admission.check(len(request.prompt_token_ids))
        except OverloadedError:
            self.metrics.on_rejected("overloaded")
            raise
        if request.sampling.seed is None and request.sampling.temperature > 0:
            sampling = dataclasses.replace(request.sampling, seed=self._rng.getrandbits(63))
            request = dataclasses.replace(request, sampling=sampling)
        receive = self._carrier_of(request)
        sequence = self.scheduler.submit(request, receiving=receive is not None)
        stream = TokenStream(request.request_id, sequence.num_prompt_tokens, self.abort, sequence.arrived_at)
        detokenizer = (
            NO_TEXT
            if self.tokenizer is None or request.pooling is not None
            else IncrementalDetokenizer(self.tokenizer, request.prompt_token_ids, request.sampling)
        )
        listener = self.publisher.add(sequence, stream, detokenizer)
        self._set_timer(listener)
        if self._idle.is_set():
            # In this order: the watchdog's thread may look in between.
            self._progress_at = self.clock.now()
            self._idle.clear()
        self._wake.set()
        if receive is not None:
            receive(sequence)
        return stream

    def received(self, sequence: Sequence) -> None:
        """Nothing more comes for a sequence that was receiving: it waits for its turn."""
        if not self.scheduler.has_work:
            self._progress_at = self.clock.now()
        self.scheduler.received(sequence)
        self._wake.set()

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
        listener = self.publisher.listeners.get(request_id)
        if listener is None:
            return
        self.scheduler.abort(listener.sequence)
        self.publisher.end(listener)
        # An idle loop has nothing to commit, so it must be told that the sequence is gone.
        self._wake.set()

    def abort_all(self) -> None:
        for request_id in list(self.publisher.listeners):
            self.abort(request_id)

    def _set_timer(self, listener: Listener) -> None:
        request, options = listener.sequence.request, self.config.scheduler
        limits = [limit for limit in (request.timeout_s, options.request_timeout_s) if limit is not None]
        if limits:
            listener.expires_at = listener.sequence.arrived_at + min(limits)
        self._on_timer(listener)

    def _on_timer(self, listener: Listener) -> None:
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

    def _expire(self, listener: Listener, status: int, sentence: str) -> None:
        self.scheduler.abort(listener.sequence)
        self.publisher.end(listener, sentence, status=status)
        self._wake.set()

    def flush_cache(self) -> bool:
        """Forget every cached prefix. False, and nothing done, while requests run or wait, unless they are paused."""
        if self.scheduler.has_work:
            return self.forget_held()
        if not self.scheduler.is_empty:
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
        if self._idle.is_set() or (self._stopped and self._at_rest.is_set()) or not self.scheduler.has_work:
            return 0.0
        return self.clock.now() - self._progress_at

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
            num_waiting=self.scheduler.num_waiting + self.scheduler.num_receiving,
            num_used_pages=used,
            num_total_pages=cache.num_pages,
            page_size=cache.page_size,
            num_evictable_pages=cache.num_evictable,
            num_total_tokens=self.limits.capacity,
        )

    def slots(self) -> list[tuple[int, int, int] | None]:
        """What runs in each place of a batch: its prompt's tokens, those generated, and how many may follow yet."""
        places = self.limits.max_num_seqs
        running = [
            (one.num_prompt_tokens, one.num_tokens - one.num_prompt_tokens, one.max_length - one.num_tokens)
            for one in self.scheduler.slot_owners
            if one is not None and not one.is_finished
        ][:places]
        return [*running, *[None] * (places - len(running))]

    def _on_watched(self, recorder: Recorder | None) -> None:
        self.scheduler.recorder = self.publisher.recorder = recorder

    def name_stages(self, range_of: RangeOf) -> None:
        """Put schedule and commit into named ranges of a profiler's time line. Costs nothing until it is called."""
        for name in ("schedule", "commit"):
            setattr(self.scheduler, name, in_range(getattr(self.scheduler, name), name, range_of))

    def num_waiting_uncached_tokens(self) -> int:
        """Tokens that wait to be computed. The cache is asked about the oldest MAX_LOOKED_UP sequences alone."""
        everybody = [listener.sequence for listener in self.publisher.listeners.values()]
        waiting = [sequence for sequence in everybody if sequence.status is SequenceStatus.WAITING]
        tokens = sum(sequence.num_tokens for sequence in waiting)
        cache = self.scheduler.kv_cache
        return tokens - sum(
            cache.match_length(sequence.matchable_ids, sequence.request.cache_root)
            for sequence in waiting[:MAX_LOOKED_UP]
        )

    # ---- the loop

    async def run(self, *, serves: bool = True) -> None:
        """Serve until cancelled. Returns only by raising: what it raises means that the process must end.

        serves: others wait for this loop, so it is logged when it is late.
        """
        self._task = asyncio.current_task()
        if self.transfer is not None:
            await self.transfer.start()
        in_flight: deque[tuple[Batch, StepHandle]] = deque()
        scheduler, executor = self.scheduler, self.executor
        self._watch.start(tells=serves)
        if (watch := getattr(executor, "watch", None)) is not None:
            # A device that can be lost while nothing runs on it.
            watch(functools.partial(asyncio.get_running_loop().call_soon_threadsafe, self._lose))
        try:
            while True:
                stages = self.recorder.stages  # None: nobody looks
                if stages is not None:
                    began = now()
                batch = None if self._stopped else scheduler.schedule()  # N+1, while N runs on the device
                if batch is not None:
                    if stages is not None:
                        scheduled = now()
                    self.metrics.on_step(batch.num_tokens)
                    in_flight.append((batch, executor.submit(batch.forward_input)))
                    if stages is not None:
                        stages.waited = at = now()
                        batch.recorded = began, scheduled, at, scheduler.num_running, scheduler.num_waiting
                    if len(in_flight) == 1:
                        self._masks.provide(*in_flight[0])
                        await self._masks.provided()
                        if stages is not None:
                            stages.waited = now()
                elif stages is not None:
                    stages.waited = now()
                if not in_flight:
                    # Not while another thread has the device: whatever comes meanwhile wakes this loop.
                    is_ours = not (self._loading or self.sleep_level)
                    if is_ours and (dropped := scheduler.take_dropped()):
                        executor.drop_adapters(dropped)
                    if scheduler.is_empty:
                        if not self.lending.lent:
                            self._books.look()
                        self._idle.set()
                    if self._stopped:
                        self._at_rest.set()
                    self.admission.rest()
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                if len(in_flight) == self.depth or batch is None:
                    await self._end_step(in_flight, stages)
                    # A device that is always ahead must not keep the sockets from being served.
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            if not self.stalled and not self._lost:
                raise
            end = StalledError("no step has come to an end") if self.stalled else DeviceLostError("the device was lost")
            self._fail_all(end)
            raise end from None
        except BaseException as error:
            self._fail_all(error)
            raise
        finally:
            self._watch.stop()
            self._end_carriers()
            # A worker that waits for a mask would never end.
            for batch, _ in in_flight:
                if batch.forward_input.masks is not None:
                    batch.forward_input.masks.release()

    async def _end_step(self, in_flight: deque[tuple[Batch, StepHandle]], stages: Recorder | None) -> None:
        """Wait for the oldest step and publish it. On its own, so that an idle loop holds nothing of the last one: its
        requests have adapters, which may be unloaded."""
        scheduler, executor = self.scheduler, self.executor
        done, handle = in_flight.popleft()
        failed = False
        try:
            output = await executor.wait(handle)
        except ForwardError as error:
            failed, arrived = True, now()
            result = scheduler.fail(done, error)
            committed = now()
            self.metrics.failed_steps += 1
            logger.error("a step failed (%s); requests that end by it: %d", error, len(result.finished))
            if in_flight:
                self._masks.provide(*in_flight[0])
            self.publisher.publish_failure(result)
        else:
            result = scheduler.commit(done, output)
            arrived = result.at
            if stages is not None:
                committed = now()
            # First, for a grammar may end its request in the next lines.
            self.publisher.attach(result, output)
            if result.cut:
                self._masks.settle(result.cut)
            # The device may be waiting for these: before the streams.
            if in_flight:
                self._masks.provide(*in_flight[0])
            self.publisher.publish(result)
        self._progress_at = self.clock.now()
        if stages is not None:
            stages.published(done, handle, arrived, committed, self._progress_at, failed)
        self.admission.observe(self._progress_at)
        # Last, so that nobody waits for masks that wait for the device's drafts.
        await self._masks.provided()

    def give_up(self) -> None:
        """The device hangs: end every stream, and let `run` raise StalledError."""
        if self._task is not None and not self._task.done():
            self.stalled = True
            self._task.cancel()

    def _lose(self) -> None:
        """The device is lost: end every stream, and let `run` raise DeviceLostError."""
        if self._task is not None and not self._task.done():
            self._lost = True
            self._task.cancel()

    def _fail_all(self, error: BaseException) -> None:
        self.failed = True
        what = "the device was lost" if isinstance(error, DeviceLostError) else "internal error"
        if isinstance(error, StalledError):
            what = "the device does not answer"
        self.publisher.end_all(f"The engine failed: {what}")
        self._idle.set()
        self._at_rest.set()
