"""What a process does to itself before it serves, and when its garbage is collected.

By itself the collector works amid what is made, where everybody waits for it. So its own collections are of what is
young, or late; those that cost more come while nothing runs.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import math
import os
import sys
import threading
from pathlib import Path

from engine import later

# Objects more than went, at which what is new since is looked through: a millisecond. Smaller means as much in all.
NEW = 5_000
# Collections of new objects behind which what has outlived them is looked through, too: once nothing happens, once no
# request runs, or, where neither comes, amid work.
QUIET_YOUNG, IDLE_YOUNG, MOST_YOUNG = 10, 50, 100
# Collections of those behind which it is everything.
QUIET_OLD, IDLE_OLD, MOST_OLD = 1, 100, 200
# Seconds of quiet before everything is looked through, and between two of these.
QUIET_S, BETWEEN_S = 1.0, 60.0
# It is quiet while the loop works less than this share of its time, and no thread makes many objects.
QUIET_SHARE, QUIET_OBJECTS = 0.05, 1_000

# Packages of a start with libraries of their own. The loader has one lock: where torch's is being mapped, they wait.
WITH_LIBRARIES = (
    *("aiohttp.web", "jinja2", "llguidance", "numpy", "orjson", "tokenizers", "uvloop"),
    *("multiprocessing.shared_memory", "resource", "statistics"),
)

# Whether `begin` has turned the collector off.
_collects_later = False


def begin() -> threading.Thread | None:
    """Called before anything large is imported. Returns the thread that maps torch's largest library, if one does; then
    what no server needs of torch is imported when it is asked for.

    Until `imported` no garbage is collected: what is imported stays, and to look through it over and over takes a
    twelfth of the imports' time.
    """
    global _collects_later
    _collects_later = gc.isenabled()
    gc.disable()
    # OpenMP reads its settings when it is loaded, which is with that library.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    found = importlib.util.find_spec("torch")
    places = () if found is None else found.submodule_search_locations or ()
    library = next((path for place in places if (path := Path(place, "lib", "libtorch_cpu.so")).is_file()), None)
    # Where there are GPUs torch looks for its libraries in more places.
    if library is None or (library.parent / "libtorch_cuda.so").exists():
        return None
    later.begin()
    for name in WITH_LIBRARIES:
        importlib.import_module(name)
    # A process that ends is to wait for it: half a library cannot be left.
    thread = threading.Thread(target=_map, args=(library,), name="torch's library")
    thread.start()
    return thread


def _map(library: Path) -> None:
    """Relocating it is a sixth of torch's import, which keeps Python's lock meanwhile, as a foreign function does not.
    Where it cannot be mapped, the import says so."""
    import ctypes

    ctypes.CDLL(None).dlopen(os.fsencode(library), ctypes.c_int(os.RTLD_NOW))


def imported() -> None:
    """Behind `begin`, when all that is large is imported; without it, in somebody else's process, this does nothing."""
    global _collects_later
    if _collects_later:
        _collects_later = False
        gc.freeze()
        gc.enable()


def settle() -> None:
    """Called when everything is loaded and nothing is served yet."""
    # What has been loaded stays: the collector need not look at it again, which would stall the loop for long.
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(NEW, MOST_YOUNG, MOST_OLD)
    # A thread that computes in Python (a template, a large body) gives the loop its turn after this and not after 5 ms,
    # and a busy loop the executor's thread.
    sys.setswitchinterval(0.0005)


class Collector:
    """Told how the loop fares some times a second, it collects garbage when that is in nobody's way."""

    def __init__(self) -> None:
        self._counts = gc.get_count()
        self._quiet_since = math.inf
        self._full_at = -math.inf

    def look(self, now: float, *, is_idle: bool, utilisation: float) -> None:
        """is_idle: no request runs or waits. utilisation: of the loop, since the last look."""
        (new, young, _), (before, young_before, _) = gc.get_count(), self._counts
        is_calm = young == young_before and abs(new - before) < QUIET_OBJECTS and utilisation < QUIET_SHARE
        if is_idle and gc.isenabled():
            self._quiet_since = min(self._quiet_since, now) if is_calm else math.inf
            self._collect(now, is_quiet=is_calm)
        else:
            self._quiet_since = math.inf
        self._counts = gc.get_count()

    def _collect(self, now: float, *, is_quiet: bool) -> None:
        _, young, old = gc.get_count()
        rests = now - self._quiet_since >= QUIET_S and now - self._full_at >= BETWEEN_S
        if old >= (QUIET_OLD if rests else IDLE_OLD):
            gc.collect()
            self._full_at = now
        elif young >= (QUIET_YOUNG if is_quiet else IDLE_YOUNG):
            gc.collect(1)
