"""What stands in for the `flashinfer` package: the calls that we make, with its signatures, its rules and its hazards.

Every argument's place, dtype and shape is checked, and the result is computed in plain torch, so that a model gives
the same tokens through it. A plan writes into the wrapper's one pinned buffer, as FlashInfer does: planning again
before that buffer's copy has run corrupts the step before.
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.cuda.fake_device import FakeDevice

# Parameters of FlashInfer 0.7.2 in their order; those after the bar have defaults.
SIGNATURES = {
    "prefill.__init__": "float_workspace_buffer | kv_layout use_cuda_graph qo_indptr_buf paged_kv_indptr_buf "
    "paged_kv_indices_buf paged_kv_last_page_len_buf custom_mask_buf mask_indptr_buf backend jit_args jit_kwargs "
    "variant_owns_mask",
    "prefill.plan": "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads "
    "head_dim_qk page_size | head_dim_vo custom_mask packed_custom_mask causal pos_encoding_mode "
    "use_fp16_qk_reduction sm_scale window_left logits_soft_cap rope_scale rope_theta q_data_type kv_data_type "
    "o_data_type non_blocking prefix_len_ptr token_pos_in_items_ptr token_pos_in_items_len max_item_len_ptr seq_lens "
    "seq_lens_q block_tables max_token_per_sequence max_sequence_kv fixed_split_size disable_split_kv uniform_q_len",
    "decode.__init__": "float_workspace_buffer | kv_layout use_cuda_graph use_tensor_cores paged_kv_indptr_buffer "
    "paged_kv_indices_buffer paged_kv_last_page_len_buffer backend jit_args",
    "decode.plan": "indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size | pos_encoding_mode "
    "window_left window_right logits_soft_cap q_data_type kv_data_type o_data_type data_type sm_scale rope_scale "
    "rope_theta non_blocking block_tables seq_lens fixed_split_size disable_split_kv q_len_per_req is_causal",
    "run": "q paged_kv_cache | q_scale k_scale v_scale out lse return_lse enable_pdl window_left sinks",
    "mla.__init__": "float_workspace_buffer | use_cuda_graph qo_indptr kv_indptr kv_indices kv_len_arr backend",
    "mla.plan": "| qo_indptr kv_indptr kv_indices kv_len_arr num_heads head_dim_ckv head_dim_kpe page_size causal "
    "sm_scale q_data_type kv_data_type use_profiler metadata cum_seq_lens_q block_tables seq_lens max_q_len "
    "query_layout kv_cache_layout lse_mode output_dtype output_scale scale_mode skip_softmax enable_pdl use_sinks",
    "mla.run": "| q_nope q_pe ckv_cache kpe_cache out lse return_lse profiler_buffer kv_len page_table "
    "return_lse_base_on_e o_scale query kv_cache ckv_scale ckv_scale_arr kpe_scale sinks "
    "skip_softmax_threshold_scale_factor bmm1_scale bmm2_scale",
    "mla.csr": "qo_indptr kv_indptr kv_indices kv_len_arr |",
    # Of what it compiles: the dry run holds our calls against the wrapper's own.
    "mla_module.plan": "float_workspace int_workspace pinned_workspace qo_indptr kv_indptr kv_len num_heads "
    "head_dim_ckv causal |",
    "mla_module.run": "float_workspace int_workspace plan q_nope q_pe ckv kpe kv_indices out lse mask num_heads "
    "page_size sm_scale lse_base_e ckv_scale kpe_scale ckv_scales |",
    "xqa": "query kv_cache workspace_buffer block_tables seq_lens max_seq_len | bmm1_scale bmm2_scale window_left out "
    "sinks kv_layout enable_pdl q_len_per_req o_scale mask kv_cache_sf q_cu_seq_lens",
}


def bind(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name; TypeError where the real call would raise one."""
    required, _, optional = SIGNATURES[name].partition("|")
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(p, kind) for p in required.split()]
    parameters += [inspect.Parameter(p, kind, default=None) for p in optional.split()]
    return inspect.Signature(parameters).bind(*args, **kwargs).arguments


