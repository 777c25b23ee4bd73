"""`logit_bias` with as many entries as a vocabulary has tokens: read some at a time, and as before."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from engine.request import RequestError
from server.protocol import generation
from server.protocol.body import Body
from server.protocol.generation import _read_logit_bias

VOCAB = 300_000


def test_many_entries_are_read_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int | None] = []

    def watched(values: Iterable[Any], most: int) -> Iterator[Any]:
        taken.append(most)
        return itertools.islice(values, most)

    monkeypatch.setattr(generation, "islice", watched)
    given = {str(token): token % 7 - 3.5 for token in range(VOCAB)}
    found = _read_logit_bias(Body({"logit_bias": given}), VOCAB)
    assert found == tuple((token, token % 7 - 3.5) for token in range(VOCAB))
    assert all(most <= 8192 for most in taken) and len(taken) > 2 * VOCAB // 8192


def test_two_spellings_are_one_id_wherever_they_stand() -> None:
    given = {"07": 1, **{str(token): 2 for token in range(10, 20_000)}, "7": 3}
    found = _read_logit_bias(Body({"logit_bias": given}), VOCAB)
    assert found[0] == (7, 3.0) and len(found) == len(given) - 1
    assert _read_logit_bias(Body({}), VOCAB) == ()


@pytest.mark.parametrize("wrong", [{"": 1}, {"x": 1}, {"٥": 1}, {str(VOCAB): 1}, {"00000000005": 1}])
@pytest.mark.parametrize("before", [0, 20_000])
def test_a_wrong_key_is_found_behind_many(wrong: dict[str, Any], before: int) -> None:
    given = {str(token): 1 for token in range(before)} | wrong
    with pytest.raises(RequestError, match="token ids from 0 to 299999 as keys"):
        _read_logit_bias(Body({"logit_bias": given}), VOCAB)


@pytest.mark.parametrize("wrong", ["1", True, None, 101, -100.5])
@pytest.mark.parametrize("before", [0, 20_000])
def test_a_wrong_value_is_found_behind_many(wrong: Any, before: int) -> None:
    given = {str(token): 1 for token in range(before)} | {"25000": wrong}
    with pytest.raises(RequestError, match="numbers from -100 to 100 as values"):
        _read_logit_bias(Body({"logit_bias": given}), VOCAB)
