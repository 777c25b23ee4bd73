"""Strings: the `pattern` of a schema as the grammar library reads one, and patterns for all other strings."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from engine.text.schema.base import Rewriter
from engine.text.schema.errors import Unwritable
from engine.text.schema.parts import at
from engine.text.schema.patterns import Unreadable, split_looks
from engine.text.schema.regular import Languages

# What the library does not read: looking ahead, behind and back, borders of words.
_LOOKS = re.compile(r"\(\?(?:[=!]|<[=!])|\\[1-9bBk]")
NO_STRING = "^[^\\s\\S]$"


def readable_patterns(rewriter: Rewriter, pattern: Any, where: str, keyword: str) -> list[str]:
    """A pattern as some that the library reads and that must all hold; none where it is left to the model."""
    if not isinstance(pattern, str):
        raise rewriter.invalid(f"has a `{keyword}` that is no string")
    check_pattern(pattern, rewriter.invalid)
    if not _LOOKS.search(pattern.replace("\\\\", "")):
        return [pattern]
    try:
        return without_looks(rewriter.languages, pattern)
    except Unreadable as error:
        unwritable = Unwritable(keyword, where, f"the pattern {pattern!r:.60} {error}")
        if rewriter.strict:
            raise unwritable from None
        rewriter.warn(unwritable)
        return []


def without_looks(languages: Languages, pattern: str) -> list[str]:
    """Patterns that look nowhere and must all hold. Raises Unreadable."""
    yes, no, rest = split_looks(pattern)
    found = [one if not _LOOKS.search(one) else languages.pattern([one]) or NO_STRING for one in (*yes, rest)]
    # One by one they are shorter than together.
    return [*found, *(languages.pattern(no=[one]) or NO_STRING for one in no)]


def not_pattern(rewriter: Rewriter, pattern: str, where: str) -> str:
    """A pattern for the strings that one does not match."""
    try:
        return rewriter.languages.pattern(no=[pattern]) or NO_STRING
    except Unreadable as error:
        raise Unwritable("pattern", at(where, "pattern"), f"cannot be turned round: it {error}") from None


def check_pattern(pattern: str, invalid: Callable[[str], Exception]) -> None:
    """Raises the caller's error for what is no regular expression at all, in ECMAScript's eyes or Python's."""
    text = re.sub(r"\\[pP]\{[^{}]*\}|\\u\{[0-9a-fA-F]+\}", "a", pattern)
    text = re.sub(r"\\c[A-Za-z]|\\k<\w+>", "a", text)
    text = text.replace("[^]", "[^a]").replace("(?<", "(?P<").replace("(?P<=", "(?<=").replace("(?P<!", "(?<!")
    # Python wants a fixed width behind; what stands there matters not here.
    text = re.sub(r"\(\?<[=!]", "(?:", text)
    text = re.sub(r"\\([a-zA-Z])", lambda found: found[0] if found[1] in "dDwWsSbBnrtfvxu" else found[1], text)
    try:
        re.compile(text)
    except re.error as error:
        raise invalid(f"has the pattern {pattern!r:.60}, which is no regular expression: {error.msg}") from None
    except (RecursionError, OverflowError):
        raise invalid(f"has the pattern {pattern!r:.60}, which is too deep or too large") from None


def other_strings(texts: list[str]) -> str:
    """A pattern for every string but these."""
    any_one, rest = "[\\s\\S]", "[\\s\\S]*"
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}

    def write(node: dict[str, Any]) -> str | None:
        """What may follow here; None where nothing may."""
        ends = "" in node
        letters = [letter for letter in node if letter]
        options: list[str] = []
        if letters:
            options.append(f"[^{''.join(map(_escaped, letters))}]{rest}")
        else:
            options.append(f"{any_one}{rest}")
        for letter in letters:
            inner = write(node[letter])
            if inner is not None:
                options.append(f"{re.escape(letter)}{inner}")
        return f"(?:{'|'.join(options)})" + ("" if ends else "?")

    found = write(tree)
    return f"^{found}$" if found is not None else NO_STRING


def _escaped(letter: str) -> str:
    return "\\" + letter if letter in "\\]^-[&~" else letter
