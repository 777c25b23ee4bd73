"""Which modules config.json means: exact names, regular expressions, wildcards, classes.

Names are those of the checkpoint. A pattern comes from a stranger's file: one that cannot be compiled is an error.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from functools import lru_cache

from engine.models.loading.schemes.base import Mismatch

# What stands before the names of a model's parts in one class and not in another.
_WRAPPERS = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")


@lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """Raises Mismatch."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        raise Mismatch(f"{pattern!r:.60} in quantization_config is no regular expression") from None


def means(pattern: str, module: str) -> bool:
    """As compressed-tensors: a whole name, or `re:` and an expression that fits from its start on. Raises Mismatch."""
    if pattern.startswith("re:"):
        return compiled(pattern[3:]).match(module) is not None
    return pattern == module


def fits_wildcard(patterns: Iterable[str], module: str) -> bool:
    """As modelopt."""
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)


def aliases(module: str) -> list[str]:
    """The name, and what it may be called where the model is, or is not, a part of another one."""
    found = [module]
    for wrapper in _WRAPPERS:
        if wrapper and module.startswith(wrapper):
            found += [other + module.removeprefix(wrapper) for other in _WRAPPERS]
            break
    return list(dict.fromkeys(found))
