"""What no server needs of torch, a third of the time that importing it takes, is imported when somebody asks for it.

A stand-in takes a module's place in sys.modules: the first attribute that it lacks imports the module in earnest,
behind which it hands on what it is asked. Without `begin` torch is as it always is, so in processes of others. Only for
modules without parts of their own, which may come before them. Of what they import in turn nobody else may need what it
does: here it is the class of torch.Generator, which cannot be called (ops/invariance.seeded can).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

# What "meta" tensors need of operators that torch has written in Python.
NAMES = ("torch._meta_registrations",)


class _Finder(MetaPathFinder):
    """The first on sys.meta_path, with `names` yet to be asked for."""

    def __init__(self) -> None:
        self.names = set(NAMES)
        self.lock = threading.Lock()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See MetaPathFinder."""
        if fullname not in self.names:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _Loader(self)
        return spec


class _Loader(Loader):
    """Makes a stand-in."""

    def __init__(self, finder: _Finder) -> None:
        self._finder = finder

    def exec_module(self, module: ModuleType) -> None:
        """See Loader."""
        name, finder = module.__name__, self._finder

        def asked(attribute: str) -> Any:
            with finder.lock:
                finder.names.discard(name)
                if sys.modules.get(name) is module:
                    del sys.modules[name]
            # Importing has locks of its own, which know what waits for what: none of ours is held.
            return getattr(importlib.import_module(name), attribute)

        module.__getattr__ = asked  # type: ignore[method-assign]  # as a module may have one of its own


def begin() -> None:
    """Called before torch is imported; once it is, this does nothing."""
    if "torch" not in sys.modules:
        sys.meta_path.insert(0, _Finder())


def everything() -> bool:
    """Import what nobody has asked for yet. Returns whether there was any."""
    names = [name for finder in sys.meta_path if isinstance(finder, _Finder) for name in tuple(finder.names)]
    for name in names:
        hasattr(importlib.import_module(name), "asked for")
    return bool(names)
