"""Ranks on GPUs, each a fake device: what one rank computes, all together compute, and they stay in step."""

from __future__ import annotations

import pytest

from tests.cuda.ranked import Machine, machine
from tests.cuda.support import expected_tokens, requests_of, serve, tiny_model


async def tokens_of(made: Machine, seed: int = 1) -> None:
    requests = requests_of(seed)
    expected = [expected_tokens(tiny_model(), request) for request in requests]
    assert await serve(made.leader, requests) == expected


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", ["off", "lazy", "start"])
async def test_the_tokens_of_one_rank(size: int, mode: str) -> None:
    with machine(size, cuda_graph=mode) as made:
        await tokens_of(made)
        replays = [executor.graphs.num_replays for executor in made.executors]
    assert len(set(replays)) == 1 and (replays[0] > 0) == (mode != "off")
