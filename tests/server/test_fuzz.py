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
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.protocol.ignored import HEADER
from tests.server.bad_fields import Family, check_tei
from tests.server.bad_requests import FAMILIES
from tests.server.support import BOUND_S, Live

pytestmark = pytest.mark.usefixtures("infills")
SEEDED = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = {"Content-Type": "application/json"}
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
    assert len(set(bodies)) > 40
    for data in bodies:
        async with (
            asyncio.timeout(BOUND_S),
            server.http.post(server.url + family.path, data=data, headers=JSON) as got,
        ):
            answer = await got.read()
        assert got.status == 200 or 400 <= got.status < 500, (got.status, data, answer)
        if got.status != 200:
            family.check(got.status, json.loads(answer), got.status)
    # What one of them had broken would be broken for good.
    assert (await server.post(family.path, family.good))[0] == 200
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
        [None, 0, True, [], {}, [None], deep, DEEP, rng.choice(WORDS), rng.choice(EVIL), {"type": rng.choice(EVIL)}]
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
    for _ in range(700):
        body = {field: history, "tools": tools, "max_output_tokens" if field == "input" else "max_tokens": 1}
        changed = {name: mutated(rng, body[name]) for name in rng.choice([(field,), ("tools",), (field, "tools")])}
        body |= changed | {"stream": rng.random() < 0.2}
        async with (
            asyncio.timeout(BOUND_S),
            server.http.post(server.url + path, data=written(body), headers=JSON) as got,
        ):
            answer = await got.read()
        statuses[got.status] += 1
        assert got.status == 200 or 400 <= got.status < 500, (got.status, changed, answer)
        assert "Set-Cookie" not in got.headers and len(got.headers.get(HEADER, "")) < 2000
    assert statuses[200] > 100 and statuses[400] > 100, statuses
    await server.all_free()


# ---- good bodies with one value within them that has no business there

