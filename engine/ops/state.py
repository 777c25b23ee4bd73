"""The recurrent states of a model's layers: memory for every seq slot and for snapshots, and what a step says of them.

Owned by an executor, which has states copied before a step reads them; layers find them at their attention backend.

Of a row with drafts it is known only after the step how many of its tokens are right. Such a row is held: it leaves
its slot's state as it was, and its layers keep what goes into their recurrences. `settle` runs those again, over the
right tokens alone. That is little beside a step, and no second state is needed, of which one a token would be many
megabytes; with the compiled kernels the bits are those of decoding, for they are the same over the same inputs. On a
GPU, where each draft is a row, `accept` does so, as soon as it is drawn what follows them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.forward import BoolArray, ForwardInput, Int32Array, Limits

# Bytes on which every tensor of a state begins.
ALIGNMENT = 64


class StateShape(Protocol):
    """One tensor of a layer's state. wide: float32 whatever the model's dtype is."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def wide(self) -> bool: ...


# What a layer does with [T, ...] of a plan's tokens, its state among it.
Advance = Callable[..., Tensor]
# For every layer the tensors of its state, none where it has no state.
StateSpec = Sequence[Sequence[StateShape]]


def _bytes_of(tensor: StateShape, dtype: torch.dtype) -> int:
    itemsize = 4 if tensor.wide else dtype.itemsize
    return -(-math.prod(tensor.shape) * itemsize // ALIGNMENT) * ALIGNMENT


def state_bytes(spec: StateSpec, dtype: torch.dtype) -> int:
    """Bytes of one sequence's state, or of a snapshot, in all layers."""
    return sum(_bytes_of(tensor, dtype) for layer in spec for tensor in layer)


def held_bytes(spec: StateSpec, dtype: torch.dtype) -> int:
    """Bytes of a token of a held row at most, in all layers: what goes into a convolution, and two numbers a head."""
    return sum(
        (2 * each.shape[0] if each.wide else each.shape[-1]) * dtype.itemsize for layer in spec for each in layer
    )


@dataclass(frozen=True, slots=True, eq=False)
class RowsOnDevice:
    """The rows of a step where its kernels read them. slots int32 [rows]. qo_indptr int32 [rows + 1], None where every
    row has one token. longest: tokens of a row at most.

    drafts int32 [B]: the first rows, of one token each, are sequences with their drafts behind them, `most` rows each
    at most: -1 where one begins, else the draft that the row is of. They are gone over in turn, and a sequence with
    drafts leaves its slot's state as it was. drawn int32, B or more: what followed each. Then those sequences alone are
    gone over, as far as their drafts are what was drawn before them, and their states are kept.
    """

    slots: Tensor
    qo_indptr: Tensor | None = None
    longest: int = 1
    most: int = 1
    drafts: Tensor | None = None
    drawn: Tensor | None = None


class _StateRows(ctypes.Structure):
    """StateRows of kernels_state.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("slots", "indptr", "held")),
        ("count", ctypes.c_int64),
    ]


class KernelRows:
    """The rows of a plan where native kernels read them. One that takes plan after plan stays at its address, which
    calls that are made again have."""

    def __init__(self, plan: StatePlan | None = None) -> None:
        self._rows = _StateRows()
        self._arrays: tuple[np.ndarray | None, ...] = ()
        self.address = ctypes.addressof(self._rows)
        if plan is not None:
            self.take(plan)

    def take(self, plan: StatePlan) -> None:
        slots, indptr = (np.ascontiguousarray(array, np.int32) for array in (plan.slots, plan.qo_indptr))
        self._arrays = slots, indptr, plan.held
        held = None if plan.held is None else plan.held.ctypes.data
        rows = self._rows
        rows.slots, rows.indptr, rows.held, rows.count = slots.ctypes.data, indptr.ctypes.data, held, plan.num_rows


@dataclass(frozen=True, slots=True, eq=False)
class StatePlan:
    """The rows of a step: the slot of each, its tokens (CSR), and how many rows of one token come first.

    held: bool [rows], those that leave their slot's state as it was; None where none does.
    device: the same on a GPU. Of a step that a graph holds they are known there alone, and stand for decode rows.
    rows: the same for native kernels, where they have been put already.
    """

    slots: Int32Array
    qo_indptr: Int32Array
    num_decode_rows: int
    device: RowsOnDevice | None = None
    held: BoolArray | None = None
    rows: KernelRows | None = None

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    @classmethod
    def of_decodes(cls, slots: Tensor, drafts: Tensor | None = None, most: int = 1) -> StatePlan:
        """One token each of the slots, int32 [rows] on the device. drafts, most: see RowsOnDevice."""
        nothing = np.zeros(0, np.int32)
        return cls(nothing, nothing, len(slots), RowsOnDevice(slots, None, most, most, drafts))

    def on(self, slots: Tensor, qo_indptr: Tensor, drafts: Tensor | None = None, most: int = 1) -> StatePlan:
        """The same rows, with their arrays on the device. drafts, most: see RowsOnDevice."""
        longest = int(np.diff(self.qo_indptr).max(initial=most))
        rows = RowsOnDevice(slots, qo_indptr, longest, most, drafts)
        return StatePlan(self.slots, self.qo_indptr, self.num_decode_rows, rows)


def plan_of(step: ForwardInput) -> StatePlan:
    """The rows of a step, as its staging has them: where it speculates, as it runs. Rows with drafts are held."""
    rows, staging, first = step.num_rows, step.staging, step.num_decode_rows
    held: BoolArray | None = None
    if step.num_speculating_rows:
        held = np.zeros(rows, np.bool_)
        held[first : first + step.num_speculating_rows] = True
        held &= staging.row_len[:rows] > 1
        held = held if held.any() else None
    return StatePlan(staging.row_slot[:rows], staging.qo_indptr[: rows + 1], first, held=held)


class States:
    """State memory: one buffer [slots and snapshots, bytes], so that a state is copied in one piece; layers see views.

    spec: of the model. `plan` is that of the step at hand. zeros: makes the buffer in host memory.
    """

    def __init__(
        self,
        spec: StateSpec,
        limits: Limits,
        dtype: torch.dtype,
        device: torch.device,
        zeros: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None,
    ) -> None:
        assert limits.num_snapshots is not None, "the limits are of a model without states"
        self._spec = spec
        self._first_snapshot = limits.num_slots
        # Snapshots are numbered from 1.
        self._count = limits.num_slots + limits.num_snapshots
        self._dtype = dtype
        self._device = device
        self._zeros = zeros
        self._layers: list[tuple[Tensor, ...]] = []
        # Of the step at hand, by layer: what its held rows' tokens go through, and with what.
        self._kept: list[tuple[Advance, tuple[Tensor, ...]]] = []
        self._of_held = torch.empty(0, dtype=torch.int64)
        self._rows = KernelRows()
        self.allocate()

    @property
    def num_bytes(self) -> int:
        """0 after `release`."""
        return self._memory.nbytes

    def allocate(self) -> None:
        """Have the memory again after `release`. On the CPU the system hands it out at first touch."""
        size = self._count * state_bytes(self._spec, self._dtype)
        if self._zeros is not None:
            memory = self._zeros((size,), torch.uint8)
        elif self._device.type == "cpu":
            memory = torch.from_numpy(np.zeros(size, np.uint8))
        else:
            memory = torch.zeros(size, dtype=torch.uint8, device=self._device)
        self._memory = memory.view(self._count, -1)
        at = 0
        self._layers = []
        for layer in self._spec:
            views = []
            for tensor in layer:
                dtype = torch.float32 if tensor.wide else self._dtype
                used = math.prod(tensor.shape) * dtype.itemsize
                part = self._memory.view(dtype)[:, at // dtype.itemsize : (at + used) // dtype.itemsize]
                views.append(part.unflatten(1, tensor.shape))
                at += _bytes_of(tensor, self._dtype)
            self._layers.append(tuple(views))

    def release(self) -> None:
        """Give the memory back."""
        self._memory = torch.empty((0, 0), dtype=torch.uint8)
        self._layers, self._kept = [], []

    @property
    def snapshots(self) -> Tensor:
        """uint8 [1 + snapshots, bytes of a state]; the first row is no snapshot's."""
        return self._memory[self._first_snapshot - 1 :]

    def begin(self, step: ForwardInput) -> None:
        """`move`, and take the step's rows for `plan`."""
        self.move(step)
        self.run(plan_of(step))

    def run(self, plan: StatePlan) -> None:
        """The rows that come next."""
        if self._device.type == "cpu":
            self._rows.take(plan)
            plan = replace(plan, rows=self._rows)
        self.plan = plan
        self._kept = []
        if plan.held is not None:
            self._of_held = torch.from_numpy(np.flatnonzero(np.repeat(plan.held, np.diff(plan.qo_indptr))))

    def expect(self, plan: StatePlan) -> None:
        """`run`, of rows on a GPU; inside a launch or a capture."""
        self.plan, self._kept = plan, []

    def advance(self, advance: Advance, *inputs: Tensor) -> Tensor:
        """advance(*inputs, plan), of a layer that may have to go over tokens of a held row again. inputs: [T, ...],
        which nobody writes to until the step has drawn."""
        device = self.plan.device
        if device is not None and device.drafts is not None:
            count = len(device.drafts)
            # Beside prompts a copy, or all that was projected of those would be held on to.
            kept = (each if len(each) == count else each[:count].clone() for each in inputs)
            self._kept.append((advance, tuple(kept)))
        elif self.plan.held is not None:
            self._kept.append((advance, tuple(each.index_select(0, self._of_held) for each in inputs)))
        return advance(*inputs, self.plan)

    def accept(self, drawn: Tensor) -> None:
        """What was drawn behind each of the plan's drafts and the tokens before them, int32 [B] or more on the device:
        states of their sequences become those behind right ones. Inside a launch or a capture."""
        device, kept, self._kept = self.plan.device, self._kept, []
        if device is None or device.drafts is None:
            return
        slots = device.slots[: len(device.drafts)]
        rows = replace(device, slots=slots, qo_indptr=None, longest=device.most, drawn=drawn)
        again = replace(StatePlan.of_decodes(rows.slots), device=rows)
        for advance, inputs in kept:
            advance(*inputs, again)

    def settle(self, counts: npt.NDArray[np.integer[Any]]) -> None:
        """Of each row of the step, that many of its tokens are right, at least one of a held row: the states of such
        rows become those after them."""
        plan, kept, self._kept = self.plan, self._kept, []
        if plan.held is None:
            return
        lengths, right = np.diff(plan.qo_indptr)[plan.held], np.asarray(counts, np.int32)[plan.held]
        assert ((right >= 1) & (right <= lengths)).all(), f"{right.tolist()} of {lengths.tolist()} tokens are right"
        places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        chosen = torch.from_numpy(np.flatnonzero(places < np.repeat(right, lengths)))
        indptr = np.concatenate([np.zeros(1, np.int32), np.cumsum(right, dtype=np.int32)])
        again = StatePlan(np.ascontiguousarray(plan.slots[plan.held]), indptr, 0)
        for advance, inputs in kept:
            advance(*(each.index_select(0, chosen) for each in inputs), again)

    def move(self, step: ForwardInput) -> None:
        """First of all in a step: saves, then loads, then rows that start at 0 start from zeros.

        Takes no memory, so that nothing here fails: the cache counts on what a step that fails has saved.
        """
        staging, rows = step.staging, step.num_rows
        saves, loads = step.num_saves, step.num_loads
        self._move(
            (staging.save_slot[:saves], staging.save_snapshot[:saves]),
            (staging.load_snapshot[:loads], staging.load_slot[:loads]),
            staging.row_slot[:rows][staging.row_start[:rows] == 0],
        )

    def apply(
        self,
        saves: tuple[Int32Array, Int32Array],
        loads: tuple[Int32Array, Int32Array],
        plan: StatePlan,
        starts: Int32Array,
    ) -> None:
        """`begin`, said in arrays. saves: slots and their snapshots; loads: snapshots and their slots; starts: of the
        plan's rows."""
        self._move(saves, loads, plan.slots[starts == 0])
        self.run(plan)

    def _move(
        self, saves: tuple[Int32Array, Int32Array], loads: tuple[Int32Array, Int32Array], fresh: Int32Array
    ) -> None:
        first = self._first_snapshot - 1
        self._copy(saves[0], first + saves[1])
        self._copy(first + loads[0], loads[1])
        for slot in fresh.tolist():
            self._memory[slot].zero_()

    def _copy(self, sources: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]) -> None:
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self._memory[target].copy_(self._memory[source])

    def of(self, layer: int) -> tuple[Tensor, ...]:
        """[slots and snapshots, *shape] of each tensor of a layer's state; a slot's is at its number."""
        return self._layers[layer]
