"""All that the scheduler and an executor say to each other: flat numpy arrays, no objects of either side.

The scheduler fills one of two `Staging` sets and hands out a `ForwardInput`, a view of it. The executor owns
the set until the step's handle is done. State of a row lives with the executor *by slot* (last token, page
table, sampling parameters), so a step carries only what changed. Imports nothing of ours but other root words.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.groups import MemoryGroup, pages_held
from engine.request import MAX_STOP_TOKEN_IDS, Pooling

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

# In `token_ids`: the value is not known on the host; read `last_token[slot]` on the device.
FUTURE_TOKEN = -1
# In its place where a device found that a row's logits are no numbers.
NO_NUMBERS = -2
# Page 0 and slot 0 belong to padding rows (CUDA graphs); no sequence ever holds them.
NULL_PAGE = 0
NULL_SLOT = 0

# Memory that sleeps and wakes up by itself; vLLM and SGLang call it so.
PARTS = ("weights", "kv_cache")

# One row of the sampling table. `min_length`: while a row's context, the new token not counted, is shorter
# than this many tokens, the ids in stop_ids are masked (min_tokens). stop_ids is padded with -1.
SAMPLING_DTYPE = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("seed", np.uint64),
        ("min_length", np.int32),
        ("num_stop_ids", np.int32),
        ("stop_ids", np.int32, (MAX_STOP_TOKEN_IDS,)),
    ],
    align=True,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes that both sides agree on at start.

    max_num_seqs: sequences that may hold a slot; slots are 1..max_num_seqs.
    max_num_batched_tokens: most token rows in one step.
    max_model_len: tokens of context. page_size: tokens of a page.
    num_pages: usable pages of the one pool, ids 1..num_pages (an executor allocates num_pages + 1).
    groups: each has a page table of its own. Pages that all queries to come of a group have left behind are given
    back, and the null page stands in their place.
    num_snapshots: of recurrent states, ids 1..num_snapshots; None for a model that has no such state. A slot has one,
    and a row that starts at token 0 starts it anew. 0: states, and no snapshot of any.
    max_draft_tokens: most drafts of one row of one step; 0 where nothing speculates.
    max_adapters: LoRA adapters that may take part in one step, indices 1..max_adapters; index 0 is none.
    processed_logprobs: a sampled token's log-probabilities are of what it was drawn from (penalties, masks, temperature
    and filters), not of what the model said. A prompt's are always of the latter.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    num_pages: int
    vocab_size: int
    groups: tuple[MemoryGroup, ...] = (MemoryGroup(),)
    num_snapshots: int | None = None
    max_draft_tokens: int = 0
    max_adapters: int = 0
    processed_logprobs: bool = False

    @property
    def num_slots(self) -> int:
        return self.max_num_seqs + 1

    @property
    def full_sequences(self) -> float:
        """Sequences of max_model_len tokens that the pool holds."""
        return self.num_pages / pages_held(self.groups, self.max_model_len, self.page_size)

    @property
    def capacity(self) -> int:
        """Tokens that the pool holds; where a token has pages in several groups, in sequences of full length."""
        one = len(self.groups) == 1
        return self.num_pages * self.page_size if one else int(self.full_sequences * self.max_model_len)

    @property
    def max_cached_tokens(self) -> int:
        """Most tokens of one sequence that the KV cache can serve, where no other holds a page."""
        level = held = 0  # pages of the sequence in each group that still grows, and in all groups
        growing = len(self.groups)
        for most in sorted(group.most_pages(self.page_size) for group in self.groups if group.window is not None):
            if held + growing * (most - level) > self.num_pages:
                break
            held += growing * (most - level)
            level, growing = most, growing - 1
        if not growing:
            return self.max_model_len
        return (level + (self.num_pages - held) // growing) * self.page_size

    @property
    def max_pages_per_seq(self) -> int:
        """Width of a page-table row."""
        return -(-self.max_model_len // self.page_size)


@dataclass(frozen=True, slots=True, eq=False)
class RowExtras:
    """What a slot's sampling needs beyond SAMPLING_DTYPE; most slots have none and pay nothing for those that do.

    Sent once, when the slot is filled, and valid until the slot's next sampling row. The fields are those of
    SamplingParams. history: int32, every token known when the slot was filled, the first num_prompt_tokens of them
    the prompt: penalties count from there, and the executor adds the tokens that it samples.
    """

    slot: int
    history: Int32Array
    num_prompt_tokens: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    allowed_token_ids: tuple[int, ...] | None
    bad_words: tuple[tuple[int, ...], ...]
    logprobs: int | None
    prompt_logprobs: int | None


@dataclass(frozen=True, slots=True, eq=False)
class RowSpeculation:
    """A slot that speculates. Sent once, when the slot is filled, and valid until the slot's next sampling row.

    history: int32, every token known when the slot was filled; the executor adds what it samples and what chunks bring.
    prediction: what the client expects as the answer, or None. namespace: of the request; what is learned from its
    answer may be proposed to requests of the same namespace alone.
    """

    slot: int
    history: Int32Array
    prediction: Int32Array | None
    namespace: str


@dataclass(frozen=True, slots=True)
class PooledRow:
    """A prompt chunk of a sequence that asks for a vector; `row` never samples. ends: the prompt ends with it, and the
    step brings the vector. Chunks before the last are named only where all tokens count, and then every one of
    them: the first has row_start 0, for such a prompt is computed from its beginning.
    """

    row: int
    pooling: Pooling
    ends: bool


class TokenMasks:
    """Which tokens the constrained rows of one step may sample. The step is launched without them; only the sampling
    of these rows waits until the host, which must see the step before, has filled them in.

    rows int32 [m]: a speculating row stands there row_len times in a row, for its positions in order; behind the first
    draft that the mask before it forbids, and behind the last draft, everything is allowed and nothing counts.
    bits uint32 [m, ceil(vocab_size / 32)]: 1 allows a token, lowest bit first.
    """

    def __init__(self, rows: list[int], vocab_size: int) -> None:
        self.rows: Int32Array = np.array(rows, np.int32)
        self.bits: npt.NDArray[np.uint32] = np.zeros((len(rows), -(-vocab_size // 32)), np.uint32)
        self._ready = threading.Event()

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    def release(self) -> None:
        """The bits are final (host side)."""
        self._ready.set()

    def wait(self) -> None:
        """Block until they are; never on the loop thread."""
        self._ready.wait()

    def allowed(self, vocab_size: int) -> BoolArray:
        """bool [m, vocab_size]."""
        assert self.is_ready, "masks are read before they are filled in"
        bits = np.unpackbits(self.bits.view(np.uint8), axis=1, bitorder="little")
        return bits[:, :vocab_size].astype(np.bool_)


Allocator = Callable[[int, np.dtype[Any]], npt.NDArray[Any]]


def numpy_allocator(length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Plain zeroed host memory; the CUDA executor passes one that returns pinned memory instead."""
    return np.zeros(length, dtype)


