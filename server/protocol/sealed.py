"""Summaries of conversations as items of /v1/responses carry them: opaque to clients, and no secret.

`encrypted_content` is the text in base64 behind a word of ours, so that any server of this kind reads it back. Pure.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

# The second is what Codex called it first.
KINDS = ("compaction", "compaction_summary")
_PREFIX = "oneloop:"


def seal(text: str) -> str:
    """The `encrypted_content` of a summary."""
    return _PREFIX + base64.b64encode(text.encode("utf-8", "replace")).decode()


def unseal(item: dict[str, Any]) -> str | None:
    """The summary that an item holds; None where it is none of ours."""
    content = item.get("encrypted_content")
    if item.get("type") not in KINDS or not isinstance(content, str) or not content.startswith(_PREFIX):
        return None
    try:
        return base64.b64decode(content.removeprefix(_PREFIX), validate=True).decode()
    except (binascii.Error, ValueError):
        return None
