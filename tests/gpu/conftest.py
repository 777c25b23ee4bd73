"""Everything here needs an NVIDIA GPU; FlashInfer where it is there. One model is loaded at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.executor.cuda_device import CudaDevice


@pytest.fixture
def layer() -> Iterator[CudaDevice]:
    yield CudaDevice()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