def attend(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, window_left: int, softcap: float | None, causal: bool
) -> Tensor:
    """q [N, Hq, D], the last N of the keys [L, Hkv, D] -> [N, Hq, D], in float32."""
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.float().repeat_interleave(group, 1), values.float().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    length = keys.shape[0]
    distance = torch.arange(length - q.shape[0], length)[:, None] - torch.arange(length)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance < 0
    if window_left >= 0:
        hidden |= distance > window_left
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


class _Wrapper:
    """What both wrappers are: a plan in pinned memory, its image on the device, and a run that reads the image."""

    ROOM = 4096

    def __init__(self, package: FakeFlashInfer) -> None:
        self.package = package
        device = self.device = package.device
        self.log = package.log
        self.strict = package.strict
        self._pin_memory_int_workspace_buffer = device.pinned(4 * self.ROOM).view(torch.int32)
        self._int_workspace_buffer = torch.zeros(self.ROOM, dtype=torch.int32)
        self.indices: Tensor | None = None
        self.settings: dict[str, Any] = {}

    def check_workspace(self, buffer: Tensor) -> None:
        assert buffer.dtype == torch.uint8 and buffer.dim() == 1 and not self.device.is_pinned(buffer)
        assert not self.strict or buffer.numel() >= 128 * 2**20, "FlashInfer recommends 128 MB"

    def check_host(self, name: str, tensor: Tensor, length: int) -> None:
        assert tensor.dtype == torch.int32 and tensor.shape == (length,), f"{name}: {tensor.dtype} {tensor.shape}"
        # Pageable host memory is allowed; what must not be is memory of the device.
        assert not hasattr(tensor, "on_device"), f"{name} on the device synchronises"

    def check_cache(self, q: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        assert isinstance(cache, tuple) and len(cache) == 2
        k, v = cache
        settings = self.settings
        for pool in (k, v):
            assert pool.shape[1:] == (settings["page_size"], settings["num_kv_heads"], settings["head_dim"])
            assert pool.dtype == settings["kv_data_type"] and pool.is_contiguous()
        assert q.dtype == settings["q_data_type"], "planned for another dtype"
        assert q.shape[1:] == (settings["num_qo_heads"], settings["head_dim"]) and q.stride(-1) == 1
        return k, v

    def send_plan(self, *arrays: Tensor) -> None:
        """The async copy of a plan; the pinned buffer is overwritten at once, as plan() does."""
        flat = torch.cat([torch.tensor([len(array) for array in arrays]), *(array.long() for array in arrays)]).int()
        assert len(flat) <= self.ROOM
        self._pin_memory_int_workspace_buffer[: len(flat)] = flat
        pinned = self._pin_memory_int_workspace_buffer[: len(flat)]
        self.device.upload(self._int_workspace_buffer[: len(flat)], pinned)

    def read_plan(self, count: int) -> list[list[int]]:
        plan, at = self._int_workspace_buffer.tolist(), count
        arrays = []
        for length in plan[:count]:
            assert 0 <= length <= self.ROOM, "a plan that is no plan"
            arrays.append(plan[at : at + length])
            at += length
        return arrays

    def rows_of(self, k: Tensor, indptr: list[int], indices: Tensor, last: list[int]) -> list[tuple[Tensor, int]]:
        rows = []
        for row, tail in enumerate(last):
            pages = indices[indptr[row] : indptr[row + 1]].long()
            assert len(pages) and 1 <= tail <= k.shape[1]
            assert int(pages.min()) >= 0 and int(pages.max()) < len(k), "a page that does not exist"
            rows.append((pages, (len(pages) - 1) * k.shape[1] + tail))
        return rows


class PrefillWrapper(_Wrapper):
    """BatchPrefillWithPagedKVCacheWrapper."""

    def begin(self, *args: Any, **kwargs: Any) -> None:
        given = bind("prefill.__init__", args, kwargs)
        self.log.append(("prefill.__init__", given))
        self.check_workspace(given["float_workspace_buffer"])
        assert given["kv_layout"] == "NHD" and not given.get("use_cuda_graph")
        assert given.get("backend", "auto") in ("auto", "fa2", "fa3")
        self.backend = self._backend = given.get("backend", "auto")

    def plan(self, *args: Any, **kwargs: Any) -> None:
        given = bind("prefill.plan", args, kwargs)
        self.log.append(("prefill.plan", given))
        self.package.look_for(f"prefill {self.backend}", given["window_left"])
        rows = len(given["qo_indptr"]) - 1
        self.check_host("qo_indptr", given["qo_indptr"], rows + 1)
        self.check_host("paged_kv_indptr", given["paged_kv_indptr"], rows + 1)
        self.check_host("paged_kv_last_page_len", given["paged_kv_last_page_len"], rows)
        self.check_host("seq_lens", given["seq_lens"], rows)
        pages = given["paged_kv_indptr"][1:] - given["paged_kv_indptr"][:-1]
        lengths = (pages - 1) * given["page_size"] + given["paged_kv_last_page_len"]
        assert torch.equal(given["seq_lens"], lengths), "two accounts of the lengths"
        indices = given["paged_kv_indices"]
        assert indices.dtype == torch.int32 and len(indices) == int(given["paged_kv_indptr"][-1])
        assert not self.device.is_pinned(indices), "host indices make the host wait"
        assert given["causal"] is True and given["q_data_type"] is not None
        if self.strict:
            assert given["head_dim_qk"] in (64, 128, 256) and given["q_data_type"] in (torch.bfloat16, torch.float16)
            assert self.backend != "fa3" or given["kv_data_type"] == given["q_data_type"]
        self.settings = dict(given, head_dim=given["head_dim_qk"])
        if self._backend == "auto":
            self._backend = "fa3"  # on these GPUs, and for good
        self.indices = indices
        self.send_plan(given["qo_indptr"], given["paged_kv_indptr"], given["paged_kv_last_page_len"])

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        given = bind("run", args, kwargs)
        q, out, settings, indices = given["q"], given["out"], self.settings, self.indices
        k, v = self.check_cache(q, given["paged_kv_cache"])
        self.package.look_for(f"run of prefill {self.backend}", settings["window_left"])
        assert out.shape == q.shape and out.dtype == q.dtype and indices is not None and out.is_contiguous()

        def work() -> None:
            qo, kv, last = self.read_plan(3)
            assert qo[-1] == len(q), "planned for another number of tokens"
            for row, (pages, length) in enumerate(self.rows_of(k, kv, indices, last)):
                part = slice(qo[row], qo[row + 1])
                keys, values = (p[pages].flatten(0, 1)[:length] for p in (k, v))
                cap, window = settings.get("logits_soft_cap"), settings.get("window_left", -1)
                out[part] = attend(q[part], keys, values, settings["sm_scale"], window, cap, True).to(q.dtype)

        self.device.kernel(work)
        return out


class DecodeWrapper(_Wrapper):
    """BatchDecodeWithPagedKVCacheWrapper in CUDA-graph mode."""

    def begin(self, *args: Any, **kwargs: Any) -> None:
        given = bind("decode.__init__", args, kwargs)
        self.log.append(("decode.__init__", given))
        self.check_workspace(given["float_workspace_buffer"])
        assert given["use_cuda_graph"] is True
        self.buffer = given["paged_kv_indices_buffer"]
        self.rows = len(given["paged_kv_last_page_len_buffer"])
        assert len(given["paged_kv_indptr_buffer"]) == self.rows + 1
        assert all(
            given[name].dtype == torch.int32
            for name in ("paged_kv_indices_buffer", "paged_kv_indptr_buffer", "paged_kv_last_page_len_buffer")
        )

    def plan(self, *args: Any, **kwargs: Any) -> None:
        assert self.device.recorder is None, "plan cannot be captured"
        given = bind("decode.plan", args, kwargs)
        self.log.append(("decode.plan", given))
        self.package.look_for("decode", given["window_left"])
        self.check_host("indptr", given["indptr"], self.rows + 1)
        self.check_host("last_page_len", given["last_page_len"], self.rows)
        indices = given["indices"]
        assert indices.dtype == torch.int32 and not self.device.is_pinned(indices), "host indices make the host wait"
        assert len(indices) == int(given["indptr"][-1]) <= len(self.buffer), "the indices do not fit their buffer"
        self.settings = dict(given)
        buffer = self.buffer
        self.device.launch(lambda: buffer[: len(indices)].copy_(indices))
        self.send_plan(given["indptr"], given["last_page_len"])

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        given = bind("run", args, kwargs)
        q, out, settings = given["q"], given["out"], self.settings
        assert settings, "run before plan"
        k, v = self.check_cache(q, given["paged_kv_cache"])
        self.package.look_for("run of decode", settings["window_left"])
        assert len(q) == self.rows and out.shape == q.shape and out.dtype == q.dtype

        def work() -> None:
            kv, last = self.read_plan(2)
            for row, (pages, length) in enumerate(self.rows_of(k, kv, self.buffer, last)):
                keys, values = (p[pages].flatten(0, 1)[:length] for p in (k, v))
                cap, window = settings.get("logits_soft_cap"), settings.get("window_left", -1)
                out[row] = attend(q[row][None], keys, values, settings["sm_scale"], window, cap, True)[0].to(q.dtype)

        self.device.kernel(work)
        return out


class MLAModule:
    """What BatchMLAPagedAttentionWrapper compiles. A plan is sent straight from the pinned memory that it is given."""

    PLACES = (0, 16, 32)

    def __init__(self, package: FakeFlashInfer, key_dim: int) -> None:
        self.package, self.device, self.key_dim = package, package.device, key_dim

    def plan(self, *args: Any) -> tuple[int, ...]:
        assert self.device.recorder is None, "plan cannot be captured"
        given = bind("mla_module.plan", args, {})
        self.package.log.append(("mla_module.plan", given))
        to, pinned = given["int_workspace"], given["pinned_workspace"]
        assert to.dtype == pinned.dtype == torch.uint8 and self.device.is_pinned(pinned)
        assert not self.device.is_pinned(to)
        arrays = [given[name] for name in ("qo_indptr", "kv_indptr", "kv_len")]
        rows = len(arrays[2])
        assert all(each.dtype == torch.int32 and each.is_contiguous() for each in arrays)
        assert len(arrays[0]) == len(arrays[1]) == rows + 1
        lengths = arrays[0][1:] - arrays[0][:-1]
        assert (lengths >= 1).all() and (arrays[2] >= lengths).all()
        heads = given["num_heads"]
        tile = 128 if int(lengths.sum()) * heads // rows > 64 else 64
        tiles = -(-lengths * heads // tile)
        assert int(tiles.sum()) <= 16384, "more work than a plan has room for"
        if given["causal"]:
            assert tile % heads == 0, "it would leave keys out at the ends of tiles"
        flat = torch.cat([torch.tensor([rows, int(given["causal"])], dtype=torch.int32), *arrays])
        view = pinned.view(torch.int32)[: len(flat)]
        view.copy_(flat)
        self.device.upload(to.view(torch.int32)[: len(flat)], view)
        return self.PLACES

    def run(self, *args: Any) -> None:
        given = bind("mla_module.run", args, {})
        q, key, latents, keys, out = (given[name] for name in ("q_nope", "q_pe", "ckv", "kpe", "out"))
        assert given["plan"] == self.PLACES and given["ckv_scales"] is given["lse"] is None
        assert given["ckv_scale"] == given["kpe_scale"] == 1.0 and given["mask"] in (0, 1)
        assert q.shape[:2] == key.shape[:2] and out.shape == q.shape and key.shape[2] == self.key_dim
        assert q.shape[1] == given["num_heads"] and out.is_contiguous() and out.dtype == q.dtype
        assert latents.dim() == keys.dim() == 3 and latents.shape[1] == keys.shape[1] == given["page_size"]
        assert latents.shape[2] == q.shape[2] and keys.shape[2] == key.shape[2]
        assert all(each.stride(-1) == 1 for each in (q, key, latents, keys))
        where, indices = given["int_workspace"], given["kv_indices"]
        assert indices.dtype == torch.int32 and indices.is_contiguous() and not self.device.is_pinned(indices)

        def work() -> None:
            plan = where.view(torch.int32).tolist()
            rows, causal = plan[:2]
            assert 0 < rows <= 4096 and causal == given["mask"], "a plan that is no plan"
            ends, starts, lengths = plan[2 : rows + 3], plan[rows + 3 : 2 * rows + 4], plan[2 * rows + 4 : 3 * rows + 4]
            assert ends[-1] == len(q), "planned for another number of tokens"
            for row, length in enumerate(lengths):
                first = starts[row]
                pages = indices[first : first + -(-length // given["page_size"])].long()
                assert int(pages.min()) >= 0 and int(pages.max()) < len(latents), "a page that does not exist"
                values, more = (pool[pages].flatten(0, 1)[:length, None] for pool in (latents, keys))
                part = slice(ends[row], ends[row + 1])
                queries = torch.cat((q[part], key[part]), -1)
                known = torch.cat((values, more), -1)
                found = attend(queries, known, values, given["sm_scale"], -1, None, bool(causal))
                out[part] = found.to(q.dtype)

        self.device.kernel(work)


class MLAWrapper:
    """BatchMLAPagedAttentionWrapper."""

    def __init__(self, package: FakeFlashInfer, *args: Any, **kwargs: Any) -> None:
        given = bind("mla.__init__", args, kwargs)
        self.package, self.backend = package, given["backend"]
        self.workspace = given["float_workspace_buffer"]
        assert self.workspace.dtype == torch.uint8 and self.backend in ("fa2", "fa3")
        package.log.append(("mla.__init__", given))

    def plan(self, **kwargs: Any) -> None:
        given = bind("mla.plan", (), kwargs)
        metadata, package = given["metadata"], self.package
        package.log.append(("mla.plan", given))
        package.look_for(f"mla {self.backend}", -1)
        latent, key = given["head_dim_ckv"], given["head_dim_kpe"]
        assert isinstance(given["sm_scale"], float)
        if package.strict:
            assert latent in (128, 256, 512) and key % 64 == 0
            assert given["q_data_type"] in (torch.bfloat16, torch.float16)
        self.given, self.indices = given, metadata["kv_indices"]
        self._int_workspace_buffer = torch.zeros(1 << 16, dtype=torch.uint8)
        self._pin_memory_int_workspace_buffer = package.device.pinned(1 << 16)
        self._cached_module = MLAModule(package, key)
        arrays = (metadata[name] for name in ("qo_indptr", "kv_indptr", "kv_len_arr"))
        self.places = self._cached_module.plan(
            self.workspace,
            self._int_workspace_buffer,
            self._pin_memory_int_workspace_buffer,
            *arrays,
            given["num_heads"],
            latent,
            given["causal"],
        )

    def run(self, **kwargs: Any) -> Tensor:
        given = bind("mla.run", (), kwargs)
        q, cache, plan = given["query"], given["kv_cache"], self.given
        self.package.look_for(f"run of mla {self.backend}", -1)
        assert q.dtype == plan["q_data_type"] and cache.dtype == plan["kv_data_type"]
        narrow = cache.dtype != q.dtype
        assert (given.get("ckv_scale") == given.get("kpe_scale") == 1.0) if narrow else "ckv_scale" not in given
        latent = plan["head_dim_ckv"]
        assert q.shape[-1] == cache.shape[-1] == latent + plan["head_dim_kpe"]
        self._cached_module.run(
            self.workspace,
            self._int_workspace_buffer,
            self.places,
            q[..., :latent],
            q[..., latent:],
            cache[..., :latent],
            cache[..., latent:],
            self.indices,
            given["out"],
            None,
            int(plan["causal"]),
            plan["num_heads"],
            plan["page_size"],
            plan["sm_scale"],
            False,
            1.0,
            1.0,
            None,
        )
        return given["out"]


class FakeFlashInfer:
    """The package. log: every call with its arguments by name. strict: only shapes that FlashInfer has kernels for.

    missing: kernels that cannot be built, (prefill auto, prefill fa2, decode, xqa, mla fa3; whether with a window),
    or that cannot run, (run of prefill auto, ...).
    """

    def __init__(self, device: FakeDevice, strict: bool = True, missing: tuple[tuple[str, bool], ...] = ()) -> None:
        self.device = device
        self.strict = strict
        self.missing = missing
        self.log: list[tuple[str, dict[str, Any]]] = []
        self.decode = SimpleNamespace(xqa_batch_decode_with_kv_cache=self._xqa)
        self.mla = SimpleNamespace(
            BatchMLAPagedAttentionWrapper=functools.partial(MLAWrapper, self),
            MLAPlanMetadata=SimpleNamespace(csr=lambda *args, **kwargs: bind("mla.csr", args, kwargs)),
        )

    def look_for(self, kernel: str, window_left: int) -> None:
        if (kernel, window_left >= 0) in self.missing:
            raise RuntimeError(f"JIT is disabled, and there is no {kernel}\nwith these flags")

    def BatchPrefillWithPagedKVCacheWrapper(self, *args: Any, **kwargs: Any) -> PrefillWrapper:
        wrapper = PrefillWrapper(self)
        wrapper.begin(*args, **kwargs)
        return wrapper

    def BatchDecodeWithPagedKVCacheWrapper(self, *args: Any, **kwargs: Any) -> DecodeWrapper:
        wrapper = DecodeWrapper(self)
        wrapper.begin(*args, **kwargs)
        return wrapper

    def _xqa(self, *args: Any, **kwargs: Any) -> Tensor:
        given = bind("xqa", args, kwargs)
        self.log.append(("xqa", given))
        self.look_for("xqa", given["window_left"])
        q, (k, v), out = given["query"], given["kv_cache"], given["out"]
        tables, lengths = given["block_tables"], given["seq_lens"]
        rows, heads, dim = q.shape
        page_size = k.shape[1]
        assert q.is_contiguous() and out.is_contiguous() and out.shape == q.shape and out.dtype == q.dtype
        assert k.shape == v.shape and k.dtype == v.dtype and k.is_contiguous() and v.is_contiguous()
        assert tables.dtype == torch.int32 and tables.dim() == 2 and len(tables) == rows and tables.is_contiguous()
        assert lengths.dtype == torch.uint32 and lengths.shape == (rows,)
        assert given["max_seq_len"] == tables.shape[1] * page_size and given["kv_layout"] == "NHD"
        workspace = given["workspace_buffer"]
        assert workspace.dtype == torch.uint8 and workspace.is_contiguous()
        if self.strict:
            assert workspace.numel() > 8 * 2**20, "the first 8 MiB are semaphores"
            assert q.dtype in (torch.bfloat16, torch.float16) and dim % 16 == 0 and dim <= 256
            assert page_size in (16, 32, 64, 128)
            assert k.dtype in (q.dtype, torch.float8_e4m3fn)
        scale, window = given["bmm1_scale"], given["window_left"]
        assert isinstance(scale, float) and given["bmm2_scale"] == 1.0
        assert heads % k.shape[2] == 0

        def work() -> None:
            for row, length in enumerate(lengths.to(torch.int64).tolist()):
                assert 1 <= length <= given["max_seq_len"], f"row {row} has length {length}"
                pages = tables[row, : -(-length // page_size)].long()
                assert int(pages.min()) >= 0 and int(pages.max()) < len(k), "a page that does not exist"
                keys, values = (p[pages].flatten(0, 1)[:length] for p in (k, v))
                out[row] = attend(q[row][None], keys, values, scale, window, None, True)[0].to(q.dtype)

        self.device.kernel(work)
        return out
