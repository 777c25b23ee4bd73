"""Declarations of tools, and wishes: what can be called is, and what nobody here can run is left out."""

# ruff: noqa: E501  (tables)

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from jsonschema import Draft202012Validator

from server.protocol import ignored
from server.protocol.anthropic_tools import client_tool
from server.protocol.ignored import HEADER
from tests.server.bad_fields import check_anthropic
from tests.server.dictate import CUTS, Cut, dictated
from tests.server.histories import BYE, CHAT, FUNCTION, HI, MESSAGES, RESPONSES, call, prompt, shown, stream
from tests.server.support import Live, live, served_model

HOSTED: dict[str, list[Any]] = {
    CHAT: [{"type": "web_search"}, {"type": "retrieval", "x": 1}],
    MESSAGES: [
        {"type": f"{kind}", "name": kind.rpartition("_")[0]}
        for kind in ("web_search_20250305", "bash_2025", "tool_search_tool_regex_20251119", "computer_20250124")
    ]
    + [{"type": "function"}],
    RESPONSES: [
        {"type": kind}
        for kind in ("web_search", "tool_search", "local_shell", "mcp", "image_generation", "code_interpreter")
    ],
}
DECLARED: dict[str, Any] = {
    CHAT: {"type": "function", "function": {"name": "f", "description": "d"}},
    MESSAGES: {
        "name": "f",
        "description": "d",
        "input_schema": {},
        "defer_loading": True,
        "cache_control": {"type": "ephemeral"},
        "input_examples": [{}],
        "allowed_callers": ["code_execution_20250825"],
        "eager_input_streaming": True,
    },
    RESPONSES: FUNCTION,
}


async def test_tools_that_nobody_here_can_run_are_left_out() -> None:
    async with shown() as server:
        for path, tools in HOSTED.items():
            field = "input" if path == RESPONSES else "messages"
            body = {field: [HI], "tools": [*tools, DECLARED[path]]}
            found, header = await prompt(server, path, body)
            assert found == "<f|d>[user::hi]"
            assert tools[0]["type"] in header and header.count("tools.") == len(tools)
            # Nothing but those: as without tools.
            assert (await prompt(server, path, {**body, "tools": tools}))[0] == "[user::hi]"
            assert (await prompt(server, path, {**body, "tools": []}))[0] == "[user::hi]"
    async with live() as server:
        for choice in ("auto", "none"):
            assert (await server.post(CHAT, {"messages": [HI], "tool_choice": choice, "max_tokens": 1}))[0] == 200


# Of the tools that Anthropic defines, those that clients run: by type and name, inputs that they take.
CLIENT_TOOLS: list[tuple[str, str, list[dict[str, Any]]]] = [
    ("bash_20250124", "bash", [{"command": "ls"}, {"restart": True}]),
    ("bash_20241022", "shell", [{"command": "ls"}]),
    (
        "text_editor_20250728",
        "str_replace_based_edit_tool",
        [
            {"command": "view", "path": "a", "view_range": [1, -1]},
            {"command": "create", "path": "a", "file_text": "x"},
            {"command": "str_replace", "path": "a", "old_str": "x", "new_str": "y"},
            {"command": "insert", "path": "a", "insert_line": 0, "insert_text": "z"},
        ],
    ),
    ("text_editor_20250429", "edit", [{"command": "insert", "path": "a", "insert_line": 0, "new_str": "z"}]),
    ("text_editor_20250124", "edit", [{"command": "undo_edit", "path": "a"}]),
    (
        "memory_20250818",
        "memory",
        [
            {"command": "insert", "path": "/memories/a", "insert_line": 0, "insert_text": "z"},
            {"command": "rename", "old_path": "/memories/a", "new_path": "/memories/b"},
        ],
    ),
]


@pytest_asyncio.fixture
async def wide() -> AsyncIterator[Live]:
    """With room for what large tools take of the prompt."""
    async with live(model=served_model(max_model_len=2048)) as server:
        yield server


