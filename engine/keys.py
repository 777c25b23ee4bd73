"""API keys as the server keeps them: their SHA-256 and what each may do. Reads --key-file. Words; imports no torch.

The file is TOML or JSON: a list `keys` of objects with a `name`, the `sha256` of the key in hex, and any of
`requests_per_minute`, `tokens_per_minute`, `concurrent`, `priority`, `weight`, `monthly_tokens`, `models`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import shortened

_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
MAX_KEYS = 10_000


def digest(key: str | bytes) -> bytes:
    """What is kept of a key; bytes are that already."""
    if isinstance(key, bytes):
        return key
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One key of the file. None: no limit. models: names that it may call, None for all.

    priority: no request of it is more important (lower) than that. weight: its share under the policy "fair".
    """

    name: str
    digest: bytes
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrent: int | None = None
    priority: int = 0
    weight: float = 1.0
    monthly_tokens: int | None = None
    models: tuple[str, ...] | None = None


def read_key_file(path: Path) -> tuple[KeyEntry, ...]:
    """Raises ValueError with one line for a file that cannot be used; the line never holds a key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no UTF-8'}") from None
    try:
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        # The message of a parser may quote the line, so only its place is told.
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ValueError(f"{path} is not valid {kind}{where}") from None
    listed = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not listed or len(listed) > MAX_KEYS:
        raise ValueError(f"{path} needs a list `keys` of 1 to {MAX_KEYS} objects")
    entries = [_read_entry(f"{path}: keys[{place}]", value) for place, value in enumerate(listed)]
    for what in ("name", "digest"):
        if len({getattr(entry, what) for entry in entries}) < len(entries):
            raise ValueError(f"{path}: two keys have the same {'sha256' if what == 'digest' else what}")
    return tuple(entries)


def _read_entry(where: str, value: Any) -> KeyEntry:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object")
    known = {"name", "sha256", *KeyEntry.__dataclass_fields__} - {"digest"}
    unknown = sorted(str(name) for name in value.keys() - known)
    if unknown:
        raise ValueError(f"{where}: there is no field '{shortened(unknown[0])}'; there are {', '.join(sorted(known))}")
    name, given = value.get("name"), value.get("sha256")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where}: `name` must be 1 to 64 letters, digits, dots, dashes, underscores or @")
    if not isinstance(given, str) or not _DIGEST.fullmatch(given):
        raise ValueError(f"{where}: `sha256` must be the 64 hex digits of the key's SHA-256, and not the key")
    models = value.get("models")
    if models is not None and not (isinstance(models, list) and all(isinstance(one, str) and one for one in models)):
        raise ValueError(f"{where}: `models` must be a list of names")
    return KeyEntry(
        name,
        bytes.fromhex(given),
        requests_per_minute=_number(where, value, "requests_per_minute", above=0),
        tokens_per_minute=_number(where, value, "tokens_per_minute", above=0),
        concurrent=_integer(where, value, "concurrent", None, low=1),
        priority=_integer(where, value, "priority", 0, low=-(2**31) + 1) or 0,
        weight=_number(where, value, "weight", above=0) or 1.0,
        monthly_tokens=_integer(where, value, "monthly_tokens", None, low=1),
        models=None if models is None else tuple(models),
    )


def _number(where: str, value: dict[str, Any], name: str, *, above: float) -> float | None:
    number = value.get(name)
    if number is None:
        return None
    good = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    if not good or not above < number <= 1e15:
        raise ValueError(f"{where}: `{name}` must be a number above {above:g}")
    return float(number)


def _integer(where: str, value: dict[str, Any], name: str, default: int | None, *, low: int) -> int | None:
    number = value.get(name, default)
    if number is default:
        return default
    if not isinstance(number, int) or isinstance(number, bool) or not low <= number < 2**53:
        raise ValueError(f"{where}: `{name}` must be an integer of at least {low}")
    return number
