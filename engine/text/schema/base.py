"""What every keyword's writer shares: the bounds, the error for what cannot be written, and `Rewriter`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from engine.text.schema.errors import Unwritable
from engine.text.schema.references import References
from engine.text.schema.regular import Languages
from engine.text.schema_types import SchemaTypes

MAX_WRITTEN = 6_000  # schemas that one schema may grow to
MAX_CASES = 200  # branches of one union that a rewriting makes
MAX_NEGATED_DEPTH = 24
MAX_POSITION = 6  # how far into an array a `contains` may come to be fulfilled
FORMATS = frozenset(
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"]
)


class Rewriter(ABC):
    """What the keywords' own modules see of a rewriting.

    invalid: makes the error for what is no schema at all, from a sentence's end. written: schemas written so far.
    negated: how many negations deep. dropped: why a branch of a union was left out, the last time.
    """

    def __init__(self, root: Any, strict: bool, expand: bool, invalid: Callable[[str], Exception]) -> None:
        self.strict = strict
        self.expand = expand
        self.invalid = invalid
        self.written = 0
        self.negated = 0
        self.dropped: Unwritable | None = None
        self.types = SchemaTypes(root)
        self.references = References(root, invalid)
        self.languages = Languages()

    @abstractmethod
    def yes(self, schema: Any, where: str) -> Any:
        """A schema in the library's keywords that admits what this one admits, or some of it."""

    @abstractmethod
    def no(self, schema: Any, where: str) -> Any:
        """Values that a schema does not admit; perhaps not all of them. Raises Unwritable where none can be told."""

    @abstractmethod
    def warn(self, error: Unwritable) -> None:
        """Say what is left to the model, for a client who does not insist."""

    def may_be(self, schema: Any, kind: str) -> bool:
        return kind in self.types.types(schema)
