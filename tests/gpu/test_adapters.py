"""LoRA adapters on a GPU: the kernels, and whole steps against models with the factors merged in, on the CPU."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from engine.executor.cuda_device import CudaDevice
from engine.models.parts.decoder import CausalLM
from engine.ops import native
from tests.cuda.support import expected_tokens, serve
from tests.cuda.test_adapters import asked, merge, read, some_tensors
from tests.cuda.test_lora_kernels import *  # noqa: F403
from tests.executor.driver import GREEDY, Driver, decode, prefill
from tests.gpu.support import executor, load
from tests.gpu.test_gpu import ATTENTIONS, CPU, PROMPT, captured_logits, reference_logits, relative_error

pytestmark = pytest.mark.gpu
pytest.importorskip("safetensors", reason="adapters are written by it")


def merged(architecture: str, factors: dict[str, torch.Tensor]) -> CausalLM:
    with native.disabled():  # its weights are to lie as they are
        return merge(load(architecture, torch.float32, CPU, 2), factors)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3_5ForCausalLM"])
@pytest.mark.parametrize(("dtype", "attention"), [("float32", "torch"), *(("bfloat16", a) for a in ATTENTIONS)])
def test_merged_weights_say_the_same(
    layer: CudaDevice, architecture: str, dtype: str, attention: str, tmp_path: Path
) -> None:
    """Rows of two adapters and of none in every step: prompts together, then decode steps."""
    kind = getattr(torch, dtype)
    model = load(architecture, kind, layer.device, 2)
    tensors = [some_tensors(model, number) for number in (1, 2)]
    found = captured_logits(model)
    engine = executor(layer, model, kind, attention=attention, cuda_graph="off")
    given = [each.weights for each in read(engine, tmp_path, tensors)]
    driver, slots = Driver(engine), (1, 2, 3)

    async def run() -> list[list[int]]:
        pages = {slot: list(range(8 * slot, 8 * slot + 8)) for slot in slots}
        first = [prefill(slot, PROMPT) for slot in slots]
        tokens = [await driver.wait(driver.launch(first, pages, dict.fromkeys(slots, GREEDY), adapters=given))]
        for position in range(len(PROMPT), len(PROMPT) + 12):
            tokens += [await driver.run([decode(slot, position) for slot in slots])]
        return tokens

    tokens = asyncio.run(run())
    engine.close()
    ours = torch.stack([each[: len(slots)] for each in found])
    for row, factors in enumerate([*tensors, {}]):
        said = [each[row] for each in tokens]
        reference = merged(architecture, factors)
        expected = reference_logits(reference, PROMPT + said)[len(PROMPT) - 1 : -1]
        error = relative_error(ours[:, row, : expected.shape[1]], expected)
        assert error < (1e-3 if dtype == "float32" else 5e-2), f"adapter {row + 1} is off by {error:.1e}"
        if dtype == "float32":
            assert said == expected.argmax(-1).tolist()


@pytest.mark.parametrize("graph", ["lazy", "off"])
def test_through_the_engine(layer: CudaDevice, graph: str, tmp_path: Path) -> None:
    """More adapters than there is room for, which come and go while steps are in flight."""
    model = load("LlamaForCausalLM", torch.float32, layer.device, 2)
    tensors = [some_tensors(model, number) for number in (1, 2, 3)]
    engine = executor(layer, model, torch.float32, attention="torch", cuda_graph=graph)
    requests = asked(read(engine, tmp_path, tensors))
    found = asyncio.run(serve(engine, requests))
    models = [merged("LlamaForCausalLM", each) for each in ({}, *tensors)]
    for request, tokens in zip(requests, found, strict=True):
        assert tokens == expected_tokens(models[request.adapter.version if request.adapter else 0], request)
