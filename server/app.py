"""The web application: routes, and the gate that every request passes. `serve.py` calls `build_app`. Loop thread."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import orjson
from aiohttp import web

from engine.config import ServerOptions, StartupError
from engine.engine import Engine
from engine.failures import raise_fatal
from engine.keys import digest
from engine.request import RequestError, UnavailableError
from engine.text.grammar.compiler import GrammarCompiler
from engine.updates import WeightUpdates
from server import endpoints, kv_events
from server.accounts import Accounts, PriceList
from server.adapters import prepare
from server.background import JOBS, Jobs
from server.endpoints import abort, health, rollouts, web_api
from server.endpoints import web as pages
from server.journal import Journal
from server.keyring import Key, Keyring
from server.kv_events import KVEvents
from server.memory import MemoryWatch
from server.parsers.registry import choose_parsers
from server.protocol.body import PREPARE, Prepare
from server.protocol.errors import OWN_SHAPE, ApiError, ErrorShape, error_body, error_response
from server.protocol.generation import MAX_TIMEOUT_S
from server.protocol.ignored import HEADER as IGNORED_HEADER
from server.protocol.ignored import IGNORED, Ignored
from server.request_log import Usage, log_request
from server.response_store import ResponseStore
from server.spans import Spans, trace_headers
from server.state import CALLER, ECHOED_ID, ID_PATTERN, REQUEST_ID, STATE, USAGE, Caller, ServedModel, State

__all__ = ["ServedModel", "build_app"]

logger = logging.getLogger("oneloop.server")

# A family of routes is a module there. ROUTES: (method, path, handler) each. ERROR_SHAPE: of errors that do not have
# OpenAI's shape. IS_ADMIN: they change the server for everybody, and need the admin key, where there is one. IS_WEB:
# they are there for this server's own pages, and `--no-web` leaves them out.
ENDPOINTS = [
    importlib.import_module(f"{endpoints.__name__}.{found.name}") for found in iter_modules(endpoints.__path__)
]
ADMIN_ENDPOINTS = [endpoint for endpoint in ENDPOINTS if getattr(endpoint, "IS_ADMIN", False)]
_ADMIN_HANDLERS = frozenset(handler for endpoint in ADMIN_ENDPOINTS for _, _, handler in endpoint.ROUTES)
# What makes a drain shorter, and what shows the answers that end meanwhile.
_ALWAYS_OPEN = frozenset({*(handler for _, _, handler in abort.ROUTES), web_api.render})
# How errors look by path, where they do not have OpenAI's shape; also a 405, which has no handler.
_SHAPES = web.AppKey("shapes", dict[str, ErrorShape])
# What a request holds and its answer does without.
_IGNORED = web.RequestKey("ignored", Ignored)
_LIMIT_HEADERS = ", ".join(
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
)
# Whose request it is, where it needed a key.
_KEY = web.RequestKey("key", Key)
_JOURNAL = web.AppKey("journal", Journal)
_MEMORY = web.AppKey("memory", MemoryWatch)
# The next process accepts: connections are not kept.
IS_CLOSING = web.AppKey("is_closing", asyncio.Event)
_ADMIN_KEYS = web.AppKey("admin_keys", Keyring)
# Bodies are inflated by read_body, which can stop.
CONNECTION: dict[str, Any] = {"auto_decompress": False, "access_log": None}
# Pages that this machine serves to itself, and those of its own programs: no site can have such a scheme. Not "null",
# which is also what a page of any site is inside of a sandbox.
_LOCAL_ORIGIN = re.compile(
    r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?|(app|file|tauri|vscode-file|vscode-webview)://[\w.\-]*"
)
# nginx's word for a client that did not wait.
_CLIENT_CLOSED = 499
_MESSAGES = {
    404: "There is no such route.",
    413: "The body is too large.",
}

# Methods that change nothing here.
_READING = ("GET", "HEAD", "OPTIONS")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(engine: Engine, model: ServedModel, options: ServerOptions) -> web.Application:
    """All routes, under `options.root_path` as well where it is set (some proxies strip it and some do not)."""
    model = dataclasses.replace(model, adapters=engine.adapters)
    app = web.Application(middlewares=[_gate], client_max_size=options.max_body_bytes, handler_args=dict(CONNECTION))
    template = model.chat_template
    tool_family, reasoning_family = choose_parsers(
        options.tool_call_parser,
        options.reasoning_parser,
        "" if template is None else template.source,
        None
        if template is None
        else lambda chat, tools: template.render(chat, tools=tools, add_generation_prompt=False),
    )
    if options.reasoning_budget is not None and reasoning_family is None:
        raise StartupError("--reasoning-budget needs a model that reasons; this one's chat template shows no reasoning")
    store = ResponseStore(options.response_store_size, options.response_store_bytes)
    usage = None if options.key_usage_path is None else Path(options.key_usage_path)
    keyring = Keyring(tuple(map(digest, options.api_keys)), options.key_entries, usage=usage)
    app[_ADMIN_KEYS] = Keyring(() if options.admin_api_key is None else (digest(options.admin_api_key),))
    accounts = Accounts(None if options.prices is None else PriceList.load(options.prices))
    engine.metrics.add_families(accounts.collect)
    app[STATE] = State(
        engine,
        model,
        options,
        _make_compiler(engine, model),
        tool_family,
        reasoning_family,
        responses=store,
        keyring=keyring,
        accounts=accounts,
        spans=None if options.otlp_traces_endpoint is None else Spans(options.otlp_traces_endpoint, model.names[0]),
        kv_events=_publish_kv_events(engine, options),
    )
    app[PREPARE] = _prepare(app[STATE])
    app[rollouts.UPDATES] = WeightUpdates(engine, options.weight_update_timeout_s)
    app[rollouts.SNAPSHOT] = {}
    journal = None
    if options.resume_journal is not None:
        journal = Journal(Path(options.resume_journal), options.response_store_size, options.response_store_bytes)
        app[_JOURNAL] = journal
    app[JOBS] = Jobs(options.response_store_size, options.response_store_bytes, journal)
    app[_MEMORY] = MemoryWatch(options.max_host_memory, functools.partial(_shed, app), engine.metrics)
    app.cleanup_ctx.append(_watch_memory)
    app[IS_CLOSING] = asyncio.Event()
    app[_SHAPES] = {}
    app.on_startup.append(_resume)
    app.on_cleanup.append(_clean_up)
    app.on_response_prepare.append(_add_headers)
    for prefix in dict.fromkeys(("", options.root_path.rstrip("/"))):
        for endpoint in ENDPOINTS:
            if getattr(endpoint, "IS_WEB", False) and not options.web:
                continue
            shape = getattr(endpoint, "ERROR_SHAPE", error_body)
            for method, path, handler in endpoint.ROUTES:
                app[_SHAPES][prefix + path] = shape
                # What takes any rest of a path takes the slash, too.
                forms = (path,) if path == "/" or path.endswith(":.+}") else (path, path + "/")
                for form in forms:
                    for one in (method, "HEAD") if method == "GET" else (method,):
                        app.router.add_route(one, prefix + form, handler, expect_handler=_expect)
    return app


def _prepare(state: State) -> Prepare:
    return functools.partial(prepare, state)


def _publish_kv_events(engine: Engine, options: ServerOptions) -> KVEvents | None:
    wanted = None if options.kv_events is None else kv_events.parse(options.kv_events)
    if wanted is None:
        return None
    cache = engine.scheduler.kv_cache
    events = KVEvents(wanted, cache.page_size)
    cache.watch(events)
    if engine.tier is not None:
        engine.tier.watch(events)
    return events


def _make_compiler(engine: Engine, model: ServedModel) -> GrammarCompiler | None:
    if engine.tokenizer is None or not engine.eos_token_ids:
        return None
    compiler = GrammarCompiler(engine.tokenizer, engine.eos_token_ids, engine.limits.vocab_size)
    if model.abilities.generates:
        compiler.prepare()
    return compiler


async def _resume(app: web.Application) -> None:
    await app[JOBS].resume(app[STATE])


def _shed(app: web.Application) -> None:
    """Empty what only makes things faster, or is kept for later turns."""
    state = app[STATE]
    state.responses.clear()
    app[JOBS].clear()
    if state.compiler is not None:
        state.compiler.forget()


async def _watch_memory(app: web.Application) -> AsyncIterator[None]:
    async with app[_MEMORY].running():
        yield


async def _clean_up(app: web.Application) -> None:
    state = app[STATE]
    state.keyring.save()
    await app[rollouts.UPDATES].close()
    await app[JOBS].close()
    if _JOURNAL in app:
        app[_JOURNAL].close()
    if state.compiler is not None:
        state.compiler.close()
    state.renderer.close()
    if state.spans is not None:
        await asyncio.to_thread(state.spans.close)
    if state.kv_events is not None:
        await asyncio.to_thread(state.kv_events.close)


# ---- the gate


@web.middleware
async def _gate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Name the request, answer it, count it."""
    state = request.app[STATE]
    usage = Usage() if state.spans is None else Usage(trace_headers=trace_headers(request.headers))
    USAGE.set(usage)
    request[REQUEST_ID] = request[ECHOED_ID] = uuid.uuid4().hex
    request[_IGNORED] = Ignored()
    IGNORED.set(request[_IGNORED])
    given = request.headers.get("X-Request-Id")
    if given is not None and re.fullmatch(ID_PATTERN, given):
        request[ECHOED_ID] = given
    resource = request.match_info.route.resource
    route = "none" if resource is None else _without_slash(resource.canonical)
    started_at = time.monotonic()
    status = _CLIENT_CLOSED
    with state.in_flight:
        try:
            response = await _answer(request, handler, state)
            status = response.status
        finally:
            seconds = time.monotonic() - started_at
            state.engine.metrics.observe_http(route, request.method, status, seconds)
            if state.options.access_log:
                log_request(
                    request_id=request[ECHOED_ID],
                    method=request.method,
                    path=request.rel_url.raw_path,
                    status=status,
                    seconds=seconds,
                    key=CALLER.get().key,
                    remote=request.remote or "",
                    usage=usage,
                )
    return response


