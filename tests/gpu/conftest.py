"""Everything here needs an NVIDIA GPU; FlashInfer where it is there. One model is loaded at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.config import StartupError
from engine.executor.cuda_device import CudaDevice
from engine.executor.cuda_kit import use_kit_of_build
from engine.executor.gpu_probe import obstacle_here


def pytest_sessionstart(session: pytest.Session) -> None:
    if torch.cuda.is_available():
        try:
            use_kit_of_build()
        except StartupError as error:
            pytest.exit(str(error), returncode=1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not torch.cuda.is_available():
        pytest.exit(f"tests/gpu needs an NVIDIA GPU: {obstacle_here(torch.version.cuda)}", returncode=1)


@pytest.fixture
def layer() -> Iterator[CudaDevice]:
    yield CudaDevice()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
