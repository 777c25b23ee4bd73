"""GGUF files: their metadata and where their tensors lie, checked before a byte of them is used.

Little endian: "GGUF", u32 version, u64 tensors, u64 pairs; each pair is a string, a u32 type and a value; each tensor
is a string, u32 dimensions, u64 each of them (the contiguous one first), u32 type, u64 offset from the start of the
data, which is aligned. Files come from strangers: nothing is allocated by a count that the file's size does not bear
out. Imports no torch.
"""

from __future__ import annotations

import functools
import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from engine.config import StartupError
from engine.models.gguf.types import TYPES

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
# As ggml has it.
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 1 << 16
# Smallest possible pair (an empty key and one byte) and tensor (no name, no dimension).
_MIN_PAIR_BYTES = 13
_MIN_TENSOR_BYTES = 24
# More parts are a typing error.
_MAX_PARTS = 1000
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies: absolute byte offsets [begin, end) in `file`.

    type: a name of types.py. shape: rows first.
    """

    file: Path
    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class _Words:
    """An array of strings, read when it is asked for."""

    offset: int
    count: int


class GGUF:
    """A model: the metadata of its first file and the tensors of all. Values are numbers, text and lists of them."""

    def __init__(self, path: Path, values: dict[str, Any], tensors: dict[str, Tensor], mapped: mmap.mmap) -> None:
        self.path = path
        self.tensors = tensors
        self._values = values
        self._mapped = mapped

    def weights(self) -> tuple[str, int]:
        """The type that takes most of the bytes, and the bytes of all tensors."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.end - tensor.begin
        return max(sizes, key=lambda name: sizes[name], default="F32"), sum(sizes.values())

    def fail(self, name: str, problem: str) -> NoReturn:
        """Raise the one line that a user gets: file, key, problem."""
        raise StartupError(f"{self.path}: {name} {problem}")

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> Any:
        """A value, None where there is none; an array is a list."""
        value = self._values.get(name)
        if isinstance(value, _Words):
            return self._words(value)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def array(self, name: str) -> NDArray[Any] | None:
        """The numbers of an array, None where there is none. Raises StartupError where it is something else."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, np.ndarray):
            self.fail(name, "must be an array of numbers")
        return value

    def words(self, name: str) -> list[str] | None:
        """The strings of an array, None where there is none. Raises StartupError where it is something else."""
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, np.ndarray) and not len(value):
            return []
        if not isinstance(value, _Words):
            self.fail(name, "must be an array of strings")
        return self._words(value)

    def text(self, name: str) -> str | None:
        """A string, None where there is none. Raises StartupError where it is something else."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            self.fail(name, "must be a string")
        return value

    def _words(self, array: _Words) -> list[str]:
        # Checked when the file was read.
        data, at, found = self._mapped, array.offset, []
        for _ in range(array.count):
            end = at + 8 + _U64.unpack_from(data, at)[0]
            found.append(data[at + 8 : end].decode(errors="replace"))
            at = end
        return found


def is_gguf(path: Path) -> bool:
    """Whether a model is such a file."""
    return path.suffix.lower() == SUFFIX


def find_gguf(directory: Path) -> Path | None:
    """The one GGUF model in a directory, its first part; None where there is none. Raises StartupError for several.

    What is beside a language model does not count: files whose names begin with `mmproj` or `mtp-`.
    """
    found = [path for path in sorted(directory.glob(f"*{SUFFIX}")) if not path.name.startswith(("mmproj", "mtp-"))]
    first = [path for path in found if (match := _PART.fullmatch(path.name)) is None or int(match[2]) == 1]
    if len(first) > 1:
        names = ", ".join(path.name for path in first[:5])
        raise StartupError(f"{directory}: holds several models ({names}{', ...' if len(first) > 5 else ''}); name one")
    return first[0] if first else found[0] if found else None


def model_name(path: Path) -> str:
    """What a file is called in the API: its name without the ending and the number of the part."""
    match = _PART.fullmatch(path.name)
    return match[1] if match else path.stem


def open_gguf(path: Path) -> GGUF:
    """The model of a file, all of its parts. Raises StartupError."""
    try:
        stat = path.stat()
    except OSError as error:
        raise StartupError(f"{path}: cannot be read: {error.strerror}") from None
    return _open(path, stat.st_mtime_ns, stat.st_size)


