"""Texts a second through an encoder, against sentence-transformers on the same directory and in the same run.

    python -m bench.encoders --model DIR [--texts 1000] [--dtype float32 bfloat16] [--no-reference]

Texts of mixed length (log-normal, a few words to some hundred) go to the engine all at once, as a client with many
requests sends them. The reference needs sentence-transformers; where it is not installed, only our part runs. Both use
as many threads, and the better of `--repeat` turns of each counts, taken in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import random
import time
from collections.abc import Callable
from typing import Any

from engine.build import Built, build_engine
from engine.config import EngineConfig, ModelOptions
from engine.request import Pooling, Request, SamplingParams

WORDS = """
the a of in on with and to from under river mountain engine language model fox moon house tree token queue running
quickly beautiful yesterday because question answer seven market report
"""


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng, words = random.Random(seed), WORDS.split()
    lengths = [min(180, max(2, int(rng.lognormvariate(2.7, 0.7)))) for _ in range(count)]
    return [" ".join(rng.choice(words) for _ in range(length)) for length in lengths]


class Ours:
    """An engine on a loop of its own."""

    def __init__(self, model: str, dtype: str) -> None:
        self.built: Built = build_engine(EngineConfig(model=ModelOptions(path=model, dtype=dtype), device="cpu"))
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self.built.engine.run())
        self._turn = 0

    def encode(self, texts: list[str]) -> int:
        """Tokenized and computed; returns the number of tokens."""
        self._turn += 1
        return self._loop.run_until_complete(self._encode(texts))

    async def _encode(self, texts: list[str]) -> int:
        engine, kind = self.built.engine, self.built.abilities.embedding
        assert engine.tokenizer is not None and kind is not None
        tokenizer = engine.tokenizer

        async def ask(number: int, text: str) -> int:
            ids = tokenizer.encode(text)[: engine.limits.max_model_len]
            name = f"{self._turn}-{number}"
            async with engine.submit(Request(name, ids, SamplingParams(), False, pooling=Pooling(kind))) as stream:
                await stream.collect()
            return len(ids)

        return sum(await asyncio.gather(*(ask(number, text) for number, text in enumerate(texts))))

    def close(self) -> None:
        self._task.cancel()
        self._loop.run_until_complete(asyncio.wait({self._task}))
        self.built.engine.executor.close()


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-reference", action="store_true")
    args = parser.parse_args()
    texts = make_texts(args.texts)
    engines = {dtype: Ours(args.model, dtype) for dtype in args.dtype}
    works: dict[str, Callable[[], Any]] = {
        dtype: functools.partial(engine.encode, texts) for dtype, engine in engines.items()
    }
    if not args.no_reference:
        try:
            from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]
        except ImportError:
            print("sentence-transformers is not installed: no reference")
        else:
            reference = SentenceTransformer(args.model, device="cpu")
            works["sentence-transformers"] = lambda: reference.encode(texts, batch_size=32)
    tokens = next(iter(engines.values())).encode(texts)
    best = dict.fromkeys(works, float("inf"))
    for _ in range(args.repeat):
        for name, work in works.items():
            best[name] = min(best[name], seconds_of(work))
    for engine in engines.values():
        engine.close()
    print(f"{len(texts)} texts, {tokens} tokens")
    known = best.get("sentence-transformers")
    for name, seconds in best.items():
        ratio = "" if known is None else f"  {known / seconds:5.2f} x"
        print(f"{name:24} {seconds:7.2f} s  {len(texts) / seconds:8.0f} texts/s{ratio}")


if __name__ == "__main__":
    main()
