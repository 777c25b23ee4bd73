"""What is written down of requests: log lines of both forms, tokens and money by key, spans."""

from __future__ import annotations

import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from engine.config import StartupError
from engine.flags import config_from, make_parser
from engine.request import Request, SamplingParams
from engine.stream import TokenStream
from server import request_log, spans, trace_file
from server.accounts import Accounts, PriceList
from tests.server.support import live


def formatted(caplog: pytest.LogCaptureFixture, formatter: logging.Formatter) -> list[str]:
    return [formatter.format(record) for record in caplog.records if record.name == "oneloop.access"]


async def test_a_line_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="oneloop.access")
    async with live(access_log=True, api_keys=("secret-key", "other-key")) as server:
        headers = {"Authorization": "Bearer other-key", "X-Request-Id": "mine"}
        await server.post("/v1/completions", {"prompt": "hello", "max_tokens": 3, "n": 2}, headers=headers)
        await server.post("/v1/completions", {}, headers={"Authorization": "Bearer wrong"})
        async with server.http.get(f"{server.url}/no%0a%22such route?secret-query") as response:
            assert response.status == 401
    lines = formatted(caplog, request_log.JsonFormatter())
    first, refused, strange = (json.loads(line) for line in lines)
    assert (first["status"], first["key"], first["request_id"], first["path"]) == (200, "1", "mine", "/v1/completions")
    assert (first["sequences"], first["output_tokens"]) == (2, 6) and first["ttft"] <= first["seconds"]
    assert first["prompt_tokens"] >= first["cached_tokens"] and first["message"] == "request"
    assert (refused["status"], refused["key"]) == (401, None) and "output_tokens" not in refused
    assert strange["method"] == "GET"
    texts = formatted(caplog, logging.Formatter(request_log.TEXT_FORMAT))
    for line in (*lines, *texts):
        assert "\n" not in line and "secret" not in line and "other-key" not in line
    assert " status=200 " in texts[0] and "request_id=mine" in texts[0]


def test_json_lines_hold_errors_and_whatever_a_message_holds() -> None:
    formatter = request_log.JsonFormatter()
    try:
        raise ValueError("a\nb")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "bad \ud800 %s", ("\n",), sys.exc_info())
    line = formatter.format(record)
    told = json.loads(line)
    assert "\n" not in line and told["level"] == "error" and "ValueError: a\nb" in told["error"]


@pytest.mark.parametrize(
    ("argv", "log_format", "access_log"),
    [
        ([], "text", False),
        (["--access-log"], "text", True),
        (["--log-format", "json"], "json", True),
        (["--log-format", "json", "--no-access-log"], "json", False),
    ],
)
def test_the_access_log_can_be_switched(argv: list[str], log_format: str, access_log: bool) -> None:
    options = config_from(make_parser().parse_args(argv)).server
    assert (options.log_format, options.access_log) == (log_format, access_log)


