"""Weights of a quantised checkpoint that stay codes with scales, where a CPU or a GPU has kernels for that.

Used at start, on the loading thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.config import StartupError
from engine.models.gguf.coded import CODED, coded
from engine.models.gguf.types import BY_NAME
from engine.models.loading.schemes.base import Coded
from engine.models.loading.weights import OUTPUT_WEIGHT, CheckpointWeights
from engine.models.parts.source import PREFIX
from engine.ops import coded as on_cpu
from engine.ops import device_coded as on_gpu
from engine.ops.coded import Piece
from engine.ops.device_coded import DeviceCodedLinear
from engine.ops.experts import Stack
from engine.ops.linear import Linear
from engine.ops.packed import MixedLinear, PackedLinear
from engine.ops.reordered import ReorderedLinear

_EMBEDDING = f"{PREFIX}embed_tokens.weight"
# Its name, and columns of a scale.
Form = tuple[str, int]
# Weights that are brought from one form into the other at once.
_PIECE = 1024 * 1024


class CodedWeights(CheckpointWeights):
    """CheckpointWeights with a layer of codes for each whose parts can all be codes of one form."""

    packed_input_bits = 16

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
        """See Weights.linear. Quantised weights of one form stay as they are, where there are kernels for them."""
        weights, wanted = [f"{name}.weight" for name in names], dtype or self.dtype
        self.round_layer(weights, dtype)
        forms = self._forms(weights, wanted)
        same, columns_order = self.input_order(weights) if forms is not None else (False, None)
        if forms is None or not same or (len(set(forms)) > 1 and order is not None):
            return super().linear(names, rows, columns, bias=bias, order=order, activation=activation, dtype=dtype)
        bias_vector = self.stacked([f"{name}.bias" for name in names], rows, dtype=dtype) if bias else None
        if order is not None and bias_vector is not None:
            bias_vector[: len(order)] = bias_vector[order]
        parts: list[Linear] = []
        begin = first = 0
        while begin < len(names):
            # Below one another, as long as they are alike.
            end = next((index for index in range(begin, len(names)) if forms[index] != forms[begin]), len(names))
            count = sum(rows[begin:end])
            own = bias_vector[first : first + count] if bias_vector is not None else None
            pieces = self._pieces(weights[begin:end], rows[begin:end], columns, order)
            alone = activation if end - begin == len(names) else None
            table = self.kept_table(weights[begin])
            layer = self._layer(forms[begin], count, columns, wanted, pieces, own, alone, table)
            rounds = self.packed_input_bits == 8 and all(self._rounds_inputs(each) for each in weights[begin:end])
            if isinstance(layer, DeviceCodedLinear) and rounds:
                layer.take_float8_inputs()
            parts.append(layer)
            begin, first = end, first + count
        self.linears.extend(parts)
        linear = parts[0] if len(parts) == 1 else MixedLinear(parts, activation)
        return linear if columns_order is None else ReorderedLinear(linear, columns_order.to(self.device))

    def experts(
        self, names: Sequence[str], count: int, rows: int, columns: int, *, order: Tensor | None = None
    ) -> Stack:
        """See Source.experts."""
        weights = [f"{name}.weight" for name in names]
        self.round_layer(weights, None)
        forms = self._forms(weights, self.dtype) if on_gpu.forms_kept(self.dtype, self.device) else None
        common = None if forms is None else _common(forms)
        if common is None or self.input_order(weights) != (True, None):
            return super().experts(names, count, rows, columns, order=order)
        each = len(names) // count
        form, group = common

        def pieces() -> Iterator[Piece]:
            for number in range(count):
                start = number * each * rows
                own = weights[number * each : (number + 1) * each]
                for begin, end, codes, scale, low in self._pieces(own, [rows] * each, columns, order, form):
                    yield start + begin, start + end, codes, scale, low

        table = self.kept_table(weights[0])
        return on_gpu.codes_of(form, count * each * rows, columns, group, self.device, pieces(), table)

    def _rounds_inputs(self, name: str) -> bool:
        """See Quantised.float8_inputs."""
        matrix = self._tensors[name].quantised
        return matrix is not None and matrix.float8_inputs

    def round_layer(self, weights: Sequence[str], dtype: torch.dtype | None) -> None:
        """Round what a layer is made of, where that was asked for; one whose dtype is given is a router's."""
        if dtype is None:
            self.round(weights, as_output=list(weights) == [OUTPUT_WEIGHT])

    def output_layer(self, vocab: int, hidden: int, *, tied: bool, bias: bool = False) -> Linear:
        """See Weights.output_layer."""
        if tied:
            self.round([_EMBEDDING], as_output=True)
        forms = self._forms([_EMBEDDING], self.dtype) if tied else None
        if forms is None or self.input_order([_EMBEDDING]) != (True, None):
            return super().output_layer(vocab, hidden, tied=tied, bias=bias)
        pieces = self._pieces([_EMBEDDING], [vocab], hidden, None)
        linear = self._layer(forms[0], vocab, hidden, self.dtype, pieces, table=self.kept_table(_EMBEDDING))
        self.linears.append(linear)
        return linear

    def _forms(self, names: Sequence[str], dtype: torch.dtype) -> list[Form] | None:
        """In what each of these can be kept, where a layer can be made of that; None where it cannot."""
        found: list[Form | None]
        if known := on_gpu.forms_kept(dtype, self.device):
            found = [self._form(name) for name in names]
        elif on_cpu.can_keep_codes(dtype, self.device):
            known, found = on_cpu.FORMS, [self.kept_form(name) for name in names]
            if len(set(found)) > 1 or found[0] is None or not on_cpu.fits(*found[0], self._tensors[names[0]].shape[-1]):
                return None
        else:
            return None
        forms = [form for form in found if form is not None and form[0] in known]
        tables = {self.kept_table(name) for name, form in zip(names, found, strict=True) if form and form[0] == "table"}
        return forms if len(forms) == len(names) and len(tables) <= 1 else None

    def _form(self, name: str) -> Form | None:
        """What a GPU can keep it in, and columns of a scale."""
        stored = self._tensors[name]
        if stored.quantised is not None:
            return self.kept_form(name, narrow=True)
        as_it_lies = stored.undo is None and not stored.stride and not stored.transposed and not stored.shift
        form = CODED.get(stored.dtype) if as_it_lies else None
        return form if form is not None and stored.shape[-1] % form[1] == 0 else None

    def _layer(
        self,
        form: Form,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        pieces: Iterator[Piece],
        bias: Tensor | None = None,
        activation: str | None = None,
        table: tuple[float, ...] | None = None,
    ) -> Linear:
        name, group = form
        if on_gpu.forms_kept(dtype, self.device):
            return DeviceCodedLinear(name, rows, columns, group, dtype, self.device, pieces, bias, activation, table)
        linear = on_cpu.coded_linear(name, rows, columns, dtype, pieces, bias, activation, group=group, table=table)
        if isinstance(linear, PackedLinear) and self.packed_input_bits == 8:
            linear.take_eight_bits()
        return linear

    def _codes(self, name: str, begin: int, end: int, form: str | None = None) -> Coded:
        """Rows [begin, end). form: one that is its own but for something added."""
        codes, scale, low = self._own_codes(name, begin, end)
        largest = float(scale.abs().amax()) if self.device.type == "cpu" else 0.0
        # The form is asked for last: it may take a look at the whole tensor.
        if largest >= on_cpu.FLOAT8_SCALES and (self.kept_form(name) or ("", 0))[0] == "e4m3":
            file = self._tensors[name].file
            raise StartupError(f"{file}: tensor {name}: a scale is {largest:g}, beyond what kernels have here")
        if low is None and form is not None and form.endswith("low"):
            low = scale * (-8.0 if form.startswith("int4") else 0.0)
        return codes, scale, low

    def _own_codes(self, name: str, begin: int, end: int) -> Coded:
        """Rows [begin, end), in its own form."""
        stored = self._tensors[name]
        if stored.quantised is not None:
            return self.kept_codes(name, begin, end)
        kind = BY_NAME[stored.dtype]
        size = stored.shape[1] // kind.elements * kind.size
        mapped = self._files.get(stored.file, stored.end)
        blocks = np.frombuffer(mapped, np.uint8, (end - begin) * size, stored.begin + begin * size)
        try:
            codes, scale, low = coded(stored.dtype, blocks.reshape(-1, kind.size))
        except ValueError as problem:
            raise StartupError(f"{stored.file}: tensor {name}: {problem}") from None
        del blocks
        self._let_go(stored, stored.begin + begin * size, stored.begin + end * size)
        added = None if low is None else torch.from_numpy(low).reshape(end - begin, -1)
        return torch.from_numpy(codes).view(end - begin, -1), torch.from_numpy(scale).reshape(end - begin, -1), added

    def _pieces(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        order: Tensor | None,
        form: str | None = None,
    ) -> Iterator[Piece]:
        """The tensors below one another, in pieces that are small where no order mixes their rows. form: see _codes."""
        total = sum(rows)
        step = PackedLinear.piece_rows(_PIECE // columns) if order is None else total
        starts = [sum(rows[:index]) for index in range(len(rows))]
        for begin in range(0, total, step):
            end = min(begin + step, total)
            parts = [
                self._codes(name, max(begin - start, 0), min(end - start, count), form)
                for name, start, count in zip(names, starts, rows, strict=True)
                if start < end and start + count > begin
            ]
            codes, scale = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            lows = [part[2] for part in parts if part[2] is not None]
            low = torch.cat(lows) if lows else None
            if order is not None:
                for part in (codes, scale, low):
                    if part is not None:
                        part[: len(order)] = part[order]
            yield begin, end, codes, scale, low


def _common(forms: list[Form]) -> Form | None:
    """One for all: what is added may be nothing. None where they differ in more."""
    kinds, groups = {name.removesuffix(" and low") for name, _ in forms}, {group for _, group in forms}
    if len(kinds) > 1 or len(groups) > 1:
        return None
    return max((name for name, _ in forms), key=len), groups.pop()
