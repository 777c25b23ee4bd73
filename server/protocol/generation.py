"""What chat and completions have in common: sampling fields, streaming options, and the engine's requests.

A `Plan` is all that the responder needs to know; it is made here and changed by nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from engine.request import (
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    RANGES,
    Adapter,
    Request,
    RequestError,
    SamplingParams,
    Transfer,
    derive_seed,
    normalised,
)
from engine.text.tokenizer import Tokenizer
from server.adapters import MAX_NAMES, adapter_name, chosen, may_call
from server.messages import Reading
from server.protocol.body import Body, are_token_ids, invalid
from server.protocol.errors import ApiError
from server.protocol.structure import Structure
from server.protocol.transfer import read_transfer
from server.state import CALLER, ServedModel, State

MAX_CHOICES = 128
MAX_SALT_LENGTH = 128
# What follows makes no other user.
MAX_USER_LENGTH = 256
MAX_PRIORITY = 2**31 - 1
MAX_TIMEOUT_S = 1e6
MAX_BEST_OF = 20
# Each bad word is at most two sequences that every step of its row is compared with.
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 256
MAX_DRAFT_TOKENS = 128
# Entries of a bias: a millisecond's work.
_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Plan:
    """One HTTP request as engine requests: `num_candidates` for each prompt, in order.

    chat: the shape of the answer. continuous_usage: running usage in every chunk.
    num_choices: how many of a prompt's candidates are answered with; the likeliest per token, if not all.
    echoes: the text that goes before each prompt's choices; None without `echo`.
    logprobs: how many alternatives the answer has beside each token; None for no log-probabilities at all.
    prompt_logprobs: the same under the prompt's own heading (vLLM's field). Of a prompt's requests at least the first
    carries what its answer needs of the prompt's tokens.
    tokens_as_ids: tokens of log-probabilities are spelled "token_id:17".
    reading: how the output becomes a message; None where all of it is the content. prompt_text: the rendered prompt,
    where the answer is to show it. no_output: max_tokens is 0, which is about the prompt alone; the engine makes one
    token, and nobody sees it.
    """

    chat: bool
    id: str
    created: int
    model: str
    requests: list[Request]
    num_candidates: int
    num_choices: int
    echoes: list[str] | None
    logprobs: int | None
    prompt_logprobs: int | None
    tokens_as_ids: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    reading: Reading | None = None
    prompt_text: str | None = None
    no_output: bool = False


@dataclass(frozen=True, slots=True)
class Terms:
    """Where in the cache a prompt may look, when its turn comes, and how long it may take; see Request.

    transfer: of the first prompt, which is the one that routers mean.
    """

    namespace: str
    priority: int
    fairness_key: str
    timeout_s: float | None
    weight: float = 1.0
    adapter: Adapter | None = None
    speculate: bool = True
    max_draft_tokens: int | None = None
    transfer: Transfer | None = None

    def request(self, request_id: str, prompt: Sequence[int], sampling: SamplingParams, **others: Any) -> Request:
        """A request on these terms. others: fields of Request."""
        return Request(
            request_id,
            prompt,
            sampling,
            namespace=self.namespace,
            priority=self.priority,
            fairness_key=self.fairness_key,
            timeout_s=self.timeout_s,
            weight=self.weight,
            adapter=self.adapter,
            speculate=self.speculate,
            max_draft_tokens=self.max_draft_tokens,
            **others,
        )


@dataclass(frozen=True, slots=True)
class Common:
    """The fields that do not depend on the prompt. default_max_tokens: used where it fits, None is "to the end"."""

    model: str
    sampling: SamplingParams
    default_max_tokens: int | None
    num_candidates: int
    num_choices: int
    echo: bool
    logprobs: int | None
    prompt_logprobs: int | None
    tokens_as_ids: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    terms: Terms


def read_model(body: Body, model: ServedModel) -> str:
    """The name that the client uses; the served one where it gives none. Raises the 404 for an unknown one."""
    name = body.string("model", model.names[0])
    adapter = adapter_name(name, model)
    if not (adapter is not None or model.knows(name)) or not may_call(adapter or name):
        raise unknown_model(name, model)
    return name


def unknown_model(name: str, model: ServedModel) -> ApiError:
    served = ", ".join(f"`{one}`" for one in model.names)
    if model.adapters is not None and (adapters := model.adapters.names(MAX_NAMES)):
        served += f" and the LoRA adapters {adapters}"
    message = f"The model `{name[:128]}` does not exist; this server has {served}."
    return ApiError(404, message, param="model", code="model_not_found")


def read_common(
    body: Body, state: State, max_tokens_field: str, default_max_tokens: int | None, logprobs: int | None
) -> Common:
    """Read and check everything but the prompt and `logprobs`, which mean different things in chat and completions.

    max_tokens_field: the name that an error should use.
    """
    model_name = read_model(body, state.model)
    if not state.model.abilities.generates:
        raise RequestError(
            "This model does not generate text: it is served for embeddings or scores (--runner pooling, or what its "
            "directory says). Start the server with --runner generate if it has an output layer.",
            param="model",
        )
    num_choices = body.integer("n", 1, 1, MAX_CHOICES)
    stream = body.boolean("stream", False)
    num_candidates = _read_best_of(body, num_choices, stream)
    prompt_logprobs = body.integer("prompt_logprobs", None, 0, state.model.max_logprobs)
    if prompt_logprobs is not None and stream:
        raise invalid("prompt_logprobs", "is only allowed when `stream` is false")
    include_usage, continuous_usage = _read_stream_options(body, stream)
    # Ids are the server's own; a client's word is only echoed.
    body.string("request_id", None, most=128)
    # llama.cpp's name, and its clients' -1 for no limit.
    max_tokens = body.integer(max_tokens_field, body.integer("n_predict", None, -1), -1)
    if max_tokens == -1:
        max_tokens = default_max_tokens = None
    transfer = read_transfer(body, state)
    sampling = _read_sampling(body, state, max_tokens)
    if transfer is not None and transfer.keep:
        # Another server goes on from here: what this one says is heard by nobody.
        sampling = replace(sampling, max_tokens=1, min_tokens=min(sampling.min_tokens, 1))
    # Candidates are compared by their log-probabilities, whether the client wants to see them or not.
    sampling = replace(sampling, logprobs=0 if logprobs is None and num_candidates > num_choices else logprobs)
    return Common(
        model=model_name,
        sampling=sampling,
        default_max_tokens=default_max_tokens,
        num_candidates=num_candidates,
        num_choices=num_choices,
        echo=body.boolean("echo", False),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        tokens_as_ids=body.boolean("return_tokens_as_token_ids", False),
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        return_token_ids=body.boolean("return_token_ids", False),
        # Drafts change no token, so that these are hints where the server tries none.
        terms=replace(
            read_terms(body, state),
            speculate=body.boolean("speculative", True),
            max_draft_tokens=body.integer("max_draft_tokens", None, 0, MAX_DRAFT_TOKENS),
            transfer=transfer,
        ),
    )


def read_terms(body: Body, state: State) -> Terms:
    """What prompts of all kinds may say beside what they want."""
    caller = CALLER.get()
    entry = None if caller.owner is None else caller.owner.entry
    # Shares are between keys where the file tells them apart: a flood under many users' names is one key's.
    user = "" if entry is not None else body.string("user", "")[:MAX_USER_LENGTH]
    adapter = chosen(body, state)
    whose = f"{user}:{adapter.name}" if adapter is not None and entry is None else user
    return Terms(
        namespace=_read_namespace(body, state),
        priority=_read_priority(body, state),
        fairness_key=f"{caller.key}:{whose}",
        adapter=adapter,
        weight=1.0 if entry is None else entry.weight,
        timeout_s=body.number("timeout", caller.timeout_s, 0, MAX_TIMEOUT_S, above=True),
    )


def _read_namespace(body: Body, state: State) -> str:
    """Where in the cache a prompt may look. The salt is the client's word, the key before the colon the server's: no
    two pairs of them make the same name, and no salt leads into another key's."""
    salt, options = body.string("cache_salt", "", most=MAX_SALT_LENGTH), state.options
    isolated = options.num_keys > 1 if options.isolate_api_keys is None else options.isolate_api_keys
    return f"{CALLER.get().key}:{salt}" if isolated else salt


