"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits before it reads.

Used by every kernel here. On Hopper and later a launch so marked may begin once all programs of the kernel before it
have begun; `overlap` lets the next one come and then waits until all before this one have ended and their writes are
seen. Every program must pass it, those that return at once too, and before it nothing is read but weights: a kernel
that ends without having waited would let the next but one run into memory which is still written.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Compute capability from which there is such a launch.
LEAST_CAPABILITY = 90


@triton.jit
def overlap(PDL: tl.constexpr):
    """Between what may be read ahead (weights) and everything else."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@functools.cache
def launch_options() -> dict[str, bool]:
    """Arguments of every launch here; all devices of a process are taken to be alike."""
    if triton.knobs.runtime.interpret:
        return {"PDL": False}
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < LEAST_CAPABILITY:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
