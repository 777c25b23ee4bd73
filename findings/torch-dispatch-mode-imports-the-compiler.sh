#!/usr/bin/env bash
# torch 2.13.0: the first operation under a TorchDispatchMode of one's own imports torch._dynamo and sympy, a second and
# more of imports amid whatever is being watched: each subclass's __torch_dispatch__ is wrapped by what keeps the compiler
# away from it, and that needs the compiler. Nothing is imported where the class says, by a method that is not
# documented (`_should_skip_dynamo`), that this is not wanted.
#
# Seen: torch._dynamo is among the modules after one `torch.empty` under such a mode, and not with that method.
# Needs python3 and pip (torch for the CPU). Exits with 1 when this has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'torch==2.13.0' numpy
"$work/venv/bin/python" - <<'PY'
import sys
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Unwrapped(Watching):
    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def seconds(mode):
    begin = time.perf_counter()
    with mode:
        torch.empty(3)
    return time.perf_counter() - begin


seconds(Unwrapped())
assert "torch._dynamo" not in sys.modules, "the compiler is imported anyway"
before = len(sys.modules)
took = seconds(Watching())
assert "torch._dynamo" in sys.modules, "nothing is imported any more"
print(f"one operation under a dispatch mode: {took:.1f} s, {len(sys.modules) - before} modules")
PY
