"""How a CUDA executor comes to be: which attention, how much memory for what, and the lines that say so.

Called once by the composition root (and by the benchmark and the GPU tests), before the loop runs; it may block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import CacheOptions, SpeculationOptions, StartupError
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_buffers import widened
from engine.executor.cuda_device import CudaDevice, DeviceLayer
from engine.executor.cuda_graph import graph_sizes
from engine.executor.cuda_pieces import SIZES
from engine.executor.gpu_probe import has_xqa, stands_in
from engine.executor.start import Start, describe_states, encoder_limits, plan_states
from engine.forward import ForwardError, Limits
from engine.groups import plan_groups
from engine.models.parts.decoder import CausalLM
from engine.ops.attention import device_packed as packed
from engine.ops.attention.device import DeviceAttention
from engine.ops.state import state_bytes
from engine.speculation.registry import make_proposer

logger = logging.getLogger("oneloop.cuda")

# Of the memory that is free after the weights, what --gpu-memory-utilization leaves unsaid takes this share.
DEFAULT_MEMORY_SHARE = 0.9
KV_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# What the driver keeps for one captured graph of some 200 kernels; an upper guess, the pool itself is shared.
GRAPH_BYTES = 8 * 1024 * 1024
GIB = 2**30
NO_DRAFTS = SpeculationOptions()
SMALLER = "; lower --max-num-batched-tokens or --max-num-seqs"


def start(given: Start) -> CUDAExecutor:
    """Load the model onto the GPU, divide its memory, and say what was decided. Raises StartupError."""
    config, report = given.config, given.report
    if config.deterministic:
        raise StartupError("--deterministic is not promised on a GPU yet")
    if config.lora.enable:
        raise StartupError("--enable-lora: LoRA adapters are served on the CPU alone so far: --device cpu")
    if config.num_threads is not None:
        raise StartupError("--threads sets compute threads on the CPU; the device is a GPU")
    if config.cuda.kernels is not None:
        from engine.executor.cuda_kit import use_kit

        found = use_kit(Path(config.cuda.kernels), torch.cuda.get_device_capability(), torch.version.cuda)
        report.row("kernels", found)
    layer, dtype = CudaDevice(nvtx=config.cuda.nvtx != "off"), pick_dtype(config.model.dtype)
    other = stands_in(torch.cuda.get_device_capability(layer.device))
    report.row("device", torch.cuda.get_device_name(layer.device) + ("" if other is None else f": {other}"))
    report.row("dtype", str(dtype).removeprefix("torch."))
    report.row("deterministic", "no (GPU)")
    with report.phase("weights"):
        read = given.loader(dtype=dtype, device=layer.device)

        def load(other: Path | None) -> CausalLM:
            model = read(other)
            if config.cuda.nvtx == "layers":
                model.name_layers(layer.range)
            return model

        with starting("the weights do not fit on the GPU"):
            model = load(None)
    given.report_output_layer(model)
    if given.spec.bidirectional:
        if config.cache.kv_cache_dtype != "auto":
            raise StartupError(f"--kv-cache-dtype {config.cache.kv_cache_dtype}: this model keeps no keys and values")
        limits = encoder_limits(config.scheduler, given.context, given.spec.vocab_size)
        return build_cuda_encoder(model, layer, limits, dtype=dtype, row=report.row, load=load)
    with report.phase("KV cache and graphs"):
        return build_cuda_executor(
            model,
            layer,
            config.cache,
            dtype=dtype,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=given.context,
            kv_cache_dtype=config.cache.kv_cache_dtype,
            # Graphs are of decode steps.
            cuda_graph="off" if given.spec.headless else config.cuda.cuda_graph,
            row=report.row,
            load=load,
            speculation=config.speculation,
        )


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of device memory by purpose. free is what stays untouched; total is the whole device."""

    total: int
    weights: int
    workspace: int
    activations: int
    graphs: int
    kv_cache: int
    free: int

    def __str__(self) -> str:
        """One line for the start-up table."""
        parts = [
            ("weights", self.weights),
            ("KV cache", self.kv_cache),
            ("activations", self.activations),
            ("workspace", self.workspace),
            ("graphs", self.graphs),
            ("free", self.free),
        ]
        others = self.total - sum(size for _, size in parts)
        text = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts)
        return f"{self.total / GIB:.1f} GiB: {text}, context and others {others / GIB:.2f}"


def pick_dtype(name: str) -> torch.dtype:
    """--dtype on a GPU: bfloat16 unless something else is asked for."""
    return torch.bfloat16 if name == "auto" else _DTYPES[name]


def pick_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """--kv-cache-dtype: auto is the model's dtype."""
    if name == "auto":
        return dtype
    if name not in KV_DTYPES:
        raise StartupError(f"--kv-cache-dtype {name}: on a GPU one of auto, {', '.join(KV_DTYPES)} is known")
    return KV_DTYPES[name]


