"""LoRA adapters where several ranks compute one model: each has a part of every one, and tokens are those of one."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig, LoraOptions, StreamOptions
from engine.engine import Engine
from engine.lora.reader import read_adapter
from engine.lora.words import AdapterError
from engine.models.loading.adapted import AdaptedLayers
from engine.models.parts.decoder import CausalLM
from engine.request import Adapter
from tests.cuda import test_adapter_kinds
from tests.cuda.ranked import Machine, load_part, machine
from tests.cuda.support import TINY, expected_tokens, requests_of, serve, tiny_model
from tests.cuda.test_adapters import CAPACITY, asked, in_layers
from tests.lora.handmade import PREFIX, factors, write

# One matrix for queries, keys and values, and one for gates and what they multiply.
FUSED = {**TINY, "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}
# Biases of queries, of what is added up over the ranks, and of a feed-forward without gates.
BIASED = {**TINY, "architectures": ["Starcoder2ForCausalLM"], "norm_epsilon": 1e-5, "hidden_act": "gelu"}

Some = Callable[[AdaptedLayers, int], tuple[dict[str, torch.Tensor], dict[str, Any]]]


def ranked(size: int, config: dict[str, Any], **options: Any) -> Any:
    load = functools.partial(load_part, json.dumps(config), max_adapters=CAPACITY)
    return machine(size, load=load, max_lora_rank=16, **options)


def layers_of(model: CausalLM) -> AdaptedLayers:
    assert isinstance(model.adapted, AdaptedLayers)
    return model.adapted


def whole(config: dict[str, Any]) -> CausalLM:
    return tiny_model.__wrapped__(json.dumps(config), max_adapters=CAPACITY)


def taken(made: Machine, path: Path, number: int) -> Adapter:
    weights = made.leader.read_adapter(path)
    return Adapter(path.name, str(path), number, weights.rank, weights.num_bytes, weights, weights.digest)


async def agree(made: Machine, models: list[CausalLM], some: Some, folder: Path, seed: int) -> None:
    """Three adapters with room for two, and rows of none: as one process has them, which reads and adds on the host."""
    adapters = []
    for number in (1, 2, 3):
        layers = layers_of(models[number])
        tensors, values = some(layers, number)
        path = write(folder / f"a{number}", tensors, **values)
        layers.put(1, read_adapter(path, layers, 16).branches)
        layers.rows.use(1)
        adapters.append(await asyncio.to_thread(taken, made, path, number))
    requests = asked(adapters, seed)
    tokens = await asyncio.wait_for(serve(made.leader, requests), 300)
    for request, got in zip(requests, tokens, strict=True):
        version = 0 if request.adapter is None else request.adapter.version
        assert got == expected_tokens(models[version], request), version


def plain(layers: AdaptedLayers, number: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Factors of all layers, of some, or of all but queries."""
    modules = {1: in_layers(layers), 2: in_layers(layers)[::2], 3: [m for m in in_layers(layers) if "q_proj" not in m]}
    rank = 2 + number
    return factors(layers, rank, number, modules[number]), {"r": rank, "lora_alpha": 2 * rank}


