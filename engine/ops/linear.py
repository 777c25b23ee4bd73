"""A linear layer that prepares its weight once for the processor at hand, and then only multiplies.

Built by models/ at load time, called by the executor's thread. Three ways, chosen by capability alone so that a
machine gives the same bits at every start: oneDNN prepacked for bf16 where there is AMX (or AVX512-BF16 that our
compiler does not know), our own kernels for float32 and for other bf16, `F.linear` as the floor. Our own give a row
the same bits in any batch; the others do so in deterministic mode, by row tiles (invariance.py).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import native
from engine.ops.activation import GATED_ACTIVATIONS
from engine.ops.gated import LEAST_ROWS, Tile, gated_product
from engine.ops.invariance import RowTile, row_tile_of
from engine.ops.norm import Normed, plain
from engine.ops.skinny import Blocks, skinny_product

# Rows that oneDNN packs for. With 1 its sums fall into the fewest classes by number of rows ({1..128}, {255..512}).
ROWS_HINT = 1
# Elements of a weight up to which deterministic mode takes our own kernels unasked: as quick at that size.
SMALL_WEIGHT = 1 << 20


def has_fast_bfloat16() -> bool:
    """The processor multiplies bf16 in hardware, and torch's oneDNN uses it."""
    flags = native.cpu_flags()
    if not ({"avx512_bf16", "amx_bf16"} & flags) or "avx512f" not in flags:
        return False
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def choose_kind(dtype: torch.dtype, device: torch.device) -> str:
    """native, onednn or torch: what `Linear.prepare` will use for such a weight.

    One thread of a Zen 4 without AVX512 (GFLOP/s at 1 / 16 / 512 rows): bf16 F.linear 15, 13, 13, native 25, 75, 75;
    float32 at 512 rows F.linear 65, native 72. With AVX512-BF16: bf16 oneDNN 14-17, 161-172, 221, native 24-29,
    181-194, 203.
    """
    if device.type != "cpu":
        return "torch"
    library = native.library()
    if dtype == torch.bfloat16 and has_fast_bfloat16():
        own = library is not None and library.multiplies_bf16 and "amx_bf16" not in native.cpu_flags()
        return "native" if own else "onednn"
    if native.type_code(dtype) is not None and library is not None and library.lanes >= 8:
        return "native"
    return "torch"


