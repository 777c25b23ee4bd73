"""Prefill and decode apart: two servers and what a router sends them, over the TCP connector and the fake device, whose
cells say what they were written for."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from engine.config import TransferOptions
from engine.transfer import exchange, wire
from engine.transfer.base import TransferError
from engine.transfer.exchange import PageExchange
from engine.transfer.registry import make_connector
from tests.server.support import Live, live, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = list(range(20, 20 + 100))  # six whole pages of 16 and a part of one
LONG = "A long text. " * 20
PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def weights(directory: Path | None) -> str:
    return "the same"


@contextlib.asynccontextmanager
async def apart(**options: Any) -> AsyncIterator[Live]:
    """A server that keeps pages and reads them."""
    transfer = TransferOptions("TcpConnector", **options)
    async with live(transfer=transfer, weights=weights) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pair() -> AsyncIterator[tuple[Live, Live]]:
    async with apart(keep_timeout_s=30.0) as prefill, apart(receive_timeout_s=5.0) as decode:
        yield prefill, decode


def prompt_of(number: int, length: int = 100) -> list[int]:
    """One that no other test has."""
    return [(number * 7919 + place * 31) % 1000 + 100 for place in range(length)]


def exchange_of(server: Live) -> PageExchange:
    assert server.engine.transfer is not None
    return server.engine.transfer


def failures(server: Live) -> dict[str, int]:
    return dict(exchange_of(server).tally.failures)


async def prefilled(server: Live, prompt: Any, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    """What the prefill's answer says of its pages."""
    body = {"prompt": prompt, "max_tokens": 1, "stream": False, "kv_transfer_params": PREFILL, **fields}
    if path == "/v1/chat/completions":
        body["messages"] = body.pop("prompt")
    status, answer = await server.post(path, body)
    assert status == 200, answer
    params: dict[str, Any] = answer["kv_transfer_params"]
    return params


async def proxy(pair: tuple[Live, Live], path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """What llm-d's sidecar does: one token of the prefiller, then the request as it was with what that said."""
    prefill, decode = pair
    first = {key: value for key, value in body.items() if key != "stream_options"}
    first |= {"max_tokens": 1, "stream": False, "kv_transfer_params": PREFILL}
    if "chat" in path:
        first["max_completion_tokens"] = 1
    status, answer = await prefill.post(path, first)
    assert status == 200, answer
    if (params := answer.get("kv_transfer_params")) is not None:
        body = {**body, "kv_transfer_params": params}
    return await decode.post(path, body)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "logprobs": 2},
        {"temperature": 1, "seed": 11, "logprobs": 0},
        {"temperature": 1, "seed": 12, "n": 3},
        {"temperature": 0, "min_tokens": 8, "presence_penalty": 1.0},
    ],
    ids=["greedy", "sampled", "choices", "penalties"],
)
async def test_the_answer_is_that_of_one_server(pair: tuple[Live, Live], fields: dict[str, Any]) -> None:
    prefill, decode = pair
    body = {"prompt": prompt_of(1 + len(fields) + fields.get("seed", 0)), "max_tokens": 12, **fields}
    before, hits = failures(decode), exchange_of(decode).tally.hit_tokens
    status, answer = await proxy(pair, "/v1/completions", body)
    assert status == 200, answer
    assert failures(decode) == before and exchange_of(decode).tally.hit_tokens == hits + 96
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 96
    async with live() as alone:
        _, expected = await alone.post("/v1/completions", body)
    assert [one["text"] for one in answer["choices"]] == [one["text"] for one in expected["choices"]]
    assert [one["logprobs"] for one in answer["choices"]] == [one["logprobs"] for one in expected["choices"]]
    # What was read is not kept any longer, and nobody holds a page.
    await until(lambda: not exchange_of(prefill)._kept and not prefill.busy() and not decode.busy())


async def test_chat_and_a_stream(pair: tuple[Live, Live]) -> None:
    prefill, decode = pair
    messages = [{"role": "user", "content": "Tell me about rivers and mountains and forests. " * 5}]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    params = await prefilled(prefill, messages, "/v1/chat/completions")
    hits = exchange_of(decode).tally.hit_tokens
    events = await decode.events("/v1/chat/completions", {**body, "kv_transfer_params": params})
    assert exchange_of(decode).tally.hit_tokens > hits
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in events[:-1])
    _, expected = await prefill.post("/v1/chat/completions", body)
    assert text == expected["choices"][0]["message"]["content"]


