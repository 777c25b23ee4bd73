"""What TRL's client takes from vLLM's package, over gloo: vLLM's own is made for NCCL, and its package for a GPU.

`install` puts these few functions where TRL imports them from. Everything else of the client is its own: what it asks
the server for, when, and in which threads. A message has the bytes of whole tensors, and ends with the one that brings
it above PACKED_BYTES, as vLLM's trainers pack them.
"""

from __future__ import annotations

import datetime
import importlib.machinery
import socket
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d as c10d

# The newest that this TRL knows; from 0.28 on the trainer says `packed` once, when the group is made.
VERSION = "0.31.0"
PACKED_BYTES = 1 << 30
# The name of the one group of vLLM's routes.
_NAME = "weight_transfer"


class Communicator:
    """Rank 0 of a gloo group. group: what TRL lets go of at the end."""

    def __init__(self, init_info: dict[str, Any]) -> None:
        address, port, size = (init_info[field] for field in ("master_address", "master_port", "world_size"))
        store, _, _ = next(distributed.rendezvous(f"tcp://{address}:{port}", 0, size))
        self.process_group, _ = c10d._new_process_group_helper(
            size,
            0,
            [],
            "gloo",
            distributed.PrefixStore(_NAME, store),
            group_name=_NAME,
            backend_options=None,
            timeout=datetime.timedelta(seconds=60),
        )
        c10d._world.pg_group_ranks[self.process_group] = {rank: rank for rank in range(size)}
        self.group = SimpleNamespace(store=store, socket=None)
        self.num_messages = 0

    def broadcast(self, tensor: Tensor) -> None:
        distributed.broadcast(tensor, src=0, group=self.process_group)
        self.num_messages += 1

    def close(self) -> None:
        distributed.destroy_process_group(self.process_group)


def broadcast_packed(
    iterator: Iterator[tuple[str, Tensor]],
    group: Communicator,
    src: int,
    post_iter_func: Callable[[tuple[str, Tensor]], Tensor],
) -> None:
    assert src == 0
    pack: list[Tensor] = []
    for item in iterator:
        pack.append(post_iter_func(item).detach().contiguous().view(torch.uint8).flatten())
        if sum(map(len, pack)) > PACKED_BYTES:
            group.broadcast(torch.cat(pack))
            pack = []
    if pack:
        group.broadcast(torch.cat(pack))


def install() -> None:
    """Before TRL is imported."""
    contents: dict[str, dict[str, Any]] = {
        # The engine inside the trainer's process, which TRL names and these tests do not use.
        "vllm": {"__version__": VERSION, "LLM": None, "RequestOutput": None, "SamplingParams": None},
        "vllm.sampling_params": {"StructuredOutputsParams": None},
        "vllm.utils": {},
        "vllm.utils.network_utils": {"get_ip": lambda: "127.0.0.1", "get_open_port": _open_port},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.nccl_common": {"trainer_init": Communicator},
        "vllm.distributed.weight_transfer.packed_tensor": {"packed_nccl_broadcast_producer": broadcast_packed},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(values)
        sys.modules[name] = module


def _open_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