def _read_priority(body: Body, state: State) -> int:
    priority = body.integer("priority", 0, -MAX_PRIORITY, MAX_PRIORITY)
    if priority and state.engine.config.scheduler.policy != "priority":
        raise RequestError("`priority` needs a server that runs with --schedule-policy priority.", param="priority")
    owner = CALLER.get().owner
    return priority if owner is None or owner.entry is None else max(priority, owner.entry.priority)


def make_plan(
    state: State,
    common: Common,
    response_id: str,
    prompts: Sequence[Sequence[int]],
    *,
    chat: bool,
    echoes: list[str] | None,
    structure: Structure | None = None,
    reading: Reading | None = None,
) -> Plan:
    """Turn prompts into engine requests. echoes, reading: see Plan. Raises RequestError for what does not fit."""
    if reading is not None:
        common = replace(common, sampling=replace(common.sampling, kept_special_ids=_markers(state, reading)))
    no_output = common.sampling.max_tokens == 0
    num_requests = len(prompts) * common.num_candidates
    check_count(state, num_requests)
    requests: list[Request] = []
    for prompt in prompts:
        sampling = _fit(state, common, prompt)
        if no_output:
            sampling = replace(sampling, max_tokens=1)
        of_prompt = _prompt_logprobs(common, chat)
        for index in range(common.num_candidates):
            seeded = sampling
            if index and sampling.seed is not None:
                seeded = replace(sampling, seed=derive_seed(sampling.seed, index))
            # Such a request computes its prompt anew. One for all choices is enough, and the others share its pages;
            # but the choices of a stream do not wait for each other.
            if of_prompt is not None and (index == 0 or common.stream):
                seeded = replace(seeded, prompt_logprobs=of_prompt)
            number = len(requests)
            name = f"{response_id}-{number}" if num_requests > 1 else response_id
            constraint = None if structure is None else structure.state(state.engine.tokenizer)
            transfer = None if len(requests) >= common.num_candidates else common.terms.transfer
            if transfer is not None and transfer.keep and requests:
                transfer = replace(transfer, keep=False)  # once is enough for all choices
            request = common.terms.request(
                name, prompt, seeded, stream=common.stream, constraint=constraint, transfer=transfer
            )
            requests.append(request)
    return Plan(
        chat=chat,
        id=response_id,
        created=int(time.time()),
        model=common.model,
        requests=requests,
        num_candidates=common.num_candidates,
        num_choices=common.num_choices,
        echoes=echoes,
        logprobs=common.logprobs,
        prompt_logprobs=common.prompt_logprobs,
        tokens_as_ids=common.tokens_as_ids,
        stream=common.stream,
        include_usage=common.include_usage,
        continuous_usage=common.continuous_usage,
        return_token_ids=common.return_token_ids,
        reading=reading,
        no_output=no_output,
    )