class Linear:
    """y = x weight^T + bias, with weight [out_features, in_features] and bias [out_features] or None.

    activation: what `gated` makes of y, one of GATED_ACTIVATIONS. few: number of rows -> blocks of skinny.py, where
    that is faster (executor/cuda_products.py); on a GPU only. tile: of gated.py, likewise, for LEAST_ROWS and more.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.kind = "torch"
        self.input_bits = 0  # to which inputs are rounded; 0: not at all
        self.row_tile: RowTile | None = None
        self.dtype = weight.dtype
        self.has_bias = bias is not None
        self._weight = weight
        self._bias = bias
        self._bias_address: int | None = None
        self.activation = activation
        self.few: dict[int, Blocks] = {}
        self.tile: Tile | None = None

    @property
    def num_bytes(self) -> int:
        """What a product reads of the weight."""
        return self.out_features * self.in_features * self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._weight.device

    @property
    def addresses(self) -> tuple[int, int | None]:
        """Of the packed weight and of the bias, for a kernel that does more than this product (kind native)."""
        assert self.kind == "native"
        return self._weight.data_ptr(), self._bias_address

    @property
    def ways(self) -> Any:
        """What a clock has found faster, for another layer of this shape and kind."""
        return self.few, self.tile

    @ways.setter
    def ways(self, found: Any) -> None:
        self.few, self.tile = found

    def prepare(self, *, keep_rows: bool = False, kind: str | None = None, deterministic: bool = False) -> None:
        """Bring the weight into its fastest form and drop the plain one. Once.

        keep_rows: `rows` must keep working without a second copy (a tied embedding); oneDNN's form cannot do that,
        so there the weight stays as it is. kind: for tests. deterministic: the fastest form whose rows have the
        same bits in any batch, where there is one (kind native, or a row_tile).
        """
        assert self.kind == "torch", "prepared twice"
        weight = self._weight
        kind = kind or choose_kind(weight.dtype, weight.device)
        own = weight.is_cpu and native.library() is not None and native.type_code(weight.dtype) is not None
        if deterministic and own and weight.numel() <= SMALL_WEIGHT:
            kind = "native"
        if kind == "onednn" and not keep_rows:
            # Not in a torch built without oneDNN.
            with contextlib.suppress(AttributeError, RuntimeError):
                self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
                self.kind = kind
        elif kind == "native":
            self._pack(weight)
        if deterministic and weight.is_cpu and self.kind != "native":
            # Both kinds are oneDNN in bf16. F.linear in float32 is MKL's, which looks at addresses too.
            if weight.dtype == torch.bfloat16:
                self.row_tile = row_tile_of(self, self._multiply)
            if self.row_tile is None and own:
                self._pack(weight)

    def _pack(self, weight: Tensor) -> None:
        """Take our own kernels."""
        library, code = native.library(), native.type_code(weight.dtype)
        assert library is not None and code is not None
        weight = weight.contiguous()
        packed = torch.empty(library.hold.ol_packed_size(code, *weight.shape), dtype=weight.dtype)
        library.release.ol_pack_weight(
            code, weight.data_ptr(), *weight.shape, packed.data_ptr(), torch.get_num_threads()
        )
        self._weight = packed
        self._library, self._code = library, code
        if self._bias is not None:
            self._bias = self._bias.float().contiguous()
            self._bias_address = self._bias.data_ptr()
        self.kind = "native"

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[T, in_features] -> [T, out_features] of the same dtype."""
        if self.few and self.activation is None:
            return self.by_blocks(x, self.few.get(x.shape[0]))
        x = plain(x)
        if self.kind == "native":
            if x.stride(1) != 1:
                x = x.contiguous()
            assert x.dtype == self.dtype and x.shape[1] == self.in_features
            rows, out_features, code = x.shape[0], self.out_features, self._code
            out = torch.empty((rows, out_features), dtype=x.dtype)
            handle = self._library.by_work(rows * out_features * self.in_features // 8)
            handle.ol_linear(
                code,
                x.data_ptr(),
                x.stride(0),
                rows,
                self.in_features,
                self._weight.data_ptr(),
                out_features,
                self._bias_address,
                out.data_ptr(),
                code,
                out_features,
                torch.get_num_threads(),
            )
            return out
        return self._multiply(x) if self.row_tile is None else self.row_tile.apply(self._multiply, x)

    def _multiply(self, x: Tensor) -> Tensor:
        """By torch or oneDNN, all rows in one call."""
        if self.kind == "onednn":
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return product
        return F.linear(x, self._weight, self._bias)

    def later(self, x: Tensor) -> Tensor | Product:
        """The same, or what will be it: where a residual that is added next costs no launch of its own."""
        return Product(self, x) if x.shape[0] in self.few else self(x)

    def gated(self, x: Tensor | Normed) -> Tensor:
        """[T, in_features] -> [T, out_features / 2]: activation(first half of y) * second half."""
        assert self.activation is not None
        if self.tile is not None and x.shape[0] >= LEAST_ROWS:
            return self.by_tile(x, self.tile)
        if self.few:
            return self.by_blocks(x, self.few.get(x.shape[0]))
        return GATED_ACTIVATIONS[self.activation](self(x))

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual [T, out_features] + the product of x, in its memory; of rows that `few` knows."""
        return skinny_product(x, self._weight, self._bias, self.few[x.shape[0]], None, residual)

    def by_blocks(self, x: Tensor | Normed, blocks: Blocks | None) -> Tensor:
        """On a GPU: what `gated` gives, or a call where there is no activation; blocks None: by cuBLAS."""
        if blocks is not None:
            return skinny_product(x, self._weight, self._bias, blocks, self.activation)
        y = self._multiply(plain(x))
        return y if self.activation is None else GATED_ACTIVATIONS[self.activation](y)

    def by_tile(self, x: Tensor | Normed, tile: Tile | None) -> Tensor:
        """On a GPU: what `gated` gives; tile None: by cuBLAS and a second launch."""
        if tile is None:
            return self.by_blocks(x, None)
        assert self.activation is not None
        return gated_product(plain(x), self._weight, self._bias, self.activation, tile)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, [T] int32 or int64 -> [T, in_features]: the embedding that a tied output layer is."""
        if self.kind == "torch":
            return F.embedding(ids, self._weight)
        assert self.kind == "native", "oneDNN's form has no rows: prepare(keep_rows=True)"
        return self._unpacked(ids, "ol_unpack_rows")

    def _unpacked(self, ids: Tensor, kernel: str, *form: int) -> Tensor:
        """Rows of a packed weight, by the kernel that knows its form."""
        ids = ids.contiguous()
        count, wide = len(ids), ids.dtype == torch.int64
        out = torch.empty((count, self.in_features), dtype=self.dtype)
        # The kernel does not check, and a bad id would read foreign memory.
        assert count == 0 or (int(ids.min()) >= 0 and int(ids.max()) < self.out_features), "token id out of range"
        getattr(self._library.by_work(4 * out.numel()), kernel)(
            *form,
            self._code,
            self._weight.data_ptr(),
            self.in_features,
            ids.data_ptr(),
            wide,
            count,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


@dataclass(frozen=True, slots=True)
class Product:
    """linear(x), still to be computed."""

    linear: Linear
    x: Tensor

    def add_to(self, residual: Tensor) -> Tensor:
        """The sum, in the residual's memory."""
        return self.linear.add_to(residual, self.x)


def computed(x: Tensor | Product) -> Tensor:
    """[T, out_features], where nothing is added to it."""
    return x.linear(x.x) if isinstance(x, Product) else x
