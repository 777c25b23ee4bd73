"""What a CUDA executor knows of the ranks beside it, where several compute one model, each on a GPU of its own.

Every rank runs the same executor over the same steps, and what it launches holds sums in which all meet: whatever one
decides by its clock, its memory or a failure, and that changes what is launched, they decide together by these calls.
They block, on the thread that launches, and every rank makes them in the same order. engine/distributed has the group.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from engine.models.loading.slices import Group


class RankGroup(Group, Protocol):
    """A slices.Group, too."""

    def least(self, value: int) -> int:
        """The smallest of what the ranks have."""
        ...

    def of_first(self, value: Any) -> Any:
        """Rank 0's: something that JSON can say, lists for tuples."""
        ...

    def taken_of_first(self, x: Tensor) -> Tensor:
        """Rank 0's x, on the device, of one shape in all: a new tensor; on the stream that is current."""
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
