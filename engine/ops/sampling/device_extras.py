"""DeviceExtras: penalties, biases, bans, log-probabilities and grammar masks on the device, by slot.

What ops/sampling/extras.py is to the CPU, in fixed-shape tensor operations that never look at a value on the host.
Where drafts are rows of their own, each row counts the drafts before it, and what rows draw is remembered where it
became a token. Its tables take memory only once a request asks for them. The host side runs on the loop thread; what it
returns to be done on the device is launched by the CUDA executor on its compute stream, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.forward import NULL_SLOT, ForwardInput, Int32Array, Limits, PromptLogprobs, RowExtras, StepLogprobs
from engine.ops.sampling.device import drafts_before, rows_that_count
from engine.ops.triton.runtime import on_gpu

# In a tail: no token stands there. In a pattern: any may.
_NO_TOKEN, _ANY = -1, -2
# Logits of a prompt's positions are made in slices of so many numbers (128 MB).
SLICE_ELEMENTS = 1 << 25

Zeros = Callable[[tuple[int, ...], torch.dtype], Tensor]
# Host arrays (int32 or float32) -> the same on the device, valid from the next launch on.
Send = Callable[[Sequence[npt.NDArray[Any]]], list[Tensor]]


@dataclass(slots=True)
class ExtrasPlan:
    """What the sampling rows of a step ask for, as indices into them. Tensors are on the device.

    patterns int32 [words, width]: word_slots says whose tail each looks at, word_last (rows, ids) what it bans.
    """

    penalised: bool
    biased: bool
    word_slots: Tensor | None
    word_last: tuple[Tensor, Tensor] | None
    patterns: Tensor | None
    logprob_rows: npt.NDArray[np.int64]
    num_top: int

    def figures(self) -> int:
        """int32 numbers of a step's log-probabilities a row: logprob, rank, ids, logprobs."""
        return 2 + 2 * self.num_top


