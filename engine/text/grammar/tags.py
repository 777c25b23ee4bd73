"""Structural tags: texts and schemas that follow each other, as one Lark grammar with side grammars."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from engine.request import RequestError
from engine.text.grammar.lark import as_lark, regex
from engine.text.grammar.spec import MAX_DEPTH, MAX_GRAMMAR_CHARACTERS, MAX_SCHEMAS, GrammarSpec, spec_error

# Free text, for what stands around tags. Control characters too: it is the model's own text.
_ANY_TEXT = "/(.|\\n)*/"


class TagWriter:
    """Turns the format of a structural tag into one Lark grammar (with side grammars where a tag holds one).

    literal: a fixed text as parts of a rule. schema: what a node of kind `json_schema` is inside of a rule.
    """

    def __init__(
        self, spec: GrammarSpec, literal: Callable[[str], list[str]], schema: Callable[[dict[str, Any]], str]
    ) -> None:
        self._spec = spec
        self._literal = literal
        self._schema = schema
        self._rules: list[str] = []
        self._grammars: list[dict[str, str]] = []

    def write(self, tree: Any) -> str:
        start = self._element(tree, "format", 0)
        lark = "\n".join([f"start: {start}", f"TEXT: {_ANY_TEXT}", *self._rules])
        return json.dumps({"grammars": [{"name": "main", "lark_grammar": lark}, *self._grammars]})

    def _rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def _bad(self, where: str, what: str) -> RequestError:
        return spec_error(self._spec, f"is not valid: `{where}` {what}")

    def _string(self, node: dict[str, Any], name: str, where: str, *, empty: bool = True) -> str:
        value = node.get(name)
        if not isinstance(value, str) or not (empty or value):
            raise self._bad(f"{where}.{name}", "must be a string" if empty else "must be a non-empty string")
        return value

    def _list(self, node: dict[str, Any], name: str, where: str) -> list[Any]:
        value = node.get(name)
        if not isinstance(value, list) or not value:
            raise self._bad(f"{where}.{name}", "must be a list that is not empty")
        return value

    def _element(self, node: Any, where: str, depth: int) -> str:
        """An expression for a node, usable inside a sequence."""
        if not isinstance(node, dict):
            raise self._bad(where, "must be an object with a `type`")
        if depth > MAX_DEPTH or len(self._rules) > MAX_SCHEMAS:
            raise self._bad(where, "is too large or too deep")
        kind = node.get("type")
        if kind == "sequence":
            return self._sequence(self._list(node, "elements", where), where, depth)
        if kind == "or":
            options = self._list(node, "elements", where)
            return "(" + " | ".join(
                self._element(inner, f"{where}.elements[{index}]", depth + 1) for index, inner in enumerate(options)
            ) + ")"  # fmt: skip
        if kind == "tag":
            return self._sequence(self._tag_parts(node, where), where, depth)
        if kind == "triggered_tags":
            return self._triggered(node, where, depth)
        if kind == "tags_with_separator":
            return self._separated(node, where, depth)
        return self._leaf(node, kind, where)

    def _leaf(self, node: dict[str, Any], kind: Any, where: str) -> str:
        if kind == "const_string":
            return " ".join(self._literal(self._string(node, "value", where))) or '""'
        if kind == "any_text":
            return "TEXT"
        if kind == "json_schema":
            return self._rule(self._schema(node))
        if kind == "regex":
            pattern = self._string(node, "pattern", where, empty=False)
            if len(pattern) > MAX_GRAMMAR_CHARACTERS:
                raise self._bad(f"{where}.pattern", "is too long")
            return self._rule(regex(self._spec, pattern))
        if kind == "grammar":
            name = f"g{len(self._grammars)}"
            lark = as_lark(self._spec, self._string(node, "grammar", where, empty=False))
            self._grammars.append({"name": name, "lark_grammar": lark})
            return f"@{name}"
        raise self._bad(f"{where}.type", f"is {json.dumps(kind)[:40]}, which is not supported")

    def _tag_parts(self, node: Any, where: str) -> list[Any]:
        if not isinstance(node, dict):
            raise self._bad(where, "must be a tag: an object with `begin`, `content` and `end`")
        begin = {"type": "const_string", "value": self._string(node, "begin", where)}
        end = node.get("end", "")
        ends = end if isinstance(end, list) and end else [end]
        if not all(isinstance(text, str) for text in ends):
            raise self._bad(f"{where}.end", "must be a string")
        closing: Any = [{"type": "const_string", "value": text} for text in ends]
        return [begin, node.get("content"), closing[0] if len(closing) == 1 else {"type": "or", "elements": closing}]

    def _sequence(self, nodes: list[Any], where: str, depth: int) -> str:
        parts: list[str] = []
        index = 0
        while index < len(nodes):
            node = nodes[index]
            following = nodes[index + 1] if index + 1 < len(nodes) else None
            if isinstance(node, dict) and node.get("type") == "any_text" and isinstance(following, dict):
                pieces = self._literal(following["value"]) if following.get("type") == "const_string" else []
                if pieces and not pieces[0].startswith("<["):
                    # Lazy, or the free text would swallow what ends it.
                    parts += [self._rule(f"TEXT {pieces[0]}", "[lazy]"), *pieces[1:]]
                    index += 2
                    continue
            parts.append(self._element(node, f"{where}.elements[{index}]", depth + 1))
            index += 1
        return self._rule(" ".join(parts))

    def _triggered(self, node: dict[str, Any], where: str, depth: int) -> str:
        """Free text in which a trigger begins one of the tags that start with it."""
        triggers = self._list(node, "triggers", where)
        tags = self._list(node, "tags", where)
        if not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise self._bad(f"{where}.triggers", "must hold non-empty strings")
        options: list[str] = []
        for index, tag in enumerate(tags):
            here = f"{where}.tags[{index}]"
            begin, content, end = self._tag_parts(tag, here)
            trigger = next((text for text in triggers if begin["value"].startswith(text)), None)
            if trigger is None:
                raise self._bad(f"{here}.begin", "starts with none of the triggers")
            pieces = self._literal(trigger)
            if pieces[0].startswith("<["):
                head = " ".join(["TEXT", *pieces])
            elif len(pieces) == 1:
                head = self._rule(f"TEXT {pieces[0]}", "[lazy]")
            else:
                raise self._bad(f"{where}.triggers", "must not mix text with a special token that follows it")
            rest = {"type": "const_string", "value": begin["value"][len(trigger) :]}
            options.append(self._rule(f"{head} {self._sequence([rest, content, end], here, depth + 1)}"))
        choice = self._rule(" | ".join(options))
        least = "+" if node.get("at_least_one") is True else "*"
        if node.get("stop_after_first") is True:
            return choice if least == "+" else f"({choice} | TEXT)"
        return f"{choice}{least} TEXT"

    def _separated(self, node: dict[str, Any], where: str, depth: int) -> str:
        """Tags and nothing else, with a separator between them."""
        tags = self._list(node, "tags", where)
        separator = " ".join(self._literal(self._string(node, "separator", where)))
        choice = self._rule(
            " | ".join(
                self._sequence(self._tag_parts(tag, f"{where}.tags[{index}]"), f"{where}.tags[{index}]", depth + 1)
                for index, tag in enumerate(tags)
            )
        )
        repeated = choice if node.get("stop_after_first") is True else f"{choice} ({separator} {choice})*"
        return f"({repeated})" if node.get("at_least_one") is True else f"({repeated})?"
