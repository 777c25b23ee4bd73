"""The answer of Ollama's /api/chat and /api/generate: one object, or a line of JSON for each piece of a stream."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import orjson

from engine.request import FinishReason, RequestError
from engine.stream import Delta, TokenStream
from server.answers.base import arguments_object, raise_cut
from server.logprobs import Spelling, chat_logprobs
from server.messages import read_events
from server.parsers.base import ContentDelta, Event, ReasoningDelta, ToolCallStart
from server.protocol.generation import Plan
from server.protocol.ollama import Wanted, error_body
from server.sse import EVENT_HEADERS, Json
from server.state import State


def iso_time(seconds: float) -> str:
    """Unix seconds as Ollama writes times."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


class OllamaAnswer:
    """One answer, of one choice; see answers/base.py."""

    headers = EVENT_HEADERS | {"Content-Type": "application/x-ndjson"}
    # Lines of JSON have no comments.
    keep_alive = b""

    def __init__(self, state: State, plan: Plan, streams: list[TokenStream], *, wanted: Wanted) -> None:
        [self._stream] = streams
        self.num_running = 1
        self._plan = plan
        self._wanted = wanted
        # A call comes whole or not at all, as it does from Ollama.
        self._parser = plan.reading.make_parser(buffer_calls=True) if plan.reading is not None else None
        self._spelling = Spelling(state.engine.tokenizer, plan.tokens_as_ids)
        self._num_output = 0
        self._done_reason = ""

    def whole(self, deltas: list[Delta]) -> Json:
        """All in one object."""
        [delta] = deltas
        said = self._said(delta)
        return said | self._end()

    def opening(self) -> bytes:
        """Nothing goes before the first token."""
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        """A line of what came, if anything did; raises ApiError for a request that failed or was aborted."""
        if delta.finish_reason is not None:
            self.num_running = 0
        said = self._said(delta)
        message = said.get("message", said)
        assert isinstance(message, dict)
        if not any(message.get(name) for name in ("content", "response", "thinking", "tool_calls")) and (
            "logprobs" not in said
        ):
            return b""
        return orjson.dumps(said | {"done": False}) + b"\n"

    def closing(self) -> bytes:
        """The line that says why it ended and what it took."""
        return orjson.dumps(self._piece([]) | self._end()) + b"\n"

    def error(self, error: RequestError) -> bytes:
        """An error after the headers have gone out, and the end of the stream."""
        return orjson.dumps(error_body(error, None)) + b"\n"

    def _said(self, delta: Delta) -> Json:
        """What a delta means. The last one is remembered for the end."""
        self._num_output += len(delta.token_ids)
        if delta.finish_reason is not None:
            raise_cut(delta)
            self._done_reason = "length" if delta.finish_reason is FinishReason.LENGTH else "stop"
        said = self._piece(read_events(self._parser, delta))
        if self._plan.logprobs is not None and delta.logprobs:
            said["logprobs"] = chat_logprobs(delta.logprobs, self._spelling)["content"]
        return said

    def _piece(self, events: list[Event]) -> Json:
        """Events as one object of the family."""
        text = thinking = ""
        calls: list[dict[str, Any]] = []
        for event in events:
            if isinstance(event, ContentDelta):
                text += event.text
            elif isinstance(event, ReasoningDelta):
                thinking += event.text
            elif isinstance(event, ToolCallStart):
                function = {"index": event.index, "name": event.name, "arguments": ""}
                calls.append({"id": event.id, "function": function})
            else:
                calls[-1]["function"]["arguments"] += event.text
        for call in calls:
            call["function"]["arguments"] = arguments_object(call["function"]["arguments"])
        head: Json = {
            "model": self._wanted.model,
            "created_at": iso_time(time.time()),
        }
        extra: Json = {"thinking": thinking} if thinking else {}
        if not self._wanted.chat:
            return head | {"response": text} | extra
        message: Json = {"role": "assistant", "content": text} | extra
        return head | {"message": message | ({"tool_calls": calls} if calls else {})}

    def _end(self) -> Json:
        """Times in nanoseconds, which add up: until the request was queued, to its first token, and to its last."""
        stream, started = self._stream, self._wanted.started_at
        assert stream.first_token_at is not None and stream.finished_at is not None
        return {
            "done": True,
            "done_reason": self._done_reason,
            "total_duration": nanoseconds(stream.finished_at - started),
            "load_duration": nanoseconds(stream.arrived_at - started),
            "prompt_eval_count": stream.num_prompt_tokens,
            "prompt_eval_duration": nanoseconds(stream.first_token_at - stream.arrived_at),
            "eval_count": self._num_output,
            "eval_duration": nanoseconds(stream.finished_at - stream.first_token_at),
        }


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
