"""A row's answer with its adapter has the same bits alone, among other adapters, beside base rows and in any chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.models.loading.adapted import AdaptedLayers
from engine.models.parts.decoder import CausalLM
from engine.ops import native
from tests.lora.handmade import factors, write
from tests.lora.support import read
from tests.models.support import Runner, load, make_checkpoint, prompts_of, relative_error
from tests.models.test_families import EXPERTS

OTHERS = 15
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("Llama", {"num_hidden_layers": 2}, {}),
    "experts": ("Mixtral", {**EXPERTS, "num_hidden_layers": 2}, {}),
    "int4": ("Llama", {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 160}, {"quantisation": "int4"}),
    "bfloat16": ("Llama", {"num_hidden_layers": 2}, {"dtype": torch.bfloat16, "deterministic": True}),
}


def adapted_layers(model: CausalLM) -> AdaptedLayers:
    assert isinstance(model.adapted, AdaptedLayers)
    return model.adapted


def step(model: CausalLM, runner: Runner, rows: dict[int, list[int]], adapters: dict[int, int]) -> list[Tensor]:
    """Logits of every row's tokens."""
    lengths = [len(ids) for ids in rows.values()]
    own = np.repeat(np.array([adapters.get(row, 0) for row in rows], np.int32), lengths)
    adapted_layers(model).rows.use(own)
    hidden = runner.step(rows)
    with torch.inference_mode():
        return list(model.logits(hidden).split_with_sizes(lengths))


@pytest.mark.parametrize("name", MODELS)
def test_alone_among_fifteen_others_and_beside_base_rows(name: str, tmp_path: Path) -> None:
    family, sizes, options = MODELS[name]
    make_checkpoint(tmp_path / "base", family, **sizes)
    dtype = options.get("dtype", torch.float32)
    plain = load(tmp_path / "base", **options)
    model = load(tmp_path / "base", **options, max_adapters=OTHERS + 1)
    layers = adapted_layers(model)
    for index in range(1, OTHERS + 2):
        modules = None if index % 3 else [each for each in layers.places if "q_proj" in each or "w1" in each]
        tensors = factors(layers, 1 + index, index, modules)
        directory = write(tmp_path / str(index), tensors, r=1 + index)
        layers.put(index, read(directory, model).branches)
    runner, alone = Runner(model, num_seqs=20, dtype=dtype), Runner(plain, num_seqs=20, dtype=dtype)
    prompts = dict(enumerate(prompts_of([5 + row for row in range(20)])))
    adapters = {row: row for row in range(1, OTHERS + 2)}  # rows 0 and 17 to 19 have none
    together = step(model, runner, prompts, adapters)
    decoded = step(model, runner, {row: ids[:1] for row, ids in prompts.items()}, adapters)
    for row in (0, 1, 3, 16, 18):
        single = Runner(model, num_seqs=20, dtype=dtype)
        ids = prompts[row]
        chunks = [ids[:3], ids[3:], ids[:1]]
        parts = [step(model, single, {row: chunk}, adapters)[0] for chunk in chunks]
        assert torch.equal(torch.cat(parts), torch.cat((together[row], decoded[row]))), row
    without = [step_plain(plain, alone, {row: prompts[row]}) for row in (0, 18)]
    assert torch.equal(without[0], together[0]) and torch.equal(without[1], together[18])
    assert relative_error(together[1], step_plain(plain, alone, {1: prompts[1]})) > 0.01


def step_plain(model: CausalLM, runner: Runner, rows: dict[int, list[int]]) -> Tensor:
    hidden = runner.step(rows)
    with torch.inference_mode():
        return model.logits(hidden)


def test_threads_and_the_lack_of_kernels_change_nothing_or_little(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", "Llama", num_hidden_layers=1)
    model = load(tmp_path / "base", max_adapters=1)
    layers = adapted_layers(model)
    layers.put(1, read(write(tmp_path / "a", factors(layers, 4, 0)), model).branches)
    site = layers.sites["model.layers.0.mlp.gate_proj"]
    x, y = torch.randn(5, 48), torch.zeros(5, 160)
    layers.rows.use(1)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(y.clone())
            site.add(x, results[-1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    with native.disabled():
        by_torch = y.clone()
        site.add(x, by_torch)
        one = y[:1].clone()
        site.add(x[:1], one)
    assert relative_error(by_torch, results[0]) < 1e-6
    assert torch.equal(by_torch[:1], one)


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    """As peft has it: what the base gave in bfloat16, and the branch in float32, are added before they are rounded."""
    make_checkpoint(tmp_path / "base", "Llama", num_hidden_layers=1)
    model = load(tmp_path / "base", max_adapters=1)
    layers = adapted_layers(model)
    layers.put(1, read(write(tmp_path / "a", factors(layers, 4, 0)), model).branches)
    site = layers.sites["model.layers.0.mlp.down_proj"]
    x, y = torch.randn(9, 80).bfloat16(), torch.randn(9, 48).bfloat16()
    wide = y.float()
    layers.rows.use(1)
    site.add(x.float(), wide)
    site.add(x, y)
    assert torch.equal(y, wide.bfloat16())


def test_an_index_forgets_whoever_had_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", "Llama", num_hidden_layers=1)
    model = load(tmp_path / "base", max_adapters=2)
    layers = adapted_layers(model)
    names = list(layers.places)
    first = read(write(tmp_path / "a", factors(layers, 4, 0)), model)
    second = read(write(tmp_path / "b", factors(layers, 4, 1, [n for n in names if "q_proj" in n])), model)
    ids = prompts_of([9])[0]

    def answer(index: int) -> Tensor:
        return step(model, Runner(model, num_seqs=1), {0: ids}, {0: index})[0]

    base = answer(0)
    layers.put(1, second.branches)
    only_second = answer(1)
    layers.put(1, first.branches)
    layers.put(2, second.branches)
    assert torch.equal(answer(2), only_second)
    layers.put(1, second.branches)
    assert torch.equal(answer(1), only_second) and torch.equal(answer(0), base)
    assert not torch.equal(only_second, base)
