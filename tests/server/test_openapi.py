"""The OpenAPI document against the code: routes, the fields that are read, and the shapes of real answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from jsonschema import Draft202012Validator

from server.app import ENDPOINTS
from server.openapi.document import document
from server.protocol.body import REFUSED_EVERYWHERE, Body
from server.short_forms import short_form
from tests.server.bad_requests import FAMILIES
from tests.server.support import Live, live
from tests.server.test_adapters import serving, write

pytestmark = pytest.mark.usefixtures("infills")


@pytest_asyncio.fixture
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Live]:
    """Routes of adapters are tried where there are any."""
    path = request.node.callspec.params.get("path", "") if hasattr(request.node, "callspec") else ""
    if not path.endswith("load_lora_adapter"):
        async with live() as plain:
            yield plain
        return
    write(tmp_path, "tuned")
    async with serving(tmp_path, *(["tuned"] if "unload" in path else [])) as adapted:
        yield adapted


Json = dict[str, Any]
DOCUMENT = document("1.2.3")
JSON = "application/json"

OPERATIONS: list[tuple[str, str, Json]] = [
    (method.upper(), path, operation) for path, item in DOCUMENT["paths"].items() for method, operation in item.items()
]
# They are answered with 200 where a trainer is, and weights in files: see test_rollouts.py.
TRAINERS = {
    *("/init_weights_update_group", "/destroy_weights_update_group", "/update_weights_from_distributed"),
    *("/update_weights_from_tensor", "/weights_checker", "/weight_checker", "/init_weight_transfer_engine"),
    *("/shutdown_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"),
}
READING = [(path, operation) for _, path, operation in OPERATIONS if "requestBody" in operation]


def validate(value: Any, schema: Json) -> None:
    Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(value)


def fields(schema: Json) -> set[str]:
    """The names of an object's fields, whichever of its forms has them."""
    if "$ref" in schema:
        return fields(DOCUMENT["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]])
    return set(schema.get("properties", ())).union(*map(fields, schema.get("anyOf", ())))


def examples(operation: Json) -> list[Json]:
    media = operation["requestBody"]["content"][JSON]
    return [example["value"] for example in media.get("examples", {}).values()]


def schemas() -> Iterator[Json]:
    """Everything of the document that stands where a schema stands."""
    yield from DOCUMENT["components"]["schemas"].values()
    for _, _, operation in OPERATIONS:
        for body in (operation.get("requestBody", {}), *operation["responses"].values()):
            for media in body.get("content", {}).values():
                yield media["schema"]


async def test_it_is_served_and_has_every_route_and_no_other(server: Live) -> None:
    async with server.http.get(server.url + "/openapi.json") as response:
        assert response.status == 200 and response.content_type == JSON
        served = await response.json()
    assert served["paths"] == json.loads(json.dumps(DOCUMENT["paths"]))
    routes = {(method, path.replace(":.+", "")) for endpoint in ENDPOINTS for method, path, _ in endpoint.ROUTES}
    assert {(method, path) for method, path, _ in OPERATIONS} == routes
    ids = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert len(set(ids)) == len(ids)


def test_a_path_without_v1_is_the_same_route() -> None:
    """So that schemathesis (tests/clients) need not try both."""
    routes = [route for endpoint in ENDPOINTS for route in endpoint.ROUTES]
    handlers = {(method, path.replace(":.+", "")): handler for method, path, handler in routes}
    # Under these SGLang's routes are, whose answers are others.
    own = ("/load_lora_adapter", "/unload_lora_adapter")
    twice = [(method, path) for method, path in handlers if (method, f"/v1{path}") in handlers and path not in own]
    assert len(twice) >= 18
    for method, path in twice:
        assert handlers[method, path] is handlers[method, f"/v1{path}"]
        told = (DOCUMENT["paths"][form][method.lower()] for form in (path, f"/v1{path}"))
        short, long = ({name: value for name, value in each.items() if name != "operationId"} for each in told)
        assert short == long, path


async def test_it_knows_where_a_proxy_puts_it() -> None:
    async with live(root_path="/llm/") as server, server.http.get(server.url + "/llm/openapi.json") as response:
        assert (await response.json())["servers"] == [{"url": "/llm"}]


def test_every_schema_is_one_and_every_reference_leads_somewhere() -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(target := node.get("$ref"), str):
                yield target
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    found = 0
    for schema in schemas():
        Draft202012Validator.check_schema(schema)
        found += 1
    assert found > 30
    used = {target.rsplit("/", 1)[1] for target in references({"a": DOCUMENT["paths"], "b": DOCUMENT["components"]})}
    assert used == set(DOCUMENT["components"]["schemas"])


class Recorder(dict[str, Any]):
    """The values of a body, which remember what was asked for."""

    def __init__(self, values: Json, asked: set[str]) -> None:
        super().__init__(values)
        self._asked = asked

    def get(self, name: str, default: Any = None) -> Any:
        self._asked.add(name)
        return super().get(name, default)


READ = [each for each in READING if each[0] not in TRAINERS]


@pytest.mark.parametrize(("path", "operation"), READ, ids=[path for path, _ in READ])
async def test_the_fields_that_are_read_are_the_fields_that_are_told(
    server: Live, monkeypatch: pytest.MonkeyPatch, path: str, operation: Json
) -> None:
    asked: set[str] = set()
    parse, changed = Body.parse, Body.changed

    def recording(data: bytes) -> Body:
        body = parse(data)
        body._values = Recorder(body._values, asked)
        return body

    def changing(self: Body, *arguments: Any) -> Body:
        """What is left of a body stays the client's."""
        body = changed(self, *arguments)
        body._values = Recorder(body._values, asked)
        return body

    monkeypatch.setattr(Body, "parse", recording)
    monkeypatch.setattr(Body, "changed", changing)
    told = fields(operation["requestBody"]["content"][JSON]["schema"])
    for body in examples(operation):
        async with server.http.post(server.url + path, json=body) as response:
            assert response.status == 200, await response.read()
            await response.read()
    # What no family takes is told once, in `info`.
    assert asked - set(REFUSED_EVERYWHERE) == told
    assert all(name in DOCUMENT["info"]["description"] for name in REFUSED_EVERYWHERE)


def test_every_route_that_reads_a_body_is_in_the_tables_of_malformed_ones() -> None:
    tested = {family.path for family in FAMILIES}
    tested |= {short for path in tested if (short := short_form(path)) is not None}
    assert {path for path, _ in READING if path not in tested} == {
        "/v1/tokenize",
        "/v1/detokenize",
        "/apply-template",
        "/abort_requests",
        "/v1/rerank",
        "/v2/rerank",
        # In test_rollouts.py.
        *TRAINERS & {path for path, _ in READING},
        *("/pause_generation", "/update_weight_version"),
        # In test_admin.py.
        *("/release_memory_occupation", "/resume_memory_occupation"),
        # In test_rendering.py.
        "/web/api/render",
        # In test_adapters.py.
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"),
    }


# Nothing here can be profiled, nothing that is kept can be cancelled, and there is no store of models.
REFUSED = (
    *("/start_profile", "/stop_profile", "/v1/responses/{response_id}/cancel", "/responses/{response_id}/cancel"),
    *("/api/create", "/api/copy", "/api/push", "/api/blobs/{digest}", "/api/delete"),
)


ANSWERED = [each for each in OPERATIONS if each[1] not in TRAINERS]


@pytest.mark.parametrize(("method", "path", "operation"), ANSWERED, ids=[f"{one[0]} {one[1]}" for one in ANSWERED])
async def test_real_answers_have_the_shapes_that_are_told(
    server: Live, method: str, path: str, operation: Json
) -> None:
    status, kept = await server.post("/v1/responses", {"input": "x", "max_output_tokens": 2})
    assert status == 200
    url = server.url + path.replace("{id}", "demo").replace("{response_id}", kept["id"]).replace("{digest}", "sha256:0")
    url = url.replace("{name}", "base.css").replace("{request_id}", kept["id"])
    url += "?limit=2" if path == "/live/events" else "?seconds=0.01" if path == "/trace" else ""
    bodies: list[Json | None] = [*examples(operation)] if "requestBody" in operation else [None]
    assert bodies
    for body in bodies:
        if body is not None:
            validate(body, operation["requestBody"]["content"][JSON]["schema"])
        async with server.http.request(method, url, json=body) as response:
            raw = await response.read()
        assert response.status == (400 if path in REFUSED else 200), raw
        content = operation["responses"]["200" if response.status == 200 else "4XX"].get("content", {})
        if not content:
            assert raw == b""
            continue
        schema = content[response.content_type]["schema"]
        for value in values(response.content_type, raw):
            validate(value, item(schema) if response.content_type == "text/event-stream" else schema)


def values(kind: str, raw: bytes) -> list[Any]:
    """What an answer holds: one value, or those of a stream."""
    text = raw.decode()
    if kind == JSON:
        return [json.loads(text)]
    if kind == "application/x-ndjson":
        return [json.loads(line) for line in text.splitlines()]
    if kind == "text/event-stream":
        found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        assert len(found) > 1
        return [json.loads(data) for data in found if data != "[DONE]"]
    return [text]


def item(schema: Json) -> Json:
    """The schema of the data of one event."""
    data = schema["properties"]["data"]
    return data.get("anyOf", [data])[0]["contentSchema"]  # type: ignore[no-any-return]


def test_the_schemas_of_answers_are_closed() -> None:
    """Or the test above could not tell a field that nobody has told of."""
    closed = DOCUMENT["components"]["schemas"]["Chat"]
    answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": []}
    validate(answer, closed)
    assert not Draft202012Validator(closed).is_valid({**answer, "more": 1})
