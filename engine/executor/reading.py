"""Adapters where several ranks compute one model: all read the same files at once, each its part of what is in them.

On the threads that read adapters, beside the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from engine.config import StartupError
from engine.lora.words import AdapterError, AdapterWeights

T = TypeVar("T")
Adapter = AdapterWeights

# Characters of what a rank says of an adapter that it cannot use.
MAX_LINE = 1000


def read_part(path: Path, layers: Any, max_rank: int, reading: Reading) -> Any:
    """A rank's LoadedWeights of an adapter. layers: the model's AdaptedLayers, None while it sleeps. Raises
    AdapterError."""
    from engine.lora.reader import read_adapter

    if layers is None:
        raise AdapterError(f"adapter {path.name!r}: the model sleeps")
    return read_adapter(path, layers.whole, max_rank, reading.add_up)


def digest_of(weights: AdapterWeights) -> str:
    """Of the files that it was read from."""
    return weights.digest


class Reading:
    """One adapter, read by all ranks at once: all have it in the end, or none has. say: what every rank says, by rank,
    as JSON has it; raises StartupError where the group is over."""

    def __init__(self, say: Callable[[Any], list[Any]], path: Path) -> None:
        self._say_all, self._adapter = say, path.name.encode("unicode_escape").decode()[:100]
        self._over = False

    def run(self, read: Callable[[], T], digest_of: Callable[[T], str]) -> T:
        """read: this rank's part. digest_of: of the files that it was read from. Raises AdapterError in all ranks."""
        try:
            found = read()
            self._say(f"read {digest_of(found)}", None)
            return found
        except AdapterError as error:
            self._fail(str(error))
            raise
        except BaseException as error:
            self._fail(f"adapter {self._adapter}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            raise

    def follow(self, read: Callable[[], T], digest_of: Callable[[T], str]) -> T | None:
        """The same in the other ranks; None where some rank cannot use it, which the first one says."""
        try:
            return self.run(read, digest_of)
        except AdapterError:
            return None

    def add_up(self, vector: Any) -> Any:
        """A float32 tensor [n] of all ranks, in their order. Raises AdapterError."""
        said = self._say(f"{len(vector)} numbers", vector.tolist())
        return vector.new_tensor(np.array(said, np.float32).sum(0))

    def _say(self, what: str, value: Any) -> list[Any]:
        said = self._ask(what, value, None)
        if any(each[0] != what for each in said):
            self._over = True
            raise AdapterError(
                f"adapter {self._adapter}: its files were changed while the ranks read them; load it again"
            )
        return [each[1] for each in said]

    def _fail(self, line: str) -> None:
        """line: also of what a file holds, so of any length, and not all of it can be said."""
        if not self._over:
            self._ask("", None, line.encode(errors="backslashreplace").decode()[:MAX_LINE])

    def _ask(self, *words: Any) -> list[Any]:
        try:
            said = self._say_all(words)
        except StartupError as error:
            self._over = True
            raise AdapterError(f"adapter {self._adapter}: {error}") from None
        failures = [each[2] for each in said if each[2] is not None]
        if failures:
            self._over = True
            raise AdapterError(failures[0])
        return said