class DeviceExtras:
    """count: slots that have extras."""

    def __init__(self, limits: Limits, zeros: Zeros) -> None:
        self._vocab = limits.vocab_size
        self._slots: dict[int, RowExtras] = {}
        # Slots whose rows on the device may not be what was said of them: a step failed amid its changes.
        self._distrusted: set[int] = set()
        self.has: npt.NDArray[np.bool_] = np.zeros(limits.num_slots, np.bool_)
        self._num_slots = limits.num_slots
        self._most_drafts = limits.max_draft_tokens
        self._zeros = zeros
        self._bias: Tensor | None = None
        self._counts: Tensor | None = None
        self._prompt: Tensor | None = None
        self._penalties: Tensor | None = None
        self._tails: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self._slots)

    # ---- what changes

    def apply(self, step: ForwardInput, send: Send) -> list[Callable[[], object]]:
        """Take over what the step changes; what is to be launched for it, in order."""
        work: list[Callable[[], object]] = []
        if self._slots or self._distrusted:
            for slot in step.staging.sampling_slot[: step.num_sampling_diffs].tolist():
                if self._slots.pop(slot, None) is not None or slot in self._distrusted:
                    self.has[slot] = False
                    self._distrusted.discard(slot)
                    work.append(self._forgetting(slot))
        for extras in step.extras:
            self._slots[extras.slot] = extras
            self.has[extras.slot] = True
            work += self._filling(extras, send)
        return work

    def distrust(self) -> None:
        """Clean every slot before it is used again."""
        self._distrusted.update(range(self._num_slots))

    def _forgetting(self, slot: int) -> Callable[[], object]:
        bias, penalties = self._bias, self._penalties

        def work() -> None:
            if bias is not None:
                bias[slot].zero_()
            if penalties is not None:
                penalties[slot].zero_()

        return work

    def _filling(self, extras: RowExtras, send: Send) -> list[Callable[[], object]]:
        slot, vocab = extras.slot, self._vocab
        work: list[Callable[[], object]] = []

        def known(ids: Sequence[int]) -> Int32Array:
            found = np.array(ids, np.int32)
            return found[(found >= 0) & (found < vocab)]

        banned = known([word[0] for word in extras.bad_words if len(word) == 1])
        added = {token: value for token, value in extras.logit_bias if 0 <= token < vocab}
        if len(banned) or added or extras.allowed_token_ids is not None:
            if self._bias is None:
                self._bias = self._zeros((self._num_slots, vocab), torch.float32)
            row, only = self._bias[slot], extras.allowed_token_ids is not None
            allowed, ids, biases, bans = send(
                [
                    known(extras.allowed_token_ids or ()),
                    np.array(list(added), np.int32),
                    np.array(list(added.values()), np.float32),
                    banned,
                ]
            )

            def bias() -> None:
                row.zero_()
                if only:
                    row.fill_(-torch.inf)
                    row.index_fill_(0, allowed.long(), 0.0)
                row.index_add_(0, ids.long(), biases)
                row.index_fill_(0, bans.long(), -torch.inf)

            work.append(bias)
        if _penalises(extras):
            if self._counts is None:
                self._counts = self._zeros((self._num_slots, vocab), torch.int32)
                self._prompt = self._zeros((self._num_slots, vocab), torch.bool)
                # Of repetition, less 1; frequency; presence: zeros are no penalty.
                self._penalties = self._zeros((self._num_slots, 3), torch.float32)
            assert self._prompt is not None and self._penalties is not None
            counts, prompt, penalties = self._counts[slot], self._prompt[slot], self._penalties[slot]
            values = (extras.repetition_penalty - 1.0, extras.frequency_penalty, extras.presence_penalty)
            before, generated, figures = send(
                [
                    extras.history[: extras.num_prompt_tokens],
                    extras.history[extras.num_prompt_tokens :],
                    np.array(values, np.float32),
                ]
            )

            def count() -> None:
                counts.zero_()
                prompt.zero_()
                prompt.index_fill_(0, before.long(), True)
                counts.index_add_(0, generated.long(), torch.ones_like(generated))
                penalties.copy_(figures)

            work.append(count)
        longest = max((len(word) for word in extras.bad_words), default=0)
        if longest > 1:
            work += self._widen(longest - 1)
            assert self._tails is not None
            tail = self._tails[slot]
            width = len(tail)
            last = np.full(width, _NO_TOKEN, np.int32)
            newest = extras.history[-width:]
            last[width - len(newest) :] = newest
            (values_of_tail,) = send([last])
            work.append(lambda: tail.copy_(values_of_tail))
        return work

    def _widen(self, width: int) -> list[Callable[[], object]]:
        old = self._tails
        if old is not None and old.shape[1] >= width:
            return []
        new = self._tails = self._zeros((self._num_slots, width), torch.int32)

        def work() -> None:
            new.fill_(_NO_TOKEN)
            if old is not None:
                new[:, width - old.shape[1] :].copy_(old)

        return [work]

    # ---- a step

    def plan(self, slots: Int32Array, send: Send) -> ExtrasPlan | None:
        """slots: of the rows that sample, in order. None: no row has extras."""
        rows = np.flatnonzero(self.has[slots])
        if not len(rows):
            return None
        owners = [(row, self._slots[int(slots[row])]) for row in rows.tolist()]
        words = [
            (row, extras.slot, word)
            for row, extras in owners
            for word in extras.bad_words
            if len(word) > 1 and 0 <= word[-1] < self._vocab
        ]
        word_slots = word_last = patterns = None
        if words:
            assert self._tails is not None
            width = self._tails.shape[1]
            table = np.full((len(words), width), _ANY, np.int32)
            for index, (_, _, word) in enumerate(words):
                table[index, width - len(word) + 1 :] = word[:-1]
            word_slots, last_rows, last_ids, flat = send(
                [
                    np.array([slot for _, slot, _ in words], np.int32),
                    np.array([row for row, _, _ in words], np.int32),
                    np.array([word[-1] for _, _, word in words], np.int32),
                    table.reshape(-1),
                ]
            )
            patterns = flat.view(len(words), width)
            word_last = (last_rows, last_ids)
        asking = [(row, extras.logprobs) for row, extras in owners if extras.logprobs is not None]
        return ExtrasPlan(
            penalised=any(_penalises(extras) for _, extras in owners),
            biased=self._bias is not None,
            word_slots=word_slots,
            word_last=word_last,
            patterns=patterns,
            logprob_rows=np.array([row for row, _ in asking], np.int64),
            num_top=min(max((top or 0 for _, top in asking), default=0), self._vocab),
        )

    def adjust(self, logits: Tensor, slots: Tensor, plan: ExtrasPlan, drafts: Tensor | None = None) -> Tensor:
        """On the device: float32 [R, V], int64 [R] -> changed logits; the given ones stay as they are.

        drafts int32 [B], B of the first rows: the draft that each one is of, -1 where a sequence begins.
        """
        x = logits
        bias = self._bias if plan.biased else None
        counts, prompt, penalties = (
            (self._counts, self._prompt, self._penalties) if plan.penalised else (None, None, None)
        )
        if on_gpu(x):
            from engine.ops.triton import extras as kernels

            x = kernels.adjust(x, slots, bias, counts, prompt, penalties, drafts)
        else:
            x = torch_adjust(x, slots, bias, counts, prompt, penalties, drafts, self._most_drafts)
        if plan.word_slots is not None and plan.word_last is not None and plan.patterns is not None:
            assert self._tails is not None
            tails = self._tails.index_select(0, plan.word_slots.long())
            if drafts is not None:
                drafts = _padded(drafts, len(logits))
                rows = plan.word_last[0].long()
                tails = _behind(tails, drafts, rows, drafts_before(drafts).index_select(0, rows))
            stands = ((tails[:, -plan.patterns.shape[1] :] == plan.patterns) | (plan.patterns == _ANY)).all(-1)
            place = plan.word_last[0].long() * self._vocab + plan.word_last[1].long()
            limit = torch.where(stands, -torch.inf, torch.inf).to(x.dtype)
            x = x.view(-1).scatter_reduce(0, place, limit, "amin").view(x.shape)
        return x

    def note(self, slots: Tensor, tokens: Tensor, drafts: Tensor | None = None) -> None:
        """On the device: count what was drawn, int64 [R] and int32 [R]. drafts: see `adjust`."""
        if self._counts is None and self._tails is None:
            return
        counting, before = torch.ones_like(tokens), None
        if drafts is not None:
            drafts = _padded(drafts, len(tokens))
            (right, last), before = rows_that_count(drafts, tokens), drafts_before(drafts)
            counting = right.int()
        if self._counts is not None:
            place = slots * self._vocab + tokens.long()
            self._counts.view(-1).index_add_(0, place, counting)
        if self._tails is not None:
            tails = self._tails.index_select(0, slots)
            if before is None:
                tails = torch.cat((tails[:, 1:], tokens[:, None]), 1)
            else:
                tails = _behind(tails, tokens, torch.arange(len(tokens), device=tokens.device), before + 1)
                slots = torch.where(last, slots, NULL_SLOT)
            self._tails.index_copy_(0, slots, tails)

    # ---- log-probabilities

    def prompts(self, step: ForwardInput) -> list[tuple[int, int, int, Int32Array, int]]:
        """Prompt chunks that ask: (row, first token of the step, index in its sequence, targets, top) each."""
        staging, found = step.staging, []
        for row in range(step.num_decode_rows, step.num_rows) if self._slots else ():
            extras = self._slots.get(int(staging.row_slot[row]))
            if extras is None or extras.prompt_logprobs is None:
                continue
            # A sequence that has output was retracted after its prompt's answer had been given.
            if len(extras.history) > extras.num_prompt_tokens:
                continue
            start = int(staging.row_start[row])
            targets = extras.history[start + 1 : start + 1 + int(staging.row_len[row])]
            if len(targets):
                found.append((row, int(staging.qo_indptr[row]), start + 1, targets, extras.prompt_logprobs))
        return found

    def step_logprobs(self, figures: Int32Array, plan: ExtrasPlan, rows: npt.NDArray[Any]) -> StepLogprobs:
        """Host: what `figures_of` brought. rows: of the step, for each sampling row."""
        asked = np.asarray(rows)[plan.logprob_rows].astype(np.int32)
        return StepLogprobs(asked, *unpack(figures, plan.num_top))


