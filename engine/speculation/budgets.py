"""DraftBudgets: how many drafts pay, for each row and step, learnt while running.

Of a row it is known how many of its drafts were right lately, of a step what it took by its number of tokens. A draft
is worth the chance that it is right, and costs what the step takes longer: drafts are taken, the likeliest first, as
long as tokens per second rise. Whatever comes out, the tokens are the same. Loop thread; numpy alone; no clock.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.config import SpeculationOptions
from engine.forward import Int32Array, Limits

# What is remembered of a row: each step counts so much of the one after it. A new row: 0.6, of two drafts.
_MEMORY = 0.85
_PRIOR = (1.2, 0.8)
# A draft must promise so much more than none, for what is measured is never quite right.
_MARGIN = 1.03
# Steps between two looks at what pays; and between two trials of rows that have no drafts, of an eighth of many rows.
_REPLAN = 8
_TRIAL = 64
_FEW = 16
# Where no draft pays for any row (so many run) trials are rarer.
_RARE_TRIAL = 512
# A row whose drafts are all wrong is still worth one where nothing else is known.
_LEAST_CHANCE = 0.01


class StepCosts:
    """Seconds of a step by its number of token rows, as measured; in between it is interpolated.

    A step smaller or larger than any that was measured is taken to be cheap (each token its share, or none more up to
    twice the largest): so it is tried once, and known then. Twice, because who tries the most at once knows only that
    this is dear, and nothing of what lies between.
    """

    def __init__(self, most_tokens: int) -> None:
        sizes = [1]
        while sizes[-1] < most_tokens:
            sizes.append(max(sizes[-1] + 1, sizes[-1] * 5 // 4))
        self._sizes = np.array(sizes, np.float64)
        # Of the steps of each class, up to its size: tokens and seconds.
        self._tokens = self._sizes.copy()
        self._seconds = np.full(len(sizes), np.nan)

    def measured(self, num_tokens: int, seconds: float) -> bool:
        """Whether nothing was known of that size before."""
        place = int(np.searchsorted(self._sizes, num_tokens))
        place = min(place, len(self._sizes) - 1)
        old = self._seconds[place]
        new = bool(np.isnan(old))
        tokens = self._tokens[place]
        self._tokens[place] = num_tokens if new else tokens + 0.1 * (num_tokens - tokens)
        # One step that something else has held up says little.
        self._seconds[place] = seconds if new else old + 0.1 * np.clip(seconds - old, -old / 2, old / 2)
        return new

    def estimate(self, num_tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Seconds, num_tokens ascending; in units of the first where nothing was ever measured."""
        known = ~np.isnan(self._seconds)
        if not known.any():
            unknown: npt.NDArray[np.float64] = np.maximum(1.0, num_tokens / (2 * num_tokens[0]))
            return unknown
        # More tokens never take less.
        seconds, sizes = np.maximum.accumulate(self._seconds[known]), self._tokens[known]
        shares = np.minimum(1.0, num_tokens / sizes[0]) * np.maximum(1.0, num_tokens / (2 * sizes[-1]))
        result: npt.NDArray[np.float64] = np.interp(num_tokens, sizes, seconds) * shares
        return result


class DraftBudgets:
    """See the module, and scheduling's Budgets. Without `adaptive`: as many as the options let a row have."""

    def __init__(self, limits: Limits, options: SpeculationOptions) -> None:
        self.costs = StepCosts(limits.max_num_batched_tokens)
        self._most = limits.max_draft_tokens
        self._adaptive = options.adaptive
        self._table = options.by_batch_size
        slots = limits.num_slots
        self._right: npt.NDArray[np.float64] = np.full(slots, _PRIOR[0])
        self._wrong: npt.NDArray[np.float64] = np.full(slots, _PRIOR[1])
        self._budget: Int32Array = np.full(slots, self._most, np.int32)
        # A draft is taken where the chance that it is right is no less: above 1 none is.
        self._threshold = 0.0
        self._turn = 0
        self._planned_for = 0

    def begin(self, slot: int) -> None:
        """Another sequence has the slot now."""
        self._right[slot], self._wrong[slot] = _PRIOR
        self._planned_for = 0  # where nothing paid for the others it may for this one

    def plan(self, slots: npt.NDArray[np.intp]) -> Int32Array:
        """int32 [n]: most drafts for each of the rows that decode next."""
        cap = self._cap(len(slots))
        if not self._adaptive:
            return np.full(len(slots), cap, np.int32)
        self._turn += 1
        if self._turn % _REPLAN == 0 or self._planned_for != len(slots):
            self._replan(slots, cap)
        budgets: Int32Array = np.minimum(self._budget[slots], cap)
        turns = _TRIAL if self._threshold <= 1.0 else _RARE_TRIAL
        if self._turn % turns == 0 and cap:
            # Fewer than usual, so that it is known what steps of such a size take; and one where there are none.
            budgets = np.minimum(budgets, 1 + self._turn // turns % cap)
            tried = slots % 8 == self._turn // turns % 8 if len(slots) > _FEW else np.ones(len(slots), np.bool_)
            budgets = np.where(tried, np.maximum(budgets, 1), budgets).astype(np.int32)
        return budgets

    def observe(self, slots: npt.NDArray[np.intp], num_drafted: Int32Array, num_accepted: Int32Array) -> None:
        """What became of the drafts of a step's rows: each right one, and the first that was wrong."""
        if not self._adaptive:
            return
        checked = num_drafted > 0
        slots, drafted, right = slots[checked], num_drafted[checked], num_accepted[checked]
        self._right[slots] = self._right[slots] * _MEMORY + right
        self._wrong[slots] = self._wrong[slots] * _MEMORY + (right < drafted)
        budgets = self._worth(slots)
        self._budget[slots] = budgets

    def took(self, num_tokens: int, seconds: float) -> None:
        """A step of rows that decode or speculate, and of nothing else."""
        if seconds > 0.0 and self.costs.measured(num_tokens, seconds):
            self._planned_for = 0

    def _cap(self, num_rows: int) -> int:
        return next((most for low, high, most in self._table if low <= num_rows <= high), self._most)

    def _chances(self, slots: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        """That a draft is right if all before it are."""
        right, wrong = self._right[slots], self._wrong[slots]
        chances: npt.NDArray[np.float64] = np.clip(right / (right + wrong), _LEAST_CHANCE, 0.99)
        return chances

    def _worth(self, slots: npt.NDArray[np.intp]) -> Int32Array:
        """Drafts whose chance is at least the threshold."""
        if self._threshold > 1.0:
            return np.zeros(len(slots), np.int32)
        if self._threshold <= 0.0:
            return np.full(len(slots), self._most, np.int32)
        counts = np.log(self._threshold) / np.log(self._chances(slots)) + 1e-9
        result: Int32Array = np.clip(np.floor(counts), 0, self._most).astype(np.int32)
        return result

    def _replan(self, slots: npt.NDArray[np.intp], cap: int) -> None:
        """Find the threshold that gives most tokens per second with these rows."""
        self._planned_for, rows = len(slots), len(slots)
        if not cap:
            return
        chances = self._chances(slots)[:, None] ** np.arange(1, cap + 1)
        gains = np.sort(chances, axis=None)[::-1]
        tokens = rows + np.arange(len(gains) + 1, dtype=np.float64)
        per_second = (rows + np.concatenate([np.zeros(1), np.cumsum(gains)])) / self.costs.estimate(tokens)
        best = int(per_second.argmax())
        self._threshold = 2.0 if per_second[best] < _MARGIN * per_second[0] else float(gains[best - 1])
        self._budget[slots] = self._worth(slots)
