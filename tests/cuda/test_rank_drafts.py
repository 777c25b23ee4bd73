"""Drafts where several ranks compute one model: rank 0 makes them, all check them, and tokens are those of decoding."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from engine.executor.cuda_buffers import CudaHandle
from engine.forward import ForwardInput
from engine.request import Request
from tests.cuda.fake_flashinfer import FakeFlashInfer
from tests.cuda.ranked import Machine, load_part, machine
from tests.cuda.support import ALWAYS, HYBRID, TINY, any_shape, expected_tokens, requests_of, serve, tiny_model
from tests.cuda.test_adapters import CAPACITY, adapters_of, expected
from tests.cuda.test_adapters import asked as with_adapters
from tests.cuda.test_drafts import Knowing
from tests.cuda.test_drafts_beside import Telling, longer
from tests.cuda.test_failures import asked
from tests.sim.workload import Runs


def counted(made: Machine) -> list[int]:
    """Drafts of each step that brought any."""
    found: list[int] = []
    lay_out = made.leader._with_drafts

    def counting(given: ForwardInput, handle: CudaHandle) -> ForwardInput:
        flat = lay_out(given, handle)
        if handle.drafted is not None and handle.drafted.shift:
            found.append(handle.drafted.shift)
        return flat

    made.leader._with_drafts = counting  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize(("size", "mode", "wrong"), [(2, "lazy", 0.0), (2, "off", 0.4), (4, "lazy", 0.4)])
async def test_the_tokens_of_one_rank(size: int, mode: str, wrong: float) -> None:
    requests = [
        dataclasses.replace(each, sampling=dataclasses.replace(each.sampling, max_tokens=20))
        for each in requests_of(size, 6)
    ]
    with machine(size, speculation=ALWAYS, seed=size, cuda_graph=mode) as made:
        made.leader._draft_by(Knowing(requests, wrong, hesitates=wrong > 0))
        drafts = counted(made)
        tokens = await asyncio.wait_for(serve(made.leader, requests, speculation=ALWAYS), 300)
        assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
        assert drafts
        assert len({executor.graphs.num_replays for executor in made.executors}) == 1
        assert not any(executor._speculator for executor in made.executors[1:])


async def test_by_flashinfer_with_what_looks_at_the_text() -> None:
    """Grammars whose masks come late, penalties, log-probabilities, filters."""

    def requests() -> list[Request]:
        grammar = [Runs(number, 101, free=1, run=2, length=12) for number in range(3)]
        return asked(extras=True) + [
            dataclasses.replace(each, request_id=f"g{number}", constraint=runs)
            for number, (each, runs) in enumerate(zip(requests_of(8, 3), grammar, strict=True))
        ]

    module = functools.partial(FakeFlashInfer, strict=False)
    with any_shape(), machine(2, seed=1, module=module) as made:
        alone = await serve(made.leader, requests())
    with any_shape(), machine(2, speculation=ALWAYS, seed=1, module=module) as made:
        made.leader._draft_by(Knowing(requests(), 0.3))
        drafts = counted(made)
        sampled: list[Any] = []
        for executor in made.executors[1:]:
            executor._draw_open = functools.partial(noting, executor._draw_open, sampled)
        assert await asyncio.wait_for(serve(made.leader, requests(), speculation=ALWAYS), 300) == alone
        assert drafts and any(sampled)


def noting(draw: Any, sampled: list[Any], step: ForwardInput, handle: CudaHandle, *given: Any, **options: Any) -> None:
    sampled.append(step.masks is not None and handle.positions is not None)
    draw(step, handle, *given, **options)


async def test_of_a_model_with_states() -> None:
    """They follow only what was right, in every rank."""
    requests = longer(requests_of(5, 4))
    with machine(2, config=HYBRID, seed=2) as made:
        alone = await serve(made.leader, requests)
    with machine(2, config=HYBRID, speculation=ALWAYS, seed=2) as made:
        made.leader._draft_by(Telling(list(zip(requests, alone, strict=True)), 0.3))
        drafts = counted(made)
        assert await asyncio.wait_for(serve(made.leader, requests, speculation=ALWAYS), 300) == alone
        assert drafts


async def test_with_adapters(tmp_path: Path) -> None:
    load = functools.partial(load_part, json.dumps(TINY), max_adapters=CAPACITY)
    with machine(2, speculation=ALWAYS, seed=6, load=load, max_lora_rank=8) as made:
        requests = with_adapters(adapters_of("llama", made.leader, tmp_path), 3)
        made.leader._draft_by(Knowing(requests, 0.3))
        drafts = counted(made)
        tokens = await asyncio.wait_for(serve(made.leader, requests, speculation=ALWAYS), 300)
        assert tokens == [expected("llama", request) for request in requests]
        assert drafts
