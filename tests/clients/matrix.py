"""The README's matrix of clients, out of what the tests of a session did. A plugin that conftest.py brings in.

A cell has tests of its own, marked `cell(client, column)`, or an explanation here; all of a cell's tests must pass.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.common import COLUMNS

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- clients: written by make test-clients MATRIX=1 -->\n", "<!-- /clients -->\n"

# Rows, in order: the client, and the package whose version is shown.
CLIENTS = {
    "openai (Python)": "openai",
    "openai (Python), responses": "openai",
    "openai (npm)": "npm:openai",
    "anthropic": "anthropic",
    "ollama": "ollama",
    "litellm": "litellm",
    "llm": "llm",
    "pydantic-ai": "pydantic-ai-slim",
    "instructor": "instructor",
    "langchain-openai": "langchain-openai",
    "lm-eval": "lm-eval",
}
# Cells without a test, and why.
_OBJECTS = "instructor answers with objects only"
_SCORES = "lm-eval only scores text"
EXPLAINED = {
    ("anthropic", "logprobs"): "the Messages API has none",
    ("instructor", "text"): _OBJECTS,
    ("instructor", "tool loop"): _OBJECTS,
    ("instructor", "logprobs"): _OBJECTS,
    ("lm-eval", "text"): _SCORES,
    ("lm-eval", "stream"): _SCORES,
    ("lm-eval", "tool loop"): _SCORES,
    ("lm-eval", "structured object"): _SCORES,
}

Cell = tuple[str, str]
_cells_of: dict[str, Cell] = {}
_outcomes: dict[Cell, set[str]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (mark := item.get_closest_marker("cell")) is not None:
            _cells_of[item.nodeid] = (mark.args[0], mark.args[1])
    # The table is the last thing to be looked at.
    items.sort(key=lambda item: item.path.name == "test_matrix.py")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    cell = _cells_of.get(report.nodeid)
    if cell is not None and (report.when == "call" or report.outcome != "passed"):
        _outcomes.setdefault(cell, set()).add(report.outcome)


def missing() -> list[Cell]:
    """Cells that this session has run no test of, and nobody has explained."""
    every = {(client, column) for client in CLIENTS for column in COLUMNS}
    assert set(_cells_of.values()) <= every and not EXPLAINED.keys() & set(_cells_of.values())
    return sorted(cell for cell in every if cell not in EXPLAINED and _outcomes.get(cell, {"skipped"}) == {"skipped"})


def table() -> str:
    """The matrix in Markdown."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    notes: list[str] = []
    yield "| client | version | " + " | ".join(COLUMNS) + " |"
    yield "|---" * (len(COLUMNS) + 2) + "|"
    for client, package in CLIENTS.items():
        cells: list[str] = []
        for column in COLUMNS:
            if (why := EXPLAINED.get((client, column))) is not None:
                if why not in notes:
                    notes.append(why)
                cells.append(f"– ({notes.index(why) + 1})")
            else:
                cells.append("yes" if _outcomes[client, column] == {"passed"} else "**fails**")
        yield f"| {client} | {_version(package)} | " + " | ".join(cells) + " |"
    yield ""
    yield "; ".join(f"({number}) {why}" for number, why in enumerate(notes, 1)) + "."


def _version(package: str) -> str:
    name = package.removeprefix("npm:")
    if name != package:
        return str(json.loads((HERE / "package.json").read_text())["dependencies"][name])
    return importlib.metadata.version(name)


def in_readme() -> str:
    """The matrix that the README shows. Raises AssertionError where it has no place for one."""
    found = re.search(f"{re.escape(BEGIN)}(.*){re.escape(END)}", README.read_text(), re.DOTALL)
    assert found is not None, "README.md has no place for it"
    return found[1]


def write(text: str) -> None:
    """Put a matrix into the README."""
    README.write_text(README.read_text().replace(f"{BEGIN}{in_readme()}{END}", f"{BEGIN}{text}{END}"))
