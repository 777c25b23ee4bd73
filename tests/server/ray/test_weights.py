"""What a replica that starts after an update reads from its siblings: engines in one process, a broadcast of ours."""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from engine.executor.cpu import CPUExecutor
from engine.forward import Limits
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from server.ray import weights
from server.ray.weights import Broadcast, SiblingWeights
from tests.server.support import DEMO, Live, live
from tests.server.trainer import changed


def read(directory: Path | None) -> CausalLM:
    torch.set_num_threads(1)
    return load_model(read_spec(DEMO), directory or DEMO, dtype=torch.float32, device=torch.device("cpu"))


@contextlib.asynccontextmanager
async def replica() -> AsyncIterator[Live]:
    def device(limits: Limits) -> CPUExecutor:
        return CPUExecutor(read(None), limits, dtype=torch.float32, load=read)

    async with live(make_device=device, num_pages=64) as server:
        server.engine.model_directory = DEMO
        yield server


async def update(server: Live, seed: int, version: str) -> None:
    url = f"{server.url}/update_weights_from_tensor?weight_version={version}"
    headers = {"Content-Type": "application/octet-stream"}
    async with server.http.post(url, data=io.BytesIO(save(changed(DEMO, seed))), headers=headers) as response:
        assert response.status == 200, await response.read()


async def said(server: Live) -> Any:
    """Log-probabilities of a prompt, which the prefix cache must not answer from other weights."""
    answer = await server.complete(list(range(40, 70)), max_tokens=2, temperature=0, logprobs=0, echo=True)
    return answer["choices"][0]["logprobs"]["token_logprobs"]


def among(*siblings: SiblingWeights) -> Broadcast:
    async def broadcast(method: str, *args: Any) -> list[Any]:
        return [await getattr(one, method.removeprefix("weights_"))(*args) for one in siblings]

    return broadcast


async def test_a_new_replica_has_what_its_siblings_have(monkeypatch: pytest.MonkeyPatch) -> None:
    # A file takes several pieces.
    monkeypatch.setattr(weights, "PIECE", 1 << 20)
    async with replica() as old, replica() as new:
        first, theirs, own = await said(new), SiblingWeights(old.engine, "old"), SiblingWeights(new.engine, "new")
        # Nobody was updated, and nobody else is there.
        for siblings in (among(theirs, own), among(own), among()):
            await own.catch_up(siblings)
        assert await said(new) == first and new.engine.num_weight_updates == 0

        await update(old, 1, "one")
        await update(old, 2, "two")
        # The same as before it asks, but for those who have seen less.
        await own.catch_up(among(own, theirs, SiblingWeights(new.engine, "other")))
        assert await said(new) == await said(old) != first
        assert new.engine.weight_version == "two" and new.engine.num_weight_updates == 2
        # And once more is nothing.
        directory = new.engine.weights_directory
        await own.catch_up(among(theirs, own))
        assert new.engine.weights_directory == directory
        # From there on it is as any other, for trainers and for siblings.
        await update(new, 3, "three")
        await theirs.catch_up(among(theirs, own))
        assert await said(new) == await said(old) and old.engine.weight_version == "three"
        own.close()
        theirs.close()
        assert directory is not None and not directory.exists()


async def test_weights_that_only_have_another_name() -> None:
    async with replica() as old, replica() as new:
        theirs, own = SiblingWeights(old.engine, "old"), SiblingWeights(new.engine, "new")
        old.engine.name_weights("named")
        await own.catch_up(among(own, theirs))
        assert new.engine.weight_version == "named" and new.engine.weights_directory == DEMO


async def test_a_sibling_that_gets_other_weights_meanwhile() -> None:
    async with replica() as old, replica() as new:
        first, theirs, own = await said(new), SiblingWeights(old.engine, "old"), SiblingWeights(new.engine, "new")
        await update(old, 1, "one")
        siblings = among(theirs, own)

        async def moving(method: str, *args: Any) -> list[Any]:
            answers = await siblings(method, *args)
            old.engine.num_weight_updates += method == "weights_held"
            return answers

        with pytest.raises(OSError, match="other weights by now"):
            await own.catch_up(moving)
        assert await said(new) == first and new.engine.weight_version != "one"
        own.close()


async def test_pieces_are_of_files_of_the_checkpoint_alone(tmp_path: Path) -> None:
    async with replica() as old:
        await update(old, 1, "one")
        theirs = SiblingWeights(old.engine, "old")
        secret = tmp_path / "secret"
        secret.write_text("no weights")
        with pytest.raises(FileNotFoundError):
            await theirs.piece("old", 1, str(secret), 0)
        assert await theirs.piece("another", 1, "config.json", 0) is None
        assert await theirs.piece("old", 1, "config.json", 0)
