"""Other weights in a running engine, on the CPU and for real: what they say is what a fresh start with them says."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import engine.demo
from engine.build import Built, build_engine
from engine.config import CacheOptions, EngineConfig, ModelOptions, StartupError
from engine.request import Request, SamplingParams

DEMO = Path(engine.demo.__path__[0])
PROMPT = list(range(20, 60))


def changed_copy(to: Path) -> Path:
    """The demo model with every token's embedding being another token's."""
    shutil.copytree(DEMO, to, ignore=shutil.ignore_patterns("*.py", "__pycache__", "loss.png"))
    path = to / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name.endswith("embed_tokens.weight"))
    begin, end = (8 + size + offset for offset in header[name]["data_offsets"])
    rows = np.frombuffer(bytes(data[begin:end]), np.uint8).reshape(header[name]["shape"][0], -1)
    data[begin:end] = np.roll(rows, 7, axis=0).tobytes()
    path.write_bytes(data)
    return to


def build(directory: Path) -> Built:
    config = EngineConfig(
        model=ModelOptions(path=str(directory), max_model_len=256), cache=CacheOptions(num_pages=64), device="cpu"
    )
    return build_engine(config)


async def say(built: Built, name: str) -> list[int]:
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    async with built.engine.submit(Request(name, PROMPT, sampling)) as stream:
        return (await stream.collect()).token_ids


async def test_new_weights_serve_as_if_started_with_them(tmp_path: Path) -> None:
    other = changed_copy(tmp_path / "other")
    built, fresh = build(DEMO), build(other)
    loops = [asyncio.create_task(one.engine.run()) for one in (built, fresh)]
    try:
        async with asyncio.timeout(60):
            before, expected = await say(built, "a"), await say(fresh, "a")
            assert before != expected
            (tmp_path / "empty").mkdir()
            stranger = changed_copy(tmp_path / "stranger")
            config = json.loads((stranger / "config.json").read_text())
            (stranger / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
            broken = changed_copy(tmp_path / "broken")
            (broken / "model.safetensors").write_bytes(b"\x10" * 100)
            for directory, words in (
                (tmp_path / "empty", "config.json"),
                (stranger, "rms_norm_eps differs"),
                (broken, "model.safetensors"),
            ):
                with pytest.raises(StartupError, match=words):
                    await built.engine.load_weights(directory)
                assert await say(built, f"after {directory.name}") == before
            await built.engine.load_weights(other)
            assert await say(built, "b") == expected
            # What is read again after a deep sleep is what served last.
            await built.engine.sleep(2)
            await built.engine.wake_up()
            assert await say(built, "c") == expected
    finally:
        for loop, one in zip(loops, (built, fresh), strict=True):
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
            one.engine.executor.close()
