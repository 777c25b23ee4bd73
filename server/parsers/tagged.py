"""Calls in tags: a name, then parameters whose values are bare text, each between an opening and a closing tag.

Tags says how one family spells them; what a value is in JSON is looked up in the tool's declaration. Text goes out as
it comes, other values when they are complete. From its name on a call is one: tags that are missing end where the next
one begins, and where a limit cuts the text off the arguments are what there is.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from engine.text.schema_types import MAX_SCALAR, SchemaTypes, Types
from server.parsers.base import MAX_NAME, SPACE, Malformed, Scanner, Steps, ToolFamily
from server.parsers.call_objects import read_call_list, read_call_object
from server.parsers.formats import Format, const, either, schema_of, sequence, tags
from server.parsers.json_text import json_escaped, read_arguments
from server.parsers.pythonic import is_python_call, read_python_call

# Values that wait for their end; what passes this is text.
_MAX_VALUE = 1 << 20
_BARE_NAME = re.compile(r"[^<>\s{}\[\]\"]")
_QUOTED = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""")
_ATTRIBUTE = re.compile(r"""\b(string|type)\s*=\s*["']?([^\s"'>]*)""")
_ELEMENT = re.compile(r"<([\w.\-]+)>")
_ELEMENT_END = re.compile(r"</([\w.\-]+)>")
_TEXT = frozenset({"string"})
_CDATA, _CDATA_END = "<![CDATA[", "]]>"


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of a family. All text between them but values is white space.

    section: around the calls of an answer; "" where there is none. lead, tail: further tags in front of `call` and
    behind `call_end`, all optional when they are read; around: how the model writes them. call: in front of the name
    and behind it; "" where white space ends it. key: in front of a parameter's name and behind it. value: in front of
    the value, "" where `key` does, and behind it. also: other ways to begin a call and a parameter, their names
    as attributes. loose: both as they are with a blank too many. quoted: names are attributes. attribute: further
    attributes of a parameter, one of which is written for a value of such types. count: an attribute that counts
    calls. escaped: & and quotes in attributes are entities. special: the tokens that tags are made of, where they are
    no tokens themselves.
    line: what is written between tags. between: between calls. bare: calls begin without `lead` as well. framed: values
    stand on lines of their own, whose breaks are none of theirs.
    """

    call: tuple[str, str]
    call_end: str
    key: tuple[str, str]
    value: tuple[str, str]
    also: tuple[str, str] = ("", "")
    loose: tuple[str, str] = ("", "")
    section: tuple[str, str] = ("", "")
    lead: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()
    around: tuple[str, str] = ("", "")
    quoted: bool = False
    attribute: Callable[[Types], list[str]] | None = None
    count: str = ""
    escaped: bool = False
    special: tuple[str, ...] = ()
    line: str = "\n"
    between: str = "\n"
    bare: bool = False
    framed: bool = False
    typed: tuple[str, str] = ("", "")
    cdata: bool = False

    @property
    def calls(self) -> tuple[str, ...]:
        """What stands in front of a call's name."""
        return tuple(filter(None, (self.call[0], self.also[0], self.loose[0])))

    @property
    def keys(self) -> tuple[str, ...]:
        """What stands in front of a parameter's name."""
        return tuple(filter(None, (self.key[0], self.also[1], self.loose[1])))

    @property
    def opens(self) -> tuple[str, ...]:
        """What begins a call in the middle of content."""
        begins = tuple(filter(None, (self.section[0], *self.lead[:1])))
        return (*begins, *self.calls) if self.bare or not begins else begins

    @property
    def closers(self) -> tuple[str, ...]:
        """What may follow a call."""
        return tuple(filter(None, (*self.tail, self.section[1])))

    @property
    def inner(self) -> tuple[str, ...]:
        """What ends a value, or a call, whose own end is missing."""
        parts = (*self.keys, self.call_end, *self.calls, *self.lead[:1], *self.closers)
        return tuple(dict.fromkeys(parts))

    @property
    def half_ends(self) -> tuple[str, ...]:
        """The end of a value without its last character, before white space or the next tag."""
        end = self.value[1]
        return tuple(end[:-1] + other for other in SPACE + "<") if end.startswith("</") and end.endswith(">") else ()

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts that are one token in some models."""
        if self.special:
            return self.special
        parts = (*self.section, *self.lead, *self.tail, *self.call, self.call_end, *self.key, *self.value)
        return tuple(dict.fromkeys(part for part in parts if re.fullmatch(r"<[^\s=]+>", part)))


def family(name: str, spelling: Tags, **options: Any) -> ToolFamily:
    """A family that writes its calls so. options: more fields of the family."""

    def run(scanner: Scanner) -> Steps[None]:
        yield from _run(scanner, spelling)

    def call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> Format:
        calls = tags([_call(spelling, name, schema) for name, schema in tools], spelling.between, parallel)
        if not spelling.section[0]:
            return calls
        begin, end = spelling.section
        return sequence(const(begin + spelling.line), calls, const(spelling.line + end))

    return ToolFamily(name, run, spelling.markers, call_format, **options)


def _run(scanner: Scanner, spelling: Tags) -> Steps[None]:
    inside = False
    while True:
        begins = tuple(dict.fromkeys((*spelling.opens, *spelling.calls)))
        marker = yield from scanner.until(begins, scanner.content)
        if marker is None:
            return
        # What stands outside of its tags, or begins in the other way, may be about anything.
        declared = marker in (spelling.also[0], spelling.loose[0]) or not (inside or marker in spelling.opens)
        try:
            while marker not in ("", *spelling.calls):
                marker = yield from _accept_any(scanner, (*spelling.lead, *spelling.calls))
            if marker:
                yield from read_tagged_call(scanner, spelling, marker, declared=declared)
            else:
                yield from _read_object(scanner, spelling)
        except Malformed:
            drop_begun(scanner, (*spelling.lead, *spelling.calls))
            scanner.fail()
            continue
        inside = bool(spelling.section[0])
        while closer := (yield from _accept_any(scanner, (*spelling.closers, spelling.call_end))):
            inside = inside and closer != spelling.section[1]
        drop_begun(scanner, spelling.inner)


def drop_begun(scanner: Scanner, literals: tuple[str, ...]) -> None:
    """Leave out the begin of a tag in which the text ends; a short one is that only where a limit has cut it off."""
    rest = scanner.text[scanner.at :].strip(SPACE)
    if scanner.closed and (scanner.cut or len(rest) > 2) and any(literal.startswith(rest) for literal in literals):
        scanner.skip(len(scanner.text) - scanner.at)


def _accept_any(scanner: Scanner, literals: tuple[str, ...]) -> Steps[str]:
    """Read whichever of the literals comes next, behind white space; "" where none does."""
    for literal in literals:
        if (yield from scanner.accept(literal, spaced=True)):
            return literal
    return ""


def _read_object(scanner: Scanner, spelling: Tags) -> Steps[None]:
    """A call as an object of JSON in the same tags, as other models write theirs; or a list of them."""
    ends = tuple(dict.fromkeys((spelling.call_end, *spelling.closers, *spelling.lead, spelling.call[0])))
    if (yield from scanner.space()) == "[":
        yield from read_call_list(scanner, ends)
    else:
        yield from read_call_object(scanner, ends)


def read_tagged_call(scanner: Scanner, spelling: Tags, begin: str, *, declared: bool = False) -> Steps[None]:
    """From behind the tag of the call, which was spelled `begin`, to its end.

    declared: the name of a tool that nobody declared makes it none.
    """
    if spelling.call[1]:
        yield from scanner.space()
        ends = _ends_of(spelling.call, begin)
        if spelling.call[1] == "\n":
            ends += (spelling.key[0], spelling.call_end)
        header, end = yield from scanner.raw_until(ends, MAX_NAME)
        if end in (spelling.key[0], spelling.call_end):
            scanner.skip(-len(end))
        name, tag = _name_in(header, spelling, begin == spelling.also[0]), ""
        if not name or re.search(r"[<>\s]", name) or (declared and not scanner.is_declared(name)):
            raise Malformed
    else:
        if (yield from scanner.space()) in ("{", "["):
            yield from _read_object(scanner, spelling)
            return
        if (yield from is_python_call(scanner)):
            yield from read_python_call(scanner)
            return
        name = yield from scanner.word(_BARE_NAME)
        # Words behind it, and it is none.
        tag = yield from _accept_any(scanner, (*spelling.keys, spelling.call_end))
        if not tag:
            yield from _read_named_object(scanner, spelling, name)
            return
    scanner.start_call(name)
    types = SchemaTypes(scanner.parameters(name))
    num_values = 0
    rest = ""
    while True:
        if not tag:
            tag, rest = yield from _next_tag(scanner, spelling)
        if tag not in spelling.keys:
            break
        spelled, tag = tag, ""
        try:
            header, kind = yield from _read_key(scanner, spelling, spelled)
        except Malformed:
            # Half of a tag, or no tag at all: the values so far are whole.
            break
        key = _name_in(header, spelling, spelled == spelling.also[1])
        scanner.arguments((", " if num_values else "{") + json.dumps(key, ensure_ascii=False) + ": ")
        num_values += 1
        said = {"type": kind} if kind else dict(_ATTRIBUTE.findall(header))
        if spelling.cdata and (yield from scanner.accept(_CDATA, spaced=True)):
            value = Value(scanner, types, types.property(key), said, (_CDATA_END,))
            if not (yield from _read_cdata(scanner, value)) and scanner.cut:
                value.cut()
                scanner.end_call()
                return
            value.end(whole=True)
            yield from scanner.accept(spelling.value[1], spaced=True)
            continue
        ends = (spelling.value[1], *spelling.inner)
        value = Value(scanner, types, types.property(key), said, ends, spelling.framed)
        halves = spelling.half_ends
        stop = yield from scanner.until((*ends, *halves), value.add)
        while stop not in (None, spelling.value[1]) and not (yield from _ends_value(scanner, spelling, stop)):
            # Text that speaks of the tag.
            value.add(stop)
            stop = yield from scanner.until((*ends, *halves), value.add)
        if stop is None and scanner.cut:
            value.cut()
            scanner.end_call()
            return
        value.end(whole=stop == spelling.value[1])
        if stop in halves:
            scanner.skip(-1)
            yield from scanner.accept(">", spaced=True)
        elif stop is not None and stop != spelling.value[1]:
            scanner.skip(-len(stop))
    if not num_values and (found := _object_in(rest) or _elements_in(rest, types)):
        # Arguments as JSON, or in tags of their own names, in place of parameters.
        scanner.arguments(found)
        rest = ""
    elif tag or not scanner.closed or not scanner.cut:
        scanner.arguments("}" if num_values else "{}")
    scanner.end_call()
    if tag != spelling.call_end and rest.strip():
        scanner.content(rest)


def _read_cdata(scanner: Scanner, value: Value) -> Steps[bool]:
    """The rest of a CDATA section, and those that follow it at once. Whether it has an end."""
    while (yield from scanner.until((_CDATA_END,), value.add)):
        if not (yield from scanner.accept(_CDATA)):
            return True
    return False


def _read_named_object(scanner: Scanner, spelling: Tags, name: str) -> Steps[None]:
    """A declared name, then its arguments as an object of JSON, or the end of the text."""
    if not scanner.is_declared(name):
        raise Malformed
    drop_begun(scanner, (*spelling.keys, spelling.call_end))
    character = yield from scanner.space()
    if character not in ("", "{"):
        raise Malformed
    scanner.start_call(name)
    if character:
        yield from read_arguments(scanner, scanner.arguments, spelling.inner)
    elif not scanner.cut:
        scanner.arguments("{}")
    scanner.end_call()


def _ends_of(tag: tuple[str, str], begin: str) -> tuple[str, ...]:
    """What may end the name in a tag that was spelled `begin`: its second part, or in a line of its own the line."""
    return (tag[1], "\n") if tag[1] == ">" and begin.endswith("=") else (tag[1],)


def _ends_value(scanner: Scanner, spelling: Tags, tag: str) -> Steps[bool]:
    """Whether a tag that is not the value's own end, and has been read, ends it, and is no text. Nothing is read."""
    if tag in spelling.keys:
        return True
    if tag in spelling.calls:
        return spelling.quoted or (yield from _is_head(scanner, spelling))
    # Nothing but further tags stands behind the end of a call, or in front of the next.
    back = -1 if tag.endswith("<") else 0
    character, distance = yield from scanner.look_past(SPACE + (">" if tag in spelling.half_ends else ""), back)
    return not character or (yield from scanner.look_at(spelling.inner, distance)) is not None


