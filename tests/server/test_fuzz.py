"""Bodies that nobody thought of: bytes of good requests that were hit, and fields with any JSON value in them.

Examples are the same in every run. Each answer is a 200 or a 4xx in its family's shape, and the server goes on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
