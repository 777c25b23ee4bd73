"""Of all tests: where they run in several processes at once (`make test`), torch has one thread in each.

Threads that wait for one another on cores that others use take many times as long.
"""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    import torch

    torch.set_num_threads(1)