def _is_head(scanner: Scanner, spelling: Tags) -> Steps[bool]:
    """Whether a name, and what ends it, stand behind the tag of a call. Nothing is read."""
    end = re.escape(spelling.call[1]) or "|".join(map(re.escape, (spelling.key[0], spelling.call_end)))
    pattern = re.compile(rf"""\s*["']?[^<>\s"']+["']?\s*(?:{end})""")
    while True:
        rest = scanner.text[scanner.at : scanner.at + MAX_NAME]
        if pattern.match(rest):
            return True
        if scanner.closed or len(rest) == MAX_NAME or re.search(r"\S\s+[^\s<>]", rest):
            return False
        yield


def _name_in(header: str, spelling: Tags, quoted: bool) -> str:
    """The name in what stands between the two parts of a tag. quoted: it is an attribute there."""
    if not (quoted or spelling.quoted):
        return header.strip().removesuffix("/").strip().strip("\"'")
    found = _QUOTED.match(header)
    name = "" if found is None else (found[1] or found[2] or found[3] or "").strip()
    return name.replace("&quot;", '"').replace("&amp;", "&") if spelling.escaped else name


def _next_tag(scanner: Scanner, spelling: Tags) -> Steps[tuple[str, str]]:
    """The tag of a parameter or the end of the call, which is read, or "" where another tag or the end follows.

    Also the text in front of it.
    """
    found = yield from _accept_any(scanner, (*spelling.keys, spelling.call_end))
    if found:
        return found, ""
    pieces: list[str] = []
    found = (yield from scanner.until(spelling.inner, pieces.append)) or ""
    text = "".join(pieces)
    if found in (*spelling.keys, spelling.call_end):
        return found, text
    if found:
        scanner.skip(-len(found))
    elif any(tag.startswith(text.strip()) for tag in spelling.inner):
        # The begin of a tag that was cut off.
        text = ""
    return "", text


