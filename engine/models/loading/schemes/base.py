"""What stands for one weight of a quantised checkpoint: several tensors of the file, and how its numbers come of them.

One file of this package knows one way of writing checkpoints, and makes a Quantised of every matrix that it finds.
Numbers are computed in float32 and rounded once, to the model's dtype; or a layer keeps the integers (`form`). Used at
start, on the loading thread. Everything here comes from strangers: a Mismatch says what is wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.models.loading.checkpoint import StoredTensor

FLOATS = ("F32", "BF16", "F16")
# Columns of a block, in whose form a layer keeps integers.
BLOCK = 32
# By GGUF's names of such blocks: what the integers may be.
RANGES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}

# A whole tensor of the file, in its shape. Not to be written to.
View = Callable[[StoredTensor], Tensor]


class Mismatch(ValueError):
    """The tensors of a weight do not fit each other, or config.json; says how."""


class Scheme(Protocol):
    """A way of writing checkpoints."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """How the names of tensors end that stand for a weight, and an ordinary weight's."""
        ...

    def matrix(self, module: str, parts: Mapping[str, StoredTensor]) -> Quantised | None:
        """The weight of a module whose tensors have these suffixes. None: an ordinary one. Raises Mismatch."""
        ...


@dataclass(frozen=True, slots=True)
class Integers:
    """Rows of a matrix as (codes - zero) * scale.

    codes: int8 [rows, columns]. zero: int32 or float32 [rows, groups], or None. scale: float32 [rows, groups].
    """

    codes: Tensor
    zero: Tensor | None
    scale: Tensor


# Codes uint8 [rows, columns], scale float32 [rows, columns / code_group], what is added to their product or None.
Coded = tuple[Tensor, Tensor, Tensor | None]


class Quantised(ABC):
    """A matrix [rows, columns]. label: what it is, for people. parts: what it is read from.

    code_group: columns that share a scale where a layer keeps its codes. float8_inputs: the checkpoint is for inputs
    that are rounded to float8 as well, with one scale for a row or for all, and so has the matrix.
    """

    code_group = BLOCK
    float8_inputs = False

    def __init__(self, label: str, shape: tuple[int, int], parts: Mapping[str, StoredTensor]) -> None:
        self.label = label
        self.shape = shape
        self.parts = dict(parts)

    @abstractmethod
    def values(self, view: View, begin: int, end: int) -> Tensor:
        """Rows [begin, end), float32 [end - begin, columns]. Raises Mismatch."""

    def kind(self, view: View) -> str | None:
        """Of the blocks, by GGUF's names, in which a layer can keep exactly these numbers; None where there is none."""
        return None

    def form(self, view: View) -> str | None:
        """Of the codes, one of ops/device_coded.FORMS or ops/coded.FORMS, in which a layer can keep these numbers;
        None where there is none."""
        return None

    def table(self, view: View) -> Tensor | None:
        """float32 [16]: what codes of the form "table" stand for; None for other forms. Raises Mismatch."""
        return None

    def narrow(self) -> None:
        """From now on a form has four bits wherever the checkpoint has no more, if need be with something added."""
        return None

    def order(self, view: View) -> Tensor | None:
        """int64 [columns]: the columns in which a layer would keep it; None for those of the weight."""
        return None

    def blocks(self, view: View, begin: int, end: int) -> Tensor:
        """Rows [begin, end) in such blocks, uint8 [end - begin, bytes]. Raises Mismatch."""
        raise NotImplementedError

    def coded(self, view: View, begin: int, end: int) -> Coded:
        """Rows [begin, end) in codes of its form. Raises Mismatch."""
        raise NotImplementedError


