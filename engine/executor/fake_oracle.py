"""What the fake device draws, from a sequence's tokens alone: the model that FakeExecutor must agree with.

No pages, no slots, no steps. A cell depends on all cells before it in its group's window, a token on all cells that
windows leave, on the adapter and on how it is sampled.
"""

from __future__ import annotations

import copy
import hashlib
import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.executor.fake_adapters import key_of
from engine.executor.fake_memory import (
    MASK,
    POSITION,
    ROUND,
    STATE,
    TOKEN,
    combine_ints,
    mix_int,
    round_of,
)
from engine.forward import (
    SAMPLING_DTYPE,
    RowExtras,
)
from engine.groups import Chunk
from engine.request import Pooling, SamplingParams

# Numbers in the vector of a prompt.
FAKE_WIDTH = 4


@dataclass(frozen=True, slots=True)
class FakeModel:
    """What the fake device "computes": hashes onto vocab_size ids, and eos_token_id at eos_rate."""

    vocab_size: int
    eos_token_id: int = 0
    eos_rate: float = 0.0
    # By memory group: tokens that a query sees in both layers, itself included; None: all.
    windows: tuple[int | None, ...] = (None,)
    has_state: bool = False  # a recurrent one, which every token changes

    @property
    def eos_threshold(self) -> int:
        """Of 2**53: below it a draw is EOS."""
        return int(self.eos_rate * 2**53)


def expected_stream(
    model: FakeModel,
    prompt: list[int],
    sampling: SamplingParams,
    eos_token_ids: tuple[int, ...] = (),
    forced: Callable[[int], int | None] = lambda place: None,
    adapter: int = 0,
) -> Iterator[int]:
    """The endless continuation of `prompt`, from its tokens alone: no pages, no slots, no steps.

    Sampling with a temperature needs `sampling.seed`. Where to stop is up to the caller. forced: the token that a mask
    leaves at a place of the output, None where it allows all. adapter: its weights, a number here; 0 is none.
    """
    stop_ids = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stop_ids |= set(eos_token_ids)
    assert sampling.temperature == 0.0 or sampling.seed is not None, "the oracle cannot know a seed that was picked"
    row = np.zeros(1, SAMPLING_DTYPE)[0]
    for name in ("temperature", "top_p", "min_p", "top_k"):
        row[name] = getattr(sampling, name)
    row["seed"] = (sampling.seed or 0) & MASK
    row["min_length"] = len(prompt) + sampling.min_tokens
    oracle = Oracle(model, Draws(model, row, sampling, stop_ids), adapter)
    for earlier in prompt:
        oracle.push(earlier)
    while True:
        token = oracle.token()
        must = forced(oracle.position - len(prompt))
        token = token if must is None else must
        yield token
        oracle.push(token)


class Draws:
    """From what a context comes to, to its next token: how one sequence is sampled. row: of SAMPLING_DTYPE; stop_ids:
    all of them."""

    def __init__(
        self, model: FakeModel, row: Any, extras: SamplingParams | RowExtras | None, stop_ids: set[int]
    ) -> None:
        self._model, self._stop_ids, self._min_length = model, stop_ids, int(row["min_length"])
        self._key: int | None = None
        if row["temperature"] > 0.0:
            temperature, top_p, min_p = struct.unpack(
                "<III", struct.pack("<fff", row["temperature"], row["top_p"], row["min_p"])
            )
            key = mix_int(temperature + (top_p << 32)) ^ mix_int(min_p + (int(row["top_k"]) << 32) + ROUND)
            self._key = key ^ mix_int(int(row["seed"]))
        self._extras = extras_key(extras) if extras is not None and shapes_draws(extras) else None
        self._counts = extras is not None and counts_tokens(extras)

    def shape(self, draw: int, history: int) -> int:
        """By what is asked beside the sampling row. history: the sum over the tokens that penalties count from."""
        if self._extras is None:
            return draw
        return mix_int(draw ^ mix_int(self._extras ^ (history if self._counts else 0)))

    def token(self, draw: int, position: int) -> int:
        """Of a draw that is shaped. position: the token's."""
        model = self._model
        if self._key is not None:
            draw = mix_int(draw ^ mix_int((self._key + position * POSITION) & MASK))
        token = model.eos_token_id if draw >> 11 < model.eos_threshold else draw % model.vocab_size
        return unmasked(token, self._stop_ids, model.vocab_size) if position < self._min_length else token


class Oracle:
    """What the fake draws next, from a sequence's tokens alone."""

    def __init__(self, model: FakeModel, draws: Draws, adapter: int) -> None:
        self._draws, self._history = draws, 0
        self._context = _Context(model.windows, model.has_state, adapter)

    @property
    def position(self) -> int:
        return self._context.position

    def push(self, token: int) -> None:
        self._history = (self._history + mix_int(token)) & MASK
        self._context.push(token)

    def token(self) -> int:
        return self._draws.token(self._draws.shape(self._context.draw(), self._history), self._context.position)

    def copy(self) -> Oracle:
        other = copy.copy(self)
        other._context = self._context.copy()
        return other


