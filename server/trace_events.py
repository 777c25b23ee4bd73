"""Chrome's trace event format (also Perfetto's) of what a Tracer has seen: one writer for each trace. Pure.

Tracks: the loop's stages, the device, requests (a bar from queue to end each), and sockets, text and grammar work in as
many lanes as overlap. Arrows lead from a request's arrival to each step that computed its tokens, and to its first one.
Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from engine.recorder import Event, Step, Stretch, Tracer, read_steps

Json = dict[str, Any]

_PROCESS = 1
_LOOP, _DEVICE, _DOOR = 1, 2, 3
_FIRST_LANE = 10
# Of one kind of stretch; what overlaps more than that is left out, and counted.
MAX_LANES = 64
# Of one batch of events: who has not been heard of for so long has ended unseen.
MAX_OPEN = 10_000


class TraceEvents:
    """`head` once, then `take` as often as there is something, then `tail`. began: seconds that become 0."""

    def __init__(self, began: float) -> None:
        self.num_left_out = 0
        self._began = began
        self._lanes: dict[str, list[float]] = {}
        self._tids: dict[tuple[str, int], int] = {}
        self._named: list[Json] = []
        # Requests that a bar was begun for; and the numbers of their arrows, where one was begun.
        self._open: dict[str, None] = {}
        self._arrows: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._device_ended = 0.0

    def head(self) -> list[Json]:
        """Names of the process and its tracks."""
        names = {_LOOP: "loop: steps", _DEVICE: "device", _DOOR: "requests arrive"}
        events = [self._meta("process_name", 0, name="oneloop")]
        for order, (tid, name) in enumerate(names.items()):
            events += [
                self._meta("thread_name", tid, name=name),
                self._meta("thread_sort_index", tid, sort_index=order),
            ]
        return events

    def take(self, tracer: Tracer) -> list[Json]:
        """The events of what it holds now, and empty it."""
        # A step's events are there before it is.
        steps = read_steps(_drain(tracer.steps), self._device_ended)
        if steps:
            self._device_ended = steps[-1].device_ended
        events: list[Json] = []
        ended = []
        for request_id, event in _drain(tracer.events):
            events += self._event(request_id, event)
            if event.kind == "finished":
                ended.append(request_id)
        for step in steps:
            events += self._step(step)
        for request_id in ended:
            self._arrows.pop(request_id, None)
        for one in sorted(map(Stretch._make, _drain(tracer.stretches)), key=lambda one: one.began):
            events += self._stretch(one)
        named, self._named = self._named, []
        return [*named, *events]

    def tail(self, ended: float) -> list[Json]:
        """The ends of bars that are still open."""
        return [self._bar("e", request_id, ended) for request_id in self._open]

    # ---- steps

    def _step(self, step: Step) -> Iterator[Json]:
        number = {"step": step.number}
        rows = {"decode": step.decode, "prefill": step.prefill, "forced": step.forced, "pooling": step.pooled}
        load = {"tokens": step.tokens, "running": step.running, "waiting": step.waiting}
        whole = number | rows | load
        yield self._slice(_LOOP, "schedule", step.began, step.scheduled, number)
        yield self._slice(_LOOP, "launch", step.scheduled, step.launched, whole)
        for chunk in step.chunks:
            yield self._flow("t", chunk.request_id, _LOOP, step.scheduled)
        yield self._slice(_LOOP, "wait", step.waited, step.arrived, number | {"failed": step.failed})
        yield self._slice(_LOOP, "commit", step.arrived, step.committed, number)
        yield self._slice(_LOOP, "publish", step.committed, step.published, number | {"ended": len(step.ended)})
        for request_id in step.first:
            yield self._flow("f", request_id, _LOOP, step.committed)
        name = "step" if step.is_told else "step (as the loop saw it)"
        yield self._slice(_DEVICE, name, step.device_began, step.device_ended, whole)
        yield {
            "ph": "C", "name": "load", "pid": _PROCESS, "tid": 0, "ts": self._ts(step.launched),
            "args": {"running": step.running, "waiting": step.waiting},
        }  # fmt: skip

    # ---- requests

    def _event(self, request_id: str, event: Event) -> Iterator[Json]:
        if event.kind == "queued":
            yield self._slice(_DOOR, "arrives", event.at, event.at, {"request": request_id, "tokens": event.value})
            yield self._flow("s", request_id, _DOOR, event.at)
        if request_id not in self._open:
            # Also of one that was there before the trace began.
            if len(self._open) >= MAX_OPEN:
                forgotten = next(iter(self._open))
                del self._open[forgotten]
                yield self._bar("e", forgotten, event.at)
            self._open[request_id] = None
            yield self._bar("b", request_id, event.at)
        yield self._bar("n", request_id, event.at, event.kind, {"value": event.value})
        if event.kind == "finished":
            del self._open[request_id]
            yield self._bar("e", request_id, event.at)

    def _bar(self, phase: str, request_id: str, at: float, name: str | None = None, args: Json | None = None) -> Json:
        """Begin, end or an instant of a request's bar."""
        return {
            "ph": phase, "cat": "request", "name": name or request_id, "id": request_id, "pid": _PROCESS, "tid": _DOOR,
            "ts": self._ts(at), "args": args or {},
        }  # fmt: skip

    def _flow(self, phase: str, request_id: str, tid: int, at: float) -> Json:
        """A point of a request's arrow, in the slice that is there at this time; its first, if it came before."""
        if request_id not in self._arrows:
            if len(self._arrows) >= MAX_OPEN:
                del self._arrows[next(iter(self._arrows))]
            self._arrows[request_id], phase = next(self._numbers), "s"
        event: Json = {
            "ph": phase, "cat": "request", "name": "request", "id": self._arrows[request_id], "pid": _PROCESS,
            "tid": tid, "ts": self._ts(at),
        }  # fmt: skip
        return event | {"bp": "e"} if phase == "f" else event

    # ---- the rest

    def _stretch(self, one: Stretch) -> Iterator[Json]:
        lanes = self._lanes.setdefault(one.lane, [])
        lane = next((place for place, free_at in enumerate(lanes) if free_at <= one.began), len(lanes))
        if lane == len(lanes):
            if lane == MAX_LANES:
                self.num_left_out += 1
                return
            lanes.append(0.0)
            tid = self._tids[one.lane, lane] = _FIRST_LANE + len(self._tids)
            name = one.lane if not lane else f"{one.lane} {lane + 1}"
            self._named += [
                self._meta("thread_name", tid, name=name),
                self._meta("thread_sort_index", tid, sort_index=tid),
            ]
        lanes[lane] = one.ended
        args = {"thread": one.thread.name} | ({"size": one.size} if one.size else {})
        yield self._slice(self._tids[one.lane, lane], one.name, one.began, one.ended, args)

    def _slice(self, tid: int, name: str, began: float, ended: float, args: Json) -> Json:
        # The difference of what is written, so that neighbours do not overlap by a rounding.
        start = self._nanoseconds(began)
        return {
            "ph": "X", "cat": "engine", "name": name, "pid": _PROCESS, "tid": tid, "ts": start / 1000,
            "dur": max(0, self._nanoseconds(ended) - start) / 1000, "args": args,
        }  # fmt: skip

    def _meta(self, kind: str, tid: int, **args: object) -> Json:
        return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": tid, "args": args}

    def _ts(self, seconds: float) -> float:
        """Microseconds, to the nanosecond; none before the trace began."""
        return self._nanoseconds(seconds) / 1000

    def _nanoseconds(self, seconds: float) -> int:
        # An integer: rounding to decimals takes longer than all else that is done for a slice.
        return max(0, round((seconds - self._began) * 1e9))


def _drain(deque_: Any) -> Iterator[Any]:
    """What is in there now; threads may go on to add."""
    for _ in range(len(deque_)):
        yield deque_.popleft()
