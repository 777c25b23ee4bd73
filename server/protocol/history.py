"""What parts of messages say to a model that reads text: of any kind, for no client can change its history.

Text stays text, what stands for something else is named by a bracketed word. Only in the user's newest turn is a
picture or a file an error: it is what the answer was to be about. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from server.protocol.body import invalid
from server.protocol.ignored import clean, ignore

# What a turn is to `newest_turn`.
Turn = Literal["user", "assistant", "result", "other"]

_WORDS = {"image": "image", "audio": "audio", "video": "video", "file": "file", "document": "document"}
_MEDIA = {
    **_WORDS,
    "image_url": "image",
    "input_image": "image",
    "output_image": "image",
    "image_file": "image",
    "computer_screenshot": "image",
    "input_audio": "audio",
    "output_audio": "audio",
    "audio_url": "audio",
    "input_video": "video",
    "video_url": "video",
    "input_file": "file",
    "file_url": "file",
    "container_upload": "file",
}
# Stand for nothing that a model could read: secrets of other servers, and calls that these have made themselves.
_SILENT = frozenset(
    ["redacted_thinking", "reasoning_encrypted", "encrypted_content", "server_tool_use", "mcp_tool_use", "fallback"]
)
# Where text is in what other programs wrote.
_TEXT_KEYS = ("text", "stdout", "stderr", "logs", "title", "refusal")
# And what holds more of it.
_HOLDERS = ("content", "output", "summary", "tool_references")
# Of the name of a document, which is only a label.
_MAX_TITLE = 200


def newest_turn(turns: Sequence[Turn]) -> int | None:
    """The place of the user's newest message; None where the assistant or a tool has been at it since it was sent.

    What a program puts behind the result of a tool (a file that was read, say) is no word of the user's.
    """
    found: int | None = None
    for place in range(len(turns) - 1, -1, -1):
        if turns[place] == "result" or (turns[place] == "assistant" and found is None):
            return None
        if turns[place] == "assistant":
            break
        if turns[place] == "user" and found is None:
            found = place
    return found


def read_part(part: Any, where: str, *, newest: bool = False) -> str | None:
    """The text of one part of a content; None where it has nothing to say. newest: in the user's newest turn.

    Raises RequestError for what is no part at all, and for what the newest turn asks about and nobody can read.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or not kind:
        raise invalid(where, "must be an object with a `type`")
    if kind in ("text", "input_text", "output_text", "summary_text", "reasoning_text"):
        return _string(part.get("text"), f"{where}.text")
    if kind == "refusal":
        return _string(part.get("refusal"), f"{where}.refusal")
    if kind == "document" and (text := _document(part)) is not None:
        return text
    if kind == "tool_reference":
        return _reference(part)
    if kind == "search_result":
        return _titled("search_result", [part.get("title"), part.get("source")], texts_in(part.get("content")))
    if kind in _MEDIA:
        if newest:
            raise invalid(where, f"is of type {clean(kind)!r}; this model reads text only")
        ignore("content", kind)
        return f"[{_MEDIA[kind]} left out: this model reads text only]"
    ignore("content", kind)
    if kind in _SILENT:
        return None
    said = texts_in({name: value for name, value in part.items() if name != "type"})
    return _titled(clean(kind), [], said) if said else f"[{clean(kind)} left out]"


def read_parts(content: Any, where: str, *, newest: bool = False) -> list[str]:
    """The texts of a content that is a list of parts."""
    texts = (read_part(part, f"{where}[{index}]", newest=newest) for index, part in enumerate(content))
    return [text for text in texts if text is not None]


def of_result(content: Any) -> Any:
    """What a tool gave back, as a text or a list of parts: programs send on whatever their function returned."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        if all(isinstance(part, dict) and "type" in part for part in parts):
            return parts
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def texts_in(value: Any) -> list[str]:
    """Every text that a block of any kind holds, in its order. value: nested no deeper than a body may be."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    if not isinstance(value, dict):
        return []
    kind = value.get("type")
    if kind == "document" and (text := _document(value)) is not None:
        # A page that was fetched.
        return [text]
    if kind == "tool_reference":
        return [_reference(value)]
    found: list[str] = []
    for name, inner in value.items():
        if name in _TEXT_KEYS or (name in _HOLDERS and isinstance(inner, str | list | dict)):
            found += texts_in(inner)
    return found


def _string(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise invalid(where, "must be a string")
    return value


def _document(part: dict[str, Any]) -> str | None:
    """The text of a document that is one."""
    source = part.get("source")
    if not isinstance(source, dict) or source.get("type") not in ("text", "content"):
        return None
    said = texts_in(source.get("data") if source["type"] == "text" else source.get("content"))
    return _titled("document", [part.get("title"), part.get("context")], said)


def _reference(part: dict[str, Any]) -> str:
    return f"[tool_reference: {_label(part.get('tool_name'))}]"


def _titled(kind: str, labels: Iterable[Any], said: list[str]) -> str:
    name = ", ".join(_label(label) for label in labels if isinstance(label, str) and label)
    return "\n".join([f"[{kind}: {name}]" if name else f"[{kind}]", *said])


def _label(value: Any) -> str:
    return " ".join(value[:_MAX_TITLE].split()) if isinstance(value, str) else ""
