"""From a spec and a directory to a model that runs. Called once at start by the device's start module."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from engine.config import StartupError
from engine.models.gguf.reader import is_gguf, open_gguf
from engine.models.loading.adapted import AdaptedLayers, AdaptedSource
from engine.models.loading.checkpoint import StoredTensor
from engine.models.loading.divided import divide
from engine.models.loading.finding import find_model_tensors, settle_output
from engine.models.loading.packed import PackedWeights
from engine.models.loading.slices import Group, SlicedWeights, plan_of
from engine.models.loading.weights import DummyWeights, Weights, recorded
from engine.models.parts.decoder import CausalLM
from engine.models.parts.streams import make_decoder
from engine.models.spec import ModelSpec
from engine.ops.packed import can_stay_packed

Progress = Callable[[int, int], None]

logger = logging.getLogger("oneloop.start")

_M_MMAP_THRESHOLD = -3  # malloc.h


def load_model(
    spec: ModelSpec,
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    max_model_len: int | None = None,
    deterministic: bool = False,
    quantisation: str | None = None,
    packed_input_bits: int = 16,
    max_adapters: int = 0,
    group: Group | None = None,
) -> CausalLM:
    """Build a model and fill it with weights.

    load_format: auto reads the safetensors of `directory`; dummy makes random weights from `seed` and reads
    nothing. progress(done, total): bytes, called after every few MB. max_model_len: tokens of context that will
    be used, which sizes the rope tables; None is `spec.context_length`. quantisation: one of schemes/rounding.py, to
    which weights of layers are rounded as they are read. packed_input_bits: 16, or 8 where packed layers have such
    products. max_adapters: LoRA adapters that may be in place at once.
    group: of the ranks, of which this is one.
    Peak memory is the weights, one layer's projection and a few MB. Raises StartupError.
    """
    try:
        return _load(
            spec,
            directory,
            dtype,
            device,
            load_format,
            seed,
            progress,
            max_model_len,
            deterministic,
            quantisation,
            packed_input_bits,
            max_adapters,
            group,
        )
    except (RuntimeError, MemoryError) as error:
        # torch has no class of its own for a failed allocation on the host, nor for a size beyond 64 bits.
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "alloc" in text or "out of memory" in text or "overflow" in text:
            raise StartupError(f"{directory}: no memory for the model: {text[:200]}") from error
        raise


def weight_bytes(spec: ModelSpec, directory: Path, dtype: torch.dtype) -> int:
    """What the weights will take, about: of a file of quantised ones what they take there. Raises StartupError."""
    wide = spec.num_parameters * dtype.itemsize
    if not is_gguf(directory) or not can_stay_packed(dtype, torch.device("cpu")):
        return wide
    return min(wide, sum(tensor.end - tensor.begin for tensor in open_gguf(directory).tensors.values()))


def _load(
    spec: ModelSpec,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str,
    seed: int,
    progress: Progress | None,
    max_model_len: int | None,
    deterministic: bool,
    quantisation: str | None,
    packed_input_bits: int,
    max_adapters: int,
    group: Group | None,
) -> CausalLM:
    if load_format not in ("auto", "safetensors", "dummy"):
        raise StartupError(f"load format {load_format!r} is not one of auto, safetensors, dummy")
    context = max_model_len or spec.context_length
    stored: dict[str, StoredTensor] = {}
    if load_format != "dummy":
        stored = find_model_tensors(directory, spec)
        if directory.is_dir() and (directory / "adapter_config.json").exists():
            logger.warning("%s: the adapter beside the model (adapter_config.json) is not applied", directory)
        spec = settle_output(spec, stored, directory, dtype)

    def record(recorder: Weights) -> AdaptedLayers | None:
        layers = AdaptedLayers(spec, max_adapters) if max_adapters and group is not None else None
        make_decoder(spec, recorder if layers is None else AdaptedSource(recorder, layers), context)
        return layers

    shapes, whole = recorded(record, dtype)
    weights: Weights
    if load_format == "dummy":
        weights = DummyWeights(dtype, device, seed, shapes, progress)
    else:
        weights = PackedWeights(dtype, device, directory, stored, shapes, progress, assumed=spec.assumed)
        weights.quantisation = quantisation
        weights.packed_input_bits = packed_input_bits
    weights.deterministic = deterministic
    with weights, _freed_memory_goes_back():
        if group is not None:
            plan = plan_of(spec, group.rank, group.size, expert_parallel=group.expert_parallel)
            if whole is None:
                return make_decoder(plan.spec, SlicedWeights(weights, plan, group, shapes), context)
            layers = AdaptedLayers(plan.spec, max_adapters)
            sliced = SlicedWeights(weights, plan, group, shapes, AdaptedSource(weights, layers))
            model = make_decoder(plan.spec, sliced, context)
            divide(whole, layers, plan, sliced.biases, is_first=group.rank == 0)
            model.adapted = layers
            return model
        if not max_adapters:
            return make_decoder(spec, weights, context)
        layers = AdaptedLayers(spec, max_adapters)
        model = make_decoder(spec, AdaptedSource(weights, layers), context)
        model.adapted = layers
        return model


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