class IntegerMatrix(Quantised):
    """Integers of `bits` bits; `group` columns share a scale (the last group may be shorter).

    groups: of which group each column is, where they do not lie one after another.
    """

    def __init__(
        self,
        label: str,
        shape: tuple[int, int],
        parts: Mapping[str, StoredTensor],
        bits: int,
        group: int,
        groups: StoredTensor | None = None,
    ) -> None:
        super().__init__(label, shape, parts)
        self.bits = bits
        self.group = group
        self.groups = groups
        self._kind: str | None = None
        self._known = False
        self._form: str | None = None
        self._known_form = False
        self._is_narrow = False

    @abstractmethod
    def integers(self, view: View, begin: int, end: int) -> Integers:
        """Rows [begin, end); codes and zeros counted from the middle of their range. Raises Mismatch."""

    @abstractmethod
    def zeros(self, view: View) -> Tensor | None:
        """All of them, in any shape; None where there are none."""

    @abstractmethod
    def scales(self, view: View) -> Tensor:
        """All of them, in any shape."""

    def values(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        found = self.integers(view, begin, end)
        self._check(found)
        which = self._groups(view)
        numbers = found.codes.float()
        if found.zero is not None:
            self._by_group(numbers, torch.Tensor.sub_, found.zero.float(), which)
        self._by_group(numbers, torch.Tensor.mul_, found.scale, which)
        return numbers

    def _by_group(
        self, numbers: Tensor, change: Callable[[Tensor, Tensor], Tensor], by: Tensor, which: Tensor | None
    ) -> None:
        """Change numbers [rows, columns] in place, by one [rows, groups] for each group."""
        rows, columns = numbers.shape
        if which is not None:
            change(numbers, by[:, which])
        elif columns % self.group == 0:
            change(numbers.view(rows, -1, self.group), by[:, :, None])
        else:
            change(numbers, by[:, torch.arange(columns) // self.group])

    def kind(self, view: View) -> str | None:
        """See Quantised."""
        if not self._known:
            self._kind = self._found_kind(view)
            self._known = True
        return self._kind

    def _found_kind(self, view: View) -> str | None:
        if not self._has_blocks(view):
            return None
        scales, bounds = self.scales(view).float(), self._range(view)
        if bounds is None or not torch.equal(scales.half().float(), scales):
            return None
        least, most = bounds
        return next((kind for kind, (low, high) in RANGES.items() if low <= least and most <= high), None)

    def _has_blocks(self, view: View) -> bool:
        """Whether a scale is of whole blocks of columns."""
        columns = self.shape[1]
        if columns % BLOCK or (self.group % BLOCK and self.group < columns):
            return False
        which = self._groups(view)
        # A layer's columns are in the order of their groups, of which each must be whole then.
        return which is None or (columns % self.group == 0 and bool((which.bincount() == self.group).all()))

    def _range(self, view: View) -> tuple[int, int] | None:
        """What the differences of codes and zeros may be; None where those are no integers."""
        least, most = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        zeros = self.zeros(view)
        if zeros is not None and zeros.numel():
            if zeros.is_floating_point() and not torch.equal(zeros.round(), zeros):
                return None
            least, most = least - int(zeros.max()), most - int(zeros.min())
        return least, most

    def form(self, view: View) -> str | None:
        """See Quantised."""
        if not self._known_form:
            self._form = self._found_form(view)
            self._known_form = True
        return self._form

    def narrow(self) -> None:
        """See Quantised."""
        self._is_narrow, self._known_form = True, False

    def _found_form(self, view: View) -> str | None:
        if not self._has_blocks(view):
            return None
        bounds = self._range(view)
        if bounds is not None and bounds[0] >= -8 and bounds[1] <= 7:
            return "int4"
        if bounds is not None and bounds[0] >= -128 and bounds[1] <= 127 and not (self._is_narrow and self.bits <= 4):
            return "int8"
        return "int4 and low" if self.bits <= 4 else "int8 and low"

    def coded(self, view: View, begin: int, end: int) -> Coded:
        """See Quantised."""
        form = self.form(view)
        found, scale, low = self._in_order(view, begin, end, keep=form is not None and form.endswith("low"))
        if low is not None:
            middle = 1 << (self.bits - 1) if self.bits <= 4 else 0
            added = -(low + middle) * scale
            if not bool(added.isfinite().all()):
                raise Mismatch("a zero times its scale is no finite number")
            return (found + middle).view(torch.uint8), scale, added
        return (found + 8 if form == "int4" else found).view(torch.uint8), scale, None

    def order(self, view: View) -> Tensor | None:
        """See Quantised."""
        which = self._groups(view)
        if which is None or bool((which.diff() >= 0).all()):
            return None
        return which.argsort(stable=True)

    def blocks(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        kind = self.kind(view)
        assert kind is not None
        numbers, scale, _ = self._in_order(view, begin, end)
        rows = len(numbers)
        return to_blocks(kind, numbers.view(rows, -1, BLOCK), scale).view(rows, -1)

    def _in_order(
        self, view: View, begin: int, end: int, *, keep: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows [begin, end) with their columns in `order`: int8 [rows, columns], scales float32 [rows, blocks], and
        with `keep` the zeros, float32 [rows, blocks]; else these are taken away."""
        found = self.integers(view, begin, end)
        self._check(found)
        numbers, zero = found.codes, found.zero
        place = torch.arange(numbers.shape[1] // BLOCK) * BLOCK // self.group
        kept = zero.float()[:, place] if keep and zero is not None else None
        if zero is not None and kept is None:
            # The differences are known to fit; zeros themselves may wrap around.
            numbers = numbers.clone()
            self._by_group(numbers, torch.Tensor.sub_, zero.to(torch.int16).to(torch.int8), self._groups(view))
        order = self.order(view)
        return numbers if order is None else numbers[:, order], found.scale[:, place], kept

    def _groups(self, view: View) -> Tensor | None:
        """int64 [columns]. Raises Mismatch."""
        if self.groups is None:
            return None
        which = view(self.groups).long()
        if which.numel() and bool((which < 0).all()):  # compressed-tensors: not set
            return None
        most = -(-self.shape[1] // self.group)
        if which.shape != (self.shape[1],) or bool((which < 0).any()) or bool((which >= most).any()):
            raise Mismatch(f"its g_idx must name one of {most} groups for each of {self.shape[1]} columns")
        return which

    def _check(self, found: Integers) -> None:
        """Raise Mismatch for scales that stand for no weights."""
        if not bool(found.scale.isfinite().all()):
            raise Mismatch("a scale is no finite number")
        if found.zero is not None and not bool(found.zero.isfinite().all()):
            raise Mismatch("a zero is no finite number")
        nothing = found.scale == 0
        if bool(nothing.any()) and self.groups is None:
            count, width = found.scale.shape[1], self.group
            for number in nothing.any(0).nonzero().view(-1).tolist():
                part = found.codes[:, number * width : min((number + 1) * width, self.shape[1])]
                zero = 0 if found.zero is None else found.zero[:, number, None]
                if number < count and bool(((part != zero) & nothing[:, number, None]).any()):
                    raise Mismatch("a scale is zero where its weights are not")


def to_blocks(kind: str, numbers: Tensor, scales: Tensor) -> Tensor:
    """GGUF's blocks of one kind of RANGES, uint8 [..., size]: numbers int8 [..., BLOCK], scales [...]."""
    first = scales.half().unsqueeze(-1).contiguous().view(torch.uint8)
    if kind == "Q8_0":
        return torch.cat((first, numbers.contiguous().view(torch.uint8)), -1)
    codes = (numbers - RANGES[kind][0]).view(torch.uint8)
    parts = [first]
    if kind == "Q5_0":
        fifth = (codes >> 4).view(*codes.shape[:-1], 4, 8)
        both = fifth[..., 0].clone()
        for bit in range(1, 8):
            both |= fifth[..., bit] << bit
        parts.append(both)
    parts.append(halves(codes))
    return torch.cat(parts, -1)


def halves(codes: Tensor) -> Tensor:
    """uint8 [..., n], of four bits -> [..., n / 2]: the first half of a block low, the second one high."""
    low, high = (codes & 15).chunk(2, -1)
    return low | (high << 4)


def need(module: str, parts: Mapping[str, StoredTensor], suffix: str, dtypes: tuple[str, ...]) -> StoredTensor:
    """One of the tensors. Raises Mismatch where it is missing or of another dtype."""
    found = parts.get(suffix)
    if found is None:
        raise Mismatch(f"tensor {module}{suffix} is missing")
    if found.dtype not in dtypes:
        raise Mismatch(f"tensor {module}{suffix} has dtype {found.dtype}, only {', '.join(dtypes)} are read")
    return found


def expect(module: str, suffix: str, found: StoredTensor, *shapes: tuple[int, ...]) -> None:
    """Raise Mismatch for a tensor of another shape than all of these."""
    if found.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise Mismatch(f"tensor {module}{suffix} has shape {list(found.shape)}, its weight asks for {wanted}")


def unpack(words: Tensor, bits: int, count: int, *, padded: bool = False) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, count]: a stream of `bits` bits from each row's lowest bit on.

    padded: no number crosses from one word into the next.
    """
    rows = words.shape[0]
    if bits in (1, 2, 4, 8):
        # Bytes hold them in the same order, on the little-endian machines that all of these formats are for.
        found = words.contiguous().view(torch.uint8).view(rows, -1)
        if bits < 8:
            mask = (1 << bits) - 1
            found = torch.stack([(found >> shift) & mask for shift in range(0, 8, bits)], dim=2).view(rows, -1)
        return found[:, :count]
    wide = words.long() & 0xFFFFFFFF
    number = torch.arange(count)
    if padded:
        each = 32 // bits
        return ((wide[:, number // each] >> (number % each * bits)) & ((1 << bits) - 1)).to(torch.uint8)
    word, offset = number * bits // 32, number * bits % 32
    above = wide[:, (word + 1).clamp_max(words.shape[1] - 1)] << (32 - offset)
    return (((wide[:, word] >> offset) | above) & ((1 << bits) - 1)).to(torch.uint8)


def word_count(count: int, bits: int, *, padded: bool = False) -> int:
    """Words that `unpack` reads `count` numbers from."""
    return -(-count // (32 // bits)) if padded else -(-count * bits // 32)


def signed(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes from 0 on -> int8, counted from the middle of their range."""
    return (codes - (1 << (bits - 1))).view(torch.int8)


def as_group(columns: int, count: int, size: int | None) -> int:
    """Columns of a group: `size`, where config.json says it, or those of `count` groups. Raises Mismatch."""
    if size is None or size <= 0:
        if count < 1 or columns % count:
            raise Mismatch(f"{count} groups do not divide {columns} columns, and config.json says no size")
        return columns // count
    if -(-columns // size) != count:
        raise Mismatch(
            f"has scales for {count} groups; groups of {size} among {columns} columns are {-(-columns // size)}"
        )
    return size
