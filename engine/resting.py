"""Resting: how the engine stands still on purpose: paused, asleep, or while weights are exchanged.

The Engine is one. All of it runs on the loop thread; one such operation goes on at a time, and each ends even where
its caller does not wait for it.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Collection, Coroutine
from pathlib import Path
from typing import Any

from engine.carriers import Carrying
from engine.clock import Clock
from engine.executor.base import Executor
from engine.forward import PARTS
from engine.lending import Lending
from engine.lora.store import AdapterStore
from engine.publisher import Publisher
from engine.request import RequestError, UnavailableError
from engine.scheduling.scheduler import Scheduler

# What becomes of the requests that are there when the engine comes to rest.
PAUSE_MODES = ("abort", "wait", "keep")


class Resting(Carrying):
    """The loop looks at `_stopped` before it schedules, and sets `_at_rest` when nothing is in flight any more."""

    def __init__(self, scheduler: Scheduler, executor: Executor, publisher: Publisher, clock: Clock) -> None:
        self.scheduler = scheduler
        self.lending = Lending(scheduler)
        self.executor = executor
        self.publisher = publisher
        self.clock = clock
        self.draining = False
        self.failed = False
        self.is_paused = False
        # Above 0 while any part sleeps (executor.base.PARTS).
        self.sleep_level = 0
        self._asleep: set[str] = set()
        self.adapters: AdapterStore | None = None
        self._loading = False
        self._weights_directory: Path | None = None  # where others than the first came from
        self.num_weight_updates = 0
        # The first ones' checkpoint; None: they come from none.
        self.model_directory: Path | None = None
        # Whether nothing is scheduled, and whether the loop has come to rest over it.
        self._stopped = False
        self._at_rest: asyncio.Event = asyncio.Event()
        self._wake: asyncio.Event = asyncio.Event()
        self._progress_at = clock.now()
        self._maintenance = asyncio.Lock()

    @property
    def weight_version(self) -> str:
        """What the weights that serve are called."""
        return self.publisher.weight_version

    @property
    def weights_directory(self) -> Path | None:
        """The checkpoint that the weights that serve were read from."""
        return self._weights_directory or self.model_directory

    def name_weights(self, version: str) -> None:
        """Call the weights that serve by another name from the next token on."""
        self.publisher.name_weights(version)

    @abstractmethod
    def abort_all(self) -> None:
        """End every request now: what comes to rest by aborting does."""

    async def pause(self, mode: str = "abort") -> None:
        """Come to rest; new requests queue up until `resume`. Returns when nothing is in flight.

        mode: what becomes of those that are there: "abort" ends them, "wait" lets them finish first, "keep" holds
        them in their places.
        """
        async with self._maintenance:
            await self._clear(mode)
            await self._rest()
            self.is_paused = True

    async def resume(self) -> None:
        """Go on after `pause`."""
        async with self._maintenance:
            self.is_paused = False
            self._settle()

    def forget_held(self) -> bool:
        """Empty the cache while paused: who is held is computed again. False, and nothing done, where nobody rests."""
        if not (self.is_paused and self._at_rest.is_set()) or self.sleep_level or self._loading or self.lending.lent:
            return False
        self._forget()
        return True

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Rest, and give the device's memory back (see Executor.sleep). New requests are refused. mode: as in pause;
        what is kept is computed again after `wake_up`. Raises RequestError while it sleeps at another level.
        """
        await self._undisturbed(self._sleep(level, mode, PARTS))

    async def release(self, parts: Collection[str] = PARTS) -> None:
        """Let parts of the memory go, at the level of those that have gone, else 1. Raises RequestError where there are
        requests, unless the engine is paused: then they are held, and computed again."""
        await self._undisturbed(self._release(parts))

    async def wake_up(self, parts: Collection[str] = PARTS) -> None:
        """End of a sleep, of its last part; nothing happens to what does not sleep. The weights by themselves can be
        exchanged then. Raises StartupError where memory or weights are lost."""
        await self._undisturbed(self._wake_up(parts))

    async def load_weights(
        self, directory: Path, *, abort: bool = False, mode: str | None = None, version: str | None = None
    ) -> None:
        """Serve with other weights of the same model, after those who are here have finished (abort: were ended).
        version: what to call them from then on. mode: see `pause`; "keep" computes what is there again with the new
        weights, and it goes on in its place.

        Forgets the prefix cache. Raises StartupError where the weights cannot be used, and RequestError where nobody
        could finish; then the old ones serve on.
        """
        await self._undisturbed(self._load_weights(directory, mode or ("abort" if abort else "wait"), version))

    async def _sleep(self, level: int, mode: str, parts: Collection[str]) -> None:
        if self.sleep_level not in (0, level):
            raise RequestError(f"The model sleeps at level {self.sleep_level}; wake it up first.", param="level")
        before, goes = self.sleep_level, [part for part in parts if part not in self._asleep]
        if not goes:
            return
        if not self.is_paused or mode == "abort":
            await self._clear(mode)
        self.sleep_level = level
        try:
            await self._rest()
            await self._halt_pages()
            self._forget()
            await asyncio.to_thread(self.executor.sleep, level, goes)
            self._asleep.update(goes)
        except BaseException:
            self.sleep_level = before
            self._settle()
            raise

    async def _release(self, parts: Collection[str]) -> None:
        if self.publisher.listeners and not (self.is_paused or self.sleep_level):
            raise RequestError("There are requests; pause the engine, or abort them first.")
        await self._sleep(self.sleep_level or 1, "keep", parts)

    async def _wake_up(self, parts: Collection[str]) -> None:
        comes = [part for part in parts if part in self._asleep]
        if not comes:
            return
        await asyncio.to_thread(self.executor.wake_up, self._weights_directory, comes)
        self._asleep.difference_update(comes)
        if not self._asleep:
            try:
                await self._let_pages_go(self._weights_directory)
            finally:
                self.sleep_level = 0
                self._settle()

    async def _load_weights(self, directory: Path, mode: str, version: str | None) -> None:
        if "weights" in self._asleep:
            raise RequestError("The model is asleep; POST /wake_up first.")
        await self._clear(mode)
        self._loading = True
        try:
            await self._rest()
            await self._halt_pages()
            self._forget()
            await asyncio.to_thread(self.executor.load_weights, directory)
            self._weights_directory = directory
            self.num_weight_updates += 1
            self.name_weights(version or f"update-{self.num_weight_updates}")
            if self.adapters is not None:
                self.adapters.base_changed()
        finally:
            self._loading = False
            try:
                if not self._asleep:
                    await self._let_pages_go(self._weights_directory)
            finally:
                self._settle()

    async def _undisturbed(self, work: Coroutine[Any, Any, None]) -> None:
        """Let `work` end even where its caller does not wait for it: half asleep is no state to be in."""

        async def run() -> None:
            async with self._maintenance:
                await work

        task = asyncio.ensure_future(run())
        # Somebody must have looked at it, also when the caller has gone.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(task)

    async def _clear(self, mode: str) -> None:
        """What happens to those who are here, before a rest."""
        assert mode in PAUSE_MODES
        if mode == "abort":
            self.abort_all()
        elif mode == "wait" and self.publisher.listeners:
            if self._stopped:
                raise RequestError("The engine is paused amid its requests; resume it, or abort them.")
            self.scheduler.hold()
            try:
                await self.publisher.all_ended()
            except asyncio.CancelledError:
                self.scheduler.let_go()
                self._wake.set()
                raise

    async def _rest(self) -> None:
        """Stop scheduling, and wait until nothing is in flight. A drain does not wait for it, and ends it."""
        if not (self.draining or self.failed):
            # From here on what is in flight must come to an end, or it is a stall.
            self._progress_at = self.clock.now()
            self._stopped = True
            self._at_rest.clear()
            self._wake.set()
            try:
                await self._at_rest.wait()
            except asyncio.CancelledError:
                self._settle()
                raise
        if self.failed:
            raise UnavailableError("The engine has failed and is shutting down.")
        if self.draining:
            self._settle()
            raise UnavailableError("The server is shutting down.")

    def _settle(self) -> None:
        """Go on scheduling, unless there is still a reason not to."""
        # First of all: the watchdog's thread may look in between.
        self._progress_at = self.clock.now()
        self._stopped = self.is_paused or self._loading or self.sleep_level > 0
        if not self._stopped:
            self.scheduler.let_go()
        self._wake.set()

    def _forget(self) -> None:
        """Take every page back; at rest only. Who runs will be computed again."""
        self.scheduler.retract_all()
        self.scheduler.adapters.forget()
        self.scheduler.kv_cache.flush()
