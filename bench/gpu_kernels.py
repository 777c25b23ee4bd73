"""Single kernels of a decode step on a GPU against what its memory and its tensor cores can do; a part of bench.gpu."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu_report import Report
from engine.executor.cuda_device import DeviceLayer

# Weights [out, in] of Llama-3.2-1B and, the last two, Llama-3.1-8B.
PRODUCTS = ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048), (6144, 4096), (28672, 4096))
# Query heads, KV heads and head_dim of Llama-3.2-1B, Llama-3.1-8B and Qwen3-30B-A3B.
HEADS = ((32, 8, 64), (32, 8, 128), (32, 4, 128))
# Rows of decode attention that are timed, and tokens of each.
ATTENDING, ATTENDED = (1, 8, 16, 64, 256), 1024
# Of Qwen3-30B-A3B: hidden size, an expert's, experts, chosen of them.
EXPERTS = (2048, 768, 128, 8)


def timed(layer: DeviceLayer, stream: Any, work: Callable[[], object], count: int = 20) -> float:
    """Microseconds of one call among `count` in a graph. Raises RuntimeError where it cannot be captured."""

    def many() -> None:
        for _ in range(count):
            work()

    layer.synchronize_all()  # the inputs were made on another stream
    with layer.on(stream):
        work()
        return 1e6 * layer.time(layer.capture(many)) / count


def in_turn(out: int, inside: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Several matrices in turn, so that they are read from memory and not from the L2 cache."""
    copies = min(20, 1 + 2**28 // (2 * out * inside))
    return itertools.cycle([torch.randn(out, inside, device=device).bfloat16() for _ in range(copies)])


def multiplication(vector: torch.Tensor, matrices: Iterator[torch.Tensor]) -> Callable[[], object]:
    """A product with the next matrix at every call."""
    return lambda: torch.nn.functional.linear(vector, next(matrices))


def bench_products(report: Report, layer: DeviceLayer, bandwidth: float) -> None:
    """Products of 1 to 4 rows, cuBLAS beside the best of our blocks."""
    from engine.ops.skinny import BLOCKS, skinny_product

    stream = layer.stream()
    for (out, inside), rows in itertools.product(PRODUCTS, (1, 4)):
        if not report.has_time(5):
            return
        x = torch.randn(rows, inside, device=layer.device).bfloat16()
        matrices = in_turn(out, inside, layer.device)
        floor = 1e6 * 2.0 * out * inside / bandwidth

        def ours(blocks: tuple[int, int, int]) -> Callable[[], object]:
            return lambda: skinny_product(x, next(matrices), None, blocks)  # noqa: B023

        found = {"cuBLAS": timed(layer, stream, multiplication(x, matrices))}
        found["ours"] = min(timed(layer, stream, ours(blocks)) for blocks in BLOCKS)
        for name, took in found.items():
            report.add(f"product {out}x{inside}, {name}", took, "us", batch=rows, floor_ratio=floor / took)


def bench_attention(report: Report, layer: DeviceLayer, bandwidth: float, module: Any = None) -> None:
    """Decode attention of one of several layers: each way that there is; the floor reads all keys and values.

    module: what stands in for `flashinfer`.
    """
    from engine.executor.cuda_attention import LAYERS, Trial
    from engine.ops.attention.base import AttentionSpec
    from engine.ops.attention.flashinfer import Backend

    names = {"xqa": "XQA", "ours": "ours", "wrapper": "FlashInfer's wrapper"}
    stream = layer.stream()
    for heads, kv_heads, dim in HEADS:
        spec = AttentionSpec.alike(LAYERS, heads, kv_heads, dim, dim**-0.5)
        pages = max(ATTENDING) * -(-ATTENDED // 16) + 1
        memory: dict[str, Any] = {"num_pages": pages, "page_size": 16, "device": layer.device}
        with layer.on(stream):
            backend = Backend(spec, dtype=torch.bfloat16, module=module, **memory)
            for pool in backend.buffers:
                pool.normal_()
            backend.settle(layer.synchronize_all)
            for rows in ATTENDING:
                if not report.has_time(5):
                    return
                trial = Trial(backend, None, rows, lambda count: count, ATTENDED, layer)
                trial.q.normal_()
                floor = rows * ATTENDED * kv_heads * dim * 4 / bandwidth
                for way in backend.ways(None):
                    what = f"attention {heads}/{kv_heads}x{dim}, {names[way]}"
                    try:
                        took = trial.seconds(backend.layers_of(None), way) / LAYERS
                    except RuntimeError as error:
                        print(f"{what}: {error}", file=sys.stderr)
                        continue
                    report.add(what, 1e6 * took, "us", batch=rows, context=ATTENDED, floor_ratio=floor / took)
        del backend, trial
        torch.cuda.empty_cache()


def bench_experts(report: Report, layer: DeviceLayer, bandwidth: float, flops: float) -> None:
    """One layer's mixture of experts; the floor reads every expert that is needed."""
    from engine.ops.experts import mix_experts

    hidden, inner, count, chosen = EXPERTS
    gate_up = torch.randn(count, 2 * inner, hidden, device=layer.device).bfloat16()
    down = torch.randn(count, hidden, inner, device=layer.device).bfloat16()
    stream = layer.stream()
    for tokens in (1, 64, 4096):
        if not report.has_time(5):
            return
        x = torch.randn(tokens, hidden, device=layer.device).bfloat16()
        logits = torch.randn(tokens, count, device=layer.device).bfloat16()
        work = partial(mix_experts, x, logits, gate_up, down, chosen, "silu", normalize=True)
        took = timed(layer, stream, work, 5)
        needed = count * (1 - (1 - chosen / count) ** tokens)
        read = needed * 3 * inner * hidden * 2 / bandwidth
        floor = max(read, tokens * chosen * 6.0 * inner * hidden / flops)
        ratio = 1e6 * floor / took
        report.add("experts of a layer", took, "us", model="qwen3-30b-a3b", batch=tokens, floor_ratio=ratio)


def bench_kernels(report: Report, layer: DeviceLayer, bandwidth: float) -> None:
    """Ours beside torch's, on the shapes of Llama-3.2-1B; microseconds inside a CUDA graph."""
    from engine.ops.norm import torch_rms_norm
    from engine.ops.sampling.device import torch_sample
    from engine.ops.sampling.layout import TEMPERATURE, TOP_P, WORDS
    from engine.ops.triton import activation, norm, rope, sampling

    device, stream = layer.device, layer.stream()
    candidates: list[tuple[str, int, Callable[[], object], float]] = []
    for batch in (1, 64, 256):
        x = torch.randn(batch, 2048, device=device).bfloat16()
        residual, weight = x.clone(), torch.randn(2048, device=device).bfloat16()
        gate = torch.randn(batch, 16384, device=device).bfloat16()
        qkv = torch.randn(batch, 48, 64, device=device).bfloat16()
        q, k, v = torch.split(qkv, [32, 8, 8], 1)
        pools = [torch.zeros(512, 16, 8, 64, device=device).bfloat16() for _ in range(2)]
        table = torch.randn(2048, 64, device=device)
        positions = torch.randint(0, 2048, (batch,), device=device, dtype=torch.int32)
        slots = torch.randperm(512 * 16, device=device)[:batch]
        logits = torch.randn(batch, 128256, device=device)
        params = torch.zeros(batch, WORDS, dtype=torch.int32, device=device)
        params.view(torch.float32)[:, TEMPERATURE] = 0.8
        params.view(torch.float32)[:, TOP_P] = 1.0
        last, taken = positions.clone(), positions.clone()
        rows = torch.arange(batch, device=device, dtype=torch.int32)
        sample = partial(sampling.sample_rows, logits.bfloat16(), params, rows, positions, last, taken, None)
        filtering = params.clone()
        filtering.view(torch.float32)[:, TOP_P] = 0.9
        narrow = partial(sampling.sample_rows, logits.bfloat16(), filtering, rows, positions, last, taken, None)
        candidates += [
            ("add + RMSNorm, ours", batch, partial(norm.add_rms_norm, x, residual, weight, 1e-5), 4 * x.nbytes),
            ("RMSNorm, torch", batch, partial(torch_rms_norm, x, weight, 1e-5), 2 * x.nbytes),
            ("SiLU and mul, ours", batch, partial(activation.gate_and_mul, gate, gelu=False), 1.5 * gate.nbytes),
            (
                "rope + KV write, ours",
                batch,
                partial(rope.rope_and_write_kv, q, k, v, table, positions, slots, pools[0], pools[1]),
                2 * qkv.nbytes,
            ),
            ("sampling, ours", batch, partial(sample, filtered=False), logits.nbytes / 2),
            ("sampling with top_p, ours", batch, partial(narrow, filtered=True), logits.nbytes / 2),
            ("argmax, torch", batch, partial(torch.argmax, logits, -1), logits.nbytes),
        ]
        if batch == 64:
            filtered = partial(torch_sample, logits, params, positions, filtered=True)
            candidates.append(("filtered sampling, torch", batch, filtered, logits.nbytes))
        for out, inside in PRODUCTS[:5]:
            if batch > 4:  # else in bench_products
                vector = torch.randn(batch, inside, device=device).bfloat16()
                work = multiplication(vector, in_turn(out, inside, device))
                candidates.append((f"product {out}x{inside}, cuBLAS", batch, work, 2.0 * out * inside))
    for name, batch, work, moved in candidates:
        if not report.has_time(5):
            return
        try:
            took = timed(layer, stream, work)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        report.add(name, took, "us", batch=batch, floor_ratio=1e6 * moved / bandwidth / took)
