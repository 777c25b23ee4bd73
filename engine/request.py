"""The words of a request: what is asked (SamplingParams, Request) and how it ended (FinishReason).

Made by the server or the offline API, read by every other part, changed by nobody. Imports nothing of ours.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

# Stop ids live in a fixed-width row of the slot tables (host and device), EOS ids included.
MAX_STOP_TOKEN_IDS = 16
MAX_STOP_STRINGS = 16
# A stop string's text is held back while it may be coming, and searched for at every token.
MAX_STOP_LENGTH = 1024
# Unless --max-logprobs says otherwise.
MAX_TOP_LOGPROBS = 20
# Below this, float32 softmax has all its mass on one token; dividing by it would only make infinities.
_GREEDY_BELOW = 1e-5
# A logit divided by less may be no float32 any more. It repeats for ever at this already.
_LEAST_REPETITION_PENALTY = 1e-6
_UINT64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from low to high; above: low itself is none of them."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: object) -> bool:
        good = isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high
        return good and not (self.above and value == self.low)

    def __str__(self) -> str:
        return f"above {self.low:g} and at most {self.high:g}" if self.above else f"from {self.low:g} to {self.high:g}"


# Of the fields of SamplingParams with the same names.
RANGES = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, above=True),
    "min_p": Range(0, 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, 2, above=True),
}
_LOGIT_BIAS = Range(-100, 100)


class FinishReason(enum.Enum):
    """Why a sequence ended; the value is OpenAI's word where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. Whoever makes one without reading it from a body calls `checked`.

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
    for the prompt's tokens, whose prefix is then not taken from the cache. See LogprobOptions.
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
    def clash(self) -> str | None:
        """The field that would fight with a constraint."""
        clashes = {
            "min_tokens": self.min_tokens > 0,
            "ignore_eos": self.ignore_eos,
            "allowed_token_ids": self.allowed_token_ids is not None,
        }
        return next((name for name, clash in clashes.items() if clash), None)

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


def checked(given: SamplingParams, vocab_size: int, most_logprobs: int = MAX_TOP_LOGPROBS) -> SamplingParams:
    """The same, `normalised` and with lists as tuples, after the checks that the server makes field by field.

    Raises RequestError for what is out of its range.
    """

    def fail(name: str, what: str) -> RequestError:
        return RequestError(f"`{name}` {what}.", param=name)

    for name, allowed in RANGES.items():
        if getattr(given, name) not in allowed:
            raise fail(name, f"must be a number {allowed}")
    for name, low, high in (
        ("max_tokens", 1, None),
        ("min_tokens", 0, given.max_tokens),
        ("top_k", -1, None),
        ("seed", -(2**63), 2**64 - 1),
        ("logprobs", 0, most_logprobs),
        ("prompt_logprobs", 0, most_logprobs),
    ):
        value = getattr(given, name)
        if value is not None and not (_is_integer(value) and value >= low and (high is None or value <= high)):
            limits = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise fail(name, f"must be an integer {limits}")
    stops: Any = given.stop
    stop = (stops,) if isinstance(stops, str) else tuple(stops)
    if len(stop) > MAX_STOP_STRINGS or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stop):
        raise fail("stop", f"must be at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters")
    bias = tuple(dict(given.logit_bias).items())
    allowed_ids = None if given.allowed_token_ids is None else tuple(given.allowed_token_ids)
    words = tuple(map(tuple, given.bad_words))
    ids: dict[str, Iterable[int]] = {
        "stop_token_ids": given.stop_token_ids,
        "allowed_token_ids": allowed_ids or (),
        "bad_words": [token_id for word in words for token_id in word],
        "logit_bias": [token_id for token_id, _ in bias],
    }
    for name, values in ids.items():
        if not all(_is_integer(value) and 0 <= value < vocab_size for value in values):
            raise fail(name, f"must have token ids from 0 to {vocab_size - 1}")
    if allowed_ids == ():
        raise fail("allowed_token_ids", "must not be empty")
    if not all(value in _LOGIT_BIAS for _, value in bias):
        raise fail("logit_bias", f"must have numbers {_LOGIT_BIAS} as values")
    sampling = replace(
        given,
        stop=stop,
        stop_token_ids=tuple(given.stop_token_ids),
        logit_bias=bias,
        allowed_token_ids=allowed_ids,
        bad_words=words,
    )
    return normalised(sampling, vocab_size)


def normalised(given: SamplingParams, vocab_size: int) -> SamplingParams:
    """In the form that the samplers want: a top_k of -1 and a tiny temperature are 0, a tiny penalty is a small one."""
    return replace(
        given,
        temperature=given.temperature if given.temperature >= _GREEDY_BELOW else 0.0,
        # -1 is vLLM's and SGLang's word for off; a device row is 32 bits wide.
        top_k=min(max(given.top_k, 0), vocab_size),
        repetition_penalty=max(given.repetition_penalty, _LEAST_REPETITION_PENALTY),
    )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def derive_seed(seed: int, index: int) -> int:
    """The seed of choice `index`; choice 0 has the client's own. The finaliser of SplitMix64 (Steele et al. 2014)."""
    if index == 0:
        return seed & _UINT64
    mixed = (seed + index * 0x9E3779B97F4A7C15) & _UINT64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _UINT64
    return mixed ^ (mixed >> 31)