async def _answer(request: web.Request, handler: Handler, state: State) -> web.StreamResponse:
    """Preflight, keys, draining; and every error in the shape of its route."""
    try:
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return _preflight(request, state.options)
        # A browser asks before it sends JSON, so what comes as such is no page's, or an allowed one's.
        asked = request.method in _READING or request.content_type == "application/json"
        if not asked and _is_foreign_page(request, state.options):
            raise ApiError(403, "Pages of this origin may not use this server; --allowed-origins says which may.")
        key = _authorize(request, state)
        CALLER.set(Caller("" if key is None else key.name, key, _read_timeout(request)))
        if key is not None:
            request[_KEY] = key
        if state.engine.draining and request.method == "POST" and request.match_info.handler not in _ALWAYS_OPEN:
            raise UnavailableError("The server is shutting down and takes no new requests.")
        if request.method == "POST" and request.match_info.handler not in _ALWAYS_OPEN:
            request.app[_MEMORY].check()
        if key is None or request.method != "POST" or request.match_info.handler in _ALWAYS_OPEN:
            return await handler(request)
        with state.keyring.request(key):
            return await handler(request)
    except RequestError as error:
        return _failed(request, error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        if isinstance(error, web.HTTPMethodNotAllowed):
            allowed = ", ".join(sorted(error.allowed_methods))
            why = f"This route takes {allowed}, and not this method."
            return _failed(request, ApiError(error.status, why), {"Allow": allowed})
        return _failed(request, ApiError(error.status, _MESSAGES.get(error.status, error.reason)))
    except ConnectionError:
        # The client has gone before its headers came; aiohttp will find that out with this answer.
        return web.Response(status=_CLIENT_CLOSED)
    except BaseException as error:
        raise_fatal(error)
        logger.exception("request %s failed in the server", request[REQUEST_ID])
        return _failed(request, ApiError(500, "The server had an internal error."))


def _failed(request: web.Request, error: RequestError, headers: Mapping[str, str] | None = None) -> web.Response:
    return error_response(error, headers, _shape(request, error))


def _shape(request: web.Request, error: RequestError) -> dict[str, object]:
    resource = request.match_info.route.resource
    path = _without_slash(request.path if resource is None else resource.canonical)
    shapes = request.app[_SHAPES]
    if path not in shapes:
        # A method that a route does not take, or a path beneath one: in the words of the route that is nearest.
        heads = (known for known in shapes if path.startswith(known.partition("{")[0].rstrip("/") + "/"))
        path = max(heads, key=len, default="")
    shape = request.get(OWN_SHAPE) or shapes.get(path, error_body)
    return shape(error, request.get(ECHOED_ID))


def _without_slash(path: str) -> str:
    """A path as it is told: routes are taken with a slash at their end, too."""
    return path.rstrip("/") or "/"


def _authorize(request: web.Request, state: State) -> Key | None:
    """The key that the request has, None where it needs none; else the 401. Headers only: the body is not read yet.

    As in SGLang: admin routes take the admin key and no other where one is set, and all other routes only the API keys.
    """
    handler, options = request.match_info.handler, state.options
    open_handlers = (health.health,) if options.protect_metrics else (health.health, health.metrics)
    is_admin = options.admin_api_key is not None and handler in _ADMIN_HANDLERS
    keyring = request.app[_ADMIN_KEYS] if is_admin else state.keyring
    if not keyring or handler in open_handlers or pages.is_page(request):
        return None
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    # The second is how Anthropic's clients send it.
    given = [token if scheme.lower() == "bearer" else "", request.headers.get("X-Api-Key", "")]
    key = keyring.find([word.strip() for word in given])
    if key is None:
        kind = "admin key" if is_admin else "API key"
        raise ApiError(401, f"A valid {kind} is required: Authorization: Bearer <key>.")
    return None if is_admin else key


def _read_timeout(request: web.Request) -> float | None:
    """The header X-Request-Timeout, in seconds; a field of the body goes before it."""
    text = request.headers.get("X-Request-Timeout")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= MAX_TIMEOUT_S:
        raise ApiError(400, f"X-Request-Timeout must be a number of seconds above 0 and at most {MAX_TIMEOUT_S:g}.")
    return seconds


def _preflight(request: web.Request, options: ServerOptions) -> web.Response:
    """The answer to a browser that asks before it sends a key; the origin's own header is added by _add_headers."""
    response = web.Response(status=204)
    if _allowed_origin(request, options) is not None:
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE, OPTIONS"
        wanted = request.headers.get("Access-Control-Request-Headers", "Authorization, Content-Type")
        # "*" would not cover Authorization.
        response.headers["Access-Control-Allow-Headers"] = wanted
        response.headers["Access-Control-Max-Age"] = "600"
    return response


def _allowed_origin(request: web.Request, options: ServerOptions) -> str | None:
    origin = request.headers.get("Origin")
    if origin is None or not options.allowed_origins:
        return None
    if "*" in options.allowed_origins:
        return "*"
    local = "local" in options.allowed_origins and _LOCAL_ORIGIN.fullmatch(origin)
    return origin if local or origin in options.allowed_origins else None


def _is_foreign_page(request: web.Request, options: ServerOptions) -> bool:
    """Whether a browser says that a page of an origin that is not allowed sent this. Other programs say nothing.

    CORS keeps such a page from the answer, but not from the effect of a request without a body, or with a text.
    """
    origin = request.headers.get("Origin")
    if origin is None:
        return request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
    # By the host alone: a proxy may have taken the TLS off.
    return origin.partition("://")[2] != request.host and _allowed_origin(request, options) is None


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Headers of every response, streamed ones included."""
    if ECHOED_ID in request:
        response.headers["X-Request-Id"] = request[ECHOED_ID]
    if _IGNORED in request and (kinds := request[_IGNORED].header()) is not None:
        response.headers[IGNORED_HEADER] = kinds
    state = request.app[STATE]
    if _KEY in request:
        response.headers.update(state.keyring.headers(request[_KEY]))
    if request.app[IS_CLOSING].is_set():
        response.headers["Connection"] = "close"
        response.force_close()
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Server"] = "oneloop"
    options = state.options
    if not options.allowed_origins:
        return
    response.headers.add("Vary", "Origin")
    if (origin := _allowed_origin(request, options)) is not None:
        response.headers["Access-Control-Allow-Origin"] = origin
        exposed = f"X-Request-Id, Retry-After, {_LIMIT_HEADERS}, {IGNORED_HEADER}"
        response.headers["Access-Control-Expose-Headers"] = exposed


async def _expect(request: web.Request) -> None:
    """`Expect: 100-continue`. Runs before the gate, so that its error has to bring its own body."""
    if request.headers.get("Expect", "").lower() != "100-continue":
        body = orjson.dumps(_shape(request, ApiError(417, "Only 100-continue can be expected.")))
        raise web.HTTPExpectationFailed(text=body.decode(), content_type="application/json")
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0
