"""A tiny model, its reference without pages or steps, and CUDA executors on the fake device around it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig, SchedulerOptions, SpeculationOptions, StreamOptions
from engine.engine import Engine
from engine.executor.cuda import CUDAExecutor, CudaHandle, Side
from engine.executor.cuda_adapters import DeviceAdapters
from engine.executor.cuda_drafter import Drafts
from engine.forward import SAMPLING_DTYPE, ForwardInput, Limits
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.ops import native
from engine.ops.attention import flashinfer, flashinfer_latent
from engine.ops.attention.device import DeviceAttention
from engine.ops.attention.sequence import attend_sequence
from engine.ops.rope import apply_rope
from engine.ops.sampling.sampler import sample
from engine.ops.state import StatePlan, States
from engine.request import Pooling, Request, SamplingParams
from engine.speculation.base import Proposer
from engine.stream import Delta
from tests.cuda.fake_device import FakeDevice
from tests.cuda.fake_flashinfer import FakeFlashInfer, attend
from tests.sim.workload import Runs

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Qwen 2 has windows on some layers, and Mistral the same one on all.
WINDOWED = {
    **TINY,
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 1,
}
# Two kinds of windows, in as many memory groups: sevenths of a text each.
GROUPED = {
    **TINY,
    "num_hidden_layers": 4,
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 1,
}
# A cache of latents, and layers that see blocks of the text.
LATENT = {
    **TINY,
    "architectures": ["DeepseekV3ForCausalLM"],
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "first_k_dense_replace": 2,
}
# Two kinds of recurrent states and attention between them, or beside them.
HYBRID = {
    **TINY,
    "num_hidden_layers": 3,
    "architectures": ["Qwen3_5ForCausalLM"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
BESIDE = {
    **TINY,
    "architectures": ["FalconH1ForCausalLM"],
    "mamba_d_ssm": 80,
    "mamba_n_heads": 8,
    "mamba_d_head": 10,
    "mamba_n_groups": 2,
    "mamba_d_state": 20,
}
CHUNKED = {
    **TINY,
    "architectures": ["Llama4ForCausalLM"],
    "intermediate_size_mlp": 40,
    "moe_layers": [],
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 7,
    "floor_scale": 9,
}


@functools.cache
def tiny_model(config: str = json.dumps(TINY), max_model_len: int = 256, max_adapters: int = 0) -> CausalLM:
    """Random weights from a fixed seed, in float32, held plainly so that every operation is torch's."""
    with tempfile.TemporaryDirectory() as folder, native.disabled():
        directory = Path(folder)
        (directory / "config.json").write_text(config)
        return load_model(
            read_spec(directory),
            directory,
            dtype=torch.float32,
            device=torch.device("cpu"),
            load_format="dummy",
            seed=3,
            max_model_len=max_model_len,
            max_adapters=max_adapters,
        )


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def tiny_directory() -> Path:
    directory = Path(_folder().name)
    (directory / "config.json").write_text(json.dumps(TINY))
    return directory


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class DenseAttention:
    """One whole sequence of so many tokens at once: no pages, no cache."""

    recordings = None

    def __init__(self, model: CausalLM, num_tokens: int) -> None:
        self.spec = model.attention_spec
        self.states: States | None = None
        if model.config.has_state:
            one = Limits(1, 1, 1, 1, 1, 1, num_snapshots=0)
            self.states = States(model.config.states, one, model.linears[0].dtype, torch.device("cpu"))
            self.states.plan = StatePlan(np.ones(1, np.int32), np.array([0, num_tokens], np.int32), 0)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def plan(self, metadata: object) -> None:
        pass

    def forward(
        self,
        layer: int,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cos_sin: Tensor | None = None,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        shape = self.spec.layers[layer]
        assert shape is not None
        if cos_sin is not None:
            apply_rope(q, k, cos_sin, torch.arange(len(q)))
        if k is not None:
            self.kept[layer] = k, k[..., : shape.value_dim] if v is None else v
        k, v = self.kept[layer if shape.reads is None else shape.reads]
        if not shape.is_plain:
            return attend_sequence(shape, q, k, v, sinks).flatten(1)
        out = attend(q, k, v, shape.scale, -1 if shape.window is None else shape.window - 1, shape.softcap, True)
        return out.flatten(1).to(q.dtype)


def sampling_row(params: SamplingParams, min_length: int = 0) -> np.ndarray[Any, Any]:
    row = np.zeros(1, SAMPLING_DTYPE)
    row["temperature"], row["top_p"], row["min_p"] = params.temperature, params.top_p, params.min_p
    row["top_k"], row["seed"], row["min_length"] = params.top_k, params.seed or 0, min_length
    row["num_stop_ids"] = len(params.stop_token_ids)
    row["stop_ids"] = -1
    row["stop_ids"][0, : len(params.stop_token_ids)] = params.stop_token_ids
    return row


def _reference_hidden(model: CausalLM, context: Sequence[int]) -> Tensor:
    return model.forward(torch.tensor(context), torch.arange(len(context)), DenseAttention(model, len(context)))


@functools.cache
def _reference_logits(model: CausalLM, context: tuple[int, ...]) -> Tensor:
    with torch.inference_mode(), native.disabled():
        return model.logits(_reference_hidden(model, context)[-1:])


def reference_next(model: CausalLM, context: list[int], params: SamplingParams, min_length: int = 0) -> int:
    """The token after `context`."""
    with one_thread():
        logits = _reference_logits(model, tuple(context)).clone()
        return int(sample(logits, sampling_row(params, min_length), np.array([len(context)], np.int32))[0])


@contextlib.contextmanager
def any_shape() -> Iterator[None]:
    """Let the FlashInfer backend take float32, small heads and small pages, for exact comparisons."""
    with (
        mock.patch.object(flashinfer, "DTYPES", (torch.float32, torch.bfloat16, torch.float16)),
        mock.patch.object(flashinfer, "HEAD_DIMS", (8, 10, 16, 64, 128, 256)),
        mock.patch.object(flashinfer, "XQA_PAGE_SIZES", (4, 16)),
        mock.patch.object(flashinfer, "WORKSPACE_BYTES", 1024),
        mock.patch.object(flashinfer, "XQA_WORKSPACE_BYTES", 1024),
        mock.patch.object(flashinfer_latent, "DTYPES", (torch.float32, torch.bfloat16, torch.float16)),
        mock.patch.object(flashinfer_latent, "LATENT_DIMS", (12, 128, 256, 512)),
        mock.patch.object(flashinfer_latent, "KEY_DIM", 4),
        mock.patch.object(flashinfer_latent, "WORKSPACE_BYTES", 1024),
    ):
        yield


def make_attention(kind: str, model: CausalLM, limits: Limits, device: FakeDevice) -> DeviceAttention:
    """kind: torch, xqa or wrapper (FlashInfer's decode wrapper, which plans every step)."""
    options: dict[str, Any] = {
        "num_pages": limits.num_pages,
        "page_size": limits.page_size,
        "groups": limits.groups,
        "dtype": torch.float32,
        "device": device.device,
    }
    if kind == "torch":
        return DeviceAttention(model.attention_spec, **options)
    with any_shape():
        module = FakeFlashInfer(device, strict=False)
        if model.attention_spec.latent is not None:
            return flashinfer_latent.Backend(model.attention_spec, module=module, **options)
        return flashinfer.Backend(model.attention_spec, module=module, decode=kind, **options)


def make_executor(
    limits: Limits,
    *,
    device: FakeDevice | None = None,
    attention: str = "torch",
    cuda_graph: str = "lazy",
    model: CausalLM | None = None,
    kind: type[CUDAExecutor] = CUDAExecutor,
    proposer: Proposer | None = None,
    drafts: Callable[[Limits, FakeDevice], Drafts] | None = None,
    load: Callable[[Path | None], CausalLM] | None = None,
    room_mib: float | None = None,
) -> CUDAExecutor:
    """A model that was loaded with places for adapters has room for some of rank 8 and below."""
    model, device = model or tiny_model(), device or FakeDevice()
    layer, adapters = make_attention(attention, model, limits, device), None
    if model.adapted is not None:
        with device.may_block():
            adapters = DeviceAdapters(model, device, 8, limits.max_num_batched_tokens, room_mib)
        limits = dataclasses.replace(limits, max_adapters=adapters.capacity)
    options: dict[str, Any] = {"load": load or read_tiny_model, "proposer": proposer, "adapters": adapters}
    if drafts is not None:
        options["drafts"] = drafts(limits, device)
    return kind(model, limits, device, layer, cuda_graph=cuda_graph, **options)


def read_tiny_model(directory: Path | None) -> CausalLM:
    """A fresh tiny_model; its weights come from a seed, so that of the directory only config.json is looked at."""
    if directory is not None:
        read_spec(directory)
    return tiny_model.__wrapped__()


class CudaAdapter:
    """ExecutorAdapter of tests/executor/driver.py. Every executor gets a device of another seed and temper."""

    vocab_size = TINY["vocab_size"]

    def __init__(self, attention: str = "torch", cuda_graph: str = "lazy") -> None:
        self.attention = attention
        self.cuda_graph = cuda_graph
        self._seed = 0

    def make(self, limits: Limits, fail_at: frozenset[int] = frozenset()) -> CUDAExecutor:
        self._seed += 1
        device = FakeDevice(self._seed, eagerness=(0.0, 0.3, 0.9)[self._seed % 3])
        executor = make_executor(limits, device=device, attention=self.attention, cuda_graph=self.cuda_graph)
        return fail_steps(executor, fail_at)

    def checkpoint(self) -> Path:
        return tiny_directory()

    def reference_next_token(self, context: list[int], sampling: SamplingParams, min_length: int = 0) -> int:
        return reference_next(tiny_model(), context, sampling, min_length)

    def reference_vector(self, prompt: list[int], pooling: Pooling) -> list[float]:
        with one_thread(), torch.inference_mode(), native.disabled():
            hidden = _reference_hidden(tiny_model(), prompt)
            if pooling.kind == "logprobs":
                shares = torch.log_softmax(tiny_model().logits(hidden[-1:])[0], -1)
                return shares[list(pooling.token_ids)].tolist()
            return (hidden[-1] if pooling.kind == "last" else hidden.mean(dim=0)).tolist()


def fail_steps(executor: CUDAExecutor, steps: frozenset[int]) -> CUDAExecutor:
    """Let steps of these numbers run out of device memory in their forward."""
    launch = executor._launch

    def failing(forward_input: ForwardInput, side: Side, handle: CudaHandle) -> None:
        if forward_input.step in steps:
            device = executor.layer
            assert isinstance(device, FakeDevice)
            # The diffs, if there are any, are a launch of their own and come first.
            diffs = forward_input.num_table_diffs or forward_input.num_sampling_diffs
            device.launches_until_failure = 2 if diffs else 1
            # A capture that fails is no failed step: none begins in this one.
            executor.pieces._seen.clear()
        launch(forward_input, side, handle)

    executor._launch = failing  # type: ignore[method-assign]
    return executor


CUDA_ADAPTERS: dict[str, Callable[[], CudaAdapter]] = {
    "cuda": CudaAdapter,
    "cuda-eager": functools.partial(CudaAdapter, cuda_graph="off"),
    "cuda-xqa": functools.partial(CudaAdapter, "xqa"),
    "cuda-plan": functools.partial(CudaAdapter, "wrapper"),
}


# ---- whole engines

NO_DRAFTS = SpeculationOptions()
ALWAYS = SpeculationOptions(
    method="ngram", num_draft_tokens=4, prompt_lookup_min=1, prompt_lookup_max=3, adaptive=False
)

SMALL = Limits(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64, page_size=4, num_pages=40, vocab_size=101)


def requests_of(seed: int, count: int = 8) -> list[Request]:
    """Prompts that share prefixes, greedy and drawn, filtered and not."""
    random = Random(f"requests {seed}")
    system = [random.randrange(3, 100) for _ in range(9)]
    requests = []
    for number in range(count):
        prompt = (system if random.random() < 0.5 else []) + [
            random.randrange(3, 100) for _ in range(random.randint(1, 20))
        ]
        hot = random.random() < 0.5
        params = SamplingParams(
            max_tokens=random.randint(1, 12),
            temperature=random.choice([0.5, 1.0, 2.0]) if hot else 0.0,
            top_k=random.choice([0, 5]) if hot else 0,
            top_p=random.choice([1.0, 0.8]) if hot else 1.0,
            seed=random.randrange(2**40),
            ignore_eos=True,
        )
        requests.append(Request(f"r{number}", prompt, params))
    return requests


def expected_tokens(model: CausalLM, request: Request) -> list[int]:
    """What a request must bring, from its tokens alone."""
    context = list(request.prompt_token_ids)
    runs = request.constraint
    for place in range(request.sampling.max_tokens or 0):
        forced = runs.token_at(place) if isinstance(runs, Runs) else None
        context.append(reference_next(model, context, request.sampling) if forced is None else forced)
    return context[len(request.prompt_token_ids) :]


async def serve(
    executor: CUDAExecutor,
    requests: list[Request],
    *,
    overlap: bool = True,
    speculation: SpeculationOptions = NO_DRAFTS,
) -> list[list[int]]:
    """The tokens of every request, through the real engine. Raises what ended the engine."""
    return [delta.token_ids for delta in await answers_of(executor, requests, overlap=overlap, speculation=speculation)]


async def answers_of(
    executor: CUDAExecutor,
    requests: list[Request],
    *,
    overlap: bool = True,
    speculation: SpeculationOptions = NO_DRAFTS,
) -> list[Delta]:
    """The whole answers, each in one piece."""
    scheduler, stream = SchedulerOptions(overlap=overlap), StreamOptions(flush_interval_ms=0.0)
    config = EngineConfig(scheduler=scheduler, stream=stream, speculation=speculation)
    engine = Engine(config, executor, None)
    loop_task = asyncio.create_task(engine.run())

    async def answer_to(request: Request) -> Delta:
        whole = Delta()
        async with engine.submit(request) as stream:
            async for delta in stream:
                whole.merge(delta)
        return whole

    asking = asyncio.gather(*(answer_to(request) for request in requests))
    try:
        await asyncio.wait([asking, loop_task], return_when=asyncio.FIRST_COMPLETED)
        if loop_task.done():
            await loop_task
        return await asking
    finally:
        loop_task.cancel()
        asking.cancel()
        await asyncio.gather(asking, loop_task, return_exceptions=True)
        executor.close()
