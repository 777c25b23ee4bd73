"""A long text in segments that a tokenizer reads one by one, and their ids kept: a conversation that grows is not
tokenised again.

A segment begins with a special token that the library takes out of the raw text before anything else looks at it, so
what stands before it cannot change the ids behind it. Only tokens where that is certain are cut at. Any thread.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from tokenizers import AddedToken

# Segments below this are tokenised anew, together with their neighbours: a call for each would cost more.
MIN_SEGMENT = 256
# Characters and ids that are kept, both together.
MOST_KEPT = 16 * 1024 * 1024


def cut_tokens(added: dict[int, AddedToken]) -> dict[str, int]:
    """Tokens whose every occurrence in a raw text is that token, and their ids.

    The library looks for the leftmost of the tokens that it does not normalise, and of several at one place for the
    longest. So no other of them may begin with this one, hold it, or end with its beginning (nor it with its own).
    Those that take the space around them with them, or want a word's end there, look at their neighbours.
    """
    raw = {token.content: token_id for token_id, token in added.items() if not token.normalized and token.content}
    neighbours = any(token.single_word and not token.normalized for token in added.values())
    found = {}
    for token_id, token in added.items():
        text = token.content
        if raw.get(text) != token_id or token.lstrip or token.rstrip or token.single_word or not token.special:
            continue
        if text != text.strip() or len(text) < 2:
            continue
        if neighbours and (text[0].isalnum() or text[0] == "_"):
            # Before it one that wants a word's end is none; at the end of a segment it would be.
            continue
        found[text] = token_id
    taken = _held(raw, found) | _begun(raw, found)
    return {text: token_id for text, token_id in found.items() if text not in taken}


def _held(raw: Iterable[str], texts: Iterable[str]) -> set[str]:
    """Those of `texts` that a longer one holds, by what is as long as one of them: a model may reserve thousands."""
    wanted = set(texts)
    sizes = {len(text) for text in wanted}
    return {
        part
        for other in raw
        for size in sizes
        for place in range(len(other) - size + 1)
        if size < len(other) and (part := other[place : place + size]) in wanted
    }


def _begun(raw: Iterable[str], texts: Iterable[str]) -> set[str]:
    """Those of `texts` whose beginning is the end of one, of their own as well."""
    ends = {other[place:] for other in raw for place in range(1, len(other))}
    return {text for text in texts if any(text[:size] in ends for size in range(1, len(text)))}


class Segments:
    """encode: ids of a text without special tokens around it."""

    def __init__(self, cuts: dict[str, int], encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._ids = frozenset(cuts.values())
        self._pattern = re.compile("|".join(map(re.escape, cuts))) if cuts else None
        # By whether it begins the text, and the segment. Ids in 4 bytes each: as a list they would take 36.
        self._kept: OrderedDict[tuple[bool, str], array[int]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """The ids of a text; the same as those of the whole, whatever is kept."""
        if self._pattern is None:
            return self._encode(text)
        ids: list[int] = []
        pending: list[str] = []
        begins = True
        for place, segment in enumerate(self._split(text)):
            known = self._find((place == 0, segment))
            if known is None:
                pending.append(segment)
                continue
            ids += self._encode_run(pending, begins=begins)
            ids += known
            pending, begins = [], False
        return ids + self._encode_run(pending, begins=begins)

    def _split(self, text: str) -> Iterator[str]:
        assert self._pattern is not None
        start = 0
        for match in self._pattern.finditer(text):
            if match.start() > start:
                yield text[start : match.start()]
                start = match.start()
        if start < len(text):
            yield text[start:]

    def _encode_run(self, segments: list[str], *, begins: bool) -> list[int]:
        """Neighbours at once; their ids are kept one by one where they fall apart as the text does."""
        if not segments:
            return []
        ids = self._encode("".join(segments))
        if any(len(segment) >= MIN_SEGMENT for segment in segments):
            starts = [place for place, token_id in enumerate(ids) if token_id in self._ids]
            if not starts or starts[0] != 0:
                starts.insert(0, 0)
            if len(starts) == len(segments):
                for place, segment in enumerate(segments):
                    if len(segment) >= MIN_SEGMENT:
                        end = starts[place + 1] if place + 1 < len(starts) else len(ids)
                        self._keep((begins and place == 0, segment), ids[starts[place] : end])
        return ids

    def _find(self, key: tuple[bool, str]) -> array[int] | None:
        if len(key[1]) < MIN_SEGMENT:
            return None
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
            return known

    def _keep(self, key: tuple[bool, str], ids: list[int]) -> None:
        size = len(key[1]) + len(ids)
        if size > MOST_KEPT // 4:
            return
        with self._lock:
            if key not in self._kept:
                self._kept[key] = array("I", ids)
                self._size += size
            while self._size > MOST_KEPT:
                (_, segment), old = self._kept.popitem(last=False)
                self._size -= len(segment) + len(old)
