"""What a start does to its process, and the Collector: which collection of garbage comes when, as the collector itself
tells it; what a crowd leaves goes."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.process import BETWEEN_S, IDLE_OLD, IDLE_YOUNG, MOST_OLD, MOST_YOUNG, NEW, QUIET_S, QUIET_YOUNG, Collector
from engine.report import StartupReport

ROOT = Path(__file__).parent.parent
_TORCH = importlib.util.find_spec("torch")
_LIBRARIES = Path(next(iter((_TORCH and _TORCH.submodule_search_locations) or [""])), "lib")
TENTH = 0.1


@pytest.fixture
def seen() -> Iterator[list[int]]:
    """The generations of the collections as they come; thresholds are those of a server, and only what a test makes is
    looked through."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW, MOST_YOUNG, MOST_OLD)
    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*thresholds)
        gc.collect()


class Time:
    """Looks every tenth of a second, and a clock that nobody waits for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.collector = Collector()

    def passes(self, seconds: float, *, is_idle: bool = True, utilisation: float = 0.0) -> None:
        for _ in range(round(seconds / TENTH)):
            self.now += TENTH
            self.collector.look(self.now, is_idle=is_idle, utilisation=utilisation)


class Circle:
    def __init__(self) -> None:
        self.itself = self


def young(times: int) -> None:
    """So many collections of what is new."""
    for _ in range(times):
        gc.collect(0)


def old(times: int) -> None:
    for _ in range(times):
        gc.collect(1)


def test_it_waits_for_quiet_or_goes_on_for_longer(seen: list[int]) -> None:
    time = Time()
    young(QUIET_YOUNG)
    seen.clear()
    time.passes(30.0, is_idle=False)
    assert not seen, "requests run"
    time.passes(30.0, utilisation=0.5)
    assert not seen, "none runs, but the loop is busy"
    time.passes(2 * TENTH)
    assert seen == [1]
    time.passes(QUIET_S + TENTH)
    assert seen == [1, 2], "everything, once nothing has happened for a while"
    time.passes(10 * BETWEEN_S)
    assert seen == [1, 2], "nothing was made since"


def test_what_is_made_meanwhile_is_no_quiet(seen: list[int]) -> None:
    """A thread parses a large body: nothing of that is garbage."""
    time = Time()
    young(QUIET_YOUNG)
    time.passes(TENTH)
    seen.clear()
    kept: list[list[int]] = []
    young(QUIET_YOUNG)
    for _ in range(20):
        kept += [[number] for number in range(2_000)]
        time.passes(TENTH)
    assert set(seen) == {0}, "the collector's own"
    del kept
    time.passes(3 * TENTH)
    assert seen[-1] == 1


def test_a_loop_that_is_never_quiet_collects_between_two_requests(seen: list[int]) -> None:
    time = Time()
    for _ in range(IDLE_OLD):
        young(IDLE_YOUNG)
        seen.clear()
        time.passes(1.0, is_idle=False, utilisation=0.9)
        assert not seen
        time.passes(TENTH, utilisation=0.9)
        assert seen == [1]
    time.passes(TENTH, utilisation=0.9)
    assert seen == [1, 2]


def test_a_loop_that_is_never_idle_has_its_garbage_collected_all_the_same(seen: list[int]) -> None:
    time = Time()
    kept = Circle()
    watched = weakref.ref(kept)
    young(1)  # beyond the reach of collections of what is new
    del kept
    made: list[list[int]] = []
    for _ in range(100 * MOST_YOUNG):
        if 1 in seen:
            break
        made += [[number] for number in range(NEW)]
        time.passes(TENTH, is_idle=False, utilisation=1.0)
        assert watched() is None or len(seen) <= MOST_YOUNG + 2
    assert watched() is None and 2 not in seen


def test_everything_is_looked_through_once_a_minute_at_most(seen: list[int]) -> None:
    time = Time()
    for _ in range(round(3 * BETWEEN_S / 2)):
        young(QUIET_YOUNG)
        time.passes(2.0)
    assert seen.count(2) == 3
    assert seen.count(1) == round(3 * BETWEEN_S / 2)


def test_what_requests_leave_in_circles_goes_in_the_next_quiet_minute(seen: list[int]) -> None:
    """Also of those that lived through a collection: neither objects nor the collector's counts grow."""
    time, living = Time(), []
    everything: list[Any] = []
    for round_number in range(5):
        for _ in range(QUIET_YOUNG):
            living = [Circle() for _ in range(NEW)]
            everything += map(weakref.ref, living[:100])
        time.passes(TENTH, is_idle=False, utilisation=1.0)
        old(1)  # they are old now, and then they end
        living = []
        time.passes(BETWEEN_S if round_number else QUIET_S + 2 * TENTH)
        assert not any(one() for one in everything)
        assert gc.get_count()[1] < QUIET_YOUNG and gc.get_count()[2] <= 1


