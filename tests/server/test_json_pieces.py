"""JSON in pieces: the values and the errors of the parser itself, and no piece that is long."""

from __future__ import annotations

import json
import random
from typing import Any

import orjson
import pytest

from server.protocol import json_pieces

TEXTS = [
    "",
    "a",
    'plain text, with: [brackets] {and} quotes " \\ \\" ',
    "é中文😀\ud7ff",
    "\\" * 9,
    '"' * 9,
    "\n\t\x01",
    "[,]{:}",
]


def value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 6)
    if kind < 3:
        return "".join(rng.choices(TEXTS, k=rng.randrange(5)))
    if kind < 6:
        return rng.choice([0, -1.5, 1e9, True, False, None, 2**40])
    if kind == 6:
        return [value(rng, depth - 1) for _ in range(rng.randrange(7))]
    return {rng.choice(TEXTS) + str(index): value(rng, depth - 1) for index in range(rng.randrange(7))}


def outcome(loads: Any, data: bytes) -> Any:
    try:
        found = loads(data)
    except orjson.JSONDecodeError as error:
        return "error", str(error)
    # Order counts, too.
    return found, json.dumps(found)


@pytest.mark.parametrize("seed", range(4))
def test_values_and_errors_are_the_parsers_own(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(json_pieces, "PIECE", rng.choice([1, 2, 7, 40]))
    for _ in range(70):
        given = value(rng, 4)
        data = json.dumps(given, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, 1])).encode()
        assert outcome(json_pieces.loads, data) == outcome(orjson.loads, data), data
        # Something is broken, or doubled, or it happens to be fine.
        place = rng.randrange(len(data) + 1)
        for broken in (
            data[:place],
            data[:place] + rng.choice([b",", b'"', b"\\", b"}", b"]", b"{", b"[", b":", b" ", b"\xff"]) + data[place:],
            data[:place] + data[place + 1 :],
            data + data,
            b'{"a": %b, "b": 1, "a": %b}' % (data, data[:place]),
            b'{"a": %b, "b": 1, "a": %b}' % (data, data),
        ):
            assert outcome(json_pieces.loads, broken) == outcome(orjson.loads, broken), broken


BROKEN = [
    *(b"[1,,2]", b"[,]", b"[1,]", b'{"a":1,}', b'{,"a":1}', b'{"a":1},{"b":2}', b'{"a":[1}]', b'{"a" 1}', b'{1:"a"}'),
    *(b"[]][", b"[" * 1100 + b"]" * 1100, b'"\\ud83d' + b" " * 40 + b'\\ude00"', b"", b" ", b'"a" "b"', b'"\\u12'),
    *(b'{"a":1 "b":2}', b'{"a":1}}', b'{"a":1}{', b'["a]', b'{"a: 1}'),
]


@pytest.mark.parametrize("data", BROKEN)
def test_what_is_no_json(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 4):
        monkeypatch.setattr(json_pieces, "PIECE", size)
        with pytest.raises(orjson.JSONDecodeError) as expected:
            orjson.loads(data)
        with pytest.raises(orjson.JSONDecodeError) as found:
            json_pieces.loads(data)
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_json_is_never_parsed_as_a_whole(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(json_pieces, "WHOLE", 0)
    monkeypatch.setattr(json_pieces, "PIECE", rng.choice([1, 2, 7, 40]))
    for _ in range(100):
        given = {"a": value(rng, 4), "b": [], "c": {}}
        space = rng.choice([None, None, 1])
        data = json.dumps(given, ensure_ascii=rng.random() < 0.5, indent=space).encode()
        data = data.replace(b"{}", b"{" + b" \n" * 40 + b"}")
        assert outcome(json_pieces.loads, data) == outcome(orjson.loads, data), data


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each piece that the parser is given from now on."""
    sizes: list[int] = []
    real = orjson.loads

    class Watched:
        JSONDecodeError = orjson.JSONDecodeError

        @staticmethod
        def loads(piece: bytes) -> Any:
            sizes.append(len(piece))
            return real(piece)

    monkeypatch.setattr(json_pieces, "orjson", Watched)
    return sizes


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b'{"messages": "' + b"x" * 2_000_000, "near byte 2000014"),
        (b"[" * 2_000_000, "more than 1024 brackets are open, near byte 1024"),
        (b"[" + b"1, " * 500_000 + b"oops" + b", 1" * 500_000 + b"]", "expected value|unexpected character"),
        (b"{}" + b" " * 2_000_000 + b"}", "near byte 2000002"),
    ],
)
def test_of_much_broken_json_no_whole_is_parsed(data: bytes, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = watched(monkeypatch)
    with pytest.raises(ValueError, match=what):
        json_pieces.loads(data)
    assert max(sizes, default=0) <= 9 * json_pieces.PIECE


@pytest.mark.parametrize(
    "body",
    [
        {"logit_bias": {str(token): 1.5 for token in range(20_000)}, "prompt": "x"},
        {"prompt": list(range(60_000))},
        {"messages": [{"role": "user", "content": "é" * 20}] * 5_000},
        {"prompt": "plain text. " * 40_000},
        {"prompt": "中文" * 60_000},
        {"a": {"b": {"c": [[1, 2, 3]] * 40_000}}},
    ],
)
@pytest.mark.parametrize("ascii", [True, False])
def test_no_piece_is_long(body: dict[str, Any], ascii: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.dumps(body, ensure_ascii=ascii).encode()
    sizes = watched(monkeypatch)
    ways: list[None] = []
    assert json_pieces.loads(data, lambda: ways.append(None)) == body
    assert len(ways) == len(sizes) > 1
    assert max(sizes) <= 9 * json_pieces.PIECE


@pytest.mark.parametrize("depth", [250, 260, 600, 1020])
@pytest.mark.parametrize("inner", [b"[" + b"1," * 9_000 + b"1]", b'"' + b"x" * 20_000 + b'"', b" " * 20_000])
def test_what_lies_deep_is_read_all_the_same(depth: int, inner: bytes) -> None:
    """Calls within calls have a limit of their own."""
    data = b"[" * depth + inner + b"]" * depth
    found, expected = json_pieces.loads(data), orjson.loads(data)
    # A comparison would go as deep.
    for _ in range(depth - 1):
        [found], [expected] = found, expected
    assert found == expected
    with pytest.raises(orjson.JSONDecodeError):
        json_pieces.loads(b"[" * depth + inner + b",]" + b"]" * (depth - 1))
