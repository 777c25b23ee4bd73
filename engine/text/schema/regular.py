"""Patterns as sets of strings: what they share, what they leave out, and a plain pattern for the result.

A pattern becomes a term over characters, union, intersection and complement; its Brzozowski derivatives are the states
of an automaton, which is written as a pattern again. Looking ahead is an intersection with what follows.

Readers differ about `\\d`, `\\w`, `\\s`, `.` and `$` beyond ASCII. Whatever is written admits no string that one of
them would refuse: these are read narrowly, and under a complement widely.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.text.schema.patterns import Alternatives, Begin, Characters, End, Look, Node, Repeat, Run, Unreadable, parse

Ranges = tuple[tuple[int, int], ...]
LAST = 0x10FFFF
MAX_STEPS = 12_000  # derivatives that one question may take, some 0.3 s
MAX_ALL_STEPS = 30_000  # and all of one schema
MAX_STATES = 300
MAX_WORDS = 40  # strings that are listed one by one
MAX_EDGES = 5_000  # of an automaton that is written
MAX_WRITTEN_PATTERN = 8_000  # characters
MAX_WRITING = 300_000  # characters written on the way to it
_FULL: Ranges = ((0, LAST),)
_ATOM = re.compile(r"[^\\]|\\x[0-9A-F]{2}|\\u\{[0-9A-F]+\}|\[[^\[\]]*\]")


class Unsupported(Unreadable):
    """A pattern that takes too long, or too many characters, to be compared or written anew."""


@dataclass(frozen=True, slots=True, eq=False)
class _Term:
    """Interned: equal terms are one object. kind: empty, end, set, cat, star, repeat, or, and, not."""

    kind: str
    parts: tuple[_Term, ...]
    ranges: Ranges
    low: int
    high: int | None
    nullable: bool


class Languages:
    """The questions about the patterns of one schema: each is answered once, and all of them in bounded time."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], object] = {}
        self._read: dict[tuple[object, ...], Language | Unreadable] = {}
        self._left = MAX_ALL_STEPS

    def pattern(self, yes: Sequence[str] = (), no: Sequence[str] = ()) -> str | None:
        """A pattern without assertions for the strings that all of `yes` match and none of `no`; None for no string."""
        found = self._ask("pattern", yes, no, False)
        assert found is None or isinstance(found, str)
        return found

    def is_empty(self, yes: Sequence[str] = (), no: Sequence[str] = (), *, widely: bool = True) -> bool:
        """Whether there is no such string; where `widely`, for no reader of patterns."""
        return self._ask("empty", yes, no, widely) is True

    def has(self, text: str, yes: Sequence[str] = (), no: Sequence[str] = (), *, widely: bool) -> bool:
        """Whether a string is one of them: for some reader of patterns, where `widely`, for all of them else."""
        if self._left <= 0:
            raise Unsupported("takes too long to compare with all others")
        key = (tuple(yes), tuple(no), widely)
        if key not in self._read:
            try:
                self._read[key] = Language(yes, no, widely=widely)
            except Unreadable as error:
                self._read[key] = error
        language = self._read[key]
        if isinstance(language, Unreadable):
            raise language
        before = language.num_steps
        try:
            return language.has(text)
        finally:
            self._left -= 1 + language.num_steps - before

    def words(self, yes: Sequence[str] = (), no: Sequence[str] = ()) -> list[str] | None:
        """Every such string, where there are few; None for more than MAX_WORDS."""
        found = self._ask("words", yes, no, False)
        assert found is None or isinstance(found, list)
        return found

    def _ask(self, what: str, yes: Sequence[str], no: Sequence[str], widely: bool) -> object:
        key = (what, tuple(yes), tuple(no), widely)
        if key not in self._known:
            if self._left <= 0:
                raise Unsupported("takes too long to compare with all others")
            found: object
            try:
                language = Language(yes, no, widely=widely)
                try:
                    asked = {"empty": language.is_empty, "pattern": language.pattern, "words": language.words}
                    found = asked[what]()
                finally:
                    self._left -= language.num_steps
            except Unreadable as error:
                found = error
            self._known[key] = found
        found = self._known[key]
        if isinstance(found, Unreadable):
            raise found
        return found


