"""Errors of a translated body, told in the field names of the family that the client speaks. Pure."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

from engine.request import RequestError

_QUOTED = re.compile(r"`([^`]+)`")
# Where a field's name ends and its inner path begins.
_PATH = re.compile(r"[.\[]")
_INDEX = re.compile(r"\[\d+\]")


@contextlib.contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """RequestErrors from inside name fields as `names` says: our name of a field to the client's.

    The longest name that is a whole leading part of a path counts. `[]` in a name is any place of a list, and stands
    for the same one in the client's.
    """
    try:
        yield
    except RequestError as error:
        if error.param is not None:
            error.param = _rename(error.param, names)
        error.args = (_QUOTED.sub(lambda found: f"`{_rename(found[1], names)}`", str(error)),)
        raise


def _rename(path: str, names: Mapping[str, str]) -> str:
    indices = iter(_INDEX.findall(path))
    bare = _INDEX.sub("[]", path)
    ends = [len(bare), *(found.start() for found in _PATH.finditer(bare))]
    known = max((end for end in ends if bare[:end] in names), default=0)
    if not known:
        return path
    # Parts that nobody indexed, as in a text between quotes, stay as they are.
    return re.sub(r"\[\]", lambda empty: next(indices, empty[0]), names[bare[:known]] + bare[known:])
