"""Ranks on GPUs, each a fake device: what one rank computes, all together compute, and they stay in step."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import SchedulerOptions, StartupError
from engine.distributed import steps
from engine.distributed.ring import PLACE_BYTES, Ring
from engine.engine import Engine
from engine.executor.cpu import CPUExecutor
from engine.executor.cuda_device import CaptureError
from engine.executor.cuda_start import coded_matrices
from engine.forward import DeviceLostError, ForwardInput, PooledRow, RowExtras, Staging, TokenMasks
from engine.models.loading.load import load_model
from engine.models.registry import read_spec
from engine.ops import device_coded
from engine.ops.device_parallel import Sums
from engine.request import Pooling, Request, SamplingParams
from tests.cuda.fake_device import FakeDevice
from tests.cuda.fake_flashinfer import FakeFlashInfer
from tests.cuda.ranked import Machine, Meeting, load_part, machine
from tests.cuda.support import (
    HYBRID,
    LATENT,
    SMALL,
    TINY,
    WINDOWED,
    any_shape,
    expected_tokens,
    make_executor,
    requests_of,
    serve,
    tiny_model,
)
from tests.cuda.test_encoders import ENCODERS, LIMITS, vectors
from tests.cuda.test_failures import asked
from tests.distributed.together import together
from tests.models.support import make_checkpoint
from tests.sim.workload import Runs

CHOICE = {"num_experts_per_tok": 2, "head_dim": 16}
MOE = {**CHOICE, "num_experts": 4, "moe_intermediate_size": 64}
FUSED = {**CHOICE, "num_local_experts": 4, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1}
CLAMPED = {**CHOICE, "num_local_experts": 4, "sliding_window": 9}


CHECKPOINTS: dict[str, dict[str, Any]] = {"Qwen3Moe": MOE, "Llama4": FUSED, "GptOss": CLAMPED, "Llama": {}}


async def tokens_of(made: Machine, seed: int = 1, config: dict[str, Any] = TINY) -> None:
    requests, model = requests_of(seed), tiny_model(json.dumps(config))
    expected = [expected_tokens(model, request) for request in requests]
    assert await serve(made.leader, requests) == expected


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", ["off", "lazy", "start"])
async def test_the_tokens_of_one_rank(size: int, mode: str) -> None:
    with machine(size, cuda_graph=mode) as made:
        await tokens_of(made)
        replays = [executor.graphs.num_replays for executor in made.executors]
        captures = [device.counts["capture"] for device in made.devices]
    assert len(set(replays)) == 1 and (replays[0] > 0) == (mode != "off")
    assert mode == "off" or min(captures) > 0


@pytest.mark.parametrize("config", [WINDOWED, LATENT, HYBRID], ids=["windows", "latents", "states"])
async def test_other_layers(config: dict[str, Any]) -> None:
    with machine(2, config=config, seed=3) as made:
        await tokens_of(made, 2, config)


@pytest.mark.parametrize(
    ("name", "sizes", "quantisation", "whole_experts"),
    [(name, sizes, kept, False) for name, sizes in CHECKPOINTS.items() for kept in (None, "int4")]
    + [("Qwen3Moe", MOE, "int4", True), ("Llama4", FUSED, None, True), ("GptOss", CLAMPED, None, True)],
)
async def test_checkpoints_as_gpus_hold_them(
    name: str,
    sizes: dict[str, Any],
    quantisation: str | None,
    whole_experts: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Experts in stacks of which each rank has a part, or some whole, biases that are added once, and weights that stay
    codes."""
    monkeypatch.setattr("engine.models.parts.experts.keeps_experts_stacked", lambda device: True)
    monkeypatch.setattr("engine.ops.device_coded.forms_kept", lambda dtype, device: device_coded.FORMS)
    given = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    make_checkpoint(tmp_path, name, vocab_size=101, num_key_value_heads=2, **(given | sizes))
    options: dict[str, Any] = {"load_format": "auto", "quantisation": quantisation}
    load = functools.partial(load_model, read_spec(tmp_path), tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    whole = load(max_model_len=256, **options)

    def part(group: Any, directory: Path | None) -> Any:
        return load_part("", group, tmp_path, **options)

    with machine(2, load=part, expert_parallel=whole_experts) as made:
        counts = {mixture.count for mixture in made.leader.model.mixtures}
        assert counts == (set() if name == "Llama" else {2 if whole_experts else 4})
        assert quantisation is None or sum(coded_matrices(made.leader.model).values())
        requests = requests_of(2)
        assert await serve(made.leader, requests) == [expected_tokens(whole, request) for request in requests]


@pytest.mark.parametrize("name", ENCODERS)
async def test_the_vectors_of_one_rank(name: str) -> None:
    config = ENCODERS[name]
    model = tiny_model.__wrapped__(json.dumps(config), 64)
    classify = model.config.classifier is not None
    reference = CPUExecutor(model, LIMITS, dtype=torch.float32)
    expected = await vectors(reference, classify)
    reference.close()
    load = functools.partial(load_part, json.dumps(config), max_model_len=64)
    with machine(2, load=load, encoder=LIMITS) as made:
        found = await vectors(made.leader, classify)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [1, 2])
