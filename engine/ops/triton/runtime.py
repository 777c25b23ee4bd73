"""Whether Triton kernels can be used here. They are tried on CUDA tensors only; every one has a torch equivalent."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor


@functools.cache
def available() -> bool:
    """Triton comes with torch's CUDA builds."""
    return importlib.util.find_spec("triton") is not None


def on_gpu(x: Tensor) -> bool:
    """Whether an operation on `x` is Triton's."""
    return x.is_cuda and available()
