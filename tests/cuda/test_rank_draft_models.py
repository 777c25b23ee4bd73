"""Draft models and heads where several ranks compute one model: each has all of what drafts, all take rank 0's drafts,
and tokens are those of decoding."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import StartupError
from engine.engine import Engine
from engine.executor.cuda_buffers import CudaHandle
from engine.executor.cuda_drafter import Reading
from engine.executor.drafting import Drafting, Eagle3Drafting, ModelDrafting, MtpDrafting
from engine.forward import DeviceLostError, ForwardOutput
from engine.models.offload import _storages as storages_of
from engine.models.parts.decoder import CausalLM, Decoder
from engine.models.registry import read_spec
from engine.ops.device_parallel import DeviceGroup
from engine.request import Request
from engine.speculation.eagle3 import load_eagle3
from engine.speculation.mtp import load_mtp
from tests.cuda import test_host_tier
from tests.cuda.fake_flashinfer import FakeFlashInfer
from tests.cuda.ranked import Machine, load_part, machine
from tests.cuda.support import (
    HYBRID,
    TINY,
    any_shape,
    expected_tokens,
    make_executor,
    requests_of,
    serve,
    tiny_directory,
    tiny_model,
)
from tests.cuda.test_adapters import CAPACITY, adapters_of, expected
from tests.cuda.test_adapters import asked as with_adapters
from tests.cuda.test_draft_heads import CONFIG, WITHOUT, apart, aux_of, of_two_tokens, read_target, target, write_coin
from tests.cuda.test_draft_models import MODEL, OTHER, longer
from tests.cuda.test_failures import asked
from tests.cuda.test_host_tier import ask, prompts
from tests.cuda.test_ranks import Weights, answers, engine_config, poisoned
from tests.sim.workload import Runs
from tests.speculation import test_eagle3 as eagle3
from tests.speculation import test_mtp as mtp

WITH_EAGLE: dict[str, Any] = {"load": functools.partial(load_part, CONFIG), "speculation": MODEL}


def a_model(config: dict[str, Any], *, differs: bool = False) -> Callable[[CausalLM, int], Drafting]:
    """differs: behind rank 0 it has other weights."""

    def drafting(model: CausalLM, rank: int) -> Drafting:
        # A rank's own: its memory moves.
        whole: Any = tiny_model.__wrapped__(json.dumps(config))
        if rank and differs:
            whole._embedding._weight.copy_(whole._embedding._weight.flip(0))
        vocab_size = model.config.vocab_size
        return ModelDrafting(MODEL, tiny_directory(), tiny_directory(), vocab_size, whole, 64)

    return drafting


def a_head(directory: Path) -> Callable[[CausalLM, int], Drafting]:
    def drafting(model: CausalLM, rank: int) -> Drafting:
        assert isinstance(model, Decoder)
        return Eagle3Drafting(MODEL, directory, load_eagle3(directory, model, torch.float32, 96), 64)

    return drafting


class Seen:
    """What a machine's ranks have drafted. told: by rank, of each step with drafts those that it took, by row; counts:
    drafts, those that were right, and steps whose drafts the host saw as they ran; said: texts, and what was drafted
    behind them."""

    def __init__(self, made: Machine) -> None:
        self.told: list[list[tuple[int, dict[int, int]]]] = [[] for _ in made.executors]
        self.counts: Counter[str] = Counter()
        self.said: list[tuple[list[int], list[int]]] = []
        for told, executor in zip(self.told, made.executors, strict=True):
            executor._output_of = functools.partial(self._note, told, executor._output_of)
        made.leader._follow = functools.partial(self._follow, made.leader, made.leader._follow)  # type: ignore

    def _note(self, told: list[Any], output_of: Any, handle: CudaHandle) -> ForwardOutput:
        output: ForwardOutput = output_of(handle)
        if handle.told:
            told.append((handle.step, dict(handle.told)))
        return output

    def _follow(self, leader: Any, follow: Any, handle: CudaHandle, output: ForwardOutput) -> None:
        behind: dict[int, list[int]] = {}
        if isinstance(handle.reading, Reading) and handle.told:
            for (_, slot, _), token in zip(handle.reading.spots, handle.told.values(), strict=True):
                behind.setdefault(slot, []).append(token)
        self.said += [(list(leader._speculator._texts[slot].tokens), drafts) for slot, drafts in behind.items()]
        self.counts["early"] += handle.early is not None
        follow(handle, output)
        if output.accepted is not None:
            self.counts["drafted"] += int(output.accepted.num_drafted.sum())
            self.counts["accepted"] += int(output.accepted.counts.sum()) - len(output.accepted.counts)

    def check(self) -> None:
        """The others are at most a step behind, which nobody has asked them for."""
        first, *others = self.told
        assert len(first) > 5
        for told in others:
            assert len(told) >= len(first) - 1
            assert told == first[: len(told)], "ranks took different drafts"


@pytest.mark.parametrize(("size", "mode"), [(2, "lazy"), (2, "off"), (4, "lazy"), (2, "start")])
async def test_a_model_that_drafts_for_itself_is_always_right(size: int, mode: str) -> None:
    requests = longer(requests_of(size), temperature=0.0)
    with machine(size, speculation=MODEL, seed=size, cuda_graph=mode, drafting=a_model(TINY)) as made:
        seen = Seen(made)
        tokens = await asyncio.wait_for(serve(made.leader, requests, speculation=MODEL), 300)
        assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
        assert seen.counts["accepted"] == seen.counts["drafted"] > 40
        seen.check()
        [replays] = {executor._drafter.graphs.num_replays for executor in made.executors}
        assert (replays > 0) == (mode != "off")
        assert not any(executor._speculator for executor in made.executors[1:])


async def test_by_flashinfer_of_a_model_that_is_mostly_wrong() -> None:
    requests = longer(requests_of(3))
    module = functools.partial(FakeFlashInfer, strict=False)
    with any_shape(), machine(2, speculation=MODEL, seed=1, module=module, drafting=a_model(OTHER)) as made:
        seen = Seen(made)
        tokens = await asyncio.wait_for(serve(made.leader, requests, speculation=MODEL), 300)
        assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
        assert seen.counts["drafted"] > seen.counts["accepted"]
        seen.check()


async def test_drawn_drafts_have_the_noise_of_the_target() -> None:
    requests = longer(requests_of(5), temperature=1.5)
    options = dataclasses.replace(MODEL, draft_sample_method="probabilistic")

    def drafting(model: CausalLM, rank: int) -> Drafting:
        return dataclasses.replace(a_model(TINY)(model, rank), options=options)  # type: ignore[type-var]

    with machine(2, speculation=options, seed=3, drafting=drafting) as made:
        seen = Seen(made)
        tokens = await asyncio.wait_for(serve(made.leader, requests, speculation=options), 300)
        assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
        assert seen.counts["accepted"] == seen.counts["drafted"] > 20
        seen.check()


async def of_two_minds() -> list[bool]:
    """A rank whose draft model has other weights than rank 0's, as one whose kernels round otherwise might: whether
    tokens are right, and drafts the same in both."""
    requests = longer(requests_of(6))
    with machine(2, speculation=MODEL, seed=4, drafting=a_model(TINY, differs=True)) as made:
        seen = Seen(made)
        tokens = await asyncio.wait_for(serve(made.leader, requests, speculation=MODEL), 300)
        right = tokens == [expected_tokens(tiny_model(), request) for request in requests]
        assert seen.counts["drafted"] > 20
        try:
            seen.check()
        except AssertionError:
            return [right, False]
        return [right, True]


async def test_all_take_the_drafts_of_the_first() -> None:
    assert await of_two_minds() == [True, True]


async def test_who_takes_its_own_drafts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceGroup, "taken_of_first", lambda self, x: x)
    assert await of_two_minds() == [False, False]


# ---- heads


@pytest.mark.parametrize(("size", "own"), [(2, True), (2, False), (4, False)])
async def test_drafts_of_a_head_are_those_of_the_formulas(
    size: int, own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """own: it has an embedding of its own; else it asks for the model's, which is divided."""
    if not own:
        monkeypatch.setattr(eagle3, "HIDDEN", eagle3.WIDTH)
        monkeypatch.setitem(eagle3.CONFIG, "hidden_size", eagle3.WIDTH)
    _, tensors = eagle3.write_head(tmp_path, "plain", norm_before_residual=False)
    if not own:
        eagle3.save_file({k: v for k, v in tensors.items() if "embed" not in k}, tmp_path / "model.safetensors")
        tensors["embed_tokens.weight"] = target()._embedding._weight  # type: ignore[attr-defined]
    requests = apart(longer(requests_of(size)))
    with machine(size, seed=size, drafting=a_head(tmp_path), **WITH_EAGLE) as made:
        seen = Seen(made)
        tokens = await asyncio.wait_for(serve(made.leader, requests, speculation=MODEL), 300)
        assert tokens == [expected_tokens(tiny_model(CONFIG), request) for request in requests]
        seen.check()
    assert len(seen.said) > 10
    for text, drafts in seen.said:
        with torch.inference_mode():
            aux = aux_of(tuple(text[:-1]))
            assert drafts == eagle3.expected_drafts(tensors, aux, text, len(drafts), norm_before_residual=False)


