"""What the host's proposers draft: from the text itself, from others of the same namespace, and from a prediction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.config import SpeculationOptions
from engine.speculation.base import Proposer, Text
from engine.speculation.matching import Store
from engine.speculation.registry import PROPOSERS, make_proposer


def proposer(method: str, **values: Any) -> Proposer:
    return make_proposer(SpeculationOptions(method=method, prompt_lookup_min=2, prompt_lookup_max=4, **values))


def grow(made: Proposer, slot: int, text: Text, *tokens: int) -> None:
    kept = len(text.tokens)
    text.tokens += tokens
    made.advance(slot, kept)


def draft(made: Proposer, slot: int, most: int = 4) -> list[int]:
    return made.propose([slot], [most])[0]


@pytest.mark.parametrize("method", PROPOSERS)
def test_what_followed_before(method: str) -> None:
    made, text = proposer(method, suffix_max_spec_factor=2.0), Text([1, 2, 3, 4, 5, 6, 9, 9, 1, 2, 3], "")
    made.start(1, text)
    assert draft(made, 1) == [4, 5, 6, 9]
    assert draft(made, 1, 2) == [4, 5] and draft(made, 1, 0) == []
    grow(made, 1, text, 7)
    assert draft(made, 1) == []
    grow(made, 1, text, 1, 2, 3)  # the longest match is followed by 7 now, for it is later
    assert draft(made, 1, 1)[0] in (4, 7)
    made.stop(1)
    made.start(1, Text([8], ""))
    assert draft(made, 1) == []


def test_the_longest_match_wins() -> None:
    made = proposer("ngram")
    text = Text([5, 1, 2, 3, 70, 6, 1, 2, 3, 80, 5, 1, 2, 3], "")
    made.start(1, text)
    assert draft(made, 1, 1) == [70]


def test_a_text_that_repeats_itself_goes_on_so() -> None:
    made = proposer("ngram")
    made.start(1, Text([1, 2, 3, 1, 2, 3, 1, 2, 3], ""))
    assert draft(made, 1, 8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_suffixes_end_where_places_disagree() -> None:
    made = proposer("suffix", suffix_min_token_prob=0.6, suffix_max_spec_factor=4.0)
    made.start(1, Text([1, 2, 50, 60, 9, 1, 2, 50, 61, 8, 1, 2], ""))
    assert draft(made, 1) == [50]
    made = proposer("suffix", suffix_max_spec_factor=1.0)
    made.start(1, Text([1, 2, 3, 4, 5, 6, 7, 1, 2], ""))
    assert draft(made, 1) == [3, 4]  # no longer than the match


@pytest.mark.parametrize("method", PROPOSERS)
def test_what_others_went_on_with(method: str) -> None:
    made, first = proposer(method, suffix_max_spec_factor=4.0), Text([1, 2, 3], "tenant")
    made.start(1, first)
    for token in range(10, 20):
        grow(made, 1, first, token)
        draft(made, 1)
    made.stop(1)
    for namespace, expected in (("tenant", [12, 13, 14, 15]), ("", []), ("another", [])):
        made.start(2, Text([4, 4, 10, 11], namespace))
        assert draft(made, 2) == expected, namespace
        made.stop(2)


@pytest.mark.parametrize("method", PROPOSERS)
def test_tokens_that_were_taken_back(method: str) -> None:
    made, text = proposer(method, suffix_max_spec_factor=4.0), Text([1, 2, 3, 4, 5], "")
    made.start(1, text)
    draft(made, 1)
    del text.tokens[3:]
    text.tokens += [8, 9, 2, 3]
    made.advance(1, 3)
    assert draft(made, 1) == [8, 9, 2, 3]


def test_the_store_is_bounded() -> None:
    store = Store(2, max_bytes=250 * 1000)
    rng = np.random.default_rng(0)
    for number in range(3000):
        tokens = rng.integers(0, 1000, 20).tolist()
        store.begin(f"n{number}")
        store.add(f"n{number}", tokens, 0, len(tokens))
        assert store.num_bytes <= 250 * 1000
    assert len(store._namespaces) <= 1024
    found = list(store.matches("n2999", tokens[:-1], [], 8))
    assert found and found[0].length == 8
    none = Store(2, max_answers=0)
    none.begin("")
    none.add("", [1, 2, 3, 4], 0, 4)
    assert none.num_bytes == 0 and not list(none.matches("", [1, 2], [], 8))
    for _ in range(300):
        store.add("one", rng.integers(0, 1000, 20).tolist(), 0, 20)
        assert store.num_bytes <= 250 * 1000


@pytest.mark.parametrize(
    ("predicted", "answer", "expected"),
    [
        ([1, 2, 3, 4, 5], [], [1, 2, 3]),
        ([1, 2, 3, 4, 5], [1, 2], [3, 4, 5]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], []),
        # Something before it, another token, one more, and one less.
        ([1, 2, 3, 4, 5, 6], [90, 91, 1], [2, 3, 4]),
        ([1, 2, 3, 4, 5, 6], [1, 2, 90, 4], [5, 6]),
        ([1, 2, 3, 4, 5, 6], [1, 2, 90, 3], [4, 5, 6]),
        ([1, 2, 3, 4, 5, 6], [1, 2, 4], [5, 6]),
        # Nothing tells where.
        ([1, 2, 3, 4, 5, 6], [90, 91], []),
        # Of two places the one near where it was left; of two near ones that with more before it.
        ([*range(100, 200), 7, *range(200, 300), 7, 8], [*range(100, 110), 99, 7], []),
        ([1, 7, 2, 7, 3], [1, 99, 2, 7], [3]),
    ],
)
def test_predictions(predicted: list[int], answer: list[int], expected: list[int]) -> None:
    made, text = proposer("ngram"), Text([300, 301], "", np.array(predicted, np.int32))
    made.start(1, text)
    for token in answer:
        grow(made, 1, text, token)
        draft(made, 1, 3)
    assert draft(made, 1, 3) == expected
    # Another request of the slot predicts nothing.
    made.start(1, Text([300, 301], "another"))
    assert draft(made, 1, 3) == []
