"""Where a model's tensors come from: a checkpoint, a random generator, or nowhere (only shapes are recorded).

A model asks for its tensors by name and shape while it builds itself; the three sources answer alike, so names
and shapes are written down once. Used at start, on the loading thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import StartupError
from engine.models.gguf.dequantise import dequantise
from engine.models.gguf.names import name_tensors
from engine.models.gguf.reader import is_gguf, open_gguf
from engine.models.gguf.types import BY_NAME
from engine.models.loading.checkpoint import FLOATS, QUANTISED, MappedFiles, StoredTensor, check, find_tensors
from engine.models.loading.cuts import Cut
from engine.models.loading.schemes.base import Mismatch, Quantised
from engine.models.loading.schemes.resolve import Left, with_quantised
from engine.models.loading.schemes.rounding import Rounded, can_round
from engine.models.loading.schemes.shaped import Below, RowsOf, Transposed, as_stored
from engine.models.parts.decoder import embedding_name
from engine.models.parts.source import PREFIX
from engine.models.spec import DenseAndExperts, Experts, ModelSpec
from engine.ops.heads import HeadLinear
from engine.ops.linear import Linear
from engine.ops.lora import Rows

OUTPUT = "lm_head"
OUTPUT_WEIGHT = f"{OUTPUT}.weight"

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

logger = logging.getLogger("oneloop.start")

# What Nemotron-H, Ling and GPT-NeoX call their embedding, and the latter its output layer.
_EMBEDDINGS = re.compile(r"^((?:model|backbone|gpt_neox)\.)(?:embeddings|word_embeddings|embed_in)\.weight$")
_OUTPUTS = re.compile(r"^embed_out\.")

Shapes = Mapping[str, tuple[int, ...]]
Progress = Callable[[int, int], None]


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
                    part[: len(order)] = part[order.to(part.device)]
        linear = Linear(weight, bias_vector, activation)
        del weight  # `prepare` may replace it, and then it must go at once
        self.prepare(linear)
        return linear

    def adapted(self, layer: Linear, name: str) -> Linear:
        """See Source.adapted: where no adapters are served, the layer itself."""
        return layer

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


class CheckpointWeights(Weights):
    """Tensors of a directory of safetensors. `shapes` is all that the model will ask for; checked at once.

    tensors: see `find_model_tensors`. assumed: sizes that config.json does not name, for the error of a wrong one.
    quantisation: one of rounding.KINDS, to which the weights of layers are rounded; None for what the file has.

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
        """Have these weights become integers, where `quantisation` asks for that and their sizes allow it.

        as_output: they are of the layer that makes logits, which takes eight bits whatever the others take.
        """
        if self.quantisation is None or not all(can_round(self._tensors[name]) for name in names):
            return
        for name in names:
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


