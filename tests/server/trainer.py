"""A trainer's process for the tests of weight updates: rank 0 of a gloo group, told on stdin what to broadcast.

`python -m tests.server.trainer PORT NAME CHECKPOINT`; a line is a seed (all tensors, changed by it), "packed SEED" (the
same as vLLM's trainers pack it, 64 KiB at most beside the last), "half SEED" (half of the tensors, then the process
ends).
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.distributed import distributed_c10d as c10d

PACK = 64 * 1024


def changed(checkpoint: Path, seed: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint after a step that `seed` stands for, by name, in their order."""
    tensors = {name: tensor.float() for name, tensor in sorted(load_file(checkpoint / "model.safetensors").items())}
    rng = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.02 * torch.randn(tensor.shape, generator=rng) for name, tensor in tensors.items()}


def packs(tensors: dict[str, Tensor]) -> list[Tensor]:
    """uint8 [n] each."""
    found: list[Tensor] = []
    pack: list[Tensor] = []
    for tensor in tensors.values():
        pack.append(tensor.contiguous().view(torch.uint8).flatten())
        if sum(map(len, pack)) > PACK:
            found.append(torch.cat(pack))
            pack = []
    return [*found, torch.cat(pack)] if pack else found


def main() -> None:
    port, name, checkpoint = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    store, rank, size = next(distributed.rendezvous(f"tcp://127.0.0.1:{port}", 0, 2))
    group, _ = c10d._new_process_group_helper(
        size,
        rank,
        [],
        "gloo",
        distributed.PrefixStore(name, store),
        group_name=name,
        backend_options=None,
        timeout=datetime.timedelta(seconds=60),
    )
    c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
    for line in sys.stdin:
        tensors = changed(checkpoint, int(line.split()[-1]))
        sent = packs(tensors) if "packed" in line else list(tensors.values())
        for tensor in sent[: len(sent) // 2] if "half" in line else sent:
            distributed.broadcast(tensor, src=0, group=group)
        if "half" in line:
            return


if __name__ == "__main__":
    main()
