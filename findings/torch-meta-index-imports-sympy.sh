#!/usr/bin/env bash
# torch 2.13.0: an index in brackets of a tensor on the device "meta", which has a shape and no memory, imports sympy and
# mpmath: 480 modules, half a second and 30 MB, for a check that the index is not empty. `index_select` of the same rows
# imports nothing. A server that records a model's shapes before it loads it pays that at every start.
#
# Seen: sympy is among the modules after `x[index]`, and not after `x.index_select(0, index)`.
# Needs python3 with torch. Exits with 1 when this has changed.
set -euo pipefail
python3 - <<'PY'
import sys
import torch

table, index = torch.empty(8, 4, device="meta"), torch.tensor([1, 3]).to("meta")
table.index_select(0, index)
assert "sympy" not in sys.modules, "index_select imports it now, too"
table[index]
assert "sympy" in sys.modules, "an index imports it no more"
print("an index of a tensor on the device meta imports", sum(name.split(".")[0] in ("sympy", "mpmath") for name in sys.modules), "modules")
PY
