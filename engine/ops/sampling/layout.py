"""A sampling row as the device reads it: int32 words, and where its fields stand in them."""

from __future__ import annotations

from engine.forward import SAMPLING_DTYPE

WORDS = SAMPLING_DTYPE.itemsize // 4
_FIELDS = SAMPLING_DTYPE.fields
assert _FIELDS is not None
TEMPERATURE, TOP_P, MIN_P, TOP_K, SEED, MIN_LENGTH, NUM_STOP_IDS, STOP_IDS = (
    _FIELDS[name][1] // 4
    for name in ("temperature", "top_p", "min_p", "top_k", "seed", "min_length", "num_stop_ids", "stop_ids")
)
NUM_STOPS = WORDS - STOP_IDS
