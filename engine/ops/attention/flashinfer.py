"""Paged attention by FlashInfer: prompts by its prefill wrapper; decode by XQA, by a kernel of ours or by its decode
wrapper, whichever was quickest for so many rows. What it has not (float32, odd head sizes, a kernel that cannot be
built here) is left to DeviceAttention, window by window. Layers of one memory group that see the same window are of one
kind, and share a plan.

In steps with prompts the decode rows go by XQA or our kernel, too: neither needs a plan. Where both are missing, they
share fa2 with the prompts, which packs the queries of a KV head; fa3 would take a tile of 128 or more for each query
head of each row.

`plan` gets host metadata alone (device arrays would synchronise), and each wrapper exists twice, for even and odd
steps: a second plan may overwrite the pinned buffer that the first one's copy still reads. Programmatic dependent
launch is FlashInfer's own default on these GPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.groups import MemoryGroup
from engine.ops.attention.base import AttentionSpec
from engine.ops.attention.device import (
    DECODE,
    LARGE_TILES,
    PROMPTS,
    DecodeAttention,
    DecodePlan,
    DecodeStep,
    DeviceAttention,
    MixedAttention,
    MixedStep,
    Ragged,
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

# Larger batches fill the GPU with one row and KV head each: there is nothing to plan.
MOST_PLANNED = 64
# What DeviceAttention does itself: by kernels of ours on a GPU, else by torch.
OURS = "ours"

Window = int | None


class Kind(NamedTuple):
    """Layers that one plan serves: of a memory group, with a window."""

    window: Window
    group: int


def load_driver() -> None:
    """Make the driver's symbols known to libraries that were linked without it, as pre-built kernels are.

    They look for them when they first need one, and a process that finds none ends at once.
    """
    with contextlib.suppress(OSError):  # no driver: whatever needs one says so
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)


class Backend(DeviceAttention):
    """DeviceAttention by FlashInfer. module: `flashinfer`, or what stands for it in the tests.

    decode: auto, xqa, wrapper, or ours: that where it is, else the wrapper. prefill: backend of the prefill wrapper
    (auto, fa2, fa3).
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
        groups: tuple[MemoryGroup, ...] = (MemoryGroup(),),
        module: ModuleType | Any = None,
        decode: str = "auto",
        prefill: str = "auto",
    ) -> None:
        memory: dict[str, Any] = {"num_pages": num_pages, "page_size": page_size, "groups": groups}
        super().__init__(spec, dtype=dtype, kv_dtype=kv_dtype, device=device, **memory)
        if module is None:
            load_driver()
            import flashinfer as module  # late: 1.4 s, and the package is optional
        self._module: Any = module
        # What was looked for in vain, and why.
        self._missing: list[str] = []
        shape = spec.common
        assert shape is not None, "FlashInfer is called for layers of one shape alone"
        self.shape = shape
        group = shape.num_heads // shape.num_kv_heads
        usable = dtype in DTYPES and shape.head_dim in HEAD_DIMS
        has_xqa = usable and page_size in XQA_PAGE_SIZES and group in XQA_GROUPS and shape.softcap is None
        assert decode != "xqa" or has_xqa, "XQA has no kernel for this shape"
        # fa3 has no kernels that read a KV cache of another type than q.
        prefill = "fa2" if self.kv_dtype != dtype and prefill == "auto" else prefill
        self._tensor_cores = group not in CUDA_CORE_GROUPS or self.kv_dtype != dtype
        self.kinds: dict[int, Kind] = {layer: Kind(self.windows[layer], self.group_of[layer]) for layer in self.layers}
        self._kinds: list[Kind] = sorted(set(self.kinds.values()), key=lambda kind: (kind.window or 0, kind.group))
        windows = dict.fromkeys(kind.window for kind in self._kinds)
        # A backend of the prefill wrapper, or ours.
        self._prefill_ways: dict[Window, str] = dict.fromkeys(windows, prefill if usable else OURS)
        self._ours_decodes = decode in ("auto", OURS) and all(self.has_kernel(layer) for layer in self.layers)
        way = OURS if not usable or self._ours_decodes else "wrapper"
        way = "xqa" if has_xqa and decode in ("auto", "xqa") else way
        self._decode_ways: dict[Window, str] = dict.fromkeys(windows, way)
        # What was found to be fastest for so many rows, by their number: of all ways, and of those without a plan.
        self._preferred: dict[Window, dict[int, tuple[str, str]]] = {window: {} for window in windows}
        self._workspace: Tensor | None = None
        self._xqa_workspace: Tensor | None = None
        self._prefills: dict[tuple[Kind, int], Any] = {}
        # By fa2, for steps whose decode rows go with the prompts.
        self._packed: dict[tuple[Kind, int], Any] = {}
        self._decodes: dict[tuple[int, int, Kind, int], Any] = {}
        self._plan_memory: dict[tuple[Kind, int], tuple[Tensor, Tensor]] = {}
        if usable:
            # Zeroed: both keep counters in it that must start at 0.
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            if way == "xqa":
                self._xqa_workspace = torch.zeros(XQA_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            for window in windows:
                self._make_prefills(window, prefill)

    def kinds_of(self, window: Window) -> list[Kind]:
        """Of every group that has such layers."""
        return [kind for kind in self._kinds if kind.window == window]

    def decode_needs_plan(self, size: int) -> bool:
        """Whether some layers decode so many rows by the wrapper."""
        return any(self._way(window, size) == "wrapper" for window in self._decode_ways)

    def _way(self, window: Window, size: int) -> str:
        """How layers with a window decode a batch of `size` rows."""
        return self._quickest(window, size)[0]

    def _quickest(self, window: Window, size: int) -> tuple[str, str]:
        """The way to decode `size` rows, and the one without a plan: as was timed for so many or the next more."""
        timed = self._preferred[window]
        if not timed:
            way = self._decode_ways[window]
            return way, OURS if way == "wrapper" else way
        way, unplanned = timed[min((each for each in timed if each >= size), default=max(timed))]
        return (unplanned if size > MOST_PLANNED else way), unplanned

    @property
    def workspace_bytes(self) -> int:
        buffers = sum(buffer.numel() for buffer in (self._workspace, self._xqa_workspace) if buffer is not None)
        # The wrapper may yet turn out quicker than the others at some batch size.
        decodes = sum("wrapper" in self.ways(kind.window) for kind in self._kinds)
        return buffers + PLAN_BYTES * (len(self._prefills) + len(self._packed) + 2 * decodes)

    def describe(self) -> str:
        prefills, decodes = set(self._prefill_ways.values()), set(self._decode_ways.values())
        missing = "".join(f"; no {what}" for what in self._missing)
        if prefills == decodes == {OURS}:
            reason = missing or f"; FlashInfer has no kernels for {self.dtype} with head_dim {self.shape.head_dim}"
            return f"{super().describe()}{reason}"
        decoded, filled = (
            "our kernel" if all(map(has, self.layers)) else "torch (slow) in some layers"
            for has in (self.has_kernel, self.has_prompt_kernel)
        )
        names = {"xqa": "XQA", "wrapper": "tensor cores" if self._tensor_cores else "CUDA cores", OURS: decoded}
        # auto is fa2 or fa3, as the first plan has found.
        found = {
            way if way == OURS else self._prefills[self.kinds_of(window)[0], 0]._backend
            for window, way in self._prefill_ways.items()
        }
        prefill = " and ".join(filled if way == OURS else way for way in sorted(found))
        decode = " and ".join(names[way] for way in sorted(decodes))
        for way, sizes in sorted(self._exceptions().items()):
            decode += f" ({names[way]} for {', '.join(map(str, sizes))} rows, as was quicker)"
        return f"FlashInfer, prefill {prefill}, decode {decode}{missing}"

    def _exceptions(self) -> dict[str, list[int]]:
        """Numbers of rows for which another way than the usual one was quickest, by way."""
        found: dict[str, set[int]] = {}
        for window, timed in self._preferred.items():
            for size, (way, _) in timed.items():
                if way != self._decode_ways[window]:
                    found.setdefault(way, set()).add(size)
        return {way: sorted(sizes) for way, sizes in found.items()}

    def settle(self, wait: Callable[[], None]) -> None:
        """See DeviceAttention: load and run the kernels of every window, and fall back where one cannot be had.

        A kernel is built when it is first asked for, which fails without a compiler or where FlashInfer may not
        build any.
        """
        usable = self._workspace is not None
        self.settle_ours(wait, (DECODE,) if usable else (DECODE, PROMPTS, LARGE_TILES), self.layers)
        if self._ours_decodes and not all(self.has_kernel(layer) for layer in self.layers):
            self._ours_decodes = False
            usual = "wrapper" if usable else OURS
            self._decode_ways = {w: usual if way == OURS else way for w, way in self._decode_ways.items()}
        one = torch.ones(1, dtype=torch.int32)
        row = Ragged(self._of_groups(), one.new_tensor([0, 1]), one.new_tensor([0, 1]), one, one)
        for window in self._decode_ways:
            # Which of fa2 and fa3 auto takes does not depend on what can be built.
            for way in dict.fromkeys((self._prefill_ways[window], "fa2")):
                if way == OURS or self._has(f"prefill ({way})", window, self._try_prefill, way, row, wait):
                    break
            else:
                self._prefill_ways[window] = OURS
            if self._decode_ways[window] == "xqa" and not self._has("XQA decode", window, self._try_xqa, wait):
                self._decode_ways[window] = OURS if self._ours_decodes else "wrapper"
            if self._decode_ways[window] == "wrapper" and not self._has("decode", window, self.try_wrapper, wait):
                self._decode_ways[window] = OURS
            if not self._unplanned(window) and self._prefill_ways[window] == "auto":
                self._has("prefill (fa2)", window, self._try_packed, row, wait)
        if usable:
            left = [layer for layer in self.layers if self.prefills_by_rows(layer)]
            self.settle_ours(wait, (PROMPTS, LARGE_TILES), left)

    def _has(self, what: str, window: Window, work: Any, *args: Any) -> bool:
        """Whether `work(window, *args)` finds its kernel, and it runs."""
        try:
            work(window, *args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a build system may raise
            kind = "full attention" if window is None else f"a window of {window}"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("FlashInfer has no %s kernel for layers with %s: %s", what, kind, reason)
            self._missing.append(f"{what} kernel for layers with {kind} ({reason})")
            return False
        return True

    def _make_prefills(self, window: Window, way: str) -> None:
        self._prefill_ways[window] = way
        for kind in self.kinds_of(window):
            for parity in (0, 1):
                self._prefills[kind, parity] = self._make_prefill(way)

    def _make_prefill(self, way: str) -> Any:
        return self._module.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend=way)

    def _try_prefill(self, window: Window, way: str, row: Ragged, wait: Callable[[], None]) -> None:
        if way != self._prefill_ways[window]:
            self._make_prefills(window, way)
        self._run_prefill(self._prefills[self.kinds_of(window)[0], 0], window, row, wait)

    def _try_packed(self, window: Window, row: Ragged, wait: Callable[[], None]) -> None:
        """No plan of auto's is fa2, as far as is known: where it is not, the decode rows go by what there is."""
        kinds = self.kinds_of(window)
        if self._prefills[kinds[0], 0]._backend == "fa2":
            return
        wrappers = {(kind, parity): self._make_prefill("fa2") for kind in kinds for parity in (0, 1)}
        self._run_prefill(wrappers[kinds[0], 0], window, row, wait)
        self._packed |= wrappers

    def _run_prefill(self, wrapper: Any, window: Window, row: Ragged, wait: Callable[[], None]) -> None:
        self._plan(wrapper, self.kinds_of(window)[0], row)
        wait()
        q, layer = self._some_query(), self.layers_of(window)[0]
        wrapper.run(q, (self.k_pools[layer], self.v_pools[layer]), out=torch.empty_like(q))
        wait()

    def layers_of(self, window: Window) -> list[int]:
        """Those of the first kind: no two of them have the same memory."""
        kind = self.kinds_of(window)[0]
        return [layer for layer, each in self.kinds.items() if each == kind]

    def _of_groups(self) -> list[Tensor]:
        """One page id for each memory group."""
        return [self._buffer(1)] * self.num_groups

    def _some_query(self) -> Tensor:
        return torch.zeros(1, self.shape.num_heads, self.shape.head_dim, dtype=self.dtype, device=self.device)

    def _some_step(self) -> DecodeStep:
        one = torch.ones(1, dtype=torch.int32, device=self.device)
        return DecodeStep(one, [one] * self.num_groups, [each[None] for each in self._of_groups()], one, 0)

    def _try_xqa(self, window: Window, wait: Callable[[], None]) -> None:
        self.xqa(self.layers_of(window)[0], self._some_query(), self._some_step())
        wait()

    def try_wrapper(self, window: Window, wait: Callable[[], None]) -> None:
        """One row by the decode wrapper; raises where it has no kernel."""
        one = torch.ones(1, dtype=torch.int32)
        self.plan_wrapper(window, DecodePlan(one.new_tensor([0, 1]), one, self._of_groups()), 1, 1, 0)
        wait()
        self.wrapped_decode(self.layers_of(window)[0], self._some_query(), self._some_step())
        wait()

    def _common(self, window: Window) -> dict[str, Any]:
        """What every plan says of layers with a window. window_left does not count the query itself."""
        return {
            "sm_scale": self.shape.scale,
            "window_left": -1 if window is None else window - 1,
            "logits_soft_cap": self.shape.softcap,
            "q_data_type": self.dtype,
            "kv_data_type": self.kv_dtype,
        }

    # ---- steps with prompts

    def mixed(self, step: MixedStep) -> MixedAttention:
        """See DeviceAttention."""
        for kind in self._kinds:
            if self._prefill_ways[kind.window] != OURS:
                apart = self.decodes_apart(kind.window, step)
                self._plan(self._prefill_of(kind, step), kind, step.prompts if apart else step.rows)
        return _Mixed(self, step)

    def decodes_apart(self, window: Window, step: MixedStep) -> bool:
        """Whether layers with a window attend the step's decode rows by a call of their own."""
        return step.num_decodes > 0 and self._unplanned(window)

    def _unplanned(self, window: Window) -> bool:
        """Whether layers with a window have a kernel for decode rows that needs no plan."""
        return self._ours_decodes or self._decode_ways[window] == "xqa"

    def decode_apart(self, layer: int, q: Tensor, step: DecodeStep, out: Tensor) -> None:
        """The decode rows of a step with prompts."""
        self.decode_by(self._quickest(self.windows[layer], len(q))[1], layer, q, step, out)

    def _prefill_of(self, kind: Kind, step: MixedStep) -> Any:
        key = kind, step.parity
        shared = step.num_decodes > 0 and not self.decodes_apart(kind.window, step)
        return self._packed.get(key, self._prefills[key]) if shared else self._prefills[key]

    def _plan(self, wrapper: Any, kind: Kind, rows: Ragged) -> None:
        shape = self.shape
        wrapper.plan(
            rows.qo_indptr,
            rows.kv_indptr,
            rows.kv_indices[kind.group],
            rows.last_page_len,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            self.page_size,
            causal=True,
            # It copies them to the device: from pinned memory here, from a fresh pageable tensor if it had to count.
            seq_lens=rows.kv_len,
            **self._common(kind.window),
        )

    def prefills_by_rows(self, layer: int) -> bool:
        """Whether prompts are left to DeviceAttention."""
        return self._prefill_ways[self.windows[layer]] == OURS

    def prefill(self, layer: int, q: Tensor, step: MixedStep, out: Tensor) -> None:
        """[T, Hq, D] -> [T, Hq, D] by the step's plan."""
        wrapper = self._prefill_of(self.kinds[layer], step)
        wrapper.run(q, (self.k_pools[layer], self.v_pools[layer]), out=out)

    # ---- decode

    def prepare_decode(self, size: int, width: int) -> None:
        """See DeviceAttention: the wrappers that graphs hold on to, with buffers of their own."""
        for kind in self._kinds:
            if self._way(kind.window, size) == "wrapper":
                self._prepare_wrapper(size, width, kind)

    def _prepare_wrapper(self, size: int, width: int, kind: Kind) -> None:
        for parity in (0, 1):
            if (size, width, kind, parity) not in self._decodes:
                self._decodes[size, width, kind, parity] = self._make_decode(size, width, kind, parity)

    def _make_decode(self, size: int, width: int, kind: Kind, parity: int) -> Any:
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
        shared = self._plan_memory.setdefault((kind, parity), own)
        wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer = shared
        return wrapper

    def _buffer(self, length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.int32, device=self.device)

    def plan_decode(self, plan: DecodePlan, size: int, width: int, parity: int) -> None:
        """See DeviceAttention. A captured graph survives it: the grid depends on the batch size alone."""
        for window in self._decode_ways:
            if self._way(window, size) == "wrapper":
                self.plan_wrapper(window, plan, size, width, parity)

    def plan_wrapper(self, window: Window, plan: DecodePlan, size: int, width: int, parity: int) -> None:
        """`plan_decode` for layers with one window."""
        shape = self.shape
        for kind in self.kinds_of(window):
            self._prepare_wrapper(size, width, kind)
            self._decodes[size, width, kind, parity].plan(
                plan.kv_indptr,
                plan.kv_indices[kind.group],
                plan.last_page_len,
                shape.num_heads,
                shape.num_kv_heads,
                shape.head_dim,
                self.page_size,
                **self._common(window),
            )

    def decode(self, step: DecodeStep) -> DecodeAttention:
        """See DeviceAttention."""
        return _Decode(self, step)

    def decode_rows_of(self, layer: int, q: Tensor, step: DecodeStep, out: Tensor | None = None) -> Tensor:
        """[B, Hq, D] -> [B, Hq, D], the way that layers with this window go."""
        return self.decode_by(self._way(self.windows[layer], len(q)), layer, q, step, out)

    def decode_by(self, way: str, layer: int, q: Tensor, step: DecodeStep, out: Tensor | None = None) -> Tensor:
        """[B, Hq, D] -> [B, Hq, D] by one of `ways`."""
        if way == OURS:
            return self.decode_rows(layer, q, step, out=out)
        return (self.xqa if way == "xqa" else self.wrapped_decode)(layer, q, step, out)

    def choices(self) -> list[Window]:
        """See DeviceAttention: which is quickest depends on the number of rows, for each splits contexts its way."""
        return [window for window in self._decode_ways if len(self.ways(window)) > 1]

    def ways(self, window: Window) -> list[str]:
        """Those that decode rows of layers with a window; the wrapper comes last, for it needs a plan."""
        usual, found = self._decode_ways[window], []
        if usual == "xqa":
            found.append("xqa")
        if self._ours_decodes or usual == OURS:
            found.append(OURS)
        if self._workspace is not None and (self._ours_decodes or usual != OURS):
            found.append("wrapper")
        return found

    def prefer(self, window: Window, size: int, way: str, unplanned: str) -> None:
        """Let layers with a window decode `size` rows by `way` from now on, and beside prompts by `unplanned`."""
        self._preferred[window][size] = way, unplanned

    def xqa(self, layer: int, q: Tensor, step: DecodeStep, out: Tensor | None = None) -> Tensor:
        """[B, Hq, D] -> [B, Hq, D]; page tables and lengths stay on the device, so there is nothing to plan."""
        window, tables = self.kinds[layer].window, step.tables[self.kinds[layer].group]
        return self._module.decode.xqa_batch_decode_with_kv_cache(  # type: ignore[no-any-return]
            q,
            (self.k_pools[layer], self.v_pools[layer]),
            self._xqa_workspace,
            tables,
            step.kv_len.view(torch.uint32),
            tables.shape[1] * self.page_size,
            # It takes the scale apart again, into one for q and 1 / sqrt(head_dim).
            bmm1_scale=self.shape.scale,
            bmm2_scale=1.0,
            window_left=-1 if window is None else window - 1,
            out=torch.empty_like(q) if out is None else out,
            kv_layout="NHD",
        )

    def wrapped_decode(self, layer: int, q: Tensor, step: DecodeStep, out: Tensor | None = None) -> Tensor:
        """[B, Hq, D] -> [B, Hq, D] by the step's plan."""
        size, width = step.tables[0].shape
        wrapper = self._decodes[size, width, self.kinds[layer], step.parity]
        out = torch.empty_like(q) if out is None else out
        return wrapper.run(q, (self.k_pools[layer], self.v_pools[layer]), out=out)  # type: ignore[no-any-return]


class _Mixed(MixedAttention):
    def attend(self, layer: int, q: Tensor, out: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        backend: Backend = self.backend
        step, count = self.step, self.step.num_decodes
        apart = backend.decodes_apart(backend.windows[layer], step)
        by_rows = backend.prefills_by_rows(layer)
        if by_rows and not apart:
            return super().attend(layer, q, out)
        out = torch.empty_like(q) if out is None else out
        first = count if apart else 0
        if apart:
            assert step.decode is not None
            backend.decode_apart(layer, q[:count], step.decode, out[:count])
        if by_rows:
            backend.prefill_rows(layer, q[first:], step.prompts, self.sizes, out=out[first:])
        else:
            backend.prefill(layer, q[first:], step, out[first:])
        return out


class _Decode(DecodeAttention):
    def attend(self, layer: int, q: Tensor, out: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        result: Tensor = self.backend.decode_rows_of(layer, q, self.step, out)
        return result
