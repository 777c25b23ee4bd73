"""The load generator: numbers of hand-made traces, arrivals, and whole runs against a small mock server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from bench.figures import measure, parse_goodput, table
from bench.sending import BenchError, Result, SSEParser, arrival_times
from bench.serve import main, parse


class Mock:
    """An OpenAI server that answers `word` per token, told by its fields how to misbehave."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.alive = self.peak = 0
        self.fail_after: int | None = None  # this many requests, the rest get `failure`
        self.failure = "status"
        self.usage = True
        self.delay = 0.0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Mock:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._runner is not None
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/server_info", self._info)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "mock/tiny"}, {"id": "other"}]})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"config": [{"model": {"vocab_size": 800}}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"count": 2 * len(body["prompt"].split()), "tokens": []})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        bad = self.fail_after is not None and len(self.bodies) > self.fail_after
        if bad and self.failure == "status":
            return web.json_response({"error": {"message": "no room"}}, status=429)
        self.alive += 1
        self.peak = max(self.peak, self.alive)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def event(value: object) -> None:
            text = value if isinstance(value, str) else f"data: {json.dumps(value)}"
            await response.write(f"{text}\n\n".encode())

        try:
            await self._stream(body, event, "messages" in body, self.failure if bad else "")
        finally:
            self.alive -= 1
        return response

    async def _stream(self, body: dict[str, Any], event: Any, chat: bool, failure: str) -> None:
        def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
            choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            return {"id": "x", "choices": [choice], "usage": None}

        await event(": a comment is no event")
        if chat:
            await event({"id": "x", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        count = body.get("max_tokens", 4)
        for index in range(count):
            if self.delay:
                await asyncio.sleep(self.delay)
            if failure == "error" and index == 1:
                await event({"error": {"message": "device lost"}})
                break
            if failure == "cut" and index == 1:
                return
            await event(chunk("" if body.get("silent") else f"word{index} ", "length" if index == count - 1 else None))
        prompt = body.get("messages") or body["prompt"]
        size = len(prompt) if isinstance(prompt, list) and not chat else len(str(prompt).split())
        if self.usage:
            usage = {"prompt_tokens": size, "completion_tokens": count}
            await event({"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": size // 2}}})
        await event("data: [DONE]")


@pytest.fixture
def mock() -> Iterator[Mock]:
    with Mock() as server:
        server_url_is_local = server.url.startswith("http://127.0.0.1:")
        assert server_url_is_local
        yield server


def bench(mock: Mock, tmp_path: Path, *flags: str, expect: int = 0) -> dict[str, Any]:
    """Run the command; its saved JSON."""
    status = main(
        [
            *("--base-url", mock.url, "--disable-tqdm", "--save-result", "--save-detailed"),
            *("--result-dir", str(tmp_path), "--result-filename", "result.json"),
            *flags,
        ]
    )
    assert status == expect
    outcome: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    return outcome


SMALL = ("--num-prompts", "6", "--random-input-len", "12", "--random-output-len", "4")


def hand_made() -> list[Result]:
    """Three that succeeded, one that did not."""
    return [
        Result(True, "", 10.0, 0.1, [0.1, 0.3], 0.5, prompt_len=10, output_len=3, cached_tokens=0),
        Result(True, "", 10.5, 0.3, [0.2] * 4, 1.1, prompt_len=20, output_len=5, cached_tokens=16),
        Result(True, "", 12.0, 0.2, [], 0.2, prompt_len=30, output_len=1, cached_tokens=16),
        Result(False, "HTTP 500", 10.0, 9.0, [9.0], 9.0, prompt_len=99, output_len=99, cached_tokens=99),
    ]


def test_measure_by_hand() -> None:
    metrics = measure(hand_made(), 4.0, percentiles=[50, 99.9], goodput={"ttft": 250.0, "tpot": 250.0})
    assert metrics["completed"] == 3
    assert metrics["failed"] == 1
    assert metrics["total_input_tokens"] == 60
    assert metrics["total_output_tokens"] == 9
    assert metrics["request_throughput"] == 0.75
    assert metrics["output_throughput"] == 2.25
    assert metrics["total_token_throughput"] == 69 / 4
    assert metrics["total_cached_tokens"] == 32
    assert metrics["num_requests_with_cached_tokens"] == 2
    assert metrics["mean_ttft_ms"] == pytest.approx(200)
    assert metrics["median_ttft_ms"] == pytest.approx(200)
    assert metrics["std_ttft_ms"] == pytest.approx(np.std([100, 300, 200]))
    assert metrics["p50_ttft_ms"] == pytest.approx(200)
    assert metrics["p99.9_ttft_ms"] == pytest.approx(np.percentile([100, 200, 300], 99.9))
    # (0.5 - 0.1) / 2 and (1.1 - 0.3) / 4; one token has no TPOT.
    assert metrics["mean_tpot_ms"] == pytest.approx(200)
    assert metrics["std_tpot_ms"] == pytest.approx(0)
    # ITL is a list over all requests: 0.1, 0.3 and four times 0.2.
    assert metrics["mean_itl_ms"] == pytest.approx(1200 / 6)
    assert metrics["median_itl_ms"] == pytest.approx(200)
    assert metrics["mean_e2el_ms"] == pytest.approx(600)
    # The second has too late a first token.
    assert metrics["request_goodput"] == 2 / 4


def test_peaks_by_hand() -> None:
    # Second 0: three tokens of the first, at 10.1, 10.2 and 10.5, and one of the second, at 10.8. Second 1: its four.
    metrics = measure(hand_made(), 4.0)
    assert metrics["max_output_tokens_per_s"] == pytest.approx(4)
    assert metrics["max_concurrent_requests"] == 2
    # A chunk of several tokens counts as its share of them.
    one = measure([Result(True, "", 0.0, 0.5, [0.1], 0.6, prompt_len=1, output_len=10)], 1.0)
    assert one["max_output_tokens_per_s"] == pytest.approx(10)


def test_measure_of_nothing() -> None:
    metrics = measure([Result(error="x")], 1.0, goodput={"ttft": 1.0})
    assert metrics["completed"] == 0
    assert metrics["failed"] == 1
    assert metrics["mean_ttft_ms"] == 0
    assert metrics["request_goodput"] == 0
    assert metrics["max_concurrent_requests"] == 0


def test_table() -> None:
    metrics = measure(hand_made(), 4.0, goodput={"ttft": 250.0})
    text = table(metrics, max_concurrency=8, request_rate=2.0, percentiles=[99.0])
    assert text == (
        "============ Serving Benchmark Result ============\n"
        "Successful requests:                     3         \n"
        "Failed requests:                         1         \n"
        "Maximum request concurrency:             8         \n"
        "Request rate configured (RPS):           2.00      \n"
        "Benchmark duration (s):                  4.00      \n"
        "Total input tokens:                      60        \n"
        "Total generated tokens:                  9         \n"
        "Request throughput (req/s):              0.75      \n"
        "Request goodput (req/s):                 0.50      \n"
        "Output token throughput (tok/s):         2.25      \n"
        "Peak output token throughput (tok/s):    4.00      \n"
        "Peak concurrent requests:                2.00      \n"
        "Total token throughput (tok/s):          17.25     \n"
        "---------------Time to First Token----------------\n"
        "Mean TTFT (ms):                          200.00    \n"
        "Median TTFT (ms):                        200.00    \n"
        "P99 TTFT (ms):                           298.00    \n"
        "-----Time per Output Token (excl. 1st token)------\n"
        "Mean TPOT (ms):                          200.00    \n"
        "Median TPOT (ms):                        200.00    \n"
        "P99 TPOT (ms):                           200.00    \n"
        "---------------Inter-token Latency----------------\n"
        "Mean ITL (ms):                           200.00    \n"
        "Median ITL (ms):                         200.00    \n"
        "P99 ITL (ms):                            295.00    \n"
        "----------------End-to-end Latency----------------\n"
        "Mean E2EL (ms):                          600.00    \n"
        "Median E2EL (ms):                        500.00    \n"
        "P99 E2EL (ms):                           1088.00   \n"
        "==================================================\n"
        "Total cached prompt tokens:              32        \n"
        "Requests with cached tokens:             2         "
    )
    short = table(measure(hand_made(), 4.0), shown=["itl"])
    assert "goodput" not in short
    assert "concurrency:" not in short
    assert "configured" not in short
    assert "TTFT" not in short


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (4.0, 0.5), (0.25, 2.0)])
def test_arrivals(burstiness: float, spread: float) -> None:
    times = arrival_times(20_000, 50.0, burstiness, np.random.default_rng(0))
    gaps = np.diff(times, prepend=0.0)
    assert times[-1] == pytest.approx(400)  # the rate is met exactly
    assert gaps.mean() == pytest.approx(0.02)
    # A gamma distribution's deviation is mean / sqrt(shape).
    assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.05)
    if burstiness == 1.0:
        assert np.mean(gaps > 0.02) == pytest.approx(np.exp(-1), abs=0.02)


def test_arrivals_at_the_edges() -> None:
    rng = np.random.default_rng(0)
    assert arrival_times(3, float("inf"), 1.0, rng).tolist() == [0, 0, 0]
    assert len(arrival_times(0, 5.0, 1.0, rng)) == 0
    for rate, burstiness in ((0.0, 1.0), (1.0, 0.0)):
        with pytest.raises(BenchError):
            arrival_times(1, rate, burstiness, rng)


def test_sse_events_may_be_cut_anywhere() -> None:
    stream = b': hi\r\n\r\ndata: {"a": 1}\n\nevent: x\ndata:{"b": 2}\r\n\r\ndata: [DONE]\n\n'
    expected = [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]
    assert SSEParser().feed(stream) == expected
    for size in (1, 2, 7):
        sse = SSEParser()
        parts = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert [event for part in parts for event in sse.feed(part)] == expected


def test_goodput_flags() -> None:
    assert parse_goodput(["ttft:200", "e2el:1.5"]) == {"ttft": 200.0, "e2el": 1.5}
    for bad in ("ttft", "ttft:x", "itl:5", "ttft:-1"):
        with pytest.raises(BenchError, match="--goodput"):
            parse_goodput([bad])


def test_flags() -> None:
    options = parse(["--port", "9", "--endpoint", "/v1/chat/completions", "--header", "a=b", "--api-key", "k"])
    assert options.base_url == "http://127.0.0.1:9"
    assert options.chat
    assert options.headers == {"a": "b", "Authorization": "Bearer k"}
    assert parse(["--base-url", "http://x:1/v1/"]).base_url == "http://x:1"
    assert parse(["--percentile-metrics", "itl,ttft"]).percentile_metrics == ["ttft", "itl"]
    for bad in (
        ["--percentile-metrics", "x"],
        ["--extra-body", "[]"],
        ["--extra-body", "{"],
        ["--endpoint", "x"],
        ["--header", "x"],
    ):
        with pytest.raises(SystemExit):
            parse(bad)
    for wrong in (["--num-prompts", "0"], ["--random-range-ratio", "1"]):
        with pytest.raises(BenchError):
            parse(wrong)


def test_random_ids_on_completions(mock: Mock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = bench(mock, tmp_path, *SMALL, "--ignore-eos", "--extra-body", '{"top_k": 3}', "--header", "X-Test=1")
    assert outcome["completed"] == 6
    assert outcome["failed"] == 0
    assert outcome["total_input_tokens"] == 72
    assert outcome["total_output_tokens"] == 24
    assert outcome["total_cached_tokens"] == 36
    assert outcome["num_requests_with_cached_tokens"] == 6
    assert outcome["request_rate"] == "inf"
    assert (outcome["model_id"], outcome["backend"]) == ("mock/tiny", "openai")
    assert outcome["output_lens"] == [4] * 6
    assert [len(gaps) for gaps in outcome["itls"]] == [3] * 6
    assert outcome["generated_texts"] == ["word0 word1 word2 word3 "] * 6
    assert outcome["errors"] == [""] * 6
    for ttft, gaps, latency in zip(outcome["ttfts"], outcome["itls"], outcome["latencies"], strict=True):
        assert ttft + sum(gaps) == pytest.approx(latency)
    keys = "date endpoint_type tokenizer_id num_prompts burstiness max_concurrency duration request_goodput"
    assert set(keys.split()) <= set(outcome)
    assert {
        f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")
    } <= set(outcome)
    for body in mock.bodies:
        assert body["model"] == "mock/tiny"
        assert len(body["prompt"]) == 12
        assert all(100 <= token < 700 for token in body["prompt"])  # the mock's vocabulary is 800
        assert body["stream_options"] == {"include_usage": True}
        assert (body["ignore_eos"], body["top_k"], body["max_tokens"], body["temperature"]) == (True, 3, 4, 0)
    assert mock.headers[0]["X-Test"] == "1"
    assert "Serving Benchmark Result" in capsys.readouterr().out


def test_chat_with_words(mock: Mock, tmp_path: Path) -> None:
    outcome = bench(mock, tmp_path, *SMALL, "--endpoint", "chat", "--model", "m", "--metric-percentiles", "50,90")
    assert outcome["completed"] == 6
    assert outcome["backend"] == "openai-chat"
    assert "p90_itl_ms" in outcome
    [message] = mock.bodies[0]["messages"]
    assert message["role"] == "user"
    assert len(message["content"].split()) == 6  # the mock counts two tokens a word
    # The role chunk has no content: it is no token.
    assert [len(gaps) for gaps in outcome["itls"]] == [3] * 6


def test_shared_prefix(mock: Mock, tmp_path: Path) -> None:
    flags = ("--dataset-name", "shared-prefix", "--prefix-len", "10", "--num-prefixes", "2", "--suffix-len", "3")
    bench(mock, tmp_path, *SMALL, *flags, "--num-warmups", "2")
    assert len(mock.bodies) == 8
    starts = [tuple(body["prompt"][:10]) for body in mock.bodies]
    assert len(set(starts[2:])) == 2
    assert not set(starts[:2]) & set(starts[2:])  # warm-up prompts do not warm the measured prefixes


def test_multi_turn_sends_the_servers_answers_back(mock: Mock, tmp_path: Path) -> None:
    flags = ("--dataset-name", "multi-turn", "--num-turns", "3", "--num-prompts", "6", "--num-prefixes", "0")
    outcome = bench(mock, tmp_path, *flags, "--random-output-len", "2", "--endpoint", "chat", "--max-concurrency", "1")
    assert outcome["completed"] == 6
    roles = [[message["role"] for message in body["messages"]] for body in mock.bodies]
    assert roles[:3] == roles[3:] == [["user"], ["user", "assistant", "user"], ["user", "assistant"] * 2 + ["user"]]
    assert mock.bodies[1]["messages"][1]["content"] == "word0 word1 "
    assert mock.bodies[1]["messages"][0] == mock.bodies[0]["messages"][0]


def test_multi_turn_on_completions(mock: Mock, tmp_path: Path) -> None:
    flags = ("--dataset-name", "multi-turn", "--num-turns", "2", "--num-prompts", "2", "--random-output-len", "2")
    bench(mock, tmp_path, *flags)
    first, second = (body["prompt"] for body in mock.bodies)
    assert second.startswith(f"{first}word0 word1 \n")


def test_file(mock: Mock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}], "output_tokens": 3}\n')
    flags = ("--dataset-name", "file", "--dataset-path", str(path), "--num-prompts", "2")
    outcome = bench(mock, tmp_path, *flags, "--endpoint", "chat")
    assert outcome["output_lens"] == [3, 3]
    assert mock.bodies[0]["messages"] == [{"role": "user", "content": "hi"}]
    assert main(["--base-url", mock.url, *flags]) == 2
    assert main(["--base-url", mock.url, "--dataset-name", "file"]) == 2
    assert main(["--base-url", mock.url, "--dataset-name", "file", "--dataset-path", "/nowhere"]) == 2
    error = capsys.readouterr().err
    assert "--endpoint chat" in error
    assert "--dataset-path" in error


