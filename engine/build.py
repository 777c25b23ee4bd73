"""Puts an Engine together: config -> model files -> device -> weights -> KV cache -> Engine. No HTTP in here.

Used by serve.py, the offline API and the benchmarks. torch is imported inside, after the environment that it
reads at import has been set.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import CudaOptions, EngineConfig, StartupError
from engine.engine import Engine
from engine.forward import Limits
from engine.metrics import EngineMetrics
from engine.models.abilities import Abilities, read_abilities
from engine.models.config import GenerationDefaults, ModelConfig
from engine.models.hub import resolve
from engine.report import StartupReport
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.executor.base import Executor
    from engine.models.registry import CausalLM

logger = logging.getLogger("oneloop.start")

GPU_FLAGS = "--cuda-graph, --kv-cache-dtype, --kernels, --profile-dir and --nvtx"

# Ordinary words that a vocabulary may have beyond the embedding, as a share of its rows: with more it belongs to
# another model. Added tokens (a pad that was never trained) may be any number; transformers minds neither.
MAX_WORDS_OVER = 0.01


@dataclass(slots=True)
class Built:
    """An engine and what belongs to its model. tokenizer is None for a bare config with dummy weights."""

    engine: Engine
    directory: Path
    names: tuple[str, ...]
    model_config: ModelConfig
    generation_defaults: GenerationDefaults
    chat_template: ChatTemplate | None
    report: StartupReport
    abilities: Abilities


def _load_tokenizer(config: EngineConfig, directory: Path, model_config: ModelConfig) -> Tokenizer | None:
    source = Path(config.model.tokenizer_path) if config.model.tokenizer_path else directory
    if config.model.load_format == "dummy" and not (source / "tokenizer.json").exists():
        return None
    rows = model_config.vocab_size
    tokenizer = Tokenizer.load(source, rows)
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


def _context_length(config: EngineConfig, model_config: ModelConfig, directory: Path) -> int:
    asked, own = config.model.max_model_len, model_config.context_length
    if asked is None:
        return own
    if asked > own:
        raise StartupError(
            f"--max-model-len {asked} is more than the model was made for: {own} "
            f"(max_position_embeddings in {directory / 'config.json'})"
        )
    return asked


def _pick_device(config: EngineConfig, report: StartupReport) -> str:
    """The GPU where it can be used. One that cannot is told in a row, or ends the start where it was asked for."""
    if config.device == "cpu":
        if config.cuda != CudaOptions():
            raise StartupError(f"{GPU_FLAGS} need a CUDA device; this is a CPU")
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
    if config.cuda != CudaOptions():
        raise StartupError(f"{GPU_FLAGS} need a CUDA device: {reason}")
    if gpu_probe.driver_version() is not None:
        report.row("GPU", f"not used: {reason}")
    return "cpu"


def show_progress() -> Callable[[int, int], None]:
    """A progress bar for weights, on stderr; nothing where stderr is no terminal and the load is short."""
    from tqdm import tqdm

    delay = 0.0 if sys.stderr.isatty() else 2.0

    bar: tqdm | None = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(
                total=total,
                desc="Loading weights",
                unit="B",
                unit_scale=True,
                file=sys.stderr,
                mininterval=0.2,
                delay=delay,
            )
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return progress


def build_engine(config: EngineConfig, report: StartupReport | None = None) -> Built:
    """Raises StartupError with one readable line for everything that is wrong with the model or the machine."""
    report = report or StartupReport()
    options = config.model
    with report.phase("config"):
        directory = resolve(options.path, options.revision, options.download_dir)
        model_config = ModelConfig.load(directory)
        defaults = GenerationDefaults.load(directory)
        context = _context_length(config, model_config, directory)
        eos = tuple(dict.fromkeys((*model_config.eos_token_ids, *defaults.eos_token_ids)))
    with report.phase("tokenizer"):
        tokenizer = _load_tokenizer(config, directory, model_config)
        chat_template = ChatTemplate.load(directory, options.chat_template) if tokenizer is not None else None
        if tokenizer is not None:
            eos = tuple(dict.fromkeys((*eos, *tokenizer.eos_token_ids)))
        if not eos and not (directory / "generation_config.json").exists():
            eos = model_config.class_eos_token_ids
        # The model cannot say what its embedding has no row for.
        eos = tuple(token_id for token_id in eos if token_id < model_config.vocab_size)
        token_id = tokenizer.token_to_id if tokenizer is not None else lambda text: None
        abilities = read_abilities(directory, model_config, options, token_id)
        if abilities.score_tokens is not None and chat_template is None:
            raise StartupError(f"{directory}: scores by tokens need a chat template; --chat-template gives one")
        model_config = dataclasses.replace(model_config, headless=not abilities.needs_head)
    local = Path(options.path).expanduser()
    given = tuple(name for name in options.served_names if name != "*")
    names = given or ((local.resolve().name,) if local.is_dir() else (options.path,))
    if not given and directory.resolve() == (Path(__file__).parent / "demo").resolve():
        names = ("oneloop-demo",)
    report.row("model", f"{names[0]} ({model_config.architecture}, {directory})")
    if abilities != Abilities(width=abilities.width, dimensions=abilities.dimensions):
        report.row("gives", abilities.describe())
    metrics = EngineMetrics(names[0], prefix=config.server.metrics_prefix, max_model_len=context)
    try:
        executor = _build_executor(config, directory, model_config, context, report)
        rng = None if options.seed is None else random.Random(options.seed)
        engine = Engine(config, executor, tokenizer, eos_token_ids=eos, metrics=metrics, rng=rng)
        if config.cuda.nvtx != "off":
            cuda_executor: Any = executor  # elsewhere the flag is refused
            engine.name_stages(cuda_executor.layer.range)
    except MemoryError as error:
        raise StartupError(
            f"no memory for --max-num-seqs {config.scheduler.max_num_seqs} with {context} tokens of context each and "
            f"--max-num-batched-tokens {config.scheduler.max_num_batched_tokens}: {' '.join(str(error).split())}"
        ) from error
    limits = executor.limits
    metrics.set_cache_config(
        block_size=limits.page_size,
        num_gpu_blocks=limits.num_pages,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
    capacity = limits.num_pages * limits.page_size
    if model_config.rope.kind in ("longrope", "dynamic"):
        report.row("rope", _describe_rope(model_config, context))
    report.row("context", f"{context} tokens")
    report.row(
        "KV cache",
        f"{limits.num_pages} pages of {limits.page_size} tokens: {capacity} tokens fit, "
        f"{capacity / context:.1f} sequences of full context",
    )
    report.row(
        "scheduler",
        f"up to {limits.max_num_seqs} sequences, {limits.max_num_batched_tokens} tokens a step, "
        f"overlap {'on' if config.scheduler.overlap else 'off'}, "
        f"prefix cache {'on' if config.cache.enable_prefix_caching else 'off'}",
    )
    if options.generation_config != "auto":
        defaults = GenerationDefaults(eos_token_ids=defaults.eos_token_ids)
    return Built(engine, directory, names, model_config, defaults, chat_template, report, abilities)


def _report_output_layer(model: CausalLM, model_config: ModelConfig, report: StartupReport) -> None:
    """Where the checkpoint knew better than config.json."""
    if model.config.tie_word_embeddings != model_config.tie_word_embeddings:
        report.row("output layer", "the checkpoint's own: it differs from the embedding, though config.json ties them")


def _describe_rope(model_config: ModelConfig, context: int) -> str:
    """Which of the frequencies that change with a text's length are used: one choice for all texts."""
    rope, native = model_config.rope, model_config.max_position_embeddings
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


