"""SlotExtras: penalties, biases, bans and log-probabilities of the slots that asked for them.

Kept by slot between steps and fed by ForwardInput.extras; `begin` changes the logits before the sampler sees them,
`end` counts what was drawn. Owned by the CPU executor's thread. Rows without extras are not touched.

The order is vLLM's and HF's: allowed ids, bad words, bias, penalties, and after them the sampler's temperature and
filters. Log-probabilities are of the logits as the model made them, or (Limits.processed_logprobs) of what tokens are
drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.forward import ForwardInput, Int32Array, Limits, PromptLogprobs, RowExtras, StepLogprobs
from engine.ops.sampling.logprobs import Float32Array, IndexArray, Normalised, normalise, of_targets, ranks
from engine.ops.sampling.sampler import process

_NOTHING = np.zeros(0, np.int64)
_MINUS_INFINITY = np.float32(-np.inf)
# In a tail: no token stands there. In a pattern: any may.
_NO_TOKEN, _ANY = -1, -2


class _Counts:
    """Distinct tokens of a row, and how often each was generated: ids int64 and counts float32, `size` of them."""

    __slots__ = ("_place", "counts", "ids", "size")

    def __init__(self, seen: Int32Array, num_prompt: int) -> None:
        """seen: the tokens that count, the first num_prompt of them with 0."""
        distinct, inverse = np.unique(seen, return_inverse=True)
        self.size = len(distinct)
        self.ids: IndexArray = np.zeros(2 * self.size + 16, np.int64)
        self.ids[: self.size] = distinct
        self.counts: Float32Array = np.zeros(len(self.ids), np.float32)
        self.counts[: self.size] = np.bincount(inverse.reshape(-1)[num_prompt:], minlength=self.size)
        self._place = {token: place for place, token in enumerate(distinct.tolist())}

    def after(self, drafts: Sequence[int]) -> tuple[IndexArray, Float32Array]:
        """The ids and counts as they would be, had these been generated, too."""
        if not len(drafts):
            return self.ids[: self.size], self.counts[: self.size]
        new = [token for token in dict.fromkeys(drafts) if token not in self._place]
        place = {token: self.size + index for index, token in enumerate(new)}
        ids = np.concatenate([self.ids[: self.size], np.array(new, np.int64)])
        counts = np.concatenate([self.counts[: self.size], np.zeros(len(new), np.float32)])
        for token in drafts:
            counts[self._place[token] if token in self._place else place[token]] += 1
        return ids, counts

    def add(self, token: int) -> None:
        """One more was generated."""
        place = self._place.setdefault(token, self.size)
        if place == self.size:
            if place == len(self.ids):
                self.ids = np.concatenate([self.ids, np.zeros_like(self.ids)])
                self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)])
            self.ids[place] = token
            self.size += 1
        self.counts[place] += 1


def _known(ids: Sequence[int], vocab: int) -> IndexArray:
    found = np.array(ids, np.int64)
    return found[(found >= 0) & (found < vocab)]


def _shift(tail: Int32Array, tokens: Sequence[int] | Int32Array) -> None:
    """Put tokens behind a tail, in place."""
    count = len(tokens)
    if count >= len(tail):
        tail[:] = tokens[count - len(tail) :]
    elif count:
        tail[:-count] = tail[count:].copy()
        tail[-count:] = tokens


class _Slot:
    """What one slot asked for. counts: None without penalties. forbidden float32 [vocab]: 0 for allowed ids, -inf for
    the others, None where all are allowed."""

    __slots__ = ("ban", "bias", "bias_values", "counts", "extras", "forbidden", "words")

    def __init__(self, extras: RowExtras, vocab: int, forbidden: Float32Array | None) -> None:
        self.forbidden = forbidden
        self.extras = extras
        self.counts: _Counts | None = None
        repeats = extras.repetition_penalty != 1.0
        if repeats or extras.presence_penalty or extras.frequency_penalty:
            # Only the repetition penalty looks at the prompt.
            first = 0 if repeats else extras.num_prompt_tokens
            self.counts = _Counts(extras.history[first:], extras.num_prompt_tokens - first)
        bias = {token: value for token, value in extras.logit_bias if 0 <= token < vocab}
        self.bias = np.array(list(bias), np.int64)
        self.bias_values = np.array(list(bias.values()), np.float32)
        self.ban = _known([word[0] for word in extras.bad_words if len(word) == 1], vocab)
        self.words = [word for word in extras.bad_words if len(word) > 1 and 0 <= word[-1] < vocab]


@dataclass(slots=True)
class _Plan:
    """What a step's rows ask for, as indices into their logits; the same rows in the next step keep it.

    bias, ban and word_last are flat: row * vocab + id. word_rows: the rows whose tails must be kept; patterns int32
    [words, width], word_places: whose tail of those each looks at.
    """

    penalised: list[tuple[int, _Counts]]
    parameters: Float32Array  # [3, rows of penalised]: repetition, frequency, presence
    repeats: bool
    bias: IndexArray
    bias_values: Float32Array
    ban: IndexArray
    forbidden: list[tuple[int, Float32Array]]
    word_rows: IndexArray
    word_places: IndexArray
    word_last: IndexArray
    patterns: Int32Array
    logprob_rows: IndexArray
    num_top: int


@dataclass(slots=True)
class Draw:
    """One step between `begin` and `end`. logits: those that the sampler is to draw from.

    own: the model's. Where both are the same memory, touched and raw are flat indices of what was changed, and what
    was there.
    """

    plan: _Plan
    logits: Tensor
    own: Tensor
    slots: Int32Array
    normalised: Normalised | None
    touched: IndexArray
    raw: Float32Array
    positions: Int32Array
    params: npt.NDArray[Any]


class SlotExtras:
    """count: slots that have extras; nothing here needs to be called while it is 0, but for `apply`."""

    def __init__(self, limits: Limits) -> None:
        self._vocab = limits.vocab_size
        self._processed = limits.processed_logprobs
        self._slots: dict[int, _Slot] = {}
        self._has = np.zeros(limits.num_slots, np.bool_)
        # The last tokens of slots with bad words of several tokens; as wide as the longest of them needs.
        self._tails: Int32Array = np.full((limits.num_slots, 0), _NO_TOKEN, np.int32)
        # Of slots that allow the same ids; a mask is as large as the vocabulary.
        self._forbidden: WeakValueDictionary[tuple[int, ...], Float32Array] = WeakValueDictionary()
        # Changed copies of logits: new memory for them would cost more than the copying.
        self._buffer: Float32Array = np.empty((0, limits.vocab_size), np.float32)
        self._plan: _Plan | None = None
        self._plan_slots = b""

    @property
    def count(self) -> int:
        return len(self._slots)

    def apply(self, step: ForwardInput) -> None:
        """Take over what changed. A slot that is filled anew without extras has none any more."""
        if self._slots:
            for slot in step.staging.sampling_slot[: step.num_sampling_diffs].tolist():
                if self._slots.pop(slot, None) is not None:
                    self._has[slot] = False
                    self._plan = None
        for extras in step.extras:
            slot = _Slot(extras, self._vocab, self._forbidden_by(extras.allowed_token_ids))
            self._slots[extras.slot] = slot
            self._has[extras.slot] = True
            self._plan = None
            if slot.words:
                self._fill_tail(extras, max(map(len, slot.words)) - 1)

    def _forbidden_by(self, allowed: tuple[int, ...] | None) -> Float32Array | None:
        if allowed is None:
            return None
        mask = self._forbidden.get(allowed)
        if mask is None:
            # Not bool: an addition is twenty times as fast as a masked write.
            mask = np.full(self._vocab, _MINUS_INFINITY, np.float32)
            mask[_known(allowed, self._vocab)] = 0.0
            self._forbidden[allowed] = mask
        return mask

    def _fill_tail(self, extras: RowExtras, width: int) -> None:
        missing = width - self._tails.shape[1]
        if missing > 0:
            # Other slots' words are no longer than before, so that they do not look there.
            self._tails = np.pad(self._tails, ((0, 0), (missing, 0)), constant_values=_NO_TOKEN)
        tail = self._tails[extras.slot]
        tail[:] = _NO_TOKEN
        last = extras.history[-len(tail) :]
        tail[len(tail) - len(last) :] = last

    # ---- before the sampler

    def begin(
        self,
        logits: Tensor,
        slots: Int32Array,
        positions: Int32Array,
        params: npt.NDArray[Any],
        *,
        masked: bool = False,
        before: Sequence[Sequence[int]] | None = None,
    ) -> Draw | None:
        """float32 [R, V], contiguous, one row per slot of `slots`; changed in place, or a changed copy is in the Draw.
        None: no row has extras, and nothing is changed.

        before: of each row, the drafts that stand between what is known of its slot and its position; None: none. A
        slot then stands there once for each of its positions, in their order.
        positions, params: as the sampler gets them, whose own masks are not to be seen in log-probabilities.
        masked: the caller will change the Draw's logits too, in ways not known here.
        """
        plan = self._plan_of(slots)
        if plan is None:
            return None
        table: Float32Array = logits.numpy()
        flat = table.reshape(-1)
        counted = [counts.after(() if before is None else before[row]) for row, counts in plan.penalised]
        penalised = np.concatenate(
            [
                _NOTHING,
                *(row * self._vocab + ids for (row, _), (ids, _) in zip(plan.penalised, counted, strict=True)),
            ]
        )
        draw = Draw(plan, logits, logits, slots, None, _NOTHING, flat[:0], positions, params)
        if len(plan.logprob_rows) and not self._processed:
            draw.normalised = normalise(logits, plan.logprob_rows, plan.num_top)
            if masked or plan.forbidden:
                # Whole rows change, so the raw ones stay where they are.
                table = self._changed_copy(table, dict(plan.forbidden))
                flat, draw.logits = table.reshape(-1), torch.from_numpy(table)
            else:
                stops = self._masked_stops(plan.logprob_rows, positions, params)
                draw.touched = np.concatenate([plan.ban, plan.word_last, plan.bias, penalised, stops])
                draw.raw = flat[draw.touched]
        else:
            for row, forbidden in plan.forbidden:
                table[row] += forbidden
        flat[plan.ban] = _MINUS_INFINITY
        if len(plan.word_last):
            tails = self._tails[slots[plan.word_rows]]
            if before is not None:
                for tail, row in zip(tails, plan.word_rows, strict=True):
                    _shift(tail, before[row])
            stands = (tails[plan.word_places] == plan.patterns) | (plan.patterns == _ANY)
            flat[plan.word_last[stands.all(-1)]] = _MINUS_INFINITY
        flat[plan.bias] += plan.bias_values
        if len(penalised):
            self._penalise(plan, flat, penalised, [counts for _, counts in counted])
        return draw

    def _changed_copy(self, table: Float32Array, forbidden: dict[int, Float32Array]) -> Float32Array:
        """A copy of all rows with what is forbidden at -inf; valid until the next one."""
        if len(self._buffer) < len(table):
            self._buffer = np.empty_like(table)
        copy = self._buffer[: len(table)]
        for row, logits in enumerate(table):
            mask = forbidden.get(row)
            if mask is None:
                copy[row] = logits
            else:
                np.add(logits, mask, out=copy[row])
        return copy

    def _penalise(self, plan: _Plan, flat: Float32Array, index: IndexArray, of_rows: list[Float32Array]) -> None:
        """repetition: a positive logit is divided by it, another multiplied (Keskar et al. 2019); then frequency
        times the count, and presence once, are taken away (OpenAI)."""
        counts = np.concatenate(of_rows)
        sizes = [len(each) for each in of_rows]
        repetition, frequency, presence = np.repeat(plan.parameters, sizes, axis=1)
        values = flat[index]
        if plan.repeats:
            values = np.where(values > 0, values / repetition, values * repetition)
        values -= frequency * counts
        values -= presence * (counts > 0)
        flat[index] = values

    def _masked_stops(self, rows: IndexArray, positions: Int32Array, params: npt.NDArray[Any]) -> IndexArray:
        """Flat indices of the stop ids that the sampler masks in these rows (min_tokens)."""
        rows = rows[(positions[rows] < params["min_length"][rows]) & (params["num_stop_ids"][rows] > 0)]
        if not len(rows):
            return _NOTHING
        ids = params["stop_ids"][rows].astype(np.int64)
        index = rows[:, None] * self._vocab + ids
        return index[(ids >= 0) & (ids < self._vocab)]

    # ---- after it

    def end(
        self,
        draw: Draw,
        drawn: Int32Array,
        rows: npt.NDArray[np.integer[Any]],
        taken: npt.NDArray[np.bool_] | None = None,
    ) -> StepLogprobs | None:
        """Remember what was drawn. rows: the rows of the step that the logits are of. taken bool [R]: rows whose draw
        became a token; None: all."""
        plan = draw.plan
        for row, counts in plan.penalised:
            if taken is None or taken[row]:
                counts.add(int(drawn[row]))
        if len(plan.word_rows):
            if taken is None:
                slots = draw.slots[plan.word_rows]
                self._tails[slots] = np.concatenate([self._tails[slots, 1:], drawn[plan.word_rows, None]], axis=1)
            else:
                for row in plan.word_rows[taken[plan.word_rows]]:
                    _shift(self._tails[draw.slots[row]], drawn[row : row + 1])
        if not len(plan.logprob_rows):
            return None
        if draw.normalised is None:
            return self._of_processed(draw, drawn, rows, taken)
        asked, found, k = plan.logprob_rows, draw.normalised, plan.num_top
        table: Float32Array = draw.own.numpy()
        table.reshape(-1)[draw.touched] = draw.raw
        if taken is not None:
            kept = taken[asked]
            asked = asked[kept]
            found = Normalised(found.log_sum[kept], found.top_ids[kept], found.top[kept])
        values = table[asked, drawn[asked]]
        return StepLogprobs(
            rows=np.asarray(rows[asked], np.int32),
            token_logprobs=found.logprobs(values),
            ranks=ranks(draw.own, asked, values, found),
            top_ids=found.top_ids[:, :k],
            top_logprobs=found.logprobs(found.top[:, :k]),
        )

    def _of_processed(
        self,
        draw: Draw,
        drawn: Int32Array,
        rows: npt.NDArray[np.integer[Any]],
        taken: npt.NDArray[np.bool_] | None,
    ) -> StepLogprobs:
        """See `end`: of what the tokens were drawn from."""
        asked, k = draw.plan.logprob_rows, draw.plan.num_top
        if taken is not None:
            asked = asked[taken[asked]]
        table = process(draw.logits, asked, draw.params, draw.positions)
        every = np.arange(len(asked), dtype=np.int64)
        # Nothing may be sampled at all: what is drawn then has no probability.
        table[~torch.isfinite(table.amax(-1))] = 0.0
        found = normalise(table, every, k)
        values = table.numpy()[every, drawn[asked]]
        return StepLogprobs(
            rows=np.asarray(rows[asked], np.int32),
            token_logprobs=found.logprobs(values),
            ranks=ranks(table, every, values, found),
            top_ids=found.top_ids[:, :k],
            top_logprobs=found.logprobs(found.top[:, :k]),
        )

    # ---- prompts

    def prompt_logprobs(
        self,
        step: ForwardInput,
        hidden: Tensor,
        make_logits: Callable[[Tensor], Tensor],
        use_slots: Callable[[list[int]], None] = lambda slots: None,
    ) -> list[PromptLogprobs]:
        """Of the prompt chunks in this step whose slots ask. hidden [tokens, size]: of all tokens of the step.

        use_slots: is told whose rows `make_logits` gets next.
        """
        staging, found = step.staging, []
        for row in range(step.num_decode_rows, step.num_rows):
            slot = self._slots.get(int(staging.row_slot[row]))
            k = None if slot is None else slot.extras.prompt_logprobs
            if slot is None or k is None:
                continue
            extras, start = slot.extras, int(staging.row_start[row])
            # A sequence that has output was retracted after its prompt's answer had been given.
            if len(extras.history) > extras.num_prompt_tokens:
                continue
            # The token at index t is foretold at t - 1.
            targets = extras.history[start + 1 : start + 1 + int(staging.row_len[row])]
            if not len(targets):
                continue
            first = int(staging.qo_indptr[row])
            of_chunk = hidden[first : first + len(targets)]
            use_slots([int(staging.row_slot[row])])
            figures = of_targets(of_chunk, make_logits, targets, k, self._vocab)
            found.append(PromptLogprobs(row, start + 1, *figures))
        return found

    # ---- plans

    def _plan_of(self, slots: Int32Array) -> _Plan | None:
        key = slots.tobytes()
        if self._plan is None or key != self._plan_slots:
            rows = np.flatnonzero(self._has[slots])
            if not len(rows):
                return None
            self._plan, self._plan_slots = self._make_plan(slots, rows), key
        return self._plan

    def _make_plan(self, slots: Int32Array, rows: npt.NDArray[np.intp]) -> _Plan:
        owners = [(row, self._slots[int(slots[row])]) for row in rows.tolist()]
        penalised = [(row, slot.counts) for row, slot in owners if slot.counts is not None]
        parameters = [
            (slot.extras.repetition_penalty, slot.extras.frequency_penalty, slot.extras.presence_penalty)
            for _, slot in owners
            if slot.counts is not None
        ]
        with_words = [(row, slot) for row, slot in owners if slot.words]
        words = [(row, word) for row, slot in with_words for word in slot.words]
        width = self._tails.shape[1]
        patterns = np.full((len(words), width), _ANY, np.int32)
        for index, (_, word) in enumerate(words):
            patterns[index, width - len(word) + 1 :] = word[:-1]
        asking = [(row, slot.extras.logprobs) for row, slot in owners if slot.extras.logprobs is not None]

        def flat(parts: list[tuple[int, IndexArray]]) -> IndexArray:
            return np.concatenate([_NOTHING, *(row * self._vocab + ids for row, ids in parts)])

        return _Plan(
            penalised=penalised,
            parameters=np.array(parameters, np.float32).reshape(-1, 3).T,
            repeats=any(repetition != 1.0 for repetition, _, _ in parameters),
            bias=flat([(row, slot.bias) for row, slot in owners]),
            bias_values=np.concatenate([slot.bias_values for _, slot in owners]),
            ban=flat([(row, slot.ban) for row, slot in owners]),
            forbidden=[(row, slot.forbidden) for row, slot in owners if slot.forbidden is not None],
            word_rows=np.array([row for row, _ in with_words], np.int64),
            word_places=np.array([place for place, (_, slot) in enumerate(with_words) for _ in slot.words], np.int64),
            word_last=np.array([row * self._vocab + word[-1] for row, word in words], np.int64),
            patterns=patterns,
            logprob_rows=np.array([row for row, _ in asking], np.int64),
            num_top=max((top for _, top in asking), default=0),
        )
