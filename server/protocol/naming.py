"""Errors of a translated body, told in the field names of the family that the client speaks. Pure."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

from engine.request import RequestError

_QUOTED = re.compile(r"`([^`]+)`")
# Where a field's name ends and its inner path begins.
_PATH = re.compile(r"[.\[]")


@contextlib.contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """RequestErrors from inside name fields as `names` says: our name of a field to the client's.

    The longest name that is a whole leading part of a path counts. A name that begins with a dot is replaced wherever
    it stands in a path.
    """
    try:
        yield
    except RequestError as error:
        if error.param is not None:
            error.param = _rename(error.param, names)
        error.args = (_QUOTED.sub(lambda found: f"`{_rename(found[1], names)}`", str(error)),)
        raise


def _rename(path: str, names: Mapping[str, str]) -> str:
    ends = [len(path), *(found.start() for found in _PATH.finditer(path))]
    known = max((end for end in ends if path[:end] in names), default=0)
    if known:
        path = names[path[:known]] + path[known:]
    for inner, other in names.items():
        if inner.startswith("."):
            path = path.replace(inner, other)
    return path