def _read_key(scanner: Scanner, spelling: Tags, begin: str) -> Steps[tuple[str, str]]:
    """From behind the tag of a parameter, spelled `begin`, to its value; returns what the tag holds, and the type that
    is named behind it."""
    before = spelling.value[0]
    ends = _ends_of(spelling.key, begin)
    yield from scanner.space()
    header, end = yield from scanner.raw_until((*ends, *([before] if before else [])), MAX_NAME)
    if end == "\n":
        # The line belongs to the value as well.
        scanner.skip(-1)
    kind = ""
    if spelling.typed[0] and end != before and (yield from scanner.accept(spelling.typed[0], spaced=True)):
        kind, end = yield from scanner.raw_until((spelling.typed[1], before), MAX_NAME)
    if before and end != before and not (yield from scanner.accept(before, spaced=True)):
        drop_begun(scanner, tuple(filter(None, (before, spelling.typed[0]))))
    if scanner.closed and scanner.cut and scanner.at == len(scanner.text):
        raise Malformed
    return header, kind.strip()


def without_begun(text: str, literals: tuple[str, ...]) -> str:
    """The text without the begin of a literal at its end."""
    longest = max(map(len, literals))
    for place in range(max(0, len(text) - longest), len(text)):
        if any(literal.startswith(text[place:]) for literal in literals):
            return text[:place]
    return text


