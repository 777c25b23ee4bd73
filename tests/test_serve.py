"""serve.py's end: what happens to clients and to the process when the device is lost."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import aiohttp
import pytest

from bench.server import free_port
from engine.build import build_engine
from engine.executor.base import StepHandle
from engine.flags import parse
from engine.forward import DeviceLostError, ForwardOutput
from engine.serve import _run


@pytest.fixture
def collector_as_before() -> Iterator[None]:
    """The server changes how garbage is collected in its process, which here is pytest's."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


@pytest.mark.usefixtures("collector_as_before")
async def test_a_lost_device_ends_streams_with_an_error_and_the_process_with_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    port = free_port()
    config, _ = parse(["--port", str(port), "--device", "cpu", "--threads", "1"])
    built = build_engine(config)
    wait, steps = built.engine.executor.wait, iter(range(10**6))

    async def lost_at_the_third(handle: StepHandle) -> ForwardOutput:
        if next(steps) < 2:
            return await wait(handle)
        raise DeviceLostError("the device failed: an illegal memory access was encountered")

    built.engine.executor.wait = lost_at_the_third  # type: ignore[method-assign]
    process = asyncio.create_task(_run(config, built))
    url = f"http://127.0.0.1:{port}"
    async with aiohttp.ClientSession() as client:
        for _ in range(1000):
            try:
                async with client.get(f"{url}/health") as response:
                    assert response.status == 200
                    break
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.01)
        body = {"prompt": "Once", "max_tokens": 50, "stream": True, "ignore_eos": True}
        async with client.post(f"{url}/v1/completions", json=body) as response:
            assert response.status == 200
            events = (await response.text()).split("\n\n")
    assert '"error"' in events[-3] and "device was lost" in events[-3] and events[-2:] == ["data: [DONE]", ""], events
    assert await asyncio.wait_for(process, 60.0) == 1
    assert "an illegal memory access" in capsys.readouterr().err
