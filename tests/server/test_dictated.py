"""Outputs with the slips that models make, dictated through the whole server: what clients get of calls and reasoning.

Every text is said whole and one character a token, and read streamed and not, which must give the same message.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.text.chat_template import ChatTemplate
from tests.server.dictate import CUTS, Cut, dictated
from tests.server.support import Live, live, served_model

Json = dict[str, Any]
Call = tuple[str, str]
# Text, content, reasoning, calls.
Row = tuple[str, str, str, list[Call]]

DS_ALL, DS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
DS_CALL, DS_SEP, DS_CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
TEXT = {"type": "string"}
OPTIONAL: dict[str, Any] = {
    "a": {"anyOf": [TEXT, {"type": "null"}]},
    "b": {"type": ["string", "null"]},
    "c": {"oneOf": [TEXT, {"type": "array"}]},
    "d": {"$ref": "#/$defs/level"},
    "e": {"const": "7"},
    "g": {"allOf": [TEXT]},
    "i": {"type": ["integer", "null"]},
    "o": {"type": "object"},
}
SCHEMAS: dict[str, Json] = {
    "f": {"type": "object", "properties": {"city": TEXT, "state": TEXT, "cmd": TEXT, "n": {"type": "integer"}}},
    "opt": {"type": "object", "properties": OPTIONAL, "$defs": {"level": {"enum": ["1", "2"]}}},
    "write_file": {"type": "object", "properties": {"path": TEXT, "content": TEXT}},
    "now": {"type": "object", "properties": {}},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]


def qwen(inner: str, name: str = "f") -> str:
    return f"<tool_call>\n<function={name}>\n{inner}\n</function>\n</tool_call>"


def parameter(name: str, value: str) -> str:
    return f"<parameter={name}>\n{value}\n</parameter>"


def tagged(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


def named(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def typed(name: str, value: str, found: Any) -> Row:
    """A bare value of `opt`, and what it is in JSON."""
    return qwen(parameter(name, value), "opt"), "", "", [("opt", json.dumps({name: found}))]


F = ("f", '{"cmd": "ls"}')
NOW = ("now", "{}")
LS = qwen(parameter("cmd", "ls"))
HERMES_LS = tagged(named("f", '{"cmd": "ls"}'))
DALLAS = [("f", '{"city": "Dallas", "state": "TX"}')]
WINDOWS = '{"path": "a", "content": "C:\\dir \\d+"}'
WINDOWS_CALL = [("write_file", WINDOWS)]

# By tool parser, reasoning parser and whether the prompt has opened the reasoning.
ROWS: dict[tuple[str, str, bool], list[Row]] = {
    ("qwen3_coder", "none", False): [
        # Values by their schema.
        *(typed(name, value, value) for name in "abcg" for value in ("12345", "2024", "true", '"quoted"')),
        *(typed(name, '{"a": 1}', '{"a": 1}') for name in "abcg"),
        *(typed(name, "null", None) for name in "abi"),
        typed("c", "[1, 2]", [1, 2]),
        typed("c", "null", "null"),
        typed("d", "1", "1"),
        typed("e", "7", "7"),
        typed("i", "7", 7),
        typed("o", '{"a": 1}', {"a": 1}),
        typed("o", "{'a': True}", {"a": True}),
        typed("unknown", "5", 5),
        typed("a", "  two\nlines ", "  two\nlines "),
        typed("a", "", ""),
        (qwen(""), "", "", [("f", "{}")]),
        # Ends that are missing, late or drifted.
        (qwen("<parameter=city>\nDallas\n<parameter=state>\nTX\n</parameter>"), "", "", DALLAS),
        (qwen("<parameter=city>\nDallas\n<parameter=state>\nTX"), "", "", DALLAS),
        (qwen("<parameter=city>Dallas<parameter=state>TX"), "", "", DALLAS),
        (qwen("<parameter=city>\nDallas\n</parameter\n<parameter=state>\nTX\n</parameter>"), "", "", DALLAS),
        (qwen("<parameter=city>\nDallas\n</parameter>\n<parameter=state>\nTX\n</parameter"), "", "", DALLAS),
        (qwen("<parameter=city>\nDallas\n</parameter>\n</parameter>\n" + parameter("state", "TX")), "", "", DALLAS),
        ("<tool_call>\n<function=f>\n<parameter=cmd>\nls\n</parameter>\n</tool_call>", "", "", [F]),
        ("<tool_call>\n<function=f>\n<parameter=cmd>\nls\n</tool_call>", "", "", [F]),
        ("<tool_call>\n<function=f>\n<parameter=cmd>\nls\n</parameter>\n</tool_call>\n" + LS, "", "", [F, F]),
        ("<tool_call>\n<function=f>\n<parameter=cmd>\nls\n" + LS, "", "", [F, F]),
        ("<tool_call>\n<function=f>\n<parameter=cmd>\nls\n</function>\n<function=now>\n</function>", "", "", [F, NOW]),
        ("<tool_call>\n<function=f>\n<parameter=cmd>\nls\n</parameter>\n</function>", "", "", [F]),
        ("<tool_call>\n<function=f>\n<parameter=cmd>\nls\n</parameter>\n", "", "", [F]),
        ("<tool_call>\n<function=f>\n<parameter=cmd>\nls\n</paramet", "", "", [F]),
        ("<function=f>\n<parameter=cmd>\nls\n</parameter>\n</function>\n</tool_call>", "", "", [F]),
        ("Look.\n" + LS + "\nDone.", "Look.\nDone.", "", [F]),
        (qwen("<parameter=city>\nDallas\n</parameter >\n" + parameter("state", "TX")), "", "", DALLAS),
        (qwen("<parameter=city>\nDallas\n</parameter" + parameter("state", "TX")), "", "", DALLAS),
        (qwen('<parameter="city">\nDallas\n</parameter>\n' + parameter("state", "TX")), "", "", DALLAS),
        (LS.replace("</function>", "</function>\n</function>") + "\nDone.", "\nDone.", "", [F]),
        (qwen('{"cmd": "ls"}'), "", "", [F]),
        (LS.replace("\n", "\r\n"), "", "", [F]),
        (LS.replace("=f", " = f").replace("=cmd", " = cmd"), "", "", [F]),
        ("<tool_call>\n<function=now/>\n</tool_call>", "", "", [NOW]),
        (qwen(parameter("n", "null")), "", "", [("f", '{"n": null}')]),
        # Text that speaks of tags.
        (qwen(parameter("cmd", "a </function> b")), "", "", [("f", '{"cmd": "a </function> b"}')]),
        (qwen(parameter("cmd", "x <tool_call> y")), "", "", [("f", '{"cmd": "x <tool_call> y"}')]),
        (qwen(parameter("cmd", "</param")), "", "", [("f", '{"cmd": "</param"}')]),
        ("Use <function=NAME and <tool_call>.", "Use <function=NAME and <tool_call>.", "", []),
        # A name that nobody declared is a call.
        (qwen(parameter("x", "1"), "nobody"), "", "", [("nobody", '{"x": 1}')]),
    ],
    ("qwen3_coder", "qwen3", True): [
        # Calls at the end of a reasoning that never closes; drafts in one that does.
        ("I think.\n" + LS, "", "I think.", [F]),
        (LS, "", "", [F]),
        (LS + "\n" + LS, "", "", [F, F]),
        ("I think.\n" + LS.removesuffix("\n</tool_call>"), "", "I think.", [F]),
        # Half a call is a thought.
        ("So <tool_call>\n<function=f>\n<parameter=cmd>", "", "So <tool_call>\n<function=f>\n<parameter=cmd>", []),
        ("Maybe " + LS + "\n</think>\n\nNo.", "No.", "Maybe " + LS, []),
        ("Maybe " + LS + "\n</think>\n\n" + LS, "", "Maybe " + LS, [F]),
        ("I would call <function= or so", "", "I would call <function= or so", []),
        ("only a thought", "", "only a thought", []),
        ("x</think>Hi</think>there", "Hithere", "x", []),
        ("x</think>\n\nHi</think>" + LS, "Hi", "x", [F]),
        ("x</think>It ends with `</think>`.", "It ends with `</think>`.", "x", []),
        ("<think>\nx</think>Hi", "Hi", "x", []),
    ],
    ("hermes", "none", False): [
        (tagged(named("write_file", WINDOWS)), "", "", WINDOWS_CALL),
        (tagged(named("write_file", WINDOWS)) + "\nDone.", "\nDone.", "", WINDOWS_CALL),
        (tagged(named("write_file", WINDOWS)) + "\n" + HERMES_LS, "", "", [*WINDOWS_CALL, F]),
        (tagged(named("f", '{"cmd": "ls",}')), "", "", [("f", '{"cmd": "ls",}')]),
        (tagged(named("f", '{"cmd": ls}')), "", "", [("f", '{"cmd": ls}')]),
        (tagged(named("f", "{'cmd': 'ls'}")), "", "", [("f", "{'cmd': 'ls'}")]),
        (tagged(named("f", '{"cmd": "a "b" c"}')), "", "", [("f", '{"cmd": "a "b" c"}')]),
        (tagged(named("f", '{"cmd": "ls"}') + "}"), "", "", [F]),
        (tagged('{"name": "f", "arguments": {"cmd": "ls"}'), "", "", [F]),
        ('<tool_call>\n{"name": "f", "arguments": {"cmd": "ls"}}\n' + HERMES_LS, "", "", [F, F]),
        ('<tool_call>\n{"name": "f", "arguments": {"cmd": "ls"}}', "", "", [F]),
        (tagged("{'name': 'f', 'arguments': {\"cmd\": \"ls\"}}"), "", "", [F]),
        (tagged('{"name": "f", "arguments": "{\\"cmd\\": \\"ls\\"}"}'), "", "", [F]),
        (tagged("[" + named("f", '{"cmd": "ls"}') + ", " + named("now", "{}") + "]"), "", "", [F, NOW]),
        (tagged(named("f", '{"cmd": "ls"}') + "\n" + named("now", "{}")), "", "", [F, NOW]),
        (tagged("```json\n" + named("f", '{"cmd": "ls"}') + "\n```"), "", "", [F]),
        (tagged('{"name": "f", {"cmd": "ls"}}'), "", "", [F]),
        (HERMES_LS + "\n</tool_call>", "", "", [F]),
        (HERMES_LS.removesuffix(">"), "", "", [F]),
        (tagged(named("nobody", '{"x": 1}')), "", "", [("nobody", '{"x": 1}')]),
        (tagged("no call"), tagged("no call"), "", []),
    ],
    ("hermes", "qwen3", True): [
        ("I think.\n" + HERMES_LS, "", "I think.", [F]),
        ("I think.\n" + HERMES_LS + "\n" + HERMES_LS, "", "I think.", [F, F]),
        ("Maybe " + HERMES_LS + " but</think>No.", "No.", "Maybe " + HERMES_LS + " but", []),
        ("a</think></think>b", "b", "a", []),
    ],
    ("llama3_json", "none", False): [
        (named("write_file", WINDOWS, "parameters"), "", "", WINDOWS_CALL),
        (named("f", '{"cmd": ls}', "parameters"), "", "", [("f", '{"cmd": ls}')]),
        ("<|python_tag|>" + named("f", '{"cmd": "ls"}', "parameters"), "", "", [F]),
        (named("f", '{"cmd": "ls"}', "parameters") + "; " + named("now", "{}", "parameters"), "", "", [F, NOW]),
        ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', "", []),
        (named("nobody", "{}", "parameters"), named("nobody", "{}", "parameters"), "", []),
    ],
    ("mistral", "none", False): [
        ("[TOOL_CALLS]" + f"[{named('write_file', WINDOWS)}]", "", "", WINDOWS_CALL),
        ("[TOOL_CALLS]" + "write_file" + WINDOWS, "", "", WINDOWS_CALL),
        ("[TOOL_CALLS] [TOOL_CALLS] [" + named("now", "{}") + "]", "", "", [NOW]),
        ("[TOOL_CALLS][" + named("now", "{}") + ", oops]", "", "", [NOW]),
        ("[TOOL_CALLS][" + named("now", "{}") + ', "junk", ' + named("now", "{}") + "]", "", "", [NOW, NOW]),
        ("[TOOL_CALLS][" + named("now", "{}") + "][/TOOL_CALLS]", "", "", [NOW]),
        ("[TOOL_CALLS]now{}[/TOOL_CALLS]", "", "", [NOW]),
        ('[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"cmd": "ls"}', "", "", [NOW, F]),
        ("[TOOL_CALLS]f[ARGS]no json[TOOL_CALLS]now[ARGS]", "", "", [("f", "no json"), NOW]),
        ("[TOOL_CALLS] what?", "[TOOL_CALLS] what?", "", []),
        ("[TOOL_CALLS]f(cmd='ls')[TOOL_CALLS]now()", "", "", [F, NOW]),
        ('[TOOL_CALLS]f [CALL_ID] abcdefghi [ARGS] {"cmd": "ls"}', "", "", [F]),
    ],
    ("pythonic", "none", False): [
        (
            "[write_file(path='a', content='C:\\dir \\d+')]",
            "",
            "",
            [("write_file", json.dumps(json.loads(WINDOWS.replace("\\", "\\\\"))))],
        ),
        ("[f(cmd='it's here')]", "", "", [("f", '{"cmd": "it\'s here"}')]),
        ("[f(cmd='ls', n=@)]", "", "", [("f", '{"cmd": "ls", "n": "@"}')]),
        ("[f(cmd='ls'), now()]", "", "", [F, NOW]),
        ("[f('Dallas', \"TX\")]", "", "", DALLAS),
        ("[f('Dallas', state='TX')]", "", "", DALLAS),
        ("[now(5)]", "", "", [("now", "{5}")]),
        ("[f(cmd='ls'", "", "", [F]),
        ("[f(cmd='ls')", "", "", [F]),
        ("[nobody(x=1)]", "[nobody(x=1)]", "", []),
        ("Let me look: [f(cmd='ls'), now()]", "Let me look:", "", [F, NOW]),
        ("See a[0], [x](y) and [nobody(x=1)].", "See a[0], [x](y) and [nobody(x=1)].", "", []),
        ("<|python_start|>f(cmd='ls'), now()<|python_end|>", "", "", [F, NOW]),
        ("<|python_start|>now()<|python_end|> Done.", " Done.", "", [NOW]),
        ("[1, 2]", "[1, 2]", "", []),
    ],
    ("deepseek_v3", "none", False): [
        (
            f"{DS_ALL}{DS_CALL}function{DS_SEP}write_file\n```json\n{WINDOWS}\n```{DS_CLOSE}{DS_END}",
            "",
            "",
            WINDOWS_CALL,
        ),
        (f"{DS_ALL}{DS_CALL}function{DS_SEP}now\n```json\n{{}}\n```{DS_CLOSE}{DS_END}", "", "", [NOW]),
        (f"{DS_ALL}{DS_CALL}function{DS_SEP}now\n{{}}{DS_CLOSE}", "", "", [NOW]),
        (f"{DS_ALL}{DS_CALL}function{DS_SEP}now\n```json\n{{}}", "", "", [NOW]),
        (f"{DS_ALL}{DS_CALL}function{DS_SEP}now\n{DS_CLOSE}{DS_END}", "", "", [NOW]),
        (f"{DS_ALL}{DS_CALL}function{DS_SEP}", f"{DS_ALL}{DS_CALL}function{DS_SEP}", "", []),
    ],
    ("deepseek_v31", "deepseek_r1", True): [
        (f"x</think>{DS_ALL}{DS_CALL}write_file{DS_SEP}{WINDOWS}{DS_CLOSE}{DS_END}", "", "x", WINDOWS_CALL),
        (f"I think.{DS_ALL}{DS_CALL}now{DS_SEP}{{}}{DS_CLOSE}{DS_END}", "", "I think.", [NOW]),
        (f"x</think>{DS_ALL}{DS_CALL}now{DS_SEP}{DS_CLOSE}{DS_END}", "", "x", [NOW]),
        (f"x</think>Hi{DS_CALL}now{DS_SEP}{{}}{DS_CALL}now{DS_SEP}{{}}", "Hi", "x", [NOW, NOW]),
    ],
    ("harmony", "harmony", False): [
        (" to=functions.now<|channel|>commentary<|message|>{}", "", "", [NOW]),
        (' to=functions.f<|channel|>commentary json<|message|>{"cmd": "ls"}<|call|>', "", "", [F]),
        (' to=functions.f<|channel|>analysis <|constrain|>json<|message|>{"cmd": "ls"}<|call|>', "", "", [F]),
        ('<|channel|>analysis to=functions.f <|constrain|>json<|message|>{"cmd": "ls"}<|call|>', "", "", [F]),
        ("<|channel|>commentary to=functions.now<|message|><|call|>", "", "", [NOW]),
        ("<|channel|>commentary to=functions.now <|constrain|>json<|message|>", "", "", [NOW]),
        (
            "<|channel|>commentary to=python<|message|>print(1)<|call|>",
            "",
            "",
            [("python", "print(1)")],
        ),
        (f"<|channel|>commentary to=functions.write_file<|message|>{WINDOWS}<|call|>", "", "", WINDOWS_CALL),
        (
            "<|channel|>analysis<|message|>x<|end|><|start|>assistant "
            "to=functions.now<|channel|>commentary<|message|>{}",
            "",
            "x",
            [NOW],
        ),
        (
            "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>Hi",
            "Hi",
            "x",
            [],
        ),
    ],
}


def body(**fields: Any) -> Json:
    return {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "max_tokens": 900, **fields}


def serve(tool: str, reasoning: str = "none", inside: bool = False, **options: Any) -> Any:
    source = "{{ messages[0].content }}" + ("<think>\n" if inside else "")
    model = served_model(chat_template=ChatTemplate({"default": source}, {}), max_model_len=2048)
    return live(model=model, tool_call_parser=tool, reasoning_parser=reasoning, **options)


def read(message: Json) -> tuple[str, str, list[Call]]:
    """Content, reasoning and calls."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return message.get("content") or "", message.get("reasoning") or "", calls


