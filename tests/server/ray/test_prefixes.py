"""Names of beginnings, who has which, and the order of replicas: pure functions."""

from __future__ import annotations

import random
from typing import Any

import pytest

from server.ray.prefixes import (
    BYTES_PER_TOKEN,
    MOST_NAMES,
    TOKENS_PER_REQUEST,
    Beginnings,
    Candidate,
    Seen,
    Sent,
    beginnings,
    order,
    read_body,
    read_published,
    worth_waiting_for,
)

TEXT = "".join(random.Random(1).choices("abcdefgh ", k=6000))


def of(fields: dict[str, Any], **headers: str) -> Beginnings:
    return beginnings(fields, {name.replace("_", "-"): value for name, value in headers.items()})


def common(one: Beginnings, other: Beginnings) -> int:
    """Bytes that both begin with, as far as their names tell."""
    shared = [end for end, *names in zip(one.ends, one.names, other.names, strict=False) if names[0] == names[1]]
    return max(shared, default=0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"prompt": TEXT}, {"prompt": TEXT + "more"}),
        ({"prompt": list(range(3000))}, {"prompt": [*range(3000), 7]}),
        ({"input_ids": list(range(3000))}, {"input_ids": [*range(3000), 7]}),
        (
            {"messages": [{"role": "user", "content": TEXT}]},
            {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "a"}]},
        ),
        ({"system": TEXT, "messages": [{"role": "user", "content": "a"}]}, {"system": TEXT, "messages": [{"b": 1}]}),
        ({"tools": [{"name": TEXT}], "messages": [1]}, {"tools": [{"name": TEXT}], "messages": [2]}),
        ({"instructions": TEXT, "input": "a"}, {"instructions": TEXT, "input": "b"}),
    ],
)
def test_what_begins_alike_has_the_same_names(first: dict[str, Any], second: dict[str, Any]) -> None:
    # A quarter at most lies between two ends.
    assert common(of(first), of(second)) >= 0.75 * min(len(TEXT), of(first).size)


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"prompt": "x" + TEXT}, {}),
        ({"prompt": TEXT, "model": "other"}, {}),
        ({"prompt": TEXT, "cache_salt": "s"}, {}),
        ({"prompt": TEXT}, {"authorization": "Bearer b"}),
        ({"prompt": TEXT}, {"x_api_key": "b"}),
    ],
)
def test_what_shares_no_pages_shares_no_names(fields: dict[str, Any], headers: dict[str, str]) -> None:
    known = set(of({"prompt": TEXT}, authorization="Bearer a").names)
    assert not known & set(of(fields, **headers).names)


def test_names_are_few_and_short_prompts_have_none() -> None:
    assert of({"prompt": "hello"}).names == () and len(of({"prompt": "a" * 8_000_000}).names) < 60


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff\xfe", b'"x"', b"[" * 100_000])
def test_what_is_no_object_has_no_fields(body: bytes) -> None:
    assert read_body(body) == {}


def test_sessions_come_from_headers_or_the_cache_key() -> None:
    assert of({"prompt": "a"}).session is None and of({"prompt_cache_key": 7}).session is None
    named = of({}, x_session_id="s")
    assert named.session == of({"prompt": TEXT}, x_smg_routing_key="s").session == of({"prompt_cache_key": "s"}).session
    assert named.session != of({}, x_session_id="s", authorization="b").session


def test_a_replica_forgets_what_its_cache_has_no_room_for() -> None:
    asks = [of({"prompt": f"{number} {TEXT}"}) for number in range(4)]
    seen = Seen(2 * asks[0].ends[-1] // BYTES_PER_TOKEN + 1)
    for ask in asks:
        seen.add(ask)
    known = read_published(seen.published())
    assert [all(name in known for name in ask.names) for ask in asks] == [False, False, True, True]
    # Of what was touched again the deepest goes first.
    seen.add(asks[2])
    seen.add(of({"prompt": "new " + TEXT[:600]}))
    known = read_published(seen.published())
    assert asks[3].names[0] in known and asks[3].names[-1] not in known and asks[2].names[-1] in known


def test_what_is_published_is_bounded() -> None:
    seen = Seen(10**9)
    for number in range(3000):
        seen.add(of({"prompt": f"{number:06}{TEXT[:600]}", "prompt_cache_key": str(number)}))
    stats = seen.published()
    assert len(stats["names"]) == 8 * MOST_NAMES and len(stats["sessions"]) == 8 * 3000


def test_what_was_sent_is_known_until_it_should_have_been_told() -> None:
    sent = Sent(5.0)
    sent.add([1, 2], now=0.0)
    sent.add([2, 3], now=4.0)
    assert all(name in sent for name in (1, 2, 3))
    sent.add([], now=5.5)
    assert 1 not in sent and 2 in sent


def candidates(wanted: Beginnings, loads: dict[str, int], *who: str, share: float = 1.0) -> list[Candidate]:
    known = set(wanted.names[: int(len(wanted.names) * share)])
    return [Candidate(name, load, (known if name in who else (), Sent(1.0))) for name, load in loads.items()]


@pytest.mark.parametrize(
    ("loads", "holders", "first"),
    [
        ({"a": 0, "b": 0}, ["b"], "b"),
        ({"a": 0, "b": 5}, ["b"], "b"),
        # The whole prompt costs less than those who are before it.
        ({"a": 0, "b": 1 + 6000 // BYTES_PER_TOKEN // TOKENS_PER_REQUEST + 1}, ["b"], "a"),
        ({"a": 3, "b": 2}, [], "b"),
        ({"a": 3, "b": 2}, ["a", "b"], "b"),
    ],
)
def test_cached_beginnings_are_weighed_against_load(loads: dict[str, int], holders: list[str], first: str) -> None:
    wanted = of({"prompt": TEXT})
    assert order(candidates(wanted, loads, *holders), wanted)[0] == [first]


def test_equal_replicas_stand_together_and_longer_matches_go_first() -> None:
    wanted = of({"prompt": TEXT})
    assert sorted(order(candidates(wanted, {"a": 1, "b": 1, "c": 2}), wanted)[0]) == ["a", "b"]
    half, whole = (candidates(wanted, {name: 0}, name, share=share)[0] for name, share in (("h", 0.5), ("w", 1.0)))
    assert order([half, whole], wanted) == [["w"], ["h"]]
    assert worth_waiting_for([half, whole], wanted)[0] == ["w"]


def test_a_session_stays_where_it_was() -> None:
    wanted = of({"prompt": "and then?"}, x_session_id="s")
    held = [Candidate("a", 0, ((),)), Candidate("b", 4, ({wanted.session},))]  # type: ignore[list-item]
    assert order(held, wanted)[0] == ["b"]
    assert order([held[0], Candidate("b", 40, held[1].known)], wanted)[0] == ["a"]
