"""Why a prompt's prefix was cached, or was not: by what CacheHistory has seen.

`explain` is pure and slow (milliseconds): for a thread of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.cache.node import TOKEN_BYTES, Node
from engine.history import Evicted, Visit

# A run of so many tokens that is found elsewhere is no accident.
PROBE_TOKENS = 12
CONTEXT_TOKENS = 12


@dataclass(slots=True)
class Explanation:
    """Why a prompt found no more than it did. Tokens are counted from the prompt's first; times are the history's.

    cause: hit (all that could be was found), first (nobody has come with the like), differs (from the nearest at token
    `first_difference`), evicted, flushed, namespace (found, but under another one), not_cached_yet (the nearest had not
    been computed that far), not_resumable (there, but a window or a state was gone), every_token (the answer needs
    each token of it computed), disabled.
    nearest: the request that agrees the longest, num_common: tokens for which it does. hint: a word more of a
    difference: inserted, left_out, reordered. ours, theirs: token ids around it, `before` of them in common.
    """

    cause: str
    num_prompt: int
    num_cached: int
    num_cacheable: int
    nearest: str | None = None
    num_common: int = 0
    first_difference: int | None = None
    evicted_at: float | None = None
    hint: str | None = None
    before: int = 0
    ours: list[int] = field(default_factory=list)
    theirs: list[int] = field(default_factory=list)


def explain(
    visit: Visit, visits: Sequence[Visit], evictions: Sequence[Evicted], flushed_at: float | None, page_size: int
) -> Explanation:
    """visits, evictions: copies of the history's, the older first."""
    # A step has to sample, so the last token is never found.
    cacheable = max(0, visit.num_prompt - 1) // page_size * page_size
    found = Explanation("hit", visit.num_prompt, visit.num_cached, cacheable)
    if visit.num_cached >= cacheable:
        return found
    if not visit.data:
        found.cause = "disabled"
        return found
    if visit.num_matchable < visit.num_prompt:
        found.cause = "every_token"
        return found
    prompt = visit.data[: visit.num_prompt * TOKEN_BYTES]
    others = [one for one in visits if one.admitted_at <= visit.admitted_at and one is not visit]
    nearest, common = _nearest(prompt, [one for one in others if one.namespace == visit.namespace])
    foreign, elsewhere = _nearest(prompt, [one for one in others if one.namespace != visit.namespace])
    if min(elsewhere, cacheable) // page_size > max(common, visit.num_cached) // page_size:
        assert foreign is not None
        # Whose it was is not told: it belongs to somebody else.
        found.cause, found.num_common = "namespace", elsewhere
        return found
    if nearest is None or not common:
        found.cause = "first"
        return found
    found.nearest, found.num_common = nearest.request_id, common
    if visit.num_known > visit.num_cached and visit.num_known >= common // page_size * page_size:
        found.cause = "not_resumable"
        return found
    if min(common, cacheable) // page_size * page_size > visit.num_cached:
        _explain_gone(found, visit, nearest, evictions, flushed_at, page_size)
        return found
    found.cause, found.first_difference = "differs", common
    _describe_difference(found, prompt, nearest.data, common)
    return found


def _nearest(prompt: bytes, visits: Sequence[Visit]) -> tuple[Visit | None, int]:
    """The newest of those that agree with a prompt the longest, and for how many tokens."""
    best, length = None, 0
    for one in reversed(visits):
        # Not as long as another: one comparison of a few bytes, mostly.
        end = (length + 1) * TOKEN_BYTES
        if len(one.data) >= end and len(prompt) >= end and one.data.startswith(prompt[:end]):
            best, length = one, common_tokens(prompt, one.data)
    return best, length


def common_tokens(one: bytes, other: bytes) -> int:
    """Tokens that two texts begin with."""
    count = min(len(one), len(other)) // TOKEN_BYTES
    differs = np.frombuffer(one, np.int32, count) != np.frombuffer(other, np.int32, count)
    first = int(differs.argmax()) if count else 0
    return first if count and differs[first] else count


def _explain_gone(
    found: Explanation,
    visit: Visit,
    nearest: Visit,
    evictions: Sequence[Evicted],
    flushed_at: float | None,
    page_size: int,
) -> None:
    """The nearest had brought more than was there: it went, or had not come yet."""
    if flushed_at is not None and nearest.admitted_at <= flushed_at <= visit.admitted_at:
        found.cause, found.evicted_at = "flushed", flushed_at
        return
    if (at := _evicted_at(visit, evictions, page_size)) is not None:
        found.cause, found.evicted_at = "evicted", at
    elif nearest.released_at is None or nearest.released_at > visit.admitted_at:
        found.cause = "not_cached_yet"
    else:
        found.cause = "evicted"  # longer ago than is remembered


def _evicted_at(visit: Visit, evictions: Sequence[Evicted], page_size: int) -> float | None:
    """When the page behind what was found went, the last time before this came."""
    page_bytes = page_size * TOKEN_BYTES
    wanted = visit.data[: (visit.num_cached // page_size + 1) * page_bytes]
    lost: dict[Node, bytes] = {}  # by what came later to what came before: in the order of the text

    def way(node: Node | None) -> list[Node]:
        """From the root's child on."""
        nodes = []
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def path(node: Node) -> bytes:
        """The tokens from the root on, with those that the nodes on the way have lost since."""
        return b"".join([one.tokens[: one.length * page_bytes] + lost.get(one, b"") for one in way(node)])

    for event in reversed(evictions):
        start = sum([one.length * page_bytes + len(lost.get(one, b"")) for one in way(event.node)])
        lost[event.node] = lost.get(event.node, b"") + event.data
        is_there = event.at <= visit.admitted_at and start < len(wanted) <= start + len(event.data)
        if is_there and path(event.node).startswith(wanted):
            return event.at
    return None


def _describe_difference(found: Explanation, prompt: bytes, other: bytes, common: int) -> None:
    ours, theirs = np.frombuffer(prompt, np.int32), np.frombuffer(other, np.int32)
    first, end = max(0, common - CONTEXT_TOKENS), common + CONTEXT_TOKENS
    found.before = common - first
    found.ours, found.theirs = ours[first:end].tolist(), theirs[first:end].tolist()
    place, probe = common * TOKEN_BYTES, PROBE_TOKENS * TOKEN_BYTES
    # What follows here, and what follows there: does the other text have it later on?
    mine, its = prompt[place : place + probe], other[place : place + probe]
    theirs_later = len(mine) == probe and _find(other, mine, place) >= 0
    ours_later = len(its) == probe and _find(prompt, its, place) >= 0
    if theirs_later and ours_later:
        found.hint = "reordered"
    elif ours_later:
        found.hint = "inserted"
    elif theirs_later:
        found.hint = "left_out"


def _find(data: bytes, wanted: bytes, start: int) -> int:
    """Where a run of tokens begins from a place on, -1 for nowhere."""
    place = data.find(wanted, start)
    while place >= 0 and place % TOKEN_BYTES:
        place = data.find(wanted, place + 1)
    return place


_NUMBER = re.compile(r"\d")


def is_number(ours: str, theirs: str) -> bool:
    """Whether two texts that differ look like a time, a date or a counter."""
    return bool(_NUMBER.match(ours.lstrip()) and _NUMBER.match(theirs.lstrip()))
