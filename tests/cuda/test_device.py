"""CudaDevice against what stands in for torch.cuda: captures that CUDA invalidates, and whose memory a pool is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.executor import cuda_device
from engine.executor.cuda_device import CaptureError, CapturesOver, CudaDevice
from engine.executor.cuda_graph import GraphCache, GraphKey


class Allocator:
    """torch's, as far as captures go. forgets: as before 2.12, a capture that is invalid never ends for it, nor for the
    generator."""

    def __init__(self, forgets: bool) -> None:
        self.forgets = forgets
        self.generator = Generator()
        self.recording: set[int] = set()
        self.pools = 0
        self.invalid = False
        self.graphs: list[weakref.ref[Any]] = []

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    def end_allocate(self, device: int, pool: int) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def empty_cache(self) -> None:
        if self.recording:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED\nand more")

    def graph(self) -> Any:
        graph = Graph(self)
        self.graphs.append(weakref.ref(graph))
        return graph

    @property
    def living_graphs(self) -> int:
        gc.collect()
        return sum(graph() is not None for graph in self.graphs)


class Generator:
    """torch's of a device, which 2.11 leaves in a capture that is invalid."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"seed": 5, "capturing": False}

    def clone_state(self) -> Generator:
        copy = Generator()
        copy.state["seed"] = self.state["seed"]
        return copy

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state

    def draw(self) -> None:
        if self.state["capturing"]:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


class Graph:
    def __init__(self, allocator: Allocator) -> None:
        self.allocator = allocator

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.pool = pool
        self.allocator.recording.add(pool)
        self.generator_state = self.allocator.generator.state
        self.generator_state["capturing"] = True

    def capture_end(self) -> None:
        if self.allocator.invalid:
            if not self.allocator.forgets:
                self.allocator.recording.discard(self.pool)
                self.generator_state["capturing"] = False
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.allocator.recording.remove(self.pool)
        self.generator_state["capturing"] = False


@pytest.fixture(params=[True, False], ids=["torch 2.11", "torch 2.12"])
def allocator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Allocator:
    found = Allocator(request.param)
    zeros = torch.zeros
    for name, value in {
        "set_device": lambda device: None,
        "graph_pool_handle": found.new_pool,
        "CUDAGraph": found.graph,
        "default_generators": (found.generator,),
        "empty_cache": found.empty_cache,
        "mem_get_info": lambda device: (7, 9),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "zeros", lambda *args, device=None, **options: zeros(*args, **options))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", found.end_allocate, raising=False)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    return found


def raising(error: Exception, allocator: Allocator) -> Callable[[], None]:
    def work() -> None:
        allocator.invalid = True
        raise error

    return work


def test_a_capture_that_fails_in_python_is_that_captures_alone(allocator: Allocator) -> None:
    layer = CudaDevice()
    with pytest.raises(CaptureError, match="ValueError: no"):
        layer.capture(lambda: (_ for _ in ()).throw(ValueError("no")))
    assert layer.capture(lambda: None) is not None and layer.free_memory() == 7


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("not permitted")])
def test_a_capture_that_is_invalidated_leaves_the_allocator_well(allocator: Allocator, error: Exception) -> None:
    layer = CudaDevice()
    with pytest.raises(type(error) if isinstance(error, torch.OutOfMemoryError) else CapturesOver):
        layer.capture(raising(error, allocator))
    assert not allocator.recording and layer.free_memory() == 7
    with pytest.raises(CapturesOver, match="was invalidated"):
        layer.capture(lambda: None)


def test_random_numbers_can_be_drawn_after_one(allocator: Allocator) -> None:
    layer = CudaDevice()
    with pytest.raises(CapturesOver):
        layer.capture(raising(RuntimeError("not permitted"), allocator))
    allocator.generator.draw()
    assert allocator.generator.state["seed"] == 5


