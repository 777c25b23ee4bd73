"""How a group of ranks on the host's cores comes to be: what each is told, and how memory and cores are divided.

Called once by the composition root in place of cpu_start.py, before the loop runs; it may block.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig, StartupError
from engine.distributed.leader import Leader, RankedExecutor, RankedModel
from engine.distributed.messages import message_bytes
from engine.executor.cpu_start import (
    DEFAULT_MEMORY_SHARE,
    available_cores,
    available_memory,
    choose_threads,
    paged_limits,
    pick_dtype,
    pick_kv_dtype,
)
from engine.executor.drafting import read_drafting
from engine.executor.start import Start, describe_states, encoder_limits, plan_states
from engine.forward import Limits
from engine.groups import MemoryGroup, plan_groups
from engine.models.loading.load import weight_bytes
from engine.models.loading.slices import FLAG, refuse
from engine.models.parts.decoder import CausalLM
from engine.models.quantisation import rounded_to
from engine.ops import native
from engine.ops.attention.base import AttentionSpec, create_backend
from engine.ops.invariance import promise
from engine.ops.parallel import ParallelGroup
from engine.ops.ranks import SLOT_BYTES, Layout
from engine.ops.state import held_bytes, state_bytes

MAX_RANKS = 64
# Of a rank's part of logits that is handed over at once.
MAX_LOGITS_BYTES = 64 << 20
# Of Limits, what other ranks are told; groups follow from the model.
SIZES = (
    *("max_num_seqs", "max_num_batched_tokens", "max_model_len", "page_size", "num_pages", "vocab_size"),
    "num_snapshots",
)


@dataclass(frozen=True, slots=True)
class AllRanks(AttentionSpec):
    """What one rank has, for the memory that all of them take."""

    size: int = 1

    def kv_bytes_per_token(self, dtype: torch.dtype, groups: tuple[MemoryGroup, ...] = (MemoryGroup(),)) -> int:
        """See AttentionSpec."""
        return self.size * AttentionSpec.kv_bytes_per_token(self, dtype, groups)


def start(given: Start) -> RankedExecutor:
    """Start the ranks, load the model in all of them, divide the memory, and say what was decided."""
    config, report, spec = given.config, given.report, given.spec
    size, context = config.tensor_parallel_size, given.context
    dtype = pick_dtype(config.model.dtype)
    with report.phase("kernels"):
        status = native.status()
    if (why := _obstacle(given, dtype)) is not None:
        raise StartupError(why)
    whole = weight_bytes(spec, given.directory, dtype)
    cores = available_cores()
    threads = config.num_threads or max(1, (cores if spec.bidirectional else choose_threads(whole, cores)) // size)
    torch.set_num_threads(threads)
    each = f"{threads} compute thread{'s' if threads > 1 else ''}"
    report.row("device", f"CPU, {size} ranks with {each} each, {status}")
    if size * threads > cores:
        report.row("ranks", f"{size * threads} threads for {cores} cores: they will wait for each other")
    report.row("dtype", str(dtype).removeprefix("torch."))
    keeps = bool(spec.paged) and not spec.bidirectional
    kv_dtype = pick_kv_dtype(config.cache.kv_cache_dtype, dtype, keeps=keeps)
    groups = plan_groups(spec.windows, context)
    layout = _layout(config, given, dtype, groups)
    job = {
        "directory": str(Path(given.directory).absolute()),
        "dtype": str(dtype).removeprefix("torch."),
        "load_format": config.model.load_format,
        "seed": config.model.seed or 0,
        "context": context,
        "deterministic": bool(config.deterministic),
        "quantisation": rounded_to(config.model.quantization, spec.quantisation, given=str(given.directory)),
        "packed_input_bits": config.model.packed_input_bits,
        "headless": spec.headless,
        "threads": threads,
        "expert_parallel": config.expert_parallel,
        "max_adapters": config.lora.max_loras if config.lora.enable else 0,
        "max_lora_rank": config.lora.max_lora_rank,
    }

    def read(other: Path | None, group: ParallelGroup) -> CausalLM:
        options: dict[str, Any] = {"dtype": dtype, "device": torch.device("cpu"), "max_adapters": job["max_adapters"]}
        load = given.loader(**options, deterministic=bool(config.deterministic), group=group)
        return load(other)

    carried = config.tiers.is_given or config.transfer.connector is not None
    leader = Leader(layout, job, read, shares_pages=carried and keeps)
    try:
        with report.phase("weights"):
            model = leader.first()
        given.report_output_layer(model.own)
        given.report_input_bits(model.own)
        promised, how = promise(model.linears, model.attention_spec, dtype)
        if config.deterministic and not promised:
            raise StartupError(f"--deterministic cannot be promised here: {how}")
        report.row("deterministic", f"{'yes' if promised else 'no'} ({how}; {size} ranks add up in their order)")
        drafting = read_drafting(given, model.own, dtype, target=model)
        beside = 0 if drafting is None else drafting.kv_bytes_per_token(dtype)
        limits = _limits(given, model, dtype, kv_dtype, groups, beside)
        own: Any = create_backend(
            "packed" if spec.bidirectional else "torch_paged",
            model.attention_spec,
            num_pages=limits.num_pages,
            page_size=limits.page_size,
            dtype=dtype,
            kv_dtype=kv_dtype,
            groups=limits.groups,
        )
        sizes = {field: getattr(limits, field) for field in SIZES}
        others = leader.begin(kv_dtype=str(kv_dtype).removeprefix("torch."), **sizes)
        proposer, late = (None, None) if drafting is None else drafting.make(limits, dtype)
        options: dict[str, Any] = {"proposer": proposer, "late": late, "max_lora_rank": config.lora.max_lora_rank}
        options["others"] = others
        return RankedExecutor(model, limits, attention=own, dtype=dtype, leader=leader, **options)
    except BaseException:
        leader.close()
        raise


def _obstacle(given: Start, dtype: torch.dtype) -> str | None:
    """Why it cannot be."""
    size = given.config.tensor_parallel_size
    if size > MAX_RANKS:
        return f"{FLAG} {size} is more than {MAX_RANKS}"
    if not sys.platform.startswith("linux"):
        return f"{FLAG} {size} works on Linux alone"
    if native.library() is None:
        return f"{FLAG} {size} needs the compiled kernels, and here it is {native.status()}"
    if native.type_code(dtype) is None:
        return f"{FLAG} {size} needs --dtype float32 or bfloat16"
    if given.config.lora.max_lora_mib is not None:
        return "--max-lora-mib is for GPUs: on a CPU an adapter takes what it needs"
    if given.spec.hidden_size * dtype.itemsize > SLOT_BYTES:
        return f"{FLAG} {size}: {given.spec.hidden_size} numbers of a token are too many"
    if given.config.expert_parallel and not given.spec.experts:
        return f"--enable-expert-parallel: {given.spec.architecture or 'this model'} has no experts"
    return refuse(given.spec, size, expert_parallel=given.config.expert_parallel)


def _layout(config: EngineConfig, given: Start, dtype: torch.dtype, groups: tuple[MemoryGroup, ...]) -> Layout:
    """The shared memory."""
    scheduler, size = config.scheduler, config.tensor_parallel_size
    pages = -(-given.context // config.cache.page_size)
    message = message_bytes(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, pages, len(groups))
    part = -(-given.spec.vocab_size // size) + 64
    logits = min(MAX_LOGITS_BYTES, max(scheduler.max_num_seqs * part * dtype.itemsize, SLOT_BYTES))
    return Layout(size, message, max(logits, part * dtype.itemsize))


def _limits(
    given: Start,
    model: RankedModel,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    groups: tuple[MemoryGroup, ...],
    beside: int,
) -> Limits:
    """As cpu_start has them: a page is in the memory of all ranks. beside: bytes of a token in the draft model's."""
    config, context, report = given.config, given.context, given.report
    size, scheduler = config.tensor_parallel_size, config.scheduler
    if given.spec.bidirectional:
        return encoder_limits(scheduler, context, given.spec.vocab_size, config.lora.max_loras * config.lora.enable)
    with report.phase("KV cache"):
        everywhere = AllRanks(model.attention_spec.layers, size)
        sequences, num_snapshots, state_memory, where = scheduler.max_num_seqs, None, 0, " in all ranks"
        if model.config.has_state:
            each = size * state_bytes(model.config.states, dtype)
            share = int(available_memory() * (config.cache.memory_fraction or DEFAULT_MEMORY_SHARE))
            sequences, num_snapshots = plan_states(each, config.cache, sequences, share)
            state_memory = (sequences + num_snapshots) * each
            report.row("states", describe_states(each, sequences, num_snapshots, scheduler.max_num_seqs) + where)
            if config.speculation.method is not None:
                state_memory += given.plan_held(sequences, size * held_bytes(model.config.states, dtype))
        return paged_limits(
            given,
            everywhere,
            kv_dtype,
            groups,
            sequences=sequences,
            num_snapshots=num_snapshots,
            state_memory=state_memory,
            beside=beside,
            where=where,
        )
