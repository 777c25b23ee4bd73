"""What each token adds to the text, as bytes: the `decoder` field of tokenizer.json turned into a table.

A whole text is then `b"".join(...)` and one UTF-8 pass, and a stream is the same pass cut into pieces, so the two
cannot differ. Used by `tokenizer.py` and `detokenizer.py`; pure, filled on demand, safe on any thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Step = Callable[[str], "str | bytes"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[int, int]:
    """GPT-2's printable stand-ins: code point in a token -> code point below 256 of the byte it means.

    The 188 printable Latin-1 characters mean themselves; the other 68 bytes are U+0100 and up, in order. Characters
    below 256 that mean no byte are sent to U+FFFF, so that encoding as Latin-1 fails on them.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: byte for byte in printable}
    table.update(dict.fromkeys(others, 0xFFFF))
    table.update({0x100 + index: byte for index, byte in enumerate(others)})
    return table


_ALPHABET = _byte_level_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; one with a character outside the alphabet stands for its own UTF-8."""
    try:
        return token.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


@dataclass(frozen=True, slots=True)
class PieceRule:
    """How one token string becomes bytes.

    inner: any token but the first of a text. first: the first one (Metaspace drops its markers there), the same
    object where it makes no difference.
    strip: a byte that is taken off the left end of the whole text up to `strip_count` times.
    """

    inner: Callable[[str], bytes]
    first: Callable[[str], bytes]
    strip: bytes = b""
    strip_count: int = 0


def compile_rule(decoder: dict[str, Any] | None) -> PieceRule | None:
    """The rule of a `decoder` field, None when a token's text depends on more than its place in the text.

    Known: ByteLevel, and sequences of Replace (one character), ByteFallback, Fuse, Strip (left) and Metaspace, which
    covers GPT-2, Llama, Mistral, Gemma, Qwen, DeepSeek, Phi and T5 files.
    """
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    inner_steps: list[Step] = []
    first_steps: list[Step] = []
    fused = False
    strip, strip_count = b"", 0
    inner: Step
    first: Step
    for step in steps:
        kind = step.get("type")
        if kind == "Fuse":
            fused = True
            continue
        if kind == "Strip" and fused and not strip and not step["stop"] and len(step["content"].encode()) == 1:
            strip, strip_count = step["content"].encode(), step["start"]
            continue
        if strip:
            return None  # what follows would see the stripped whole
        if kind == "Replace" and len(step["pattern"].get("String", "")) == 1:
            inner = _replace(step["pattern"]["String"], step["content"])
            first = inner
        elif kind == "ByteFallback" and not fused:
            inner = first = _byte_fallback
        elif kind == "ByteLevel" and not fused:
            inner = first = byte_level_bytes
        elif kind == "Metaspace" and not fused:
            inner = _replace(step["replacement"], " ")
            first = inner if step.get("prepend_scheme") == "never" else _replace(step["replacement"], "")
        elif kind == "Strip" and not fused:
            inner = first = _strip(step["content"], step["start"], step["stop"])
        else:
            return None
        inner_steps.append(inner)
        first_steps.append(first)
    inner_chain = _chain(inner_steps)
    first_chain = inner_chain if first_steps == inner_steps else _chain(first_steps)
    return PieceRule(inner_chain, first_chain, strip, strip_count)


def _replace(pattern: str, content: str) -> Callable[[str], str]:
    return lambda token: token.replace(pattern, content)


def _strip(content: str, left: int, right: int) -> Callable[[str], str]:
    def strip(token: str) -> str:
        start, end = 0, len(token)
        while start < min(left, end) and token[start] == content:
            start += 1
        while end > start and len(token) - end < right and token[end - 1] == content:
            end -= 1
        return token[start:end]

    return strip


def _byte_fallback(token: str) -> str | bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token


def _chain(steps: list[Step]) -> Callable[[str], bytes]:
    """Apply the steps until one gives bytes: a byte is out of reach for the rest."""

    def apply(token: str) -> bytes:
        for step in steps:
            piece = step(token)
            if isinstance(piece, bytes):
                return piece
            token = piece
        return token.encode()

    return apply


class Pieces(dict[int, bytes]):
    """id -> the bytes that it adds to a text, made when first asked for.

    A table for 150k tokens costs 0.2 s and 10 MB to make at once, and a server meets a few thousand of them.
    """

    __slots__ = ("_make",)

    def __init__(self, make: Callable[[int], bytes | None]) -> None:
        self._make = make

    def __missing__(self, token_id: int) -> bytes:
        piece = self._make(token_id)
        if piece is None:
            return b""  # not in the vocabulary (padding of the embedding matrix): not kept, so the table is bounded
        self[token_id] = piece
        return piece


class Texts(dict[int, "str | None"]):
    """id -> its piece as text, or None when the piece is not whole UTF-8 by itself."""

    __slots__ = ("_pieces",)

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces

    def __missing__(self, token_id: int) -> str | None:
        piece = self._pieces[token_id]
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            text = None
        if token_id in self._pieces:
            self[token_id] = text
        return text


class Opening:
    """The start of a text, where a token's bytes depend on what stood before it: one leading space is dropped.

    Feed it the ids that count (neither skipped nor unknown) until `done`; from there on `Pieces` holds.
    """

    __slots__ = ("_first", "_left", "_rule", "done")

    def __init__(self, rule: PieceRule) -> None:
        self._rule = rule
        self._first = rule.first is not rule.inner
        self._left = rule.strip_count
        self.done = not self._first and not self._left

    def feed(self, token: str) -> bytes:
        """The bytes that this token adds at this point."""
        rule = self._rule
        piece = rule.first(token) if self._first else rule.inner(token)
        self._first = False
        while self._left and piece.startswith(rule.strip):
            piece = piece[1:]
            self._left -= 1
        if piece or not self._left:
            self._left = 0
            self.done = True
        return piece
