#!/usr/bin/env bash
# safetensors 0.8.0 (Apache-2.0) with torch 2.13.0: a tensor of torch.float4_e2m1fn_x2, two numbers to a byte, is saved as F4 with
# the numbers counted, twice the columns that torch shows, and get_tensor gives it back as it was. get_slice does not: each
# slice of it raises RuntimeError, also one of whole rows, which would cut no byte, and one of everything; it makes bytes of
# a part and then asks torch for the shape in numbers. What a loader of a model that is divided over several devices calls is
# just that, and it works for all other dtypes, those of float8 among them. Its get_shape, too, has other columns than the
# tensor has. So packed weights that are to be read in parts are saved as uint8, as most quantisers do.
#
# Seen: [4, 8] of float4_e2m1fn_x2 is F4 [4, 16] in the file, comes back whole, and of four slices none is given; the same bytes
# as uint8 and as float8_e4m3fn give all of them. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile safetensors==0.8.0 torch==2.13.0 numpy
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

stored = torch.arange(32, dtype=torch.uint8).reshape(4, 8)
all_of_it = slice(None)
slices = {"rows": slice(0, 2), "all": all_of_it, "left": (all_of_it, slice(0, 4)), "right": (all_of_it, slice(4, 8))}


def read(dtype):
    tensor = stored.view(dtype)
    save_file({"weight": tensor}, "file")
    assert torch.equal(load_file("file")["weight"].view(torch.uint8), stored)
    given = {}
    with safe_open("file", "pt") as file:
        part = file.get_slice("weight")
        for name, wanted in slices.items():
            try:
                given[name] = torch.equal(part[wanted].view(torch.uint8), stored[wanted])
            except RuntimeError as error:
                given[name] = f"RuntimeError: {error}"
        found = part.get_dtype(), part.get_shape(), list(file.get_tensor("weight").shape)
    print(dtype, found, given)
    return found, given


for dtype, name in ((torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")):
    assert read(dtype) == ((name, [4, 8], [4, 8]), dict.fromkeys(slices, True))
found, given = read(torch.float4_e2m1fn_x2)
assert found == ("F4", [4, 16], [4, 8])
assert all(isinstance(seen, str) and seen.startswith("RuntimeError") for seen in given.values())
PY
