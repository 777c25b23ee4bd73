"""What a simulation is made of, all of it a function of a seed: sizes, rates, and the requests that arrive.

Prompts come from a tiny alphabet and from each other, so that prefixes collide; the oracle says what each request
must bring before anything has run.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from dataclasses import dataclass
from random import Random
from typing import Any

from engine.cache.eviction.registry import EVICTION_POLICIES
from engine.executor.fake_memory import mix_int
from engine.executor.fake_oracle import FakeModel, expected_stream, expected_vector
from engine.forward import Limits
from engine.groups import Chunk, MemoryGroup
from engine.request import Adapter, FinishReason, Pooling, Request, SamplingParams, Transfer
from engine.scheduling.policy.registry import POLICIES

EOS = 0
BUDGETS = ["all", "random", "adaptive"]

# Of the memory groups. Most models have one; a full one beside windows is next.
WINDOWS: list[tuple[int | None, ...]] = [
    *[(None,)] * 6,
    *[(1,), (4,), (9,), (20,)],
    *[(None, 4), (None, 9), (None, 9, 9, 9), (None, 1), (None, None, 20), (20, 3)],
]


@dataclass(frozen=True)
class Options:
    """One simulated server. Rates are per tick unless said; ticks is the length of the busy phase.

    pool_rate: share of the requests that ask for a vector. culprit_rate: of those that make every step fail.
    spoil_rate: of steps with a row that computes no numbers, and of those with one that samples no token there is.
    adapter_rate: of requests with an adapter. reload_rate: of those whose adapter is loaded again just before.
    """

    page_size: int
    num_pages: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    alphabet: int
    eos_rate: float
    depth: int
    prefix_caching: bool
    eviction_policy: str
    watermark: float
    ticks: int
    arrival_rate: float
    burst: int
    namespaces: int
    eagerness: float
    abort_rate: float
    abort_burst_rate: float
    fail_rate: float
    pool_rate: float
    poison: bool
    constrained_rate: float
    jump_ahead: bool
    policy: str
    windows: tuple[int | None, ...]
    num_snapshots: int | None
    culprit_rate: float = 0.0
    spoil_rate: float = 0.0
    # Most drafts of a row, how many of them are right, and who says how many there are: BUDGETS.
    max_draft_tokens: int = 0
    draft_accuracy: float = 0.5
    budgets: str = "all"
    # Those of rows under a grammar are seen when their step has begun, not before.
    unseen_drafts: bool = False
    max_adapters: int = 0
    adapter_rate: float = 0.0
    reload_rate: float = 0.0
    # Pages of a tier where prompts' pages are kept (0: there is none), how fast it is, and what is waited for it.
    tier_pages: int = 0
    tier_eagerness: float = 0.5
    tier_timeout_s: float = 1.0
    # Of a device whose pages go to host memory first, as many as that (0: there is none), and from there to the tier.
    host_pages: int = 0
    has_disk: bool = True
    # Of requests whose prompts are computed for another server first, which reads what they leave; how fast, how long
    # either waits for the other, and of all pages what may be kept for it.
    transfer_rate: float = 0.0
    transfer_eagerness: float = 0.5
    transfer_timeout_s: float = 1.0
    kept_share: float = 0.5

    @property
    def has_transfer(self) -> bool:
        return self.transfer_rate > 0 and self.prefix_caching and self.num_snapshots != 0

    @property
    def has_tier(self) -> bool:
        """Of models that keep anything."""
        return self.tier_pages > 0 and self.prefix_caching and self.num_snapshots != 0

    @property
    def limits(self) -> Limits:
        return Limits(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            page_size=self.page_size,
            num_pages=self.num_pages,
            vocab_size=self.vocab_size,
            groups=tuple(MemoryGroup(window) for window in self.windows),
            num_snapshots=self.num_snapshots,
            max_draft_tokens=self.max_draft_tokens,
            max_adapters=self.max_adapters,
        )

    @functools.cached_property
    def model(self) -> FakeModel:
        return FakeModel(self.vocab_size, EOS, self.eos_rate, self.windows, self.num_snapshots is not None)

    @property
    def whole_context(self) -> int:
        """Pages of all groups with which one sequence of full length can go on, whatever the others do."""
        return self.pages_of(self.max_model_len)

    def pages_of(self, num_tokens: int) -> int:
        """Counted page by page. A window keeps what the last whole page's end sees, that page's rest, and one more."""
        pages = -(-num_tokens // self.page_size)
        count = 0
        for window in self.windows:
            end = 1000 * self.page_size
            seen = range(end if window is None else end - window + 1, end)
            kept = len({token // self.page_size for token in seen}) + 2
            count += pages if window is None else min(pages, kept)
        return count

    @functools.cached_property
    def cache_tokens(self) -> int:
        """Most tokens of one sequence that the pool can serve."""
        if None not in self.windows and self.pages_of(10**6) <= self.num_pages:
            return self.max_model_len
        whole = (n for n in itertools.count() if self.pages_of(n * self.page_size + 1) > self.num_pages)
        return next(whole) * self.page_size


class Runs:
    """A constraint: `free` tokens as the model draws them, then `run` forced ones, and so on; `length` in all."""

    is_free = False
    error: str | None = None

    def __init__(self, seed: int, vocab_size: int, *, free: int, run: int, length: int) -> None:
        self.length, self.num_seen = length, 0
        # Asked for over and over: of each place, behind which stands that nothing is forced.
        self._tokens = [
            None if place % (free + run) < free else mix_int(seed << 32 | place) % vocab_size for place in range(length)
        ] + [None]

    def token_at(self, place: int) -> int | None:
        return self._tokens[place] if place < self.length else None

    def forced_tokens(self) -> list[int]:
        begin = min(self.num_seen, self.length)
        return self._tokens[begin : self._tokens.index(None, begin)]  # type: ignore[return-value]

    def copy(self) -> Runs:
        return copy.copy(self)

    def mask_into(self, mask: Any) -> None:
        token = self.token_at(self.num_seen)
        mask.fill(0xFFFFFFFF if token is None else 0)
        if token is not None:
            mask[token >> 5] = 1 << (token & 31)

    def accept(self, token_id: int) -> None:
        assert self.token_at(self.num_seen) in (None, token_id), "a token that the mask forbids"
        self.num_seen += 1

    @property
    def is_finished(self) -> bool:
        return self.num_seen >= self.length


class Adapters:
    """Five names, the first ones asked for most. Loading one again makes another version of it."""

    def __init__(self, seed: int) -> None:
        self._random = Random(f"whose adapter {seed}")
        self._loaded: dict[str, Adapter] = {}
        self._num_loaded = 0

    def draw(self, options: Options) -> Adapter | None:
        random = self._random
        if not options.max_adapters or random.random() >= options.adapter_rate:
            return None
        name = random.choice("aaabbbccde")
        if name not in self._loaded or random.random() < options.reload_rate:
            number = self._num_loaded = self._num_loaded + 1
            self._loaded[name] = Adapter(name, f"/{name}", number, 1, 1, number, str(number))
        return self._loaded[name]


@dataclass(frozen=True)
class Arrival:
    """A request, when it comes, and the tokens that it must bring.

    stop_after: a stop string "appears" with that many tokens. abort_after: the client leaves then.
    tokens, reason, stop_reason: the whole answer if nothing goes wrong. accepted: else RequestError at submit.
    vector: the answer of a request that asks for one. breaks_at: steps that bring it beyond that index fail.
    follows: the request whose pages it is told of; waits: it comes when that has ended.
    """

    tick: int
    request: Request
    accepted: bool
    tokens: list[int]
    reason: FinishReason
    stop_reason: int | str | None
    stop_after: int | None = None
    abort_after: int | None = None
    vector: tuple[float, ...] | None = None
    breaks_at: int | None = None
    # The request that computes its prompt for it.
    follows: str | None = None
    waits: bool = False


def draw_options(seed: int) -> Options:
    random = Random(f"options {seed}")
    adapters = Random(f"adapters {seed}")
    tiers = Random(f"tiers {seed}")
    hosts = Random(f"hosts {seed}")
    transfers = Random(f"transfers {seed}")
    host_pages = hosts.choice([0, 0, 0, 12, 60])
    page_size = random.choice([1, 2, 3, 4, 4, 8, 16])
    max_num_seqs = random.choice([1, 2, 3, 4, 5, 6, 8, 8])
    max_model_len = random.choice([8, 16, 24, 40, 64])
    windows = random.choice(WINDOWS)
    if Random(f"chunks {seed}").random() < 0.3:
        windows = tuple(None if window is None else Chunk(window) for window in windows)
    groups = len(windows)
    whole_context = -(-max_model_len // page_size) * groups
    num_pages = random.choice(
        [
            # Less than one whole context, just one, a few (retraction), and enough for all.
            max(1, whole_context - 1),
            whole_context,
            whole_context + random.randint(1, 4),
            whole_context + random.randint(1, 4),
            whole_context + random.randint(1, 12) * groups,
            2 * whole_context,
            (max_num_seqs + 3) * whole_context,
        ]
    )
    calm = random.random() < 0.3
    return Options(
        page_size=page_size,
        num_pages=num_pages,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + random.choice([0, 1, 3, 8, 16, 64]),
        max_model_len=max_model_len,
        vocab_size=random.choice([8, 40, 1000, 1000]),
        alphabet=random.choice([1, 2, 2, 3]),
        eos_rate=random.choice([0.0, 0.0, 0.02, 0.1, 0.3]),
        depth=random.choice([1, 2, 2]),
        prefix_caching=random.random() < 0.8,
        eviction_policy=random.choice(sorted(EVICTION_POLICIES)),
        watermark=random.choice([0.0, 0.0, 0.05, 0.2]),
        ticks=random.choice([60, 150, 300]),
        arrival_rate=random.choice([0.1, 0.3, 0.5]),
        burst=random.choice([1, 1, 4, 12]),
        namespaces=random.choice([1, 1, 2]),
        eagerness=random.choice([0.0, 0.0, 0.3, 1.0]),
        abort_rate=0.0 if calm else random.choice([0.0, 0.02, 0.1]),
        abort_burst_rate=0.0 if calm else random.choice([0.0, 0.0, 0.02]),
        fail_rate=0.0 if calm else random.choice([0.0, 0.0, 0.01, 0.05]),
        poison=random.random() < 0.5,
        constrained_rate=random.choice([0.0, 0.3, 0.7]),
        jump_ahead=random.random() < 0.8,
        policy=random.choice(sorted(POLICIES)),
        pool_rate=random.choice([0.0, 0.0, 0.1, 0.4]),
        windows=windows,
        num_snapshots=random.choice([None, None, None, None, 0, 1, 3, 20]),
        spoil_rate=0.0 if calm else Random(f"spoils {seed}").choice([0.0, 0.0, 0.02, 0.1]),
        culprit_rate=0.0 if calm else Random(f"culprits {seed}").choice([0.0, 0.0, 0.02, 0.1]),
        max_draft_tokens=Random(f"drafts {seed}").choice([0, 0, 1, 2, 3, 5, 12]),
        draft_accuracy=Random(f"accuracy {seed}").choice([0.0, 0.5, 0.8, 0.95, 1.0]),
        budgets=Random(f"budgets {seed}").choice(BUDGETS),
        unseen_drafts=Random(f"unseen {seed}").random() < 0.5,
        max_adapters=adapters.choice([0, 0, 0, 1, 2, 3]),
        adapter_rate=adapters.choice([0.3, 0.8, 1.0]),
        reload_rate=adapters.choice([0.0, 0.05, 0.2]),
        tier_pages=tiers.choice([0, 3, 20, 200]),
        tier_eagerness=tiers.choice([0.2, 0.5, 0.9]),
        tier_timeout_s=tiers.choice([0.02, 1.0, 1.0]),
        host_pages=host_pages,
        has_disk=not host_pages or hosts.random() < 0.6,
        transfer_rate=transfers.choice([0.0, 0.0, 0.3, 0.8]),
        transfer_eagerness=transfers.choice([0.2, 0.5, 0.9]),
        transfer_timeout_s=transfers.choice([0.03, 0.2, 1.0]),
        kept_share=transfers.choice([0.1, 0.5, 1.0]),
    )


def calm_options(seed: int) -> Options:
    """Options under which every request is accepted and finishes, whatever the sizes are varied to."""
    options = draw_options(seed)
    return dataclasses.replace(
        options,
        num_pages=max(options.num_pages, options.whole_context),
        abort_rate=0.0,
        abort_burst_rate=0.0,
        fail_rate=0.0,
        culprit_rate=0.0,
        spoil_rate=0.0,
        ticks=60,
    )


def draw_arrivals(seed: int, options: Options) -> list[Arrival]:
    random = Random(f"arrivals {seed}")
    # Of its own, so that a policy changes the order of a workload and nothing else.
    whose = Random(f"whose {seed}")
    breaks = Random(f"breaks {seed}")
    speculates = Random(f"speculates {seed}")
    adapters = Adapters(seed)
    longest = options.max_model_len - 1
    systems = [
        _draw_tokens(random, options, random.randint(1, random.choice([longest, 1 + longest // 2, 4])))
        for _ in range(3)
    ]
    earlier: list[list[int]] = []
    arrivals: list[Arrival] = []
    for tick in range(options.ticks):
        if random.random() >= options.arrival_rate / options.burst:
            continue
        for _ in range(options.burst):
            kind = random.random()
            if earlier and kind < 0.2:
                # n choices of one prompt.
                prompt = list(earlier[-1][: random.randint(1, len(earlier[-1]))])
            elif earlier and kind < 0.4:
                # The next turn of a conversation: prompt, answer, question.
                prompt = random.choice(earlier) + _draw_tokens(random, options, random.randint(0, 4))
            elif kind < 0.8:
                prompt = random.choice(systems) + _draw_tokens(random, options, random.randint(0, 6))
            else:
                prompt = _draw_tokens(random, options, random.randint(1, longest))
            if len(prompt) > longest and random.random() < 0.95:
                prompt = prompt[:longest]
            request = Request(
                request_id=f"r{len(arrivals)}",
                prompt_token_ids=prompt,
                sampling=_draw_sampling(random, options, len(prompt)),
                namespace="" if options.namespaces == 1 else random.choice(["", "b"]),
                constraint=_draw_runs(random, options),
                priority=whose.choice([-3, 0, 0, 0, 7]),
                fairness_key=whose.choice(["", "", "a", "b"]),
                speculate=speculates.random() < 0.9,
                max_draft_tokens=speculates.choice([None, None, None, 0, 1, 4]),
                adapter=adapters.draw(options),
            )
            if random.random() < options.pool_rate:
                pooling = random.choice([Pooling("last"), Pooling("mean"), Pooling("logprobs", (1, 3))])
                request = dataclasses.replace(
                    request, sampling=SamplingParams(temperature=0.0), pooling=pooling, constraint=None
                )
            arrival = _expect(tick, request, options)
            if arrival.accepted:
                earlier.append(prompt + arrival.tokens)
                if random.random() < 0.1 and arrival.tokens:
                    stop_after = random.randint(1, len(arrival.tokens))
                    stops = dataclasses.replace(request.sampling, stop=("what the simulator calls a stop string",))
                    request = dataclasses.replace(request, sampling=stops)
                    arrival = dataclasses.replace(arrival, request=request, stop_after=stop_after)
                if random.random() < 0.5 * min(1.0, 10 * options.abort_rate):
                    abort_after = random.randint(0, len(arrival.tokens))
                    arrival = dataclasses.replace(arrival, abort_after=abort_after)
                if options.culprit_rate and breaks.random() < options.culprit_rate:
                    place = breaks.randrange(len(prompt) + max(1, len(arrival.tokens)))
                    arrival = dataclasses.replace(arrival, breaks_at=place)
            arrivals.append(arrival)
    return _part(seed, options, arrivals) if options.has_transfer else arrivals


def _part(seed: int, options: Options, arrivals: list[Arrival]) -> list[Arrival]:
    """Of some, the prompt comes to another server first, and they come to this one later, in a namespace of theirs."""
    random = Random(f"apart {seed}")
    parted: list[Arrival] = []
    for arrival in arrivals:
        request = arrival.request
        if request.pooling is not None or not arrival.accepted or random.random() >= options.transfer_rate:
            parted.append(arrival)
            continue
        constraint = request.constraint.copy() if isinstance(request.constraint, Runs) else None
        sampling = dataclasses.replace(
            request.sampling, max_tokens=1, min_tokens=min(1, request.sampling.min_tokens), stop=()
        )
        prompt, adapter = request.prompt_token_ids, request.adapter
        kind = random.random()
        if kind < 0.05:
            prompt = [1 + options.alphabet - prompt[0], *prompt[1:]]
        elif kind < 0.1:
            adapter = None
        first = dataclasses.replace(
            request,
            request_id=f"p{request.request_id}",
            prompt_token_ids=prompt,
            adapter=adapter,
            sampling=sampling,
            constraint=constraint,
            transfer=Transfer(keep=True),
        )
        parted.append(_expect(arrival.tick, first, options))
        later = min(options.ticks - 1, arrival.tick + random.choice([0, 3, 6, 10, 30]))
        request = dataclasses.replace(request, namespace="apart")
        parted.append(
            dataclasses.replace(
                arrival, tick=later, request=request, follows=first.request_id, waits=random.random() < 0.9
            )
        )
    return sorted(parted, key=lambda arrival: arrival.tick)


def _draw_tokens(random: Random, options: Options, length: int) -> list[int]:
    return [1 + random.randrange(options.alphabet) for _ in range(length)]


def _draw_runs(random: Random, options: Options) -> Runs | None:
    if not options.constrained_rate or random.random() >= options.constrained_rate:
        return None
    return Runs(
        random.randrange(100),
        options.vocab_size,
        free=random.choice([0, 1, 1, 3]),
        run=random.choice([1, 2, 5, 9, 20]),
        length=random.choice([1, 7, 12, 1000]),
    )


def _draw_sampling(random: Random, options: Options, prompt_length: int) -> SamplingParams:
    room = options.max_model_len - prompt_length
    max_tokens: int | None = random.randint(1, max(1, room))
    if random.random() < 0.3:
        max_tokens = min(max(1, room), random.randint(1, 3))
    if random.random() < 0.05:
        max_tokens = None
    min_tokens = random.randint(1, 6) if random.random() < 0.2 else 0
    hot = random.random() < 0.5
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens if max_tokens is not None else min_tokens),
        temperature=random.choice([0.3, 1.0]) if hot else 0.0,
        top_k=random.choice([0, 5]),
        seed=random.choice([0, 1, 2, -5, 2**63 + 11]) if hot else None,
        stop_token_ids=tuple(random.sample(range(options.vocab_size), 2)) if random.random() < 0.2 else (),
        ignore_eos=random.random() < 0.2,
        **_draw_extras(random),
    )


def _draw_extras(random: Random) -> dict[str, Any]:
    """Penalties and the like, for one request in five."""
    if random.random() < 0.8:
        return {}
    return random.choice(
        [
            {"presence_penalty": 0.5},
            {"frequency_penalty": -1.0, "logprobs": 0},
            {"repetition_penalty": 1.2},
            {"logit_bias": ((1, -5.0),)},
            {"bad_words": ((1, 2),)},
            {"logprobs": 2},
            {"prompt_logprobs": 0},
        ]
    )


def _expect(tick: int, request: Request, options: Options) -> Arrival:
    """The answer by the oracle, and whether the request can be served at all."""
    prompt, params = request.prompt_token_ids, request.sampling
    cache_tokens = options.cache_tokens
    max_length = options.max_model_len
    adapter = 0 if request.adapter is None else int(request.adapter.weights)
    refused = Arrival(tick, request, False, [], FinishReason.ERROR, None)
    if request.pooling is not None:
        if len(prompt) > min(options.max_model_len, cache_tokens):
            return refused
        model = options.model
        vector = tuple(expected_vector(prompt, request.pooling, model.windows, model.has_state, adapter).tolist())
        return Arrival(tick, request, True, [], FinishReason.STOP, None, vector=vector)
    if len(prompt) >= options.max_model_len:
        return refused
    if params.max_tokens is not None:
        max_length = len(prompt) + params.max_tokens
        if max_length > options.max_model_len or max_length - 1 > cache_tokens:
            return refused
    elif len(prompt) >= cache_tokens and max_length - 1 > cache_tokens:
        return refused
    max_length = min(max_length, cache_tokens + 1)
    eos = () if params.ignore_eos else (EOS,)
    tokens: list[int] = []
    runs = request.constraint
    assert runs is None or isinstance(runs, Runs)
    forced: dict[str, Any] = {} if runs is None else {"forced": runs.token_at}
    for token in expected_stream(options.model, prompt, params, (EOS,), **forced, adapter=adapter):
        tokens.append(token)
        if token in eos or token in params.stop_token_ids:
            stop_reason = token if token != EOS else None
            return Arrival(tick, request, True, tokens, FinishReason.STOP, stop_reason)
        if len(prompt) + len(tokens) >= max_length:
            break
        if runs is not None and len(tokens) >= runs.length:
            return Arrival(tick, request, True, tokens, FinishReason.STOP, None)
    return Arrival(tick, request, True, tokens, FinishReason.LENGTH, None)
