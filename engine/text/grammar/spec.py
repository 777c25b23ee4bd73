"""GrammarSpec: what an answer must look like, as the server hands it over; its bounds, and the errors that name it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.request import RequestError

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "structural_tag"]

# Bounds of what a client may send. A schema of 256 KiB is fifty large tools; 64 is the body's own nesting limit.
MAX_SPEC_CHARACTERS = 256 * 1024
MAX_GRAMMAR_CHARACTERS = 64 * 1024
MAX_DEPTH = 64
MAX_SCHEMAS = 5_000


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What the output must look like; hashable, so equal specs are compiled once.

    text: the JSON of a schema, of a list of choices or of a structural tag's format; a regular expression; a Lark or
    GBNF/EBNF grammar. strict: a schema keyword that cannot be enforced is an error; otherwise it is left to the model.
    any_whitespace: JSON may be laid out freely. whitespace_pattern: what may stand between JSON tokens then.
    param: the request field that errors name.
    """

    kind: Kind
    text: str = ""
    strict: bool = True
    any_whitespace: bool = True
    whitespace_pattern: str | None = None
    param: str | None = field(default=None, compare=False)


def spec_error(spec: GrammarSpec, what: str) -> RequestError:
    names = {
        "json_object": "The JSON object format", "json_schema": "The JSON schema", "regex": "The regular expression",
        "choice": "The list of choices", "grammar": "The grammar", "structural_tag": "The structural tag",
    }  # fmt: skip
    return RequestError(f"{names[spec.kind]} {what}.", param=spec.param)


def load(spec: GrammarSpec) -> Any:
    try:
        value = json.loads(spec.text)
    except ValueError as error:
        raise spec_error(spec, f"is not valid JSON: {error}") from None
    except RecursionError:
        raise spec_error(spec, "is nested too deep") from None
    level = [value]
    for _ in range(4 * MAX_DEPTH):
        # Schemas alternate with the maps that hold them, and data (enum, const) may nest too.
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return value
    raise spec_error(spec, "is nested too deep")


def sentence(text: str) -> str:
    """What the library says, on one short line without its trailing stop."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("at ", "stack backtrace")))[:300].rstrip(
        " ."
    )