def check_count(state: State, num_requests: int) -> None:
    """Raise the 400 for an HTTP request that asks for more sequences than could ever be queued."""
    most = state.engine.config.scheduler.max_queued_requests
    if num_requests > most:
        raise RequestError(f"{num_requests} sequences in one request are more than the queue holds ({most}).")


def with_max_tokens(plan: Plan, count: Callable[[Request], int]) -> Plan:
    """The plan with another limit for each of its requests."""
    requests = [
        replace(request, sampling=replace(request.sampling, max_tokens=count(request))) for request in plan.requests
    ]
    return replace(plan, requests=requests)


def _markers(state: State, reading: Reading) -> frozenset[int]:
    """Special tokens that the output is read by; one that ends the text is none of it."""
    tokenizer = state.tokenizer
    ids = {tokenizer.token_to_id(marker) for marker in reading.make_parser().markers}
    return tokenizer.special_ids.intersection(ids).difference(state.engine.eos_token_ids)


def _prompt_logprobs(common: Common, chat: bool) -> int | None:
    """What the answer needs of the prompt's tokens: the echo's `logprobs` and `prompt_logprobs`."""
    echoed = common.logprobs if common.echo and not chat else None
    wanted = [count for count in (echoed, common.prompt_logprobs) if count is not None]
    return max(wanted, default=None)


