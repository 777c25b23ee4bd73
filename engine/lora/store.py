"""AdapterStore: the LoRA adapters that have a name here: loaded, replaced in place, unloaded, found under --lora-root.

Weights are read by a thread, never on the loop, and kept in host memory for those that were asked for last; of the
others the name stays, and they are read again when somebody asks. Owned by the Engine; loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

from engine.config import LoraOptions, StartupError
from engine.lora.words import AdapterError, AdapterWeights
from engine.request import Adapter, RequestError

NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
# What an explicit load may call its adapter: ids of hubs have slashes.
GIVEN_NAME = re.compile(r"[A-Za-z0-9._@/-]{1,128}")
MAX_PATH = 4096
# Adapters that are read at once.
MAX_READERS = 2
_FILES = ("adapter_config.json", "adapter_model.*")

Signature = tuple[tuple[str, int, int], ...]


class AdapterNotFoundError(RequestError):
    """There is no adapter of that name."""

    status = 404
    code = "model_not_found"


class AlreadyLoadedError(RequestError):
    """The name is taken."""


class AdapterInUseError(RequestError):
    """Requests use it, and the server was told not to wait."""

    status = 409
    code = "adapter_in_use"


class ForbiddenPathError(RequestError):
    """Outside of --lora-root."""

    status = 403
    code = "forbidden"


class Places(Protocol):
    """What the scheduler wants to know; see AdapterPlaces."""

    def keep(self, version: int) -> None: ...

    def unload(self, version: int) -> None: ...


@dataclass(slots=True, eq=False)
class Entry:
    """An adapter that has a name. adapter: None while its weights are not in host memory. listed: it was loaded by its
    name, and not just found under the root. loaded_at: Unix seconds. used_at: in the order of use."""

    name: str
    path: Path
    version: int
    rank: int
    num_bytes: int
    base: str
    signature: Signature
    adapter: Adapter | None
    pinned: bool
    listed: bool
    loaded_at: int


class AdapterStore:
    """read: see Executor.read_adapter. unused: waits until no request has an adapter of that version any more.

    in_use: whether one has.
    """

    def __init__(
        self,
        options: LoraOptions,
        read: Callable[[Path], AdapterWeights],
        places: Places,
        *,
        in_use: Callable[[int], bool],
        unused: Callable[[int], Awaitable[None]],
    ) -> None:
        self.options = options
        self.max_resident = options.max_cpu_loras or max(options.max_loras, 32)
        self.num_reads = 0
        self._read = read
        self._places = places
        self._in_use = in_use
        self._unused = unused
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # oldest first
        self._resident: OrderedDict[str, Entry] = OrderedDict()  # least recently used first
        self._versions = itertools.count(1)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._readers = asyncio.Semaphore(MAX_READERS)
        # How often the base has got other weights.
        self._num_bases = 0

    # ---- what is there

    @property
    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    def find(self, name: str) -> Entry | None:
        return self._entries.get(name)

    def knows(self, name: str) -> bool:
        """It is loaded, or there is a directory of that name under the root."""
        return name in self._entries or self._under_root(name) is not None

    def names(self, most: int) -> str:
        """For a sentence: the newest ones first, and how many more there are."""
        names = list(reversed(self._entries))
        shown = ", ".join(f"`{name}`" for name in names[:most])
        return f"{shown} and {len(names) - most} more" if len(names) > most else shown

    # ---- what requests ask for

    async def get(self, name: str) -> Adapter:
        """An adapter with its weights, which may have to be read. Raises RequestError."""
        entry = self._entries.get(name)
        if entry is not None and entry.adapter is not None:
            self._resident.move_to_end(name)
            return entry.adapter
        async with self._lock(name):
            entry = self._entries.get(name)
            if entry is not None and entry.adapter is not None:
                return entry.adapter
            path = entry.path if entry is not None else self._under_root(name)
            if path is None:
                raise AdapterNotFoundError(f"There is no LoRA adapter `{name[:128]}`.", param="model")
            try:
                found = await self._load(name, path, pinned=False, listed=False)
            except AdapterError as error:
                raise RequestError(f"The LoRA adapter `{name}` cannot be used: {without(path, error)}") from None
            if self._entries.get(name) is not entry:
                raise AdapterNotFoundError(f"The LoRA adapter `{name}` was unloaded.", param="model")
            if entry is None:
                self._make_room_for_name()
            elif found.signature != entry.signature:
                # Its files have changed: what the cache holds of it is another adapter's.
                self._places.unload(entry.version)
            else:
                found.version = entry.version
            if entry is not None:
                found.pinned, found.listed = entry.pinned, entry.listed
            return self._take(found)

    # ---- what administrators ask for

    async def load(self, name: str, path: str, *, in_place: bool = False, pinned: bool = False) -> Entry:
        """Give an adapter under the root a name. in_place: another one's, which requests that are here go on with.

        Raises RequestError, and AdapterError for one that cannot be used; then nothing has changed.
        """
        self._check_name(name)
        return await self._put(name, self._within_root(path), in_place, pinned)

    async def add(self, name: str, path: str) -> None:
        """What a script on this machine names, from anywhere; loaded unless it is there. Raises as `load`."""
        self._check_name(name)
        directory = _absolute(Path(path))
        entry = self._entries.get(name)
        if entry is None:
            # Another call may have been quicker.
            with contextlib.suppress(AlreadyLoadedError):
                await self._put(name, directory, False, False)
            entry = self._entries.get(name)
        if entry is not None and _absolute(entry.path) != directory:
            raise RequestError(f"The LoRA adapter `{name}` has been loaded from another path.", param="lora_path")

    async def _put(self, name: str, directory: Path, in_place: bool, pinned: bool) -> Entry:
        async with self._lock(name):
            if not in_place and name in self._entries and self._entries[name].listed:
                raise AlreadyLoadedError(f"The LoRA adapter `{name}` has already been loaded.", param="lora_name")
            self._check_room(name, pinned)
            entry = await self._load(name, directory, pinned=pinned, listed=True)
            self._check_room(name, pinned)
            if (before := self._entries.get(name)) is not None:
                self._places.unload(before.version)
            self._take(entry)
            return entry

    async def unload(self, name: str) -> Entry:
        """Take a name away; no new request gets it, and it returns when the last one that has it has ended."""
        async with self._lock(name):
            entry = self._entries.get(name)
            if entry is None:
                raise AdapterNotFoundError(f"There is no LoRA adapter `{name[:128]}`.", param="lora_name")
            if self.options.unload == "refuse" and self._in_use(entry.version):
                raise AdapterInUseError(f"Requests use the LoRA adapter `{name}`; try again later.", param="lora_name")
            del self._entries[name]
            self._resident.pop(name, None)
            self._places.unload(entry.version)
        await self._unused(entry.version)
        return entry

    def load_modules(self) -> None:
        """Those of the command line, before anything serves. Blocks. Raises StartupError with one line."""
        for module in self.options.modules:
            try:
                self._check_name(module.name)
                self._check_room(module.name, module.pinned)
                if module.name in self._entries:
                    raise RequestError(f"two adapters are called '{module.name}'")
                path = Path(module.path).expanduser()
                entry = self._entry(module.name, path, self._read(path), _signature(path), module.pinned, listed=True)
            except (AdapterError, RequestError) as error:
                raise StartupError(f"--lora-modules {module.name}: {error}") from None
            if module.base is not None:
                entry.base = module.base
            self._take(entry)

    def base_changed(self) -> None:
        """The model has other weights: what was computed from the old ones is read again, as another version."""
        self._num_bases += 1
        for entry in self._entries.values():
            entry.adapter, entry.signature = None, ()
        self._resident.clear()

    # ---- inside

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _load(self, name: str, path: Path, *, pinned: bool, listed: bool) -> Entry:
        async with self._readers:
            base = -1
            while base != self._num_bases:  # else some of it may have been computed from the old one's weights
                base = self._num_bases
                self.num_reads += 1
                # Before: files that change while they are read are then seen as changed.
                signature = await asyncio.to_thread(_signature, path)
                weights = await asyncio.to_thread(self._read, path)
        return self._entry(name, path, weights, signature, pinned, listed=listed)

    def _entry(
        self, name: str, path: Path, weights: AdapterWeights, signature: Signature, pinned: bool, *, listed: bool
    ) -> Entry:
        if weights.rank > self.options.max_lora_rank:
            raise AdapterError(
                f"{path}: LoRA rank {weights.rank} is greater than max_lora_rank {self.options.max_lora_rank} "
                "(--max-lora-rank)"
            )
        version, digest = next(self._versions), weights.digest
        adapter = Adapter(name, str(path), version, weights.rank, weights.num_bytes, weights, digest)
        base, now = weights.base_model_name, int(time.time())
        return Entry(
            name, path, adapter.version, weights.rank, weights.num_bytes, base, signature, adapter, pinned, listed, now
        )

    def _take(self, entry: Entry) -> Adapter:
        read = entry.adapter
        assert read is not None
        if read.version != entry.version:
            # The same files as before, so the same version as before.
            read = entry.adapter = dataclasses.replace(read, version=entry.version)
        self._entries[entry.name] = self._resident[entry.name] = entry
        self._resident.move_to_end(entry.name)
        if entry.pinned:
            self._places.keep(entry.version)
        for name in [name for name, one in self._resident.items() if not one.pinned]:
            if len(self._resident) <= self.max_resident:
                break
            self._resident.pop(name).adapter = None
        return read

    def _check_name(self, name: str) -> None:
        if not GIVEN_NAME.fullmatch(name):
            raise RequestError(
                "`lora_name` must be 1 to 128 letters, digits, dots, dashes, underscores, slashes or @.",
                param="lora_name",
            )

    def _check_room(self, name: str, pinned: bool) -> None:
        others = [entry for entry in self._entries.values() if entry.name != name]
        if pinned and sum(entry.pinned for entry in others) + 1 >= self.options.max_loras:
            raise RequestError(
                f"At most {self.options.max_loras - 1} adapters can be pinned (one less than --max-loras).",
                param="pinned",
            )
        if len([entry for entry in others if entry.listed]) >= self.options.max_loaded:
            raise RequestError(f"At most {self.options.max_loaded} adapters can be loaded.", param="lora_name")

    def _make_room_for_name(self) -> None:
        """Names that were found under the root are found again."""
        while len(self._entries) >= self.options.max_loaded:
            oldest = next((entry for entry in self._entries.values() if not entry.listed), None)
            if oldest is None:
                raise RequestError(f"At most {self.options.max_loaded} adapters can be loaded.", param="model")
            del self._entries[oldest.name]
            self._resident.pop(oldest.name, None)
            self._places.unload(oldest.version)

    def _under_root(self, name: str) -> Path | None:
        """The directory of an adapter that nobody has loaded by its name."""
        if self.options.root is None or not NAME.fullmatch(name) or name in (".", ".."):
            return None
        try:
            directory = self._within_root(name)
            return directory if (directory / "adapter_config.json").is_file() else None
        except (OSError, RequestError):
            return None

    def _within_root(self, path: str) -> Path:
        """A client's path as a directory under the root. Links do not lead out."""
        if self.options.root is None:
            raise ForbiddenPathError("This server loads no adapters for clients: it was started without --lora-root.")
        try:
            top = Path(self.options.root).expanduser().resolve(strict=True)
            directory = (top / path).resolve()
        except (OSError, RuntimeError, ValueError):  # too long, links in a circle, a zero byte
            raise RequestError("`lora_path` must be a directory under --lora-root.", param="lora_path") from None
        if not directory.is_relative_to(top):
            raise ForbiddenPathError("`lora_path` must be a directory under --lora-root.", param="lora_path")
        return directory


def without(path: Path, error: Exception) -> str:
    """An error's words without where on this machine the adapter is."""
    return str(error).replace(str(path), path.name)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


def _signature(path: Path) -> Signature:
    """Whether an adapter's files are still the same: names, bytes and times of change."""
    try:
        files = sorted(file for pattern in _FILES for file in path.glob(pattern))
        return tuple((file.name, stat.st_size, stat.st_mtime_ns) for file in files if (stat := file.stat()))
    except OSError:
        return ()
