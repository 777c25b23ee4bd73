"""The simulator: the Engine's loop without asyncio, on a fake device that checks every step.

A run is a function of its seed. `simulate(seed)` raises SimulationError with the seed and the command that
repeats it; `run` is the same for options and arrivals of the caller's choice. What is said of all pages and sequences
at once is checked after every few ticks and at the end: a page that is lost stays lost, and seeds differ in which
ticks they look at. Repeated by the command, a run is checked after every tick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections import deque
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from engine.clock import ManualClock
from engine.config import CacheOptions, SchedulerOptions, SpeculationOptions
from engine.executor.fake import FakeExecutor, FakeHandle
from engine.executor.fake_checks import poison_staging
from engine.executor.faults import Fault, FaultPlan, FaultyExecutor
from engine.forward import ForwardError
from engine.grammar_masks import GrammarMasks
from engine.lending import Lending
from engine.request import Adapter, FinishReason, Pooling, RequestError
from engine.scheduling.batch import Batch
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.trials import TRIES_ALONE
from engine.speculation.budgets import DraftBudgets
from tests.sim.invariants import check_all, check_logprobs, check_namespaces
from tests.sim.ordering import CheckedPolicy
from tests.sim.tiers import SimulatedTier
from tests.sim.transfers import SimulatedTransfer
from tests.sim.workload import EOS, Arrival, Options, draw_arrivals, draw_options

# Ticks from one look at everything to the next.
CHECK_EVERY = 8


class SimulationError(AssertionError):
    """A run broke a rule; the message says which, where, and how to see it again."""


@dataclass(eq=False)
class Client:
    """One request as its client sees it."""

    arrival: Arrival
    sequence: Sequence
    delivered: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    vector: tuple[float, ...] | None = None
    # Of its answer, tokens that its constraint has seen.
    num_accepted: int = 0
    # The client's side ended it (abort, stop string): the rest of the answer is not owed.
    ended_early: bool = False
    # Steps that failed with it since its last token.
    num_failures: int = 0

    @property
    def name(self) -> str:
        return self.arrival.request.request_id


@dataclass
class Launched:
    batch: Batch
    handle: FakeHandle
    # Who had which slot as the step was launched: its tokens are theirs and nobody else's.
    owners: dict[int, Sequence]
    # By group, pages at the front of a slot's table that had been given back before: null on the device by now.
    gone: dict[int, list[int]]


@dataclass
class Report:
    """What a run did, for totals and for comparing runs."""

    ticks: int = 0
    steps: int = 0
    retractions: int = 0
    cached_tokens: int = 0
    failed_steps: int = 0
    guilty: int = 0
    spoiled: int = 0
    jumped_tokens: int = 0
    drafts: int = 0
    right_drafts: int = 0
    cut_by_grammar: int = 0
    received_tokens: int = 0
    given_up: int = 0
    transferred_tokens: int = 0
    finished: int = 0
    answers: dict[str, tuple[tuple[int, ...], str, object]] = field(default_factory=dict)


class RandomBudgets:
    """Any number of drafts, drawn anew for each row and step."""

    def __init__(self, seed: int, most: int) -> None:
        self._random, self._most = Random(f"budgets {seed}"), most

    def begin(self, slot: int) -> None:
        pass

    def plan(self, slots: Any) -> Any:
        return np.array([max(0, self._random.randint(-1, self._most)) for _ in slots], np.int32)

    def observe(self, slots: Any, num_drafted: Any, num_accepted: Any) -> None:
        assert (num_accepted <= num_drafted).all() and (num_drafted <= self._most).all()

    def took(self, num_tokens: int, seconds: float) -> None:
        assert num_tokens > 0 and seconds >= 0.0


class Delivery:
    """What GrammarMasks knows of a Publisher."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator

    def jumped(self, client: Client, count: int) -> None:
        self._simulator.report.jumped_tokens += count
        for token in client.sequence.output_token_ids[len(client.delivered) :]:
            self._simulator.deliver(client, token)

    def end(self, client: Client) -> None:
        self._simulator.end(client)

    def break_off(self, client: Client, domain: str, sentence: str) -> None:
        raise


