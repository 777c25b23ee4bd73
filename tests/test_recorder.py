"""What the recorder keeps of steps. What the pages and traces make of it: tests/server/test_live.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from engine.recorder import Recorder, Tracer, read_steps


def test_a_step_that_began_before_the_trace_takes_its_first_tokens_along() -> None:
    recorder, tracer = Recorder(lambda _: None), Tracer()
    recorder.start(tracer)

    def end(number: int, launch: tuple[float, ...] | None) -> None:
        step = SimpleNamespace(num_decode_rows=1, num_speculating_rows=0, num_rows=1, num_tokens=1)
        batch: Any = SimpleNamespace(recorded=launch, forward_input=step, chunks=())
        handle: Any = SimpleNamespace(step=number, began_at=0.0, ended_at=0.0)
        recorder.published(batch, handle, 3.0, 4.0, 5.0, False)

    recorder.first_token("before", 0.1)
    recorder.finished("before", "stop")
    end(1, None)
    recorder.first_token("seen", 0.1)
    end(2, (0.0, 1.0, 2.0, 1, 0))
    [step] = read_steps(tracer.steps)
    # Who ended is told with the next step that is seen.
    assert (step.number, list(step.first), list(step.ended)) == (2, ["seen"], ["before"])