class Language:
    """The strings that all of `yes` match (anywhere, as in JSON Schema) and none of `no`.

    widely: read so that no string is missed, to tell whether there is one at all. Raises Unreadable or Unsupported.
    """

    def __init__(self, yes: Iterable[str] = (), no: Iterable[str] = (), *, widely: bool = False) -> None:
        self._terms: dict[tuple[object, ...], _Term] = {}
        self._derived: dict[tuple[int, int], _Term] = {}
        self.num_steps = 0
        self._empty = self._make("empty", nullable=False)
        self._end = self._make("end", nullable=True)
        self._all = self._make("not", (self._empty,), nullable=True)
        read = [self._search(parse(pattern), wide=widely) for pattern in yes]
        read += [self._not(self._search(parse(pattern), wide=not widely)) for pattern in no]
        self._root = self._and(read)

    def is_empty(self) -> bool:
        """Whether there is no such string. Raises Unsupported where it takes too long to tell."""
        states, _ = self._automaton(until_one=True)
        return not states[-1].nullable and not self._root.nullable

    def has(self, text: str) -> bool:
        """Whether a string is one of them: in time linear in its length, unlike a search that goes back."""
        term = self._root
        for letter in text:
            if term is self._empty or term is self._all:
                break
            # Numbers below zero are no classes of characters.
            term = self._derive(term, -1 - ord(letter), ord(letter))
        return term.nullable

    def words(self) -> list[str] | None:
        """These strings, where there are at most MAX_WORDS."""
        states, edges = self._automaton()
        ends = {place for place, state in enumerate(states) if state.nullable}
        alive, before = set(ends), -1
        while len(alive) != before:
            before = len(alive)
            alive |= {place for place, row in enumerate(edges) if not alive.isdisjoint(row)}
        found: list[str] = []
        todo = [(0, "")] if 0 in alive else []
        while todo:
            place, begun = todo.pop()
            if place in ends:
                found.append(begun)
            for number, after in enumerate(edges[place]):
                if after in alive:
                    ranges = self._characters[number]
                    if sum(high - low + 1 for low, high in ranges) > MAX_WORDS:
                        return None
                    todo += [(after, begun + chr(code)) for low, high in ranges for code in range(low, high + 1)]
            # Each of those that are begun ends as one at least; one longer than all states has been in a circle.
            if len(found) + len(todo) > MAX_WORDS or len(begun) > len(states):
                return None
        return sorted(found)

    def pattern(self) -> str | None:
        """A pattern without assertions for exactly these strings; None where there is none."""
        states, edges = self._automaton()
        if len(states) * len(self._characters) > MAX_EDGES:
            raise Unsupported("is too large to be written out")
        return _written(*_merged(states, edges), self._characters)

    # ---- terms

    def _make(
        self,
        kind: str,
        parts: tuple[_Term, ...] = (),
        ranges: Ranges = (),
        low: int = 0,
        high: int | None = None,
        *,
        nullable: bool,
    ) -> _Term:
        key = (kind, tuple(map(id, parts)), ranges, low, high)
        found = self._terms.get(key)
        if found is None:
            if len(self._terms) > 20 * MAX_STEPS:
                raise Unsupported("takes too long to compare")
            found = self._terms[key] = _Term(kind, parts, ranges, low, high, nullable)
        return found

    def _set(self, ranges: Ranges) -> _Term:
        return self._make("set", ranges=ranges, nullable=False) if ranges else self._empty

    def _cat(self, left: _Term, right: _Term) -> _Term:
        if left is self._empty or right is self._empty:
            return self._empty
        if left is self._end:
            return right
        if right is self._end:
            return left
        if left is self._all and right is self._all:
            return left
        if left.kind == "cat":
            return self._cat(left.parts[0], self._cat(left.parts[1], right))
        return self._make("cat", (left, right), nullable=left.nullable and right.nullable)

    def _star(self, inner: _Term) -> _Term:
        if inner in (self._empty, self._end):
            return self._end
        if inner.kind == "star" or inner is self._all:
            return inner
        if inner.kind == "set" and inner.ranges == _FULL:
            return self._all
        return self._make("star", (inner,), nullable=True)

    def _repeat(self, inner: _Term, low: int, high: int | None) -> _Term:
        if high is None:
            rest = self._star(inner)
            return self._cat(self._repeat(inner, low, low), rest) if low else rest
        if high == 0 or inner is self._end:
            return self._end
        if inner is self._empty:
            return self._empty if low else self._end
        if low == high == 1:
            return inner
        return self._make("repeat", (inner,), low=low, high=high, nullable=low == 0 or inner.nullable)

    def _many(self, kind: str, parts: Iterable[_Term], neutral: _Term, ruling: _Term) -> _Term:
        found: dict[int, _Term] = {}
        for part in parts:
            for one in part.parts if part.kind == kind else (part,):
                if one is ruling:
                    return ruling
                if one is not neutral:
                    found[id(one)] = one
        if len(found) < 2:
            return next(iter(found.values()), neutral)
        if any(one.kind == "not" and id(one.parts[0]) in found for one in found.values()):
            return ruling
        nullable = (any if kind == "or" else all)(one.nullable for one in found.values())
        return self._make(kind, tuple(found[key] for key in sorted(found)), nullable=nullable)

    def _or(self, parts: Iterable[_Term]) -> _Term:
        return self._many("or", parts, self._empty, self._all)

    def _and(self, parts: Iterable[_Term]) -> _Term:
        return self._many("and", parts, self._all, self._empty)

    def _not(self, inner: _Term) -> _Term:
        return inner.parts[0] if inner.kind == "not" else self._make("not", (inner,), nullable=not inner.nullable)

    # ---- patterns

    def _search(self, node: Node, *, wide: bool) -> _Term:
        """The strings in which a pattern is found."""
        found = []
        for branch in _branches(node):
            anchored, branch = _anchored(branch)
            term = self._run(branch, self._all, wide)
            found.append(term if anchored else self._cat(self._all, term))
        return self._or(found)

    def _run(self, nodes: Sequence[Node], rest: _Term, wide: bool) -> _Term:
        for node in reversed(nodes):
            rest = self._before(node, rest, wide)
        return rest

    def _before(self, node: Node, rest: _Term, wide: bool) -> _Term:
        """What a node matches, followed by the rest of the string."""
        match node:
            case Characters():
                return self._cat(self._set(node.wide if wide else node.narrow), rest)
            case Run():
                return self._run(node.nodes, rest, wide)
            case Alternatives():
                return self._or(self._before(one, rest, wide) for one in node.nodes)
            case End():
                # Python's `$` stands before a last newline too.
                return self._and([rest, self._or([self._end, self._set(((10, 10),))]) if wide else self._end])
            case Look():
                ahead = self._before(node.node, self._all, wide != node.negative)
                return self._and([rest, self._not(ahead) if node.negative else ahead])
            case Repeat():
                return self._repeated(node, rest, wide)
            case _:
                raise Unsupported("stands for the begin of a text within it")

    def _repeated(self, node: Repeat, rest: _Term, wide: bool) -> _Term:
        if not node.node.has_assertions:
            return self._cat(self._repeat(self._before(node.node, self._end, wide), node.low, node.high), rest)
        inner = node.node
        if node.high is not None and node.high <= 4:
            found = rest if node.low == 0 else self._empty
            for count in range(1, node.high + 1):
                rest = self._before(inner, rest, wide)
                found = self._or([found, rest]) if count >= node.low else found
            return found
        # `((?!x).)*$`: no place from here on begins with x.
        last = self._or([self._end, self._set(((10, 10),))]) if wide else self._end
        if isinstance(inner, Run) and len(inner.nodes) == 2 and node.low == 0 and node.high is None and rest is last:
            look, one = inner.nodes
            if isinstance(look, Look) and look.negative and isinstance(one, Characters):
                ahead = self._cat(self._all, self._before(look.node, self._all, not wide))
                return self._and([self._star(self._set(one.wide if wide else one.narrow)), self._not(ahead)])
        raise Unsupported("looks ahead again and again")

    # ---- the automaton

    def _automaton(self, *, until_one: bool = False) -> tuple[list[_Term], list[list[int]]]:
        """States, the first one first, and for each the state behind every class of characters.

        until_one: no further than to the first state in which a string may end; it is the last one then.
        """
        self._characters = _classes(self._terms.values())
        states = [self._root]
        places = {id(self._root): 0}
        edges: list[list[int]] = []
        for state in states:
            row = []
            for number, ranges in enumerate(self._characters):
                after = self._derive(state, number, ranges[0][0])
                place = places.setdefault(id(after), len(states))
                if place == len(states):
                    states.append(after)
                    if until_one and after.nullable:
                        return states, edges
                    if len(states) > MAX_STATES:
                        raise Unsupported("is too large to compare")
                row.append(place)
            edges.append(row)
        return states, edges

    def _derive(self, term: _Term, number: int, code: int) -> _Term:
        key = (id(term), number)
        found = self._derived.get(key)
        if found is not None:
            return found
        self.num_steps += 1 + len(term.parts) // 8
        if self.num_steps > MAX_STEPS:
            raise Unsupported("takes too long to compare")
        match term.kind:
            case "empty" | "end":
                found = self._empty
            case "set":
                found = self._end if any(low <= code <= high for low, high in term.ranges) else self._empty
            case "cat":
                left, right = term.parts
                found = self._cat(self._derive(left, number, code), right)
                if left.nullable:
                    found = self._or([found, self._derive(right, number, code)])
            case "star":
                found = self._cat(self._derive(term.parts[0], number, code), term)
            case "repeat":
                assert term.high is not None
                rest = self._repeat(term.parts[0], max(term.low - 1, 0), term.high - 1)
                found = self._cat(self._derive(term.parts[0], number, code), rest)
            case "not":
                found = self._not(self._derive(term.parts[0], number, code))
            case _:
                parts = [self._derive(part, number, code) for part in term.parts]
                found = self._or(parts) if term.kind == "or" else self._and(parts)
        self._derived[key] = found
        return found


