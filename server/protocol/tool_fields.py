"""`tools`, `tool_choice` and `parallel_tool_calls`, checked as OpenAI does, and the grammar of calls that are forced.

Functions, custom tools and namespaces of both can be called; tools of any other type, which somebody else would have
to run, are left out unless the request insists on one. Pure. The parser that reads the calls back belongs to the model;
see server/parsers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from engine.text.grammar.spec import GrammarSpec
from server.custom_calls import INPUT
from server.parsers.base import ToolFamily
from server.protocol.body import Body, check_nesting, invalid
from server.protocol.ignored import clean, ignore

MAX_TOOLS = 1024
# Of the flat names that we make ourselves.
_MAX_FLAT = 64
_NAME = re.compile(r"[a-zA-Z0-9_.\-]{1,128}")
_NOT_OF_NAME = re.compile(r"[^a-zA-Z0-9_\-]")
_MODES = ("none", "auto", "required")
_SYNTAXES = ("lark", "regex")
# What a choice can name beside a mode.
_CALLABLE = ("function", "custom")


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What a request says about tools.

    tools: functions as the chat template gets them, None without any. mode: none, auto or required. named: the one
    function that must be called. parallel: several calls are allowed. callable: parameters by name of what may be
    called. refused: declared names that may not be. strict: those of the callable whose arguments are to keep their
    schema in every point. places: where in the request each one's schema stands, for errors. custom: by name the
    grammars that bind the inputs of custom tools, None where they are free. origins: namespace and own name of the
    functions of namespaces, by the flat name that the model knows.
    """

    tools: list[dict[str, Any]] | None = None
    mode: str = "none"
    named: str | None = None
    parallel: bool = True
    callable: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()
    strict: frozenset[str] = frozenset()
    places: dict[str, str] = field(default_factory=dict)
    custom: dict[str, GrammarSpec | None] = field(default_factory=dict)
    origins: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def reads_calls(self) -> bool:
        """Whether calls are to be looked for in the output."""
        return self.mode != "none"

    @property
    def is_forced(self) -> bool:
        """Whether the output must be calls."""
        return self.mode == "required"

    @property
    def raw(self) -> tuple[str, GrammarSpec] | None:
        """The custom tool with a grammar that is the only thing left to call: the output is its input, as it is."""
        if self.is_forced and len(self.callable) == 1:
            [name] = self.callable
            if (spec := self.custom.get(name)) is not None:
                return name, spec
        return None


@dataclass(frozen=True, slots=True)
class _Tool:
    """One that can be called. declaration: the function that the template shows. name: its own, in its namespace.
    place: where its schema stands in the request."""

    flat: str
    name: str
    namespace: str | None
    declaration: dict[str, Any]
    parameters: dict[str, Any]
    place: str
    strict: bool
    is_custom: bool = False
    spec: GrammarSpec | None = None


