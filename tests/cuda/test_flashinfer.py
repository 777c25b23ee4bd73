"""The FlashInfer backend in the shapes that FlashInfer has kernels for: every call checked, results against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.ops.attention.base import AttentionSpec
from engine.ops.attention.device import DecodePlan, DecodeStep, DeviceAttention, MixedStep
from engine.ops.attention.flashinfer import Backend
from tests.cuda.fake_device import FakeDevice
from tests.cuda.fake_flashinfer import FakeFlashInfer

PAGE = 16
# Two rows: tokens, pages in the pool, length of the context with them.
ROWS = [(20, [3, 7], 20), (5, [2, 9, 4], 37)]


class Bench:
    """A backend and its torch twin over equal pools, fed the same steps."""

    def __init__(self, spec: AttentionSpec, **options: Any) -> None:
        self.device = FakeDevice(0)
        self.stream = self.device.stream()
        self.flashinfer = FakeFlashInfer(self.device, missing=options.pop("missing", ()))
        settings: dict[str, Any] = {
            "num_pages": 12,
            "page_size": PAGE,
            "dtype": options.pop("dtype", torch.bfloat16),
            "kv_dtype": options.pop("kv_dtype", None),
            "device": torch.device("cpu"),
        }
        self.spec = spec
        self.dtype = settings["dtype"]
        self.backend = Backend(spec, module=self.flashinfer, **settings, **options)
        self.twin = DeviceAttention(spec, **settings)
        generator = torch.Generator().manual_seed(0)
        for ours, theirs in zip(
            self.backend.k_pools + self.backend.v_pools, self.twin.k_pools + self.twin.v_pools, strict=True
        ):
            values = torch.randn(ours.shape, generator=generator).to(ours.dtype)
            ours.copy_(values)
            theirs.copy_(values)

    def qkv(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        heads = spec.num_heads + 2 * spec.num_kv_heads
        qkv = torch.randn(tokens, heads, spec.head_dim, generator=torch.Generator().manual_seed(tokens)).to(self.dtype)
        q, k, v = qkv.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 1)
        return q, k, v

    def on_device(self, values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    def pinned(self, values: list[int]) -> Tensor:
        tensor = self.device.pinned(4 * len(values)).view(torch.int32)
        tensor.copy_(torch.tensor(values))
        return tensor

    def run(self, layers: int, make: Any, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        results: tuple[list[Tensor], list[Tensor]] = ([], [])
        for backend, found in zip((self.backend, self.twin), results, strict=True):
            with self.device.on(self.stream):
                attention = make(backend)
                for layer in range(layers):
                    self.device.launch(
                        lambda layer=layer, a=attention, f=found: f.append(a.forward(layer, *self.qkv(tokens)))
                    )
            with self.device.may_block():
                self.device.synchronize_all()
        return results

    def mixed(self, parity: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        positions = [length - count + i for count, _, length in ROWS for i in range(count)]
        pages = [page for _, row, _ in ROWS for page in row]
        slots = [
            row[(length - count + i) // PAGE] * PAGE + (length - count + i) % PAGE
            for count, row, length in ROWS
            for i in range(count)
        ]

        def make(backend: DeviceAttention) -> Any:
            return backend.mixed(
                MixedStep(
                    self.on_device(positions),
                    self.on_device(slots, torch.int64),
                    self.on_device(pages),
                    self.pinned([0, 20, 25]),
                    self.pinned([0, 2, 5]),
                    self.pinned([4, 5]),
                    self.pinned([20, 37]),
                    parity,
                )
            )

        return self.run(self.spec.num_layers, make, 25)

    def decode(self, parity: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        """The two rows, one token on, and a row of padding."""
        width = 4
        tables = torch.tensor([[3, 7, 0, 0], [2, 9, 4, 0], [0, 0, 0, 0]], dtype=torch.int32)
        step = DecodeStep(
            self.on_device([20, 37, 0]),
            self.on_device([7 * PAGE + 4, 4 * PAGE + 5, 0], torch.int64),
            tables,
            self.on_device([21, 38, 1]),
            parity,
        )

        def make(backend: DeviceAttention) -> Any:
            if backend.decode_needs_plan:
                plan = DecodePlan(self.pinned([0, 2, 5, 6]), self.pinned([5, 6, 1]), self.on_device([3, 7, 2, 9, 4, 0]))
                backend.plan_decode(plan, 3, width, parity)
            return backend.decode(step)

        return self.run(self.spec.num_layers, make, 3)

    def calls(self, name: str) -> list[dict[str, Any]]:
        return [given for called, given in self.flashinfer.log if called == name]


def check(results: tuple[list[Tensor], list[Tensor]]) -> None:
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 1e-2, f"off by {error:.1e}"


LLAMA_1B = AttentionSpec(2, 32, 8, 64, 64**-0.5)
LLAMA_8B = AttentionSpec(2, 32, 8, 128, 128**-0.5)


@pytest.mark.parametrize("spec", [LLAMA_1B, LLAMA_8B], ids=["1b", "8b"])
@pytest.mark.parametrize("decode", ["xqa", "wrapper"])
def test_llama(spec: AttentionSpec, decode: str) -> None:
    bench = Bench(spec, decode=decode)
    check(bench.mixed())
    check(bench.decode())
    plan = bench.calls("prefill.plan")[0]
    assert (plan["num_qo_heads"], plan["num_kv_heads"], plan["head_dim_qk"], plan["page_size"]) == (
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        PAGE,
    )
    assert len(bench.calls("prefill.plan")) == 1, "one plan serves all layers"
    assert len(bench.calls("xqa")) == (2 if decode == "xqa" else 0)
    assert len(bench.calls("decode.plan")) == (0 if decode == "xqa" else 1)
    assert bench.backend.workspace_bytes >= 128 * 2**20


@pytest.mark.parametrize("decode", ["xqa", "wrapper"])
def test_windows_on_some_layers(decode: str) -> None:
    """A window counts the query itself, FlashInfer's window_left does not."""
    spec = AttentionSpec(3, 8, 2, 64, 0.1, window=(6, None, 6))
    bench = Bench(spec, decode=decode)
    check(bench.mixed())
    check(bench.decode())
    assert {plan["window_left"] for plan in bench.calls("prefill.plan")} == {5, -1}
    if decode == "xqa":
        assert [call["window_left"] for call in bench.calls("xqa")] == [5, -1, 5]


