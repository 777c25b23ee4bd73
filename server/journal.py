"""The journal of background responses: `--resume-journal FILE` brings them through a crash.

A line of JSON as one begins (whose it is, its body with a seed, its id) and one as it ends. At the next start what had
ended is kept again, and what had not is computed anew: the same tokens, and so the same events under the same numbers,
on a device that computes the same bits; a client that comes back goes on behind the last number that it has seen.

Written without a buffer, so that a killed process loses nothing that the operating system keeps. Loop thread.
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from engine.config import StartupError
from engine.request import UnavailableError

logger = logging.getLogger("oneloop.server")


@dataclass(frozen=True, slots=True)
class Begun:
    """A response that had not ended. owner: the name of its key."""

    id: str
    owner: str
    body: dict[str, Any]
    created: int


@dataclass(frozen=True, slots=True)
class Ended:
    owner: str
    response: dict[str, Any]
    items: list[dict[str, Any]]


class Journal:
    """Reads what is there and begins a new file in its place. begun, ended: of earlier processes, in their order."""

    def __init__(self, path: Path, most_ended: int) -> None:
        self._path = path
        begun, ended = _read(path)
        self.begun = list(begun.values())
        self.ended = list(ended.values())[-most_ended:] if most_ended else []
        partial = path.with_name(path.name + ".partial")
        try:
            self._file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
            for one in self.begun:
                self._write({"begun": one.id, "owner": one.owner, "body": one.body, "created": one.created})
            for other in self.ended:
                self._write(_ended_line(other.owner, other.response["id"], other.response, other.items))
            os.replace(partial, path)
        except OSError as error:
            raise StartupError(f"--resume-journal: {path} cannot be written: {error.strerror}") from None

    def begin(self, one: Begun) -> None:
        """Raises UnavailableError where it cannot be written down: what is promised must be kept."""
        try:
            self._write({"begun": one.id, "owner": one.owner, "body": one.body, "created": one.created})
        except OSError as error:
            logger.error("the journal cannot be written: %s", error.strerror)
            raise UnavailableError("The server cannot keep background responses at the moment.") from None

    def end(self, owner: str, response_id: str, response: Any = None, items: Any = None) -> None:
        """response None: it is not to be kept."""
        try:
            self._write(_ended_line(owner, response_id, response, items))
        except OSError as error:
            # It would be computed again, which is no harm.
            logger.error("the journal cannot be written: %s", error.strerror)

    def close(self) -> None:
        os.close(self._file)
        # A response that a second signal cut off ends later still: by then the number may be of another's file.
        self._file = -1

    def _write(self, line: dict[str, Any]) -> None:
        data = orjson.dumps(line) + b"\n"
        written = os.write(self._file, data)
        if written < len(data):
            # A disk that is full takes a part: no line may begin amid another, and none that was refused may count.
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(errno.ENOSPC, "no space is left")


def _ended_line(owner: str, response_id: str, response: Any, items: Any) -> dict[str, Any]:
    return {"ended": response_id, "owner": owner, "response": response, "items": items}


def _read(path: Path) -> tuple[dict[str, Begun], dict[str, Ended]]:
    """By id. A line that is cut off, or none of ours, is passed over."""
    begun: dict[str, Begun] = {}
    ended: dict[str, Ended] = {}
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return begun, ended
    except OSError as error:
        raise StartupError(f"--resume-journal: {path} cannot be read: {error.strerror}") from None
    num_bad = 0
    for line in filter(None, data.split(b"\n")):
        try:
            entry = orjson.loads(line)
            if "begun" in entry:
                begun[entry["begun"]] = Begun(
                    entry["begun"], entry["owner"], dict(entry["body"]), int(entry["created"])
                )
                continue
            begun.pop(entry["ended"], None)
            ended.pop(entry["ended"], None)
            if entry["response"] is not None:
                ended[entry["ended"]] = Ended(entry["owner"], dict(entry["response"]), list(entry["items"]))
        except (ValueError, TypeError, KeyError):
            num_bad += 1
    if num_bad:
        logger.warning("%s: %d lines could not be read", path, num_bad)
    return begun, ended
