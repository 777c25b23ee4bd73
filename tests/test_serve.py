"""serve.py's end: what happens to clients and to the process when it is to stop, and when the device is lost."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import signal
import socket
import sys
import textwrap
from collections.abc import Iterator

import aiohttp
import pytest

from bench.server import free_port
from engine.build import build_engine
from engine.config import StartupError
from engine.executor.base import StepHandle
from engine.flags import parse
from engine.forward import DeviceLostError, ForwardOutput
from engine.serve import _run
from engine.watchdog import Deadline


@pytest.fixture
def collector_as_before() -> Iterator[None]:
    """The server changes how garbage is collected in its process, which here is pytest's."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


async def ready(client: aiohttp.ClientSession, url: str) -> None:
    for _ in range(6000):
        try:
            async with client.get(f"{url}/health") as response:
                assert response.status == 200
                return
        except aiohttp.ClientConnectorError:
            await asyncio.sleep(0.01)
    pytest.fail("no server came")


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
        await ready(client, url)
        body = {"prompt": "Once", "max_tokens": 50, "stream": True, "ignore_eos": True}
        async with client.post(f"{url}/v1/completions", json=body) as response:
            assert response.status == 200
            events = (await response.text()).split("\n\n")
    assert '"error"' in events[-3] and "device was lost" in events[-3] and events[-2:] == ["data: [DONE]", ""], events
    assert await asyncio.wait_for(process, 60.0) == 1
    assert "an illegal memory access" in capsys.readouterr().err


@pytest.mark.usefixtures("collector_as_before")
async def test_a_stop_is_told_and_waits_for_no_text(caplog: pytest.LogCaptureFixture) -> None:
    """Templates and long texts that wait for a thread would all be worked through at the end of the process."""
    caplog.set_level(logging.INFO, "oneloop.server")
    port = free_port()
    config, _ = parse(["--port", str(port), "--device", "cpu", "--threads", "1", "--drain-timeout", "20"])
    built = build_engine(config)
    assert built.engine.tokenizer is not None
    process = asyncio.create_task(_run(config, built))
    async with aiohttp.ClientSession() as client:
        await ready(client, f"http://127.0.0.1:{port}")
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(process, 60.0) == 0
    told = [record.getMessage() for record in caplog.records if record.name == "oneloop.server"]
    assert told == ["stopping: no requests are running", "stopped"]
    with pytest.raises(RuntimeError, match="after shutdown"):
        built.engine.tokenizer.pool.submit(print)


@pytest.mark.usefixtures("collector_as_before")
async def test_where_it_cannot_listen_no_deadline_comes_before_the_line_that_says_why() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config, _ = parse(["--port", str(port), "--device", "cpu", "--threads", "1"])
        deadline = Deadline()
        with pytest.raises(StartupError, match="the address is in use"):
            await _run(config, build_engine(config), deadline)
    assert deadline._thread is None


@pytest.mark.parametrize("stuck", ["CPUExecutor._run = lambda *_: time.sleep(1e6)", "CPUExecutor.close = blocks"])
async def test_a_process_is_gone_although_something_in_it_does_not_end(stuck: str) -> None:
    """A step that outlives the drain, say: every stream is told by then, and nobody waits for it."""
    program = textwrap.dedent("""
        import sys, threading, time
        from engine import serve
        from engine.executor.cpu import CPUExecutor

        def blocks(self):
            threading.Thread(target=time.sleep, args=(1e6,)).start()
            time.sleep(1e6)

        STUCK
        serve.LEAVE_S = 1.0
        sys.exit(serve.main(sys.argv[1:], ends=True))
    """).replace("STUCK", stuck)
    port = free_port()
    flags = ["--port", str(port), "--device", "cpu", "--threads", "1", "--drain-timeout", "1"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, *flags), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with aiohttp.ClientSession() as client:
            await ready(client, url := f"http://127.0.0.1:{port}")
            body = {"prompt": "Once", "max_tokens": 5, "stream": True}
            if "_run" in stuck:
                asking = asyncio.create_task(client.post(f"{url}/v1/completions", json=body))
                for _ in range(6000):
                    if re.search(r"num_requests_running\{.*\} 1.0", await metrics(client, url)):
                        break
                    await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            _, told = await asyncio.wait_for(process.communicate(), 60.0)
            if "_run" in stuck:
                async with await asking as response:
                    assert response.status == 503 and "aborted" in await response.text()
        assert process.returncode == 0, told.decode()
        assert b"the time to stop is over" in told and b"most recent call first" in told
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def metrics(client: aiohttp.ClientSession, url: str) -> str:
    async with client.get(f"{url}/metrics") as response:
        return await response.text()
