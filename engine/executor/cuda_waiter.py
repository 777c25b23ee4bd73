"""The thread that blocks on events of the device, so that the loop does not."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from typing import Any

from engine.executor.cuda_device import DeviceLayer


class Waiter:
    """The thread that blocks on events, so that the loop does not."""

    def __init__(self, layer: DeviceLayer) -> None:
        self._layer = layer
        self._jobs: queue.SimpleQueue[tuple[Any, asyncio.Future[None], asyncio.AbstractEventLoop] | None] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None

    async def wait(self, event: Any) -> None:
        """Until the event is done. Raises what the device raised."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cuda-waiter", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._jobs.put((event, future, loop))
        await future

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            event, future, loop = job
            error: BaseException | None = None
            try:
                self._layer.synchronize(event)
            except BaseException as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(_settle, future, error)

    def close(self, *, waits: bool = True) -> None:
        """waits: for what it waits for."""
        if self._thread is not None:
            self._jobs.put(None)
            # A device that hangs must not keep the process.
            self._thread.join(timeout=30.0 if waits else 0.1)
            self._thread = None


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():  # its waiter was cancelled
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