def around(layers: AdaptedLayers, number: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return test_adapter_kinds.around(number)


def magnitudes(layers: AdaptedLayers, number: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """DoRA, biases in place of the base's and biases of factors, each at layers of both kinds of division."""
    generator, modules, rank = torch.Generator().manual_seed(number), in_layers(layers), 2 + number
    tensors = factors(layers, rank, number, modules)
    for name in modules:
        count = layers.places[name].count
        if number != 2:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = torch.rand(count, generator=generator) + 0.5
        if number != 1:
            tensors[f"{PREFIX}{name}.base_layer.bias"] = torch.randn(count, generator=generator) * 0.3
        if number == 3:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = torch.randn(count, generator=generator) * 0.1
    return tensors, {"r": rank, "lora_alpha": 2 * rank, "use_dora": number != 2}


KINDS: dict[str, tuple[dict[str, Any], Some]] = {
    "plain": (TINY, plain),
    "fused": (FUSED, plain),
    "around the layers": (test_adapter_kinds.MODEL, around),
    "magnitudes and biases": (BIASED, magnitudes),
}


@pytest.mark.parametrize("name", KINDS)
async def test_the_tokens_of_one_rank(name: str, tmp_path: Path) -> None:
    config, some = KINDS[name]
    with ranked(2, config, seed=len(name)) as made:
        await agree(made, [whole(config) for _ in range(4)], some, tmp_path, len(name))
        # All the same steps by the same graphs.
        replays = {executor.graphs.num_replays for executor in made.executors}
        assert len(replays) == 1 and replays != {0}


@pytest.mark.parametrize("expert_parallel", [False, True])
async def test_experts_of_which_each_rank_has_a_part_or_some(
    expert_parallel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = test_adapter_kinds.MIXTURE
    # The reference has them one by one.
    models = [whole(config) for _ in range(4)]
    monkeypatch.setattr("engine.models.parts.experts.keeps_experts_stacked", lambda device: device.type != "meta")
    with ranked(2, config, seed=2, max_lora_mib=1, expert_parallel=expert_parallel) as made:
        assert layers_of(made.leader.model).stacks
        await agree(made, models, plain, tmp_path, 2)


def parts_held(made: Machine) -> list[int]:
    """How many adapters the other ranks have in host memory."""
    return [len(executor._shared.parts) for executor in made.executors[1:]]


async def test_they_come_and_go_while_the_ranks_run(tmp_path: Path) -> None:
    """By the routes' own store, beside requests that go on; what is unloaded is in no rank's memory."""
    layers, root = layers_of(whole(TINY)), tmp_path / "root"
    for number in (1, 2, 3):
        tensors, values = plain(layers, number)
        write(root / f"a{number}", tensors, **values)
    models = [whole(TINY) for _ in range(4)]
    for number in (1, 2, 3):
        own = layers_of(models[number])
        own.put(1, read_adapter(root / f"a{number}", own, 16).branches)
        own.rows.use(1)
    with ranked(2, TINY, seed=4) as made:
        lora = LoraOptions(enable=True, max_loras=CAPACITY, root=str(root))
        engine = Engine(EngineConfig(stream=StreamOptions(flush_interval_ms=0.0), lora=lora), made.leader, None)
        store = engine.adapters
        assert store is not None
        loop_task = asyncio.create_task(engine.run())
        greedy = dataclasses.replace(requests_of(1, 1)[0].sampling, max_tokens=6, temperature=0.0)

        async def ask(number: int, seed: int) -> None:
            adapter = await store.get(f"a{number}") if number else None
            request = dataclasses.replace(requests_of(seed, 1)[0], sampling=greedy, adapter=adapter)
            request = dataclasses.replace(request, request_id=f"{number} {seed}")
            async with engine.submit(request) as stream:
                tokens = [token async for delta in stream for token in delta.token_ids]
            assert tokens == expected_tokens(models[number], request), number

        beside = asyncio.create_task(ask(0, 9))
        await asyncio.gather(*(ask(number, seed) for seed in range(2) for number in (1, 2, 3)))
        await beside
        assert parts_held(made) == [3]
        (root / "a2" / "adapter_model.safetensors").write_bytes(b"broken")
        with pytest.raises(AdapterError, match="adapter a2: "):
            await store.load("a2", "a2", in_place=True)
        await asyncio.gather(*(ask(number, 5) for number in range(4)))
        for number in (1, 2, 3):
            await store.unload(f"a{number}")
        gc.collect()
        await asyncio.gather(ask(0, 6), ask(1, 6))
        assert parts_held(made) == [1]
        loop_task.cancel()
        await asyncio.gather(loop_task, return_exceptions=True)


@pytest.mark.parametrize("where", [0, 1])
async def test_what_one_rank_cannot_take_none_does(where: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is, an error of the one adapter; and amid what they add up for it."""
    with ranked(2, BIASED, seed=where) as made:
        tensors, values = magnitudes(layers_of(whole(BIASED)), 1)
        path = write(tmp_path / "a1", tensors, **values)
        device = made.devices[where]
        pinned = device.pinned

        def refuse(num_bytes: int) -> Any:
            raise RuntimeError("CUDA error: out of memory")

        device.pinned = refuse  # type: ignore[method-assign]
        with pytest.raises(AdapterError, match=r"adapter a1: no page-locked memory: CUDA error: out of memory$"):
            made.leader.read_adapter(path)
        device.pinned = pinned  # type: ignore[method-assign]
        reader = "engine.executor.cuda_adapters.read_adapter"
        read = read_adapter

        def sees_others(directory: Path, layers: Any, *rest: Any) -> Any:
            # As one that reads a little later, when the file has been written anew.
            return read(other if layers.places is watched else directory, layers, *rest)

        other = write(tmp_path / "other", {name: each * 0.5 for name, each in tensors.items()}, **values)
        watched = layers_of(made.executors[where].model).whole.places  # type: ignore[union-attr]
        with monkeypatch.context() as patched:
            patched.setattr(reader, sees_others)
            with pytest.raises(AdapterError, match="adapter a1: its files were changed while the ranks read them"):
                made.leader.read_adapter(path)
        broken = {n: torch.full_like(each, torch.nan) if "1.mlp" in n else each for n, each in tensors.items()}
        with pytest.raises(AdapterError, match="has a number that is not finite"):
            made.leader.read_adapter(write(tmp_path / "a3", broken, **values))
        # And the group goes on.
        assert taken(made, path, 1).rank == 3
        requests = requests_of(where, 2)
        tokens = await serve(made.leader, requests)
        assert tokens == [expected_tokens(whole(BIASED), request) for request in requests]
