"""What ranks in processes of their own have in tests: a fake device, and gloo where GPUs have NCCL.

torch.distributed, the spawned processes and their shared memory are the real ones. Named in a job as a stand-in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.distributed.collectives import TorchCollectives
from engine.ops import native
from tests.cuda.ranked import WorkingDevice


class GlooCollectives(TorchCollectives):
    """On the device's stream, as kernels."""

    def __init__(self, file: str, rank: int, size: int, device: WorkingDevice) -> None:
        super().__init__(file, rank, size, device.device, "gloo")
        self._device = device

    def gather(self, out: Tensor, x: Tensor) -> None:
        self._kernel(super().gather, out, x)

    def exchange(self, out: Tensor, x: Tensor) -> None:
        self._kernel(super().exchange, out, x)

    def _kernel(self, work: object, out: Tensor, x: Tensor) -> None:
        def run() -> None:
            assert self._device.running is not None, "a collective outside of its stream's order"
            with torch.inference_mode():
                work(out, x)  # type: ignore[operator]

        self._device.kernel(run)


def stand_in(file: str, rank: int, size: int) -> tuple[WorkingDevice, GlooCollectives]:
    """A device and collectives of this rank, whose operations are torch's alone from now on."""
    torch.set_num_threads(1)
    native._disabled += 1
    device = WorkingDevice(rank)
    return device, GlooCollectives(file, rank, size, device)
