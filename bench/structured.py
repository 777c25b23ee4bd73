"""What structured output costs: `python -m bench.structured [masks compile jump step]`, on this machine's CPU.

masks: a mask of a constrained row with a made-up vocabulary of 128,256 tokens. compile: the test suite's schemas, and
how long the loop stands still while 100 compile. jump: forwards and time of an answer of the demo model with long
property names, with and without jump-ahead. step: decode steps of the Llama-1B shape (random weights) at batch 32, all
rows free and one in four under a schema, by turns in one run: the promise is at most 5% more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import engine.demo
from bench.shapes import SHAPES, write_shape
from engine.build import build_engine
from engine.config import CacheOptions, EngineConfig, ModelOptions, SchedulerOptions, StreamOptions
from engine.engine import Engine
from engine.request import Request, SamplingParams, TokenConstraint
from engine.text.grammar.compiler import GrammarCompiler
from engine.text.grammar.spec import GrammarSpec
from engine.text.tokenizer import Tokenizer

Row = dict[str, Any]
SHAPE = "llama-3.2-1b"
EOS = 128_001


def made_up_tokenizer(vocab_size: int = 128_000, seed: int = 0) -> Tokenizer:
    """A byte-level BPE of the size of Llama 3's: punctuation, numbers and the words of a language that nobody speaks,
    each with all of its beginnings, as trained vocabularies have them; then 256 special tokens."""
    rng = random.Random(seed)
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []

    def add(left: str, right: str) -> None:
        if left + right not in vocabulary and len(vocabulary) < vocab_size:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))

    for marks in itertools.product('{}[]",:Ġ', repeat=2):
        add(*marks)
    for marks in itertools.product('{}[]",:Ġ', repeat=3):
        if marks[0] + marks[1] in vocabulary:
            add(marks[0] + marks[1], marks[2])
    for size in (2, 3):
        for digits in itertools.product("0123456789", repeat=size):
            add("".join(digits[:-1]), digits[-1])
    syllables = [a + b + c for a in "bcdfghklmnprstvw" for b in "aeiou" for c in ("", "n", "r", "s", "t", "l")]
    while len(vocabulary) < vocab_size:
        word = "".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 3, 4))))
        word = rng.choice(("", "Ġ", "Ġ")) + (word.capitalize() if rng.random() < 0.2 else word)
        for end in range(2, len(word) + 1):
            add(word[: end - 1], word[end - 1])
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [f"<|special {number}|>" for number in range(256)]
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    return Tokenizer(backend, {"eos_token": special[1]})


def spec(schema: Any, **more: Any) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(schema), **more)


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def percentiles(seconds: list[float]) -> Row:
    us = 1e6 * np.array(seconds)
    return {"mean": us.mean(), "p50": np.percentile(us, 50), "p99": np.percentile(us, 99), "max": us.max()}


# ---- masks


PERSON = closed(
    {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
        "role": {"enum": ["admin", "editor", "reader"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": closed({"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}),
    }
)
DOCUMENTS: dict[str, tuple[Any, Any]] = {
    "person": (
        PERSON,
        {
            "name": "Mia Lovelace", "age": 31, "email": "mia@example.org", "role": "editor",
            "tags": ["botas", "nelu", "kirsa"], "address": {"street": "Some street 17", "zip": "01234"},
        },
    ),
    "free text": (closed({"text": {"type": "string"}}), {"text": "A story of some words that nobody speaks. " * 8}),
    "any object": (
        {"type": "object"}, {"a": [1, 2.5, None, {"b": "c d e"}], "long name": {"x": True, "y": "text " * 10}},
    ),
    "list of people": ({"type": "array", "items": PERSON}, None),
}  # fmt: skip


def masks(repeat: int) -> list[Row]:
    """Per constrained row and step: what is forced asked, the mask written, a token accepted. Of each place of a text
    the best of `repeat` counts: a thread that loses its core for 4 ms says nothing about masks."""
    tokenizer = made_up_tokenizer()
    compiler = GrammarCompiler(tokenizer, [EOS], tokenizer.vocab_size)
    begin = time.perf_counter()
    compiler.warm()
    print(f"vocabulary of {tokenizer.vocab_size} tokens read in {time.perf_counter() - begin:.1f} s")
    bits = np.zeros(compiler.mask_words, np.uint32)
    rows: list[Row] = []
    everything: list[float] = []
    for name, (schema, document) in DOCUMENTS.items():
        text = json.dumps(document if document is not None else [DOCUMENTS["person"][1]] * 4)
        ids = tokenizer.encode(text, add_special_tokens=False)
        grammar = compiler.compile(spec(schema))
        times = [float("inf")] * len(ids)
        for _ in range(repeat):
            state = grammar.state()
            for place, token in enumerate(ids):
                begin = time.perf_counter()
                state.mask_into(bits)
                taken = time.perf_counter() - begin
                assert bits[token >> 5] >> (token & 31) & 1, "the document breaks its schema"
                begin = time.perf_counter()
                state.accept(token)
                times[place] = min(times[place], taken + time.perf_counter() - begin)
        rows.append({"name": f"mask: {name}", "us": percentiles(times), "tokens": len(ids)})
        everything += times
    rows.append({"name": "mask: all", "us": percentiles(everything)})
    return rows


# ---- compile


async def compiling(tokenizer: Tokenizer) -> list[Row]:
    from tests.text.schemas import SCHEMAS

    compiler = GrammarCompiler(tokenizer, [EOS], tokenizer.vocab_size)
    compiler.warm()
    alone = []
    for schema in SCHEMAS:
        begin = time.perf_counter()
        compiler.compile(spec(schema))
        alone.append(time.perf_counter() - begin)
    stalls: list[float] = []

    async def watch() -> None:
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(0.001)
            stalls.append(time.perf_counter() - begin - 0.001)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.05)
    idle = max(stalls)
    stalls.clear()
    begin = time.perf_counter()
    await asyncio.gather(*(compiler.compile_async(spec(schema)) for schema in SCHEMAS[-100:]))
    whole = time.perf_counter() - begin
    watching.cancel()
    compiler.close()
    return [
        {"name": f"compile: {len(SCHEMAS)} schemas", "us": percentiles(alone)},
        {"name": "loop while 100 compile", "us": percentiles(stalls), "idle_ms": 1e3 * idle, "seconds": whole},
    ]


# ---- engines


@contextlib.asynccontextmanager
async def running(config: EngineConfig) -> AsyncIterator[Engine]:
    built = build_engine(config)
    task = asyncio.create_task(built.engine.run())
    try:
        yield built.engine
    finally:
        task.cancel()
        await asyncio.wait({task})
        built.engine.executor.close()


LONG_NAMES = closed(
    {
        "the_name_of_the_person_as_written_in_the_passport": {"type": "string", "maxLength": 20},
        "the_age_of_the_person_in_years_at_the_last_birthday": {"type": "integer", "minimum": 0, "maximum": 130},
        "the_city_in_which_the_person_lives_at_this_moment": {"type": "string", "maxLength": 20},
        "whether_the_person_has_ever_been_a_customer_of_ours": {"type": "boolean"},
    }
)


async def jumping(repeat: int) -> list[Row]:
    """The same answer of the demo model both ways; forwards are what the executor was given."""
    path = Path(engine.demo.__path__[0])
    tokenizer = Tokenizer.load(path)
    compiler = GrammarCompiler(tokenizer, tokenizer.eos_token_ids, tokenizer.vocab_size)
    grammar = compiler.compile(spec(LONG_NAMES, any_whitespace=False))
    prompt = tokenizer.encode("Mia is a baker. Mia lives in Oslo. Mia is 31 years old.", add_special_tokens=False)
    params = SamplingParams(max_tokens=300, temperature=0.0)
    rows: list[Row] = []
    answers = []
    for jump_ahead in (False, True):
        scheduler = SchedulerOptions(jump_ahead=jump_ahead, max_num_seqs=8)
        config = EngineConfig(model=ModelOptions(path=str(path)), scheduler=scheduler, device="cpu")
        async with running(config) as running_engine:
            submit, num_steps = running_engine.executor.submit, 0

            def count(forward_input: Any, submit: Any = submit) -> Any:
                nonlocal num_steps
                num_steps += 1
                return submit(forward_input)

            running_engine.executor.submit = count  # type: ignore[method-assign]
            times = []
            for turn in range(repeat + 1):
                num_steps, begin = 0, time.perf_counter()
                request = Request(f"j{turn}", prompt, params, constraint=grammar.state())
                async with running_engine.submit(request) as stream:
                    answer = await stream.collect()
                times.append(time.perf_counter() - begin)
            answers.append(answer.token_ids)
        name = f"jump-ahead {'on' if jump_ahead else 'off'}"
        rows.append({"name": name, "forwards": num_steps, "tokens": len(answer.token_ids), "ms": 1e3 * min(times[1:])})
    assert answers[0] == answers[1], "jump-ahead changed an answer"
    return rows


async def stepping(tokenizer: Tokenizer, args: argparse.Namespace) -> list[Row]:
    """Seconds of the steps as a free row sees them: medians of its gaps while all rows decode."""
    compiler = GrammarCompiler(tokenizer, [EOS], int(str(SHAPES[SHAPE]["vocab_size"])))
    # An answer that random weights cannot end, most of it text.
    endless = {"type": "array", "minItems": 500, "items": PERSON}
    grammar = compiler.compile(spec(endless))
    rng = np.random.default_rng(args.seed)
    length = args.input_len + args.output_len + 1
    with tempfile.TemporaryDirectory() as scratch:
        config = EngineConfig(
            model=ModelOptions(
                path=str(write_shape(SHAPE, Path(scratch) / SHAPE)),
                dtype=args.dtype, load_format="dummy", max_model_len=length,
            ),
            cache=CacheOptions(num_pages=(args.batch + 2) * -(-length // 16), enable_prefix_caching=False),
            scheduler=SchedulerOptions(max_num_seqs=args.batch, jump_ahead=args.jump_ahead),
            stream=StreamOptions(flush_interval_ms=0.0),
            device="cpu",
            num_threads=args.threads,
        )  # fmt: skip
        async with running(config) as running_engine:
            params = SamplingParams(max_tokens=args.output_len, temperature=1.0, ignore_eos=True)

            async def consume(name: str, prompt: list[int], constraint: TokenConstraint | None) -> list[float]:
                request = Request(name, prompt, params, constraint=constraint)
                async with running_engine.submit(request) as stream:
                    return [time.perf_counter() async for _ in stream]

            async def turn(number: int, constrained: bool) -> float:
                prompts = rng.integers(0, 100_000, (args.batch, args.input_len)).tolist()
                marked = [grammar.state() if constrained and row % 4 == 0 else None for row in range(args.batch)]
                rows = zip(prompts, marked, strict=True)
                *_, last = await asyncio.gather(
                    *(consume(f"{number}-{row}", prompt, mark) for row, (prompt, mark) in enumerate(rows))
                )
                # The last prompt's first tokens may still share their steps with prefills.
                return float(np.median(np.diff(last)[1:]))

            await turn(-1, True)
            pairs = []
            for number in range(args.repeat):
                # Each pair begins with the other kind: drift of the machine favours neither.
                order = (False, True) if number % 2 else (True, False)
                found = {kind: await turn(2 * number + place, kind) for place, kind in enumerate(order)}
                pairs.append((found[False], found[True]))
    ratios = [constrained / free for free, constrained in pairs]
    return [
        {
            "name": f"step, batch {args.batch}",
            "free_ms": 1e3 * float(np.median([free for free, _ in pairs])),
            "constrained_ms": 1e3 * float(np.median([constrained for _, constrained in pairs])),
            "ratio": float(np.median(ratios)),
            "ratios": ratios,
        }
    ]


def show(row: Row) -> None:
    line = f"{row['name']:<28}"
    if "us" in row:
        line += ", ".join(f"{name} {value:8.1f} us" for name, value in row["us"].items())
    if "seconds" in row:
        line += f"; without load {row['idle_ms']:.1f} ms; all in {row['seconds']:.2f} s"
    if "forwards" in row:
        line += f"{row['forwards']} forwards for {row['tokens']} tokens, {row['ms']:.1f} ms"
    if "ratio" in row:
        line += f"free {row['free_ms']:.1f} ms, one in four constrained {row['constrained_ms']:.1f} ms: "
        line += f"{100 * (row['ratio'] - 1):+.1f}% (pairs {', '.join(f'{100 * (r - 1):+.1f}%' for r in row['ratios'])})"
    print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.structured", description=__doc__)
    parser.add_argument("what", nargs="*", choices=["masks", "compile", "jump", "step"], default=[])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=8)
    parser.add_argument("--output-len", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--no-jump-ahead", dest="jump_ahead", action="store_false", help="in `step`: masks alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    what = args.what or ["masks", "compile", "jump", "step"]
    rows: list[Row] = []
    if "masks" in what:
        rows += masks(args.repeat)
    if "compile" in what:
        rows += asyncio.run(compiling(made_up_tokenizer()))
    if "jump" in what:
        rows += asyncio.run(jumping(args.repeat))
    if "step" in what:
        rows += asyncio.run(stepping(made_up_tokenizer(), args))
    for row in rows:
        show(row)
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
