"""CUDAExecutor on its own: what a step costs, errors, graphs, start-up, profiling. Tokens: tests/executor."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import CacheOptions, StartupError
from engine.executor import cuda_start
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_device import CaptureError
from engine.executor.cuda_graph import (
    IDLE_REPLAYS,
    GraphCache,
    GraphKey,
    graph_sizes,
    most_graphs,
    table_widths,
)
from engine.executor.cuda_start import SMALLER, build_cuda_executor, pick_dtype, pick_kv_dtype
from engine.executor.start import describe_states
from engine.flags import parse
from engine.forward import DeviceLostError, ForwardError, ForwardInput, Limits, PooledRow, RowExtras
from engine.ops.attention.device import DeviceAttention
from engine.ops.state import state_bytes
from engine.request import Pooling, SamplingParams
from tests.cuda.fake_device import FakeDevice
from tests.cuda.support import HYBRID, SMALL, TINY, CudaAdapter, make_executor, tiny_model
from tests.executor.driver import GREEDY, Driver, continuation, decode, prefill

A = [5, 6, 7, 8, 9, 10, 11]


async def decode_alone(driver: Driver, count: int, start: int = len(A)) -> list[int]:
    tokens = []
    for position in range(start, start + count):
        tokens += await driver.run([decode(1, position)])
    return tokens


async def test_a_steady_step_is_one_upload_one_replay_one_download() -> None:
    device = FakeDevice(0)
    driver = Driver(make_executor(SMALL, device=device))
    await driver.run([prefill(1, A)], {1: [1, 2, 3, 4, 5]}, {1: GREEDY})
    await decode_alone(driver, 4)
    before = dict(device.counts)
    await decode_alone(driver, 6, len(A) + 4)
    spent = {name: count - before[name] for name, count in device.counts.items()}
    assert spent == {"upload": 6, "download": 6, "replay": 6, "launch": 0, "capture": 0}
    driver.executor.close()


async def test_a_decode_step_may_bring_more_than_its_graph_has_room_for() -> None:
    """Table and sampling diffs beyond the batch size, and staging that has grown."""
    adapter = CudaAdapter()
    driver = Driver(make_executor(SMALL))
    expected = continuation(adapter, A, 8)
    tokens = await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    tokens += await decode_alone(driver, 1)
    others = [(3, index, 10 + index) for index in range(6)]
    tokens += await driver.run([decode(1, 8)], entries=[(1, 2, 3), *others], sampling={3: GREEDY})
    tokens += await decode_alone(driver, 2, 9)
    staging = driver.executor.staging[driver.step % 2]
    staging.reserve_table_diff(len(staging.table_index) + 1)
    tokens += await driver.run([decode(1, 11)], entries=[(3, 6, 20)])
    tokens += await driver.run([decode(1, 12)], entries=[(1, 3, 4)])
    assert tokens == expected[: len(tokens)]
    mixed = await driver.run([decode(1, 13), prefill(3, A)], entries=[(3, 0, 21), (3, 1, 22)])
    assert mixed == [expected[7], continuation(adapter, A, 1)[0]]
    driver.executor.close()


async def test_grown_staging_in_a_step_with_prompts() -> None:
    driver = Driver(make_executor(SMALL))
    for staging in driver.executor.staging:
        staging.reserve_table_diff(len(staging.table_index) + 1)
    expected = continuation(CudaAdapter(), A, 3)
    tokens = await driver.run([prefill(1, A)], {1: [7, 8, 9]}, {1: GREEDY})
    assert tokens + await decode_alone(driver, 2) == expected
    driver.executor.close()


async def test_a_broken_device_ends_every_step() -> None:
    device = FakeDevice(1, eagerness=0.0)
    driver = Driver(make_executor(SMALL, device=device))
    await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    with device.on(device.streams[0]):
        device.fail("an illegal memory access was encountered")
    first, second = driver.launch([decode(1, 7)]), driver.launch([decode(1, 8)], entries=[(1, 2, 3)])
    for handle in (first, second):
        with pytest.raises(DeviceLostError, match="illegal memory access"):
            await driver.wait(handle)
    with pytest.raises(DeviceLostError):
        await driver.run([decode(1, 9)])
    driver.executor.close()
    driver.executor.close()


async def test_an_error_that_is_not_the_devices_is_the_steps() -> None:
    executor = make_executor(SMALL)
    driver = Driver(executor)
    await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    mixed = executor.attention.mixed
    executor.attention.mixed = None  # type: ignore[assignment, method-assign]
    with pytest.raises(ForwardError, match="TypeError"):
        await driver.run([prefill(2, A)], {2: [3, 4]}, {2: GREEDY})
    executor.attention.mixed = mixed  # type: ignore[method-assign]
    assert await driver.run([decode(1, 7)]) == continuation(CudaAdapter(), A, 2)[1:]
    executor.close()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), CaptureError("not permitted")])
async def test_a_capture_that_fails_leaves_the_step_eager(error: Exception) -> None:
    device = FakeDevice(2)
    executor = make_executor(SMALL, device=device)
    driver = Driver(executor)

    def full(work: object) -> None:
        raise error

    device.capture = full  # type: ignore[assignment, method-assign]
    tokens = await driver.run([prefill(1, A)], {1: [1, 2, 3, 4]}, {1: GREEDY})
    assert tokens + await decode_alone(driver, 6) == continuation(CudaAdapter(), A, 7)
    assert not len(executor.graphs) and device.counts["replay"] == 0
    executor.close()


async def test_graphs_are_captured_while_the_device_is_idle() -> None:
    device = FakeDevice(3, eagerness=0.0)
    executor = make_executor(SMALL, device=device)
    driver = Driver(executor)
    expected = continuation(CudaAdapter(), A, 9)
    tokens = await driver.run([prefill(1, A)], {1: [1, 2, 3, 4]}, {1: GREEDY})
    tokens += await decode_alone(driver, 1)
    for _ in range(200):
        await asyncio.sleep(0.01)
        if len(executor.graphs) == 2:
            break
    assert len(executor.graphs) == 2, "one for each parity"
    # Steps that come while the warm-up is still queued on the device.
    tokens += await decode_alone(driver, 7, 8)
    assert tokens == expected and device.counts["replay"] == 7
    executor.close()


async def test_an_idle_capture_without_memory_is_not_tried_for_ever() -> None:
    device = FakeDevice(3)
    executor = make_executor(SMALL, device=device)
    driver = Driver(executor)
    await driver.run([prefill(1, A)], {1: [1, 2, 3, 4]}, {1: GREEDY})
    await decode_alone(driver, 1)
    assert executor.graphs.next_wanted() is not None
    launch = device.launch

    def full(work: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    device.launch = full  # type: ignore[assignment, method-assign]
    for _ in range(200):
        await asyncio.sleep(0.01)
        if executor.graphs.next_wanted() is None:
            break
    assert executor.graphs.next_wanted() is None and executor._idle_timer is None
    device.launch = launch  # type: ignore[method-assign]
    assert await decode_alone(driver, 3, 8) == continuation(CudaAdapter(), A, 5)[2:]
    assert device.counts["replay"] == 0
    executor.close()


async def test_seeds_and_filters_draw_the_same_in_graphs_and_without() -> None:
    adapter, hot = CudaAdapter(), SamplingParams(temperature=1.5, top_k=20, top_p=0.9, min_p=0.01, seed=2**63 + 5)
    for mode in ("lazy", "off"):
        driver = Driver(make_executor(SMALL, cuda_graph=mode))
        tokens = await driver.run([prefill(1, A)], {1: [1, 2, 3, 4]}, {1: hot})
        assert tokens + await decode_alone(driver, 7) == continuation(adapter, A, 8, hot)
        driver.executor.close()


async def test_wide_tables_get_graphs_of_their_own() -> None:
    limits = Limits(2, 300, 600, 4, 200, 101)
    model = tiny_model(max_model_len=1024)
    device = FakeDevice(4)
    executor = make_executor(limits, device=device, model=model)
    driver = Driver(executor)
    prompt = [(3 * i) % 100 for i in range(252)]
    await driver.run([prefill(1, prompt)], {1: list(range(1, 81))}, {1: GREEDY})
    for position in range(252, 260):
        await driver.run([decode(1, position)])
    widths = {key.width for key in executor.graphs._graphs}
    assert widths == {64, 128}
    executor.close()


def test_graph_sizes_cover_every_batch() -> None:
    for most in (1, 2, 3, 4, 7, 8, 9, 100, 256, 1000):
        sizes = graph_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most and sizes[0] == 1
        for rows in range(9, most + 1):
            size = next(s for s in sizes if s >= rows)
            assert size - rows <= max(8, size // 4)
    assert table_widths(10) == [10] and table_widths(500) == [64, 128, 256, 500]


def test_keys() -> None:
    cache = GraphCache(FakeDevice(), "lazy", 100, 300)
    assert cache.key(9, 65, 1, "plain") == GraphKey(16, 128, 1, "plain")
    assert GraphCache(FakeDevice(), "off", 100, 300).key(9, 1, 0, "open") == GraphKey(9, 64, 0, "open")


def test_there_are_no_more_graphs_than_memory_was_set_aside_for() -> None:
    """One that many steps went without makes room, and only one of those."""
    assert most_graphs(7, 2, 10) == 14 and most_graphs(7, 2, 200) == 42 and most_graphs(7, 2, 8192) == 56
    device = FakeDevice()
    cache = GraphCache(device, "lazy", 8, 8192)
    cache.most = 3
    keys = [GraphKey(size, width, 0, "plain") for size in (1, 2) for width in (64, 128)]
    graphs = [cache.capture(key, lambda: None) for key in keys]
    assert all(graphs[:3]) and graphs[3] is None and len(cache) == 3
    with device.on(device.stream()):
        for number in range(IDLE_REPLAYS):
            cache.replay(cache.get(keys[number % 2]))
    assert cache.get(keys[3]) is None
    assert cache.capture(keys[3], lambda: None) is not None
    assert cache.get(keys[2]) is None and cache.get(keys[0]) is not None and len(cache) == 3
    assert cache.capture(keys[2], lambda: None) is None, "the others are in use"
    cache.clear()
    assert cache.capture(keys[2], lambda: None) is not None and len(cache) == 1


# ---- start


def build(**options: object) -> tuple[dict[str, str], object]:
    rows: dict[str, str] = {}
    settings: dict[str, object] = {
        "dtype": torch.float32,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 48,
        "max_model_len": 64,
        "row": rows.__setitem__,
        **options,
    }
    cache = settings.pop("cache", CacheOptions(page_size=4))
    device = settings.pop("layer", None) or FakeDevice()
    # A model of its own, whose products the start may change.
    executor = build_cuda_executor(tiny_model.__wrapped__(), device, cache, **settings)  # type: ignore[arg-type]
    return rows, executor


async def test_start_measures_and_explains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_start, "has_flashinfer", lambda: False)
    device = FakeDevice()
    device.memory, device.allocated, device.peak = 3 * 2**25, 2**24, 2**25
    rows, executor = build(layer=device, cache=CacheOptions(page_size=4, memory_fraction=0.5), cuda_graph="off")
    # 48 MiB less 16 of activations, in pages of 4 tokens, 2 layers, K and V, 2 heads of 8 floats.
    assert executor.limits.num_pages == 2**25 // (4 * 2 * 2 * 2 * 8 * 4) - 1
    assert "KV cache 0.03" in rows["GPU memory"] and "activations 0.02" in rows["GPU memory"]
    assert "pip install" in rows["attention"]
    driver = Driver(executor)
    assert await driver.run([prefill(1, A)], {1: [3, 2]}, {1: GREEDY}) == continuation(CudaAdapter(), A, 1)
    executor.close()


def test_start_takes_sizes_as_given_and_captures() -> None:
    rows, executor = build(cache=CacheOptions(page_size=4, num_pages=30), cuda_graph="start")
    assert executor.limits.num_pages == 30
    assert "of 15 by our kernel" in rows["products of 1 to 4 rows"]
    decodes, prompts = 2 * len(executor.graphs.sizes), len(executor.pieces.sizes)
    assert rows["CUDA graphs"] == f"{decodes} captured, and {prompts} sizes of steps with prompts" and prompts > 1
    executor.close()


def test_start_without_memory_says_what_to_do() -> None:
    device = FakeDevice()
    device.memory = 2**18
    with pytest.raises(StartupError, match="--max-num-batched-tokens"):
        build(layer=device)


@pytest.mark.parametrize("launches", range(1, 5))
def test_a_start_that_runs_out_of_memory_says_so_in_a_line(launches: int) -> None:
    """At whichever launch: of the largest step, of the first decode step, of the products that are timed."""
    device = FakeDevice()
    device.launches_until_failure = launches
    with pytest.raises(
        StartupError, match=r"^(no memory is left for the largest step|a first decode step fails): "
    ) as e:
        build(layer=device, cache=CacheOptions(page_size=4, num_pages=30))
    assert "out of memory" in str(e.value) and str(e.value).endswith(SMALLER) and "\n" not in str(e.value)


def test_dtypes() -> None:
    assert pick_dtype("auto") == torch.bfloat16 and pick_dtype("float32") == torch.float32
    assert pick_kv_dtype("auto", torch.bfloat16) == torch.bfloat16
    assert pick_kv_dtype("fp8_e4m3", torch.bfloat16) == torch.float8_e4m3fn
    assert pick_kv_dtype("bfloat16", torch.bfloat16) == torch.bfloat16
    for name in ("int8", "float16"):
        with pytest.raises(StartupError, match=f"^--kv-cache-dtype {name}: on a GPU auto, fp8, "):
            pick_kv_dtype(name, torch.bfloat16)


async def test_fp8_cache_stays_close() -> None:
    """Not equal, so only a first token is compared: an e4m3 value is off by up to 1/16."""
    rows, executor = build(cache=CacheOptions(page_size=4, num_pages=30), kv_cache_dtype="fp8")
    assert "float8_e4m3fn" in rows["attention"]
    driver = Driver(executor)
    assert await driver.run([prefill(1, A)], {1: [3, 2, 1]}, {1: GREEDY}) == continuation(CudaAdapter(), A, 1)
    await decode_alone(driver, 4)
    assert len(executor.graphs) == 2
    executor.close()


def test_worst_case_fits_the_budget() -> None:
    executor = make_executor(SMALL)
    executor.run_worst_case()
    executor.close()


# ---- profiling


async def test_a_trace_is_written(tmp_path: Path) -> None:
    executor = make_executor(SMALL)
    driver = Driver(executor)
    assert executor.stop_profile() is None
    executor.start_profile(tmp_path / "traces")
    executor.start_profile(tmp_path / "other")
    assert executor.is_profiling
    await driver.run([prefill(1, A)], {1: [3, 2]}, {1: GREEDY})
    path = executor.stop_profile()
    assert path is not None and path.parent == tmp_path / "traces"
    assert "traceEvents" in json.loads(path.read_text())
    assert not executor.is_profiling
    executor.close()


async def test_states_take_their_part_of_the_memory() -> None:
    model, rows = tiny_model(json.dumps(HYBRID)), dict[str, str]()
    device = FakeDevice()
    device.memory = device.allocated + 2**26

    def built(**cache: Any) -> CUDAExecutor:
        return build_cuda_executor(
            model,
            device,
            CacheOptions(page_size=4, **cache),
            dtype=torch.float32,
            max_num_seqs=4,
            max_num_batched_tokens=48,
            max_model_len=64,
            cuda_graph="off",
            row=rows.__setitem__,
        )

    executor = built(kv_cache_bytes=2**21)
    each = state_bytes(model.config.states, torch.float32)
    count = executor.limits.num_snapshots
    assert count == 2**21 // 4 // each and rows["states"] == describe_states(each, 4, count, 4)
    left = 2**21 - (4 + count) * each
    assert executor.limits.num_pages == left // (4 * 2 * 2 * 8 * 4) - 1
    executor.close()
    with pytest.raises(StartupError, match=r"^the recurrent states of --max-num-seqs 4 take"):
        built(kv_cache_bytes=4 * each)


async def test_states_are_saved_by_a_step_that_fails_before_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a failed step the tables are sent anew, which needs memory."""
    executor = make_executor(dataclasses.replace(SMALL, num_snapshots=2), model=tiny_model(json.dumps(HYBRID)))
    driver, moved = Driver(executor), []
    await driver.run([prefill(1, A)], {1: [1, 2, 3]}, {1: GREEDY})
    states = executor._states
    assert states is not None
    move = states.move

    def noting(step: ForwardInput) -> None:
        moved.append(step.step)
        move(step)

    def without_memory(handle: object) -> None:
        raise torch.OutOfMemoryError("none is left")

    monkeypatch.setattr(states, "move", noting)
    monkeypatch.setattr(executor, "_send_tables", without_memory)
    executor._lost_diffs = True
    with pytest.raises(ForwardError, match="out of device memory"):
        await driver.run([decode(1, len(A))])
    with executor.layer.may_block():
        executor.layer.synchronize_all()
    assert len(moved) == 1
    executor.close()


