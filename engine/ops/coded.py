"""Linear layers whose weights stay codes with a float32 scale for every few: a seventh to a third of the bytes.

Built at load time from a quantised checkpoint, called by the executor's thread; the kernels widen the codes in
registers. Integers and floats of four bits go to packed.py, whose products are of integers. Here are the others, of
which the products are, bit for bit, those of the same numbers kept as float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.ops import native
from engine.ops.linear import Linear
from engine.ops.norm import Normed, plain
from engine.ops.packed import FLOAT4_SPAN, OWN_KINDS, PackedLinear, blocks_of

# Weights along a row that share a scale.
CODE_BLOCK = 32

# What scales of "e4m3" are to be below: kernels hold 2^120 times as much.
FLOAT8_SCALES = 128.0

# By name, as the kernels number them: floats of eight bits, and places in a table of 16 numbers.
CODE_FORMS = {"e4m3": 0, "table": 1}
FORMS = (*OWN_KINDS, *CODE_FORMS)
_TABLE_SIZE = 16

# Rows [start, stop) of the weight: codes uint8 [rows, K], scale float32 [rows, K / group], low the same or None.
Piece = tuple[int, int, Tensor, Tensor, Tensor | None]


def can_keep_codes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for it here. dtype: of inputs and outputs."""
    library = native.library()
    return device.type == "cpu" and library is not None and native.type_code(dtype) is not None


def fits(form: str, group: int, columns: int) -> bool:
    """Whether a layer can be made of codes of this form of which so many columns share a scale."""
    return form in FORMS and group % (FLOAT4_SPAN if form == "e2m1" else CODE_BLOCK) == 0 and columns % CODE_BLOCK == 0


def coded_linear(
    form: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    pieces: Iterator[Piece],
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    group: int = CODE_BLOCK,
    table: Sequence[float] | None = None,
) -> PackedLinear | CodedLinear:
    """form, group: see `fits`. dtype: of inputs and outputs. pieces: the weight, from row 0 on; every piece but the
    last ends at a multiple of `PackedLinear.piece_rows`. table: 16 numbers, of the form that has its own. Scales are
    finite, those of "e4m3" below FLOAT8_SCALES."""
    if form not in OWN_KINDS:
        return CodedLinear(form, rows, columns, dtype, pieces, bias, activation, group, table)
    linear = PackedLinear(form, rows, columns, dtype, bias, activation)
    repeats = group // (FLOAT4_SPAN if form == "e2m1" else CODE_BLOCK)
    for start, stop, codes, scale, low in pieces:
        scale = scale.repeat_interleave(repeats, 1)
        low = low.repeat_interleave(repeats, 1) if low is not None else None
        blocks = blocks_of(form, codes.contiguous(), scale, low)
        bad = linear.pack(start, blocks.data_ptr() + torch.arange(stop - start) * blocks.stride(0))
        assert bad is None, "checked where it was read"
    return linear


class CodedLinear(Linear):
    """See `coded_linear`; form: one of CODE_FORMS."""

    def __init__(
        self,
        form: str,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        pieces: Iterator[Piece],
        bias: Tensor | None,
        activation: str | None,
        group: int,
        table: Sequence[float] | None,
    ) -> None:
        library, code = native.library(), native.type_code(dtype)
        assert library is not None and code is not None and fits(form, group, columns)
        assert (form == "table") == (table is not None)
        number, size, repeats = CODE_FORMS[form], library.hold.ol_codes_size, group // CODE_BLOCK
        # A line of memory before the first panel, for a table.
        packed = torch.empty(_TABLE_SIZE + size(number, rows, columns), dtype=torch.int32)[_TABLE_SIZE:]
        # What stands for the weight is never asked for its dtype or shape.
        super().__init__(packed.view(1, -1), None, activation)
        self.out_features, self.in_features, self.dtype = rows, columns, dtype
        self.kind = "native"
        self._library, self._code, self._form = library, code, number
        self._weight = packed
        if table is not None:
            before = packed.as_strided((_TABLE_SIZE,), (1,), 0).view(torch.float32)
            before.copy_(torch.tensor(table, dtype=torch.float32))
        for start, stop, codes, scale, _ in pieces:
            codes, scale = codes.contiguous(), scale.repeat_interleave(repeats, 1).contiguous()
            assert scale.shape == (stop - start, columns // CODE_BLOCK)
            library.release.ol_pack_codes(
                number,
                codes.data_ptr(),
                scale.data_ptr(),
                stop - start,
                columns,
                packed.data_ptr() + 4 * size(number, start, columns),
                torch.get_num_threads(),
            )
        if bias is not None:
            self.has_bias = True
            self._bias = bias.float().contiguous()
            self._bias_address = self._bias.data_ptr()

    @property
    def num_bytes(self) -> int:
        """See Linear.num_bytes."""
        return self._weight.nbytes

    def prepare(self, *, keep_rows: bool = False, kind: str | None = None, deterministic: bool = False) -> None:
        """Nothing is left to do."""

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[T, in_features] -> [T, out_features] of the same dtype."""
        x = plain(x)
        if x.stride(1) != 1:
            x = x.contiguous()
        assert x.dtype == self.dtype and x.shape[1] == self.in_features
        rows = x.shape[0]
        out = torch.empty((rows, self.out_features), dtype=x.dtype)
        self._library.by_work(rows * self.out_features * self.in_features // 8).ol_linear_codes(
            self._form,
            self._code,
            x.data_ptr(),
            x.stride(0),
            rows,
            self.in_features,
            self._weight.data_ptr(),
            self.out_features,
            self._bias_address,
            out.data_ptr(),
            self.out_features,
            torch.get_num_threads(),
        )
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """See Linear.rows."""
        return self._unpacked(ids, "ol_code_rows", self._form)
