"""Admin routes and their key; who shares a cache with whom; and the fields that say when a request is served."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from engine.config import StartupError
from server.app import ADMIN_ENDPOINTS
from server.endpoints import health
from tests.server.bad_fields import check_anthropic, check_ollama
from tests.server.support import ALL_ABILITIES, Live, live, parse_events, served_model, until
from tests.server.test_errors import check_shape

PROMPT = [7] * 100
HI = [{"role": "user", "content": "hi"}]
LONG = [{"role": "user", "content": "word " * 50}]


def with_options(server: Live, **changes: Any) -> None:
    """Other scheduler options from now on; what the scheduler was made with stays."""
    config = server.engine.config
    scheduler = dataclasses.replace(config.scheduler, **changes)
    server.engine.config = dataclasses.replace(config, scheduler=scheduler)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def get(server: Live, path: str, **options: Any) -> tuple[int, Any]:
    async with server.http.get(server.url + path, **options) as response:
        return response.status, await response.json() if response.content_length else None


async def cached(server: Live, **options: Any) -> int:
    headers = options.pop("headers", {})
    body = {"prompt": PROMPT, "max_tokens": 1, **options}
    status, answer = await server.post("/v1/completions", body, headers=headers)
    assert status == 200, answer
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]  # type: ignore[no-any-return]


# ---- keys


async def test_the_admin_key_is_for_admin_routes_and_for_nothing_else() -> None:
    async with live(api_keys=("user",), admin_api_key="root") as server:
        found = [(method, path) for endpoint in ADMIN_ENDPOINTS for method, path, _ in endpoint.ROUTES]
        routes = [(method, re.sub(r"{[^}]*}", "x", path)) for method, path in found]
        assert ("POST", "/update_weights_from_disk") in routes and ("POST", "/flush_cache") in routes
        for method, path in routes:
            for headers in ({}, bearer("user"), bearer("roo"), bearer("root2")):
                async with server.http.request(method, server.url + path, headers=headers) as response:
                    error = check_shape(response.status, await response.json(), expected=401)
                    assert "admin key" in error["message"]
        for headers in (bearer("root"), {"X-Api-Key": "root"}):
            assert (await get(server, "/is_sleeping", headers=headers))[0] == 200
        assert (await get(server, "/version", headers=bearer("user")))[0] == 200
        check_shape(*await get(server, "/version", headers=bearer("root")), expected=401)


async def test_without_an_admin_key_the_api_key_serves_and_an_admin_key_alone_opens_the_rest() -> None:
    async with live(api_keys=("user",)) as server:
        check_shape(*await get(server, "/is_paused"), expected=401)
        assert (await get(server, "/is_paused", headers=bearer("user")))[0] == 200
    async with live(admin_api_key="root") as server:
        assert (await get(server, "/version"))[0] == 200
        check_shape(*await get(server, "/is_paused"), expected=401)
        assert (await get(server, "/is_paused", headers=bearer("root")))[0] == 200


# ---- whose prefix cache


@pytest.mark.parametrize("isolate", [None, True])
async def test_keys_do_not_share_a_cache(isolate: bool | None) -> None:
    async with live(api_keys=("a", "b"), isolate_api_keys=isolate) as server:
        assert await cached(server, headers=bearer("a")) == 0
        assert await cached(server, headers=bearer("a")) == 96
        assert await cached(server, headers=bearer("b")) == 0
        # No salt spells another key's part of the cache.
        for salt in ("a", "0", "0:", ":", "1:0:"):
            assert await cached(server, headers=bearer("b"), cache_salt=salt) == 0
        assert await cached(server, headers=bearer("b"), cache_salt="0:") == 96


async def test_the_time_to_the_first_token_does_not_betray_what_another_key_has_cached() -> None:
    """It is a function of the steps to it and of how much the device computes in each."""
    async with live(api_keys=("a", "b")) as server:

        async def work(key: str, start: int) -> tuple[list[int], float]:
            tokens = server.engine.metrics.step_tokens
            counts, total = tokens.counts[0].copy(), tokens.sums[0]
            body = {"prompt": [start, *PROMPT], "max_tokens": 1}
            assert (await server.post("/v1/completions", body, headers=bearer(key)))[0] == 200
            return (tokens.counts[0] - counts).tolist(), tokens.sums[0] - total

        unseen, cold = await work("b", 2), await work("a", 3)
        warm = await work("a", 3)
        assert warm[1] < cold[1] == 101
        assert await work("b", 3) == unseen == cold
        assert await work("b", 3) == warm


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": LONG, "max_tokens": 1}),
        ("/v1/responses", {"input": LONG, "max_output_tokens": 1}),
        ("/v1/messages", {"messages": LONG, "max_tokens": 1}),
        ("/api/chat", {"messages": LONG, "stream": False, "options": {"num_predict": 1}}),
        ("/generate", {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}),
        ("/v1/embeddings", {"input": PROMPT}),
        ("/score", {"text_1": "word " * 50, "text_2": "word " * 50}),
        ("/v1/score", {"query": PROMPT, "items": [[8]], "label_token_ids": [5]}),
    ],
)
async def test_keys_share_a_cache_in_no_family(path: str, body: dict[str, Any]) -> None:
    # A mean needs every token's hidden state, so it would find nothing.
    abilities = dataclasses.replace(ALL_ABILITIES, embedding="last")
    async with live(api_keys=("a", "b"), model=served_model(abilities=abilities)) as server:
        for key, hit in (("a", False), ("b", False), ("a", True), ("b", True)):
            before = server.engine.scheduler.counters.prefix_cache_hits
            # Both ways to send a key are one key.
            headers = {"X-Api-Key": key} if hit else bearer(key)
            status, answer = await server.post(path, body, headers=headers)
            assert status == 200, answer
            assert (server.engine.scheduler.counters.prefix_cache_hits > before) == hit, key


async def test_keys_share_a_cache_where_that_is_wished() -> None:
    async with live(api_keys=("a", "b"), isolate_api_keys=False) as server:
        assert await cached(server, headers=bearer("a")) == 0
        assert await cached(server, headers=bearer("b")) == 96
        assert await cached(server, headers=bearer("b"), cache_salt="s") == 0


# ---- when


async def test_priority_needs_its_policy_and_user_is_the_fairness_key(server: Live) -> None:
    error = check_shape(*await server.post("/v1/completions", {"prompt": "x", "priority": 1}), expected=400)
    assert error["param"] == "priority" and "--schedule-policy priority" in error["message"]
    with_options(server, policy="priority")
    submitted = []
    submit = server.engine.submit
    server.engine.submit = lambda request: submitted.append(request) or submit(request)  # type: ignore
    await server.complete(max_tokens=1, priority=-7, user="tom", n=2, timeout=9)
    assert {(one.priority, one.fairness_key, one.timeout_s) for one in submitted} == {(-7, ":tom", 9.0)}
    submitted.clear()
    await server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, headers={"X-Request-Timeout": "2.5"})
    assert [(one.fairness_key, one.timeout_s) for one in submitted] == [(":", 2.5)]
    for field, value in [
        ("priority", 0.5),
        ("priority", 2**31),
        ("priority", "high"),
        ("timeout", 0),
        ("timeout", -1),
        ("timeout", "5"),
        ("timeout", 1e7),
        ("user", 5),
    ]:
        assert check_shape(*await server.post("/v1/completions", {"prompt": "x", field: value}))["param"] == field
    for value in ("0", "x", "nan", "inf", "-1"):
        reply = await server.post("/v1/completions", {"prompt": "x"}, headers={"X-Request-Timeout": value})
        assert "X-Request-Timeout" in check_shape(*reply, expected=400)["message"]


async def test_users_of_two_keys_are_two_users() -> None:
    async with live(api_keys=("a", "b")) as server:
        submitted = []
        submit = server.engine.submit
        server.engine.submit = lambda request: submitted.append(request) or submit(request)  # type: ignore
        for key in ("a", "b"):
            for user in ({"user": "tom"}, {}):
                await server.post("/v1/completions", {"prompt": "x", "max_tokens": 1, **user}, headers=bearer(key))
        assert len({one.fairness_key for one in submitted}) == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_lets_go_after_its_time(stream: bool) -> None:
    async with live(max_num_seqs=1) as server:
        with_options(server, queue_timeout_s=0.02)
        server.device.gate.clear()
        running = asyncio.create_task(server.complete("x", max_tokens=2))
        await until(lambda: server.engine.stats().num_running == 1)
        body = {"prompt": "y", "max_tokens": 2, "stream": stream}
        async with server.http.post(server.url + "/v1/completions", json=body) as response:
            assert response.headers["Retry-After"] == "1"
            error = check_shape(response.status, await response.json(), expected=503)
            assert error["code"] == "service_unavailable"
        server.device.gate.set()
        assert (await running)["usage"]["completion_tokens"] == 2


async def test_a_request_timeout_is_a_504_before_the_first_token_and_an_event_after_it(server: Live) -> None:
    server.device.gate.clear()
    for stream in (False, True):
        body = {"prompt": "y", "max_tokens": 2, "stream": stream, "timeout": 0.02}
        assert check_shape(*await server.post("/v1/completions", body), expected=504)["code"] == "timeout"
    headers = {"X-Request-Timeout": "0.02"}
    check_anthropic(*await server.post("/v1/messages", {"messages": HI, "max_tokens": 2}, headers=headers), 504)
    check_ollama(*await server.post("/api/chat", {"messages": HI, "stream": False}, headers=headers), 504)
    check_shape(*await server.post("/v1/embeddings", {"input": "x"}, headers=headers), 504)
    server.device.gate.set()
    body = {"prompt": "y", "max_tokens": 300, "stream": True, "timeout": 0.3, "ignore_eos": True}
    async with server.http.post(server.url + "/v1/completions", json=body) as response:
        assert response.status == 200
        first = await response.content.readuntil(b"\n\n")
        server.device.gate.clear()
        events = parse_events(first + await response.read())
    assert events[-1] == "[DONE]" and events[-2]["error"]["code"] == "timeout"
    server.device.gate.set()
    await server.all_free()


# ---- abort


async def test_requests_are_aborted_by_every_name_their_client_knows(server: Live) -> None:
    server.device.gate.clear()

    async def start(**headers: str) -> asyncio.Task[Any]:
        before = server.num_requests()
        task = asyncio.create_task(server.post("/v1/completions", {"prompt": "x", "max_tokens": 300}, headers=headers))
        await until(lambda: server.num_requests() == before + 1)
        return task

    other = await start()
    named = await start(**{"X-Request-Id": "mine"})
    status, answer = await server.post("/abort_request", {"rid": "mine"})
    assert (status, answer["num_aborted"]) == (200, 1)
    check_shape(*await named, expected=503)
    for make_body in (
        lambda own_id: {"rid": own_id},
        lambda own_id: {"request_ids": [own_id, "unknown"]},
        lambda own_id: {"rid": [own_id.removeprefix("cmpl-")]},
    ):
        (own_id,) = server.state.submitted
        assert (await server.post("/abort_requests", make_body(own_id)))[1]["num_aborted"] == 1
        check_shape(*await other, expected=503)
        other = await start()
    assert (await server.post("/abort_request", {"rid": "unknown"}))[1]["num_aborted"] == 0
    assert (await server.post("/abort_request", {"abort_all": True}))[1]["num_aborted"] == 1
    check_shape(*await other, expected=503)
    for bad in ({}, {"rid": 5}, {"rid": []}, {"rid": [""]}, {"rid": {"a": 1}}, {"abort_all": "yes"}):
        check_shape(*await server.post("/abort_request", bad), expected=400)
    server.device.gate.set()
    await server.all_free()


FAMILIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 300},
    "/v1/chat/completions": {"messages": HI, "max_tokens": 300},
    "/v1/responses": {"input": "x", "max_output_tokens": 300},
    "/v1/messages": {"messages": HI, "max_tokens": 300},
    "/api/chat": {"messages": HI, "stream": False},
    "/api/generate": {"prompt": "x", "stream": False},
    "/generate": {"text": "x"},
    "/v1/embeddings": {"input": ["x", "y"]},
    "/score": {"text_1": "x", "text_2": "y"},
    "/rerank": {"query": "x", "documents": ["y"]},
}


@pytest.mark.parametrize("path", FAMILIES)
async def test_requests_of_every_family_are_aborted(server: Live, path: str) -> None:
    server.device.gate.clear()
    task = asyncio.create_task(server.post(path, FAMILIES[path], headers={"X-Request-Id": "mine"}))
    await until(lambda: len(server.state.submitted) > path.count("embeddings"))
    count = len(server.state.submitted)
    assert (await server.post("/abort_request", {"rid": "mine"}))[1]["num_aborted"] == count
    status, answer = await task
    if path == "/generate":  # as SGLang answers it: a rollout is sent again
        assert status == 200 and answer["meta_info"]["finish_reason"]["type"] == "abort"
    else:
        assert status == 503 and "aborted" in str(answer)
    server.device.gate.set()
    await server.all_free()


async def test_prompts_of_generate_are_aborted_by_their_rids(server: Live) -> None:
    for rid, wanted, count in (
        ("own", "own", 2),
        ("own", "own_1", 1),
        (["one", "other"], "other", 1),
        (["one", "other"], ["one", "other"], 2),
    ):
        server.device.gate.clear()
        task = asyncio.create_task(server.post("/generate", {"text": ["x", "y"], "rid": rid}))
        await until(lambda: len(server.state.submitted) == 2)
        assert (await server.post("/abort_request", {"rid": wanted}))[1]["num_aborted"] == count
        server.device.gate.set()
        status, answers = await task
        ends = [one["meta_info"]["finish_reason"]["type"] for one in answers]
        assert status == 200 and ends.count("abort") == count
        await server.all_free()


# ---- what it does and how it is


async def test_loads_have_sglangs_shape(server: Live) -> None:
    await cached(server)
    server.device.gate.clear()
    running = asyncio.create_task(server.complete(PROMPT, max_tokens=2))
    await until(lambda: server.engine.stats().num_running == 1)
    status, body = await get(server, "/v1/loads?include=core")
    assert status == 200 and body["dp_rank_count"] == 1 and isinstance(body["timestamp"], str)
    (load,) = body["loads"]
    assert list(load) == [
        "dp_rank",
        "num_running_reqs",
        "num_waiting_reqs",
        "num_waiting_uncached_tokens",
        "num_total_reqs",
        "num_used_tokens",
        "max_total_num_tokens",
        "token_usage",
        "gen_throughput",
        "cache_hit_rate",
        "utilization",
        "max_running_requests",
    ]
    assert (load["num_running_reqs"], load["num_total_reqs"], load["max_running_requests"]) == (1, 1, 64)
    assert load["num_used_tokens"] == 112 and load["max_total_num_tokens"] == 4096 * 16
    assert await get(server, "/get_load") == (
        200,
        [{"dp_rank": 0, "num_reqs": 1, "num_waiting_reqs": 0, "num_tokens": 112}],
    )
    server.device.gate.set()
    await running
    # Of 100 tokens that wait, 96 are in the cache.
    await server.engine.pause()
    waiting = asyncio.create_task(server.complete(PROMPT, max_tokens=2))
    await until(lambda: server.num_requests() == 1)
    assert (await get(server, "/v1/loads"))[1]["loads"][0]["num_waiting_uncached_tokens"] == 4
    await server.engine.resume()
    await waiting


async def test_model_info(server: Live) -> None:
    for path in ("/model_info", "/get_model_info"):
        status, body = await get(server, path)
        assert status == 200 and body["is_generation"] is True and body["weight_version"] == "default"
        assert body["model_path"] == "demo"


async def test_the_probe_generates_a_token_or_says_why_not(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    before = server.engine.metrics.generation_tokens
    assert (await get(server, "/health_generate"))[0] == 200
    assert server.engine.metrics.generation_tokens == before + 1
    monkeypatch.setattr(health, "PROBE_SECONDS", 0.02)
    server.device.gate.clear()
    check_shape(*await get(server, "/health_generate"), expected=503)
    server.device.gate.set()
    await server.all_free()
    await server.engine.pause()
    check_shape(*await get(server, "/health_generate"), expected=503)
    await server.engine.resume()
    assert (await get(server, "/health_generate"))[0] == 200


async def test_the_probe_that_finds_no_room_looks_at_others() -> None:
    async with live(max_num_seqs=1, max_queued_requests=1) as server:
        for limit in (0.01, None):
            with_options(server, queue_timeout_s=None)
            server.device.gate.clear()
            body = {"prompt": "x", "max_tokens": 2, "temperature": 0}
            busy = [asyncio.create_task(server.post("/v1/completions", body))]
            await until(lambda: server.engine.stats().num_running == 1)
            # Of the probe alone: on a busy machine the other might not be admitted in time.
            with_options(server, queue_timeout_s=limit)
            if limit is None:
                busy.append(asyncio.create_task(server.post("/v1/completions", body)))
                await until(lambda: server.engine.stats().num_waiting == 1)
            rejected = server.engine.metrics.rejected.copy()
            probe = asyncio.create_task(get(server, "/health_generate"))
            await until(lambda before=rejected: server.engine.metrics.rejected != before)  # type: ignore[misc]
            server.device.gate.set()
            assert (await probe)[0] == 200
            await asyncio.gather(*busy)


async def test_the_probe_of_a_model_without_text_asks_for_a_vector() -> None:
    embeds = dataclasses.replace(ALL_ABILITIES, generates=False)
    async with live(model=served_model(abilities=embeds)) as server:
        assert (await get(server, "/health_generate"))[0] == 200
        metrics = server.engine.metrics
        assert (metrics.prompt_tokens, metrics.generation_tokens) == (1, 0)
        assert (await get(server, "/model_info"))[1]["is_generation"] is False
        assert (await server.post("/api/show", {}))[1]["capabilities"] == ["embedding"]


# ---- rest


async def test_sleeping_and_waking_up(server: Live) -> None:
    await cached(server)
    for level in ("1", "2"):
        async with server.http.post(f"{server.url}/sleep?level={level}") as response:
            assert response.status == 200
        assert (await get(server, "/is_sleeping"))[1] == {"is_sleeping": True}
        assert (await get(server, "/health"))[0] == 200
        reply = await server.post("/v1/completions", {"prompt": "x"})
        assert "asleep" in check_shape(*reply, expected=503)["message"]
        async with server.http.post(server.url + "/wake_up") as response:
            assert response.status == 200
        assert (await get(server, "/is_sleeping"))[1] == {"is_sleeping": False}
        assert await cached(server) == 0
    for path in ("/sleep?level=3", "/sleep?level=x", "/sleep?mode=later", "/wake_up?tags=weight", "/pause?mode=x"):
        async with server.http.post(server.url + path) as response:
            check_shape(response.status, await response.json(), expected=400)


async def test_waking_up_by_parts(server: Live) -> None:
    for sleep, wake in (("/sleep?level=2", "/wake_up?tags={}"), (None, None)):
        if sleep is None:
            await server.post("/release_memory_occupation", {"tags": ["weights", "kv_cache", "cuda_graph"]})
        else:
            assert (await server.http.post(server.url + sleep)).status == 200
        for tag, asleep in (("weights", True), ("kv_cache", False)):
            if wake is None:
                body = {"tags": [tag, "cuda_graph"]}
                assert (await server.post("/resume_memory_occupation", body))[0] == 200
            else:
                assert (await server.http.post(server.url + wake.format(tag))).status == 200
            assert (await get(server, "/is_sleeping"))[1] == {"is_sleeping": asleep}
            status = (await server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}))[0]
            assert status == (503 if asleep else 200)
    # No body at all is both.
    for path, asleep in (("/release_memory_occupation", True), ("/resume_memory_occupation", False)):
        assert (await server.http.post(server.url + path)).status == 200
        assert (await get(server, "/is_sleeping"))[1] == {"is_sleeping": asleep}
    for tags in ("weights", ["weight"], [1], {}):
        for path in ("/release_memory_occupation", "/resume_memory_occupation"):
            assert check_shape(*await server.post(path, {"tags": tags}), expected=400)["param"] == "tags"


async def test_weights_from_a_directory_as_prime_rl_names_it(server: Live, tmp_path: Path) -> None:
    """Between /pause?mode=keep and /resume: who is held goes on with them, and is told which token came from which."""
    body = {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "return_token_ids": True}
    running = asyncio.create_task(server.post("/v1/completions", body))
    await until(lambda: server.engine.scheduler.num_running == 1)
    async with server.http.post(server.url + "/pause?mode=keep&clear_cache=false") as response:
        assert response.status == 200
    assert (await server.post("/update_weights", {"weight_dir": str(tmp_path)}))[0] == 200
    assert server.device.weights == tmp_path and server.num_requests() == 1
    for bad, status in (
        ({"weight_dir": 5}, 400),
        ({"weight_dir": "a\0b"}, 400),
        ({"weight_dir": str(tmp_path / "missing")}, 400),
        ({"weight_dir": str(tmp_path), "update_info": {"names": []}}, 400),
        ({"weight_dir": None}, 409),
    ):
        error = check_shape(*await server.post("/update_weights", bad), expected=status)
        assert status == 409 or error["param"] == "weight_dir"
    async with server.http.post(server.url + "/resume") as response:
        assert response.status == 200
    status, answer = await running
    assert status == 200 and answer["usage"]["completion_tokens"] == 200


async def test_a_pause_that_clears_the_cache(server: Live) -> None:
    prompt = list(range(40, 140))
    await server.complete(prompt, max_tokens=1)
    for clear, cached in (("false", 96), ("true", 0)):
        async with server.http.post(f"{server.url}/pause?mode=keep&clear_cache={clear}") as response:
            assert response.status == 200
        async with server.http.post(server.url + "/resume") as response:
            assert response.status == 200
        answer = await server.complete(prompt, max_tokens=1)
        assert answer["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0) == cached
    for path in ("/sleep?level=1", "/pause?clear_cache=true", "/wake_up", "/resume"):
        async with server.http.post(server.url + path) as response:
            assert response.status == 200, path
    async with server.http.post(server.url + "/pause?clear_cache=7") as response:
        assert check_shape(response.status, await response.json(), expected=400)["param"] == "clear_cache"


async def test_pausing_and_resuming(server: Live) -> None:
    async with server.http.post(server.url + "/pause?mode=wait") as response:
        assert (response.status, await response.json()) == (200, {"status": "paused"})
    assert (await get(server, "/is_paused"))[1] == {"is_paused": True}
    waiting = asyncio.create_task(server.complete("x", max_tokens=1))
    await until(lambda: server.num_requests() == 1)
    async with server.http.post(server.url + "/resume") as response:
        assert response.status == 200
    assert (await waiting)["usage"]["completion_tokens"] == 1


async def test_new_weights_from_disk(server: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model_path": str(tmp_path), "weight_version": "2"}
    status, answer = await server.post("/update_weights_from_disk", body)
    assert status == 200 and answer["success"] is True and server.device.weights == tmp_path
    assert (await get(server, "/model_info"))[1]["weight_version"] == "2"
    missing = str(tmp_path / "missing")
    error = check_shape(*await server.post("/update_weights_from_disk", {"model_path": missing}), expected=400)
    assert missing not in error["message"] and error["param"] == "model_path"

    # Names of the server's files are told by their last part alone.
    def fail(directory: Path) -> None:
        raise StartupError(f"{tmp_path}/broken/config.json: is no JSON")

    for path in (f"{tmp_path}/broken", f"{tmp_path}//./broken/", "/", "e"):
        with monkeypatch.context() as patched:
            patched.setattr(server.device, "load_weights", fail)
            error = check_shape(*await server.post("/update_weights_from_disk", {"model_path": path}), expected=400)
        assert error["message"] == "The weights were not taken: config.json: is no JSON"
    for bad in ({}, {"model_path": 5}, {"model_path": "a\0b"}, {"model_path": "x", "load_format": "gguf"}):
        check_shape(*await server.post("/update_weights_from_disk", bad), expected=400)
    bad = {"model_path": str(tmp_path), "flush_cache": False}
    assert check_shape(*await server.post("/update_weights_from_disk", bad), expected=400)["param"] == "flush_cache"
    assert server.device.weights == tmp_path


async def test_an_abort_makes_a_drain_shorter(server: Live) -> None:
    server.device.gate.clear()
    running = asyncio.create_task(server.post("/v1/completions", {"prompt": "x", "max_tokens": 5}))
    await until(lambda: server.num_requests() == 1)
    server.engine.drain()
    check_shape(*await server.post("/v1/completions", {"prompt": "y"}), expected=503)
    assert (await server.post("/abort_request", {"abort_all": True}))[0] == 200
    server.device.gate.set()
    check_shape(*await running, expected=503)
    await server.engine.drained()
