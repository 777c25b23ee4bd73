"""/v1/responses: create a response, and see, follow, cancel, list or forget what is kept of one."""

from __future__ import annotations

import contextlib
from functools import partial

import orjson
from aiohttp import web

from engine.request import UnavailableError
from server.answers.compaction import CompactionAnswer
from server.answers.responses import ResponsesAnswer
from server.background import JOBS, Job
from server.endpoints.generate import echo_request_id
from server.protocol.body import Body, invalid, read_body
from server.protocol.chat import encode_messages
from server.protocol.compaction import parse_compaction
from server.protocol.errors import ApiError, json_response
from server.protocol.generation import read_model
from server.protocol.naming import in_words_of
from server.protocol.responses import NAMES, parse_response, read_chat
from server.protocol.tool_fields import read_tools
from server.responder import names_of, respond
from server.response_store import Stored
from server.short_forms import with_short_forms
from server.sse import EventStream
from server.state import CALLER, REQUEST_ID, STATE, State

_MAX_LISTED = 100


async def create(request: web.Request) -> web.StreamResponse:
    """POST /v1/responses."""
    state, body = request.app[STATE], await read_body(request)
    if isinstance(earlier := body.values.get("previous_response_id"), str):
        await request.app[JOBS].settle(state, earlier)
    if body.boolean("background", False):
        return await _create_job(request, state, body)
    plan, asked = await parse_response(body, state, f"resp_{request[REQUEST_ID]}", _owner())
    echo_request_id(request, body)
    with in_words_of(NAMES):
        return await respond(request, state, plan, partial(ResponsesAnswer, asked))


async def compact(request: web.Request) -> web.StreamResponse:
    """POST /v1/responses/compact."""
    state, body = request.app[STATE], await read_body(request)
    plan, asked = await parse_compaction(body, state, f"resp_{request[REQUEST_ID]}", _owner())
    with in_words_of(NAMES):
        return await respond(request, state, plan, partial(CompactionAnswer, asked))


async def _create_job(request: web.Request, state: State, body: Body) -> web.StreamResponse:
    """One that goes on without its client. It is made to be streamed, whether this client follows it or not."""
    follows = body.boolean("stream", False)
    if body.has("stream_options") and not follows:
        raise invalid("stream_options", "is only allowed when `stream` is true")
    name = f"resp_{request[REQUEST_ID]}"
    job, response = await request.app[JOBS].start(state, body, name, names_of(request, name))
    echo_request_id(request, body)
    if follows:
        return await _follow(request, job, -1)
    return web.Response(body=response, content_type="application/json")


async def _follow(request: web.Request, job: Job, after: int) -> web.StreamResponse:
    """The events of a job, to its end."""
    interval = request.app[STATE].options.keep_alive_interval_s
    events = await EventStream.open(request, ResponsesAnswer.headers, ResponsesAnswer.keep_alive, interval)
    with contextlib.suppress(ConnectionError):
        async with events, contextlib.aclosing(job.follow(after)) as source:
            async for data in source:
                await events.write(data)
    return events.response


async def count_input_tokens(request: web.Request) -> web.Response:
    """POST /v1/responses/input_tokens: what the same body would be charged for its input."""
    state, body = request.app[STATE], await read_body(request)
    read_model(body, state.model)
    chat, _ = await read_chat(body, state, _owner())
    with in_words_of(NAMES):
        _, tokens = await encode_messages(chat, state, read_tools(chat))
    return json_response({"object": "response.input_tokens", "input_tokens": len(tokens)})


