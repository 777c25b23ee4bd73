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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import orjson
from tqdm import tqdm

from bench.datasets import (
    WORDS,
    Job,
    Prompt,
    Source,
    file_jobs,
    multi_turn_jobs,
    random_jobs,
    safe_ids,
    shared_prefix_jobs,
)

WIDTH = 50
TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
WARMUP_SEED = 1_000_003  # warm-up prompts are others than the measured ones, or they would fill the prefix cache


class BenchError(Exception):
    """The benchmark cannot run; one line for the user."""


@dataclass(slots=True)
class Result:
    """One request. Times in seconds; start_time on the perf_counter clock.

    ttft: from sending to the first chunk with content. itl: gaps between chunks with content. latency: from sending
    to the last chunk. output_len: the server's count, or the number of chunks where it reports none.
    """

    success: bool = False
    error: str = ""
    start_time: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    prompt_len: int = 0
    output_len: int = 0
    cached_tokens: int = 0
    text: str = ""


# Arrivals.


def arrival_times(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Seconds from the start at which `count` jobs arrive.

    Gaps are gamma distributed with shape `burstiness` and mean 1/rate (1.0 is a Poisson process), then scaled so
    that the last job arrives at count / rate: a short run has the rate it was asked for.
    """
    if not np.isfinite(rate):
        return np.zeros(count)
    if rate <= 0 or burstiness <= 0:
        raise BenchError("--request-rate and --burstiness must be above 0")
    times = np.cumsum(rng.gamma(burstiness, 1.0 / (rate * burstiness), size=count))
    return times * (count / rate / times[-1]) if count and times[-1] > 0 else times


# One request.


class SSEParser:
    """Bytes of a stream to the payloads of its `data:` fields; events may be cut anywhere."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The payloads that are complete. Comments and other fields are dropped."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def _content(choice: dict[str, Any]) -> tuple[str, bool]:
    """Text of a chunk's choice, and whether the chunk carries output at all (also reasoning or a tool call)."""
    delta = choice.get("delta")
    if delta is None:
        text = choice.get("text") or ""
        return text, bool(text)
    text = delta.get("content") or ""
    more = delta.get("reasoning") or delta.get("reasoning_content") or delta.get("tool_calls")
    return text, bool(text or more)


async def send(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], headers: dict[str, str], prompt_len: int
) -> Result:
    """Stream one request and take its times. Never raises: what went wrong is in `error`."""
    result = Result(prompt_len=prompt_len)
    parser = SSEParser()
    first = last = 0.0  # first chunk with choices; last chunk with content
    chunks = 0
    usage: dict[str, Any] = {}
    finished = False
    parts: list[str] = []
    payload = orjson.dumps(body)
    result.start_time = start = time.perf_counter()
    try:
        async with session.post(url, data=payload, headers=headers) as response:
            if response.status != 200:
                result.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                return result
            async for data in response.content.iter_any():
                now = time.perf_counter()
                for event in parser.feed(data):
                    if event == b"[DONE]":
                        continue
                    message = orjson.loads(event)
                    if error := message.get("error"):
                        result.error = f"error in the stream: {str(error)[:500]}"
                        return result
                    usage = message.get("usage") or usage
                    for choice in message.get("choices") or ():
                        first = first or now
                        text, filled = _content(choice)
                        if choice.get("finish_reason") is not None:
                            finished = True
                            result.latency = now - start
                        if filled:
                            parts.append(text)
                            if chunks:
                                result.itl.append(now - last)
                            else:
                                result.ttft = now - start
                            chunks += 1
                            last = now
                            result.latency = now - start
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        result.error = f"{type(error).__name__}: {error}"
        return result
    if not finished:
        result.error = "the stream ended without a finish_reason"
        return result
    if not chunks:  # every token was without text (special tokens, half characters)
        result.ttft = first - start
    result.success = True
    result.text = "".join(parts)
    result.prompt_len = usage.get("prompt_tokens") or prompt_len
    result.output_len = usage.get("completion_tokens") or chunks
    result.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return result


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and what they say beside the prompt."""

    base_url: str
    chat: bool
    model: str
    headers: dict[str, str] = field(default_factory=dict)
    ignore_eos: bool = False
    temperature: float | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"{self.base_url}/v1/{'chat/completions' if self.chat else 'completions'}"

    def body(self, prompt: Prompt, output_len: int | None) -> dict[str, Any]:
        """JSON of one request."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages" if self.chat else "prompt": prompt,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if output_len is not None:
            body["max_tokens"] = output_len
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body | self.extra_body


