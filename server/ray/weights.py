"""Weights of a replica that starts after an update: those of its siblings, which send theirs in pieces.

What a trainer sends reaches the replicas that are there, and its directory is theirs alone. A new one asks all others
how many updates they have seen, and reads those of who has seen the most. No Ray in here.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import StartupError
from engine.engine import Engine
from engine.request import RequestError

logger = logging.getLogger("oneloop.ray")

PIECE = 16 * 1024 * 1024
# Asks all other replicas, by a method's name and its arguments. Those that fail have no answer.
Broadcast = Callable[..., Awaitable[list[Any]]]


@dataclass(frozen=True, slots=True)
class Held:
    """What a replica serves with. updates: how many it has seen. files: name and bytes of each; none before any."""

    replica: str
    updates: int
    version: str
    files: tuple[tuple[str, int], ...]


class SiblingWeights:
    """Both sides of it, for one replica. Its first weights are those that it was started with."""

    def __init__(self, engine: Engine, replica: str) -> None:
        self._engine, self._replica = engine, replica
        self._first_version = engine.weight_version
        self._fetched: list[Path] = []

    async def held(self) -> Held:
        engine = self._engine
        updates, directory = engine.num_weight_updates, engine.weights_directory
        files = await asyncio.to_thread(_files, directory) if updates and directory is not None else ()
        return Held(self._replica, updates, engine.weight_version, files)

    async def piece(self, replica: str, updates: int, name: str, offset: int) -> bytes | None:
        """Of the one replica that is meant, as long as it serves with them."""
        directory = self._engine.weights_directory
        if replica != self._replica or updates != self._engine.num_weight_updates or directory is None:
            return None
        return await asyncio.to_thread(_read, directory / Path(name).name, offset)

    async def catch_up(self, broadcast: Broadcast) -> None:
        """Serve with the newest weights that another replica has. Raises OSError where they cannot be had whole, which
        is so when who has them gets others meanwhile, and StartupError where they do not fit."""
        engine = self._engine
        others = [one for one in await broadcast("weights_held") if one.replica != self._replica]
        newest = max(others, key=lambda one: one.updates, default=None)
        if newest is None or newest.updates < engine.num_weight_updates:
            return
        if newest.updates == engine.num_weight_updates:
            named = next((one.version for one in others if one.version != self._first_version), None)
            if named is not None and engine.weight_version == self._first_version:
                engine.name_weights(named)
            return
        directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="oneloop-weights-"))
        try:
            for name, size in newest.files:
                await self._fetch(newest, directory / Path(name).name, size, broadcast)
            await engine.load_weights(directory, mode="keep", version=newest.version)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            raise
        self.close()
        self._fetched = [directory]
        engine.num_weight_updates = newest.updates
        logger.info("this replica has the weights of %d updates from %s", newest.updates, newest.replica)

    async def look_again(self, broadcast: Broadcast, every_s: float, times: int) -> None:
        """For what was updated while this replica started, and was not among those that were asked to."""
        for _ in range(times):
            await asyncio.sleep(every_s)
            try:
                await self.catch_up(broadcast)
            except (OSError, RequestError, StartupError) as error:
                logger.warning("the newest weights were not had from another replica: %s", error)

    def close(self) -> None:
        """What was fetched is read from no more."""
        for directory in self._fetched:
            shutil.rmtree(directory, ignore_errors=True)

    async def _fetch(self, held: Held, path: Path, size: int, broadcast: Broadcast) -> None:
        with path.open("wb") as file:
            while file.tell() < size:
                answers = await broadcast("weights_piece", held.replica, held.updates, path.name, file.tell())
                data = next((answer for answer in answers if answer), None)
                if data is None:
                    raise OSError(f"{held.replica} has other weights by now, or has ended")
                await asyncio.to_thread(file.write, data)


def _files(directory: Path) -> tuple[tuple[str, int], ...]:
    return tuple((path.name, path.stat().st_size) for path in sorted(directory.iterdir()) if path.is_file())


def _read(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(PIECE)
