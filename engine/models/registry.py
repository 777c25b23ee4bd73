"""Which architectures there are, and how one is loaded.

A new model is one file with `read_config(fields) -> ModelConfig` and the DEFAULTS of its class, one line in FAMILIES
and one in MODEL_TYPES. Called once at start by the composition root. torch is imported only when weights are loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from engine.clock import RangeOf
from engine.config import StartupError
from engine.models.config import ModelConfig
from engine.models.fields import Fields, show

if TYPE_CHECKING:
    import torch

    from engine.ops.attention.base import AttentionBackend, AttentionSpec
    from engine.ops.linear import Linear

# `architectures` of config.json -> the module in this package that reads it.
FAMILIES = {
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Glm4ForCausalLM": "glm4",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}

# `model_type` of config.json -> the class, as transformers' AutoModelForCausalLM has it.
MODEL_TYPES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral": "MistralForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# Types of classes for images and text -> what their text part is, where `text_config` has no type of its own.
_TEXT_PARTS = {
    "gemma3": "gemma3_text",
    "llava": "llama",
    "llava_next": "llama",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_vl_moe_text": "qwen3_moe",
    "smolvlm": "llama",
}

Progress = Callable[[int, int], None]

logger = logging.getLogger("oneloop.start")

_M_MMAP_THRESHOLD = -3  # malloc.h


class CausalLM(Protocol):
    """A loaded model. Not thread safe: one thread runs it."""

    config: ModelConfig
    attention_spec: AttentionSpec
    linears: list[Linear]

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend) -> torch.Tensor:
        """Integers [T] and [T] -> hidden states [T, hidden_size] after the final norm, in the model's dtype."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [R, hidden_size] -> float32 [R, vocab_size]. Never called where config.headless is set."""
        ...

    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same in the model's dtype where nothing is done to them after the product: for who reads them once."""
        ...

    def decode(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend) -> torch.Tensor:
        """`forward`, and `raw_logits` of every token."""
        ...

    def name_layers(self, range_of: RangeOf) -> None:
        """Put every layer's parts into named ranges of a profiler's time line from now on."""
        ...


def read_config(fields: Fields) -> ModelConfig:
    """Let the family of the file's class read it; Qwen3Model is a Qwen3ForCausalLM without its output layer.

    Raises StartupError.
    """
    architecture = _architecture_of(fields)
    headless = architecture.endswith("Model")
    _refuse_unknown(fields)
    module = importlib.import_module(f"engine.models.{FAMILIES[_with_head(architecture)]}")
    config = module.read_config(fields.over(module.DEFAULTS))
    assert isinstance(config, ModelConfig)
    return dataclasses.replace(config, architecture=architecture, headless=headless)


def _with_head(architecture: str) -> str:
    """LlamaModel -> LlamaForCausalLM."""
    return architecture.removesuffix("Model") + "ForCausalLM" if architecture.endswith("Model") else architecture


def _architecture_of(fields: Fields) -> str:
    """The class, as transformers finds it: `model_type` says which; `architectures` where there is no known type.

    A `...Model` in `architectures` is the class without its output layer. Raises StartupError.
    """
    given, kind = fields.raw("architectures"), fields.raw("model_type")
    names = [] if given is None else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        fields.fail("architectures", f"must be a list with the name of the model class, not {show(given)}")
    if kind is not None and not isinstance(kind, str):
        fields.fail("model_type", f"must be text, not {show(kind)}")
    known = [name for name in names if _with_head(name) in FAMILIES]
    by_type = MODEL_TYPES.get(kind or "")
    if by_type is None:
        if known:
            return known[0]
        if not names and kind is None:
            fields.fail("architectures", "and model_type are missing: one of them must name the model's class")
        _refuse(fields, names[0] if names else str(kind))
    for name in (by_type, by_type.removesuffix("ForCausalLM") + "Model"):
        if name in names:
            return name
    if names and not known and not names[0].endswith(("ForCausalLM", "LMHeadModel")):
        _refuse(fields, names[0])
    if names:
        logger.warning(
            "%s: architectures says %s, but model_type %s is a %s and counts, as in transformers",
            fields.path,
            show(names[0]),
            show(kind),
            by_type,
        )
    return by_type


