"""`tools`, `tool_choice` and `parallel_tool_calls`, checked as OpenAI does, and the grammar of calls that are forced.

Pure. The parser that reads the calls back belongs to the model; see server/parsers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import orjson

from engine.text.structured import GrammarSpec
from server.parsers.base import ToolFamily
from server.protocol.body import Body, check_nesting, invalid

MAX_TOOLS = 1024
_NAME = re.compile(r"[a-zA-Z0-9_.\-]{1,128}")
_MODES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What a request says about tools.

    tools: as the chat template gets them, None without any. mode: none, auto or required. named: the one function
    that must be called. parallel: several calls are allowed. callable: parameters by name of what may be called.
    strict: those of them whose arguments are to keep their schema in every point. places: where in the request each
    one's schema stands, for errors.
    """

    tools: list[dict[str, Any]] | None = None
    mode: str = "none"
    named: str | None = None
    parallel: bool = True
    callable: dict[str, dict[str, Any]] = field(default_factory=dict)
    strict: frozenset[str] = frozenset()
    places: dict[str, str] = field(default_factory=dict)

    @property
    def reads_calls(self) -> bool:
        """Whether calls are to be looked for in the output."""
        return self.mode != "none"

    @property
    def is_forced(self) -> bool:
        """Whether the output must be calls."""
        return self.mode == "required"


def read_tools(body: Body) -> ToolPlan:
    """Raises RequestError (400) for anything that OpenAI refuses too."""
    parallel = body.boolean("parallel_tool_calls", True)
    tools, choice = body.raw("tools"), body.raw("tool_choice")
    if tools is None:
        if choice is not None and choice != "none":
            raise invalid("tool_choice", "is only allowed when `tools` are given")
        return ToolPlan()
    declared, strict = _read_declarations(tools)
    mode, allowed, named = _read_choice("auto" if choice is None else choice, declared)
    callable = {name: declared[name] for name in declared if name in allowed}
    return ToolPlan(
        tools=tools,
        mode=mode,
        named=named,
        parallel=parallel and named is None,
        callable=callable,
        strict=frozenset(name for name in callable if strict[name]),
        places={name: f"tools[{index}].function.parameters" for index, name in enumerate(declared)},
    )


def _read_declarations(tools: Any) -> tuple[dict[str, dict[str, Any]], dict[str, bool]]:
    if not isinstance(tools, list) or not tools:
        raise invalid("tools", "must be a list with at least one tool")
    if len(tools) > MAX_TOOLS:
        raise invalid("tools", f"must have at most {MAX_TOOLS} tools")
    check_nesting("tools", tools)
    declared: dict[str, dict[str, Any]] = {}
    strict: dict[str, bool] = {}
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict):
            raise invalid(where, "must be an object of type `function` with a `function`")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise invalid(f"{where}.function.name", "must have 1 to 128 letters, digits, dashes, dots or underscores")
        if name in declared:
            raise invalid(f"{where}.function.name", f"is {name!r}, which another tool is called already")
        if not isinstance(function.get("description"), str | None):
            raise invalid(f"{where}.function.description", "must be a string")
        parameters = function.get("parameters")
        if not isinstance(parameters, dict | None):
            raise invalid(f"{where}.function.parameters", "must be an object")
        if not isinstance(function.get("strict"), bool | None):
            raise invalid(f"{where}.function.strict", "must be true or false")
        declared[name] = parameters or {}
        strict[name] = bool(function.get("strict"))
    return declared, strict


def _read_choice(choice: Any, declared: dict[str, Any]) -> tuple[str, set[str], str | None]:
    """Mode, the names that may be called, and the one that must be."""
    if isinstance(choice, str):
        if choice not in _MODES:
            raise invalid("tool_choice", f"must be one of {', '.join(_MODES)}, or an object that names a function")
        return choice, set(declared), None
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        name = _function_name(choice, "tool_choice", declared)
        return "required", {name}, name
    if kind == "allowed_tools":
        fields = choice.get("allowed_tools", choice)
        tools = fields.get("tools") if isinstance(fields, dict) else None
        if not isinstance(tools, list) or not tools:
            raise invalid("tool_choice.allowed_tools.tools", "must be a list with at least one tool")
        if fields.get("mode") not in ("auto", "required"):
            raise invalid("tool_choice.allowed_tools.mode", "must be auto or required")
        names = {
            _function_name(tool, f"tool_choice.allowed_tools.tools[{index}]", declared)
            for index, tool in enumerate(tools)
        }
        return str(fields["mode"]), names, None
    raise invalid("tool_choice", f"must be one of {', '.join(_MODES)}, or an object that names a function")


def _function_name(value: Any, where: str, declared: dict[str, Any]) -> str:
    # The Responses API has the name beside the type.
    inner = value.get("function", value) if isinstance(value, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str):
        raise invalid(f"{where}.function.name", "must be a string")
    if name not in declared:
        raise invalid(where, f"names the function {name[:64]!r}, which is not in `tools`")
    return name


def call_format(plan: ToolPlan, family: ToolFamily) -> dict[str, Any]:
    """The structural tag of the calls that a plan allows, in the way that the model writes them.

    Each schema in it says whose it is and whether that tool is strict: one tool's schema is never another's fault.
    """
    tools = [(name, _as_object(parameters)) for name, parameters in plan.callable.items()]
    found = family.call_format(tools, plan.parallel)
    _mark(found, plan, [name for name, _ in tools], None)
    return found


def _mark(node: Any, plan: ToolPlan, names: list[str], name: str | None) -> None:
    """Write into the schemas of a structural tag which tool they belong to; the tags of a family are in its order."""
    if isinstance(node, list):
        for index, inner in enumerate(node):
            _mark(inner, plan, names, name if name is not None or len(node) != len(names) else names[index])
    elif isinstance(node, dict):
        if node.get("type") == "json_schema":
            node["strict"] = name in plan.strict if name is not None else plan.strict.issuperset(names)
            if name is not None:
                node["name"] = plan.places[name]
            return
        for key in ("tags", "elements", "content"):
            if key in node:
                _mark(node[key], plan, names if key == "tags" else [], name)


def forced_calls(plan: ToolPlan, family: ToolFamily) -> GrammarSpec | None:
    """The grammar of an output that must be calls; None where they are the model's choice."""
    if not plan.is_forced:
        return None
    param = "tools" if plan.named is None else "tool_choice"
    return GrammarSpec("structural_tag", orjson.dumps(call_format(plan, family)).decode(), strict=False, param=param)


def _as_object(parameters: dict[str, Any]) -> dict[str, Any]:
    """Arguments are an object, also where a declaration forgets to say so."""
    if "type" in parameters or "$ref" in parameters:
        return parameters
    return {"type": "object", **parameters}
