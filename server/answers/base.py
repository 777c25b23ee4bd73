"""What an API family has to say for itself: a Plan's tokens as one body, or as a stream of bytes.

The responder runs the plan and owns the connection; an Answer is made for one request, is asked on the loop thread,
and does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import orjson

from engine.request import FinishReason, RequestError
from engine.stream import Delta, TokenStream
from server.protocol.errors import ApiError
from server.protocol.generation import Plan
from server.protocol.thinking import ReasoningWatch
from server.sse import Json
from server.state import State


class Answer(Protocol):
    """headers: of a stream. keep_alive: bytes that mean nothing, sent while a stream is silent; empty for none.

    num_running: streams whose last delta has not been written; `delta` counts it down.
    """

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def keep_alive(self) -> bytes: ...

    num_running: int

    def whole(self, deltas: list[Delta]) -> Json | list[Json]:
        """The body of an answer that is not streamed; one delta for each request of the plan. Raises ApiError."""
        ...

    def opening(self) -> bytes:
        """What a stream begins with, before any delta."""
        ...

    def delta(self, index: int, delta: Delta) -> bytes:
        """What one delta of request `index` brings; may be nothing. Raises ApiError for a failed one."""
        ...

    def closing(self) -> bytes:
        """What a stream ends with, after the last delta of the last request."""
        ...

    def error(self, error: RequestError) -> bytes:
        """The end of a stream that cannot go on."""
        ...


MakeAnswer = Callable[[State, Plan, list[TokenStream]], Answer]


def reasoning_watches(state: State, plan: Plan) -> list[ReasoningWatch]:
    """One for each of the plan's streams, where there may be reasoning to count."""
    if plan.reading is None:
        return []
    watches = (plan.reading.make_watch(state.engine.tokenizer) for _ in plan.requests)
    return [watch for watch in watches if watch is not None]


def usage(plan: Plan, streams: list[TokenStream], num_output: int, watches: list[ReasoningWatch]) -> Json:
    """A prompt counts once, however many choices it has; what its first choice found in the cache is its share."""
    firsts = streams[:: plan.num_candidates]
    num_prompt = sum(stream.num_prompt_tokens for stream in firsts)
    counts: Json = {
        **plain_usage(num_prompt, num_output),
        "prompt_tokens_details": {"cached_tokens": sum(stream.num_cached_tokens for stream in firsts)},
    }
    if plan.chat:
        details = {"reasoning_tokens": sum(watch.num_tokens for watch in watches)}
        drafted, accepted = (sum(stream.draft_counts[which] for stream in streams) for which in (0, 1))
        if drafted or plan.requests[0].prediction is not None:
            details |= {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
        counts["completion_tokens_details"] = details
    return counts


def plain_usage(num_prompt: int, num_output: int | None = None) -> dict[str, int]:
    """OpenAI's counts of what was read and written; num_output None: nothing could have been."""
    written = {} if num_output is None else {"completion_tokens": num_output}
    return {"prompt_tokens": num_prompt, **written, "total_tokens": num_prompt + (num_output or 0)}


def weight_versions(stream: TokenStream, num_output: int) -> Json:
    """vLLM's spans of a choice's tokens by the weights that they came from, of an answer that is complete; nothing
    where the weights are those of the start."""
    if not stream.versions or [name for name, _ in stream.versions] == ["default"]:
        return {}
    spans: list[Json] = []
    start = 0
    for name, end in stream.versions:
        end = min(end, num_output)
        if end > start or (not spans and (name, end) == (stream.versions[-1][0], 0)):
            spans.append({"version": name, "start": start, "end": end})
            start = end
    return {"weight_versions": spans}


def failure(delta: Delta) -> ApiError:
    """The error of a delta whose finish reason is ERROR."""
    return ApiError(delta.status, delta.error or "The model failed to compute this request.")


def arguments_object(text: str) -> Json:
    """A call's arguments for clients that want an object; of one that was cut off, its text under Anthropic's key."""
    try:
        value = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": text}


def raise_cut(delta: Delta) -> None:
    """Raise for an end that a family has no word for: a failed request's, and that of one which was aborted."""
    if delta.finish_reason is FinishReason.ERROR:
        raise failure(delta)
    if delta.finish_reason is FinishReason.ABORT:
        raise ApiError(503, "The request was aborted before its end.")


def raise_early(delta: Delta) -> None:
    """Raise what can still be an HTTP error."""
    if delta.finish_reason is FinishReason.ERROR:
        raise failure(delta)
    if delta.finish_reason is FinishReason.ABORT and not delta.token_ids:
        raise ApiError(503, "The request was aborted before its first token.")


def kept_pages(streams: Sequence[TokenStream]) -> Json:
    """What the prefill's answer tells the server that goes on: vLLM's field, where pages are kept for one."""
    kept = next((one.kv_transfer_params for one in streams if one.kv_transfer_params is not None), None)
    return {} if kept is None else {"kv_transfer_params": kept}