OBJECT = {"type": "object", "properties": {"a": {"type": "string", "enum": ["x"]}}, "required": ["a"]}
FUNCTION = {"type": "function", "function": {"name": "f", "description": "d", "parameters": OBJECT, "strict": True}}
CUSTOM_FORMAT = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}
CUSTOM = {"type": "custom", "custom": {"name": "c", "format": {"type": "grammar", "grammar": CUSTOM_FORMAT}}}
HI = [{"role": "user", "name": "n", "content": [{"type": "text", "text": "hi"}]}]
TAG = {"begin": "<a>", "content": {"type": "json_schema", "json_schema": OBJECT}, "end": "</a>"}
NAMED = {"type": "json_schema", "json_schema": {"name": "n", "description": "d", "strict": True, "schema": OBJECT}}
FLAT = {"type": "function", "name": "f", "description": "d", "parameters": OBJECT, "strict": True}
SPACE = {"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "function", "name": "g"}]}
PARAMS = {"max_new_tokens": 1, "stop": ["x"], "logit_bias": {"5": 1.5}, "stop_token_ids": [5], "json_schema": "{}"}
OPTIONS = {"num_predict": 1, "num_ctx": 400, "stop": ["x"], "seed": 1, "temperature": 0.5, "use_mmap": True}
# By route: bodies that are answered, each field of which is then hit at every depth.
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {
        "messages": HI, "tools": [FUNCTION, CUSTOM], "parallel_tool_calls": True, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "metadata": {"a": "b"},
        "logit_bias": {"5": 1.5}, "chat_template_kwargs": {"enable_thinking": False}, "stop": ["x"],
        "stop_token_ids": [5], "bad_words": ["b"], "user": "u", "reasoning_effort": "low", "logprobs": True,
    }),
    *(("/v1/chat/completions", {"messages": HI, "tools": [FUNCTION, CUSTOM], "tool_choice": choice}) for choice in (
        "required",
        {"type": "function", "function": {"name": "f"}},
        {"type": "custom", "custom": {"name": "c"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
            {"type": "function", "function": {"name": "f"}}, {"type": "custom", "custom": {"name": "c"}}]}},
    )),
    ("/v1/chat/completions", {"messages": HI, "response_format": NAMED}),
    ("/v1/chat/completions", {"messages": HI, "response_format": {"type": "structural_tag", "format": {
        "type": "triggered_tags", "triggers": ["<"], "tags": [TAG]}}}),
    ("/v1/chat/completions", {"messages": HI, "response_format": {"type": "structural_tag", "triggers": ["<"],
        "structures": [{"begin": "<a>", "schema": OBJECT, "end": "</a>"}]}}),
    ("/v1/completions", {"prompt": ["x"], "structured_outputs": {"json": OBJECT, "whitespace_pattern": " ?"}}),
    ("/v1/completions", {"prompt": [[5, 6]], "allowed_token_ids": [5, 2], "logprobs": 1, "echo": True}),
    ("/v1/completions", {"prompt": "x", "guided_choice": ["a"], "guided_whitespace_pattern": " ?"}),
    ("/completion", {"prompt": ["x"], "n_predict": 1, "logit_bias": [[5, 1.5], ["a", False]], "json_schema": OBJECT,
        "stop": ["x"], "samplers": ["top_k"], "lora": []}),
    ("/tokenize", {"content": "x", "with_pieces": True}),
    ("/tokenize", {"messages": HI, "tools": [FUNCTION]}),
    ("/v1/messages", {
        "messages": HI, "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "f", "description": "d", "input_schema": OBJECT, "strict": True},
                  {"type": "web_search_20250305", "name": "web_search", "max_uses": 1},
                  {"type": "bash_20250124", "name": "bash"}],
        "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        "metadata": {"user_id": "u"}, "stop_sequences": ["x"], "context_management": {"edits": [{"type": "x"}]},
        "mcp_servers": [{"type": "url", "url": "x"}], "container": {"id": "x", "skills": []},
    }),
    ("/v1/messages", {
        "messages": HI, "thinking": {"type": "adaptive", "display": "omitted"}, "stream": True,
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": OBJECT}},
    }),
    ("/v1/responses", {
        "input": "x", "tools": [FLAT, SPACE, {"type": "custom", "name": "c", "format": CUSTOM_FORMAT}, {"type": "mcp"}],
        "text": {"verbosity": "low"}, "reasoning": {"effort": "low", "summary": "auto"}, "metadata": {"a": "b"},
        "include": ["reasoning.encrypted_content"], "stream_options": {"include_obfuscation": False}, "stream": True,
        "prompt_cache_options": {"mode": "x"}, "context_management": [{"type": "compaction"}], "truncation": "auto",
    }),
    *(("/v1/responses", {"input": "x", "tools": [FLAT, SPACE, {"type": "custom", "name": "c"}], "tool_choice": choice})
      for choice in (
        {"type": "function", "name": "f"},
        {"type": "function", "name": "g", "namespace": "n"},
        {"type": "custom", "name": "c"},
        {"type": "namespace", "name": "n"},
        {"type": "allowed_tools", "mode": "required", "tools": [
            {"type": "function", "name": "f"}, {"type": "custom", "name": "c"}]},
    )),
    ("/v1/responses", {
        "input": [{"role": "user", "content": "x"}, {"type": "tool_search_call", "call_id": "c", "arguments": {"query": "q"}},
            {"type": "tool_search_output", "call_id": "c", "tools": [FLAT, SPACE]}],
        "tools": [{"type": "tool_search", "execution": "client", "description": "d", "parameters": OBJECT}]}),
    ("/v1/responses", {"input": "x", "text": {"format": {
        "type": "json_schema", "name": "n", "description": "d", "schema": OBJECT, "strict": True}}}),
    ("/api/chat", {
        "messages": [*HI[:0], {"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [
            {"id": "c", "function": {"name": "f", "arguments": {"a": "x"}}}]},
            {"role": "tool", "tool_name": "f", "content": "r"}],
        "tools": [FUNCTION], "format": OBJECT, "options": OPTIONS, "keep_alive": "5m", "think": False, "stream": False,
    }),
    ("/api/generate", {"prompt": "x", "system": "s", "format": "json", "options": OPTIONS, "stream": False}),
    ("/api/embed", {"input": ["x"], "options": OPTIONS, "truncate": True}),
    ("/generate", {"text": ["x", "y"], "sampling_params": [PARAMS, PARAMS], "rid": ["a", "b"], "stream": False,
        "return_logprob": [True, False], "top_logprobs_num": [1, 0], "logprob_start_len": [0, -1]}),
    ("/v1/embeddings", {"input": ["x"], "encoding_format": "float"}),
    ("/rerank", {"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1}),
    ("/rerank", {"query": "a", "texts": ["b", "c"], "return_text": True}),
    ("/classify", {"input": ["x"], "use_activation": False}),
    ("/pooling", {"input": ["x"], "task": "token_embed", "encoding_format": "float"}),
    ("/embed", {"inputs": ["x"], "truncate": True, "normalize": False}),
    ("/embed_all", {"inputs": ["x"], "truncate": True}),
    ("/predict", {"inputs": [["x"], ["x", "y"]], "raw_scores": True}),
    ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}, "parameters": {"truncate": True}}),
    ("/v1/score", {"query": [5], "items": [[6], [7]], "label_token_ids": [5, 6]}),
    ("/abort_request", {"rid": ["a"], "request_ids": ["b"], "abort_all": False}),
]  # fmt: skip
LIMITS = {"/v1/responses": "max_output_tokens", "/v1/completions": "max_tokens", "/v1/chat/completions": "max_tokens"}
LIMITS["/v1/messages"] = "max_tokens"
# Stands for lists in lists, deeper than Python recurses and than its own writer of JSON would write.
DEEP = "@deep@"
DEPTH = 900
ODD: tuple[Any, ...] = (
    None, True, -1, 2**64 - 1, 1e308, 0.5, "", "x\r\ny", "9" * 5000, [], {}, [[]], [{}], [None], {"type": []},
    {"type": {}}, {"": ""}, DEEP,
)  # fmt: skip
# How many of them are tried in each place.
ODD_EACH = 2


