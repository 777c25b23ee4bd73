"""Collectives of ranks on GPUs: torch.distributed over NCCL, on the stream that is current, so that graphs hold them.

Only copies are asked of NCCL (ops/device_parallel.py adds up), so neither its choice of algorithm nor the number of its
channels has a part in any bit. The ranks find each other by a file, and NCCL by the loopback interface: nothing listens
to a network.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from typing import Any

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import FileStore

from engine.config import StartupError

# Ranks that are to come together, and have not by then, never do.
JOIN_TIMEOUT_S = 300.0
# Its name until torch 2.13, where it warns of the new one.
_gather: Any = getattr(distributed, "all_gather_single", None) or getattr(distributed, "all_gather_into_tensor", None)


def set_environment() -> None:
    """Before a group is made. What the user has set stays."""
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    # A rank that is gone is noticed by its parent (members.py), which ends streams first: torch's own watch over
    # collectives would end the process in their stead.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")


class TorchCollectives:
    """A Collectives (ops/device_parallel.py). file: a path that all ranks know, and that does not exist yet.

    backend: nccl, or gloo for tests on the host. Blocks until all are there. Raises StartupError.
    """

    def __init__(self, file: str, rank: int, size: int, device: torch.device, backend: str = "nccl") -> None:
        self.rank, self.size = rank, size
        set_environment()
        if distributed.is_initialized():
            raise StartupError("--tensor-parallel-size: this process has a torch.distributed group of its own already")
        try:
            distributed.init_process_group(
                backend,
                store=FileStore(file, size),
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=JOIN_TIMEOUT_S),
                # Makes the communicator now: its errors are those of a start, and no graph is the first to need it.
                device_id=device if device.type == "cuda" else None,
            )
        except (RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:300]
            raise StartupError(f"the ranks find no way to each other by {backend}: {why}") from error
        group = distributed.group.WORLD
        assert group is not None
        self._group: Any = group
        if device.type == "cuda":
            # Buffers that NCCL makes at a first use are there before the memory is divided.
            with torch.inference_mode():
                x = torch.zeros((size, 1), device=device)
                self.gather(x.new_empty((size, size, 1)), x)
                self.exchange(torch.empty_like(x), x)
                torch.cuda.synchronize(device)

    def gather(self, out: Tensor, x: Tensor) -> None:
        """See Collectives."""
        _gather(out.view(-1), x.view(-1), group=self._live_group())

    def exchange(self, out: Tensor, x: Tensor) -> None:
        """See Collectives."""
        distributed.all_to_all_single(out, x, group=self._live_group())

    def _live_group(self) -> Any:
        """torch takes None for its default group, which would be the one that was aborted."""
        group = self._group
        if group is None:
            raise RuntimeError("the ranks have ended")
        return group

    def abort(self) -> None:
        """End what waits for others on the device, and the group; any thread, more than once."""
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()

    def close(self) -> None:
        """Leave the group, of which others may be gone; the executor's thread."""
        self.abort()
        if distributed.is_initialized():
            with contextlib.suppress(RuntimeError, AssertionError):
                distributed.destroy_process_group()
