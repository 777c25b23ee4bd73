"""Requests of a benchmark to an OpenAI-compatible server, when each goes out, and what is seen of its answer."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import orjson
from tqdm import tqdm

from bench.datasets import Job, Prompt


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