def written(body: Any) -> bytes:
    return json.dumps(body).replace(f'"{DEEP}"', "[" * DEPTH + "]" * DEPTH).encode()


def hit(body: dict[str, Any], number: int) -> Iterator[dict[str, Any]]:
    """The body with each of its places taken away, and with a few odd values in its stead: others in each place."""
    for place in range(len(places(body))):
        for turn in range(ODD_EACH + 1):
            changed = copy.deepcopy(body)
            container, key = places(changed)[place]
            if turn == ODD_EACH:
                del container[key]
            else:
                container[key] = copy.deepcopy(ODD[(number + place * ODD_EACH + turn) % len(ODD)])
            yield changed


@pytest.mark.parametrize("path", dict.fromkeys(path for path, _ in GOOD))
async def test_any_value_at_any_depth_is_answered(server: Live, path: str) -> None:
    check = next(family.check for family in FAMILIES if family.path == path)
    statuses: collections.Counter[int] = collections.Counter()
    for number, body in enumerate(body for route, body in GOOD if route == path):
        if path in LIMITS:
            body = {LIMITS[path]: 1, **body}
        async with server.http.post(server.url + path, json=body) as got:
            assert got.status == 200, (body, await got.read())
        for changed in hit(body, number):
            async with (
                asyncio.timeout(BOUND_S),
                server.http.post(server.url + path, data=written(changed), headers=JSON) as got,
            ):
                answer = await got.read()
            statuses[got.status] += 1
            assert got.status == 200 or 400 <= got.status < 500, (got.status, changed, answer)
            if got.status != 200:
                told = json.loads(answer)
                # A rerank with `texts` is text-embeddings-inference's, and has its errors.
                is_tei = path == "/rerank" and "error_type" in told
                (check_tei if is_tei else check)(got.status, told, got.status)
    assert statuses[200] and statuses[400], statuses
    await server.all_free()
