"""Tables of cosines and sines for rotary embeddings, computed in float32 as the checkpoints were trained with.

Built once at start by the decoder; read by ops/rope.py at every layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.models.mixers import RopeSpec


def rope_table(rope: RopeSpec, native_context: int, max_model_len: int, device: torch.device) -> Tensor:
    """float32 [max_model_len, rotary_dim]: row p holds cos(p f_i), then sin(p f_i), for i < rotary_dim / 2.

    native_context: the model's max_position_embeddings.
    """
    if device.type == "meta":
        # Only shapes are asked for; a meta arange would import torch's compiler, which takes seconds.
        return torch.empty((max_model_len, rope.rotary_dim), dtype=torch.float32, device=device)
    frequencies = inverse_frequencies(rope, native_context, max_model_len).to(device)
    positions = torch.arange(max_model_len, dtype=torch.float32, device=device)
    table = torch.empty((max_model_len, rope.rotary_dim), dtype=torch.float32, device=device)
    cos, sin = table.chunk(2, dim=1)
    torch.mul(positions[:, None], frequencies, out=sin)
    torch.cos(sin, out=cos)
    sin.sin_()
    return table if rope.attention_scaling == 1.0 else table.mul_(rope.attention_scaling)


def inverse_frequencies(rope: RopeSpec, native_context: int, max_model_len: int) -> Tensor:
    """float32 [rotary_dim / 2]: radians per position.

    The kinds whose frequencies change with the length of the text (dynamic, longrope) are fixed by the length
    that may be served: keys in the cache cannot be turned again. Up to the native context that is the same.
    """
    dim, theta = rope.rotary_dim, rope.theta
    if rope.kind == "dynamic":
        # NTK-aware scaling of the base for texts of max_model_len tokens; none within the native context.
        length = max(max_model_len, native_context)
        theta *= (rope.factor * length / native_context - (rope.factor - 1)) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    wavelengths = theta**exponents
    if rope.kind == "proportional":
        frequencies = 1.0 / wavelengths / rope.factor
        frequencies[rope.turning :] = 0
        return frequencies
    if rope.kind == "linear":
        return 1.0 / wavelengths / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, 1.0 / wavelengths)
    if rope.kind == "yarn":
        return _yarn(rope, wavelengths)
    if rope.kind == "longrope":
        long = max_model_len > rope.original_max_position
        factors = torch.tensor(rope.long_factor if long else rope.short_factor, dtype=torch.float32)
        return 1.0 / (factors * wavelengths)
    return 1.0 / wavelengths


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    original, low, high = rope.original_max_position, rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    result = torch.where(wavelengths > original / low, frequencies / rope.factor, between)
    return torch.where(wavelengths < original / high, frequencies, result)


def _yarn(rope: RopeSpec, wavelengths: Tensor) -> Tensor:
    """YaRN (arXiv 2309.00071), section 3.2: dimensions that turn often are kept, slow ones stretched."""
    dim = rope.rotary_dim

    def dimension_of(rotations: float) -> float:
        """The dimension that turns so many times within the original context."""
        ratio = rope.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * wavelengths) * stretched + 1.0 / wavelengths * (1 - stretched)


def split_pairs(num_heads: int, head_dim: int, rotary_dim: int) -> Tensor:
    """int64 [num_heads * head_dim]: rows of a projection with interleaved pairs, in the order of split halves.

    Turning pairs (2i, 2i+1) of the old rows is turning pairs (i, i + rotary_dim/2) of the new ones; q @ k stays
    the same when both are reordered alike, so one rope kernel serves both kinds of checkpoints.
    """
    head = torch.arange(head_dim)
    head[:rotary_dim] = torch.cat((torch.arange(0, rotary_dim, 2), torch.arange(1, rotary_dim, 2)))
    return (torch.arange(num_heads)[:, None] * head_dim + head).view(-1)
