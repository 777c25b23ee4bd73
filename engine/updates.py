"""Weights that a trainer sends: staged as a checkpoint of their own until all are there, then read as any other.

A set in the making never touches what serves. It is a directory of safetensors that holds what came, with links to the
rest of the weights that serve now; `Resting.load_weights` reads it through the loader, so fused, sliced, rounded and
tied weights are what they would be at a start. What fails, stops or does not fit leaves the old weights serving.
Loop thread, but for what is said to block.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from engine.config import StartupError
from engine.models.loading.checkpoint import INDEX, StoredTensor, find_tensors, read_header
from engine.request import RequestError
from engine.resting import Resting

logger = logging.getLogger("oneloop.engine")

# Spellings of a type's name: torch's, vLLM's and that of safetensors.
DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "uint8": "U8",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1, "I32": 4, "I64": 8}
FLOATS = ("F32", "F16", "BF16")
# Of what trainers send though the checkpoint need not have it: the output layer, where it is the embedding.
_TIED = "lm_head.weight"
MAX_GROUPS = 8
PIECE = 16 * 1024 * 1024


class Group(Protocol):
    """Where tensors come from, in the order that was announced. Its methods block."""

    def receive(self, dtype: str, shape: Sequence[int]) -> memoryview: ...

    def close(self) -> None: ...


class StagedWeights:
    """One set of weights in the making. Its methods block on the disk. base: a directory of what serves now."""

    def __init__(self, base: Path) -> None:
        if not base.is_dir():
            raise RequestError("The served weights are packed in one file, which single tensors cannot replace.")
        self._base = base
        try:
            self._serving = find_tensors(base)
        except StartupError as error:
            raise RequestError(f"The served weights cannot be added to: {error}") from None
        self.directory = Path(tempfile.mkdtemp(prefix="oneloop-weights-"))
        self._came: dict[str, str] = {}  # tensor -> file
        self._count = 0

    @property
    def num_tensors(self) -> int:
        return len(self._came)

    @property
    def num_bytes(self) -> int:
        """Of all tensors that serve."""
        return sum(tensor.end - tensor.begin for tensor in self._serving.values())

    def check(self, name: str, dtype: str, shape: Sequence[int], where: str = "names") -> None:
        """Raises RequestError, naming the tensor, for one that the served model does not have like this."""
        served = self._serving.get(name)
        if name in self._came:
            raise RequestError(f"Tensor {name!r:.200} came twice in one update.", param=where)
        if served is None:
            if name == _TIED:
                return
            raise RequestError(f"The served checkpoint has no tensor {name!r:.200}.", param=where)
        if tuple(shape) != served.shape:
            raise RequestError(
                f"Tensor {name!r:.200} has shape {list(served.shape)} in the served checkpoint, "
                f"not {list(shape)!s:.100}.",
                param=where,
            )
        if dtype != served.dtype and not (dtype in FLOATS and served.dtype in FLOATS):
            raise RequestError(
                f"Tensor {name!r:.200} is {served.dtype} in the served checkpoint, which {dtype} cannot replace: "
                "a quantised checkpoint takes tensors that are quantised as its own are.",
                param=where,
            )

    def add(self, name: str, dtype: str, shape: Sequence[int], data: memoryview) -> None:
        """Write one tensor that was checked."""
        size = _size(dtype, shape)
        assert data.nbytes == size, "checked by who received it"
        header = json.dumps({name: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size]}}).encode()
        header += b" " * (-len(header) % 8)
        file = self._next_file()
        with (self.directory / file).open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.write(data)
        self._came[name] = file

    def add_file(self, data: bytes, where: str) -> None:
        """Take the tensors of a safetensors file's bytes. Raises RequestError."""
        file = self._next_file()
        path = self.directory / file
        path.write_bytes(data)
        try:
            tensors = read_header(path)
        except StartupError as error:
            path.unlink()
            raise RequestError(f"Not safetensors: {str(error).replace(str(path) + ': ', '')}", param=where) from None
        try:
            for name, tensor in tensors.items():
                self.check(name, tensor.dtype, tensor.shape, where)
        except RequestError:
            path.unlink()
            raise
        self._came |= dict.fromkeys(tensors, file)

    def complete(self) -> Path:
        """The directory as a checkpoint: what did not come is what serves now."""
        files: dict[Path, str] = {}
        weight_map = dict(self._came)
        for name, tensor in self._serving.items():
            if name not in weight_map:
                weight_map[name] = self._linked(tensor, files)
        for path in self._base.iterdir():
            if path.suffix == ".json" and not path.name.endswith(".index.json") and path.is_file():
                self._copy_config(path)
        (self.directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return self.directory

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _next_file(self) -> str:
        self._count += 1
        return f"received-{self._count:06d}.safetensors"

    def _linked(self, tensor: StoredTensor, files: dict[Path, str]) -> str:
        source = tensor.file.resolve()
        if source not in files:
            files[source] = f"kept-{len(files):06d}.safetensors"
            link = self.directory / files[source]
            try:
                # Of an earlier update, whose directory goes.
                os.link(source, link)
            except OSError:
                link.symlink_to(source)
        return files[source]

    def _copy_config(self, path: Path) -> None:
        if path.name != "config.json":
            (self.directory / path.name).write_bytes(path.read_bytes())
            return
        fields = json.loads(path.read_bytes())
        # It would name the file of the weights.
        fields.pop("transformers_weights", None)
        (self.directory / path.name).write_text(json.dumps(fields))


class WeightUpdates:
    """What trainers do with one engine: groups that they send over, and at most one set in the making.

    timeout_s: of a trainer that stops amid an update; what came is dropped then, and the old weights serve on.
    """

    def __init__(self, engine: Resting, timeout_s: float = 300.0) -> None:
        self.engine = engine
        self.timeout_s = timeout_s
        self.groups: dict[str, Group] = {}
        self._staged: StagedWeights | None = None
        self._begun = False  # by `begin`: it waits for its `finish`
        self._broken: str | None = None
        # Of vLLM's group: how tensors are packed in it. Of SGLang's pieces: what they were last called.
        self.packed_bytes: int | None = None
        self.version: str | None = None
        self._served: Path | None = None  # the directory of the last update
        self._lock = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._base = 0  # of the set: which weights it completes, by the number of updates before it

    @property
    def num_staged(self) -> int:
        """Tensors that came and do not serve yet."""
        return 0 if self._staged is None else self._staged.num_tensors

    @property
    def is_begun(self) -> bool:
        """Between `begin` and `finish`."""
        return self._begun or self._broken is not None

    async def most_bytes(self) -> int:
        """What one body may bring."""
        async with self._lock:
            staged = await self._open()
            return 2 * staged.num_bytes + (64 << 20)

    # ---- groups

    async def join(self, name: str, make: Callable[[float], Group]) -> None:
        """make(timeout_s): blocks until the trainer is there. Raises RequestError where it does not come."""
        async with self._lock:
            if name in self.groups:
                raise RequestError(f"There is a group {name!r:.100} already; destroy it first.", param="group_name")
            if len(self.groups) >= MAX_GROUPS:
                raise RequestError(f"There are {MAX_GROUPS} groups already.", param="group_name")
            coming = in_daemon(lambda: make(self.timeout_s))
            try:
                self.groups[name] = await asyncio.shield(coming)
                # Whoever comes anew begins anew.
                self._broken = None
            except asyncio.CancelledError:
                # Nobody would ever leave it.
                coming.add_done_callback(_close_late)
                raise
            except (RuntimeError, OSError, ValueError) as error:
                line = " ".join(str(error).split())[:200]
                raise RequestError(f"The group did not come together: {line}", param="master_address") from None

    async def leave(self, name: str) -> None:
        async with self._lock:
            await self._leave(self._group(name), name)

    async def _leave(self, group: Group, name: str) -> None:
        self.groups.pop(name, None)
        with contextlib.suppress(RuntimeError):
            await in_daemon(group.close)

    def _group(self, name: str) -> Group:
        group = self.groups.get(name)
        if group is None:
            raise RequestError(f"There is no group {name!r:.100}; it must be initialised first.", param="group_name")
        return group

    # ---- a set

    async def begin(self) -> None:
        """vLLM's form: everything until `finish` is one update."""
        async with self._lock:
            if self._staged is not None:
                raise RequestError("An update is in progress already; finish it first.")
            self._broken = None
            await self._open()
            self._begun = True
            self._wait_for_more()

    async def receive(
        self,
        group_name: str,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        packed_bytes: int | None = None,
    ) -> None:
        """Take these tensors from a group, in this order. packed_bytes: as vLLM packs them, whole tensors in one until
        they have more bytes than that. Raises RequestError, and drops the set where it failed on the
        way: the trainer's side and this one no longer agree on what comes next."""
        async with self._lock:
            group = self._group(group_name)
            staged = await self._open()
            seen: set[str] = set()
            try:
                for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
                    staged.check(name, dtype, shape)
                    if name in seen:
                        raise RequestError(f"Tensor {name!r:.200} stands twice in `names`.", param="names")
                    seen.add(name)
            except RequestError:
                self._keep_what_came(staged)
                raise

            def work() -> None:
                for pack in _packs(dtypes, shapes, packed_bytes):
                    if packed_bytes is None:
                        staged.add(names[pack[0]], dtypes[pack[0]], shapes[pack[0]], group.receive(*of(pack[0])))
                        continue
                    sizes = [_size(*of(index)) for index in pack]
                    data = group.receive("U8", (sum(sizes),))
                    for index, size in zip(pack, sizes, strict=True):
                        staged.add(names[index], dtypes[index], shapes[index], data[:size])
                        data = data[size:]

            def of(index: int) -> tuple[str, list[int]]:
                return dtypes[index], shapes[index]

            async def failed(error: BaseException) -> BaseException:
                if not isinstance(error, RuntimeError | OSError):
                    self._keep_what_came(staged)
                    return error
                line = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
                self._drop(f"the trainer stopped amid it ({line})")
                await self._leave(group, group_name)
                return RequestError(f"The update was dropped and its group closed, the old weights serve on: {line}")

            await self._undisturbed(work, failed)

    async def add_files(self, files: Sequence[bytes], where: str) -> None:
        """Take the tensors of safetensors files."""
        async with self._lock:
            staged = await self._open()

            def work() -> None:
                for data in files:
                    staged.add_file(data, where)

            async def failed(error: BaseException) -> BaseException:
                if not isinstance(error, OSError):
                    self._keep_what_came(staged)
                    return error
                self._drop(f"it could not be written ({error.strerror})")
                return RequestError(f"The update was dropped, the old weights serve on: {error.strerror}.")

            await self._undisturbed(work, failed)

    async def finish(self, version: str | None, mode: str, *, begun: bool = False) -> None:
        """Serve with what came. begun: it must have been opened by `begin`. mode: see Resting.pause. Raises
        RequestError; then the old weights serve on, and what came is forgotten."""
        async with self._lock:
            if self._broken is not None:
                lost, self._broken = self._lost(), None
                raise lost
            if begun and not self._begun:
                raise RequestError("No update is in progress; /start_weight_update begins one.")
            if self._staged is not None and self._staged.num_tensors and self._is_stale():
                self._drop(None)
                raise RequestError(_STALE)
            staged, self._staged, self._begun = self._staged, None, False
            self._stop_timer()
            if staged is None or not staged.num_tensors:
                if staged is not None:
                    staged.remove()
                if version is not None:
                    self.engine.name_weights(version)
                return
            try:
                directory = await asyncio.to_thread(staged.complete)
                await self.engine.load_weights(directory, mode=mode, version=version)
            except (StartupError, OSError) as error:
                staged.remove()
                line = str(error).replace(f"{staged.directory}: ", "").replace(f"{staged.directory}/", "")
                raise RequestError(f"The weights were not taken, the old ones serve on: {line}") from None
            except RequestError:
                staged.remove()
                raise
            if self._served is not None:
                shutil.rmtree(self._served, ignore_errors=True)
            self._served = directory

    async def finish_pieces(self, mode: str = "keep") -> None:
        """`finish` for pieces that nobody began, and nothing where none came. Not while vLLM's form is under way."""
        version, self.version = self.version, None
        if not self._begun and (self._staged is not None or self._broken is not None or version is not None):
            await self.finish(version, mode)

    async def close(self) -> None:
        """At the end of the server."""
        self._drop(None)
        for name, group in list(self.groups.items()):
            await self._leave(group, name)
        if self._served is not None:
            shutil.rmtree(self._served, ignore_errors=True)

    async def _open(self) -> StagedWeights:
        if self._broken is not None:
            raise self._lost()
        if self._staged is not None and self._is_stale():
            lost = self._staged.num_tensors or self._begun
            self._drop(None)
            if lost:
                raise RequestError(_STALE)
        if self._staged is None:
            self._base = self.engine.num_weight_updates
            base = self.engine.weights_directory
            if base is None:
                raise RequestError(
                    "This server's weights do not come from a checkpoint, so there is nothing to update."
                )
            self._staged = await asyncio.to_thread(StagedWeights, base)
        return self._staged

    def _is_stale(self) -> bool:
        """Other weights serve than those that what came was to complete."""
        return self._base != self.engine.num_weight_updates

    def _keep_what_came(self, staged: StagedWeights) -> None:
        """Of a piece that was refused: an empty set is none."""
        if not self._begun and not staged.num_tensors:
            self._drop(None)
        else:
            self._wait_for_more()

    async def _undisturbed(
        self, work: Callable[[], None], failed: Callable[[BaseException], Awaitable[BaseException]]
    ) -> None:
        """In a thread, to its end even where the caller goes: a group's tensors have their order, and what has failed
        is dropped whoever waits. failed: sees to that, and returns what to raise."""
        self._stop_timer()
        task, gone = in_daemon(work), False
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            gone = True
            await asyncio.wait({task})
        except Exception:
            pass
        error = task.exception()
        answer = None if error is None else await failed(error)
        if answer is None:
            self._wait_for_more()
        if gone:
            raise asyncio.CancelledError
        if answer is not None:
            raise answer from None

    def _wait_for_more(self) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(self.timeout_s, self._expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        logger.warning("a weight update was dropped: nothing came for %g seconds", self.timeout_s)
        self._drop(f"nothing came for {self.timeout_s:g} seconds")

    def _lost(self) -> RequestError:
        return RequestError(f"The update is lost: {self._broken}. The old weights serve on; begin another one.")

    def _drop(self, reason: str | None) -> None:
        """Forget what came. reason: what whoever finishes it is told."""
        self._stop_timer()
        if self._staged is not None:
            self._staged.remove()
            # A piece by itself is lost alone; of an update in several the rest must not serve without it.
            self._broken = reason if self._begun or self.engine.is_paused else None
        self._staged, self._begun = None, False


_T = TypeVar("_T")
_STALE = "Other weights were loaded meanwhile, so what came before is dropped; begin another update."


def in_daemon(work: Callable[[], _T]) -> asyncio.Future[_T]:
    """What may block for as long as a trainer likes has a thread that no end of the process waits for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()
    # Somebody has looked at it, also where nobody waits any more.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def tell(done: Callable[[], None]) -> None:
        def on_loop() -> None:
            if not future.done():
                done()

        # RuntimeError: that loop is closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(on_loop)

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            failure = error
            tell(lambda: future.set_exception(failure))
        else:
            tell(lambda: future.set_result(result))

    threading.Thread(target=run, name="weight-update", daemon=True).start()
    return future


def _close_late(coming: asyncio.Future[Group]) -> None:
    if not coming.cancelled() and coming.exception() is None:
        in_daemon(coming.result().close)


def connect(name: str, address: str, port: int, rank: int, world_size: int, backend: str, timeout_s: float) -> Group:
    """A group of torch.distributed with a trainer as rank 0; see TrainerGroup. Blocks."""
    from engine.distributed.trainer import TrainerGroup

    return TrainerGroup(name, address, port, rank, world_size, backend, timeout_s)


def _size(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * ITEM_BYTES[dtype]


def _packs(dtypes: list[str], shapes: list[list[int]], most: int | None) -> Iterator[list[int]]:
    """Which tensors come in one, by their places."""
    pack: list[int] = []
    total = 0
    for index, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True)):
        pack.append(index)
        total += _size(dtype, shape)
        if most is None or total > most:
            yield pack
            pack, total = [], 0
    if pack:
        yield pack


def checksums(directory: Path) -> dict[str, Any]:
    """SHA-256 of every tensor's bytes as a checkpoint holds them, and of all of them. Blocks. Raises StartupError."""
    found: dict[str, str] = {}
    for name, tensor in sorted(find_tensors(directory).items()):
        digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
        with tensor.file.open("rb") as file:
            file.seek(tensor.begin)
            left = tensor.end - tensor.begin
            while left and (piece := file.read(min(left, PIECE))):
                digest.update(piece)
                left -= len(piece)
        found[name] = digest.hexdigest()
    whole = hashlib.sha256("".join(f"{name}{value}" for name, value in found.items()).encode()).hexdigest()
    return {"checksum": whole, "per_tensor": found}
