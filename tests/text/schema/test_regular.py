"""Patterns as sets of strings: what is written for them matches what they match, and what they say of each other."""

from __future__ import annotations

import random
import re
import time

import pytest

from engine.text.schema.patterns import Unreadable, parse, split_looks
from engine.text.schema.regular import MAX_WRITTEN_PATTERN, Language, Languages

PIECES = [
    "a",
    "b",
    "ab",
    "aws:",
    "A",
    "1",
    "-",
    "--",
    "foo",
    "f",
    "o",
    "z",
    "Z",
    ".",
    "y",
    "@",
    "0",
    "x",
    "_",
    " ",
    "é",
]
CASES: list[tuple[list[str], list[str]]] = [
    (["^(?!aws:).*$"], []),
    (["^(?![aA][wW][sS]:)[\\s\\S]*$"], []),
    (["^((?!foo).)*$"], []),
    (["^(?!.*--)[a-z0-9-]*$"], []),
    (["^(?!^[0-9]+$)[a-z0-9]+$"], []),
    (["^(?=.*[A-Z])(?=.*[0-9]).{2,}$"], []),
    (["^[A-Z](?!Z)[A-Z1]?$"], []),
    (["^f.*"], ["b"]),
    (["^a", "b$"], []),
    (["a|^b$"], ["^ab"]),
    (["^a{1,3}b?$"], []),
    (["^(?:a|b){1,3}x?$"], ["^ab", "bb$"]),
    ([], ["^[a-z]+$"]),
    ([], ["b"]),
    ([], ["^(0|1+)[.]?1*$"]),
    ([], ["^$"]),
]


def strings(seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice(PIECES) for _ in range(rng.randint(0, 6))) for _ in range(400)]


@pytest.mark.parametrize("yes, no", CASES)
def test_a_written_pattern_matches_the_same_strings(yes: list[str], no: list[str]) -> None:
    written = Language(yes, no).pattern()
    assert written is not None and "(?=" not in written and "(?!" not in written
    readable = re.sub(r"\\u\{([0-9A-F]+)\}", lambda found: f"\\U{int(found[1], 16):08X}", written)
    counts = [0, 0]
    for text in strings(1):
        wanted = all(re.search(one, text) for one in yes) and not any(re.search(one, text) for one in no)
        assert (re.search(readable, text) is not None) == wanted, (text, written)
        counts[wanted] += 1
    assert min(counts) > 0


@pytest.mark.parametrize(
    "yes, no, empty",
    [
        (["^a$"], ["a"], True),
        (["^a", "^b"], [], True),
        (["^a", "b$"], [], False),
        (["^[0-9]+$", "^[a-f]+$"], [], True),
        (["^\\d+$", "^\\w+$"], [], False),
        (["^(?!x)", "^x"], [], True),
        (["^.{5,}$", "^.{0,4}$"], [], True),
    ],
)
def test_whether_there_is_a_string(yes: list[str], no: list[str], empty: bool) -> None:
    assert Languages().is_empty(yes, no) is empty


@pytest.mark.parametrize(
    "pattern, text, widely, narrowly",
    [
        ("b", "abc", True, True),
        ("^b", "abc", False, False),
        ("^a b-c\\.é$", "a b-c.é", True, True),
        ("^a$", "a\n", True, False),
        ("\n$", "a", False, False),
        ("^\\d$", "٣", True, False),
        ("^[\\s\\S]{0,4294967296}$", "abc", True, True),
        ("^[\\s\\S]{100000,}$", "abc", False, False),
        ("a+$", "a" * 400 + "!", False, False),
        ("^(a|a)*$", "a" * 5000, True, True),
    ],
)
def test_whether_a_string_matches(pattern: str, text: str, widely: bool, narrowly: bool) -> None:
    languages = Languages()
    assert languages.has(text, [pattern], widely=True) is widely
    assert languages.has(text, [pattern], widely=False) is narrowly
    assert languages.has(text, no=[pattern], widely=False) is not widely


def test_readers_differ_beyond_ascii() -> None:
    """An Arabic digit is a digit to some: neither a pattern nor its complement admits one."""
    for yes, no in ((["^\\d$"], []), ([], ["^\\d$"])):
        written = Language(yes, no).pattern()
        assert written is not None and not re.fullmatch(written, "٣")


@pytest.mark.parametrize(
    "pattern, yes, no, rest",
    [
        ("^(?!a)(?=.*b)c$", ["^(?:.*b)"], ["^(?:a)"], "^c$"),
        ("^x(?<!-)$", [], ["(?:-)$"], "^x$"),
        ("(?=^.{2,9}$)[a-z]*$", ["^.{2,9}$"], [], "^[a-z]*$"),
        ("^(?!a)b|c", [], [], "^(?!a)b|c"),
    ],
)
def test_looks_at_the_ends_stand_apart(pattern: str, yes: list[str], no: list[str], rest: str) -> None:
    assert split_looks(pattern) == (yes, no, rest)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a)\\1",
        "\\bx",
        "a(?<!b)c",
        "\\p{L}",
        "(?i:a)",
        "a++",
        "*a",
        "(a",
        "a)",
        "[b-a]",
        "(" * 60 + ")" * 60,
        "a" * 5000,
    ],
)
def test_what_is_no_set_of_strings(pattern: str) -> None:
    with pytest.raises(Unreadable):
        parse(pattern)


@pytest.mark.parametrize(
    "yes",
    [
        ["^(a|b)*a(a|b){12}$"],
        ["^(?:[a-z]{1,60}-){1,60}$"],
        ["(?=.*a.{20})(?=.*b.{20})(?=.*c.{20})x"],
        ["^" + "(a?" * 30 + ")" * 30 + "a{300}$"],
    ],
)
def test_questions_end_in_time(yes: list[str]) -> None:
    begun = time.process_time()
    try:
        written = Languages().pattern(yes, ["^ab"])
        assert written is None or len(written) <= 2 * MAX_WRITTEN_PATTERN
    except Unreadable:
        pass
    assert time.process_time() - begun < 3
