"""A trainer's group: torch.distributed between a trainer (another process, rank 0) and this server, which receives.

The group is found as SGLang's trainers make it: a store at the trainer's address, and the group's name before its keys.
gloo on the CPU, NCCL where there is a GPU. Everything blocks; one thread at a time.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
BACKENDS = ("gloo", "nccl")


class TrainerGroup:
    """A member of a trainer's group. Raises RuntimeError or ValueError where it does not come together in time."""

    def __init__(
        self, name: str, address: str, port: int, rank: int, world_size: int, backend: str, timeout_s: float
    ) -> None:
        if backend == "nccl" and not torch.cuda.is_available():
            raise ValueError("backend nccl needs a GPU, and this server runs on a CPU; use gloo")
        timeout = datetime.timedelta(seconds=timeout_s)
        host = f"[{address}]" if ":" in address else address
        store, rank, world_size = next(rendezvous(f"tcp://{host}:{port}", rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        self._device = torch.device("cuda" if backend == "nccl" else "cpu")
        # As SGLang's and OpenRLHF's trainers do it: torch makes a group beside the default one only like this.
        make: Any = c10d._new_process_group_helper
        self._group, _ = make(
            world_size,
            rank,
            [],
            backend,
            c10d.PrefixStore(name, store),
            group_name=name,
            backend_options=None,
            timeout=timeout,
        )
        c10d._world.pg_group_ranks[self._group] = {index: index for index in range(world_size)}

    def receive(self, dtype: str, shape: Sequence[int]) -> memoryview:
        """The bytes of the next tensor that rank 0 broadcasts. Raises RuntimeError where it does not come."""
        tensor = torch.empty(tuple(shape), dtype=_DTYPES[dtype], device=self._device)
        distributed.broadcast(tensor, src=0, group=self._group)
        return _bytes_of(tensor.cpu())

    def close(self) -> None:
        """Leave it."""
        distributed.destroy_process_group(self._group)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    if math.prod(tensor.shape) == 0:
        return memoryview(b"")
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
