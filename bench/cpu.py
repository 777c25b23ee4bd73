"""The limits of this machine's CPU, and how near the linear layers come to them: `python -m bench.cpu`.

Independent of the engine's steps. Figures are the best of several rounds, in CPU time on one thread (other processes
then disturb less) and wall time on more; read the ratios, a shared machine's absolute figures vary.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from engine.ops import native
from engine.ops.coded import CODE_BLOCK, FORMS, coded_linear
from engine.ops.linear import Linear
from engine.ops.packed import FLOAT4_SPAN

# Beyond any cache: a virtual machine may report a huge L3.
WORKING_SET = 1 << 30
# Llama-3.2-1B: (name, out_features, in_features).
LAYERS = [("qkv", 3072, 2048), ("o", 2048, 2048), ("gate_up", 16384, 2048), ("down", 2048, 8192)]
ROWS = (1, 4, 16, 64, 512)


def best_seconds(run: Callable[[], object], num_threads: int, rounds: int = 3) -> float:
    """Shortest of `rounds` runs, with torch limited to num_threads."""
    clock = time.thread_time if num_threads == 1 else time.perf_counter
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        run()
        best = float("inf")
        for _ in range(rounds):
            start = clock()
            run()
            best = min(best, clock() - start)
        return best
    finally:
        torch.set_num_threads(before)


def read_bandwidth(num_threads: int = 1) -> float:
    """Bytes a second of reading memory in order, over WORKING_SET bytes."""
    library = native.library()
    # torch widens integers as it sums them, which is slower than the memory; floats it adds as they come.
    data = torch.ones(WORKING_SET // 4, dtype=torch.float32 if library is None else torch.int32)
    if library is None:
        return WORKING_SET / best_seconds(data.sum, num_threads)
    address = data.data_ptr()
    return WORKING_SET / best_seconds(lambda: library.release.ol_read(address, WORKING_SET, num_threads), num_threads)


def gemm_rate(dtype: torch.dtype = torch.float32, num_threads: int = 1) -> float:
    """Floating point operations a second of torch's matrix product, 512x2048 by 2048x2048."""
    a, b = torch.randn(512, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return 2 * 512 * 2048 * 2048 / best_seconds(lambda: torch.nn.functional.linear(a, b), num_threads)


def fma_rate(num_threads: int = 1) -> float | None:
    """Floating point operations a second of float32 multiply-adds in registers; None without native kernels."""
    library = native.library()
    if library is None:
        return None
    count = library.release.ol_fma(2_000_000, num_threads)
    return float(count) / best_seconds(lambda: library.release.ol_fma(2_000_000, num_threads), num_threads)


def linear_seconds(
    dtype: torch.dtype,
    rows: int,
    out_features: int,
    in_features: int,
    num_threads: int = 1,
    working_set: int = WORKING_SET,
) -> float:
    """Seconds of one prepared Linear; its weights come from memory each time (copies fill the working set)."""
    size = out_features * in_features * dtype.itemsize

    def make() -> Linear:
        layer = Linear(torch.full((out_features, in_features), 0.01, dtype=dtype))
        layer.prepare()
        return layer

    return _seconds(make, torch.randn(rows, in_features).to(dtype), working_set // size, num_threads)


def _seconds(make: Callable[[], Linear], x: torch.Tensor, copies: int, num_threads: int) -> float:
    # From 64 rows on the arithmetic dwarfs the reading.
    layers = [make() for _ in range(max(1, copies) if len(x) < 64 else 1)]

    def run() -> None:
        for layer in layers:
            layer(x)

    return best_seconds(run, num_threads) / len(layers)


def coded_layer(form: str, out_features: int, in_features: int) -> Linear:
    """One of ops/coded.FORMS in float32, of random codes, of which 32 columns share a scale, of "e2m1" 16."""
    codes = torch.randint(0, 120 if form in ("e4m3", "int8", "int8 and low") else 16, (out_features, in_features))
    group = FLOAT4_SPAN if form == "e2m1" else CODE_BLOCK
    scale = torch.full((out_features, in_features // group), 0.01)
    piece = (0, out_features, codes.byte(), scale, scale if form.endswith("low") else None)
    table = [float(number) for number in range(16)] if form == "table" else None
    pieces = iter([piece])
    return coded_linear(form, out_features, in_features, torch.float32, pieces, group=group, table=table)


def print_forms(forms: list[str], bandwidth: float, threads: int) -> None:
    """Layers of small codes [2048, 2048]: products a nanosecond, and of one row the share of the bandwidth."""
    print("\nlayers of codes: products a ns at " + ", ".join(str(rows) for rows in ROWS[:-1]) + " rows")
    for form in forms:
        size = coded_layer(form, 2048, 2048).num_bytes
        line = f"{form:12} {size * 8 / 2048**2:4.1f} bits"
        for rows in ROWS[:-1]:
            x = torch.randn(rows, 2048)
            seconds = _seconds(partial(coded_layer, form, 2048, 2048), x, (WORKING_SET >> 1) // size, threads)
            line += f" {rows * 2048**2 / seconds / 1e9:6.1f}"
            if rows == 1:
                line += f" ({100 * size / seconds / bandwidth:.0f}% of the bandwidth)"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], action="append")
    parser.add_argument("--forms", nargs="*", choices=FORMS, help="layers of such codes alone; none named: of all")
    arguments = parser.parse_args()
    threads = arguments.threads
    names = arguments.dtype or ["bfloat16", "float32"]
    print(f"ops: {native.status()}; {threads} thread(s)")
    bandwidth, peak = read_bandwidth(threads), fma_rate(threads)
    print(f"read bandwidth {bandwidth / 1e9:6.1f} GB/s")
    if peak is not None:
        print(f"float32 FMA    {peak / 1e9:6.1f} GFLOP/s")
    if arguments.forms is not None:
        print_forms(arguments.forms or list(FORMS), bandwidth, threads)
        return
    rates = {name: gemm_rate(getattr(torch, name), threads) for name in ("float32", "bfloat16")}
    for name, rate in rates.items():
        print(f"{name:8} torch GEMM {rate / 1e9:6.1f} GFLOP/s")
    print("\nLinear: GB/s of weights, GFLOP/s, and % of the nearer limit (bandwidth, or the best arithmetic rate)")
    for name in names:
        dtype = getattr(torch, name)
        top = max(rates[name], peak or 0.0)
        for layer, out_features, in_features in LAYERS:
            for rows in ROWS:
                seconds = linear_seconds(dtype, rows, out_features, in_features, threads)
                size, work = out_features * in_features * dtype.itemsize, 2 * rows * out_features * in_features
                limit = max(size / bandwidth, work / top)
                print(
                    f"{name:8} {layer:8} M={rows:<4} {seconds * 1e3:9.3f} ms {size / seconds / 1e9:6.1f} GB/s "
                    f"{work / seconds / 1e9:7.1f} GFLOP/s {100 * limit / seconds:4.0f}%",
                    flush=True,
                )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
