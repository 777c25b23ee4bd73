"""The answer of /v1/responses: output items, whole or as the named events that tell of them while they grow.

Both ways go through the same steps, so that the items of a stream are those of the same request unstreamed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import orjson

from engine.request import FinishReason, RequestError
from engine.stream import Delta, TokenLogprob, TokenStream
from engine.text.detokenizer import IncrementalDetokenizer
from server.answers.base import arguments_object, failure, kept_pages, reasoning_watches, usage
from server.logprobs import Spelling, chat_logprobs
from server.messages import finish_events
from server.parsers.base import ContentDelta, Event, ReasoningDelta, ToolCallStart
from server.protocol.errors import ApiError
from server.protocol.generation import Plan
from server.protocol.responses import Asked
from server.protocol.tool_search import NAME as SEARCH
from server.sse import EVENT_HEADERS, KEEP_ALIVE
from server.state import State

Json = dict[str, Any]

# What ids of items begin with.
_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "custom_tool_call": "ctc",
    "tool_search_call": "tsc",
}
_TEXTS = {"message": "output_text", "reasoning": "reasoning_text"}
# Of calls: the field that grows.
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
_EVENTS_OF_CALLS = {
    "function_call": "response.function_call_arguments",
    "custom_tool_call": "response.custom_tool_call_input",
}


class ResponsesAnswer:
    """One answer; see answers/base.py."""

    headers = EVENT_HEADERS
    keep_alive = KEEP_ALIVE

    def __init__(self, asked: Asked, state: State, plan: Plan, streams: list[TokenStream]) -> None:
        self.num_running = len(streams)
        self._asked = asked
        self._state = state
        self._plan = plan
        self._streams = streams
        self._parser = plan.reading.make_parser() if plan.reading is not None else None
        self._num_output = 0
        self._watches = reasoning_watches(state, plan)
        self._events: list[bytes] = []
        self._num_events = 0
        # The items so far; the last one grows while it has pieces.
        self._output: list[Json] = []
        self._pieces: list[str] | None = None
        self._logprobs = None if plan.logprobs is None else _Logprobs(state, plan)
        self._end: Delta | None = None

    def whole(self, deltas: list[Delta]) -> Json:
        """The Response; one delta."""
        self._read(deltas[0])
        return self._finished(self._end)

    def opening(self) -> bytes:
        """Two events before any output."""
        response = self._response("in_progress")
        self._tell("response.created", response=response)
        self._tell("response.in_progress", response=response)
        return self._told()

    def delta(self, index: int, delta: Delta) -> bytes:
        """The events of one delta; nothing for tokens whose text is held back. Raises ApiError for a failed one."""
        if delta.finish_reason is not None:
            self.num_running -= 1
            if delta.finish_reason is FinishReason.ERROR:
                raise failure(delta)
        self._read(delta)
        return self._told()

    def closing(self) -> bytes:
        """The event that has all of it."""
        response = self._finished(self._end)
        self._tell(f"response.{response['status']}", response=response)
        return self._told()

    def error(self, error: RequestError) -> bytes:
        """A failed response is one, too: with what it has, and why there is no more."""
        self._close("incomplete")
        response = self._kept(self._response("failed", error))
        self._tell("response.failed", response=response)
        return self._told()

    def current(self, status: str) -> Json:
        """The Response of one that is under way, "queued" or "in_progress"."""
        return self._response(status)

    def cancelled(self) -> bytes:
        """The event of one that was cancelled, with what it has."""
        self._close("incomplete")
        response = self._kept(self._response("cancelled"))
        # There is no event of that name: clients read the status.
        self._tell("response.incomplete", response=response)
        return self._told()

    # ---- the items

    def _read(self, delta: Delta) -> None:
        self._num_output += len(delta.token_ids)
        for watch in self._watches:
            watch.follow(delta.token_ids)
        if self._logprobs is None:
            self._push(delta.text)
        else:
            # Token by token, for an answer must not depend on how tokens come.
            for piece in self._logprobs.pieces(delta):
                self._push(piece)
        if delta.finish_reason is None:
            return
        self._end = delta
        for event in finish_events(self._parser, delta) if self._parser is not None else ():
            self._add(event)
        if not self._output:
            self._add(ContentDelta(""))
        self._close("completed" if delta.finish_reason is FinishReason.STOP else "incomplete")

    def _push(self, text: str) -> None:
        if not text:
            return
        events = self._parser.push(text) if self._parser is not None else [ContentDelta(text)]
        for event in events:
            self._add(event)
        if self._logprobs is not None and events:
            self._logprobs.forget()

    def _add(self, event: Event) -> None:
        """What one event of the parser adds."""
        if isinstance(event, ToolCallStart):
            kind = "custom_tool_call" if event.custom else "function_call"
            if self._asked.searches and event.name == SEARCH:
                # An item that comes whole: its arguments are an object.
                self._open("tool_search_call", call_id=event.id, execution="client", arguments={})
            else:
                self._open(kind, call_id=event.id, **self._name(event.name), **{_CALLS[kind]: ""})
            return
        if isinstance(event, ContentDelta):
            kind = "message"
            if self._kind != kind:
                self._open(kind, role="assistant", content=[])
        elif isinstance(event, ReasoningDelta):
            kind = "reasoning"
            if self._kind != kind:
                self._open(kind, summary=[], content=[])
        else:
            kind = self._kind
        if not event.text:
            return
        assert self._pieces is not None
        self._pieces.append(event.text)
        if kind == "tool_search_call":
            return
        if kind in _CALLS:
            self._tell_item(f"{_EVENTS_OF_CALLS[kind]}.delta", delta=event.text)
        elif kind == "reasoning":
            self._tell_item("response.reasoning_text.delta", content_index=0, delta=event.text)
        else:
            logprobs = [] if self._logprobs is None else self._logprobs.take(event.text)
            self._tell_item("response.output_text.delta", content_index=0, delta=event.text, logprobs=logprobs)

    def _name(self, name: str) -> Json:
        """What a call names: a function of a namespace has the two apart."""
        origins = {} if self._plan.reading is None else self._plan.reading.origins
        if name not in origins:
            return {"name": name}
        namespace, inner = origins[name]
        return {"name": inner, "namespace": namespace}

    @property
    def _kind(self) -> str:
        """Of the item that grows."""
        return "" if self._pieces is None else self._output[-1]["type"]

    def _open(self, kind: str, **fields: Any) -> None:
        self._close("completed")
        place = len(self._output)
        # Unique, as the response's own id is.
        name = f"{_PREFIXES[kind]}_{self._plan.id.removeprefix('resp_')}{place:02x}"
        self._output.append({"id": name, "type": kind, "status": "in_progress", **fields})
        self._pieces = []
        self._tell("response.output_item.added", output_index=place, item=self._output[-1])
        if kind in _TEXTS:
            self._tell_item("response.content_part.added", content_index=0, part=_part(kind, ""))

    def _close(self, status: str) -> None:
        """The item that grows is done."""
        if self._pieces is None:
            return
        kind, item, text = self._kind, self._output[-1], "".join(self._pieces)
        if kind in _CALLS:
            item[_CALLS[kind]] = text
            named = {"name": item["name"]} if kind == "function_call" else {}
            self._tell_item(f"{_EVENTS_OF_CALLS[kind]}.done", **named, **{_CALLS[kind]: text})
        elif kind == "tool_search_call":
            item["arguments"] = arguments_object(text)
        else:
            part = _part(kind, text)
            if kind == "message":
                part["logprobs"] = [] if self._logprobs is None else self._logprobs.of_part()
                self._tell_item("response.output_text.done", content_index=0, text=text, logprobs=part["logprobs"])
            else:
                self._tell_item("response.reasoning_text.done", content_index=0, text=text)
            item["content"] = [part]
            self._tell_item("response.content_part.done", content_index=0, part=part)
        item["status"] = status
        self._tell("response.output_item.done", output_index=len(self._output) - 1, item=item)
        self._pieces = None

    # ---- the response

    def _finished(self, end: Delta | None) -> Json:
        assert end is not None and end.finish_reason is not None
        if end.finish_reason is FinishReason.ABORT:
            return self._kept(self._response("failed", ApiError(503, "The request was aborted.")))
        status = "incomplete" if end.finish_reason is FinishReason.LENGTH else "completed"
        # Where the pages are is for who asks now, and no part of what is kept.
        return self._kept(self._response(status)) | kept_pages(self._streams)

    def _kept(self, response: Json) -> Json:
        if self._asked.owner is not None:
            self._state.responses.put(self._asked.owner, response, self._asked.items)
        return response

    def _response(self, status: str, error: RequestError | None = None) -> Json:
        """The Response object. error: why it failed."""
        plan, sampling = self._plan, self._plan.requests[0].sampling
        why = None
        if error is not None:
            why = {"code": "server_error" if error.status >= 500 else "invalid_prompt", "message": str(error)}
        return {
            "id": plan.id,
            "object": "response",
            "created_at": plan.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": self._asked.background,
            "error": why,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": plan.model,
            "output": self._output,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "usage": None if status in ("queued", "in_progress") else self._usage(),
            **self._asked.fields,
        }

    def _usage(self) -> Json:
        counts: Json = usage(self._plan, self._streams, self._num_output, self._watches)
        return {
            "input_tokens": counts["prompt_tokens"],
            # Nothing is charged for what is written to the cache.
            "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": counts["completion_tokens_details"]["reasoning_tokens"]},
            "total_tokens": counts["total_tokens"],
        }

    # ---- events

    def _tell(self, kind: str, **fields: Any) -> None:
        if self._plan.stream:
            data = orjson.dumps({"type": kind, "sequence_number": self._num_events, **fields})
            self._events.append(b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n")
            self._num_events += 1

    def _tell_item(self, kind: str, **fields: Any) -> None:
        """An event of the item that grows."""
        self._tell(kind, item_id=self._output[-1]["id"], output_index=len(self._output) - 1, **fields)

    def _told(self) -> bytes:
        data = b"".join(self._events)
        self._events.clear()
        return data


def _part(kind: str, text: str) -> Json:
    part: Json = {"type": _TEXTS[kind], "text": text}
    return part | {"annotations": [], "logprobs": []} if kind == "message" else part


class _Logprobs:
    """Which tokens spell the text of the message: those of reasoning and of calls are not shown."""

    def __init__(self, state: State, plan: Plan) -> None:
        request = plan.requests[0]
        self._spelling = Spelling(state.engine.tokenizer, plan.tokens_as_ids)
        self._detokenizer = IncrementalDetokenizer(state.tokenizer, request.prompt_token_ids, request.sampling)
        # Tokens that no event of the parser stands for yet, each with the length of what it added to the text.
        self._waiting: list[tuple[TokenLogprob, int]] = []
        self._of_part: list[Json] = []

    def pieces(self, delta: Delta) -> Iterator[str]:
        """The delta's text as its tokens spell it."""
        length = 0
        for entry in delta.logprobs:
            piece = self._detokenizer.push([entry.token_id])
            self._waiting.append((entry, len(piece)))
            length += len(piece)
            yield piece
        # What had been held back.
        yield delta.text[length:]

    def take(self, text: str) -> list[Json]:
        """The last tokens, as many as it takes to spell the text; the ones before them spell tags."""
        start, missing = len(self._waiting), len(text)
        while start and (missing > 0 or not self._waiting[start - 1][1]):
            start -= 1
            missing -= self._waiting[start][1]
        entries = [entry for entry, _ in self._waiting[start:]]
        self._waiting.clear()
        found: Any = chat_logprobs(entries, self._spelling)["content"]
        self._of_part += found
        return list(found)

    def forget(self) -> None:
        """What has not been taken spells something else."""
        self._waiting.clear()

    def of_part(self) -> list[Json]:
        """All that were taken for the message that ends here."""
        found, self._of_part = self._of_part, []
        return found
