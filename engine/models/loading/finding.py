"""Which stored tensors a checkpoint has for what a model asks for: by our names, with experts one by one, and whether
it has an output layer of its own.

Reads headers alone, but where two tensors may be the same. Used at start, on the loading thread.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from pathlib import Path

import torch

from engine.config import StartupError
from engine.models.gguf.names import name_tensors
from engine.models.gguf.reader import is_gguf, open_gguf
from engine.models.loading.checkpoint import FLOATS, QUANTISED, MappedFiles, StoredTensor, find_tensors
from engine.models.loading.schemes.base import Mismatch, Quantised
from engine.models.loading.schemes.resolve import Left, with_quantised
from engine.models.loading.schemes.shaped import Below, RowsOf, Transposed, as_stored
from engine.models.loading.weights import CHUNK_BYTES, OUTPUT, OUTPUT_WEIGHT, TORCH_DTYPES, view_of
from engine.models.parts.decoder import embedding_name
from engine.models.parts.source import PREFIX
from engine.models.spec import DenseAndExperts, Experts, ModelSpec

logger = logging.getLogger("oneloop.start")

# What Nemotron-H, Ling and GPT-NeoX call their embedding, and the latter its output layer.
_EMBEDDINGS = re.compile(r"^((?:model|backbone|gpt_neox)\.)(?:embeddings|word_embeddings|embed_in)\.weight$")
_OUTPUTS = re.compile(r"^embed_out\.")


def find_model_tensors(
    directory: Path, spec: ModelSpec, beside: tuple[str, str] | None = None
) -> dict[str, StoredTensor]:
    """The tensors of a directory, or of a GGUF file, by the names that a model asks for. Raises StartupError.

    beside: what the names of a layer begin with that stands beside the others, and what they begin with as a layer of
    the spec; its experts are found as theirs are.
    """
    if is_gguf(directory):
        return _gguf_tensors(directory, spec)

    def inside(found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        return {
            name: tensor for name, tensor in found.items() if not name.removeprefix(PREFIX).startswith(spec.outside)
        }

    # Before and after, for what is left out may stand under the prefix of a wrapper, too.
    found = inside(_modern(find_tensors(directory)))
    if spec.quantisation is not None:
        found, left = with_quantised(found, spec.quantisation)
        tell_unused(directory, left)
    found = inside(_with_our_names(found, spec))
    if beside is not None:
        found = _renamed(_with_single_experts(_renamed(found, *beside), spec), *beside[::-1])
    else:
        found = _with_single_experts(found, spec)
    for step in spec.projections:
        if step.name:
            module = find_tensors(directory / step.name.removesuffix(".linear"))
            found |= {step.name.removesuffix("linear") + name: tensor for name, tensor in module.items()}
    return found


def _renamed(tensors: dict[str, StoredTensor], old: str, new: str) -> dict[str, StoredTensor]:
    return {new + name.removeprefix(old) if name.startswith(old) else name: each for name, each in tensors.items()}


def tell_unused(directory: Path, left: Left) -> None:
    """One line for scales that a checkpoint has and that count for nothing here."""
    if left.cache:
        told = "%s: %d scales for keys and values in eight bits are not used: the cache needs none"
        logger.warning(told, directory, left.cache)


def _gguf_tensors(path: Path, spec: ModelSpec) -> dict[str, StoredTensor]:
    """What belongs to nothing keeps its name, for `check` to refuse."""
    model = open_gguf(path)
    named, others = name_tensors(spec, model)
    found = {}
    for name, each in named.items():
        tensor = each.tensor
        ours = name if name.startswith(f"{OUTPUT}.") else PREFIX + name
        place = (tensor.file, tensor.type, tensor.shape, tensor.begin, tensor.end)
        found[ours] = StoredTensor(*place, shift=each.shift, undo=each.undo)
    for name in others:
        tensor = model.tensors[name]
        found[name] = StoredTensor(tensor.file, tensor.type, tensor.shape, tensor.begin, tensor.end)
    return found


def _modern(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Names of TensorFlow's times: a LayerNorm's weight is its gamma, its bias is its beta."""
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    return {
        next((name.removesuffix(end) + new for end, new in old.items() if name.endswith(end)), name): tensor
        for name, tensor in tensors.items()
    }


