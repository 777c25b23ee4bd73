"""Checkpoints of float8 (e4m3) as DeepSeek V3 introduced them, with a scale for every block, and those of FBGEMM.

A matrix `NAME.weight` stands beside its scales under one of several names; it is multiplied by them, despite `_inv`.
Experts may be e2m1, two to a byte, with an exponent for every 32.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.models.fields import Fields, show
from engine.models.loading.checkpoint import StoredTensor
from engine.models.loading.schemes.base import FLOATS, Mismatch, Quantised, expect, need
from engine.models.loading.schemes.floats import EXPONENTS, Float4Matrix, Float8Matrix

WEIGHT = ".weight"
SCALES = (".weight_scale_inv", ".weight_scale", ".qscale_weight", ".scale")
# Rows or columns that share a scale, at most.
MAX_BLOCK = 65536


class Float8:
    """See base.Scheme."""

    suffixes = (*SCALES, WEIGHT)

    def __init__(self, config: Fields) -> None:
        self.config = config
        if config.raw("fmt") not in (None, "e4m3", "float8_e4m3fn"):
            config.fail("fmt", f"must be e4m3, not {show(config.raw('fmt'))}")
        if config.raw("expert_dtype") not in (None, "fp8", "fp4"):
            config.fail("expert_dtype", f"({show(config.raw('expert_dtype'))}) is not supported")
        self.block: tuple[int, int] | None = None
        if config.has("weight_block_size"):
            block = config.integers("weight_block_size")
            if len(block) != 2 or not all(1 <= size <= MAX_BLOCK for size in block):
                config.fail("weight_block_size", f"must be two integers from 1 to {MAX_BLOCK}, not {show(list(block))}")
            self.block = block[0], block[1]

    def matrix(self, module: str, parts: Mapping[str, StoredTensor]) -> Quantised | None:
        """See base.Scheme."""
        suffix = next((each for each in SCALES if each in parts), None)
        if suffix is None:
            return None
        if WEIGHT in parts and len(parts[WEIGHT].shape) == 3:
            return None  # of all experts of a layer
        scale = need(module, parts, suffix, (*FLOATS, *EXPONENTS))
        weight = need(module, parts, WEIGHT, ("F8_E4M3", "I8", "U8"))
        if len(weight.shape) != 2 or 0 in weight.shape:
            raise Mismatch(f"has shape {list(weight.shape)}, where a matrix is needed")
        rows, columns = weight.shape
        if weight.dtype != "F8_E4M3":
            if self.config.raw("expert_dtype") != "fp4" or scale.dtype not in EXPONENTS or 2 * columns % 32:
                raise Mismatch(f"has dtype {weight.dtype}, only F8_E4M3 is read")
            expect(module, suffix, scale, (rows, 2 * columns // 32))
            return Float4Matrix("FP4 by 32", parts, weight, scale, 32)
        method, activations = self.config.raw("quant_method"), self.config.raw("activation_scheme")
        rounds = method == "fbgemm_fp8" or activations in ("dynamic", "static")
        if scale.shape in ((), (1,), (1, 1)):
            return Float8Matrix("FP8 by tensor", parts, weight, scale, (rows, columns), float8_inputs=rounds)
        if self.block is None:
            if scale.shape not in ((rows,), (rows, 1)):
                raise Mismatch(
                    f"tensor {module}{suffix} has shape {list(scale.shape)}, and config.json has no block size"
                )
            return Float8Matrix("FP8 by row", parts, weight, scale, (1, columns), float8_inputs=rounds)
        high, wide = self.block
        expected = -(-rows // high), -(-columns // wide)
        if scale.shape != expected:
            raise Mismatch(
                f"tensor {module}{suffix} has shape {list(scale.shape)}; weight_block_size in config.json asks for "
                f"{list(expected)}"
            )
        return Float8Matrix(f"FP8 by {high} x {wide}", parts, weight, scale, self.block)
