"""Who has used how much: tokens by API key and kind, and by a price file what they cost.

Kept by the responder as requests end, read by /metrics (oneloop_tokens_total, oneloop_cost_total) and by /live. A key
is named by its place in --api-key, or by the name that it was given; never by itself. Loop thread.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, Metric

from engine.config import StartupError

# cached: prompt tokens that the prefix cache had. prompt: those that were computed. output: generated ones.
KINDS = ("cached", "prompt", "output")
NO_KEY = "none"
# Names come from the command line or a file; a bug in that must not fill the memory.
MAX_KEYS = 10_000
_OTHERS = "others"
_MAX_BYTES = 1024 * 1024
_FIELDS = ("currency", "per", "keys", *KINDS)

Prices = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class PriceList:
    """Money for a token of each of KINDS, and those of single keys."""

    currency: str = ""
    prices: Prices = (0.0, 0.0, 0.0)
    of_keys: Mapping[str, Prices] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str) -> PriceList:
        """A JSON or TOML file: `currency`, `per` (tokens that a price is for, 1,000,000 by default), `cached`,
        `prompt`, `output`, and under `keys` other prices by the name of a key. Raises StartupError with one line.
        """
        try:
            with Path(path).open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise StartupError(f"--prices: {path!r} cannot be read: {why}") from None
        if len(data) > _MAX_BYTES:
            raise StartupError(f"--prices: {path!r} is larger than {_MAX_BYTES} bytes")
        return cls._read(_parsed(path, data), path)

    @classmethod
    def _read(cls, found: Any, path: str) -> PriceList:
        if not isinstance(found, dict):
            raise StartupError(f"--prices: {path!r} holds no object")
        _refuse_others(found, _FIELDS, path, "")
        currency = found.get("currency", "")
        if not isinstance(currency, str) or not currency.isprintable() or len(currency) > 16:
            raise StartupError(f"--prices: {path!r}: currency must be a word of at most 16 characters")
        per = _number(found.get("per", 1_000_000), path, "per")
        if per < 1:
            raise StartupError(f"--prices: {path!r}: per must be a number of tokens")
        if not any(kind in found for kind in KINDS) and "keys" not in found:
            raise StartupError(f"--prices: {path!r}: none of cached, prompt, output and keys is there")
        common = _prices(found, path, "", per, (0.0, 0.0, 0.0))
        keys = found.get("keys", {})
        if not isinstance(keys, dict) or not all(isinstance(one, dict) for one in keys.values()):
            raise StartupError(f"--prices: {path!r}: keys must be an object of objects, by the names of keys")
        of_keys = {}
        for name, own in keys.items():
            _refuse_others(own, KINDS, path, f"keys.{name}.")
            of_keys[name] = _prices(own, path, f"keys.{name}.", per, common)
        return cls(currency, common, of_keys)


def _parsed(path: str, data: bytes) -> Any:
    try:
        text = data.decode("utf-8-sig")
        return tomllib.loads(text) if path.lower().endswith(".toml") else json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "TOML" if path.lower().endswith(".toml") else "JSON"
        raise StartupError(f"--prices: {path!r} is no {kind}: {' '.join(str(error).split())}") from None


def _refuse_others(found: dict[str, Any], known: tuple[str, ...], path: str, where: str) -> None:
    for name in found:
        if name not in known:
            raise StartupError(f"--prices: {path!r}: {where}{name} is none of {', '.join(known)}")


def _prices(found: dict[str, Any], path: str, where: str, per: float, default: Prices) -> Prices:
    cached, prompt, output = (
        _number(found[kind], path, where + kind) / per if kind in found else own
        for kind, own in zip(KINDS, default, strict=True)
    )
    return cached, prompt, output


def _number(value: object, path: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise StartupError(f"--prices: {path!r}: {where} must be a number of 0 or more")
    return float(value)


class Accounts:
    """`add` what a request used. prices: None where nothing has a price."""

    def __init__(self, prices: PriceList | None = None) -> None:
        self.prices = prices
        self.tokens: dict[str, list[int]] = {}

    def add(self, key: str, *, cached: int, prompt: int, output: int) -> None:
        """key: its name. prompt: computed tokens alone."""
        key = key or NO_KEY
        if key not in self.tokens and len(self.tokens) >= MAX_KEYS:
            key = _OTHERS
        used = self.tokens.setdefault(key, [0, 0, 0])
        used[0] += cached
        used[1] += prompt
        used[2] += output

    def cost(self, key: str) -> float:
        """Money that a key has used so far; 0 without a price list."""
        if self.prices is None:
            return 0.0
        prices = self.prices.of_keys.get(key, self.prices.prices)
        return sum(count * price for count, price in zip(self.tokens[key], prices, strict=True))

    def collect(self) -> Iterator[Metric]:
        """For EngineMetrics.add_families."""
        tokens = CounterMetricFamily(
            "oneloop_tokens", "Tokens of ended requests, by API key and kind.", labels=["key", "kind"]
        )
        for key, used in self.tokens.items():
            for kind, count in zip(KINDS, used, strict=True):
                tokens.add_metric([key, kind], count)
        yield tokens
        if self.prices is not None:
            costs = CounterMetricFamily(
                "oneloop_cost", "What they cost by --prices, by API key.", labels=["key", "currency"]
            )
            for key in self.tokens:
                costs.add_metric([key, self.prices.currency], self.cost(key))
            yield costs
