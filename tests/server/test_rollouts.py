"""Weight updates as trainers make them: over gloo with another process, as bytes, amid requests; and what stops."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import save

from engine.executor.cpu import CPUExecutor
from engine.forward import Limits
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from server.endpoints.rollouts import UPDATES
from tests.server.support import DEMO, Live, live, until
from tests.server.test_errors import check_shape
from tests.server.test_openapi import DOCUMENT, validate
from tests.server.trainer import PACK, changed

PROMPT = list(range(40, 70))


def read(directory: Path | None) -> CausalLM:
    torch.set_num_threads(1)
    return load_model(read_spec(DEMO), directory or DEMO, dtype=torch.float32, device=torch.device("cpu"))


def device(limits: Limits) -> CPUExecutor:
    return CPUExecutor(read(None), limits, dtype=torch.float32, load=read)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Live]:
    async with live(make_device=device, num_pages=256, weights_root=str(DEMO.parent)) as server:
        server.engine.model_directory = DEMO
        yield server


@functools.cache
def logprobs_of(seed: int | None) -> list[float]:
    """Of PROMPT's tokens from the second on, by transformers with the weights of a step."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    if seed is not None:
        model.load_state_dict(changed(DEMO, seed), strict=False)
        model.tie_weights()
    with torch.inference_mode():
        table = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0], -1)
    return [float(table[at, token]) for at, token in enumerate(PROMPT[1:])]


