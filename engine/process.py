"""What a process does to itself before it serves."""

from __future__ import annotations

import gc
import sys


def settle() -> None:
    """Called once, when everything is loaded and nothing is served yet."""
    # What has been loaded stays: the collector need not look at it again, which would stall the loop for long.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    # A thread that computes in Python (a template, a large body) gives the loop its turn after this and not after 5 ms,
    # and a busy loop the executor's thread.
    sys.setswitchinterval(0.0005)
