"""Latent attention by FlashInfer in the shapes that it has kernels for: every call checked, results against torch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.executor.cuda_start import make_attention
from engine.kernels import kernels_of
from engine.ops.attention.base import AttentionSpec, LayerAttention
from engine.ops.attention.device import DecodePlan, DecodeStep, DeviceAttention, MixedStep, Ragged
from engine.ops.attention.flashinfer_latent import Backend, has_kernel
from tests.cuda.fake_device import FakeDevice
from tests.cuda.fake_flashinfer import FakeFlashInfer

PAGE = 16
# Rows: tokens, pages, length of the context with them. Two that decode, then two prompts.
ROWS = [(1, [5, 8, 1], 40), (1, [6], 7), (20, [3, 7], 20), (5, [2, 9, 4], 37)]


def spec_of(heads: int, latent: int = 512, key: int = 64, **options: Any) -> AttentionSpec:
    layer = LayerAttention(heads, 1, latent + key, latent, 0.07, values_in_keys=True, **options)
    return AttentionSpec((layer, layer))


class Bench:
    """A backend and its torch twin over equal pools."""

    def __init__(self, spec: AttentionSpec, missing: Any = (), **options: Any) -> None:
        self.device = FakeDevice(0)
        self.stream = self.device.stream()
        self.flashinfer = FakeFlashInfer(self.device, missing=missing)
        settings: dict[str, Any] = {"num_pages": 12, "page_size": PAGE, "dtype": torch.bfloat16, **options}
        settings["device"] = torch.device("cpu")
        self.backend = Backend(spec, module=self.flashinfer, **settings)
        self.twin = DeviceAttention(spec, **settings)
        generator = torch.Generator().manual_seed(0)
        self.shape = spec.layers[0]
        for layer in (0, 1):
            values = torch.randn(self.twin.k_pools[layer].shape, generator=generator)
            for each in (self.backend, self.twin):
                each.k_pools[layer].copy_(values)
        with self.device.on(self.stream), self.device.may_block():
            self.backend.settle(self.device.synchronize_all)

    def pinned(self, values: list[int]) -> Tensor:
        tensor = self.device.pinned(4 * len(values)).view(torch.int32)
        tensor.copy_(torch.tensor(values))
        return tensor

    def run(self, make: Any, tokens: int) -> None:
        """Both give the same."""
        generator = torch.Generator().manual_seed(tokens)
        assert self.shape is not None
        size = self.shape.head_dim
        q = torch.randn(tokens, self.shape.num_heads, size, generator=generator).bfloat16()
        k = torch.randn(tokens, 1, size, generator=generator).bfloat16()
        results: list[list[Tensor]] = [[], []]
        for backend, found in zip((self.backend, self.twin), results, strict=True):
            with self.device.on(self.stream):
                attention = make(backend)
                for layer in (0, 1):
                    self.device.launch(
                        lambda layer=layer, a=attention, f=found: f.append(a.forward(layer, q.clone(), k.clone(), None))
                    )
            with self.device.may_block():
                self.device.synchronize_all()
        for ours, theirs in zip(*results, strict=True):
            assert ours.shape == theirs.shape == (tokens, self.shape.num_heads * self.shape.value_dim)
            torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)

    def ragged(self, rows: list[tuple[int, list[int], int]]) -> Ragged:
        ends = [[0, *itertools.accumulate(sizes)] for sizes in ([r[0] for r in rows], [len(r[1]) for r in rows])]
        last = [length - (len(pages) - 1) * PAGE for _, pages, length in rows]
        host = [self.pinned(values) for values in (*ends, last, [length for _, _, length in rows])]
        return Ragged([torch.tensor([page for _, pages, _ in rows for page in pages], dtype=torch.int32)], *host)

    def mixed(self, rows: list[tuple[int, list[int], int]], decodes: int, parity: int = 0) -> None:
        positions = [length - count + i for count, _, length in rows for i in range(count)]
        cells = [
            pages[(length - count + i) // PAGE] * PAGE + (length - count + i) % PAGE
            for count, pages, length in rows
            for i in range(count)
        ]
        where, slots = torch.tensor(positions, dtype=torch.int32), torch.tensor(cells)
        tables = torch.tensor([pages + (4 - len(pages)) * [0] for _, pages, _ in rows[:decodes]], dtype=torch.int32)
        lengths = torch.tensor([length for _, _, length in rows[:decodes]], dtype=torch.int32)
        known = DecodeStep(where[:decodes], [slots[:decodes]], [tables], lengths, parity)

        def make(backend: DeviceAttention) -> Any:
            step = MixedStep(where, [slots], self.ragged(rows), self.ragged(rows[decodes:]), decodes, parity)
            attention = backend.mixed(step)
            step.decode = known if decodes else None
            return attention

        self.run(make, len(positions))

    def decode(self, parity: int) -> None:
        """Two rows, and one of padding."""
        tables = torch.tensor([[3, 7, 0, 0], [2, 9, 4, 0], [0, 0, 0, 0]], dtype=torch.int32)
        cells = torch.tensor([7 * PAGE + 4, 4 * PAGE + 5, 0])
        lengths = torch.tensor([21, 38, 1], dtype=torch.int32)
        step = DecodeStep(lengths - 1, [cells], [tables], lengths, parity)

        def make(backend: DeviceAttention) -> Any:
            if backend.decode_needs_plan(3):
                indices = [torch.tensor([3, 7, 2, 9, 4, 0], dtype=torch.int32)]
                backend.prepare_decode(3, 4)
                plan = DecodePlan(self.pinned([0, 2, 5, 6]), self.pinned([5, 6, 1]), indices)
                backend.plan_decode(plan, 3, 4, parity)
            return backend.decode(step)

        self.run(make, 3)

    def calls(self, name: str) -> list[dict[str, Any]]:
        return [given for called, given in self.flashinfer.log if called == name]


@pytest.mark.parametrize(("heads", "together"), [(16, True), (128, True), (20, False)])
def test_steps_of_all_kinds(heads: int, together: bool) -> None:
    """DeepSeek V2 Lite, V3 and GLM-4.7-Flash: 20 heads do not fill a tile, so their prompts go by torch."""
    bench = Bench(spec_of(heads))
    assert bench.backend.whole_tokens == together
    for parity in (0, 1):
        bench.decode(parity)
        before = len(bench.calls("mla_module.plan"))
        bench.mixed(ROWS, 2, parity)
        (plan,) = bench.calls("mla_module.plan")[before:]
        assert (plan["causal"], len(plan["kv_len"])) == ((True, 4) if together else (False, 2))
        bench.mixed(ROWS[2:], 0, parity)
    assert ("torch" in bench.backend.describe()) != together
    memories = {plan["pinned_workspace"].data_ptr() for plan in bench.calls("mla_module.plan")}
    assert len(memories) == 2, "one for even and one for odd steps"


def test_a_step_of_more_tiles_than_a_plan_holds() -> None:
    bench = Bench(spec_of(128))
    ends = bench.pinned([0, 16000]), bench.pinned([0, 1000])
    row = Ragged([], *ends, bench.pinned([16]), bench.pinned([16000]))
    assert not bench.backend.takes_prompts(row)
    row.qo_indptr = bench.pinned([0, 15000])
    assert bench.backend.takes_prompts(row)


def test_float8() -> None:
    bench = Bench(spec_of(16), kv_dtype=torch.float8_e4m3fn)
    assert bench.backend.describe() == "FlashInfer MLA, fa3"
    assert Bench(spec_of(16, 256), kv_dtype=torch.float8_e4m3fn).backend.describe().startswith("torch (slow)")


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ((("mla fa3", False),), "FlashInfer MLA, fa2; no MLA kernel (fa3: JIT is disabled, and there is no mla fa3)"),
        ((("run of mla fa3", False),), "FlashInfer MLA, fa2; no MLA kernel (fa3"),
        ((("mla fa3", False), ("run of mla fa2", False)), "torch (slow); no MLA kernel (fa3"),
    ],
)
def test_what_there_is_no_kernel_for(missing: Any, says: str) -> None:
    bench = Bench(spec_of(16), missing=missing)
    assert bench.backend.describe().startswith(says)
    bench.decode(0)
    bench.mixed(ROWS, 2)


def test_shapes_without_a_kernel() -> None:
    """MiniCPM 3's keys are of 32 numbers; float32 is for comparison."""
    for spec, dtype in ((spec_of(40, 256, 32), torch.bfloat16), (spec_of(16), torch.float32)):
        given: dict[str, Any] = {"num_pages": 2, "page_size": PAGE, "dtype": dtype, "device": torch.device("cpu")}
        backend = Backend(spec, module=FakeFlashInfer(FakeDevice()), **given)
        assert "has no kernels" in backend.describe() and not backend.workspace_bytes
        assert not backend.decode_needs_plan(1)
    shape = spec_of(16).latent
    assert shape is not None and has_kernel(shape, torch.bfloat16, torch.float8_e4m3fn)
    assert not has_kernel(shape, torch.bfloat16, torch.float8_e4m3fn, hopper=False)


