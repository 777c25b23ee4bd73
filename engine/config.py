"""What can be set, as frozen dataclasses. `serve.py` fills them from flags; "auto" (None) is resolved once at start.

Imports nothing of ours, so that `--help` and the scheduler's tests stay free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What a chat template gets from the server and from nobody else.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how its weights are held.

    path: a directory in HF format, or a hub id. dtype: auto, bfloat16, float16 or float32.
    load_format: auto (safetensors) or dummy (random weights). max_model_len: None is the model's own limit.
    quantization: int8 or int4, to which weights are rounded as they are read; auto takes them as they are, and so does
    the name of the checkpoint's own method.
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

    memory_fraction None means the executor's own sane share.
    """

    page_size: int = 16
    num_pages: int | None = None
    kv_cache_bytes: int | None = None
    memory_fraction: float | None = None
    enable_prefix_caching: bool = True
    eviction_policy: str = "lru"


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """How steps are built.

    max_num_seqs: sequences that run at once. max_num_batched_tokens: token budget of a step, decode rows included.
    max_queued_requests: waiting requests before a 429. overlap: depth 2 (build N+1 while N runs), else depth 1.
    admission_watermark: share of the pages that must stay available when a retracted sequence is admitted again.
    jump_ahead: forced tokens are appended without a forward; the tokens are the same without it (benches).
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


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """flush_interval_ms: how long a streamed token may wait for company; first and last tokens never wait."""

    flush_interval_ms: float = 10.0


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """HTTP. Sizes in bytes, times in seconds.

    admin_api_key: the only key of admin routes, where it is set; else api_keys are theirs too.
    isolate_api_keys: prompts of one key find nothing in the cache of another. None: where there are several keys.
    tool_call_parser, reasoning_parser: a name of server/parsers/registry.py, "none", or "auto" for what the chat
    template shows. default_chat_template_kwargs: the template's options where a request does not give its own.
    reasoning_budget: most tokens of reasoning where a request names no budget, None for no limit.
    response_store_size, response_store_bytes: how many responses of /v1/responses are kept for a later turn, and how
    much of them; 0 keeps none. allowed_origins: web pages that may read answers; "local" stands for all of this
    machine's, "*" for all there are. refuse_max_tokens: a max_tokens that does not fit the context is an error and not
    cut to what fits.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    admin_api_key: str | None = None
    isolate_api_keys: bool | None = None
    protect_metrics: bool = False
    max_body_bytes: int = 8 * 1024 * 1024
    allowed_origins: tuple[str, ...] = ("local",)
    drain_timeout_s: float = 30.0
    keep_alive_interval_s: float = 15.0
    metrics_prefix: str = "vllm"
    unresponsive_after_s: float = 60.0
    root_path: str = ""
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    response_store_size: int = 1000
    response_store_bytes: int = 64 * 1024 * 1024
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_budget: int | None = None
    refuse_max_tokens: bool = False


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """cuda_graph: lazy, start or off. kv_cache_dtype: auto, fp8 or fp8_e4m3. profile_dir: where traces go.

    kernels: a kit that was built beforehand (executor/cuda_kit.py).

    nvtx: off, steps (ranges around schedule, launch, commit, capture) or layers (those, and the parts of every layer).
    """

    cuda_graph: str = "lazy"
    kv_cache_dtype: str = "auto"
    kernels: str | None = None
    profile_dir: str | None = None
    nvtx: str = "off"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything. device: auto, cpu or cuda. num_threads: compute threads on the CPU, None for auto.

    deterministic: a request's tokens and log-probabilities have the same bits whatever runs beside it. True: or the
    start fails. None: where it costs nothing.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    stream: StreamOptions = field(default_factory=StreamOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    cuda: CudaOptions = field(default_factory=CudaOptions)
    device: str = "auto"
    num_threads: int | None = None
    deterministic: bool | None = None


class StartupError(Exception):
    """The server cannot start; `str(error)` is one readable line. `serve.py` prints it and exits with 1."""
