"""Attention over latents by FlashInfer: all heads of a row read one cache, 64 or 128 queries at a time.

Decode rows go by its kernel, in graphs too. So do prompts, in the same launch, where a tile holds whole tokens (their
heads divide 128: where they do not, the kernel's own bounds leave keys out); elsewhere by torch. What FlashInfer has no
kernel for falls back to torch altogether.

A wrapper of FlashInfer's is planned once, at start, which checks the shape and loads the kernel. Steps then call what
it has loaded: a wrapper plans with copies of all its buffers, and copies of those in case it fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engine.groups import MemoryGroup
from engine.ops.attention.base import AttentionSpec, LayerAttention
from engine.ops.attention.device import (
    DecodeAttention,
    DecodePlan,
    DecodeStep,
    DeviceAttention,
    MixedAttention,
    MixedStep,
    Ragged,
)
from engine.ops.attention.flashinfer import load_driver

logger = logging.getLogger("oneloop.cuda")

DTYPES = (torch.bfloat16, torch.float16)
# Sizes of a latent that fa3 has, and what the key beside it must be a multiple of.
LATENT_DIMS = (128, 256, 512)
KEY_DIM = 64
# Partial results of split contexts: two tiles of 128 latents for every two processors.
WORKSPACE_BYTES = 64 * 1024 * 1024
# On the device and pinned, for plans; FlashInfer's own size.
PLAN_BYTES = 8 * 1024 * 1024
# Tiles that a plan has room for, and how many more splitting may make of them: no GPU has more processors.
MOST_TILES, MOST_SPLITS = 16384, 512
# Codes of masks: see nothing hidden, or what comes later.
NO_MASK, CAUSAL = 0, 1


def has_kernel(shape: LayerAttention, dtype: torch.dtype, kv_dtype: torch.dtype, *, hopper: bool = True) -> bool:
    """Whether FlashInfer has one for layers of a shape, as far as can be told without a GPU."""
    latent, key = shape.value_dim, shape.head_dim - shape.value_dim
    if dtype not in DTYPES or latent not in LATENT_DIMS or key % KEY_DIM:
        return False
    # A cache of float8 has one size, beside bfloat16, and a Hopper.
    return kv_dtype == dtype or (hopper and dtype == torch.bfloat16 and latent == 512 and key in (0, 64))


class Backend(DeviceAttention):
    """DeviceAttention by FlashInfer's MLA. module: `flashinfer`, or what stands for it in the tests."""

    name = "flashinfer"

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
        module: ModuleType | Any = None,
    ) -> None:
        memory: dict[str, Any] = {"num_pages": num_pages, "page_size": page_size, "groups": groups}
        super().__init__(spec, dtype=dtype, kv_dtype=kv_dtype, device=device, **memory)
        if module is None:
            load_driver()
            import flashinfer as module  # late, see flashinfer.py
        self._module: Any = module
        shape = spec.latent
        assert shape is not None, "it is called for layers of one shape alone, that keep latents"
        self.shape = shape
        self.latent_dim, self.key_dim = shape.value_dim, shape.head_dim - shape.value_dim
        usable = has_kernel(shape, dtype, self.kv_dtype)
        # fa3, fa2 or torch; known after `settle`.
        self._way = "fa3" if usable else "torch"
        self.whole_tokens = 128 % shape.num_heads == 0
        (self.group,) = set(self.group_of.values())
        self._missing: list[str] = []
        self._workspace: Tensor | None = None
        if usable:
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # Of wrappers: their kernel, and memory for a plan of even and of odd steps, on the device and pinned.
        self._kernel: Any = None
        self._plan_memory: list[tuple[Tensor, Tensor]] = []
        # Where the kernel finds its plan, by batch size, width of tables and parity.
        self.plans: dict[tuple[int, int, int], Any] = {}

    @property
    def workspace_bytes(self) -> int:
        return 0 if self._workspace is None else WORKSPACE_BYTES + 2 * PLAN_BYTES

    def describe(self) -> str:
        missing = "".join(f"; no {what}" for what in self._missing)
        if self._way == "torch":
            reason = missing or (
                f"; FlashInfer has no kernels for {self.dtype} with latents of {self.latent_dim} and {self.key_dim}"
            )
            return f"{super().describe()}{reason}"
        prompts = f", prompts by torch (slow), as {self.shape.num_heads} heads do not divide 128"
        return f"FlashInfer MLA, {self._way}{'' if self.whole_tokens else prompts}{missing}"

    def decode_needs_plan(self, size: int) -> bool:
        return self._way != "torch"

    # ---- start

    def settle(self, wait: Callable[[], None]) -> None:
        """See DeviceAttention: plan, load and run the kernel, and fall back where it cannot be had."""
        super().settle(wait)
        for way in ("fa3", "fa2") if self._way != "torch" else ():
            try:
                self._try(way, wait)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a build system may raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                logger.warning("FlashInfer has no MLA kernel (%s): %s", way, reason)
                self._missing.append(f"MLA kernel ({way}: {reason})")
            else:
                self._way = way
                return
        self._way, self._workspace = "torch", None

    def _try(self, way: str, wait: Callable[[], None]) -> None:
        shape, mla = self.shape, self._module.mla
        layer = next(iter(self.layers))
        one = torch.ones(1, dtype=torch.int32)
        begin = one.new_tensor([0, 1])
        q = torch.zeros(1, shape.num_heads, shape.head_dim, dtype=self.dtype, device=self.device)
        page = torch.zeros(1, dtype=torch.int32, device=self.device)
        # Values are held as they are.
        scales = {"ckv_scale": 1.0, "kpe_scale": 1.0} if self.kv_dtype != self.dtype else {}
        self._plan_memory = []
        for _ in range(2):
            wrapper = mla.BatchMLAPagedAttentionWrapper(self._workspace, backend=way)
            wrapper.plan(
                metadata=mla.MLAPlanMetadata.csr(qo_indptr=begin, kv_indptr=begin, kv_indices=page, kv_len_arr=one),
                num_heads=shape.num_heads,
                head_dim_ckv=self.latent_dim,
                head_dim_kpe=self.key_dim,
                page_size=self.page_size,
                causal=False,
                sm_scale=shape.scale,
                q_data_type=self.dtype,
                kv_data_type=self.kv_dtype,
            )
            wait()
            out = q.new_empty(1, shape.num_heads, self.latent_dim)
            wrapper.run(query=q, kv_cache=self.k_pools[layer][:, :, 0], out=out, **scales)
            wait()
            self._kernel = wrapper._cached_module
            self._plan_memory.append((wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer))
        # As steps do it.
        for parity, causal in enumerate((False, self.whole_tokens)):
            plan = self.plan_rows(begin, begin, one, parity, causal)
            wait()
            self.run(layer, q, plan, page, parity, causal)
            wait()

    # ---- a step

    def plan_rows(self, qo_indptr: Tensor, kv_indptr: Tensor, kv_len: Tensor, parity: int, causal: bool) -> Any:
        """Plan rows, as int32 arrays of the host have them: returns where the kernel finds what it planned. Of a
        parity's plans the newest is good, in the order of the stream. The arrays are read at once."""
        sizes = self.shape.num_heads, self.latent_dim
        memory = self._workspace, *self._plan_memory[parity]
        return self._kernel.plan(*memory, qo_indptr, kv_indptr, kv_len, *sizes, causal)

    def run(
        self, layer: int, q: Tensor, plan: Any, indices: Tensor, parity: int, causal: bool, out: Tensor | None = None
    ) -> Tensor:
        """[T, Hq, D] -> [T, Hq, Dv] by a plan. indices: page ids on the device, as the plan counts them."""
        latent = self.latent_dim
        pool = self.k_pools[layer][:, :, 0]
        if out is None:
            out = torch.empty((*q.shape[:2], latent), dtype=q.dtype, device=q.device)
        self._kernel.run(
            self._workspace,
            self._plan_memory[parity][0],
            plan,
            q[..., :latent],
            q[..., latent:],
            pool[..., :latent],
            pool[..., latent:],
            indices,
            out,
            None,  # no log-sum-exp
            CAUSAL if causal else NO_MASK,
            self.shape.num_heads,
            self.page_size,
            self.shape.scale,
            False,
            1.0,
            1.0,
            None,
        )
        return out

    def plan_decode(self, plan: DecodePlan, size: int, width: int, parity: int) -> None:
        """See DeviceAttention. A captured graph survives it: grid and places depend on the batch size alone.

        The rows' pages are where the tables of the step have them, so the plan's own are not looked at.
        """
        kv_len = (plan.kv_indptr[1:] - plan.kv_indptr[:-1] - 1) * self.page_size + plan.last_page_len
        each = torch.arange(size + 1, dtype=torch.int32)
        self.plans[size, width, parity] = self.plan_rows(each, each * width, kv_len, parity, False)

    def decode(self, step: DecodeStep) -> DecodeAttention:
        """See DeviceAttention."""
        return DecodeAttention(self, step) if self._way == "torch" else _Decode(self, step)

    def mixed(self, step: MixedStep) -> MixedAttention:
        """See DeviceAttention."""
        return MixedAttention(self, step) if self._way == "torch" else _Mixed(self, step)

    def takes_prompts(self, rows: Ragged) -> bool:
        """Whether one plan holds all rows of a step."""
        heads = self.shape.num_heads
        lengths = rows.qo_indptr[1:] - rows.qo_indptr[:-1]
        queries: list[int] = (lengths * heads).tolist()
        tile = 128 if sum(queries) // len(queries) > 64 else 64
        return self.whole_tokens and sum(-(-count // tile) for count in queries) <= MOST_TILES - MOST_SPLITS


class _Decode(DecodeAttention):
    def attend(self, layer: int, q: Tensor, out: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        backend: Backend = self.backend
        tables, parity = self.step.tables[backend.group], self.step.parity
        return backend.run(layer, q, backend.plans[*tables.shape, parity], tables.view(-1), parity, False, out)


class _Mixed(MixedAttention):
    """All rows by one plan, or those that decode."""

    def __init__(self, backend: Backend, step: MixedStep) -> None:
        super().__init__(backend, step)
        rows, count = step.rows, step.num_decodes
        self._indices = rows.kv_indices[backend.group]
        self._prompts_too = backend.takes_prompts(rows)
        self._plan: Any = None
        if self._prompts_too:
            self._plan = backend.plan_rows(rows.qo_indptr, rows.kv_indptr, rows.kv_len, step.parity, True)
        elif count:
            starts = rows.qo_indptr[: count + 1], rows.kv_indptr[: count + 1]
            self._plan = backend.plan_rows(*starts, rows.kv_len[:count], step.parity, False)

    def attend(self, layer: int, q: Tensor, out: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        backend: Backend = self.backend
        step, count = self.step, self.step.num_decodes
        if self._prompts_too:
            return backend.run(layer, q, self._plan, self._indices, step.parity, True, out)
        if out is None:
            out = torch.empty((*q.shape[:2], backend.latent_dim), dtype=q.dtype, device=q.device)
        if count:
            backend.run(layer, q[:count], self._plan, self._indices, step.parity, False, out[:count])
        backend.prefill_rows(layer, q[count:], step.prompts, self.sizes, out=out[count:])
        return out
