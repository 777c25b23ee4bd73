"""bench/step.py runs, and its figures hang together. Times are not judged: a busy machine has any."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import pytest

from bench import step
from engine.recorder import Recorder, Step, Tracer, read_steps


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    monkeypatch.setattr("sys.argv", ["step", "--batch", "1", "400", "--steps", "40", "--json", str(path)])
    step.main()
    one, many = json.loads(path.read_text())
    assert (one["batch"], many["batch"]) == (1, 400) and one["new_arrays"] is None
    for figures in (one, many):
        assert min(figures["schedule"], figures["submit"], figures["commit"], figures["steady_wall"]) > 0.0
        assert figures["floor"] > 0.0 and figures["ns_per_sequence"] > 0.0
    assert len(capsys.readouterr().out.splitlines()) >= 4


def test_a_loop_decodes_its_whole_batch_for_as_long_as_asked() -> None:
    for stagger in (False, True):
        loop = step.Loop(8, 50, stagger)
        for _ in range(50):
            loop.step()
        assert loop.in_flight[-1][0].forward_input.num_decode_rows == 8


def test_a_steady_step_keeps_nothing() -> None:
    loop = step.Loop(512, 60, stagger=False)
    lines, peak, kept = step.measure_allocations(loop, at_least=512)
    assert kept < 512 and peak < 64 * 1024
    assert all(line.startswith(("engine/scheduling/", "engine/cache/")) for line in lines)


def test_what_looking_costs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["step", "--recorder", "--batch", "4", "--steps", "100"])
    step.main()
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[0] == "4" and float(row[1]) > 0.0 and row[2].endswith("%") and row[4].endswith("%") and float(row[5])


def test_each_turn_of_the_engine_is_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[list[Step]] = []
    stop = Recorder.stop

    def stopped(self: Recorder, tracer: Tracer) -> None:
        traced.append(read_steps(tracer.steps))
        stop(self, tracer)

    monkeypatch.setattr(Recorder, "stop", stopped)
    turns = step.RecordedEngine(4, rounds=2)
    asyncio.run(turns.run())
    assert {kind: len(times) for kind, times in turns.times.items()} == dict.fromkeys(turns.KINDS, 2)
    assert min(min(times) for times in turns.times.values()) > 0.0
    assert turns.engine.recorder.stages is None and not turns.engine.recorder.is_watched
    # All but the two that were under way as the trace began.
    assert [len(steps) for steps in traced] == [step.TURN + step.UNCOUNTED - 2] * 2
    for steps in traced:
        assert [one.number - steps[0].number for one in steps] == list(range(len(steps)))
        for one in steps:
            assert (one.decode, one.tokens, one.running, one.waiting) == (4, 4, 4, 0) and not one.chunks
            times = (one.began, one.scheduled, one.launched, one.waited, one.arrived, one.committed, one.published)
            assert list(times) == sorted(times)
        for one, following in itertools.pairwise(steps):
            # Two are under way at once: the next has been launched before one is waited for.
            assert one.launched < following.launched <= one.waited and one.published <= following.arrived