def _object_in(text: str) -> str:
    """The object of JSON in a text, "" where there is none."""
    found = text[text.find("{") : text.rfind("}") + 1]
    try:
        return found if isinstance(json.loads(found), dict) else ""
    except (ValueError, RecursionError):
        return ""


def _elements_in(text: str, types: SchemaTypes) -> str:
    """The object that elements with the names of parameters make, `<city>Paris</city>`; "" where there are none."""
    known = types.properties()
    found = {key: value for key, value in _elements(text) if key in known}
    fields = (
        f"{json.dumps(key, ensure_ascii=False)}: {types.read_value(value, types.property(key))}"
        for key, value in found.items()
    )
    return "{" + ", ".join(fields) + "}" if found else ""


def _elements(text: str) -> Iterator[tuple[str, str]]:
    """Names and texts of the outermost elements, each up to the first end of its name. One pass for the ends: a search
    for each would be quadratic in what the model wrote.
    """
    ends: dict[str, list[re.Match[str]]] = {}
    for end in _ELEMENT_END.finditer(text):
        ends.setdefault(end[1], []).append(end)
    place = 0
    while (begin := _ELEMENT.search(text, place)) is not None:
        place = begin.end()
        own = ends.get(begin[1], [])
        index = bisect.bisect_left(own, place, key=re.Match.start)
        if index < len(own):
            yield begin[1], text[place : own[index].start()]
            place = own[index].end()


