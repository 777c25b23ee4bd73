"""Where a model's tensors come from: a checkpoint, a random generator, or nowhere (only shapes are recorded).

A model asks for its tensors by name and shape while it builds itself; the three sources answer alike, so names
and shapes are written down once. Used at start, on the loading thread.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine import later
from engine.config import StartupError
from engine.models.gguf.dequantise import dequantise
from engine.models.gguf.types import BY_NAME
from engine.models.loading.checkpoint import FLOATS, MappedFiles, StoredTensor, check
from engine.models.loading.cuts import Cut
from engine.models.loading.schemes.base import Coded, Mismatch, Quantised
from engine.models.loading.schemes.rounding import Rounded, RoundedFloat8, can_round
from engine.models.loading.schemes.shaped import as_stored
from engine.models.parts.source import PREFIX
from engine.ops.experts import Mixture, Stack
from engine.ops.heads import HeadLinear
from engine.ops.invariance import seeded
from engine.ops.linear import Linear
from engine.ops.lora import Rows, StackedSites
from engine.ops.reordered import permuted

OUTPUT = "lm_head"
OUTPUT_WEIGHT = f"{OUTPUT}.weight"
# Behind a module's name and before the number of one of its pieces, of which a rank has several.
PIECE = "#"
# An exponent of 8 bits that is no number, by OCP's specification of MXFP4.
NO_EXPONENT = 255

# Bytes copied before the mapped pages are given back and progress is told.
CHUNK_BYTES = 16 * 1024 * 1024
# Elements of quantised tensors that are dequantised at once; a multiple of every block.
BLOCK_ELEMENTS = 64 * 1024
# The same, of those that several tensors stand for.
QUANTISED_ELEMENTS = 1024 * 1024
# Random values that dummy weights repeat; a prime, so that rows of any length differ.
DUMMY_BLOCK = 1_048_573

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}

Shapes = Mapping[str, tuple[int, ...]]
Progress = Callable[[int, int], None]
T = TypeVar("T")


class Weights:
    """The interface to a source, and what the sources share. dtype and device are those of the result.

    deterministic: linear layers are to give a row the same bits in any batch (Linear.prepare).
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.deterministic = False
        # All that were prepared.
        self.linears: list[Linear] = []
        self.mixtures: list[Mixture] = []
        self.adapters: Rows | None = None

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of files. Tensors handed out stay valid."""

    def fill(self, destination: Tensor, name: str) -> None:
        """Write the tensor called `name` into `destination` (contiguous, its shape), converting the dtype."""
        raise NotImplementedError

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """One tensor as the checkpoint has it. dtype: in place of the usual one."""
        result = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        self.fill(result, name)
        return result

    def raw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """uint8: one tensor of bytes as the checkpoint has it."""
        result = torch.empty(shape, dtype=torch.uint8, device=self.device)
        self.fill(result, name)
        return result

    def stacked(
        self, names: Sequence[str], rows: Sequence[int], *columns: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Several tensors [rows[i], *columns] below one another, as one [sum(rows), *columns]."""
        result = torch.empty((sum(rows), *columns), dtype=dtype or self.dtype, device=self.device)
        for name, part in zip(names, result.split_with_sizes(list(rows)), strict=True):
            self.fill(part, name)
        return result

    def experts(
        self, names: Sequence[str], count: int, rows: int, columns: int, *, order: Tensor | None = None
    ) -> Stack:
        """See Source.experts."""
        stack = self.stacked([f"{name}.weight" for name in names], [rows] * len(names), columns)
        stack = stack.view(count, -1, columns)
        if order is not None:
            order = order.to(stack.device)
            for matrix in stack:
                matrix.copy_(permuted(matrix, order))
        return stack

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        bias: bool = False,
        order: Tensor | None = None,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Linear:
        """A ready linear layer from one or several projections of the checkpoint (`NAME.weight`, `NAME.bias`).

        order: the first len(order) rows of the result are rows `order` of the checkpoint. activation: see Linear.
        """
        weight = self.stacked([f"{name}.weight" for name in names], rows, columns, dtype=dtype)
        bias_vector = self.stacked([f"{name}.bias" for name in names], rows, dtype=dtype) if bias else None
        if order is not None:
            for part in (weight, bias_vector):
                if part is not None:
                    part[: len(order)] = permuted(part, order)
        linear = Linear(weight, bias_vector, activation)
        del weight  # `prepare` may replace it, and then it must go at once
        self.prepare(linear)
        return linear

    def adapted(self, layer: Linear, name: str) -> Linear:
        """See Source.adapted: where no adapters are served, the layer itself."""
        return layer

    def adapted_experts(
        self, names: Sequence[str], count: int, rows: int, columns: int, order: Tensor | None
    ) -> StackedSites | None:
        """See Source.adapted_experts: where no adapters are served, none."""
        return None

    def adapted_heads(
        self, name: str, to_latent: HeadLinear, to_value: HeadLinear
    ) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
        """See Source.adapted_heads."""
        return to_latent, to_value

    def embedding(self, name: str, count: int, width: int) -> Linear:
        """A table [count, width] of which only `rows` are asked for."""
        return Linear(self.tensor(name, (count, width)))

    def output_layer(self, vocab: int, hidden: int, *, tied: bool, bias: bool = False) -> Linear:
        """The layer that makes logits; a tied one is the embedding too, and hands out its rows."""
        if not tied:
            return self.linear([OUTPUT], [vocab], hidden, bias=bias)
        assert not bias, "a tied output layer has no bias"
        linear = Linear(self.tensor(f"{PREFIX}embed_tokens.weight", (vocab, hidden)))
        self.prepare(linear, keep_rows=True)
        return linear

    def summed(self, part: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """See Source: there is one rank."""
        return part

    def prepare(self, linear: Linear, *, keep_rows: bool = False) -> None:
        """Bring a layer into the form that is fastest to multiply with."""
        linear.prepare(keep_rows=keep_rows, deterministic=self.deterministic)
        self.linears.append(linear)


class ShapeRecorder(Weights):
    """Notes what a model asks for and hands out tensors without memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype, torch.device("meta"))
        self.shapes: dict[str, tuple[int, ...]] = {}

    def fill(self, destination: Tensor, name: str) -> None:
        self.shapes[name] = tuple(destination.shape)

    def prepare(self, linear: Linear, *, keep_rows: bool = False) -> None:
        pass


def recorded(make: Callable[[ShapeRecorder], T], dtype: torch.dtype) -> tuple[Shapes, T]:
    """The shapes of all tensors that `make` asks its source for, and what it makes of them."""
    recorder = ShapeRecorder(dtype)
    try:
        made = make(recorder)
    except NotImplementedError:  # torch has not imported an operator of "meta" tensors
        if not later.everything():
            raise
        made = make(recorder)
    return recorder.shapes, made


class CheckpointWeights(Weights):
    """Tensors of a directory of safetensors. `shapes` is all that the model will ask for; checked at once.

    tensors: see finding.py. assumed: sizes that config.json does not name, for the error of a wrong one.
    quantisation: one of quantisation.ROUNDED, to which the weights of layers are rounded; None for what the file has.

    Every tensor goes from the mapped file to its place in chunks, and the mapped pages are given back after
    each: memory never holds more than the model so far, the layer at hand and one chunk.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        directory: Path,
        tensors: dict[str, StoredTensor],
        shapes: Shapes,
        progress: Progress | None = None,
        *,
        assumed: Sequence[str] = (),
    ) -> None:
        super().__init__(dtype, device)
        self._tensors = tensors
        # A tied model's checkpoint may hold the embedding a second time, as the output layer.
        self._files = MappedFiles()
        ignored = [] if OUTPUT_WEIGHT in shapes else [OUTPUT_WEIGHT]
        ignored += [name for name in tensors if name not in shapes and self._adds_nothing(name)]
        check(directory, self._tensors, shapes, ignored, assumed)
        self._progress = progress
        self._done = 0
        self._total = sum(self._tensors[name].end - self._tensors[name].begin for name in shapes)
        self.quantisation: str | None = None

    def round(self, names: Sequence[str], *, as_output: bool = False) -> None:
        """Have these weights become what `quantisation` asks for, where it does and their sizes allow it.

        as_output: they are of the layer that makes logits, which takes eight bits whatever the others take.
        """
        if self.quantisation is None or not all(can_round(self._tensors[name]) for name in names):
            return
        for name in names:
            matrix: Quantised
            if self.quantisation == "fp8":
                matrix = RoundedFloat8(self._tensors[name])
            else:
                matrix = Rounded(self._tensors[name], "int8" if as_output else self.quantisation)
            self._tensors[name] = as_stored(matrix)

    def close(self) -> None:
        self._files.close()

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor lies."""
        return self._tensors[name]

    def replace_tensor(self, name: str, stored: StoredTensor) -> None:
        """What is read under that name from now on."""
        if name in self._tensors:
            self._total -= self._tensors[name].end - self._tensors[name].begin
        self._tensors[name] = stored
        self._total += stored.end - stored.begin

    def drop_tensor(self, name: str) -> None:
        """Nobody will ask for it."""
        gone = self._tensors.pop(name)
        self._total -= gone.end - gone.begin

    def raw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See Source. Raises StartupError for an exponent that is no number, by OCP's specification."""
        stored = self._tensors[name]
        if name.endswith("_scales") and bool((self._whole(stored) == NO_EXPONENT).any()):
            raise StartupError(f"{stored.file}: tensor {name}: a scale is no finite number")
        return super().raw(name, shape)

    def fill(self, destination: Tensor, name: str) -> None:
        stored = self._tensors[name]
        if stored.quantised is not None:
            self._fill_quantised(destination, name, stored.quantised)
        elif stored.undo is not None:
            wide = torch.empty(stored.shape, dtype=torch.float32)
            self._fill(wide, name, stored)
            destination.copy_(torch.from_numpy(stored.undo(wide.numpy())).view(destination.shape))
        elif stored.shift:
            wide = torch.empty(destination.shape, dtype=torch.float32)
            self._fill(wide, name, stored)
            destination.copy_(wide.sub_(stored.shift))
        else:
            self._fill(destination, name, stored)

    def _fill(self, destination: Tensor, name: str, stored: StoredTensor) -> None:
        flat = destination.view(-1)
        if stored.dtype not in (*FLOATS, "U8"):
            self._dequantise(flat, name, stored)
            return
        dtype = TORCH_DTYPES[stored.dtype]
        if stored.stride:
            self._fill_parts(destination, stored, dtype)
            return
        step = CHUNK_BYTES // dtype.itemsize
        if stored.transposed:
            # Whole rows of the file, which are columns of the destination.
            columns = destination.T
            width = columns.shape[1]
            step = max(1, step // width) * width
        for start in range(0, flat.numel(), step):
            count = min(step, flat.numel() - start)
            begin = stored.begin + start * dtype.itemsize
            end = begin + count * dtype.itemsize
            source = view_of(self._files, stored, dtype, start, count)
            if stored.transposed:
                columns[start // width : (start + count) // width].copy_(source.view(-1, width))
            else:
                flat[start : start + count].copy_(source)
            del source
            self._let_go(stored, begin, end)

    def _fill_parts(self, destination: Tensor, stored: StoredTensor, dtype: torch.dtype) -> None:
        """From rows that are parts of the file's."""
        into = destination.T if stored.transposed else destination
        step = max(1, CHUNK_BYTES // stored.stride)
        for first in range(0, len(into), step):
            last = min(first + step, len(into))
            source = view_of_parts(self._files, stored, dtype, first, last)
            into[first:last].copy_(source)
            begin = stored.begin + first * stored.stride
            end = begin + (last - first - 1) * stored.stride + source.shape[1] * dtype.itemsize
            del source
            self._let_go(stored, begin, end)

    def _dequantise(self, flat: Tensor, name: str, stored: StoredTensor) -> None:
        """The blocks of a quantised tensor as numbers, piece by piece; each piece stays in the processor's caches."""
        kind = BY_NAME[stored.dtype]
        mapped = self._files.get(stored.file, stored.end)
        if stored.stride:
            # Rows that are parts of wider ones, as what they would be in one piece.
            rows, width = stored.shape[0], stored.shape[-1] // kind.elements * kind.size
            parts: Any = np.ndarray((rows, width), np.uint8, mapped, stored.begin, (stored.stride, 1))
            blocks = np.ascontiguousarray(parts).reshape(-1, kind.size)
        else:
            blocks = np.frombuffer(mapped, np.uint8, stored.end - stored.begin, stored.begin).reshape(-1, kind.size)
        values = np.empty((BLOCK_ELEMENTS // kind.elements, kind.elements), dtype=np.float32)
        given_back = 0
        for start in range(0, len(blocks), len(values)):
            piece = blocks[start : start + len(values)]
            out = values[: len(piece)]
            try:
                dequantise(stored.dtype, piece, out)
            except ValueError as problem:
                raise StartupError(f"{stored.file}: tensor {name}: {problem}") from None
            at = start * kind.elements
            flat[at : at + out.size].copy_(torch.from_numpy(out.reshape(-1)))
            done = (start + len(piece)) * kind.size
            if (not stored.stride and done - given_back >= CHUNK_BYTES) or start + len(piece) == len(blocks):
                del piece
                self._let_go(stored, stored.begin + given_back, stored.begin + done)
                given_back = done
        if stored.stride:
            self._let_go(stored, stored.begin, stored.end)

    def _fill_quantised(self, destination: Tensor, name: str, matrix: Quantised) -> None:
        """A matrix that several tensors stand for, some rows at a time."""
        rows, columns = matrix.shape
        step = max(1, QUANTISED_ELEMENTS // columns)
        with self._reading(name, matrix):
            for begin in range(0, rows, step):
                end = min(begin + step, rows)
                values = matrix.values(self._whole, begin, end)
                if not bool(values.isfinite().all()):
                    raise Mismatch("a weight is no finite number")
                destination[begin:end].copy_(values)

    def _adds_nothing(self, name: str) -> bool:
        """Whether it is a bias of zeros beside a quantised matrix: some libraries give one to every layer."""
        matrix = self._tensors.get(name.removesuffix("bias") + "weight") if name.endswith(".bias") else None
        if matrix is None or matrix.quantised is None or self._tensors[name].dtype not in FLOATS:
            return False
        return not bool(self._whole(self._tensors[name]).any())

    def kept_kind(self, name: str) -> str:
        """Of the blocks that a tensor is stored in, or can be brought into; its dtype where that is none of them."""
        stored = self._tensors[name]
        if stored.quantised is None:
            return stored.dtype
        with self._reading(name, stored.quantised, last=False):
            return stored.quantised.kind(self._whole) or stored.dtype

    def kept_form(self, name: str, *, narrow: bool = False) -> tuple[str, int] | None:
        """Of the codes that it can be brought into, and columns of a scale; see Quantised.form and Quantised.narrow."""
        matrix = self._tensors[name].quantised
        if matrix is None:
            return None
        if narrow:
            matrix.narrow()
        with self._reading(name, matrix, last=False):
            form = matrix.form(self._whole)
            return None if form is None else (form, matrix.code_group)

    def kept_table(self, name: str) -> tuple[float, ...] | None:
        """What codes of its `kept_form` are places in, where they are in one of its own; see Quantised.table."""
        matrix = self._tensors[name].quantised
        if matrix is None:
            return None
        with self._reading(name, matrix, last=False):
            found = matrix.table(self._whole)
        return None if found is None else tuple(found.tolist())

    def input_order(self, names: Sequence[str]) -> tuple[bool, Tensor | None]:
        """Whether all of these have their columns in one order as blocks; int64 [columns], None for their own."""
        found: list[Tensor | None] = []
        for name in names:
            matrix = self._tensors[name].quantised
            if matrix is not None:
                with self._reading(name, matrix, last=False):
                    found.append(matrix.order(self._whole))
            else:
                found.append(None)
        first = found[0]
        if first is None:
            return all(each is None for each in found), None
        return all(each is not None and torch.equal(each, first) for each in found), first

    def kept_blocks(self, name: str, begin: int, end: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Rows [begin, end) of a matrix that several tensors stand for, in blocks of its `kept_kind`: a row's bytes."""
        matrix = self._tensors[name].quantised
        assert matrix is not None
        with self._reading(name, matrix, last=end == matrix.shape[0]):
            blocks = matrix.blocks(self._whole, begin, end)
        found: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = blocks.numpy()
        return found

    def kept_codes(self, name: str, begin: int, end: int) -> Coded:
        """Rows [begin, end) of a matrix that several tensors stand for, in codes of its `kept_form`."""
        matrix = self._tensors[name].quantised
        assert matrix is not None
        with self._reading(name, matrix, last=end == matrix.shape[0]):
            return matrix.coded(self._whole, begin, end)

    @contextlib.contextmanager
    def _reading(self, name: str, matrix: Quantised, *, last: bool = True) -> Iterator[None]:
        """What is wrong with it is told of this tensor; after the last rows its bytes in the files are done with."""
        parts = matrix.parts.values()
        try:
            yield
        except Mismatch as problem:
            file = next(iter(parts)).file
            raise StartupError(f"{file}: tensor {name} ({matrix.label}): {problem}") from None
        for part in parts if last else ():
            self._let_go(part, part.begin, part.end)

    def _whole(self, stored: StoredTensor) -> Tensor:
        """A tensor of the file, in its shape. Not to be written to."""
        shape = stored.shape
        if 0 in shape:
            return torch.empty(shape, dtype=TORCH_DTYPES[stored.dtype])
        if stored.stride:
            last = shape[1] if stored.transposed else shape[0]
            parts = view_of_parts(self._files, stored, TORCH_DTYPES[stored.dtype], 0, last)
            return parts.contiguous().view(shape) if stored.transposed else parts
        return view_of(self._files, stored, TORCH_DTYPES[stored.dtype], 0, math.prod(shape)).view(shape)

    def _let_go(self, stored: StoredTensor, begin: int, end: int) -> None:
        """Bytes [begin, end) of the file are done with."""
        self._files.release(stored.file, begin, end)
        self._done += end - begin
        if self._progress is not None:
            self._progress(self._done, self._total)


def view_of(files: MappedFiles, stored: StoredTensor, dtype: torch.dtype, start: int, count: int) -> Tensor:
    """[count]: elements of a stored tensor from `start` on, in the mapped file. Not to be written to."""
    mapped = files.get(stored.file, stored.end)
    with warnings.catch_warnings():
        # torch warns that the buffer is read-only; nothing writes to it.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=stored.begin + start * dtype.itemsize)


def view_of_parts(files: MappedFiles, stored: StoredTensor, dtype: torch.dtype, first: int, last: int) -> Tensor:
    """Rows [first, last) of a stored matrix (as the file has it) whose rows are parts of wider ones."""
    width, stride = stored.shape[0] if stored.transposed else stored.shape[1], stored.stride // dtype.itemsize
    count = (last - first - 1) * stride + width
    flat = view_of(files, stored, dtype, first * stride, count)
    return flat.as_strided((last - first, width), (stride, 1))


class DummyWeights(Weights):
    """Random weights that keep activations near size 1: matrices normal with deviation 1/sqrt(columns), norms 1.

    A function of seed and names alone. One block of random values is repeated, from a different place for each
    tensor: copies in place of draws, so that 10^9 parameters take a few seconds.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        shapes: Shapes,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(dtype, device)
        generator = seeded(seed)
        self._block = torch.randn(DUMMY_BLOCK, generator=generator).to(device)
        self._bytes = torch.randint(0, 256, (DUMMY_BLOCK,), generator=generator, dtype=torch.uint8).to(device)
        self._scaled: dict[float, Tensor] = {}
        self._seed = seed
        # By name: of what tensor it is a part, and which one.
        self.cuts: dict[str, tuple[str, Cut]] = {}
        self._progress = progress
        self._done = 0
        self._total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize

    def fill(self, destination: Tensor, name: str) -> None:
        if name in self.cuts:
            # As one process alone would have it.
            whole, cut = self.cuts[name]
            width = math.prod(cut.shape[1:])
            if not cut.by_columns:
                self._fill(destination, whole, cut.shape, cut.begin * width)
                return
            step = max(1, DUMMY_BLOCK // width)
            for row in range(0, cut.shape[0], step):
                full = torch.empty((min(step, cut.shape[0] - row), width), dtype=destination.dtype)
                self._fill(full, whole, cut.shape, row * width)
                destination[row : row + step].copy_(cut.of(full))
            return
        self._fill(destination, name, tuple(destination.shape), 0)

    def _fill(self, destination: Tensor, name: str, shape: tuple[int, ...], first: int) -> None:
        """Elements from `first` on of a tensor of that shape."""
        flat = destination.view(-1)
        if destination.dtype == torch.uint8 and name.endswith("_scales"):
            # Exponents above 127: the numbers that they are for, 32 each, have a deviation of 2.9.
            flat.fill_(127 - round(math.log2(2.9 * math.sqrt(32 * shape[-1]))))
        elif destination.dtype == torch.uint8:
            self._repeat(flat, name, self._bytes, first)
        elif re.search(r"norm|_ln\b", name, re.IGNORECASE):
            flat.fill_(0.0 if name.endswith(".bias") else 1.0)
        else:
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.02
            block = self._scaled.get(scale)
            if block is None:
                block = self._scaled[scale] = (self._block * scale).to(self.dtype)
            self._repeat(flat, name, block, first)
        self._done += flat.numel() * flat.element_size()
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _repeat(self, flat: Tensor, name: str, block: Tensor, first: int) -> None:
        at = (zlib.crc32(f"{self._seed} {name}".encode()) + first) % DUMMY_BLOCK
        start = 0
        while start < flat.numel():
            count = min(DUMMY_BLOCK - at, flat.numel() - start)
            flat[start : start + count] = block[at : at + count]
            start, at = start + count, 0
