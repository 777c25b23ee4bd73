"""The group of ranks on GPUs as one of them has it: layers whose parts meet on the devices, and words on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.config import StartupError
from engine.distributed.ring import ADAPTERS, Ring
from engine.ops.device_parallel import Collectives, DeviceGroup
from engine.ops.ranks import RanksEndedError


class RankedGroup(DeviceGroup):
    """A RankGroup (executor/cuda_group.py). gone: which rank has ended unasked, where one has."""

    def __init__(
        self,
        ring: Ring,
        collectives: Collectives,
        gone: Callable[[], str | None] = lambda: None,
        *,
        expert_parallel: bool = False,
    ) -> None:
        super().__init__(collectives, expert_parallel=expert_parallel)
        self.ring = ring
        self._gone = gone

    def why(self) -> str:
        """What became of the group."""
        return self.ring.last_word() or self._gone() or "the ranks have ended"

    def exchange(self, value: Any) -> list[Any]:
        """See Ring. Raises StartupError where the group is over."""
        try:
            return self.ring.exchange(value)
        except RanksEndedError:
            raise StartupError(self.why()) from None

    def beside(self, value: Any) -> list[Any]:
        """See RankGroup."""
        try:
            return self.ring.beside[ADAPTERS].exchange(value)
        except RanksEndedError:
            raise StartupError(self.why()) from None

    def least(self, value: int) -> int:
        """See RankGroup."""
        return int(min(self.exchange(value)))

    def of_first(self, value: Any) -> Any:
        """See RankGroup."""
        return self.exchange(value if self.rank == 0 else None)[0]

    def agreed(self, well: bool) -> bool:
        """See RankGroup."""
        return all(self.exchange(well))

    def together(self, failure: str | None) -> None:
        """See RankGroup."""
        failures = [each for each in self.exchange(failure) if each is not None]
        if failures:
            raise StartupError(failures[0])

    def fail(self, why: str | None = None) -> None:
        """See RankGroup. why: what the others may want to know."""
        self.ring.end(why)