def test_a_soft_cap_goes_by_the_decode_wrapper() -> None:
    bench = Bench(AttentionSpec(2, 8, 4, 256, 1 / 16, softcap=30.0))
    assert bench.backend.decode_needs_plan
    check(bench.mixed())
    check(bench.decode())
    assert bench.calls("decode.plan")[0]["logits_soft_cap"] == 30.0


def test_groups_without_cuda_core_kernels_use_tensor_cores() -> None:
    bench = Bench(AttentionSpec(1, 28, 4, 128, 128**-0.5), decode="wrapper")
    check(bench.decode())
    assert bench.calls("decode.__init__")[0]["use_tensor_cores"] is True
    assert bench.calls("decode.__init__")[0]["backend"] == "fa2"
    assert Bench(LLAMA_1B, decode="wrapper").backend.describe().endswith("CUDA cores")


@pytest.mark.parametrize("decode", ["xqa", "wrapper"])
def test_fp8_cache(decode: str) -> None:
    bench = Bench(LLAMA_1B, kv_dtype=torch.float8_e4m3fn, decode=decode)
    check(bench.mixed())
    check(bench.decode())
    assert all(call["backend"] == "fa2" for call in bench.calls("prefill.__init__"))
    assert bench.calls("prefill.plan")[0]["kv_data_type"] == torch.float8_e4m3fn