async def test_a_head_behind_drafts_that_came_true(tmp_path: Path) -> None:
    write_coin(tmp_path)
    requests = of_two_tokens(1)
    alone = await serve(make_executor(WITHOUT, model=target()), requests)
    with machine(2, seed=5, drafting=a_head(tmp_path), **WITH_EAGLE) as made:
        seen = Seen(made)
        assert await asyncio.wait_for(serve(made.leader, requests, speculation=MODEL), 300) == alone
        assert seen.counts["drafted"] > seen.counts["accepted"] > 20
        seen.check()


@pytest.mark.parametrize(("family", "copies"), [("deepseek", "equal"), ("glm", "own"), ("mimo", ""), ("glm", "equal")])
async def test_drafts_of_layers_that_checkpoints_bring(
    family: str, copies: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole in every rank, beside a model of which each has a part; embedding and output layer may be that one's."""
    if family != "mimo":
        monkeypatch.setitem(mtp.FAMILIES[family][1], "first_k_dense_replace", mtp.LAYERS + 1)
    theirs, parts = mtp.write(tmp_path, family, copies=copies)
    requests = apart(longer(requests_of(1)))
    alone = await serve(make_executor(WITHOUT, model=read_target(tmp_path)), requests)

    def part(group: Any, directory: Path | None) -> CausalLM:
        return load_part("", group, tmp_path, max_model_len=64)

    def drafting(model: CausalLM, rank: int) -> Drafting:
        assert isinstance(model, Decoder)
        layers = read_spec(tmp_path).layers
        head = load_mtp(tmp_path, model, torch.float32, 64, layers=layers)
        return MtpDrafting(tmp_path, "", head, 64)

    with machine(2, seed=1, load=part, speculation=MODEL, drafting=drafting) as made:
        seen = Seen(made)
        assert await asyncio.wait_for(serve(made.leader, requests, speculation=MODEL), 300) == alone
        seen.check()
    assert len(seen.said) > 10
    for text, drafts in seen.said[::3]:
        with torch.inference_mode():
            assert drafts == mtp.expected_drafts(family, theirs, parts, text, len(drafts))


# ---- beside what else there is


async def test_with_what_looks_at_the_text() -> None:
    """Grammars whose masks come when the host has seen the drafts, penalties, log-probabilities, filters."""

    def requests() -> list[Request]:
        grammar = [Runs(number, 101, free=1, run=2, length=12) for number in range(3)]
        return asked(extras=True) + [
            dataclasses.replace(each, request_id=f"g{number}", constraint=runs)
            for number, (each, runs) in enumerate(zip(requests_of(8, 3), grammar, strict=True))
        ]

    with machine(2, seed=1) as made:
        alone = await serve(made.leader, requests())
    with machine(2, speculation=MODEL, seed=1, drafting=a_model(TINY)) as made:
        seen = Seen(made)
        assert await asyncio.wait_for(serve(made.leader, requests(), speculation=MODEL), 300) == alone
        assert seen.counts["accepted"] > 10 and seen.counts["early"] > 2
        seen.check()


async def test_for_a_model_with_states() -> None:
    requests = longer(requests_of(5, 4))
    with machine(2, config=HYBRID, seed=2) as made:
        alone = await serve(made.leader, requests)
    with machine(2, config=HYBRID, speculation=MODEL, seed=2, drafting=a_model(TINY)) as made:
        seen = Seen(made)
        assert await asyncio.wait_for(serve(made.leader, requests, speculation=MODEL), 300) == alone
        assert seen.counts["drafted"]
        seen.check()


async def test_with_adapters(tmp_path: Path) -> None:
    """Drafts are the model's without any."""
    load = functools.partial(load_part, json.dumps(TINY), max_adapters=CAPACITY)
    options: dict[str, Any] = {"load": load, "max_lora_rank": 8, "speculation": MODEL, "drafting": a_model(TINY)}
    with machine(2, seed=6, **options) as made:
        seen = Seen(made)
        requests = longer(with_adapters(adapters_of("llama", made.leader, tmp_path), 2))
        tokens = await asyncio.wait_for(serve(made.leader, requests, speculation=MODEL), 300)
        assert tokens == [expected("llama", request) for request in requests]
        assert seen.counts["drafted"] > seen.counts["accepted"] > 0
        seen.check()


async def test_what_is_no_number_is_in_no_ranks_pages() -> None:
    """Neither of the model nor of what drafts for it."""
    requests = [dataclasses.replace(each, prompt_token_ids=[5, 9 + n]) for n, each in enumerate(longer(requests_of(1)))]
    broken = [
        dataclasses.replace(each, request_id=f"broken {n}", prompt_token_ids=[8, 7, n])
        for n, each in enumerate(requests[:3])
    ]

    def drafting(model: CausalLM, rank: int) -> Drafting:
        found: Any = a_model(TINY)(model, rank)
        found.model._embedding._weight[7] = torch.nan
        return found  # type: ignore[no-any-return]

    with machine(2, load=poisoned, speculation=MODEL, seed=7, drafting=drafting) as made:
        seen = Seen(made)
        tokens = await asyncio.wait_for(serve(made.leader, [*broken, *requests], speculation=MODEL), 300)
        assert seen.counts["drafted"] and tokens[:3] == [[], [], []]
        for found, request in zip(tokens[3:], requests, strict=True):
            answer = expected_tokens(tiny_model(), request)
            assert found == answer or found == answer[: answer.index(7) + 1]
        with made.devices[0].may_block(), made.devices[1].may_block():
            for device in made.devices:
                device.synchronize_all()
        for executor in made.executors:
            for layer in (executor.attention, executor._drafter.attention):
                assert all(pool.isfinite().all() for pool in [*layer.k_pools.values(), *layer.v_pools.values()])


# ---- memory, failures, messages


async def test_pages_of_drafts_leave_the_devices_and_come_back() -> None:
    """The model drafts for itself: it is always right where all that it has read is there again."""
    requests = [ask(number, prompt, 9) for number, prompt in enumerate(prompts(4, 7))]
    with machine(2, speculation=MODEL, seed=9, num_pages=28, drafting=a_model(TINY)) as made:
        seen = Seen(made)
        async with test_host_tier.running(made.leader, speculation=MODEL) as engine:
            assert await test_host_tier.answers(engine, requests, 1) == [
                expected_tokens(tiny_model(), one) for one in requests
            ]
            assert engine.tier is not None and engine.tier.tally.hit_tokens > 40
        assert seen.counts["accepted"] == seen.counts["drafted"] > 20
        seen.check()


async def test_sleep_and_other_weights() -> None:
    """What drafts sleeps with the model in every rank, and drafts for whatever model there is then."""
    with machine(2, load=Weights(), speculation=MODEL, seed=8, drafting=a_model(TINY)) as made:
        config = dataclasses.replace(engine_config(), speculation=MODEL)
        engine, seen = Engine(config, made.leader, None), Seen(made)
        loop_task = asyncio.create_task(engine.run())
        requests = longer(requests_of(1, 3), temperature=0.0)
        first = await answers(engine, requests)
        for level in (1, 2):
            drafted = seen.counts["drafted"]
            await engine.sleep(level)
            for executor in made.executors:
                assert not any(storage.nbytes() for storage in storages_of(executor._drafter.net.weights))
                assert not executor._drafter.attention.buffers
            await engine.wake_up()
            assert await answers(engine, requests) == first
            assert seen.counts["drafted"] > drafted
        with pytest.raises(StartupError, match="rank 1 cannot read them"):
            await engine.load_weights(Path("broken"))
        assert await answers(engine, requests) == first
        await engine.load_weights(Path("other"))
        assert await answers(engine, requests) != first
        seen.check()
        loop_task.cancel()
        await asyncio.gather(loop_task, return_exceptions=True)


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("how", ["launch", "device"])
async def test_drafts_that_fail_in_one_rank_end_all(where: int, how: str) -> None:
    made = Machine(2, speculation=MODEL, drafting=a_model(TINY))
    device, executor = made.devices[where], made.executors[where]
    begin, calls = executor._launch_drafts, Counter[str]()

    def failing(*given: Any) -> None:
        calls["drafts"] += 1
        if calls["drafts"] == 3 and how == "launch":
            device.launches_until_failure = 1
        elif calls["drafts"] == 3:
            device.fail("an illegal address")
        begin(*given)

    executor._launch_drafts = failing
    with pytest.raises(DeviceLostError):
        await asyncio.wait_for(serve(made.leader, longer(requests_of(1)), speculation=MODEL), 300)
    assert calls["drafts"] >= 3
    made.threads[0].join(300)
    assert not any(thread.is_alive() for thread in made.threads)
    made.leader.close()


async def test_a_graph_of_drafts_that_one_rank_cannot_capture_is_captured_by_none(tmp_path: Path) -> None:
    """It may hold sums of all ranks: a head's, of the model's embedding."""
    from engine.executor.cuda_device import CaptureError

    with machine(2, speculation=MODEL, drafting=a_model(TINY)) as made:
        drafter = made.executors[1]._drafter

        def refuse(work: Any) -> Any:
            raise CaptureError("no")

        drafter.graphs._layer = _Refusing(drafter.graphs._layer, refuse)
        requests = longer(requests_of(2))
        tokens = await asyncio.wait_for(serve(made.leader, requests, speculation=MODEL), 300)
        assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
        assert [len(executor._drafter.graphs) for executor in made.executors] == [0, 0]


class _Refusing:
    def __init__(self, layer: Any, capture: Any) -> None:
        self._layer, self.capture = layer, capture

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def test_a_reading_is_the_same_in_another_rank() -> None:
    rows = [(3, 17, 99, 0), (3, 18, 5, 4), (1, 2, 3, 1)]
    reading = Reading(rows, {3: 4, 1: 1}, 23, [(5, 3, 0), (6, 3, 1), (9, 1, 0)])
    for each in (reading, Reading(rows), Reading(rows, {3: 4})):
        words = each.words()
        assert words.dtype == np.int32 and Reading.of_words(words) == each
