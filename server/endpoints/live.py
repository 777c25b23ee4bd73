"""GET /live/events, /requests/{id}/cache and /trace: the engine at work, for /live and for programs. All need the admin
key where there is one: they tell of everybody's requests."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

import orjson
from aiohttp import web

from engine.history import Visit
from engine.misses import Explanation, explain, is_number
from engine.recorder import MAX_TRACED, Event, Tracer, now
from engine.request import UnavailableError
from server.protocol.body import invalid
from server.protocol.errors import ApiError, json_response
from server.sse import EVENT_HEADERS, KEEP_ALIVE, EventStream
from server.state import STATE, State
from server.trace_events import TraceEvents
from server.trace_file import orjson_lines

MAX_TRACE_S = 60.0
MAX_TRACES = 4

Json = dict[str, Any]


async def events(request: web.Request) -> web.StreamResponse:
    """Snapshots of LiveFeed as server-sent events, from now on. `?limit=1`: so many, and no more."""
    state = request.app[STATE]
    text = request.query.get("limit", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise invalid("limit", "must be a number of snapshots")
    left = int(text) or None
    async with contextlib.aclosing(state.live.snapshots()) as snapshots:
        first = await anext(snapshots, None)
        if first is None:
            raise UnavailableError("What this page shows cannot be gathered at the moment.")
        stream = await EventStream.open(request, EVENT_HEADERS, KEEP_ALIVE, state.options.keep_alive_interval_s)
        with contextlib.suppress(ConnectionError):
            async with stream:
                await stream.write(b"data: " + first + b"\n\n")
                # Somebody who looks must not hold up the end.
                while not state.engine.draining and left != 1:
                    following = await anext(snapshots, None)
                    if following is None:
                        break
                    await stream.write(b"data: " + following + b"\n\n")
                    left = None if left is None else left - 1
    return stream.response


async def cache(request: web.Request) -> web.Response:
    """Why the prompt of a request, or those of its choices, found what it found in the prefix cache.

    id: of the response, its X-Request-Id, or while it runs any name that /abort_request takes.
    """
    state, name = request.app[STATE], request.match_info["request_id"]
    history = state.engine.scheduler.kv_cache.history
    asked = {own for own, names in state.submitted.items() if name in names}
    visits = list(history.visits.values())
    found = [visit for visit in visits if visit.request_id in asked or _is_called(visit.request_id, name)]
    if not found:
        if asked:
            raise ApiError(404, "This request has not been admitted yet: it has not looked into the cache.")
        raise ApiError(404, "There is no such request, or it was too long ago.")
    evictions = list(history.evictions)
    answers = []
    for visit in found[:128]:
        one = await asyncio.to_thread(explain, visit, visits, evictions, history.flushed_at, history.page_size)
        answers.append(_explanation(state, visit, one))
    return json_response({"id": name, "object": "list", "data": answers})


def _is_called(request_id: str, name: str) -> bool:
    """An engine's request is called like its response, or by a number behind that; X-Request-Id has no prefix."""
    if request_id == name or (request_id.startswith(f"{name}-") and request_id[len(name) + 1 :].isdigit()):
        return True
    prefix, _, rest = request_id.partition("-")
    return bool(prefix) and len(name) >= 32 and (rest == name or rest.rpartition("-")[0] == name)


def _explanation(state: State, visit: Visit, one: Explanation) -> Json:
    engine = state.engine
    clock = engine.clock.now()
    answer: Json = {
        "id": visit.request_id,
        "cause": one.cause,
        "explanation": _sentence(one, clock),
        "prompt_tokens": one.num_prompt,
        "cached_tokens": one.num_cached,
        "cacheable_tokens": one.num_cacheable,
        "nearest": one.nearest,
        "common_tokens": one.num_common,
        "first_difference": one.first_difference,
        "hint": one.hint,
        "evicted_seconds_ago": None if one.evicted_at is None else round(clock - one.evicted_at, 3),
        "admitted_seconds_ago": round(clock - visit.admitted_at, 3),
        "text": None,
        "timeline": _timeline(state, visit.request_id, one.num_cached),
    }
    if one.first_difference is not None and state.options.live_text and engine.tokenizer is not None:
        decode = engine.tokenizer.decode
        ours, theirs = (decode(ids[one.before :], skip_special_tokens=False) for ids in (one.ours, one.theirs))
        answer["text"] = {
            "common": decode(one.ours[: one.before], skip_special_tokens=False),
            "here": ours,
            "there": theirs,
        }
        if one.hint is None and is_number(ours, theirs):
            answer["hint"] = "number"
    return answer


