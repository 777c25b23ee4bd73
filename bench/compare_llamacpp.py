"""The same GGUF file and the same threads in llama.cpp and here: `python -m bench.compare_llamacpp --model FILE.gguf`

Decode at several batch sizes and prefill, in pairs that alternate; then both servers under one load over HTTP with a
shared prompt (--http). Without --model, files of a Llama-3.2-1B shape with random blocks are written (--types).
llama.cpp comes from an interpreter that has llama-cpp-python: --llamacpp-python PATH (for --http with its `server`
extra). Without one, our figures stand alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.offline import decode_seconds, prefill_seconds
from bench.server import running
from engine.build import Built, build_engine
from engine.config import CacheOptions, EngineConfig, ModelOptions, SchedulerOptions, StreamOptions
from engine.models.gguf.reader import open_gguf
from engine.models.gguf.types import BY_NAME

WORKER = Path(__file__).with_name("llamacpp_worker.py")
# A shape for files of random blocks: Llama-3.2-1B's.
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 16, 2048, 8192, 32, 8, 128256

# Loads a model in a process of its own: seconds, and the most memory that it took beyond the imports.
_LOAD = """
import json, re, sys, time
import torch
from pathlib import Path
from engine.models.loading.load import load_model
from engine.models.registry import read_spec
import engine.ops.native as native
torch.set_num_threads(int(sys.argv[2]))
native.library()
path = Path(sys.argv[1])
def most():  # kB; a process inherits its parent's ru_maxrss
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = most()
begin = time.perf_counter()
model = load_model(read_spec(path), path, dtype=torch.float32, device=torch.device("cpu"))
seconds = time.perf_counter() - begin
after = most()
print(json.dumps({"seconds": seconds, "before": 1024 * before, "after": 1024 * after}))
"""


def write_random(path: Path, kind: str) -> Path:
    """A file of the shape whose matrices are random blocks of that type; every pair of bytes is a token."""
    import gguf

    rng = np.random.default_rng(0)
    block = BY_NAME[kind]
    number = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    pairs = [(first, second) for first in letters for second in letters]
    words = letters + [first + second for first, second in pairs]
    words += [f"<|reserved_{index}|>" for index in range(VOCAB - len(words))]
    writer.add_token_list(words)
    writer.add_token_types([1] * (256 + len(pairs)) + [3] * (VOCAB - 256 - len(pairs)))
    writer.add_token_merges([f"{first} {second}" for first, second in pairs])
    writer.add_bos_token_id(VOCAB - 2)
    writer.add_eos_token_id(VOCAB - 1)

    def matrix(name: str, rows: int, columns: int) -> None:
        blocks = rng.integers(0, 256, (rows * columns // block.elements, block.size), dtype=np.uint8)
        for at in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(kind, (0,)):
            blocks[:, at : at + 2] = np.array([1e-4], np.float16).view(np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=number)

    matrix("token_embd.weight", VOCAB, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for index in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", HIDDEN * KV_HEADS // HEADS, HIDDEN),
            ("attn_v", HIDDEN * KV_HEADS // HEADS, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", INNER, HIDDEN),
            ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER),
        ):
            matrix(f"blk.{index}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{index}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, path: Path, threads: int, sequences: int, length: int) -> None:
        options = {"path": str(path), "threads": threads, "sequences": sequences, "length": length}
        self._process = subprocess.Popen(
            [python, str(WORKER), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.version = str(self._answer()["version"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp's process ended: {self._process.stderr.read()[-1000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def seconds(self, run: str, **arguments: int | list[int]) -> float:
        assert self._process.stdin is not None
        print(json.dumps({"run": run, **arguments}), file=self._process.stdin, flush=True)
        return float(self._answer()["seconds"])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def build(path: Path, sequences: int, length: int, args: argparse.Namespace) -> Built:
    return build_engine(
        EngineConfig(
            model=ModelOptions(path=str(path), max_model_len=length, packed_input_bits=args.packed_input_bits),
            cache=CacheOptions(
                num_pages=(sequences + 2) * -(-length // 16),
                enable_prefix_caching=False,
                kv_cache_dtype=args.kv_cache_dtype,
            ),
            scheduler=SchedulerOptions(max_num_seqs=sequences),
            stream=StreamOptions(flush_interval_ms=0.0),
            device="cpu",
            num_threads=args.threads,
        )
    )


def matrix_bytes(path: Path) -> int:
    """Bytes of the file that a decode step reads: an embedding beside an output layer gives single rows."""
    tensors = open_gguf(path).tensors
    return sum(
        each.end - each.begin
        for name, each in tensors.items()
        if name != "token_embd.weight" or "output.weight" not in tensors
    )


def show(name: str, ours: list[float], theirs: list[float], tokens: int, beside: str = "") -> dict[str, object]:
    """One line; seconds of each round."""
    mine = statistics.median(ours)
    row: dict[str, object] = {"name": name, "ours_tokens_per_s": tokens / mine}
    text = f"{name:<18} {tokens / mine:9.1f} tok/s"
    if theirs:
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        row |= {"theirs_tokens_per_s": tokens / statistics.median(theirs), "ratio": statistics.median(ratios)}
        text += f", llama.cpp {tokens / statistics.median(theirs):9.1f}: {statistics.median(ratios):5.2f} times"
        text += f" ({min(ratios):.2f} - {max(ratios):.2f})"
    print(text + beside, flush=True)
    return row


async def measure(built: Built, peer: Peer | None, path: Path, args: argparse.Namespace) -> list[dict[str, object]]:
    from bench.cpu import read_bandwidth

    engine = built.engine
    rng = np.random.default_rng(0)
    task = asyncio.create_task(engine.run())

    def prompts(count: int, length: int) -> list[list[int]]:
        return rng.integers(0, built.model_config.vocab_size, (count, length)).tolist()  # type: ignore[no-any-return]

    rows = []
    for batch in args.batch:
        ours, theirs, shares = [], [], []
        for number in range(args.rounds + 1):
            mine = await decode_seconds(engine, prompts(batch, args.context), args.steps)
            if peer is not None:
                other = peer.seconds("decode", sequences=batch, length=args.context, steps=args.steps)
            if number:  # the first pair warms both up
                ours.append(mine)
                theirs += [other] if peer is not None else []
                shares.append(matrix_bytes(path) / read_bandwidth(args.threads) / mine)
        share = statistics.median(shares)
        rows.append(show(f"decode, batch {batch}", ours, theirs, batch, f"; {100 * share:.0f}% of the bandwidth limit"))
        rows[-1]["of_bandwidth_limit"] = share
    ours, theirs = [], []
    for number in range(args.rounds + 1):
        mine = await prefill_seconds(engine, prompts(1, args.prompt)[0])
        other = peer.seconds("prefill", length=args.prompt) if peer is not None else 0.0
        if number:
            ours.append(mine)
            theirs += [other] if peer is not None else []
    rows.append(show(f"prefill of {args.prompt}", ours, theirs, args.prompt))
    task.cancel()
    engine.executor.close()
    return rows


def load(path: Path, threads: int) -> dict[str, object]:
    """Time and memory of a load, the second in a row: the file is then in the page cache."""
    size = path.stat().st_size
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", _LOAD, str(path), str(threads)], capture_output=True, check=True)
        found = json.loads(done.stdout)
    ratio = (found["after"] - found["before"]) / size
    print(
        f"load               {found['seconds']:.2f} s, at most {ratio:.2f} times the file beyond "
        f"{found['before'] / 1e6:.0f} MB of Python and torch",
        flush=True,
    )
    return {"name": "load", "seconds": found["seconds"], "peak_rss_of_file": ratio, "before_bytes": found["before"]}


def over_http(path: Path, args: argparse.Namespace) -> dict[str, object]:
    """Tokens a second of both servers under one load."""
    from bench.serve import parse, run

    # It serves one request at a time, and would end a stream early for the next one if it were not told otherwise.
    command = args.llamacpp_server or (
        f"{args.llamacpp_python} -m llama_cpp.server --model {path} --port {{port}} --n_threads {args.threads} "
        f"--n_threads_batch {args.threads} --n_ctx 2048 --cache true --interrupt_requests false"
    )
    flags = f"--model {path} --threads {args.threads} --max-model-len 2048"
    flags += f" --packed-input-bits {args.packed_input_bits} --kv-cache-dtype {args.kv_cache_dtype}"
    words = ["--disable-tqdm", "--dataset-name", "shared-prefix", "--num-prefixes", "1", "--prefix-len", "512"]
    words += ["--suffix-len", "32", "--random-output-len", "32", "--num-prompts", str(2 * args.clients)]
    words += ["--max-concurrency", str(args.clients), "--text-prompts", "--vocab-size", "1000"]

    def rate(port: int, seed: int) -> float:
        begin = time.perf_counter()
        outcome = asyncio.run(run(parse([*words, "--port", str(port), "--seed", str(seed)])))
        if outcome["failed"]:
            raise RuntimeError(f"{outcome['failed']} requests failed")
        # What is generated may end early in one of them; requests are what both have served.
        seconds: float = (time.perf_counter() - begin) / (2 * args.clients)
        return seconds

    ours, theirs = [], []
    with running(flags) as mine, running(command=command, ready="/v1/models") as other:
        for number in range(args.rounds + 1):
            pair = rate(mine.port, number), rate(other.port, number)
            if number:
                ours.append(pair[0])
                theirs.append(pair[1])
    return show(f"HTTP, {args.clients} clients", ours, theirs, 32)


def one_file(path: Path, args: argparse.Namespace) -> list[dict[str, object]]:
    print(f"\n{path.name}: {path.stat().st_size / 1e6:.0f} MB, threads: {args.threads}", flush=True)
    length = max(args.context + args.steps, args.prompt) + 1
    sequences = max(args.batch)
    rows: list[dict[str, object]] = [load(path, args.threads)]
    peer = Peer(args.llamacpp_python, path, args.threads, sequences, length) if args.llamacpp_python else None
    try:
        if peer is not None:
            print(f"llama-cpp-python {peer.version}")
        built = build(path, sequences, length, args)
        print(built.report.table(), file=sys.stderr)
        rows += asyncio.run(measure(built, peer, path, args))
    finally:
        if peer is not None:
            peer.close()
    if args.http:
        rows.append(over_http(path, args))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare_llamacpp", description=__doc__)
    parser.add_argument("--model", type=Path, nargs="+", default=[], help="GGUF files")
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q8_0", "Q4_K"], help="of the random files")
    parser.add_argument("--llamacpp-python", metavar="PATH", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--llamacpp-server", metavar="COMMAND", help="another server for --http, with {port}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=64, help="tokens before the decoded ones")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-cache-dtype", default="auto", help="ours; llama.cpp's is float16")
    parser.add_argument("--packed-input-bits", type=int, choices=[8, 16], default=16, help="see the server's flag")
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.http and not (args.llamacpp_python or args.llamacpp_server):
        parser.error("--http needs --llamacpp-python or --llamacpp-server")
    from engine.ops import native

    print(f"ours: {native.status()}")
    rows: dict[str, list[dict[str, object]]] = {}
    for path in args.model:
        rows[path.name] = one_file(path, args)
    for kind in args.types if not args.model else ():
        with tempfile.TemporaryDirectory() as scratch:
            rows[kind] = one_file(write_random(Path(scratch) / f"llama-1b-{kind}.gguf", kind), args)
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