@pytest.mark.parametrize("generators", [(), (object(),)])
def test_a_generator_that_cannot_be_helped_costs_no_more(
    allocator: Allocator, monkeypatch: pytest.MonkeyPatch, generators: tuple[object, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    layer = CudaDevice()
    with pytest.raises(CapturesOver, match="not permitted"):
        layer.capture(raising(RuntimeError("not permitted"), allocator))
    assert layer.free_memory() == 7


def test_what_is_found_at_its_end_alone(allocator: Allocator) -> None:
    layer = CudaDevice()

    def work() -> None:
        allocator.invalid = True

    with pytest.raises(CapturesOver, match="previous error"):
        layer.capture(work)
    assert not allocator.recording and layer.free_memory() == 7


def test_memory_is_counted_also_where_the_allocator_cannot_be_helped(
    allocator: Allocator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    layer = CudaDevice()
    with pytest.raises(CapturesOver):
        layer.capture(raising(RuntimeError("not permitted"), allocator))
    assert layer.free_memory() == 7
    assert ("INTERNAL ASSERT" in caplog.text) == allocator.forgets
    # With nothing wrong, an assertion of the allocator's is no business of ours.
    other = CudaDevice()
    monkeypatch.setattr(torch.cuda, "empty_cache", raising(RuntimeError("other"), allocator))
    with pytest.raises(RuntimeError, match="other"):
        other.free_memory()


def test_after_one_no_graph_is_tried_any_more(allocator: Allocator, caplog: pytest.LogCaptureFixture) -> None:
    layer = CudaDevice()
    cache = GraphCache(layer, "lazy", 8, 64)
    first, second = (GraphKey(size, 64, 0, "plain") for size in (1, 2))
    assert cache.capture(first, lambda: None) is not None
    cache.note_use(second)
    assert cache.capture(second, raising(RuntimeError("not permitted"), allocator)) is None
    assert cache.get(first) is not None, "what is captured is still good"
    assert not cache.note_use(second) and not cache.note_use(second) and cache.next_wanted() is None
    assert cache.key(3, 1, 0, "plain").size == 4, "the sizes that there are graphs for stay"
    assert caplog.text.count("no more CUDA graphs") == 1


def test_the_pool_goes_with_the_graphs(allocator: Allocator) -> None:
    """Else what sleep wants to give back stays: the pool is counted as used by its first graph."""
    layer = CudaDevice()
    cache = GraphCache(layer, "lazy", 8, 64)
    for size in (1, 2):
        cache.capture(GraphKey(size, 64, 0, "plain"), lambda: None)
    assert allocator.pools == 1 and allocator.living_graphs == 3
    cache.clear()
    assert allocator.living_graphs == 0
    assert cache.capture(GraphKey(1, 64, 0, "plain"), lambda: None) is not None
    assert allocator.pools == 2, "a pool whose graphs are gone is not captured into again"


def test_the_stand_in_names_what_torch_has() -> None:
    assert hasattr(cuda_device.torch._C, "_cuda_endAllocateToPool") and hasattr(torch.cuda, "CUDAGraph")
    assert isinstance(torch.cuda.default_generators, tuple)
    assert hasattr(torch.Generator, "clone_state") and hasattr(torch.Generator, "graphsafe_set_state")


def test_a_capture_in_parts_is_as_many_graphs_in_one_pool(allocator: Allocator) -> None:
    layer, done = CudaDevice(), list[str]()

    def work(cut: Callable[[], None]) -> None:
        done.append("a")
        cut()
        done.append("b")

    parts = layer.capture_parts(work)
    assert len({id(part) for part in parts}) == 2 and done == ["a", "b"] and {part.pool for part in parts} == {1}
    assert not allocator.recording

    def broken(cut: Callable[[], None]) -> None:
        cut()
        raise ValueError("no")

    with pytest.raises(CaptureError, match="ValueError: no"):
        layer.capture_parts(broken)
    assert not allocator.recording and len(layer.capture_parts(work)) == 2

    def invalid(cut: Callable[[], None]) -> None:
        allocator.invalid = True
        cut()

    with pytest.raises(CapturesOver, match="previous error"):
        layer.capture_parts(invalid)
    assert not allocator.recording
