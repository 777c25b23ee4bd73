"""Paged attention by FlashInfer: prompts by its prefill wrapper, decode by XQA where it has the shape, else by its
decode wrapper. What it has not (float32, odd head sizes, a kernel that cannot be built here) falls back to plain
torch, layer kind by layer kind; layers that see the same window are of one kind.

`plan` gets host metadata alone (device arrays would synchronise), and each wrapper exists twice, for even and odd
steps: a second plan may overwrite the pinned buffer that the first one's copy still reads. Programmatic dependent
launch is FlashInfer's own default on these GPUs.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engine.ops.attention.base import AttentionSpec
from engine.ops.attention.device import (
    DecodeAttention,
    DecodePlan,
    DecodeStep,
    DeviceAttention,
    MixedAttention,
    MixedStep,
)

logger = logging.getLogger("oneloop.cuda")

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
XQA_PAGE_SIZES = (16, 32, 64, 128)
# Queries per KV head that XQA's and the CUDA-core decode kernels are built for; others decode on tensor cores.
XQA_GROUPS = (1, 2, 4, 8)
CUDA_CORE_GROUPS = (1, 2, 4, 8)
# Partial results of split contexts; FlashInfer's own advice for batches of hundreds.
WORKSPACE_BYTES = 256 * 1024 * 1024
# XQA keeps semaphores in the first 8 MiB, so its workspace is not shared with the wrappers'.
XQA_WORKSPACE_BYTES = 128 * 1024 * 1024
# Every wrapper comes with so much memory of its own for plans, on the device and pinned.
PLAN_BYTES = 8 * 1024 * 1024

Window = int | None


class Backend(DeviceAttention):
    """DeviceAttention by FlashInfer. module: `flashinfer`, or what stands for it in the tests.

    decode: auto, xqa or wrapper. prefill: backend of the prefill wrapper (auto, fa2, fa3).
    """

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
        module: ModuleType | Any = None,
        decode: str = "auto",
        prefill: str = "auto",
    ) -> None:
        super().__init__(spec, num_pages=num_pages, page_size=page_size, dtype=dtype, kv_dtype=kv_dtype, device=device)
        if module is None:
            import flashinfer as module  # late: 1.4 s, and the package is optional
        self._module: Any = module
        self.filters = module.sampling
        group = spec.num_heads // spec.num_kv_heads
        usable = dtype in DTYPES and spec.head_dim in HEAD_DIMS
        has_xqa = usable and page_size in XQA_PAGE_SIZES and group in XQA_GROUPS and spec.softcap is None
        assert decode != "xqa" or has_xqa, "XQA has no kernel for this shape"
        # fa3 has no kernels that read a KV cache of another type than q.
        prefill = "fa2" if self.kv_dtype != dtype and prefill == "auto" else prefill
        self._tensor_cores = group not in CUDA_CORE_GROUPS or self.kv_dtype != dtype
        # One plan serves all layers that see the same window.
        self._kinds: list[Window] = sorted(set(self.windows), key=lambda window: window or 0)
        # A backend of the prefill wrapper, or torch.
        self._prefill_ways: dict[Window, str] = dict.fromkeys(self._kinds, prefill if usable else "torch")
        way = "torch" if not usable else "xqa" if has_xqa and decode in ("auto", "xqa") else "wrapper"
        self._decode_ways: dict[Window, str] = dict.fromkeys(self._kinds, way)
        self._workspace: Tensor | None = None
        self._xqa_workspace: Tensor | None = None
        self._prefills: dict[tuple[Window, int], Any] = {}
        self._decodes: dict[tuple[int, int, Window, int], Any] = {}
        self._plan_memory: dict[tuple[Window, int], tuple[Tensor, Tensor]] = {}
        if usable:
            # Zeroed: both keep counters in it that must start at 0.
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            if way == "xqa":
                self._xqa_workspace = torch.zeros(XQA_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            for window in self._kinds:
                self._make_prefills(window, prefill)

    @property
    def decode_needs_plan(self) -> bool:
        """Whether some layers decode by the wrapper."""
        return "wrapper" in self._decode_ways.values()

    @property
    def workspace_bytes(self) -> int:
        buffers = sum(buffer.numel() for buffer in (self._workspace, self._xqa_workspace) if buffer is not None)
        wrappers = len(self._prefills) + 2 * list(self._decode_ways.values()).count("wrapper")
        return buffers + PLAN_BYTES * wrappers

    def describe(self) -> str:
        prefills, decodes = set(self._prefill_ways.values()), set(self._decode_ways.values())
        if prefills == decodes == {"torch"}:
            return f"torch (slow): FlashInfer has no kernels for {self.dtype} with head_dim {self.spec.head_dim}"
        names = {
            "xqa": "XQA",
            "wrapper": "tensor cores" if self._tensor_cores else "CUDA cores",
            "torch": "torch (slow) in some layers",
        }
        prefill, decode = (" and ".join(names.get(way, way) for way in sorted(ways)) for ways in (prefills, decodes))
        return f"FlashInfer, prefill {prefill}, decode {decode}"

    def settle(self) -> None:
        """See DeviceAttention: load the kernels of every kind of layer, and fall back where one cannot be had.

        A kernel is built when it is first asked for, which fails without a compiler or where FlashInfer may not
        build any.
        """
        one = torch.ones(1, dtype=torch.int32)
        step = MixedStep(one, one, self._buffer(1), one.new_tensor([0, 1]), one.new_tensor([0, 1]), one, one, 0)
        for window in self._kinds:
            # Which of fa2 and fa3 auto takes does not depend on what can be built.
            for way in dict.fromkeys((self._prefill_ways[window], "fa2")):
                if way == "torch" or self._has(f"prefill ({way})", window, self._try_prefill, way, step):
                    break
            else:
                self._prefill_ways[window] = "torch"
            if self._decode_ways[window] == "xqa" and not self._has("XQA decode", window, self._try_xqa):
                self._decode_ways[window] = "wrapper"
            if self._decode_ways[window] == "wrapper":
                plan = DecodePlan(step.kv_indptr, one, self._buffer(1))
                if not self._has("decode", window, self._plan_decode, plan, 1, 1, 0):
                    self._decode_ways[window] = "torch"

    def _has(self, what: str, window: Window, work: Any, *args: Any) -> bool:
        """Whether `work(window, *args)` finds its kernel."""
        try:
            work(window, *args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a build system may raise
            kind = "full attention" if window is None else f"a window of {window}"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("FlashInfer has no %s kernel for layers with %s: %s", what, kind, reason)
            return False
        return True

    def _make_prefills(self, window: Window, way: str) -> None:
        self._prefill_ways[window] = way
        for parity in (0, 1):
            self._prefills[window, parity] = self._module.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, "NHD", backend=way
            )

    def _try_prefill(self, window: Window, way: str, step: MixedStep) -> None:
        if way != self._prefill_ways[window]:
            self._make_prefills(window, way)
        self._plan_mixed(window, step)

    def _try_xqa(self, window: Window) -> None:
        q = torch.zeros(1, self.spec.num_heads, self.spec.head_dim, dtype=self.dtype, device=self.device)
        one = torch.ones(1, dtype=torch.int32, device=self.device)
        self.xqa(self.windows.index(window), q, DecodeStep(one, one, self._buffer(1)[None], one, 0))

    def _common(self, window: Window) -> dict[str, Any]:
        """What every plan says of a layer kind. window_left does not count the query itself."""
        return {
            "sm_scale": self.spec.scale,
            "window_left": -1 if window is None else window - 1,
            "logits_soft_cap": self.spec.softcap,
            "q_data_type": self.dtype,
            "kv_data_type": self.kv_dtype,
        }

    # ---- steps with prompts

    def mixed(self, step: MixedStep) -> MixedAttention:
        """See DeviceAttention."""
        for window, way in self._prefill_ways.items():
            if way != "torch":
                self._plan_mixed(window, step)
        return _Prefill(self, step, self.rows_of(step) if "torch" in self._prefill_ways.values() else [])

    def _plan_mixed(self, window: Window, step: MixedStep) -> None:
        spec = self.spec
        self._prefills[window, step.parity].plan(
            step.qo_indptr,
            step.kv_indptr,
            step.kv_indices,
            step.last_page_len,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            self.page_size,
            causal=True,
            # It copies them to the device: from pinned memory here, from a fresh pageable tensor if it had to count.
            seq_lens=step.kv_len,
            **self._common(window),
        )

    def prefills_by_torch(self, layer: int) -> bool:
        return self._prefill_ways[self.windows[layer]] == "torch"

    def prefill(self, layer: int, q: Tensor, parity: int) -> Tensor:
        """[T, Hq, D] -> [T, Hq, D] by the step's plan."""
        wrapper = self._prefills[self.windows[layer], parity]
        return wrapper.run(q, (self.k_pools[layer], self.v_pools[layer]), out=torch.empty_like(q))  # type: ignore[no-any-return]

    # ---- decode

    def prepare_decode(self, size: int, width: int) -> None:
        """See DeviceAttention: the wrappers that graphs hold on to, with buffers of their own."""
        for window, way in self._decode_ways.items():
            for parity in (0, 1):
                if way == "wrapper" and (size, width, window, parity) not in self._decodes:
                    self._decodes[size, width, window, parity] = self._make_decode(size, width, window, parity)

    def _make_decode(self, size: int, width: int, window: Window, parity: int) -> Any:
        wrapper = self._module.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self._tensor_cores,
            paged_kv_indptr_buffer=self._buffer(size + 1),
            paged_kv_indices_buffer=self._buffer(size * width),
            paged_kv_last_page_len_buffer=self._buffer(size),
            backend="fa2" if self._tensor_cores else "auto",
        )
        # One plan at a time is open for a kind and a parity, so all their wrappers take the memory of the first: each
        # would bring 8 MiB of the device and 8 of pinned memory.
        own = wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer
        shared = self._plan_memory.setdefault((window, parity), own)
        wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer = shared
        return wrapper

    def _buffer(self, length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.int32, device=self.device)

    def plan_decode(self, plan: DecodePlan, size: int, width: int, parity: int) -> None:
        """See DeviceAttention. A captured graph survives it: the grid depends on the batch size alone."""
        for window, way in self._decode_ways.items():
            if way == "wrapper":
                self._plan_decode(window, plan, size, width, parity)

    def _plan_decode(self, window: Window, plan: DecodePlan, size: int, width: int, parity: int) -> None:
        self.prepare_decode(size, width)
        spec = self.spec
        self._decodes[size, width, window, parity].plan(
            plan.kv_indptr,
            plan.kv_indices,
            plan.last_page_len,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            self.page_size,
            **self._common(window),
        )

    def decode(self, step: DecodeStep) -> DecodeAttention:
        """See DeviceAttention."""
        return _Decode(self, step)

    def decode_rows_of(self, layer: int, q: Tensor, step: DecodeStep) -> Tensor:
        """[B, Hq, D] -> [B, Hq, D], the way that layers of this kind go."""
        way = self._decode_ways[self.windows[layer]]
        if way == "xqa":
            return self.xqa(layer, q, step)
        if way == "wrapper":
            return self.wrapped_decode(layer, q, step)
        return self.decode_rows(layer, q, step.tables, step.kv_len)

    def xqa(self, layer: int, q: Tensor, step: DecodeStep) -> Tensor:
        """[B, Hq, D] -> [B, Hq, D]; page tables and lengths stay on the device, so there is nothing to plan."""
        window = self.windows[layer]
        return self._module.decode.xqa_batch_decode_with_kv_cache(  # type: ignore[no-any-return]
            q,
            (self.k_pools[layer], self.v_pools[layer]),
            self._xqa_workspace,
            step.tables,
            step.kv_len.view(torch.uint32),
            step.tables.shape[1] * self.page_size,
            # It takes the scale apart again, into one for q and 1 / sqrt(head_dim).
            bmm1_scale=self.spec.scale,
            bmm2_scale=1.0,
            window_left=-1 if window is None else window - 1,
            out=torch.empty_like(q),
            kv_layout="NHD",
        )

    def wrapped_decode(self, layer: int, q: Tensor, step: DecodeStep) -> Tensor:
        """[B, Hq, D] -> [B, Hq, D] by the step's plan."""
        size, width = step.tables.shape
        wrapper = self._decodes[size, width, self.windows[layer], step.parity]
        return wrapper.run(q, (self.k_pools[layer], self.v_pools[layer]), out=torch.empty_like(q))  # type: ignore[no-any-return]


class _Prefill(MixedAttention):
    def attend(self, layer: int, q: Tensor) -> Tensor:
        if self.backend.prefills_by_torch(layer):
            return super().attend(layer, q)
        return self.backend.prefill(layer, q, self.step.parity)  # type: ignore[no-any-return]


class _Decode(DecodeAttention):
    def attend(self, layer: int, q: Tensor) -> Tensor:
        return self.backend.decode_rows_of(layer, q, self.step)  # type: ignore[no-any-return]
