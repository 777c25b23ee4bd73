"""AdapterPlaces alone: what steps are told of indices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from engine.lora.places import AdapterPlaces
from engine.request import Adapter


def adapter(version: int) -> Adapter:
    return Adapter(f"a{version}", "", version, 8, 1, f"weights {version}", str(version))


def sequence(of: Adapter) -> Any:
    return SimpleNamespace(request=SimpleNamespace(adapter=of))


def test_steps_are_told_of_indices_that_are_nobodys() -> None:
    """Once, so that what the executor holds of them is free; not where another takes the index first."""
    places = AdapterPlaces(2, lambda: 0.0)
    first, second, third = (adapter(version) for version in (1, 2, 3))
    assert [places.pin(sequence(one)) for one in (first, second)] == [1, 2]
    assert places.take_loads() == [(1, "weights 1"), (2, "weights 2")]
    places.unload(1)  # in use
    assert not places.take_loads()
    places.unpin(first)
    places.unpin(second)
    assert places.take_loads() == [(1, None)] and not places.take_loads()
    places.unload(2)
    assert places.pin(sequence(third)) == 2
    assert places.take_loads() == [(2, "weights 3")]


def test_after_the_device_has_lost_them_they_are_nobodys() -> None:
    """Those that no step has taken there, too."""
    places = AdapterPlaces(3, lambda: 0.0)
    first, second, third = (adapter(version) for version in (1, 2, 3))
    places.pin(sequence(first))
    places.take_loads()
    for one in (second, third):
        places.pin(sequence(one))
    for one in (first, second, third):
        places.unpin(one)
    places.unload(2)
    places.forget()
    assert sorted(places.take_loads()) == [(1, None), (2, None), (3, None)]
    assert sorted(places.pin(sequence(one)) for one in (first, second, third)) == [1, 2, 3]
    assert {index for index, weights in places.take_loads() if weights} == {1, 2, 3}


def test_between_steps_somebody_is_told() -> None:
    """What is nobody's is taken at once, and no step says it again; what waits for a step is left."""
    places, told = AdapterPlaces(3, lambda: 0.0), []
    places.on_dropped = lambda: told.append(True)
    first, second, third = (adapter(version) for version in (1, 2, 3))
    for one in (first, second):
        places.pin(sequence(one))
    places.take_loads()
    places.unpin(first)
    places.unload(1)
    places.unload(2)  # in use
    assert places.take_dropped() == [1] and len(told) == 1 and not places.take_dropped()
    places.pin(sequence(third))
    places.unpin(second)
    assert len(told) == 2 and places.take_dropped() == [2]
    assert places.take_loads() == [(1, "weights 3")]