async def streamed(server: Live, wanted: Json) -> tuple[Json, str, int]:
    """The message that the deltas add up to, the finish reason, and the number of deltas with arguments."""
    message: Json = {"content": "", "reasoning": "", "tool_calls": []}
    reason, count = "", 0
    for event in await server.events("/v1/chat/completions", wanted):
        if event == "[DONE]":
            continue
        [choice] = event["choices"]
        reason = choice["finish_reason"] or reason
        delta = choice["delta"]
        for key in ("content", "reasoning"):
            message[key] += delta.get(key) or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append({"function": {"name": call["function"]["name"], "arguments": ""}})
            found = call["function"].get("arguments", "")
            message["tool_calls"][call["index"]]["function"]["arguments"] += found
            count += bool(found)
    return message, reason, count


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("names", ROWS, ids=lambda names: "-".join(map(str, names)))
async def test_messages(names: tuple[str, str, bool], cut: Cut) -> None:
    failed = []
    async with serve(*names) as server:
        for text, *expected in ROWS[names]:
            with dictated(server, text, cut=cut):
                status, answer = await server.post("/v1/chat/completions", body())
                message, reason, _ = await streamed(server, body())
            assert status == 200, answer
            [choice] = answer["choices"]
            found = read(choice["message"])
            if found != tuple(expected):
                failed.append((text, found, tuple(expected)))
            assert read(message) == found, text
            assert choice["finish_reason"] == reason == ("tool_calls" if found[2] else "stop"), text
    assert not failed