async def test_by_flashinfer(seed: int) -> None:
    with any_shape(), machine(2, seed=seed, module=functools.partial(FakeFlashInfer, strict=False)) as made:
        await tokens_of(made, seed)


async def test_penalties_grammars_and_log_probabilities() -> None:
    def requests() -> list[Request]:
        grammar = [Runs(number, 101, free=1, run=2, length=9) for number in range(2)]
        plain = requests_of(8, 2)
        return asked(extras=True) + [
            dataclasses.replace(each, request_id=f"g{number}", constraint=runs)
            for number, (each, runs) in enumerate(zip(plain, grammar, strict=True))
        ]

    expected = await serve(make_executor(SMALL), requests())
    with machine(2) as made:
        assert await serve(made.leader, requests()) == expected
        assert not made.leader._awaited


def poisoned(group: Any, directory: Path | None) -> Any:
    """A rank's part of a model to which token 7 is no numbers."""
    model = load_part(json.dumps(TINY), group)
    embedding = model._embedding
    if 0 <= 7 - embedding._first < embedding.own.out_features:
        embedding.own._weight[7 - embedding._first] = torch.nan
    return model


def noted(executor: Any) -> list[tuple[str, int]]:
    """In what order it launches steps, and cleans up behind them."""
    order: list[tuple[str, int]] = []
    launch, cleanse = executor._launch, executor._cleanse

    def launching(given: ForwardInput, *rest: Any) -> None:
        order.append(("launch", given.step))
        launch(given, *rest)

    def cleansing(handle: Any, rows: list[int]) -> None:
        order.append(("cleanse", handle.step))
        cleanse(handle, rows)

    executor._launch, executor._cleanse = launching, cleansing
    return order


async def test_what_is_no_number_is_out_of_all_ranks_pages_before_others_have_them() -> None:
    """One goes on from page to page while others fail beside it, whose pages are the next to be had."""
    with machine(2, load=poisoned, cuda_graph="off") as made:
        config = dataclasses.replace(engine_config(), scheduler=SchedulerOptions(overlap=False))
        engine = Engine(config, made.leader, None)
        orders: list[list[tuple[str, int]]] = [noted(executor) for executor in made.executors]
        loop_task = asyncio.create_task(engine.run())
        greedy = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        sound = Request("sound", [5, 9], dataclasses.replace(greedy, max_tokens=40))
        asking = asyncio.create_task(answers(engine, [sound]))
        errors: list[str | None] = []
        while not asking.done():
            async with engine.submit(Request(f"broken {len(errors)}", [7] * 10, greedy)) as stream:
                errors.append((await stream.collect()).error)
        tokens = await asking
        loop_task.cancel()
        await asyncio.gather(loop_task, return_exceptions=True)
        assert len(errors) > 4 and None not in errors
        # But for the last one, which waits for the next step.
        assert all(order == orders[0][: len(order)] and len(order) > 40 for order in orders)
        assert tokens == [expected_tokens(tiny_model(json.dumps(TINY)), sound)]


async def test_sleep_and_other_weights() -> None:
    """As one server would: level 1, level 2, weights that only one rank cannot read, others."""
    with machine(2, load=Weights()) as made:
        engine = Engine(engine_config(), made.leader, None)
        loop_task = asyncio.create_task(engine.run())
        requests = requests_of(1, 3)
        first = await answers(engine, requests)
        for level in (1, 2):
            await engine.sleep(level)
            await engine.wake_up()
            assert await answers(engine, requests) == first
        with pytest.raises(StartupError, match="rank 1 cannot read them"):
            await engine.load_weights(Path("broken"))
        assert await answers(engine, requests) == first
        await engine.load_weights(Path("other"))
        assert await answers(engine, requests) != first
        assert not made.errors
        loop_task.cancel()
        await asyncio.gather(loop_task, return_exceptions=True)


