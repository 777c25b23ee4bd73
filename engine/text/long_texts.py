"""Texts of megabytes, tokenised piece by piece: the library works without the interpreter's lock, but what it found
becomes a Python list in one call, which a million ids make 60 ms long. Any thread but the loop's.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

# Characters of a piece, about: 15,000 ids, 1 ms.
PIECE = 64 * 1024
# Ids of a longer prompt are kept as an array: as a list they take 36 bytes each, and a millisecond to become one.
MIN_PACKED = 16 * 1024

# A word's end: few tokenizers join what is on its two sides.
_CUT = re.compile(r"(?<=\w)(?=\W)")
_BREAK = re.compile(r"\W")
# Whether one does is tried with so many characters on each side, at so many places before the text is left as it is.
_AROUND = 512
_TRIES = 8


def cut_text(text: str, encode: Callable[[str], list[int]]) -> Iterator[str]:
    """The text in pieces whose ids, one behind the other, are those of the whole. encode: without special tokens.

    Where no such place is found a piece has what is left, however long.
    """
    start, place = 0, PIECE
    while len(text) - place > PIECE:
        tried = False
        for match in islice(_CUT.finditer(text, place, place + PIECE), _TRIES):
            cut, tried = match.start(), True
            left, right = text[max(start, cut - _AROUND) : cut], text[cut : cut + _AROUND]
            # A run that is longer than what is tried goes on otherwise than it does there.
            if _BREAK.search(left) and encode(left + right) == encode(left) + encode(right):
                yield text[start:cut]
                start, place = cut, cut + PIECE
                break
        else:
            if tried:
                break
            place += PIECE
    yield text[start:]


def packed(ids: list[int]) -> Sequence[int]:
    """The ids of a prompt, many as an array of 32 bits each. Takes them out of the list on the way."""
    if len(ids) < MIN_PACKED:
        return ids
    found = copied(ids)
    # A million objects at once take 30 ms to go.
    while ids:
        del ids[-MIN_PACKED:]
    return found


def copied(ids: Sequence[int]) -> array[int]:
    """The same as an array, some at a time: threads take turns between calls alone."""
    found = array("i")
    for start in range(0, len(ids), MIN_PACKED):
        found.extend(ids[start : start + MIN_PACKED])
    return found