async def retrieve(request: web.Request) -> web.StreamResponse:
    """GET /v1/responses/{id}, whole, or with `stream=true` its events behind number `starting_after`."""
    name = request.match_info["response_id"]
    await request.app[JOBS].settle(request.app[STATE], name)
    job = request.app[JOBS].get(_owner(), name)
    stream, after = request.query.get("stream", "false"), request.query.get("starting_after")
    if stream not in ("true", "false"):
        raise invalid("stream", "must be true or false")
    # The header is what SSE says for a client that comes back.
    named = after if after is not None else request.headers.get("Last-Event-ID")
    if after is not None and stream == "false":
        raise invalid("starting_after", "is only allowed when `stream` is true")
    if stream == "true":
        job = await request.app[JOBS].events_of(request.app[STATE], name)
        if job is None:
            _find(request)
            raise invalid("stream", "is of `background` responses, as long as their events are kept")
        if named is not None and not (named.isascii() and named.isdecimal() and len(named) <= 9):
            raise invalid("starting_after", "must be the number of an event")
        _check_here(job)
        return await _follow(request, job, -1 if named is None else int(named))
    if job is not None:
        _check_here(job)
        if not job.is_done:
            return json_response(job.response())
    stored = _find(request)
    return web.Response(body=stored.response, content_type="application/json")


async def delete(request: web.Request) -> web.Response:
    """DELETE /v1/responses/{id}."""
    name = request.match_info["response_id"]
    await request.app[JOBS].settle(request.app[STATE], name)
    job = request.app[JOBS].get(_owner(), name)
    if job is not None and not job.is_done:
        await job.cancel()
    elif job is None:
        _find(request)
    request.app[JOBS].forget(_owner(), name)
    request.app[STATE].responses.delete(_owner(), name)
    return json_response({"id": name, "object": "response", "deleted": True})


async def cancel(request: web.Request) -> web.Response:
    """POST /v1/responses/{id}/cancel: end one that runs in the background; one that has ended stays as it is."""
    await request.app[JOBS].settle(request.app[STATE], request.match_info["response_id"])
    job = request.app[JOBS].get(_owner(), request.match_info["response_id"])
    if job is None and not orjson.loads(_find(request).response)["background"]:
        raise invalid("response_id", "is of a response that was not made with `background`, and cannot be cancelled")
    if job is not None and not job.is_done:
        await job.cancel()
    return web.Response(body=_find(request).response, content_type="application/json")


async def list_input_items(request: web.Request) -> web.Response:
    """GET /v1/responses/{id}/input_items, those of earlier turns included, a page at a time."""
    await request.app[JOBS].settle(request.app[STATE], request.match_info["response_id"])
    items = orjson.loads(_find(request).input)
    query = Body(dict(request.query))
    limit = query.raw("limit") or "20"
    if not (limit.isascii() and limit.isdecimal() and len(limit) <= 3 and 1 <= int(limit) <= _MAX_LISTED):
        raise invalid("limit", f"must be an integer from 1 to {_MAX_LISTED}")
    if query.has("before"):
        raise invalid("before", "is not supported by this server; use `after` with the other `order`")
    if (query.choice("order", ("asc", "desc")) or "desc") == "desc":
        items.reverse()
    if (after := query.raw("after")) is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise invalid("after", "names no input item of this response")
        items = items[places[0] + 1 :]
    page = items[: int(limit)]
    return json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(page) < len(items),
        }
    )


def _check_here(job: Job) -> None:
    if job.was_cut_short or (job.is_left and not job.is_done):
        raise UnavailableError("Another process goes on with this response; ask again on a new connection.")


def _find(request: web.Request) -> Stored:
    """Raises the 404, also for a response of somebody else."""
    name = request.match_info["response_id"]
    stored = request.app[STATE].responses.get(_owner(), name)
    if stored is None:
        raise ApiError(404, f"Response with id {name[:64]!r} not found.", param="response_id")
    return stored


def _owner() -> str:
    """Whose responses these are: the caller's key."""
    return CALLER.get().key


ROUTES = with_short_forms(
    (
        ("POST", "/v1/responses", create),
        ("POST", "/v1/responses/input_tokens", count_input_tokens),
        ("POST", "/v1/responses/compact", compact),
        ("GET", "/v1/responses/{response_id}", retrieve),
        ("DELETE", "/v1/responses/{response_id}", delete),
        ("POST", "/v1/responses/{response_id}/cancel", cancel),
        ("GET", "/v1/responses/{response_id}/input_items", list_input_items),
    )
)
