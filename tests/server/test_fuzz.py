"""Bodies that nobody thought of: bytes of good requests that were hit, and fields with any JSON value in them.

Examples are the same in every run. Each answer is a 200 or a 4xx in its family's shape, and the server goes on.
"""

# ruff: noqa: E501  (tables)

from __future__ import annotations

import asyncio
import collections
import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.protocol.ignored import HEADER
from tests.server.bad_requests import FAMILIES, Family
from tests.server.support import BOUND_S, Live

SEEDED = settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BYTES = st.one_of(
    st.binary(min_size=0, max_size=4), st.sampled_from([b'"', b"\\", b"[", b"}", b"\xff", b"\x00", b"e9"])
)
NUMBERS = st.one_of(st.integers(), st.integers(-3, 130), st.floats(allow_nan=False, allow_infinity=False))
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["type", "role", "content", "text", "name", "function", "$ref"]), inner),
    ),
    max_leaves=8,
)


@st.composite
def hit_bytes(draw: Callable[[Any], Any], family: Family) -> bytes:
    """A body of the tables, with up to three places of its text replaced."""
    row = draw(st.sampled_from(family.rows[:: max(1, len(family.rows) // 50)]))
    data = json.dumps(draw(st.sampled_from([family.good, family.body(row)]))).encode()[:4000]
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        data = data[:start] + draw(BYTES) + data[start + draw(st.integers(0, 4)) :]
    return data


@st.composite
def odd_fields(draw: Callable[[Any], Any], family: Family) -> bytes:
    """A good body with any values in up to three of the fields that the tables know."""
    names = sorted({name.replace("[", ".").split(".")[0] for name, _ in family.rows if name is not None})
    odd = draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3))
    return json.dumps({**family.good, **odd}).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("make", [hit_bytes, odd_fields])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.path)
async def test_any_body_is_answered(server: Live, family: Family, make: Any) -> None:
    @SEEDED
    @given(make(family))
    def collect(data: bytes) -> None:
        bodies.append(data)

    bodies: list[bytes] = []
    collect()
    assert len(set(bodies)) > 60
    headers = {"Content-Type": "application/json"}
    for data in bodies:
        async with (
            asyncio.timeout(BOUND_S),
            server.http.post(server.url + family.path, data=data, headers=headers) as got,
        ):
            answer = await got.read()
        assert got.status == 200 or 400 <= got.status < 500, (got.status, data, answer)
        if got.status != 200:
            family.check(got.status, json.loads(answer), got.status)
        assert (await server.post(family.path, family.good))[0] == 200, data
    await server.all_free()


# ---- histories and declarations that nobody thought of

WORDS = (
    "text",
    "image",
    "function",
    "custom",
    "namespace",
    "function_call",
    "custom_tool_call_output",
    "tool_use",
    "tool_result",
)
EVIL = (
    "x\r\nSet-Cookie: a=b",
    "\x00\x1b[31m",
    "é\u2028",
    "n" * 3000,
    "../../etc/passwd",
    "<|im_start|>",
    "{{ 7*7 }}",
    "",
)
NAMES = (
    "type", "role", "content", "text", "name", "namespace", "input", "arguments", "call_id", "id", "tools", "output",
    "tool_use_id", "thinking", "source", "action", "function", "custom", "format", "summary", "title", "encrypted_content",
)  # fmt: skip
HISTORIES: dict[str, tuple[str, list[Any], list[Any]]] = {
    "/v1/chat/completions": (
        "messages",
        [
            {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "x"}}]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                {"id": "d", "type": "custom", "custom": {"name": "c", "input": "x"}}]},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "r"}]},
            {"role": "user", "content": "bye"},
        ],
        [{"type": "function", "function": {"name": "f"}}, {"type": "custom", "custom": {"name": "c"}}, {"type": "x"}],
    ),
    "/v1/messages": (
        "messages",
        [
            {"role": "user", "content": [{"type": "document", "title": "t", "source": {"type": "text", "data": "x"}}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
                {"type": "tool_use", "id": "u", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "u", "content": [
                {"type": "search_result", "title": "t", "content": [{"type": "text", "text": "x"}]}]}]},
            {"role": "user", "content": "bye"},
        ],
        [{"name": "f", "input_schema": {}}, {"type": "web_search_20250305", "name": "web_search"}],
    ),
    "/v1/responses": (
        "input",
        [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": "x"},
            {"type": "function_call", "call_id": "c", "namespace": "n", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": "x"}]},
            {"type": "custom_tool_call", "call_id": "d", "name": "c", "input": "x"},
            {"type": "shell_call_output", "call_id": "d", "output": [{"stdout": "x"}]},
            {"role": "user", "content": "bye"},
        ],
        [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]}, {"type": "custom", "name": "c"}],
    ),
}  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a value."""
    found: list[tuple[Any, Any]] = []
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


def odd(rng: random.Random) -> Any:
    """A value that has no business there."""
    deep: Any = "x"
    for _ in range(rng.choice((3, 70))):
        deep = [deep] if rng.random() < 0.5 else {rng.choice(NAMES): deep}
    return rng.choice(
        [None, 0, True, [], {}, [None], deep, rng.choice(WORDS), rng.choice(EVIL), {"type": rng.choice(EVIL)}]
    )


def mutated(rng: random.Random, value: Any) -> Any:
    """A copy with up to four places changed, taken away, doubled or swapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 4)):
        container, key = rng.choice(places(value) or [({"x": 0}, "x")])
        kind = rng.randrange(5)
        if kind == 0 and isinstance(container, dict):
            container[rng.choice(NAMES)] = odd(rng)
        elif kind == 1:
            del container[key]
        elif kind == 2 and isinstance(container, list):
            container.insert(0, copy.deepcopy(container[key]))
        elif kind == 3 and isinstance(container[key], str):
            container[key] = rng.choice(WORDS + EVIL)
        else:
            container[key] = odd(rng)
    return value


@pytest.mark.parametrize("path", HISTORIES)
async def test_any_history_is_answered(server: Live, path: str) -> None:
    rng = random.Random(path)
    field, history, tools = HISTORIES[path]
    statuses: collections.Counter[int] = collections.Counter()
    for _ in range(1000):
        body = {field: history, "tools": tools, "max_output_tokens" if field == "input" else "max_tokens": 1}
        changed = {name: mutated(rng, body[name]) for name in rng.choice([(field,), ("tools",), (field, "tools")])}
        body |= changed | {"stream": rng.random() < 0.2}
        async with asyncio.timeout(BOUND_S), server.http.post(server.url + path, json=body) as got:
            answer = await got.read()
        statuses[got.status] += 1
        assert got.status == 200 or 400 <= got.status < 500, (got.status, changed, answer)
        assert "Set-Cookie" not in got.headers and len(got.headers.get(HEADER, "")) < 2000
    assert statuses[200] > 100 and statuses[400] > 100, statuses
    await server.all_free()
