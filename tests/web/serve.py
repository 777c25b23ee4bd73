"""The server that the browser's tests talk to: the whole server over the fake device, and a model that says what it is
told to. Prints its port. `python -m tests.web.serve [--port N] [--key KEY] [--reasoning] [--step SECONDS] [--pages N]
[--live-text]`; a line on its standard input asks for what the loop did longest without a pause since the last
(tests/web/figures.py).

It says the last message of the user; "long N" is N paragraphs with code and formulas, "call" is a call of get_weather.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import uvloop

from engine.executor.base import StepHandle
from engine.executor.fake import FakeHandle, FakeModel
from engine.forward import ForwardOutput, Limits
from engine.pace import waited
from engine.process import settle
from tests.server.dictate import dictated
from tests.server.support import Device, live, served_model, tokenizer

_PARAGRAPH = (
    "Paragraph {n} of **many** has `code`, a formula $x_{{{n}}}^2 = \\frac{{1}}{{{n}}}$ and some more words.\n\n"
)
_CODE = "```python\ndef f{n}(x):\n    return x + {n}  # and so on\n```\n\n"


def say(prompt: str) -> str:
    """Prompts come without their marks: the roles are lines of their own."""
    before, _, said = f"\n{prompt}".rpartition("\nassistant\n")
    asked = before.rpartition("\nuser\n")[2].removesuffix("\n")
    if asked.startswith("<tool_response>"):
        return "It is sunny."
    if asked.startswith("call"):
        return '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    if asked.startswith("long "):
        number = int(asked.split()[1])
        asked = "".join((_CODE if n % 5 == 4 else _PARAGRAPH).format(n=n) for n in range(1, number + 1)) + "END"
    # What goes on is the rest of what was said.
    return asked[len(said) :] if asked.startswith(said) else asked


class OwnThread(Device):
    """The device works on a thread of its own, as real ones do: what its steps take is none of the loop's time."""

    def __init__(self, limits: Limits, step_seconds: float) -> None:
        model = FakeModel(limits.vocab_size, tokenizer().eos_token_ids[0], 0.0)
        super().__init__(limits, model, step_seconds)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")

    async def wait(self, handle: StepHandle) -> ForwardOutput:
        assert isinstance(handle, FakeHandle)
        if (left := handle.done_at - time.monotonic()) > 0.0:
            await asyncio.sleep(left)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.resolve, handle)


class Stall(NamedTuple):
    """Milliseconds between two ticks of the loop. late: by the clock, beyond the tick. worked: what its thread computed
    meanwhile, collected of that in the garbage collector. queued: what the thread waited for a processor that others
    had; 0 where the system does not say. What is left of `late` went to threads that held the interpreter."""

    late: float = 0.0
    worked: float = 0.0
    collected: float = 0.0
    queued: float = 0.0


class Stalls:
    """The latest tick since the last that was told, and the one with the most work of the loop's own: of a turn of
    the loop, or of some that are shorter than a tick."""

    EVERY_S = 0.001

    def __init__(self) -> None:
        """On the loop's thread."""
        self.latest = self.busiest = Stall()
        self._collected = 0.0
        self._thread = threading.get_ident()
        gc.callbacks.append(self._on_collection)
        self._loop = asyncio.get_running_loop()
        self._since = self._now()
        self._loop.call_later(self.EVERY_S, self._tick)

    def _now(self) -> tuple[float, float, float, float]:
        return time.perf_counter(), time.thread_time(), self._collected, waited()

    def _on_collection(self, phase: str, _: dict[str, int]) -> None:
        if threading.get_ident() == self._thread:
            self._collected += time.thread_time() if phase == "stop" else -time.thread_time()

    def _tick(self) -> None:
        """A timer's own call, which waits for no other that is ready: from one to the next it is a turn of the loop."""
        took, worked, collected, queued = (1e3 * (at - was) for at, was in zip(self._now(), self._since, strict=True))
        stall = Stall(took - 1e3 * self.EVERY_S, worked, collected, queued)
        if stall.late > self.latest.late:
            self.latest = stall
        if worked > self.busiest.worked:
            self.busiest = stall
        self._since = self._now()
        self._loop.call_later(self.EVERY_S, self._tick)

    def tell(self) -> None:
        if os.read(sys.stdin.fileno(), 4096):
            print(json.dumps({"latest": self.latest._asdict(), "busiest": self.busiest._asdict()}), flush=True)
            self.latest = self.busiest = Stall()
        else:
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key")
    parser.add_argument("--reasoning", action="store_true")
    parser.add_argument("--step", type=float, default=0.002)
    parser.add_argument("--pages", type=int, default=20_000)
    parser.add_argument("--live-text", action="store_true")
    args = parser.parse_args()
    options: dict[str, Any] = {"port": args.port, "live_text": args.live_text}
    if args.key:
        options["api_keys"] = (args.key,)
    if args.reasoning:
        options["reasoning_parser"] = "qwen3"
    model = served_model(max_model_len=65_536)
    options |= {"num_pages": args.pages, "make_device": lambda limits: OwnThread(limits, args.step)}
    async with live(model=model, **options) as server:
        with dictated(server, say=say):
            settle()
            stalls = Stalls()
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stalls.tell)
            print(server.port, flush=True)
            await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
