"""The answer of vLLM's /inference/v1/generate: token ids, no text; in a stream each event has what is new."""

from __future__ import annotations

import orjson

from engine.request import FinishReason, RequestError
from engine.stream import Delta, TokenLogprob, TokenStream
from server.answers.base import failure, kept_pages, usage, weight_versions
from server.logprobs import LOWEST, Spelling, vllm_prompt_logprobs
from server.protocol.generation import Plan
from server.sse import DONE, EVENT_HEADERS, KEEP_ALIVE, Json, error_event
from server.state import State


class TokensAnswer:
    """One answer; see answers/base.py. request_id: what the client calls it, or our id."""

    headers = EVENT_HEADERS
    keep_alive = KEEP_ALIVE
    tells_aborts = True

    def __init__(self, state: State, plan: Plan, streams: list[TokenStream], *, request_id: str) -> None:
        self.num_running = len(streams)
        self._plan = plan
        self._streams = streams
        self._request_id = request_id
        self._spelling = Spelling(state.engine.tokenizer, plan.tokens_as_ids)
        # Of each choice so far.
        self._counts = [0] * len(streams)

    def whole(self, deltas: list[Delta]) -> Json:
        """The body of an answer that is not streamed."""
        answer = self._event([self._choice(index, delta) for index, delta in enumerate(deltas)])
        if self._plan.prompt_logprobs is not None:
            entries = self._streams[0].prompt_logprobs
            answer["prompt_logprobs"] = vllm_prompt_logprobs(entries, self._plan.prompt_logprobs, self._spelling)
        return answer | {"usage": self._usage()} | kept_pages(self._streams)

    def opening(self) -> bytes:
        """Nothing goes before the first token."""
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        """What is new of one choice. Raises ApiError for a failed one."""
        if delta.finish_reason is not None:
            self.num_running -= 1
            if delta.finish_reason is FinishReason.ERROR:
                raise failure(delta)
        elif not delta.token_ids:
            return b""
        event = self._event([self._choice(index, delta)])
        if self._plan.continuous_usage:
            event["usage"] = self._usage()
        if delta.finish_reason is not None:
            event |= kept_pages([self._streams[index]])
        return _written(event)

    def closing(self) -> bytes:
        """The usage, where it was asked for, and the terminator."""
        return (_written(self._event([]) | {"usage": self._usage()}) if self._plan.include_usage else b"") + DONE

    def error(self, error: RequestError) -> bytes:
        """An error after the headers have gone out, and the end of the stream."""
        return error_event(error)

    def _event(self, choices: list[Json]) -> Json:
        return {"request_id": self._request_id, "choices": choices}

    def _choice(self, index: int, delta: Delta) -> Json:
        self._counts[index] += len(delta.token_ids)
        choice: Json = {
            "index": index,
            "token_ids": delta.token_ids,
            "logprobs": None if self._plan.logprobs is None else {"content": list(map(self._entry, delta.logprobs))},
            "finish_reason": None if delta.finish_reason is None else delta.finish_reason.value,
        }
        if delta.finish_reason is not None:
            choice |= {"stop_reason": delta.stop_reason} | weight_versions(self._streams[index], self._counts[index])
        return choice

    def _entry(self, entry: TokenLogprob) -> Json:
        wanted = self._plan.logprobs or 0
        top = [self._token(*pair, rank) for rank, pair in enumerate(entry.top[:wanted], 1)]
        return self._token(entry.token_id, entry.logprob, entry.rank) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float, rank: int) -> Json:
        return {
            "token": self._spelling.text(token_id),
            "token_id": token_id,
            "logprob": max(logprob, LOWEST),
            "rank": rank,
        }

    def _usage(self) -> Json:
        return usage(self._plan, self._streams, sum(self._counts), [])


def _written(event: Json) -> bytes:
    return b"data: " + orjson.dumps(event) + b"\n\n"
