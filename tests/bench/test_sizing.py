"""Sizing: shapes are counted right, the capacity that is found keeps its bounds, and twice the device serves more."""

from __future__ import annotations

import argparse

import pytest

from bench.sizing import Load, Replica, Shape, capacity, main, simulate, sizes

OPTIONS = argparse.Namespace(
    ttft=0.1, tpot=0.02, requests=200, max_num_seqs=16, chunk=512, seed=1, headroom=0.5, router_rate=100.0
)
LOAD = Load(64, 2, 60, 12)


def replica(factor: float = 1.0) -> Replica:
    return Replica(Shape.of("llama-3.2-1b"), 1, factor * 1e12, factor * 2e13, 0.001, 8e9)


def test_shapes() -> None:
    dense, mixed = Shape.of("llama-3.1-8b"), Shape.of("qwen3-30b-a3b")
    assert dense.parameters == pytest.approx(8.03e9, rel=0.01) and dense.kv_bytes == 128 * 1024
    assert mixed.parameters == pytest.approx(30.5e9, rel=0.02) and mixed.active == pytest.approx(3.3e9, rel=0.15)


def test_capacity() -> None:
    rate, figures = capacity(replica(), LOAD, OPTIONS)
    assert figures.ttft_p99 <= OPTIONS.ttft and figures.tpot_p95 <= OPTIONS.tpot and 0 < figures.busy <= 1
    beyond = simulate(replica(), LOAD, 2 * rate, OPTIONS)
    assert beyond.ttft_p99 > OPTIONS.ttft or beyond.tpot_p95 > OPTIONS.tpot
    assert capacity(replica(2.0), LOAD, OPTIONS)[0] > 1.2 * rate
    assert figures.hit_rate > 0.2
    found = sizes(10 * rate, rate, replica(), LOAD, 0.5, OPTIONS)
    assert found["replicas"] == found["devices"] == 20
    moved = found["KV moved, prefill and decode apart, GB/s"]
    assert moved == pytest.approx(10 * rate * 124 * 0.5 * replica().shape.kv_bytes / 1e9)


def test_a_model_that_does_not_fit() -> None:
    with pytest.raises(SystemExit, match="hold the weights"):
        main(["--shape", "qwen3-30b-a3b", "--memory-share", "0.7", "--requests", "10", "--shared", "2000000"])
