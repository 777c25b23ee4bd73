"""What a comparison of routers is made of; the routers themselves run in `make test-scale`."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest

from bench import routing
from bench.datasets import Job
from bench.routing import Costs
from engine.flags import DEMO_MODEL
from engine.text.tokenizer import Tokenizer


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    routing.add_cost_flags(parser)
    routing.add_load_flags(parser)
    return parser.parse_args(words)


def test_a_load_is_measured_in_what_prompts_cost() -> None:
    costs = Costs(step_ms=10.0, token_ms=0.5, row_ms=0.0, cache_tokens=1000, rows=4)
    assert costs.seconds(100) == pytest.approx(0.06)
    assert costs.seconds(routing.STEP_TOKENS + 1) == pytest.approx((20 + 0.5 * (routing.STEP_TOKENS + 1)) / 1000)
    # A turn has all before it in its prompt, answers too.
    tokenizer = Tokenizer.load(DEMO_MODEL)
    first, second = (len(tokenizer.encode(text, add_special_tokens=False)) for text in ("the fox", "and the lake"))
    job = Job(("the fox", "and the lake"), 8)
    expected = costs.seconds(first) + costs.seconds(first + 8 + second)
    assert routing.job_seconds(job, costs, tokenizer) == pytest.approx(expected)


@pytest.mark.parametrize("load", routing.LOADS)
def test_every_router_gets_the_same_prompts_of_a_seed(load: str) -> None:
    given = arguments("--requests", "16", "--num-prefixes", "4", "--prefix-len", "30", "--opening-len", "20")
    jobs = routing.make_jobs(load, given, 1)
    assert jobs == routing.make_jobs(load, given, 1) != routing.make_jobs(load, given, 2)
    assert sum(len(job.turns) for job in jobs) == 16
    beginnings = {" ".join(str(job.turns[0]).split()[:20]) for job in jobs}
    assert len(beginnings) == (4 if load == "shared-prefix" else 2)


def test_routers_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    @contextlib.contextmanager
    def opened(name: str) -> Iterator[str]:
        order.append(name)
        yield name

    async def measured(url: str, load: str, given: argparse.Namespace, seed: int) -> dict[str, float]:
        p50 = 100.0 * seed if url == "a" else 50.0
        return {"rate": 1, "lone_ms": 1, "ttft_p50_ms": p50, "ttft_p99_ms": 90.0, "hit_rate": 0.5, "tokens_per_s": 1,
                "failed": float(url == "b")}  # fmt: skip

    monkeypatch.setattr(routing, "measure_load", measured)
    given = arguments("--loads", "multi-turn", "--rounds", "3", "--seed", "1")
    rows = routing.in_turns({name: functools.partial(opened, name) for name in "ab"}, given)
    assert order == ["a", "b"] * 3
    told: Any = routing.versus(rows, "a", "b", ["multi-turn"])
    assert told == "multi-turn, a / b: TTFT p50 4.00 (2.00 to 6.00), p99 1.00 (1.00 to 1.00)"
    assert "200 ms" in routing.report(rows) and routing.report(rows).rstrip().endswith("3")
