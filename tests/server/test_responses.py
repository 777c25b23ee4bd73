"""/v1/responses: items and events as OpenAI's own client types read them, turns, tools, the store, and bad input."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import openai
import pydantic
import pytest
import pytest_asyncio
from openai.types.responses import Response, ResponseStreamEvent

from engine.forward import ForwardError
from engine.text.chat_template import ChatTemplate
from tests.server.dictate import dictated
from tests.server.support import BOUND_S, DEMO, Live, live, served_model, tokenizer, until
from tests.server.test_errors import check_shape
from tests.server.test_logprobs import device

RESPONSES = "/v1/responses"
EVENTS: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo"]}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THINKING = ChatTemplate(
    {"default": "{% for m in messages %}[{{ m.role }}:{{ m.reasoning_content }}:{{ m.content }}]{% endfor %}"}, {}
)


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[Live]:
    async with live(make_device=device, num_pages=512) as server:
        yield server


async def create(server: Live, body: Any, **options: Any) -> dict[str, Any]:
    """A whole response, which the client's own types must take as it is."""
    status, found = await server.post(RESPONSES, body, **options)
    assert status == 200, found
    Response.model_validate(found)
    return found


async def get(server: Live, path: str, key: str = "") -> tuple[int, Any]:
    async with server.http.get(server.url + path, headers={"Authorization": f"Bearer {key}"}) as response:
        return response.status, await response.json()


async def stream(server: Live, body: Any) -> list[dict[str, Any]]:
    """The events, each checked against the client's types."""
    async with server.http.post(server.url + RESPONSES, json={**body, "stream": True}) as response:
        raw = (await response.read()).decode()
        assert response.status == 200, raw
    events = []
    for text in raw.removesuffix("\n\n").split("\n\n"):
        if text.startswith(":"):
            continue
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == len(events)
        EVENTS.validate_python(event)
        events.append(event)
    return events


