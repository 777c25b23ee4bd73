"""Pages between two processes: how fast against a copy in memory, and what other requests' decode pays meanwhile.

    python -m bench.transfer                       10k tokens of a Llama-1B shape over NIXL, in pairs with a copy
    python -m bench.transfer --decode              decode of that model alone, and while pages come without a pause
    python -m bench.transfer --connector TcpConnector
NIXL is in the environment of tests/scale/transfer; UCX_TLS=tcp,self UCX_NET_DEVICES=lo leaves it nothing but TCP.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench.shapes import SHAPES, write_shape
from engine.config import CacheOptions, EngineConfig, ModelOptions, SchedulerOptions, TransferOptions
from engine.executor.host_pages import HostPages
from engine.forward import Int32Array
from engine.request import Request, SamplingParams
from engine.transfer.registry import make_connector

PAGE_SIZE = 16


def make_memory(shape: str, num_pages: int, fill: int) -> tuple[HostPages, list[Any]]:
    """Pools of K and V as the CPU backend has them, in 16 bits."""
    config: dict[str, Any] = SHAPES[shape]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    size = PAGE_SIZE * config["num_key_value_heads"] * head * 2
    parts = [np.full((num_pages + 1, size), fill, np.uint8) for _ in range(2 * config["num_hidden_layers"])]
    return HostPages(parts, "bench"), parts


def keep(connection: Connection, options: TransferOptions, shape: str, num_pages: int, seed: int) -> None:
    """The other process: describes scattered pages whenever it is asked to."""
    connector = make_connector(options)
    memory, _ = make_memory(shape, num_pages, 7)
    connector.register([memory])
    described = None
    while (count := connection.recv()) is not None:
        if described is not None:
            connector.release(described)
        described = connector.describe([scattered(num_pages, count, seed)])
        connection.send(described)
    connector.close()


def scattered(num_pages: int, count: int, seed: int) -> Int32Array:
    return np.random.default_rng(seed).permutation(num_pages)[:count].astype(np.int32) + 1


class Peer:
    def __init__(self, options: TransferOptions, shape: str, num_pages: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._own, other = context.Pipe()
        self._process = context.Process(target=keep, args=(other, options, shape, num_pages, 1), daemon=True)
        self._process.start()

    def describe(self, count: int) -> dict[str, Any]:
        self._own.send(count)
        described: dict[str, Any] = self._own.recv()
        return described

    def close(self) -> None:
        self._own.send(None)
        self._process.join(10)


def measure_copy(args: argparse.Namespace, options: TransferOptions) -> None:
    """Pairs of a read and a copy of as many scattered pages."""
    count = -(-args.tokens // PAGE_SIZE)
    num_pages = count + count // 8
    peer, connector = Peer(options, args.shape, num_pages), make_connector(options)
    memory, parts = make_memory(args.shape, num_pages, 0)
    source = [np.full_like(part, 7) for part in parts]
    connector.register([memory])
    into, out_of = scattered(num_pages, count, 2), scattered(num_pages, count, 1)
    total, ratios, rates, copies = count * memory.page_bytes, [], [], []
    for number in range(args.repeat + 1):
        description = peer.describe(count)
        for part in parts:
            part[:] = 0
        began = time.perf_counter()
        assert connector.read(description, [into], 120.0).result() == total
        read = time.perf_counter() - began
        assert all((part[into] == 7).all() for part in parts), "other bytes came"
        began = time.perf_counter()
        for part, other in zip(parts, source, strict=True):
            part[into] = other[out_of]
        copied = time.perf_counter() - began
        if number:  # the first one also connects
            rates.append(total / read)
            copies.append(total / copied)
            ratios.append(copied / read)
    print(
        f"{args.tokens} tokens of {args.shape}, {total / 1e6:.0f} MB: {options.connector} "
        f"{statistics.median(rates) / 1e9:.2f} GB/s, a copy {statistics.median(copies) / 1e9:.2f} GB/s: "
        f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} pairs)"
    )
    connector.close()
    peer.close()


async def decode(args: argparse.Namespace, options: TransferOptions) -> None:
    """Windows of decode alone and with reads into the engine's own memory, in turn."""
    from engine.build import build_engine

    count = -(-args.tokens // PAGE_SIZE)
    num_pages = count + count // 8
    with tempfile.TemporaryDirectory() as directory:
        model = ModelOptions(str(write_shape(args.shape, Path(directory))), dtype="bfloat16", load_format="dummy")
        config = EngineConfig(
            model=dataclasses.replace(model, max_model_len=4096),
            cache=CacheOptions(page_size=PAGE_SIZE, num_pages=num_pages + args.batch * 256),
            scheduler=SchedulerOptions(max_num_seqs=max(args.batch, 4)),
            device="cpu",
            num_threads=args.threads,
        )
        engine = build_engine(config).engine
    peer, connector = Peer(options, args.shape, num_pages), make_connector(options)
    connector.register([engine.executor.page_memory()])
    # The last pages are those that a small cache does not hand out yet.
    into = scattered(num_pages, count, 2) + args.batch * 256
    running = asyncio.create_task(engine.run())
    sampling = SamplingParams(max_tokens=3000, ignore_eos=True, temperature=0.0)
    streams = [engine.submit(Request(f"r{row}", [5 + row] * 32, sampling)) for row in range(args.batch)]
    windows: dict[bool, list[float]] = {False: [], True: []}
    moved = 0.0

    async def step() -> None:
        for stream in streams:
            await stream.take()

    for _ in range(4):
        await step()
    for number in range(2 * args.repeat):
        reads, began, future = number % 2 == 1, time.perf_counter(), None
        for _ in range(args.steps):
            if reads and (future is None or future.done()):
                if future is not None:
                    moved += future.result()
                future = connector.read(peer.describe(count), [into], 600.0)
            await step()
        windows[reads].append((time.perf_counter() - began) / args.steps)
        if future is not None:
            await asyncio.wrap_future(future)
    rate = moved / (sum(windows[True]) * args.steps)
    slower = [loud / quiet - 1 for quiet, loud in zip(windows[False], windows[True], strict=True)]
    print(
        f"{args.shape}, {args.batch} rows, {args.threads or 'all'} threads: a step takes "
        f"{statistics.median(windows[False]) * 1e3:.1f} ms, while pages come {statistics.median(slower):+.1%} "
        f"({min(slower):+.1%} to {max(slower):+.1%}), {rate / 1e9:.2f} GB/s of them"
    )
    for stream in streams:
        engine.abort(stream.request_id)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    connector.close()
    peer.close()
    engine.executor.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connector", default="NixlConnector")
    parser.add_argument("--shape", default="llama-3.2-1b", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=5, help="pairs")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--batch", type=int, default=1, help="rows that decode")
    parser.add_argument("--steps", type=int, default=20, help="of a window")
    parser.add_argument("--threads", type=int, help="of the model")
    args = parser.parse_args()
    options = TransferOptions(args.connector)
    if args.decode:
        asyncio.run(decode(args, options))
    else:
        measure_copy(args, options)


if __name__ == "__main__":
    main()
