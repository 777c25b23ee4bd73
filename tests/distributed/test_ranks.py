"""Sums over ranks: exact, in the order of the ranks, the same bits whatever rows lie beside a row."""

from __future__ import annotations

import time

import pytest
import torch

from engine.ops.ranks import Ranks, RanksEndedError
from tests.distributed.together import together

ROWS, COLUMNS = 37, 203


def part(rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    # Of sizes so unlike that the order of additions shows.
    return (torch.randn(ROWS, COLUMNS, generator=generator) * 10.0 ** (rank % 3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_sum_is_in_the_order_of_the_ranks_whatever_it_is_cut_into(size: int, dtype: torch.dtype) -> None:
    bias = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(9))
    expected = part(0, dtype).float()
    for rank in range(1, size):
        expected = expected + part(rank, dtype).float()
    plain, biased = expected.to(dtype), (expected + bias).to(dtype)

    def work(ranks: Ranks) -> list[torch.Tensor]:
        own = part(ranks.rank, dtype)
        alone = torch.cat([ranks.sum(own[row : row + 1].clone()) for row in range(5)])
        return [ranks.sum(own.clone()), ranks.sum(own.clone(), bias), alone]

    # A slot of 5 KB takes six rows in float32, so the whole goes in pieces.
    for whole, with_bias, alone in together(size, work, slot=5000):
        assert torch.equal(whole, plain) and torch.equal(with_bias, biased) and torch.equal(alone, plain[:5])


def test_who_waits_for_a_rank_that_ended_is_woken() -> None:
    def work(ranks: Ranks) -> str:
        if ranks.rank == 1:
            time.sleep(0.2)  # the other one sleeps by now
            ranks.end()
            return "left"
        try:
            ranks.sum(torch.ones(2, 8))
        except RanksEndedError:
            return "ended"
        return "summed"

    assert together(2, work)[0] == "ended"


def test_messages_come_whole_and_in_order() -> None:
    def work(ranks: Ranks) -> list[int]:
        seen = []
        for number in range(50):
            if ranks.rank == 0:
                ranks.next_message()[:2] = number, number
                ranks.post()
            else:
                seen.append(int(ranks.receive()[0]))
            ranks.sum(torch.ones(1, 4))
        return seen

    first, *others = together(3, work)
    assert first == [] and others == [list(range(50))] * 2
