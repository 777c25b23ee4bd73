"""/live/events, /requests/{id}/cache, /trace: what they tell of a live server, and to whom."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from engine.executor.cpu import CPUExecutor
from engine.inspection import PAGE_STATES
from engine.models.offload import Weighed
from server import live_feed, trace_file
from server.trace_file import TraceFile
from tests.models.support import load
from tests.server.support import BOUND_S, DEMO, Live, live, until

Json = dict[str, Any]


async def snapshots(server: Live, count: int, **options: Any) -> list[Json]:
    """The first events of the page's stream."""
    found: list[Json] = []
    async with server.http.get(f"{server.url}/live/events", **options) as response:
        assert response.status == 200 and response.content_type == "text/event-stream"
        async for line in response.content:
            if line.startswith(b"data: "):
                found.append(json.loads(line[6:]))
                if len(found) == count:
                    break
    return found


@contextlib.asynccontextmanager
async def busy(server: Live, count: int = 3) -> AsyncIterator[list[str]]:
    """Some streams that run, and their ids."""
    async with contextlib.AsyncExitStack() as stack:
        ids = []
        for number in range(count):
            body = {"prompt": "the same words " * 20 + f"and {number}", "max_tokens": 400, "stream": True}
            response = await stack.enter_async_context(server.http.post(f"{server.url}/v1/completions", json=body))
            line = await response.content.readuntil(b"\n\n")
            ids.append(json.loads(line.removeprefix(b"data: "))["id"])
        yield ids


async def test_a_snapshot_tells_who_runs_and_whose_the_pages_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_feed, "PICTURE_INTERVAL_S", 0.0)
    monkeypatch.setattr(live_feed, "INTERVAL_S", 0.02)
    async with live(step_seconds=0.002, live_text=True) as server:
        assert server.engine.recorder.stages is None and server.engine.scheduler.recorder is None
        async with busy(server) as ids:
            first, *others = await snapshots(server, 6)
        assert {row["id"] for row in first["running"]} == set(ids) and first["num_running"] == 3
        assert all(row["state"] == "decode" and row["pages"] >= row["shared"] > 0 for row in first["running"])
        pool = first["pool"]
        assert sum(pool["counts"].values()) == server.engine.limits.num_pages
        assert pool["counts"]["shared"] >= 4 and pool["counts"]["running"] > 0 and pool["counts"]["free"] > 0
        assert len(pool["cells"]) * pool["pages_per_cell"] >= server.engine.limits.num_pages
        assert set(pool["cells"]) <= set("01234") and list(pool["counts"]) == list(PAGE_STATES)
        nodes = first["tree"]["nodes"]
        assert nodes[0]["parent"] == -1 and "the same words" in nodes[0]["text"] and nodes[0]["locks"] == 3
        assert all(node["parent"] < place for place, node in enumerate(nodes))
        steps = [step for one in others for step in one["steps"]]
        numbers = [step[0] for step in steps]
        assert len(steps) > 5 and numbers == sorted(set(numbers))
        for step in steps:
            began, scheduled, launched, waited, arrived, committed, published = step[1:8]
            assert began <= scheduled <= launched <= waited <= arrived <= committed <= published
        assert others[-1]["itl"] is not None and others[-1]["lag"] is not None
        # Nobody looks any more.
        await until(lambda: server.engine.scheduler.recorder is None)
        assert server.engine.recorder.stages is None and not server.engine.recorder.timelines


async def test_memory_by_owner() -> None:
    model = load(DEMO)
    async with live(num_pages=64, make_device=lambda limits: CPUExecutor(model, limits, dtype=torch.float32)) as server:
        await server.complete("the same words " * 20, max_tokens=2)
        [first] = await snapshots(server, 1)
        page_bytes = server.engine.executor.page_bytes  # type: ignore[attr-defined]
    names, memory = [name for name, _ in first["memory"]], dict(first["memory"])
    assert names[0] == "weights" and memory["weights"] == Weighed()(model) > 2**20
    assert sum(memory[f"KV pages: {state}"] for state in PAGE_STATES) == 64 * page_bytes
    assert memory["KV pages: evictable"] == first["pool"]["counts"]["evictable"] * page_bytes > 0
    assert memory["process (resident)"] > memory["weights"]


