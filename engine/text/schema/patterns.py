"""Reads a regular expression of ECMAScript (and the like) into a tree. Raises Unreadable for what is no set of strings
by itself: references back, looking behind, borders of words, classes of Unicode.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]
MAX_PATTERN = 4_000
MAX_DEPTH = 40
LAST = 0x10FFFF


class Unreadable(Exception):
    """Why a pattern is no set of strings by itself, as the end of a sentence."""


@dataclass(frozen=True, slots=True)
class Characters:
    """One character. narrow: what every reader of patterns takes; wide: what any of them does."""

    narrow: Ranges
    wide: Ranges
    has_assertions = False
    has_begin = False


@dataclass(frozen=True, slots=True)
class Begin:
    has_assertions = True
    has_begin = True


@dataclass(frozen=True, slots=True)
class End:
    has_assertions = True
    has_begin = False


@dataclass(frozen=True, slots=True)
class Run:
    """One after the other."""

    nodes: tuple[Node, ...]

    @property
    def has_assertions(self) -> bool:
        return any(node.has_assertions for node in self.nodes)

    @property
    def has_begin(self) -> bool:
        return any(node.has_begin for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Alternatives:
    nodes: tuple[Node, ...]

    @property
    def has_assertions(self) -> bool:
        return any(node.has_assertions for node in self.nodes)

    @property
    def has_begin(self) -> bool:
        return any(node.has_begin for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Repeat:
    """high: None for no end."""

    node: Node
    low: int
    high: int | None

    @property
    def has_assertions(self) -> bool:
        return self.node.has_assertions

    @property
    def has_begin(self) -> bool:
        return self.node.has_begin


@dataclass(frozen=True, slots=True)
class Look:
    """What follows must begin so, or must not."""

    node: Node
    negative: bool
    has_assertions = True
    has_begin = False


Node = Characters | Begin | End | Run | Alternatives | Repeat | Look

_DIGITS = [(48, 57)]
_WORD = [(48, 57), (65, 90), (95, 95), (97, 122)]
_SPACE = [(9, 13), (32, 32)]
_ASCII = {"d": _DIGITS, "w": _WORD, "s": _SPACE}
_BEYOND = [(28, 31), (128, LAST)]  # Python takes the separators of ASCII for blanks
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0, "a": 7}
_COUNT = re.compile(r"\{([0-9]+)(,([0-9]*))?\}")
_BEHIND = re.compile(r"\(\?<([=!])([^()\\^$]|(?:\[[^\]\\]*\])|\\[^0-9a-zA-Z])\)\$$")
# A first look at the begin says where all of it stands.
_AHEAD_OF_ALL = re.compile(r"\(\?=(\^)(?=[^|()]*\))")
_UNICODE = re.compile(r"\{([0-9a-fA-F]{1,6})\}|([0-9a-fA-F]{4})")


def parse(pattern: str) -> Node:
    """The tree of a pattern. Raises Unreadable."""
    if len(pattern) > MAX_PATTERN:
        raise Unreadable("is too long to compare")
    parser = _Parser(pattern)
    node = parser.alternatives(0)
    if parser.place < len(pattern):
        raise Unreadable("closes a group that is not open")
    return node


def split_looks(pattern: str) -> tuple[list[str], list[str], str]:
    """What looks ahead behind the begin of a pattern, or behind before its end, apart from the rest of it.

    Returns patterns that must hold too, patterns that must not, and the rest.
    """
    yes: list[str] = []
    no: list[str] = []
    if len(pattern) > MAX_PATTERN:
        raise Unreadable("is too long to compare")
    tree = parse(_BEHIND.sub("$", pattern))
    if isinstance(tree, Alternatives):
        return yes, no, pattern
    if (behind := _BEHIND.search(pattern)) is not None:
        (no if behind[1] == "!" else yes).append(f"(?:{behind[2]})$")
        pattern = _BEHIND.sub("$", pattern)
    if _AHEAD_OF_ALL.match(pattern):
        pattern = f"^{pattern}"
    parser = _Parser(pattern)
    parser.place = 1
    while pattern.startswith(("^(?=", "^(?!")):
        node = parser._one(0)
        assert isinstance(node, Look)
        if pattern[parser.place : parser.place + 1] in tuple("*+?{"):
            break
        inner = pattern[4 : parser.place - 1]
        (no if node.negative else yes).append(inner if inner.startswith("^") and "|" not in inner else f"^(?:{inner})")
        pattern = "^" + pattern[parser.place :]
        parser = _Parser(pattern)
        parser.place = 1
    return yes, no, pattern


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self.place = 0

    def _take(self, literal: str) -> bool:
        found = self._text.startswith(literal, self.place)
        if found:
            self.place += len(literal)
        return found

    def _next(self) -> str:
        if self.place >= len(self._text):
            raise Unreadable("ends too early")
        self.place += 1
        return self._text[self.place - 1]

    def alternatives(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unreadable("is nested too deep to compare")
        runs = [self._run(depth)]
        while self._take("|"):
            runs.append(self._run(depth))
        return runs[0] if len(runs) == 1 else Alternatives(tuple(runs))

    def _run(self, depth: int) -> Node:
        nodes: list[Node] = []
        while self.place < len(self._text) and self._text[self.place] not in "|)":
            nodes.append(self._counted(self._one(depth)))
        return nodes[0] if len(nodes) == 1 else Run(tuple(nodes))

    def _counted(self, node: Node) -> Node:
        found = _COUNT.match(self._text, self.place)
        low, high = 1, 1
        if self._take("*"):
            low, high = 0, -1
        elif self._take("+"):
            low, high = 1, -1
        elif self._take("?"):
            low, high = 0, 1
        elif found is not None:
            self.place = found.end()
            low = int(found[1])
            high = low if found[2] is None else int(found[3]) if found[3] else -1
        else:
            return node
        if self._take("+"):
            raise Unreadable("repeats without going back")
        self._take("?")  # a lazy one matches the same strings
        return Repeat(node, low, None if high < 0 else high)

    def _one(self, depth: int) -> Node:
        letter = self._next()
        match letter:
            case "(":
                return self._group(depth)
            case "[":
                return self._class()
            case ".":
                return Characters(_without([(10, 10), (13, 13), (0x2028, 0x2029)]), _without([(10, 10)]))
            case "^":
                return Begin()
            case "$":
                return End()
            case "\\":
                return self._escape()
            case "*" | "+" | "?":
                raise Unreadable("repeats nothing")
        return _single(ord(letter))

    def _group(self, depth: int) -> Node:
        look: bool | None = None
        if self._take("?"):
            if self._take("="):
                look = False
            elif self._take("!"):
                look = True
            elif self._take("<=") or self._take("<!"):
                raise Unreadable("looks behind")
            elif self._take("<") or self._take("P<"):
                while self._next() != ">":
                    pass
            elif not self._take(":"):
                raise Unreadable("has a group of a kind that is not known")
        node = self.alternatives(depth + 1)
        if not self._take(")"):
            raise Unreadable("ends too early")
        return node if look is None else Look(node, look)

    def _escape(self) -> Node:
        letter = self._next()
        if letter.lower() in _ASCII:
            return _shorthand(letter)
        if letter in "bBkAzZGpP123456789":
            raise Unreadable("looks back, at a border of words, or at a class of Unicode")
        return _single(self._code(letter))

    def _code(self, letter: str) -> int:
        """The character that an escape stands for; its first letter is read."""
        if letter in _CONTROLS:
            return _CONTROLS[letter]
        if letter == "c" and self.place < len(self._text):
            return ord(self._next()) % 32
        if letter == "x":
            found = re.compile(r"[0-9a-fA-F]{2}").match(self._text, self.place)
            if found is not None:
                self.place = found.end()
                return int(found[0], 16)
        if letter == "u":
            found = _UNICODE.match(self._text, self.place)
            if found is not None:
                self.place = found.end()
                code = int(found[1] or found[2], 16)
                if code > LAST or 0xD800 <= code < 0xE000:
                    raise Unreadable("names no character")
                return code
        return ord(letter)

    def _class(self) -> Node:
        negative = self._take("^")
        narrow: list[tuple[int, int]] = []
        wide: list[tuple[int, int]] = []
        begun = self.place
        while not self._take("]"):
            item = self._class_item()
            if isinstance(item, Characters):
                narrow += item.narrow
                wide += item.wide
                continue
            high = item
            if self._text.startswith("-", self.place) and not self._text.startswith("-]", self.place):
                self.place += 1
                end = self._class_item()
                if isinstance(end, Characters):
                    narrow += [(item, item), (45, 45), *end.narrow]
                    wide += [(item, item), (45, 45), *end.wide]
                    continue
                high = end
                if high < item:
                    raise Unreadable("has a range that goes backward")
            narrow.append((item, high))
            wide.append((item, high))
        inside = self._text[begun : self.place]
        if any(f"\\{one}" in inside and f"\\{one.upper()}" in inside for one in _ASCII):
            # `[\s\S]`: every reader has a character in the one or in the other.
            narrow = wide = [(0, LAST)]
        if negative:
            return Characters(_without(wide), _without(narrow))
        return Characters(_sorted(narrow), _sorted(wide))

    def _class_item(self) -> int | Characters:
        letter = self._next()
        if letter == "[" and self._text.startswith((":", ".", "="), self.place):
            raise Unreadable("has a class of another standard")
        if letter != "\\":
            return ord(letter)
        letter = self._next()
        if letter.lower() in _ASCII:
            return _shorthand(letter)
        if letter in "pP":
            raise Unreadable("names a class of Unicode")
        return 8 if letter == "b" else self._code(letter)


def _single(code: int) -> Characters:
    return Characters(((code, code),), ((code, code),))


def _shorthand(letter: str) -> Characters:
    plain = _ASCII[letter.lower()]
    beyond = [*plain, *_BEYOND]
    if letter.islower():
        return Characters(_sorted(plain), _sorted(beyond))
    return Characters(_without(beyond), _without(plain))


def _sorted(ranges: list[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and merged[-1][1] >= low - 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def _without(ranges: list[tuple[int, int]]) -> Ranges:
    found: list[tuple[int, int]] = []
    at = 0
    for low, high in _sorted(ranges):
        if low > at:
            found.append((at, low - 1))
        at = high + 1
    if at <= LAST:
        found.append((at, LAST))
    return tuple(found)
