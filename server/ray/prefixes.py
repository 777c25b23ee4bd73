"""Which replica has what a request begins with: names of a request's beginnings, and the order of replicas by them.

Nothing is tokenised before a replica is chosen: a beginning is so many bytes of what the prompt is rendered from. Its
ends lie a quarter further apart each time, so that a prompt of any length has a few dozen. Replicas publish which names
they have seen, most recent ones that fit their KV cache. No Ray in here.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

FIRST_END = 256
_GROWTH = 1.25
# What a token is of a prompt's JSON, about: sizes here are bytes, and the KV cache's are tokens.
BYTES_PER_TOKEN = 4
# A row that a replica runs already delays a new one as a prompt of so many tokens would.
TOKENS_PER_REQUEST = 128
# A session's replica is left only where it is worse by so many tokens: what its answers cached is not in the names.
SESSION_TOKENS = 1024
# Names that one replica tells of, 8 bytes each.
MOST_NAMES = 4096
SESSION_HEADERS = ("x-session-id", "x-smg-routing-key", "x-session-affinity")
# Fields in the order in which templates write them; the prompt itself is the last.
_BEFORE = ("tools", "functions", "system", "instructions")
_PROMPTS = ("messages", "prompt", "input", "input_ids", "text", "query")
# Prompts that differ in one of these share no pages.
_APART = ("model", "cache_salt", "lora_path", "chat_template_kwargs")


@dataclass(frozen=True, slots=True)
class Beginnings:
    """names: 64 bits of each beginning, shortest first; ends: its bytes. session: 64 bits, None without one. size:
    bytes of the whole prompt."""

    names: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    session: int | None = None
    size: int = 0


def _name(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest())


def read_body(body: bytes) -> dict[str, Any]:
    """The body's fields; of what is no JSON object none, which the server will tell its client."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return fields if isinstance(fields, dict) else {}


def beginnings(fields: Mapping[str, Any], headers: Mapping[str, str]) -> Beginnings:
    """Of a request. headers: lower-case names. What two keys or models say alike has different names."""
    owner = headers.get("authorization", "") + "\0" + headers.get("x-api-key", "")
    root = owner.encode(errors="replace") + _dumps([fields.get(name) for name in _APART])
    session = next((value for name in SESSION_HEADERS if (value := headers.get(name))), None)
    if session is None:
        given = fields.get("prompt_cache_key")
        session = given if isinstance(given, str) and given else None
    prompt = next((fields[name] for name in _PROMPTS if fields.get(name)), None)
    text = b"".join(_dumps(fields[name]) for name in _BEFORE if fields.get(name)) + _dumps(prompt)
    names, ends = [], []
    running, start, end = blake2b(root, digest_size=8), 0, FIRST_END
    while end <= len(text):
        running.update(text[start:end])
        names.append(int.from_bytes(running.digest()))
        ends.append(end)
        start, end = end, int(end * _GROWTH)
    told = None if session is None else _name(b"session\0" + owner.encode(errors="replace") + _dumps(session))
    return Beginnings(tuple(names), tuple(ends), told, len(text))


def _dumps(value: object) -> bytes:
    return b"" if value is None else orjson.dumps(value)


class Seen:
    """What a replica has served, most recent last. capacity: tokens that its KV cache holds. Loop thread."""

    def __init__(self, capacity: int) -> None:
        self._room = capacity * BYTES_PER_TOKEN
        self._sizes: OrderedDict[int, int] = OrderedDict()
        self._sessions: OrderedDict[int, None] = OrderedDict()

    def add(self, seen: Beginnings) -> None:
        """The longest first: what is forgotten first is what hangs deepest, as in the radix tree."""
        starts = (0, *seen.ends)
        for index in reversed(range(len(seen.names))):
            name = seen.names[index]
            if name not in self._sizes:
                self._sizes[name] = seen.ends[index] - starts[index]
                self._room -= self._sizes[name]
            self._sizes.move_to_end(name)
        if seen.session is not None:
            self._sessions[seen.session] = None
            self._sessions.move_to_end(seen.session)
        while self._sizes and (self._room < 0 or len(self._sizes) > MOST_NAMES):
            self._room += self._sizes.popitem(last=False)[1]
        while len(self._sessions) > MOST_NAMES:
            self._sessions.popitem(last=False)

    def published(self) -> dict[str, bytes]:
        """As routing statistics; see `read_published`."""
        return {"names": array("Q", self._sizes).tobytes(), "sessions": array("Q", self._sessions).tobytes()}


def read_published(stats: Mapping[str, Any]) -> frozenset[int]:
    """Names and sessions together: both are 64 bits of a hash."""
    found = array("Q")
    for key in ("names", "sessions"):
        found.frombytes(stats.get(key, b""))
    return frozenset(found)


class Sent:
    """What one router has sent to one replica lately, and the replica may not have told of yet."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at: OrderedDict[int, float] = OrderedDict()

    def add(self, names: Iterable[int], now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        for name in names:
            self._at[name] = now
            self._at.move_to_end(name)
        while self._at and (next(iter(self._at.values())) < now - self._seconds or len(self._at) > MOST_NAMES):
            self._at.popitem(last=False)

    def __contains__(self, name: object) -> bool:
        return name in self._at


@dataclass(frozen=True, slots=True)
class Candidate:
    """ongoing: requests that it has. known: its names, published or just sent."""

    id: str
    ongoing: int
    known: Sequence[Collection[int] | Sent]

    def knows(self, name: int) -> bool:
        return any(name in names for names in self.known)

    def matched(self, wanted: Beginnings) -> int:
        """Bytes of the prompt that it has seen."""
        for name, end in zip(reversed(wanted.names), reversed(wanted.ends), strict=True):
            if self.knows(name):
                return end
        return 0


def cost(candidate: Candidate, wanted: Beginnings) -> float:
    """What a request has before it there, in tokens: the prompt's that are to be computed, and other rows."""
    tokens = (wanted.size - candidate.matched(wanted)) / BYTES_PER_TOKEN
    if wanted.session is not None and not candidate.knows(wanted.session):
        tokens += SESSION_TOKENS
    return tokens + candidate.ongoing * TOKENS_PER_REQUEST


def order(candidates: Sequence[Candidate], wanted: Beginnings) -> list[list[str]]:
    """Ids of replicas, cheapest first; what costs the same stands together."""
    ranks: dict[float, list[str]] = {}
    for candidate in candidates:
        ranks.setdefault(cost(candidate, wanted), []).append(candidate.id)
    return [ranks[price] for price in sorted(ranks)]


def worth_waiting_for(candidates: Sequence[Candidate], wanted: Beginnings) -> tuple[list[str], float]:
    """Who knows the most of a request, and how many tokens more than who knows the least: where all are busy, waiting
    for one of them is cheaper than computing these elsewhere."""
    matched = {candidate.id: candidate.matched(wanted) for candidate in candidates}
    most = max(matched.values(), default=0)
    gain = (most - min(matched.values(), default=0)) / BYTES_PER_TOKEN
    return [name for name, found in matched.items() if found == most], gain
