"""All of half an hour on a GPU: checks, tests, benchmarks in the order of their worth; `python -m bench.gpu_run`.

Every part is a process of its own with a budget. What is done is in the JSON file and the Markdown table beside it at
once, so that a run that is cut keeps what it had; the benchmark writes a file of its own. `--only` runs some parts,
where a machine is lent for less than all of them take. Prints the table at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TAIL = 4000
# What runs a module; a rehearsal without a GPU puts its own in place.
PYTHON = (sys.executable, "-m")
OPTIONS = ("-c", "tests/gpu/gpu.ini", "--rootdir=.", "-m", "gpu", "-q")


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
    pytest, kernels = (*PYTHON, "pytest", *OPTIONS), ("tests/gpu/test_kernels.py",)
    sanitizer = ("compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all", "--tool")
    few = ("-k", "sample_rows or skinny or prepare or rms_norm or rope or gate")
    return [
        Part("kernels", (*pytest, *kernels), 150),
        Part("invalidated capture", (*pytest, "tests/gpu", "-k", "invalidated"), 60),
        Part("memcheck", (*sanitizer, "memcheck", *pytest, *kernels, *few), 150, 60, "compute-sanitizer"),
        Part("initcheck", (*sanitizer, "initcheck", *pytest, *kernels, *few), 120, 60, "compute-sanitizer"),
        Part("tests", (*pytest, "tests/gpu", "--deselect", kernels[0]), 420, 60),
        Part("benchmarks", (*PYTHON, "bench.gpu", "--out", str(out)), 780, 120),
    ]


class Stop:
    """Ends the part that runs when this process is told to end; what was done is then written as ever."""

    def __init__(self) -> None:
        self.asked = False
        self.group: int | None = None

    def __call__(self, number: int, frame: object) -> None:
        self.asked = True
        self.kill()

    def kill(self) -> None:
        """All that the part has begun, and may have left behind."""
        if self.group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGKILL)


def run_part(part: Part, seconds: float, stop: Stop) -> Outcome:
    """Run a part; its whole process group ends with it."""
    if part.needs is not None and shutil.which(part.needs) is None:
        return Outcome(part.name, "left out", 0.0, f"{part.needs} is not here")
    command = list(part.command)
    if "bench.gpu" in command:
        command += ["--seconds", str(round(seconds - 20))]
    begin = time.monotonic()
    # Not a pipe: what a process of another group still holds open would be waited for.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        stop.group = process.pid
        try:
            code = process.wait(seconds)
            state = "passed" if code == 0 else "cut" if stop.asked else "failed"
        except subprocess.TimeoutExpired:
            state = "cut"
        stop.kill()
        stop.group = None
        process.wait()
        log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
        output = log.read().decode(errors="replace")
    return Outcome(part.name, state, round(time.monotonic() - begin, 1), output)


def run_all(planned: Sequence[Part], out: Path, seconds: float) -> list[Outcome]:
    """All parts that there is time for; `out` has what was done after each: a JSON file, and the table beside it."""
    out.mkdir(parents=True, exist_ok=True)
    begin, deadline = time.time(), time.monotonic() + seconds
    now = datetime.datetime.now(datetime.UTC)
    path = out / f"run-{now:%Y%m%d-%H%M%S}.json"
    done: list[Outcome] = []
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for part in planned:
            left = deadline - time.monotonic()
            if stop.asked or left < part.least:
                why = "the run was stopped" if stop.asked else "no time was left"
                done.append(Outcome(part.name, "left out", 0.0, why))
            else:
                print(f"{part.name} ...", file=sys.stderr, flush=True)
                try:
                    done.append(run_part(part, min(part.seconds, left), stop))
                except OSError as error:
                    done.append(Outcome(part.name, "failed", 0.0, str(error)))
                if done[-1].state in ("failed", "cut"):
                    print(done[-1].output, file=sys.stderr, flush=True)
            content = {"date": now.isoformat(timespec="seconds"), "parts": [asdict(each) for each in done]}
            path.write_text(json.dumps(content, indent=1) + "\n")
            path.with_suffix(".md").write_text(table(done, figures_in(out, begin - 1)) + "\n")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
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
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder of the JSON files and the table")
    parser.add_argument("--seconds", type=float, default=28 * 60.0, help="all that may be spent")
    names = [part.name for part in parts(results)]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    args = parser.parse_args(argv)
    begin = time.time()
    done = run_all([part for part in parts(args.out) if part.name in args.only], args.out, args.seconds)
    print(f"\n{table(done, figures_in(args.out, begin - 1))}")
    return int(any(each.state in ("failed", "cut") for each in done))


if __name__ == "__main__":
    sys.exit(main())