WORDS = " ".join(f"word{place}" for place in range(200))


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        ("qwen3_coder", qwen(parameter("path", "a") + "\n" + parameter("content", WORDS), "write_file")),
        ("qwen3_coder", qwen(parameter("a", WORDS), "opt")),
        ("pythonic", f"[write_file(path='a', content='{WORDS}')]"),
        ("hermes", tagged(named("write_file", json.dumps({"path": "a", "content": WORDS})))),
        ("mistral", "[TOOL_CALLS]write_file" + json.dumps({"path": "a", "content": WORDS})),
        ("llama3_json", named("write_file", json.dumps({"path": "a", "content": WORDS}), "parameters")),
        ("deepseek_v31", f"{DS_CALL}write_file{DS_SEP}" + json.dumps({"path": "a", "content": WORDS})),
        ("harmony", "<|channel|>commentary to=functions.write_file<|message|>" + json.dumps({"content": WORDS})),
    ],
)
async def test_long_values_stream(tool: str, text: str) -> None:
    async with serve(tool) as server:
        with dictated(server, text):
            message, reason, count = await streamed(server, body(max_tokens=1900))
    [(_, arguments)] = read(message)[2]
    assert WORDS in json.loads(arguments).values() and reason == "tool_calls"
    assert count > 200


# A call that the limit cuts open: parser, what was said of it, and the arguments there are.
CUT_OFF: list[tuple[str, str, Call]] = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"cmd": "ls', ("f", '{"cmd": "ls')),
    ("hermes", '<tool_call>\n{"name": "f", "argu', ("f", "")),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=cmd>\nls -", ("f", '{"cmd": "ls -')),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=cmd>\nls\n</parame", ("f", '{"cmd": "ls')),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=n>\n1", ("f", '{"n": 1')),
    ("pythonic", "[f(cmd='ls -", ("f", '{"cmd": "ls -')),
    ("pythonic", "[f(cmd='ls', n", ("f", '{"cmd": "ls"')),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"cmd": "ls', ("f", '{"cmd": "ls')),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"cmd": "ls', ("f", '{"cmd": "ls')),
    ("llama3_json", '{"name": "f", "parameters": {"cmd": "ls', ("f", '{"cmd": "ls')),
    ("deepseek_v31", f'{DS_ALL}{DS_CALL}f{DS_SEP}{{"cmd": "ls', ("f", '{"cmd": "ls')),
    ("harmony", '<|channel|>commentary to=functions.f<|message|>{"cmd": "ls', ("f", '{"cmd": "ls')),
]


