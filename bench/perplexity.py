"""How well a model foretells a text: `python -m bench.perplexity --model engine/demo --text FILE`.

Offline through the Engine, or over HTTP (`--url http://127.0.0.1:8000`) by `echo` and `logprobs`, as lm-eval asks.
`--compare` asks transformers too. `--floats` scores the same checkpoint once more with every weight as a float32 number
and by torch's kernels: what a file's packed weights, rounded inputs and a smaller cache cost, such as SmolLM2's with
inputs of eight bits:

    python -m bench.perplexity --model FILE.gguf --text tests/real/text.txt --packed-input-bits 8 --floats

The text is cut into windows; every token but the first of the text is scored
once, with at least `window - stride` tokens before it (the Hugging Face way of striding).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import json
import math
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from engine.build import Built, build_engine
from engine.config import CacheOptions, EngineConfig, ModelOptions, SchedulerOptions, StartupError
from engine.request import Request, SamplingParams

DEMO = Path(__file__).parent.parent / "engine" / "demo"
# For a look without any file; too short to say how good a model is.
SAMPLE = (
    "The town lay in a valley between two hills. Every morning the baker opened his shop before the sun was up, and "
    "the smell of bread went through the streets. In the afternoon the children came from school, bought a roll each, "
    "and ran down to the river to see whether the boats had come in. "
)
# Windows that are scored at the same time.
CONCURRENCY = 8

# [token ids] -> log-probabilities of all of them but the first.
Scorer = Callable[[Sequence[int]], Coroutine[None, None, list[float]]]


def windows(num_tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored token) of each window: together they score 1..num_tokens - 1 once each."""
    if not 1 <= stride < window:
        raise ValueError("the stride must be at least 1 and less than the window")
    found: list[tuple[int, int, int]] = []
    scored = 1
    start = 0
    while scored < num_tokens:
        end = min(start + window, num_tokens)
        found.append((start, end, scored))
        scored = end
        start += stride
    return found


async def perplexity(score: Scorer, token_ids: Sequence[int], window: int, stride: int) -> tuple[float, int]:
    """exp of the mean negative log-probability, and how many tokens it is the mean of."""
    limit = asyncio.Semaphore(CONCURRENCY)

    async def one(start: int, end: int, scored: int) -> list[float]:
        async with limit:
            return (await score(token_ids[start:end]))[scored - start - 1 :]

    parts = await asyncio.gather(*(one(*place) for place in windows(len(token_ids), window, stride)))
    values = [value for part in parts for value in part]
    assert len(values) == len(token_ids) - 1
    return math.exp(-math.fsum(values) / len(values)), len(values)


@asynccontextmanager
async def offline(built: Built) -> AsyncIterator[Scorer]:
    """Scores through the Engine."""
    engine = built.engine
    running = asyncio.create_task(engine.run())
    count = 0

    async def score(token_ids: Sequence[int]) -> list[float]:
        nonlocal count
        count += 1
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        async with engine.submit(Request(f"score-{count}", list(token_ids), params, stream=False)) as stream:
            await stream.collect()
            return [entry.logprob for entry in stream.prompt_logprobs or []]

    try:
        yield score
    finally:
        running.cancel()
        await asyncio.wait({running})
        engine.executor.close()


@asynccontextmanager
async def over_http(
    url: str, model: str | None, api_key: str | None
) -> AsyncIterator[tuple[Scorer, aiohttp.ClientSession]]:
    """Scores by /v1/completions with `echo`; the session is set up for that server."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with aiohttp.ClientSession(url, headers=headers, timeout=aiohttp.ClientTimeout(600)) as session:

        async def score(token_ids: Sequence[int]) -> list[float]:
            body = {
                "prompt": list(token_ids),
                "max_tokens": 1,
                "temperature": 0,
                "echo": True,
                "logprobs": 1,
                **({"model": model} if model else {}),
            }
            async with session.post("/v1/completions", json=body) as response:
                answer = await response.json()
                if response.status != 200:
                    raise RuntimeError(f"{response.status}: {answer}")
            values: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
            return values[1 : len(token_ids)]

        yield score, session


async def tokenize(session: aiohttp.ClientSession, text: str, model: str | None) -> tuple[list[int], int]:
    """Ids of the text by the server's tokenizer, and its context length."""
    async with session.post("/tokenize", json={"prompt": text, **({"model": model} if model else {})}) as response:
        answer = await response.json()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {answer}")
    return answer["tokens"], answer["max_model_len"]