def torch_adjust(
    logits: Tensor,
    slots: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    prompt: Tensor | None,
    penalties: Tensor | None,
    drafts: Tensor | None = None,
    most_drafts: int = 0,
) -> Tensor:
    """float32 [R, V], int64 [R] -> the same with biases and penalties. Tables by slot, as DeviceExtras keeps them.

    bias float32 [slots, V]; counts int32, prompt bool [slots, V]: of generated tokens, whether in the prompt; penalties
    float32 [slots, 3]. drafts: see DeviceExtras.adjust; most_drafts: of a sequence.
    """
    x = logits
    if bias is not None:
        x = x + bias.index_select(0, slots)
    if counts is not None and prompt is not None and penalties is not None:
        counts = counts.index_select(0, slots)
        if drafts is not None:
            drafts, vocab = _padded(drafts, len(x)), x.shape[1]
            before, row = drafts_before(drafts), torch.arange(len(x), device=x.device)
            for nth in range(most_drafts):
                own = drafts.index_select(0, (row - nth).clamp(min=0)).long()
                place = row * vocab + own.clamp(min=0)
                counts.view(-1).index_add_(0, place, (before > nth).int())
        seen = prompt.index_select(0, slots) | (counts > 0)
        penalties = penalties.index_select(0, slots)
        repetition, frequency, presence = (1.0 + penalties[:, :1]), penalties[:, 1:2], penalties[:, 2:]
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x = x - frequency * counts - presence * (counts > 0)
    return x


