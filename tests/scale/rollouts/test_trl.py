"""TRL's own clients against this server: rollouts, weights over a group, and both sides' log-probabilities.

No GPU and no vLLM is there, so the group is of gloo; see communicator.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
from torch import Tensor

import engine.demo
from tests.scale.rollouts import communicator

communicator.install()
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from trl.experimental.async_grpo.vllm_client import VLLMClient as AsyncClient  # noqa: E402
from trl.generation.vllm_client import VLLMClient  # noqa: E402

ROOT, DEMO = Path(__file__).parents[3], Path(engine.demo.__file__).parent
ADMIN = "trainers-only"
PROMPTS = [list(range(40, 70)), list(range(300, 320)), [7, 8, 9]]
NUM_CHOICES, NUM_TOKENS, VOCAB = 2, 12, 2304
TOLERANCE = 1e-4


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass(frozen=True)
class Setting:
    model: Any
    url: str


def make_model(directory: Path) -> Any:
    """A tiny Llama with the demo model's words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    ).float()
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, directory)
    return model


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    directory = tmp_path_factory.mktemp("rollouts")
    model, port, log = make_model(directory / "model"), free_port(), directory / "log"
    command = [sys.executable, "-m", "engine.serve", "--model", str(directory / "model"), "--port", str(port)]
    command += ["--dtype", "float32", "--threads", "1", "--kv-cache-gb", "0.1", "--admin-api-key", ADMIN]
    # As TRL's documentation has it.
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=ROOT)
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"{url}/ready", timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail(log.read_text())
        yield Setting(model, url)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def client(setting: Setting) -> Iterator[VLLMClient]:
    one = VLLMClient(base_url=setting.url, group_port=free_port())
    one.session.headers["Authorization"] = f"Bearer {ADMIN}"
    yield one
    if one.communicator is not None:
        one.communicator.close()
    one.close_communicator()
    one.session.close()


