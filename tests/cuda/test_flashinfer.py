"""The FlashInfer backend in the shapes that FlashInfer has kernels for: every call checked, results against torch."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.executor.cuda_attention import choose_attention
from engine.ops import native
from engine.ops.attention import flashinfer
from engine.ops.attention.base import AttentionSpec
from engine.ops.attention.device import (
    DECODE,
    LARGE_TILES,
    PROMPTS,
    DecodePlan,
    DecodeStep,
    DeviceAttention,
    MixedStep,
    Ragged,
)
from engine.ops.attention.flashinfer import Backend, Kind
from tests.cuda.fake_device import FakeDevice
from tests.cuda.fake_flashinfer import FakeFlashInfer
from tests.gpu import support as gpu_support

PAGE = 16
# Rows: tokens, pages in the pool, length of the context with them. Two prompts, and two rows that decode beside them.
ROWS = [(20, [3, 7], 20), (5, [2, 9, 4], 37)]
DECODES = [(1, [5, 8, 1], 40), (1, [6], 7)]


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
        pools = [[*each.k_pools.values(), *each.v_pools.values()] for each in (self.backend, self.twin)]
        for ours, theirs in zip(*pools, strict=True):
            values = torch.randn(ours.shape, generator=generator).to(ours.dtype)
            ours.copy_(values)
            theirs.copy_(values)

    def qkv(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.backend.shape
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

    def ragged(self, rows: list[tuple[int, list[int], int]]) -> Ragged:
        ends = [[0, *itertools.accumulate(sizes)] for sizes in ([r[0] for r in rows], [len(r[1]) for r in rows])]
        last = [length - (len(pages) - 1) * PAGE for _, pages, length in rows]
        host = [self.pinned(values) for values in (*ends, last, [length for _, _, length in rows])]
        return Ragged([self.on_device([page for _, pages, _ in rows for page in pages])], *host)

    def mixed(self, parity: int = 0, decodes: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        first = DECODES[:decodes]
        rows = first + ROWS
        positions = [length - count + i for count, _, length in rows for i in range(count)]
        slots = [
            row[(length - count + i) // PAGE] * PAGE + (length - count + i) % PAGE
            for count, row, length in rows
            for i in range(count)
        ]
        on_device = self.on_device(positions), [self.on_device(slots, torch.int64)]
        tables = torch.tensor([pages + (4 - len(pages)) * [0] for _, pages, _ in first], dtype=torch.int32)
        lengths = self.on_device([length for _, _, length in first])
        known = DecodeStep(on_device[0][:decodes], [on_device[1][0][:decodes]], [tables], lengths, parity)

        def make(backend: DeviceAttention) -> Any:
            step = MixedStep(*on_device, self.ragged(rows), self.ragged(ROWS), decodes, parity)
            attention = backend.mixed(step)
            step.decode = known if decodes else None
            return attention

        return self.run(len(self.spec.layers), make, 25 + decodes)

    def decode(self, parity: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        """The two rows, one token on, and a row of padding."""
        width = 4
        tables = torch.tensor([[3, 7, 0, 0], [2, 9, 4, 0], [0, 0, 0, 0]], dtype=torch.int32)
        step = DecodeStep(
            self.on_device([20, 37, 0]),
            [self.on_device([7 * PAGE + 4, 4 * PAGE + 5, 0], torch.int64)],
            [tables],
            self.on_device([21, 38, 1]),
            parity,
        )

        def make(backend: DeviceAttention) -> Any:
            if backend.decode_needs_plan(3):
                indices = [self.on_device([3, 7, 2, 9, 4, 0])]
                plan = DecodePlan(self.pinned([0, 2, 5, 6]), self.pinned([5, 6, 1]), indices)
                backend.plan_decode(plan, 3, width, parity)
            return backend.decode(step)

        return self.run(len(self.spec.layers), make, 3)

    def calls(self, name: str) -> list[dict[str, Any]]:
        return [given for called, given in self.flashinfer.log if called == name]


def check(results: tuple[list[Tensor], list[Tensor]]) -> None:
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 1e-2, f"off by {error:.1e}"


LLAMA_1B = AttentionSpec.alike(2, 32, 8, 64, 64**-0.5)
LLAMA_8B = AttentionSpec.alike(2, 32, 8, 128, 128**-0.5)
# Layers without a window, where there is one memory group.
ALL = Kind(None, 0)


@pytest.mark.parametrize("spec", [LLAMA_1B, LLAMA_8B], ids=["1b", "8b"])
@pytest.mark.parametrize("decode", ["xqa", "wrapper"])
def test_llama(spec: AttentionSpec, decode: str) -> None:
    bench = Bench(spec, decode=decode)
    check(bench.mixed())
    check(bench.decode())
    plan = bench.calls("prefill.plan")[0]
    shape = bench.backend.shape
    assert (plan["num_qo_heads"], plan["num_kv_heads"], plan["head_dim_qk"], plan["page_size"]) == (
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        PAGE,
    )
    assert len(bench.calls("prefill.plan")) == 1, "one plan serves all layers"
    assert len(bench.calls("xqa")) == (2 if decode == "xqa" else 0)
    assert len(bench.calls("decode.plan")) == (0 if decode == "xqa" else 1)
    assert bench.backend.workspace_bytes >= 128 * 2**20


@pytest.mark.parametrize("decode", ["xqa", "wrapper"])
def test_windows_on_some_layers(decode: str) -> None:
    """A window counts the query itself, FlashInfer's window_left does not."""
    spec = AttentionSpec.alike(3, 8, 2, 64, 0.1, window=(6, None, 6))
    bench = Bench(spec, decode=decode)
    check(bench.mixed())
    check(bench.decode())
    assert {plan["window_left"] for plan in bench.calls("prefill.plan")} == {5, -1}
    if decode == "xqa":
        assert [call["window_left"] for call in bench.calls("xqa")] == [5, -1, 5]


