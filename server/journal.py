"""The journal of background responses: `--resume-journal FILE` brings them through a crash, and to the next process.

A line of JSON as one begins (whose it is, its body with a seed, its id) and one as it ends. At the next start what had
ended is kept again, and what had not is computed anew: the same tokens, and so the same events under the same numbers,
on a device that computes the same bits; a client that comes back goes on behind the last number that it has seen.

Two processes write one journal while one hands over to the other. Each line says by whom it is; what is begun by one
that lives (it holds a lock on a file beside the journal) is its own, until it leaves it to others.

Written without a buffer, so that a killed process loses nothing that the operating system keeps. What no longer counts
is taken out as the file grows: a new file is made beside it and put in its place.

Calls may wait for another process's lock and for the disk: one thread, not the loop's (background.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import glob
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from engine.config import StartupError
from engine.request import UnavailableError

logger = logging.getLogger("oneloop.server")


@dataclass(frozen=True, slots=True)
class Begun:
    """A response that had not ended. owner: the name of its key. by: the process that computes it, "" for none."""

    id: str
    owner: str
    body: dict[str, Any]
    created: int
    by: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """begun: as it was begun, where that was seen."""

    owner: str
    response: dict[str, Any]
    items: list[dict[str, Any]]
    begun: Begun | None = None


@dataclass
class News:
    """What others have written since the last look. forgotten: owners and ids."""

    ended: dict[str, Ended] = field(default_factory=dict)
    forgotten: list[tuple[str, str]] = field(default_factory=list)


class Journal:
    """Reads what is there, and begins a new file in its place where no other process writes it.

    ended: of earlier processes, in their order, as this one began. has_company: another process that lives writes here.
    """

    def __init__(self, path: Path, most_ended: int) -> None:
        self._path, self._most_ended = path, most_ended
        self._name = uuid.uuid4().hex
        self._file = self._alive = -1
        # Of all processes, by id; and the file's number with how many bytes of it are read.
        self._begun: dict[str, Begun] = {}
        self._read_to = (0, 0)
        # How long the file may become.
        self._most_bytes = _LEAST_BYTES
        self.has_company = False
        try:
            self._live()
            self._file = self._open()
            with self._locked():
                news = self._read(of_all=True)
                self.ended = list(news.ended.values())[-most_ended:] if most_ended else []
                self.has_company = bool(self._others())
                if not self.has_company:
                    self._rewrite(self.ended)
        except OSError as error:
            self.close()
            raise StartupError(f"--resume-journal: {path} cannot be written: {error.strerror}") from None

    @property
    def begun(self) -> list[Begun]:
        """What others have begun, and nobody ended."""
        return [one for one in self._begun.values() if one.by != self._name]

    # ---- writing

    def begin(self, one: Begun) -> None:
        """Raises UnavailableError where it cannot be written down: what is promised must be kept."""
        try:
            with self._locked():
                self._append(_begun_line(one, self._name))
                self._make_short()
        except OSError as error:
            logger.error("the journal cannot be written: %s", error.strerror)
            raise UnavailableError("The server cannot keep background responses at the moment.") from None

    def end(self, owner: str, response_id: str, response: Any = None, items: Any = None) -> None:
        """response None: it is not to be kept."""
        self._try(_ended_line(owner, response_id, response, items, self._name))

    def leave(self, response_id: str) -> None:
        """One of this process that another is to go on with."""
        self._try({"left": response_id, "by": self._name})

    def close(self) -> None:
        # A response that a second signal cut off ends later still: by then the number may be of another's file.
        for file in (self._file, self._alive):
            if file >= 0:
                os.close(file)
        if self._alive >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._alive_path(self._name))
        self._file = self._alive = -1

    # ---- others

    def is_elsewhere(self, one: Begun) -> bool:
        """Another process that lives computes it."""
        return one.by != self._name and self._lives(one.by)

    def elsewhere(self, owner: str, response_id: str) -> bool:
        one = self._begun.get(response_id)
        return one is not None and one.owner == owner and self.is_elsewhere(one)

    def claim(self, one: Begun) -> bool:
        """Go on with what nobody computes; False where another process was first, or it is over."""
        try:
            with self._locked():
                self._read()
                now = self._begun.get(one.id)
                if now is None or now.by == self._name or self._lives(now.by):
                    return False
                self._append(_begun_line(one, self._name))
                self._begun[one.id] = dataclasses.replace(one, by=self._name)
        except OSError as error:
            # It is computed all the same, once; nobody else would.
            logger.error("the journal cannot be written: %s", error.strerror)
            self._begun[one.id] = dataclasses.replace(one, by=self._name)
        return True

    def look(self) -> News:
        """What others have written since the last look. With the last of them gone, the file is made short."""
        news = News()
        try:
            with self._locked():
                news = self._read()
                self.has_company = bool(self._others())
                if not self.has_company:
                    kept = self._read(of_all=True)
                    self._rewrite(list(kept.ended.values())[-self._most_ended :] if self._most_ended else [])
        except OSError as error:
            logger.error("the journal cannot be written: %s", error.strerror)
        return news

    def has_heirs(self) -> bool:
        """Another process that lives writes this journal, too."""
        return bool(self._others())

    def _alive_path(self, name: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{name}.alive")

    def _live(self) -> None:
        """Hold a lock on a file of this process's name, for as long as it lives. Locked before it can be found."""
        path = self._alive_path(self._name)
        new = path.with_suffix(".new")
        self._alive = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        os.rename(new, path)

    def _lives(self, name: str) -> bool:
        if name == self._name:
            return True
        if not name.isalnum():
            return False
        path = self._alive_path(name)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        else:
            # It was killed.
            with contextlib.suppress(OSError):
                os.unlink(path)
            return False
        finally:
            os.close(file)

    def _others(self) -> list[str]:
        paths = glob.glob(f"{glob.escape(str(self._path))}.*.alive")
        names = [path.removesuffix(".alive").rpartition(".")[2] for path in paths]
        return [name for name in names if name != self._name and self._lives(name)]

    # ---- the file

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process writes meanwhile, and the file that is open is the one of the path. Raises OSError."""
        while True:
            if self._file < 0:
                raise OSError(errno.EBADF, "it is closed")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == os.fstat(self._file).st_ino:
                    break
            # Another process has begun a new one.
            old, self._file = self._file, self._open()
            os.close(old)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _read(self, *, of_all: bool = False) -> News:
        """Lines that were not read yet: what others have ended. of_all: all lines, whoever wrote them."""
        at = os.fstat(self._file)
        place = 0
        if not of_all and self._read_to[0] == at.st_ino:
            place = self._read_to[1]
        else:
            self._begun.clear()
        data = os.pread(self._file, at.st_size - place, place) if at.st_size > place else b""
        self._read_to = at.st_ino, at.st_size
        news, num_bad = News(), 0
        for line in filter(None, data.split(b"\n")):
            try:
                self._take(orjson.loads(line), news, of_all)
            except (ValueError, TypeError, KeyError, AttributeError):
                num_bad += 1
        if num_bad:
            logger.warning("%s: %d lines could not be read", self._path, num_bad)
        return news

    def _take(self, entry: dict[str, Any], news: News, of_all: bool) -> None:
        by = str(entry.get("by", ""))
        if "begun" in entry:
            name, owner, body = entry["begun"], entry["owner"], dict(entry["body"])
            self._begun[name] = Begun(name, owner, body, int(entry["created"]), by)
            return
        if "left" in entry:
            one = self._begun.get(entry["left"])
            if one is not None and one.by == by:
                self._begun[one.id] = dataclasses.replace(one, by="")
            return
        begun = self._begun.pop(entry["ended"], None)
        news.ended.pop(entry["ended"], None)
        if not of_all and by == self._name:
            return
        if entry["response"] is None:
            news.forgotten.append((entry["owner"], entry["ended"]))
        else:
            news.ended[entry["ended"]] = Ended(entry["owner"], dict(entry["response"]), list(entry["items"]), begun)

    def _rewrite(self, ended: list[Ended]) -> None:
        """What counts yet alone. Locked."""
        with self._new_file():
            for one in self._begun.values():
                self._append(_begun_line(one, one.by))
            for other in ended:
                self._append(_ended_line(other.owner, other.response["id"], other.response, other.items, ""))

    @contextlib.contextmanager
    def _new_file(self) -> Iterator[int]:
        """What the block appends is in the place of the old file, whose number it gets; both are locked. Where that
        fails, the old one stays, as it does where the process ends meanwhile. Raises OSError."""
        partial = self._path.with_name(self._path.name + ".partial")
        old = self._file
        self._file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            yield old
            # Else a power cut might leave the new name without its bytes.
            os.fsync(self._file)
            os.replace(partial, self._path)
        except BaseException as error:
            os.close(self._file)
            self._file = old
            if isinstance(error, OSError):
                # On a full disk it would hold the very bytes that are missing.
                with contextlib.suppress(OSError):
                    os.unlink(partial)
            raise
        os.close(old)
        at = os.fstat(self._file)
        self._read_to = at.st_ino, at.st_size
        self._most_bytes = max(_LEAST_BYTES, 2 * at.st_size)

    def _make_short(self) -> None:
        """Where the file has become long, and no other process writes it. Locked; what has been written stands."""
        size = os.fstat(self._file).st_size
        if size <= self._most_bytes or self.has_company or self._others():
            return
        try:
            self._read()
            kept = self._that_count()
            with self._new_file() as old:
                for start, length in kept:
                    self._write(os.pread(old, length, start))
        except OSError as error:
            self._most_bytes = 2 * size  # not at each line again
            logger.error("the journal cannot be made shorter: %s", error.strerror)

    def _that_count(self) -> list[tuple[int, int]]:
        """Starts and lengths of the lines that count yet; one of them at a time is in memory."""
        begun: dict[str, tuple[str, list[tuple[int, int]]]] = {}
        ended: dict[str, tuple[int, int]] = {}
        end = 0
        with open(os.dup(self._file), "rb") as file:
            file.seek(0)
            for line in file:
                place, end = (end, len(line)), end + len(line)
                with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                    entry = orjson.loads(line)
                    by = str(entry.get("by", ""))
                    if "begun" in entry:
                        begun[entry["begun"]] = by, [place]
                    elif "left" in entry:
                        if (one := begun.get(entry["left"])) is not None and one[0] == by:
                            begun[entry["left"]] = "", [*one[1], place]
                    else:
                        begun.pop(entry["ended"], None)
                        ended.pop(entry["ended"], None)
                        if entry["response"] is not None:
                            ended[entry["ended"]] = place
        kept = list(ended.values())[-self._most_ended :] if self._most_ended else []
        return [place for _, places in begun.values() for place in places] + kept

    def _try(self, line: dict[str, Any]) -> None:
        try:
            with self._locked():
                self._append(line)
                self._make_short()
        except OSError as error:
            # It would be computed again, which is no harm.
            logger.error("the journal cannot be written: %s", error.strerror)

    def _append(self, line: dict[str, Any]) -> None:
        data, size = orjson.dumps(line) + b"\n", os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            data = b"\n" + data  # one that was killed amid a line
        self._write(data)

    def _write(self, data: bytes) -> None:
        written = os.write(self._file, data)
        if written < len(data):
            # A disk that is full takes a part: no line may begin amid another, and none that was refused may count.
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(errno.ENOSPC, "no space is left")


# Shorter than that the file need not be.
_LEAST_BYTES = 1 << 20


def _begun_line(one: Begun, by: str) -> dict[str, Any]:
    return {"begun": one.id, "owner": one.owner, "body": one.body, "created": one.created, "by": by}


def _ended_line(owner: str, response_id: str, response: Any, items: Any, by: str) -> dict[str, Any]:
    return {"ended": response_id, "owner": owner, "response": response, "items": items, "by": by}