def _refuse(fields: Fields, name: str) -> NoReturn:
    """The sentence for a class that is not served; it names the class of a text part that would be."""
    text = fields.raw("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    outer = _TEXT_PARTS.get(str(fields.raw("model_type")))
    part = MODEL_TYPES.get(_TEXT_PARTS.get(str(inner), str(inner))) or MODEL_TYPES.get(str(outer))
    told = f"{name[:100]} is not supported; "
    if part is not None:
        told += f"its text part is a {part}, which is served from a directory of that class alone; "
    field = "architectures" if fields.has("architectures") else "model_type"
    fields.fail(field, f"{told}supported are: {', '.join(sorted(FAMILIES))}")


def _refuse_unknown(fields: Fields) -> None:
    """Refuse what changes the answer of any family and is not done here."""
    for name in ("quantization_config", "compression_config"):
        if fields.has(name):
            scheme = fields.raw(name)
            if isinstance(scheme, dict):
                parts = (scheme.get("quant_method"), scheme.get("quant_algo"), scheme.get("format"))
                scheme = ", ".join(str(part)[:40] for part in parts if part) or "unknown"
            fields.fail(name, f"({show(scheme)}) is not supported; use an unquantized checkpoint")
    # In transformers null is as good as false here.
    if fields.mentions("is_causal") and not fields.raw("is_causal"):
        shown = show(fields.raw("is_causal"))
        fields.fail("is_causal", f"is {shown}: attention to later tokens (bidirectional) is not supported")
    if fields.raw("use_bidirectional_attention"):
        fields.fail("use_bidirectional_attention", "is not supported")
    if fields.raw("per_layer_config"):
        fields.fail("per_layer_config", "is not supported: layers of different sizes")


def load_model(
    model_config: ModelConfig,
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    max_model_len: int | None = None,
    deterministic: bool = False,
) -> CausalLM:
    """Build a model and fill it with weights.

    load_format: auto reads the safetensors of `directory`; dummy makes random weights from `seed` and reads
    nothing. progress(done, total): bytes, called after every few MB. max_model_len: tokens of context that will
    be used, which sizes the rope tables; None is `model_config.context_length`.
    Peak memory is the weights, one layer's projection and a few MB. Raises StartupError.
    """
    try:
        return _load(model_config, directory, dtype, device, load_format, seed, progress, max_model_len, deterministic)
    except (RuntimeError, MemoryError) as error:
        # torch has no class of its own for a failed allocation on the host, nor for a size beyond 64 bits.
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "alloc" in text or "out of memory" in text or "overflow" in text:
            raise StartupError(f"{directory}: no memory for the model: {text[:200]}") from error
        raise


def _load(
    model_config: ModelConfig,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str,
    seed: int,
    progress: Progress | None,
    max_model_len: int | None,
    deterministic: bool,
) -> CausalLM:
    from engine.models.decoder import Decoder
    from engine.models.weights import (
        CheckpointWeights,
        DummyWeights,
        ShapeRecorder,
        StoredTensor,
        Weights,
        find_model_tensors,
        settle_output,
    )

    if load_format not in ("auto", "safetensors", "dummy"):
        raise StartupError(f"load format {load_format!r} is not one of auto, safetensors, dummy")
    context = max_model_len or model_config.context_length
    stored: dict[str, StoredTensor] = {}
    if load_format != "dummy":
        stored = find_model_tensors(directory)
        if (directory / "adapter_config.json").exists():
            logger.warning("%s: the adapter beside the model (adapter_config.json) is not applied", directory)
        model_config = settle_output(model_config, stored, directory, dtype)
    recorder = ShapeRecorder(dtype)
    Decoder(model_config, recorder, context)
    weights: Weights
    if load_format == "dummy":
        weights = DummyWeights(dtype, device, seed, recorder.shapes, progress)
    else:
        weights = CheckpointWeights(
            dtype, device, directory, stored, recorder.shapes, progress, assumed=model_config.assumed
        )
    weights.deterministic = deterministic
    with weights, _freed_memory_goes_back():
        return Decoder(model_config, weights, context)


@contextlib.contextmanager
def _freed_memory_goes_back() -> Iterator[None]:
    """Keep glibc from holding on to what loading frees.

    Its threshold for memory that is given back at once rises with each large block that is freed, so that later
    temporaries of that size stay in the heap: up to a tenth of the weights of a small model, now and then. Afterwards
    it stands at its highest (32 MB), where a step's activations are reused without new page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
