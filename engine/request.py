"""The words of a request: what is asked (SamplingParams, Request) and how it ended (FinishReason).

Made by the server or the offline API, read by every other part, changed by nobody. Imports nothing of ours.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

# Stop ids live in a fixed-width row of the slot tables (host and device), EOS ids included.
MAX_STOP_TOKEN_IDS = 16


class FinishReason(enum.Enum):
    """Why a sequence ended; the value is OpenAI's word where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. Ranges are checked by the server (`server/protocol`).

    max_tokens: most tokens to generate, None for "to the end of the context".
    min_tokens: EOS and stop_token_ids are masked until that many tokens were generated.
    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
    seed: any 64-bit integer; a draw depends on (seed, position) alone. None: the engine picks one.
    stop: strings that end the text and are left out of it (unless include_stop_str_in_output).
    stop_token_ids: beside the model's EOS ids; ignore_eos drops only the latter.
    presence_penalty, frequency_penalty: over generated tokens, 0 is off. repetition_penalty: over prompt and
    generated tokens, 1 is off. logit_bias: (token id, added value). allowed_token_ids: all others are masked.
    bad_words: token id sequences whose last id is masked where the ones before it stand.
    logprobs: how many alternatives to report beside each token, 0 for the token alone. prompt_logprobs: the same
    for the prompt's tokens, whose prefix is then not taken from the cache. Both are of the raw distribution.
    kept_special_ids: special tokens that the text shows although skip_special_tokens leaves out the others; markers
    that the model's output is read by.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    kept_special_ids: frozenset[int] = frozenset()

    @property
    def has_penalties(self) -> bool:
        """Some logit depends on the tokens so far."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def has_extras(self) -> bool:
        """The sampler needs more than a row of SAMPLING_DTYPE (see forward.RowExtras)."""
        return bool(
            self.has_penalties
            or self.logit_bias
            or self.bad_words
            or self.allowed_token_ids is not None
            or self.logprobs is not None
            or self.prompt_logprobs is not None
        )


@dataclass(frozen=True, slots=True)
class Pooling:
    """What is wanted of a prompt where no text is: a float32 vector.

    kind: last is the last token's hidden state after the final norm, mean the average of all tokens' [hidden_size];
    logprobs are the natural log-probabilities of token_ids as the next token [len(token_ids)].
    """

    kind: Literal["last", "mean", "logprobs"]
    token_ids: tuple[int, ...] = ()


class TokenConstraint(Protocol):
    """What a grammar allows next. One per sequence; the engine alone calls it, on the loop thread."""

    def mask_into(self, mask: Any) -> None:
        """Write a bit per token, 1 for allowed, into uint32 [ceil(vocab_size / 32)], lowest bit first."""
        ...

    def accept(self, token_id: int) -> None:
        """This token was generated."""
        ...

    @property
    def is_free(self) -> bool:
        """Everything may follow for now: no mask has to be computed."""
        ...

    @property
    def is_finished(self) -> bool:
        """Nothing may follow."""
        ...

    @property
    def error(self) -> str | None:
        """Why it can tell no more what is allowed, in a few words without a full stop; None while all is well."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt that becomes one sequence. `n` choices are n requests that meet again in the radix tree.

    prompt_token_ids: at least one id.
    stream: False means that nobody looks before the end, so no text is made per token.
    constraint: its state is this request's own.
    namespace: root of the radix tree that this prompt may share pages under (tenant, cache_salt); "" is common.
    pooling: the prompt's vector is the answer; nothing is sampled.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stream: bool = True
    namespace: str = ""
    priority: int = 0
    constraint: TokenConstraint | None = None
    pooling: Pooling | None = None


class RequestError(Exception):
    """A request that cannot be served; `str(error)` is one sentence for the user, `status` the HTTP status."""

    status = 400
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceededError(RequestError):
    """The prompt, or prompt and max_tokens, do not fit the context or the KV cache."""

    code = "context_length_exceeded"


class QueueFullError(RequestError):
    """More requests wait than `--max-queued-requests` allows."""

    status = 429
    code = "rate_limit_exceeded"


class UnavailableError(RequestError):
    """The engine drains or has failed."""

    status = 503
    code = "service_unavailable"
