"""LoRA adapters over HTTP: both peers' routes, names in every family of routes, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.config import LoraModule, LoraOptions
from engine.keys import KeyEntry, digest
from engine.lora import tally
from tests.server.support import Live, live, until

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}


def write(root: Path, name: str, **config: object) -> Path:
    directory = root / name
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({"r": 8, "name": name, **config}))
    return directory


@contextlib.asynccontextmanager
async def serving(root: Path, *names: str, **options: Any) -> AsyncIterator[Live]:
    modules = tuple(LoraModule(name, str(write(root, name))) for name in names)
    given = {"enable": True, "max_loras": 2, "root": str(root), "modules": modules} | options.pop("lora", {})
    lora = LoraOptions(**given)
    async with live(lora=lora, **options) as server:
        yield server


async def text(server: Live, model: str, path: str = "/v1/completions", **fields: Any) -> str:
    given = {"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0} | fields
    status, body = await server.post(path, given)
    assert status == 200, body
    assert body["model"] == model
    return str(body["choices"][0]["text"])


async def raw(server: Live, path: str, body: Any) -> tuple[int, str]:
    async with server.http.post(server.url + path, json=body) as response:
        return response.status, await response.text()


async def test_names_in_every_family(tmp_path: Path) -> None:
    async with serving(tmp_path, "tuned", "other") as server:
        base, tuned, other = [await text(server, name) for name in ("demo", "tuned", "other")]
        assert len({base, tuned, other}) == 3
        assert await text(server, "demo:tuned") == tuned
        assert await text(server, "demo", lora_path="other") == other
        assert await text(server, "demo:tuned", lora_path="other") == tuned  # the model's name wins
        same = {"prompt": "hello", "temperature": 0}
        status, body = await server.post(
            "/generate",
            {"text": ["hello"] * 3, "lora_path": [None, "tuned", "other"],
             "sampling_params": {"max_new_tokens": 8, "temperature": 0}},
        )  # fmt: skip
        assert status == 200 and [one["text"] for one in body] == [base, tuned, other]
        status, body = await server.post("/completion", {"model": "tuned", "n_predict": 8, **same})
        assert status == 200 and body["content"] == tuned
        chats = {}
        for name in ("demo", "tuned"):
            status, body = await server.post("/v1/chat/completions", {"model": name, **CHAT})
            assert status == 200, body
            status, answer = await server.post(
                "/v1/messages", {"model": name, "max_tokens": 4, "temperature": 0, "messages": CHAT["messages"]}
            )
            assert status == 200 and answer["content"][0]["text"] == body["choices"][0]["message"]["content"]
            for form in (name, f"{name}:latest"):
                status, answer = await server.post(
                    "/api/chat",
                    {"model": form, "stream": False, "messages": CHAT["messages"],
                     "options": {"num_predict": 4, "temperature": 0}},
                )  # fmt: skip
                assert status == 200, answer
                assert answer["message"]["content"] == body["choices"][0]["message"]["content"]
            status, answer = await server.post(
                "/v1/responses", {"model": name, "input": "hi", "max_output_tokens": 4, "temperature": 0}
            )
            assert status == 200 and answer["model"] == name
            status, vectors = await server.post("/v1/embeddings", {"model": name, "input": "hi"})
            assert status == 200
            chats[name] = vectors["data"][0]["embedding"]
        assert chats["demo"] != chats["tuned"]


async def test_both_peers_routes(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        write(tmp_path, "one")
        write(tmp_path, "two")
        body = {"lora_name": "a", "lora_path": "one"}
        answer = await raw(server, "/v1/load_lora_adapter", body)
        assert answer == (200, "Success: LoRA adapter 'a' added successfully.")
        first = await text(server, "a")
        status, error = await server.post("/v1/load_lora_adapter", body)
        assert status == 400 and error["error"]["param"] == "lora_name"
        status, answer = await server.post("/load_lora_adapter", body)
        assert status == 400 and not answer["success"] and list(answer["loaded_adapters"]) == ["a"]
        # Other weights under the same name: nothing that was cached of the old ones is seen.
        again = {**body, "lora_path": "two", "load_inplace": True}
        assert (await raw(server, "/v1/load_lora_adapter", again))[0] == 200
        assert await text(server, "a") != first
        async with server.http.get(server.url + "/v1/models") as response:
            cards = {card["id"]: card for card in (await response.json())["data"]}
        assert cards["a"]["parent"] == "demo" and cards["a"]["root"] == str(tmp_path / "two")
        async with server.http.get(server.url + "/v1/models/a") as response:
            assert (await response.json())["id"] == "a"
        assert await raw(server, "/v1/unload_lora_adapter", {"lora_name": "a"}) == (
            200,
            "Success: LoRA adapter 'a' removed successfully.",
        )
        assert (await raw(server, "/v1/unload_lora_adapter", {"lora_name": "a"}))[0] == 404
        status, answer = await server.post("/load_lora_adapter", {"lora_name": "b", "lora_path": str(tmp_path / "one")})
        assert (status, answer["success"], answer["error_message"]) == (200, True, None)
        assert await text(server, "b") == first
        status, answer = await server.post("/unload_lora_adapter", {"lora_name": "b"})
        assert (status, answer["loaded_adapters"]) == (200, {})


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"lora_name": "x", "lora_path": "../.."}, 403, "lora_path"),
        ({"lora_name": "x", "lora_path": "/etc"}, 403, "lora_path"),
        ({"lora_name": "x", "lora_path": "nothing"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "link"}, 403, "lora_path"),
        ({"lora_name": "x", "lora_path": "wide"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "a\0b"}, 400, "lora_path"),
        ({"lora_name": "demo", "lora_path": "wide"}, 400, "lora_name"),
        ({"lora_name": "x y\n", "lora_path": "wide"}, 400, "lora_name"),
        ({"lora_name": "x"}, 400, "lora_path"),
        ({"lora_path": "wide"}, 400, "lora_name"),
    ],
)
async def test_bad_loads(tmp_path: Path, body: dict[str, str], status: int, param: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write(root, "wide", r=4096)
    (root / "link").symlink_to("/etc")
    async with serving(root) as server:
        found, error = await server.post("/v1/load_lora_adapter", body)
        assert (found, error["error"]["param"]) == (status, param), error
        assert str(tmp_path) not in error["error"]["message"]
        assert server.engine.adapters is not None and not server.engine.adapters.entries


async def test_names_that_are_not_there(tmp_path: Path) -> None:
    async with serving(tmp_path, "tuned") as server:
        for fields in ({"model": "nope"}, {"model": "demo:nope"}, {"lora_path": "nope"}, {"model": "../tuned"}):
            status, body = await server.post("/v1/completions", {"prompt": "hello", **fields})
            assert status == 404 and "`tuned`" in body["error"]["message"], body
        status, body = await server.post("/v1/completions", {"prompt": "hello", "lora_path": ["tuned"]})
        assert status == 400 and body["error"]["param"] == "lora_path"
    async with live() as server:
        status, body = await server.post("/v1/completions", {"prompt": "hello", "lora_path": "x"})
        assert status == 400 and body["error"]["param"] == "lora_path"
        assert (await raw(server, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "x"}))[0] == 400


async def test_names_are_found_under_the_root_and_read_again(tmp_path: Path) -> None:
    async with serving(tmp_path, lora={"max_cpu_loras": 2, "max_loras": 1}) as server:
        for name in "abcd":
            write(tmp_path, name)
        texts = {name: await text(server, name) for name in "abcd"}
        assert len(set(texts.values())) == 4
        store = server.engine.adapters
        assert store is not None
        version = store._entries["a"].version
        reads = store.num_reads
        assert {name: await text(server, name) for name in "abcd"} == texts
        assert store.num_reads == reads + 4  # two at a time, in turn, are one too few each time
        assert store._entries["a"].version == version
        write(tmp_path, "a", changed=True)
        assert await text(server, "a") != texts["a"]
        assert store._entries["a"].version != version


@pytest.mark.parametrize("unload", ["wait", "refuse"])
async def test_unload_while_in_use(tmp_path: Path, unload: str) -> None:
    async with serving(tmp_path, "tuned", lora={"unload": unload}) as server:
        server.device.gate.clear()
        running = asyncio.create_task(text(server, "tuned"))
        await until(lambda: server.num_requests() == 1)
        if unload == "refuse":
            assert (await raw(server, "/v1/unload_lora_adapter", {"lora_name": "tuned"}))[0] == 409
            server.device.gate.set()
            await running
        else:
            unloading = asyncio.create_task(raw(server, "/v1/unload_lora_adapter", {"lora_name": "tuned"}))
            await until(lambda: not server.engine.adapters.entries)  # type: ignore[union-attr]
            assert not unloading.done()
            server.device.gate.set()
            assert len(await running) > 0
            assert (await unloading)[0] == 200


async def test_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, "a", "b", "c", "d", lora={"max_loras": 1}) as server:

        async def scrape() -> dict[str, list[Any]]:
            async with server.http.get(server.url + "/metrics") as response:
                families = text_string_to_metric_families(await response.text())
            return {family.name: family.samples for family in families}

        [info] = (await scrape())["vllm:lora_requests_info"]
        assert info.labels == {"max_lora": "1", "running_lora_adapters": "", "waiting_lora_adapters": ""}
        assert abs(info.value - time.time()) < 600
        server.device.gate.clear()
        tasks = []
        for count, name in enumerate("abc", 1):
            tasks.append(asyncio.create_task(text(server, name, max_tokens=3, ignore_eos=True)))
            await until(lambda count=count: server.num_requests() == count)  # type: ignore[misc]
        [info] = (await scrape())["vllm:lora_requests_info"]
        assert info.labels["running_lora_adapters"] == "a" and info.labels["waiting_lora_adapters"] == "b,c"
        server.device.gate.set()
        await asyncio.gather(*tasks)
        monkeypatch.setattr(tally, "MAX_SERIES", 3)
        await text(server, "d", max_tokens=3, ignore_eos=True)
        await text(server, "a", max_tokens=3, ignore_eos=True)
        await text(server, "demo")
        families = await scrape()
        found = {one.labels["lora_name"]: one.value for one in families["oneloop_lora_generation_tokens"]}
        assert found == {"a": 6, "b": 3, "c": 3, tally.OTHERS: 3}
        found = {one.labels["lora_name"]: one.value for one in families["oneloop_lora_requests"]}
        assert found == {"a": 2, "b": 1, "c": 1, tally.OTHERS: 1}
        [info] = families["vllm:lora_requests_info"]
        assert info.labels["running_lora_adapters"] == info.labels["waiting_lora_adapters"] == ""


async def test_keys(tmp_path: Path) -> None:
    """A key's models are adapters, too; and those who may ask may not load."""
    entries = tuple(
        KeyEntry(name, digest(f"secret-{name}"), models=models)
        for name, models in (("all", None), ("base", ("demo",)), ("tuned", ("tuned",)))
    )
    async with serving(tmp_path, "tuned", "other", key_entries=entries, admin_api_key="root") as server:

        async def ask(key: str, path: str, **fields: Any) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            async with server.http.post(server.url + path, json=fields, headers=headers) as response:
                return response.status

        for key, model, lora_path, status in (
            ("all", "tuned", None, 200), ("all", "demo", "other", 200), ("base", "demo", None, 200),
            ("base", "tuned", None, 404), ("base", "demo:tuned", None, 404), ("base", "demo", "tuned", 404),
            ("tuned", "tuned", None, 200), ("tuned", "other", None, 404), ("tuned", "demo", None, 404),
        ):  # fmt: skip
            given = {"prompt": "hi", "max_tokens": 2, "model": model, "lora_path": lora_path}
            assert await ask(f"secret-{key}", "/v1/completions", **given) == status, (key, model, lora_path)
        body = {"lora_name": "new", "lora_path": "other"}
        for path in ("/v1/load_lora_adapter", "/load_lora_adapter", "/v1/unload_lora_adapter", "/unload_lora_adapter"):
            for key in ("secret-all", "nobody"):
                assert await ask(key, path, **body) in (401, 403), path
        assert await ask("root", "/v1/load_lora_adapter", **body) == 200
