"""How a CPU executor comes to be: dtype, compute threads, how much memory the cache has, and the lines that say so.

Called once by the composition root, before the loop runs; it may block.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from pathlib import Path

import torch

from engine.config import CacheOptions, StartupError
from engine.executor.cpu import CPUExecutor
from engine.executor.drafting import read_drafting
from engine.executor.start import Start, describe_states, encoder_limits, plan_states
from engine.forward import Limits
from engine.groups import MemoryGroup, pages_held, plan_groups
from engine.models.loading.load import weight_bytes
from engine.ops import native
from engine.ops.attention.base import AttentionSpec
from engine.ops.coded import CodedLinear
from engine.ops.invariance import promise
from engine.ops.linear import has_fast_bfloat16
from engine.ops.packed import PackedLinear
from engine.ops.state import held_bytes, state_bytes

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KV_DTYPES = {**_DTYPES, "int8": torch.int8}
# Share of the available memory that the KV cache takes when nothing was asked for: the rest is for activations,
# other processes and the page cache that holds the checkpoint. It is touched as the cache fills, so what it comes to
# take shows only later.
DEFAULT_MEMORY_SHARE = 0.25
# Sequences of full context that it then holds at most; many more fit, for few are that long.
DEFAULT_FULL_SEQUENCES = 64


def start(given: Start) -> CPUExecutor:
    """Load the model, divide the memory, and say what was decided. Raises StartupError."""
    config, report, context = given.config, given.report, given.context
    dtype = pick_dtype(config.model.dtype)
    with report.phase("kernels"):
        status = native.status()
    encodes = given.spec.bidirectional
    kv_dtype = pick_kv_dtype(config.cache.kv_cache_dtype, dtype, keeps=bool(given.spec.paged) and not encodes)
    chosen = available_cores() if encodes else choose_threads(weight_bytes(given.spec, given.directory, dtype))
    threads = config.num_threads or chosen
    torch.set_num_threads(threads)
    of = "" if config.num_threads else f" of {available_cores()} cores (by the model's size; --threads sets them)"
    report.row("device", f"CPU, {threads} compute thread{'s' if threads > 1 else ''}{of}, {status}")
    report.row("dtype", str(dtype).removeprefix("torch."))
    with report.phase("weights"):
        if config.lora.max_lora_mib is not None:
            raise StartupError("--max-lora-mib is for GPUs: on a CPU an adapter takes what it needs")
        adapters = config.lora.max_loras if config.lora.enable else 0
        load = given.loader(
            dtype=dtype, device=torch.device("cpu"), deterministic=bool(config.deterministic), max_adapters=adapters
        )
        model = load(None)
    given.report_output_layer(model)
    if coded := sum(isinstance(linear, CodedLinear) for linear in model.linears):
        report.row("weights", f"{coded} of {len(model.linears)} matrices stay small codes")
    if packed := Counter(linear.block for linear in model.linears if isinstance(linear, PackedLinear)):
        kinds = ", ".join(f"{count} {kind}" for kind, count in packed.most_common())
        report.row("weights", f"{packed.total()} of {len(model.linears)} matrices stay packed ({kinds})")
    given.report_input_bits(model)
    drafting = read_drafting(given, model, dtype)
    promised, how = promise(model.linears, model.attention_spec, dtype)
    if config.deterministic and not promised:
        raise StartupError(f"--deterministic cannot be promised here: {how}")
    report.row("deterministic", f"{'yes' if promised else 'no'} ({how})")
    if encodes:
        limits = encoder_limits(config.scheduler, context, given.spec.vocab_size, adapters)
        return CPUExecutor(model, limits, dtype=dtype, load=load, max_lora_rank=config.lora.max_lora_rank)
    with report.phase("KV cache"):
        groups = plan_groups(given.spec.windows, context)
        sequences, num_snapshots, state_memory = config.scheduler.max_num_seqs, None, 0
        if given.spec.has_state:
            each = state_bytes(given.spec.states, dtype)
            share = int(available_memory() * (config.cache.memory_fraction or DEFAULT_MEMORY_SHARE))
            sequences, num_snapshots = plan_states(each, config.cache, sequences, share)
            state_memory = (sequences + num_snapshots) * each
            report.row("states", describe_states(each, sequences, num_snapshots, config.scheduler.max_num_seqs))
            if drafting is not None:
                state_memory += given.plan_held(sequences, held_bytes(given.spec.states, dtype))
        beside = 0 if drafting is None else drafting.kv_bytes_per_token(dtype)
        limits = paged_limits(
            given,
            model.attention_spec,
            kv_dtype,
            groups,
            sequences=sequences,
            num_snapshots=num_snapshots,
            state_memory=state_memory,
            beside=beside,
        )
        proposer = late = None
        if drafting is not None:
            proposer, late = drafting.make(limits, dtype)
        return CPUExecutor(
            model,
            limits,
            dtype=dtype,
            kv_dtype=kv_dtype,
            load=load,
            proposer=proposer,
            late=late,
            max_lora_rank=config.lora.max_lora_rank,
        )


def paged_limits(
    given: Start,
    spec: AttentionSpec,
    kv_dtype: torch.dtype,
    groups: tuple[MemoryGroup, ...],
    *,
    sequences: int,
    num_snapshots: int | None = None,
    state_memory: int = 0,
    beside: int = 0,
    where: str = "",
) -> Limits:
    """Of a model that keeps K and V; says what they take. spec: of a token's, `where` it has them. state_memory: bytes
    of its states. beside: bytes of a token in a draft model's cache."""
    config, cache = given.config, given.config.cache
    num_pages = plan_memory(spec, kv_dtype, cache, sequences, given.context, groups, state_memory, beside)
    per_token = spec.kv_bytes_per_token(kv_dtype, groups) + beside
    kv_bytes = (num_pages + 1) * cache.page_size * per_token
    chosen = cache.kv_cache_dtype != "auto"
    asked = (cache.num_pages, cache.kv_cache_bytes, cache.memory_fraction) != (None, None, None)
    given.report.row(
        "KV memory",
        f"up to {kv_bytes / 2**30:.2f} GiB{where}, taken as the cache fills"
        + (f", in {str(kv_dtype).removeprefix('torch.')}: {per_token:,} bytes a token" if chosen else "")
        + ("" if asked else f" (at most {DEFAULT_MEMORY_SHARE:.0%} of what is available; --kv-cache-gb sets it)"),
    )
    return Limits(
        max_num_seqs=sequences,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_model_len=given.context,
        page_size=cache.page_size,
        num_pages=num_pages,
        vocab_size=given.spec.vocab_size,
        groups=groups,
        num_snapshots=num_snapshots,
        max_draft_tokens=config.speculation.num_draft_tokens if config.speculation.method is not None else 0,
        max_adapters=config.lora.max_loras if config.lora.enable else 0,
        processed_logprobs=config.logprobs.processed,
    )


