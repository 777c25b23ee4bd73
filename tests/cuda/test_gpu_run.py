"""bench/gpu_run.py end to end, with parts that pass, fail, hang or cannot begin; and that what it names is there."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_run
from bench.gpu_run import Part

ROOT = Path(__file__).parents[2]
FIGURES = {
    "gpu": "none",
    "date": "today",
    "commit": "0123456789abcdef",
    "rows": [
        {
            "name": "decode",
            "model": "tiny",
            "batch": 1,
            "context": 8,
            "value": 1234.5,
            "unit": "tok/s",
            "floor_ratio": 0.5,
        }
    ],
}


def python(name: str, code: str, seconds: float = 20.0, **options: object) -> Part:
    return Part(name, (sys.executable, "-c", code), seconds, **options)  # type: ignore[arg-type]


def test_a_run_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = f"import json, time; open(r'{tmp_path}/x.json', 'w').write(json.dumps({FIGURES!r})); time.sleep(60)"
    planned = [
        python("good", "print('=== 3 passed ===')"),
        python("bad", "import sys; print('one | two'); sys.exit(3)"),
        python("cut, with figures", write, 3.0, least=1.0),
        python("no program", "", needs="no-such-program"),
        Part("not even begun", ("/no/such/file",), 5.0, least=1.0),
        python("no time", "", least=1e6),
    ]
    monkeypatch.setattr(gpu_run, "parts", lambda out: planned)
    begin = time.monotonic()
    assert gpu_run.main(["--out", str(tmp_path), "--seconds", "40"]) == 1
    assert time.monotonic() - begin < 30, "a part that hangs is ended with all that it has begun"
    (path,) = tmp_path.glob("run-*.json")
    states = {each["name"]: each["state"] for each in json.loads(path.read_text())["parts"]}
    assert states == {
        "good": "passed",
        "bad": "failed",
        "cut, with figures": "cut",
        "no program": "left out",
        "not even begun": "failed",
        "no time": "left out",
    }
    out = capsys.readouterr().out
    assert "| good | passed | 0 | 3 passed |" in out and "one / two" in out
    assert "| decode | tiny | 1 | 8 | 1,234 tok/s | 50% |" in out and "commit 0123456789ab" in out


def test_all_that_is_begun_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "parts", lambda out: [python("good", "")])
    assert gpu_run.main(["--out", str(tmp_path / "new")]) == 0


def test_the_parts_fit_in_28_minutes_and_name_what_is_there(tmp_path: Path) -> None:
    planned = gpu_run.parts(tmp_path)
    assert sum(part.seconds for part in planned) <= 28 * 60
    assert [part.name for part in planned][-2:] == ["tests", "benchmarks"]
    for part in planned:
        for word in part.command:
            assert not word.startswith("tests/") or (ROOT / word).exists(), word
    (bench,) = (part for part in planned if part.name == "benchmarks")
    assert bench.command[-2:] == ("--out", str(tmp_path))
    text = (ROOT / "tests/gpu/test_gpu.py").read_text()
    assert "def test_an_invalidated_capture" in text