def test_it_is_chosen_for_layers_with_latents_alone() -> None:
    class Model:
        def __init__(self, spec: AttentionSpec) -> None:
            self.attention_spec = spec

    device = FakeDevice()
    options = {"num_pages": 2, "page_size": PAGE, "dtype": torch.bfloat16}
    module = FakeFlashInfer(device)
    latent, plain = spec_of(16), AttentionSpec.alike(2, 8, 2, 64, 0.1)
    windowed = AttentionSpec((latent.layers[0], spec_of(16, window=9).layers[0]))
    found = [
        type(make_attention(Model(spec), device, module, **options)).__module__.rpartition(".")[2]  # type: ignore[arg-type]
        for spec in (latent, plain, windowed)
    ]
    assert found == ["flashinfer_latent", "flashinfer", "device"]


def test_a_kit_names_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is built of, the dry run says by the real generator."""
    modules = pytest.importorskip("flashinfer.jit.attention.modules")
    monkeypatch.setattr(modules, "gen_batch_mla_module", lambda *given: given)
    bfloat16, float8 = torch.bfloat16, torch.float8_e4m3fn
    same = bfloat16, bfloat16, bfloat16, torch.int32, 512, 64, False
    assert kernels_of(spec_of(16), bfloat16, bfloat16) == [("fa3", *same)]
    assert kernels_of(spec_of(16), bfloat16, bfloat16, arch="8.0") == [("fa2", *same)]
    assert not kernels_of(spec_of(16, 96), bfloat16, bfloat16)
    assert not kernels_of(spec_of(16), bfloat16, float8, arch="8.9")