def test_a_soft_cap_goes_by_the_decode_wrapper() -> None:
    bench = Bench(AttentionSpec.alike(2, 8, 4, 256, 1 / 16, softcap=30.0))
    assert bench.backend.decode_needs_plan(1)
    check(bench.mixed())
    check(bench.decode())
    assert bench.calls("decode.plan")[0]["logits_soft_cap"] == 30.0


def test_groups_without_cuda_core_kernels_use_tensor_cores() -> None:
    bench = Bench(AttentionSpec.alike(1, 28, 4, 128, 128**-0.5), decode="wrapper")
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
    for spec, dtype in ((LLAMA_1B, torch.float32), (AttentionSpec.alike(1, 4, 2, 80, 0.1), torch.bfloat16)):
        bench = Bench(spec, dtype=dtype)
        check(bench.mixed())
        check(bench.decode())
        assert not bench.flashinfer.log and "torch" in bench.backend.describe()


def test_odd_and_even_steps_have_wrappers_of_their_own() -> None:
    backend = Bench(LLAMA_1B).backend
    assert backend._prefills[ALL, 0] is not backend._prefills[ALL, 1]
    planned = Bench(LLAMA_1B, decode="wrapper").backend
    planned.prepare_decode(8, 64)
    assert planned._decodes[8, 64, ALL, 0] is not planned._decodes[8, 64, ALL, 1]


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
    assert all((at == memory[1, 64, ALL, 0]) == (key[3] == 0) for key, at in memory.items())


WINDOWED = AttentionSpec.alike(3, 8, 2, 64, 0.1, window=(6, None, 6))


def settled(missing: tuple[tuple[str, bool], ...], spec: AttentionSpec = WINDOWED) -> Bench:
    bench = Bench(spec, missing=missing)
    with bench.device.may_block(), bench.device.on(bench.stream):
        bench.backend.settle(bench.device.synchronize_all)
    bench.flashinfer.log.clear()
    return bench


def test_settling_finds_every_kernel_and_changes_nothing() -> None:
    bench = settled(())
    assert bench.backend.describe() == "FlashInfer, prefill fa3, decode XQA"
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
    for kernel, _ in missing:
        assert f"there is no {kernel}" in bench.backend.describe(), "what is missing, and why"
    assert ("torch (slow) in some layers" in bench.backend.describe()) == (len(missing) > 1)
    for parity in (0, 1):
        check(bench.mixed(parity))
        check(bench.decode(parity))
    assert len(bench.calls("prefill.plan")) == 2 * plans
    if ("prefill auto", False) in missing:
        assert "prefill fa2 and fa3" in bench.backend.describe()
    assert len(bench.calls("xqa")) == 2 * xqa and len(bench.calls("decode.plan")) == 2 * decode_plans


