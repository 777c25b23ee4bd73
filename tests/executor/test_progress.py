"""What a start says of weights that it loads."""

from __future__ import annotations

import pytest

from engine.executor import start


def test_a_log_has_lines_and_no_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("engine.executor.start.time.monotonic", lambda: now)
    tell = start.show_progress()
    for seconds, done in ((1.0, 1), (9.0, 2), (1.0, 3), (10.0, 4), (10.0, 5)):
        now += seconds
        tell(done * 10**9, 5 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "Loading weights: 2.00 of 5.00 GB",
        "Loading weights: 4.00 of 5.00 GB",
    ]
