"""What drafts are worth: `python -m bench.speculation` (a Llama-3.2-1B shape; --gguf FILE for a file, and llama.cpp).

Three texts: an answer that repeats 80% of its prompt (edit), one that repeats nothing (new), and one that the client
predicts (predicted). Random weights write no such texts, so each draw, once the model and the sampler have made it, is
replaced by the text's next token, with drafts and without: what a step computes and what is accepted are as they would
be. Both engines run the same weights in turns, and a ratio is of neighbouring rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import engine.executor.cpu as cpu
from bench.compare_llamacpp import Peer, write_random
from bench.shapes import SHAPES, write_shape
from engine.config import CacheOptions, EngineConfig, SchedulerOptions, SpeculationOptions, StreamOptions
from engine.engine import Engine
from engine.executor.cpu_start import choose_threads
from engine.forward import Int32Array, Limits
from engine.models.loading.load import load_model, weight_bytes
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.ops.sampling.sampler import sample
from engine.request import Request, SamplingParams
from engine.speculation.registry import make_proposer

PAGE = 16
# Of an edited text: tokens that are copied at once, and how many of all are.
_SPAN, _COPIED = (20, 60), 0.8


class Dictation:
    """Replaces what the sampler has drawn by what was to come: texts by the seed of their requests."""

    def __init__(self) -> None:
        self.texts: dict[int, Int32Array] = {}
        self._sample = sample
        setattr(cpu, "sample", self.sample)  # noqa: B010 - not a name that the module exports

    def sample(self, logits: Tensor, params: npt.NDArray[Any], positions: Int32Array) -> Int32Array:
        drawn = self._sample(logits, params, positions)
        for index, (seed, position) in enumerate(zip(params["seed"].tolist(), positions.tolist(), strict=True)):
            text = self.texts.get(seed)
            if text is not None and position < len(text):
                drawn[index] = text[position]
        return drawn


def edited(rng: np.random.Generator, prompt: list[int], length: int, vocab: int) -> list[int]:
    """Spans of the prompt in order, new tokens between them."""
    found: list[int] = []
    at = 0
    while len(found) < length:
        span = int(rng.integers(*_SPAN))
        if at + span > len(prompt):
            at = 0
        found += prompt[at : at + span]
        new = round(span * (1 - _COPIED) / _COPIED)
        found += rng.integers(3, vocab, new).tolist()
        at += span + new
    return found[:length]


def build(model: CausalLM, dtype: torch.dtype, args: argparse.Namespace, batch: int, drafts: int) -> Engine:
    length = args.prompt + args.answer + 1
    pages = (batch + 2) * -(-(length + drafts) // PAGE)
    limits = Limits(
        *(batch, max(512, batch * (1 + drafts)), length, PAGE, pages, model.config.vocab_size),
        num_snapshots=0 if model.config.has_state else None,
        max_draft_tokens=drafts,
    )
    options = SpeculationOptions(
        method=args.method if drafts else None, num_draft_tokens=drafts, prompt_lookup_min=3, prompt_lookup_max=5
    )
    config = EngineConfig(
        cache=CacheOptions(page_size=PAGE, enable_prefix_caching=False),
        scheduler=SchedulerOptions(max_num_seqs=batch),
        stream=StreamOptions(flush_interval_ms=0.0),
        speculation=options,
    )
    proposer = make_proposer(options) if drafts else None
    return Engine(config, cpu.CPUExecutor(model, limits, dtype=dtype, proposer=proposer), None)


async def seconds(
    engine: Engine, dictation: Dictation, texts: list[tuple[list[int], list[int]]], *, predict: bool
) -> float:
    """From the first tokens of all on until the last. texts: prompt and answer of each sequence."""
    firsts: list[float] = []

    async def one(index: int, prompt: list[int], answer: list[int]) -> None:
        seed = index + 1
        dictation.texts[seed] = np.array(prompt + answer, np.int32)
        params = SamplingParams(max_tokens=len(answer), temperature=0.0, seed=seed, ignore_eos=True)
        predicted = tuple(answer) if predict else None
        request = Request(f"bench-{time.monotonic_ns()}-{index}", prompt, params, prediction=predicted)
        tokens: list[int] = []
        async with engine.submit(request) as stream:
            async for delta in stream:
                if not tokens and delta.token_ids:
                    firsts.append(time.perf_counter())
                tokens += delta.token_ids
        assert tokens == answer, "not what was dictated"

    await asyncio.gather(*(one(index, *text) for index, text in enumerate(texts)))
    return time.perf_counter() - max(firsts)


async def measure(
    model: CausalLM, dtype: torch.dtype, args: argparse.Namespace, peer: Peer | None
) -> list[dict[str, object]]:
    dictation, rows = Dictation(), []
    vocab = model.config.vocab_size
    for batch in args.batch:
        engines = {name: build(model, dtype, args, batch, drafts) for name, drafts in (("on", args.drafts), ("off", 0))}
        tasks = [asyncio.create_task(each.run()) for each in engines.values()]
        for kind in args.texts:
            times: dict[str, list[float]] = {"on": [], "off": [], "llama.cpp": [], "llama.cpp plain": []}
            for number in range(args.rounds + 1):
                rng = np.random.default_rng(number)
                texts = []
                for _ in range(batch):
                    prompt = rng.integers(3, vocab, args.prompt).tolist()
                    answer = rng.integers(3, vocab, args.answer).tolist()
                    texts.append((prompt, edited(rng, prompt, args.answer, vocab) if kind == "edit" else answer))
                for name in ("on", "off") if number % 2 else ("off", "on"):
                    taken = await seconds(engines[name], dictation, texts, predict=kind == "predicted")
                    times[name] += [taken] if number else []  # the first round warms up
                if peer is not None and batch == 1 and kind != "predicted":
                    for name, drafts in (("llama.cpp", args.drafts), ("llama.cpp plain", 0)):
                        asked = {"prompt": texts[0][0], "answer": texts[0][1], "drafts": drafts}
                        taken = await asyncio.to_thread(peer.seconds, "dictated", **asked)
                        times[name] += [taken] if number else []
            rows.append(show(kind, batch, args.answer * batch, times))
            speculation = engines["on"].scheduler.speculation
            if speculation is not None:
                rows[-1]["accepted_of_drafted"] = (speculation.num_accepted_tokens, speculation.num_draft_tokens)
        for engine, task in zip(engines.values(), tasks, strict=True):
            task.cancel()
            engine.executor.close()
    return rows


def show(kind: str, batch: int, tokens: int, times: dict[str, list[float]]) -> dict[str, object]:
    """One line as soon as it is known."""
    row: dict[str, object] = {"text": kind, "batch": batch}
    row |= {f"{name}_tokens_per_s": tokens / statistics.median(taken) for name, taken in times.items() if taken}
    row["on_of_off"] = statistics.median(b / a for a, b in zip(times["on"], times["off"], strict=True))
    text = f"{kind:<10} batch {batch:>3}: {row['on_tokens_per_s']:8.1f} tok/s, off {row['off_tokens_per_s']:8.1f}"
    text += f": {row['on_of_off']:.2f} times"
    if theirs := times["llama.cpp"]:
        row["of_llamacpp"] = statistics.median(b / a for a, b in zip(times["on"], theirs, strict=True))
        text += f"; llama.cpp's lookup {row['llama.cpp_tokens_per_s']:.1f} (plain "
        text += f"{row['llama.cpp plain_tokens_per_s']:.1f}): {row['of_llamacpp']:.2f} times that"
    print(text, flush=True)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.speculation", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--gguf", help="a file, or a type of blocks of which a random one is written (Q4_0, Q8_0)")
    parser.add_argument("--llamacpp-python", help="an interpreter that has llama-cpp-python (with --gguf)")
    parser.add_argument("--method", choices=["ngram", "suffix"], default="ngram")
    parser.add_argument("--drafts", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument(
        "--texts", nargs="+", choices=["edit", "new", "predicted"], default=["edit", "new", "predicted"]
    )
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        if args.gguf is None:
            path = write_shape(args.shape, Path(scratch))
        else:
            path = Path(args.gguf)
            if not path.exists():
                path = write_random(Path(scratch) / f"{args.gguf}.gguf", args.gguf)
        spec, length = read_spec(path), args.prompt + args.answer + 1
        threads = args.threads or choose_threads(weight_bytes(spec, path, dtype))
        torch.set_num_threads(threads)
        model = load_model(
            spec,
            path,
            dtype=dtype,
            device=torch.device("cpu"),
            load_format="dummy" if args.gguf is None else "auto",
            max_model_len=length,
        )
        peer = None
        if args.llamacpp_python and args.gguf:
            peer = Peer(args.llamacpp_python, path, threads, 1, length + args.drafts)
        try:
            rows = asyncio.run(measure(model, dtype, args, peer))
        finally:
            if peer is not None:
                peer.close()
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "threads": threads, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