class _Context:
    """The layers of the fake over a growing context, from its tokens alone. position: of the token to come."""

    def __init__(self, windows: tuple[int | None, ...], has_state: bool, adapter: int = 0) -> None:
        self.position = 0
        self._state = 0
        self._key = key_of(adapter)
        self._has_state = has_state
        self._groups = [_GroupContext(group, window) for group, window in enumerate(windows)]

    def push(self, token: int) -> int:
        """One more token; returns its cells in the second layers, as one number."""
        mixed = token * TOKEN + self.position * POSITION + self._key
        cells = [group.push(mixed, self.position) for group in self._groups]
        self._state = (self._state + mix_int((mixed + STATE) & MASK)) & MASK
        self.position += 1
        return combine_ints(cells)

    def copy(self) -> _Context:
        other = copy.copy(self)
        other._groups = [group.copy() for group in self._groups]
        return other

    def draw(self) -> int:
        """What the next token is drawn from."""
        state = [self._state] if self._has_state else []
        return mix_int(combine_ints([group.layer1 for group in self._groups] + state) ^ ROUND)


class _GroupContext:
    """Sums over the cells that the last token sees in one memory group."""

    def __init__(self, group: int, window: int | None) -> None:
        self._round, self._window = round_of(group), window
        self._layer0 = self.layer1 = 0
        self._seen: deque[tuple[int, int]] = deque()

    def copy(self) -> _GroupContext:
        other = copy.copy(self)
        other._seen = self._seen.copy()
        return other

    def push(self, mixed: int, position: int) -> int:
        if isinstance(self._window, Chunk) and position % self._window == 0:
            self._layer0 = self.layer1 = 0
            self._seen.clear()
        elif self._window is not None and len(self._seen) == self._window:
            left = self._seen.popleft()
            self._layer0, self.layer1 = self._layer0 - left[0], self.layer1 - left[1]
        cell = mix_int((mixed + self._round) & MASK)
        self._layer0 = (self._layer0 + cell) & MASK
        above = mix_int(self._layer0)
        self.layer1 = (self.layer1 + above) & MASK
        if self._window is not None:
            self._seen.append((cell, above))
        return above


def expected_tokens(
    model: FakeModel,
    prompt: list[int],
    sampling: SamplingParams,
    n: int,
    eos_token_ids: tuple[int, ...] = (),
) -> list[int]:
    """The first n tokens of `expected_stream`."""
    stream = expected_stream(model, prompt, sampling, eos_token_ids)
    return [next(stream) for _ in range(n)]


def expected_logprob(token: int, position: int) -> float:
    """What the fake reports beside `token` as the token at index `position` of its sequence."""
    return -float((7 * token + position) % 64)


def expected_vector(
    prompt: list[int],
    pooling: Pooling,
    windows: tuple[int | None, ...] = (None,),
    has_state: bool = False,
    adapter: int = 0,
) -> npt.NDArray[np.float32]:
    """What the fake answers to a request for a vector, from its tokens alone. windows: see FakeModel."""
    context = _Context(windows, has_state, adapter)
    cells = [context.push(token) for token in prompt]
    if pooling.needs_all:
        mean: npt.NDArray[np.float64] = numbers_of(cells).sum(axis=0) / len(prompt)
        return vector_of_all(mean, pooling, len(prompt))
    return vector_of_context(context.draw(), pooling)


def vector_of_all(mean: npt.NDArray[np.float64], pooling: Pooling, num_tokens: int) -> npt.NDArray[np.float32]:
    """Of a kind that all tokens have a part in: the mean stands for it, and for the vector of each token."""
    vector = mean.astype(np.float32)
    return np.tile(vector, (num_tokens, 1)) if pooling.kind == "all" else vector


def numbers_of(states: list[int]) -> npt.NDArray[np.float64]:
    """Integers of 20 bits [n, FAKE_WIDTH]: thousands of them add up exactly, in whatever chunks."""
    return np.array([[float(mix_int((state + i) & MASK) >> 44) for i in range(FAKE_WIDTH)] for state in states])


def vector_of_context(state: int, pooling: Pooling) -> npt.NDArray[np.float32]:
    """Of a kind that depends on the context of the last token alone; state: what that token's draw would be."""
    if pooling.kind == "last":
        return numbers_of([state]).astype(np.float32).reshape(-1)
    return np.array([-float(mix_int(state ^ mix_int(token)) >> 44) / 2**18 for token in pooling.token_ids], np.float32)


def shapes_draws(params: SamplingParams | RowExtras) -> bool:
    """Beside log-probabilities, which change no token, something is asked."""
    return bool(counts_tokens(params) or params.logit_bias or params.bad_words or params.allowed_token_ids is not None)


def counts_tokens(params: SamplingParams | RowExtras) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def extras_key(params: SamplingParams | RowExtras) -> int:
    """64 bits of what shapes the draws; the fake obeys none of it, but a lost or a foreign one is seen."""
    words = repr(
        (
            float(params.presence_penalty),
            float(params.frequency_penalty),
            float(params.repetition_penalty),
            params.logit_bias,
            params.allowed_token_ids,
            params.bad_words,
        )
    )
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")


def unmasked(token: int, stop_ids: set[int], vocab_size: int) -> int:
    for _ in range(vocab_size):
        if token not in stop_ids:
            return token
        token = (token + 1) % vocab_size
    return token
