"""A rank beside the one that has the event loop: reads its part of the model, and computes what it is told to.

`python -m engine.distributed.rank`, started by members.py with a job on its standard input, which stays open as long as
the parent lives. torch is imported once the job is known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import orjson

from engine.config import StartupError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from engine.executor.reading import Reading
    from engine.models.parts.decoder import CausalLM
    from engine.ops.attention.base import AttentionBackend

logger = logging.getLogger("oneloop.ranks")


def main() -> int:
    """Serve until the group ends."""
    # Whoever ends the parent decides; a terminal's Ctrl-C reaches this process, too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    job = orjson.loads(line)
    if job.get("device") == "cuda":
        from engine.distributed import device_rank

        _leave(device_rank.serve(job))  # its device may wait for a rank that is gone, and so would a tidy end
    from engine.ops.ranks import RanksEndedError

    try:
        status = Rank(job).run()
    except RanksEndedError:
        status = 0
    except BaseException:
        logger.exception("rank %d failed", job["rank"])
        status = 1
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End the process. Not by the interpreter's own end, which takes standard input away from the thread that reads."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os._exit(0)


class Rank:
    """One process's part. job: see leader.py."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        from engine.distributed.adapters import FollowedAdapters
        from engine.distributed.ring import Ring, adapters_layout
        from engine.distributed.shared import SharedMemory
        from engine.ops.parallel import ParallelGroup
        from engine.ops.ranks import Layout, Ranks

        torch.set_num_threads(job["threads"])
        self._job = job
        self._dtype: torch.dtype = getattr(torch, job["dtype"])
        self._ranks = Ranks(job["file"], Layout(**job["layout"]), job["rank"])
        self._groups = [ParallelGroup(self._ranks, _never, expert_parallel=job["expert_parallel"]) for _ in range(2)]
        self._model: CausalLM | None = None
        self._pending: CausalLM | None = None
        self._backend: AttentionBackend | None = None
        self._memory = None if job["pages"] is None else SharedMemory(job["pages"], job["rank"])
        layout = adapters_layout(self._ranks.size)
        self._beside = Ring(Ranks(job["beside"], layout, job["rank"]))
        self._shared = FollowedAdapters(self._beside, self._beside.exchange, self._read_part)

    def run(self) -> int:
        """Load, then do what comes."""
        import torch

        from engine.distributed import messages

        failure, _ = self._attempt(lambda: self._read(None))
        self._model, self._pending = self._pending, None
        self._answer(failure)
        if failure is not None:
            return 1
        threading.Thread(target=self._read_adapters, name="adapters", daemon=True).start()
        with torch.inference_mode():
            while True:
                message = self._ranks.receive()
                kind = messages.kind_of(message)
                if kind == messages.FORWARD:
                    self._forward(message)
                elif kind == messages.LOGITS:
                    self._logits(message)
                elif kind == messages.STATES:
                    self._begin_states(message)
                elif kind == messages.SETTLED:
                    self._settle_states(message)
                elif kind == messages.EMBEDDED:
                    self._embedded(message)
                else:
                    command = messages.read_text(message)
                    self._answer(*self._attempt(lambda command=command: self._obey(**command)))

    def _forward(self, message: Any) -> None:
        import torch

        from engine.distributed import messages

        model, backend = self._model, self._backend
        assert model is not None and backend is not None
        token_ids, groups, types, adapters = messages.read_forward(message)
        self._use(adapters)
        backend.plan(*groups)
        model.forward(
            torch.from_numpy(token_ids),
            torch.from_numpy(groups[0].positions),
            backend,
            None if types is None else torch.from_numpy(types),
        )

    def _begin_states(self, message: Any) -> None:
        from engine.distributed import messages
        from engine.ops.state import StatePlan

        assert self._backend is not None and self._backend.states is not None
        told = messages.read_states(message)
        plan = StatePlan(told.slots, told.qo_indptr, told.num_decode_rows, held=told.held)
        self._backend.states.apply(told.saves, told.loads, plan, told.starts)
        if told.meets:
            self._ranks.arrive()
            self._ranks.meet()

    def _settle_states(self, message: Any) -> None:
        from engine.distributed import messages

        assert self._backend is not None and self._backend.states is not None
        self._backend.states.settle(messages.read_settled(message))
        self._ranks.arrive()
        self._ranks.meet()

    def _embedded(self, message: Any) -> None:
        import torch

        from engine.distributed import messages
        from engine.models.parts.decoder import Decoder

        assert isinstance(self._model, Decoder)
        self._use(None)
        self._model.embedded(torch.from_numpy(messages.read_ids(message)))

    def _logits(self, message: Any) -> None:
        import torch

        from engine.distributed import messages

        output = self._groups[0].output
        assert output is not None
        width = output.in_features
        hidden, adapters = messages.read_logits(message, width * self._dtype.itemsize)
        self._use(adapters)
        output.answer(torch.from_numpy(hidden).view(self._dtype).view(-1, width))

    def _use(self, adapters: Any | None) -> None:
        """Whose each row of what is computed next is, int32 [rows]."""
        if self._model is not None and (adapted := self._model.adapted) is not None:
            adapted.rows.use(0 if adapters is None else adapters.copy())

    def _read_adapters(self) -> None:
        """What rank 0 reads, at the same time."""
        from engine.ops.ranks import RanksEndedError

        try:
            self._shared.follow()
        except RanksEndedError:
            pass
        except BaseException:
            # The others would wait for what this thread says, and that ends with the process.
            logger.exception("rank %d failed at an adapter", self._ranks.rank)
            _leave(1)

    def _read_part(self, path: Path, reading: Reading) -> Any:
        from engine.executor.reading import read_part

        model = self._model  # read once: a command may take it away
        layers = None if model is None else model.adapted
        return read_part(path, layers, self._job["max_lora_rank"], reading)

    def _put_adapters(self, loads: list[list[int]], gone: list[int]) -> None:
        assert self._model is not None and self._model.adapted is not None
        for index, number in loads:
            weights = self._shared.of(number)
            self._model.adapted.put(index, {} if weights is None else weights.branches)
        self._shared.forget(gone)

    def _obey(self, do: str, **given: Any) -> Any:
        """A command of leader.py, and what it is to know of it. Raises StartupError."""
        if do == "begin":
            self._make_backend(**given)
            return self._places()
        elif do == "adapters":
            self._put_adapters(**given)
        elif do == "sleep":
            assert self._backend is not None
            if "kv_cache" in given["parts"]:
                self._backend.release()
                if self._backend.states is not None:
                    self._backend.states.release()
                if self._memory is not None:
                    self._memory.release()
            if given["level"] == 2 and "weights" in given["parts"]:
                self._model = None
        elif do == "wake":
            assert self._backend is not None
            self._backend.allocate()
            if self._backend.states is not None:
                self._backend.states.allocate()
        elif do == "read":
            directory = given["directory"]
            self._read(None if directory is None else Path(directory))
        elif do == "keep":
            # What every rank has read counts from now on; or what some could not, does not.
            if given["whole"]:
                assert self._pending is not None
                if self._model is not None and self._pending.adapted is not None:
                    self._pending.adapted.take_over(self._model.adapted)
                self._model = self._pending
                self._groups.reverse()
            self._pending = None
        return None

    def _places(self) -> dict[str, list[list[int]]] | None:
        """Of the memory that rank 0 is to see, if it is."""
        if (memory := self._memory) is None:
            return None
        import torch

        backend: Any = self._backend
        kinds = {
            "pages": [pool for pool in (*backend.k_pools, *backend.v_pools) if pool.nbytes],
            "states": [] if backend.states is None else [backend.states.snapshots],
        }
        return {
            kind: [memory.place_of(part.view(torch.uint8).flatten(1).numpy()) for part in parts]
            for kind, parts in kinds.items()
        }

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See Zeros."""
        import torch

        from engine.ops.attention.torch_paged import OVER_BYTES

        assert self._memory is not None
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        size = math.prod(shape) * dtype.itemsize
        return torch.from_numpy(self._memory.take(size + OVER_BYTES))[:size].view(dtype).view(shape)

    def _make_backend(self, kv_dtype: str, **sizes: Any) -> None:
        """sizes: of Limits, but for the groups."""
        import torch

        from engine.forward import Limits
        from engine.groups import plan_groups
        from engine.ops.attention.base import create_backend
        from engine.ops.state import States

        model = self._model
        assert model is not None
        spec = model.attention_spec
        limits = Limits(**sizes, groups=plan_groups(model.config.windows, self._job["context"]))
        zeros = {} if self._memory is None else {"zeros": self._zeros}
        self._backend = create_backend(
            "packed" if spec.bidirectional else "torch_paged",
            spec,
            num_pages=limits.num_pages,
            page_size=limits.page_size,
            dtype=self._dtype,
            kv_dtype=getattr(torch, kv_dtype),
            groups=limits.groups,
            **zeros,
        )
        if limits.num_snapshots is not None:
            self._backend.states = States(model.config.states, limits, self._dtype, torch.device("cpu"), **zeros)

    def _read(self, other: Path | None) -> None:
        """The model, as `_pending`: from where the job says, or another directory with the same one."""
        import torch

        from engine.models.loading.load import load_model
        from engine.models.registry import read_spec

        job = self._job
        directory = Path(job["directory"])
        spec = dataclasses.replace(read_spec(directory), headless=job["headless"], projections=())
        # What is read at a start is in use at once.
        group = self._groups[0 if self._model is None and other is None and self._backend is None else 1]
        self._pending = load_model(
            spec,
            other or directory,
            dtype=self._dtype,
            device=torch.device("cpu"),
            load_format=job["load_format"] if other is None else "auto",
            seed=job["seed"],
            max_model_len=job["context"],
            deterministic=job["deterministic"],
            quantisation=job["quantisation"],
            packed_input_bits=job["packed_input_bits"],
            max_adapters=job["max_adapters"],
            group=group,
        )

    def _attempt(self, act: Any) -> tuple[str | None, Any]:
        """What went wrong, as a line; and what was found."""
        try:
            return None, act()
        except StartupError as error:
            return str(error), None
        except (MemoryError, OSError) as error:
            return f"no memory: {' '.join(str(error).split())[:200]}", None

    def _answer(self, failure: str | None, found: Any = None) -> None:
        from engine.distributed import messages

        said = {"error": failure, "found": found}
        messages.write_text(self._ranks.section(self._ranks.rank), messages.COMMAND, said)
        self._ranks.arrive()


def _never(hidden: Any) -> None:
    raise AssertionError("only rank 0 asks for logits")


if __name__ == "__main__":
    sys.exit(main())
