"""What the scheduler promises, one promise a test, on the fake device. The simulator covers the combinations."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest

from engine.books import check
from engine.clock import ManualClock
from engine.config import CacheOptions, SchedulerOptions
from engine.executor.fake import FakeExecutor, FakeHandle
from engine.executor.fake_oracle import FakeModel, expected_tokens
from engine.forward import ForwardError, Limits
from engine.groups import MemoryGroup
from engine.request import ContextLengthExceededError, FinishReason, Request, RequestError, SamplingParams
from engine.scheduling.batch import Batch, StepResult
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, SequenceStatus

EOS = 7
PAGE = 4


@dataclass
class Rig:
    """A scheduler, a fake device, and the loop of the engine by hand."""

    max_num_seqs: int = 8
    budget: int = 64
    num_pages: int = 64
    max_model_len: int = 64
    depth: int = 2
    eos_rate: float = 0.0
    prefix_cache: bool = True
    policy: str = "fcfs"
    windows: tuple[int | None, ...] = (None,)
    num_snapshots: int | None = None
    clock: ManualClock = field(default_factory=ManualClock)

    def __post_init__(self) -> None:
        groups = tuple(MemoryGroup(window) for window in self.windows)
        limits = Limits(
            *(self.max_num_seqs, self.budget, self.max_model_len, PAGE, self.num_pages, 1000, groups),
            self.num_snapshots,
        )
        self.model = FakeModel(1000, EOS, self.eos_rate, self.windows, self.num_snapshots is not None)
        self.fail_steps: set[int] = set()
        self.executor = FakeExecutor(limits, self.model, fail_on=self._fail)
        self.scheduler = Scheduler(
            limits,
            SchedulerOptions(max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.budget, policy=self.policy),
            CacheOptions(page_size=PAGE, enable_prefix_caching=self.prefix_cache),
            self.executor.staging,
            self.clock,
            (EOS,),
        )
        self.in_flight: deque[tuple[Batch, FakeHandle]] = deque()
        self.submitted = 0

    def _fail(self, step: int) -> None:
        if step in self.fail_steps:
            raise ForwardError("planned")

    def submit(
        self, prompt: list[int], max_tokens: int = 8, *, key: str = "", priority: int = 0, **params: object
    ) -> Sequence:
        self.submitted += 1
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, **params)  # type: ignore[arg-type]
        request = Request(f"r{self.submitted}", prompt, sampling, priority=priority, fairness_key=key)
        return self.scheduler.submit(request)

    def launch(self) -> Batch | None:
        batch = self.scheduler.schedule()
        if batch is not None:
            self.in_flight.append((batch, self.executor.submit(batch.forward_input)))
        return batch

    def commit(self) -> StepResult:
        batch, handle = self.in_flight.popleft()
        try:
            output = self.executor.resolve(handle)
        except ForwardError as error:
            return self.scheduler.fail(batch, error)
        return self.scheduler.commit(batch, output)

    def tick(self) -> Batch | None:
        batch = self.launch()
        if self.in_flight and (len(self.in_flight) == self.depth or batch is None):
            self.commit()
        self.check()
        return batch

    def run(self, bound: int = 2000) -> None:
        for _ in range(bound):
            if not self.scheduler.has_work and not self.in_flight:
                return
            self.tick()
        raise AssertionError("the scheduler did not come to an end")

    def admissions(self, bound: int = 5000) -> list[Sequence]:
        """Run to the end; the sequences in the order in which they were first admitted."""
        order: dict[Sequence, None] = {}
        for _ in range(bound):
            if not self.scheduler.has_work and not self.in_flight:
                return list(order)
            self.tick()
            order |= dict.fromkeys(self.scheduler.live_sequences())
        raise AssertionError("the scheduler did not come to an end")

    def check(self) -> None:
        live = self.scheduler.live_sequences()
        check(self.scheduler.kv_cache, [sequence.pages for sequence in live if sequence.pages is not None])

    def expected(self, prompt: list[int], count: int) -> list[int]:
        return expected_tokens(self.model, prompt, SamplingParams(temperature=0.0), count, (EOS,))


@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_are_the_models(depth: int) -> None:
    rig = Rig(depth=depth)
    prompts = [[i, i + 1, i + 2] * (i + 1) for i in range(5)]
    sequences = [rig.submit(prompt) for prompt in prompts]
    rig.run()
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.output_token_ids == rig.expected(prompt, 8)
        assert sequence.finish_reason is FinishReason.LENGTH and sequence.status is SequenceStatus.FINISHED


def test_overlap_launches_the_next_step_before_the_first_is_known() -> None:
    rig = Rig()
    sequence = rig.submit([1, 2, 3])
    rig.launch()
    batch = rig.launch()
    assert batch is not None and batch.forward_input.num_decode_rows == 1
    assert sequence.num_tokens == 3 and sequence.num_computed_tokens == 4
    assert rig.scheduler.schedule() is None, "both staging sets are in flight"


def test_length_is_foreseen_so_no_overrun_row_is_launched() -> None:
    rig = Rig()
    rig.submit([1, 2, 3], max_tokens=3)
    rows = 0
    while rig.scheduler.has_work:
        batch = rig.tick()
        rows += batch.num_rows if batch is not None else 0
    assert rows == 3


def test_eos_costs_one_overrun_row_that_reaches_nobody() -> None:
    rig = Rig(eos_rate=0.2)
    sequences = [rig.submit([i, 3], max_tokens=50) for i in range(8)]
    rig.run()
    stopped = [s for s in sequences if s.finish_reason is FinishReason.STOP]
    assert stopped
    for sequence in stopped:
        output = sequence.output_token_ids
        assert output[-1] == EOS and EOS not in output[:-1] and sequence.stop_reason is None


def test_client_stop_id_is_told_back_and_min_tokens_masks_it() -> None:
    rig = Rig()
    first = rig.expected([5, 6], 6)
    stop = first[2]
    sequence = rig.submit([5, 6], stop_token_ids=(stop,))
    held = rig.submit([5, 6], max_tokens=6, min_tokens=6, stop_token_ids=(stop,))
    rig.run()
    assert sequence.output_token_ids == first[:3]
    assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.STOP, stop)
    assert len(held.output_token_ids) == 6 and stop not in held.output_token_ids


def test_burst_with_one_system_prompt_computes_it_once() -> None:
    rig = Rig(max_num_seqs=16, budget=128, num_pages=256)
    system = list(range(40))
    sequences = [rig.submit([*system, 100 + i], max_tokens=2) for i in range(16)]
    batch = rig.launch()
    assert batch is not None
    # One whole prompt and fifteen single tokens, all in the very first step.
    assert batch.num_rows == 16 and batch.num_tokens == 41 + 15
    rig.run()
    assert [s.num_cached_tokens for s in sequences] == [0] + [40] * 15
    for i, sequence in enumerate(sequences):
        assert sequence.output_token_ids == rig.expected([*system, 100 + i], 2)


def test_long_prompt_goes_in_aligned_chunks_beside_the_decode_rows() -> None:
    rig = Rig(budget=10)
    rig.submit([1, 2], max_tokens=30)
    rig.tick()
    long = rig.submit(list(range(30)), max_tokens=2)
    widths = []
    while long.num_computed_tokens < 30:
        batch = rig.tick()
        assert batch is not None and batch.forward_input.num_decode_rows == 1
        assert batch.num_tokens <= 10
        widths.append(batch.num_tokens - 1)
    assert widths == [8, 8, 8, 6]
    rig.run()
    assert long.output_token_ids == rig.expected(list(range(30)), 2)


def test_retraction_spares_the_oldest_and_loses_nothing() -> None:
    rig = Rig(num_pages=12, max_model_len=40, prefix_cache=False)
    prompts = [[i] * 6 for i in range(4)]
    sequences = [rig.submit(prompt, max_tokens=24) for prompt in prompts]
    rig.run()
    assert sequences[0].num_retractions == 0
    assert sum(s.num_retractions for s in sequences) > 0
    assert rig.scheduler.counters.num_preemptions == sum(s.num_retractions for s in sequences)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.output_token_ids == rig.expected(prompt, 24)


def test_abort_in_every_state_frees_everything() -> None:
    rig = Rig(max_num_seqs=2, budget=8)
    waiting = [rig.submit([i, i], max_tokens=20) for i in range(4)]
    prefilling = rig.submit(list(range(20)))
    rig.scheduler.abort(prefilling)  # waiting
    rig.scheduler.abort(prefilling)  # again: nothing happens
    assert prefilling.status is SequenceStatus.FINISHED and rig.scheduler.num_waiting == 4
    rig.launch()
    running = waiting[0]
    rig.scheduler.abort(running)  # in flight: keeps its slot until the commit
    assert running.status is SequenceStatus.FINISHING and running.holds_slot
    rig.commit()
    assert running.status is SequenceStatus.FINISHED and not running.holds_slot
    assert running.output_token_ids == []
    for sequence in waiting[1:]:
        rig.scheduler.abort(sequence)
    rig.run()
    assert rig.scheduler.kv_cache.num_available == 64
    assert all(s.finish_reason is FinishReason.ABORT for s in [*waiting, prefilling])


def test_a_failed_step_is_computed_again_and_spares_the_rest() -> None:
    rig = Rig()
    healthy = rig.submit([9, 9], max_tokens=4)
    rig.run()
    rig.fail_steps = {rig.scheduler._next_step}
    shared = list(range(12))
    failing = rig.submit([*shared, 50], max_tokens=3)
    rig.launch()
    heir = rig.submit([*shared, 51], max_tokens=3)  # shares pages that the failing step was to write
    rig.launch()
    rig.commit()
    assert failing.finish_reason is None and failing.output_token_ids == []
    rig.run()
    assert failing.output_token_ids == rig.expected([*shared, 50], 3) and failing.num_retractions == 1
    assert healthy.finish_reason is FinishReason.LENGTH
    assert heir.output_token_ids == rig.expected([*shared, 51], 3) and heir.num_retractions == 1


def test_a_batch_that_was_forgotten_knows_no_dropped_sample() -> None:
    """reset() clears them only where rows under a grammar were noted, which forget() has let go."""
    rig = Rig()
    rig.submit([1, 2, 3], max_tokens=1)
    batch = rig.launch()
    assert batch is not None
    batch.drop_sample(0, 2)
    batch.ends[0] = 4
    rig.commit()
    batch.forget()
    assert not batch.dropped and not batch.ends


def test_a_step_launched_before_its_suspects_had_failed_tells_nothing() -> None:
    """It holds one of the two alone, and fails as well: that one was not found guilty by it."""
    rig = Rig()
    short, long = rig.submit([1, 2], max_tokens=4), rig.submit([5, 4], max_tokens=16)
    for _ in range(3):
        rig.tick()
    first = rig.scheduler._next_step
    rig.fail_steps = {first, first + 1}
    together, alone = rig.launch(), rig.launch() if len(rig.in_flight) < 2 else None
    while alone is None:
        rig.commit()
        alone = rig.launch()
    assert together is not None and together.num_rows == 2 and alone.num_rows == 1
    rig.run()
    assert short.output_token_ids == rig.expected([1, 2], 4) and long.output_token_ids == rig.expected([5, 4], 16)


def test_who_was_cleared_may_be_to_blame_a_step_later() -> None:
    """A suspect that has passed its place breaks at the next token, in a step with one that is still tried."""
    rig = Rig(budget=24, prefix_cache=False)
    early, slow, other = (rig.submit([number] * size, 30) for number, size in ((1, 4), (2, 12), (3, 4)))
    while early.num_computed_tokens < 14:
        rig.tick()
    place = early.num_computed_tokens
    rig.fail_steps = {rig.scheduler._next_step - 1}
    for _ in range(200):
        batch = rig.scheduler.schedule()
        if batch is not None:
            starts, sizes = batch.staging.row_start.tolist(), batch.staging.row_len.tolist()
            rows = zip(batch.slots.tolist(), starts, sizes, strict=False)
            if any(rig.scheduler.sequence_of(slot) is early and at <= place < at + size for slot, at, size in rows):
                rig.fail_steps.add(batch.forward_input.step)
            rig.in_flight.append((batch, rig.executor.submit(batch.forward_input)))
        if rig.in_flight and (len(rig.in_flight) == rig.depth or batch is None):
            rig.commit()
    assert early.finish_reason is FinishReason.ERROR
    assert slow.output_token_ids == rig.expected([2] * 12, 30) and other.output_token_ids == rig.expected([3] * 4, 30)


def test_suspects_that_pass_let_others_in_again() -> None:
    rig = Rig()
    running = [rig.submit([number, 9, 9], max_tokens=60) for number in range(4)]
    for _ in range(5):
        rig.tick()
    rig.fail_steps = {rig.scheduler._next_step}
    late = rig.submit([7, 7], max_tokens=3)
    for _ in range(20):
        rig.tick()
    assert late.finish_reason is FinishReason.LENGTH and not any(sequence.is_finished for sequence in running)
    rig.run()
    for sequence, number in zip(running, range(4), strict=True):
        assert sequence.output_token_ids == rig.expected([number, 9, 9], 60)


def test_impossible_requests_are_refused_at_the_door() -> None:
    rig = Rig(num_pages=4, max_model_len=64)
    with pytest.raises(RequestError, match="empty"):
        rig.submit([])
    with pytest.raises(ContextLengthExceededError, match="maximum context length is 64 tokens"):
        rig.submit([1] * 64)
    with pytest.raises(ContextLengthExceededError, match="maximum context length is 64 tokens"):
        rig.submit([1] * 60, max_tokens=5)
    with pytest.raises(ContextLengthExceededError, match="KV cache holds 16 tokens"):
        rig.submit([1] * 10, max_tokens=8)
    with pytest.raises(RequestError, match="stop token ids"):
        rig.submit([1], stop_token_ids=tuple(range(100, 120)))
    assert rig.scheduler.num_waiting == 0
    assert rig.submit([1] * 10, max_tokens=7).max_length == 17


def test_steady_schedule_keeps_no_array() -> None:
    import tracemalloc

    rig = Rig(max_num_seqs=32, num_pages=2048, max_model_len=2048, budget=256)
    for i in range(32):
        rig.submit([i] * 5, max_tokens=1500)
    for _ in range(40):
        rig.tick()
    scheduler = rig.scheduler
    steady = 0
    for _ in range(PAGE * 3):
        tracemalloc.start()
        before = tracemalloc.take_snapshot()
        batch = scheduler.schedule()
        after = tracemalloc.take_snapshot()
        tracemalloc.stop()
        assert batch is not None
        domain = np.lib.tracemalloc_domain
        arrays = tracemalloc.DomainFilter(inclusive=True, domain=domain)
        grown = sum(
            s.size_diff for s in after.filter_traces([arrays]).compare_to(before.filter_traces([arrays]), "lineno")
        )
        if batch.forward_input.num_table_diffs == 0:
            steady += 1
            assert grown == 0, f"{grown} bytes of arrays in a steady step"
        rig.in_flight.append((batch, rig.executor.submit(batch.forward_input)))
        rig.commit()
    assert steady >= PAGE