async def test_a_queue_says_what_it_waits_for() -> None:
    async with live(max_num_seqs=1) as server:
        async with busy(server, 1):
            waiting = asyncio.create_task(server.complete("another", max_tokens=1))
            await until(lambda: server.engine.stats().num_waiting == 1)
            [first] = await snapshots(server, 1)
            assert [row["state"] for row in first["waiting"]] == ["slots"] and first["num_waiting"] == 1
        await waiting


async def test_all_of_it_needs_the_admin_key() -> None:
    async with live(api_keys=("user",), admin_api_key="root") as server:
        for path in ("/live/events", "/requests/x/cache", "/trace?seconds=0.01"):
            for key, expected in ((None, 401), ("user", 401), ("root", 404 if "requests" in path else 200)):
                headers = {} if key is None else {"Authorization": f"Bearer {key}"}
                async with server.http.get(server.url + path, headers=headers) as response:
                    assert response.status == expected, (path, key)


async def test_more_viewers_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_feed, "MAX_VIEWERS", 1)
    async with live() as server, server.http.get(f"{server.url}/live/events") as first:
        assert first.status == 200
        async with server.http.get(f"{server.url}/live/events") as second:
            assert second.status == 429


async def test_a_feed_that_fails_ends_its_streams_and_begins_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, left = live_feed.LiveFeed._numbers, 1

    def fail(self: live_feed.LiveFeed) -> Json:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("planted")
        return whole(self)

    async with live() as server:
        with monkeypatch.context() as context:
            context.setattr(live_feed.LiveFeed, "_numbers", fail)
            assert len(await asyncio.wait_for(snapshots(server, 2), BOUND_S)) == 1
            async with server.http.get(f"{server.url}/live/events") as response:
                assert response.status == 503
        said = [record.getMessage() for record in caplog.records if record.exc_info]
        assert said == ["what /live shows cannot be gathered"] * 2
        assert len(await snapshots(server, 1)) == 1


async def ask(server: Live, request_id: str, **options: Any) -> Json:
    async with server.http.get(f"{server.url}/requests/{request_id}/cache", **options) as response:
        assert response.status == 200, await response.text()
        [answer] = (await response.json())["data"]
    return answer


SYSTEM = list(range(1000, 1100))


@pytest.mark.parametrize("text", [False, True])
async def test_why_a_prefix_missed(text: bool) -> None:
    async with live(live_text=text) as server:

        async def send(prompt: list[int], **fields: Any) -> Json:
            answer = await server.complete(prompt, max_tokens=2, **fields)
            found = await ask(server, answer["id"])
            cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            assert found["cached_tokens"] == cached
            return found

        first = await send(SYSTEM)
        assert (first["cause"], first["nearest"]) == ("first", None)
        again = await send(SYSTEM)
        assert (again["cause"], again["cached_tokens"]) == ("hit", 96)
        changed = await send([*SYSTEM[:40], 7, *SYSTEM[41:]])
        assert (changed["cause"], changed["first_difference"], changed["hint"]) == ("differs", 40, None)
        assert changed["nearest"] == again["id"] and changed["cached_tokens"] == 32
        assert (changed["text"] is not None) is text
        if text:
            assert server.engine.tokenizer is not None
            assert changed["text"]["there"].startswith(server.engine.tokenizer.decode(SYSTEM[40:42]))
        inserted = await send([*SYSTEM[:50], 7, 8, 9, *SYSTEM[50:]])
        assert (inserted["first_difference"], inserted["hint"]) == (50, "inserted")
        left_out = await send([*SYSTEM[:60], *SYSTEM[70:]])
        assert (left_out["first_difference"], left_out["hint"]) == (60, "left_out")
        await send(SYSTEM)
        swapped = await send([*SYSTEM[:20], *SYSTEM[60:], *SYSTEM[20:60]])
        assert (swapped["first_difference"], swapped["hint"]) == (20, "reordered")
        salted = await send(SYSTEM, cache_salt="other")
        assert (salted["cause"], salted["nearest"]) == ("namespace", None)
        every = await send(SYSTEM, prompt_logprobs=0)
        assert every["cause"] == "every_token"
        await server.all_free()
        async with server.http.post(f"{server.url}/flush_cache") as response:
            assert response.status == 200
        flushed = await send(SYSTEM)
        assert flushed["cause"] == "flushed" and flushed["evicted_seconds_ago"] >= flushed["admitted_seconds_ago"]


