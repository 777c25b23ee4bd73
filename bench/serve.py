"""Load generator for any OpenAI-compatible server: `python -m bench.serve --base-url http://127.0.0.1:8000`.

Sends completions or chats, open loop (a rate) or closed (a concurrency), and prints `vllm bench serve`'s table, so
that numbers can be laid beside other servers'. Exits with 1 when a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson

from bench.datasets import (
    WORDS,
    Job,
    Source,
    file_jobs,
    multi_turn_jobs,
    random_jobs,
    safe_ids,
    shared_prefix_jobs,
)
from bench.figures import TITLES, measure, parse_goodput, table
from bench.sending import BenchError, Target, arrival_times, client, drive

WARMUP_SEED = 1_000_003  # warm-up prompts are others than the measured ones, or they would fill the prefix cache


# The server's side of the setup.


async def get_json(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> Any:
    """A GET's JSON, None for anything but a 200."""
    async with session.get(url, headers=headers) as response:
        return await response.json(content_type=None) if response.status == 200 else None


async def wait_ready(target_url: str, headers: dict[str, str], timeout: float) -> list[str]:
    """Model names of /v1/models, asked until it answers."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            async with client() as session:
                answer = await get_json(session, f"{target_url}/v1/models", headers)
            if answer is not None:
                return [entry["id"] for entry in answer.get("data", [])]
            problem = "no list of models"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise BenchError(f"{target_url}/v1/models does not answer: {problem}")
        await asyncio.sleep(0.2)


def _find_key(value: Any, key: str) -> Any:
    """The first value under `key`, at any depth."""
    if isinstance(value, dict):
        if key in value:
            return value[key]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            if (found := _find_key(item, key)) is not None:
                return found
    return None


async def find_source(
    base_url: str, headers: dict[str, str], model: str, *, ids: bool, vocab_size: int | None
) -> Source:
    """What prompts are made of: ids of a range known to be safe, or words, counted by the server's tokenizer."""
    async with client() as session:
        if ids:
            for path in ("server_info", "get_server_info"):
                if vocab_size is None:
                    vocab_size = _find_key(await get_json(session, f"{base_url}/{path}", headers), "vocab_size")
            if not isinstance(vocab_size, int) or vocab_size < 2:
                raise BenchError("the server does not tell its vocabulary; give --vocab-size")
            return Source(safe_ids(vocab_size))
        text = " ".join(WORDS)
        body = orjson.dumps({"model": model, "prompt": text, "add_special_tokens": False})
        async with session.post(f"{base_url}/tokenize", data=body, headers=headers) as response:
            count = (await response.json(content_type=None)).get("count") if response.status == 200 else None
    return Source(None, count / len(WORDS) if isinstance(count, int) and count else 1.0)


