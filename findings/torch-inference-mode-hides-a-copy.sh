#!/usr/bin/env bash
# torch 2.13.0 (BSD-3): a TorchDispatchMode under inference_mode is shown reshape and contiguous whole, where under
# no_grad it is shown the clone that they make. Their schemas say that the result may alias the input, so a tracer that
# tells views from new memory by the schema takes a copy for a view: what it records reads memory that is filled once.
#
# Seen: a reshape of a transposed matrix is [t, clone, _unsafe_view] under no_grad, and [t, reshape] under inference_mode,
# with an aliasing schema and other memory.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Seen(TorchDispatchMode):
    """Names of the operations; and of the last one whether it says that it may alias, and whether it does."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.may_alias = any(one.alias_info is not None for one in func._schema.returns)
        self.does = result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
        return result


x = torch.arange(6.0).view(2, 3)
seen = {}
for name, run in (("reshape", lambda: x.t().reshape(-1)), ("contiguous", lambda: x.t().contiguous())):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Seen() as watch:
            run()
        seen[name, mode.__name__] = watch.names, watch.may_alias, watch.does
        print(f"{name}, {mode.__name__}: {watch.names}; the last may alias by its schema: {watch.may_alias}, does: {watch.does}")
assert seen["reshape", "no_grad"][0] == ["t", "clone", "_unsafe_view"]
assert seen["reshape", "inference_mode"] == (["t", "reshape"], True, False)
assert seen["contiguous", "no_grad"][0] == ["t", "clone"]
assert seen["contiguous", "inference_mode"] == (["t", "contiguous"], True, False)
PY
