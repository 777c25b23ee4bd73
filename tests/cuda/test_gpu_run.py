"""bench/gpu_run.py end to end, with parts that pass, fail, hang or cannot begin; and that what it names is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
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
    assert path.with_suffix(".md").read_text().strip() == out.strip()


def test_a_run_that_is_told_to_end_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By whoever lends the machine; the part that runs ends, too, and no other begins."""
    told = "import os, signal, time; print('half', flush=True); os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    planned = [python("good", ""), python("told", told), python("never", "")]
    monkeypatch.setattr(gpu_run, "parts", lambda out: planned)
    before, begin = signal.getsignal(signal.SIGTERM), time.monotonic()
    assert gpu_run.main(["--out", str(tmp_path)]) == 1
    assert time.monotonic() - begin < 30 and signal.getsignal(signal.SIGTERM) is before
    out = capsys.readouterr().out
    assert "| good | passed |" in out and "| told | cut |" in out and "| half |" in out
    assert "| never | left out | 0 | the run was stopped |" in out


def test_some_parts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_run, "parts", lambda out: [python("a b", ""), python("c", "")])
    assert gpu_run.main(["--out", str(tmp_path), "--only", "a b"]) == 0
    assert "| c |" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_run.main(["--only", "d"])


def test_a_run_is_rehearsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All parts in their processes, as they are but for the device: nothing is missing, misspelt or left behind."""
    monkeypatch.setattr(gpu_run, "PYTHON", (sys.executable, "-m", "tests.cuda.rehearsal"))
    monkeypatch.setattr(gpu_run.shutil, "which", lambda name: None)
    monkeypatch.chdir(ROOT)
    code = gpu_run.main(["--out", str(tmp_path), "--seconds", "600"])
    said = capsys.readouterr()
    assert code == 0, said.err
    (path,) = tmp_path.glob("run-*.json")
    done = {each["name"]: each for each in json.loads(path.read_text())["parts"]}
    assert {name: each["state"] for name, each in done.items()} == {
        "kernels": "passed",
        "invalidated capture": "passed",
        "memcheck": "left out",
        "initcheck": "left out",
        "tests": "passed",
        "benchmarks": "passed",
    }
    assert done["memcheck"]["output"] == "compute-sanitizer is not here"
    assert "failed" not in done["benchmarks"]["output"] and "no time" not in done["benchmarks"]["output"]
    (figures,) = (path for path in tmp_path.glob("*.json") if path.name.startswith("rehearsal-"))
    rows = json.loads(figures.read_text())["rows"]
    assert {row["model"] for row in rows if row["name"] == "decode"} == {
        "llama-3.2-1b",
        "llama-3.1-8b",
        "qwen3-30b-a3b",
    }
    names = {row["name"] for row in rows}
    assert names >= {"prefill", "overlap on over off", "GPU idle between steps", "start to first token", "kernels"}
    assert names >= {"HTTP, output", "HTTP, overlap on over off", "product 24x16, ours", "experts of a layer"}
    written = path.with_suffix(".md").read_text()
    assert written.strip() == said.out.strip() and all(f"| {name} |" in written for name in names)


def test_a_rehearsal_looks_at_no_kit(tmp_path: Path) -> None:
    """Of somebody who has built one, and has neither a GPU nor FlashInfer that could load it."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "kernels.kit").write_bytes(b"for a GPU")
    code = (
        "from tests.cuda.rehearsal import with_a_gpu; with_a_gpu()\n"
        "from bench.gpu import kit_flags, use_kit_of_build\n"
        "assert kit_flags() == use_kit_of_build() == ''"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120)


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
