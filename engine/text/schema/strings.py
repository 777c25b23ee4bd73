"""Strings: the `pattern` of a schema as the grammar library reads one, and patterns for all other strings."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from engine.text.schema.base import Rewriter
from engine.text.schema.errors import Unwritable
from engine.text.schema.parts import at

_LOOKS = re.compile(r"\(\?(?:[=!]|<[=!])|\\[1-9bBk]")


def readable_pattern(rewriter: Rewriter, pattern: Any, where: str, keyword: str) -> str | None:
    if not isinstance(pattern, str):
        raise rewriter.invalid(f"has a `{keyword}` that is no string")
    check_pattern(pattern, rewriter.invalid)
    if _LOOKS.search(pattern.replace("\\\\", "")):
        simple = _without_look(pattern)
        if simple is not None:
            return simple
        error = Unwritable(keyword, where, "looks ahead, behind or back, which a grammar cannot")
        if rewriter.strict:
            raise error
        rewriter.warn(error)
        return None
    return pattern


def not_pattern(rewriter: Rewriter, pattern: str, where: str) -> str:
    """A pattern for the strings that one of a plain text does not match."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    text = literal(pattern[begins : len(pattern) - ends])
    if text is None or not begins:
        raise Unwritable("pattern", at(where, "pattern"), "cannot be turned round")
    return other_strings([text], prefix=not ends)


def check_pattern(pattern: str, invalid: Callable[[str], Exception]) -> None:
    """Raises the caller's error for what is no regular expression at all, in ECMAScript's eyes or Python's."""
    text = re.sub(r"\\[pP]\{[^}]*\}|\\u\{[0-9a-fA-F]+\}", "a", pattern)
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


def _without_look(pattern: str) -> str | None:
    """The pattern of a text that must not begin so, or must not be empty, without looking ahead; None for others."""
    found = re.fullmatch(r"\^\(\?!((?:[^()\[\]|\\]|\\.)*)\)(?:\.\*|\[\\s\\S\]\*)?\$?", pattern)
    if found is None:
        return None
    inner = found[1]
    whole = inner.endswith("$")
    text = literal(inner[:-1] if whole else inner)
    return (
        None
        if not text or "\n" in text
        else other_strings([text], prefix=not whole, any_text="." if ".*" in pattern else None)
    )


def literal(pattern: str) -> str | None:
    """The text that a pattern stands for, where it stands for one."""
    plain = re.sub(r"\\([^a-zA-Z0-9])", "", pattern)
    if re.search(r"[\\.*+?()\[\]{}|^$]", plain):
        return None
    return re.sub(r"\\([^a-zA-Z0-9])", r"\1", pattern)


def other_strings(texts: list[str], *, prefix: bool = False, any_text: str | None = None) -> str:
    """A pattern for every string but these; prefix: but those that begin with one."""
    rest = (any_text or "[\\s\\S]") + "*"
    any_one = any_text or "[\\s\\S]"
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}

    def write(node: dict[str, Any]) -> str | None:
        """What may follow here; None where nothing may."""
        ends = "" in node
        if ends and prefix:
            return None
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
    return f"^{found}$" if found is not None else "^[^\\s\\S]$"


def _escaped(letter: str) -> str:
    return "\\" + letter if letter in "\\]^-[&~" else letter