@pytest.mark.parametrize(("tool", "text", "call"), CUT_OFF)
async def test_calls_that_a_limit_cuts_off(tool: str, text: str, call: Call) -> None:
    async with serve(tool) as server:
        with dictated(server, text, cut="characters") as requests:
            await server.post("/v1/chat/completions", body())
            # As many tokens as it takes to say the text, without an end.
            said = requests[0]
            limit = (await server.post("/v1/chat/completions", body()))[1]["usage"]["completion_tokens"] - 1
            _, answer = await server.post("/v1/chat/completions", body(max_tokens=limit))
            message, reason, _ = await streamed(server, body(max_tokens=limit))
        assert said.sampling.max_tokens == 900
    [choice] = answer["choices"]
    assert read(choice["message"]) == read(message) == ("", "", [call])
    assert choice["finish_reason"] == reason == "length"


# ---- the other families of APIs

FUNCTIONS = [{"type": "function", "name": name, "parameters": schema} for name, schema in SCHEMAS.items()]
INPUTS = [{"name": name, "input_schema": schema} for name, schema in SCHEMAS.items()]
BODIES: dict[str, Json] = {
    "/v1/messages": {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": INPUTS,
        "max_tokens": 900,
        "thinking": {"type": "adaptive"},
    },
    "/v1/responses": {"input": "hi", "tools": FUNCTIONS, "max_output_tokens": 900},
    "/api/chat": {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": TOOLS,
        "stream": False,
        "options": {"num_predict": 900},
    },
}


