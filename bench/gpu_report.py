"""The rows of bench.gpu, kept in a JSON file from the moment that each is known."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch


class Report:
    """Rows, written to their file whenever one is added."""

    def __init__(self, folder: Path, seconds: float, gpu: str) -> None:
        self.deadline = time.monotonic() + seconds
        now = datetime.datetime.now(datetime.UTC)
        self.content: dict[str, Any] = {
            "commit": _commit(),
            "date": now.isoformat(timespec="seconds"),
            "gpu": gpu,
            "versions": _versions(),
            # The program by its name alone: where it lies is nobody's business.
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "rows": [],
        }
        name = gpu.lower().replace("nvidia ", "").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}-{now:%Y%m%d-%H%M%S}.json"

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        model: str = "",
        batch: int | None = None,
        context: int | None = None,
        floor_ratio: float | None = None,
    ) -> None:
        """floor_ratio: what the hardware needs at least, over what was needed; 1 cannot be beaten."""
        row = {
            "name": name,
            "model": model,
            "batch": batch,
            "context": context,
            "value": round(value, 4),
            "unit": unit,
            "floor_ratio": None if floor_ratio is None else round(floor_ratio, 4),
        }
        self.content["rows"].append(row)
        # At once or not at all: whoever reads it while this process is killed finds the rows before.
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)
        where = f"batch {batch}" if batch is not None else ""
        ratio = f"{100 * floor_ratio:.0f}% of the floor" if floor_ratio is not None else ""
        print(f"{name:<28} {model:<14} {where:<10} {value:>14,.3f} {unit:<8} {ratio}", flush=True)

    def has_time(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self.deadline

    def table(self) -> str:
        """Markdown for the README."""
        lines = ["| figure | model | batch | context | value | of the floor |", "| --- | --- | --- | --- | --- | --- |"]
        for row in self.content["rows"]:
            ratio = "" if row["floor_ratio"] is None else f"{100 * row['floor_ratio']:.0f}%"
            cells = (row["name"], row["model"], row["batch"] or "", row["context"] or "")
            lines.append(f"| {' | '.join(map(str, cells))} | {row['value']:,.4g} {row['unit']} | {ratio} |")
        return "\n".join(lines)


def _commit() -> str:
    found = os.environ.get("ONELOOP_COMMIT")
    if found:
        return found
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    return "unknown"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for package in ("flashinfer", "triton"):
        with contextlib.suppress(Exception):
            versions[package] = __import__(package).__version__
    return versions