async def test_tools_that_anthropic_defines_and_clients_run_can_be_called(wide: Live) -> None:
    for kind, name, inputs in CLIENT_TOOLS:
        tools = [{"type": kind, "name": name, "cache_control": {"type": "ephemeral"}}]
        body = {"messages": [HI], "tools": tools, "max_tokens": 200, "tool_choice": {"type": "tool", "name": name}}
        declared = client_tool(kind)
        assert declared is not None
        schema = Draft202012Validator(declared["parameters"])
        for given in inputs:
            with dictated(wide, call(name, json.dumps(given))):
                async with wide.http.post(wide.url + MESSAGES, json=body) as response:
                    answer = await response.json()
            assert response.status == 200 and HEADER not in response.headers, answer
            assert [(block["name"], block["input"]) for block in answer["content"]] == [(name, given)]
            schema.validate(given)
            assert not schema.is_valid({**given, "command": 5}) and set(given) <= set(
                declared["parameters"]["properties"]
            )
    assert client_tool("text_editor_20250728") != client_tool("text_editor_20250124")
    async with shown() as other:
        tool: dict[str, Any] = {"type": "bash_20250124", "name": "b"}
        found, _ = await prompt(other, MESSAGES, {"messages": [HI], "tools": [tool]})
        assert found.startswith("<b|Run a command")
    for name in (None, "a b", 5, {}):
        status, answer = await wide.post(
            MESSAGES, {"messages": [HI], "tools": [{"type": "memory_20250818", "name": name}], "max_tokens": 1}
        )
        assert "`tools[0].name`" in check_anthropic(status, answer)["message"]


async def test_an_effort_that_is_newer_than_this_server_is_the_highest(server: Live) -> None:
    for effort, told in (
        ("high", None),
        ("max", None),
        ("ultra", "output_config.effort.ultra"),
        ("a\r\nb", "output_config.effort.a__b"),
    ):
        body = {"messages": [HI], "max_tokens": 1, "output_config": {"effort": effort}}
        async with server.http.post(server.url + MESSAGES, json=body) as response:
            assert response.status == 200 and response.headers.get(HEADER) == told


async def test_a_search_of_the_clients_is_a_call_and_what_it_finds_can_be_called(server: Live) -> None:
    search = {"type": "tool_search", "execution": "client", "description": "Finds tools."}
    found = [
        {"type": "namespace", "name": "mcp", "tools": [FUNCTION, FUNCTION | {"name": "g"}, {"type": "x"}]},
        FUNCTION | {"name": "h", "defer_loading": True},
        # What is broken in a history is left out.
        *(
            {"type": "function"},
            {"type": "function", "name": "a b"},
            5,
            {"type": "namespace"},
            {"type": "custom", "name": []},
        ),
    ]
    body = {"tools": [search, FUNCTION], "max_output_tokens": 100}
    with dictated(server, call("tool_search", '{"query": "q"}')):
        _, whole = await server.post(RESPONSES, {**body, "input": "hi"})
        events = await stream(server, RESPONSES, {**body, "input": "hi"})
    for response in (whole, events[-1]["response"]):
        [item] = response["output"]
        assert (item["type"], item["execution"], item["arguments"]) == ("tool_search_call", "client", {"query": "q"})
        assert item["call_id"] and item["status"] == "completed"
    assert [event["type"] for event in events[2:-1]] == ["response.output_item.added", "response.output_item.done"]
    output = {"type": "tool_search_output", "call_id": item["call_id"], "execution": "client", "tools": found}
    # Both as a kept thread and as one that the client sends whole.
    for more in ({"input": [output], "previous_response_id": whole["id"]}, {"input": [HI, item, output]}):
        with dictated(server, call("mcp__g", "{}") + call("h", "{}")):
            status, answer = await server.post(RESPONSES, {**body, **more})
        assert status == 200, answer
        calls = [(one["type"], one.get("namespace"), one["name"]) for one in answer["output"]]
        assert calls == [("function_call", "mcp", "g"), ("function_call", None, "h")]
    async with shown() as other:
        text, header = await prompt(
            other, RESPONSES, {"input": [HI, item, output, output], "tools": [search, FUNCTION]}
        )
        assert text.startswith("<tool_search|Finds tools.><f|d><mcp__f|d><mcp__g|d><h|d>[user::hi]")
        assert "input.tool_search_output.tools" in header
        # Without the search nothing of it is declared; one that a server would run is left out.
        for tools in ([FUNCTION], [{"type": "tool_search"}, FUNCTION]):
            text, _ = await prompt(other, RESPONSES, {"input": [HI, item, output], "tools": tools})
            assert text.startswith("<f|d>[user::hi]")
        # Deferred or not, what is declared can be called.
        deferred = {"type": "namespace", "name": "n", "tools": [FUNCTION | {"defer_loading": True}]}
        text, _ = await prompt(other, RESPONSES, {"input": "hi", "tools": [{"type": "tool_search"}, deferred]})
        assert text.startswith("<n__f|d>[user::hi]")
    # It can be insisted on, alone or among others.
    pick = {"type": "tool_search"}
    for choice in (pick, {"type": "allowed_tools", "mode": "required", "tools": [pick]}):
        status, answer = await server.post(RESPONSES, {**body, "input": "hi", "tool_choice": choice})
        assert status == 200 and {item["type"] for item in answer["output"]} == {"tool_search_call"}
    for tools in ([FUNCTION], [{"type": "tool_search"}, FUNCTION]):
        status, answer = await server.post(RESPONSES, {"input": "hi", "tools": tools, "tool_choice": pick})
        assert status == 400 and answer["error"]["param"] == "tool_choice"
    for broken in ({"parameters": 5}, {"description": 5}):
        status, answer = await server.post(RESPONSES, {"input": "hi", "tools": [search | broken]})
        assert status == 400 and answer["error"]["param"] == f"tools[0].{next(iter(broken))}"


