"""Whether the GPU of this machine can be used, why not, and what it lacks beside a Hopper: one line each.

Told from plain values, so that the composition root can ask before anything is loaded. Imports no torch.
"""

from __future__ import annotations

import ctypes
import os

# Ampere: the oldest that multiplies bfloat16.
LEAST_CAPABILITY = (8, 0)
HOPPER = 9


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver speaks; None where there is no driver."""
    try:
        driver, found = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
        if driver.cuDriverGetVersion(ctypes.byref(found)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return found.value // 1000, found.value % 1000 // 10


def obstacle(torch_cuda: str | None, driver: tuple[int, int] | None, visible: str | None = None) -> str:
    """Why torch sees no GPU. torch_cuda: `torch.version.cuda`. visible: CUDA_VISIBLE_DEVICES."""
    if torch_cuda is None:
        return "this torch is built without CUDA"
    if driver is None:
        return "no NVIDIA driver is installed (libcuda.so.1)"
    major = int(torch_cuda.split(".")[0])
    if driver < (major, 0):
        return (
            f"the NVIDIA driver is too old: it speaks CUDA {driver[0]}.{driver[1]}, and this torch is built for "
            f"{torch_cuda}; a newer driver or a torch for CUDA {driver[0]} is needed"
        )
    if visible is not None:
        return f"torch sees no CUDA device; CUDA_VISIBLE_DEVICES is {visible!r}"
    return "torch sees no CUDA device"


def obstacle_here(torch_cuda: str | None) -> str:
    """The same, of this machine."""
    return obstacle(torch_cuda, driver_version(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def too_old(name: str, capability: tuple[int, int]) -> str | None:
    """Why a GPU that torch sees cannot be used; None where it can."""
    if capability >= LEAST_CAPABILITY:
        return None
    least = ".".join(map(str, LEAST_CAPABILITY))
    return f"{name} has compute capability {capability[0]}.{capability[1]}, and {least} (Ampere) or newer is needed"


def has_xqa(capability: tuple[int, int]) -> bool:
    """Whether FlashInfer's XQA has code for it."""
    return capability[0] >= HOPPER


def stands_in(capability: tuple[int, int]) -> str | None:
    """What is used in the place of what only a Hopper has; None for one."""
    major = capability[0]
    if major == HOPPER:
        return None
    if not has_xqa(capability):
        return (
            "prompts by fa2, decode by our kernel or FlashInfer's plain ones: fa3 needs a Hopper, XQA a Hopper or newer"
        )
    return "prompts by fa2, as fa3 needs a Hopper; nothing here was tuned for this GPU"