def test_concurrency_is_bounded_and_the_rate_is_kept(mock: Mock, tmp_path: Path) -> None:
    mock.delay = 0.005
    outcome = bench(mock, tmp_path, *SMALL, "--max-concurrency", "2", "--goodput", "ttft:60000", "e2el:60000")
    assert mock.peak == 2
    assert outcome["request_goodput"] == outcome["request_throughput"]
    outcome = bench(mock, tmp_path, *SMALL, "--request-rate", "40", "--burstiness", "2", "--goodput", "ttft:0")
    assert outcome["duration"] >= 6 / 40
    assert outcome["request_goodput"] == 0
    starts = np.array(outcome["start_times"])
    assert (np.diff(starts) >= 0).all()
    assert starts[-1] - starts[0] > 0.05


@pytest.mark.parametrize(
    ("failure", "words"), [("status", "HTTP 429"), ("error", "device lost"), ("cut", "without a finish_reason")]
)
def test_failures_are_counted(
    failure: str, words: str, mock: Mock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mock.fail_after, mock.failure = 4, failure
    outcome = bench(mock, tmp_path, *SMALL, expect=1)
    assert (outcome["completed"], outcome["failed"]) == (4, 2)
    assert outcome["total_output_tokens"] == 16
    errors = [error for error in outcome["errors"] if error]
    assert len(errors) == 2
    assert all(words in error for error in errors)
    assert words in capsys.readouterr().err


def test_a_failed_warm_up_ends_the_run(mock: Mock, capsys: pytest.CaptureFixture[str]) -> None:
    mock.fail_after = 0
    assert main(["--base-url", mock.url, *SMALL, "--num-warmups", "1"]) == 2
    assert "warm-up" in capsys.readouterr().err


def test_without_usage_chunks_are_counted(mock: Mock, tmp_path: Path) -> None:
    mock.usage = False
    outcome = bench(mock, tmp_path, *SMALL)
    assert outcome["total_output_tokens"] == 24
    assert outcome["total_input_tokens"] == 72  # as asked for
    assert outcome["total_cached_tokens"] == 0


def test_tokens_without_text_are_still_timed(mock: Mock, tmp_path: Path) -> None:
    outcome = bench(mock, tmp_path, *SMALL, "--extra-body", '{"silent": true}')
    assert outcome["completed"] == 6
    assert outcome["total_output_tokens"] == 24
    assert all(0 < ttft <= latency for ttft, latency in zip(outcome["ttfts"], outcome["latencies"], strict=True))


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "1", "--ready-check-timeout-sec", "0"]) == 2
    assert "/v1/models" in capsys.readouterr().err


def test_saved_without_details_and_named_by_itself(mock: Mock, tmp_path: Path) -> None:
    flags = ("--base-url", mock.url, *SMALL, "--save-result", "--result-dir", str(tmp_path), "--max-concurrency", "3")
    assert main(flags) == 0
    [path] = tmp_path.iterdir()
    assert path.name.startswith("openai-infqps-concurrency3-tiny-")
    outcome = json.loads(path.read_text())
    assert "itls" not in outcome
    assert "generated_texts" not in outcome
