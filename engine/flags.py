"""Command-line flags -> EngineConfig. Accepts vLLM's and SGLang's spelling of what exists here; imports no torch.

What is not listed does not exist: an unknown flag ends the start with a line that names it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from engine.config import (
    CacheOptions,
    CudaOptions,
    EngineConfig,
    ModelOptions,
    SchedulerOptions,
    StartupError,
    StreamOptions,
    shortened,
)
from engine.draft_flags import add_draft_flags, draft_options
from engine.flag_types import count, fraction, given, interval, not_negative, positive, show_defaults
from engine.logprob_flags import add_logprob_flags, logprob_options
from engine.lora import flags as lora
from engine.server_flags import add_server_flags, add_watching_flags, server_options
from engine.tiers import flags as tiers
from engine.transfer import flags as transfer

DEMO_MODEL = Path(__file__).parent / "demo"

_DTYPES = {
    "auto": "auto",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "half": "float16",
    "float16": "float16",
    "float": "float32",
    "float32": "float32",
}
_TASKS = {"auto": "auto", "generate": "generate", "embed": "pooling", "embedding": "pooling", "score": "pooling"}


# Flags of vLLM and SGLang that switch on what is always on here.
_ALWAYS = (
    "--enable-auto-tool-choice",
    "--enable-chunked-prefill",
    "--enable-mixed-chunk",
    "--enable-metrics",
    "--enable-cache-report",
    "--enable-prompt-tokens-details",
    "--enable-request-id-headers",
    "--enable-sleep-mode",
)
# How many stages, or copies, of a model; one is all there is.
_ALWAYS_ONE = (
    "--pipeline-parallel-size",
    "-pp",
    "--pp-size",
    "--data-parallel-size",
    "-dp",
    "--dp-size",
)


def _one(text: str) -> int:
    if text != "1":
        raise argparse.ArgumentTypeError(f"'{text}': this server runs on one device")
    return 1


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print two screens of usage before it."""
        # Beside words that nobody knows there are lists of spellings, and paths.
        most = 64 if message.startswith("unrecognized") else 256
        shown = " ".join(shortened(word, most) for word in message.split(" "))
        self.exit(2, f"error: {shown} ({self.meant(message)}--help lists the flags)\n")

    def meant(self, message: str) -> str:
        """Of a message about flags that nobody knows, which ones may have been meant. None is taken in their place."""
        _, told, words = message.partition("unrecognized arguments: ")
        if not told:
            return ""
        unknown = [word.partition("=")[0].replace("_", "-") for word in words.split() if word.startswith("--")]
        nearest = [get_close_matches(word, self._option_string_actions, 1, 0.7) for word in unknown]
        names = dict.fromkeys(name for found in nearest for name in found)
        return f"did you mean {' and '.join(names)}? " if names else ""