# The start asks several times, for the config, the tokenizer and the weights.
@functools.lru_cache(maxsize=1)
def _open(path: Path, changed: int, size: int) -> GGUF:
    first, total = path, 1
    if match := _PART.fullmatch(path.name):
        total = int(match[3])
        if not 1 <= int(match[2]) <= total <= _MAX_PARTS:
            raise StartupError(f"{path}: its name says part {int(match[2])} of {total}")
        first = path.with_name(f"{match[1]}-00001-of-{match[3]}{SUFFIX}")
    head = _Header(first)
    count = head.values.get("split.count", 1)
    # A set of one may say 0, too.
    if total == 1 and isinstance(count, int) and count > 1:
        raise StartupError(f"{path}: is part of {count}; their names must end in -00001-of-{count:05d}{SUFFIX}")
    tensors = dict(head.tensors)
    for number in range(2, total + 1):
        assert match is not None
        part = path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}{SUFFIX}")
        if not part.is_file():
            raise StartupError(f"{part}: is not there; the model is in {total} files. Is the download complete?")
        for name, tensor in _Header(part).tensors.items():
            if name in tensors:
                raise StartupError(f"{part}: tensor {_shown(name)} is in {tensors[name].file.name}, too")
            tensors[name] = tensor
    expected = head.values.get("split.tensors.count")
    if total > 1 and isinstance(expected, int) and expected != len(tensors):
        raise StartupError(f"{first}: split.tensors.count is {expected}, but the files hold {len(tensors)} tensors")
    return GGUF(first, head.values, tensors, head.mapped)


