"""An output that is the input of one custom tool and nothing else: forced, and held to the tool's own grammar.

No model writes so by itself, so no template names it; its grammar is the client's, and what follows the reasoning is
the call.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from server.parsers.base import Scanner, Steps, ToolFamily


def raw_family(name: str, make_id: Callable[[], str]) -> ToolFamily:
    """The family of outputs that are the input of the tool `name`; its calls have it as their one argument."""

    def run(scanner: Scanner) -> Steps[None]:
        scanner.begin()
        scanner.start_call(name)
        scanner.arguments('{"input": "')
        while True:
            if scanner.at < len(scanner.text):
                text = scanner.text[scanner.at :]
                scanner.skip(len(text))
                scanner.arguments(json.dumps(text, ensure_ascii=False)[1:-1])
            if scanner.closed:
                break
            yield
        scanner.arguments('"}')
        scanner.end_call()

    return ToolFamily("raw", run, (), _call_format, make_id)


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    return {"type": "any_text"}
