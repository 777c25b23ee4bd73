"""Recorder: what the loop has done lately, kept only while somebody looks: the page /live, /trace, --trace-file.

The Engine owns one and its loop asks for `stages`, the Scheduler and the Publisher hold it as `recorder`: all three are
None while nobody looks, and that check is all that it costs then. Stretches of work outside of the steps (sockets,
tokenising, grammars) go to whoever is in TRACERS. Written on the loop thread, `stretch` from any; times are
time.monotonic's.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from engine.executor.base import StepHandle
    from engine.scheduling.batch import Batch
    from engine.scheduling.sequence import Sequence as Running

now = time.monotonic
# A step as the loop leaves it (see Recorder): a Step is made of it (`read_step`) when somebody reads it.
Recorded = tuple[Any, ...]

# Steps that a page gets to see; and how many are recorded between two looks at them: a device that does 40,000 steps a
# second shall not be slowed down for a picture of 200.
MAX_STEPS = 256
STEPS_PER_LOOK = 128
MAX_TIMELINES = 512
MAX_EVENTS_PER_SEQUENCE = 128
MAX_LATENCIES = 4096
# Of one trace in memory: about 100 MB.
MAX_TRACED = 250_000


class Chunk(NamedTuple):
    """Known tokens of a sequence that a step computes: of a prompt, or forced by a grammar. tokens: from, to."""

    request_id: str
    kind: str
    start: int
    end: int


# Of a step: when it began to be built, was built and was launched; sequences that run and that wait then.
Launch = tuple[float, float, float, int, int]
# Requests whose first token, and whose end, a step brings.
_Ends = tuple[Sequence[str], Sequence[str]]
_NOTHING: _Ends = ((), ())


class Step(NamedTuple):
    """One step: when each stage began or ended (seconds), its rows by kind, and who stood where as it was launched.

    device_began, device_ended: by the device's own thread where it tells, else as the host saw it (is_seen: it told).
    first: requests whose first token it brought. ended: requests that ended with it, or since the one before.
    """

    number: int
    began: float
    scheduled: float
    launched: float
    waited: float
    arrived: float
    committed: float
    published: float
    device_began: float
    device_ended: float
    is_told: bool
    decode: int
    prefill: int
    forced: int
    pooled: int
    tokens: int
    running: int
    waiting: int
    failed: bool
    chunks: tuple[Chunk, ...]
    first: Sequence[str]
    ended: Sequence[str]


def read_step(recorded: Recorded, last: float = 0.0) -> Step:
    """What the loop has put together. last: when the device was through with the step before, where that is known."""
    number, launch, decode, speculating, rows, tokens, waited, arrived, committed, published, *others = recorded
    device_began, ended, failed, chunks, (first, gone) = others
    began, scheduled, launched, running, waiting = launch
    is_told = ended > 0.0
    if not is_told:
        ended = arrived
    if not device_began:
        # It works at one step after another.
        device_began = max(launched, last)
    forced = sum(chunk.kind == "forced" for chunk in chunks)
    pooled = sum(chunk.kind == "pooling" for chunk in chunks)
    decode += speculating
    return Step(
        number, began, scheduled, launched, waited, arrived, committed, published, device_began, ended, is_told, decode,
        rows - decode - forced - pooled, forced, pooled, tokens, running, waiting, failed, tuple(chunks), first, gone,
    )  # fmt: skip


def read_steps(recorded: Iterable[Recorded], last: float = 0.0) -> list[Step]:
    """`read_step` of each, in their order."""
    steps = []
    for one in recorded:
        steps.append(read_step(one, last))
        last = steps[-1].device_ended
    return steps


class Event(NamedTuple):
    """Of a sequence. kind: queued, admitted, prefill, forced or pooling (a chunk), first_token, retracted, tokens (that
    it has written), finished. value: tokens, or why."""

    at: float
    kind: str
    value: int | str


class Stretch(NamedTuple):
    """Work with a name between two times. lane: sockets, text, grammar."""

    lane: str
    name: str
    began: float
    ended: float
    thread: threading.Thread
    size: int


# One of those as it is written.
Stretched = tuple[str, str, float, float, threading.Thread, int]


class Tracer:
    """Everything from its making on, in deques that forget the oldest. Drained by whoever made it."""

    def __init__(self, most: int = MAX_TRACED) -> None:
        self.steps: deque[Recorded] = deque(maxlen=most)
        self.events: deque[tuple[str, Event]] = deque(maxlen=most)
        self.stretches: deque[Stretched] = deque(maxlen=most)
        self.began = now()

    @property
    def is_full(self) -> bool:
        """Something may have been forgotten."""
        return any(len(one) == one.maxlen for one in (self.steps, self.events, self.stretches))


# Of the process: what takes a while outside of the loop's steps belongs to no engine.
TRACERS: list[Tracer] = []


def stretched(lane: str, name: str, began: float, size: int = 0) -> None:
    """A stretch ends now. For what is done so often that `stretch` would be felt: `if TRACERS: ...`."""
    one = (lane, name, began, now(), threading.current_thread(), size)
    for tracer in TRACERS:
        tracer.stretches.append(one)


class stretch:
    """`with stretch("text", "tokenise", len(text)): ...`; half a microsecond without tracers, and then nothing more."""

    __slots__ = ("_began", "_lane", "_name", "_size")

    def __init__(self, lane: str, name: str, size: int = 0) -> None:
        self._lane, self._name, self._size = lane, name, size
        self._began = 0.0

    def __enter__(self) -> None:
        if TRACERS:
            self._began = now()

    def __exit__(self, *_: object) -> None:
        if self._began and TRACERS:
            stretched(self._lane, self._name, self._began, self._size)


class Recorder:
    """See the module. `watch` and `unwatch` come in pairs, and so do `start` and `stop` of a Tracer.

    stages: itself while steps are to be recorded, None where not. waited: when the loop began to wait for a step, at
    the last launch where it does nothing in between. left: steps that are yet to be recorded for who `look`s.
    on_watched: called with the recorder when the first looks, with None when the last has gone.
    """

    def __init__(self, on_watched: Callable[[Recorder | None], None]) -> None:
        self.stages: Recorder | None = None
        self._hand_on: Callable[[Recorded], None] = self._keep
        self.waited = 0.0
        # Whose first token, and whose end, the next step brings. Most bring none.
        self._ends: tuple[list[str], list[str]] | None = None
        self.timelines: OrderedDict[str, list[Event]] = OrderedDict()
        self.first_tokens: deque[float] = deque(maxlen=MAX_LATENCIES)
        self._steps: deque[Recorded] = deque(maxlen=MAX_STEPS)
        self._gaps: deque[npt.NDArray[np.float64]] = deque(maxlen=MAX_STEPS)
        self._on_watched = on_watched
        self._num_watching = 0
        self.left = 0
        self._tracers: list[Tracer] = []

    # ---- who looks

    @property
    def is_watched(self) -> bool:
        return self._num_watching > 0

    def watch(self) -> None:
        """Somebody looks: events of sequences are kept from now on, and steps as often as `look` asks for them."""
        self._num_watching += 1
        if self._num_watching == 1:
            self._on_watched(self)

    def unwatch(self) -> None:
        assert self._num_watching > 0
        self._num_watching -= 1
        if not self._num_watching:
            self._on_watched(None)
            self.stages = None
            self.left = 0
            self._steps.clear()
            self.timelines.clear()
            self.first_tokens.clear()
            self._gaps.clear()

    @property
    def steps(self) -> list[Step]:
        """The last ones that `look` asked for."""
        return read_steps(self._steps)

    def look(self, num_steps: int = STEPS_PER_LOOK) -> None:
        """Record the next steps, as many as that."""
        self.left = max(self.left, num_steps)
        self._begin()

    def start(self, tracer: Tracer) -> None:
        """Record every step for somebody, until `stop`."""
        self._tracers.append(tracer)
        TRACERS.append(tracer)
        self.watch()
        self._begin()

    def stop(self, tracer: Tracer) -> None:
        self._tracers.remove(tracer)
        TRACERS.remove(tracer)
        self.unwatch()
        self._settle()

    def _begin(self) -> None:
        if self.stages is None:
            self.stages = self
            self._ends = None
        self._settle()

    def _settle(self) -> None:
        """Where the next step goes: as directly as it may."""
        self._hand_on = self._keep if self.left or len(self._tracers) != 1 else self._tracers[0].steps.append
        if not (self.left or self._tracers):
            self.stages = None

    def _keep(self, step: Recorded) -> None:
        for tracer in self._tracers:
            tracer.steps.append(step)
        if self.left:
            self._steps.append(step)
            self.left -= 1
            if not self.left:
                self._settle()

    # ---- the loop's

    def published(
        self, batch: Batch, handle: StepHandle, arrived: float, committed: float, published: float, failed: bool
    ) -> None:
        """A step whose launch nobody saw is left out. One tuple and no more: this is done for each step of a trace."""
        launch, step = batch.recorded, batch.forward_input
        if launch is None:
            if self._ends is not None:
                self._ends[0].clear()  # first tokens of this one
            return
        ends, self._ends = self._ends or _NOTHING, None
        self._hand_on((
            handle.step, launch, step.num_decode_rows, step.num_speculating_rows, step.num_rows, step.num_tokens,
            self.waited, arrived, committed, published, handle.began_at, handle.ended_at, failed, batch.chunks,
            ends,
        ))  # fmt: skip

    # ---- sequences; called while somebody looks

    def event(self, request_id: str, kind: str, value: int | str = 0) -> None:
        self._event(request_id, Event(now(), kind, value))

    def chunk(self, batch: Batch, sequence: Running, kind: str, start: int, end: int) -> None:
        """A step that is being built computes known tokens of a sequence."""
        request_id = sequence.request.request_id
        if not batch.chunks:
            batch.chunks = []
        batch.chunks.append(Chunk(request_id, kind, start, end))
        self._event(request_id, Event(now(), kind, end - start))

    def first_token(self, request_id: str, seconds: float) -> None:
        """seconds: since it arrived."""
        self.first_tokens.append(seconds)
        self._ended()[0].append(request_id)
        self._event(request_id, Event(now(), "first_token", 0))

    def finished(self, request_id: str, reason: str) -> None:
        self._ended()[1].append(request_id)
        self._event(request_id, Event(now(), "finished", reason))

    def _ended(self) -> tuple[list[str], list[str]]:
        if self._ends is None:
            self._ends = ([], [])
        return self._ends

    def gaps(self, seconds: npt.NDArray[np.float64]) -> None:
        """Between a row's last two tokens, for the rows of a step. While steps are `left`: a trace has no use for
        them."""
        self._gaps.append(seconds.copy())

    def inter_token(self) -> npt.NDArray[np.float64]:
        """Seconds, of the last MAX_STEPS steps that were recorded."""
        return np.concatenate(self._gaps) if self._gaps else np.zeros(0)

    def _event(self, request_id: str, event: Event) -> None:
        timeline = self.timelines.get(request_id)
        if timeline is None:
            if len(self.timelines) >= MAX_TIMELINES:
                self.timelines.popitem(last=False)
            timeline = self.timelines[request_id] = []
        if len(timeline) >= MAX_EVENTS_PER_SEQUENCE:
            del timeline[1]  # how it came is worth more than what was in between
        timeline.append(event)
        for tracer in self._tracers:
            tracer.events.append((request_id, event))


def percentiles(values: Iterable[float], wanted: tuple[float, ...] = (50.0, 90.0, 99.0)) -> list[float] | None:
    """None of nothing."""
    array = np.fromiter(values, np.float64)
    return np.percentile(array, wanted).tolist() if len(array) else None