async def test_an_evicted_prefix_and_when() -> None:
    # 16 pages of 16 tokens: a second long prompt needs those of the first.
    async with live(num_pages=16, max_num_seqs=2) as server:
        first = await server.complete(SYSTEM, max_tokens=2)
        await server.complete([7, *SYSTEM, *SYSTEM], max_tokens=2)
        again = await server.complete(SYSTEM, max_tokens=2)
        found = await ask(server, again["id"])
        assert (found["cause"], found["nearest"]) == ("evicted", first["id"])
        assert found["cached_tokens"] < 96 and found["evicted_seconds_ago"] >= found["admitted_seconds_ago"]
        # By the id in the header, and by that of a choice.
        async with server.http.post(
            f"{server.url}/v1/completions", json={"prompt": SYSTEM, "max_tokens": 1, "n": 2}
        ) as response:
            request_id, body = response.headers["X-Request-Id"], await response.json()
        for name, count in ((request_id, 2), (body["id"], 2), (body["id"] + "-1", 1)):
            async with server.http.get(f"{server.url}/requests/{name}/cache") as response:
                assert len((await response.json())["data"]) == count, name
        async with server.http.get(f"{server.url}/live/events?limit=x") as response:
            assert response.status == 400
        for name in ("nobody", "%00", "a" * 5000, "cmpl", "-1"):
            async with server.http.get(f"{server.url}/requests/{name}/cache") as response:
                assert response.status == 404 and (await response.json())["error"]["message"]


def check_trace(events: list[Json]) -> dict[str, list[Json]]:
    """The rules of the trace event format; the events by phase."""
    by_phase: dict[str, list[Json]] = defaultdict(list)
    for event in events:
        by_phase[event["ph"]].append(event)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and isinstance(event["name"], str)
        assert event["ph"] == "M" or event["ts"] >= 0
    assert set(by_phase) <= set("MXCstfbne")
    named = {event["tid"] for event in by_phase["M"] if event["name"] == "thread_name"}
    by_track: dict[int, list[Json]] = defaultdict(list)
    for event in by_phase["X"]:
        assert event["dur"] >= 0 and event["tid"] in named
        by_track[event["tid"]].append(event)
    for track in by_track.values():
        # Slices of one track do not overlap.
        track.sort(key=lambda event: (event["ts"], event["dur"]))
        for one, other in itertools.pairwise(track):
            assert one["ts"] + one["dur"] <= other["ts"] + 0.002, (one, other)
    arrows: dict[int, list[Json]] = defaultdict(list)
    for event in [*by_phase["s"], *by_phase["t"], *by_phase["f"]]:
        arrows[event["id"]].append(event)
        # An arrow begins and ends in a slice of its track.
        assert any(
            one["ts"] - 0.002 <= event["ts"] <= one["ts"] + one["dur"] + 0.002 for one in by_track[event["tid"]]
        ), event
    for points in arrows.values():
        points.sort(key=lambda event: event["ts"])
        phases = [event["ph"] for event in points]
        assert phases[0] == "s" and phases.count("s") == 1 and phases.count("f") <= 1
        assert "f" not in phases[:-1] and all(event.get("bp") == "e" for event in points if event["ph"] == "f")
    begun = {event["id"] for event in by_phase["b"]}
    assert len(begun) == len(by_phase["b"]) == len(by_phase["e"]), "every bar has an end"
    assert {event["id"] for event in [*by_phase["e"], *by_phase["n"]]} <= begun
    return by_phase


