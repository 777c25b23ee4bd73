"""CPUExecutor in the contract suite: a tiny Llama, and transformers with the plain sampler as its reference."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.executor.cpu import CPUExecutor
from engine.forward import SAMPLING_DTYPE, ForwardError, Limits
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.ops.attention.base import AttentionBackend
from engine.ops.sampling.sampler import torch_sample
from engine.request import Pooling, SamplingParams
from tests.executor.driver import write_sampling_row
from tests.models.support import make_checkpoint


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def _models() -> tuple[CausalLM, Any]:
    """The model under test and the same weights in transformers."""
    torch.set_num_threads(1)
    directory = Path(_folder().name)
    reference = make_checkpoint(directory, "Llama")
    return _load(directory), reference


def _load(directory: Path | None) -> CausalLM:
    directory = directory or Path(_folder().name)
    config = read_spec(directory)
    return load_model(config, directory, dtype=torch.float32, device=torch.device("cpu"))


class _Failing:
    """A model whose n-th forward fails: of an executor that runs one forward a step, step n."""

    def __init__(self, model: CausalLM, fail_at: frozenset[int]) -> None:
        self._model = model
        self._fail_at = fail_at
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, *types: Tensor | None
    ) -> Tensor:
        self._calls += 1
        if self._calls - 1 in self._fail_at:
            raise ForwardError(f"forward {self._calls - 1} was told to fail")
        return self._model.forward(token_ids, positions, attention, *types)


class CPUAdapter:
    """engine/executor/cpu.py."""

    vocab_size = 211

    def make(self, limits: Limits, fail_at: frozenset[int] = frozenset()) -> CPUExecutor:
        return CPUExecutor(_Failing(_models()[0], fail_at), limits, dtype=torch.float32, load=_load)

    def checkpoint(self) -> Path:
        return Path(_folder().name)

    def reference_next_token(self, context: list[int], sampling: SamplingParams, min_length: int = 0) -> int:
        with torch.inference_mode():
            logits = _models()[1](torch.tensor([context])).logits[:, -1].float()
            row = np.zeros(1, SAMPLING_DTYPE)
            write_sampling_row(row[0], sampling, min_length)
            return int(torch_sample(logits, row, np.array([len(context)], np.int32))[0])

    def reference_vector(self, prompt: list[int], pooling: Pooling) -> list[float]:
        reference = _models()[1]
        with torch.inference_mode():
            if pooling.kind == "logprobs":
                logits = reference(torch.tensor([prompt])).logits[0, -1].float()
                return torch.log_softmax(logits, -1)[list(pooling.token_ids)].tolist()
            hidden = reference.model(torch.tensor([prompt])).last_hidden_state[0]
            return (hidden[-1] if pooling.kind == "last" else hidden.mean(dim=0)).tolist()
