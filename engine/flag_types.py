"""What the values of flags are: text -> value. Each raises ArgumentTypeError with the reason."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from engine.config import RESERVED_TEMPLATE_KWARGS, shortened


def count(text: str) -> int:
    """A number of tokens: 4096, 4k (4000) or 4K (4096), as vLLM writes them."""
    factors = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}
    factor = factors.get(text[-1:], 1)
    digits = text[:-1] if factor != 1 else text
    try:
        value = int(digits) * factor
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number such as 4096, 4k or 4K") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not positive")
    return value


def not_negative_count(text: str) -> int:
    return 0 if text == "0" else count(text)


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a fraction above 0 and up to 1")
    return value


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return value


def not_negative(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else positive(text)


def interval(text: str) -> float | None:
    return None if text == "auto" else not_negative(text)


def budget(text: str) -> int:
    if text != "-1" and not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of tokens, nor -1 for no limit")
    return int(text)


def port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port (0 to 65535; 0 takes a free one)")
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"'{shortened(text)}' is not a JSON object")
    return value


def template_kwargs(text: str) -> dict[str, Any]:
    value = json_object(text)
    if reserved := RESERVED_TEMPLATE_KWARGS.intersection(value):
        raise argparse.ArgumentTypeError(f"'{min(reserved)}' cannot be set")
    return value


def show_defaults(group: argparse._ArgumentGroup, *options: object, **fields: str) -> None:
    """End the help of a group's flags by the defaults of `options`, which have a field of the flag's name, or of that
    and its unit. fields: of other names. What is said by hand stays, and None and nothing are no defaults to tell.
    """
    for action in group._group_actions:
        told = action.help or ""
        if action.help is argparse.SUPPRESS or re.search(r"\(default|default: |(by|the) default", told):
            continue
        if action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction):
            continue
        names = {fields.get(action.dest, action.dest), f"{action.dest}_s"}
        value = next((getattr(one, name) for one in options for name in names if hasattr(one, name)), action.default)
        if value not in (None, "", (), {}):
            action.help = f"{told} (default: {_spelled(value)})".strip()


def _spelled(value: Any) -> str:
    """As one would give it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int) and value >= 1024**2 and value % 1024**2 == 0:
        return f"{value // 1024**2}M"
    return f"{value:g}" if isinstance(value, float) else str(value)


def given(**values: object) -> dict[str, object]:
    """Only what was set, so that the dataclasses' defaults stay the only defaults."""
    return {name: value for name, value in values.items() if value is not None}
