"""LoRA adapters of the fake device: a number for each, which changes every token, and the tables that say whose it is.

Believes ForwardInput alone, as a device does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.executor.fake_memory import mix_int
from engine.forward import ForwardInput, Int32Array, Limits
from engine.lora.words import AdapterError


def key_of(adapter: int) -> int:
    """What an adapter adds to every token; 64 bits, 0 for none."""
    return mix_int(adapter) if adapter else 0


@dataclass(frozen=True, slots=True)
class FakeWeights:
    """See AdapterWeights. value: not 0."""

    value: int
    rank: int = 8
    num_bytes: int = 1024
    base_model_name: str = ""

    @property
    def digest(self) -> str:
        return str(self.value)

    def __int__(self) -> int:
        return self.value


def read_fake_adapter(path: Path) -> FakeWeights:
    """A digest of the directory's files stands for the weights. Raises AdapterError where there are none."""
    digest = hashlib.blake2b(digest_size=7)
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        for file in sorted(path.iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
        rank, base = int(config.get("r", 8)), str(config.get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError, TypeError):
        raise AdapterError(f"{path}: adapter_config.json is missing or no JSON object") from None
    return FakeWeights(1 + int.from_bytes(digest.digest()), rank, base_model_name=base)


class AdapterTables:
    """Which adapter's number an index has, and which index a slot has."""

    def __init__(self, limits: Limits) -> None:
        self._count = limits.max_adapters
        self._numbers: dict[int, int] = {}
        self._index: Int32Array = np.zeros(limits.num_slots, np.int32)

    def forget(self) -> None:
        self._numbers.clear()

    def check(self, forward_input: ForwardInput) -> None:
        """What can be said of a step from itself."""
        indices: list[int] = forward_input.staging.adapter[: forward_input.num_sampling_diffs].tolist()
        assert all(0 <= index <= self._count for index in indices), f"adapters {indices} are out of range"
        loads = [index for index, _ in forward_input.adapter_loads]
        assert len(set(loads)) == len(loads), f"an index is loaded twice: {loads}"
        assert all(1 <= index <= self._count for index in loads), f"loads {loads} are out of range"

    def apply(self, forward_input: ForwardInput) -> None:
        """Take over the step's diffs."""
        staging, count = forward_input.staging, forward_input.num_sampling_diffs
        self._index[staging.sampling_slot[:count]] = staging.adapter[:count]
        for index, weights in forward_input.adapter_loads:
            if weights is None:
                self._numbers.pop(index, None)
            else:
                self._numbers[index] = int(weights)

    def drop(self, indices: Sequence[int]) -> None:
        """These are nobody's now."""
        assert all(1 <= index <= self._count for index in indices), f"adapters {indices} are out of range"
        for index in indices:
            self._numbers.pop(index, None)

    def number_of(self, slot: int) -> int:
        """The adapter that a slot's tokens come from now, 0 for none."""
        return self._numbers.get(int(self._index[slot]), 0)

    def keys(self, slots: list[int]) -> list[int]:
        """What the tokens of each row get from the adapters that are there now."""
        if not self._count:
            return [0] * len(slots)
        used: list[int] = self._index[slots].tolist()
        lost = [index for index in used if index and index not in self._numbers]
        assert not lost, f"rows with the adapters {lost}, which were never loaded"
        return [key_of(self._numbers[index]) if index else 0 for index in used]
