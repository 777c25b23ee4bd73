"""Responses that go on without their client: asked about, followed from any event on, cancelled, bounded."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.server.support import Live, live, until
from tests.server.test_errors import check_shape

BODY = {"input": "Tell me.", "background": True, "max_output_tokens": 20, "temperature": 0}


async def get(server: Live, path: str, **options: Any) -> tuple[int, Any]:
    async with server.http.get(server.url + path, **options) as response:
        return response.status, await response.json()


async def follow(server: Live, name: str, query: str = "", **options: Any) -> list[Any]:
    async with server.http.get(f"{server.url}/v1/responses/{name}?stream=true{query}", **options) as response:
        assert response.status == 200, await response.text()
        text = await response.text()
    return [json.loads(event.split("data: ", 1)[1]) for event in text.split("\n\n") if "data: " in event]


async def ended(server: Live, name: str) -> Any:
    while (found := (await get(server, f"/v1/responses/{name}"))[1])["status"] in ("queued", "in_progress"):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    return found


async def test_it_runs_on_and_is_what_a_plain_one_is(server: Live) -> None:
    server.device.gate.clear()
    status, queued = await server.post("/v1/responses", BODY)
    assert (
        status == 200
        and queued["status"] == "queued"
        and not queued["output"]
        and queued["background"] is True
        and queued["usage"] is None
    )
    name = queued["id"]
    assert (await get(server, f"/v1/responses/{name}"))[1]["status"] in ("queued", "in_progress")
    following = asyncio.create_task(follow(server, name))
    server.device.gate.set()
    found, events = await ended(server, name), await following
    plain = (await server.post("/v1/responses", {**BODY, "background": False}))[1]
    assert [item["content"][0]["text"] for item in found["output"]] == [
        item["content"][0]["text"] for item in plain["output"]
    ]
    assert found["status"] == plain["status"] == "incomplete" and found["background"] is True
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"] == found and events[0]["type"] == "response.created"
    # Taken up again from any event on, by the query or by what SSE clients send by themselves.
    for after in (0, 3, len(events) - 1, len(events) + 5):
        assert await follow(server, name, f"&starting_after={after}") == events[after + 1 :]
    assert await follow(server, name, headers={"Last-Event-ID": "2"}) == events[3:]
    more = {"input": "And?", "previous_response_id": name, "max_output_tokens": 2}
    assert (await server.post("/v1/responses", more))[0] == 200
    await server.all_free()


async def test_a_client_that_leaves_ends_nothing(server: Live) -> None:
    server.device.gate.clear()
    url = f"{server.url}/v1/responses"
    response = await server.http.post(url, json={**BODY, "stream": True})
    first = json.loads((await response.content.readuntil(b"\n\n")).split(b"data: ", 1)[1])
    response.close()
    await asyncio.sleep(0.01)
    server.device.gate.set()
    assert (await ended(server, first["response"]["id"]))["status"] == "incomplete"


async def test_cancelling_and_forgetting(server: Live) -> None:
    body = {**BODY, "max_output_tokens": 400}
    server.device.gate.clear()
    names = [(await server.post("/v1/responses", body))[1]["id"] for _ in range(3)]
    await until(lambda: server.num_requests() == 3)
    following = asyncio.create_task(follow(server, names[0]))
    cancelled = asyncio.create_task(server.post(f"/v1/responses/{names[0]}/cancel", {}))
    status, found = await cancelled
    assert status == 200 and found["status"] == "cancelled"
    assert (await following)[-1]["response"]["status"] == "cancelled"
    assert (await server.post(f"/v1/responses/{names[0]}/cancel", {}))[1] == found, "it stays as it is"
    async with server.http.delete(f"{server.url}/v1/responses/{names[1]}") as response:
        assert response.status == 200
    assert (await get(server, f"/v1/responses/{names[1]}"))[0] == 404
    server.device.gate.set()
    assert (await ended(server, names[2]))["status"] == "incomplete"
    await server.all_free()
    plain = (await server.post("/v1/responses", {"input": "x", "max_output_tokens": 1}))[1]["id"]
    check_shape(*await server.post(f"/v1/responses/{plain}/cancel", {}), expected=400)
    check_shape(*await server.post("/v1/responses/resp_unknown/cancel", {}), expected=404)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"store": False}, "background"),
        ({"background": "yes"}, "background"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": 5}, "stream"),
        ({"input": 5}, "input"),
        ({"previous_response_id": "resp_unknown"}, "previous_response_id"),
    ],
)
async def test_what_cannot_be_asked(server: Live, change: dict[str, Any], field: str) -> None:
    error = check_shape(*await server.post("/v1/responses", BODY | change))
    assert error["param"] == field
    assert server.num_requests() == 0


@pytest.mark.parametrize(
    "query", ["stream=yes", "stream=true&starting_after=-1", "starting_after=1", "stream=true&starting_after=x"]
)
async def test_queries_that_mean_nothing(server: Live, query: str) -> None:
    name = (await server.post("/v1/responses", BODY))[1]["id"]
    await ended(server, name)
    check_shape(*await get(server, f"/v1/responses/{name}?{query}"), expected=400)
    plain = (await server.post("/v1/responses", {"input": "x", "max_output_tokens": 1}))[1]["id"]
    check_shape(*await get(server, f"/v1/responses/{plain}?stream=true"), expected=400)


async def test_they_belong_to_their_key_and_are_bounded_and_refused() -> None:
    async with live(api_keys=("k1", "k2"), response_store_size=2, max_queued_requests=3, max_num_seqs=1) as server:
        one, two = {"X-Api-Key": "k1"}, {"X-Api-Key": "k2"}
        names = []
        for _ in range(4):
            names.append((await server.post("/v1/responses", BODY, headers=one))[1]["id"])
            await server.all_free()
        assert [(await get(server, f"/v1/responses/{name}", headers=one))[0] for name in names] == [404, 404, 200, 200]
        for path in (names[-1], f"{names[-1]}?stream=true"):
            assert (await get(server, f"/v1/responses/{path}", headers=two))[0] == 404
        assert (await server.post(f"/v1/responses/{names[-1]}/cancel", {}, headers=two))[0] == 404
        server.device.gate.clear()
        answers = [await server.post("/v1/responses", BODY, headers=one) for _ in range(6)]
        assert {status for status, _ in answers} == {200, 429}
        server.device.gate.set()
        await server.all_free()


async def test_a_drain_waits_for_them(server: Live) -> None:
    server.device.gate.clear()
    await server.post("/v1/responses", BODY)
    await until(lambda: server.num_requests() == 1)
    assert server.state.in_flight.count == 1
    server.device.gate.set()
    await server.state.in_flight.idle.wait()
    assert server.num_requests() == 0