def outcome(path: str, answer: Json) -> tuple[str, str, list[tuple[str, Any]]]:
    """Content, reasoning and calls; the arguments as the family has them."""
    if path == "/api/chat":
        said = answer["message"]
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in said.get("tool_calls", ())]
        return said["content"], said.get("thinking", ""), calls
    content = reasoning = ""
    found: list[tuple[str, Any]] = []
    for item in answer["content" if path == "/v1/messages" else "output"]:
        match item["type"]:
            case "text":
                content += item["text"]
            case "thinking":
                reasoning += item["thinking"]
            case "tool_use":
                found.append((item["name"], item["input"]))
            case "message":
                content += item["content"][0]["text"]
            case "reasoning":
                reasoning += item["content"][0]["text"]
            case "function_call":
                found.append((item["name"], item["arguments"]))
    return content, reasoning, found


@pytest.mark.parametrize("path", BODIES)
async def test_other_apis(path: str) -> None:
    as_object = path != "/v1/responses"
    async with serve("qwen3_coder", "qwen3", inside=True) as server:
        for text, content, reasoning, calls in ROWS["qwen3_coder", "qwen3", True]:
            with dictated(server, text, cut="characters"):
                status, answer = await server.post(path, {"model": "demo", **BODIES[path]})
            assert status == 200, answer
            expected = [(name, json.loads(arguments) if as_object else arguments) for name, arguments in calls]
            assert outcome(path, answer) == (content, reasoning, expected), text
    async with serve("hermes") as server:
        with dictated(server, tagged(named("write_file", WINDOWS)) + "\nDone."):
            _, answer = await server.post(path, {"model": "demo", **BODIES[path]})
        content, _, [(name, arguments)] = outcome(path, answer)
        assert name == "write_file" and content.strip() == "Done."
        assert arguments == ({"INVALID_JSON": WINDOWS} if as_object else WINDOWS)


LIMITED = '<tool_call>\n{"name": "f", "arguments": {"cmd": "ls'


@pytest.mark.parametrize("path", BODIES)
async def test_other_apis_at_the_limit(path: str) -> None:
    async with serve("hermes") as server:
        with dictated(server, LIMITED, cut="whole", ends=False) as requests:
            given = {"model": "demo", **BODIES[path]}
            size = len(server.state.tokenizer.encode(LIMITED, add_special_tokens=False))
            if path == "/api/chat":
                given["options"] = {"num_predict": size}
            else:
                given["max_tokens" if path == "/v1/messages" else "max_output_tokens"] = size
            status, answer = await server.post(path, given)
        assert status == 200 and requests[0].sampling.max_tokens == size, answer
    content, _, [(name, arguments)] = outcome(path, answer)
    assert content == "" and name == "f"
    if path == "/v1/responses":
        assert arguments == '{"cmd": "ls' and answer["status"] == "incomplete"
        assert answer["output"][-1]["status"] == "incomplete"
        return
    assert arguments == {"INVALID_JSON": '{"cmd": "ls'}
    if path == "/v1/messages":
        assert answer["stop_reason"] == "max_tokens"
    else:
        assert answer["done_reason"] == "length"
