"""Puts an Engine together: config -> model files -> device -> weights -> KV cache -> Engine. No HTTP in here.

Used by serve.py, the offline API and the benchmarks. torch is imported inside, after the environment that it
reads at import has been set.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import CudaOptions, EngineConfig, LoraOptions, StartupError
from engine.engine import Engine
from engine.executor.base import DeviceMemory
from engine.executor.faults import FaultyExecutor, parse_faults
from engine.lora.store import AdapterStore
from engine.metrics import EngineMetrics
from engine.models.abilities import Abilities, read_abilities
from engine.models.generation import GenerationDefaults
from engine.models.gguf.reader import is_gguf, model_name, open_gguf
from engine.models.hub import resolve
from engine.models.mixers import RopeSpec
from engine.models.quantisation import rounded_to
from engine.models.registry import read_spec
from engine.models.spec import ModelSpec
from engine.process import imported
from engine.report import StartupReport
from engine.speculation.registry import PROPOSERS
from engine.text import gguf
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer
from engine.transfer.fingerprint import fingerprint
from engine.transfer.registry import make_connector

if TYPE_CHECKING:
    from engine.executor.base import Executor

logger = logging.getLogger("oneloop.start")

# Ordinary words that a vocabulary may have beyond the embedding, as a share of its rows: with more it belongs to
# another model. Added tokens (a pad that was never trained) may be any number; transformers minds neither.
MAX_WORDS_OVER = 0.01
# Of the host memory that can be had, what may be page-locked: the system cannot take that back.
MOST_HOST_SHARE = 0.9


@dataclass(slots=True)
class Built:
    """An engine and what belongs to its model. tokenizer is None for a bare config with dummy weights."""

    engine: Engine
    directory: Path
    names: tuple[str, ...]
    model_config: ModelSpec
    generation_defaults: GenerationDefaults
    chat_template: ChatTemplate | None
    report: StartupReport
    abilities: Abilities


def _load_tokenizer(config: EngineConfig, directory: Path, spec: ModelSpec) -> Tokenizer | None:
    source = Path(config.model.tokenizer_path) if config.model.tokenizer_path else directory
    if config.model.load_format == "dummy" and not is_gguf(source) and not (source / "tokenizer.json").exists():
        return None
    rows = spec.vocab_size
    tokenizer = gguf.load_tokenizer(open_gguf(source)) if is_gguf(source) else Tokenizer.load(source, rows)
    over = [token_id for token_id in range(rows, tokenizer.vocab_size) if tokenizer.id_to_token(token_id) is not None]
    told = (
        f"{source / 'tokenizer.json'}: the vocabulary has {tokenizer.vocab_size} tokens, but the model's embedding "
        f"only {rows} (vocab_size in {directory / 'config.json'})"
    )
    words = len(set(over) - tokenizer.added_ids)
    if words > rows * MAX_WORDS_OVER:
        raise StartupError(told)
    if over:
        shown = ", ".join(repr(tokenizer.id_to_token(token_id)) for token_id in over[:3])
        logger.warning("%s: a prompt with %s%s is refused", told, shown, ", ..." if len(over) > 3 else "")
    return tokenizer


def _load_chat_template(directory: Path, override: str | None, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    if tokenizer is None:
        return None
    if not is_gguf(directory):
        return ChatTemplate.load(directory, override)
    if override is None:
        return gguf.load_chat_template(open_gguf(directory), tokenizer.named_tokens)
    return ChatTemplate.given(override, tokenizer.named_tokens)


def _context_length(config: EngineConfig, spec: ModelSpec, directory: Path, trained: int | None) -> int:
    """trained: tokens that the directory says texts should have at most."""
    asked, own = config.model.max_model_len, spec.context_length
    if asked is not None and asked > own:
        raise StartupError(
            f"--max-model-len {asked} is more than the model was made for: {own} "
            f"(max_position_embeddings in {directory / 'config.json'})"
        )
    budget = config.scheduler.max_num_batched_tokens
    if not spec.bidirectional:
        return asked or min(own, trained or own)
    if asked is not None and asked > budget:
        raise StartupError(
            f"--max-model-len {asked} is more than --max-num-batched-tokens {budget}: this model reads a text at once"
        )
    return asked or min(own, trained or own, budget)


def _describe_context(context: int, spec: ModelSpec, trained: int | None, budget: int) -> str:
    """With the reason why it is not the model's own, where nobody asked for less."""
    most = min(spec.context_length, trained or spec.context_length)
    if spec.bidirectional and context == budget < most:
        return f"{context} tokens of {most}: a text is read at once; --max-num-batched-tokens {most} takes all"
    if context == trained:
        return f"{context} tokens (max_seq_length in sentence_bert_config.json)"
    return f"{context} tokens"


