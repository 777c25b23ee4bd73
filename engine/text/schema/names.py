"""Names of an object's properties: `propertyNames` held, and `patternProperties` that overlap taken apart.

The library wants patterns of which a name matches one at most. Those that share names become one for each way of
matching: the one alone, the other alone, both.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from typing import Any

from engine.text.schema.base import FORMATS, Rewriter
from engine.text.schema.errors import Unwritable
from engine.text.schema.parts import all_of, at, names_of
from engine.text.schema.patterns import Unreadable
from engine.text.schema.plain import plain
from engine.text.schema.regular import Languages
from engine.text.schema.strings import NO_STRING, readable_patterns

MAX_COMPARED = 16  # patterns of one object that are compared with each other
MAX_OVERLAPPING = 5
MAX_DEPTH = 8
MAX_LISTING = 400  # characters of a pattern that is asked for its names
MAX_REPEATED = 4_000  # and of the schemas that are written for each
# What has many strings, or others for other readers.
_ESCAPED = re.compile(r"\\[^a-zA-Z0-9]")
_MANY = re.compile(r"[*+.]|\{[0-9]+,\}|\[\^|\\[a-zA-Z]")
_SAY_NOTHING = ("type", "description", "title", "$comment", "$schema", "$id", "examples", "default", "deprecated")


def name_keywords(rewriter: Rewriter, schema: dict[str, Any], where: str) -> dict[str, Any]:
    """`patternProperties` and `additionalProperties` of a schema, written; and the `properties` that may not be."""
    given = schema.get("patternProperties", {})
    if not isinstance(given, dict):
        raise rewriter.invalid("has `patternProperties` that are no object")
    here = at(where, "patternProperties")
    patterns = {}
    for pattern in given:
        readable = readable_patterns(rewriter, pattern, here, "patternProperties")
        if readable:
            patterns[pattern] = readable
    limits = _limits(rewriter, schema, where) if rewriter.expand else None
    found: dict[str, Any] = {}
    if "additionalProperties" in schema:
        found["additionalProperties"] = rewriter.yes(schema["additionalProperties"], at(where, "additionalProperties"))
    written = {name: rewriter.yes(given[name], at(where, f"patternProperties.{name}")) for name in patterns}
    try:
        if limits is None:
            parts: dict[str, Any] = {}
            for group in _overlapping(rewriter.languages, patterns):
                if len(group) == 1 and len(patterns[group[0]]) == 1:
                    parts[patterns[group[0]][0]] = written[group[0]]
                else:
                    parts |= _apart(rewriter.languages, group, patterns, written, ([], []), None)
        else:
            here = at(where, "propertyNames")
            rest = found.get("additionalProperties", True)
            parts = _apart(rewriter.languages, list(patterns), patterns, written, limits, rest)
            found["additionalProperties"] = False
            found["properties"] = {
                name: False for name in schema.get("properties", {}) if not _is_within(rewriter, name, limits, here)
            }
    except Unreadable as error:
        keyword = here.rpartition(".")[2]
        unwritable = Unwritable(keyword, here, f"the names of its patterns cannot be told apart: one of them {error}")
        if rewriter.strict:
            raise unwritable from None
        rewriter.warn(unwritable)
        parts = {patterns[name][0]: part for name, part in written.items()}
    if parts:
        found["patternProperties"] = parts
        if found.get("additionalProperties") is not False and _are_all(rewriter.languages, parts):
            # The library would begin a name that matches none of them, and never come to its end.
            found["additionalProperties"] = False
    return found


def _are_all(languages: Languages, patterns: Iterable[str]) -> bool:
    """Whether every name matches one of some patterns."""
    try:
        return languages.is_empty(no=list(patterns), widely=False)
    except Unreadable:
        return False


def _overlapping(languages: Languages, patterns: dict[str, list[str]]) -> list[list[str]]:
    """Groups of patterns; a name may match several of one group, and none of two groups."""
    groups = [[pattern] for pattern in patterns]
    if len(groups) > MAX_COMPARED:
        return groups
    for left, right in itertools.combinations(patterns, 2):
        try:
            if languages.is_empty([*patterns[left], *patterns[right]]):
                continue
        except Unreadable:
            continue  # the library judges
        mine = next(group for group in groups if left in group)
        other = next(group for group in groups if right in group)
        if mine is not other:
            groups.remove(other)
            mine += other
    return groups


def _apart(
    languages: Languages,
    group: list[str],
    patterns: dict[str, list[str]],
    written: dict[str, Any],
    limits: tuple[list[str], list[str]],
    rest: Any,
) -> dict[str, Any]:
    """For each way of matching the patterns of a group a pattern of its own. rest: for names that match none."""
    if len(group) > MAX_OVERLAPPING:
        raise Unreadable("has names in common with too many others")
    found: dict[str, Any] = {}

    def split(left: list[str], yes: list[str], no: list[str], parts: list[Any]) -> None:
        if left:
            split(left[1:], [*yes, *patterns[left[0]]], no, [*parts, written[left[0]]])
            negated = (
                patterns[left[0]]
                if len(patterns[left[0]]) == 1
                else [languages.pattern(patterns[left[0]]) or NO_STRING]
            )
            split(left[1:], yes, [*no, *negated], parts)
            return
        schema = all_of(parts) if parts else rest
        if schema is None or (not parts and schema is False):
            return
        pattern = yes[0] if len(yes) == 1 and not no else languages.pattern(yes, no)
        if pattern is not None:
            found[pattern] = schema

    split(group, limits[0], limits[1], [])
    return found


def _limits(rewriter: Rewriter, schema: dict[str, Any], where: str) -> tuple[list[str], list[str]] | None:
    """Patterns that names must match, and that they must not, by `propertyNames`; None where it says nothing here."""
    names = schema.get("propertyNames")
    if not isinstance(names, dict) or not rewriter.may_be(schema, "object") or is_listed(rewriter, names, where):
        return None
    here = at(where, "propertyNames")
    try:
        yes, no = _conditions(rewriter, names, here, 0)
        shorter = [one for one in yes if not _is_length(one)]
        if shorter:
            # A length that the other patterns imply only makes them long.
            lengths = [one for one in yes if _is_length(one)]
            yes = shorter + [one for one in lengths if not rewriter.languages.is_empty(shorter, [*no, one])]
    except Unreadable as error:
        unwritable = Unwritable("propertyNames", here, str(error))
    except Unwritable as error:
        unwritable = error
    else:
        return (yes, no) if yes or no else None
    if rewriter.strict:
        raise unwritable
    rewriter.warn(unwritable)
    return None


def with_listed_names(rewriter: Rewriter, schema: dict[str, Any], where: str) -> dict[str, Any]:
    """A schema whose patterns of few names are those names: in `properties`, or as the list in `propertyNames`.

    The library does not see that a pattern has no name left beside those that are listed, and begins one; it would also
    let a free name come twice where several are asked for.
    """
    given, names = schema.get("patternProperties", {}), schema.get("propertyNames")
    own, asks_for_several = schema.get("properties", {}), schema.get("minProperties", 0) > 1
    if not rewriter.expand or not isinstance(given, dict) or not isinstance(own, dict):
        return schema
    if not (given or isinstance(names, dict)) or not rewriter.may_be(schema, "object"):
        return schema
    listed: dict[str, list[Any]] = {}
    patterns: dict[str, Any] = {}
    for pattern, part in given.items():
        words = _few_words(rewriter, [pattern], [])
        if words is not None and not (asks_for_several or own.keys() & set(words)):
            # Written once for each of them: a large schema stays where nothing is the worse for it.
            words = words if len(words) * len(json.dumps(part)) < MAX_REPEATED else None
        if words is None:
            patterns[pattern] = part
        for word in words or ():
            listed.setdefault(word, []).append(part)
    if listed:
        schema = {key: value for key, value in schema.items() if key != "patternProperties"}
        if patterns:
            schema["patternProperties"] = patterns
        parts = {word: [*([own[word]] if word in own else []), *found] for word, found in listed.items()}
        schema["properties"] = own | {
            word: found[0] if len(found) == 1 else {"allOf": found} for word, found in parts.items()
        }
    if isinstance(names, dict) and not is_listed(rewriter, names, where):
        limits = _limits(rewriter, schema, where)
        words = None if limits is None else _few_words(rewriter, *limits)
        if words is not None:
            schema = {**schema, "propertyNames": {"enum": words}}
    return schema


def _few_words(rewriter: Rewriter, yes: list[str], no: list[str]) -> list[str] | None:
    """The names that patterns admit, where they are few and read alike by all."""
    if not any(len(pattern) <= MAX_LISTING and not _MANY.search(_ESCAPED.sub("", pattern)) for pattern in yes):
        return None
    try:
        return rewriter.languages.words(yes, no)
    except Unreadable:
        return None


def is_listed(rewriter: Rewriter, names: dict[str, Any], where: str) -> bool:
    """Whether `propertyNames` lists the names."""
    if set(names) == {"$ref"}:
        names = rewriter.references.target(names["$ref"], names, where)
    told = set(names) - set(_SAY_NOTHING) if isinstance(names, dict) else set()
    return bool(told) and told <= {"enum", "const"}


def _conditions(rewriter: Rewriter, names: Any, here: str, depth: int) -> tuple[list[str], list[str]]:
    if names is True or not isinstance(names, dict):
        return [], []
    if depth > MAX_DEPTH:
        raise Unwritable("propertyNames", here, "is nested too deep")
    names = plain(names, rewriter.invalid)
    yes: list[str] = []
    no: list[str] = []
    for key, value in names.items():
        match key:
            case "pattern":
                yes += readable_patterns(rewriter, value, here, "propertyNames")
            case "minLength" | "maxLength":
                bounds = (value, "") if key == "minLength" else (0, value)
                yes.append(f"^[\\s\\S]{{{bounds[0]},{bounds[1]}}}$")
            case "enum" | "const":
                listed = names_of([value] if key == "const" else value)
                yes.append(f"^(?:{'|'.join(map(re.escape, listed))})$" if listed else "^[^\\s\\S]$")
            case "$ref":
                more = _conditions(rewriter, rewriter.references.target(value, names, here), here, depth + 1)
                yes, no = yes + more[0], no + more[1]
            case "allOf":
                for part in value:
                    more = _conditions(rewriter, part, here, depth + 1)
                    yes, no = yes + more[0], no + more[1]
            case "anyOf":
                branches = [_conditions(rewriter, part, here, depth + 1) for part in value]
                if any(len(one[0]) != 1 or one[1] for one in branches):
                    raise Unwritable("propertyNames", here, "has an `anyOf` of more than patterns")
                yes.append("|".join(f"(?:{one[0][0]})" for one in branches))
            case "not":
                inner = _conditions(rewriter, value, here, depth + 1)
                if len(inner[0]) == 1 and not inner[1]:
                    no += inner[0]
                elif len(inner[1]) == 1 and not inner[0]:
                    yes += inner[1]
                else:
                    raise Unwritable("propertyNames", here, "has a `not` of more than one pattern")
            case "format" if value in FORMATS:
                raise Unwritable("propertyNames", here, "has a `format`, which no name can be held to")
            case _ if key not in (*_SAY_NOTHING, "format"):
                raise Unwritable("propertyNames", here, f"has `{key}`, which no name can be held to")
    return yes, no


def _is_length(pattern: str) -> bool:
    return pattern.startswith("^[\\s\\S]{")


def _is_within(rewriter: Rewriter, name: str, limits: tuple[list[str], list[str]], here: str) -> bool:
    try:
        return rewriter.languages.has(name, *limits, widely=False)
    except Unreadable as error:
        why = f"cannot be compared with the names of `properties`: a pattern {error}"
        raise Unwritable("propertyNames", here, why) from None
