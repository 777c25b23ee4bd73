"""A small Llama in plain torch, equal to transformers' LlamaForCausalLM.

Owns the architecture of the demo model, the layout of its parameters in one flat tensor (so that several
processes can share it) and the names they have in a Hugging Face checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The sizes of the model."""

    vocab: int = 2304
    hidden: int = 256
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    inner: int = 704
    head_dim: int = 64
    context: int = 2048
    theta: float = 10000.0
    eps: float = 1e-5

    def config(self, bos: int | None, eos: int, pad: int) -> dict[str, Any]:
        """The Hugging Face config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.inner,
            "max_position_embeddings": self.context,
            "mlp_bias": False,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.eps,
            "rope_scaling": None,
            "rope_theta": self.theta,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab,
        }

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter, in the order of the flat tensor."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, h)}
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            found |= {
                layer + "input_layernorm.weight": (h,),
                layer + "self_attn.q_proj.weight": (q, h),
                layer + "self_attn.k_proj.weight": (kv, h),
                layer + "self_attn.v_proj.weight": (kv, h),
                layer + "self_attn.o_proj.weight": (h, q),
                layer + "post_attention_layernorm.weight": (h,),
                layer + "mlp.gate_proj.weight": (self.inner, h),
                layer + "mlp.up_proj.weight": (self.inner, h),
                layer + "mlp.down_proj.weight": (h, self.inner),
            }
        return found | {"model.norm.weight": (h,)}

    def size(self) -> int:
        """The number of parameters."""
        return sum(math.prod(s) for s in self.parameters().values())


def views(flat: Tensor, shape: Shape) -> dict[str, Tensor]:
    """The parameters as views into a flat tensor."""
    found, at = {}, 0
    for name, size in shape.parameters().items():
        n = math.prod(size)
        found[name] = flat[at : at + n].view(size)
        at += n
    return found


def init_flat(shape: Shape, seed: int) -> Tensor:
    """Fresh parameters: normal matrices scaled by fan-in, smaller where they end in the residual stream."""
    flat = torch.empty(shape.size())
    g = torch.Generator().manual_seed(seed)
    for name, p in views(flat, shape).items():
        if p.dim() == 1:
            p.fill_(1.0)
        else:
            std = 0.02 if "embed" in name else 1.0 / math.sqrt(p.shape[1])
            if "o_proj" in name or "down_proj" in name:
                std /= math.sqrt(2 * shape.layers)
            p.copy_(torch.randn(p.shape, generator=g) * std)
    return flat


def rotations(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding for positions 0..length-1."""
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angle = torch.arange(length, dtype=torch.float32)[:, None] / shape.theta ** half[None, :]
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to [batch, heads, length, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def forward(p: dict[str, Tensor], shape: Shape, ids: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """The final hidden states [batch, length, hidden]; logits are these times the embedding."""
    batch, length = ids.shape
    cos, sin = rope[0][:length], rope[1][:length]
    x = F.embedding(ids, p["model.embed_tokens.weight"])
    for i in range(shape.layers):
        layer = f"model.layers.{i}."

        def heads(name: str, h: Tensor, n: int, layer: str = layer) -> Tensor:
            y = F.linear(h, p[f"{layer}self_attn.{name}_proj.weight"])
            return y.view(batch, length, n, shape.head_dim).transpose(1, 2)

        h = norm(x, p[layer + "input_layernorm.weight"], shape.eps)
        q = rotate(heads("q", h, shape.heads), cos, sin)
        k = rotate(heads("k", h, shape.kv_heads), cos, sin)
        v = heads("v", h, shape.kv_heads)
        repeat = shape.heads // shape.kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        a = a.transpose(1, 2).reshape(batch, length, shape.heads * shape.head_dim)
        x = x + F.linear(a, p[layer + "self_attn.o_proj.weight"])
        h = norm(x, p[layer + "post_attention_layernorm.weight"], shape.eps)
        gate = F.silu(F.linear(h, p[layer + "mlp.gate_proj.weight"]))
        x = x + F.linear(gate * F.linear(h, p[layer + "mlp.up_proj.weight"]), p[layer + "mlp.down_proj.weight"])
    return norm(x, p["model.norm.weight"], shape.eps)


def logits(p: dict[str, Tensor], shape: Shape, ids: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Next-token logits of every position."""
    return F.linear(forward(p, shape, ids, rope), p["model.embed_tokens.weight"])
