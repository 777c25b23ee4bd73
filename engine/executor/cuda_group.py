"""What a CUDA executor knows of the ranks beside it, where several compute one model, each on a GPU of its own.

Every rank runs the same executor over the same steps, and what it launches holds sums in which all meet: whatever one
decides by its clock, its memory or a failure, and that changes what is launched, they decide together by these calls.
They block, on the thread that launches, and every rank makes them in the same order. engine/distributed has the group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from engine.config import StartupError
from engine.lora.words import AdapterError
from engine.models.loading.slices import Group

T = TypeVar("T")


class RankGroup(Group, Protocol):
    """A slices.Group, too."""

    def least(self, value: int) -> int:
        """The smallest of what the ranks have."""
        ...

    def of_first(self, value: Any) -> Any:
        """Rank 0's: something that JSON can say, lists for tuples."""
        ...

    def agreed(self, well: bool) -> bool:
        """Whether it is well with all."""
        ...

    def together(self, failure: str | None) -> None:
        """Raises StartupError in all ranks where one has failed, with that one's line."""
        ...

    def fail(self) -> None:
        """This rank cannot go on, so none can: nobody waits for it any more."""
        ...

    def beside(self, value: Any) -> list[Any]:
        """What every rank says on the thread on which it reads adapters, while steps go on: by rank, as JSON has it.
        Raises StartupError where the group is over."""
        ...


class Reading:
    """One adapter, read by all ranks at once, each its part: all have it in the end, or none. adapter: its name."""

    def __init__(self, group: RankGroup, adapter: str) -> None:
        self._group, self._adapter = group, adapter
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

    def add_up(self, vector: Tensor) -> Tensor:
        """float32 [n] of all ranks, in their order. Raises AdapterError."""
        said = self._say(f"{len(vector)} numbers", vector.tolist())
        return torch.tensor(said, dtype=torch.float32).sum(0)

    def _say(self, what: str, value: Any) -> list[Any]:
        said = self._ask(what, value, None)
        if any(each[0] != what for each in said):
            self._over = True
            raise AdapterError(
                f"adapter {self._adapter}: its files were changed while the ranks read them; load it again"
            )
        return [each[1] for each in said]

    def _fail(self, line: str) -> None:
        if not self._over:
            self._ask("", None, line)

    def _ask(self, *words: Any) -> list[Any]:
        try:
            said = self._group.beside(words)
        except StartupError as error:
            self._over = True
            raise AdapterError(f"adapter {self._adapter}: {error}") from None
        failures = [each[2] for each in said if each[2] is not None]
        if failures:
            self._over = True
            raise AdapterError(failures[0])
        return said
