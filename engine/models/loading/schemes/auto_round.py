"""Checkpoints of AutoRound: the tensors of GPTQ or of AWQ, with what is stored of a zero told by `packing_format`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.fields import Fields, show
from engine.models.loading.checkpoint import StoredTensor
from engine.models.loading.schemes import awq, gptq
from engine.models.loading.schemes.base import Mismatch, Quantised
from engine.models.loading.schemes.names import aliases, compiled

# Of the packings in GPTQ's tensors, what is added to a stored zero.
OFFSETS = {"auto_round:auto_gptq": 1, "auto_round:gptq": 1, "auto_gptq": 1, "auto_round": 0, "auto_round:gptqmodel": 1}
AWQ = ("auto_round:auto_awq", "auto_round:awq", "auto_awq")


class AutoRound:
    """See base.Scheme."""

    suffixes = gptq.Gptq.suffixes

    def __init__(self, config: Fields) -> None:
        self.config = config
        self._packing = config.raw("packing_format") or config.raw("backend") or "auto_round:auto_gptq"
        if self._packing not in (*OFFSETS, *AWQ):
            known = ", ".join((*OFFSETS, *AWQ))
            config.fail("packing_format", f"({show(self._packing)}) is not one of {known}")
        kind = config.raw("data_type") or "int"
        if kind != "int":
            config.fail("data_type", f"({show(kind)}) is not supported in this packing")
        self._own = config.nested("extra_config")

    def matrix(self, module: str, parts: Mapping[str, StoredTensor]) -> Quantised | None:
        """See base.Scheme."""
        if gptq.CODES not in parts:
            return None
        bits, size = self.config.raw("bits"), self.config.raw("group_size")
        for key in self._own.names_in_order() if self._own is not None else ():
            own: Any = self._own.raw(key) if self._own is not None else None
            if isinstance(own, dict) and _means(key, module):
                bits, size = own.get("bits", bits), own.get("group_size", size)
                break
        if isinstance(bits, int) and bits >= 16:
            raise Mismatch(f"has integers, but extra_config in quantization_config leaves {module} in {bits} bits")
        if self._packing in AWQ:
            return awq.matrix(module, parts, bits, size)
        return gptq.matrix(module, parts, bits, size, OFFSETS[self._packing])


def _means(key: str, module: str) -> bool:
    """A name, or an expression where it holds what no name has."""
    if key in aliases(module):
        return True
    return any(sign in key for sign in "*^$\\+?|(") and compiled(key).match(module) is not None