@pytest.mark.parametrize("decodes", [1, 2])
@pytest.mark.parametrize("spec", [LLAMA_1B, WINDOWED], ids=["1b", "windows"])
def test_decode_rows_beside_prompts_go_by_xqa(spec: AttentionSpec, decodes: int) -> None:
    """fa3 would take a tile of 192 rows for each of their query heads; prompts are planned alone."""
    bench = settled((), spec)
    for parity in (0, 1):
        check(bench.mixed(parity, decodes))
    assert len(bench.calls("xqa")) == 2 * len(spec.layers)
    assert all(len(call["query"]) == decodes for call in bench.calls("xqa"))
    assert all(plan["qo_indptr"].tolist() == [0, 20, 25] for plan in bench.calls("prefill.plan"))
    check(bench.mixed(0, 0))


def test_decode_rows_that_xqa_has_not_share_fa2_with_the_prompts() -> None:
    bench = settled((), AttentionSpec.alike(2, 8, 4, 256, 1 / 16, softcap=30.0))
    assert {call.backend for call in bench.backend._packed.values()} == {"fa2"}
    for decodes in (0, 2):
        bench.flashinfer.log.clear()
        check(bench.mixed(0, decodes))
        (plan,) = bench.calls("prefill.plan")
        assert len(plan["qo_indptr"]) == 3 + decodes
        wrapper = bench.backend._packed[ALL, 0] if decodes else bench.backend._prefills[ALL, 0]
        assert wrapper.settings["qo_indptr"] is plan["qo_indptr"]


def test_without_fa2_they_share_what_there_is() -> None:
    bench = settled((("prefill fa2", False),), AttentionSpec.alike(2, 8, 4, 256, 1 / 16, softcap=30.0))
    assert not bench.backend._packed and "no prefill (fa2) kernel" in bench.backend.describe()
    check(bench.mixed(0, 2))


@pytest.mark.parametrize(
    "missing",
    [("xqa", False), ("prefill auto", False), ("prefill fa2", False)],
)
def test_decode_rows_beside_prompts_without_a_kernel(missing: tuple[str, bool]) -> None:
    both = (missing, ("prefill auto", False)) if missing[0] == "prefill fa2" else (missing,)
    bench = settled(both, LLAMA_1B)
    check(bench.mixed(0, 2))
    check(bench.decode())


@pytest.mark.parametrize(("kernel", "says"), [("prefill auto", "prefill fa2"), ("decode", "torch (slow) in some")])
def test_a_kernel_that_does_not_run_is_found_out_before_the_first_step(kernel: str, says: str) -> None:
    """Prompts and planned decode, which else would run first in a step that nothing can save."""
    spec = AttentionSpec.alike(2, 8, 4, 256, 1 / 16, softcap=30.0)
    bench = settled(((f"run of {kernel}", False),), spec)
    assert says in bench.backend.describe()
    check(bench.mixed(0, 1))
    check(bench.decode())