def _pick_device(config: EngineConfig, report: StartupReport) -> str:
    """The GPU where it can be used. One that cannot is told in a row, or ends the start where it was asked for."""
    flags = [
        f"--{one.name.replace('_', '-')}"
        for one in dataclasses.fields(CudaOptions)
        if getattr(config.cuda, one.name) != one.default
    ]
    if (kv_dtype := config.cache.kv_cache_dtype).startswith("fp8"):
        flags.append(f"--kv-cache-dtype {kv_dtype}")
    asks = f"{', '.join(flags)}: needs a CUDA device" if flags else None
    if config.device == "cpu":
        if asks:
            raise StartupError(f"{asks}; this is a CPU")
        return "cpu"
    import torch

    from engine.executor import gpu_probe

    reason: str | None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of is the reason below
        if torch.cuda.is_available():
            reason = gpu_probe.too_old(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
        else:
            reason = gpu_probe.obstacle_here(torch.version.cuda)
    if reason is None:
        return "cuda"
    if config.device == "cuda":
        raise StartupError(f"--device cuda: {reason}")
    if asks:
        raise StartupError(f"{asks}: {reason}")
    if gpu_probe.driver_version() is not None:
        report.row("GPU", f"not used: {reason}")
    return "cpu"


def build_engine(config: EngineConfig, report: StartupReport | None = None) -> Built:
    """Raises StartupError with one readable line for everything that is wrong with the model or the machine."""
    report = report or StartupReport()
    options = config.model
    with report.phase("config"):
        directory = resolve(options.path, options.revision, options.download_dir)
        spec = read_spec(directory)
        defaults = GenerationDefaults.load(directory)
        eos = tuple(dict.fromkeys((*spec.eos_token_ids, *defaults.eos_token_ids)))
    with report.phase("tokenizer"):
        tokenizer = _load_tokenizer(config, directory, spec)
        chat_template = _load_chat_template(directory, options.chat_template, tokenizer)
        if tokenizer is not None:
            eos = tuple(dict.fromkeys((*eos, *tokenizer.eos_token_ids)))
        if not eos and not is_gguf(directory) and not (directory / "generation_config.json").exists():
            eos = spec.class_eos_token_ids
        # The model cannot say what its embedding has no row for.
        eos = tuple(token_id for token_id in eos if token_id < spec.vocab_size)
        token_id = tokenizer.token_to_id if tokenizer is not None else lambda text: None
        abilities = read_abilities(directory, spec, options, token_id)
        if abilities.score_tokens is not None and chat_template is None:
            raise StartupError(f"{directory}: scores by tokens need a chat template; --chat-template gives one")
        spec = dataclasses.replace(spec, headless=not abilities.needs_head, projections=abilities.projections)
        context = _context_length(config, spec, directory, abilities.max_length)
    if spec.bidirectional:
        config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, enable_prefix_caching=False))
    local = Path(options.path).expanduser()
    given = tuple(name for name in options.served_names if name != "*")
    if is_gguf(directory) and local.exists():
        own = model_name(directory)
    else:
        own = local.resolve().name if local.is_dir() else options.path
    names = given or (own,)
    if not given and directory.resolve() == (Path(__file__).parent / "demo").resolve():
        names = ("oneloop-demo",)
    report.row("model", f"{names[0]} ({spec.architecture}, {directory})")
    if spec.text_only:
        report.row("reads", "text only: requests with images are refused, the towers for them are not loaded")
    if abilities != Abilities(width=abilities.width, dimensions=abilities.dimensions):
        report.row("gives", abilities.describe())
    metrics = EngineMetrics(names[0], prefix=config.server.metrics_prefix, max_model_len=context)
    try:
        plan = None if config.debug_faults is None else parse_faults(config.debug_faults)
        executor = _build_executor(config, directory, spec, context, report)
        if plan is not None:
            executor = faulty = FaultyExecutor(executor, plan)
            metrics.add_families(faulty.families)
            report.row("faults", f"by plan: {config.debug_faults}")
        rng = None if options.seed is None else random.Random(options.seed)
        engine = Engine(config, executor, tokenizer, eos_token_ids=eos, metrics=metrics, rng=rng)
        if options.load_format != "dummy":
            engine.model_directory = directory
        if engine.adapters is not None:
            with report.phase("adapters"):
                engine.adapters.load_modules()
            report.row("adapters", _describe_adapters(config.lora, engine.adapters))
        if config.transfer.connector is not None or config.tiers.is_given:
            with report.phase("carriers"):
                _add_carriers(engine, directory, spec, context, report)
        if config.cuda.nvtx != "off":
            cuda_executor: Any = executor  # elsewhere the flag is refused
            engine.name_stages(cuda_executor.layer.range)
    except MemoryError as error:
        raise StartupError(
            f"no memory for --max-num-seqs {config.scheduler.max_num_seqs} with {context} tokens of context each and "
            f"--max-num-batched-tokens {config.scheduler.max_num_batched_tokens}: {' '.join(str(error).split())}"
        ) from error
    limits = executor.limits
    if (speculation := config.speculation).method is not None:
        if not limits.max_draft_tokens:
            executor.close()
            raise StartupError(f"speculative decoding ({speculation.method}) is not supported on this device")
        kind = "as many as pay" if speculation.adaptive else "always"
        report.row("drafts", f"{speculation.method}, up to {limits.max_draft_tokens} a row and step, {kind}")
    metrics.set_cache_config(
        block_size=limits.page_size,
        num_gpu_blocks=limits.num_pages,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
    one = len(limits.groups) == 1
    for rope in spec.ropes:
        if rope.kind in ("longrope", "dynamic"):
            report.row("rope", _describe_rope(rope, spec.max_position_embeddings, context))
    budget = config.scheduler.max_num_batched_tokens
    if spec.quantisation is not None and options.load_format != "dummy":
        report.row("weights", spec.quantisation.method)
    report.row("context", _describe_context(context, spec, abilities.max_length, budget))
    report.row(
        "KV cache",
        "none: a text is read at once and nothing is kept of it"
        if spec.bidirectional
        else f"{limits.num_pages} pages of {limits.page_size} tokens"
        f"{'' if one else f' for {len(limits.groups)} groups of layers'}: {limits.capacity} tokens fit, "
        f"{limits.capacity / context if one else limits.full_sequences:.1f} sequences of full context",
    )
    report.row(
        "scheduler",
        f"up to {limits.max_num_seqs} sequences, {limits.max_num_batched_tokens} tokens a step, "
        f"overlap {'on' if config.scheduler.overlap else 'off'}, "
        f"prefix cache {'on' if config.cache.enable_prefix_caching else 'off'}",
    )
    if options.generation_config != "auto":
        defaults = GenerationDefaults(eos_token_ids=defaults.eos_token_ids)
    return Built(engine, directory, names, spec, defaults, chat_template, report, abilities)


def _add_carriers(engine: Engine, directory: Path, spec: ModelSpec, context: int, report: StartupReport) -> None:
    """Pages from and to other servers, host memory and the disk. Raises StartupError."""
    config = engine.config
    tiers = config.tiers
    flags = {
        "--kv-transfer-config": config.transfer.connector,
        "--kv-host-gb": tiers.host_bytes or None,
        "--kv-disk": tiers.directory,
    }
    for flag in (flag for flag, given in flags.items() if given is not None):
        if not config.cache.enable_prefix_caching:
            raise StartupError(f"{flag} needs the prefix cache: pages are kept and found in it")
        try:
            memory = engine.executor.page_memory()
            engine.executor.state_memory()
            if flag == "--kv-host-gb":
                if not isinstance(memory, DeviceMemory):
                    raise StartupError("the KV cache is in host memory already; --kv-cache-gb makes it larger")
                from engine.executor.cpu_start import available_memory

                if tiers.host_bytes > MOST_HOST_SHARE * (free := available_memory()):
                    raise StartupError(
                        f"{tiers.host_bytes / 1e9:g} GB are more than {MOST_HOST_SHARE:.0%} of the host memory that "
                        f"can be had, {free / 1e9:.1f} GB"
                    )
        except StartupError as error:
            raise StartupError(f"{flag}: {error}") from None
    # Frequencies of these kinds depend on the longest text.
    length = context if any(rope.kind in ("longrope", "dynamic") for rope in spec.ropes) else None
    model = config.model
    seed = model.seed if model.load_format == "dummy" else None
    options = (spec, model.quantization, model.load_format, seed, length, *_drafting(config))

    def weights(other: Path | None) -> str:
        return fingerprint(other or directory, *options)

    if config.transfer.connector is not None:
        exchange = engine.enable_transfer(make_connector(config.transfer), weights)
        role = {"kv_both": "keeps pages and reads them", "kv_producer": "keeps pages", "kv_consumer": "reads pages"}
        at = f", asked at {config.transfer.host}:{exchange.port}" if config.transfer.keeps else ""
        report.row("transfer", f"{config.transfer.connector}: {role[config.transfer.role]}{at}")
    if tiers.is_given:

        def here(other: Path | None) -> str:
            """On this machine times tell what samples of a file may not."""
            path = other or directory
            files = [path] if path.is_file() else sorted(path.iterdir())
            return f"{fingerprint(path, *options, whole=False)} {[file.stat().st_mtime_ns for file in files]}"

        worker = engine.enable_tier(here).worker
        if (host := worker.host) is not None:
            beside = f"{host.capacity(0)} pages beside the device's {engine.limits.num_pages}"
            report.row("host tier", f"{host.max_bytes / 1e9:g} GB of page-locked memory: {beside}")
        if (disk := worker.disk) is not None:
            most = f"{disk.bytes / 1e9:.2f} of at most {disk.max_bytes / 1e9:g} GB"
            report.row("disk", f"{disk.directory}: {len(disk)} files, {most}")


def _drafting(config: EngineConfig) -> tuple[str, ...]:
    """What has keys and values of its own beside the model's, those of its drafts; () for nothing."""
    options = config.speculation
    if options.method is None or options.method in PROPOSERS:
        return ()
    if options.model is None:
        return (options.method,)
    # Others' would cost drafts that are right, and no word.
    found = resolve(options.model, options.revision, config.model.download_dir)
    return (options.method, fingerprint(found, whole=False))


def _describe_adapters(options: LoraOptions, store: AdapterStore) -> str:
    """What of LoRA there is, and where more comes from."""
    loaded = len(store.entries)
    parts = [
        f"{loaded} loaded" if loaded else "none loaded yet",
        f"{options.max_loras} in one step, of rank {options.max_lora_rank} at most",
        f"{store.max_resident} in host memory",
        "no others" if options.root is None else f"others from {options.root}",
    ]
    return ", ".join(parts)


def _describe_rope(rope: RopeSpec, native: int, context: int) -> str:
    """Which of the frequencies that change with a text's length are used: one choice for all texts."""
    if rope.kind == "dynamic":
        if context <= native:
            return "dynamic, unscaled: the context is no longer than the model's own"
        return f"dynamic, scaled for {context} tokens in every text; up to --max-model-len {native} it is not scaled"
    original = rope.original_max_position
    if context <= original:
        return f"longrope, short factors in every text: the context is at most {original} tokens"
    return (
        f"longrope, long factors in every text, short ones too: the context is longer than {original} tokens; "
        f"--max-model-len {original} takes the short factors"
    )


def _check_speculation(config: EngineConfig, spec: ModelSpec) -> None:
    """Raises StartupError for what no draft can be tried with."""
    flag = f"speculative decoding ({config.speculation.method})"
    if spec.bidirectional or spec.headless:
        raise StartupError(f"{flag}: this model is served without generating text")


def _build_executor(
    config: EngineConfig, directory: Path, spec: ModelSpec, context: int, report: StartupReport
) -> Executor:
    with report.phase("torch"):
        # OpenMP reads its settings when torch loads it.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch  # noqa: F401
    device = _pick_device(config, report)
    if config.speculation.method is not None:
        _check_speculation(config, spec)
    rounded = rounded_to(config.model.quantization, spec.quantisation, given=str(directory))
    if rounded is not None:
        if is_gguf(directory) or config.model.load_format == "dummy":
            raise StartupError(
                f"--quantization {rounded} needs safetensors, and {directory} is not read from such files"
            )
        scale = "a row" if rounded == "fp8" else "32 weights"
        report.row("quantization", f"{rounded}, {scale} to a scale, rounded as they are read")
    with report.phase("imports"):
        from engine.executor.start import Start

    given = Start(config, directory, spec, context, report)
    if config.expert_parallel and config.tensor_parallel_size == 1:
        raise StartupError("--enable-expert-parallel needs a --tensor-parallel-size of 2 or more")
    if config.tensor_parallel_size > 1:
        if device == "cuda":
            from engine.distributed import device_start

            imported()
            return device_start.start(given)
        from engine.distributed import start

        imported()
        return start.start(given)
    if device == "cuda":
        from engine.executor import cuda_start

        imported()
        return cuda_start.start(given)
    with report.phase("imports"):
        from engine.executor import cpu_start
    imported()
    return cpu_start.start(given)