def _branches(node: Node) -> list[Sequence[Node]]:
    """The alternatives of a pattern as runs in which only the first node may be its begin."""
    todo: list[list[Node]] = [[node]]
    found: list[Sequence[Node]] = []
    while todo:
        run = todo.pop()
        if len(found) + len(todo) > 64:
            raise Unsupported("has too many alternatives")
        first = run[0] if run else None
        if isinstance(first, Run):
            todo.append([*first.nodes, *run[1:]])
        elif isinstance(first, Alternatives) and first.has_begin:
            todo += [[one, *run[1:]] for one in first.nodes]
        elif isinstance(first, Begin) and len(run) > 1 and isinstance(run[1], Begin):
            todo.append(run[1:])
        else:
            found.append(run)
    return found


def _anchored(branch: Sequence[Node]) -> tuple[bool, list[Node]]:
    """Whether a run holds at the begin of a text alone, and the run without saying so."""
    head = next(
        (place for place, node in enumerate(branch) if not isinstance(node, Begin | Look)),
        len(branch),
    )
    begins = [isinstance(node, Begin) or (isinstance(node, Look) and _looks_at_begin(node)) for node in branch[:head]]
    if not any(begins):
        return False, list(branch)
    kept: list[Node] = []
    for node in branch[:head]:
        if isinstance(node, Look) and node.node.has_begin:
            # Here is the begin.
            inner = [Run(tuple(_anchored(one)[1])) for one in _branches(node.node)]
            kept.append(Look(Alternatives(tuple(inner)), node.negative))
        elif isinstance(node, Look):
            kept.append(node)
    return True, [*kept, *branch[head:]]


