"""The protocol of a device: take a step, say later what it brought. Implemented by fake, cpu and cuda."""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from engine.forward import PARTS, ForwardInput, ForwardOutput, Int32Array, Limits, Staging
from engine.lora.words import AdapterWeights


class StepHandle(Protocol):
    """A launched step. `step` is the number of its ForwardInput.

    began_at, ended_at: when the device worked at it (time.monotonic), known once it is done; 0 where it does not tell.
    """

    step: int
    began_at: float
    ended_at: float


class PageMemory(Protocol):
    """The KV memory as bytes, for whoever carries pages elsewhere, or that of snapshots of recurrent states, whose ids
    then take the place of pages'. Its content is gone after Executor.sleep.

    page_bytes: of one page, all layers' keys and values (and scales) one after the other in one fixed order.
    layout: memories of equal layouts may exchange bytes, where the same weights wrote them.
    """

    page_bytes: int
    layout: str

    def copy_out(self, pages: Int32Array, into: npt.NDArray[np.uint8]) -> None:
        """Fill uint8 [pages, page_bytes]. From any thread; whoever calls holds the pages, which nobody writes."""
        ...

    def copy_in(self, pages: Int32Array, data: npt.NDArray[np.uint8]) -> None:
        """The reverse, into pages that no launched step names."""
        ...

    def regions(self) -> list[tuple[int, int, int]]:
        """(address of page 0, bytes of a page, pages) of each part: where one page's bytes follow the other's."""
        ...


@runtime_checkable
class DeviceMemory(PageMemory, Protocol):
    """A PageMemory that is no host memory. Everything but `rows` blocks the calling thread, never the loop's, while the
    steps go on; several may, and wait for each other.

    rows_at_once: at most; so many are worth a copy.
    """

    rows_at_once: int

    def rows(self, count: int) -> npt.NDArray[np.uint8]:
        """Host memory that it copies from and to, uint8 [count, page_bytes]. Raises StartupError."""
        ...

    def copy_rows_out(self, pages: Int32Array, rows: Sequence[npt.NDArray[np.uint8]]) -> None:
        """`copy_out` into rows that came from `rows`."""
        ...

    def copy_rows_in(self, pages: Int32Array, rows: Sequence[npt.NDArray[np.uint8]]) -> None:
        """`copy_in` from rows that came from `rows`."""
        ...


class Executor(Protocol):
    """Runs steps strictly in the order of `submit`.

    staging: the two sets that the scheduler fills in turn (step number modulo 2). A set belongs to the
    executor from `submit` until the step's handle is done; the scheduler refills it only after that.
    """

    limits: Limits
    staging: tuple[Staging, Staging]

    def submit(self, forward_input: ForwardInput) -> StepHandle:
        """Launch a step. Never blocks, never raises for what happens on the device. Loop thread only."""
        ...

    def unseen_drafts(self, handle: StepHandle) -> Awaitable[list[tuple[int, Int32Array]]] | None:
        """(row, drafts) of this step's speculating rows under a grammar whose drafts nobody was told of before: their
        masks are made for them. None: there are no such rows. All steps before it have ended."""
        ...

    def provide_masks(self, handle: StepHandle) -> None:
        """The masks of this step's ForwardInput have been filled in. Never blocks. Before `wait` for the step."""
        ...

    async def wait(self, handle: StepHandle) -> ForwardOutput:
        """Wait for a step, in the order of `submit`.

        Raises ForwardError when this step failed, DeviceLostError when the device is gone.
        """
        ...

    # The next three block, for long. Nothing may be in flight; from any thread, while the loop's makes no call.

    def sleep(self, level: int, parts: Collection[str] = PARTS) -> None:
        """Give memory back: the KV cache and what it held; the weights too, to host memory (level 1) or for good (2).
        parts: which of them, and none that sleeps.

        No `submit` before all have woken up; `load_weights` when the weights have.
        """
        ...

    def wake_up(self, directory: Path | None = None, parts: Collection[str] = PARTS) -> None:
        """Take the memory again. directory: where the weights are read from after level 2; None for where they were.
        parts: of those that sleep.

        Raises StartupError for weights that cannot be had; then it still sleeps.
        """
        ...

    def load_weights(self, directory: Path) -> None:
        """Serve with other weights of the same model from the next step on; the KV cache's content is lost.

        Raises StartupError for what cannot be used; then the old weights go on serving.
        """
        ...

    def read_adapter(self, path: Path) -> AdapterWeights:
        """Read a LoRA adapter's directory for this model. Blocks; from any thread, also while steps are in flight.

        Raises AdapterError for one that cannot be used.
        """
        ...

    def drop_adapters(self, indices: Sequence[int]) -> None:
        """As ForwardInput.adapter_loads with None for each: what is held of these indices' adapters is given back.
        While no step is in flight."""
        ...

    def page_memory(self) -> PageMemory:
        """The memory as it is until the next `sleep`. Raises StartupError where pages cannot be had as bytes."""
        ...

    def state_memory(self) -> PageMemory | None:
        """The same of snapshots; None of a model without recurrent states. Raises StartupError."""
        ...

    def close(self) -> None:
        """Finish what is launched, then free the device. Idempotent."""
        ...
