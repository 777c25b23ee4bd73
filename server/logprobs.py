"""Log-probabilities as the three JSON shapes that clients know: chat's, completions' and vLLM's prompt_logprobs.

Made by the responder for the requests that ask; the others never come here. Loop thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.request import Request, SamplingParams
from engine.stream import Delta, TokenLogprob
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer
from server.protocol.generation import Plan

Json = dict[str, object]

# JSON has no -inf; vLLM's word for a token that cannot be.
LOWEST = -9999.0


class Spelling:
    """How tokens are written. tokenizer None, as_ids, or an id beyond the vocabulary: "token_id:17"."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool) -> None:
        self.tokenizer = tokenizer
        self._as_ids = as_ids

    def bytes(self, token_id: int) -> bytes:
        """The token's own bytes."""
        return b"" if self.tokenizer is None else self.tokenizer.token_bytes(token_id)

    def text(self, token_id: int) -> str:
        """The token by itself; where it is only a part of a character, its bytes as OpenAI spells them."""
        if self._as_ids or self.tokenizer is None or self.tokenizer.id_to_token(token_id) is None:
            return f"token_id:{token_id}"
        data = self.tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(entries: list[TokenLogprob], spelling: Spelling) -> Json:
    """`choices[].logprobs` of a chat."""

    def one(token_id: int, logprob: float) -> Json:
        return {
            "token": spelling.text(token_id),
            "logprob": max(logprob, LOWEST),
            "bytes": list(spelling.bytes(token_id)),
        }

    return {
        "content": [
            one(entry.token_id, entry.logprob) | {"top_logprobs": [one(*pair) for pair in entry.top]}
            for entry in entries
        ]
    }


class Logprobs:
    """`choices[].logprobs` of one choice, delta by delta. echo: the choice's own, see Plan.

    text_offset counts characters from the choice's start, as the client joins its text.
    """

    def __init__(self, plan: Plan, request: Request, echo: str | None, spelling: Spelling) -> None:
        assert plan.logprobs is not None
        self._chat = plan.chat
        self._wanted: int = plan.logprobs
        self._spelling = spelling
        self._request = request
        self._echo = None if plan.chat else echo
        self._length = 0
        self._detokenizer: IncrementalDetokenizer | None = None
        if not plan.chat:
            self._follow(request.prompt_token_ids)

    def next(self, delta: Delta, of_prompt: list[TokenLogprob] | None) -> Json:
        """What belongs to the next delta; the first one brings the echoed prompt with it."""
        if self._chat:
            return chat_logprobs(delta.logprobs, self._spelling)
        if self._echo is None:
            return self._tokens(delta.logprobs)
        echoed = self._prompt(of_prompt or [])
        self._echo = None
        return _joined(echoed, self._tokens(delta.logprobs))

    def _prompt(self, entries: list[TokenLogprob]) -> Json:
        """The echoed prompt: its first token has no log-probability."""
        ids = self._request.prompt_token_ids
        self._follow([])
        first: Json = {
            "text_offset": [0],
            "token_logprobs": [None],
            "tokens": [self._spelling.text(ids[0])],
            "top_logprobs": [None],
        }
        self._advance(ids[0])
        rest = self._tokens(entries)
        # What the tokens spell and what the client sent may differ (normalisation, BOS): the answer goes on after
        # the latter.
        self._length = len(self._echo or "")
        self._follow(ids)
        return _joined(first, rest)

    def _tokens(self, entries: list[TokenLogprob]) -> Json:
        spelling, offsets = self._spelling, []
        for entry in entries:
            offsets.append(self._length)
            self._advance(entry.token_id)
        return {
            "text_offset": offsets,
            "token_logprobs": [max(entry.logprob, LOWEST) for entry in entries],
            "tokens": [spelling.text(entry.token_id) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the token itself where it is none of them. Of two that look alike the likelier."""
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top[: self._wanted], (entry.token_id, entry.logprob)):
            top.setdefault(self._spelling.text(token_id), max(logprob, LOWEST))
        return top

    def _follow(self, token_ids: Sequence[int]) -> None:
        """Count the characters of what comes after these tokens."""
        if self._spelling.tokenizer is not None:
            given = self._request.sampling
            # Without the stop strings: what they hold back is no less part of the text.
            shown = SamplingParams(
                skip_special_tokens=given.skip_special_tokens,
                spaces_between_special_tokens=given.spaces_between_special_tokens,
            )
            self._detokenizer = IncrementalDetokenizer(self._spelling.tokenizer, token_ids, shown)

    def _advance(self, token_id: int) -> None:
        if self._detokenizer is not None:
            self._length += len(self._detokenizer.push([token_id]))


def _joined(first: Json, second: Json) -> Json:
    """Two pieces of a completion's logprobs as one."""
    both: Json = {}
    for name, head in first.items():
        tail = second[name]
        assert isinstance(head, list) and isinstance(tail, list)
        both[name] = head + tail
    return both


def vllm_prompt_logprobs(entries: list[TokenLogprob] | None, wanted: int, spelling: Spelling) -> list[Json | None]:
    """vLLM's `prompt_logprobs`: null for the first token, then an object by token id."""
    answer: list[Json | None] = [None]
    for entry in entries or []:
        own: Json = {"logprob": max(entry.logprob, LOWEST), "rank": entry.rank}
        named: Json = {str(entry.token_id): own | {"decoded_token": spelling.text(entry.token_id)}}
        for rank, (token_id, logprob) in enumerate(entry.top[:wanted], 1):
            named.setdefault(
                str(token_id),
                {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": spelling.text(token_id)},
            )
        answer.append(named)
    return answer
