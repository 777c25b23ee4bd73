"""--key-file: limits of keys, OpenAI's headers, and what of a key is kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import ServerOptions, StartupError
from engine.flags import config_from, make_parser
from engine.keys import KeyEntry, digest, read_key_file
from server.keyring import Keyring, RateLimitError, duration
from tests.server.support import Live, live, until
from tests.server.test_errors import check_shape

ASK = {"prompt": [1, 2, 3, 4], "max_tokens": 6, "ignore_eos": True}


def key(name: str, **limits: Any) -> KeyEntry:
    return KeyEntry(name, digest(f"secret-{name}"), **limits)


async def ask(server: Live, name: str, **fields: Any) -> tuple[int, dict[str, str], Any]:
    headers = {"Authorization": f"Bearer secret-{name}"}
    async with server.http.post(server.url + "/v1/completions", json=ASK | fields, headers=headers) as response:
        return response.status, dict(response.headers), json.loads(await response.read())


def freeze(server: Live) -> None:
    """Buckets fill up no more: a busy machine must not matter."""
    now = server.state.keyring._now()
    server.state.keyring._now = lambda: now


async def test_limits_of_keys() -> None:
    entries = (
        key("few", requests_per_minute=2),
        key("short", tokens_per_minute=12),
        key("month", monthly_tokens=10),
        key("other", models=("elsewhere",)),
        key("free"),
    )
    async with live(key_entries=entries) as server:
        freeze(server)
        assert (await ask(server, "nobody"))[0] == 401
        for left in ("1", "0"):
            status, headers, _ = await ask(server, "few")
            assert status == 200 and headers["x-ratelimit-limit-requests"] == "2"
            assert headers["x-ratelimit-remaining-requests"] == left
        status, headers, body = await ask(server, "few")
        check_shape(status, body, expected=429)
        assert body["error"]["code"] == "rate_limit_exceeded" and 25 <= int(headers["Retry-After"]) <= 30
        assert headers["x-ratelimit-reset-requests"].endswith("s")

        status, headers, _ = await ask(server, "short")
        assert status == 200 and headers["x-ratelimit-limit-tokens"] == "12"
        status, headers, body = await ask(server, "short")
        check_shape(status, body, expected=429)
        assert headers["x-ratelimit-remaining-tokens"] == "2" and int(headers["Retry-After"]) >= 5

        assert (await ask(server, "month"))[0] == 200
        status, headers, body = await ask(server, "month")
        check_shape(status, body, expected=429)
        assert body["error"]["code"] == "insufficient_quota" and int(headers["Retry-After"]) >= 1

        status, _, body = await ask(server, "other")
        assert status == 404 and body["error"]["code"] == "model_not_found"
        for _ in range(5):
            status, headers, _ = await ask(server, "free")
            assert status == 200 and not [name for name in headers if name.startswith("x-ratelimit")]
            assert headers["X-Content-Type-Options"] == "nosniff" and headers["Server"] == "oneloop"


async def test_concurrent_requests_of_a_key_and_streams() -> None:
    async with live(key_entries=(key("one", concurrent=1, tokens_per_minute=1000), key("two"))) as server:
        freeze(server)
        server.device.gate.clear()
        first = asyncio.create_task(ask(server, "one"))
        await until(lambda: server.num_requests() == 1)
        assert (await ask(server, "one"))[0] == 429
        second = asyncio.create_task(ask(server, "two"))
        await until(lambda: server.num_requests() == 2)
        server.device.gate.set()
        assert (await first)[0] == (await second)[0] == 200
        headers = {"Authorization": "Bearer secret-one"}
        body = ASK | {"stream": True}
        async with server.http.post(server.url + "/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200 and response.headers["x-ratelimit-remaining-tokens"] == "986"
            await response.read()
        assert (await ask(server, "one"))[1]["x-ratelimit-remaining-tokens"] == "970"


async def test_keys_of_a_file_have_caches_and_shares_of_their_own() -> None:
    async with live(key_entries=(key("a", weight=2.0, priority=5), key("b"))) as server:
        seen = []
        submit = server.engine.submit
        server.engine.submit = lambda request: seen.append(request) or submit(request)  # type: ignore
        await ask(server, "a", user="x")
        await ask(server, "b", user="y")
        assert [one.namespace for one in seen] == ["@a:", "@b:"]
        assert [one.fairness_key for one in seen] == ["@a:", "@b:"]
        assert [one.weight for one in seen] == [2.0, 1.0] and [one.priority for one in seen] == [5, 0]


def test_buckets_and_months(tmp_path: Path) -> None:
    now, month = [0.0], ["2031-01"]
    usage = tmp_path / "keys.toml.usage"
    entries = (key("a", requests_per_minute=60, tokens_per_minute=600, monthly_tokens=1000),)

    def ring() -> Keyring:
        return Keyring((), entries, usage=usage, now=lambda: now[0], today=lambda: month[0])

    keys = ring()
    one = keys.find(["secret-a"])
    assert one is not None and keys.find(["secret-b", ""]) is None
    keys.check_tokens(one, 500)
    with pytest.raises(RateLimitError) as refused:
        keys.check_tokens(one, 200)
    assert refused.value.retry_after == pytest.approx(10.0)
    now[0] += 10.0
    keys.check_tokens(one, 200)
    keys.charge(one, 300)  # an answer may overdraw
    assert keys.headers(one)["x-ratelimit-remaining-tokens"] == "0"
    now[0] += 40.0
    with pytest.raises(RateLimitError) as refused:
        keys.check_tokens(one, 1)
    assert refused.value.code == "insufficient_quota"
    keys.save()
    keys = ring()
    one = keys.find(["secret-a"])
    assert one is not None and one.month_tokens == 1000
    month[0] = "2031-02"
    keys.check_tokens(one, 5000)  # more than a minute's: of a full bucket
    assert one.month_tokens == 5000
    usage.write_text("[1]")
    again = ring().find(["secret-a"])
    assert again is not None and again.month_tokens == 0


def test_durations_are_written_as_openai_does() -> None:
    assert [duration(one) for one in (0.02, 1.5, 360.0, 3600.0, 0.0)] == ["20ms", "1.5s", "6m0s", "1h0m0s", "0ms"]


GOOD = {"name": "a", "sha256": hashlib.sha256(b"secret").hexdigest()}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not valid JSON"),
        ("[]", "needs a list `keys`"),
        ('{"keys": []}', "needs a list `keys`"),
        ('{"keys": [1]}', "is no object"),
        ({"name": "a b"}, "`name` must be"),
        ({"sha256": "my-secret-key"}, "and not the key"),
        ({"key": "my-secret-key"}, "no field 'key'"),
        ({"requests_per_minute": 0}, "`requests_per_minute`"),
        ({"tokens_per_minute": True}, "`tokens_per_minute`"),
        ({"tokens_per_minute": 1e400}, "`tokens_per_minute`"),
        ({"concurrent": 0.5}, "`concurrent`"),
        ({"monthly_tokens": -1}, "`monthly_tokens`"),
        ({"weight": -1}, "`weight`"),
        ({"models": "all"}, "`models`"),
        ({"priority": "high"}, "`priority`"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: Any, told: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"keys": [GOOD | content]}))
    with pytest.raises(ValueError) as caught:
        read_key_file(path)
    assert told in str(caught.value) and "my-secret" not in str(caught.value)


def test_a_file_and_its_flags(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[[keys]]\nname = "a"\nsha256 = "{GOOD["sha256"]}"\nconcurrent = 3\nmodels = ["m"]\n')
    config = config_from(make_parser().parse_args(["--key-file", str(path)]))
    (entry,) = config.server.key_entries
    assert (entry.name, entry.digest, entry.concurrent, entry.models) == ("a", digest("secret"), 3, ("m",))
    assert config.scheduler.policy == "fair" and config.server.key_usage_path == f"{path}.usage"
    path.write_text(path.read_text() * 2)
    with pytest.raises(StartupError, match="same name"):
        config_from(make_parser().parse_args(["--key-file", str(path)]))
    with pytest.raises(StartupError, match="cannot be read"):
        config_from(make_parser().parse_args(["--key-file", str(tmp_path / "none")]))


def test_no_key_is_kept() -> None:
    options = ServerOptions(api_keys=("first-secret",), admin_api_key="second-secret")
    assert "secret" not in repr(options) and options.api_keys == (digest("first-secret"),)


async def test_a_request_that_the_queue_refuses_costs_no_tokens() -> None:
    entries = (key("a", tokens_per_minute=6, monthly_tokens=1000), key("b"))
    async with live(key_entries=entries, max_queued_requests=2, max_num_seqs=1) as server:
        freeze(server)
        server.device.gate.clear()
        others = [asyncio.create_task(ask(server, "b"))]
        await until(lambda: server.engine.stats().num_running == 1)
        others += [asyncio.create_task(ask(server, "b")) for _ in range(2)]
        await until(lambda: server.num_requests() == 3)
        for _ in range(3):
            status, headers, body = await ask(server, "a")
            assert status == 429 and "Too many requests are waiting" in body["error"]["message"], body
            assert headers["x-ratelimit-remaining-tokens"] == "6"
        assert server.state.keyring.keys[0].month_tokens == 0
        server.device.gate.set()
        assert [(await other)[0] for other in others] == [200] * 3