def room_for(state: State, prompt: Sequence[int]) -> int:
    """Most tokens that can follow a prompt; below 1 where it does not fit itself."""
    limits = state.engine.limits
    return min(limits.max_model_len, limits.max_cached_tokens + 1) - len(prompt)


def _fit(state: State, common: Common, prompt: Sequence[int]) -> SamplingParams:
    """Give a prompt its max_tokens: the default where it fits, and of an explicit one what fits.

    That is the rule of every API family, for agents send the largest number that they know. Where --refuse-max-tokens
    is set, one that does not fit is the engine's to refuse; and so is a prompt that leaves no room at all.
    """
    sampling, room = common.sampling, room_for(state, prompt)
    max_tokens = sampling.max_tokens
    if max_tokens is None and common.default_max_tokens is not None and common.default_max_tokens <= room:
        max_tokens = common.default_max_tokens
    if max_tokens is not None and max_tokens > room > 0 and not state.options.refuse_max_tokens:
        max_tokens = room
    most = room if max_tokens is None else max_tokens
    # Where nothing fits, the engine's own error says more.
    if room > 0 and sampling.min_tokens > most:
        raise invalid("min_tokens", f"must be at most `max_tokens`, which is {most} here")
    return sampling if max_tokens == sampling.max_tokens else replace(sampling, max_tokens=max_tokens)


def _read_sampling(body: Body, state: State, max_tokens: int | None) -> SamplingParams:
    defaults, vocab_size = state.model.generation_defaults, state.model.model_config.vocab_size

    def either(given: float | None, of_model: float | None, otherwise: float) -> float:
        return given if given is not None else of_model if of_model is not None else otherwise

    def number(name: str) -> float | None:
        allowed = RANGES[name]
        return body.number(name, None, allowed.low, allowed.high, above=allowed.above)

    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.integer("min_tokens", 0, 0),
        temperature=either(number("temperature"), defaults.temperature, 1.0),
        top_k=int(either(body.integer("top_k", None, -1), defaults.top_k, 0)),
        top_p=either(number("top_p"), defaults.top_p, 1.0),
        min_p=either(number("min_p"), defaults.min_p, 0.0),
        seed=body.integer("seed", None, -(2**63), 2**64 - 1),
        stop=_read_stop(body),
        stop_token_ids=_read_stop_token_ids(body, vocab_size),
        ignore_eos=body.boolean("ignore_eos", False),
        include_stop_str_in_output=body.boolean("include_stop_str_in_output", False),
        skip_special_tokens=body.boolean("skip_special_tokens", True),
        spaces_between_special_tokens=body.boolean("spaces_between_special_tokens", True),
        presence_penalty=number("presence_penalty") or 0.0,
        frequency_penalty=number("frequency_penalty") or 0.0,
        repetition_penalty=either(_read_repetition_penalty(body), defaults.repetition_penalty, 1.0),
        logit_bias=_read_logit_bias(body, vocab_size),
        allowed_token_ids=_read_allowed_token_ids(body, vocab_size),
        bad_words=_read_bad_words(body, state),
    )
    return normalised(sampling, vocab_size)