async def test_tokens_and_money_by_key(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text('{"currency": "EUR", "per": 10, "cached": 1, "prompt": 10, "keys": {"1": {"output": 100}}}')
    async with live(api_keys=("a", "b"), prices=str(path)) as server:
        body = {"prompt": list(range(100, 140)), "max_tokens": 4}
        for key in ("a", "a", "b"):
            status, _ = await server.post("/v1/completions", body, headers={"X-Api-Key": key})
            assert status == 200
        async with server.http.get(f"{server.url}/metrics") as response:
            text = await response.text()
    for key, cached, prompt, output, cost in (("0", 32, 48, 8, 51.2), ("1", 0, 40, 4, 80.0)):
        for kind, count in (("cached", cached), ("prompt", prompt), ("output", output)):
            assert f'oneloop_tokens_total{{key="{key}",kind="{kind}"}} {count}.0' in text
        assert f'oneloop_cost_total{{currency="EUR",key="{key}"}} {cost}' in text


def test_prices_by_toml_and_for_keys(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text('currency = "USD"\noutput = 2\n[keys.team]\nprompt = 0.5\n')
    accounts = Accounts(PriceList.load(str(path)))
    accounts.add("team", cached=5, prompt=1_000_000, output=1_000_000)
    accounts.add("", cached=5, prompt=7, output=500_000)
    assert accounts.cost("team") == pytest.approx(2.5) and accounts.cost("none") == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.json", "{", "is no JSON"),
        ("p.toml", "a = ", "is no TOML"),
        ("p.json", "[1]", "holds no object"),
        ("p.json", "{}", "none of cached, prompt, output"),
        ("p.json", '{"prompt": -1}', "prompt must be a number"),
        ("p.json", '{"prompt": true}', "prompt must be a number"),
        ("p.json", '{"prompt": 1e999}', "prompt must be a number"),
        ("p.json", '{"prompt": NaN}', "prompt must be a number"),
        ("p.json", '{"promt": 1}', "promt is none of"),
        ("p.json", '{"prompt": 1, "per": 0}', "per must be"),
        ("p.json", '{"prompt": 1, "currency": 3}', "currency must be"),
        ("p.json", '{"prompt": 1, "currency": "a\\nb"}', "currency must be"),
        ("p.json", '{"keys": {"a": 1}}', "keys must be"),
        ("p.json", '{"keys": {"a": {"x": 1}}}', "keys.a.x is none of"),
        ("p.json", "\xff\xfe", "is no JSON"),
        ("p.json", "[" * 100_000, "is no JSON"),
        ("missing/p.json", None, "cannot be read"),
        ("", None, "cannot be read"),
        ("a\0b", None, "cannot be read"),
    ],
)
def test_a_price_file_that_is_none_is_one_line(tmp_path: Path, name: str, text: str | None, told: str) -> None:
    path = tmp_path / name if name and "\0" not in name else name
    if text is not None:
        Path(path).write_bytes(text.encode("latin-1"))
    with pytest.raises(StartupError) as caught:
        PriceList.load(str(path))
    assert told in str(caught.value) and "--prices" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing/trace.json", ".", "a\0b", ""])
def test_a_trace_path_that_cannot_be_used_is_one_line(tmp_path: Path, name: str) -> None:
    path = name if "\0" in name or not name else str(tmp_path / name)
    with pytest.raises(StartupError, match="--trace-file") as caught:
        trace_file.check(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "protocol", "told"),
    [
        ("http://", "grpc", "is no URL"),
        ("a b", "grpc", "is no URL"),
        ("localhost:4318", "http/protobuf", "must begin with http"),
        ("http://localhost:4317", "smoke-signals", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"),
    ],
)
def test_an_endpoint_that_is_none(monkeypatch: pytest.MonkeyPatch, endpoint: str, protocol: str, told: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    with pytest.raises(StartupError, match=told):
        spans.check(endpoint)


def test_spans_without_the_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(StartupError, match=r"pip install 'oneloop\[otel\]'"):
        spans.check("http://localhost:4317")


def test_what_a_span_says_of_a_sequence() -> None:
    request = Request("cmpl-1", [1, 2, 3], SamplingParams(max_tokens=8, temperature=0.5))
    stream = TokenStream("cmpl-1", 3, lambda _: None, 10.0)
    stream.admitted_at, stream.first_token_at = 11.0, 13.0
    stream.push("ab", [4, 5])
    told = spans.attributes(request, stream, 20.0, "demo")
    expected: dict[str, Any] = {
        "request.id": "cmpl-1", "response.model": "demo", "request.max_tokens": 8, "usage.prompt_tokens": 3,
        "usage.completion_tokens": 2, "latency.e2e": 10.0, "latency.time_in_queue": 1.0,
        "latency.time_to_first_token": 3.0, "latency.time_in_model_prefill": 2.0, "latency.time_in_model_decode": 7.0,
    }  # fmt: skip
    assert {f"gen_ai.{name}": value for name, value in expected.items()}.items() <= told.items()
    waited = spans.attributes(request, TokenStream("x", 3, lambda _: None, 10.0), 12.0, "demo")
    assert "gen_ai.latency.time_to_first_token" not in waited and None not in waited.values()


async def test_a_request_ends_in_a_span_of_its_callers_trace() -> None:
    ended: list[tuple[str, dict[str, str]]] = []
    sink = types.SimpleNamespace(
        ended=lambda request, stream, clock, headers: ended.append((request.request_id, headers)), close=lambda: None
    )
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with live() as server:
        object.__setattr__(server.state, "spans", sink)
        body = {"prompt": "x", "max_tokens": 1}
        status, answer = await server.post("/v1/completions", body, headers={"traceparent": parent})
        assert status == 200
        await server.post("/v1/completions", body, headers={"traceparent": "x" * 5000})
    assert ended[0] == (answer["id"], {"traceparent": parent}) and ended[1][1] == {}