async def check_weights(server: Live, seed: int | None) -> None:
    """That the server computes what the trainer does."""
    body = {"prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
    status, answer = await server.post("/v1/completions", body)
    assert status == 200, answer
    found = answer["choices"][0]["prompt_logprobs"][1:]
    ours = [entry[str(token)]["logprob"] for entry, token in zip(found, PROMPT[1:], strict=True)]
    assert ours == pytest.approx(logprobs_of(seed), abs=1e-4)


class Trainer:
    def __init__(self, name: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.name = name
        command = [sys.executable, "-m", "tests.server.trainer", str(self.port), name, str(DEMO)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)

    @property
    def group(self) -> dict[str, Any]:
        return {"master_address": "127.0.0.1", "master_port": self.port, "rank_offset": 1, "world_size": 2}

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    one = Trainer("weight_transfer")
    yield one
    assert one.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        one.process.stdin.close()
    one.process.kill()
    one.process.wait()


def announced(seed: int, dtypes: str = "dtypes") -> dict[str, Any]:
    tensors = changed(DEMO, seed)
    shapes = [list(tensor.shape) for tensor in tensors.values()]
    return {"names": list(tensors), dtypes: ["float32"] * len(tensors), "shapes": shapes}


def check_told(path: str, answer: Any, body: dict[str, Any] | None = None) -> None:
    """That the OpenAPI document says so of a request and its answer."""
    operation = DOCUMENT["paths"][path]["post"]
    if body is not None and "requestBody" in operation:
        validate(body, operation["requestBody"]["content"]["application/json"]["schema"])
    validate(answer, operation["responses"]["200"]["content"]["application/json"]["schema"])


async def done(server: Live, path: str, body: dict[str, Any]) -> Any:
    status, answer = await server.post(path, body)
    assert status == 200, answer
    check_told(path, answer, body)
    return answer


async def send(server: Live, seed: int, version: str = "") -> Any:
    """All tensors as one safetensors file."""
    url = server.url + "/update_weights_from_tensor" + (f"?weight_version={version}" if version else "")
    headers = {"Content-Type": "application/octet-stream"}
    async with server.http.post(url, data=io.BytesIO(save(changed(DEMO, seed))), headers=headers) as response:
        assert response.status == 200, await response.read()
        answer = await response.json()
    check_told("/update_weights_from_tensor", answer)
    return answer


async def test_a_group_in_sglangs_words(server: Live, trainer: Trainer) -> None:
    await check_weights(server, None)
    group = {"group_name": trainer.name}
    await done(server, "/init_weights_update_group", {**trainer.group, **group, "backend": "gloo"})
    check_shape(*await server.post("/init_weights_update_group", {**trainer.group, **group}), expected=400)
    trainer.say("1")
    await done(server, "/update_weights_from_distributed", {**announced(1), **group, "weight_version": "one"})
    await check_weights(server, 1)
    # In pieces, while paused: nothing of it serves before the end.
    await done(server, "/pause_generation", {"mode": "retract"})
    trainer.say("2")
    whole = announced(2)
    for part in (slice(0, 5), slice(5, None)):
        piece = {field: values[part] for field, values in whole.items()}
        await done(server, "/update_weights_from_distributed", {**piece, **group, "weight_version": "two"})
        assert server.engine.weight_version == "one"
    await done(server, "/continue_generation", {})
    assert server.engine.weight_version == "two"
    await check_weights(server, 2)
    await done(server, "/destroy_weights_update_group", group)
    check_shape(*await server.post("/destroy_weights_update_group", group), expected=400)


async def test_a_group_in_vllms_words_and_a_trainer_that_stops_amid_an_update(server: Live, trainer: Trainer) -> None:
    async with server.http.get(server.url + "/server_info?config_format=json") as response:
        assert (await response.json())["vllm_config"]["weight_transfer_config"] == {"backend": "gloo"}
    given = {**trainer.group, "packed": True, "packed_buffer_size_bytes": PACK}
    await done(server, "/init_weight_transfer_engine", {"init_info": given})
    body = {"update_info": announced(3, "dtype_names")}
    assert check_shape(*await server.post("/update_weights", body), expected=409)
    await done(server, "/start_weight_update", {})
    trainer.say("packed 3")
    await done(server, "/update_weights", body)
    await check_weights(server, None)
    await done(server, "/finish_weight_update", {"weight_version": "three"})
    await check_weights(server, 3)
    await done(server, "/start_weight_update", {})
    trainer.say("half 4")
    body = {"update_info": {**announced(4, "dtype_names"), "packed": False}}
    error = check_shape(*await server.post("/update_weights", body), expected=400)
    assert "the old weights serve on" in error["message"]
    assert "lost" in check_shape(*await server.post("/finish_weight_update", {}), expected=400)["message"]
    assert server.engine.weight_version == "three"
    await check_weights(server, 3)


async def test_bytes_of_tensors_and_what_is_no_safetensors(server: Live) -> None:
    await send(server, 5, "five")
    await check_weights(server, 5)
    assert server.engine.weight_version == "five"
    name = "model.layers.0.input_layernorm.weight"
    cases = {
        "safetensors bytes": base64.b64encode(b"\x80\x04\x95abc").decode(),
        "Not safetensors": base64.b64encode(b"hello").decode(),
        "base64": "?",
        "no tensor": base64.b64encode(save({"other": torch.zeros(2)})).decode(),
        "has shape": base64.b64encode(save({name: torch.zeros(2)})).decode(),
        "cannot replace": base64.b64encode(
            save({name: torch.zeros(changed(DEMO, 5)[name].shape, dtype=torch.int8)})
        ).decode(),
    }
    for words, bad in cases.items():
        reply = await server.post("/update_weights_from_tensor", {"serialized_named_tensors": [bad]})
        assert words in check_shape(*reply, expected=400)["message"]
    await check_weights(server, 5)
    # A part of the weights: the others stay, those of an earlier update too.
    tensor = changed(DEMO, 5)[name]
    some = {"serialized_named_tensors": base64.b64encode(save({name: tensor})).decode()}
    await done(server, "/update_weights_from_tensor", some)
    await check_weights(server, 5)


async def test_a_trainer_that_never_ends_its_update(server: Live) -> None:
    updates = server.app[UPDATES]
    updates.timeout_s = 0.05
    await done(server, "/start_weight_update", {})
    with contextlib.suppress(AssertionError):
        await send(server, 6)
    await until(lambda: updates.num_staged == 0)
    assert "lost" in check_shape(*await server.post("/finish_weight_update", {}), expected=400)["message"]
    await check_weights(server, None)


async def test_versions_of_tokens_when_weights_change_amid_an_answer(server: Live) -> None:
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    running = asyncio.create_task(server.post("/v1/completions", body))
    stream = {}

    def underway() -> bool:
        for listener in server.engine.publisher.listeners.values():
            stream["one"] = listener
        one = stream.get("one")
        return one is not None and one.sequence.num_tokens > len(PROMPT) + 4

    await until(underway)
    await done(server, "/pause_generation", {"mode": "in_place"})
    await send(server, 7, "seven")
    await done(server, "/continue_generation", {})
    status, answer = await running
    assert status == 200, answer
    spans = answer["choices"][0]["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "seven"]
    cut = spans[0]["end"]
    assert spans[0]["start"] == 0 and spans[1] == {"version": "seven", "start": cut, "end": 60} and 4 < cut < 60
    # What came after the change is what the new weights say of all before it: nothing of the old KV is left.
    ids = answer["choices"][0]["token_ids"]
    rest = {**body, "prompt": PROMPT + ids[:cut], "max_tokens": 60 - cut}
    assert (await done(server, "/v1/completions", rest))["choices"][0]["token_ids"] == ids[cut:]


async def test_an_aborted_rollout_goes_on_as_if_it_had_not_been(server: Live) -> None:
    params = {"max_new_tokens": 40, "temperature": 1.0, "sampling_seed": 11, "ignore_eos": True}
    whole = await done(server, "/generate", {"input_ids": PROMPT, "sampling_params": params})
    running = asyncio.create_task(server.post("/generate", {"input_ids": PROMPT, "sampling_params": params}))
    found = server.engine.publisher.listeners
    await until(lambda: any(one.sequence.num_tokens > len(PROMPT) + 3 for one in found.values()))
    await done(server, "/pause_generation", {})
    status, part = await running
    assert status == 200 and part["meta_info"]["finish_reason"]["type"] == "abort"
    ids = part["output_ids"]
    assert 3 <= len(ids) < 40 and ids == whole["output_ids"][: len(ids)]
    # Before its first token: a waiting one has none to answer with.
    waiting = asyncio.create_task(server.post("/generate", {"input_ids": PROMPT, "sampling_params": params}))
    await until(lambda: server.num_requests() == 1)
    await done(server, "/abort_request", {"abort_all": True})
    reason = (await waiting)[1]["meta_info"]["finish_reason"]
    assert reason["type"] == "abort" and reason["message"].startswith("Abort before prefill")
    await done(server, "/continue_generation", {})
    again = {"input_ids": PROMPT + ids, "sampling_params": {**params, "max_new_tokens": 40 - len(ids)}}
    assert ids + (await done(server, "/generate", again))["output_ids"] == whole["output_ids"]


async def test_checksums_and_names(server: Live) -> None:
    before = await done(server, "/weights_checker", {"action": "checksum"})
    await done(server, "/weights_checker", {"action": "snapshot"})
    await done(server, "/weights_checker", {"action": "compare"})
    await send(server, 8)
    after = await done(server, "/weight_checker", {"action": "checksum"})
    assert before["checksum"] != after["checksum"] and before["per_tensor"].keys() == after["per_tensor"].keys()
    reply = await server.post("/weights_checker", {"action": "compare"})
    assert "differ" in check_shape(*reply, expected=400)["message"]
    assert server.engine.weight_version == "update-1"
    await done(server, "/update_weight_version", {"new_version": "mine"})
    async with server.http.get(server.url + "/get_weight_version") as response:
        assert await response.json() == {"weight_version": "mine"}


class Dying:
    """A group whose trainer dies amid what it sends."""

    def __init__(self) -> None:
        self.began, self.dies, self.closed = threading.Event(), threading.Event(), False

    def receive(self, dtype: str, shape: Sequence[int]) -> memoryview:
        self.began.set()
        assert self.dies.wait(20)
        raise RuntimeError("Connection closed by peer")

    def close(self) -> None:
        self.closed = True


async def test_what_fails_is_dropped_though_its_caller_has_gone(server: Live) -> None:
    updates, group = server.app[UPDATES], Dying()
    await updates.join("g", lambda timeout_s: group)
    await server.engine.pause("keep")
    name, _, shape = next(zip(*announced(1).values(), strict=True))
    await updates.add_files([save({name: torch.zeros(shape)})], "body")
    other, _, wide = list(zip(*announced(1).values(), strict=True))[1]
    task = asyncio.create_task(updates.receive("g", [other], ["F32"], [wide]))
    await asyncio.to_thread(group.began.wait, 20)
    task.cancel()
    await asyncio.sleep(0)
    group.dies.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert group.closed and not updates.groups and not updates.num_staged
    check_shape(*await server.post("/continue_generation", {}), expected=400)
    await check_weights(server, None)


async def test_a_set_does_not_outlive_the_weights_that_it_completes(server: Live) -> None:
    updates = server.app[UPDATES]
    name, _, shape = next(zip(*announced(1).values(), strict=True))
    await server.engine.pause("keep")
    await updates.add_files([save({name: torch.zeros(shape)})], "body")
    await server.engine.load_weights(DEMO, mode="keep")
    told = check_shape(*await server.post("/continue_generation", {}), expected=400)["message"]
    assert "Other weights were loaded meanwhile" in told and not updates.num_staged
    await check_weights(server, None)


async def test_a_group_that_comes_late_is_closed(server: Live) -> None:
    updates, group, go = server.app[UPDATES], Dying(), threading.Event()
    task = asyncio.create_task(updates.join("g", lambda timeout_s: go.wait(20) and group))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    await until(lambda: group.closed)
    assert not updates.groups
