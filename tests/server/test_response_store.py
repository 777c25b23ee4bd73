"""Turns that go on from kept responses: the store, whose it is, and its bounds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from server.response_store import ResponseStore
from tests.server.support import Live, live
from tests.server.test_errors import check_shape
from tests.server.test_logprobs import device
from tests.server.test_responses import RESPONSES, create, get


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[Live]:
    async with live(make_device=device, num_pages=512) as server:
        yield server


async def test_turns_go_on_from_the_store(demo: Live) -> None:
    async with demo.openai() as client:

        async def turn(text: str, **fields: Any) -> Any:
            return await client.responses.create(model="demo", input=text, temperature=0, **fields)

        first = await turn("My name is Tom.", instructions="You are a helpful assistant.")
        second = await turn("What is my name?", previous_response_id=first.id)
        assert second.output_text == "Your name is Tom."
        # A branch from the same turn does not see the other.
        other = await turn("What is 17 + 25?", previous_response_id=first.id)
        assert other.output_text == "17 + 25 = 42"

        seen = await client.responses.retrieve(second.id)
        assert seen.to_dict() == second.to_dict()
        items = [item async for item in client.responses.input_items.list(second.id, order="asc", limit=1)]
        assert [item.type for item in items] == ["message"] * 3 and items[1].id == first.output[0].id
        assert [item.content[0].text for item in items[::2]] == ["My name is Tom.", "What is my name?"]
        newest = await client.responses.input_items.list(second.id, limit=2)
        assert [item.id for item in newest.data] == [items[2].id, items[1].id] and newest.has_more

        # By reference: items of an earlier answer, with nothing else of it.
        references: Any = [{"type": "item_reference", "id": item.id} for item in (items[0], first.output[0])]
        question: Any = {"role": "user", "content": "What is my name?"}
        by_reference = await turn([*references, question])  # type: ignore[arg-type]
        assert by_reference.output_text == "Your name is Tom."

        with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
            await client.responses.cancel(second.id)
        await client.responses.delete(second.id)
        for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                await call(second.id)
        with pytest.raises(openai.BadRequestError) as error:
            await turn("x", previous_response_id=second.id)
        assert error.value.code == "previous_response_not_found" and error.value.param == "previous_response_id"
        assert (await client.responses.retrieve(first.id)).id == first.id


async def test_what_is_not_to_be_stored_is_not(server: Live) -> None:
    found = await create(server, {"input": "x", "max_output_tokens": 2, "store": False})
    check_shape(*await get(server, f"{RESPONSES}/{found['id']}"), expected=404)
    assert len(server.state.responses) == 0


async def test_a_server_without_a_store() -> None:
    async with live(response_store_size=0) as server:
        found = await create(server, {"input": "x", "max_output_tokens": 2})
        assert found["store"] is False
        check_shape(*await get(server, f"{RESPONSES}/{found['id']}"), expected=404)
        for field in ({"previous_response_id": found["id"]}, {"store": True}):
            error = check_shape(*await server.post(RESPONSES, {"input": "x", **field}))
            assert error["param"] in field and "--response-store-size 0" in error["message"]


async def test_a_response_belongs_to_its_key() -> None:
    async with live(api_keys=("one", "two")) as server:
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        found = await create(server, {"input": "x", "max_output_tokens": 2}, headers=one)
        path = f"{RESPONSES}/{found['id']}"
        for place in (path, f"{path}/input_items"):
            check_shape(*await get(server, place, "two"), expected=404)
            assert (await get(server, place, "one"))[0] == 200
        check_shape(*await get(server, path, "three"), expected=401)
        body = {"input": "x", "previous_response_id": found["id"]}
        assert check_shape(*await server.post(RESPONSES, body, headers=two))["code"] == "previous_response_not_found"
        reference = {"input": [{"id": found["output"][0]["id"]}]}
        # To anybody else it is an item like any that is not kept.
        assert check_shape(*await server.post(RESPONSES, reference, headers=two))["param"] == "input"
        await create(server, {**reference, "max_output_tokens": 1}, headers=one)
        async with server.http.delete(server.url + path, headers=two) as response:
            assert response.status == 404
        assert (await get(server, path, "one"))[0] == 200


def stored(name: str, text: str = "") -> dict[str, Any]:
    return {"id": name, "output": [{"id": f"msg_{name}", "text": text}]}


def test_the_store_is_bounded_in_number_and_the_least_used_go_first() -> None:
    store = ResponseStore(3, 10_000)
    for name in "abc":
        store.put("", stored(name), [])
    assert store.get("", "a") is not None
    store.put("", stored("d"), [])
    assert [store.get("", name) is not None for name in "abcd"] == [True, False, True, True]
    assert store.get_item("", "msg_b") is None and store.get_item("", "msg_d") == stored("d")["output"][0]
    assert store.get_item("other", "msg_d") is None
    for name in "acd":
        assert store.delete("", name) and not store.delete("", name)
    assert store.num_bytes == 0 and len(store) == 0 and store.get_item("", "msg_a") is None


def test_the_store_is_bounded_in_bytes() -> None:
    store = ResponseStore(100, 3000)
    for index in range(20):
        store.put("", stored(str(index), "x" * 500), [])
        assert store.num_bytes <= 3000
    assert 2 <= len(store) <= 4 and store.get("", "19") is not None
    store.put("", stored("big", "x" * 5000), [])
    assert store.get("", "big") is None and store.get("", "19") is not None