def pick_dtype(name: str = "auto") -> torch.dtype:
    """auto: bfloat16 where the processor multiplies it (AVX512-BF16, AMX), else float32. Raises StartupError."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16() else torch.float32
    if name not in _DTYPES:
        raise StartupError(f"dtype {name!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def pick_kv_dtype(name: str, dtype: torch.dtype, *, keeps: bool = True) -> torch.dtype:
    """--kv-cache-dtype on a CPU: auto is the model's dtype. keeps: the model has keys and values to keep."""
    if name == "auto":
        return dtype
    if name not in KV_DTYPES:
        raise StartupError(f"--kv-cache-dtype {name}: on a CPU one of auto, {', '.join(KV_DTYPES)} is known")
    if not keeps:
        raise StartupError(f"--kv-cache-dtype {name}: this model keeps no keys and values")
    found = KV_DTYPES[name]
    if found == torch.float32 != dtype:
        raise StartupError("--kv-cache-dtype float32 is for --dtype float32: wider than they are made says no more")
    return found


def available_cores() -> int:
    """Physical cores that this process may use: affinity, hyperthreads counted once, the cgroup's quota."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in cpus:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text().strip())
        except OSError:
            siblings.add(str(cpu))
    count = len(siblings)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, int(int(quota) / int(period) + 0.5))
    return max(1, count)


def choose_threads(weight_bytes: int, cores: int | None = None) -> int:
    """Compute threads for a model of that size.

    A step reads all weights, so one thread takes about weight_bytes / 15 GB/s, and every thread should have a share
    of 16 MB (1 ms): its barriers and the event loop's work, 0.1 to 1 ms a step, weigh as much as the gain otherwise.
    A thread that must share its core with the loop holds all others up at each barrier (measured: 3 to 5 times
    slower than one thread), so a core is left to the loop, unless the loop has next to nothing to do: steps of
    20 ms and more (300 MB) on four cores or fewer, where that core is worth more (1.9 times on two).
    """
    cores = cores or available_cores()
    heavy = weight_bytes >= 300_000_000
    most = cores if heavy and cores <= 4 else max(1, cores - 1)
    return max(1, min(most, weight_bytes // 16_000_000))


def available_memory() -> int:
    """Bytes of RAM that can be had without swapping, within the cgroup's limit."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    groups = [Path("/sys/fs/cgroup")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                own = Path("/sys/fs/cgroup") / line[4:]
                groups += [own, *own.parents]
    for group in groups:
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
        ):
            # "max" is no number, and then no limit.
            with contextlib.suppress(OSError, ValueError):
                found.append(max(0, int((group / limit).read_text()) - int((group / usage).read_text())))
    if not found:
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2
    return min(found)