class _Header:
    """One file's metadata and tensors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0
        self.mapped = self._map()
        self._size = len(self.mapped)
        try:
            self.values, self.tensors = self._read()
        except _Problem as problem:
            raise StartupError(f"{path}: {problem}") from None

    def _map(self) -> mmap.mmap:
        try:
            with self._path.open("rb") as file:
                start = file.read(8)
                if start.startswith(b"version "):
                    raise StartupError(f"{self._path}: is a pointer of Git LFS; `git lfs pull` fetches the file itself")
                if start[:4] != _MAGIC:
                    raise StartupError(f"{self._path}: is no GGUF file: it begins with {start[:4]!r}")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) else str(error)
            raise StartupError(f"{self._path}: cannot be read: {text}") from None

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        self._take(4, "magic")
        version = self._u32("version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in _VERSIONS:
                raise _Problem("is a big-endian GGUF file; only little-endian ones are read")
            raise _Problem(f"is of GGUF version {version}; only {' and '.join(map(str, _VERSIONS))} are read")
        num_tensors = self._count("number of tensors", _MIN_TENSOR_BYTES)
        num_pairs = self._count("number of metadata pairs", _MIN_PAIR_BYTES)
        values: dict[str, Any] = {}
        for number in range(num_pairs):
            name = self._name(f"key {number}")
            if name in values:
                raise _Problem(f"key {_shown(name)} stands twice")
            values[name] = self._value(self._u32(f"type of {_shown(name)}"), _shown(name))
        entries = [self._entry(number) for number in range(num_tensors)]
        return values, self._place(entries, self._alignment(values))

    def _alignment(self, values: dict[str, Any]) -> int:
        alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise _Problem(f"general.alignment must be a power of two up to {_MAX_ALIGNMENT}, not {alignment!r:.40}")
        return alignment

    def _entry(self, number: int) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (rows first), type and offset of a tensor."""
        name = self._name(f"name of tensor {number}")
        shown = f"tensor {_shown(name)}"
        dimensions = self._u32(f"dimensions of {shown}")
        if dimensions > _MAX_DIMENSIONS:
            raise _Problem(f"{shown} has {dimensions} dimensions, more than {_MAX_DIMENSIONS}")
        sizes = [self._u64(f"shape of {shown}") for _ in range(dimensions)]
        kind = self._u32(f"type of {shown}")
        if kind not in TYPES:
            raise _Problem(f"{shown} has the unknown type {kind}")
        return name, tuple(reversed(sizes)), kind, self._u64(f"offset of {shown}")

    def _place(self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, Tensor]:
        data = -(-self._at // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        for name, shape, kind, offset in entries:
            block, shown = TYPES[kind], f"tensor {_shown(name)}"
            if name in tensors:
                raise _Problem(f"{shown} stands twice")
            width = shape[-1] if shape else 1
            if width % block.elements:
                raise _Problem(f"{shown} has rows of {width} elements, and {block.name} has blocks of {block.elements}")
            if offset % alignment:
                raise _Problem(f"{shown} begins at {offset}, which is no multiple of the alignment {alignment}")
            begin = data + offset
            end = begin + math.prod(shape) // block.elements * block.size
            if end > self._size:
                raise _Problem(f"{shown} ends at byte {end} of a file of {self._size}: truncated")
            tensors[name] = Tensor(self._path, block.name, shape, begin, end)
        last, before = data, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if tensor.begin < last and tensor.end > tensor.begin:
                raise _Problem(f"tensor {_shown(name)} overlaps with {_shown(before)}")
            last, before = max(last, tensor.end), name
        return tensors

    # What a header is made of; each step stays inside the file.

    def _take(self, count: int, what: str) -> int:
        """The place of the next `count` bytes, which are passed."""
        at = self._at
        if count > self._size - at:
            raise _Problem(f"{what} needs {count} bytes at {at} of a file of {self._size}: truncated")
        self._at = at + count
        return at

    def _u32(self, what: str) -> int:
        number: int = _U32.unpack_from(self.mapped, self._take(4, what))[0]
        return number

    def _u64(self, what: str) -> int:
        number: int = _U64.unpack_from(self.mapped, self._take(8, what))[0]
        return number

    def _count(self, what: str, smallest: int) -> int:
        """How many things follow, each of `smallest` bytes or more."""
        count = self._u64(what)
        if count > (self._size - self._at) // smallest:
            raise _Problem(f"{what} is {count}, more than a file of {self._size} bytes has room for")
        return count

    def _bytes(self, what: str) -> bytes:
        length = self._count(f"length of {what}", 1)
        at = self._take(length, what)
        return self.mapped[at : at + length]

    def _name(self, what: str) -> str:
        text = self._bytes(what)
        if len(text) > _MAX_NAME_BYTES:
            raise _Problem(f"{what} has {len(text)} bytes")
        return self._decoded(text, what)

    @staticmethod
    def _decoded(text: bytes, what: str) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise _Problem(f"{what} is not UTF-8") from None

    def _value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self._decoded(self._bytes(what), what)
        if kind in _SCALARS:
            number = self._numbers(kind, 1, what)[0]
            # 0.7 and not what its float32 is in 64 bits: configs are written in decimals.
            return float(str(number)) if kind == _FLOAT32 else number.item()
        if kind != _ARRAY:
            raise _Problem(f"{what} has the unknown type {kind}")
        kind = self._u32(f"element type of {what}")
        if kind == _STRING:
            return self._skip_words(what)
        if kind not in _SCALARS:
            raise _Problem(f"{what} is an array of the unknown type {kind}")
        return self._numbers(kind, self._count(f"length of {what}", _SCALARS[kind].itemsize), what)

    def _numbers(self, kind: int, count: int, what: str) -> NDArray[Any]:
        dtype = _SCALARS[kind]
        at = self._take(count * dtype.itemsize, what)
        data = self.mapped[at : at + count * dtype.itemsize]
        # A byte above 1 is no bool that numpy knows.
        return np.frombuffer(data, dtype="u1") != 0 if kind == _BOOL else np.frombuffer(data, dtype=dtype)

    def _skip_words(self, what: str) -> _Words:
        count = self._count(f"length of {what}", 8)
        begin = at = self._at
        data, last, unpack = self.mapped, self._size - 8, _U64.unpack_from
        for number in range(count):
            if at > last:
                raise _Problem(f"string {number} of {what} begins at {at} of a file of {self._size}: truncated")
            at += 8 + unpack(data, at)[0]
        if at > self._size:
            raise _Problem(f"{what} ends at byte {at} of a file of {self._size}: truncated")
        self._at = at
        return _Words(begin, count)


class _Problem(Exception):
    """What is wrong with a file."""


def _shown(name: str) -> str:
    """A name of the file, fit for one line."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= 80 else text[:77] + "..."
