"""PageStore: pages as files in a directory, by name; bounded in bytes, the longest unused go first.

Used by the disk tier's one thread, but for `__contains__`, which any thread may ask. Nothing is synced: a file that a
crash has cut short, or that is another's, fails its check and is removed. Several servers may share a directory: each
file is written whole under another name and then renamed, and one that has gone meanwhile is a miss.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.config import StartupError

logger = logging.getLogger("oneloop.tiers")

FLAG = "--kv-disk"
_MAGIC = b"oneloop kv page\0"
# magic, the page's name, its bytes, their CRC-32
_HEADER = struct.Struct("<16s32sQI4x")
_SUFFIX = ".page"
# What else is in the directory is somebody's.
_OURS = re.compile(rf"[0-9a-f]{{2}}/[0-9a-f]{{62}}{re.escape(_SUFFIX)}")
# Left behind by a server that was killed amid a write.
_TEMPORARY, _STALE_S = ".part", 3600.0
# After a write that failed (a full disk), none is tried for so long.
_PAUSE_S = 30.0
# What others have written or removed is looked for so often.
_LOOK_S = 60.0
# Room is made for more than one page at once.
_MADE_AT_ONCE = 0.02

Row = npt.NDArray[np.uint8]


class PageStore:
    """See the module. max_bytes: of all pages in the directory, whatever their model. Raises StartupError where the
    directory cannot be had.

    num_corrupt: files that failed their check. num_failed: pages that could not be written.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        self.num_corrupt = self.num_failed = 0
        self.bytes = 0
        # Told of each that goes, whoever removed it.
        self.on_removed: Callable[[bytes], None] | None = None
        self._lock = threading.Lock()
        # By path below the directory: bytes. The longest unused first.
        self._files: OrderedDict[str, int] = OrderedDict()
        self._paused_until = 0.0
        self._looked_at = 0.0
        try:
            # What prompts said can be told from their pages: they are the owner's alone.
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = directory / f"probe-{os.getpid()}{_TEMPORARY}"
            probe.write_bytes(b"")
            probe.unlink()
            self._look()
        except OSError as error:
            raise StartupError(f"{FLAG} {directory}: {error.strerror or error}") from None

    def __contains__(self, name: bytes) -> bool:
        return _path(name) in self._files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, name: bytes, into: Row) -> bool:
        """Fill uint8 [page_bytes] from the page's file. False, and anything in `into`, where it cannot be had."""
        path = _path(name)
        try:
            with (self.directory / path).open("rb", buffering=0) as file:
                header = file.read(_HEADER.size)
                whole = len(header) == _HEADER.size and _fill(file, into) and not file.read(1)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                logger.warning("%s: a page could not be read: %s", self.directory, error.strerror or error)
            self._forget(path)
            return False
        if not whole or _HEADER.unpack(header) != (_MAGIC, name, into.nbytes, zlib.crc32(into.data)):
            self.num_corrupt += 1
            logger.warning("%s: %s is damaged and removed", self.directory, path)
            self._remove(path)
            return False
        with contextlib.suppress(OSError):
            # The order of use outlives this process.
            os.utime(self.directory / path)
        with self._lock, contextlib.suppress(KeyError):
            self._files.move_to_end(path)
        return True

    def write(self, name: bytes, data: Row) -> bool:
        """Keep uint8 [page_bytes]. False where it cannot be: the disk is full, say."""
        size = _HEADER.size + data.nbytes
        now = time.monotonic()
        if now < self._paused_until or size > self.max_bytes:
            self.num_failed += 1
            return False
        if now - self._looked_at > _LOOK_S:
            with contextlib.suppress(OSError):
                self._look()
        self._make_room(size)
        path = _path(name)
        target = self.directory / path
        temporary = target.with_name(f"{target.name}-{os.getpid()}{_TEMPORARY}")
        try:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            with open(temporary, "wb", buffering=0, opener=_private) as file:
                _write_all(file.fileno(), _HEADER.pack(_MAGIC, name, data.nbytes, zlib.crc32(data.data)))
                _write_all(file.fileno(), data.data)
            temporary.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self.num_failed += 1
            self._paused_until = now + _PAUSE_S
            full = " (the disk is full)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            logger.warning(
                "%s: a page could not be written: %s%s; the next is tried in %.0f s",
                *(self.directory, error.strerror or error, full, _PAUSE_S),
            )
            return False
        with self._lock:
            self.bytes += size - self._files.pop(path, 0)
            self._files[path] = size
        return True

    def _make_room(self, size: int) -> None:
        """For one more file, and some beside it."""
        if self.bytes + size <= self.max_bytes:
            return
        goal = self.max_bytes - size - int(self.max_bytes * _MADE_AT_ONCE)
        while self._files and self.bytes > max(0, goal):
            self._remove(next(iter(self._files)))

    def _remove(self, path: str) -> None:
        self._forget(path)
        with contextlib.suppress(OSError):
            (self.directory / path).unlink()

    def _forget(self, path: str) -> None:
        with self._lock:
            size = self._files.pop(path, None)
            self.bytes -= size or 0
        if size is not None and self.on_removed is not None:
            self.on_removed(_name(path))

    def _look(self) -> None:
        """Take in what there is, by the times of last use."""
        self._looked_at = time.monotonic()
        found: list[tuple[float, str, int]] = []
        stale = time.time() - _STALE_S
        for folder in os.scandir(self.directory):
            if not (folder.is_dir(follow_symlinks=False) and len(folder.name) == 2):
                continue
            with contextlib.suppress(FileNotFoundError):
                for file in os.scandir(folder.path):
                    with contextlib.suppress(FileNotFoundError):
                        status = file.stat(follow_symlinks=False)
                        if _OURS.fullmatch(f"{folder.name}/{file.name}"):
                            found.append((status.st_mtime, f"{folder.name}/{file.name}", status.st_size))
                        elif file.name.endswith(_TEMPORARY) and status.st_mtime < stale:
                            os.unlink(file.path)
        found.sort()
        with self._lock:
            before, self._files = self._files, OrderedDict((path, size) for _, path, size in found)
            self.bytes = sum(self._files.values())
        if self.on_removed is not None:
            for path in before.keys() - self._files.keys():
                self.on_removed(_name(path))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _path(name: bytes) -> str:
    text = name.hex()
    return f"{text[:2]}/{text[2:]}{_SUFFIX}"


def _name(path: str) -> bytes:
    return bytes.fromhex(path.removesuffix(_SUFFIX).replace("/", ""))


def _fill(file: object, into: Row) -> bool:
    view = into.data
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            return False
        view = view[count:]
    return True


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
