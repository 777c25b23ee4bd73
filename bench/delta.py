"""A gated delta net between its projections, beside transformers' chunked form of it, on one thread of this machine.

`python -m bench.delta` (needs transformers). Convolution, recurrence and gated norm of one layer of Qwen3.5-0.8B, in
float32; seconds of the thread, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import native
from engine.ops.recurrence import Recurrence, causal_conv, gated_norm
from engine.ops.state import StatePlan

HEADS, DIM, TAPS = 16, 128, 4


def best_seconds(function: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        begin = time.thread_time()
        function()
        times.append(time.thread_time() - begin)
    return min(times)


def measure(tokens: int, repeat: int) -> tuple[float, float]:
    """Seconds of ours and of transformers'."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as reference

    width = HEADS * DIM
    qkv, z = torch.randn(tokens, 3 * width), torch.randn(tokens, width)
    step, share = torch.randn(tokens, HEADS), torch.randn(tokens, HEADS)
    taps, norm = torch.randn(TAPS, 3 * width), torch.ones(DIM)
    rate, bias = torch.rand(HEADS), torch.ones(HEADS)
    recurrence = Recurrence(True, HEADS, HEADS, DIM, DIM, rate, bias)
    columns, matrices = torch.zeros(2, TAPS - 1, 3 * width), torch.zeros(2, HEADS, DIM, DIM)
    plan = StatePlan(np.ones(1, np.int32), np.array([0, tokens], np.int32), 0)
    weight, their_norm = taps.T.contiguous(), reference.Qwen3_5RMSNormGated(DIM)

    def ours() -> Tensor:
        matrices.zero_()
        q, k, v = causal_conv(qkv, taps, None, columns, plan, silu=True).chunk(3, 1)
        return gated_norm(recurrence(q, k, v, step, share, matrices, plan), z, norm, 1e-6, HEADS)

    def theirs() -> Tensor:
        mixed = reference.causal_conv1d_fn(qkv.T[None], weight, None, activation="silu").transpose(1, 2)
        q, k, v = (part.reshape(1, tokens, HEADS, DIM) for part in mixed.split(width, -1))
        decay = -rate * F.softplus(step + bias)
        out, _ = reference.torch_chunk_gated_delta_rule(
            q, k, v, g=decay[None], beta=share.sigmoid()[None], output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        gated: Tensor = their_norm(out.reshape(-1, DIM), z.reshape(-1, DIM))
        return gated.view(tokens, width)

    columns.zero_()
    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)
    return best_seconds(ours, repeat), best_seconds(theirs, repeat)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.delta", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(native.status())
    with torch.inference_mode():
        for tokens in args.tokens:
            ours, theirs = measure(tokens, args.repeat)
            both = f"{1e3 * ours:8.2f} ms, transformers {1e3 * theirs:8.2f} ms"
            print(f"{tokens:>5} tokens: {both}: {theirs / ours:.1f} times")


if __name__ == "__main__":
    main()