async def converse(
    session: aiohttp.ClientSession, target: Target, job: Job, done: Callable[[], object]
) -> list[Result]:
    """All turns of a job, each behind what was asked and answered before; ends with the first failure."""
    results: list[Result] = []
    messages: list[dict[str, Any]] = []
    text = ""
    for turn in job.turns:
        prompt: Prompt
        if target.chat:
            if isinstance(turn, str):
                messages.append({"role": "user", "content": turn})
            else:
                messages += [message for message in turn if isinstance(message, dict)]
            prompt = messages
        elif isinstance(turn, str):
            text += turn
            prompt = text
        else:
            prompt = turn
        result = await send(session, target.url, target.body(prompt, job.output_len), target.headers, job.prompt_len)
        results.append(result)
        done()
        if not result.success:
            break
        messages.append({"role": "assistant", "content": result.text})
        text += f"{result.text}\n"
    return results


async def drive(
    target: Target, jobs: Sequence[Job], arrivals: npt.NDArray[np.float64], max_concurrency: int | None, progress: bool
) -> tuple[list[Result], float]:
    """Run all jobs; results in the jobs' order, and the seconds it took. Measured from the first arrival time 0."""
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    total = sum(len(job.turns) for job in jobs)
    async with client() as session:
        with tqdm(total=total, disable=not progress, unit="req", file=sys.stderr) as bar:

            async def one(job: Job) -> list[Result]:
                if gate is None:
                    return await converse(session, target, job, bar.update)
                async with gate:
                    return await converse(session, target, job, bar.update)

            start = time.perf_counter()
            tasks: list[asyncio.Task[list[Result]]] = []
            for job, arrival in zip(jobs, arrivals, strict=True):
                if (delay := start + arrival - time.perf_counter()) > 0:
                    await asyncio.sleep(delay)
                tasks.append(asyncio.create_task(one(job)))
            results = [result for results in await asyncio.gather(*tasks) for result in results]
            duration = time.perf_counter() - start
    return results, duration


def client() -> aiohttp.ClientSession:
    """No limit on connections: the server is measured, not the client's pool."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
        timeout=aiohttp.ClientTimeout(total=6 * 60 * 60, sock_connect=60),
        headers={"Content-Type": "application/json"},
        read_bufsize=1 << 20,
    )


# Numbers.


def parse_goodput(items: Sequence[str]) -> dict[str, float]:
    """["ttft:200", "tpot:50"] to limits in milliseconds."""
    limits: dict[str, float] = {}
    for item in items:
        name, _, value = item.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            raise BenchError(f"--goodput: {item!r} is not NAME:MILLISECONDS") from None
        if name not in ("ttft", "tpot", "e2el") or limits[name] < 0:
            raise BenchError(f"--goodput: {item!r}: the name must be ttft, tpot or e2el and the time 0 or more")
    return limits


def percentile_name(percentile: float) -> str:
    """99.0 -> p99, 99.9 -> p99.9"""
    return f"p{percentile:g}"


def measure(
    results: Sequence[Result],
    duration: float,
    *,
    percentiles: Sequence[float] = (99.0,),
    goodput: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The numbers of a run, under `vllm bench serve`'s JSON keys; latencies in ms.

    TPOT of a request is (E2EL - TTFT) / (output tokens - 1); requests with one token have none. The peak is of whole
    seconds; a chunk stands for its share of its request's tokens.
    """
    good = [result for result in results if result.success]
    total_input = sum(result.prompt_len for result in good)
    total_output = sum(result.output_len for result in good)
    tpots = [_tpot(result) for result in good if result.output_len > 1]
    series = {
        "ttft": [result.ttft for result in good],
        "tpot": tpots,
        "itl": [gap for result in good for gap in result.itl],
        "e2el": [result.latency for result in good],
    }
    peak_tokens, peak_requests = _peaks(good)
    metrics: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(results) - len(good),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(good) / duration,
        "request_goodput": _num_good(good, goodput) / duration if goodput else None,
        "output_throughput": total_output / duration,
        "total_token_throughput": (total_input + total_output) / duration,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "total_cached_tokens": sum(result.cached_tokens for result in good),
        "num_requests_with_cached_tokens": sum(result.cached_tokens > 0 for result in good),
    }
    for name, values in series.items():
        milliseconds = np.array(values or [0.0]) * 1000
        metrics[f"mean_{name}_ms"] = float(milliseconds.mean())
        metrics[f"median_{name}_ms"] = float(np.median(milliseconds))
        metrics[f"std_{name}_ms"] = float(milliseconds.std())
        for percentile in percentiles:
            metrics[f"{percentile_name(percentile)}_{name}_ms"] = float(np.percentile(milliseconds, percentile))
    return metrics