_CAUSES = {
    "hit": "All whole pages of the prompt were found.",
    "first": "No request that is remembered begins like this one.",
    "differs": "It differs from the request that agrees with it the longest.",
    "evicted": "What others had left of this prompt had been evicted.",
    "flushed": "What others had left of this prompt was flushed.",
    "namespace": "The same tokens were cached, but for another API key or cache_salt.",
    "not_cached_yet": "A request with the same beginning was still being computed.",
    "not_resumable": "The tokens were known, but a window or a recurrent state that they need was gone.",
    "every_token": "The answer needs every token of the prompt computed (prompt_logprobs, or a mean over all).",
    "disabled": "The prefix cache is off.",
}
_HINTS = {
    "inserted": " Something was inserted there: what the other one has next comes later in this prompt.",
    "left_out": " Something was left out there: what comes next in this prompt comes later in the other one.",
    "reordered": " The same parts come in another order.",
}


def _sentence(one: Explanation, clock: float) -> str:
    if one.cause == "hit" and not one.num_cacheable:
        return "The prompt is no longer than a page: there was nothing to be found."
    text = _CAUSES[one.cause]
    if one.first_difference is not None:
        text += f" Token {one.first_difference} of {one.num_prompt} is the first that differs."
    if one.cause == "evicted" and one.evicted_at is None:
        text += " That was longer ago than is remembered."
    elif one.evicted_at is not None:
        text += f" That was {clock - one.evicted_at:.1f} seconds ago."
    return text + _HINTS.get(one.hint or "", "")


def _timeline(state: State, request_id: str, num_cached: int) -> list[Json]:
    """What happened to it, in milliseconds since it came; where nobody looked then, what is still known. num_cached:
    tokens that it found as it was admitted."""
    recorder = state.engine.recorder
    known = list(recorder.timelines.get(request_id, ()))
    if (listener := state.engine.publisher.listeners.get(request_id)) is not None:
        sequence, kinds = listener.sequence, {event.kind for event in known}
        moments = {
            "queued": (sequence.arrived_at, sequence.num_prompt_tokens),
            "admitted": (sequence.admitted_at, num_cached),
            "first_token": (listener.stream.first_token_at, 0),
        }
        known += [Event(at, kind, n) for kind, (at, n) in moments.items() if at is not None and kind not in kinds]
        known.sort(key=lambda event: event.at)
        if sequence.finish_reason is None:
            # So far.
            known.append(Event(state.engine.clock.now(), "tokens", sequence.num_tokens - sequence.num_prompt_tokens))
    if not known:
        return []
    began = known[0].at
    return [{"ms": round((event.at - began) * 1e3, 3), "kind": event.kind, "value": event.value} for event in known]


async def trace(request: web.Request) -> web.Response:
    """`?seconds=5`: record for so long, and give it in Chrome's trace format, for ui.perfetto.dev."""
    state = request.app[STATE]
    seconds = _read_seconds(request.query.get("seconds", "5"))
    running = state.traces
    if len(running) >= MAX_TRACES:
        raise ApiError(429, f"{MAX_TRACES} traces are being recorded already.")
    tracer = Tracer(MAX_TRACED)
    writer = TraceEvents(tracer.began)
    running.add(tracer)
    state.engine.recorder.start(tracer)
    try:
        await _sleep(state, seconds)
    finally:
        state.engine.recorder.stop(tracer)
        running.discard(tracer)
    ended, is_full = now(), tracer.is_full

    def encode() -> bytes:
        found = [*writer.head(), *writer.take(tracer), *writer.tail(ended)]
        about = {
            "seconds": round(ended - tracer.began, 3),
            "forgotten": is_full,
            "left_out": writer.num_left_out,
        }
        rest = orjson.dumps({"displayTimeUnit": "ms", "otherData": about})
        return b'{"traceEvents":[\n%b\n],%b' % (orjson_lines(found).removesuffix(b",\n"), rest[1:])

    body = await asyncio.to_thread(encode)
    headers = {"Content-Disposition": 'attachment; filename="oneloop-trace.json"'}
    return web.Response(body=body, content_type="application/json", headers=headers)


async def _sleep(state: State, seconds: float) -> None:
    """A drain does not wait for it."""
    until = now() + seconds
    while not state.engine.draining and (left := until - now()) > 0:  # noqa: ASYNC110  (a drain is no event)
        await asyncio.sleep(min(left, 0.1))


def _read_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds <= MAX_TRACE_S:
        raise invalid("seconds", f"must be a number above 0 and at most {MAX_TRACE_S:g}")
    return seconds


ROUTES = (
    ("GET", "/live/events", events),
    ("GET", "/requests/{request_id}/cache", cache),
    ("GET", "/trace", trace),
)
IS_ADMIN = True