def _looks_at_begin(look: Look) -> bool:
    return not look.negative and all(_anchored(one)[0] for one in _branches(look.node))


def _classes(terms: Iterable[_Term]) -> list[Ranges]:
    """Characters that no term tells apart, all of them."""
    sets = list(dict.fromkeys(term.ranges for term in terms if term.kind == "set"))
    bounds = sorted({0, *(low for ranges in sets for low, _ in ranges), *(high + 1 for r in sets for _, high in r)})
    bounds = [bound for bound in bounds if bound <= LAST]
    members: list[list[int]] = [[] for _ in bounds]
    for number, ranges in enumerate(sets):
        for low, high in ranges:
            for place in range(bisect.bisect_left(bounds, low), bisect.bisect_right(bounds, high)):
                members[place].append(number)
    found: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for place, low in enumerate(bounds):
        high = bounds[place + 1] - 1 if place + 1 < len(bounds) else LAST
        listed = found.setdefault(tuple(members[place]), [])
        if listed and listed[-1][1] == low - 1:
            listed[-1] = (listed[-1][0], high)
        else:
            listed.append((low, high))
    return [tuple(ranges) for ranges in found.values()]


def _merged(states: list[_Term], edges: list[list[int]]) -> tuple[list[bool], list[list[int]]]:
    """The automaton with the fewest states: which of them accept, and its edges. The first stays the first."""
    group = [int(state.nullable) for state in states]
    while True:
        names: dict[tuple[int, ...], int] = {}
        new = [
            names.setdefault((group[place], *(group[after] for after in row)), len(names))
            for place, row in enumerate(edges)
        ]
        if len(names) == len(set(group)):
            break
        group = new
    firsts = {name: place for place, name in reversed(list(enumerate(new)))}
    accepting = [states[firsts[name]].nullable for name in range(len(names))]
    return accepting, [[new[after] for after in edges[firsts[name]]] for name in range(len(names))]


