"""What stands in front reads the server by its own contract: endpoint pickers of the Gateway API, KServe, smg."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.support import Live, live, until

# The picker's defaults for vLLM. (SGLang's: num_queue_reqs, num_running_reqs, token_usage, cache_config_info with
# page_size and num_pages.)
VLLM = {
    "waiting": "vllm:num_requests_waiting",
    "running": "vllm:num_requests_running",
    "cache": "vllm:kv_cache_usage_perc",
    "config": "vllm:cache_config_info",
    "lora": "vllm:lora_requests_info",
}


async def scraped(server: Live, names: dict[str, str]) -> dict[str, float | str]:
    """As the endpoint picker of the Gateway API inference extension does it: one gauge by a name, whatever its labels;
    of the adapters the newest; integers in the labels of the cache's configuration."""
    async with server.http.get(server.url + "/metrics") as response:
        assert response.status == 200 and response.content_type == "text/plain"
        families = {family.name: family for family in text_string_to_metric_families(await response.text())}
    told: dict[str, float | str] = {}
    for word in ("waiting", "running", "cache"):
        family = families[names[word]]
        assert family.type == "gauge"
        [sample] = family.samples
        told[word] = sample.value
    [config] = families[names["config"]].samples
    told["block_size"], told["blocks"] = int(config.labels["block_size"]), int(config.labels["num_gpu_blocks"])
    if (family := families.get(names["lora"])) is not None:
        newest = max(family.samples, key=lambda sample: sample.value)
        told["adapters"] = int(newest.labels["max_lora"])
        told["in_use"] = newest.labels["running_lora_adapters"] + newest.labels["waiting_lora_adapters"]
    return told


async def test_an_endpoint_picker_sees_the_queue_and_the_cache() -> None:
    async with live(max_num_seqs=2, api_keys=("secret",)) as server:
        server.engine.metrics.set_cache_config(block_size=16, num_gpu_blocks=4096)
        empty = await scraped(server, VLLM)
        assert empty == {"waiting": 0, "running": 0, "cache": 0, "block_size": 16, "blocks": 4096}
        server.device.gate.clear()
        body = {"prompt": "hello " * 200, "max_tokens": 4}
        headers = {"Authorization": "Bearer secret"}
        asked = [asyncio.create_task(server.post("/v1/completions", body, headers=headers)) for _ in range(5)]
        # One that came long before the others may have both steps in flight to itself.
        await until(lambda: server.engine.stats().num_running + server.engine.stats().num_waiting == 5)
        busy, stats = await scraped(server, VLLM), server.engine.stats()
        assert (busy["waiting"], busy["running"]) == (stats.num_waiting, stats.num_running)
        assert stats.num_running in (1, 2)
        assert 0 < float(busy["cache"]) < 1 and math.isfinite(float(busy["cache"]))
        server.device.gate.set()
        assert [status for status, _ in await asyncio.gather(*asked)] == [200] * 5
        # What is only kept for later prompts is free: a picker must not go round a server for it.
        assert await scraped(server, VLLM) == empty


@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
async def test_kserve_finds_the_openai_routes(path: str) -> None:
    """Its paths begin with /openai; probes come without."""
    async with live(root_path="/openai") as server:
        given: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
        if path == "/completions":
            given = {"prompt": "Hi"}
        status, answer = await server.post(f"/openai/v1{path}", given | {"max_tokens": 2})
        assert status == 200 and answer["usage"]["completion_tokens"] == 2
        status, answer = await server.post(f"/openai/v1{path}", given | {"max_tokens": 0.5})
        assert status == 400 and answer["error"]["param"] == "max_tokens"
        for probe in ("/health", "/ready", "/openai/v1/models"):
            async with server.http.get(server.url + probe) as response:
                assert response.status == 200


async def test_smg_learns_what_it_asks_at_registration() -> None:
    async with live() as server:
        found: dict[str, Any] = {}
        for path in ("/health", "/v1/models", "/version", "/server_info", "/model_info", "/v1/loads", "/get_load"):
            async with server.http.get(server.url + path, params={"include": "core,queues"}) as response:
                assert response.status == 200
                found[path] = await response.json() if "json" in response.content_type else None
        model = found["/v1/models"]["data"][0]
        assert model["owned_by"] == "oneloop" and model["max_model_len"] == found["/server_info"]["max_model_len"]
        [load] = found["/v1/loads"]["loads"]
        for name in ("num_running_reqs", "num_waiting_reqs", "token_usage", "max_total_num_tokens", "gen_throughput"):
            assert isinstance(load[name], int | float)
        assert found["/model_info"]["is_generation"] is True


@pytest.mark.parametrize("model", ["unknown", "", None, 7])
async def test_generate_takes_the_model_that_smg_adds(model: object) -> None:
    """SGLang's route has no such field, and its server never looks at it."""
    async with live() as server:
        body = {"text": "hello", "model": model, "sampling_params": {"max_new_tokens": 2}}
        status, answer = await server.post("/generate", body)
        assert status == 200 and answer["meta_info"]["completion_tokens"] == 2


@pytest.mark.parametrize("field", ["bootstrap_host", "bootstrap_port", "bootstrap_room"])
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
async def test_half_a_request_of_smg_is_not_taken_for_a_whole(path: str, field: str) -> None:
    """Prefill and decode would both compute everything, and nobody would notice."""
    given: dict[str, Any] = {"text": "Hi"} if path == "/generate" else {"prompt": "Hi"}
    if "chat" in path:
        given = {"messages": [{"role": "user", "content": "Hi"}]}
    async with live() as server:
        status, answer = await server.post(path, given | {field: "p" if field == "bootstrap_host" else 9000})
        assert status == 400 and field in str(answer)


def test_the_example_for_kserve_starts_the_server_so() -> None:
    import yaml

    from engine.flags import parse

    path = Path(__file__).parents[2] / "server/deploy/kubernetes/kserve.yaml"
    service = yaml.safe_load(path.read_text())
    [container] = service["spec"]["predictor"]["containers"]
    config, _ = parse(container["args"])
    assert config.server.root_path == "/openai"
    assert container["ports"][0]["containerPort"] == 8000
    assert {container[name]["httpGet"]["path"] for name in ("readinessProbe", "livenessProbe")} == {"/ready", "/health"}