def test_who_has_switched_the_collector_off_is_left_alone(seen: list[int]) -> None:
    time = Time()
    young(IDLE_YOUNG)
    seen.clear()
    gc.disable()
    try:
        time.passes(10.0)
    finally:
        gc.enable()
    assert not seen


def run(code: str) -> str:
    """What a process of its own prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True).stdout


def test_a_start_collects_no_garbage_before_all_is_imported() -> None:
    printed = run(
        "import gc\n"
        "from engine.process import begin, imported\n"
        "begin()\n"
        "class Kept: pass\n"
        "seen = []\n"
        "gc.callbacks.append(lambda phase, info: seen.append(phase))\n"
        "kept = [Kept() for _ in range(200_000)]\n"
        "print(seen, gc.get_freeze_count())\n"
        "imported()\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 200_000)\n"
    )
    assert printed == "[] 0\nTrue True\n"


def test_in_somebody_elses_process_nothing_is_frozen() -> None:
    assert run("import gc\nfrom engine.process import imported\nimported()\nprint(gc.get_freeze_count())") == "0\n"
    printed = run(
        "import gc\nfrom engine.process import begin, imported\ngc.disable()\nimported()\nbegin()\nimported()\n"
        "print(gc.isenabled(), gc.get_freeze_count())"
    )
    assert printed == "False 0\n"


IS_MAPPED = (_LIBRARIES / "libtorch_cpu.so").is_file() and not (_LIBRARIES / "libtorch_cuda.so").exists()


@pytest.mark.skipif(not IS_MAPPED, reason="torch is another one here")
def test_torchs_library_is_mapped_beside_what_is_imported() -> None:
    printed = run(
        "import sys\n"
        "from engine.process import begin\n"
        "thread = begin()\n"
        "assert thread is not None, 'nothing was mapped'\n"
        "thread.join()\n"
        "print('libtorch_cpu.so' in open('/proc/self/maps').read(), 'torch' in sys.modules)\n"
        "import torch\n"
        "print(torch.ones(3).sum().item())\n"
    )
    assert printed == "True False\n3.0\n"


@pytest.mark.skipif(not IS_MAPPED, reason="torch is another one here")
def test_nobody_waits_for_the_loader_while_it_maps() -> None:
    printed = run(
        "import sys\n"
        "from engine.process import begin\n"
        "begin()\n"
        "before = set(sys.modules)\n"
        "import engine.build, engine.report, server.app, server.serving, engine.watchdog, server.trace_file\n"
        "from server import accounts, handover, kv_events, spans\n"
        "assert 'torch' not in sys.modules\n"
        "later = {name: getattr(sys.modules[name], '__file__', None) or '' for name in set(sys.modules) - before}\n"
        "print(sorted(name for name, file in later.items() if file.endswith('.so')))"
    )
    assert printed == "[]\n"


def test_the_phases_add_up_to_the_start() -> None:
    report = StartupReport(time.perf_counter() - 100.0)
    report.phases["imports"] = 60.0
    with report.phase("imports"):
        pass
    with report.phase("torch"):
        pass
    table = report.table()
    assert sum(report.phases.values()) == pytest.approx(100.0, abs=10.0)
    assert 30.0 < report.phases["other"] < 50.0
    assert "(imports 60.00, other " in table and "torch" not in table
