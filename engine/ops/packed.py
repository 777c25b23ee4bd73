"""A linear layer whose weight stays in GGUF's blocks of small integers: a seventh to a quarter of the bytes.

Built at load time from a quantised checkpoint, called by the executor's thread; the kernels (kernels_packed.h) widen
the integers in registers. Inputs are brought to 16 bits in blocks of 32, and the products of a block are summed
exactly: a row has the same bits in any batch, and a layer is within 3e-5 of the same weights in float32. With 8 bits,
where asked for, it is within 1e-2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.ops import native
from engine.ops.linear import Linear
from engine.ops.norm import Normed, plain

# By the names of GGUF: the numbers that the kernels know them by, and weights that share a scale.
PACKED_KINDS = {
    "Q4_0": (2, 32),
    "Q4_1": (3, 32),
    "Q5_0": (6, 32),
    "Q5_1": (7, 32),
    "Q8_0": (8, 32),
    "Q2_K": (10, 256),
    "Q3_K": (11, 256),
    "Q4_K": (12, 256),
    "Q5_K": (13, 256),
    "Q6_K": (14, 256),
    "IQ4_NL": (20, 32),
    "IQ4_XS": (23, 256),
    "TQ2_0": (35, 256),
    "MXFP4": (39, 32),
}

# Blocks that no file has: codes with scales of float32, and numbers that are added (see `blocks_of`).
OWN_KINDS = {
    "int4": (100, 32),
    "int4 and low": (101, 32),
    "int8": (102, 32),
    "int8 and low": (103, 32),
    "e2m1": (104, 32),
}
# Weights of "e2m1" that share a scale.
FLOAT4_SPAN = 16

# Beside a number: inputs of eight bits.
EIGHT_BITS = 256


def can_stay_packed(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for it here. dtype: of inputs and outputs."""
    return device.type == "cpu" and native.library() is not None and native.type_code(dtype) is not None


