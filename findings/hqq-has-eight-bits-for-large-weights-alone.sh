#!/usr/bin/env bash
# hqq 0.2.8.post1 (Apache-2.0): the steps of a group are never finer than 1/20,000: its scale is cut off at 2e4, so that
# half precision can hold it, whatever the compute type is. With 8 bits that binds where a group's weights span less
# than 0.013: from there each halving costs a bit, and 8 bits are no better than 4 where weights are around 1e-4. Below a
# span of 1e-4 the scale is set to 1 besides: all weights of such a group come back as one number. So it is not the
# relative accuracy that one expects of groups with a scale each, where small weights lose no more than large ones.
# Nothing is said.
#
# Seen, normal numbers in groups of 64, float32, axis 1: with 8 bits the error is 0.5 % at a deviation of 0.02, 1.4 % at
# 0.001, 14 % at 0.0001 (4 bits: the same), 99 % at 0.00001, where each group holds a single value.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile hqq==0.2.8.post1 torch==2.13.0 numpy
cd "$dir"
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def look(deviation, bits):
    """The relative error of the weights as they come back, and the most values that a group of 64 holds."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 256, bias=False)
    weight = torch.randn(256, 256) * deviation
    layer.weight.data = weight.clone()
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    again = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu").dequantize()
    error = ((again - weight).norm() / weight.norm()).item()
    values = max(len(group.unique()) for group in again.view(-1, 64))
    print(f"deviation {deviation:<8g} {bits} bits: error {error:6.2%}, at most {values} values in a group")
    return error, values


usual, small, smaller, smallest = (look(deviation, 8) for deviation in (0.02, 1e-3, 1e-4, 1e-5))
assert usual[0] < 0.006 and 2 * usual[0] < small[0] < 0.02 and 0.1 < smaller[0] < 0.2
assert smallest[0] > 0.9 and smallest[1] == 1
four = [look(deviation, 4) for deviation in (0.02, 1e-4, 1e-5)]
assert four[0][0] < 0.1 and abs(four[1][0] - smaller[0]) < 0.01 and four[2][1] == 1
PY