def _build_executor(
    config: EngineConfig, directory: Path, model_config: ModelConfig, context: int, report: StartupReport
) -> Executor:
    with report.phase("torch"):
        # OpenMP reads its settings when torch loads it.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch  # noqa: F401
    if _pick_device(config, report) == "cuda":
        return _build_cuda(config, directory, model_config, context, report)
    return _build_cpu(config, directory, model_config, context, report)


def _make_loader(
    config: EngineConfig, directory: Path, model_config: ModelConfig, **options: Any
) -> Callable[[Path | None], CausalLM]:
    """What reads the model: from `directory`, and later from others that hold the same one with other weights."""
    from engine.models.registry import load_model

    def load(other: Path | None) -> CausalLM:
        load_format = config.model.load_format
        if other is not None:
            theirs, load_format = ModelConfig.load(other), "auto"
            # Whether the output layer is used is ours to say.
            theirs = dataclasses.replace(theirs, headless=model_config.headless, assumed=model_config.assumed)
            for field in dataclasses.fields(ModelConfig):
                if getattr(theirs, field.name) != getattr(model_config, field.name):
                    raise StartupError(f"{other / 'config.json'} is of another model: {field.name} differs")
        return load_model(
            model_config,
            other or directory,
            load_format=load_format,
            seed=config.model.seed or 0,
            progress=show_progress(),
            **options,
        )

    return load


