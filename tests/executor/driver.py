"""What the contract tests drive an executor with: steps written by hand, and the adapter of an implementation.

An implementation joins the suite with one ExecutorAdapter in `conftest.py`; nothing else knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from engine.executor.base import Executor, StepHandle
from engine.executor.fake import FakeExecutor
from engine.executor.fake_oracle import FakeModel, expected_tokens, expected_vector
from engine.forward import FUTURE_TOKEN, ForwardError, ForwardInput, Limits, PooledRow
from engine.request import Pooling, SamplingParams

GREEDY = SamplingParams(temperature=0.0)


class ExecutorAdapter(Protocol):
    """How the suite makes an executor and knows what it must answer.

    vocab_size: ids that prompts may use. limits of `make` have it set.
    """

    vocab_size: int

    def make(self, limits: Limits, fail_at: frozenset[int] = frozenset()) -> Executor:
        """A fresh executor whose steps numbered in fail_at raise ForwardError."""
        ...

    def checkpoint(self) -> Path:
        """A directory that holds the executor's own weights."""
        ...

    def reference_next_token(self, context: list[int], sampling: SamplingParams, min_length: int = 0) -> int:
        """The token after `context`, computed without pages, slots or steps.

        min_length: the stop ids of `sampling` are masked while the context is shorter.
        """
        ...

    def reference_vector(self, prompt: list[int], pooling: Pooling) -> list[float]:
        """The vector of a whole prompt."""
        ...


class FakeAdapter:
    """engine/executor/fake.py; the reference is its oracle."""

    vocab_size = 1000

    def make(self, limits: Limits, fail_at: frozenset[int] = frozenset()) -> FakeExecutor:
        def fail_on(step: int) -> None:
            if step in fail_at:
                raise ForwardError(f"step {step} was told to fail")

        return FakeExecutor(limits, FakeModel(self.vocab_size), fail_on=fail_on)

    def checkpoint(self) -> Path:
        return Path(__file__).parent

    def reference_next_token(self, context: list[int], sampling: SamplingParams, min_length: int = 0) -> int:
        masked = SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            stop_token_ids=sampling.stop_token_ids,
            min_tokens=max(0, min_length - len(context)),
        )
        return expected_tokens(FakeModel(self.vocab_size), context, masked, 1)[0]

    def reference_vector(self, prompt: list[int], pooling: Pooling) -> list[float]:
        vector: list[float] = expected_vector(prompt, pooling).tolist()
        return vector


def continuation(adapter: ExecutorAdapter, prompt: list[int], n: int, sampling: SamplingParams = GREEDY) -> list[int]:
    """n tokens after `prompt` by the reference."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(adapter.reference_next_token(tokens, sampling))
    return tokens[len(prompt) :]


def write_sampling_row(row: Any, params: SamplingParams, min_length: int = 0) -> None:
    """Fill one row of SAMPLING_DTYPE."""
    for name in ("temperature", "top_p", "min_p", "top_k"):
        row[name] = getattr(params, name)
    row["seed"], row["min_length"] = params.seed or 0, min_length
    row["num_stop_ids"] = len(params.stop_token_ids)
    row["stop_ids"] = -1
    row["stop_ids"][: len(params.stop_token_ids)] = params.stop_token_ids


@dataclass(frozen=True)
class Row:
    """One row of a step. tokens None: a decode row, which reads the relay."""

    slot: int
    start: int
    tokens: list[int] | None = None
    samples: bool = True


def prefill(slot: int, tokens: list[int], start: int = 0, samples: bool = True) -> Row:
    return Row(slot, start, tokens, samples)


def decode(slot: int, start: int) -> Row:
    return Row(slot, start)


@dataclass
class Driver:
    """Writes steps into staging as a scheduler would, minimally and by hand."""

    executor: Executor
    step: int = 0
    handles: list[StepHandle] = field(default_factory=list)

    def launch(
        self,
        rows: Sequence[Row],
        pages: dict[int, list[int]] | None = None,
        sampling: dict[int, SamplingParams] | None = None,
        entries: Sequence[tuple[int, int, int]] = (),
        min_length: int = 0,
        pooled: Sequence[PooledRow] = (),
        adapters: Sequence[Any] = (),
    ) -> StepHandle:
        """pages: slot -> first entries of its page table. entries: single ones, (slot, index, page).

        sampling: slot -> its new row, with min_length. adapters: what takes indices 1, 2, ..., which the slots of
        those numbers have.
        """
        limits, staging = self.executor.limits, self.executor.staging[self.step % 2]
        num_tokens = 0
        staging.qo_indptr[0] = 0
        for index, row in enumerate(rows):
            tokens = [FUTURE_TOKEN] if row.tokens is None else row.tokens
            staging.row_slot[index] = row.slot
            staging.row_start[index] = row.start
            staging.row_len[index] = len(tokens)
            staging.row_samples[index] = row.samples
            staging.token_ids[num_tokens : num_tokens + len(tokens)] = tokens
            num_tokens += len(tokens)
            staging.qo_indptr[index + 1] = num_tokens
        changes = list(entries)
        for slot, row_pages in (pages or {}).items():
            changes += [(slot, index, page) for index, page in enumerate(row_pages)]
        staging.reserve_table_diff(len(changes))
        for count, (slot, index, page) in enumerate(changes):
            staging.table_index[count] = slot * limits.max_pages_per_seq + index
            staging.table_page[count] = page
        for count, (slot, params) in enumerate((sampling or {}).items()):
            staging.sampling_slot[count] = slot
            write_sampling_row(staging.sampling[count], params, min_length)
            staging.adapter[count] = slot if slot <= len(adapters) else 0
        num_decode_rows = sum(row.tokens is None for row in rows)
        assert all(row.tokens is None for row in rows[:num_decode_rows]), "decode rows come first"
        handle = self.executor.submit(
            ForwardInput(
                step=self.step,
                staging=staging,
                num_rows=len(rows),
                num_decode_rows=num_decode_rows,
                num_tokens=num_tokens,
                num_table_diffs=len(changes),
                num_sampling_diffs=len(sampling or {}),
                pooled=list(pooled),
                adapter_loads=list(enumerate(adapters, 1)),
            )
        )
        self.step += 1
        return handle

    async def wait(self, handle: StepHandle) -> list[int]:
        output = await self.executor.wait(handle)
        tokens: list[int] = output.token_ids.tolist()
        return tokens

    async def run(
        self,
        rows: Sequence[Row],
        pages: dict[int, list[int]] | None = None,
        sampling: dict[int, SamplingParams] | None = None,
        entries: Sequence[tuple[int, int, int]] = (),
        min_length: int = 0,
    ) -> list[int]:
        """One step, launched and waited for."""
        return await self.wait(self.launch(rows, pages, sampling, entries, min_length))
