"""The answer of llama.cpp's /completion and /infill: one object, a list of them, or an event for each piece of a
stream."""

from __future__ import annotations

import orjson

from engine.request import FinishReason, RequestError, SamplingParams
from engine.stream import Delta, TokenLogprob, TokenStream
from server.answers.base import failure, raise_cut
from server.logprobs import LOWEST, Spelling
from server.protocol.errors import error_body
from server.protocol.generation import Plan
from server.protocol.llamacpp import Wanted
from server.sse import EVENT_HEADERS, Json
from server.state import State

_ABSENT = object()


def settings_of(sampling: SamplingParams, *, no_output: bool = False) -> Json:
    """What is sampled by, under llama.cpp's names; -1 is no limit there. no_output: nothing of it is shown."""
    most = -1 if sampling.max_tokens is None else sampling.max_tokens
    return {
        "n_predict": 0 if no_output else most,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": list(sampling.stop),
    }


class NativeAnswer:
    """One answer; see answers/base.py."""

    headers = EVENT_HEADERS
    # Its clients read every line as an event.
    keep_alive = b""

    def __init__(self, state: State, plan: Plan, streams: list[TokenStream], *, wanted: Wanted) -> None:
        self.num_running = len(streams)
        self._state = state
        self._plan = plan
        self._streams = streams
        self._wanted = wanted
        self._spelling = Spelling(state.engine.tokenizer, plan.tokens_as_ids)
        self._num_output = [0] * len(streams)
        self._has_line = [False] * len(streams)

    def whole(self, deltas: list[Delta]) -> Json | list[Json]:
        """One object, or one for each prompt."""
        answers = [
            self._picked(self._count(index, delta) | self._said(delta) | self._end(index, delta))
            for index, delta in enumerate(deltas)
        ]
        return answers if self._wanted.is_list else answers[0]

    def opening(self) -> bytes:
        """Nothing goes before the first token."""
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        """What came, and an event of its own for the end. Raises ApiError for a failed one."""
        counted = self._count(index, delta)
        data = b""
        if delta.text or delta.logprobs or (self._wanted.with_tokens and delta.token_ids):
            piece = counted | self._said(delta) | {"stop": False}
            if self._wanted.each_timed:
                piece["timings"] = self._timings(index)
            data = _event(piece)
        if delta.finish_reason is not None:
            self.num_running -= 1
            data += _event(self._picked(counted | {"content": "", "tokens": []} | self._end(index, delta)))
        return data

    def closing(self) -> bytes:
        """The last event has said it all."""
        return b""

    def error(self, error: RequestError) -> bytes:
        """An error after the headers have gone out, and the end of the stream."""
        return _event(error_body(error))

    def _count(self, index: int, delta: Delta) -> Json:
        """Count a delta in; what every object says of its request."""
        if delta.finish_reason is FinishReason.ERROR:
            raise failure(delta)
        self._num_output[index] += len(delta.token_ids)
        self._has_line[index] |= "\n" in delta.text
        return {
            "index": index,
            "id_slot": -1,
            "tokens_predicted": self._num_output[index],
            "tokens_evaluated": self._streams[index].num_prompt_tokens,
        }

    def _picked(self, answer: Json) -> Json:
        """What the client wants to be told, by paths; what lies deeper is lifted out under its whole path."""
        if not self._wanted.fields:
            return answer
        picked: Json = {}
        for path in self._wanted.fields:
            found: object = answer
            for name in path.split("/"):
                found = found.get(name, _ABSENT) if isinstance(found, dict) else _ABSENT
            if found is not _ABSENT:
                picked[path] = found
        return picked

    def _said(self, delta: Delta) -> Json:
        said: Json = {"content": delta.text, "tokens": delta.token_ids if self._wanted.with_tokens else []}
        if self._plan.logprobs is not None:
            said["completion_probabilities"] = [self._probability(entry) for entry in delta.logprobs]
        return said

    def _probability(self, entry: TokenLogprob) -> Json:
        own = self._token(entry.token_id, entry.logprob)
        return own | {"top_logprobs": [self._token(*pair) for pair in entry.top[: self._plan.logprobs]]}

    def _token(self, token_id: int, logprob: float) -> Json:
        spelling = self._spelling
        return {
            "id": token_id,
            "token": spelling.text(token_id),
            "bytes": list(spelling.bytes(token_id)),
            "logprob": max(logprob, LOWEST),
        }

    def _end(self, index: int, delta: Delta) -> Json:
        """Why it ended, what it took, and what it was made by."""
        raise_cut(delta)
        stream, request = self._streams[index], self._plan.requests[index]
        word = delta.stop_reason if isinstance(delta.stop_reason, str) else ""
        kind = "limit" if delta.finish_reason is FinishReason.LENGTH else "word" if word else "eos"
        tokenizer = self._state.engine.tokenizer
        prompt = "" if tokenizer is None else tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        return {
            "model": self._plan.model,
            "stop": True,
            "stop_type": kind,
            "stopping_word": word,
            "generation_settings": settings_of(request.sampling, no_output=self._plan.no_output),
            "prompt": prompt,
            "has_new_line": self._has_line[index],
            "truncated": False,
            "tokens_cached": stream.num_prompt_tokens + self._num_output[index],
            "timings": self._timings(index),
        }

    def _timings(self, index: int) -> Json:
        """In milliseconds: until the first token, which the prompt's is, and from there."""
        stream, num_output = self._streams[index], self._num_output[index]
        now = self._state.engine.clock.now() if stream.finished_at is None else stream.finished_at
        first = now if stream.first_token_at is None else stream.first_token_at
        num_prompt = stream.num_prompt_tokens - stream.num_cached_tokens
        return {
            "cache_n": stream.num_cached_tokens,
            **_rate("prompt", num_prompt, first - stream.arrived_at),
            **_rate("predicted", num_output, now - first),
        }


def _rate(what: str, count: int, seconds: float) -> Json:
    """What took how long; a rate of nothing is none."""
    return {
        f"{what}_n": count,
        f"{what}_ms": seconds * 1e3,
        f"{what}_per_token_ms": seconds * 1e3 / count if count else 0.0,
        f"{what}_per_second": count / seconds if seconds > 0 else 0.0,
    }


def _event(fields: Json) -> bytes:
    return b"data: " + orjson.dumps(fields) + b"\n\n"