class Weights:
    """Reads by the name of the directory."""

    def __call__(self, group: Any, directory: Path | None) -> Any:
        if directory == Path("broken") and group.rank == 1:
            raise StartupError("rank 1 cannot read them")
        return load_part(json.dumps(TINY), group, seed=3 if directory is None else 4)


def engine_config() -> Any:
    from engine.config import EngineConfig, StreamOptions

    return EngineConfig(stream=StreamOptions(flush_interval_ms=0.0))


async def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    async def one(request: Request) -> list[int]:
        async with engine.submit(request) as stream:
            return [token async for delta in stream for token in delta.token_ids]

    return await asyncio.gather(*map(one, requests))


async def test_the_least_memory_decides() -> None:
    with machine(2, memories=[2**24, 2**23], cuda_graph="off") as made:
        pages = {executor.limits.num_pages for executor in made.executors}
        await tokens_of(made)
    with machine(2, memories=[2**23, 2**23], cuda_graph="off") as made:
        assert {executor.limits.num_pages for executor in made.executors} == pages
        await tokens_of(made)


async def test_a_graph_that_one_rank_cannot_capture_is_captured_by_none() -> None:
    with machine(2) as made:
        device = made.devices[1]

        def refuse(work: Any) -> Any:
            raise CaptureError("no")

        device.capture_parts = refuse  # type: ignore[method-assign]
        await tokens_of(made)
        assert [len(executor.graphs) for executor in made.executors] == [0, 0]


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("how", ["launch", "device"])
async def test_a_step_that_fails_in_one_rank_ends_all(where: int, how: str) -> None:
    made = Machine(2)
    device, executor = made.devices[where], made.executors[where]
    begin = executor._launch

    def failing(given: ForwardInput, *rest: Any) -> None:
        if given.step == 3 and how == "launch":
            device.launches_until_failure = 1
        if given.step == 3 and how == "device":
            with device.on(executor._compute):
                device.fail("an illegal address")
        begin(given, *rest)

    executor._launch = failing
    with pytest.raises(DeviceLostError):
        await asyncio.wait_for(serve(made.leader, requests_of(1)), 300)
    made.threads[0].join(300)
    assert not any(thread.is_alive() for thread in made.threads)


def test_who_waits_for_an_event_finds_a_record_with_its_work_or_neither() -> None:
    """As the thread that watches a rank's device, while its executor records the event of a later step."""
    device = FakeDevice(1, 0.0)
    stream, event = device.stream(), device.event()
    entered = threading.Event()
    device._may_issue = entered.set  # type: ignore[method-assign]

    def issue() -> None:
        with device.on(stream):
            device.record(event)

    thread = threading.Thread(target=issue)
    with device.may_block():
        with device._lock:
            thread.start()
            entered.wait()
            thread.join(0.05)  # as far as it comes without the lock
            device.synchronize(event)
            assert (event.recorded, event.completed) == (0, 0)
        thread.join()
        device.synchronize(event)
    assert (event.recorded, event.completed) == (1, 1)


