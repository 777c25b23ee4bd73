"""How a CUDA executor comes to be: which attention, how much memory for what, and the lines that say so.

Called once by the composition root (and by the benchmark and the GPU tests), before the loop runs; it may block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import CacheOptions, SpeculationOptions, StartupError
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_adapters import DeviceAdapters
from engine.executor.cuda_buffers import widened
from engine.executor.cuda_device import CudaDevice, DeviceLayer
from engine.executor.cuda_drafter import DeviceDrafter, Drafts
from engine.executor.cuda_graph import graph_sizes, most_graphs
from engine.executor.cuda_group import RankGroup
from engine.executor.cuda_pieces import SIZES
from engine.executor.drafting import Drafting, read_drafting
from engine.executor.gpu_probe import has_xqa, stands_in
from engine.executor.start import Start, describe_states, encoder_limits, plan_states
from engine.forward import ForwardError, Limits
from engine.groups import plan_groups
from engine.models.parts.decoder import CausalLM
from engine.ops.attention import device_packed as packed
from engine.ops.attention.device import DeviceAttention
from engine.ops.device_coded import DeviceCodedLinear
from engine.ops.state import held_bytes, state_bytes
from engine.speculation.nets import Net
from engine.speculation.paged import full_group
from engine.speculation.registry import proposer_of

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


@dataclass(frozen=True, slots=True)
class Ranked:
    """One of several ranks that compute together, and what its executor is."""

    group: RankGroup
    make: Callable[..., CUDAExecutor]


def least_of(ranked: Ranked | None) -> Callable[[int], int]:
    """Of a number, the smallest that any rank has."""
    return (lambda value: value) if ranked is None else ranked.group.least


def start(given: Start, ranked: Ranked | None = None, layer: DeviceLayer | None = None) -> CUDAExecutor:
    """Load the model onto the GPU, divide its memory, and say what was decided. Raises StartupError.

    ranked: where all ranks call this, each on the GPU of its number. layer: what stands in for that in tests.
    """
    config, report = given.config, given.report
    if config.deterministic:
        raise StartupError("--deterministic is not promised on a GPU yet")
    if config.num_threads is not None:
        raise StartupError("--threads sets compute threads on the CPU; the device is a GPU")
    if config.cuda.kernels is not None:
        from engine.executor.cuda_kit import use_kit

        found = use_kit(Path(config.cuda.kernels), torch.cuda.get_device_capability(), torch.version.cuda)
        report.row("kernels", found)
    dtype = pick_dtype(config.model.dtype)
    if layer is None:
        layer = CudaDevice(0 if ranked is None else ranked.group.rank, nvtx=config.cuda.nvtx != "off")
        other = stands_in(torch.cuda.get_device_capability(layer.device))
        name = torch.cuda.get_device_name(layer.device) + ("" if other is None else f": {other}")
        report.row("device", name if ranked is None else f"{ranked.group.size} ranks, the first on {name}")
    report.row("dtype", str(dtype).removeprefix("torch."))
    report.row("deterministic", "no (GPU)")
    with report.phase("weights"):
        max_adapters = config.lora.max_loras if config.lora.enable else 0
        group = None if ranked is None else ranked.group
        read = given.loader(dtype=dtype, device=layer.device, max_adapters=max_adapters, group=group)

        def load(other: Path | None) -> CausalLM:
            model = read(other) if group is None else read_together(read, other, group)
            if config.cuda.nvtx == "layers":
                model.name_layers(layer.range)
            return model

        with starting("the weights do not fit on the GPU"):
            model = load(None)
    given.report_output_layer(model)
    with starting("the draft model does not fit on the GPU beside the model"):
        drafting = read_drafting(given, model, dtype, device=layer.device)
    if config.model.packed_input_bits == 8 and not float8_layers(model):
        raise StartupError(
            "--packed-input-bits 8: this checkpoint is for no inputs of float8, or this GPU has no products of them"
        )
    if coded := coded_matrices(model):
        kinds = ", ".join(f"{count} {form}" for form, count in coded.most_common())
        matrices = len(model.linears) + sum(2 * mixture.count for mixture in model.mixtures)
        report.row("weights", f"{coded.total()} of {matrices} matrices stay codes ({kinds})")
    if given.spec.bidirectional:
        if config.cache.kv_cache_dtype != "auto":
            raise StartupError(f"--kv-cache-dtype {config.cache.kv_cache_dtype}: this model keeps no keys and values")
        limits = encoder_limits(config.scheduler, given.context, given.spec.vocab_size, max_adapters)
        options: dict[str, Any] = {"max_lora_mib": config.lora.max_lora_mib, "ranked": ranked}
        options |= {"max_lora_rank": config.lora.max_lora_rank, "row": report.row, "load": load}
        return build_cuda_encoder(model, layer, limits, dtype=dtype, **options)
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
            processed_logprobs=config.logprobs.processed,
            row=report.row,
            load=load,
            speculation=config.speculation,
            drafting=drafting,
            max_lora_rank=config.lora.max_lora_rank,
            max_lora_mib=config.lora.max_lora_mib,
            ranked=ranked,
        )


def read_together(read: Callable[[Path | None], CausalLM], other: Path | None, group: RankGroup) -> CausalLM:
    """What all ranks have read, or none. Raises StartupError."""
    model, failure = None, None
    try:
        model = read(other)
    except StartupError as error:
        failure = str(error)
    except torch.OutOfMemoryError as error:
        failure = f"the weights do not fit on GPU {group.rank}: {str(error).splitlines()[0]}"
    group.together(failure)
    assert model is not None
    return model


def coded_matrices(model: CausalLM) -> Counter[str]:
    """How many stay codes, by form; every expert has two."""
    found = Counter(linear.codes.form for linear in model.linears if isinstance(linear, DeviceCodedLinear))
    for mixture in model.mixtures:
        for form in mixture.forms:
            found[form] += mixture.count
    return found


def float8_layers(model: CausalLM) -> list[DeviceCodedLinear]:
    """Those whose inputs may be rounded."""
    return [each for each in model.linears if isinstance(each, DeviceCodedLinear) and each.has_float8_inputs]


def report_float8(model: CausalLM, row: Callable[[str, str], None]) -> None:
    """Where inputs of layers are rounded, once a clock has said from how many rows on."""
    kept = float8_layers(model)
    taken = [each.float8_from for each in kept if each.float8_from is not None]
    if kept:
        least = f", from {min(taken)} rows of a step on" if taken else ", the others were quicker"
        row("inputs", f"rounded to float8 for {len(taken)} of {len(kept)} matrices whose checkpoint says so{least}")


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
    if name == "auto" or _DTYPES.get(name) == dtype:
        return dtype
    if name not in KV_DTYPES:
        known = f"auto, {', '.join(KV_DTYPES)} and the model's own dtype are known"
        raise StartupError(f"--kv-cache-dtype {name}: on a GPU {known}")
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


def make_attention(model: CausalLM | Net, layer: DeviceLayer, module: Any = None, **options: Any) -> DeviceAttention:
    """FlashInfer where it is installed and all layers are of one shape, plain or with latents, else our own kernels.

    options: num_pages, page_size, groups, dtype, kv_dtype.
    """
    spec = model.attention_spec
    known = spec.common is not None or spec.latent is not None
    if not known or (module is None and not (layer.device.type == "cuda" and has_flashinfer())):
        return DeviceAttention(spec, device=layer.device, **options)
    from engine.ops.attention import flashinfer, flashinfer_latent

    kind: Any = flashinfer_latent.Backend
    special = {}
    if spec.latent is None:
        kind = flashinfer.Backend
        if layer.device.type == "cuda" and not has_xqa(torch.cuda.get_device_capability(layer.device)):
            special["decode"] = flashinfer.OURS
    try:
        backend: DeviceAttention = kind(spec, device=layer.device, module=module, **options, **special)
        return backend
    except torch.OutOfMemoryError:
        raise
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("FlashInfer is installed but cannot be loaded: %s", error)
        return DeviceAttention(spec, device=layer.device, **options)


def place_adapters(
    model: CausalLM,
    layer: DeviceLayer,
    max_rank: int,
    room_mib: int | None,
    most_rows: int,
    row: Callable[[str, str], None],
) -> DeviceAdapters | None:
    """Memory for all that may take part in one step; None where none are served. Raises StartupError."""
    if model.adapted is None:
        return None
    with layer.may_block(), starting("no memory is left for adapters", "; lower --max-loras or --max-lora-rank"):
        adapters = DeviceAdapters(model, layer, max_rank, most_rows, room_mib)
    each = adapters.num_bytes / adapters.capacity / GIB
    row("adapters", f"{adapters.capacity} in one step, of rank {max_rank} and below, {each:.2f} GiB each")
    return adapters


def profile_step(
    model: CausalLM,
    layer: DeviceLayer,
    limits: Limits,
    make: Callable[[int], DeviceAttention],
    adapters: DeviceAdapters | None,
    drafts_of: Callable[[Limits], Drafts | None],
) -> tuple[int, int]:
    """Run the hungriest step in a small cache. Returns bytes of (activations, attention workspace)."""
    rows = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    length = min(limits.max_model_len, limits.max_num_batched_tokens // rows)
    pages = len(limits.groups) * rows * -(-length // limits.page_size)
    small = dataclasses.replace(limits, num_pages=pages)
    if limits.num_snapshots is not None:
        small = dataclasses.replace(small, num_snapshots=0)
    attention = make(pages)
    drafts = drafts_of(small)
    executor = CUDAExecutor(model, small, layer, attention, cuda_graph="off", drafts=drafts, adapters=adapters)
    before = layer.allocated_memory()
    layer.peak_memory(reset=True)
    executor.run_worst_case()
    activations = layer.peak_memory() - before
    executor.close()
    workspace = attention.workspace_bytes + (0 if drafts is None else drafts.attention.workspace_bytes)
    return max(0, activations), workspace


def build_cuda_encoder(
    model: CausalLM,
    layer: DeviceLayer,
    limits: Limits,
    *,
    dtype: torch.dtype,
    row: Callable[[str, str], None] = lambda name, text: None,
    load: Callable[[Path | None], CausalLM] | None = None,
    max_lora_rank: int = 64,
    max_lora_mib: int | None = None,
    ranked: Ranked | None = None,
) -> CUDAExecutor:
    """Of a model that reads a text at once and keeps nothing of it: see `encoder_limits`; and build_cuda_executor.
    Raises StartupError."""
    most = limits.max_num_batched_tokens
    adapters = place_adapters(model, layer, max_lora_rank, max_lora_mib, most, row)
    with layer.may_block():
        weights, free = layer.allocated_memory(), layer.free_memory()
        with starting("no memory is left for the largest step", SMALLER):
            attention = packed.Backend(model.attention_spec, max_tokens=most, dtype=dtype, device=layer.device)
            trial = CUDAExecutor(model, limits, layer, attention, cuda_graph="off", adapters=adapters)
            before = layer.allocated_memory()
            layer.peak_memory(reset=True)
            trial.run_worst_case()
            activations = max(0, layer.peak_memory() - before)
            trial.close()
            options: dict[str, Any] = {"cuda_graph": "off", "load": load, "adapters": adapters}
            make: Callable[..., CUDAExecutor] = CUDAExecutor
            if ranked is not None:
                make, options["group"] = ranked.make, ranked.group
            executor = make(model, limits, layer, attention, **options)
        left = max(0, free - (before - weights) - activations)
        row("GPU memory", str(MemoryPlan(layer.total_memory(), weights, before - weights, activations, 0, 0, left)))
        row("attention", attention.describe())
        with starting("a first step fails", SMALLER):
            _, gated = executor.choose_products()
        report_float8(model, row)
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
    processed_logprobs: bool = False,
    row: Callable[[str, str], None] = lambda name, text: None,
    module: Any = None,
    load: Callable[[Path | None], CausalLM] | None = None,
    speculation: SpeculationOptions = NO_DRAFTS,
    drafting: Drafting | None = None,
    max_lora_rank: int = 64,
    max_lora_mib: int | None = None,
    ranked: Ranked | None = None,
) -> CUDAExecutor:
    """Measure, divide the memory, allocate; `row` gets the lines of the start-up table. Raises StartupError.

    load: see CUDAExecutor. speculation, drafting: what drafts, and what was read for it. module: what stands in for
    `flashinfer` in tests. ranked: where this is one of several ranks, all of which call this with the same.
    """
    least = least_of(ranked)
    kv_dtype = pick_kv_dtype(kv_cache_dtype, dtype)
    page_size = cache.page_size
    most = max(max_num_seqs, max_num_batched_tokens)
    adapters = place_adapters(model, layer, max_lora_rank, max_lora_mib, most, row)
    groups = plan_groups(model.config.windows, max_model_len)
    sequences, num_snapshots, state_memory = max_num_seqs, None, 0
    if model.config.has_state:
        each = state_bytes(model.config.states, dtype)
        with layer.may_block():
            share = least(int(layer.free_memory() * (cache.memory_fraction or DEFAULT_MEMORY_SHARE)))
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
            processed_logprobs=processed_logprobs,
            max_adapters=0 if adapters is None else adapters.capacity,
        )

    def attention_of(num_pages: int) -> DeviceAttention:
        options = {"num_pages": num_pages, "page_size": page_size, "groups": groups}
        return make_attention(model, layer, module, dtype=dtype, kv_dtype=kv_dtype, **options)

    net = None if drafting is None else drafting.net(layer.device)
    group = full_group(groups)
    if net is not None and group is None:
        raise StartupError("a draft model needs a layer that attends to all tokens in the model it drafts for")

    def drafts_of(limits: Limits) -> Drafts | None:
        if drafting is None or net is None or group is None:
            return None
        options: dict[str, Any] = {"num_pages": limits.num_pages, "page_size": page_size, "dtype": dtype}

        def by_torch() -> DeviceAttention:
            return DeviceAttention(net.attention_spec, device=layer.device, **options)

        # A cache of latents is planned for every step.
        latent = net.attention_spec.common is None
        attention = by_torch() if latent else make_attention(net, layer, module, **options)
        return Drafts(net, attention, by_torch, group, drafting.context, drafting.probabilistic)

    with layer.may_block():
        weights = layer.allocated_memory()
        free = layer.free_memory()
        with starting("no memory is left for the largest step", SMALLER):
            wide = widened(limits_of(1))
            # A draft is a row, which has no state of its own.
            tried = wide if num_snapshots is None else dataclasses.replace(limits_of(1), max_draft_tokens=0)
            activations, workspace = profile_step(model, layer, tried, attention_of, adapters, drafts_of)
            held = 0
            if num_snapshots is not None and speculation.method is not None:
                # What goes into recurrences, in one piece with what goes by them; and such rows' logits.
                held = 2 * wide.max_num_seqs * held_bytes(model.config.states, dtype)
                activations += held + 16 * wide.max_num_seqs * model.config.vocab_size
        gc.collect()  # the trial cache and buffers go before the real ones come
        page_bytes = page_size * model.attention_spec.kv_bytes_per_token(kv_dtype, groups)
        if drafting is not None:
            page_bytes += page_size * drafting.kv_bytes_per_token(dtype)
        if net is not None:
            workspace += DeviceDrafter.num_bytes(net, limits_of(1), dtype)
        graphs = num_graphs = num_draft_graphs = 0
        if cuda_graph != "off":
            # Logits, the same as open steps have them, and the list of a filter's tokens; all graphs share the room.
            logits = wide.max_num_seqs * model.config.vocab_size * 4
            sides = 2 if speculation.method is None else 4
            families = 1 if adapters is None else 2
            num_sizes = len(graph_sizes(wide.max_num_seqs))
            num_graphs = families * most_graphs(num_sizes, sides, wide.max_pages_per_seq)
            if net is not None:
                num_draft_graphs = most_graphs(num_sizes, 4, wide.max_pages_per_seq)
            graphs = held + 4 * logits + (num_graphs + num_draft_graphs + families * len(SIZES)) * GRAPH_BYTES
            graphs += activations * min(SIZES[-1], max_num_batched_tokens) // max_num_batched_tokens
        wanted = cache.kv_cache_bytes
        if cache.num_pages is not None:
            wanted = (cache.num_pages + 1) * page_bytes
        if wanted is None:
            share = DEFAULT_MEMORY_SHARE if cache.memory_fraction is None else cache.memory_fraction
            wanted = int(share * free) - activations - workspace - graphs
        if cache.num_pages is None:
            wanted -= state_memory
        # A page is in the memory of all ranks.
        num_pages = least(wanted // page_bytes - 1)
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
            limits = limits_of(num_pages)
            options: dict[str, Any] = {"cuda_graph": cuda_graph, "load": load, "proposer": proposer_of(speculation)}
            options |= {"drafts": drafts_of(limits), "adapters": adapters}
            if ranked is None:
                executor = CUDAExecutor(model, limits, layer, attention, **options)
            else:
                executor = ranked.make(model, limits, layer, attention, group=ranked.group, **options)
        except torch.OutOfMemoryError as error:
            what = "a KV cache with recurrent states" if state_memory else "a KV cache"
            what += f" of {kv_bytes / GIB:.2f} GiB"
            raise StartupError(f"{what} does not fit: {str(error).splitlines()[0]}") from error
        if cuda_graph != "off":
            executor.graphs.most = num_graphs
            if executor._drafter is not None:
                executor._drafter.graphs.most = num_draft_graphs
        left = free - kv_bytes - activations - workspace - graphs
        plan = MemoryPlan(layer.total_memory(), weights, workspace, activations, graphs, kv_bytes, max(0, left))
        row("GPU memory", str(plan))
        if not model.config.headless:
            with starting("a first decode step fails", SMALLER):
                executor.decode_once()
                executor.choose_attention()
        text = attention.describe()
        spec = model.attention_spec
        if spec.common is None and spec.latent is None:
            text += ", for layers that differ in more than their window, or have sinks"
        elif module is None and not has_flashinfer():
            gain = ", which is many times faster" if "torch" in text else ""
            text += f"; pip install 'oneloop[cuda]' brings FlashInfer{gain}"
        row("attention", f"{text}; KV cache in {str(kv_dtype).removeprefix('torch.')}")
        with starting("a first decode step fails", SMALLER):
            few, gated = executor.choose_products()
        report_float8(model, row)
        quicker = "by our kernel, the others by cuBLAS, as was quicker"
        row("products of 1 to 4 rows", f"{few[0]} of {few[1]} {quicker}")
        row("gate and up of prompts", f"{gated[0]} of {gated[1]} {quicker}")
        if (drafter := executor._drafter) is not None:
            with starting("a first draft fails", SMALLER):
                executor.draft_once()
            row("drafting", drafter.describe())
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
