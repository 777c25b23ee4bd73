"""What can be set, as frozen dataclasses. `serve.py` fills them from flags; "auto" (None) is resolved once at start.

Imports nothing of ours, so that `--help` and the scheduler's tests stay free of torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.keys import KeyEntry

# What a chat template gets from the server and from nobody else.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how its weights are held.

    path: a directory in HF format, or a hub id. dtype: auto, bfloat16, float16 or float32.
    load_format: auto (safetensors) or dummy (random weights). max_model_len: None is the model's own limit.
    quantization: int8, int4 or fp8, to which weights are rounded as they are read; auto takes them as they are, and so
    does the name of the checkpoint's own method.
    packed_input_bits: 16 or 8, to which a CPU rounds inputs of weights that stay packed; 8 is what llama.cpp does. On a
    GPU 8 lets those be float8 whose checkpoint is for that.
    seed: of dummy weights and of requests without a seed of their own; None draws one.
    generation_config: auto (the model's sampling defaults apply) or none (OpenAI's).
    runner: auto, generate or pooling. pooling: auto, cls, last, max or mean. score_tokens: yes and no. See
    models/abilities.py.
    """

    path: str = ""
    tokenizer_path: str | None = None
    served_names: tuple[str, ...] = ()
    revision: str | None = None
    download_dir: str | None = None
    dtype: str = "auto"
    load_format: str = "auto"
    quantization: str = "auto"
    packed_input_bits: int = 16
    max_model_len: int | None = None
    generation_config: str = "auto"
    chat_template: str | None = None
    seed: int | None = None
    runner: str = "auto"
    pooling: str = "auto"
    score_tokens: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The KV cache. Size: num_pages, else kv_cache_bytes, else memory_fraction of what is free after the weights.

    memory_fraction None means the executor's own sane share. kv_cache_dtype: auto (the model's), bfloat16, float16,
    float32 or int8 (on a CPU), fp8 or fp8_e4m3 (on a GPU).
    """

    page_size: int = 16
    num_pages: int | None = None
    kv_cache_bytes: int | None = None
    memory_fraction: float | None = None
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    eviction_policy: str = "lru"


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """How steps are built.

    max_num_seqs: sequences that run at once. max_num_batched_tokens: token budget of a step, decode rows included.
    max_queued_requests: waiting requests before a 429. overlap: depth 2 (build N+1 while N runs), else depth 1.
    admission_watermark: share of the pages that must stay available when a retracted sequence is admitted again.
    jump_ahead: forced tokens are appended without a forward; the tokens are the same without it (benches).
    ttft_slo_s, max_queue_wait_s: a request that would wait for longer, by estimate, gets a 429 (engine/admission.py).
    queue_timeout_s: how long a request may wait to be admitted. request_timeout_s: from submit to the end, also for a
    request that asks for more. None: for ever.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_queued_requests: int = 4096
    policy: str = "fcfs"
    overlap: bool = True
    admission_watermark: float = 0.05
    jump_ahead: bool = True
    queue_timeout_s: float | None = None
    request_timeout_s: float | None = None
    ttft_slo_s: float | None = None
    max_queue_wait_s: float | None = None


LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs")


@dataclass(frozen=True, slots=True)
class LogprobOptions:
    """What answers say of tokens' probabilities.

    mode: of sampled tokens, raw_logprobs: as the model says them; processed_logprobs: as they are drawn, after
    penalties, masks, temperature and filters (greedy ones: after penalties and masks). Of a prompt's tokens always the
    former. most: how many alternatives a request may ask for beside each token; -1: as many as there are words.
    """

    mode: str = "raw_logprobs"
    most: int = 20

    @property
    def processed(self) -> bool:
        return self.mode == "processed_logprobs"

    def most_of(self, vocab_size: int) -> int:
        """`most` as a number."""
        return vocab_size if self.most == -1 else min(self.most, vocab_size)

    def __post_init__(self) -> None:
        if self.mode not in LOGPROBS_MODES:
            raise StartupError(f"logprobs_mode {self.mode!r} is not one of {', '.join(LOGPROBS_MODES)}")
        if self.most < -1:
            raise StartupError("max_logprobs must be at least 0, or -1 for as many as there are words")


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """Speculative decoding (engine/speculation/): it changes how fast tokens come and never which.

    method: None is off; ngram, suffix, draft_model, eagle3 or mtp. model: of the last three, a directory in HF format
    or a hub id; mtp takes the served model's own layer where it is None. revision: of a hub id. use_vocabulary_map: the
    draft model may have another vocabulary. num_draft_tokens: most drafts of one row in one step.
    draft_sample_method: greedy (the draft's most probable token) or probabilistic (drawn with the target's own noise).
    prompt_lookup_min, prompt_lookup_max: tokens of a match. suffix_*: see engine/speculation/suffix.py.
    by_batch_size: (from, to, drafts): most drafts where so many sequences decode; () sets nothing. adaptive: fewer
    drafts, or none, where they do not pay (engine/speculation/budgets.py); else always as many as are allowed.
    """

    method: str | None = None
    model: str | None = None
    revision: str | None = None
    use_vocabulary_map: bool = False
    num_draft_tokens: int = 0
    draft_sample_method: str = "greedy"
    prompt_lookup_min: int = 5
    prompt_lookup_max: int = 5
    suffix_max_tree_depth: int = 24
    suffix_max_cached_requests: int = 10_000
    suffix_max_spec_factor: float = 1.0
    suffix_min_token_prob: float = 0.1
    by_batch_size: tuple[tuple[int, int, int], ...] = ()
    adaptive: bool = True