def test_the_way_of_a_batch_size_is_what_was_quicker() -> None:
    """The clock of the fake device counts calls: the wrapper of 1 row is the only one that is quicker."""
    bench = settled((), WINDOWED)
    measured: list[int] = []

    def time(graph: Any) -> float:
        measured.append(1)
        return {2: 0.5, 4: 0.95}.get(len(measured), 1.0)  # XQA, wrapper, XQA, ...

    bench.device.time = time  # type: ignore[method-assign]
    with bench.device.may_block(), bench.device.on(bench.stream):
        found = choose_attention(bench.backend, [1, 3, 4, 128], lambda pages: pages + 1, 40, bench.device)
        bench.device.synchronize_all()
    assert found == [1] and len(measured) == 2 * 2 * 2, (
        "two ways, sizes and kinds; a size between two goes by the larger, one that fills the GPU is not planned"
    )
    assert bench.backend.decode_needs_plan(1) and not bench.backend.decode_needs_plan(3)
    assert not bench.backend.decode_needs_plan(500), "by the largest that was looked at"
    assert "CUDA cores for 1 rows" in bench.backend.describe()
    bench.flashinfer.log.clear()
    check(bench.decode())
    assert not bench.calls("decode.plan") and len(bench.calls("xqa")) == 3
    bench.backend.prefer(None, 4, "wrapper", "xqa")
    bench.flashinfer.log.clear()
    check(bench.decode())
    assert len(bench.calls("decode.plan")) == 1 and len(bench.calls("xqa")) == 2


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As where there is a kernel of ours, which torch stands in for: rows of its calls."""
    seen: list[int] = []

    def decode_rows(
        self: Backend, layer: int, q: Tensor, step: DecodeStep, sinks: Any = None, out: Tensor | None = None
    ) -> Tensor:
        seen.append(len(q))
        found = self.torch_decode_rows(layer, q, step)
        return found if out is None else out.copy_(found)

    monkeypatch.setattr(Backend, "has_kernel", lambda self, layer: (DECODE, layer) not in self._not_ours)
    monkeypatch.setattr(Backend, "decode_rows", decode_rows)
    monkeypatch.setattr(Backend, "_run_ours", lambda self, number, work: None)
    return seen


def test_our_kernel_decodes_what_it_is_quickest_for(ours: list[int]) -> None:
    bench = settled((), LLAMA_1B)
    # XQA, ours and the wrapper of one row; of four; then, with the wrapper left out, of 128.
    seconds = iter([1.0, 0.8, 0.75, 1.0, 1.1, 0.5, 1.0, 0.9])
    bench.device.time = lambda graph: next(seconds)  # type: ignore[method-assign]
    with bench.device.may_block(), bench.device.on(bench.stream):
        found = choose_attention(bench.backend, [1, 3, 4, 128], lambda pages: pages + 1, 40, bench.device)
        bench.device.synchronize_all()
    assert found == [1, 4, 128], "ours, the wrapper, ours"
    assert [bench.backend.decode_needs_plan(size) for size in (1, 4, 128, 200)] == [False, True, False, False]
    says = "decode XQA (our kernel for 1, 128 rows, as was quicker) (CUDA cores for 4 rows, as was quicker)"
    assert bench.backend.describe().endswith(says)
    ours.clear()
    bench.flashinfer.log.clear()
    check(bench.mixed(0, 1))
    assert ours == [1, 1] and not bench.calls("xqa"), "one row beside prompts"
    check(bench.mixed(1, 2))
    assert ours == [1, 1] and len(bench.calls("xqa")) == 2, "the wrapper is planned for whole steps alone"


@pytest.mark.parametrize(
    ("missing", "spec"),
    [((("xqa", False),), LLAMA_1B), ((), AttentionSpec.alike(2, 8, 4, 256, 1 / 16, softcap=30.0))],
)
def test_our_kernel_stands_in_for_xqa(
    missing: tuple[tuple[str, bool], ...], spec: AttentionSpec, ours: list[int]
) -> None:
    """Where it is missing or has no such shape: no step is planned, and prompts are not mixed with decode rows."""
    bench = settled(missing, spec)
    assert "decode our kernel" in bench.backend.describe() and not bench.backend.decode_needs_plan(3)
    check(bench.decode())
    check(bench.mixed(0, 2))
    assert ours == [3, 3, 2, 2] and not bench.calls("decode.plan") and not bench.calls("xqa")


def test_kernels_of_prompts_that_do_not_run_are_found_out_before_the_first_step(
    ours: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where FlashInfer's cannot be had: the smaller tiles stay when the larger do not fit, and decode stays in any
    case."""
    works = {LARGE_TILES}

    def run_ours(self: Backend, number: int, work: str) -> None:
        if work in works:
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(Backend, "_run_ours", run_ours)
    monkeypatch.setattr(Backend, "has_prompt_kernel", lambda self, layer: (PROMPTS, layer) not in self._not_ours)
    missing = (("prefill auto", False), ("prefill fa2", False))
    backend = settled(missing, LLAMA_1B).backend
    assert backend._not_ours == {(LARGE_TILES, 0), (LARGE_TILES, 1)} and "prefill our kernel" in backend.describe()
    works.add(PROMPTS)
    bench = settled(missing, LLAMA_1B)
    assert "prefill torch (slow) in some layers" in bench.backend.describe()
    assert bench.backend.has_kernel(0) and not bench.backend.has_prompt_kernel(0)
    check(bench.mixed(0, 1))
    assert not settled((), LLAMA_1B).backend._not_ours, "where FlashInfer has them nothing is tried"