def test_the_bits_of_a_sum_do_not_depend_on_the_batch() -> None:
    """Three ranks, whose sums go both ways: gathered whole, and by shares of the rows."""
    meeting, rows = Meeting(3), 701
    parts = torch.randn(3, rows, 256, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(256, generator=torch.Generator().manual_seed(2))

    class Plain:
        size = 3

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def gather(self, out: torch.Tensor, x: torch.Tensor) -> None:
            out.view(3, -1).copy_(torch.stack(meeting.meet(self.rank, "gather", x.reshape(-1))))

        def exchange(self, out: torch.Tensor, x: torch.Tensor) -> None:
            out.copy_(torch.stack([each[self.rank] for each in meeting.meet(self.rank, "exchange", x)]))

    found: list[list[torch.Tensor]] = [[], [], []]

    def run(rank: int) -> None:
        sums = Sums(Plain(rank))
        for given in (None, bias):
            found[rank] += [sums.sum(parts[rank], given), sums.sum(parts[rank, 5:6], given)]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {kind for kind, _, _ in meeting.issued[0]} == {"gather", "exchange"}
    for whole, one, given in ((0, 1, 0.0), (2, 3, bias)):
        expected = (parts[0] + parts[1]) + parts[2] + given
        for rank in range(3):
            assert torch.equal(found[rank][whole], expected)
            assert torch.equal(found[rank][one], expected[5:6])


def test_messages_of_any_length_and_words_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.ops.native._disabled", 0)
    sizes = [0, 1, PLACE_BYTES, 3 * PLACE_BYTES + 5, 17, 18, 19]
    sent = [np.random.default_rng(size).integers(0, 256, size, np.uint8) for size in sizes]

    def work(ranks: Any) -> Any:
        ring, said = Ring(ranks), []
        for number, each in enumerate(sent):
            if ring.rank == 0:
                ring.send([each[:3], each[3:]])
            else:
                assert np.array_equal(ring.receive(), each)
            if number % 3 == 1:
                said.append(ring.exchange([ring.rank, number]))
        return said

    for said in together(3, work, slot=4096, logits=4 << 20):
        assert said == [[[rank, number] for rank in range(3)] for number in (1, 4)]


def test_a_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.ops.native._disabled", 0)

    def work(ranks: Any) -> Any:
        ring = Ring(ranks)
        ring.exchange(None)
        if ring.rank == 1:
            ring.end("it is over: ü")
            return None
        with pytest.raises(Exception, match="the ranks have ended"):
            ring.exchange(None)
        return ring.last_word()

    assert together(2, work, slot=4096, logits=4 << 20) == ["it is over: ü", None]


def test_a_step_is_the_same_in_another_rank() -> None:
    limits = dataclasses.replace(SMALL, num_snapshots=3)
    here, there = Staging(limits), Staging(limits)
    random = np.random.default_rng(1)
    for staging in (here, there):
        for name in vars(staging):
            if isinstance(array := getattr(staging, name), np.ndarray):
                array.view(np.uint8)[:] = random.integers(0, 2, array.nbytes, np.uint8)
    here.reserve_table_diff(5000)
    history = np.arange(9, dtype=np.int32)
    extras = RowExtras(2, history, 4, 0.1, -0.3, 1.7, ((5, -0.25),), (1, 2), ((3,), (4, 5)), 2, None)
    masks = TokenMasks([0, 2], limits.vocab_size)
    masks.bits[:] = random.integers(0, 2**32, masks.bits.shape, np.uint32)
    masks.release()
    pooled = [PooledRow(1, Pooling("logprobs", token_ids=(3, 4)), True)]
    step = ForwardInput(7, here, 3, 1, 20, 5000, 2, [extras], masks, pooled, num_saves=4, num_loads=2)
    reading = np.array([9, 0, 0, 0], np.int32)
    told_of = steps.Told(3, 1, [(2, 5), (1, 0)], [3, 4], [1, 1, 2], [2], reading)
    message, awaits = steps.write_step(step, told_of)
    assert not awaits
    told = np.concatenate(message)
    assert steps.kind_of(told) == steps.STEP and steps.side_of(told) == 3 and steps.num_ahead(told) == 1
    found, said = steps.read_step(told, there)
    assert said.reading is not None and np.array_equal(said.reading, reading)
    assert dataclasses.replace(said, reading=None) == steps.Told(3, 1, [[2, 5], [1, 0]], [3, 4], [1, 1, 2], [2])
    for name, length in steps._lengths(step).items():
        assert np.array_equal(getattr(here, name)[:length], getattr(there, name)[:length]), name
    same = ("step", "num_rows", "num_decode_rows", "num_tokens", "num_table_diffs", "num_sampling_diffs", "num_saves")
    assert all(getattr(found, name) == getattr(step, name) for name in (*same, "num_loads", "pooled"))
    [other] = found.extras
    assert np.array_equal(other.history, history)
    plain = [dataclasses.replace(each, history=history) for each in (extras, other)]
    assert all(getattr(plain[0], f.name) == getattr(plain[1], f.name) for f in dataclasses.fields(RowExtras)[2:])
    assert found.masks is not None and found.masks.is_ready
    assert np.array_equal(found.masks.bits, masks.bits) and found.masks.rows.tolist() == [0, 2]
    later = TokenMasks([0, 2], limits.vocab_size)
    message, awaits = steps.write_step(dataclasses.replace(step, masks=later), steps.Told(0, 0))
    assert awaits
    found, _ = steps.read_step(np.concatenate(message), there)
    assert found.masks is not None and not found.masks.is_ready
    steps.read_masks(np.concatenate(steps.write_masks(masks)), found.masks)
    assert np.array_equal(found.masks.bits, masks.bits)
