"""Which architectures there are, and how one is loaded.

A new model is one file with `read_config(fields) -> ModelConfig` and one line in FAMILIES. Called once at start
by the composition root. torch is imported only when weights are loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.clock import RangeOf
from engine.config import StartupError
from engine.models.config import Fields, ModelConfig, architecture_of

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

Progress = Callable[[int, int], None]

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

    def name_layers(self, range_of: RangeOf) -> None:
        """Put every layer's parts into named ranges of a profiler's time line from now on."""
        ...


def read_config(fields: Fields) -> ModelConfig:
    """Let the family of the file's architecture read it; Qwen3Model is a Qwen3ForCausalLM without its output layer.

    Raises StartupError.
    """
    architecture = architecture_of(fields)
    headless = architecture.endswith("Model")
    module = FAMILIES.get(architecture.removesuffix("Model") + "ForCausalLM" if headless else architecture)
    if module is None:
        supported = ", ".join(sorted(FAMILIES))
        fields.fail("architectures", f"{architecture} is not supported; supported are: {supported}")
    config = importlib.import_module(f"engine.models.{module}").read_config(fields)
    assert isinstance(config, ModelConfig)
    return dataclasses.replace(config, headless=headless)


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
    from engine.models.weights import CheckpointWeights, DummyWeights, ShapeRecorder, Weights

    context = max_model_len or model_config.context_length
    recorder = ShapeRecorder(dtype)
    Decoder(model_config, recorder, context)
    weights: Weights
    if load_format == "dummy":
        weights = DummyWeights(dtype, device, seed, recorder.shapes, progress)
    elif load_format in ("auto", "safetensors"):
        weights = CheckpointWeights(dtype, device, directory, recorder.shapes, progress)
    else:
        raise StartupError(f"load format {load_format!r} is not one of auto, safetensors, dummy")
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
