"""The kernel that adds up parts of ranks against its torch reference: by Triton's interpreter, or on the GPU."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    # Read when a kernel is defined, so it comes before the import below.
    os.environ["TRITON_INTERPRET"] = "1"

from engine.ops.device_parallel import torch_add_up  # noqa: E402
from engine.ops.triton import ranks  # noqa: E402


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 0.0), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_are_added_up_in_their_order(dtype: torch.dtype, near: float, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    parts = torch.randn(size, 5, 411, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(411, generator=generator).to(DEVICE)
    for given in (None, bias):
        whole = ranks.add_up(parts, given)
        # The interpreter does not round to bfloat16 as a GPU does.
        assert torch.allclose(whole.float(), torch_add_up(parts, given).float(), rtol=near, atol=near / 4)
        assert torch.equal(ranks.add_up(parts[:, 2:3].contiguous(), given), whole[2:3]), "bits depend on the batch"