def _tpot(result: Result) -> float:
    return (result.latency - result.ttft) / (result.output_len - 1) if result.output_len > 1 else 0.0


def _num_good(results: Sequence[Result], limits: dict[str, float]) -> int:
    """Requests that keep every limit."""
    count = 0
    for result in results:
        found = {"ttft": result.ttft, "tpot": _tpot(result), "e2el": result.latency}
        count += all(found[name] * 1000 <= limit for name, limit in limits.items())
    return count


def _peaks(results: Sequence[Result]) -> tuple[float, int]:
    """Most output tokens and most requests alive in any second since the first request was sent."""
    if not results:
        return 0.0, 0
    origin = min(result.start_time for result in results)
    seconds = int(max(result.start_time + result.latency for result in results) - origin) + 1
    tokens = np.zeros(seconds)
    alive = np.zeros(seconds, dtype=np.int64)
    for result in results:
        start = result.start_time - origin
        times = start + result.ttft + np.concatenate(([0.0], np.cumsum(result.itl)))
        places = np.minimum(times.astype(np.int64), seconds - 1)
        np.add.at(tokens, places, result.output_len / len(times))
        alive[int(start) : int(start + result.latency) + 1] += 1
    return float(tokens.max()), int(alive.max())


def table(
    metrics: dict[str, Any],
    *,
    shown: Sequence[str] = ("ttft", "tpot", "itl", "e2el"),
    percentiles: Sequence[float] = (99.0,),
    max_concurrency: int | None = None,
    request_rate: float = float("inf"),
) -> str:
    """The table of `vllm bench serve`, line by line, then two lines on the prefix cache."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]

    def count(title: str, value: int) -> None:
        lines.append(f"{title:<40} {value:<10}")

    def number(title: str, value: float) -> None:
        lines.append(f"{title:<40} {value:<10.2f}")

    count("Successful requests:", metrics["completed"])
    count("Failed requests:", metrics["failed"])
    if max_concurrency is not None:
        count("Maximum request concurrency:", max_concurrency)
    if np.isfinite(request_rate):
        number("Request rate configured (RPS):", request_rate)
    number("Benchmark duration (s):", metrics["duration"])
    count("Total input tokens:", metrics["total_input_tokens"])
    count("Total generated tokens:", metrics["total_output_tokens"])
    number("Request throughput (req/s):", metrics["request_throughput"])
    if metrics["request_goodput"] is not None:
        number("Request goodput (req/s):", metrics["request_goodput"])
    number("Output token throughput (tok/s):", metrics["output_throughput"])
    number("Peak output token throughput (tok/s):", metrics["max_output_tokens_per_s"])
    number("Peak concurrent requests:", metrics["max_concurrent_requests"])
    number("Total token throughput (tok/s):", metrics["total_token_throughput"])
    for name in shown:
        short, title = TITLES[name]
        lines.append(f"{title:-^{WIDTH}}")
        number(f"Mean {short} (ms):", metrics[f"mean_{name}_ms"])
        number(f"Median {short} (ms):", metrics[f"median_{name}_ms"])
        for percentile in percentiles:
            key = percentile_name(percentile)
            number(f"{key.upper()} {short} (ms):", metrics[f"{key}_{name}_ms"])
    lines.append("=" * WIDTH)
    count("Total cached prompt tokens:", metrics["total_cached_tokens"])
    count("Requests with cached tokens:", metrics["num_requests_with_cached_tokens"])
    return "\n".join(lines)


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
