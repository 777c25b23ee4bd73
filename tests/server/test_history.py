"""What clients cannot change, histories and declarations: taken, left out or named in words, and never an error."""

# ruff: noqa: E501  (tables)

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest

from engine.text.chat_template import ChatTemplate
from server.protocol import ignored
from server.protocol.ignored import HEADER
from tests.server.bad_requests import check_anthropic, check_shape
from tests.server.dictate import CUTS, Cut, dictated
from tests.server.support import Live, live, served_model, tokenizer

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
# Shows every role, name and call of a conversation.
TEMPLATE = ChatTemplate(
    {
        "default": "{% for t in tools or [] %}<{{ t.function.name }}|{{ t.function.description }}>{% endfor %}"
        "{% for m in messages %}[{{ m.role }}:{{ m.reasoning_content }}:"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}({{ p.text }}){% endfor %}"
        "{% endif %}{% for c in m.tool_calls or [] %}+{{ c.function.name }}={{ c.function.arguments | tojson }}"
        "{% endfor %}]{% endfor %}<tool_call></tool_call>"
    },
    {},
)
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
INPUT_IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
LEFT_OUT = "[image left out: this model reads text only]"
FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
HI = {"role": "user", "content": "hi"}
BYE = {"role": "user", "content": "bye"}


def shown() -> Any:
    return live(model=served_model(chat_template=TEMPLATE, max_model_len=2048), tool_call_parser="hermes")


async def prompt(server: Live, path: str, body: dict[str, Any]) -> tuple[str, str]:
    """What the model is shown of a body, and what the answer says was left out."""
    body = {"max_output_tokens" if path == RESPONSES else "max_tokens": 4, **body}
    with dictated(server, "ok") as requests:
        async with server.http.post(server.url + path, json=body) as response:
            answer = await response.read()
            assert response.status == 200, answer
    text = tokenizer().decode(requests[0].prompt_token_ids, skip_special_tokens=False)
    return text.removesuffix("<tool_call></tool_call>"), response.headers.get(HEADER, "")


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


