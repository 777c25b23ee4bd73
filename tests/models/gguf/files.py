"""Small GGUF files for the tests: written byte by byte, or by the `gguf` package from what transformers saved."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

# Of values; those of the format.
CODES = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "u64": 10, "i64": 11, "f64": 12}
_PACK = dict(zip(CODES, "BbHhIif?QqD", strict=True)) | {"f64": "d"}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def scalar(kind: str, value: Any) -> bytes:
    """A value with its type before it."""
    return struct.pack("<I", CODES[kind]) + struct.pack(f"<{_PACK[kind]}", value)


def string(value: str | bytes) -> bytes:
    return struct.pack("<I", 8) + text(value)


def array(kind: str, values: list[Any]) -> bytes:
    if kind == "str":
        return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(text(value) for value in values)
    return struct.pack("<IIQ", 9, CODES[kind], len(values)) + struct.pack(f"<{len(values)}{_PACK[kind]}", *values)


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """shape: rows first."""
    sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def file(
    pairs: list[tuple[str, bytes]],
    tensors: list[bytes],
    data: bytes,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(pairs) if num_pairs is None else num_pairs,
    )
    head += b"".join(text(name) + value for name, value in pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


def small_file() -> bytes:
    """Every type of value, and three tensors."""
    pairs = [(kind, scalar(kind, 1)) for kind in CODES]
    pairs += [("text", string("größe")), ("words", array("str", ["a", "", "ü" * 9])), ("none", array("str", []))]
    pairs += [(f"list.{kind}", array(kind, [0, 1, 1])) for kind in CODES]
    tensors = [
        tensor("token_embd.weight", (3, 32), 8, 0),
        tensor("blk.0.attn_norm.weight", (5,), 0, 128),
        tensor("blk.0.ffn_gate_exps.weight", (2, 2, 32), 2, 160),
    ]
    return file(pairs, tensors, np.arange(256, dtype=np.uint8).tobytes())


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