async def test_a_trace_holds_to_the_format_and_shows_every_stage() -> None:
    async with live(step_seconds=0.001) as server:
        url = f"{server.url}/trace?seconds=0.5"
        async with asyncio.TaskGroup() as group:
            recording = group.create_task(server.http.get(url).__aenter__())
            await until(lambda: bool(server.state.traces))
            schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
            formatted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            group.create_task(server.events("/v1/completions", {"prompt": "once " * 30, "max_tokens": 20}))
            group.create_task(server.complete("x", max_tokens=9, response_format=formatted))
            group.create_task(server.complete("y", max_tokens=9, n=3))
        response = recording.result()
        trace = await response.json()
        assert response.status == 200 and "attachment" in response.headers["Content-Disposition"]
    assert trace["displayTimeUnit"] == "ms" and trace["otherData"]["forgotten"] is False
    by_phase = check_trace(trace["traceEvents"])
    names = {event["name"] for event in by_phase["X"]}
    stages = {"schedule", "launch", "wait", "commit", "publish"}
    assert names >= stages | {"write", "tokenise", "compile", "masks", "arrives"}
    assert {event["args"]["step"] for event in by_phase["X"] if event["name"] == "wait"}
    assert len(by_phase["f"]) == 5 and len(by_phase["s"]) == 5
    assert {event["name"] for event in by_phase["n"]} >= {"queued", "admitted", "prefill", "first_token", "finished"}


async def test_nothing_is_recorded_after_a_trace_and_bad_lengths_are_refused(server: Live) -> None:
    for seconds in ("0", "-1", "nan", "inf", "61", "x", ""):
        async with server.http.get(f"{server.url}/trace?seconds={seconds}") as response:
            assert response.status == 400 and (await response.json())["error"]["param"] == "seconds"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.05), server.http.get(f"{server.url}/trace?seconds=60"):
            pass
    await until(lambda: not server.state.traces)
    assert server.engine.recorder.stages is None and server.engine.scheduler.recorder is None


async def test_a_trace_file_is_whole_json_after_a_clean_end(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    async with live() as server:
        async with TraceFile(str(path)).running(server.engine.recorder):
            await server.complete("hello", max_tokens=5)
        by_phase = check_trace(json.loads(path.read_bytes()))
        assert len(by_phase["f"]) == 1 and {event["name"] for event in by_phase["X"]} >= {"schedule", "publish"}
        assert server.engine.recorder.stages is None


def test_many_events_are_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Watched:
        @staticmethod
        def dumps(events: list[Json]) -> bytes:
            sizes.append(len(events))
            return orjson.dumps(events)

    monkeypatch.setattr(trace_file, "orjson", Watched)
    events = [{"number": number} for number in range(3 * trace_file.PART + 1)]
    written = trace_file.orjson_lines(events)
    assert written.endswith(b",\n") and json.loads(b"[%b]" % written[:-2]) == events
    assert max(sizes) == trace_file.PART and not trace_file.orjson_lines([])


async def test_a_drain_does_not_wait_for_who_looks() -> None:
    async with live(drain_timeout_s=20.0) as server:
        looking = asyncio.create_task(snapshots(server, 10**6))
        tracing = asyncio.create_task(server.http.get(f"{server.url}/trace?seconds=60").__aenter__())
        await until(lambda: bool(server.state.traces) and server.engine.recorder.is_watched)
        server.stop.set()
        async with asyncio.timeout(BOUND_S / 4):
            await server.serving
        await asyncio.gather(looking, tracing, return_exceptions=True)