def transformers_scorer(directory: Path, dtype: str) -> Scorer:
    """Scores by transformers: the oracle."""
    import torch

    # Any: its types are not for this checker.
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()

    async def score(token_ids: Sequence[int]) -> list[float]:
        ids = torch.tensor([list(token_ids)])
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        values: list[float] = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
        return values

    return score


async def measure(args: argparse.Namespace) -> dict[str, object]:
    text = SAMPLE if args.text is None else args.text.read_text(encoding="utf-8")
    report: dict[str, object] = {}

    async def run(name: str, score: Scorer, ids: list[int], context: int) -> None:
        # One token is generated after the last.
        window = context - 1 if args.window is None else min(args.window, context - 1)
        stride = max(1, window // 2) if args.stride is None else args.stride
        value, count = await perplexity(score, ids, window, stride)
        report.update({name: value, "tokens": count, "window": window})

    if args.url is not None:
        async with over_http(args.url, args.model, args.api_key) as (score, session):
            ids, context = await tokenize(session, text, args.model)
            await run("http", score, ids, context)
        return report
    config = EngineConfig(
        model=ModelOptions(
            path=args.model or str(DEMO),
            dtype=args.dtype,
            quantization=args.quantization,
            packed_input_bits=args.packed_input_bits,
        ),
        cache=CacheOptions(kv_cache_dtype=args.kv_cache_dtype),
        scheduler=SchedulerOptions(max_num_seqs=CONCURRENCY),
        device=args.device,
        num_threads=args.threads,
    )
    built = build_engine(config)
    if built.engine.tokenizer is None:
        raise StartupError("this model has no tokenizer")
    ids = built.engine.tokenizer.encode(text)
    context = built.engine.limits.max_model_len
    async with offline(built) as score:
        await run("offline", score, ids, context)
    if args.compare:
        await run("transformers", transformers_scorer(built.directory, args.dtype), ids, context)
    if args.floats:
        from engine.ops import native

        model = ModelOptions(path=args.model or str(DEMO), dtype="float32", max_model_len=context)
        with native.disabled():
            async with offline(build_engine(dataclasses.replace(config, model=model, cache=CacheOptions()))) as score:
                await run("floats", score, ids, context)
    if args.against is not None:
        model = ModelOptions(path=args.against, dtype=args.dtype, max_model_len=context)
        plain = dataclasses.replace(config, model=model, cache=CacheOptions())
        async with offline(build_engine(plain)) as score:
            await run("against", score, ids, context)
    return report


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.perplexity", description=__doc__)
    parser.add_argument("--model", help="a model directory or hub id (the demo model); with --url the served name")
    parser.add_argument("--quantization", default="auto", help="int8, int4 or fp8: what to round its weights to")
    parser.add_argument("--kv-cache-dtype", default="auto", help="bfloat16, float16 or int8; not of --against")
    parser.add_argument("--packed-input-bits", type=int, choices=[8, 16], default=16, help="not of --against")
    parser.add_argument("--floats", action="store_true", help="the same weights as float32 numbers as well (CPU)")
    parser.add_argument("--against", help="another model of the same tokens, such as the one that this was made from")
    parser.add_argument("--url", help="score over HTTP instead: the server's address, without /v1")
    parser.add_argument("--api-key")
    parser.add_argument("--text", type=Path, help="a UTF-8 file; a short built-in text if none is given")
    parser.add_argument("--window", type=int, help="tokens of a window; the model's context if not given")
    parser.add_argument("--stride", type=int, help="tokens from one window to the next; half a window if not given")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compare", action="store_true", help="ask transformers as well (offline only)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    try:
        report = asyncio.run(measure(args))
    except (StartupError, RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    own: Any = report.get("offline")
    for name in ("offline", "http", "transformers", "floats", "against"):
        if name in report:
            value: Any = report[name]
            line = f"{name:<13} perplexity {value:.4f} over {report['tokens']} tokens, window {report['window']}"
            print(line if own is None or name == "offline" else f"{line}; offline is {own / value - 1:+.3%} of it")
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, **report}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
