"""What chat and completions have in common: sampling fields, streaming options, and the engine's requests.

A `Plan` is all that the responder needs to know; it is made here and changed by nobody.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from engine.request import Request, RequestError, SamplingParams
from server.protocol.body import Body, are_token_ids, invalid
from server.protocol.errors import ApiError
from server.protocol.refusals import not_supported
from server.state import ServedModel, State

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
# A stop string's text is held back while it may be coming, and searched for at every token.
MAX_STOP_LENGTH = 1024
MAX_SALT_LENGTH = 128
# Below this, float32 softmax has all its mass on one token; dividing by it would only make infinities.
_GREEDY_BELOW = 1e-5
_UINT64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Plan:
    """One HTTP request as engine requests: `num_choices` for each prompt, in order.

    chat: the shape of the answer. continuous_usage: running usage in every chunk.
    """

    chat: bool
    id: str
    created: int
    model: str
    requests: list[Request]
    num_choices: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool


@dataclass(frozen=True, slots=True)
class Common:
    """The fields that do not depend on the prompt. default_max_tokens: used where it fits, None is "to the end"."""

    model: str
    sampling: SamplingParams
    default_max_tokens: int | None
    num_choices: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    namespace: str


def read_model(body: Body, model: ServedModel) -> str:
    """The name that the client uses; the served one where it gives none. Raises the 404 for an unknown one."""
    name = body.string("model", model.names[0])
    if name not in model.names:
        raise unknown_model(name)
    return name


def unknown_model(name: str) -> ApiError:
    return ApiError(404, f"The model `{name}` does not exist.", param="model", code="model_not_found")


def read_common(body: Body, state: State, max_tokens_field: str, default_max_tokens: int | None) -> Common:
    """Read and check everything but the prompt. max_tokens_field: the name that an error should use."""
    model_name = read_model(body, state.model)
    num_choices = body.integer("n", 1, 1, MAX_CHOICES)
    _read_best_of(body, num_choices)
    stream = body.boolean("stream", False)
    include_usage, continuous_usage = _read_stream_options(body, stream)
    # Ids are the server's own; a client's word is only echoed.
    body.string("request_id", None, most=128)
    sampling = _read_sampling(body, state, body.integer(max_tokens_field, None, 1))
    return Common(
        model=model_name,
        sampling=sampling,
        default_max_tokens=default_max_tokens,
        num_choices=num_choices,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        return_token_ids=body.boolean("return_token_ids", False),
        namespace=body.string("cache_salt", "", most=MAX_SALT_LENGTH),
    )


def make_plan(state: State, common: Common, response_id: str, prompts: list[list[int]], *, chat: bool) -> Plan:
    """Turn prompts into engine requests. Raises RequestError for what cannot fit together."""
    num_requests = len(prompts) * common.num_choices
    most = state.engine.config.scheduler.max_queued_requests
    if num_requests > most:
        raise RequestError(f"{num_requests} sequences in one request are more than the queue holds ({most}).")
    requests: list[Request] = []
    for prompt in prompts:
        sampling = _fit(state, common, prompt)
        for index in range(common.num_choices):
            seeded = sampling
            if index and sampling.seed is not None:
                seeded = replace(sampling, seed=derive_seed(sampling.seed, index))
            number = len(requests)
            name = f"{response_id}-{number}" if num_requests > 1 else response_id
            requests.append(Request(name, prompt, seeded, common.stream, common.namespace))
    return Plan(
        chat=chat,
        id=response_id,
        created=int(time.time()),
        model=common.model,
        requests=requests,
        num_choices=common.num_choices,
        stream=common.stream,
        include_usage=common.include_usage,
        continuous_usage=common.continuous_usage,
        return_token_ids=common.return_token_ids,
    )


def derive_seed(seed: int, index: int) -> int:
    """The seed of choice `index`; choice 0 has the client's own. The finaliser of SplitMix64 (Steele et al. 2014)."""
    if index == 0:
        return seed & _UINT64
    mixed = (seed + index * 0x9E3779B97F4A7C15) & _UINT64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _UINT64
    return mixed ^ (mixed >> 31)