def logprobs_of(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> Tensor:
    """float32 [len(completion)]: what the trainer's forward says of sampled tokens."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    table = torch.log_softmax(logits / temperature, -1)
    return table.gather(1, torch.tensor(completion)[:, None])[:, 0]


def roll_out(client: VLLMClient, **fields: Any) -> list[tuple[list[int], list[int], list[float]]]:
    """(prompt, completion, the server's log-probability of each of its tokens) by choice."""
    found = client.generate(
        PROMPTS, n=NUM_CHOICES, max_tokens=NUM_TOKENS, logprobs=0, generation_kwargs={"ignore_eos": True}, **fields
    )
    assert found["prompt_ids"] == PROMPTS
    prompts = [prompt for prompt in PROMPTS for _ in range(NUM_CHOICES)]
    answers = zip(prompts, found["completion_ids"], found["logprobs"], found["logprob_token_ids"], strict=True)
    rollouts = []
    for prompt, completion, logprobs, ids in answers:
        assert [one for (one,) in ids] == completion and len(completion) == NUM_TOKENS
        rollouts.append((prompt, completion, [one for (one,) in logprobs]))
    return rollouts


def check_agreement(client: VLLMClient, model: Any) -> None:
    """Of tokens that are sampled now, at two temperatures, and of the same scored as prompts."""
    for temperature in (0.7, 1.0):
        rollouts = roll_out(client, temperature=temperature)
        with torch.inference_mode():
            own = [logprobs_of(model, prompt, completion, temperature) for prompt, completion, _ in rollouts]
        for mine, (_, _, logprobs) in zip(own, rollouts, strict=True):
            assert logprobs == pytest.approx(mine.tolist(), abs=TOLERANCE)
    whole = [prompt + completion for prompt, completion, _ in rollouts]
    lengths = [len(prompt) for prompt, _, _ in rollouts]
    # Or a token that is none of them has no figure.
    scored = client.get_sequence_logprobs(whole, lengths, VOCAB, chunk_size=2)
    for mine, (_, completion, _), found, ids in zip(
        own, rollouts, scored["actual_logprobs"], scored["actual_token_ids"], strict=True
    ):
        assert [one for (one,) in ids] == completion
        assert [one for (one,) in found] == pytest.approx(mine.tolist(), abs=TOLERANCE)


def test_two_steps_of_an_optimiser(setting: Setting, client: VLLMClient) -> None:
    model = setting.model
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    # TRL means a GPU by it; with our group it comes to no more than a name.
    client.init_communicator(device="cuda")
    check_agreement(client, model)
    for step in range(2):
        rollouts = roll_out(client)
        # A reward for even tokens; the mean of a prompt's choices is what they are measured by.
        rewards = torch.tensor([sum(token % 2 == 0 for token in completion) for _, completion, _ in rollouts]).float()
        advantages = rewards - rewards.view(len(PROMPTS), -1).mean(1).repeat_interleave(NUM_CHOICES)
        before = [logprobs_of(model, prompt, completion) for prompt, completion, _ in rollouts]
        ratios = [torch.exp(now - torch.tensor(then)) for now, (_, _, then) in zip(before, rollouts, strict=True)]
        loss = -torch.stack([advantage * ratio.mean() for advantage, ratio in zip(advantages, ratios, strict=True)])
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
        with torch.inference_mode():
            after = [logprobs_of(model, prompt, completion) for prompt, completion, _ in rollouts]
        then = torch.cat(before).detach()
        moved = float((torch.cat(after) - then).abs().max())
        assert moved > 100 * TOLERANCE, "a step that changes nothing shows nothing"
        if step == 0:
            client.update_model_params(model)
        else:
            with client.weight_update():
                for name, parameter in model.named_parameters():
                    client.update_named_param(name, parameter.data)
        client.reset_prefix_cache()
        check_agreement(client, model)


def test_what_else_the_client_asks_for(client: VLLMClient) -> None:
    """Chats, structures, filters, alternatives, tokens in and out."""
    found = client.chat(
        [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": "How are you?"}]],
        n=2,
        max_tokens=4,
        logprobs=2,
    )
    assert len(found["prompt_ids"]) == 2 and len(found["completion_ids"]) == 4
    assert all(len(each) in (2, 3) for choice in found["logprobs"] for each in choice)
    found = client.generate(["The answer: "], max_tokens=8, structured_outputs_regex="[0-9]{2}", logprobs=None)
    assert found["logprobs"] is None and len(found["completion_ids"]) == 1
    # Filters leave their own few to draw from, and those share all of the probability.
    found = client.generate(PROMPTS, max_tokens=6, top_k=3, temperature=1.3, logprobs=3, repetition_penalty=1.1)
    for choice in found["logprobs"]:
        for each in choice:
            assert sum(torch.exp(torch.tensor(each)).tolist()) == pytest.approx(1.0, abs=1e-5)
    # Images would go this way; without any there are tokens alone.
    same = {"n": 2, "max_tokens": 5, "logprobs": 1, "generation_kwargs": {"seed": 3, "ignore_eos": True}}
    tokens = client.generate(PROMPTS, features=[None] * len(PROMPTS), **same)
    assert tokens == client.generate(PROMPTS, **same)


def test_weights_are_the_administrators(setting: Setting) -> None:
    with pytest.raises(Exception, match="401"):
        VLLMClient(base_url=setting.url)._start_weight_update()


def test_the_asynchronous_trainers_client(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its routes around a transfer. It has no place for a key, so requests add it."""
    import requests
    from accelerate.state import PartialState

    send = requests.Session.request

    def with_key(self: requests.Session, method: str, url: str, **given: Any) -> requests.Response:
        return send(self, method, url, headers={"Authorization": f"Bearer {ADMIN}"}, **given)

    monkeypatch.setattr(requests.Session, "request", with_key)
    PartialState(cpu=True)  # its logger asks for it
    client = AsyncClient(setting.url, server_timeout=5)
    client.wait_for_server_ready()
    assert client.get_max_model_len() == 512 and client.get_dtype() == "torch.float32"
    info = client.get_server_info()
    assert info["lora_config"] is None and info["parallel_config"]["data_parallel_size"] == 1
    tensors = [(name, parameter.data) for name, parameter in setting.model.named_parameters()]
    update = {
        "names": [name for name, _ in tensors],
        "dtype_names": ["float32"] * len(tensors),
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }
    start = {"master_address": "127.0.0.1", "master_port": free_port(), "rank_offset": 1, "packed": True}
    start["world_size"] = client.get_world_size() + 1
    with ThreadPoolExecutor(1) as beside:
        joined = beside.submit(communicator.Communicator, start)
        client.init_weight_transfer_engine(start)
        group = joined.result()
        client.pause()
        client.start_weight_update()
        sent = beside.submit(communicator.broadcast_packed, iter(tensors), group, 0, lambda item: item[1])
        client.update_weights(update)
        sent.result()
        client.finish_weight_update()
        client.resume()
    group.close()
    sync = VLLMClient(base_url=setting.url)
    check_agreement(sync, setting.model)
    sync.session.close()
