"""Regular expressions, choices and grammars of the client as Lark, the grammar library's own form."""

from __future__ import annotations

import json

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from engine.text.grammar.spec import MAX_GRAMMAR_CHARACTERS, GrammarSpec, load, sentence, spec_error

MAX_CHOICES = 8192
# The translation of EBNF is Python, quadratic in the rules.
MAX_EBNF_RULES = 512


def choice(spec: GrammarSpec) -> str:
    """One terminal of all texts that a spec lists."""
    choices = load(spec)
    if not isinstance(choices, list) or not choices or len(choices) > MAX_CHOICES:
        raise spec_error(spec, f"must be a list of 1 to {MAX_CHOICES} strings")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise spec_error(spec, "must hold non-empty strings only")
    # A terminal and no rule: the lexer then sees all choices at once, whatever they share.
    quoted = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(choices))
    return f"start: CHOICE\nCHOICE: {quoted}"


def regex(spec: GrammarSpec, pattern: str) -> str:
    """A pattern as a Lark terminal. \\d and \\w are ASCII, as in JSON Schema: nobody means Arabic digits."""
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        # The library would drop it without a word.
        raise spec_error(spec, "ends with a backslash that escapes nothing")
    return f"/{regex_to_lark(_without_anchors(pattern), 'dw')}/"


def _without_anchors(pattern: str) -> str:
    """A pattern always describes the whole text, so anchors at its ends say nothing; inside it they are errors."""
    pattern = pattern.removeprefix("^")
    escapes = len(pattern) - 1 - len(pattern[:-1].rstrip("\\"))
    if pattern.endswith("$") and escapes % 2 == 0:
        pattern = pattern[:-1]
    return pattern


def as_lark(spec: GrammarSpec, text: str) -> str:
    """Lark as it is; GBNF and EBNF (`root ::= ...`) translated."""
    if not text.strip():
        raise spec_error(spec, "is empty")
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise spec_error(spec, f"is longer than {MAX_GRAMMAR_CHARACTERS} characters")
    if text.count("::=") > MAX_EBNF_RULES:
        raise spec_error(spec, f"has more than {MAX_EBNF_RULES} rules")
    try:
        return any_to_lark(text)
    except RecursionError:
        raise spec_error(spec, "is nested too deep") from None
    except Exception as error:  # the translator raises bare Exception and IndexError
        raise spec_error(spec, f"cannot be read: {sentence(str(error))}") from None