def _written(accepting: list[bool], edges: list[list[int]], characters: list[Ranges]) -> str | None:
    """The automaton as a pattern: states are taken away one by one, the paths through them written out."""
    begin, end = len(edges), len(edges) + 1
    labels: dict[int, dict[int, str]] = {place: {} for place in range(len(edges) + 2)}
    for place, row in enumerate(edges):
        onward: dict[int, list[tuple[int, int]]] = {}
        for ranges, after in zip(characters, row, strict=True):
            onward.setdefault(after, []).extend(ranges)
        labels[place] = {after: _class(ranges) for after, ranges in onward.items()}
        if accepting[place]:
            labels[place][end] = ""
    labels[begin] = {0: ""}
    useful = _leading_to(labels, end)
    if begin not in useful:
        return None
    labels = {a: {b: text for b, text in row.items() if b in useful} for a, row in labels.items() if a in useful}
    _count_tails(labels, end)
    useful = _reached(labels, begin)
    labels = {a: row for a, row in labels.items() if a in useful}
    left = set(labels) - {begin, end}
    written = 0
    while left:
        into = {place: [other for other in labels if place in labels[other] and other != place] for place in left}
        place = min(left, key=lambda one: (len(into[one]) * (len(labels[one]) - (one in labels[one])), one))
        left.remove(place)
        paths = labels.pop(place)
        loop = f"{_atom(paths.pop(place))}*" if place in paths else ""
        for other in into[place]:
            first = labels[other].pop(place)
            for after, second in paths.items():
                text = _joined(first, loop, second)
                old = labels[other].get(after)
                labels[other][after] = text if old is None else _either(old, text)
                written += len(labels[other][after])
                if len(labels[other][after]) > MAX_WRITTEN_PATTERN or written > MAX_WRITING:
                    raise Unsupported("is too large when it is written out")
    return f"^{_joined(labels[begin].get(end, ''))}$" if end in labels[begin] else None


def _count_tails(labels: dict[int, dict[int, str]], end: int) -> None:
    """Where nothing but some more of the same may follow, say how many: one state for each would nest too deep."""
    tails: dict[int, tuple[str, int, int]] = {
        place: ("", 0, 0) for place, row in labels.items() if set(row) == {end} and not row[end]
    }
    grown = True
    while grown:
        grown = False
        for place, row in labels.items():
            onward = [after for after in row if after != end]
            if place in tails or place == end or len(onward) != 1 or onward[0] not in tails or row.get(end):
                continue
            label, low, high = tails[onward[0]]
            accepts = end in row
            if high == 0 or (label == row[onward[0]] and not (accepts and low)):
                tails[place] = (row[onward[0]], 0 if accepts else low + 1, high + 1)
                grown = True
    for place, (label, low, high) in tails.items():
        if high > 1:
            labels[place] = {end: f"{_atom(label)}{{{low},{high}}}"}


def _reached(labels: dict[int, dict[int, str]], begin: int) -> set[int]:
    found, todo = {begin}, [begin]
    while todo:
        for after in labels.get(todo.pop(), {}):
            if after not in found:
                found.add(after)
                todo.append(after)
    return found


def _leading_to(labels: dict[int, dict[int, str]], end: int) -> set[int]:
    found = {end}
    grown = True
    while grown:
        more = {place for place, row in labels.items() if place not in found and not found.isdisjoint(row)}
        found |= more
        grown = bool(more)
    return found


# Texts of parts of a pattern: an alternation always stands in a group of its own.


def _joined(*texts: str) -> str:
    return "".join(texts)


def _either(left: str, right: str) -> str:
    if left == right:
        return left
    if not left or not right:
        return f"{_atom(left or right)}?"
    return f"(?:{left}|{right})"


def _atom(text: str) -> str:
    return text if _ATOM.fullmatch(text) or _is_group(text) else f"(?:{text})"


def _is_group(text: str) -> bool:
    """Whether the group that a text begins with is all of it. Parentheses of the text itself are escaped."""
    if not text.startswith("(?:"):
        return False
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place == len(text) - 1
    return False


def _class(ranges: list[tuple[int, int]]) -> str:
    ranges = sorted(ranges)
    merged: list[tuple[int, int]] = []
    for low, high in ranges:
        if merged and merged[-1][1] >= low - 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    if merged == [(0, LAST)]:
        return "[\\s\\S]"
    if len(merged) == 1 and merged[0][0] == merged[0][1]:
        return _letter(merged[0][0])
    if merged[-1][1] == LAST:
        # What is left out is shorter.
        gaps, at = [], 0
        for low, high in merged:
            if low > at:
                gaps.append((at, low - 1))
            at = high + 1
        return f"[^{''.join(map(_range, gaps))}]"
    return f"[{''.join(map(_range, merged))}]"


def _range(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return _letter(low) if low == high else f"{_letter(low)}-{_letter(high)}"


def _letter(code: int) -> str:
    letter = chr(code)
    if code < 128:
        return letter if letter.isalnum() or letter in " _" else f"\\x{code:02X}"
    return letter if letter.isprintable() else f"\\u{{{code:X}}}"
