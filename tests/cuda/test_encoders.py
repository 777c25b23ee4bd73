"""Encoders through the CUDA executor on the fake device: the vectors are those of the CPU executor."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import SchedulerOptions
from engine.executor.cpu import CPUExecutor
from engine.executor.cuda_start import build_cuda_encoder
from engine.executor.start import encoder_limits
from engine.forward import PooledRow
from engine.models.parts.decoder import CausalLM
from engine.ops import native
from engine.request import Pooling
from tests.cuda.fake_device import FakeDevice
from tests.cuda.support import one_thread, tiny_model
from tests.executor.driver import GREEDY, Driver, Row, prefill

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
ENCODERS = {
    "bert": {"architectures": ["BertModel"], **SIZES},
    "windows": {"architectures": ["ModernBertModel"], **SIZES, "local_attention": 10},
    "grouped": {
        "architectures": ["Gemma3TextModel"],
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 10,
        "use_bidirectional_attention": True,
    },
    "labels": {"architectures": ["BertForSequenceClassification"], **SIZES, "num_labels": 3},
}
# Texts of several powers of two, and two of one.
LENGTHS = (1, 7, 40, 18, 25)
LIMITS = encoder_limits(SchedulerOptions(max_num_seqs=8, max_num_batched_tokens=128), 64, 101)


def poolings(classify: bool) -> list[Pooling]:
    kinds = ("mean", "last", "cls", "all", "mean") if not classify else ("cls",) * 5
    return [
        Pooling(kind, classify=classify, second=5 if number in (2, 4) else 0)  # type: ignore[arg-type]
        for number, kind in enumerate(kinds)
    ]


async def vectors(executor: Any, classify: bool) -> list[np.ndarray[Any, Any]]:
    driver, rng = Driver(executor), np.random.default_rng(3)
    found = []
    for _ in range(2):  # the second finds what the first has left behind
        rows: list[Row] = [
            prefill(slot, rng.integers(1, 101, length).tolist(), samples=False)
            for slot, length in enumerate(LENGTHS, 1)
        ]
        pages = {slot: [slot + 1] for slot in range(1, len(rows) + 1)}
        pooled = [PooledRow(row, pooling, True) for row, pooling in enumerate(poolings(classify))]
        output = await executor.wait(driver.launch(rows, pages, dict.fromkeys(pages, GREEDY), pooled=pooled))
        found += output.pooled
    return found


def on_gpu(model: CausalLM, device: FakeDevice) -> Any:
    rows: dict[str, str] = {}
    executor = build_cuda_encoder(model, device, LIMITS, dtype=torch.float32, row=rows.__setitem__)  # type: ignore[arg-type]
    assert "whole texts" in rows["attention"] and "KV cache 0.00" in rows["GPU memory"]
    return executor


@pytest.mark.parametrize("name", ENCODERS)
async def test_vectors_are_those_of_the_cpu(name: str) -> None:
    model = tiny_model.__wrapped__(json.dumps(ENCODERS[name]), 64)
    classify = model.config.classifier is not None
    with native.disabled(), one_thread():
        reference = CPUExecutor(model, LIMITS, dtype=torch.float32)
        expected = await vectors(reference, classify)
        reference.close()
        device = FakeDevice(5, 0.3)
        executor = on_gpu(model, device)
        found = await vectors(executor, classify)
    assert len(found) == len(expected) == 2 * len(LENGTHS)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    executor.close()


async def test_pools_come_back_after_sleep() -> None:
    model = tiny_model.__wrapped__(json.dumps(ENCODERS["bert"]), 64)
    executor = on_gpu(model, FakeDevice())
    before = await vectors(executor, False)
    executor.sleep(1)
    assert not executor.attention.k_pools
    executor.wake_up()
    for ours, theirs in zip(await vectors(executor, False), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    executor.close()


async def test_vectors_without_numbers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model.__wrapped__(json.dumps(ENCODERS["bert"]), 64)
    executor = on_gpu(model, FakeDevice(2, 0.3))
    forward = model.forward

    def spoiled(*given: Any) -> torch.Tensor:
        hidden = forward(*given)
        hidden[LENGTHS[0] + 3] = torch.nan  # in the second text
        return hidden

    monkeypatch.setattr(model, "forward", spoiled)
    rows: list[Row] = [prefill(slot, [5] * length, samples=False) for slot, length in enumerate(LENGTHS, 1)]
    pages = {slot: [slot + 1] for slot in range(1, len(rows) + 1)}
    pooled = [PooledRow(row, Pooling("mean"), True) for row in range(len(rows))]
    driver = Driver(executor)
    output = await executor.wait(driver.launch(rows, pages, dict.fromkeys(pages, GREEDY), pooled=pooled))
    assert output.broken == [1] and len(output.pooled) == len(LENGTHS)
    executor.close()
