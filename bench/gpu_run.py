"""All of half an hour on a GPU: checks, tests, benchmarks in the order of their worth; `python -m bench.gpu_run`.

Every part is a process of its own with a budget. What is done is in the JSON file at once, so that a run that is cut
keeps what it had; the benchmark writes its own file beside it. Prints one Markdown table at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TAIL = 4000
PYTEST = (sys.executable, "-m", "pytest", "-c", "tests/gpu/gpu.ini", "--rootdir=.", "-m", "gpu", "-q")


@dataclass(frozen=True)
class Part:
    """A command and the most seconds it may take. needs: a program that may be missing; least: else it is not begun."""

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float = 10.0
    needs: str | None = None


@dataclass
class Outcome:
    """state: passed, failed, cut (its time was over) or left out."""

    name: str
    state: str
    seconds: float
    output: str


def parts(out: Path) -> list[Part]:
    """In the order of their worth; the first are quick and say whether the rest is worth anything."""
    kernels = ("tests/gpu/test_kernels.py",)
    sanitizer = ("compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all", "--tool")
    few = ("-k", "sample_rows or skinny or prepare or rms_norm or rope or gate")
    return [
        Part("kernels", (*PYTEST, *kernels), 150),
        Part("a capture that is invalidated", (*PYTEST, "tests/gpu", "-k", "invalidated"), 60),
        Part("memcheck", (*sanitizer, "memcheck", *PYTEST, *kernels, *few), 150, 60, "compute-sanitizer"),
        Part("initcheck", (*sanitizer, "initcheck", *PYTEST, *kernels, *few), 120, 60, "compute-sanitizer"),
        Part("tests", (*PYTEST, "tests/gpu", "--deselect", kernels[0]), 420, 60),
        Part("benchmarks", (sys.executable, "-m", "bench.gpu", "--out", str(out)), 780, 120),
    ]


def run_part(part: Part, seconds: float) -> Outcome:
    """Run a part; its whole process group ends with it."""
    if part.needs is not None and shutil.which(part.needs) is None:
        return Outcome(part.name, "left out", 0.0, f"{part.needs} is not here")
    command = list(part.command)
    if "bench.gpu" in command:
        command += ["--seconds", str(round(seconds - 20))]
    begin = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        state = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        state = "cut"
    return Outcome(part.name, state, round(time.monotonic() - begin, 1), output[-TAIL:])


def run_all(planned: Sequence[Part], out: Path, seconds: float) -> list[Outcome]:
    """All parts that there is time for; `out` has what was done after each."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    now = datetime.datetime.now(datetime.UTC)
    path = out / f"run-{now:%Y%m%d-%H%M%S}.json"
    done: list[Outcome] = []
    for part in planned:
        left = deadline - time.monotonic()
        if left < part.least:
            done.append(Outcome(part.name, "left out", 0.0, "no time was left"))
        else:
            print(f"{part.name} ...", file=sys.stderr, flush=True)
            try:
                done.append(run_part(part, min(part.seconds, left)))
            except OSError as error:
                done.append(Outcome(part.name, "failed", 0.0, str(error)))
            if done[-1].state in ("failed", "cut"):
                print(done[-1].output, file=sys.stderr, flush=True)
        content = {"date": now.isoformat(timespec="seconds"), "parts": [asdict(each) for each in done]}
        path.write_text(json.dumps(content, indent=1) + "\n")
    return done


def table(done: Sequence[Outcome], figures: Sequence[dict[str, Any]]) -> str:
    """Markdown: what was done, then the figures."""
    lines = ["| part | | seconds | |", "| --- | --- | --- | --- |"]
    for each in done:
        last = (each.output.strip().splitlines() or [""])[-1].strip("= ").replace("|", "/")
        lines.append(f"| {each.name} | {each.state} | {each.seconds:.0f} | {last[:100]} |")
    for report in figures:
        lines += ["", f"{report['gpu']}, {report['date']}, commit {report['commit'][:12]}", ""]
        lines += [
            "| figure | model | batch | context | value | of the floor |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in report["rows"]:
            ratio = "" if row["floor_ratio"] is None else f"{100 * row['floor_ratio']:.0f}%"
            cells = (row["name"], row["model"], row["batch"] or "", row["context"] or "")
            lines.append(f"| {' | '.join(map(str, cells))} | {row['value']:,.4g} {row['unit']} | {ratio} |")
    return "\n".join(lines)


def figures_in(out: Path, since: float) -> list[dict[str, Any]]:
    """What the benchmark has written since then, also where it was cut."""
    paths = (path for path in sorted(out.glob("*.json")) if not path.name.startswith("run-"))
    return [json.loads(path.read_text()) for path in paths if path.stat().st_mtime >= since]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where something that was begun did not end well."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_run", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON files")
    parser.add_argument("--seconds", type=float, default=28 * 60.0, help="all that may be spent")
    args = parser.parse_args(argv)
    begin = time.time()
    done = run_all(parts(args.out), args.out, args.seconds)
    print(f"\n{table(done, figures_in(args.out, begin - 1))}")
    return int(any(each.state in ("failed", "cut") for each in done))


if __name__ == "__main__":
    sys.exit(main())
