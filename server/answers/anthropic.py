"""The answer of /v1/messages: content blocks, and the named events that build them up in a stream."""

from __future__ import annotations

from typing import Any

import orjson

from engine.request import FinishReason, RequestError
from engine.stream import Delta, TokenStream
from server.answers.base import arguments_object, kept_pages, raise_cut
from server.messages import read_events
from server.parsers.base import ContentDelta, Event, ReasoningDelta, ToolCallStart
from server.protocol.anthropic import Wanted, error_body
from server.protocol.generation import Plan
from server.sse import EVENT_HEADERS, Json
from server.state import State

# Proves to Anthropic that it has written a thought; there is nothing to prove here. Not empty: clients throw away
# thoughts without one before the next turn.
SIGNATURE = "b25lbG9vcA=="


def _event(fields: Json) -> bytes:
    return b"event: " + str(fields["type"]).encode() + b"\ndata: " + orjson.dumps(fields) + b"\n\n"


class AnthropicAnswer:
    """One answer, of one choice; see answers/base.py."""

    headers = EVENT_HEADERS
    keep_alive = _event({"type": "ping"})

    def __init__(self, state: State, plan: Plan, streams: list[TokenStream], *, wanted: Wanted) -> None:
        [self._stream] = streams
        self.num_running = 1
        self._plan = plan
        self._wanted = wanted
        self._parser = plan.reading.make_parser() if plan.reading is not None else None
        # The block that is open in the stream: its kind and its index.
        self._open: type[Event] | None = None
        self._index = -1
        self._num_output = 0
        self._ending: Json = {}

    def whole(self, deltas: list[Delta]) -> Json:
        """The message as one object."""
        [delta] = deltas
        raise_cut(delta)
        blocks: list[dict[str, Any]] = []
        kind: type[Event] | None = None
        for event in read_events(self._parser, delta):
            if (begun := _block(event, kind)) is not None:
                blocks.append(begun)
                kind = type(event)
            if isinstance(event, ContentDelta):
                blocks[-1]["text"] += event.text
            elif isinstance(event, ReasoningDelta):
                blocks[-1]["thinking"] += event.text if self._wanted.shows_thinking else ""
            elif not isinstance(event, ToolCallStart):
                blocks[-1]["input"] += event.text
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = arguments_object(block["input"])
            elif block["type"] == "thinking":
                block["signature"] = SIGNATURE
        self._num_output = len(delta.token_ids)
        return self._message(blocks) | self._end(delta) | kept_pages([self._stream])

    def opening(self) -> bytes:
        """The message without content."""
        message = self._message([]) | {"stop_reason": None, "stop_sequence": None}
        return _event({"type": "message_start", "message": message})

    def delta(self, index: int, delta: Delta) -> bytes:
        """Events of what came; raises ApiError for a request that failed or was aborted."""
        self._num_output += len(delta.token_ids)
        if delta.finish_reason is not None:
            raise_cut(delta)
            self.num_running = 0
        data = b"".join(map(self._piece, read_events(self._parser, delta)))
        if delta.finish_reason is not None:
            self._ending = self._end(delta)
        return data

    def closing(self) -> bytes:
        """Why it ended and what it took."""
        ending: Json = {"type": "message_delta", "delta": self._ending, "usage": self._usage()}
        ending |= kept_pages([self._stream])
        return self._stop() + _event(ending) + _event({"type": "message_stop"})

    def error(self, error: RequestError) -> bytes:
        """An error after the headers have gone out, and the end of the stream."""
        return _event(error_body(error, self._plan.id))

    def _message(self, content: list[dict[str, Any]]) -> Json:
        return {
            "id": self._plan.id,
            "type": "message",
            "role": "assistant",
            "model": self._plan.model,
            "content": content,
            "usage": self._usage(),
        }

    def _usage(self) -> Json:
        """What is taken from the cache is no input here; entries of the cache cost nothing to make."""
        cached = self._stream.num_cached_tokens
        return {
            "input_tokens": self._stream.num_prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self._num_output,
        }

    def _end(self, delta: Delta) -> Json:
        sequence = delta.stop_reason if isinstance(delta.stop_reason, str) else None
        if delta.finish_reason is FinishReason.LENGTH:
            in_full = self._num_output >= self._wanted.max_tokens
            reason = "max_tokens" if in_full else "model_context_window_exceeded"
        elif sequence is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if self._parser is not None and self._parser.num_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _piece(self, event: Event) -> bytes:
        """An event of ours as theirs; a new block where its kind is another or a new call begins."""
        data = b""
        if (begun := _block(event, self._open)) is not None:
            data = self._stop()
            self._open = type(event)
            self._index += 1
            if isinstance(event, ToolCallStart):
                begun["input"] = {}
            data += _event({"type": "content_block_start", "index": self._index, "content_block": begun})
        piece: Json
        if isinstance(event, ToolCallStart) or (isinstance(event, ReasoningDelta) and not self._wanted.shows_thinking):
            return data
        if isinstance(event, ContentDelta):
            piece = {"type": "text_delta", "text": event.text}
        elif isinstance(event, ReasoningDelta):
            piece = {"type": "thinking_delta", "thinking": event.text}
        else:
            piece = {"type": "input_json_delta", "partial_json": event.text}
        return data + _event({"type": "content_block_delta", "index": self._index, "delta": piece})

    def _stop(self) -> bytes:
        """The end of the open block, if there is one."""
        if self._open is None:
            return b""
        signed = b""
        if self._open is ReasoningDelta:
            piece = {"type": "signature_delta", "signature": SIGNATURE}
            signed = _event({"type": "content_block_delta", "index": self._index, "delta": piece})
        self._open = None
        return signed + _event({"type": "content_block_stop", "index": self._index})


def _block(event: Event, after: type[Event] | None) -> dict[str, Any] | None:
    """The empty block that an event begins; None where it goes on with the one of the kind before."""
    if isinstance(event, ToolCallStart):
        return {"type": "tool_use", "id": event.id, "name": event.name, "input": ""}
    if isinstance(event, ContentDelta) and after is not ContentDelta:
        return {"type": "text", "text": ""}
    if isinstance(event, ReasoningDelta) and after is not ReasoningDelta:
        # In a stream the signature follows the text.
        return {"type": "thinking", "thinking": "", "signature": ""}
    return None
