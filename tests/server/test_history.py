"""Histories, which no client can change: taken, left out or named in words, and never an error."""

# ruff: noqa: E501  (tables)

from __future__ import annotations

from typing import Any

from engine.text.chat_template import ChatTemplate
from tests.server.bad_fields import check_anthropic, check_shape
from tests.server.dictate import dictated
from tests.server.histories import (
    BYE,
    CHAT,
    FUNCTION,
    HI,
    IMAGE,
    INPUT_IMAGE,
    LEFT_OUT,
    MESSAGES,
    RESPONSES,
    TEMPLATE,
    URL,
    call,
    prompt,
    shown,
    stream,
)
from tests.server.support import Live, live, served_model

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
    # Thoughts among the parts are thoughts, and calls that frameworks keep there too are not said twice.
    *(
        ([HI, {"role": "assistant", "content": [part, {"type": "text", "text": "a"}]}], "[user::hi][assistant:hm:(a)]")
        for part in (
            {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
            {"type": "thinking", "thinking": "hm", "signature": "x"},
            {"type": "reasoning", "text": "hm"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        )
    ),
    (
        [HI, {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}],
              "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}],
        "[user::hi][assistant::+f={}]",
    ),
    # Thoughts that gateways keep beside the content.
    *(
        ([HI, {"role": "assistant", "content": "a", **kept}, BYE], "[user::hi][assistant:hm:a][user::bye]")
        for kept in (
            {"reasoning_details": [{"type": "reasoning.text", "text": "hm"}, {"type": "reasoning.encrypted", "data": "z"}]},
            {"reasoning_details": [{"type": "reasoning.summary", "summary": "hm"}], "reasoning_content": None},
            {"thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "x"}, None]},
            {"thinking_blocks": [{"type": "thinking", "thinking": "other"}], "reasoning_content": "hm"},
        )
    ),
    # Whatever a function gave back.
    *(
        ([HI, {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]},
          {"role": "tool", "tool_call_id": "c", "content": given}], f"[user::hi][assistant::+f={{}}][tool::{said}]")
        for given, said in (
            (42, "42"), (False, "false"), ({"a": [1, "é"]}, '{"a":[1,"é"]}'), ([1, 2], "[1,2]"), ([{"a": 1}], '[{"a":1}]'),
            (["a", "b"], "(a)(b)"), ([], ""),
        )
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
    *(
        (answered(given), f"[user::hi][assistant::+f={{}}][tool::{said}]")
        for given, said in ((5, "5"), (True, "true"), ({"a": 1}, '{"a":1}'), ([1], "[1]"), (["a"], "a"))
    ),
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
    # A page that was fetched, and tools that were found, on another server.
    *(
        ([HI, {"role": "assistant", "content": [{"type": f"{kind}_tool_result", "tool_use_id": "s", "content": found}]}, BYE],
         f"[user::hi][assistant::[{kind}_tool_result]\n{said}][user::bye]")
        for kind, found, said in (
            ("web_fetch", {"type": "web_fetch_result", "url": "http://p", "content":
                {"type": "document", "title": "P", "source": {"type": "text", "data": "words"}}}, "[document: P]\nwords"),
            ("tool_search", {"type": "tool_search_tool_search_result", "tool_references":
                [{"type": "tool_reference", "tool_name": "g"}]}, "[tool_reference: g]"),
        )
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
    ([{"type": "local_shell_call", "id": "l", "call_id": "c", "action": {"type": "exec", "command": ["ls"]}},
      {"type": "local_shell_call_output", "id": "l", "output": "r"}],
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
    ([{"type": "code_interpreter_call", "id": "x", "code": "1+1", "outputs": [{"type": "logs", "logs": "2"}]}],
     "[user::[code_interpreter_call]\n1+1\n2]"),
    ([{"type": "file_search_call", "id": "x", "queries": ["q"], "results": [{"text": "words", "score": 1}]}],
     "[user::[file_search_call]\nwords]"),
    # What a function gave back as it is, and calls that go by their own ids.
    ([{"type": "function_call", "id": "x", "name": "f", "arguments": "{}"},
      {"type": "function_call_output", "call_id": "x", "output": {"a": 1}}], '[assistant::+f={}][tool::{"a":1}]'),
    *(([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": given}], f"[assistant::+f={{}}][tool::{said}]")
      for given, said in ((5, "5"), (False, "false"), ([1, {"a": None}], '[1,{"a":null}]'), (["a", "b"], "a\nb"))),
    # Results that do not say whose they are: by the name of their function, else in order.
    ([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
      {"type": "function_call", "call_id": "d", "name": "g", "arguments": "{}"},
      {"type": "function_call_output", "name": "g", "output": "of g"},
      {"type": "function_call_output", "call_id": None, "output": "of f"}],
     "[assistant::+f={}+g={}][tool::of g][tool::of f]"),
    ([{"type": "function_call_output", "output": "r"}], "[user::[function_call_output]\nr]"),
    ([{"type": "computer_call", "call_id": "c", "actions": [{"type": "wait"}]}],
     '[assistant::+computer={"actions": [{"type": "wait"}]}]'),
    ([{"type": "program", "call_id": "c", "code": "f()"}, {"type": "program_output", "call_id": "c", "result": "r"}],
     "[user::[program]\nf()][user::[program_output]\nr]"),
    ([{"type": "additional_tools", "role": "developer", "tools": "none"},
      {"type": "configuration_update", "reasoning": {"effort": 5}, "text": 5}], ""),
    ([{"type": "reasoning", "summary": [], "encrypted_content": "foreign"}], "[assistant::]"),
    ([{"type": "reasoning", "summary": "hm"}], "[assistant:hm:]"),
    ([{"type": "reasoning", "summary": [], "content": "hm"}], "[assistant:hm:]"),
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


async def test_thinking_between_tools_begins_with_their_results() -> None:
    source = "{{ messages[-1].role }}{{ '<on>' if enable_thinking else '<off>' }}<think></think><tool_call></tool_call>"
    async with live(model=served_model(chat_template=ChatTemplate({"default": source}, {}))) as server:
        for messages, thinks in (
            ([HI], "user<off>"),
            (answered("r"), "tool<on>"),
            ([*answered("r"), BYE], "user<off>"),
        ):
            found, _ = await prompt(server, MESSAGES, {"messages": messages, "thinking": {"type": "between_tools"}})
            assert found.startswith(thinks)


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