class Value:
    """One value as it comes. White space at its end waits: it is the value's only where its own tag follows."""

    def __init__(
        self,
        scanner: Scanner,
        types: SchemaTypes,
        schema: Any,
        attributes: dict[str, str],
        ends: tuple[str, ...],
        framed: bool = False,
    ) -> None:
        self._scanner = scanner
        self._ends = ends
        self._framed = framed
        self._begun = False
        self._line = ""
        self._types = types
        self._schema = schema
        self._pieces: list[str] = []
        self._size = 0
        self._streams = False
        said = attributes.get("string") or {"": "", "string": "true"}.get(attributes.get("type", ""), "false")
        admitted = types.types(schema, implied=True)
        self._is_text = admitted <= _TEXT or (said == "true" and "string" in admitted)
        self._waits = said == "false"

    def add(self, text: str) -> None:
        """The next text."""
        if self._scanner.closed:
            # The begin of a tag; a shorter one is that only where the model was cut off.
            kept = without_begun(text, self._ends)
            text = kept if self._scanner.cut or len(text) - len(kept) > 2 else text
        if self._framed and not self._begun and text:
            self._line += text[0]
            if self._line == "\r":
                # Half of a line's end, perhaps.
                text = text[1:]
                if not text:
                    return
                self._line += text[0]
            self._begun = True
            if self._line in ("\n", "\r\n"):
                text = text[1:]
            else:
                text = self._line[:-1] + text
                self._line = ""
        self._pieces.append(text)
        self._size += len(text)
        if not self._streams and not self._is_decided_text():
            return
        held = "".join(self._pieces)
        body = held.rstrip(SPACE)
        if len(held) - len(body) > MAX_NAME:
            body = held
        if body:
            self._send(body)
            self._pieces = [held[len(body) :]]

    def _is_decided_text(self) -> bool:
        if self._is_text or self._size > _MAX_VALUE:
            return True
        # What is undecided at this length is a container, whose end shows what it is.
        if self._waits or self._size > 2 * MAX_SCALAR:
            return False
        return not self._types.is_undecided("".join(self._pieces), self._schema)

    def _send(self, text: str) -> None:
        self._scanner.arguments(("" if self._streams else '"') + json_escaped(text))
        self._streams = True

    def end(self, *, whole: bool) -> None:
        """The value is complete."""
        text = "".join(self._pieces)
        if not whole:
            text = text.rstrip(SPACE)
        elif self._framed:
            text = text.removesuffix("\r\n" if self._line == "\r\n" and text.endswith("\r\n") else "\n")
        if self._streams or self._is_text:
            self._send(text)
            self._scanner.arguments('"')
        else:
            self._scanner.arguments(self._as_json(text))

    def cut(self) -> None:
        """The text has ended inside of the value."""
        text = "".join(self._pieces)
        if self._framed:
            text = text.removesuffix("\n")
        if self._streams or self._is_text:
            self._send(text)
        elif text.strip():
            self._scanner.arguments(text.strip())

    def _as_json(self, text: str) -> str:
        admitted = self._types.types(self._schema, implied=True)
        if not text.strip() and "string" not in admitted:
            empty = next((kind for kind in ("array", "object", "null") if kind in admitted), "")
            if empty:
                return {"array": "[]", "object": "{}", "null": "null"}[empty]
        return self._types.read_value(text, self._schema)


