"""What a compiled library of kernels says of itself: what it exports, what it wants of others, which GPUs it is for.

Read from the file (ELF, and the fat binaries in it), so that neither a GPU nor CUDA's own tools are needed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Section types of ELF.
DYNAMIC, DYNSYM, VERSIONS = 6, 11, 0x6FFFFFFF
NEEDED, WEAK = 1, 2
FAT_BINARY, CUBIN = 0xBA55ED50, 2
# How a library names a function that Python may call.
EXPORT = "__tvm_ffi_"
# FlashInfer's fa2 refers to tiles of 32 queries that it neither compiles nor ever chooses.
NEVER_CALLED = re.compile(r"BatchPrefillWith(Paged|Ragged)KVCacheDispatchedI(Lb[01]E)?Lj32E")
DRIVER, DRIVER_CALL = "libcuda.so.1", re.compile(r"cu[A-Z]")


@dataclass(frozen=True)
class Library:
    """needed: libraries it is linked to. exported, undefined: symbols; an undefined one is bound to no library by name.

    architectures: those of its GPU code, 90 of sm_90a.
    """

    needed: tuple[str, ...]
    exported: frozenset[str]
    undefined: frozenset[str]
    architectures: frozenset[int]

    @property
    def functions(self) -> frozenset[str]:
        """What Python may call."""
        return frozenset(name.removeprefix(EXPORT) for name in self.exported if name.startswith(EXPORT))

    @property
    def unresolved(self) -> list[str]:
        """Symbols that nothing will bring when they are first needed, which ends the process."""
        return sorted(
            name
            for name in self.undefined
            # tvm-ffi, which loads the library, brings its own.
            if not name.startswith("TVMFFI")
            and NEVER_CALLED.search(name) is None
            and not (DRIVER in self.needed and DRIVER_CALL.match(name))
        )


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    content: bytes
    link: int


def read_library(content: bytes) -> Library:
    """Raises ValueError for what is no shared library of a 64-bit machine."""
    try:
        sections = _sections(content)
        symbols = list(_symbols(sections))
        needed = tuple(_needed(sections))
        architectures = frozenset(each for s in sections if s.name == ".nv_fatbin" for each in _cubins(s.content))
    except (struct.error, IndexError, UnicodeDecodeError):
        raise ValueError("it is cut or damaged") from None
    if not symbols:
        raise ValueError("it exports nothing")
    exported = frozenset(name for name, defined, _ in symbols if defined)
    return Library(
        needed, exported, frozenset(n for n, defined, bound in symbols if not defined and not bound), architectures
    )


def _text(content: bytes, begin: int) -> str:
    return content[begin : content.index(b"\0", begin)].decode()


def _sections(content: bytes) -> list[_Section]:
    # 64 bits, little-endian, a shared object.
    if content[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", content, 16)[0] != 3:
        raise ValueError("it is no shared library")
    (begin,) = struct.unpack_from("<Q", content, 40)
    size, count, names = struct.unpack_from("<HHH", content, 58)
    headers = [struct.unpack_from("<IIQQQQI", content, begin + size * i) for i in range(count)]
    if not headers:
        raise ValueError("it has no sections")
    start = headers[names][4]
    return [
        # A section of type 8 has a size, but no bytes in the file.
        _Section(_text(content, start + name), kind, content[at : at + length] if kind != 8 else b"", link)
        for name, kind, _, _, at, length, link in headers
    ]


def _symbols(sections: list[_Section]) -> Iterator[tuple[str, bool, bool]]:
    """(name, whether it is defined here, whether it may stay unknown or is bound to a library that is named)."""
    versions = next((s.content for s in sections if s.kind == VERSIONS), b"")
    for table in (s for s in sections if s.kind == DYNSYM):
        strings = sections[table.link].content
        for number in range(1, len(table.content) // 24):
            name, info, _, section = struct.unpack_from("<IBBH", table.content, 24 * number)
            version = struct.unpack_from("<H", versions, 2 * number)[0] & 0x7FFF if versions else 0
            yield _text(strings, name), section != 0, info >> 4 == WEAK or version > 1


def _needed(sections: list[_Section]) -> Iterator[str]:
    for table in (s for s in sections if s.kind == DYNAMIC):
        for tag, value in struct.iter_unpack("<QQ", table.content):
            if tag == NEEDED:
                yield _text(sections[table.link].content, value)


def _cubins(content: bytes) -> Iterator[int]:
    """Architectures of the machine code in fat binaries, which begin at multiples of 8."""
    at = 0
    while at + 16 <= len(content):
        magic, _, header, size = struct.unpack_from("<IHHQ", content, at)
        if magic != FAT_BINARY:
            at += 8
            continue
        at += header
        end = at + size
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", content, at)
            (architecture,) = struct.unpack_from("<I", content, at + 28)
            if header == 0:
                raise ValueError("a fat binary in it is damaged")
            if kind == CUBIN:
                yield architecture
            at += header + size
