"""Which tensor of a GGUF file is which of a model's: the spec's parts beside llama.cpp's names for them.

llama.cpp calls a part the same in every architecture, so one table does for all. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.models.gguf.config import architecture_of
from engine.models.gguf.reader import GGUF, Tensor
from engine.models.spec import Dense, Experts, GroupedQueryAttention, LayerSpec, ModelSpec, NormSpec, Ungated

# What families read from the metadata's side, or llama.cpp computes from it.
_READ_ELSEWHERE = re.compile(r"(blk\.\d+\.)?(rope_freqs|rope_factors_(long|short))\.weight")

_FUSED_NAMES = {1: ("attn_qkv",), 3: ("attn_q", "attn_k", "attn_v")}


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor, or rows of one, for a name of the model's. shift: has been added to it and must be taken away."""

    tensor: Tensor
    shift: float = 0.0


def name_tensors(spec: ModelSpec, model: GGUF) -> tuple[dict[str, Named], set[str]]:
    """By the names that a model asks for (without the `model.` before most): what is there of them; and the file's
    names of tensors that belong to nothing. Raises StartupError.
    """
    shift = architecture_of(model).shift
    found: dict[str, Named] = {}
    used: set[str] = set()
    rows = set(_rows(spec))
    for ours, names in _pairs(spec):
        name = next((each for each in names if each in model.tensors), None)
        if name is not None:
            is_norm = shift != 0.0 and name.endswith("_norm.weight")
            tensor = model.tensors[name]
            if ours in rows and len(tensor.shape) == 1:
                tensor = replace(tensor, shape=(1, *tensor.shape))
            found[ours] = Named(tensor, shift if is_norm else 0.0)
            used.add(name)
    for ours, theirs, count in _stacked(spec):
        if theirs not in model.tensors:
            continue
        used.add(theirs)
        tensor = model.tensors[theirs]
        if tensor.shape[:1] != (count,):
            model.fail(f"tensor {theirs}", f"has shape {list(tensor.shape)}, the metadata asks for {count} experts")
        size = (tensor.end - tensor.begin) // count
        for number in range(count):
            begin = tensor.begin + number * size
            part = replace(tensor, shape=tensor.shape[1:], begin=begin, end=begin + size)
            found[ours.format(number)] = Named(part)
    unused = {name for name in model.tensors if name not in used and not _READ_ELSEWHERE.fullmatch(name)}
    # Layers past the last, which draft.
    drafting = {
        name for name in unused if (match := re.match(r"blk\.(\d+)\.", name)) and int(match[1]) >= spec.num_layers
    }
    return found, unused - drafting


def _pairs(spec: ModelSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(the model's name, those that the file may have for it)."""
    yield "embed_tokens.weight", ("token_embd.weight",)
    if spec.final_norm is not None:
        yield from _both(spec.final_norm.name, "output_norm")
    yield from _both("lm_head", "output")
    for index, layer in enumerate(spec.layers):
        for ours, theirs in _layer_pairs(layer):
            yield f"layers.{index}.{ours}", tuple(f"blk.{index}.{name}" for name in theirs)


def _both(ours: str, *theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for end in (".weight", ".bias"):
        yield ours + end, tuple(name + end for name in theirs)


def _norm(norm: NormSpec | None, *theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    if norm is not None:
        yield from _both(norm.name, *theirs)


def _layer_pairs(layer: LayerSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    mixer, feed_forward = layer.mixer, layer.feed_forward
    yield from _norm(layer.mixer_norm, "attn_norm")
    yield from _norm(layer.mixer_out_norm, "post_attention_norm")
    # Some architectures call it by where it stands in the checkpoints: after attention.
    yield from _norm(layer.feed_forward_norm, *("ffn_norm", "post_attention_norm")[: 1 if layer.mixer_out_norm else 2])
    yield from _norm(layer.feed_forward_out_norm, "post_ffw_norm")
    if isinstance(mixer, GroupedQueryAttention):
        for ours, theirs in zip(mixer.qkv, _FUSED_NAMES[len(mixer.qkv)], strict=True):
            yield from _both(ours, theirs)
        yield from _both(mixer.output, "attn_output")
        yield from _norm(mixer.q_norm, "attn_q_norm")
        yield from _norm(mixer.k_norm, "attn_k_norm")
    if isinstance(feed_forward, Dense | Ungated):
        yield from _mlp(feed_forward, "")
    elif isinstance(feed_forward, Experts):
        yield f"{feed_forward.router.name}.weight", ("ffn_gate_inp.weight",)
        if feed_forward.router.bias is not None:
            yield feed_forward.router.bias, ("exp_probs_b.bias", "exp_probs_b")
        if feed_forward.shared is not None:
            yield from _mlp(feed_forward.shared, "_shexp")
        if feed_forward.shared_gate is not None:
            yield f"{feed_forward.shared_gate}.weight", ("ffn_gate_inp_shexp.weight",)


def _mlp(spec: Dense | Ungated, end: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    inner = spec.gate_up if isinstance(spec, Dense) else (spec.up,)
    # Fused, both are called up.
    names = ("ffn_gate", "ffn_up") if len(inner) == 2 else ("ffn_up",)
    for ours, theirs in zip(inner, names, strict=True):
        yield from _both(ours, theirs + end)
    yield from _both(spec.down, f"ffn_down{end}")


def _rows(spec: ModelSpec) -> Iterator[str]:
    """What has one row, which the file need not say."""
    for index, layer in enumerate(spec.layers):
        experts = layer.feed_forward
        if isinstance(experts, Experts):
            if experts.shared_gate is not None:
                yield f"layers.{index}.{experts.shared_gate}.weight"
            if experts.router.bias is not None and experts.router.bias_is_row:
                yield f"layers.{index}.{experts.router.bias}"


def _stacked(spec: ModelSpec) -> Iterator[tuple[str, str, int]]:
    """(the model's name with a place for the expert's number, the file's for all of them, how many)."""
    for index, layer in enumerate(spec.layers):
        experts = layer.feed_forward
        if isinstance(experts, Experts):
            fused = len(experts.gate_up) == 1
            names = ("ffn_gate_up_exps",) if fused else ("ffn_gate_exps", "ffn_up_exps")
            for ours, theirs in zip((*experts.gate_up, experts.down), (*names, "ffn_down_exps"), strict=True):
                yield f"layers.{index}.{ours}.weight", f"blk.{index}.{theirs}.weight", experts.num_experts