def _call(spelling: Tags, name: str, schema: dict[str, Any]) -> Format:
    """The tag of one call, its parameters in the order of the schema."""
    quote = '"' if spelling.quoted else ""
    before, after = spelling.around
    begin = f"{before}{spelling.call[0]}{quote}{name}{quote}"
    head = [const(spelling.call[1] + ("" if spelling.call[1] == "\n" else spelling.line))]
    if spelling.count:
        head = [
            const(f' {spelling.count}="'),
            {"type": "regex", "pattern": "[1-9][0-9]?"},
            const(f'"{spelling.call[1]}'),
        ]
    types = SchemaTypes(schema)
    required = schema.get("required")
    parts: list[Format] = []
    for key, inner in types.properties().items():
        if not key or re.search(r"[<>\"'&\s]", key):
            continue
        part = _parameter(spelling, types, key, inner, schema)
        must = isinstance(required, list) and key in required
        parts.append(part if must else either(const(""), part))
    return {"type": "tag", "begin": begin, "content": sequence(*head, *parts), "end": spelling.call_end + after}


def _parameter(spelling: Tags, types: SchemaTypes, key: str, inner: Any, root: dict[str, Any]) -> Format:
    """One parameter with its value."""
    # Free text ends with the tag alone, as it does for who reads it.
    frame = "\n" if spelling.framed else ""
    end = [const(part) for part in (spelling.value[1], spelling.line) if part]
    framed_end = [const(frame), *end] if frame else end
    quote = '"' if spelling.quoted else ""
    between = spelling.line + spelling.value[0] if spelling.value[0] else frame

    def begin(admitted: Types) -> Format:
        attributes = spelling.attribute(admitted) if spelling.attribute is not None else [""]
        return either(
            *(const(f"{spelling.key[0]}{quote}{key}{quote}{text}{spelling.key[1]}{between}") for text in attributes)
        )

    admitted = types.types(inner, implied=True)
    values = types.values(inner)
    if values is not None:
        options = [
            sequence(begin(types.types({"const": value})), const(text), *framed_end)
            for value in values
            if (text := _spelled(types, inner, value)) is not None
        ]
        if options:
            return either(*options)
    if "string" in admitted:
        return sequence(begin(_TEXT), {"type": "any_text"}, *end)
    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    whole = schema_of({**inner, **definitions} if isinstance(inner, dict) else inner)
    return sequence(begin(admitted), whole, *framed_end)


def _spelled(types: SchemaTypes, schema: Any, value: Any) -> str | None:
    """A value as bare text; None for one that would be read as another."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not text or "<" in text:
        return None
    return text if json.loads(types.read_value(text, schema)) == value else None
