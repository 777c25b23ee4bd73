"""Tools that the client finds for the model: its search as a function that can be called, and what searches have found.

A search that somebody else's server would run is none: that one is left out, and deferred tools can be called at once.
Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from engine.request import RequestError
from server.protocol.ignored import ignore
from server.protocol.tool_fields import MAX_TOOLS, Declared

Json = dict[str, Any]

# The type of the tool, and the name that the model knows it by.
NAME = "tool_search"
OUTPUT = "tool_search_output"
_DESCRIPTION = "Finds tools for a task. Those that it finds can be called from then on."
_PARAMETERS: Json = {
    "type": "object",
    "properties": {"query": {"type": "string", "description": "What the tools are to do."}},
    "required": ["query"],
}


def is_client_search(tool: Any) -> bool:
    """Whether a declaration is that of a search that the client runs."""
    return isinstance(tool, dict) and tool.get("type") == NAME and tool.get("execution") == "client"


def as_function(tool: Json) -> Json:
    """The search as a chat's function."""
    description, parameters = tool.get("description"), tool.get("parameters")
    return {"name": NAME, "description": description or _DESCRIPTION, "parameters": parameters or _PARAMETERS}


def found_tools(
    items: Iterable[Json], declared: Declared, as_chat: Callable[[Any, str], Json], kinds: Collection[str]
) -> list[Json]:
    """The tools of items of such kinds that `declared` does not have, as a chat declares them: what past searches have
    found, say. as_chat: makes one of a tool of the Responses API. No client can change its history: what is broken in
    there is left out."""
    known = {(tool.namespace, tool.name) for tool in declared.tools}
    found: list[Json] = []
    for item in items:
        tools = item.get("tools") if item["type"] in kinds else None
        for given in tools if isinstance(tools, list) else ():
            try:
                tool = as_chat(given, "tools")
                new = [one for one in Declared([tool]).tools if (one.namespace, one.name) not in known]
            except RequestError:
                ignore("input", f"{item['type']}.tools")
                continue
            if not new or len(known) + len(new) > MAX_TOOLS:
                continue
            if tool["type"] == "namespace":
                names = {one.name for one in new}
                tool = {**tool, "tools": [one for one in tool["tools"] if _name(one) in names]}
            known.update((one.namespace, one.name) for one in new)
            found.append(tool)
    return found


def _name(tool: Json) -> Any:
    """Of a function or a custom tool, as a chat declares it; None for one of another type."""
    inner = tool.get(tool["type"])
    return inner.get("name") if isinstance(inner, dict) else None