class Declared:
    """The tools of a request that can be called, in order.

    Raises RequestError for a declaration that is broken; of types that nobody here can run it takes no notice.
    """

    def __init__(self, tools: Any) -> None:
        self.tools: list[_Tool] = []
        if tools is None:
            return
        if not isinstance(tools, list):
            raise invalid("tools", "must be a list")
        if len(tools) > MAX_TOOLS:
            raise invalid("tools", f"must have at most {MAX_TOOLS} tools")
        check_nesting("tools", tools)
        # Flat names give way to those that clients gave themselves.
        self._taken = {name for tool in tools if isinstance(name := _own_name(tool), str)}
        self._flat: set[str] = set()
        for tool, where in _each(tools, "tools"):
            if tool["type"] == "namespace":
                self._read_namespace(tool, where)
            else:
                self._add(tool, where, None)
        if len(self.tools) > MAX_TOOLS:
            raise invalid("tools", f"must have at most {MAX_TOOLS} tools")

    def flat(self, namespace: str | None, name: str) -> str:
        """What the model knows a function by, also one that earlier turns called and this one does not declare."""
        if not namespace:
            return name
        found = (tool.flat for tool in self.tools if (tool.namespace, tool.name) == (namespace, name))
        return next(found, _flatten(namespace, name))

    def _read_namespace(self, tool: dict[str, Any], where: str) -> None:
        namespace, inner = tool.get("name"), tool.get("tools")
        if not isinstance(namespace, str) or not namespace:
            raise invalid(f"{where}.name", "must be a non-empty string")
        if not isinstance(tool.get("description"), str | None):
            raise invalid(f"{where}.description", "must be a string")
        if not isinstance(inner, list | None):
            raise invalid(f"{where}.tools", "must be a list")
        first = len(self.tools)
        for one, place in _each(inner or [], f"{where}.tools"):
            if one["type"] == "namespace":
                ignore("tools", "namespace")
            else:
                self._add(one, place, namespace)
        if tool.get("description") and len(self.tools) > first:
            # Templates know functions alone: what is said of all stands with the first.
            function = self.tools[first].declaration["function"]
            function["description"] = "\n\n".join(filter(None, [tool["description"], function.get("description")]))

    def _add(self, tool: dict[str, Any], where: str, namespace: str | None) -> None:
        kind = tool["type"]
        function, where = tool.get(kind), f"{where}.{kind}"
        if not isinstance(function, dict):
            raise invalid(where.rpartition(".")[0], f"must be an object of type `{kind}` with a `{kind}`")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise invalid(f"{where}.name", "must have 1 to 128 letters, digits, dashes, dots or underscores")
        flat = name
        if namespace is not None:
            flat = self._free(_flatten(namespace, name))
        elif name in self._flat:
            raise invalid(f"{where}.name", f"is {name!r}, which another tool is called already")
        self._flat.add(flat)
        if not isinstance(function.get("description"), str | None):
            raise invalid(f"{where}.description", "must be a string")
        if kind == "custom":
            self.tools.append(_custom(function, where, flat, namespace))
            return
        parameters = function.get("parameters")
        if not isinstance(parameters, dict | None):
            raise invalid(f"{where}.parameters", "must be an object")
        if not isinstance(function.get("strict"), bool | None):
            raise invalid(f"{where}.strict", "must be true or false")
        # Without what a provider is told beside it: templates write whatever there is.
        declaration = {"type": kind, "function": function if namespace is None else {**function, "name": flat}}
        strict = bool(function.get("strict"))
        self.tools.append(_Tool(flat, name, namespace, declaration, parameters or {}, f"{where}.parameters", strict))

    def _free(self, flat: str) -> str:
        number, found = 1, flat
        while found in self._taken or found in self._flat:
            number += 1
            found = f"{flat[: _MAX_FLAT - 5]}_{number}"
        return found