def make_parser(kind: type[Parser] = Parser) -> argparse.ArgumentParser:
    """The parser; every option's default is None where EngineConfig's own default applies."""
    parser = kind(
        prog="python -m engine.serve",
        description="Serve a language model over an OpenAI-compatible API.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Without a model the bundled demo model is served. Flags in one line are spellings of the same option.",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "model_positional", nargs="?", metavar="MODEL", help="directory in HF format, GGUF file, or hub id"
    )
    model.add_argument("--model", "--model-path", dest="model", metavar="MODEL", help="the same as a flag")
    model.add_argument("--tokenizer", "--tokenizer-path", dest="tokenizer", metavar="DIR")
    model.add_argument("--revision", help="branch, tag or commit of a hub id")
    model.add_argument("--download-dir", metavar="DIR", help="where hub downloads are kept")
    model.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="names in the API, the first is shown; '*': any name"
    )
    model.add_argument("--dtype", choices=sorted(_DTYPES), help="auto: bfloat16 where the device has it, else float32")
    model.add_argument("--load-format", choices=["auto", "safetensors", "dummy"], help="dummy: random weights")
    model.add_argument(
        "--quantization",
        "-q",
        metavar="KIND",
        help="int8, int4, fp8: weights of layers are rounded as they are read (CPU); awq and other methods: the "
        "checkpoint must be of that one",
    )
    model.add_argument(
        "--packed-input-bits",
        type=int,
        choices=[8, 16],
        help="to which inputs of packed weights are rounded on a CPU: 16 is nearly exact, 8 quicker and as llama.cpp "
        "has it; on a GPU 8 rounds inputs to float8 where the checkpoint is for that",
    )
    model.add_argument(
        "--max-model-len",
        "--context-length",
        dest="max_model_len",
        type=count,
        metavar="TOKENS",
        help="context length (4096, 4k, 4K); default: the model's own",
    )
    model.add_argument("--chat-template", metavar="FILE|TEXT", help="instead of the model's own")
    model.add_argument(
        "--generation-config", choices=["auto", "vllm"], help="auto: the model's sampling defaults; vllm: OpenAI's"
    )
    model.add_argument("--sampling-defaults", choices=["model", "openai"], help="SGLang's spelling of the same")
    model.add_argument(
        "--seed", "--random-seed", dest="seed", type=int, help="of dummy weights and of unseeded requests"
    )

    model.add_argument(
        "--runner",
        choices=["auto", "generate", "pooling"],
        help="pooling: embeddings and no text; auto: what the model is made for (a sentence-transformers directory)",
    )
    model.add_argument("--is-embedding", dest="runner", action="store_const", const="pooling")
    model.add_argument("--task", choices=sorted(_TASKS), help="vLLM's older spelling of the same")
    model.add_argument(
        "--pooling",
        choices=["auto", "cls", "last", "max", "mean"],
        help="how embeddings are made, also of a model that says nothing of it; it goes on generating beside that",
    )
    model.add_argument(
        "--score-tokens",
        nargs=2,
        metavar=("YES", "NO"),
        help="tokens whose odds are a relevance: makes a generative reranker of the model (/score, /rerank)",
    )

    device = parser.add_argument_group("device and memory")
    device.add_argument("--device", choices=["auto", "cpu", "cuda"])
    device.add_argument(
        "--threads",
        type=count,
        metavar="N",
        help="compute threads on the CPU (of each rank); by default what the model's size pays for: a small one leaves "
        "a core to the event loop",
    )
    device.add_argument(
        "--tensor-parallel-size",
        "-tp",
        "--tp",
        "--tp-size",
        dest="tensor_parallel_size",
        type=count,
        metavar="N",
        help="processes that compute the model together, each with its part of the weights and of the KV cache, and "
        "on GPUs each on one of its own",
    )
    device.add_argument(
        "--enable-expert-parallel",
        "-ep",
        action="store_true",
        dest="expert_parallel",
        default=None,
        help="with --tensor-parallel-size: each process has some experts whole, and not a part of each",
    )
    device.add_argument(
        "--deterministic",
        "--enable-deterministic-inference",
        dest="deterministic",
        action="store_true",
        default=None,
        help="the same tokens and log-probabilities whatever runs beside a request; on anyway where it costs nothing",
    )
    device.add_argument(
        "--kv-cache-gb",
        type=positive,
        metavar="GB",
        help="size of the KV cache in 1e9 bytes; by default on a CPU a quarter of the RAM that is available, or what "
        "64 sequences of full context fill; on a GPU nine tenths of what is free",
    )
    device.add_argument("--kv-cache-memory-bytes", type=count, metavar="BYTES", help="the same in bytes")
    device.add_argument(
        "--gpu-memory-utilization",
        "--mem-fraction-static",
        dest="memory_fraction",
        type=fraction,
        metavar="F",
        help="share of the free memory for the KV cache (on a CPU: of the RAM that is available)",
    )
    device.add_argument(
        "--num-gpu-blocks-override", dest="num_pages", type=count, metavar="PAGES", help="size of the KV cache in pages"
    )
    device.add_argument("--max-total-tokens", type=count, metavar="TOKENS", help="size of the KV cache in tokens")
    device.add_argument(
        "--kv-cache-dtype",
        choices=[*sorted(_DTYPES), "int8", "fp8", "fp8_e4m3"],
        help="auto: the model's; on a CPU bfloat16, float16 or int8 (a scale for each token and head), fp8 on a GPU",
    )
    device.add_argument("--page-size", "--block-size", dest="page_size", type=count, metavar="TOKENS")

    cuda = parser.add_argument_group("CUDA")
    cuda.add_argument("--cuda-graph", choices=["lazy", "start", "off"], help="when decode graphs are captured")
    cuda.add_argument("--enforce-eager", "--disable-cuda-graph", dest="cuda_graph", action="store_const", const="off")
    cuda.add_argument(
        "--kernels", metavar="FILE", help="a kit of `python -m engine.kernels build`: FlashInfer compiles nothing here"
    )
    cuda.add_argument("--profile-dir", metavar="DIR", help="where /start_profile writes torch profiler traces")
    cuda.add_argument(
        "--nvtx",
        nargs="?",
        const="steps",
        choices=["off", "steps", "layers"],
        help="NVTX ranges for nsys: of a step's stages, or of every layer's parts too (a graph's replay has none)",
    )

    scheduler = parser.add_argument_group("scheduler and cache")
    scheduler.add_argument(
        "--max-num-seqs",
        "--max-running-requests",
        dest="max_num_seqs",
        type=count,
        metavar="N",
        help="requests that run at once",
    )
    scheduler.add_argument(
        "--max-num-batched-tokens",
        "--chunked-prefill-size",
        dest="max_num_batched_tokens",
        type=count,
        metavar="N",
        help="token budget of a step, decode rows included",
    )
    scheduler.add_argument(
        "--max-queued-requests",
        "--max-num-queued-reqs",
        dest="max_queued_requests",
        type=count,
        metavar="N",
        help="waiting requests before a 429",
    )
    scheduler.add_argument(
        "--schedule-policy",
        "--scheduling-policy",
        dest="policy",
        metavar="NAME",
        help="who is admitted next: fcfs, lpm (longest cached prefix), priority (lowest number), fair (between users) "
        "(default: fcfs, with --key-file fair)",
    )
    scheduler.add_argument(
        "--ttft-slo",
        type=positive,
        metavar="S",
        help="429 at the door for a request whose first token, by estimate, would come later",
    )
    scheduler.add_argument(
        "--max-queue-wait", type=positive, metavar="S", help="429 for one that, by estimate, would wait longer in line"
    )
    scheduler.add_argument(
        "--queue-timeout", type=not_negative, metavar="S", help="503 for a request that waited so long; 0 is off"
    )
    scheduler.add_argument(
        "--request-timeout", type=not_negative, metavar="S", help="longest that a request may take; 0 is off"
    )
    scheduler.add_argument("--radix-eviction-policy", dest="eviction_policy", metavar="NAME", help="lru, lfu or fifo")
    scheduler.add_argument(
        "--enable-prefix-caching", dest="prefix_caching", action=argparse.BooleanOptionalAction, default=None
    )
    scheduler.add_argument("--disable-radix-cache", dest="prefix_caching", action="store_false", default=None)
    scheduler.add_argument(
        "--async-scheduling",
        dest="overlap",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="build the next step while this one runs",
    )
    scheduler.add_argument(
        "--disable-overlap", "--disable-overlap-schedule", dest="overlap", action="store_false", default=None
    )
    scheduler.add_argument(
        "--flush-interval-ms",
        type=interval,
        metavar="MS",
        help="how long a streamed token may wait for company; auto (default): not at all while the event loop has time",
    )

    add_logprob_flags(parser)
    add_draft_flags(parser)
    lora.add_flags(parser)
    transfer.add_flags(parser)
    tiers.add_flags(parser)

    add_server_flags(parser)
    debug = parser.add_argument_group("looking for faults")
    debug.add_argument(
        "--debug-faults",
        metavar="SPEC",
        help="a device that misbehaves by plan: 'raise:p=0.01;nan:step=40;slow:p=0.1,s=0.5;seed=7', and hang, oom, "
        "corrupt, lost",
    )
    debug.add_argument(
        "--check-invariants", action="store_true", help="check all of the KV cache's books whenever nothing runs"
    )
    same = parser.add_argument_group("what is so here anyway")
    same.add_argument(*_ALWAYS, dest="always", action="store_true", help="always on")
    same.add_argument(*_ALWAYS_ONE, dest="devices", type=_one, metavar="1", help="one device is all there is")
    add_watching_flags(parser)
    show_defaults(model, ModelOptions())
    show_defaults(device, CacheOptions(), EngineConfig())
    show_defaults(cuda, CudaOptions())
    show_defaults(
        scheduler, SchedulerOptions(), CacheOptions(), StreamOptions(), prefix_caching="enable_prefix_caching"
    )
    return parser