def test_what_has_no_kernel_runs_on_torch() -> None:
    for spec, dtype in ((LLAMA_1B, torch.float32), (AttentionSpec(1, 4, 2, 80, 0.1), torch.bfloat16)):
        bench = Bench(spec, dtype=dtype)
        check(bench.mixed())
        check(bench.decode())
        assert not bench.flashinfer.log and "torch" in bench.backend.describe()


def test_odd_and_even_steps_have_wrappers_of_their_own() -> None:
    backend = Bench(LLAMA_1B).backend
    assert backend._prefills[None, 0] is not backend._prefills[None, 1]
    planned = Bench(LLAMA_1B, decode="wrapper").backend
    planned.prepare_decode(8, 64)
    assert planned._decodes[8, 64, None, 0] is not planned._decodes[8, 64, None, 1]


def test_all_decode_wrappers_of_a_kind_and_parity_share_their_plan_memory() -> None:
    """Each would bring 16 MiB. The other parity's plan may still be on its way, so it has its own."""
    backend = Bench(LLAMA_1B, decode="wrapper").backend
    for size, width in ((1, 64), (8, 64), (8, 128)):
        backend.prepare_decode(size, width)
    memory = {
        key: (wrapper._int_workspace_buffer.data_ptr(), wrapper._pin_memory_int_workspace_buffer.data_ptr())
        for key, wrapper in backend._decodes.items()
    }
    assert len(memory) == 6 and len(set(memory.values())) == 2
    assert all((at == memory[1, 64, None, 0]) == (key[3] == 0) for key, at in memory.items())


WINDOWED = AttentionSpec(3, 8, 2, 64, 0.1, window=(6, None, 6))


def settled(missing: tuple[tuple[str, bool], ...], spec: AttentionSpec = WINDOWED) -> Bench:
    bench = Bench(spec, missing=missing)
    with bench.device.on(bench.stream):
        bench.backend.settle()
    with bench.device.may_block():
        bench.device.synchronize_all()
    bench.flashinfer.log.clear()
    return bench


def test_settling_finds_every_kernel_and_changes_nothing() -> None:
    bench = settled(())
    assert bench.backend.describe() == "FlashInfer, prefill auto, decode XQA"
    check(bench.mixed())
    check(bench.decode())
    assert len(bench.calls("xqa")) == 3 and not bench.calls("decode.plan")


@pytest.mark.parametrize(
    ("missing", "plans", "xqa", "decode_plans"),
    [
        # Windows by the decode wrapper, the rest by XQA.
        ((("xqa", True),), 2, 1, 1),
        # Windows by torch alone.
        ((("xqa", True), ("decode", True), ("prefill auto", True), ("prefill fa2", True)), 1, 1, 0),
        # Decode by torch alone, prompts without a window by the second choice.
        ((("xqa", True), ("xqa", False), ("decode", True), ("decode", False), ("prefill auto", False)), 2, 0, 0),
    ],
)
def test_a_kernel_that_cannot_be_built_is_replaced_for_its_layers_alone(
    missing: tuple[tuple[str, bool], ...], plans: int, xqa: int, decode_plans: int, caplog: pytest.LogCaptureFixture
) -> None:
    bench = settled(missing)
    assert len(caplog.records) == len(missing) and "window of 6" in caplog.text
    assert "JIT is disabled" in caplog.text and "with these flags" not in caplog.text
    assert ("torch (slow) in some layers" in bench.backend.describe()) == (len(missing) > 1)
    for parity in (0, 1):
        check(bench.mixed(parity))
        check(bench.decode(parity))
    assert len(bench.calls("prefill.plan")) == 2 * plans
    if ("prefill auto", False) in missing:
        assert "prefill auto and fa2" in bench.backend.describe()
    assert len(bench.calls("xqa")) == 2 * xqa and len(bench.calls("decode.plan")) == 2 * decode_plans