async def test_generate_and_a_prefill_that_is_streamed(pair: tuple[Live, Live]) -> None:
    prefill, decode = pair
    body = {"input_ids": prompt_of(30), "sampling_params": {"max_new_tokens": 5, "temperature": 0}}
    status, answer = await prefill.post("/generate", {**body, "kv_transfer_params": PREFILL})
    assert status == 200 and len(answer["output_ids"]) == 1
    hits = exchange_of(decode).tally.hit_tokens
    status, own = await decode.post("/generate", {**body, "kv_transfer_params": answer["kv_transfer_params"]})
    assert status == 200 and own["meta_info"]["cached_tokens"] == 96 and exchange_of(decode).tally.hit_tokens > hits
    assert own["output_ids"] == (await prefill.post("/generate", body))[1]["output_ids"]
    events = await prefill.events("/v1/completions", {"prompt": prompt_of(31), "kv_transfer_params": PREFILL})
    assert events[-2]["kv_transfer_params"]["remote_block_ids"]
    exchange_of(prefill)._let_go(events[-2]["kv_transfer_params"]["remote_request_id"], "read")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": "Messages. " + LONG}], "max_tokens": 8}),
        ("/v1/responses", {"input": "Responses. " + LONG, "max_output_tokens": 8}),
    ],
)
async def test_other_families(pair: tuple[Live, Live], path: str, body: dict[str, Any]) -> None:
    """As routers send them: a whole answer of the prefiller, then the request with what that said."""
    prefill, decode = pair
    body = {"model": "demo", "temperature": 0, **body}
    asked = {**body, "kv_transfer_params": PREFILL}
    if path == "/v1/messages":
        # With what a client wants of the whole answer.
        asked |= {"max_tokens": 1, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    status, first = await prefill.post(path, asked)
    assert status == 200 and first["kv_transfer_params"]["remote_block_ids"], first
    assert first["usage"]["output_tokens"] == 1
    hits, failed = exchange_of(decode).tally.hit_tokens, failures(decode)
    again = {**body, "kv_transfer_params": first["kv_transfer_params"]}
    status, answer = await decode.post(path, again)
    assert status == 200 and exchange_of(decode).tally.hit_tokens > hits and failures(decode) == failed
    assert "kv_transfer_params" not in answer
    told = "content" if path == "/v1/messages" else "output"
    _, expected = await prefill.post(path, body)
    assert [_text(item) for item in answer[told]] == [_text(item) for item in expected[told]]
    streamed = {**body, "stream": True, "kv_transfer_params": PREFILL}
    async with prefill.http.post(prefill.url + path, json=streamed) as response:
        lines = (await response.read()).splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    [kept] = [params for event in events if (params := _kept(event)) is not None]
    assert kept["remote_block_ids"]
    exchange_of(prefill)._let_go(kept["remote_request_id"], "read")


def _text(item: dict[str, Any]) -> Any:
    return item.get("text") or [part["text"] for part in item["content"]]


def _kept(event: dict[str, Any]) -> Any:
    """In a Messages stream beside the usage, else in the Response that ends."""
    return event.get("response", event).get("kv_transfer_params")


async def test_only_what_is_not_there_is_read(pair: tuple[Live, Live]) -> None:
    prefill, decode = pair
    prompt = prompt_of(40, 200)
    await decode.complete(prompt[:90], max_tokens=1)
    params = await prefilled(prefill, prompt)
    assert len(params["remote_block_ids"]) == 12
    hits = exchange_of(decode).tally.hit_tokens
    answer = await decode.complete(prompt, max_tokens=4, kv_transfer_params=params)
    assert exchange_of(decode).tally.hit_tokens - hits == 192 - 80
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 192


async def test_keeping_answers_one_token_whatever_was_asked_for(pair: tuple[Live, Live]) -> None:
    status, answer = await pair[0].post(
        "/v1/completions",
        {"prompt": prompt_of(50), "max_tokens": 40, "min_tokens": 9, "kv_transfer_params": PREFILL},
    )
    assert status == 200 and answer["usage"]["completion_tokens"] == 1
    # A prompt within one page has nothing to read.
    params = await prefilled(pair[0], [5, 6, 7])
    assert params["remote_block_ids"] == []
    before = failures(pair[1])
    await pair[1].complete([5, 6, 7], max_tokens=2, kv_transfer_params=params)
    assert failures(pair[1]) == before


Change = Callable[[dict[str, Any]], dict[str, Any]]
LIES: dict[str, tuple[Change, str]] = {
    "no words": (lambda params: {"do_remote_prefill": True}, "missing"),
    "no port": (lambda params: {**params, "remote_port": None}, "missing"),
    "another engine": (lambda params: {**params, "remote_engine_id": "somebody"}, "unknown"),
    "another request": (lambda params: {**params, "remote_request_id": "nothing"}, "expired"),
    "a dead port": (lambda params: {**params, "remote_port": 1}, "peer"),
    "a host that is none": (lambda params: {**params, "remote_host": "no such host.invalid"}, "peer"),
    "a host of the world": (lambda params: {**params, "remote_host": "8.8.8.8"}, "peer"),
    "a log line": (lambda params: {**params, "remote_engine_id": "x\nWARNING all is lost"}, "unknown"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_what_cannot_be_had_is_computed(
    pair: tuple[Live, Live], lie: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = pair
    change, reason = LIES[lie]
    prompt = prompt_of(100 + sorted(LIES).index(lie))
    params = await prefilled(prefill, prompt)
    before = failures(decode).get(reason, 0)
    answer = await decode.complete(prompt, max_tokens=6, temperature=0, kv_transfer_params=change(params))
    expected = await prefill.complete(prompt, max_tokens=6, temperature=0)
    assert answer["choices"][0]["text"] == expected["choices"][0]["text"]
    assert answer["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0) == 0
    assert failures(decode)[reason] == before + 1
    lines = [record.getMessage() for record in caplog.records if "were not had" in record.getMessage()]
    assert len(lines) == 1 and reason in lines[0] and "\n" not in lines[0] and "96 tokens" in lines[0]
    exchange_of(prefill)._let_go(params["remote_request_id"], "read")


async def test_a_name_of_another_prompt_brings_nothing(pair: tuple[Live, Live]) -> None:
    """Or a client could put its pages under somebody else's words."""
    prefill, decode = pair
    params = await prefilled(prefill, prompt_of(60))
    before = failures(decode).get("mismatch", 0)
    other = prompt_of(61)
    answer = await decode.complete(other, max_tokens=4, temperature=0, kv_transfer_params=params)
    assert failures(decode)["mismatch"] == before + 1
    expected = await prefill.complete(other, max_tokens=4, temperature=0)
    assert answer["choices"][0]["text"] == expected["choices"][0]["text"]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"error": "no"}, "peer"),
        ({}, "mismatch"),
        ({"ticket": "t", "pages": {}}, "mismatch"),
        ({"ticket": "t", "pages": {"host": "127.0.0.1", "port": 1, "ticket": "00" * 32, "counts": [9]}}, "mismatch"),
        ({"ticket": "t", "pages": {"host": "9.9.9.9", "port": 1, "ticket": "00" * 32, "counts": [6]}}, "peer"),
        (b"\xff\xff\xff\xff", "peer"),
        (b"\x00\x00\x00\x02no", "peer"),
        (b"\x00\x00\x00\x02[]", "peer"),
        (b"", "peer"),
        (None, "timeout"),
    ],
)
async def test_a_peer_that_is_none(pair: tuple[Live, Live], what: Any, reason: str) -> None:
    """It lies about what it has, says what is no word of ours, or nothing."""
    decode, asked = pair[1], asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await wire.read_message(reader) is not None
        asked.set()
        if what is None:
            await reader.read()
        else:
            writer.write(what if isinstance(what, bytes) else wire.pack(what))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    params = {"do_remote_prefill": True, "remote_engine_id": "e", "remote_request_id": "r", "remote_host": "127.0.0.1"}
    before = failures(decode).get(reason, 0)
    options, exchange_of(decode).options = exchange_of(decode).options, TransferOptions(receive_timeout_s=0.3)
    try:
        answer_ = await decode.complete(prompt_of(70), max_tokens=2, kv_transfer_params={**params, "remote_port": port})
    finally:
        exchange_of(decode).options = options
        server.close()
    assert asked.is_set() and failures(decode)[reason] == before + 1, failures(decode)
    assert answer_["usage"]["completion_tokens"] == 2
    decode.engine.scheduler.kv_cache.flush()


async def test_another_layout_or_version_is_refused(pair: tuple[Live, Live], monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = pair
    params = await prefilled(prefill, prompt_of(80))
    before = failures(decode).get("mismatch", 0)
    monkeypatch.setattr(exchange_of(decode), "_layout", "other weights")
    await decode.complete(prompt_of(80), max_tokens=1, kv_transfer_params=params)
    assert failures(decode)["mismatch"] == before + 1
    monkeypatch.undo()
    channel = await wire.connect("127.0.0.1", params["remote_port"], exchange_of(decode)._networks)
    good = {
        "op": "open",
        "version": exchange.VERSION,
        "engine_id": params["remote_engine_id"],
        "layout": exchange_of(prefill)._layout,
        "request_id": params["remote_request_id"],
        "first": 0,
        "count": 6,
        "digest": exchange._digest(prompt_of(80), 96),
    }
    for change, reason in (
        ({"version": 1}, "mismatch"),
        ({"version": None}, "mismatch"),
        ({"op": "drop"}, "mismatch"),
        ({"op": None}, "mismatch"),
        ({"engine_id": 7}, "unknown"),
        ({"layout": ""}, "mismatch"),
        ({"request_id": ["x"]}, "expired"),
        ({"first": -1}, "mismatch"),
        ({"first": 1}, "mismatch"),
        ({"count": 0}, "mismatch"),
        ({"count": 10**9}, "mismatch"),
        ({"count": 6.0}, "mismatch"),
        ({"count": True}, "mismatch"),
        ({"digest": None}, "mismatch"),
        ({"digest": exchange._digest(prompt_of(80), 80)}, "mismatch"),
    ):
        with pytest.raises(wire.TransferError) as error:
            await channel.ask(good | change)
        assert error.value.reason == reason, change
    for ticket in (None, 7, "", "0" * 32):
        assert await channel.ask({"op": "close", "version": exchange.VERSION, "ticket": ticket}) == {"held": False}
    opened = await channel.ask(good)
    channel.close()
    # What was opened on a connection ends with it; the pages wait for the next reader.
    kept = exchange_of(prefill)._kept[params["remote_request_id"]]
    await until(lambda: not kept.reads)
    assert opened["ticket"] not in kept.reads and params["remote_request_id"] in exchange_of(prefill)._kept
    exchange_of(prefill)._let_go(params["remote_request_id"], "read")


async def test_pages_are_let_go_in_time_and_are_not_without_bound() -> None:
    async with apart(keep_timeout_s=0.2, kept_share=0.003) as server, apart() as decode:
        first = await prefilled(server, prompt_of(90))
        assert exchange_of(server).tally.num_kept_pages() == 6 and server.engine.stats().num_used_pages == 6
        second = {"prompt": prompt_of(91, 200), "max_tokens": 1, "kv_transfer_params": PREFILL}
        status, answer = await server.post("/v1/completions", second)
        assert status == 200 and "kv_transfer_params" not in answer  # 12 pages more would be too many
        await until(lambda: not exchange_of(server)._kept)
        assert server.engine.stats().num_used_pages == 0
        assert exchange_of(server).tally.let_go["expired"] == 1
        await decode.complete(prompt_of(90), max_tokens=1, kv_transfer_params=first)
        assert failures(decode) == {"expired": 1}
        async with server.http.get(f"{server.url}/metrics") as response:
            text = await response.text()
        assert 'vllm:nixl_num_kv_expired_reqs_total{model_name="demo"} 1.0' in text
        assert 'oneloop_kv_transfer_not_kept_total{reason="room"} 1.0' in text
        async with server.http.get(f"{decode.url}/metrics") as response:
            text = await response.text()
        assert 'oneloop_kv_transfer_failures_total{reason="expired"} 1.0' in text
        assert "oneloop_kv_transfer_recomputed_tokens_total 96.0" in text


async def test_pages_that_went_while_they_were_read_are_not_believed(pair: tuple[Live, Live]) -> None:
    prefill, decode = pair
    params = await prefilled(prefill, prompt_of(95))
    connector = exchange_of(decode)._connector
    read = connector.read

    def slow(*given: Any) -> Any:
        future = read(*given)
        future.result()
        exchange_of(prefill)._let_go(params["remote_request_id"], "expired")
        return future

    connector.read = slow  # type: ignore[method-assign]
    before = failures(decode).get("expired", 0)
    answer = await decode.complete(prompt_of(95), max_tokens=2, kv_transfer_params=params)
    connector.read = read  # type: ignore[method-assign]
    assert failures(decode)["expired"] == before + 1
    assert answer["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0) == 0


async def test_a_client_that_goes_while_pages_come(pair: tuple[Live, Live]) -> None:
    """The sequence is gone at once; its pages when nobody writes to them any more."""
    prefill, decode = pair
    params = await prefilled(prefill, prompt_of(96))
    gate: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    connector = exchange_of(decode)._connector
    read = connector.read
    connector.read = lambda *given: gate  # type: ignore[method-assign, assignment, return-value]
    wrap = asyncio.wrap_future
    exchange.asyncio.wrap_future = lambda future: future  # type: ignore[attr-defined]
    try:
        body = {"prompt": prompt_of(96), "max_tokens": 3, "kv_transfer_params": params}
        with pytest.raises(TimeoutError):
            await decode.post("/v1/completions", body, timeout=aiohttp.ClientTimeout(0.3))
        await until(lambda: decode.num_requests() == 0)
        assert decode.engine.stats().num_used_pages == 6 and decode.engine.lending.lent
        assert not decode.engine.flush_cache() or decode.engine.stats().num_used_pages == 6
        gate.set_result(1)
        await until(lambda: not decode.busy() and not decode.engine.lending.lent)
    finally:
        connector.read = read  # type: ignore[method-assign]
        exchange.asyncio.wrap_future = wrap  # type: ignore[attr-defined]


async def test_sleep_lets_go_and_wakes_up_able(pair: tuple[Live, Live]) -> None:
    prefill, decode = pair
    params = await prefilled(prefill, prompt_of(97))
    assert (await prefill.http.post(f"{prefill.url}/sleep?level=1")).status == 200
    assert not exchange_of(prefill)._kept and not prefill.engine.lending.lent
    assert (await prefill.http.post(f"{prefill.url}/wake_up")).status == 200
    before = failures(decode).get("expired", 0)
    await decode.complete(prompt_of(97), max_tokens=1, kv_transfer_params=params)
    assert failures(decode)["expired"] == before + 1
    again = await prefilled(prefill, prompt_of(98))
    hits = exchange_of(decode).tally.hit_tokens
    await decode.complete(prompt_of(98), max_tokens=1, kv_transfer_params=again)
    assert exchange_of(decode).tally.hit_tokens == hits + 96


async def test_sleep_does_not_wait_for_pages_that_never_come(
    pair: tuple[Live, Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = pair
    params = await prefilled(prefill, prompt_of(93))
    connector, gate = exchange_of(decode)._connector, Future[int]()
    release = connector.release

    def end(description: Any) -> None:
        release(description)
        if description is None:
            gate.set_exception(TransferError("resting", "the memory goes away"))

    with monkeypatch.context() as patched:
        patched.setattr(connector, "read", lambda *given: gate)
        patched.setattr(connector, "release", end)
        body = {"prompt": prompt_of(93), "max_tokens": 3, "kv_transfer_params": params}
        asking = asyncio.create_task(decode.post("/v1/completions", body))
        await until(lambda: bool(decode.engine.lending.lent))
        assert (await decode.http.post(f"{decode.url}/sleep?level=1")).status == 200
        assert not decode.engine.lending.lent and gate.done()
        await asking
    exchange_of(prefill)._let_go(params["remote_request_id"], "read")
    assert (await decode.http.post(f"{decode.url}/wake_up")).status == 200
    again, hits = await prefilled(prefill, prompt_of(94)), exchange_of(decode).tally.hit_tokens
    await decode.complete(prompt_of(94), max_tokens=1, kv_transfer_params=again)
    assert exchange_of(decode).tally.hit_tokens == hits + 96


async def test_nobody_waits_for_room_that_never_comes() -> None:
    """A prompt of more than half of all pages; others, behind it, would wait as well."""
    prompt, patient = prompt_of(98, 400), TransferOptions("TcpConnector", receive_timeout_s=3600.0)
    async with apart() as prefill, live(num_pages=40, transfer=patient, weights=weights) as decode:
        params = await prefilled(prefill, prompt)
        body = {"prompt": prompt, "max_tokens": 2, "temperature": 0}
        status, answer = await decode.post("/v1/completions", {**body, "kv_transfer_params": params})
        assert status == 200 and failures(decode) == {"room": 1}
        assert answer["choices"][0]["text"] == (await prefill.complete(**body))["choices"][0]["text"]
        assert exchange_of(decode).tally.recomputed_tokens == 384
        # With its beginning there, the rest may come.
        status, _ = await decode.post("/v1/completions", {**body, "kv_transfer_params": params})
        assert status == 200 and failures(decode) == {"room": 1}


async def test_the_server_says_how_its_exchange_stands(pair: tuple[Live, Live]) -> None:
    prefill, decode = pair
    params = await prefilled(prefill, prompt_of(99))
    async with prefill.http.get(f"{prefill.url}/server_info") as response:
        told = (await response.json())["kv_transfer"]
    assert told["kv_connector"] == "TcpConnector" and told["kv_role"] == "kv_both"
    assert (told["engine_id"], told["side_channel_port"]) == (params["remote_engine_id"], params["remote_port"])
    assert (told["kept_requests"], told["kept_pages"], told["is_paused"]) == (1, 6, False)
    await decode.complete(prompt_of(99), max_tokens=1, kv_transfer_params=params)
    async with prefill.http.get(f"{decode.url}/server_info") as response:
        told = (await response.json())["kv_transfer"]
    assert told["hit_tokens"] == exchange_of(decode).tally.hit_tokens > 0 and told["failures"] == failures(decode)


MALFORMED = [
    ("text", ""),
    ([], ""),
    ({"do_remote_decode": 1}, ".do_remote_decode"),
    ({"do_remote_prefill": "yes"}, ".do_remote_prefill"),
    ({"do_remote_prefill": True, "do_remote_decode": True}, ""),
    ({"remote_port": 0}, ".remote_port"),
    ({"remote_port": 70000}, ".remote_port"),
    ({"remote_port": "port"}, ".remote_port"),
    ({"remote_host": 7}, ".remote_host"),
    ({"remote_host": "x" * 300}, ".remote_host"),
    ({"remote_engine_id": ""}, ".remote_engine_id"),
    ({"remote_request_id": ["r"]}, ".remote_request_id"),
    ({"remote_block_ids": "all"}, ".remote_block_ids"),
    ({"remote_block_ids": [1, "two"]}, ".remote_block_ids"),
    ({"remote_block_ids": [[1], 2]}, ".remote_block_ids"),
    ({"remote_block_ids": [-1]}, ".remote_block_ids"),
    ({"tp_size": 0}, ".tp_size"),
    ({str(key): 1 for key in range(100)}, ""),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
async def test_malformed_words_are_refused_in_the_routes_own_shape(pair: tuple[Live, Live], path: str) -> None:
    prompt = {
        "/v1/completions": {"prompt": "x"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/generate": {"text": "x"},
    }[path]
    for params, where in MALFORMED:
        if path == "/generate" and isinstance(params, list):
            continue  # there a list has one for each prompt
        status, answer = await pair[1].post(path, {**prompt, "kv_transfer_params": params})
        assert status == 400, (params, answer)
        assert answer["error"]["param"] == f"kv_transfer_params{where}", (params, answer)


async def test_without_the_flag_and_against_the_role() -> None:
    async with live() as server, apart(role="kv_consumer") as consumer, apart(role="kv_producer") as producer:
        for one, word, role in (
            (server, "do_remote_decode", "kv_producer"),
            (server, "do_remote_prefill", "kv_consumer"),
            (consumer, "do_remote_decode", "kv_producer"),
            (producer, "do_remote_prefill", "kv_consumer"),
        ):
            status, answer = await one.post("/v1/completions", {"prompt": "x", "kv_transfer_params": {word: True}})
            assert status == 400 and answer["error"]["param"] == f"kv_transfer_params.{word}"
            assert role in answer["error"]["message"]
        for nothing in ({}, {"do_remote_decode": False}, None):
            await server.complete("x", max_tokens=1, kv_transfer_params=nothing)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        # A summary is of another prompt than that of which pages are kept.
        ("/v1/responses/compact", {"input": "x"}),
        ("/completion", {"prompt": "x"}),
        ("/api/generate", {"prompt": "x", "model": "demo"}),
        ("/api/chat", {"messages": [{"role": "user", "content": "x"}], "model": "demo"}),
    ],
)
async def test_other_families_do_not_know_it(pair: tuple[Live, Live], path: str, body: dict[str, Any]) -> None:
    status, answer = await pair[0].post(path, {**body, "kv_transfer_params": PREFILL})
    assert status == 400 and "kv_transfer_params" in str(answer), answer


async def test_connectors_are_known_by_name() -> None:
    connector = make_connector(TransferOptions("TcpConnector"))
    connector.close()
    connector.close()