def _fit(state: State, common: Common, prompt: list[int]) -> SamplingParams:
    """Give a prompt its default max_tokens; an explicit one that does not fit is the engine's to refuse."""
    sampling, limits = common.sampling, state.engine.limits
    room = min(limits.max_model_len, limits.num_pages * limits.page_size + 1) - len(prompt)
    max_tokens = sampling.max_tokens
    if max_tokens is None and common.default_max_tokens is not None and common.default_max_tokens <= room:
        max_tokens = common.default_max_tokens
    most = room if max_tokens is None else max_tokens
    # Where nothing fits, the engine's own error says more.
    if room > 0 and sampling.min_tokens > most:
        raise invalid("min_tokens", f"must be at most max_tokens, which is {most} here")
    return sampling if max_tokens == sampling.max_tokens else replace(sampling, max_tokens=max_tokens)


def _read_sampling(body: Body, state: State, max_tokens: int | None) -> SamplingParams:
    defaults, vocab_size = state.model.generation_defaults, state.model.model_config.vocab_size

    def either(given: float | None, of_model: float | None, otherwise: float) -> float:
        return given if given is not None else of_model if of_model is not None else otherwise

    temperature = either(body.number("temperature", None, 0, 2), defaults.temperature, 1.0)
    top_k = int(either(body.integer("top_k", None, -1), defaults.top_k, 0))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.integer("min_tokens", 0, 0),
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        # -1 is vLLM's and SGLang's word for off; a device row is 32 bits wide.
        top_k=min(max(top_k, 0), vocab_size),
        top_p=either(body.number("top_p", None, 0, 1, above=True), defaults.top_p, 1.0),
        min_p=either(body.number("min_p", None, 0, 1), defaults.min_p, 0.0),
        seed=body.integer("seed", None, -(2**63), 2**64 - 1),
        stop=_read_stop(body),
        stop_token_ids=_read_stop_token_ids(body, vocab_size),
        ignore_eos=body.boolean("ignore_eos", False),
        include_stop_str_in_output=body.boolean("include_stop_str_in_output", False),
        skip_special_tokens=body.boolean("skip_special_tokens", True),
        spaces_between_special_tokens=body.boolean("spaces_between_special_tokens", True),
    )


def _read_stop(body: Body) -> tuple[str, ...]:
    stop = body.raw("stop")
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(strings, list)
        or len(strings) > MAX_STOP_STRINGS
        or not all(isinstance(item, str) and 0 < len(item) <= MAX_STOP_LENGTH for item in strings)
    ):
        raise invalid("stop", f"must be at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(strings)


def _read_stop_token_ids(body: Body, vocab_size: int) -> tuple[int, ...]:
    ids = body.raw("stop_token_ids")
    if ids is None:
        return ()
    if not are_token_ids(ids, vocab_size):
        raise invalid("stop_token_ids", f"must be a list of token ids from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def _read_best_of(body: Body, num_choices: int) -> None:
    best_of = body.integer("best_of", None, 1, 20)
    if best_of is None:
        return
    if best_of < num_choices:
        raise invalid("best_of", "must be at least `n`")
    # The best n of n are all of them.
    if best_of > num_choices:
        raise not_supported("best_of")


def _read_stream_options(body: Body, stream: bool) -> tuple[bool, bool]:
    options = body.object("stream_options")
    if options is None:
        return False, False
    if not stream:
        raise invalid("stream_options", "is only allowed when `stream` is true")
    fields = Body({f"stream_options.{name}": value for name, value in options.items()})
    return (
        fields.boolean("stream_options.include_usage", False),
        fields.boolean("stream_options.continuous_usage_stats", False),
    )