class PackedLinear(Linear):
    """block: of PACKED_KINDS or OWN_KINDS. dtype: of inputs and outputs. `pack` brings the rows of the weight."""

    def __init__(
        self,
        block: str,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        library, code = native.library(), native.type_code(dtype)
        number, shared = (PACKED_KINDS | OWN_KINDS)[block]
        assert library is not None and code is not None and columns % shared == 0
        packed = torch.empty(library.hold.ol_packed_blocks(number, rows, columns), dtype=torch.uint8)
        # What stands for the weight is never asked for its dtype or shape.
        super().__init__(packed.view(1, -1), None, activation)
        self.out_features, self.in_features, self.dtype = rows, columns, dtype
        self.kind = "native"
        self.block = block
        self._library, self._code, self._number, self._product = library, code, number, number
        self.input_bits = 16
        self._weight = packed
        if bias is not None:
            self.has_bias = True
            self._bias = bias.float().contiguous()
            self._bias_address = self._bias.data_ptr()

    def take_eight_bits(self) -> None:
        """Bring inputs to 8 bits in blocks of 32, as llama.cpp does, where there are such products: quicker."""
        if self._library.hold.ol_takes_eight_bits(self._number):
            self.input_bits, self._product = 8, self._number | EIGHT_BITS

    @staticmethod
    def piece_rows(at_most: int) -> int:
        """A number of rows that `pack` takes at a time, the last may be fewer; any, where there are no kernels."""
        library = native.library()
        panel = 1 if library is None else 2 * library.lanes
        return max(panel, at_most // panel * panel)

    def pack(self, first: int, rows: Tensor) -> int | None:
        """Take rows [first, first + len(rows)) of the weight from the addresses of their blocks, int64 [n].

        first is a multiple of what `piece_rows` gives. Returns the row that has a scale which is no finite number.
        """
        at = self._library.hold.ol_packed_blocks(self._number, first, self.in_features)
        bad: int = self._library.release.ol_pack_blocks(
            self._number,
            rows.data_ptr(),
            len(rows),
            self.in_features,
            self._weight.data_ptr() + at,
            torch.get_num_threads(),
        )
        return None if bad < 0 else first + bad

    @property
    def num_bytes(self) -> int:
        """See Linear.num_bytes."""
        return self._weight.nbytes

    def prepare(self, *, keep_rows: bool = False, kind: str | None = None, deterministic: bool = False) -> None:
        """Nothing is left to do."""

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[T, in_features] -> [T, out_features] of the same dtype."""
        x = plain(x)
        out = torch.empty((x.shape[0], self.out_features), dtype=x.dtype)
        self.write(x, out, 0)
        return out

    def write(self, x: Tensor, out: Tensor, column: int) -> None:
        """The product into columns [column, column + out_features) of `out`."""
        if x.stride(1) != 1:
            x = x.contiguous()
        assert x.dtype == self.dtype and x.shape[1] == self.in_features
        rows = x.shape[0]
        self._library.by_work(rows * self.out_features * self.in_features // 16).ol_linear_blocks(
            self._product,
            self._code,
            x.data_ptr(),
            x.stride(0),
            rows,
            self.in_features,
            self._weight.data_ptr(),
            self.out_features,
            self._bias_address,
            out.data_ptr() + column * out.element_size(),
            out.stride(0),
            torch.get_num_threads(),
        )

    def rows(self, ids: Tensor) -> Tensor:
        """See Linear.rows. Each number is what the file's own arithmetic gives."""
        return self._unpacked(ids, "ol_block_rows", self._number)


def blocks_of(form: str, codes: Tensor, scale: Tensor, low: Tensor | None) -> Tensor:
    """Of one of OWN_KINDS, for `pack`: uint8 [rows, bytes].

    codes: uint8 [rows, K], one in a byte: integers of four bits, of which 8 is taken or to whose product with the scale
    `low` is added; of eight with a sign; floats. scale, low: float32 [rows, K / 32], of "e2m1" [rows, K / 16].
    """
    rows, blocks = len(codes), codes.shape[1] // 32
    parts = [scale * 0.5 if form == "e2m1" else scale]  # the table of kernels holds twice the floats
    if low is not None:
        parts.append(low)
    codes = codes.view(rows, blocks, 32)
    if not form.startswith("int8"):
        first, second = codes.chunk(2, -1)
        codes = first | second << 4
    head = [part.float().contiguous().view(torch.uint8).view(rows, blocks, -1) for part in parts]
    return torch.cat([*head, codes], -1).flatten(1)


class MixedLinear(Linear):
    """Layers of one input below one another, each in its own form: what a file of mixed types makes of fused ones."""

    def __init__(self, parts: Sequence[Linear], activation: str | None = None) -> None:
        first = parts[0]
        super().__init__(torch.empty(1, 1), None, activation)
        self.out_features = sum(part.out_features for part in parts)
        self.in_features, self.dtype, self.parts = first.in_features, first.dtype, tuple(parts)
        self.kind = "native" if all(part.kind == "native" for part in parts) else "mixed"
        self.has_bias = any(part.has_bias for part in parts)

    def prepare(self, *, keep_rows: bool = False, kind: str | None = None, deterministic: bool = False) -> None:
        """Nothing is left to do."""

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[T, in_features] -> [T, out_features] of the same dtype."""
        x = plain(x)
        out = torch.empty((x.shape[0], self.out_features), dtype=x.dtype, device=x.device)
        column = 0
        for part in self.parts:
            if isinstance(part, PackedLinear):
                part.write(x, out, column)
            else:
                out[:, column : column + part.out_features] = part(x)
            column += part.out_features
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """See Linear.rows; of parts that can give theirs."""
        out = torch.empty((len(ids), self.in_features), dtype=self.dtype, device=ids.device)
        first = 0
        for part in self.parts:
            own = (ids >= first) & (ids < first + part.out_features)
            out[own] = part.rows(ids[own] - first)
            first += part.out_features
        return out