def _with_single_experts(tensors: dict[str, StoredTensor], spec: ModelSpec) -> dict[str, StoredTensor]:
    """Every expert of a tensor that holds all those of a layer, as one of its own. Raises StartupError."""
    found = dict(tensors)
    for index, layer in enumerate(spec.layers):
        experts = layer.feed_forward
        if isinstance(experts, DenseAndExperts):
            experts = experts.experts
        if not isinstance(experts, Experts) or experts.stacked is None:
            continue
        count, inner, hidden = experts.num_experts, experts.intermediate_size, spec.hidden_size
        hidden = experts.latent_size or hidden
        inputs = (2 if experts.gated else 1) * inner // len(experts.gate_up)
        if experts.fused is not None:
            _split_fused(found, f"{PREFIX}layers.{index}.", experts, hidden)
        _join_halves(found, f"{PREFIX}layers.{index}.", experts)
        for template, out, into in (
            *((name, inputs, hidden) for name in experts.gate_up),
            (experts.down, hidden, inner),
        ):
            name = f"{PREFIX}layers.{index}.{template.replace('.{}', '')}"
            name = name if name in found else f"{name}.weight"
            tensor = found.get(name)
            if tensor is None:
                continue
            fits = [
                way for way, shape in (("rows", (out, into)), ("columns", (into, out))) if tensor.shape[1:] == shape
            ]
            if tensor.shape[:1] != (count,) or not fits:
                raise StartupError(
                    f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, config.json asks for "
                    f"{[count, out, into]} or {[count, into, out]}"
                )
            way = experts.stacked if experts.stacked in fits else fits[0]
            ours = f"{PREFIX}layers.{index}.{template}.weight"
            _split(found, name, ours, count, (out, into), transposed=way == "columns")
        for template in (*experts.gate_up, experts.down) if experts.bias else ():
            name = f"{PREFIX}layers.{index}.{template.replace('.{}', '')}_bias"
            bias = found.get(name)
            if bias is not None and bias.shape[:1] == (count,) and len(bias.shape) == 2:  # else `check` says it
                _split(found, name, f"{PREFIX}layers.{index}.{template}.bias", count, bias.shape[1:])
    return found


def _split_fused(found: dict[str, StoredTensor], prefix: str, experts: Experts, hidden: int) -> None:
    """Every expert's gate and up of the tensor that holds those of a layer, as tensors of their own; in place."""
    name = f"{prefix}{experts.fused}"
    name = name if name in found else f"{name}.weight"
    tensor = found.get(name)
    if tensor is None:
        return
    count, inner = experts.num_experts, experts.intermediate_size
    if tensor.shape != (count, 2 * inner, hidden):
        raise StartupError(
            f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, config.json asks for "
            f"{[count, 2 * inner, hidden]}"
        )
    del found[name]
    size = (tensor.end - tensor.begin) // (2 * count)
    for place, (number, template) in enumerate((n, each) for n in range(count) for each in experts.gate_up):
        if tensor.members and (whole := tensor.members[number].quantised) is not None:
            found[f"{prefix}{template.format(number)}.weight"] = as_stored(RowsOf(whole, place % 2 * inner, inner))
            continue
        begin = tensor.begin + place * size
        found[f"{prefix}{template.format(number)}.weight"] = StoredTensor(
            tensor.file, tensor.dtype, (inner, hidden), begin, begin + size
        )


def _join_halves(found: dict[str, StoredTensor], prefix: str, experts: Experts) -> None:
    """Gate above up, where a model asks for both as one and its quantised checkpoint has them apart; in place."""
    template = experts.gate_up[0]
    if len(experts.gate_up) != 1 or not experts.gated or experts.clamp is not None or "gate_up" not in template:
        return
    for number in range(experts.num_experts):
        name = prefix + template.format(number)
        halves = [f"{name.replace('gate_up', each)}.weight" for each in ("gate", "up")]
        above, below = (found[each].quantised if each in found else None for each in halves)
        if f"{name}.weight" in found or above is None or below is None:
            continue
        file = found[halves[0]].file
        try:
            found[f"{name}.weight"] = as_stored(Below(above, below))
        except Mismatch as problem:
            raise StartupError(f"{file}: tensor {halves[0]}: {problem}") from None
        for each in halves:
            del found[each]


def _split(
    found: dict[str, StoredTensor],
    name: str,
    template: str,
    count: int,
    shape: tuple[int, ...],
    *,
    transposed: bool = False,
) -> None:
    """Put `count` tensors of that shape in the place of the one that has them below one another."""
    tensor = found.pop(name)
    size = (tensor.end - tensor.begin) // count
    for number in range(count):
        if tensor.members and (whole := tensor.members[number].quantised) is not None:
            found[template.format(number)] = as_stored(Transposed(whole)) if transposed else tensor.members[number]
            continue
        begin = tensor.begin + number * size
        found[template.format(number)] = StoredTensor(
            tensor.file, tensor.dtype, shape, begin, begin + size, transposed=transposed
        )