def config_from(args: argparse.Namespace) -> EngineConfig:
    """Raises StartupError for combinations that make no sense."""
    if args.model and args.model_positional and args.model != args.model_positional:
        raise StartupError(f"two models are named: '{args.model_positional}' and '{args.model}'")
    path = args.model or args.model_positional or str(DEMO_MODEL)
    generation = args.generation_config
    if args.sampling_defaults:
        generation = {"model": "auto", "openai": "vllm"}[args.sampling_defaults]
    if args.runner and args.task and args.runner != _TASKS[args.task]:
        raise StartupError(f"--runner {args.runner} and --task {args.task} contradict each other")
    sizes = [
        name
        for name in ("kv_cache_gb", "kv_cache_memory_bytes", "memory_fraction", "num_pages", "max_total_tokens")
        if getattr(args, name) is not None
    ]
    if len(sizes) > 1:
        raise StartupError(f"the size of the KV cache is given {len(sizes)} times; give one of the options")
    page_size = args.page_size or CacheOptions().page_size
    num_pages = args.num_pages
    if args.max_total_tokens is not None:
        num_pages = max(1, args.max_total_tokens // page_size)
    kv_bytes = args.kv_cache_memory_bytes
    if args.kv_cache_gb is not None:
        kv_bytes = int(args.kv_cache_gb * 1e9)
    max_num_seqs = args.max_num_seqs or SchedulerOptions().max_num_seqs
    batched = args.max_num_batched_tokens or max(SchedulerOptions().max_num_batched_tokens, max_num_seqs)
    if batched < max_num_seqs:
        raise StartupError(
            f"--max-num-batched-tokens {batched} is less than --max-num-seqs {max_num_seqs}: "
            "a step must hold one token of every running sequence"
        )
    server = server_options(args)
    return EngineConfig(
        model=ModelOptions(
            path=path,
            served_names=tuple(args.served_model_name or ()),
            **given(  # type: ignore[arg-type]
                tokenizer_path=args.tokenizer,
                revision=args.revision,
                download_dir=args.download_dir,
                dtype=_DTYPES[args.dtype] if args.dtype else None,
                load_format="auto" if args.load_format == "safetensors" else args.load_format,
                quantization=args.quantization,
                packed_input_bits=args.packed_input_bits,
                max_model_len=args.max_model_len,
                generation_config="none" if generation == "vllm" else generation,
                chat_template=args.chat_template,
                seed=args.seed,
                runner=args.runner or (_TASKS[args.task] if args.task else None),
                pooling=args.pooling,
                score_tokens=tuple(args.score_tokens) if args.score_tokens else None,
            ),
        ),
        cache=CacheOptions(
            page_size=page_size,
            num_pages=num_pages,
            kv_cache_bytes=kv_bytes,
            memory_fraction=args.memory_fraction,
            **given(  # type: ignore[arg-type]
                kv_cache_dtype=_DTYPES.get(args.kv_cache_dtype, args.kv_cache_dtype),
                enable_prefix_caching=args.prefix_caching,
                eviction_policy=args.eviction_policy,
            ),
        ),
        scheduler=SchedulerOptions(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=batched,
            queue_timeout_s=args.queue_timeout or None,
            request_timeout_s=args.request_timeout or None,
            ttft_slo_s=args.ttft_slo,
            max_queue_wait_s=args.max_queue_wait,
            **given(  # type: ignore[arg-type]
                max_queued_requests=args.max_queued_requests,
                # Between keys that were told apart, no flood of one may make the others wait.
                policy=args.policy or ("fair" if server.key_entries else None),
                overlap=args.overlap,
            ),
        ),
        lora=lora.options_from(args),
        transfer=transfer.options_from(args),
        tiers=tiers.options_from(args),
        logprobs=logprob_options(args),
        speculation=draft_options(args),
        stream=StreamOptions(**given(flush_interval_ms=args.flush_interval_ms)),  # type: ignore[arg-type]
        server=server,
        cuda=CudaOptions(
            **given(  # type: ignore[arg-type]
                cuda_graph=args.cuda_graph,
                kernels=args.kernels,
                profile_dir=args.profile_dir,
                nvtx=args.nvtx,
            )
        ),
        num_threads=args.threads,
        deterministic=args.deterministic,
        debug_faults=args.debug_faults,
        check_invariants=args.check_invariants,
        **given(  # type: ignore[arg-type]
            device=args.device, tensor_parallel_size=args.tensor_parallel_size, expert_parallel=args.expert_parallel
        ),
    )


def shows_keys(argv: Sequence[str]) -> bool:
    """Whether a key stands on the command line."""
    return any(word.partition("=")[0] in ("--api-key", "--admin-api-key") for word in argv)


def as_given(message: str, argv: Sequence[str]) -> str:
    """A message, with flags by the spelling that was used of them."""
    used = {word.partition("=")[0] for word in argv}
    for action in make_parser()._actions:
        names = [name for name in action.option_strings if name.startswith("--") and not name.startswith("--no-")]
        spelled = [name for name in names if name in used]
        for name in names:
            if spelled and name not in spelled:
                message = re.sub(rf"(?<![\w-]){name}(?![\w-])", spelled[0], message)
    return message


def parse(argv: Sequence[str] | None = None) -> tuple[EngineConfig, str]:
    """argv -> (config, log level). Exits with 2 on unknown flags, raises StartupError on impossible values."""
    args = make_parser().parse_args(argv)
    return config_from(args), args.log_level