def plan_memory(
    spec: AttentionSpec,
    kv_dtype: torch.dtype,
    cache: CacheOptions,
    max_num_seqs: int,
    max_model_len: int,
    groups: tuple[MemoryGroup, ...] = (MemoryGroup(),),
    state_memory: int = 0,
    beside: int = 0,
) -> int:
    """Pages of the KV cache. To be called after the weights are loaded. Raises StartupError.

    What was asked for is taken as it is: num_pages, kv_cache_bytes, or memory_fraction of the available memory. Else
    DEFAULT_MEMORY_SHARE of it, and no more than max_num_seqs sequences of max_model_len (or DEFAULT_FULL_SEQUENCES, if
    those are fewer) can fill. state_memory: bytes of recurrent states, which are part of each of these but num_pages.
    beside: bytes that a token takes in another cache with the same pages.
    """
    per_page = (spec.kv_bytes_per_token(kv_dtype, groups) + beside) * cache.page_size
    free = available_memory()
    useful = min(max_num_seqs, DEFAULT_FULL_SEQUENCES) * pages_held(groups, max_model_len, cache.page_size)
    if cache.num_pages is not None:
        num_pages = cache.num_pages
    elif per_page == 0:  # no layer keeps K and V
        num_pages = useful
    elif cache.kv_cache_bytes is not None:
        num_pages = (cache.kv_cache_bytes - state_memory) // per_page - 1  # page 0 is nobody's
    elif cache.memory_fraction is not None:
        num_pages = (int(free * cache.memory_fraction) - state_memory) // per_page - 1
    else:
        num_pages = min((int(free * DEFAULT_MEMORY_SHARE) - state_memory) // per_page - 1, useful)
    if num_pages < 1:
        raise StartupError(f"the KV cache would hold no page: one of {cache.page_size} tokens takes {per_page:,} bytes")
    if (num_pages + 1) * per_page + state_memory > free:
        beside = f" and recurrent states {state_memory / 2**30:.1f} GiB" if state_memory else ""
        raise StartupError(
            f"a KV cache of {num_pages:,} pages takes {(num_pages + 1) * per_page / 2**30:.1f} GiB{beside}, "
            f"and {free / 2**30:.1f} GiB of memory are available"
        )
    return num_pages