async def test_tools_and_settings_that_come_in_the_input() -> None:
    more = {"type": "additional_tools", "role": "developer"}
    broken = {"type": "function", "name": "no name"}
    inner = {"type": "namespace", "name": "n", "tools": [FUNCTION]}
    items = [
        HI,
        {**more, "tools": [FUNCTION, {"type": "web_search"}]},
        {**more, "tools": [broken, inner, FUNCTION]},
        BYE,
    ]
    async with shown() as server:
        found, header = await prompt(server, RESPONSES, {"input": items})
        assert found == "<f|d><n__f|d>[user::hi][user::bye]"
        assert header.split(", ") == ["tools.web_search", "input.additional_tools.tools"]
        found, _ = await prompt(server, RESPONSES, {"input": items, "tools": [FUNCTION | {"description": "own"}]})
        assert found.startswith("<f|own><n__f|d>[user")
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "s", "schema": schema, "strict": True}
    update = {"type": "configuration_update", "text": {"format": form}, "reasoning": {"effort": "low"}}
    plain = {"type": "configuration_update", "text": {"format": {"type": "text"}}}
    async with live() as other:
        choice = {"type": "function", "name": "f", "namespace": "n"}
        status, answer = await other.post(RESPONSES, {"input": items, "tool_choice": choice, "max_output_tokens": 99})
        assert status == 200 and answer["output"][0]["namespace"] == "n", answer
        status, answer = await other.post(RESPONSES, {"input": [HI, update, BYE], "max_output_tokens": 40})
        assert status == 200 and json.loads(answer["output"][-1]["content"][0]["text"]) == {"a": 1}
        with dictated(other, "ok"):
            status, answer = await other.post(RESPONSES, {"input": [HI, update, plain, BYE], "max_output_tokens": 40})
        assert status == 200 and answer["output"][-1]["content"][0]["text"] == "ok"


