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
import re
import uuid
from collections import OrderedDict
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

    most_ended, most_ended_bytes: how many of those that have ended are kept, and how much of them, the newest first.
    ended: of earlier processes, in their order, as this one began. has_company: another process that lives writes here.
    """

    def __init__(self, path: Path, most_ended: int, most_ended_bytes: int = 64 << 20) -> None:
        self._path, self._most_ended, self._most_ended_bytes = path, most_ended, most_ended_bytes
        self._name = uuid.uuid4().hex
        self._file = self._alive = -1
        # Of all processes, by id; and the file's number with how many bytes of it are read.
        self._begun: dict[str, Begun] = {}
        self._read_to = (0, 0)
        # What was read, by whatever call, and not told by a look yet.
        self._news = News()
        # What this process claimed and could not write down.
        self._unwritten: set[str] = set()
        # How long the file may become.
        self._most_bytes = _LEAST_BYTES
        self.has_company = False
        try:
            self._live()
            self._file = self._open()
            with self._locked():
                counting = self._count()
                self.ended = self._ended_of(counting)
                self.has_company = bool(self._others())
                if not self.has_company:
                    self._shorten(counting)
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
        self._unwritten.discard(response_id)
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
            self._unwritten.add(one.id)
            self._begun[one.id] = dataclasses.replace(one, by=self._name)
        return True

    def look(self) -> News:
        """What others have written since the last look. With the last of them gone, the file is made short."""
        try:
            with self._locked():
                self._read()
                self.has_company = bool(self._others())
                if not self.has_company:
                    self._shorten(self._count())
        except OSError as error:
            logger.error("the journal cannot be written: %s", error.strerror)
        news, self._news = self._news, News()
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

    def _lines(self, start: int = 0) -> Iterator[tuple[Place, bytes]]:
        """From there on, one at a time in memory. The interpreter is given away at each read."""
        with open(os.dup(self._file), "rb", buffering=_READ_BYTES) as file:
            file.seek(start)
            for line in file:
                if line != b"\n":
                    yield (start, len(line)), line
                start += len(line)

    def _read(self) -> None:
        """Lines that were not read yet, and what others have ended in them."""
        at = os.fstat(self._file)
        place = 0
        if self._read_to[0] == at.st_ino:
            place = self._read_to[1]
        else:
            self._begun.clear()
        num_bad = 0
        for _, line in self._lines(place):
            try:
                self._take(line, self._news)
            except _NO_LINE:
                num_bad += 1
        self._read_to = at.st_ino, at.st_size
        self._tell_bad(num_bad)

    def _take(self, line: bytes, news: News) -> None:
        kind, name, by, is_forgotten = _told(line)
        if kind == "begun":
            self._begun[name] = _begun_of(line, by)
            return
        if kind == "left":
            one = self._begun.get(name)
            if one is not None and one.by == by:
                self._begun[name] = dataclasses.replace(one, by="")
            return
        begun = self._begun.pop(name, None)
        news.ended.pop(name, None)
        if by == self._name:
            return
        if is_forgotten:
            news.forgotten.append((orjson.loads(line)["owner"], name))
        else:
            news.ended[name] = _ended_of(line, begun)

    def _count(self) -> _Counting:
        """All lines of the file. What is begun and not ended is known then."""
        at = os.fstat(self._file)
        counting, num_bad = _Counting(self._most_ended, self._most_ended_bytes), 0
        for place, line in self._lines():
            try:
                counting.take(line, place)
            except _NO_LINE:
                num_bad += 1
        before, self._begun = self._begun, {}
        self._unwritten &= counting.begun.keys()
        for name, (by, places) in list(counting.begun.items()):
            by = self._name if name in self._unwritten else by
            try:
                one = before.get(name)
                if one is None or one.by != by:
                    one = _begun_of(self._line(places[0]), by)
                self._begun[name] = one
            except _NO_LINE:
                del counting.begun[name]
                num_bad += 1
        self._read_to = at.st_ino, at.st_size
        self._tell_bad(num_bad)
        return counting

    def _ended_of(self, counting: _Counting) -> list[Ended]:
        found: list[Ended] = []
        num_bad = 0
        for name, place in list(counting.ended.items()):
            try:
                found.append(_ended_of(self._line(place)))
            except _NO_LINE:
                counting.drop(name)
                num_bad += 1
        self._tell_bad(num_bad)
        return found

    def _line(self, place: Place) -> bytes:
        return os.pread(self._file, place[1], place[0])

    def _tell_bad(self, num_bad: int) -> None:
        if num_bad:
            logger.warning("%s: %d lines could not be read", self._path, num_bad)

    def _shorten(self, counting: _Counting) -> None:
        """What counts yet alone. Locked."""
        with self._new_file() as old:
            for start, length in counting.places():
                data = os.pread(old, length, start)
                # The last one may be whole but for its end.
                self._write(data if data.endswith(b"\n") else data + b"\n")

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
            self._shorten(self._count())
        except OSError as error:
            self._most_bytes = 2 * size  # not at each line again
            logger.error("the journal cannot be made shorter: %s", error.strerror)

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


class _Counting:
    """Where the lines are that count yet, as all of them go by. Of those that have ended the newest, as the response
    store keeps them."""

    def __init__(self, most_ended: int, most_bytes: int) -> None:
        # By whom, and the places of one that is begun and of what was said of it.
        self.begun: dict[str, tuple[str, list[Place]]] = {}
        self.ended: OrderedDict[str, Place] = OrderedDict()
        self._most_ended, self._most_bytes = most_ended, most_bytes
        self._num_bytes = 0

    def take(self, line: bytes, place: Place) -> None:
        """Raises what is in _NO_LINE."""
        kind, name, by, is_forgotten = _told(line)
        if kind == "begun":
            self.begun[name] = by, [place]
        elif kind == "left":
            if (one := self.begun.get(name)) is not None and one[0] == by:
                self.begun[name] = "", [*one[1], place]
        else:
            self.begun.pop(name, None)
            self.drop(name)
            if not is_forgotten and place[1] <= self._most_bytes:
                self.ended[name] = place
                self._num_bytes += place[1]
            while self._num_bytes > self._most_bytes or len(self.ended) > self._most_ended:
                self.drop(next(iter(self.ended)))

    def drop(self, name: str) -> None:
        """One that has ended, if it is there."""
        self._num_bytes -= self.ended.pop(name, (0, 0))[1]

    def places(self) -> list[Place]:
        return [place for _, places in self.begun.values() for place in places] + list(self.ended.values())


# A line's start and length in the file, in bytes.
Place = tuple[int, int]
# Shorter than that the file need not be.
_LEAST_BYTES = 1 << 20
# At once of the file.
_READ_BYTES = 1 << 16
# What is raised for a line that is none of a journal.
_NO_LINE = (ValueError, TypeError, KeyError, AttributeError)
# A line as it is written here: most are told by their ends, however long what they hold is.
_HEAD = re.compile(rb'\{"(begun|ended)":"([^"\\]*)","owner":"(?:[^"\\]|\\.)*",(?:"body":\{|"response":(?:\{|(null),))')
_TAIL = re.compile(rb',"by":"([0-9a-f]*)"\}\n?\Z')
_TAIL_BYTES = 64


def _told(line: bytes) -> tuple[str, str, str, bool]:
    """Its kind ("begun", "left" or "ended"), the response's id, by whom, whether it is not to be kept. Raises what
    is in _NO_LINE."""
    head, tail = _HEAD.match(line), _TAIL.search(line, max(0, len(line) - _TAIL_BYTES))
    if head is not None and tail is not None:
        return head[1].decode(), head[2].decode(), tail[1].decode(), head[3] is not None
    entry = orjson.loads(line)
    kind = "begun" if "begun" in entry else "left" if "left" in entry else "ended"
    if not isinstance(entry[kind], str):
        raise TypeError("an id is a string")
    return kind, entry[kind], str(entry.get("by", "")), kind == "ended" and entry["response"] is None


def _begun_of(line: bytes, by: str) -> Begun:
    entry = orjson.loads(line)
    return Begun(entry["begun"], entry["owner"], dict(entry["body"]), int(entry["created"]), by)


def _ended_of(line: bytes, begun: Begun | None = None) -> Ended:
    entry = orjson.loads(line)
    return Ended(entry["owner"], dict(entry["response"]), list(entry["items"]), begun)


def _begun_line(one: Begun, by: str) -> dict[str, Any]:
    return {"begun": one.id, "owner": one.owner, "body": one.body, "created": one.created, "by": by}


def _ended_line(owner: str, response_id: str, response: Any, items: Any, by: str) -> dict[str, Any]:
    return {"ended": response_id, "owner": owner, "response": response, "items": items, "by": by}