async def stream(server: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The data of named events."""
    async with server.http.post(server.url + path, json={**body, "stream": True}) as response:
        raw = await response.read()
        assert response.status == 200, raw
    return [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]


# ---- histories


CHATS: list[tuple[list[Any], str]] = [
    # A turn that was cut while thinking.
    *(
        ([HI, {"role": "assistant", **turn}, BYE], "[user::hi][assistant::][user::bye]")
        for turn in ({"content": None}, {}, {"content": []}, {"content": None, "tool_calls": []})
    ),
    (
        [HI, {"role": "assistant", "content": None, "reasoning_content": "hm"}, BYE],
        "[user::hi][assistant:hm:][user::bye]",
    ),
    ([HI, {"role": "assistant", "content": None, "refusal": "no"}, BYE], "[user::hi][assistant::no][user::bye]"),
    ([{"role": "user", "content": None}, BYE], "[user::][user::bye]"),
    (
        [HI, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, BYE],
        "[user::hi][assistant::(no)][user::bye]",
    ),
    # One picture does not end a session.
    (
        [{"role": "user", "content": [{"type": "text", "text": "see"}, URL]}, {"role": "assistant", "content": "x"}, BYE],
        f"[user::(see)({LEFT_OUT})][assistant::x][user::bye]",
    ),
    ([{"role": "user", "content": [URL]}, BYE], f"[user::({LEFT_OUT})][user::bye]"),
    (
        [
            HI,
            {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "t"}, URL]},
            {"role": "user", "content": [URL]},
        ],
        f"[user::hi][assistant::+f={{}}][tool::(t)({LEFT_OUT})][user::({LEFT_OUT})]",
    ),
    (
        [HI, {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}, {"role": "tool"}],
        "[user::hi][assistant::+f={}][tool::]",
    ),
    # Custom tools, older forms, and what is none of ours.
    (
        [
            HI,
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "c", "type": "custom", "custom": {"name": "p", "input": 'a"\n'}},
                    {"id": "w", "type": "web_search", "web_search": {}},
                ],
            },
            {"role": "tool", "tool_call_id": "c", "content": None},
        ],
        '[user::hi][assistant::+p={"input": "a\\"\\n"}][tool::]',
    ),
    (
        [HI, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
         {"role": "function", "name": "f", "content": "r"}],
        "[user::hi][assistant::+f={}][tool::r]",
    ),
    (
        [{"role": "user", "content": [{"type": "x_new", "text": "words"}, {"type": "y\r\nEvil: 1"}]}],
        "[user::([x_new]\nwords)([y__Evil__1 left out])]",
    ),
]  # fmt: skip


async def test_chats() -> None:
    async with shown() as server:
        for messages, expected in CHATS:
            assert (await prompt(server, CHAT, {"messages": messages}))[0] == expected, messages


def use(name: str, **given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": "u", "name": name, "input": given}


def result(content: Any, use_id: str = "u") -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": use_id, "content": content}


def answered(content: Any) -> list[Any]:
    """A conversation with a result of a tool."""
    return [HI, {"role": "assistant", "content": [use("f")]}, {"role": "user", "content": [result(content)]}]


CONVERSATIONS: list[tuple[list[Any], str]] = [
    *(
        ([HI, {"role": "assistant", "content": content}, BYE], "[user::hi][assistant::][user::bye]")
        for content in ([], None, "", [{"type": "redacted_thinking", "data": "x"}])
    ),
    ([HI, {"role": "assistant", "content": []}], "[user::hi]"),
    ([HI, {"role": "assistant", "content": [use("f", a=1)]}], '[user::hi][assistant::+f={"a": 1}]'),
    ([HI, {"role": "assistant", "content": [use("f", a=1)]}, BYE], '[user::hi][assistant::+f={"a": 1}][user::bye]'),
    ([HI, {"role": "user", "content": [result("r", "lost")]}], "[user::(hi)([tool_result])(r)]"),
    (answered([IMAGE]), f"[user::hi][assistant::+f={{}}][tool::{LEFT_OUT}]"),
    (answered(None), "[user::hi][assistant::+f={}][tool::]"),
    (answered([{"type": "tool_reference", "tool_name": "g"}]), "[user::hi][assistant::+f={}][tool::[tool_reference: g]]"),
    (
        answered([{"type": "search_result", "title": "T", "source": "http://s", "content": [{"type": "text", "text": "x"}]}]),
        "[user::hi][assistant::+f={}][tool::[search_result: T, http://s]\nx]",
    ),
    (
        answered([{"type": "document", "title": "D", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}]),
        "[user::hi][assistant::+f={}][tool::[document: D]\nx]",
    ),
    (
        answered([{"type": "document", "source": {"type": "base64", "data": "x"}}]),
        "[user::hi][assistant::+f={}][tool::[document left out: this model reads text only]]",
    ),
    # A program reads a file and puts it behind the result of its tool.
    ([*answered("r"), {"role": "user", "content": [IMAGE]}], f"[user::hi][assistant::+f={{}}][tool::r][user::{LEFT_OUT}]"),
    (
        [
            HI,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "foreign"},
                    {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
                    {
                        "type": "web_search_tool_result",
                        "tool_use_id": "s",
                        "content": [{"type": "web_search_result", "title": "Page", "encrypted_content": "z"}],
                    },
                    {"type": "text", "text": "so"},
                ],
            },
            BYE,
        ],
        "[user::hi][assistant:hm:([web_search_tool_result]\nPage)(so)][user::bye]",
    ),
    ([{"role": "user", "content": [IMAGE]}, BYE], f"[user::({LEFT_OUT})(bye)]"),
    ([HI, {"role": "system", "content": "s"}, {"role": "developer", "content": "d"}], "[user::hi][system::(s)(d)]"),
]  # fmt: skip


async def test_conversations() -> None:
    async with shown() as server:
        for messages, expected in CONVERSATIONS:
            assert (await prompt(server, MESSAGES, {"messages": messages}))[0] == expected, messages


ITEMS: list[tuple[list[Any], str]] = [
    ([{"type": "custom_tool_call", "call_id": "c", "name": "p", "input": "x"},
      {"type": "custom_tool_call_output", "call_id": "c", "output": "r"}], '[assistant::+p={"input": "x"}][tool::r]'),
    ([{"type": "function_call", "call_id": "c", "namespace": "n", "name": "f", "arguments": "{}"},
      {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "r"}, INPUT_IMAGE]}],
     f"[assistant::+n__f={{}}][tool::r\n{LEFT_OUT}]"),
    ([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}], "[assistant::+f={}]"),
    ([{"type": "function_call_output", "call_id": "c", "output": "r"}], "[user::[function_call_output]\nr]"),
    ([{"type": "function_call_output", "call_id": "c", "output": None}], ""),
    ([{"type": "local_shell_call", "id": "l", "call_id": "c", "action": {"type": "exec", "command": ["ls"]}},
      {"type": "function_call_output", "call_id": "c", "output": "r"}],
     '[assistant::+local_shell={"type": "exec", "command": ["ls"]}][tool::r]'),
    ([{"type": "shell_call", "call_id": "c", "action": {"commands": ["ls"]}},
      {"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "o", "stderr": "e", "outcome": {"type": "exit"}}]}],
     '[assistant::+shell={"commands": ["ls"]}][tool::o\ne]'),
    ([{"type": "tool_search_call", "call_id": "c", "execution": "client", "arguments": {"query": "q"}},
      {"type": "tool_search_output", "call_id": "c", "tools": [FUNCTION]}],
     '[assistant::+tool_search={"query": "q"}][tool::[function: f]]'),
    ([{"type": "computer_call", "call_id": "c", "action": {"type": "click"}},
      {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot", "image_url": "x"}}],
     f'[assistant::+computer={{"type": "click"}}][tool::{LEFT_OUT}]'),
    ([{"type": "mcp_call", "id": "m", "server_label": "s", "name": "g", "arguments": "{}", "output": "r"}],
     "[assistant::+g={}][tool::r]"),
    *(([{"type": kind, "id": "x", "status": "completed", "encrypted_content": "z", "action": {"type": "search"}}], "")
      for kind in ("web_search_call", "compaction", "image_generation_call", "mcp_list_tools", "ghost_snapshot")),
    ([{"type": "agent_message", "content": [{"type": "input_text", "text": "words"}]}], "[user::[agent_message]\nwords]"),
    ([{"type": "reasoning", "summary": [], "encrypted_content": "foreign"}], "[assistant::]"),
    ([{"type": "item_reference", "id": "gone"}], ""),
    ([{"role": "assistant", "content": []}], "[assistant::]"),
    ([{"role": "assistant", "content": None}], "[assistant::]"),
    ([{"role": "user", "content": [INPUT_IMAGE]}], f"[user::{LEFT_OUT}]"),
]  # fmt: skip


async def test_items() -> None:
    async with shown() as server:
        for items, expected in ITEMS:
            found, _ = await prompt(server, RESPONSES, {"input": [HI, *items, BYE]})
            assert found == f"[user::hi]{expected}[user::bye]", items


async def test_a_thread_goes_on_from_kept_items_of_all_kinds() -> None:
    async with shown() as server:
        items = [HI, *(item for row, _ in ITEMS for item in row if "id" not in item), BYE]
        with dictated(server, "ok"):
            status, first = await server.post(RESPONSES, {"input": items, "max_output_tokens": 4})
            assert status == 200
        told, _ = await prompt(server, RESPONSES, {"input": [*items, {"role": "assistant", "content": "ok"}, BYE]})
        kept, _ = await prompt(server, RESPONSES, {"input": "bye", "previous_response_id": first["id"]})
        assert kept == told
        async with server.http.get(f"{server.url}{RESPONSES}/{first['id']}/input_items?limit=100") as response:
            assert len((await response.json())["data"]) == len(items)


async def test_a_picture_in_the_newest_turn_is_an_error_and_the_next_turn_goes_on(server: Live) -> None:
    text = {"type": "text", "text": "what is it?"}
    for path, first, name, check in (
        (CHAT, [text, URL], "messages[0].content[1]", check_shape),
        (MESSAGES, [text, IMAGE], "messages[0].content[1]", check_anthropic),
        (RESPONSES, [text, INPUT_IMAGE], "input[0].content[1]", check_shape),
    ):
        field = "input" if path == RESPONSES else "messages"
        body: dict[str, Any] = {"max_output_tokens" if path == RESPONSES else "max_tokens": 2}
        asked = {"role": "user", "content": first}
        for more in ([], [{"role": "system", "content": "note"}]):
            error = check(*await server.post(path, {**body, field: [asked, *more]}))
            assert name in error["message"] and "reads text only" in error["message"]
        assert (await server.post(path, {**body, field: [asked, BYE]}))[0] == 200


# ---- declarations


HOSTED: dict[str, list[Any]] = {
    CHAT: [{"type": "web_search"}, {"type": "retrieval", "x": 1}],
    MESSAGES: [
        {"type": f"{kind}", "name": kind.rpartition("_")[0]}
        for kind in ("web_search_20250305", "bash_20250124", "text_editor_20250728", "computer_20250124")
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


# ---- thinking, and what Claude Code puts first


async def test_a_billing_header_does_not_reach_the_prompt() -> None:
    rest = "You are an agent. " * 20
    async with live(model=served_model(chat_template=TEMPLATE), tool_call_parser="hermes") as server:
        cached = []
        for cch in ("e2f", "a01"):
            billing = f"x-anthropic-billing-header: cc_version=2.1.197.{cch}; cc_entrypoint=cli; cch={cch};"
            system = [{"type": "text", "text": billing}, {"type": "text", "text": rest, "cache_control": {}}]
            body = {"system": system, "messages": [HI], "max_tokens": 1}
            _, answer = await server.post(MESSAGES, body)
            usage = answer["usage"]
            cached.append((usage["cache_read_input_tokens"], usage["input_tokens"]))
            found, header = await prompt(server, MESSAGES, body)
            assert found == f"[system::{rest}][user::hi]" and header == "system.x-anthropic-billing-header"
            found, _ = await prompt(server, MESSAGES, {**body, "system": f"{billing}\n{rest}"})
            assert found == f"[system::{rest}][user::hi]"
            assert (await prompt(server, MESSAGES, {**body, "system": billing}))[0] == "[user::hi]"
        assert cached[0][0] == 0 and cached[1][0] > 0.8 * sum(cached[1])


async def test_thinking_is_signed_and_only_where_it_is_asked_for() -> None:
    async with live(reasoning_parser="qwen3") as server:
        said = f"<think>Hm.</think>Yes. {call('f', '{}')}"
        tools = [{"name": "f", "input_schema": {}}]
        body = {"messages": [HI], "tools": tools, "max_tokens": 200}
        with dictated(server, said):
            for fields, kinds in (
                ({"thinking": {"type": "adaptive"}}, ["thinking", "text", "tool_use"]),
                ({"thinking": {"type": "disabled"}}, ["text", "tool_use"]),
                ({}, ["text", "tool_use"]),
            ):
                _, whole = await server.post(MESSAGES, {**body, **fields})
                assert [block["type"] for block in whole["content"]] == kinds
                events = await stream(server, MESSAGES, {**body, **fields})
                signed = [event["delta"] for event in events if event.get("delta", {}).get("type") == "signature_delta"]
                if "thinking" in kinds:
                    [signature] = signed
                    assert whole["content"][0]["signature"] == signature["signature"] != ""
                else:
                    assert not signed
        # A forced call begins at once.
        for choice in ({"type": "any"}, {"type": "tool", "name": "f"}):
            for fields in ({}, {"thinking": {"type": "enabled", "budget_tokens": 50}}):
                for turn in range(4):
                    prompt = [{"role": "user", "content": f"hi {turn}"}]
                    forced = {**body, "messages": prompt, "tool_choice": choice, **fields, "max_tokens": 60}
                    _, answer = await server.post(MESSAGES, forced)
                    assert {block["type"] for block in answer["content"]} <= {"thinking", "tool_use"}, answer
                    assert not any(block.get("thinking") for block in answer["content"]), answer


async def test_calls_of_names_that_nobody_declared_reach_the_client(server: Live) -> None:
    with dictated(server, call("Bash", '{"a": 1}')):
        _, said = await server.post(
            CHAT, {"messages": [HI], "tools": [{"type": "function", "function": {"name": "bash"}}], "max_tokens": 99}
        )
        assert said["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "Bash", "arguments": '{"a": 1}'}
        _, said = await server.post(
            MESSAGES, {"messages": [HI], "tools": [{"name": "bash", "input_schema": {}}], "max_tokens": 99}
        )
        assert (said["content"][0]["name"], said["stop_reason"]) == ("Bash", "tool_use")
        _, said = await server.post(RESPONSES, {"input": "hi", "tools": [FUNCTION], "max_output_tokens": 99})
        assert (said["output"][0]["type"], said["output"][0]["name"]) == ("function_call", "Bash")
        # Nobody looks for calls where nothing was declared, and what was declared and excluded stays words.
        _, said = await server.post(CHAT, {"messages": [HI], "max_tokens": 99})
        assert "tool_calls" not in said["choices"][0]["message"]
        tools = [{"type": "function", "function": {"name": name}} for name in ("bash", "Bash")]
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tools[0]]}}
        _, said = await server.post(CHAT, {"messages": [HI], "tools": tools, "tool_choice": choice, "max_tokens": 99})
        assert "tool_calls" not in said["choices"][0]["message"]


REQUIRED = (
    "id object created_at completed_at status incomplete_details model previous_response_id instructions output error "
    "tools tool_choice truncation parallel_tool_calls text top_p presence_penalty frequency_penalty top_logprobs "
    "temperature reasoning user usage max_output_tokens max_tool_calls store background service_tier metadata "
    "safety_identifier prompt_cache_key"
)


async def test_a_response_has_every_field_that_open_responses_asks_for(server: Live) -> None:
    body = {"input": "hi", "max_output_tokens": 2, "presence_penalty": 0.5, "service_tier": "flex"}
    _, answer = await server.post(RESPONSES, body)
    events = await stream(server, RESPONSES, body)
    for response in (answer, *(event["response"] for event in events if "response" in event)):
        assert set(REQUIRED.split()) <= set(response)
        assert (response["presence_penalty"], response["frequency_penalty"]) == (0.5, 0.0)