async def test_functions_of_namespaces() -> None:
    tools = [
        {"type": "function", "name": "mcp__s__f", "description": "plain"},
        {"type": "namespace", "name": "mcp__s", "description": "S.", "tools": [FUNCTION, {"type": "x"}]},
        {"type": "namespace", "name": "n" * 100, "tools": [FUNCTION, FUNCTION | {"name": "g" * 100}]},
    ]
    async with shown() as server:
        found, _ = await prompt(server, RESPONSES, {"input": "hi", "tools": tools})
        names = [part.split("|")[0] for part in found.split("[user")[0].removeprefix("<").split("><")]
        assert names[:2] == ["mcp__s__f", "mcp__s__f_2"] and "S.\n\nd" in found
        assert len(set(names)) == 4 and all(len(name) <= 64 for name in names)
        # History comes by the same names.
        past = {"type": "function_call", "call_id": "c", "namespace": "mcp__s", "name": "f", "arguments": "{}"}
        found, _ = await prompt(server, RESPONSES, {"input": [HI, past, BYE], "tools": tools})
        assert found.endswith("[user::hi][assistant::+mcp__s__f_2={}][user::bye]")


@pytest.mark.parametrize("cut", CUTS)
async def test_a_call_names_its_namespace_apart(server: Live, cut: Cut) -> None:
    tools = [{"type": "namespace", "name": "mcp__s", "description": "S.", "tools": [FUNCTION]}, {"type": "web_search"}]
    body = {"input": "hi", "tools": tools, "max_output_tokens": 200}
    with dictated(server, call("mcp__s__f", '{"a": 1}'), cut=cut):
        status, whole = await server.post(RESPONSES, body)
        events = await stream(server, RESPONSES, body)
    assert status == 200, whole
    [item] = whole["output"]
    assert {key: item[key] for key in ("type", "namespace", "name", "arguments")} == {
        "type": "function_call",
        "namespace": "mcp__s",
        "name": "f",
        "arguments": '{"a": 1}',
    }
    done = next(event for event in events if event["type"] == "response.output_item.done")["item"]
    assert {**done, "id": 0, "call_id": 0} == {**item, "id": 0, "call_id": 0}
    [named] = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert (named["name"], named["arguments"]) == ("f", '{"a": 1}')
    assert whole["tools"][0]["type"] == "namespace"
    # What comes back is understood.
    status, next_one = await server.post(
        RESPONSES,
        body | {"input": [HI, item, {"type": "function_call_output", "call_id": item["call_id"], "output": "r"}]},
    )
    assert status == 200, next_one


async def test_choices_of_functions_in_namespaces(server: Live) -> None:
    tools = [FUNCTION, {"type": "namespace", "name": "n", "tools": [FUNCTION]}]
    body = {"input": "hi", "tools": tools, "max_output_tokens": 100}
    for choice, namespace in (
        ({"type": "function", "name": "f"}, None),
        ({"type": "function", "name": "f", "namespace": "n"}, "n"),
        ({"type": "namespace", "name": "n"}, "n"),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "mcp"}, {"type": "function", "name": "f", "namespace": "n"}]}, "n"),
    ):  # fmt: skip
        status, answer = await server.post(RESPONSES, {**body, "tool_choice": choice})
        assert status == 200, answer
        assert (answer["output"][0]["name"], answer["output"][0].get("namespace")) == ("f", namespace)


PATCH = {
    "type": "grammar",
    "syntax": "lark",
    "definition": 'start: "*** Begin Patch" LF line+ "*** End Patch" LF?\nline: "+" /[a-z"]{1,4}/ LF -> added\n'
    "%import common.LF",
}
DIGITS = {"type": "grammar", "syntax": "regex", "definition": "[0-9]{3}-[0-9]{2}"}
INPUT = '*** Begin\n+a "b" \\ é 😊\t'


