"""The answer of SGLang's /generate: text, ids and `meta_info`; in a stream each event has all that came so far."""

from __future__ import annotations

import orjson

from engine.request import FinishReason, RequestError
from engine.stream import Delta, TokenLogprob, TokenStream
from server.answers.base import failure, kept_pages, weight_versions
from server.logprobs import LOWEST, Spelling
from server.protocol.generation import Plan
from server.protocol.sglang import Wanted
from server.sse import DONE, EVENT_HEADERS, Json, error_event
from server.state import State


class SGLangAnswer:
    """One answer; see answers/base.py."""

    headers = EVENT_HEADERS
    tells_aborts = True
    # Its benchmark reads every line as JSON.
    keep_alive = b""

    def __init__(self, state: State, plan: Plan, streams: list[TokenStream], *, wanted: Wanted) -> None:
        self.num_running = len(streams)
        self._plan = plan
        self._streams = streams
        self._wanted = wanted
        self._eos_token_ids = state.engine.eos_token_ids
        self._spelling = Spelling(state.engine.tokenizer if wanted.with_text else None, False)
        # What came so far, and its log-probabilities as they are shown.
        self._so_far = [Delta() for _ in streams]
        self._shown: dict[int, dict[str, list[object]]] = {}

    def whole(self, deltas: list[Delta]) -> Json | list[Json]:
        """One object, or a list of them: all choices of the first prompt first."""
        answers = [self._add(index, delta) for index, delta in enumerate(deltas)]
        return answers if self._wanted.is_list else answers[0]

    def opening(self) -> bytes:
        """Nothing goes before the first token."""
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        """Everything of one request so far. Raises ApiError for a failed one."""
        if delta.finish_reason is not None:
            self.num_running -= 1
            if delta.finish_reason is FinishReason.ERROR:
                raise failure(delta)
        answer = self._add(index, delta)
        if self._wanted.is_list:
            answer["index"] = index
        return b"data: " + orjson.dumps(answer) + b"\n\n"

    def closing(self) -> bytes:
        """The terminator."""
        return DONE

    def error(self, error: RequestError) -> bytes:
        """An error after the headers have gone out, and the end of the stream."""
        return error_event(error)

    def _add(self, index: int, added: Delta) -> Json:
        """What one request has come to with a delta more."""
        request, stream, delta = self._plan.requests[index], self._streams[index], self._so_far[index]
        delta.merge(added)
        rid = self._wanted.rids[index]
        meta: Json = {
            "id": request.request_id if rid is None else rid,
            "finish_reason": self._finish_reason(delta),
            "prompt_tokens": stream.num_prompt_tokens,
            "completion_tokens": len(delta.token_ids),
            "cached_tokens": stream.num_cached_tokens,
        }
        if delta.finish_reason is not None and (spans := weight_versions(stream, len(delta.token_ids))):
            meta |= {"weight_version": stream.versions[-1][0], **spans}
        if stream.finished_at is not None and delta.finish_reason is not None:
            meta["e2e_latency"] = stream.finished_at - stream.arrived_at
        drafted, accepted, steps = stream.draft_counts
        if steps and delta.finish_reason is not None:
            meta |= {
                "spec_verify_ct": steps,
                "spec_accept_rate": accepted / drafted,
                "spec_accept_length": 1 + accepted / steps,
                "spec_num_correct_drafts": accepted,
                "spec_num_proposed_drafts": drafted,
            }
        if (top := request.sampling.logprobs) is not None:
            if index not in self._shown:
                self._shown[index] = self._of_prompt(index, top)
            shown = self._shown[index]
            shown["output_token_logprobs"] += map(self._own, added.logprobs)
            if top:
                shown["output_top_logprobs"] += (self._top(entry, top) for entry in added.logprobs)
            meta |= shown
        answer: Json = {"text": delta.text, "output_ids": delta.token_ids, "meta_info": meta}
        if delta.finish_reason is not None:
            answer |= kept_pages([stream])
        return answer

    def _of_prompt(self, index: int, top: int) -> dict[str, list[object]]:
        """The lists of one request's log-probabilities, with those of its prompt."""
        start, ids = self._wanted.starts[index], self._plan.requests[index].prompt_token_ids
        own = self._streams[index].prompt_logprobs
        # Of choices that are not streamed the first has them for all.
        entries = own or self._streams[index - index % self._plan.num_candidates].prompt_logprobs or []
        # The first token has nothing before it, and SGLang shows none for the first of a later start either.
        firsts = ids[start : start + 1]
        shown: dict[str, list[object]] = {
            "input_token_logprobs": [[None, first, self._text(first)] for first in firsts],
            "output_token_logprobs": [],
        }
        shown["input_token_logprobs"] += map(self._own, entries[start:])
        if top:
            tops: list[object] = [self._top(entry, top) for entry in entries[start:]]
            shown |= {"input_top_logprobs": [None] * len(firsts) + tops, "output_top_logprobs": []}
        return shown

    def _finish_reason(self, delta: Delta) -> Json | None:
        if delta.finish_reason is None:
            return None
        if delta.finish_reason is FinishReason.LENGTH:
            return {"type": "length", "length": len(delta.token_ids)}
        if delta.finish_reason is FinishReason.ABORT:
            # Who resubmits what came so far looks at how this begins.
            message = "The request was aborted." if delta.token_ids else "Abort before prefill: no token was computed."
            return {"type": "abort", "message": message}
        matched = delta.stop_reason
        if matched is None and delta.token_ids and delta.token_ids[-1] in self._eos_token_ids:
            matched = delta.token_ids[-1]
        return {"type": "stop", "matched": matched}

    def _own(self, entry: TokenLogprob) -> list[object]:
        return [max(entry.logprob, LOWEST), entry.token_id, self._text(entry.token_id)]

    def _top(self, entry: TokenLogprob, wanted: int) -> list[list[object]]:
        return [[max(logprob, LOWEST), token_id, self._text(token_id)] for token_id, logprob in entry.top[:wanted]]

    def _text(self, token_id: int) -> str | None:
        return self._spelling.text(token_id) if self._wanted.with_text else None
