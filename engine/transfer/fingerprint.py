"""Which weights wrote a page: a name that two servers give alike to the same checkpoint, and to no other.

All of config.json, and of files of weights their names, sizes and bytes. Where something else tells whether they have
changed (the time of a file on this machine), samples of the bytes will do: gigabytes are then not read again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_WEIGHTS = (".safetensors", ".gguf", ".bin")
_SAMPLES = 16
_SAMPLE_BYTES = 16 * 1024
_PIECE_BYTES = 1 << 22


def fingerprint(checkpoint: Path, *options: object, whole: bool = True) -> str:
    """Of a directory or a GGUF file. options: what else decides what is computed, as far as it has a stable repr.
    whole: all bytes count, about a second for 1.5 GB; else samples."""
    digest = hashlib.sha256(repr(options).encode("utf-8", "surrogateescape"))
    files = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.iterdir())
    for file in files:
        if not file.is_file() or not (file.name == "config.json" or file.suffix in _WEIGHTS):
            continue
        size = file.stat().st_size
        # A file that was given alone may have any name.
        digest.update(f"\0{file.name if file is not checkpoint else ''}\0{size}\0".encode("utf-8", "surrogateescape"))
        with file.open("rb") as opened:
            if whole or file.suffix not in _WEIGHTS or size <= _SAMPLES * _SAMPLE_BYTES:
                while piece := opened.read(_PIECE_BYTES):
                    digest.update(piece)
                continue
            for sample in range(_SAMPLES):
                opened.seek(sample * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