async def test_a_model_without_an_output_layer() -> None:
    """Its start measures without logits, and vectors are all that is asked of it."""
    model = tiny_model(json.dumps({**TINY, "architectures": ["LlamaModel"]}))
    executor = build_cuda_executor(
        model,
        FakeDevice(),
        CacheOptions(page_size=4, num_pages=30),
        dtype=torch.float32,
        max_num_seqs=4,
        max_num_batched_tokens=48,
        max_model_len=64,
        cuda_graph="off",
    )
    driver = Driver(executor)
    row, pooled = prefill(1, A, samples=False), PooledRow(0, Pooling("mean"), True)
    output = await executor.wait(driver.launch([row], {1: [3, 2]}, {1: GREEDY}, pooled=[pooled]))
    # Dummy weights are a function of names and seed, so the hidden states are those of the whole model.
    np.testing.assert_allclose(
        output.pooled[0], CudaAdapter().reference_vector(A, Pooling("mean")), rtol=1e-4, atol=1e-5
    )
    executor.close()


def test_ranges_name_the_launch() -> None:
    device = FakeDevice()
    executor = make_executor(SMALL, device=device)
    executor.run_worst_case()
    assert "launch" in device.ranges
    executor.close()


def test_the_parts_of_every_layer_are_named_when_asked() -> None:
    device, model = FakeDevice(), tiny_model.__wrapped__()
    executor = make_executor(SMALL, device=device, model=model)
    executor.run_worst_case()
    assert not any(name.startswith("layer") for name in device.ranges)
    model.name_layers(device.range)
    executor.run_worst_case()
    executor.close()
    names = [name for name in device.ranges if name.startswith("layer")]
    assert names == ["layer 0 attention", "layer 0 mlp", "layer 1 attention", "layer 1 mlp"]


