"""MiMo 7B: Qwen 2 with layers that draft, which are left out."""

from __future__ import annotations

from dataclasses import replace

from engine.models.families import qwen2
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# Transformers has no such class: its own code is Qwen 2's.
DEFAULTS = qwen2.DEFAULTS


def read_spec(fields: Fields) -> ModelSpec:
    return replace(qwen2.read_spec(fields), outside=("mtp_layers.",))
