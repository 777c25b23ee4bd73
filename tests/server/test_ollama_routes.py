"""What Ollama's clients ask beside answers: the model, embeddings, the store of models; and from where they may ask."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from engine.executor.fake_oracle import FAKE_WIDTH, expected_vector
from engine.models.abilities import Abilities
from engine.models.generation import GenerationDefaults
from engine.models.registry import read_spec
from engine.request import Pooling
from server.endpoints.info import version
from tests.server.support import DEMO, Live, live, served_model, tokenizer
from tests.server.test_ollama import BODY, CHAT, GENERATE, PROMPT, check_error, stream

# ---- what clients ask before


async def test_names(server: Live) -> None:
    for given in ("demo", "demo:latest", "org/demo", "org/demo:latest"):
        body = {**PROMPT, "model": given, "options": {"num_predict": 1}, "stream": False}
        status, answer = await server.post(GENERATE, body)
        assert status == 200 and answer["model"] == given
    for path, body in ((CHAT, BODY), (GENERATE, PROMPT), ("/api/show", {})):
        for given in ("nope", "demo:7b", ":latest"):
            message = check_error(*await server.post(path, {**body, "model": given}), expected=404)
            assert given in message


async def test_the_model_as_it_is() -> None:
    model = served_model(model_config=read_spec(DEMO), generation_defaults=GenerationDefaults.load(DEMO))
    async with live(model=model) as server:
        async with server.http.get(server.url + "/api/version") as response:
            spoken = (await response.json())["version"]
            # What VS Code and Codex ask for, who compare numbers.
            assert tuple(map(int, spoken.split("."))) >= max((0, 6, 4), (0, 13, 4))
        async with server.http.get(server.url + "/version") as response:
            assert (await response.json())["version"] == version() != spoken
        async with server.http.get(server.url + "/api/tags") as response:
            cards = (await response.json())["models"]
        async with server.http.get(server.url + "/api/ps") as response:
            loaded = (await response.json())["models"]
        assert [card["name"] for card in cards] == [card["model"] for card in loaded] == ["demo", "org/demo"]
        card = cards[0]
        assert card["details"]["parameter_size"] == "4.3M" and len(card["digest"]) == 64
        weights = (DEMO / "model.safetensors").stat().st_size
        assert abs(card["size"] - weights) < weights / 10
        assert card["details"]["format"] == "safetensors" and card["details"]["quantization_level"] == "BF16"
        assert card["capabilities"] == ["completion", "tools", "embedding"]
        assert loaded[0]["size_vram"] == 0 and loaded[0]["context_length"] == 512
        for name in ("model", "name"):
            status, shown = await server.post("/api/show", {name: "demo:latest"})
            assert status == 200 and shown["capabilities"] == card["capabilities"]
            architecture = shown["model_info"]["general.architecture"]
            assert shown["model_info"][f"{architecture}.context_length"] == 512
            assert shown["template"] and "temperature 0.7" in shown["parameters"]
        assert "`verbose`" in check_error(*await server.post("/api/show", {"model": "demo", "verbose": True}))


# ---- embeddings


EMBED, OLD_EMBED = "/api/embed", "/api/embeddings"


def vector_of(text: str, most: int = 512) -> Any:
    return expected_vector(tokenizer().encode(text)[:most], Pooling("mean"))


def same(found: Any, wanted: Any, *, scaled: bool = True) -> bool:
    wanted = wanted / np.linalg.norm(wanted) if scaled else wanted
    return len(found) == len(wanted) and bool(
        np.abs(np.array(found) - wanted).max() < 1e-6 * np.abs(wanted).max() + 1e-6
    )


async def test_embed(server: Live) -> None:
    texts = ["a fox", "the moon and the sea " * 20, "x"]
    for given, wanted in ((texts, texts), (texts[0], texts[:1]), (texts[1:2], texts[1:2])):
        status, answer = await server.post(EMBED, {"model": "demo:latest", "input": given, "keep_alive": "5m"})
        assert status == 200 and answer["model"] == "demo:latest", answer
        names = {"model", "embeddings", "total_duration", "load_duration", "prompt_eval_count"}
        assert set(answer) == names and answer["total_duration"] >= answer["load_duration"] >= 0
        assert answer["prompt_eval_count"] == sum(len(tokenizer().encode(text)) for text in wanted)
        assert len(answer["embeddings"]) == len(wanted)
        assert all(same(found, vector_of(text)) for found, text in zip(answer["embeddings"], wanted, strict=True))
    for given in ("", [], None):
        assert await server.post(EMBED, {"model": "demo", "input": given}) == (200, {"model": "demo", "embeddings": []})
    # What is too long is cut, unless that is not wanted.
    long = "w " * 600
    for options, most in (({}, 512), ({"num_ctx": 4096}, 512), ({"num_ctx": 8, "num_gpu": 1}, 8)):
        _, answer = await server.post(EMBED, {"input": ["a", long], "options": options, "dimensions": 0})
        assert answer["prompt_eval_count"] == most + len(tokenizer().encode("a"))
        assert same(answer["embeddings"][1], vector_of(long, most))
        body = {"input": long, "truncate": False, "options": options}
        assert f"maximum context length is {most} tokens" in check_error(*await server.post(EMBED, body))
    await server.all_free()


async def test_the_older_route_of_embeddings(server: Live) -> None:
    status, answer = await server.post(OLD_EMBED, {"model": "demo", "prompt": "a fox", "keep_alive": 0})
    assert status == 200 and set(answer) == {"embedding"}
    # As the model gives it.
    assert same(answer["embedding"], vector_of("a fox"), scaled=False)
    for body in ({"prompt": ""}, {}):
        assert await server.post(OLD_EMBED, body) == (200, {"embedding": []})


async def test_embeddings_of_models_that_have_some_and_of_others() -> None:
    nested = Abilities(generates=False, embedding="mean", width=FAKE_WIDTH, dimensions=(2, 4))
    async with live(model=served_model(abilities=nested)) as server:
        _, answer = await server.post(EMBED, {"input": "a fox", "dimensions": 2})
        assert same(answer["embeddings"][0], vector_of("a fox")[:2])
        assert "`dimensions`" in check_error(*await server.post(EMBED, {"input": "a fox", "dimensions": 3}))
        assert (await server.post("/api/show", {}))[1]["capabilities"] == ["embedding"]
    async with live(model=served_model(abilities=Abilities())) as server:
        for path, body in ((EMBED, {"input": "x"}), (EMBED, {}), (OLD_EMBED, {"prompt": "x"})):
            assert "--pooling" in check_error(*await server.post(path, body))
        assert (await server.post("/api/show", {}))[1]["capabilities"] == ["completion", "tools"]


# ---- the store of models that there is not


async def test_a_served_model_is_there_to_pull(server: Live) -> None:
    for name in ("demo", "demo:latest", "org/demo"):
        for body in ({"model": name}, {"name": name, "stream": True, "insecure": False}):
            assert await stream(server, "/api/pull", body) == [{"status": "success"}]
        assert await server.post("/api/pull", {"model": name, "stream": False}) == (200, {"status": "success"})
    for more in ({}, {"stream": False}):
        message = check_error(*await server.post("/api/pull", {"model": "llama3.2", **more}), expected=404)
        assert "llama3.2" in message and "no others" in message


async def test_what_only_a_store_of_models_does(server: Live) -> None:
    for method, path, body in (
        ("POST", "/api/create", {"model": "mario", "from": "demo", "system": "You are Mario."}),
        ("POST", "/api/copy", {"source": "demo", "destination": "demo-backup"}),
        ("POST", "/api/push", {"model": "demo"}),
        ("DELETE", "/api/delete", {"model": "demo"}),
        ("POST", "/api/blobs/sha256:29fdb92e57cf0827ded04ae6461b5931d01fa595843f55d36f5b275a52087dd2", {}),
    ):
        async with server.http.request(method, server.url + path, json=body) as response:
            assert "This server serves the model that it was started with" in check_error(
                response.status, await response.json()
            )


CURL = "application/x-www-form-urlencoded"
FETCHED = "Sec-Fetch-Site"


async def test_any_content_type_but_from_a_page_of_another_origin() -> None:
    async with live(allowed_origins=("https://app.example",)) as server:
        host = f"127.0.0.1:{server.port}"

        async def status(path: str, kind: str | None, headers: dict[str, str]) -> int:
            fields = {"options": {"num_predict": 1}, "stream": False}
            bodies = {CHAT: BODY | fields, GENERATE: PROMPT | fields}
            data = json.dumps(bodies.get(path, {})).encode()
            request = server.http.post(
                server.url + path,
                data=data,
                headers=headers | ({} if kind is None else {"Content-Type": kind}),
                skip_auto_headers=("Content-Type",),
            )
            async with request as response:
                answer = await response.json()
            if response.status != 200:
                assert "`" not in check_error(response.status, answer, expected=403) and "origin" in answer["error"]
            return response.status

        for path in (CHAT, GENERATE, "/api/show"):
            for kind in (None, "", CURL, "text/plain", "text/plain;charset=UTF-8", "application/octet-stream", "x"):
                for headers in (
                    {},
                    {FETCHED: "none"},
                    {FETCHED: "same-origin"},
                    {"Origin": f"http://{host}", FETCHED: "same-origin"},
                    {"Origin": f"https://{host}"},
                    {"Origin": "https://app.example", FETCHED: "cross-site"},
                ):
                    assert await status(path, kind, headers) == 200, (path, kind, headers)
            for kind in (None, CURL, "text/plain", "multipart/form-data; boundary=x"):
                for headers in (
                    {FETCHED: "cross-site"},
                    {FETCHED: "same-site"},
                    {FETCHED: "new-word"},
                    {"Origin": "null"},
                    {"Origin": ""},
                    {"Origin": "https://evil.example"},
                    {"Origin": "https://evil.example", FETCHED: "same-origin"},
                    {"Origin": f"https://evil.{host}"},
                    {"Origin": f"https://{host}.evil.example"},
                    {"Origin": "http://app.example"},
                ):
                    assert await status(path, kind, headers) == 403, (path, kind, headers)
            # What a browser asks for leave to send.
            assert await status(path, "application/json", {"Origin": "https://evil.example"}) == 200
        # Other families have clients that say it.
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/embeddings", "/generate"):
            async with server.http.post(server.url + path, data=b"{}", headers={"Content-Type": CURL}) as response:
                assert response.status == 415
    async with live(allowed_origins=("*",)) as server:
        headers = {"Content-Type": CURL, "Origin": "https://any.example", FETCHED: "cross-site"}
        async with server.http.post(server.url + "/api/show", data=b"{}", headers=headers) as response:
            assert response.status == 200
