"""What the serving side knows of an adapter that was read: words without torch."""

from __future__ import annotations

from typing import Protocol


class AdapterError(Exception):
    """An adapter that cannot be served; one sentence that names it, the key and the reason."""


class AdapterWeights(Protocol):
    """rank: the largest. num_bytes: in memory. base_model_name: of the adapter's config, "" where it names none."""

    rank: int
    num_bytes: int
    base_model_name: str