@dataclass(frozen=True, slots=True)
class Pooling:
    """What is wanted of a prompt where no text is: a float32 vector.

    kind: cls and last are the first and the last token's hidden state after the final norm; mean, max, weightedmean
    (by places, from 1 on) and mean_sqrt_len (the sum over the root of their number) are of all tokens' [hidden_size];
    all is each of them [tokens, hidden_size]; logprobs are the natural log-probabilities of token_ids as the next token
    [len(token_ids)]. classify: what the model's classifier makes of that. second: the place at which the second text of
    a pair begins, where types of tokens tell the two apart; 0 for none.
    """

    kind: Literal["cls", "last", "mean", "max", "weightedmean", "mean_sqrt_len", "all", "logprobs"]
    token_ids: tuple[int, ...] = ()
    classify: bool = False
    second: int = 0

    @property
    def needs_all(self) -> bool:
        """Every token has a part in it, so every one must be computed, and is told of."""
        return self.kind not in ("last", "logprobs")


class TokenConstraint(Protocol):
    """What a grammar allows next. One per sequence; the engine alone calls it, on the loop thread."""

    def mask_into(self, mask: Any) -> None:
        """Write a bit per token, 1 for allowed, into uint32 [ceil(vocab_size / 32)], lowest bit first."""
        ...

    def forced_tokens(self) -> Sequence[int]:
        """What must come next, in order; empty where there is a choice. `mask_into` allows the first of them alone."""
        ...

    def accept(self, token_id: int) -> None:
        """This token was generated."""
        ...

    def copy(self) -> TokenConstraint:
        """An independent one at the same place, to look ahead with."""
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
class Adapter:
    """A LoRA adapter as it was loaded once: loading it again makes another one.

    version: unique among all that were ever loaded; with it pages of the radix tree are told apart, never by the name.
    weights: the executor's own, opaque here. num_bytes: of them. digest: of their files, the same in every process.
    """

    name: str
    path: str
    version: int
    rank: int
    num_bytes: int
    weights: Any
    digest: str


@dataclass(frozen=True, slots=True)
class RemotePages:
    """Where another server says that it keeps a prompt's pages. A client's words: nothing in it is trusted.

    num_pages: of which it says so. None: not said.
    """

    engine_id: str | None
    request_id: str | None
    host: str | None
    port: int | None
    num_pages: int | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """keep: the prompt's pages stay for another server, which goes on with the answer. source: who has them."""

    keep: bool = False
    source: RemotePages | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt that becomes one sequence. `n` choices are n requests that meet again in the radix tree.

    prompt_token_ids: at least one id; a long prompt's are an array.
    stream: False means that nobody looks before the end, so no text is made per token.
    constraint: its state is this request's own.
    namespace: root of the radix tree that this prompt may share pages under (tenant, cache_salt); "" is common.
    priority: lower is earlier, under the policy "priority". fairness_key: whose share it is, under "fair".
    weight: of its fairness key, what its share is in proportion to. timeout_s: from submit to the end, None for as long
    as it takes.
    pooling: the prompt's vector is the answer; nothing is sampled.
    adapter: whose answer it is, None for the model's own. speculate: whether drafts may be tried where the server does
    so; max_draft_tokens: at most so many a step, None for as many as pay. prediction: what the answer may repeat.
    transfer: of its pages, between servers.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stream: bool = True
    namespace: str = ""
    priority: int = 0
    constraint: TokenConstraint | None = None
    fairness_key: str = ""
    timeout_s: float | None = None
    pooling: Pooling | None = None
    weight: float = 1.0
    adapter: Adapter | None = None
    speculate: bool = True
    max_draft_tokens: int | None = None
    prediction: tuple[int, ...] | None = None
    transfer: Transfer | None = None

    def most_drafts(self, most: int) -> int:
        """Drafts that a row of it may have where any row may have so many."""
        if not self.speculate or self.pooling is not None:
            return 0
        return most if self.max_draft_tokens is None else min(most, self.max_draft_tokens)

    @property
    def cache_root(self) -> str:
        """Of the radix tree: the namespace, under an adapter that version's own. No namespace leads into another's."""
        if self.adapter is not None:
            return f"\0{self.adapter.version}:{self.namespace}"
        return f"\0{self.namespace}" if self.namespace.startswith("\0") else self.namespace


class RequestError(Exception):
    """A request that cannot be served; `str(error)` is one sentence for the user, `status` the HTTP status."""

    status = 400
    code: str | None = None
    # Seconds after which it may be tried again, where that is known.
    retry_after: float | None = None

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

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OverloadedError(QueueFullError):
    """It would wait for longer than was promised."""


class UnavailableError(RequestError):
    """The engine drains or has failed."""

    status = 503
    code = "service_unavailable"
