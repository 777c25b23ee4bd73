"""Runs a module of a GPU run where there is no GPU: `python -m tests.cuda.rehearsal MODULE ARGUMENT...`.

torch says that there is one, and what asks for it gets the fake device; shapes and counts are small, so that the
figures mean nothing. bench.gpu does all of its sections; of pytest's tests most are only collected.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import engine.executor.cuda_device as cuda_device
import engine.executor.cuda_kit as cuda_kit
from engine.ops import native
from tests.cuda.fake_device import FakeDevice
from tests.cuda.support import TINY

# As long as the server is asked for. Without experts, which only have kernels on a GPU.
SHAPE = {**TINY, "max_position_embeddings": 4096}
# Of tests/gpu, what runs on the fake device as it is and is quick.
RUN = "test_limits_fit"


class Device(FakeDevice):
    """In the place of CudaDevice, where the loop is started by whoever measures."""

    def __init__(self, index: int = 0, *, nvtx: bool = False) -> None:
        super().__init__(index)
        self._blocking_allowed = 1
        self.memory = 2**31


class Moment:
    """In the place of an event that notes when the device came to it."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: Moment) -> float:
        return 1e3 * (later.at - self.at) + 1e-6


def with_a_gpu() -> None:
    nothing: Any = lambda *args, **options: None  # noqa: E731
    for name, answer in {
        "is_available": lambda: True,
        "get_device_name": lambda *args: "NVIDIA Rehearsal",
        "get_device_capability": lambda *args: (9, 0),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
    }.items():
        setattr(torch.cuda, name, answer)
    cuda_device.CudaDevice = Device  # type: ignore[misc, assignment]
    # A kit is for FlashInfer on a GPU; one that lies in this checkout is nothing that can be used here.
    cuda_kit.KIT_OF_BUILD = Path(os.devnull, "kernels.kit")


def bench(arguments: list[str]) -> int:
    """All sections on small shapes."""
    from bench import gpu, gpu_kernels

    gpu.SHAPES.update(dict.fromkeys(("llama-3.2-1b", "llama-3.1-8b", "qwen3-30b-a3b"), SHAPE))
    whole = gpu.bench_model

    def quick(report: Any, subject: Any, batches: Any, *limits: float) -> None:
        """All figures of one model; of the others that they can be built and run."""
        if subject.name == "llama-3.2-1b":
            return whole(report, subject, batches, *limits)
        executor = subject.executor()
        interval, _ = asyncio.run(gpu.measure_decode(subject, executor, batches[-1]))
        report.add("decode", batches[-1] / interval, "tok/s", model=subject.name, batch=batches[-1])
        executor.close()
        return None

    small: dict[str, Any] = {
        "bench_model": quick,
        "PYTHON": (sys.executable, "-m", "tests.cuda.rehearsal"),
        "BATCHES": (1, 2),
        "WARM_STEPS": 2,
        "PREFILL_STEPS": 2,
        "cuda": SimpleNamespace(Event=Moment, _sleep=lambda cycles: None),
        "copy_rate": functools.partial(gpu.copy_rate, num_bytes=2**16),
        "gemm_rate": functools.partial(gpu.gemm_rate, size=16),
        "Subject": functools.partial(gpu.Subject, context=12, decode_tokens=9, max_num_batched_tokens=40),
        "bench_http": functools.partial(gpu.bench_http, flags="--num-gpu-blocks-override 300 --max-num-seqs 4"),
        # Triton's kernels at the blocks that a GPU takes: tests/gpu/test_kernels.py.
        "bench_kernels": lambda report, layer, bandwidth: report.add("kernels", 1.0, "us"),
    }
    for name, value in small.items():
        assert hasattr(gpu, name), name
        setattr(gpu, name, value)
    gpu_kernels.PRODUCTS, gpu_kernels.EXPERTS = ((24, 16), (8, 16)), (16, 8, 4, 2)
    return gpu.main(arguments)


def tests(arguments: list[str]) -> int:
    import pytest

    more = ["-k", RUN] if "--deselect" in arguments else ["--collect-only"]
    return int(pytest.main([*arguments, *more]))


@atexit.register
def _quiet_end() -> None:
    """See conftest.py."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    with_a_gpu()
    torch.set_num_threads(1)
    with native.disabled():  # a graph of the fake device sees torch's operations alone
        code = {"bench.gpu": bench, "pytest": tests}[sys.argv[1]](sys.argv[2:])
    sys.exit(code)