class Simulator:
    def __init__(self, seed: int, options: Options, arrivals: List[Arrival], every: int = CHECK_EVERY) -> None:
        self.options = options
        self._every, self._phase = every, seed % every
        self._limits, self._has_windows = options.limits, options.windows != (None,)
        self.random = Random(f"run {seed}")
        self.report = Report()
        limits = self._limits
        fail_random = Random(f"failures {seed}")
        # Of steps that may hold a culprit: who is in them, in the order of their rows.
        self.members: dict[int, tuple[Batch, list[Sequence]]] = {}

        def fail_on(step: int) -> None:
            if fail_random.random() < options.fail_rate:
                raise ForwardError(f"step {step} fails by lot")
            if step in self.members and self._holds_culprit(*self.members.pop(step)):
                raise ForwardError(f"step {step} holds a culprit")

        self.executor: Any = FakeExecutor(
            limits,
            options.model,
            fail_on=fail_on if options.fail_rate or options.culprit_rate else None,
            random=Random(f"device {seed}"),
            eagerness=options.eagerness,
            draft_accuracy=options.draft_accuracy,
            unseen_drafts=options.unseen_drafts,
        )
        if options.spoil_rate:
            faults = [Fault(kind, options.spoil_rate) for kind in ("nan", "corrupt")]
            self.executor = FaultyExecutor(self.executor, FaultPlan(tuple(faults), seed))
        for staging in self.executor.staging:
            # Room for a single page, so that the table diff has to grow.
            staging.table_index = staging.table_index[:1].copy()
            staging.table_page = staging.table_page[:1].copy()
        self.clock = ManualClock()
        self.scheduler = Scheduler(
            limits,
            SchedulerOptions(
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                overlap=options.depth == 2,
                admission_watermark=options.watermark,
                jump_ahead=options.jump_ahead,
                policy=options.policy,
            ),
            CacheOptions(
                page_size=limits.page_size,
                num_pages=limits.num_pages,
                enable_prefix_caching=options.prefix_caching,
                eviction_policy=options.eviction_policy,
            ),
            self.executor.staging,
            self.clock,
            (EOS,),
            self._budgets(seed),
        )
        self.lending = Lending(self.scheduler)
        delivery: Any = Delivery(self)
        self.masks = GrammarMasks(self.scheduler, self.executor, delivery)
        # Answers are short here.
        self.scheduler.snapshot_pages = 1
        if limits.max_draft_tokens:
            # Rows with drafts do not go beyond the end of a page after which a snapshot is due.
            self.scheduler.snapshot_pages = Random(f"snapshots {seed}").choice([1, 1, 3, 16])
        policy = self.scheduler._policy
        self.policy = CheckedPolicy(options.policy, policy, self.scheduler.kv_cache)
        self.scheduler._policy = self.policy
        self.scheduler.adapters.max_passed = self.policy.max_passed
        self.newest_adapters: dict[str, Adapter] = {}
        self.arrivals = deque(arrivals)
        # Those whose prompts are yet with another server.
        self._early: list[Arrival] = []
        self.clients: dict[Sequence, Client] = {}
        self.open: dict[Sequence, Client] = {}
        self.in_flight: deque[Launched] = deque()
        self.page_namespace: dict[int, tuple[str, int | None]] = {}
        # Who got a token from the step that is being committed.
        self.delivered_now: list[Sequence] = []
        self.tier = SimulatedTier(self, seed) if options.has_tier else None
        self.transfer = SimulatedTransfer(self, seed) if options.has_transfer else None
        self._carriers = [one for one in (self.tier, self.transfer) if one is not None]

    def _budgets(self, seed: int) -> Any:
        limits = self._limits
        if self.options.budgets == "random":
            return RandomBudgets(seed, limits.max_draft_tokens)
        return DraftBudgets(limits, SpeculationOptions()) if self.options.budgets == "adaptive" else None

    # ---- phases

    def run(self) -> Report:
        for tick in range(self.options.ticks):
            self._arrive(tick)
            self.tick()
        assert not self.arrivals and not self._early
        self._finish_all()
        check_all(self)
        self.report.finished = len(self.clients)
        if self.tier is not None:
            self.report.received_tokens = self.tier.tier.tally.hit_tokens
            self.report.given_up = self.tier.tier.tally.failures["stuck"]
        if self.transfer is not None:
            self.report.transferred_tokens = self.transfer.exchange.tally.hit_tokens
        if (speculation := self.scheduler.speculation) is not None:
            self.report.drafts, self.report.right_drafts = (
                speculation.num_draft_tokens,
                speculation.num_accepted_tokens,
            )
            assert speculation.accepted_by_position.sum() == speculation.num_accepted_tokens
        return self.report

    def _finish_all(self) -> None:
        """Liveness: without new work, everything ends within a bound and everything is given back."""
        bound = 50 + 4 * sum(
            len(client.arrival.request.prompt_token_ids) + len(client.arrival.tokens) + 4
            for client in self.open.values()
        )
        if self.options.fail_rate or self.options.culprit_rate:
            bound *= 6  # steps are tried again
        for _ in range(bound):
            if not self.open and not self.in_flight:
                break
            self.tick(leaving=False)
        while any(carrier.is_busy for carrier in self._carriers):
            self.tick(leaving=False)
        assert not self.open, f"{[client.sequence for client in self.open.values()]} never finished"
        assert not self.in_flight, "a step is in flight with nobody to want it"
        scheduler = self.scheduler
        assert not scheduler.has_work and scheduler.schedule() is None
        assert scheduler.num_running == 0 and scheduler.num_waiting == 0 and scheduler.is_empty
        assert not self.lending.lent, "somebody has pages yet"
        assert not self.lending.num_pinned, "a snapshot is pinned"
        assert not any(snapshot.pins for snapshot in scheduler.kv_cache._tree.snapshots())
        assert not scheduler.live_sequences(), "a slot was not given back"
        available, pages = scheduler.kv_cache.num_available, self.options.num_pages
        assert available == pages, f"{pages - available} pages are neither free nor evictable"

    def tick(self, leaving: bool = True) -> None:
        """One turn of Engine.run."""
        self.report.ticks += 1
        self.clock.advance(0.01)
        if leaving:
            self._leave()
        for carrier in self._carriers:
            carrier.turn(hurry=not leaving)
        scheduler, depth = self.scheduler, self.options.depth
        before = {}
        if self._has_windows:
            live = scheduler.live_sequences()
            before = {sequence.pages: [*sequence.pages.gone] for sequence in live if sequence.pages}
        batch = scheduler.schedule()
        if batch is not None:
            assert 0 < batch.num_tokens <= self.options.max_num_batched_tokens, "the token budget"
            owners = {slot: scheduler.sequence_of(slot) for slot in batch.slots.tolist()}
            assert len(owners) == batch.num_rows
            for sequence in owners.values():
                assert not sequence.is_finished, f"{sequence} was scheduled after its end"
            gone = {}
            if before:
                gone = {slot: before.get(sequence.pages, []) for slot, sequence in owners.items() if sequence.pages}
            if self.options.culprit_rate:
                self.members[batch.forward_input.step] = batch, list(owners.values())
            self.in_flight.append(Launched(batch, self.executor.submit(batch.forward_input), owners, gone))
            if len(self.in_flight) == 1:
                self._provide()
            if leaving:
                self._leave()
            for carrier in self._carriers:
                carrier.turn()
        if not self.in_flight:
            # Here the Engine sleeps until something arrives: whoever still waits would wait for ever.
            # Pages that are lent are given back, and wake it.
            assert not scheduler.has_work or self.lending.lent, "nothing runs, nothing is scheduled, yet somebody waits"
        elif len(self.in_flight) >= depth or batch is None:
            self._commit(self.in_flight.popleft())
            if self.in_flight:
                self._provide()
        self.check()

    def _provide(self) -> None:
        """The masks of the only step in flight. What is awaited is there at once."""
        self.masks.provide(self.in_flight[0].batch, self.in_flight[0].handle)
        with contextlib.suppress(StopIteration):
            self.masks.provided().send(None)

    def _holds_culprit(self, batch: Batch, members: list[Sequence]) -> bool:
        """As the step runs: then the device knows how far a row that speculates goes."""
        staging = batch.staging
        for row, sequence in enumerate(members):
            breaks_at = self.clients[sequence].arrival.breaks_at
            if breaks_at is None:
                continue
            end = staging.row_start[row] + staging.row_len[row]
            if batch.is_speculating(row):
                end = self.executor.end_of(int(staging.row_slot[row]), int(staging.row_len[row]))
            if end > breaks_at:
                return True
        return False

    # ---- what happens

    def _is_open(self, name: str | None) -> bool:
        return self.transfer is not None and any(client.name == name for client in self.open.values())

    def _arrive(self, tick: int) -> None:
        coming, self._early = self._early, []
        while self.arrivals and self.arrivals[0].tick <= tick:
            coming.append(self.arrivals.popleft())
        for arrival in coming:
            if arrival.waits and tick < self.options.ticks - 1 and self._is_open(arrival.follows):
                self._early.append(arrival)
                continue
            request, carrier = arrival.request, None
            if self.transfer is not None and arrival.follows is not None:
                request, carrier = self.transfer.told(arrival), self.transfer
            elif self.tier is not None and self.tier.promises(request):
                carrier = self.tier
            try:
                sequence = self.scheduler.submit(request, receiving=carrier is not None)
            except RequestError:
                assert not arrival.accepted, f"{arrival.request.request_id} was refused"
                continue
            assert arrival.accepted, f"{arrival.request.request_id} can never fit, but was accepted"
            self.clients[sequence] = self.open[sequence] = sequence.listener = Client(arrival, sequence)
            self._reload(arrival.request.adapter)
            if carrier is not None:
                carrier.receive(sequence)

    def _reload(self, adapter: Adapter | None) -> None:
        """What the store does where a name gets other weights."""
        if adapter is not None:
            before = self.newest_adapters.get(adapter.name, adapter)
            self.newest_adapters[adapter.name] = adapter
            if before is not adapter:
                self.scheduler.adapters.unload(before.version)

    def _leave(self) -> None:
        """Clients that go away: by their own plan, by bad luck, and in bursts."""
        random, options = self.random, self.options
        burst = options.abort_burst_rate and random.random() < options.abort_burst_rate
        for client in list(self.open.values()):
            abort_after = client.arrival.abort_after
            if (abort_after is not None and len(client.delivered) >= abort_after) or (burst and random.random() < 0.7):
                self._abort(client)
        if self.clients and options.abort_rate and random.random() < 0.1:
            # Abort is idempotent and legal in every state, long finished ones included.
            self._abort(random.choice(list(self.clients.values())))

    def _abort(self, client: Client) -> None:
        before = client.sequence.finish_reason
        self.scheduler.abort(client.sequence)
        if client in self.open.values():
            client.ended_early = True
            self.end(client)
            assert client.finish_reason is FinishReason.ABORT
        assert before in (None, client.sequence.finish_reason), "an abort changed how a sequence had ended"

    def _commit(self, launched: Launched) -> None:
        scheduler = self.scheduler
        owners = launched.owners
        for slot, sequence in owners.items():
            assert sequence.slot == slot, f"{sequence} lost slot {slot} while it was in flight"
        self.report.steps += 1
        try:
            output = self.executor.resolve(launched.handle)
        except ForwardError as error:
            self.report.failed_steps += 1
            check_namespaces(self, launched, failed=True)
            result = scheduler.fail(launched.batch, error)
            assert not len(result.token_ids), "tokens of a failed step"
            for sequence in owners.values():
                self.clients[sequence].num_failures += 1
            for sequence in result.finished:
                assert sequence in owners.values(), f"{sequence} was no part of the failed step"
                assert sequence.finish_reason is FinishReason.ERROR
                client = self.open[sequence]
                guilty = client.arrival.breaks_at is not None
                assert guilty or self.options.fail_rate, f"{client.name} ended for a step that another broke"
                assert client.num_failures >= TRIES_ALONE, f"{client.name} ended for what may pass"
                client.ended_early = True
                self.report.guilty += 1
                self.end(client)
        else:
            check_namespaces(self, launched)
            foreign = [row for row, token in enumerate(output.token_ids.tolist()) if token >= self.options.vocab_size]
            spoiled = {int(launched.batch.slots[row]) for row in (*output.broken, *foreign)}
            if not self.options.spoil_rate:
                live = scheduler._table.live
                assert not any(live[slot] for slot in spoiled), "what a failed step left behind was sampled"
            spoiled = {slot for slot in spoiled if owners[slot] in self.open}
            tokens = dict(zip(launched.batch.slots.tolist(), output.token_ids.tolist(), strict=True))
            result = scheduler.commit(launched.batch, output)
            self.delivered_now = []
            counts = [1] * len(result.slots) if result.counts is None else result.counts.tolist()
            assert sum(counts) == result.num_new == len(result.gaps)
            for slot, token, count in zip(result.slots.tolist(), result.token_ids.tolist(), counts, strict=True):
                client = self.clients[owners[slot]]
                # Tokens that a grammar forces are delivered without that.
                client.num_failures = 0
                new = owners[slot].output_token_ids[len(client.delivered) :]
                assert new[-1] == token and len(new) == count, "a token changed its row"
                assert token == tokens[slot] or result.counts is not None
                for one in new[: (client.arrival.stop_after or 10**9) - len(client.delivered)]:
                    self.deliver(client, one)
            check_logprobs(self, result, output)
            for sequence, place in result.pooled:
                assert sequence in owners.values() and self.clients[sequence].vector is None
                self.clients[sequence].vector = tuple(output.pooled[place].tolist())
            for sequence in result.finished:
                assert sequence in self.open, f"a second terminal event of {sequence}"
                client = self.open[sequence]
                if sequence.finish_reason is FinishReason.ERROR:
                    assert sequence in [owners[slot] for slot in spoiled], f"{client.name} ended for another's row"
                    self.report.spoiled += 1
                    client.ended_early = True
                elif len(client.delivered) == client.arrival.stop_after:
                    self._stop(client)
                    continue
                self.end(client)
            self._stop_by_string(owners)
            self.report.cut_by_grammar += len(result.cut)
            self.masks.settle(result.cut)
            assert all(sequence.is_finished for sequence in result.cut)
        for slot, counts in launched.gone.items():
            for group, count in enumerate(counts):
                if not count:
                    continue
                named = self.executor.pages_of(slot, count * self.options.page_size, group)
                assert not any(named), f"slot {slot} still names {named}, which were given back"
        if self.options.poison:
            poison_staging(launched.batch.staging)

    def _stop_by_string(self, owners: dict[int, Sequence]) -> None:
        """What the Engine does when the text of a sequence meets a stop string."""
        for sequence in owners.values():
            client = self.open.get(sequence)
            if client is None:
                continue
            stop_after = client.arrival.stop_after
            assert stop_after is None or len(client.delivered) <= stop_after, f"{client.name}: past its stop string"
            if stop_after is not None and len(client.delivered) == stop_after:
                self._stop(client)

    def _stop(self, client: Client) -> None:
        """Its text has met a stop string; what came with the step behind it is nobody's."""
        sequence = client.sequence
        end = sequence.num_prompt_tokens + len(client.delivered)
        self.scheduler.finish(sequence, FinishReason.STOP, "stop string")
        if end < sequence.num_tokens:
            sequence.cut(end)
            sequence.finish_reason, sequence.stop_reason = FinishReason.STOP, "stop string"
        client.ended_early = True
        self.end(client)

    def deliver(self, client: Client, token: int) -> None:
        index = len(client.delivered)
        assert client.finish_reason is None, f"{client.name}: token {token} after the end"
        expected = client.arrival.tokens
        assert index < len(expected), f"{client.name}: token {token} after the whole answer {expected}"
        assert token == expected[index], (
            f"{client.name}: token {index} is {token}, the oracle says {expected[index]} ({client.sequence})"
        )
        client.delivered.append(token)
        self.delivered_now.append(client.sequence)
        if self.tier is not None and len(client.delivered) == 1:
            self.tier.keep(client.sequence)

    def end(self, client: Client) -> None:
        """The terminal event of a client."""
        sequence = client.sequence
        assert client.finish_reason is None, f"{client.name}: a second terminal event"
        assert sequence.is_finished and sequence.finish_reason is not None
        client.finish_reason = sequence.finish_reason
        del self.open[sequence]
        arrival = client.arrival
        assert sequence.output_token_ids == client.delivered, f"{client.name}: delivered is not what is known"
        if not client.ended_early:
            assert client.delivered == arrival.tokens, f"{client.name}: ended before its time"
            assert sequence.finish_reason is arrival.reason
            assert sequence.stop_reason == arrival.stop_reason
            assert client.vector == arrival.vector, f"{client.name}: {client.vector}, the oracle says {arrival.vector}"
        if self.transfer is not None and not client.ended_early:
            self.transfer.ended(sequence)
        if sequence.admitted_at is not None:
            cached = sequence.num_cached_tokens
            assert 0 <= cached < sequence.num_prompt_tokens and cached % self.options.page_size == 0
            assert cached == 0 or self.options.prefix_caching
            assert cached == 0 or arrival.request.sampling.prompt_logprobs is None
            assert cached == 0 or arrival.request.pooling != Pooling("mean")
            self.report.cached_tokens += cached
        self.report.retractions += sequence.num_retractions
        self.report.answers[client.name] = (
            tuple(client.delivered),
            sequence.finish_reason.value,
            sequence.stop_reason if client.vector is None else client.vector,
        )

    # ---- what must hold

    def check(self) -> None:
        """After every tick."""
        if self.report.ticks % self._every == self._phase:
            check_all(self)


def run(seed: int, options: Options, arrivals: List[Arrival], every: int = CHECK_EVERY) -> Report:
    """One run, with all of it looked at after `every` ticks. Raises SimulationError."""
    simulator = Simulator(seed, options, arrivals, every)
    # A run makes little garbage, and looking for it takes an eighth of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return simulator.run()
    except Exception as error:
        raise SimulationError(
            f"seed {seed}, tick {simulator.report.ticks}: {type(error).__name__}: {error}\n"
            f"  {options}\n  repeat with: python -m tests.sim --seed {seed}"
        ) from error
    finally:
        if simulator.transfer is not None:
            simulator.transfer.close()
        if was_enabled:
            gc.enable()


def simulate(seed: int, every: int = CHECK_EVERY, **changes: Any) -> Report:
    """The run of a seed; `changes` to its options look closer at one part of the code. every: see `run`."""
    options = dataclasses.replace(draw_options(seed), **changes)
    return run(seed, options, draw_arrivals(seed, options), every)