@pytest.mark.parametrize(("words", "value"), [([], "off"), (["--nvtx"], "steps"), (["--nvtx", "layers"], "layers")])
def test_the_flag_for_ranges(words: list[str], value: str) -> None:
    assert parse(words)[0].cuda.nvtx == value


def test_staging_is_pinned_and_lies_in_one_block() -> None:
    device = FakeDevice()
    executor = make_executor(SMALL, device=device)
    for staging, side in zip(executor.staging, executor._sides, strict=True):
        for name in ("row_slot", "row_start", "token_ids", "table_index", "table_page", "sampling"):
            array = getattr(staging, name)
            assert side.arena.offset_of(array) % 64 == 0 and not np.any(array["seed"] if array.dtype.names else array)
    executor.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("sampling", "extras"),
    [
        (GREEDY, []),
        (SamplingParams(temperature=1.0, seed=1, top_p=0.9), []),
        (
            SamplingParams(temperature=1.0, seed=1, top_k=5),
            [RowExtras(2, np.array(A[:5], np.int32), 5, 0.0, 0.5, 1.0, (), None, ((5, 6),), 2, None)],
        ),
    ],
    ids=["greedy", "filtered", "open"],
)
async def test_rows_without_numbers_are_named_and_hurt_no_other(
    monkeypatch: pytest.MonkeyPatch, value: float, sampling: SamplingParams, extras: list[RowExtras]
) -> None:
    """In steps with prompts, decode steps and graphs of them; nothing waits for it."""
    device = FakeDevice(3, 0.3)
    executor = make_executor(SMALL, device=device)
    model = executor.model

    def spoiled(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        if value < 0:
            logits[1] = value
        elif len(logits) > 1:
            logits[1, 7] = value
        return logits

    prompts = [A, A[:5], A[2:]]
    expected = [continuation(CudaAdapter(), prompts[index], 6) for index in (0, 2)]  # by the same model, yet unspoiled
    raw, decode_logits = model.raw_logits, model.decode
    monkeypatch.setattr(model, "raw_logits", lambda hidden: spoiled(raw(hidden)))
    monkeypatch.setattr(model, "decode", lambda *given: spoiled(decode_logits(*given)))
    driver, submit = Driver(executor), executor.submit

    def with_extras(forward_input: ForwardInput) -> Any:
        forward_input.extras = extras if forward_input.num_decode_rows == 0 else []
        return submit(forward_input)

    monkeypatch.setattr(executor, "submit", with_extras)
    pages = {1: [1, 2, 3, 4], 2: [5, 6, 7, 8], 3: [9, 10, 11, 12]}
    asked = {1: GREEDY, 2: sampling, 3: GREEDY}
    steps = [[prefill(slot, prompt) for slot, prompt in enumerate(prompts, 1)]]
    steps += [[decode(slot, len(prompt) + more) for slot, prompt in enumerate(prompts, 1)] for more in range(5)]
    found: list[list[int]] = [[], []]
    # Of a row that may not say some things, that nothing is left is not told from that there was nothing.
    told = [] if value < 0 and extras else [1]
    for number, rows in enumerate(steps):
        handle = driver.launch(rows, *((pages, asked) if number == 0 else ()))
        output = await executor.wait(handle)
        assert output.broken == told
        assert (output.token_ids >= 0).all()
        for tokens, token in zip(found, output.token_ids[[0, 2]].tolist(), strict=True):
            tokens.append(token)
    assert device.counts["replay"] > 0
    assert found == expected
    executor.close()


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn])
async def test_pages_of_a_row_without_numbers_are_cleansed(kv_dtype: torch.dtype) -> None:
    """Before others have them, behind a step that was launched meanwhile; what is a number stays."""
    device = FakeDevice(4, 0.2)
    model = tiny_model()
    given: dict[str, Any] = {"num_pages": SMALL.num_pages, "page_size": SMALL.page_size, "dtype": torch.float32}
    attention = DeviceAttention(model.attention_spec, kv_dtype=kv_dtype, device=device.device, **given)
    executor = CUDAExecutor(model, SMALL, device, attention, cuda_graph="lazy")
    driver = Driver(executor)
    await driver.run([prefill(1, A), prefill(2, A)], {1: [1, 2, 3], 2: [4, 5, 6]}, {1: GREEDY, 2: GREEDY})
    pools = [*attention.k_pools.values(), *attention.v_pools.values()]

    def spoil() -> None:
        for pool in pools:
            pool[5, 1] = torch.nan

    with device.on(executor._compute):
        device.launch(spoil)
    first, second = (driver.launch([decode(1, 7 + more), decode(2, 7 + more)]) for more in range(2))
    assert (await executor.wait(first)).broken == [1]
    assert (await executor.wait(second)).broken == [1]
    with device.may_block():
        device.synchronize_all()
    for pool in pools:
        numbers = pool.float()
        assert numbers.isfinite().all()
        # The two rows said the same up to there.
        assert torch.equal(numbers[1], numbers[4]) and torch.equal(numbers[2, 0], numbers[5, 0])
        assert numbers[1].any() and not numbers[5, 1].any() and numbers[2, 1].any()
    executor.close()