def _read_repetition_penalty(body: Body) -> float | None:
    """vLLM's name, or llama.cpp's."""
    allowed = RANGES["repetition_penalty"]
    names = ("repetition_penalty", "repeat_penalty")
    given = (body.number(name, None, allowed.low, allowed.high, above=allowed.above) for name in names)
    return next((value for value in given if value is not None), None)


def _read_logit_bias(body: Body, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """JSON's keys are strings; two spellings of one id ("7", "07") are one id, and the last counts."""
    items = iter((body.object("logit_bias") or {}).items())
    found: dict[int, float] = {}
    # A vocabulary may have 300,000 tokens: keys and values are checked as wholes, but some at a time, for threads take
    # turns between calls alone.
    while part := dict(islice(items, _AT_ONCE)):
        digits, values = "".join(part), part.values()
        # Their lengths first: int() takes its time over a million digits.
        fine = digits.isascii() and digits.isdecimal() and min(map(len, part)) > 0 and max(map(len, part)) <= 10
        ids = list(map(int, part)) if fine else []
        if not ids or max(ids) >= vocab_size:
            raise invalid("logit_bias", f"must have token ids from 0 to {vocab_size - 1} as keys")
        if not {int, float}.issuperset(map(type, values)) or not -100 <= min(values) <= max(values) <= 100:
            raise invalid("logit_bias", "must have numbers from -100 to 100 as values")
        found.update(zip(ids, map(float, values), strict=True))
    pairs, left = [], iter(found.items())
    while more := list(islice(left, _AT_ONCE)):
        pairs += more
    return tuple(pairs)


def _read_allowed_token_ids(body: Body, vocab_size: int) -> tuple[int, ...] | None:
    ids = body.raw("allowed_token_ids")
    if ids is None:
        return None
    if not ids or not are_token_ids(ids, vocab_size):
        raise invalid("allowed_token_ids", f"must be a non-empty list of token ids from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def _read_bad_words(body: Body, state: State) -> tuple[tuple[int, ...], ...]:
    words = body.raw("bad_words")
    if words is None or words == []:
        return ()
    if (
        not isinstance(words, list)
        or len(words) > MAX_BAD_WORDS
        or not all(isinstance(word, str) and 0 < len(word) <= MAX_BAD_WORD_LENGTH for word in words)
    ):
        raise invalid("bad_words", f"must be at most {MAX_BAD_WORDS} strings of 1 to {MAX_BAD_WORD_LENGTH} characters")
    # What holds an id that the model cannot say is never said.
    rows = state.model.model_config.vocab_size
    return tuple(ids for ids in bad_word_ids(state.tokenizer, words) if max(ids) < rows)


def bad_word_ids(tokenizer: Tokenizer, words: list[str]) -> tuple[tuple[int, ...], ...]:
    """Each word at the start of a text and after a space: most vocabularies have different tokens for the two."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            found[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    found.pop((), None)
    return tuple(found)


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


def _read_best_of(body: Body, num_choices: int, stream: bool) -> int:
    """How many candidates a prompt gets; as many as choices, unless the client asks for more."""
    best_of = body.integer("best_of", None, 1, MAX_BEST_OF)
    if best_of is None:
        return num_choices
    if best_of < num_choices:
        raise invalid("best_of", "must be at least `n`")
    if best_of > num_choices and stream:
        raise invalid("best_of", "must equal `n` when `stream` is true: the best is known at the end")
    return best_of


def _read_stream_options(body: Body, stream: bool) -> tuple[bool, bool]:
    options = body.object("stream_options")
    if options is None:
        return False, False
    if not stream:
        raise invalid("stream_options", "is only allowed when `stream` is true")
    fields = Body({f"stream_options.{name}": value for name, value in options.items()})
    include_usage = fields.boolean("stream_options.include_usage", False)
    # As in vLLM, the second says how often, and nothing without the first.
    return include_usage, fields.boolean("stream_options.continuous_usage_stats", False) and include_usage