def make_jobs(options: argparse.Namespace, source: Source, count: int, seed: int) -> list[Job]:
    """`count` requests of the chosen dataset."""
    output_len, ratio = options.random_output_len, options.random_range_ratio
    if options.dataset_name == "random":
        return random_jobs(
            source, count, input_len=options.random_input_len, output_len=output_len, range_ratio=ratio, seed=seed
        )
    if options.dataset_name == "shared-prefix":
        return shared_prefix_jobs(
            source,
            count,
            prefix_len=options.prefix_len,
            num_prefixes=options.num_prefixes,
            suffix_len=options.suffix_len,
            output_len=output_len,
            range_ratio=ratio,
            seed=seed,
        )
    if options.dataset_name == "multi-turn":
        return multi_turn_jobs(
            source,
            -(-count // options.num_turns),
            num_turns=options.num_turns,
            input_len=options.random_input_len,
            output_len=output_len,
            prefix_len=options.prefix_len if options.num_prefixes else 0,
            range_ratio=ratio,
            seed=seed,
        )
    if options.dataset_path is None:
        raise BenchError("--dataset-name file needs --dataset-path")
    try:
        jobs = file_jobs(
            Path(options.dataset_path), count, output_len=output_len, num_turns=options.num_turns, seed=seed
        )
    except (OSError, ValueError) as error:
        raise BenchError(str(error)) from None
    if not options.chat and any(
        isinstance(turn, list) and turn and isinstance(turn[0], dict) for job in jobs for turn in job.turns
    ):
        raise BenchError(f"{options.dataset_path}: holds messages; use --endpoint chat")
    return jobs


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything: warm-up, load, numbers."""
    models = await wait_ready(options.base_url, options.headers, options.ready_check_timeout_sec)
    model = options.model or (models[0] if models else None)
    if model is None:
        raise BenchError("the server lists no model; give --model")
    target = Target(
        base_url=options.base_url,
        chat=options.chat,
        model=model,
        headers=options.headers,
        ignore_eos=options.ignore_eos,
        temperature=options.temperature,
        extra_body=options.extra_body,
    )
    # Only what sends synthetic prompts to completions can send ids; all else is text.
    ids = not options.chat and options.dataset_name in ("random", "shared-prefix") and not options.text_prompts
    synthetic = options.dataset_name != "file"
    source = (
        await find_source(options.base_url, options.headers, model, ids=ids, vocab_size=options.vocab_size)
        if synthetic
        else Source()
    )
    jobs = make_jobs(options, source, options.num_prompts, options.seed)
    if options.num_warmups:
        warmups = make_jobs(options, source, options.num_warmups, options.seed + WARMUP_SEED)
        results, _ = await drive(target, warmups, np.zeros(len(warmups)), options.max_concurrency, progress=False)
        if bad := [result.error for result in results if not result.success]:
            raise BenchError(f"a warm-up request failed: {bad[0]}")
    arrivals = arrival_times(len(jobs), options.request_rate, options.burstiness, np.random.default_rng(options.seed))
    results, duration = await drive(target, jobs, arrivals, options.max_concurrency, not options.disable_tqdm)
    metrics = measure(results, duration, percentiles=options.metric_percentiles, goodput=options.goodput)
    metrics["errors"] = [result.error for result in results]
    head = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if options.chat else "openai",
        "backend": "openai-chat" if options.chat else "openai",
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": options.num_prompts,
        "dataset_name": options.dataset_name,
        "seed": options.seed,
        "request_rate": options.request_rate if np.isfinite(options.request_rate) else "inf",
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
    }
    detail = {
        "input_lens": [result.prompt_len for result in results],
        "output_lens": [result.output_len for result in results],
        "ttfts": [result.ttft for result in results],
        "itls": [result.itl for result in results],
        "latencies": [result.latency for result in results],
        "start_times": [result.start_time for result in results],
        "cached_tokens": [result.cached_tokens for result in results],
        "generated_texts": [result.text for result in results],
    }
    return head | metrics | detail


# The command.


def _numbers(text: str) -> list[float]:
    return [float(item) for item in text.split(",") if item]


def _shown(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in TITLES]:
        raise argparse.ArgumentTypeError(f"unknown metric {unknown[0]!r}; known: {', '.join(TITLES)}")
    return [name for name in TITLES if name in names]


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _endpoint(text: str) -> str:
    name = text.rstrip("/").removeprefix("/v1/").removeprefix("v1/")
    if name in ("chat", "chat/completions"):
        return "chat"
    if name == "completions":
        return "completions"
    raise argparse.ArgumentTypeError("must be completions or chat")


def _header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError("must be NAME=VALUE")
    return name, value


def parser() -> argparse.ArgumentParser:
    """Flags, called as in `vllm bench serve` where it has them."""
    p = argparse.ArgumentParser(prog="python -m bench.serve", description="Measure an OpenAI-compatible server.")
    p.add_argument("--base-url", help="http://host:port, instead of --host and --port")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--endpoint", type=_endpoint, default="completions", help="completions or chat")
    p.add_argument("--model", help="default: the first of /v1/models")
    p.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    p.add_argument("--header", type=_header, action="append", default=[], metavar="NAME=VALUE")
    p.add_argument("--extra-body", type=_object, default={}, metavar="JSON", help="more fields for every request")
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--ignore-eos", action="store_true")
    p.add_argument("--ready-check-timeout-sec", type=float, default=30.0)

    load = p.add_argument_group("load")
    load.add_argument("--num-prompts", type=int, default=1000, help="requests; with turns, rounded up to conversations")
    load.add_argument("--num-warmups", type=int, default=0)
    load.add_argument("--request-rate", type=float, default=float("inf"), help="arrivals a second; inf: all at once")
    load.add_argument("--burstiness", type=float, default=1.0, help="1 is Poisson, below more bursty, above more even")
    load.add_argument("--max-concurrency", type=int)
    load.add_argument("--seed", type=int, default=0)

    data = p.add_argument_group("dataset")
    data.add_argument("--dataset-name", choices=["random", "shared-prefix", "multi-turn", "file"], default="random")
    data.add_argument("--dataset-path", help="JSON lines of prompts or messages, or ShareGPT")
    data.add_argument("--random-input-len", "--input-len", type=int, default=1024)
    data.add_argument("--random-output-len", "--output-len", type=int, default=128)
    data.add_argument("--random-range-ratio", type=float, default=0.0)
    data.add_argument("--prefix-len", type=int, default=256)
    data.add_argument("--num-prefixes", type=int, default=10, help="groups; for multi-turn 0 is no system prompt")
    data.add_argument("--suffix-len", type=int, default=256)
    data.add_argument("--num-turns", type=int, default=1)
    data.add_argument("--vocab-size", type=int, help="default: asked from /server_info")
    data.add_argument("--text-prompts", action="store_true", help="send words to completions, not token ids")

    out = p.add_argument_group("report")
    out.add_argument("--percentile-metrics", type=_shown, default=list(TITLES), metavar="ttft,tpot,itl,e2el")
    out.add_argument("--metric-percentiles", type=_numbers, default=[99.0], metavar="50,99")
    out.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help="ttft:200 tpot:50 e2el:5000")
    out.add_argument("--save-result", action="store_true")
    out.add_argument("--save-detailed", action="store_true", help="with every request's times and text")
    out.add_argument("--result-dir", default=".")
    out.add_argument("--result-filename")
    out.add_argument("--disable-tqdm", action="store_true")
    return p


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags, checked, with base_url, chat and headers worked out."""
    options = parser().parse_args(argv)
    options.base_url = (options.base_url or f"http://{options.host}:{options.port}").rstrip("/").removesuffix("/v1")
    options.chat = options.endpoint == "chat"
    options.headers = dict(options.header)
    if options.api_key:
        options.headers.setdefault("Authorization", f"Bearer {options.api_key}")
    options.goodput = parse_goodput(options.goodput)
    if options.num_prompts < 1 or options.num_turns < 1 or options.num_warmups < 0:
        raise BenchError("--num-prompts and --num-turns must be at least 1, --num-warmups at least 0")
    if not 0 <= options.random_range_ratio < 1:
        raise BenchError("--random-range-ratio must be 0 or more and below 1")
    return options


def save(outcome: dict[str, Any], options: argparse.Namespace) -> Path:
    """Write the JSON; returns where."""
    detailed = ("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "generated_texts", "errors")
    hidden = () if options.save_detailed else (*detailed, "cached_tokens")
    kept = {key: value for key, value in outcome.items() if key not in hidden}
    name = options.result_filename
    if name is None:
        concurrency = f"-concurrency{options.max_concurrency}" if options.max_concurrency else ""
        model = str(outcome["model_id"]).rpartition("/")[2]
        name = f"{outcome['backend']}-{options.request_rate}qps{concurrency}-{model}-{outcome['date']}.json"
    path = Path(options.result_dir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept), encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 when every request succeeded, 1 when one failed, 2 when the run could not be made."""
    try:
        options = parse(argv)
        outcome = asyncio.run(run(options))
    except BenchError as problem:
        print(f"bench.serve: {problem}", file=sys.stderr)
        return 2
    print(
        table(
            outcome,
            shown=options.percentile_metrics,
            percentiles=options.metric_percentiles,
            max_concurrency=options.max_concurrency,
            request_rate=options.request_rate,
        )
    )
    errors = [error for error in outcome["errors"] if error]
    for error in sorted(set(errors), key=errors.count, reverse=True)[:5]:
        print(f"failed {errors.count(error)}x: {error}", file=sys.stderr)
    if options.save_result or options.save_detailed:
        print(f"written to {save(outcome, options)}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
