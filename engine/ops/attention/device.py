"""Attention over metadata that lives on the device: what the CUDA executor hands to a backend, and plain torch for it.

The host plans once per step; `forward` then issues device work alone: it reads no tensor on the host and, for decode
rows, has shapes that depend on the batch size only, so that it can be captured in a graph. Backends: flashinfer.py,
and `DeviceAttention` here, which runs everything: by kernels of ours on a GPU, and by torch where those have no room.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.forward import Int32Array
from engine.groups import Chunk, MemoryGroup, places_of
from engine.ops.attention.base import AttentionSpec, LayerAttention
from engine.ops.attention.sequence import attend_sequence, softmax_with_sinks
from engine.ops.norm import rms_norm
from engine.ops.rope import apply_rope
from engine.ops.state import States
from engine.ops.triton.runtime import available, on_gpu

logger = logging.getLogger("oneloop.cuda")

# What kernels of ours do.
DECODE, PROMPTS, LARGE_TILES = "decode", "prompts", "large tiles of prompts"
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
# Weights [D] of the RMS norms of a head of q and of k, and their epsilon.
HeadNorms = tuple[Tensor, Tensor, float]


@dataclass(slots=True)
class DecodeStep:
    """A decode step in fixed shapes. positions int32 [B]; kv_len int32 [B]: positions + 1. Padding rows read page 0.

    Of each memory group: kv_slots int32 [B], the cells that the new tokens go to; tables int32 [B, W], the rows' pages.
    """

    positions: Tensor
    kv_slots: Sequence[Tensor]
    tables: Sequence[Tensor]
    kv_len: Tensor
    parity: int


@dataclass(slots=True)
class Ragged:
    """Rows of any length, for a plan on the host. kv_indices int32 [pages] of each memory group: on the device.

    qo_indptr, kv_indptr int32 [R + 1], last_page_len, kv_len int32 [R]: pinned host tensors, unchanged until the step
    is done. on_device: qo_indptr, kv_indptr and kv_len once more, of rows that `prefill_rows` may be asked for.
    """

    kv_indices: Sequence[Tensor]
    qo_indptr: Tensor
    kv_indptr: Tensor
    last_page_len: Tensor
    kv_len: Tensor
    on_device: tuple[Tensor, Tensor, Tensor] | None = None

    def sizes(self) -> list[tuple[int, int, int]]:
        """(tokens, pages, kv_len) of every row."""
        lengths = (self.qo_indptr[1:] - self.qo_indptr[:-1]).tolist()
        pages = (self.kv_indptr[1:] - self.kv_indptr[:-1]).tolist()
        return list(zip(lengths, pages, self.kv_len.tolist(), strict=True))


@dataclass(slots=True)
class MixedStep:
    """A step with prompts. positions int32 [T], kv_slots int32 [T] of each memory group: on the device.

    rows: all of them. The first num_decodes continue by one token each; prompts: the others, counted from 0.
    decode: the first ones once more, in fixed shapes; set on the device, just before the forward.
    send: brings int32 arrays of the host to the device, on the stream of the step.
    """

    positions: Tensor
    kv_slots: Sequence[Tensor]
    rows: Ragged
    prompts: Ragged
    num_decodes: int
    parity: int
    decode: DecodeStep | None = None
    send: Callable[[Sequence[Int32Array]], list[Tensor]] | None = None


@dataclass(slots=True)
class DecodePlan:
    """For backends that plan decode steps on the host: CSR of the rows, padding rows included (one page, page 0).

    kv_indptr int32 [B + 1], last_page_len int32 [B]: pinned host tensors. kv_indices int32, of each memory group: on
    the device.
    """

    kv_indptr: Tensor
    last_page_len: Tensor
    kv_indices: Sequence[Tensor]


def decode_inputs(
    page_tables: Tensor,
    last_token: Tensor,
    row_slot: Tensor,
    row_start: Tensor,
    table_index: Tensor,
    table_page: Tensor,
    width: int,
    page_size: int,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Apply table diffs, then look up what the rows of a decode step need.

    page_tables int32 [groups, slots, pages], changed in place; last_token int32 [slots]; row_slot, row_start int32 [B];
    table_index, table_page int32 [D], an entry may repeat; given int32 [B]: tokens of rows that have one, and -1.
    Returns token_ids int32 [B], kv_len int32 [B], and of each
    group kv_slots int32 [B] and tables int32 [B, width].
    """
    if on_gpu(page_tables):
        from engine.ops.triton.prepare import prepare

        return prepare(page_tables, last_token, row_slot, row_start, table_index, table_page, width, page_size, given)
    page_tables.view(-1).index_copy_(0, table_index.long(), table_page)
    slots, where = row_slot.long(), row_start.long()
    tables = page_tables[:, :, :width].index_select(1, slots).unbind()
    pages = [table.gather(1, (where // page_size)[:, None])[:, 0] for table in tables]
    kv_slots = tuple((page * page_size + where % page_size).int() for page in pages)
    tokens = last_token.index_select(0, slots)
    if given is not None:
        tokens = torch.where(given >= 0, given, tokens)
    return tokens, row_start + 1, kv_slots, tables


class DeviceAttention:
    """Owns the KV pools on the device and attends by kernels of ours or by torch operations, see `has_kernel`.

    One K and one V buffer for each place in a memory group, as in ops/attention/torch_paged.py. kv_dtype: of the pools;
    float8_e4m3fn holds values as they are (scale 1). Used by the executor on its one stream.
    """

    name = "torch"
    # Where layers with a recurrent state find it; the executor's.
    states: States | None = None

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        device: torch.device,
        groups: tuple[MemoryGroup, ...] = (MemoryGroup(),),
    ) -> None:
        self.spec = spec
        # Those that have K and V, by number.
        self.layers: dict[int, LayerAttention] = spec.attending
        self.page_size = page_size
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self.device = device
        self.windows: dict[int, int | None] = {number: layer.window for number, layer in self.layers.items()}
        self.num_pages = num_pages
        self.num_groups = len(groups)
        # What our kernels were found not to run for: of DECODE, PROMPTS and LARGE_TILES, and of the layers.
        self._not_ours: set[tuple[str, int]] = set()
        self._widths = spec.buffer_widths(groups)
        places = dict(zip(spec.owners, places_of(groups, len(spec.owners)), strict=True))
        self._places = {number: places[layer.own(number)] for number, layer in self.layers.items()}
        # Whose page ids a layer goes by.
        self.group_of: dict[int, int] = {number: group for number, (group, _) in self._places.items()}
        self.allocate()

    def allocate(self) -> None:
        """The KV pools; again, after `release`."""
        cells = self.num_pages + 1, self.page_size
        options: dict[str, Any] = {"dtype": self.kv_dtype, "device": self.device}
        # Zeroed: a masked place counts with weight 0, and 0 times the NaN of old memory would be NaN.
        keys = [torch.zeros((*cells, width), **options) for width, _ in self._widths]
        values = [torch.zeros((*cells, width), **options) for _, width in self._widths]
        # All that a page holds, [pages, ...] each.
        self.buffers: list[Tensor] = [*keys, *values]
        # By layer.
        self.k_pools: dict[int, Tensor] = {}
        self.v_pools: dict[int, Tensor] = {}
        for number, layer in self.layers.items():
            _, buffer = self._places[number]
            source = keys[buffer] if layer.values_in_keys else values[buffer]
            self.k_pools[number], self.v_pools[number] = (
                pool[..., : layer.num_kv_heads * dim].unflatten(2, (layer.num_kv_heads, dim))
                for pool, dim in ((keys[buffer], layer.head_dim), (source, layer.value_dim))
            )

    def release(self) -> None:
        """Give the KV pools' memory back; graphs that were captured with them are void."""
        self.k_pools, self.v_pools, self.buffers = {}, {}, []

    def cleanse(self, tables: Tensor) -> None:
        """Zeros for what is NaN or infinite in pages [groups, P], on the device; what is a number stays."""
        with torch.inference_mode():
            for number, layer in self.layers.items():
                pages = tables[self.group_of[number]].long()
                pools = [self.k_pools[number], self.v_pools[number]]
                for pool in pools[:1] if layer.values_in_keys else pools:
                    found = pool.view(torch.uint8)[pages] if pool.dtype.itemsize == 1 else pool[pages]
                    if pool.dtype.itemsize == 1:  # e4m3fn knows NaN alone
                        pool.view(torch.uint8)[pages] = found.masked_fill(found & 0x7F == 0x7F, 0)
                    else:
                        pool[pages] = found.masked_fill(~found.isfinite(), 0.0)

    def decode_needs_plan(self, size: int) -> bool:
        """Whether decode steps of `size` rows come with a DecodePlan."""
        return False

    @property
    def workspace_bytes(self) -> int:
        return 0

    def settle(self, wait: Callable[[], None]) -> None:
        """Find out which kernels there are, before the first step; on the stream of the steps.

        wait: blocks until the device has done what was issued.
        """
        self.settle_ours(wait, (DECODE, PROMPTS, LARGE_TILES), self.layers)

    def settle_ours(self, wait: Callable[[], None], works: Iterable[str], layers: Iterable[int]) -> None:
        """Run our kernels once for layers of every shape and window: what does not run goes another way from then on.

        Not every GPU has the memory that their tiles ask for. And a kernel is compiled here, while nobody waits for it.
        works: which of DECODE, PROMPTS and LARGE_TILES.
        """
        alike: dict[object, list[int]] = {}
        for number in layers:
            layer, window = self.layers[number], self.windows[number]
            sizes = layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.value_dim
            alike.setdefault((*sizes, layer.softcap, layer.sinks, window), []).append(number)
        for numbers, work in itertools.product(alike.values(), works):
            if not (self.has_kernel if work == DECODE else self.has_prompt_kernel)(numbers[0]):
                continue
            try:
                self._run_ours(numbers[0], work)
                wait()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler may raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                what = f"our kernel of {work} does not run for heads of {self.layers[numbers[0]].head_dim}: {reason}"
                logger.log(logging.INFO if work == LARGE_TILES else logging.WARNING, what)
                self._not_ours.update((work, number) for number in numbers)

    def _run_ours(self, number: int, work: str) -> None:
        """One token by the kernels that steps may take."""
        from engine.ops.triton import attention
        from engine.ops.triton import prompts as of_prompts

        spec, pools = self.layers[number], (self.k_pools[number], self.v_pools[number])
        seen: dict[str, Any] = {"window": self.windows[number], "softcap": spec.softcap}
        if spec.sinks:
            seen["sinks"] = torch.zeros(spec.num_heads, device=self.device)
        q = torch.zeros(1, spec.num_heads, spec.head_dim, dtype=self.dtype, device=self.device)
        table = torch.zeros(1, 64, dtype=torch.int32, device=self.device)
        one, starts = table[0, :1] + 1, table[0, :2] + torch.arange(2, dtype=torch.int32, device=self.device)
        if work == DECODE:
            most = attention.most_parts(spec.num_kv_heads, q, self.num_pages * self.page_size)
            for parts in (1 << power for power in range(most.bit_length() + 1)):
                attention.decode_attention(q, *pools, table, one, spec.scale, parts=parts, **seen)
            return
        where = starts, starts, table[0], one
        queries = of_prompts.LARGE if work == LARGE_TILES else of_prompts.SMALL
        tile = of_prompts.tile_of(max(spec.head_dim, spec.value_dim), self.dtype, self.kv_dtype, queries)
        of_prompts.prompt_attention(q, *pools, *where, spec.scale, max_len=1, tile=tile, **seen)

    def describe(self) -> str:
        """One line for the start-up table."""
        ours = [has(layer) for layer in self.layers for has in (self.has_kernel, self.has_prompt_kernel)]
        if not any(ours):
            return "torch (slow)"
        return "our kernels (Triton)" + ("" if all(ours) else ", torch (slow) for prompts or in some layers")

    def choices(self) -> list[int | None]:
        """Kinds of layers, by their window, that could decode in more than one way: see executor/cuda_attention.py."""
        return []

    def prepare_decode(self, size: int, width: int) -> None:
        """Make ready for decode batches of `size` rows, before the first is planned or captured."""

    def plan_decode(self, plan: DecodePlan, size: int, width: int, parity: int) -> None:
        """Host side of a decode step, before its launch or replay; only where `decode_needs_plan`."""

    def decode(self, step: DecodeStep) -> DecodeAttention:
        """The attention of one decode step, for `CausalLM.forward`."""
        return DecodeAttention(self, step)

    def mixed(self, step: MixedStep) -> StepAttention:
        """Plan a step with prompts on the host; the result attends on the device."""
        return MixedAttention(self, step)

    # What both do per layer.

    def write(
        self,
        layer: int,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        positions: Tensor,
        kv_slots: Sequence[Tensor],
        cos_sin: Tensor | None,
        norms: HeadNorms | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Norm and turn q and k, put k and v into the pool; returns q, contiguous, in `out` if there is one."""
        cells = kv_slots[self.group_of[layer]]
        if on_gpu(q) and k is not None and v is not None and k.shape == v.shape:
            from engine.ops.triton.rope import rope_and_write_kv

            pools = self.k_pools[layer], self.v_pools[layer]
            return rope_and_write_kv(q, k, v, cos_sin, positions, cells, *pools, norms, out)
        if norms is not None:
            assert k is not None
            *weights, eps = norms
            q, k = (rms_norm(x.flatten(0, 1), w, eps).view(x.shape) for x, w in zip((q, k), weights, strict=True))
        if cos_sin is not None:
            apply_rope(q, k, cos_sin, positions)
        if k is not None:
            self._store(self.k_pools[layer], cells, k)
        if v is not None:
            self._store(self.v_pools[layer], cells, v)
        return q.contiguous() if out is None else out.copy_(q)

    def _store(self, pool: Tensor, slots: Tensor, values: Tensor) -> None:
        flat = pool.flatten(0, 1)
        if pool.dtype.itemsize == 1:
            # float8 has no indexed writes; its bytes do.
            flat, values = flat.view(torch.uint8), values.to(pool.dtype).view(torch.uint8)
        flat.index_copy_(0, slots.long(), values.contiguous())

    def gather(self, pool: Tensor, pages: Tensor) -> Tensor:
        """[..., P] page ids -> [..., P * page_size, kv_heads, head_dim] in the model's dtype."""
        if pool.dtype.itemsize == 1:
            found = pool.view(torch.uint8)[pages].view(pool.dtype).to(self.dtype)
        else:
            found = pool[pages]
        return found.flatten(pages.dim() - 1, pages.dim())

    def has_kernel(self, layer: int) -> bool:
        """Whether a layer's decode rows go by a kernel of ours."""
        return (DECODE, layer) not in self._not_ours and self._fits_ours(layer)

    def has_prompt_kernel(self, layer: int) -> bool:
        """Whether a layer's prompts do."""
        return (PROMPTS, layer) not in self._not_ours and self._fits_ours(layer)

    def _fits_ours(self, layer: int) -> bool:
        """Numbers of 16 bits, and heads that the tiles of our kernels have room for."""
        spec = self.layers[layer]
        fits = max(spec.head_dim, spec.value_dim) <= 256 and spec.num_heads <= 32 * spec.num_kv_heads
        return self.device.type == "cuda" and available() and self.dtype in KERNEL_DTYPES and fits

    def decode_rows(
        self, layer: int, q: Tensor, step: DecodeStep, sinks: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """q [B, Hq, D] -> [B, Hq, Dv] over the first kv_len tokens of each row's pages, in `out` if there is one."""
        if not self.has_kernel(layer):
            result = self.torch_decode_rows(layer, q, step, sinks)
            return result if out is None else out.copy_(result)
        from engine.ops.triton.attention import decode_attention

        spec, tables = self.layers[layer], step.tables[self.group_of[layer]]
        pools = self.k_pools[layer], self.v_pools[layer]
        seen: dict[str, Any] = {"window": self.windows[layer], "softcap": spec.softcap, "sinks": sinks}
        return decode_attention(q, *pools, tables, step.kv_len, spec.scale, out=out, **seen)

    def torch_decode_rows(self, layer: int, q: Tensor, step: DecodeStep, sinks: Tensor | None = None) -> Tensor:
        """`decode_rows` by plain torch."""
        spec, kv_len = self.layers[layer], step.kv_len
        pages = step.tables[self.group_of[layer]].long()
        rows, columns = len(pages), pages.shape[1] * self.page_size
        column = torch.arange(columns, device=q.device)
        seen = column < kv_len[:, None]
        window = self.windows[layer]
        if isinstance(window, Chunk):
            seen = seen & (column >= (kv_len[:, None] - 1) // window * window)
        elif window is not None:
            seen = seen & (column >= kv_len[:, None] - window)
        # A table names more than its row has: others' pages, that may just be written.
        pages = pages.where(seen.unflatten(1, (-1, self.page_size)).any(2), 0)
        keys, values = self.gather(self.k_pools[layer], pages), self.gather(self.v_pools[layer], pages)
        grouped = q.view(rows, spec.num_kv_heads, -1, spec.head_dim)
        scores = torch.einsum("bhgd,blhd->bhgl", grouped.float(), keys.float()) * spec.scale
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        if sinks is None:
            weights = scores.softmax(-1)
        else:
            by_head = scores.view(rows, spec.num_heads, columns).transpose(0, 1)
            weights = softmax_with_sinks(by_head, sinks).transpose(0, 1).view(scores.shape)
        # A weight of 0 is not enough: what others left behind in a page may be NaN.
        values = values.float().masked_fill(~seen[:, :, None, None], 0.0)
        result = torch.einsum("bhgl,blhd->bhgd", weights, values)
        return result.reshape(rows, spec.num_heads, spec.value_dim).to(q.dtype)

    def prefill_rows(
        self,
        layer: int,
        q: Tensor,
        rows: Ragged,
        sizes: list[tuple[int, int, int]],
        sinks: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """q [T, Hq, D] -> [T, Hq, Dv], in `out` if there is one. sizes: of the rows, see there."""
        if not self.has_prompt_kernel(layer):
            result = self.torch_prefill_rows(layer, q, rows, sizes, sinks)
            return result if out is None else out.copy_(result)
        from engine.ops.triton.prompts import LARGE, SMALL, prompt_attention

        assert rows.on_device is not None
        spec, indices = self.layers[layer], rows.kv_indices[self.group_of[layer]]
        starts, first_pages, kv_len = rows.on_device
        pools = self.k_pools[layer], self.v_pools[layer]
        seen: dict[str, Any] = {"window": self.windows[layer], "softcap": spec.softcap, "sinks": sinks}
        where = starts, first_pages, indices, kv_len
        longest = max(length for length, _, _ in sizes)
        most = SMALL if (LARGE_TILES, layer) in self._not_ours else LARGE
        return prompt_attention(q, *pools, *where, spec.scale, max_len=longest, most=most, out=out, **seen)

    def torch_prefill_rows(
        self, layer: int, q: Tensor, rows: Ragged, sizes: list[tuple[int, int, int]], sinks: Tensor | None = None
    ) -> Tensor:
        """`prefill_rows` by plain torch, row by row."""
        parts, token, page = [], 0, 0
        indices = rows.kv_indices[self.group_of[layer]]
        for length, count, kv_len in sizes:
            pages = indices[page : page + count].long()
            parts.append(self.prefill_row(layer, q[token : token + length], pages, kv_len, sinks))
            token, page = token + length, page + count
        return torch.cat(parts)

    def prefill_row(self, layer: int, q: Tensor, pages: Tensor, kv_len: int, sinks: Tensor | None) -> Tensor:
        """q [N, Hq, D], the last N of kv_len tokens -> [N, Hq, Dv]."""
        keys = self.gather(self.k_pools[layer], pages)[:kv_len]
        values = self.gather(self.v_pools[layer], pages)[:kv_len]
        return attend_sequence(self.layers[layer], q, keys, values, sinks)


class StepAttention:
    """AttentionBackend of one step, planned already; `attend` is what a faster backend replaces.

    q: memory for the turned q, if it is to lie somewhere.
    """

    q: Tensor | None = None
    recordings = None

    def __init__(self, backend: Any, step: Any) -> None:
        self.backend = backend
        self.step = step
        self.states: States | None = backend.states

    def plan(self, metadata: object) -> None:
        """Planned already."""

    def forward(
        self,
        layer: int,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cos_sin: Tensor | None = None,
        norms: HeadNorms | None = None,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See AttentionBackend. norms: of the heads of q and k, taken first."""
        step = self.step
        q = self.backend.write(layer, q, k, v, step.positions, step.kv_slots, cos_sin, norms, self.q)
        return self.attend(layer, q, sinks=sinks).view(q.shape[0], -1)

    def attend(self, layer: int, q: Tensor, out: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        """[T, Hq, D] -> [T, Hq, Dv], in `out` if there is one."""
        raise NotImplementedError


class DecodeAttention(StepAttention):
    """Of a step in which every row has one token."""

    step: DecodeStep

    def attend(self, layer: int, q: Tensor, out: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        result: Tensor = self.backend.decode_rows(layer, q, self.step, sinks, out)
        return result


class MixedAttention(StepAttention):
    """Of a step with prompts."""

    step: MixedStep

    def __init__(self, backend: Any, step: MixedStep) -> None:
        super().__init__(backend, step)
        self.sizes = step.prompts.sizes()

    def attend(self, layer: int, q: Tensor, out: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        count, decode = self.step.num_decodes, self.step.decode
        if out is None:
            out = q.new_empty((*q.shape[:2], self.backend.layers[layer].value_dim))
        if count:
            assert decode is not None
            self.backend.decode_rows(layer, q[:count], decode, sinks, out[:count])
        self.backend.prefill_rows(layer, q[count:], self.step.prompts, self.sizes, sinks, out[count:])
        return out
