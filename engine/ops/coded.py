"""A linear layer whose weight stays small integers or floats with a float32 scale for every few: a sixth to a third.

Built at load time from a quantised checkpoint, called by the executor's thread; the kernels (kernels.cpp) widen the
codes in registers. The products are, bit for bit, those of the same numbers kept as float32. packed.py is faster and
holds integers with scales of float16, as GGUF has them; here is what does not fit into that: floats of eight bits,
floats of four with scales of sixteen, places in a table, and scales or zeros of more digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.ops import native
from engine.ops.linear import Linear
from engine.ops.mxfp4 import TABLE
from engine.ops.norm import Normed, plain

# Weights along a row that share a scale; of places in a table half of them may.
CODE_BLOCK = 32

# What scales of "e4m3" are to be below: kernels hold 2^120 times as much.
FLOAT8_SCALES = 128.0

# By name, as the kernels number them: integers of four bits from 0 on (of which 8 is taken, or a number is added to
# their product with the scale), of eight with a sign, floats, and places in a table of 16 numbers, of which that of
# small floats is known.
CODE_FORMS = {"int4": 0, "int4 and low": 1, "int8": 2, "int8 and low": 3, "e4m3": 4, "e2m1": 5, "table": 5}
_BY_16 = 6
_TABLE_SIZE = 16

# Rows [start, stop) of the weight: codes uint8 [rows, K], scale float32 [rows, K / group], low the same or None.
Piece = tuple[int, int, Tensor, Tensor, Tensor | None]


def can_keep_codes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for it here. dtype: of inputs and outputs."""
    library = native.library()
    return device.type == "cpu" and library is not None and native.type_code(dtype) is not None


def fits(form: str, group: int) -> bool:
    """Whether a layer can be made of codes of this form of which so many columns share a scale."""
    return form in CODE_FORMS and group % (CODE_BLOCK // 2 if form in ("e2m1", "table") else CODE_BLOCK) == 0


class CodedLinear(Linear):
    """form, group: see `fits`. dtype: of inputs and outputs. pieces: the weight, from row 0 on; every piece but the
    last ends at a multiple of `piece_rows`. table: 16 numbers, of the form that has its own. Scales of
    "e4m3" are below FLOAT8_SCALES."""

    def __init__(
        self,
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
    ) -> None:
        library, code = native.library(), native.type_code(dtype)
        assert library is not None and code is not None and fits(form, group)
        number, block = (_BY_16, CODE_BLOCK // 2) if group % CODE_BLOCK else (CODE_FORMS[form], CODE_BLOCK)
        assert columns % block == 0 and (form == "table") == (table is not None)
        size, repeats = library.hold.ol_codes_size, group // block
        # A line of memory before the first panel, for a table.
        packed = torch.empty(_TABLE_SIZE + size(number, rows, columns), dtype=torch.int32)[_TABLE_SIZE:]
        # What stands for the weight is never asked for its dtype or shape.
        super().__init__(packed.view(1, -1), None, activation)
        self.out_features, self.in_features, self.dtype = rows, columns, dtype
        self.kind = "native"
        self._library, self._code, self._form = library, code, number
        self._weight = packed
        if number >= CODE_FORMS["table"]:
            before = packed.as_strided((_TABLE_SIZE,), (1,), 0).view(torch.float32)
            before.copy_(torch.tensor(TABLE if table is None else table, dtype=torch.float32))
        for start, stop, codes, scale, add in pieces:
            codes, scale = codes.contiguous(), scale.contiguous()
            if repeats > 1:
                scale = scale.repeat_interleave(repeats, 1)
                add = add.repeat_interleave(repeats, 1) if add is not None else None
            assert scale.shape == (stop - start, columns // block)
            add = add.contiguous() if add is not None else None
            library.release.ol_pack_codes(
                number,
                codes.data_ptr(),
                scale.data_ptr(),
                add.data_ptr() if add is not None else None,
                stop - start,
                columns,
                packed.data_ptr() + 4 * size(number, start, columns),
                torch.get_num_threads(),
            )
        if bias is not None:
            self.has_bias = True
            self._bias = bias.float().contiguous()
            self._bias_address = self._bias.data_ptr()

    @staticmethod
    def piece_rows(at_most: int) -> int:
        """A number of rows at which a piece may end; any, where there are no kernels."""
        library = native.library()
        panel = 1 if library is None else 2 * library.lanes
        return max(panel, at_most // panel * panel)

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