def find_model_tensors(directory: Path, spec: ModelSpec) -> dict[str, StoredTensor]:
    """The tensors of a directory, or of a GGUF file, by the names that a model asks for. Raises StartupError."""
    if is_gguf(directory):
        return _gguf_tensors(directory, spec)

    def inside(found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        return {
            name: tensor for name, tensor in found.items() if not name.removeprefix(PREFIX).startswith(spec.outside)
        }

    # Before and after, for what is left out may stand under the prefix of a wrapper, too.
    found = inside(_modern(find_tensors(directory)))
    if spec.quantisation is not None:
        found, left = with_quantised(found, spec.quantisation)
        tell_unused(directory, left)
    found = _with_single_experts(inside(_with_our_names(found, spec)), spec)
    for step in spec.projections:
        if step.name:
            module = find_tensors(directory / step.name.removesuffix(".linear"))
            found |= {step.name.removesuffix("linear") + name: tensor for name, tensor in module.items()}
    return found


def tell_unused(directory: Path, left: Left) -> None:
    """One line for scales that a checkpoint has and that count for nothing here."""
    if left.cache:
        told = "%s: %d scales for keys and values in eight bits are not used: the cache needs none"
        logger.warning(told, directory, left.cache)


def _gguf_tensors(path: Path, spec: ModelSpec) -> dict[str, StoredTensor]:
    """What belongs to nothing keeps its name, for `check` to refuse."""
    model = open_gguf(path)
    named, others = name_tensors(spec, model)
    found = {}
    for name, each in named.items():
        tensor = each.tensor
        ours = name if name.startswith(f"{OUTPUT}.") else PREFIX + name
        place = (tensor.file, tensor.type, tensor.shape, tensor.begin, tensor.end)
        found[ours] = StoredTensor(*place, shift=each.shift, undo=each.undo)
    for name in others:
        tensor = model.tensors[name]
        found[name] = StoredTensor(tensor.file, tensor.type, tensor.shape, tensor.begin, tensor.end)
    return found


def _modern(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Names of TensorFlow's times: a LayerNorm's weight is its gamma, its bias is its beta."""
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    return {
        next((name.removesuffix(end) + new for end, new in old.items() if name.endswith(end)), name): tensor
        for name, tensor in tensors.items()
    }


def _with_single_experts(tensors: dict[str, StoredTensor], spec: ModelSpec) -> dict[str, StoredTensor]:
    """Every expert of a tensor that holds all those of a layer, as one of its own. Raises StartupError."""
    found = dict(tensors)
    for index, layer in enumerate(spec.layers):
        experts = layer.feed_forward
        if isinstance(experts, DenseAndExperts):
            experts = experts.experts
        if not isinstance(experts, Experts) or experts.stacked is None:
            continue
        count, inner, hidden = experts.num_experts, experts.intermediate_size, spec.hidden_size
        hidden = experts.latent_size or hidden
        inputs = (2 if experts.gated else 1) * inner // len(experts.gate_up)
        if experts.fused is not None:
            _split_fused(found, f"{PREFIX}layers.{index}.", experts, hidden)
        _join_halves(found, f"{PREFIX}layers.{index}.", experts)
        for template, out, into in (
            *((name, inputs, hidden) for name in experts.gate_up),
            (experts.down, hidden, inner),
        ):
            name = f"{PREFIX}layers.{index}.{template.replace('.{}', '')}"
            name = name if name in found else f"{name}.weight"
            tensor = found.get(name)
            if tensor is None:
                continue
            fits = [
                way for way, shape in (("rows", (out, into)), ("columns", (into, out))) if tensor.shape[1:] == shape
            ]
            if tensor.shape[:1] != (count,) or not fits:
                raise StartupError(
                    f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, config.json asks for "
                    f"{[count, out, into]} or {[count, into, out]}"
                )
            way = experts.stacked if experts.stacked in fits else fits[0]
            ours = f"{PREFIX}layers.{index}.{template}.weight"
            _split(found, name, ours, count, (out, into), transposed=way == "columns")
        for template in (*experts.gate_up, experts.down) if experts.bias else ():
            name = f"{PREFIX}layers.{index}.{template.replace('.{}', '')}_bias"
            bias = found.get(name)
            if bias is not None and bias.shape[:1] == (count,) and len(bias.shape) == 2:  # else `check` says it
                _split(found, name, f"{PREFIX}layers.{index}.{template}.bias", count, bias.shape[1:])
    return found


def _split_fused(found: dict[str, StoredTensor], prefix: str, experts: Experts, hidden: int) -> None:
    """Every expert's gate and up of the tensor that holds those of a layer, as tensors of their own; in place."""
    name = f"{prefix}{experts.fused}"
    name = name if name in found else f"{name}.weight"
    tensor = found.get(name)
    if tensor is None:
        return
    count, inner = experts.num_experts, experts.intermediate_size
    if tensor.shape != (count, 2 * inner, hidden):
        raise StartupError(
            f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, config.json asks for "
            f"{[count, 2 * inner, hidden]}"
        )
    del found[name]
    size = (tensor.end - tensor.begin) // (2 * count)
    for place, (number, template) in enumerate((n, each) for n in range(count) for each in experts.gate_up):
        if tensor.members and (whole := tensor.members[number].quantised) is not None:
            found[f"{prefix}{template.format(number)}.weight"] = as_stored(RowsOf(whole, place % 2 * inner, inner))
            continue
        begin = tensor.begin + place * size
        found[f"{prefix}{template.format(number)}.weight"] = StoredTensor(
            tensor.file, tensor.dtype, (inner, hidden), begin, begin + size
        )


def _join_halves(found: dict[str, StoredTensor], prefix: str, experts: Experts) -> None:
    """Gate above up, where a model asks for both as one and its quantised checkpoint has them apart; in place."""
    template = experts.gate_up[0]
    if len(experts.gate_up) != 1 or not experts.gated or experts.clamp is not None or "gate_up" not in template:
        return
    for number in range(experts.num_experts):
        name = prefix + template.format(number)
        halves = [f"{name.replace('gate_up', each)}.weight" for each in ("gate", "up")]
        above, below = (found[each].quantised if each in found else None for each in halves)
        if f"{name}.weight" in found or above is None or below is None:
            continue
        file = found[halves[0]].file
        try:
            found[f"{name}.weight"] = as_stored(Below(above, below))
        except Mismatch as problem:
            raise StartupError(f"{file}: tensor {halves[0]}: {problem}") from None
        for each in halves:
            del found[each]


def _split(
    found: dict[str, StoredTensor],
    name: str,
    template: str,
    count: int,
    shape: tuple[int, ...],
    *,
    transposed: bool = False,
) -> None:
    """Put `count` tensors of that shape in the place of the one that has them below one another."""
    tensor = found.pop(name)
    size = (tensor.end - tensor.begin) // count
    for number in range(count):
        if tensor.members and (whole := tensor.members[number].quantised) is not None:
            found[template.format(number)] = as_stored(Transposed(whole)) if transposed else tensor.members[number]
            continue
        begin = tensor.begin + number * size
        found[template.format(number)] = StoredTensor(
            tensor.file, tensor.dtype, shape, begin, begin + size, transposed=transposed
        )


def _with_our_names(tensors: dict[str, StoredTensor], spec: ModelSpec) -> dict[str, StoredTensor]:
    """A model saved without its output layer has no `model.` before its names (Qwen3-Embedding is one); one saved from
    inside of another object has that one's name before them. The embedding, or else the layers, show the prefix.
    """
    name = embedding_name(spec).removeprefix(PREFIX)
    tensors = {
        _OUTPUTS.sub(f"{OUTPUT}.", _EMBEDDINGS.sub(r"\g<1>" + name, key)): tensor for key, tensor in tensors.items()
    }
    found = {key.removesuffix(name) for key in tensors if f".{key}".endswith(f".{name}")}
    layer = re.escape(spec.layer_names).replace(r"\{\}", r"\d+")
    found = found or {match[1] for key in tensors if (match := re.match(rf"((?:.*?\.)?){layer}", key))}
    if len(found) != 1 or found == {PREFIX}:
        return tensors
    prefix = found.pop()
    outer = prefix.removesuffix(PREFIX) if prefix.endswith(f".{PREFIX}") else prefix

    def ours(key: str) -> str:
        if key.removeprefix(outer).startswith(f"{OUTPUT}."):
            return key.removeprefix(outer)
        return PREFIX + key.removeprefix(prefix) if key.startswith(prefix) else key

    renamed = {ours(key): tensor for key, tensor in tensors.items()}
    return renamed if len(renamed) == len(tensors) else tensors


def settle_output(spec: ModelSpec, tensors: dict[str, StoredTensor], directory: Path, dtype: torch.dtype) -> ModelSpec:
    """The spec as the checkpoint has it: tied where config.json says so and the checkpoint has no other output layer.

    As transformers decides: an output layer that differs from the embedding is used, with a warning; an embedding that
    is stored under the output layer's name alone is moved there, in `tensors`. Raises StartupError for a model that has
    no output layer although it is not tied.
    """
    if spec.headless:
        return spec
    own = embedding_name(spec)
    head, embedding = tensors.get(OUTPUT_WEIGHT), tensors.get(own)
    if not spec.tie_word_embeddings:
        if head is None and embedding is not None:
            raise StartupError(
                f"{directory}: tensor {OUTPUT_WEIGHT} is missing, and tie_word_embeddings in config.json is false "
                "(which an absent field may mean); true there uses the embedding in its place"
            )
        return spec
    if head is None:
        return spec
    if embedding is None:
        tensors[own] = tensors.pop(OUTPUT_WEIGHT)
        return spec
    if _are_equal(head, embedding, dtype):
        return spec
    if "tie_word_embeddings" in spec.assumed:
        return dataclasses.replace(spec, tie_word_embeddings=False)
    logger.warning(
        "%s: tie_word_embeddings in config.json is true, but %s differs from the embedding: it is used, as in "
        "transformers; false there says so",
        directory,
        OUTPUT_WEIGHT,
    )
    return dataclasses.replace(spec, tie_word_embeddings=False)


def _are_equal(first: StoredTensor, second: StoredTensor, dtype: torch.dtype) -> bool:
    """Whether two stored tensors are the same once they are loaded; read in chunks, up to the first difference."""
    if first.shape != second.shape:
        return False
    if first.quantised is not None and second.quantised is not None:
        return _same_parts(first.quantised, second.quantised)
    if QUANTISED in (first.dtype, second.dtype):
        return False
    if first.dtype not in FLOATS or second.dtype not in FLOATS:
        return first.dtype == second.dtype  # an error of its own, later
    count = math.prod(first.shape)
    step = CHUNK_BYTES // 8
    files = MappedFiles()
    try:
        for start in range(0, count, step):
            size = min(step, count - start)
            parts = [view_of(files, stored, TORCH_DTYPES[stored.dtype], start, size) for stored in (first, second)]
            equal = first.dtype == second.dtype and torch.equal(*(part.view(torch.uint8) for part in parts))
            equal = equal or torch.equal(*(part.to(dtype) for part in parts))
            del parts
            for stored in (first, second):
                item = TORCH_DTYPES[stored.dtype].itemsize
                files.release(stored.file, stored.begin + start * item, stored.begin + (start + size) * item)
            if not equal:
                return False
    finally:
        files.close()
    return True


def _same_parts(first: Quantised, second: Quantised) -> bool:
    """Whether two matrices are made of the same bytes."""
    if first.label != second.label or first.parts.keys() != second.parts.keys():
        return False
    files = MappedFiles()
    try:
        for name, one in first.parts.items():
            other = second.parts[name]
            pair = [memoryview(files.get(each.file, each.end))[each.begin : each.end] for each in (one, other)]
            equal = one.dtype == other.dtype and one.shape == other.shape and pair[0] == pair[1]
            for view in pair:
                view.release()
            if not equal:
                return False
    finally:
        files.close()
    return True


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
        generator = torch.Generator().manual_seed(seed)
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