def replay(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response of the last event, after checking that the events before it add up to it."""
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert all(event["response"]["status"] == "in_progress" for event in events[:2])
    last = events[-1]
    assert last["type"] == f"response.{last['response']['status']}"
    items: list[dict[str, Any]] = []
    done = 0
    for event in events[2:-1]:
        kind = event["type"]
        assert event["output_index"] == (len(items) if kind == "response.output_item.added" else len(items) - 1)
        if kind == "response.output_item.added":
            assert done == len(items), "one item after another"
            items.append({**event["item"], "text": "", "logprobs": []})
            continue
        item = items[-1]
        assert event.get("item_id", item["id"]) == item["id"]
        if kind.endswith(".delta"):
            assert event["delta"], "no empty deltas"
            item["text"] += event["delta"]
            item["logprobs"] += event.get("logprobs", [])
        elif kind.endswith(("text.done", "arguments.done")):
            assert event.get("text", event.get("arguments")) == item["text"]
            assert event.get("logprobs", []) == item["logprobs"]
        elif kind == "response.output_item.done":
            done += 1
            whole = event["item"]
            if whole["type"] == "function_call":
                assert whole["arguments"] == item["text"]
            else:
                assert [part["text"] for part in whole["content"]] == [item["text"]]
                assert whole["content"][0].get("logprobs", []) == item["logprobs"]
            assert whole == last["response"]["output"][len(items) - 1]
    assert done == len(items) == len(last["response"]["output"])
    return last["response"]


def plain(response: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from one answer to the next, and the items without their ids."""
    left_out = ("id", "created_at", "completed_at")
    text = json.dumps({key: value for key, value in response.items() if key not in left_out})
    text = re.sub(r'"(msg|rs|fc|call)_\w+"', '"\\1"', text)
    # What the first of two found in the cache is less.
    return json.loads(re.sub(r'"cached_tokens": \d+', '"cached_tokens": 0', text))


async def both_ways(server: Live, body: dict[str, Any]) -> dict[str, Any]:
    whole = await create(server, body)
    assert plain(replay(await stream(server, body))) == plain(whole)
    return whole


async def say(server: Live, text: str, body: dict[str, Any]) -> dict[str, Any]:
    """Let the device say a text and its EOS whatever it is asked, and read the answer both ways."""
    status, count = await server.post(f"{RESPONSES}/input_tokens", body)
    assert status == 200, count
    assert count["object"] == "response.input_tokens"
    ids = [*tokenizer().encode(text, add_special_tokens=False), tokenizer().eos_token_ids[0]]
    start = count["input_tokens"] % len(ids)
    server.device.script = ids[len(ids) - start :] + ids[: len(ids) - start]
    found = await both_ways(server, body)
    assert found["usage"]["input_tokens"] == count["input_tokens"]
    return found


def texts(response: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (item["type"], item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        for item in response["output"]
    ]


# ---- output


async def test_text_is_that_of_a_chat(demo: Live) -> None:
    question = "What is 17 + 25?"
    found = await both_ways(demo, {"input": question, "temperature": 0, "user": "me", "metadata": {"a": "b"}})
    assert texts(found) == [("message", "17 + 25 = 42")]
    assert found["status"] == "completed" and found["error"] is None and found["completed_at"] >= found["created_at"]
    assert found["user"] == "me" and found["metadata"] == {"a": "b"} and found["object"] == "response"
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
    _, chat = await demo.post("/v1/chat/completions", body)
    assert chat["choices"][0]["message"]["content"] == "17 + 25 = 42"
    usage = found["usage"]
    assert usage["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == chat["usage"]["completion_tokens"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}
    again = await create(demo, {"input": question, "temperature": 0})
    assert again["usage"]["input_tokens_details"]["cached_tokens"] > 0


async def test_an_answer_cut_off_is_incomplete(server: Live) -> None:
    found = await both_ways(server, {"input": "hi", "max_output_tokens": 3, "seed": 1})
    assert found["status"] == "incomplete" and found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["output"][0]["status"] == "incomplete" and found["usage"]["output_tokens"] == 3


async def test_no_text_at_all_is_an_empty_message(server: Live) -> None:
    assert texts(await say(server, "", {"input": "hi"})) == [("message", "")]


async def test_reasoning_text_and_calls_are_items() -> None:
    async with live(reasoning_parser="qwen3") as server:
        body = {"input": "hi", "tools": [WEATHER]}
        found = await say(server, f"<think>\nHm, hm.\n</think>\n\nLet me see.\n{CALL}\n{CALL}", body)
        call = ("function_call", '{"city": "Paris"}')
        assert texts(found) == [("reasoning", "Hm, hm."), ("message", "Let me see."), call, call]
        assert [item["status"] for item in found["output"]] == ["completed"] * 4
        assert found["output"][2]["name"] == "get_weather" and found["output"][2]["call_id"].startswith("call_")
        ids = [item["id"] for item in found["output"]]
        assert len(set(ids)) == 4 and [name.split("_")[0] for name in ids] == ["rs", "msg", "fc", "fc"]
        spent = found["usage"]["output_tokens_details"]["reasoning_tokens"]
        assert 0 < spent < found["usage"]["output_tokens"]
        once = await say(server, f"{CALL}\n{CALL}", body | {"parallel_tool_calls": False})
        assert texts(once) == [call] and once["parallel_tool_calls"] is False
        cut = await say(server, "<think>Hm, this is quite a question", body | {"max_output_tokens": 12})
        assert [item["type"] for item in cut["output"]] == ["reasoning"]
        num_mark = len(tokenizer().encode("<think>", add_special_tokens=False))
        assert cut["usage"]["output_tokens_details"]["reasoning_tokens"] == 12 - num_mark


async def test_logprobs_are_those_of_the_message(demo: Live) -> None:
    include = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "temperature": 0}
    # Without tools there is no parser between the tokens and the text.
    for tools in ([], [WEATHER]):
        found = await both_ways(demo, {"input": "List three fruits.", "tools": tools, **include})
        [part] = found["output"][0]["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode() == part["text"]
        for entry in part["logprobs"]:
            assert len(entry["top_logprobs"]) == 2 and entry["logprob"] == entry["top_logprobs"][0]["logprob"]
    async with live(reasoning_parser="qwen3") as server:
        body = {"input": "hi", "include": include["include"], "tools": [WEATHER]}
        found = await say(server, f"<think>Hm, hé.</think>\n\nJa! 😊 {CALL}", body)
        assert [kind for kind, _ in texts(found)] == ["reasoning", "message", "function_call"]
        part = found["output"][1]["content"][0]
        assert part["text"] == "Ja! 😊"
        assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode() == part["text"]


async def test_fields_reach_the_sampler(server: Live) -> None:
    body = {"input": "hi", "max_output_tokens": 12, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 3}
    first, second = await create(server, body), await create(server, body)
    assert texts(first) == texts(second) and (first["temperature"], first["top_p"]) == (0.7, 0.9)
    assert texts(await create(server, body | {"seed": 4})) != texts(first)
    text = texts(first)[0][1]
    stopped = await create(server, body | {"stop": [text[3:5]]})
    assert texts(stopped) == [("message", text[: text.index(text[3:5])])] and stopped["status"] == "completed"


@pytest.mark.parametrize("strict", [True, None])
async def test_structured_text(server: Live, strict: bool | None) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a"],
        "additionalProperties": False,
    }
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": strict}, "verbosity": "low"}
    found = await both_ways(server, {"input": "hi", "text": text, "seed": 5, "max_output_tokens": 300})
    assert list(json.loads(texts(found)[0][1])) == ["a"] and found["text"] == text
    found = await create(server, {"input": "hi", "text": {"format": {"type": "json_object"}}, "seed": 5})
    assert found["text"] == {"format": {"type": "json_object"}, "verbosity": "medium"}


async def test_effort_and_verbosity_reach_the_template() -> None:
    source = "{{ reasoning_effort }}|{{ enable_thinking }}|{{ verbosity }}|{{ messages[0].content }}"
    async with live(model=served_model(chat_template=ChatTemplate({"default": source}, {}))) as server:
        body = {"reasoning": {"effort": "none", "summary": "auto"}, "text": {"verbosity": "high"}}
        status, found = await server.post(f"{RESPONSES}/input_tokens", {"input": "x", **body})
        expected = tokenizer().encode("none|False|high|x", add_special_tokens=False)
        assert status == 200 and found["input_tokens"] == len(expected)
        made = await create(server, {"input": "x", "max_output_tokens": 1, **body})
        assert made["reasoning"]["effort"] == "none" and made["usage"]["input_tokens"] == len(expected)


# ---- with the real client


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_tool_loop(demo: Live, streamed: bool) -> None:
    [example] = [item for item in json.loads((DEMO / "prompts.json").read_text()) if item["name"] == "tool"]
    tools = [{"type": "function", **tool["function"]} for tool in example["tools"]]
    async with demo.openai() as client:

        async def turn(**fields: Any) -> Any:
            fields |= {"model": "demo", "tools": tools, "temperature": 0}
            if not streamed:
                return await client.responses.create(**fields)
            async with client.responses.stream(**fields) as events:
                return await events.get_final_response()

        first = await turn(input=example["messages"])
        [call] = first.output
        assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Paris"}
        result = {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": '{"weather": "sunny", "temperature": 21}',
        }
        second = await turn(previous_response_id=first.id, input=[result])
        assert "sunny" in second.output_text and second.previous_response_id == first.id
        # The same without a store: the client sends everything again.
        again = await turn(
            input=[*example["messages"], *(item.to_dict() for item in first.output), result], store=False
        )
        assert again.output_text == second.output_text and again.store is False
        assert again.usage.input_tokens == second.usage.input_tokens


async def test_parsed_objects_and_events(demo: Live) -> None:
    class Person(pydantic.BaseModel):
        name: str
        age: int

    question = "Write JSON with the keys name, age, city for a person called Mia, 31, from Oslo."
    async with demo.openai() as client:
        found = await client.responses.parse(model="demo", input=question, text_format=Person, temperature=0)
        assert found.output_parsed == Person(name="Mia", age=31)
        async with client.responses.stream(model="demo", input=question, text_format=Person, temperature=0) as stream:
            kinds = [event.type async for event in stream]
            assert (await stream.get_final_response()).output_parsed == Person(name="Mia", age=31)
        assert kinds[0] == "response.created" and kinds[-1] == "response.completed"


async def test_the_blocking_client(demo: Live) -> None:
    def talk() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
            events = client.responses.create(model="demo", input="Who are you?", temperature=0, stream=True)
            text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            return text, client.responses.create(model="demo", input="Who are you?", temperature=0).output_text

    streamed, whole = await asyncio.to_thread(talk)
    assert streamed == whole == "I am the oneloop demo model, a very small language model made for testing."


# ---- input


async def prompt_of(server: Live, body: dict[str, Any]) -> str:
    """What the template makes of a body; the device is not asked."""
    server.device.gate.clear()
    task = asyncio.create_task(server.post(RESPONSES, body))
    try:
        await until(lambda: server.num_requests() == 1 or task.done())
        assert not task.done(), task.result()
        [request] = server.engine.publisher.listeners.values()
        return tokenizer().decode(request.sequence.request.prompt_token_ids, skip_special_tokens=False)
    finally:
        task.cancel()
        server.device.gate.set()
        await server.all_free()


async def test_items_become_messages() -> None:
    async with live(model=served_model(chat_template=THINKING)) as server:
        turn = [
            {"role": "developer", "content": "B"},
            {"role": "user", "content": [{"type": "input_text", "text": "q"}, {"type": "input_text", "text": "r"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "let me see", "annotations": []}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "not JSON"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
            {"type": "function_call_output", "call_id": "c1", "output": "one"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
            {"role": "assistant", "content": "done"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "system", "content": "late"},
        ]
        prompt = await prompt_of(server, {"input": turn, "instructions": "A"})
        assert prompt == (
            # A template without words for calls gets them as text.
            "[system::A][system::B][user::q\nr][assistant:hm:let me see\n\n"
            '{"name": "f", "arguments": {}}\n{"name": "g", "arguments": "not JSON"}][tool::two]'
            "[tool::one][assistant:so:done]"
            "[assistant::no][system::late]"
        )


async def test_truncation_leaves_out_the_oldest_turns() -> None:
    async with live(model=served_model(chat_template=THINKING, max_model_len=256)) as server:
        turns: list[Any] = [{"role": "system", "content": "S"}]
        for index in range(40):
            turns.append({"role": "user", "content": f"question {index}"})
            turns.append({"role": "assistant", "content": f"answer {index}"})
        turns.append({"role": "user", "content": "last"})
        body = {"input": turns, "max_output_tokens": 20}
        error = check_shape(*await server.post(RESPONSES, body))
        assert error["code"] == "context_length_exceeded"
        prompt = await prompt_of(server, {**body, "truncation": "auto"})
        assert prompt.startswith("[system::S][user::question ") and prompt.endswith("[user::last]")
        size = len(tokenizer().encode(prompt, add_special_tokens=False))
        first = int(re.findall(r"question (\d+)", prompt)[0])
        one_more = f"[user::question {first - 1}][assistant::answer {first - 1}]"
        assert size <= 236 < size + len(tokenizer().encode(one_more, add_special_tokens=False))
        found = await create(server, {**body, "truncation": "auto"})
        assert found["truncation"] == "auto" and found["usage"]["input_tokens"] == size
        huge = [*turns, {"role": "user", "content": "word " * 400}]
        error = check_shape(*await server.post(RESPONSES, {"input": huge, "truncation": "auto"}))
        assert error["code"] == "context_length_exceeded" and error["param"] == "input"


MESSAGE = {"role": "user", "content": "x"}
BAD: list[tuple[str, Any]] = [
    ("input", None),
    ("input", []),
    ("input", 5),
    ("input[0]", ["x"]),
    ("input", [{"type": "web_search_call"}]),
    ("input[0].type", [{"type": 7}]),
    ("input[0].type", [{"type": []}]),
    ("input[0].role", [{"content": "x"}]),
    ("input[0].role", [{"role": ["user"], "content": "x"}]),
    ("input[0].content[0]", [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]),
    ("input[0].content[0]", [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]),
    ("input[0].content[0]", [{"role": "user", "content": ["x"]}]),
    ("input[0].content[0].text", [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]),
    ("input[1].id", [MESSAGE, {"type": "item_reference"}]),
    ("input[0].id", [MESSAGE | {"id": "x" * 129}]),
    ("input[1].call_id", [MESSAGE, {"type": "function_call_output", "call_id": 5, "output": "x"}]),
    ("input[1].arguments", [MESSAGE, {"type": "function_call", "call_id": "c", "name": "f", "arguments": 5}]),
    ("input[0].content", [{"type": "reasoning", "summary": [], "content": 5}]),
    ("input[0].summary[0].text", [{"type": "reasoning", "summary": [{"type": "summary_text", "text": 5}]}]),
    ("instructions", 5),
    ("tools", {}),
    ("tools[0]", ["x"]),
    ("tool_choice", {"type": "web_search"}),
    ("tools[0].format.syntax", [{"type": "custom", "name": "x", "format": {"type": "grammar"}}]),
    ("tools[0].name", [{"type": "function", "name": "no good"}]),
    ("tools[0].name", [{"type": "function", "function": {"name": "f"}}]),
    ("tools[0].parameters", [{"type": "function", "name": "f", "parameters": 5}]),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "name": "f"}),
    ("max_output_tokens", 0),
    ("max_tool_calls", 0),
    ("temperature", 3),
    ("top_p", 0),
    ("top_logprobs", 5),
    ("top_logprobs", 50),
    ("include", "message.output_text.logprobs"),
    ("include[1]", ["message.output_text.logprobs", 5]),
    ("text", "json"),
    ("text.format", {"format": "json"}),
    ("text.format.type", {"format": {}}),
    ("text.format.type", {"format": {"type": "xml"}}),
    ("text.format", {"format": {"type": "json_schema", "name": "x"}}),
    ("text.format.name", {"format": {"type": "json_schema", "name": "a b", "schema": {}}}),
    ("text.format.schema", {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}),
    ("text.verbosity", {"verbosity": "loud"}),
    ("reasoning", "high"),
    ("reasoning.effort", {"effort": "enormous"}),
    ("reasoning.effort", {"effort": {}}),
    ("reasoning.effort", {"effort": ""}),
    ("metadata", {"a": 1}),
    ("metadata", {str(index): "x" for index in range(17)}),
    ("truncation", "middle"),
    ("store", "yes"),
    ("previous_response_id", "resp_unknown"),
    ("previous_response_id", 5),
    ("background", "yes"),
    ("conversation", "conv_1"),
    ("prompt", {"id": "pmpt_1"}),
    ("stream_options", {"include_obfuscation": False}),
    ("stream", "yes"),
    ("messages", [MESSAGE]),
    ("max_tokens", 5),
    ("response_format", {"type": "text"}),
    ("reasoning_effort", "low"),
    ("n", 2),
    ("chat_template_kwargs", {"messages": []}),
    ("thinking_token_budget", 5),
]


async def test_bad_input_is_a_400_that_names_the_field(server: Live) -> None:
    for name, value in BAD:
        body = {"input": "x", "max_output_tokens": 2, re.split(r"[.\[]", name)[0]: value}
        async with asyncio.timeout(BOUND_S):
            status, answer = await server.post(RESPONSES, body)
        error = check_shape(status, answer)
        assert error["param"] == name, (name, value, answer)
        assert not re.search(r"max_tokens|response_format|reasoning_effort", error["message"]) or name in (
            "max_tokens",
            "response_format",
            "reasoning_effort",
        ), error
    for path in (RESPONSES, f"{RESPONSES}/input_tokens"):
        error = check_shape(*await server.post(path, {"input": "x", "model": "other"}), expected=404)
        assert error["code"] == "model_not_found"
    options = {"stream": True, "stream_options": {"include_obfuscation": True}}
    async with server.http.post(server.url + RESPONSES, json={"input": "x", "max_output_tokens": 1, **options}) as got:
        assert got.status == 200
    await create(server, {"input": "x", "max_output_tokens": 2})


async def test_bad_queries(server: Live) -> None:
    found = await create(server, {"input": "x", "max_output_tokens": 2})
    path = f"{RESPONSES}/{found['id']}"
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=msg_unknown", "before=x"):
        error = check_shape(*await get(server, f"{path}/input_items?{query}"))
        assert error["param"] == query.split("=")[0]
    assert check_shape(*await get(server, f"{path}?stream=true"))["param"] == "stream"
    check_shape(*await get(server, f"{RESPONSES}/nothing/input_items"), expected=404)


async def test_what_clients_send_by_default_is_taken(server: Live) -> None:
    """Codex and the Agents SDK always send these."""
    body = {
        "model": "demo",
        "instructions": "Be brief.",
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "abc",
        "max_output_tokens": 3,
        "background": False,
        "service_tier": "auto",
        "top_logprobs": None,
    }
    found = replay(await stream(server, body))
    assert found["prompt_cache_key"] == "abc" and found["instructions"] == "Be brief."


# ---- failures


async def test_a_stream_that_fails_says_so() -> None:
    def fail(step: int) -> None:
        if step >= 3:
            raise ForwardError("broken")

    async with live(fail_on=fail) as server:
        events = await stream(server, {"input": "x", "max_output_tokens": 50})
        found = replay(events)
        assert found["status"] == "failed" and found["error"]["code"] == "server_error"
        assert found["output"][0]["status"] == "incomplete"
        assert (await get(server, f"{RESPONSES}/{found['id']}"))[1] == found


async def test_an_abort_is_a_failed_response(server: Live) -> None:
    server.device.gate.clear()
    task = asyncio.create_task(stream(server, {"input": "x", "max_output_tokens": 50}))
    await until(lambda: server.num_requests() == 1)
    server.device.gate.set()
    await until(lambda: server.device.num_waited > 3)
    for name in list(server.state.submitted):
        server.engine.abort(name)
    found = replay(await task)
    assert found["status"] == "failed" and found["error"]["message"] == "The request was aborted."


async def test_keep_alive_comments_stand_between_the_events() -> None:
    async with live(keep_alive_interval_s=0.02) as server:
        server.device.gate.clear()
        body = {"input": "x", "max_output_tokens": 3, "stream": True}
        async with server.http.post(server.url + RESPONSES, json=body) as response:
            assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
            server.device.gate.set()
            assert b"event: response.incomplete" in await response.read()


async def test_a_conversation_is_made_shorter_and_goes_on(demo: Live) -> None:
    """As OpenAI's own client asks for it: the user's words stay, an item that only this server reads has the rest."""
    turns: list[Any] = [
        {"role": "user", "content": "Call me Mia."},
        {"role": "assistant", "content": "Hello Mia."},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"role": "user", "content": "Thanks."},
    ]
    async with demo.openai() as client:
        with dictated(demo, "Mia asked for the weather: rain é.") as asked:
            shorter = await client.responses.compact(model="demo", input=turns, instructions="Be kind.")
        prompt = tokenizer().decode(asked[0].prompt_token_ids)
        assert "Be kind." in prompt and "rain" in prompt and "summary of this conversation" in prompt
        *kept, item = [item.to_dict(warnings=False) for item in shorter.output]
        assert [said["content"][0]["text"] for said in kept] == ["Call me Mia.", "Thanks."]  # type: ignore[index]
        assert item["type"] == "compaction" and "rain" not in str(item["encrypted_content"])
        assert shorter.usage.output_tokens > 1
        with dictated(demo, "Yes.") as asked:
            again = [*kept, item, {"role": "user", "content": "Well?"}]
            await create(demo, {"input": again})
        prompt = tokenizer().decode(asked[0].prompt_token_ids)
        assert "Mia asked for the weather: rain é." in prompt and prompt.count("Thanks.") == 1
    # Of what is not ours, or was changed, nothing is read.
    for content in ("gAAAA", "oneloop:%%%", "oneloop:/w==", "oneloop:", 5, None):
        body = {"input": [{"type": "compaction", "encrypted_content": content}, {"role": "user", "content": "x"}]}
        with dictated(demo, "y") as asked:
            await create(demo, body)
        assert "oneloop:" not in tokenizer().decode(asked[0].prompt_token_ids)