def _build_cuda(
    config: EngineConfig, directory: Path, model_config: ModelConfig, context: int, report: StartupReport
) -> Executor:
    import torch

    from engine.executor import gpu_probe
    from engine.executor.cuda_device import CudaDevice
    from engine.executor.cuda_start import build_cuda_executor, pick_dtype, starting

    if config.deterministic:
        raise StartupError("--deterministic is not promised on a GPU yet")
    if config.num_threads is not None:
        raise StartupError("--threads sets compute threads on the CPU; the device is a GPU")
    if config.cuda.kernels is not None:
        from engine.executor.cuda_kit import use_kit

        found = use_kit(Path(config.cuda.kernels), torch.cuda.get_device_capability(), torch.version.cuda)
        report.row("kernels", found)
    layer, dtype = CudaDevice(nvtx=config.cuda.nvtx != "off"), pick_dtype(config.model.dtype)
    other = gpu_probe.stands_in(torch.cuda.get_device_capability(layer.device))
    report.row("device", torch.cuda.get_device_name(layer.device) + ("" if other is None else f": {other}"))
    report.row("dtype", str(dtype).removeprefix("torch."))
    report.row("deterministic", "no (GPU)")
    with report.phase("weights"):
        read = _make_loader(config, directory, model_config, dtype=dtype, device=layer.device, max_model_len=context)

        def load(other: Path | None) -> CausalLM:
            model = read(other)
            if config.cuda.nvtx == "layers":
                model.name_layers(layer.range)
            return model

        with starting("the weights do not fit on the GPU"):
            model = load(None)
    _report_output_layer(model, model_config, report)
    with report.phase("KV cache and graphs"):
        return build_cuda_executor(
            model,
            layer,
            config.cache,
            dtype=dtype,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=context,
            kv_cache_dtype=config.cuda.kv_cache_dtype,
            # Graphs are of decode steps.
            cuda_graph="off" if model_config.headless else config.cuda.cuda_graph,
            row=report.row,
            load=load,
        )


def _build_cpu(
    config: EngineConfig, directory: Path, model_config: ModelConfig, context: int, report: StartupReport
) -> Executor:
    import torch

    from engine.executor.cpu import DEFAULT_MEMORY_SHARE, CPUExecutor, choose_threads, pick_dtype, plan_memory
    from engine.ops import native
    from engine.ops.invariance import promise

    dtype = pick_dtype(config.model.dtype)
    with report.phase("kernels"):
        status = native.status()
    threads = config.num_threads or choose_threads(model_config.num_parameters * dtype.itemsize)
    torch.set_num_threads(threads)
    report.row("device", f"CPU, {threads} compute thread{'s' if threads > 1 else ''}, {status}")
    report.row("dtype", str(dtype).removeprefix("torch."))
    with report.phase("weights"):
        load = _make_loader(
            config,
            directory,
            model_config,
            dtype=dtype,
            device=torch.device("cpu"),
            max_model_len=context,
            deterministic=bool(config.deterministic),
        )
        model = load(None)
    _report_output_layer(model, model_config, report)
    promised, how = promise(model.linears, model.attention_spec, dtype)
    if config.deterministic and not promised:
        raise StartupError(f"--deterministic cannot be promised here: {how}")
    report.row("deterministic", f"{'yes' if promised else 'no'} ({how})")
    with report.phase("KV cache"):
        num_pages = plan_memory(model_config, dtype, config.cache, config.scheduler.max_num_seqs, context)
        kv_bytes = (num_pages + 1) * config.cache.page_size * model.attention_spec.kv_bytes_per_token(dtype)
        asked = config.cache != dataclasses.replace(
            config.cache, num_pages=None, kv_cache_bytes=None, memory_fraction=None
        )
        report.row(
            "KV memory",
            f"up to {kv_bytes / 2**30:.2f} GiB, taken as the cache fills"
            + ("" if asked else f" (at most {DEFAULT_MEMORY_SHARE:.0%} of what is available; --kv-cache-gb sets it)"),
        )
        limits = Limits(
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=context,
            page_size=config.cache.page_size,
            num_pages=num_pages,
            vocab_size=model_config.vocab_size,
            window=model_config.longest_window,
        )
        return CPUExecutor(model, limits, dtype=dtype, load=load)