@pytest.mark.parametrize("cut", CUTS)
async def test_custom_tools(server: Live, cut: Cut) -> None:
    text = call("patch", json.dumps({"input": INPUT}, ensure_ascii=cut == "whole"))
    tool = {"name": "patch", "description": "d"}
    body = {"input": "hi", "tools": [{"type": "custom", **tool, "format": PATCH}], "max_output_tokens": 250}
    with dictated(server, text, cut=cut):
        status, whole = await server.post(RESPONSES, body)
        assert status == 200, whole
        events = await stream(server, RESPONSES, body)
        chat = {"messages": [HI], "tools": [{"type": "custom", "custom": tool}], "max_tokens": 250}
        status, said = await server.post(CHAT, chat)
        chunks = await stream(server, CHAT, chat)
    [item] = whole["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "patch", INPUT)
    pieces = [event["delta"] for event in events if event["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(pieces) == INPUT and (cut == "whole" or len(pieces) > 9)
    [done] = [event for event in events if event["type"] == "response.custom_tool_call_input.done"]
    assert done["input"] == INPUT and not any("function_call" in event["type"] for event in events)
    [made] = said["choices"][0]["message"]["tool_calls"]
    assert made["type"] == "custom" and made["custom"] == {"name": "patch", "input": INPUT}
    deltas = [one for chunk in chunks for c in chunk["choices"] for one in c["delta"].get("tool_calls", ())]
    assert deltas[0]["type"] == "custom" and deltas[0]["custom"]["name"] == "patch"
    assert "".join(one["custom"]["input"] for one in deltas) == INPUT
    # And back.
    output = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "done"}
    status, answer = await server.post(RESPONSES, {**body, "input": [HI, item, output], "max_output_tokens": 2})
    assert status == 200, answer


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"input": "a', "a"),
        ('{"input": "\\u00e9\\ud83d\\ude0a\\ud83d"}', "é😊"),
        ('{"patch": "x"}', "x"),
        ('{"input": {"a": 1}}', '{"input": {"a": 1}}'),
        ("{}", ""),
        ('{ "input" : "x", "more": 1}', "x"),
    ],
)
async def test_inputs_of_any_shape(server: Live, arguments: str, expected: str) -> None:
    body = {"input": "hi", "tools": [{"type": "custom", "name": "c"}], "max_output_tokens": 200}
    for cut in CUTS:
        with dictated(server, call("c", arguments)[: None if arguments.endswith("}") else -14], cut=cut):
            _, answer = await server.post(RESPONSES, body)
            events = await stream(server, RESPONSES, body)
        item = next(one for one in answer["output"] if one["type"] == "custom_tool_call")
        assert item["input"].startswith(expected), answer
        if arguments.endswith("}") and "ud83d" not in arguments:
            assert item["input"] == expected
        pieces = [event["delta"] for event in events if event["type"].endswith("_input.delta")]
        assert "".join(pieces) == item["input"]


async def test_a_forced_custom_tool_keeps_its_grammar(server: Live) -> None:
    free = {"type": "custom", "name": "free"}
    for form, matches in (
        (PATCH, r"\*\*\* Begin Patch\n(\+[a-z\"]{1,4}\n)+\*\*\* End Patch\n?"),
        (DIGITS, r"\d{3}-\d{2}"),
    ):
        for tools, choice in (
            ([{"type": "custom", "name": "c", "format": form}], "required"),
            ([free, {"type": "custom", "name": "c", "format": form}], {"type": "custom", "name": "c"}),
        ):
            for seed in range(3):
                body = {"input": "hi", "tools": tools, "tool_choice": choice, "max_output_tokens": 150, "seed": seed}
                status, answer = await server.post(RESPONSES, body)
                assert status == 200, answer
                [item] = answer["output"]
                assert (item["type"], item["name"]) == ("custom_tool_call", "c")
                if answer["status"] == "completed":
                    assert re.fullmatch(matches, item["input"]), item
                events = await stream(server, RESPONSES, body)
                assert events[-1]["response"]["output"][0]["input"] == item["input"]
    # Beside others a regular expression still holds.
    body = {"input": "hi", "tools": [FUNCTION, {"type": "custom", "name": "c", "format": DIGITS}], "seed": 1}
    body |= {"tool_choice": "required", "max_output_tokens": 200, "parallel_tool_calls": False}
    for seed in range(8):
        status, answer = await server.post(RESPONSES, {**body, "seed": seed})
        assert status == 200
        for item in answer["output"]:
            assert item["type"] == "function_call" or re.fullmatch(r"\d{3}-\d{2}", item["input"])