def _each(tools: list[Any], where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Those that can be called, and where they stand."""
    for index, tool in enumerate(tools):
        place = f"{where}[{index}]"
        if isinstance(tool, dict) and isinstance(tool.get("function"), dict) and "type" not in tool:
            # Functions came before there were types.
            tool = {"type": "function", **tool}
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(kind, str) or not kind:
            raise invalid(place, "must be an object with a `type`")
        if kind in (*_CALLABLE, "namespace"):
            yield tool, place
        else:
            ignore("tools", kind)


def _own_name(tool: Any) -> Any:
    inner = tool.get(tool["type"]) if isinstance(tool, dict) and tool.get("type") in _CALLABLE else None
    return inner.get("name") if isinstance(inner, dict) else None


def _flatten(namespace: str, name: str) -> str:
    """A name for a function of a namespace that a model can read and write."""
    flat = _NOT_OF_NAME.sub("_", f"{namespace.rstrip('_')}__{name}")
    if len(flat) <= _MAX_FLAT:
        return flat
    digest = hashlib.sha256(f"{namespace}\0{name}".encode()).hexdigest()[:8]
    # The end of a name tells more than its beginning, which all of a namespace share.
    return f"{flat[:20]}_{digest}_{flat[-(_MAX_FLAT - 30) :]}"


def _custom(tool: dict[str, Any], where: str, flat: str, namespace: str | None) -> _Tool:
    """A custom tool as a function of one string. The model is told its grammar, which holds where calls are forced."""
    given, description = tool.get("format"), tool.get("description") or ""
    spec: GrammarSpec | None = None
    schema: dict[str, Any] = {"type": "string"}
    if not isinstance(given, dict | None) or (given or {}).get("type", "text") not in ("text", "grammar"):
        raise invalid(f"{where}.format.type", "must be text or grammar")
    if given is not None and given.get("type") == "grammar":
        # Chat has the grammar in an object of its own.
        inner, place = given.get("grammar"), f"{where}.format.grammar"
        if not isinstance(inner, dict):
            inner, place = given, f"{where}.format"
        syntax, definition = inner.get("syntax"), inner.get("definition")
        if syntax not in _SYNTAXES:
            raise invalid(f"{place}.syntax", f"must be one of {', '.join(_SYNTAXES)}")
        if not isinstance(definition, str) or not definition:
            raise invalid(f"{place}.definition", "must be a non-empty string")
        spec = GrammarSpec("grammar" if syntax == "lark" else "regex", definition, param=f"{place}.definition")
        if syntax == "regex":
            # Beside other tools a grammar of calls can hold this much.
            schema["pattern"] = f"^(?:{definition})$"
        rule = "this Lark grammar" if syntax == "lark" else "this regular expression"
        description = f"{description}\n\nThe input is free text that keeps {rule}:\n{definition}".strip()
    parameters = {"type": "object", "properties": {INPUT: schema}, "required": [INPUT], "additionalProperties": False}
    shown = {**parameters, "properties": {INPUT: {"type": "string"}}}
    declaration = {"type": "function", "function": {"name": flat, "description": description, "parameters": shown}}
    return _Tool(flat, tool["name"], namespace, declaration, parameters, f"{where}.format", False, True, spec)


def read_tools(body: Body) -> ToolPlan:
    """Raises RequestError (400) for broken declarations, and for a choice that cannot be met."""
    parallel = body.boolean("parallel_tool_calls", True)
    declared, choice = Declared(body.raw("tools")), body.raw("tool_choice")
    # Some families tell it in their answers.
    check_nesting("tool_choice", choice)
    mode, allowed, named = _read_choice("auto" if choice is None else choice, declared)
    if not declared.tools or not allowed:
        if mode == "required":
            raise invalid("tool_choice", "asks for a call, and `tools` has none that could be called")
        return ToolPlan()
    callable = {tool.flat: tool.parameters for tool in declared.tools if tool.flat in allowed}
    return ToolPlan(
        tools=[tool.declaration for tool in declared.tools],
        mode=mode,
        named=named,
        parallel=parallel and named is None,
        callable=callable,
        refused=frozenset(tool.flat for tool in declared.tools).difference(callable),
        strict=frozenset(tool.flat for tool in declared.tools if tool.strict and tool.flat in callable),
        places={tool.flat: tool.place for tool in declared.tools},
        custom={tool.flat: tool.spec for tool in declared.tools if tool.is_custom},
        origins={tool.flat: (tool.namespace, tool.name) for tool in declared.tools if tool.namespace is not None},
    )


def _read_choice(choice: Any, declared: Declared) -> tuple[str, set[str], str | None]:
    """Mode, the names that may be called, and the one that must be."""
    everything = {tool.flat for tool in declared.tools}
    if isinstance(choice, str):
        if choice not in _MODES:
            raise invalid("tool_choice", f"must be one of {', '.join(_MODES)}, or an object that names a function")
        return choice, everything, None
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(kind, str) and kind in _CALLABLE:
        name = _chosen(choice, "tool_choice", declared)
        return "required", {name}, name
    if kind == "namespace":
        inner = {tool.flat for tool in declared.tools if tool.namespace == choice.get("name")}
        if not inner:
            raise invalid("tool_choice.name", "names no namespace of `tools` with a function in it")
        return "required", inner, None
    if kind == "allowed_tools":
        fields = choice.get("allowed_tools", choice)
        tools = fields.get("tools") if isinstance(fields, dict) else None
        if not isinstance(tools, list) or not tools:
            raise invalid("tool_choice.allowed_tools.tools", "must be a list with at least one tool")
        if fields.get("mode") not in ("auto", "required"):
            raise invalid("tool_choice.allowed_tools.mode", "must be auto or required")
        names: set[str] = set()
        for index, tool in enumerate(tools):
            other = tool.get("type") if isinstance(tool, dict) else None
            if isinstance(other, str) and other and other not in _CALLABLE:
                ignore("tool_choice", other)
            else:
                names.add(_chosen(tool, f"tool_choice.allowed_tools.tools[{index}]", declared))
        return str(fields["mode"]), names, None
    if isinstance(kind, str) and kind:
        raise invalid("tool_choice", f"asks for {clean(kind)!r}, which is nothing that this server can call")
    raise invalid("tool_choice", f"must be one of {', '.join(_MODES)}, or an object that names a function")


def _chosen(value: Any, where: str, declared: Declared) -> str:
    """The flat name of what a choice names."""
    kind = value.get("type", "function") if isinstance(value, dict) else "function"
    if not isinstance(kind, str) or not kind:
        raise invalid(f"{where}.type", "must be a non-empty string")
    # The Responses API has the name beside the type.
    inner = value.get(kind, value) if isinstance(value, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str):
        raise invalid(f"{where}.{kind}.name", "must be a string")
    namespace = value.get("namespace")
    if not isinstance(namespace, str | None):
        raise invalid(f"{where}.namespace", "must be a string")
    wanted = (namespace or None, name, kind == "custom")
    found = [tool.flat for tool in declared.tools if (tool.namespace, tool.name, tool.is_custom) == wanted]
    if not found:
        raise invalid(where, f"names the function {name[:64]!r}, which is not in `tools`")
    return found[0]


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