class Staging:
    """One set of host arrays for one step. Sized once; only the table diff may grow (a burst of admissions).

    Rows are ordered: decode rows first, then speculating rows, then prefill chunks. All arrays are flat:

    row_slot     int32 [rows]      seq slot of the row; no slot stands twice in a step
    row_start    int32 [rows]      tokens of the row's sequence computed by earlier steps; of a speculating row the most
                                   that they may be: the executor knows how many drafts were accepted, and starts there
    row_len      int32 [rows]      tokens of this step (1 for decode, 1 + the most drafts for a speculating row)
    row_samples  bool  [rows]      the last token of the row is followed by a sampled one
    token_ids    int32 [tokens]    row after row; FUTURE_TOKEN in decode rows and in speculating rows
    qo_indptr    int32 [rows + 1]  CSR offsets of the rows in token_ids
    table_index  int32 [diffs]     page-table entries to change, before the step:
                                   (group * num_slots + slot) * max_pages_per_seq + index
    table_page   int32 [diffs]     their new page ids
    sampling_slot int32 [changed]  slots whose sampling row changes, before the step
    sampling     SAMPLING_DTYPE [changed]
    adapter      int32 [changed]   adapter index of the same slots, 0 for none
    save_slot, save_snapshot int32 [saves]: first of all, states of slots are copied to snapshots
    load_slot, load_snapshot int32 [loads]: then snapshots to slots, which is what their rows go on from
    """

    def __init__(self, limits: Limits, allocate: Allocator = numpy_allocator) -> None:
        self.limits = limits
        self._allocate = allocate
        rows, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
        int32 = np.dtype(np.int32)
        self.row_slot: Int32Array = allocate(rows, int32)
        self.row_start: Int32Array = allocate(rows, int32)
        self.row_len: Int32Array = allocate(rows, int32)
        self.row_samples: BoolArray = allocate(rows, np.dtype(np.bool_))
        self.token_ids: Int32Array = allocate(tokens, int32)
        self.qo_indptr: Int32Array = allocate(rows + 1, int32)
        diffs = max(1024, 4 * rows) * len(limits.groups)
        self.table_index: Int32Array = allocate(diffs, int32)
        self.table_page: Int32Array = allocate(diffs, int32)
        self.sampling_slot: Int32Array = allocate(rows, int32)
        self.sampling: npt.NDArray[Any] = allocate(rows, SAMPLING_DTYPE)
        self.adapter: Int32Array = allocate(rows, int32)
        states = 0 if limits.num_snapshots is None else rows
        # A prompt's chunk and the decoding after it may both leave a snapshot of one slot.
        self.save_slot: Int32Array = allocate(2 * states, int32)
        self.save_snapshot: Int32Array = allocate(2 * states, int32)
        self.load_slot: Int32Array = allocate(states, int32)
        self.load_snapshot: Int32Array = allocate(states, int32)

    def reserve_table_diff(self, length: int) -> None:
        """Make room for `length` table entries, keeping what is already written."""
        if length <= len(self.table_index):
            return
        capacity = max(length, 2 * len(self.table_index))
        for name in ("table_index", "table_page"):
            old = getattr(self, name)
            new = self._allocate(capacity, np.dtype(np.int32))
            new[: len(old)] = old
            setattr(self, name, new)


