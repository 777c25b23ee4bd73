"""VaultGemma: Gemma 2 without norms after attention and MLP."""

from __future__ import annotations

from dataclasses import replace

from engine.models.families import gemma2
from engine.models.fields import Fields
from engine.models.spec import ModelSpec, share

# What an absent field means: VaultGemmaConfig of transformers.
DEFAULTS = gemma2.DEFAULTS


def read_spec(fields: Fields) -> ModelSpec:
    spec = gemma2.read_spec(fields)
    layers = (replace(layer, mixer_out_norm=None, feed_forward_out_norm=None) for layer in spec.layers)
    return replace(spec, layers=share(layers))