def _padded(drafts: Tensor, rows: int) -> Tensor:
    """Of so many rows, each of which begins a sequence behind those that are known."""
    return torch.cat((drafts, drafts.new_full((rows - len(drafts),), -1)))


def _behind(tails: Tensor, tokens: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Tails int32 [W, width] with so many tokens more (int64 [W]), which end at these rows (int64 [W]) of int32 [R]."""
    width = tails.shape[1]
    column = torch.arange(width, device=tails.device)
    place = column + counts[:, None]
    new = tokens[(rows[:, None] + column - (width - 1)).clamp(min=0)]
    return torch.where(place < width, tails.gather(1, place.clamp(max=width - 1)), new)


def _penalises(extras: RowExtras) -> bool:
    return bool(extras.repetition_penalty != 1.0 or extras.presence_penalty or extras.frequency_penalty)


def figures_of(logits: Tensor, tokens: Tensor, k: int) -> Tensor:
    """On the device: raw float32 [n, V], int [n] -> int32 [n, 2 + 2k]: logprob, rank, best ids, their logprobs."""
    lse = logits.logsumexp(-1, keepdim=True)
    values = logits.gather(1, tokens.long()[:, None])
    rank = (logits > values).sum(-1, keepdim=True) + 1
    best = logits.topk(k, dim=-1)
    floats = torch.cat((values - lse, best.values - lse), 1).view(torch.int32)
    return torch.cat((floats[:, :1], rank.int(), best.indices.int(), floats[:, 1:]), 1)


def unpack(figures: Int32Array, k: int) -> tuple[Any, Any, Any, Any]:
    """Host: int32 [n, 2 + 2k] -> logprobs, ranks, ids, their logprobs; memory of their own."""
    own = figures.copy()
    floats = own.view(np.float32)
    return floats[:, 0], own[:, 1], own[:, 2 : 2 + k], floats[:, 2 + k :]


def prompt_figures(
    hidden: Tensor, make_logits: Callable[[Tensor], Tensor], targets: Tensor, k: int, vocab: int, out: Tensor
) -> None:
    """On the device: hidden [n, size] and the token that follows each -> `out` int32 [n, 2 + 2k], in slices."""
    size = max(1, SLICE_ELEMENTS // vocab)
    for first in range(0, len(hidden), size):
        part = slice(first, first + size)
        out[part].copy_(figures_of(make_logits(hidden[part]), targets[part], k))


def prompt_logprobs(row: int, first: int, figures: Int32Array, k: int) -> PromptLogprobs:
    """Host: what `prompt_figures` brought."""
    return PromptLogprobs(row, first, *unpack(figures, k))


def allow(logits: Tensor, rows: Tensor, bits: Tensor) -> Tensor:
    """On the device: mask rows [m] of float32 [R, V] by bits int32 [m, words], lowest bit first; a new tensor."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    allowed = (bits.index_select(1, ids // 32) >> (ids % 32)) & 1
    index = rows.long()
    masked = logits.index_select(0, index).masked_fill(allowed == 0, -torch.inf)
    return logits.index_copy(0, index, masked)
