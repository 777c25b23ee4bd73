#!/usr/bin/env bash
# triton 3.6.0 (MIT), TRITON_INTERPRET=1 on a CPU, with NumPy 2.4.6: a kernel whose loop runs to one of its arguments,
# `for i in range(n)`, fails with a TypeError. The interpreter holds a scalar argument as an array of one element and turns
# it into an int; NumPy 2.4 allows that for arrays of no dimension alone (before, it warned). The same kernel runs with
# NumPy 2.3.5, and compiled for a GPU it runs with either. triton names no bound on NumPy.
#
# Seen: NumPy 2.3.5: sum 6.0; NumPy 2.4.6: TypeError. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cat > kernel.py <<'PY'
import warnings

warnings.simplefilter("ignore")
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def total(x, out, n):
    found = 0.0
    for i in range(n):
        found += tl.load(x + i)
    tl.store(out, found)


x, out = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(1)
try:
    total[(1,)](x, out, 3)
    print("sum", out.item())
except Exception as error:
    inner = error.__cause__ or error
    print(type(inner).__name__)
PY
python3 -m venv venv
for numpy in 2.3.5 2.4.6; do
  venv/bin/pip install --quiet triton==3.6.0 torch==2.13.0 "numpy==$numpy" 2>/dev/null
  seen=$(TRITON_INTERPRET=1 venv/bin/python kernel.py)
  echo "NumPy $numpy: $seen"
  echo "$numpy $seen" >> all
done
diff all - <<'END'
2.3.5 sum 6.0
2.4.6 TypeError
END
