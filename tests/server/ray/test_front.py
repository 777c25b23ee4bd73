"""The front over real applications behind their bridges: what clients see of them, and of replicas that are gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

from server.ray.bridge import Ask, Head
from server.ray.front import Front, FullError
from server.ray.prefixes import Beginnings
from tests.server.ray.support import Answer, Client, Local, local
from tests.server.support import parse_events, text_of, until

ASK = {"model": "demo", "prompt": "hello", "max_tokens": 12, "temperature": 0}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12}


@pytest_asyncio.fixture
async def replica() -> AsyncIterator[Local]:
    async with local() as one:
        yield one


def client(*backends: Any, **options: Any) -> Client:
    return Client(Front(backends, **{"max_body": 10_000, **options}))


class Flaky:
    """Two replicas of a model: asks go to the first, as long as it is there."""

    def __init__(self, *replicas: Local) -> None:
        self.replicas = list(replicas)
        self.keepers: list[str | None] = []

    async def answer(self, ask: Ask) -> Any:
        self.keepers.append(ask.keeper)
        one = self.replicas.pop(0) if len(self.replicas) > 1 else self.replicas[0]
        async for piece in one.answer(ask):
            yield piece

    async def answer_all(self, ask: Ask) -> list[tuple[Head, bytes]]:
        return [answer for one in self.replicas for answer in await one.answer_all(ask)]


async def test_answers_arrive_as_they_are(replica: Local) -> None:
    ours = client(replica)
    whole = await ours.ask("/v1/completions", ASK)
    assert whole.status == 200 and whole.ended and whole.json()["usage"]["completion_tokens"] == 12
    assert whole.headers["content-length"] == str(len(whole.body)) and whole.headers["x-oneloop-replica"] == "demo"
    stream = await ours.ask("/v1/completions", ASK | {"stream": True})
    assert text_of(parse_events(stream.body)) == whole.json()["choices"][0]["text"]
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    listed = await ours.ask("/v1/models?x=%41", method="GET")
    assert listed.json()["data"][0]["id"] == "demo" and replica.asked[-1].target == "/v1/models?x=%41"
    assert (await ours.ask("/v1/models", method="HEAD")).body == b""


@pytest.mark.parametrize(
    ("path", "fields", "status", "told"),
    [
        ("/v1/completions", b"{", 400, "JSON"),
        ("/v1/completions", b"[" * 4000, 400, "JSON"),
        ("/v1/chat/completions", b'{"messages": ' + b"[" * 400 + b"]" * 400 + b"}", 400, "nested"),
        ("/v1/completions", b"x" * 20_000, 413, "larger than"),
        ("/v1/completions", {"prompt": 3.5}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "other"),
        ("/v1/messages", {"model": "demo"}, 400, "max_tokens"),
        ("/v1/nothing%2F..", {}, 404, "route"),
    ],
)
async def test_errors_are_the_applications(path: str, fields: Any, status: int, told: str) -> None:
    async with local(max_body_bytes=10_000) as replica:
        answer = await client(replica).ask(path, fields)
    assert answer.status == status and told in answer.json()["error"]["message"]


async def test_a_client_that_leaves_frees_its_row(replica: Local) -> None:
    answer, leave = Answer(), asyncio.Event()
    replica.device.gate.clear()
    asking = asyncio.create_task(client(replica).ask("/v1/completions", ASK, leave=leave, answer=answer))
    await until(lambda: replica.engine.stats().num_running == 1)
    leave.set()
    await asking
    replica.device.gate.set()
    await until(lambda: not replica.engine.stats().num_used_pages)
    assert not answer.status


async def test_an_answer_that_has_not_begun_comes_from_another(replica: Local) -> None:
    async with local("dead") as dead:
        dead.fails_at = 0
        flaky = Flaky(dead, replica)
        answer = await client(flaky).ask("/v1/completions", ASK)
    assert answer.status == 200 and answer.headers["x-oneloop-replica"] == "demo" and len(dead.asked) == 1


async def test_where_all_are_gone_it_is_a_503_of_the_api(replica: Local) -> None:
    replica.fails_at = 0
    for path, error in (("/v1/completions", "service_unavailable"), ("/v1/messages", None), ("/api/chat", None)):
        answer = await client(replica).ask(path, ASK)
        assert answer.status == 503 and answer.headers["retry-after"] and answer.ended
        told = answer.json()
        if error:
            assert told["error"]["code"] == error
        elif path == "/v1/messages":
            assert told["type"] == "error" and told["error"]["type"]
        else:
            assert isinstance(told["error"], str)
    assert len(replica.asked) == 6


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", ASK),
        ("/chat/completions", CHAT),
        ("/generate", {"text": "hello", "sampling_params": {"max_new_tokens": 12}}),
        ("/v1/messages", CHAT),
        ("/v1/responses", {"model": "demo", "input": "hi", "max_output_tokens": 12}),
        ("/api/chat", CHAT | {"options": {"num_predict": 12}}),
        ("/completion", {"prompt": "hello", "n_predict": 12}),
    ],
)
async def test_a_broken_stream_ends_with_the_apis_own_error(replica: Local, path: str, fields: Any) -> None:
    replica.fails_at = 3
    answer = await client(replica).ask(path, fields | {"stream": True})
    assert answer.status == 200 and answer.ended and answer.body.endswith(b"\n")
    if path == "/api/chat":
        assert isinstance(json.loads(answer.body.splitlines()[-1])["error"], str)
        return
    events = answer.body.decode().rstrip("\n").split("\n\n")
    if path in ("/v1/messages", "/v1/responses"):
        kind, data = events[-1].split("\n")
        last = json.loads(data.removeprefix("data: "))
        assert kind == "event: error" and last["type"] == "error"
        if path == "/v1/responses":
            before = json.loads(events[-2].split("\n")[1].removeprefix("data: "))
            assert last["sequence_number"] == before["sequence_number"] + 1 and last["message"]
    elif path == "/completion":
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "service_unavailable"
    else:
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "service_unavailable"


async def test_errors_have_their_shape_below_a_root_path() -> None:
    async with local(root_path="/base") as replica:
        replica.fails_at = 3
        ours = client(replica, root_path="/base")
        events = (await ours.ask("/base/v1/messages/", CHAT | {"stream": True})).body
        assert b"event: error" in events
        assert (await ours.ask("/base/v1/messages", {})).json()["type"] == "error"


async def test_half_an_event_is_never_passed_on() -> None:
    class Cutting:
        """Says a stream in pieces of three bytes, and is gone in the middle of an event."""

        async def answer(self, ask: Ask) -> Any:
            yield Head(200, [("Content-Type", "text/event-stream; charset=utf-8")])
            data = b'data: {"a": 1}\n\ndata: {"b": 2}\n\ndata: {"c"'
            for start in range(0, len(data), 3):
                yield data[start : start + 3]
            async for piece in broken.answer(ask):
                yield piece

    async with local() as broken:
        broken.fails_at = 0
        events = parse_events((await client(Cutting()).ask("/v1/completions", ASK)).body)
    assert events[:2] == [{"a": 1}, {"b": 2}] and "error" in events[2] and events[3:] == ["[DONE]"]


async def test_a_full_queue_is_a_429() -> None:
    class Full:
        async def answer(self, ask: Ask) -> Any:
            raise FullError
            yield

    answer = await client(Full()).ask("/v1/completions", ASK)
    assert answer.status == 429 and answer.json()["error"]["type"] == "rate_limit_error"
    assert answer.headers["retry-after"]


async def test_models_are_found_by_their_names() -> None:
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(local(name)) for name in ("one", "other")]
        renamed = Renamed(other)
        ours = client(one, renamed)
        for name, status, who in (("demo", 200, "one"), ("second", 200, "other"), ("third", 404, "one")):
            answer = await ours.ask("/v1/completions", ASK | {"model": name})
            assert (answer.status, answer.headers["x-oneloop-replica"]) == (status, who)


class Renamed:
    """Another model, as far as its name goes."""

    def __init__(self, replica: Local) -> None:
        self.replica = replica

    async def answer(self, ask: Ask) -> Any:
        if ask.target == "/v1/models":
            yield Head(200, [])
            yield b'{"data": [{"id": "second"}]}'
            return
        async for piece in self.replica.answer(
            Ask(ask.method, ask.target, ask.headers, ask.body.replace(b"second", b"demo"))
        ):
            yield piece


async def test_later_turns_of_a_response_go_to_who_keeps_it(replica: Local) -> None:
    flaky = Flaky(replica)
    ours = client(flaky)
    first = await ours.ask("/v1/responses", {"model": "demo", "input": "hi", "max_output_tokens": 4})
    await ours.ask("/v1/responses", {"model": "demo", "input": "b", "previous_response_id": first.json()["id"]})
    again = await ours.ask(f"/v1/responses/{first.json()['id']}", method="GET")
    assert again.json()["output"] == first.json()["output"]
    assert flaky.keepers == [None, "demo", "demo"]


async def test_what_changes_a_replica_is_done_to_all(replica: Local) -> None:
    async with local("second") as second:
        ours = client(Flaky(replica, second))
        paused = await ours.ask("/pause", {})
        assert paused.status == 200 and paused.headers["x-oneloop-replicas"] == "2"
        assert replica.engine.is_paused and second.engine.is_paused
        assert (await ours.ask("/pause?mode=none", {})).status == 400
        metrics = await ours.ask("/metrics", method="GET")
        assert metrics.body.count(b"# TYPE vllm:num_requests_running gauge") == 1
        for name in (b"demo", b"second"):
            assert b'vllm:num_requests_running{replica="' + name in metrics.body


async def test_what_a_request_begins_with_is_told_to_who_chooses(replica: Local) -> None:
    await client(replica).ask("/v1/completions", ASK | {"prompt": "a" * 1000}, x_session_id="s")
    told = replica.asked[0].beginnings
    assert told.ends[-1] > 700 and told.session is not None and told != Beginnings()


async def test_closing_waits_for_what_was_accepted() -> None:
    async with local() as replica:
        replica.device.gate.clear()
        asking = asyncio.create_task(client(replica).ask("/v1/completions", ASK | {"stream": True}))
        await until(lambda: replica.engine.stats().num_running == 1)
        closing = asyncio.create_task(replica.bridge.close())
        await asyncio.sleep(0)
        replica.device.gate.set()
        events = parse_events((await asking).body)
        await closing
    assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "length"