async def test_the_grammar_of_a_custom_tool_is_shown() -> None:
    async with shown() as server:
        tool = {"type": "custom", "name": "p", "description": "Patch.", "format": PATCH}
        found, _ = await prompt(server, RESPONSES, {"input": "hi", "tools": [tool]})
        assert found.startswith("<p|Patch.\n\nThe input is free text that keeps this Lark grammar:\nstart: ")
        # One that nobody needs is not judged.
        broken = {"type": "custom", "name": "p", "format": PATCH | {"definition": "start: nothing"}}
        await prompt(server, RESPONSES, {"input": "hi", "tools": [broken]})


# ---- wishes


@pytest.mark.parametrize(
    ("path", "fields", "kind"),
    [
        (RESPONSES, {"service_tier": "flex"}, "service_tier"),
        (RESPONSES, {"background_options": {"completion_window": "8h"}}, "background_options"),
        (RESPONSES, {"image": {"context_compression": "disabled"}}, "image"),
        (RESPONSES, {"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
        (RESPONSES, {"context_management": [{"type": "compaction", "compact_threshold": 9}]}, "context_management"),
        (RESPONSES, {"include": ["web_search_call.action.sources"]}, "include.web_search_call.action.sources"),
        (RESPONSES, {"include": ["a\r\nb: c\x00é" * 20]}, "include.a__b__c__"),
        (RESPONSES, {"reasoning": {"summary": "detailed"}}, ""),
        (RESPONSES, {"truncation": "auto", "safety_identifier": "x", "max_tool_calls": 3}, ""),
        (RESPONSES, {"stream_options": {"include_obfuscation": False}, "stream": True}, ""),
        (MESSAGES, {"service_tier": "priority", "speed": "fast"}, "service_tier, speed"),
        (MESSAGES, {"context_management": {"edits": [{"type": "x"}]}}, "context_management"),
        (MESSAGES, {"mcp_servers": [{"url": "http://127.0.0.1"}], "container": "c"}, "container, mcp_servers"),
        (MESSAGES, {"thinking": {"type": "adaptive", "display": "new", "budget_tokens": 5}}, ""),
        (MESSAGES, {"output_config": {"effort": "high", "task_budget": {"total": 5}}}, ""),
        (CHAT, {"web_search_options": {"search_context_size": "low"}}, "web_search_options"),
        (CHAT, {"service_tier": "flex", "prompt_cache_retention": "24h", "thinking": {"type": "adaptive"}}, ""),
    ],
)
async def test_wishes_that_change_no_answer(server: Live, path: str, fields: dict[str, Any], kind: str) -> None:
    body = {"input" if path == RESPONSES else "messages": [HI], **fields}
    body["max_output_tokens" if path == RESPONSES else "max_tokens"] = 8
    async with server.http.post(server.url + path, json=body) as response:
        assert response.status == 200, await response.read()
        header = response.headers.get(HEADER, "")
    assert header.startswith(kind) if kind.startswith("include.a") else header == kind


async def test_what_was_left_out_is_told_once_in_the_log(
    server: Live, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ignored, "_logged", set())
    evil = "x\r\nSet-Cookie: a=b\x1b[31m\u2028" + "y" * 200
    tools = [{"type": "function", "function": {"name": "f"}}, *({"type": f"{n}{evil}"} for n in range(300))]
    with caplog.at_level(logging.INFO, "oneloop.server"):
        for stream in (False, True, False):
            body = {"messages": [HI], "tools": tools, "max_tokens": 1, "stream": stream}
            async with server.http.post(server.url + CHAT, json=body) as response:
                assert response.status == 200
                await response.read()
                header = response.headers[HEADER]
            assert "Set-Cookie" not in response.headers
            assert header.count(",") == 15 and len(header) < 2000 and header.isprintable() and header.isascii()
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(lines) == len(set(lines)) == 256
    assert all(len(line) < 200 and line.isprintable() and line.isascii() for line in lines)