def _with_our_names(tensors: dict[str, StoredTensor], spec: ModelSpec) -> dict[str, StoredTensor]:
    """A model saved without its output layer has no `model.` before its names (Qwen3-Embedding is one); one saved from
    inside of another object has that one's name before them. The embedding, or else the layers, show the prefix.
    """
    name = embedding_name(spec).removeprefix(PREFIX)
    tensors = {
        _OUTPUTS.sub(f"{OUTPUT}.", _EMBEDDINGS.sub(r"\g<1>" + name, key)): tensor for key, tensor in tensors.items()
    }
    found = {key.removesuffix(name) for key in tensors if f".{key}".endswith(f".{name}")}
    layer = re.escape(spec.layer_names).replace(r"\{\}", r"\d+")
    found = found or {match[1] for key in tensors if (match := re.match(rf"((?:.*?\.)?){layer}", key))}
    if len(found) != 1 or found == {PREFIX}:
        return tensors
    prefix = found.pop()
    outer = prefix.removesuffix(PREFIX) if prefix.endswith(f".{PREFIX}") else prefix

    def ours(key: str) -> str:
        if key.removeprefix(outer).startswith(f"{OUTPUT}."):
            return key.removeprefix(outer)
        return PREFIX + key.removeprefix(prefix) if key.startswith(prefix) else key

    renamed = {ours(key): tensor for key, tensor in tensors.items()}
    return renamed if len(renamed) == len(tensors) else tensors


def settle_output(spec: ModelSpec, tensors: dict[str, StoredTensor], directory: Path, dtype: torch.dtype) -> ModelSpec:
    """The spec as the checkpoint has it: tied where config.json says so and the checkpoint has no other output layer.

    As transformers decides: an output layer that differs from the embedding is used, with a warning; an embedding that
    is stored under the output layer's name alone is moved there, in `tensors`. Raises StartupError for a model that has
    no output layer although it is not tied.
    """
    if spec.headless:
        return spec
    own = embedding_name(spec)
    head, embedding = tensors.get(OUTPUT_WEIGHT), tensors.get(own)
    if not spec.tie_word_embeddings:
        if head is None and embedding is not None:
            raise StartupError(
                f"{directory}: tensor {OUTPUT_WEIGHT} is missing, and tie_word_embeddings in config.json is false "
                "(which an absent field may mean); true there uses the embedding in its place"
            )
        return spec
    if head is None:
        return spec
    if embedding is None:
        tensors[own] = tensors.pop(OUTPUT_WEIGHT)
        return spec
    if are_equal(head, embedding, dtype):
        return spec
    if "tie_word_embeddings" in spec.assumed:
        return dataclasses.replace(spec, tie_word_embeddings=False)
    logger.warning(
        "%s: tie_word_embeddings in config.json is true, but %s differs from the embedding: it is used, as in "
        "transformers; false there says so",
        directory,
        OUTPUT_WEIGHT,
    )
    return dataclasses.replace(spec, tie_word_embeddings=False)


def are_equal(first: StoredTensor, second: StoredTensor, dtype: torch.dtype) -> bool:
    """Whether two stored tensors are the same once they are loaded; read in chunks, up to the first difference."""
    if first.shape != second.shape:
        return False
    if first.quantised is not None and second.quantised is not None:
        return _same_parts(first.quantised, second.quantised)
    if QUANTISED in (first.dtype, second.dtype):
        return False
    if first.dtype not in FLOATS or second.dtype not in FLOATS:
        return first.dtype == second.dtype  # an error of its own, later
    count = math.prod(first.shape)
    step = CHUNK_BYTES // 8
    files = MappedFiles()
    try:
        for start in range(0, count, step):
            size = min(step, count - start)
            parts = [view_of(files, stored, TORCH_DTYPES[stored.dtype], start, size) for stored in (first, second)]
            equal = first.dtype == second.dtype and torch.equal(*(part.view(torch.uint8) for part in parts))
            equal = equal or torch.equal(*(part.to(dtype) for part in parts))
            del parts
            for stored in (first, second):
                item = TORCH_DTYPES[stored.dtype].itemsize
                files.release(stored.file, stored.begin + start * item, stored.begin + (start + size) * item)
            if not equal:
                return False
    finally:
        files.close()
    return True


def _same_parts(first: Quantised, second: Quantised) -> bool:
    """Whether two matrices are made of the same bytes."""
    if first.label != second.label or first.parts.keys() != second.parts.keys():
        return False
    files = MappedFiles()
    try:
        for name, one in first.parts.items():
            other = second.parts[name]
            pair = [memoryview(files.get(each.file, each.end))[each.begin : each.end] for each in (one, other)]
            equal = one.dtype == other.dtype and one.shape == other.shape and pair[0] == pair[1]
            for view in pair:
                view.release()
            if not equal:
                return False
    finally:
        files.close()
    return True