@contextlib.contextmanager
def starting(what: str, advice: str = "") -> Iterator[None]:
    """A StartupError of one line where memory is not enough, or a first step fails."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StartupError(f"{what}: {str(error).splitlines()[0]}{advice}") from error
    except ForwardError as error:
        raise StartupError(f"{what}: {(str(error).splitlines() or [''])[0]}{advice}") from error


def has_flashinfer() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def make_attention(model: CausalLM, layer: DeviceLayer, module: Any = None, **options: Any) -> DeviceAttention:
    """FlashInfer where it is installed and all layers are of one plain shape, else torch.

    options: num_pages, page_size, groups, dtype, kv_dtype.
    """
    alike = model.attention_spec.common is not None
    if not alike or (module is None and not (layer.device.type == "cuda" and has_flashinfer())):
        return DeviceAttention(model.attention_spec, device=layer.device, **options)
    from engine.ops.attention.flashinfer import Backend

    if layer.device.type == "cuda" and not has_xqa(torch.cuda.get_device_capability(layer.device)):
        options["decode"] = "wrapper"
    try:
        return Backend(model.attention_spec, device=layer.device, module=module, **options)
    except torch.OutOfMemoryError:
        raise
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("FlashInfer is installed but cannot be loaded: %s", error)
        return DeviceAttention(model.attention_spec, device=layer.device, **options)


def profile_step(
    model: CausalLM, layer: DeviceLayer, limits: Limits, make: Callable[[int], DeviceAttention]
) -> tuple[int, int]:
    """Run the hungriest step in a small cache. Returns bytes of (activations, attention workspace)."""
    rows = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    length = min(limits.max_model_len, limits.max_num_batched_tokens // rows)
    pages = len(limits.groups) * rows * -(-length // limits.page_size)
    small = dataclasses.replace(limits, num_pages=pages)
    if limits.num_snapshots is not None:
        small = dataclasses.replace(small, num_snapshots=0)
    attention = make(pages)
    executor = CUDAExecutor(model, small, layer, attention, cuda_graph="off")
    before = layer.allocated_memory()
    layer.peak_memory(reset=True)
    executor.run_worst_case()
    activations = layer.peak_memory() - before
    executor.close()
    return max(0, activations), attention.workspace_bytes


def build_cuda_encoder(
    model: CausalLM,
    layer: DeviceLayer,
    limits: Limits,
    *,
    dtype: torch.dtype,
    row: Callable[[str, str], None] = lambda name, text: None,
    load: Callable[[Path | None], CausalLM] | None = None,
) -> CUDAExecutor:
    """Of a model that reads a text at once and keeps nothing of it: see `encoder_limits`. Raises StartupError."""
    most = limits.max_num_batched_tokens
    with layer.may_block():
        weights, free = layer.allocated_memory(), layer.free_memory()
        with starting("no memory is left for the largest step", SMALLER):
            attention = packed.Backend(model.attention_spec, max_tokens=most, dtype=dtype, device=layer.device)
            trial = CUDAExecutor(model, limits, layer, attention, cuda_graph="off")
            before = layer.allocated_memory()
            layer.peak_memory(reset=True)
            trial.run_worst_case()
            activations = max(0, layer.peak_memory() - before)
            trial.close()
            executor = CUDAExecutor(model, limits, layer, attention, cuda_graph="off", load=load)
        left = max(0, free - (before - weights) - activations)
        row("GPU memory", str(MemoryPlan(layer.total_memory(), weights, before - weights, activations, 0, 0, left)))
        row("attention", attention.describe())
        with starting("a first step fails", SMALLER):
            _, gated = executor.choose_products()
        row("gate and up of prompts", f"{gated[0]} of {gated[1]} by our kernel, the others by cuBLAS, as was quicker")
    return executor


def build_cuda_executor(
    model: CausalLM,
    layer: DeviceLayer,
    cache: CacheOptions,
    *,
    dtype: torch.dtype,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    kv_cache_dtype: str = "auto",
    cuda_graph: str = "lazy",
    row: Callable[[str, str], None] = lambda name, text: None,
    module: Any = None,
    load: Callable[[Path | None], CausalLM] | None = None,
    speculation: SpeculationOptions = NO_DRAFTS,
) -> CUDAExecutor:
    """Measure, divide the memory, allocate; `row` gets the lines of the start-up table. Raises StartupError.

    load: see CUDAExecutor. speculation: none, or one of PROPOSERS. module: what stands in for `flashinfer` in tests.
    """
    kv_dtype = pick_kv_dtype(kv_cache_dtype, dtype)
    page_size = cache.page_size
    groups = plan_groups(model.config.windows, max_model_len)
    sequences, num_snapshots, state_memory = max_num_seqs, None, 0
    if model.config.has_state:
        each = state_bytes(model.config.states, dtype)
        with layer.may_block():
            share = int(layer.free_memory() * (cache.memory_fraction or DEFAULT_MEMORY_SHARE))
        sequences, num_snapshots = plan_states(each, cache, max_num_seqs, share)
        state_memory = (sequences + num_snapshots) * each
        row("states", describe_states(each, sequences, num_snapshots, max_num_seqs))

    def limits_of(num_pages: int) -> Limits:
        return Limits(
            max_num_seqs=sequences,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            page_size=page_size,
            num_pages=num_pages,
            vocab_size=model.config.vocab_size,
            groups=groups,
            num_snapshots=num_snapshots,
            max_draft_tokens=0 if speculation.method is None else speculation.num_draft_tokens,
        )

    def attention_of(num_pages: int) -> DeviceAttention:
        options = {"num_pages": num_pages, "page_size": page_size, "groups": groups}
        return make_attention(model, layer, module, dtype=dtype, kv_dtype=kv_dtype, **options)

    with layer.may_block():
        weights = layer.allocated_memory()
        free = layer.free_memory()
        with starting("no memory is left for the largest step", SMALLER):
            wide = widened(limits_of(1))
            activations, workspace = profile_step(model, layer, wide, attention_of)
        gc.collect()  # the trial cache and buffers go before the real ones come
        page_bytes = page_size * model.attention_spec.kv_bytes_per_token(kv_dtype, groups)
        graphs = 0
        if cuda_graph != "off":
            # Logits, the same as open steps have them, and the list of a filter's tokens; all graphs share the room.
            logits = wide.max_num_seqs * model.config.vocab_size * 4
            sides = 2 if speculation.method is None else 4
            graphs = 4 * logits + (sides * len(graph_sizes(wide.max_num_seqs)) + len(SIZES)) * GRAPH_BYTES
            graphs += activations * min(SIZES[-1], max_num_batched_tokens) // max_num_batched_tokens
        wanted = cache.kv_cache_bytes
        if cache.num_pages is not None:
            wanted = (cache.num_pages + 1) * page_bytes
        if wanted is None:
            share = DEFAULT_MEMORY_SHARE if cache.memory_fraction is None else cache.memory_fraction
            wanted = int(share * free) - activations - workspace - graphs
        if cache.num_pages is None:
            wanted -= state_memory
        num_pages = wanted // page_bytes - 1
        if num_pages < 1:
            raise StartupError(
                f"no memory is left for the KV cache: {free / GIB:.2f} GiB are free after the weights, activations "
                f"take {activations / GIB:.2f}, workspace {workspace / GIB:.2f}, graphs {graphs / GIB:.2f}; lower "
                "--max-num-batched-tokens or --max-num-seqs, or raise --gpu-memory-utilization"
            )
        # Cells are counted in int32 on the device.
        num_pages = min(num_pages, (2**31 - 1) // page_size - 1)
        kv_bytes = (num_pages + 1) * page_bytes + state_memory
        try:
            attention = attention_of(num_pages)
            proposer = None if speculation.method is None else make_proposer(speculation)
            limits = limits_of(num_pages)
            executor = CUDAExecutor(
                model, limits, layer, attention, cuda_graph=cuda_graph, load=load, proposer=proposer
            )
        except torch.OutOfMemoryError as error:
            what = "a KV cache with recurrent states" if state_memory else "a KV cache"
            what += f" of {kv_bytes / GIB:.2f} GiB"
            raise StartupError(f"{what} does not fit: {str(error).splitlines()[0]}") from error
        left = free - kv_bytes - activations - workspace - graphs
        plan = MemoryPlan(layer.total_memory(), weights, workspace, activations, graphs, kv_bytes, max(0, left))
        row("GPU memory", str(plan))
        if not model.config.headless:
            with starting("a first decode step fails", SMALLER):
                executor.decode_once()
                executor.choose_attention()
        text = attention.describe()
        if model.attention_spec.common is None:
            text += ", for layers that differ in more than their window, or have sinks"
        elif module is None and not has_flashinfer():
            text += "; pip install 'oneloop[cuda]' brings FlashInfer, which is many times faster"
        row("attention", f"{text}; KV cache in {str(kv_dtype).removeprefix('torch.')}")
        with starting("a first decode step fails", SMALLER):
            few, gated = executor.choose_products()
        quicker = "by our kernel, the others by cuBLAS, as was quicker"
        row("products of 1 to 4 rows", f"{few[0]} of {few[1]} {quicker}")
        row("gate and up of prompts", f"{gated[0]} of {gated[1]} {quicker}")
        if limits.max_draft_tokens:
            # Whose kernels add up in another order where there are more of them.
            near = "of tokens that are nearly as likely another may be drawn than without drafts"
            row("steps with drafts", f"up to {wide.max_num_seqs} rows, a draft is one; {near}")
        if cuda_graph == "start":
            executor.capture_at_start()
            row(
                "CUDA graphs",
                f"{len(executor.graphs)} captured, and {len(executor.pieces)} sizes of steps with prompts",
            )
        elif cuda_graph == "lazy":
            row("CUDA graphs", f"captured as they are needed, batch sizes {executor.graphs.sizes[-1]} and below")
        else:
            row("CUDA graphs", "off")
    return executor