@dataclass(frozen=True, slots=True)
class LoraModule:
    """An adapter that is there from the start. pinned: see AdapterStore. base: the model that it says it is of."""

    name: str
    path: str
    pinned: bool = False
    base: str | None = None


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """LoRA adapters. enable: the model takes any. max_loras: of as many in one step. max_lora_rank: the highest.
    max_lora_mib: what a GPU has for each; None for what factors of that rank take.

    max_cpu_loras: as many have their weights in host memory, and those that take part in steps count; None for
    max(max_loras, 32). Others are read again when somebody asks for them. max_loaded: names that are known at once.
    root: the only directory that clients may load from, and where a name that is not known is looked for.
    unload: an adapter that is in use waits for its requests (wait), or is not unloaded (refuse).
    """

    enable: bool = False
    max_loras: int = 8
    max_lora_rank: int = 64
    max_lora_mib: int | None = None
    max_cpu_loras: int | None = None
    max_loaded: int = 10_000
    modules: tuple[LoraModule, ...] = ()
    root: str | None = None
    unload: str = "wait"


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """flush_interval_ms: how long a streamed token may wait for company; first and last tokens never wait.

    None: not at all while the event loop has time, else as long as that it keeps up (pace.py).
    """

    flush_interval_ms: float | None = None


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """HTTP. Sizes in bytes, times in seconds.

    api_keys, admin_api_key: given as text or as their SHA-256, and kept as the latter. key_entries: those of
    --key-file, with their limits; key_usage_path: where the tokens that they used this month are written down.
    admin_api_key: the only key of admin routes, where it is set; else api_keys are theirs too.
    isolate_api_keys: prompts of one key find nothing in the cache of another. None: where there are several keys.
    tool_call_parser, reasoning_parser: a name of server/parsers/registry.py, "none", or "auto" for what the chat
    template shows. default_chat_template_kwargs: the template's options where a request does not give its own.
    reasoning_budget: most tokens of reasoning where a request names no budget, None for no limit.
    weights_root: the directory that /update_weights_from_disk may read from; None: it may not.
    weight_update_timeout_s: of a trainer that stops amid an update. write_timeout_s: a client that reads nothing for
    so long is cut off; header_timeout_s: one that sends no whole head.
    max_connections_per_address: 0 is any number. max_host_memory: bytes of the process, see server/memory.py.
    handover: "unix:PATH", see server/handover.py. resume_journal: see server/journal.py.
    stall_timeout_s: without a step that comes to an end in so long, while there is work, /health is 503 and all stacks
    are logged; stall_action: "exit" ends the process then, "report" does not.
    response_store_size, response_store_bytes: how many responses of /v1/responses are kept for a later turn, and how
    much of them; 0 keeps none. allowed_origins: web pages that may read answers; "local" stands for all of this
    machine's, "*" for all there are. refuse_max_tokens: a max_tokens that does not fit the context is an error and not
    cut to what fits. web: whether there are pages for people. live_text: /live and /requests/{id}/cache show what is in
    prompts. trace_file: a trace of the whole run goes there. log_format: text or json. prices: file of what tokens
    cost.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str | bytes, ...] = ()
    admin_api_key: str | bytes | None = None
    key_entries: tuple[KeyEntry, ...] = ()
    key_usage_path: str | None = None
    isolate_api_keys: bool | None = None
    protect_metrics: bool = False
    max_body_bytes: int = 8 * 1024 * 1024
    allowed_origins: tuple[str, ...] = ("local",)
    drain_timeout_s: float = 30.0
    keep_alive_interval_s: float = 15.0
    metrics_prefix: str = "vllm"
    stall_timeout_s: float = 60.0
    stall_action: str = "report"
    root_path: str = ""
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    response_store_size: int = 1000
    response_store_bytes: int = 64 * 1024 * 1024
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_budget: int | None = None
    refuse_max_tokens: bool = False
    weights_root: str | None = None
    weight_update_timeout_s: float = 300.0
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    write_timeout_s: float = 60.0
    header_timeout_s: float = 30.0
    max_connections_per_address: int = 0
    max_host_memory: int | None = None
    handover: str | None = None
    resume_journal: str | None = None
    web: bool = True
    live_text: bool = False
    trace_file: str | None = None
    log_format: str = "text"
    access_log: bool = False
    prices: str | None = None
    otlp_traces_endpoint: str | None = None
    kv_events: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        # Nobody needs the keys themselves any more.
        object.__setattr__(self, "api_keys", tuple(map(_digest, self.api_keys)))
        if self.admin_api_key is not None:
            object.__setattr__(self, "admin_api_key", _digest(self.admin_api_key))

    @property
    def num_keys(self) -> int:
        return len(self.api_keys) + len(self.key_entries)


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """Pages between servers. connector: None for none. role: kv_both, kv_producer (keeps pages) or kv_consumer (reads).

    engine_id: what this server is called, None for a random name. host, port: where peers find it, 0 is a free port.
    peers: networks that it reads from, whatever a client says. keep_timeout_s: pages are kept for a reader for so long,
    and of all pages at most kept_share. receive_timeout_s: after that a prompt is computed here. backends: of NIXL.
    data_port: of the TcpConnector.
    """

    connector: str | None = None
    role: str = "kv_both"
    engine_id: str | None = None
    host: str = "127.0.0.1"
    port: int = 0
    peers: tuple[str, ...] = (
        *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"),
        *("::1/128", "fc00::/7"),
    )
    keep_timeout_s: float = 120.0
    kept_share: float = 0.25
    receive_timeout_s: float = 30.0
    backends: tuple[str, ...] = ("UCX",)
    data_port: int = 0

    @property
    def keeps(self) -> bool:
        """Whether it answers for others with one token."""
        return self.connector is not None and self.role != "kv_consumer"

    @property
    def reads(self) -> bool:
        """Whether it takes pages of others."""
        return self.connector is not None and self.role != "kv_producer"


@dataclass(frozen=True, slots=True)
class TierOptions:
    """Pages on the disk, and a device's in host memory. directory: None for no disk. max_bytes: of its files.
    timeout_s: a prompt waits for its pages no longer; the rest is computed. host_bytes: of page-locked memory, 0 for
    none."""

    directory: Path | None = None
    max_bytes: int = 32 * 10**9
    timeout_s: float = 5.0
    host_bytes: int = 0

    @property
    def is_given(self) -> bool:
        """Whether there is any tier."""
        return self.directory is not None or self.host_bytes > 0


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """cuda_graph: lazy, start or off. profile_dir: where traces go.

    kernels: a kit that was built beforehand (executor/cuda_kit.py).

    nvtx: off, steps (ranges around schedule, launch, commit, capture) or layers (those, and the parts of every layer).
    """

    cuda_graph: str = "lazy"
    kernels: str | None = None
    profile_dir: str | None = None
    nvtx: str = "off"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything. device: auto, cpu or cuda. num_threads: compute threads on the CPU (of each rank), None for auto.

    tensor_parallel_size: ranks, processes that compute one model together, on GPUs each on one of its own.
    expert_parallel: of experts each has some whole, and not a part of each.
    deterministic: a request's tokens and log-probabilities have the same bits whatever runs beside it. True: or the
    start fails. None: where it costs nothing. debug_faults: see executor/faults.py. check_invariants: the KV cache is
    checked whole whenever the engine is idle, and not a part of the time.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    logprobs: LogprobOptions = field(default_factory=LogprobOptions)
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    transfer: TransferOptions = field(default_factory=TransferOptions)
    tiers: TierOptions = field(default_factory=TierOptions)
    stream: StreamOptions = field(default_factory=StreamOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    cuda: CudaOptions = field(default_factory=CudaOptions)
    device: str = "auto"
    num_threads: int | None = None
    tensor_parallel_size: int = 1
    expert_parallel: bool = False
    deterministic: bool | None = None
    debug_faults: str | None = None
    check_invariants: bool = False


def _digest(key: str | bytes) -> bytes:
    return key if isinstance(key, bytes) else hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def shortened(word: str, most: int = 64) -> str:
    """As an error shows what somebody wrote: its beginning."""
    return word if len(word) <= most else f"{word[:most]}..."


class StartupError(Exception):
    """The server cannot start; `str(error)` is one readable line. `serve.py` prints it and exits with 1."""
