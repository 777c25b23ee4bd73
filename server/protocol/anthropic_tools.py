"""Tools that Anthropic defines and clients run: bash, the text editor and memory, as functions that any model can call.

Clients declare them by type and name alone, for Anthropic's own models know their inputs; these are given here, as
Anthropic documents them, a version's own where versions differ. Pure.
"""

from __future__ import annotations

import re
from typing import Any

Json = dict[str, Any]

_DATED = re.compile(r"(bash|text_editor|memory)_(\d{8})")
# From these versions on the editor cannot undo, and inserts a text that has a name of its own.
_NO_UNDO = "20250429"
_INSERT_TEXT = "20250728"
_RANGE: Json = {
    "type": "array",
    "items": {"type": "integer"},
    "minItems": 2,
    "maxItems": 2,
    "description": "For view: the first and the last line to show, from 1 on; -1 is the last line of the file.",
}


def client_tool(kind: str) -> Json | None:
    """Description and parameters of a tool by its type; None for one that is not of this kind."""
    found = _DATED.fullmatch(kind)
    if found is None:
        return None
    name, version = found[1], found[2]
    if name == "bash":
        return _BASH
    return _editor(version) if name == "text_editor" else _MEMORY


def _tool(description: str, properties: Json, required: list[str]) -> Json:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"description": description, "parameters": parameters}


def _text(description: str) -> Json:
    return {"type": "string", "description": description}


def _command(*names: str) -> Json:
    return {"type": "string", "enum": list(names), "description": "What to do."}


_BASH = _tool(
    "Run a command in a bash session that lasts over calls: its directory, variables and files stay.",
    {
        "command": _text("The command to run. Needed unless restart is true."),
        "restart": {"type": "boolean", "description": "Begin a new session instead of running a command."},
    },
    [],
)


def _editing(inserted: str) -> Json:
    """What editing a file takes. inserted: the name of the text of an insert."""
    said = "For str_replace: what stands there then."
    return {
        "file_text": _text("For create: the whole text of the file."),
        "old_str": _text("For str_replace: the text to replace, exactly as it stands in the file, once."),
        "new_str": _text(said + " For insert: the text to put in." if inserted == "new_str" else said),
        "insert_line": {"type": "integer", "description": "For insert: the line to insert behind; 0 is the start."},
        **({} if inserted == "new_str" else {inserted: _text("For insert: the text to put in.")}),
        "view_range": _RANGE,
    }


def _editor(version: str) -> Json:
    undo = () if version >= _NO_UNDO else ("undo_edit",)
    return _tool(
        "View, create and edit text files. view also lists a directory.",
        {
            "command": _command("view", "create", "str_replace", "insert", *undo),
            "path": _text("The path of the file or directory."),
            **_editing("insert_text" if version >= _INSERT_TEXT else "new_str"),
        },
        ["command", "path"],
    )


_MEMORY = _tool(
    "Keep notes for later conversations in files under /memories. View that directory before you begin a task.",
    {
        "command": _command("view", "create", "str_replace", "insert", "delete", "rename"),
        "path": _text("The path of the file or directory, under /memories. Needed unless the command is rename."),
        **_editing("insert_text"),
        "old_path": _text("For rename: the path as it is."),
        "new_path": _text("For rename: the path as it is to be."),
    },
    ["command"],
)
