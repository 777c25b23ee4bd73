"""The answers of /v1/chat/completions and /v1/completions, and how a stream of theirs is written."""

from __future__ import annotations

import math
from functools import partial

from engine.request import FinishReason, RequestError
from engine.stream import Delta, TokenStream
from server.answers.base import failure, kept_pages, reasoning_watches, usage, weight_versions
from server.logprobs import Logprobs, Spelling, vllm_prompt_logprobs
from server.messages import delta_of, read_events, read_message
from server.protocol.generation import Plan
from server.sse import DONE, EVENT_HEADERS, KEEP_ALIVE, Chunks, Json, error_event
from server.state import State


class OpenAIAnswer:
    """One answer; see answers/base.py."""

    headers = EVENT_HEADERS
    keep_alive = KEEP_ALIVE

    def __init__(self, state: State, plan: Plan, streams: list[TokenStream]) -> None:
        self.num_running = len(streams)
        self._plan = plan
        self._streams = streams
        self._spelling = spelling = Spelling(state.engine.tokenizer, plan.tokens_as_ids)
        self._chunks = Chunks(plan)
        self._num_output = 0
        self._watches = reasoning_watches(state, plan)
        # Whatever comes beside the text has an event even where the text is held back.
        self._only_text = not plan.return_token_ids and plan.logprobs is None and plan.echoes is None
        # Completions have no role chunk to carry the prompt's ids.
        self._owes_prompt = [plan.return_token_ids and not plan.chat] * len(streams)
        self._echoes: list[str | None] = [None] * len(streams)
        if plan.echoes is not None:
            self._echoes = [echo for echo in plan.echoes for _ in range(plan.num_candidates)]
        self._parsers = [plan.reading.make_parser() for _ in streams] if plan.reading is not None else []
        self._logprobs: list[Logprobs] = []
        if plan.logprobs is not None:
            self._logprobs = [
                Logprobs(plan, request, echo, spelling)
                for request, echo in zip(plan.requests, self._echoes, strict=True)
            ]

    def whole(self, deltas: list[Delta]) -> Json:
        """The body of an answer that is not streamed; one delta for each request of the plan."""
        plan, streams = self._plan, self._streams
        for watch, delta in zip(self._watches, deltas, strict=False):
            watch.follow(delta.token_ids)
        choices: list[Json] = []
        for prompt in range(len(streams) // plan.num_candidates):
            first = prompt * plan.num_candidates
            # The first of a prompt's requests has its log-probabilities, whichever of them are answered with.
            of_prompt = streams[first].prompt_logprobs
            for place in _best(plan, deltas[first : first + plan.num_candidates]):
                request, delta = plan.requests[first + place], deltas[first + place]
                echo = None if plan.echoes is None else plan.echoes[prompt]
                text = (echo or "") + delta.text
                choice: Json = {"index": len(choices)}
                called = False
                if plan.reading is not None:
                    parser = plan.reading.make_parser()
                    choice["message"] = read_message(parser, delta, echo or "")
                    called = parser.num_calls > 0
                elif plan.chat:
                    choice["message"] = {"role": "assistant", "content": text}
                else:
                    choice["text"] = text
                choice["logprobs"] = None
                if plan.logprobs is not None:
                    shape = Logprobs(plan, request, echo, self._spelling)
                    choice["logprobs"] = shape.next(delta, of_prompt)
                choice |= _ending(delta, called)
                choice |= weight_versions(streams[first + place], len(delta.token_ids))
                if plan.return_token_ids:
                    choice["token_ids"] = delta.token_ids
                    if not plan.chat:
                        choice["prompt_token_ids"] = list(request.prompt_token_ids)
                if plan.prompt_logprobs is not None and not plan.chat:
                    choice["prompt_logprobs"] = vllm_prompt_logprobs(of_prompt, plan.prompt_logprobs, self._spelling)
                choices.append(choice)
        answer: Json = {
            "id": plan.id,
            "object": "chat.completion" if plan.chat else "text_completion",
            "created": plan.created,
            "model": plan.model,
            "choices": choices,
            "usage": self._usage(sum(len(delta.token_ids) for delta in deltas)),
        }
        answer |= self._of_prompt() | kept_pages(streams)
        if plan.chat and plan.prompt_logprobs is not None:
            answer["prompt_logprobs"] = vllm_prompt_logprobs(
                streams[0].prompt_logprobs, plan.prompt_logprobs, self._spelling
            )
        return answer

    def _of_prompt(self) -> Json:
        """What a chat's answer shows of its prompt."""
        plan = self._plan
        shown: Json = {}
        if plan.chat and plan.return_token_ids:
            shown["prompt_token_ids"] = list(plan.requests[0].prompt_token_ids)
        if plan.prompt_text is not None:
            shown["prompt_text"] = plan.prompt_text
        return shown

    def opening(self) -> bytes:
        """The role chunk of every choice; completions have none."""
        plan = self._plan
        if not plan.chat:
            return b""
        first = self._of_prompt()
        return b"".join(
            self._chunks.choice(
                {
                    "index": index,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                },
                self._running_usage(),
                **({} if index else first),
            )
            for index in range(len(self._streams))
        )

    def delta(self, index: int, delta: Delta) -> bytes:
        """The event of one delta; nothing for tokens whose text is held back. Raises ApiError for a failed one."""
        self._num_output += len(delta.token_ids)
        if self._watches:
            self._watches[index].follow(delta.token_ids)
        if self._only_text and delta.finish_reason is None and not self._parsers:
            return self._chunks.text(index, delta.text, self._running_usage()) if delta.text else b""
        plan = self._plan
        if delta.finish_reason is not None:
            self.num_running -= 1
            if delta.finish_reason is FinishReason.ERROR:
                raise failure(delta)
        text, echo = delta.text, self._echoes[index]
        if echo is not None:
            text, self._echoes[index] = echo + text, None
        choice: Json = {"index": index}
        before, called = b"", False
        if self._parsers:
            deltas, called = self._read(index, delta), self._parsers[index].num_calls > 0
            if echo:
                deltas.insert(0, {"content": echo})
            if self._only_text and not deltas:
                return b""
            # All but the last are events of their own; the last one carries what comes beside the text.
            before = b"".join(map(partial(self._bare, index), deltas[:-1]))
            choice["delta"] = deltas[-1] if deltas else {}
        elif plan.chat:
            choice["delta"] = {"content": text} if text else {}
        else:
            choice["text"] = text
        choice["logprobs"] = None
        if self._logprobs and (delta.token_ids or echo):
            choice["logprobs"] = self._logprobs[index].next(delta, self._streams[index].prompt_logprobs)
        if delta.finish_reason is None:
            choice["finish_reason"] = None
        else:
            choice |= _ending(delta, called)
            choice |= weight_versions(self._streams[index], self._streams[index].num_output_tokens)
        if plan.return_token_ids:
            choice["token_ids"] = delta.token_ids
        if self._owes_prompt[index]:
            self._owes_prompt[index] = False
            choice["prompt_token_ids"] = list(plan.requests[index].prompt_token_ids)
        beside = kept_pages(self._streams[index : index + 1]) if delta.finish_reason is not None else {}
        return before + self._chunks.choice(choice, self._running_usage(), **beside)

    def _read(self, index: int, delta: Delta) -> list[Json]:
        """What a delta's text means; an empty one at the end, which brings the finish reason."""
        deltas = [delta_of(event) for event in read_events(self._parsers[index], delta)]
        return deltas if delta.finish_reason is None else [*deltas, {}]

    def _bare(self, index: int, delta: Json) -> bytes:
        choice: Json = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._chunks.choice(choice, self._running_usage())

    def closing(self) -> bytes:
        """The usage chunk, if asked for, and the terminator."""
        if not self._plan.include_usage:
            return DONE
        return self._chunks.usage(self._usage(self._num_output)) + DONE

    def error(self, error: RequestError) -> bytes:
        """An error after the headers have gone out, and the end of the stream."""
        return error_event(error)

    def _running_usage(self) -> Json | None:
        if not self._plan.continuous_usage:
            return None
        return self._usage(self._num_output)

    def _usage(self, num_output: int) -> Json:
        return usage(self._plan, self._streams, num_output, self._watches)


def _best(plan: Plan, candidates: list[Delta]) -> list[int]:
    """Which candidates are answered with: OpenAI's "highest log probability per token", best first."""
    if plan.num_choices == plan.num_candidates:
        return list(range(plan.num_choices))

    def per_token(place: int) -> float:
        entries = candidates[place].logprobs
        return sum(entry.logprob for entry in entries) / len(entries) if entries else -math.inf

    return sorted(range(len(candidates)), key=per_token, reverse=True)[: plan.num_choices]


def _ending(delta: Delta, called: bool = False) -> Json:
    """Why a choice ended, under the names of OpenAI, vLLM and SGLang. called: it holds calls of tools."""
    assert delta.finish_reason is not None
    reason = delta.stop_reason
    word = "tool_calls" if called and delta.finish_reason is FinishReason.STOP else delta.finish_reason.value
    return {"finish_reason": word, "stop_reason": reason, "matched_stop": reason}
