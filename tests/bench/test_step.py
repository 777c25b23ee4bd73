"""bench/step.py runs, and its figures hang together. Times are not judged: a busy machine has any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import step


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
