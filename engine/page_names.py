"""Names of pages: a chain of SHA-256 over all tokens up to a page's end, begun by whose page it is.

Equal names stand for equal keys and values, so that what a page holds can be found again elsewhere, or later.
"""

from __future__ import annotations

import hashlib

_TOKEN_BYTES = 4  # int32


def root_name(*words: str) -> bytes:
    """Where a chain begins: a name of its own for every list of words."""
    digest = hashlib.sha256()
    for word in words:
        data = word.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def page_names(parent: bytes, data: bytes, page_size: int, first: int, end: int) -> list[bytes]:
    """32 bytes for each page from `first` on, before `end`. parent: the name before the first of them. data: int32
    bytes of the tokens from the sequence's first on."""
    width, names = page_size * _TOKEN_BYTES, []
    for index in range(first, end):
        parent = hashlib.sha256(parent + data[index * width : (index + 1) * width]).digest()
        names.append(parent)
    return names
