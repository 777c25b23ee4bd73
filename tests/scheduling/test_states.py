"""Snapshots of recurrent states in the radix tree: where they are taken, who goes on from them, how many there are."""

from __future__ import annotations

import pytest

from engine.executor.fake_oracle import expected_tokens
from engine.request import FinishReason, SamplingParams
from engine.scheduling.sequence import Sequence
from tests.scheduling.test_scheduler import PAGE, Rig

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
SYSTEM = [1 + n % 900 for n in range(203)]


def rig_of(num_snapshots: int, **options: object) -> Rig:
    return Rig(num_pages=400, max_model_len=512, num_snapshots=num_snapshots, **options)  # type: ignore[arg-type]


def ask(rig: Rig, prompt: list[int], max_tokens: int = 5) -> Sequence:
    """One request from its beginning to its end."""
    sequence = rig.submit(prompt, max_tokens, ignore_eos=True)
    rig.run()
    assert sequence.output_token_ids == expected_tokens(rig.model, prompt, GREEDY, max_tokens)
    return sequence


def test_a_prompt_is_found_where_its_chunks_ended_and_then_where_others_part() -> None:
    rig = rig_of(20)
    cached = [ask(rig, [*SYSTEM, 900 + n]).num_cached_tokens for n in range(4)]
    # Chunks of 64 tokens. The second one leaves a snapshot where the two part.
    assert cached == [0, 192, 200, 200]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_burst_computes_a_shared_prompt_once(depth: int) -> None:
    rig = rig_of(20, depth=depth)
    prompts = [[*SYSTEM, 900 + n, 5, 6, 7, 8] for n in range(16)]
    sequences = [rig.submit(prompt, 5, ignore_eos=True) for prompt in prompts]
    rig.run()
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.output_token_ids == expected_tokens(rig.model, prompt, GREEDY, 5)
    # Once, its end after the last chunk a second time, and of each what is its own.
    assert rig.scheduler.counters.prefill_tokens <= len(SYSTEM) + 16 + 16 * (PAGE + 5)


def test_the_next_turn_goes_on_near_the_end_of_the_answer() -> None:
    rig = rig_of(20)
    prompt = SYSTEM[:30]
    first = ask(rig, prompt, 150)
    # 179 tokens were computed; a snapshot was taken 16 pages after the prompt's last whole one, and 16 after that.
    following = [*first.token_ids.tolist(), 3, 4]
    assert ask(rig, following).num_cached_tokens == 28 + 2 * 16 * PAGE


def test_snapshots_are_bounded_and_the_ones_not_used_go_first() -> None:
    rig = rig_of(2)
    other = [500 + n for n in range(129)]
    ask(rig, SYSTEM[:129])  # chunks end at 64 and 128
    assert ask(rig, SYSTEM[:129]).num_cached_tokens == 128
    ask(rig, other[:65])  # its one snapshot takes the place of the one at 64, which nobody used
    assert ask(rig, SYSTEM[:129]).num_cached_tokens == 128
    assert ask(rig, SYSTEM[:100]).num_cached_tokens == 0
    assert ask(rig, other[:65]).num_cached_tokens in (0, 64)


@pytest.mark.parametrize("options", [{"num_snapshots": 0}, {"num_snapshots": 8, "prefix_cache": False}])
def test_without_snapshots_nothing_is_found(options: dict[str, object]) -> None:
    rig = rig_of(**options)  # type: ignore[arg-type]
    assert [ask(rig, SYSTEM).num_cached_tokens for _ in range(2)] == [0, 0]


def test_a_failed_step_leaves_no_snapshot() -> None:
    rig = rig_of(8)
    rig.fail_steps = set(range(1, 100))
    failed = rig.submit(SYSTEM, 5)
    rig.run()
    assert failed.finish_reason is FinishReason.ERROR and failed.output_token_ids == []
    rig.fail_steps = set()
    assert ask(rig, SYSTEM).num_cached_tokens == 64, "the end of the first chunk, which did not fail"


def test_a_retracted_sequence_goes_on_from_a_snapshot() -> None:
    rig = Rig(num_pages=24, max_model_len=64, max_num_seqs=3, num_snapshots=8)
    sequences = [rig.submit([n + 1] * 10, 40, ignore_eos=True) for n in range(3)]
    rig.run()
    assert sum(sequence.num_retractions for sequence in sequences) > 0
    for n, sequence in enumerate(sequences):
        assert sequence.output_token_ids == expected_tokens(rig.model, [n + 1] * 10, GREEDY, 40)