@pytest.mark.parametrize("head_dim", [64, 80])
def test_our_kernel_that_does_not_run_is_found_out_before_the_first_step(
    head_dim: int, ours: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU with less memory for tiles: FlashInfer takes its place, and torch where that has no such heads."""
    tried: list[tuple[int, str]] = []

    def run_ours(self: Backend, number: int, work: str) -> None:
        tried.append((number, work))
        raise RuntimeError("out of resource: shared memory\nmore of it")

    monkeypatch.setattr(Backend, "_run_ours", run_ours)
    bench = settled((("xqa", False),), AttentionSpec.alike(2, 32, 8, head_dim, 0.1))
    assert tried == [(0, DECODE)], "one of layers that are alike"
    assert f"heads of {head_dim}: out of resource: shared memory" in caplog.text
    assert bench.backend.decode_needs_plan(3) == (head_dim == 64)
    assert ("CUDA cores" if head_dim == 64 else "torch (slow)") in bench.backend.describe()
    check(bench.decode())
    check(bench.mixed(0, 1))
    assert not ours or head_dim == 80


def test_a_wrapper_that_is_not_there_is_not_chosen() -> None:
    bench = settled((("decode", False), ("decode", True)), WINDOWED)
    with bench.device.may_block(), bench.device.on(bench.stream):
        assert choose_attention(bench.backend, [1, 3], lambda pages: pages, 40, bench.device) == []
        bench.device.synchronize_all()
    check(bench.decode())


# A library that was linked without the driver's, as pre-built kernels are: its undefined symbol is looked for at its
# first use, in what was loaded for all to see.
KERNEL = "extern int cuTensorMapEncodeTiled(void); int use(void) { return cuTensorMapEncodeTiled(); }"
DRIVER = "int cuTensorMapEncodeTiled(void) { return 42; }"
PROGRAM = """
import ctypes, os, sys
from engine.ops.attention.flashinfer import load_driver
if sys.argv[1] == "load":
    load_driver()
ctypes.CDLL("libcuda.so.1")  # as the runtime does, for itself
print(ctypes.CDLL(sys.argv[2], mode=os.RTLD_LAZY).use())
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_kernels_that_were_linked_without_the_driver_find_it(tmp_path: Path) -> None:
    for name, source in (("libcuda.so.1", DRIVER), ("kernel.so", KERNEL)):
        (tmp_path / "source.c").write_text(source)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / name, tmp_path / "source.c"], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = {
        way: subprocess.run(
            [sys.executable, "-c", PROGRAM, way, str(tmp_path / "kernel.so")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        for way in ("load", "not")
    }
    assert done["load"].stdout.strip() == "42", done["load"].stderr
    assert done["not"].returncode == 127 and "undefined symbol" in done["not"].stderr, "else this test shows nothing"


def test_the_driver_is_loaded_before_flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    package = tmp_path / "flashinfer"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    monkeypatch.setattr(flashinfer, "load_driver", lambda: order.append("driver"))
    with pytest.raises(ImportError, match="it was imported"):
        Backend(LLAMA_1B, num_pages=2, page_size=16, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert order == ["driver"]


@pytest.mark.parametrize("missing", [("xqa", False), ("prefill auto", False)])
def test_tests_on_a_gpu_do_not_pass_on_torch(missing: tuple[str, bool]) -> None:
    """Where a kernel is missing, what is meant to try it fails."""
    with native.disabled():
        model = gpu_support.load("LlamaForCausalLM", torch.bfloat16, torch.device("cpu"))
    device: Any = FakeDevice(0)
    for module in (FakeFlashInfer(device), FakeFlashInfer(device, missing=(missing,))):
        options: dict[str, Any] = {"attention": "auto", "module": module}
        if module.missing:
            with pytest.raises(AssertionError):
                gpu_support.executor(device, model, torch.bfloat16, **options)
        else:
            gpu_support.executor(device, model, torch.bfloat16, **options).close()
