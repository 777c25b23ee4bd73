"""Keyring: whose key a request came with, and what is left of what that key may use. Loop thread.

Requests and tokens of a minute are buckets that fill up all the time: an answer's tokens are charged as it ends, so a
bucket may be overdrawn, and then nothing is taken until it is above nothing again.
"""

from __future__ import annotations

import calendar
import contextlib
import hmac
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.keys import KeyEntry, digest
from engine.request import RequestError

logger = logging.getLogger("oneloop.server")

# How often the month's tokens are written down, at most.
SAVE_EVERY_S = 30.0


class RateLimitError(RequestError):
    """A key has used up what it may use."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after: float, code: str | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.code = code or self.code


class Bucket:
    """`most` a minute. left: of them now, below 0 where more was used."""

    def __init__(self, most: float, now: float) -> None:
        self.most = most
        self._left = most
        self._at = now

    def left(self, now: float) -> float:
        self._left = min(self.most, self._left + (now - self._at) * self.most / 60.0)
        self._at = now
        return self._left

    def take(self, amount: float, now: float) -> None:
        self._left = self.left(now) - amount

    def seconds_until(self, amount: float, now: float) -> float:
        """Until so much is left."""
        return max(0.0, (min(amount, self.most) - self.left(now)) * 60.0 / self.most)


class Key:
    """One key with its use. entry None: of --api-key, without limits. name: what tells keys apart."""

    def __init__(self, name: str, secret: bytes, entry: KeyEntry | None, now: float) -> None:
        self.name = name
        self.digest = secret
        self.entry = entry
        self.num_running = 0
        self.month_tokens = 0
        self.requests = self.tokens = None
        if entry is not None and entry.requests_per_minute is not None:
            self.requests = Bucket(entry.requests_per_minute, now)
        if entry is not None and entry.tokens_per_minute is not None:
            self.tokens = Bucket(entry.tokens_per_minute, now)


class Keyring:
    """digests: of --api-key. usage: where the month's tokens outlive the process, None for nowhere."""

    def __init__(
        self,
        digests: Sequence[bytes],
        entries: Sequence[KeyEntry] = (),
        *,
        usage: Path | None = None,
        now: Callable[[], float] = time.monotonic,
        today: Callable[[], str] = lambda: time.strftime("%Y-%m", time.gmtime()),
    ) -> None:
        self._now, self._today = now, today
        start = now()
        self.keys = [Key(str(place), one, None, start) for place, one in enumerate(digests)]
        self.keys += [Key(f"@{entry.name}", entry.digest, entry, start) for entry in entries]
        self._usage = usage if any(entry.monthly_tokens is not None for entry in entries) else None
        self._month = today()
        self._saved_at = start
        self._load()

    def __bool__(self) -> bool:
        return bool(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, given: Sequence[str]) -> Key | None:
        """The key that one of these words is. Every key is compared, whatever the others gave: time tells nothing."""
        words = [digest(word) for word in given if word]
        found = None
        for key in self.keys:
            if sum(hmac.compare_digest(word, key.digest) for word in words):
                found = key
        return found

    def named(self, name: str) -> Key | None:
        return next((key for key in self.keys if key.name == name), None)

    # ---- limits

    def check_tokens(self, key: Key, num_tokens: int) -> None:
        """Charge a request's prompt. Raises RateLimitError where the minute or the month has no room for it."""
        entry, now = key.entry, self._now()
        if entry is None:
            return
        self._turn_month()
        if entry.monthly_tokens is not None and key.month_tokens >= entry.monthly_tokens:
            sentence = f"This key has used its {entry.monthly_tokens} tokens of the month."
            raise RateLimitError(sentence, _seconds_of_month_left(), "insufficient_quota")
        if key.tokens is not None:
            # A prompt that is more than a minute's tokens waits for a full bucket, and overdraws it.
            wanted = min(num_tokens, key.tokens.most)
            if key.tokens.left(now) < wanted:
                raise RateLimitError(
                    f"This key may use {entry.tokens_per_minute:g} tokens a minute; please retry later.",
                    key.tokens.seconds_until(wanted, now),
                )
        self.charge(key, num_tokens)

    def charge(self, key: Key, num_tokens: int) -> None:
        """Tokens that were used; below 0, that were charged and not used."""
        if key.entry is None:
            return
        self._turn_month()
        key.month_tokens = max(0, key.month_tokens + num_tokens)
        if key.tokens is not None:
            key.tokens.take(num_tokens, self._now())
        if self._usage is not None and self._now() - self._saved_at >= SAVE_EVERY_S:
            self.save()

    @contextlib.contextmanager
    def request(self, key: Key) -> Iterator[None]:
        """One request of a key, from its head to the end of its answer. Raises RateLimitError for one too many."""
        entry, now = key.entry, self._now()
        if entry is not None:
            if entry.concurrent is not None and key.num_running >= entry.concurrent:
                raise RateLimitError(f"This key may run {entry.concurrent} requests at once; please retry later.", 1.0)
            if key.requests is not None:
                if key.requests.left(now) < 1.0:
                    raise RateLimitError(
                        f"This key may send {entry.requests_per_minute:g} requests a minute; please retry later.",
                        key.requests.seconds_until(1.0, now),
                    )
                key.requests.take(1.0, now)
        key.num_running += 1
        try:
            yield
        finally:
            key.num_running -= 1

    def headers(self, key: Key) -> dict[str, str]:
        """OpenAI's, of a key that has limits."""
        now, told = self._now(), {}
        for name, bucket in (("requests", key.requests), ("tokens", key.tokens)):
            if bucket is not None:
                told[f"x-ratelimit-limit-{name}"] = f"{bucket.most:.0f}"
                told[f"x-ratelimit-remaining-{name}"] = f"{max(0.0, bucket.left(now)):.0f}"
                told[f"x-ratelimit-reset-{name}"] = duration(bucket.seconds_until(bucket.most, now))
        return told

    # ---- the month

    def _turn_month(self) -> None:
        month = self._today()
        if month != self._month:
            self._month = month
            for key in self.keys:
                key.month_tokens = 0

    def _load(self) -> None:
        if self._usage is None or not self._usage.exists():
            return
        try:
            kept = json.loads(self._usage.read_text())
            used = kept["tokens"] if kept["month"] == self._month else {}
            for key in self.keys:
                key.month_tokens = max(0, int(used.get(key.name, 0)))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            logger.warning("%s cannot be read: the month's tokens are counted from 0", self._usage)

    def save(self) -> None:
        """Write the month's tokens down, whole or not at all."""
        if self._usage is None:
            return
        self._saved_at = self._now()
        content = {"month": self._month, "tokens": {key.name: key.month_tokens for key in self.keys if key.entry}}
        partial = self._usage.with_name(self._usage.name + ".partial")
        try:
            partial.write_text(json.dumps(content))
            os.replace(partial, self._usage)
        except OSError as error:
            logger.warning("%s cannot be written (%s): tokens of this month may be forgotten", partial, error.strerror)


def duration(seconds: float) -> str:
    """As OpenAI writes them: 6m0s, 1.5s, 20ms."""
    if seconds < 1.0:
        return f"{seconds * 1000:.0f}ms"
    minutes, rest = divmod(seconds, 60.0)
    hours, minutes = divmod(int(minutes), 60)
    head = f"{hours}h" if hours else ""
    return f"{head}{minutes}m{rest:.0f}s" if head or minutes else f"{rest:.3g}s"


def _seconds_of_month_left() -> float:
    now = time.gmtime()
    spent = (now.tm_mday - 1) * 86400 + now.tm_hour * 3600 + now.tm_min * 60 + now.tm_sec
    return max(1.0, calendar.monthrange(now.tm_year, now.tm_mon)[1] * 86400 - spent)
