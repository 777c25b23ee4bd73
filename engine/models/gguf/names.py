"""Which tensor of a GGUF file is which of a model's: the spec's parts beside llama.cpp's names for them.

llama.cpp calls a part the same in every architecture, so one table does for all. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engine.models.gguf.config import architecture_of
from engine.models.gguf.reader import GGUF, Tensor
from engine.models.mixers import GatedDelta, GroupedQueryAttention, NormSpec, ShortConv
from engine.models.spec import Dense, Experts, LayerSpec, ModelSpec, Ungated

# What families read from the metadata's side, or llama.cpp computes from it.
_READ_ELSEWHERE = re.compile(r"(blk\.\d+\.)?(rope_freqs|rope_factors_(long|short))\.weight")

_FUSED_NAMES = {1: ("attn_qkv",), 3: ("attn_q", "attn_k", "attn_v")}


Undo = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor, or rows of one, for a name of the model's. shift: has been added to it and must be taken away.

    undo: what its numbers, as float32, are turned into.
    """

    tensor: Tensor
    shift: float = 0.0
    undo: Undo | None = None


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
            is_norm = shift != 0.0 and name.endswith("_norm.weight") and not name.endswith(".ssm_norm.weight")
            tensor = model.tensors[name]
            if ours in rows and len(tensor.shape) == 1:
                tensor = replace(tensor, shape=(1, *tensor.shape))
            found[ours] = Named(tensor, shift if is_norm else 0.0)
            used.add(name)
    for ours, theirs, undo in _recurrent(spec):
        if theirs in model.tensors:
            tensor = model.tensors[theirs]
            if ours.endswith(("conv1d.weight", "conv.conv.weight")) and len(tensor.shape) == 2:
                tensor = replace(tensor, shape=(tensor.shape[0], 1, tensor.shape[1]))
            found[ours] = Named(tensor, undo=undo)
            used.add(theirs)
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
        yield from _both(spec.final_norm.name, "output_norm", "token_embd_norm")
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


def _recurrent(spec: ModelSpec) -> Iterator[tuple[str, str, Undo | None]]:
    """(the model's name, the file's, what was done to it there), of layers that keep a state."""
    for index, layer in enumerate(spec.layers):
        if isinstance(layer.mixer, GatedDelta):
            for ours, theirs, undo in _delta(layer.mixer):
                yield f"layers.{index}.linear_attn.{ours}", f"blk.{index}.{theirs}", undo
        elif isinstance(layer.mixer, ShortConv):
            for part in ("in_proj", "conv", "out_proj"):
                yield f"layers.{index}.conv.{part}.weight", f"blk.{index}.shortconv.{part}.weight", None


def _delta(mixer: GatedDelta) -> Iterator[tuple[str, str, Undo | None]]:
    """(the model's name under linear_attn, the file's, what was done to it there).

    Heads that one key head serves are neighbours in the model, and as far apart as they can be in the file.
    """
    keys, served, width = mixer.num_key_heads, mixer.num_heads // mixer.num_key_heads, mixer.value_dim
    before = 2 * keys * mixer.key_dim

    def grouped(axis: int, first: int, width: int) -> Undo | None:
        def undo(values: NDArray[np.float32]) -> NDArray[np.float32]:
            values = np.moveaxis(values, axis, 0)
            heads = values[first:].reshape(served, keys, width, *values.shape[1:]).swapaxes(0, 1)
            values = np.concatenate((values[:first], heads.reshape(-1, *values.shape[1:])))
            return np.ascontiguousarray(np.moveaxis(values, 0, axis))

        return undo if served > 1 else None

    by_head = grouped(0, 0, 1)

    def logarithm(values: NDArray[np.float32]) -> NDArray[np.float32]:
        with np.errstate(all="ignore"):
            rates = np.log(-values)
        return rates if by_head is None else by_head(rates)

    qkv, z, share, step = mixer.projections
    yield f"{qkv}.weight", "attn_qkv.weight", grouped(0, before, width)
    yield f"{z}.weight", "attn_gate.weight", grouped(0, 0, width)
    yield f"{share}.weight", "ssm_beta.weight", by_head
    yield f"{step}.weight", "ssm_alpha.weight", by_head
    yield "conv1d.weight", "ssm_conv1d.weight", grouped(0, before, width)
    yield "dt_bias", "ssm_dt.bias", by_head
    yield "A_log", "ssm_a", logarithm
    yield f"{mixer.norm.name}.weight", "ssm_norm.weight", None
    yield "out_proj.weight", "ssm_out.weight", grouped(1, 0, width)


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