@dataclass(slots=True)
class ForwardInput:
    """One step, as counts into a Staging set. Valid until the step's handle is done.

    step: number of the step, rising by one. num_decode_rows: rows[:num_decode_rows] continue by one token each.
    num_speculating_rows: the rows after those. Each brings its slot's last token and the drafts that the executor holds
    for the slot, at most row_len - 1 of them. Every position is sampled just as decoding would (its own position,
    penalties and masks that know the drafts before it), and drafts are accepted while they equal what is sampled. So
    the tokens are those of decoding, whatever was drafted. A sequence that speculates has no other kind of row while
    a speculating row of it is in flight; where its rows end, the executor's count of its tokens does, too, and
    so do recurrent states: the next row of the slot begins there.
    speculations: of the slots in sampling_slot that speculate.
    adapter_loads: (index, weights) of adapters that take an index before the step; whoever had it is gone. None for
    weights: the index is nobody's until another takes it.
    extras: of the slots in sampling_slot that have any; a slot there without an entry here has none any more.
    masks: of the rows that a grammar constrains, None where there are none; not filled in yet at submit.
    pooled: the rows that ask for a vector, in their order.
    """

    step: int
    staging: Staging
    num_rows: int
    num_decode_rows: int
    num_tokens: int
    num_table_diffs: int
    num_sampling_diffs: int
    extras: list[RowExtras] = field(default_factory=list)
    masks: TokenMasks | None = None
    pooled: list[PooledRow] = field(default_factory=list)
    num_saves: int = 0
    num_loads: int = 0
    num_speculating_rows: int = 0
    speculations: list[RowSpeculation] = field(default_factory=list)
    adapter_loads: list[tuple[int, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Accepted:
    """What the speculating rows of a step brought, row by row in their order.

    counts int32 [m]: new tokens, 1 + the drafts that were accepted. tokens int32 [m, 1 + max_draft_tokens]: those
    tokens, then -1. num_drafted int32 [m]: drafts that were checked. drafts int32 [m, max_draft_tokens]: what the
    executor holds for the slot's next speculating row (which takes as many of the first as it has room for), then -1.
    """

    counts: Int32Array
    tokens: Int32Array
    num_drafted: Int32Array
    drafts: Int32Array


@dataclass(slots=True)
class StepLogprobs:
    """Log-probabilities of sampled tokens, natural logarithm of the raw distribution (before any filter).

    rows int32 [m]: the rows of the step that asked, a speculating row as often as it has new tokens.
    token_logprobs float32 [m], ranks int32 [m] (1 is the most probable token). top_ids int32 and top_logprobs float32
    [m, k]: the most probable, k is what the greediest row asks.
    """

    rows: Int32Array
    token_logprobs: npt.NDArray[np.float32]
    ranks: Int32Array
    top_ids: Int32Array
    top_logprobs: npt.NDArray[np.float32]


@dataclass(slots=True)
class PromptLogprobs:
    """The same for prompt tokens of one row: entry i is of the token at index first + i of the sequence, given all
    before it."""

    row: int
    first: int
    token_logprobs: npt.NDArray[np.float32]
    ranks: Int32Array
    top_ids: Int32Array
    top_logprobs: npt.NDArray[np.float32]


@dataclass(slots=True)
class ForwardOutput:
    """What a step brought. Owned by the receiver until the executor's next-but-one step.

    token_ids: int32 [rows]; the sampled token (of a speculating row the last), -1 where the row did not sample.
    accepted: of the speculating rows, None where the step has none. new_drafts: (row, int32 drafts) of chunk rows of
    slots that speculate and have sampled: what the executor holds for their next row.
    pooled: float32 vectors, one for each of the input's pooled rows that `ends`, in their order.
    broken: rows whose logits or vectors are no numbers (NaN, infinity); what they sampled means nothing.
    """

    token_ids: Int32Array
    step: int = field(default=0)
    logprobs: StepLogprobs | None = None
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    pooled: list[npt.NDArray[np.float32]] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    accepted: Accepted | None = None
    new_drafts: list[tuple[int, Int32Array]] = field(default_factory=list)


class ForwardError(Exception):
    """This step failed and only this step: the engine goes on, and finds out with whom of the step it fails."""


class DeviceLostError(Exception):
    """The device cannot be used any more: every stream ends with an error and the process exits non-zero."""
