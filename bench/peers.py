"""The same weights behind several servers, under the same loads, in turns: `python -m bench.compare peers --gguf FILE`

Ours, llama.cpp's server (--llamacpp-python: an interpreter with llama-cpp-python[server]; --llamacpp-command for its
own `llama-server`), `transformers serve` (--transformers-python: one with transformers[serving]) and any other
(--command NAME=COMMAND, with {port}, {file} and {directory}). The file's matrices are written as bfloat16 into a GGUF
file and a directory in HF format, so that every server computes with the same numbers; --as-stored leaves the file as
it is for those that read GGUF. All servers are up for the whole run and idle but for the one that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.serve import parse, run
from bench.server import Running, running

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"type": "string", "maxLength": 16},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
LOADS = {
    "short chat": "--dataset-name random --random-input-len 48 --random-output-len 48",
    "shared prefix": "--dataset-name shared-prefix --num-prefixes 1 --prefix-len 512 --suffix-len 32"
    " --random-output-len 32",
    "long prompt": "--dataset-name random --random-input-len 768 --random-output-len 16",
    "JSON": "--dataset-name random --random-input-len 48 --random-output-len 96",
}
# llama-cpp-python has the schema in its own field, all others read OpenAI's.
OPENAI_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
LLAMACPP_SCHEMA = {"type": "json_object", "schema": SCHEMA}


@dataclass(frozen=True)
class Server:
    """command: with {port}, None for our own with `flags`. model: what requests call it, None for the first listed.
    schema: the response_format of a JSON load, None where the server has none.
    """

    name: str
    command: str | None = None
    flags: str = ""
    ready: str = "/health"
    model: str | None = None
    schema: dict[str, Any] | None = field(default_factory=lambda: OPENAI_SCHEMA)


def as_bfloat16(path: Path, target: Path) -> Path:
    """The same GGUF file with its matrices dequantised and rounded to bfloat16."""
    import gguf

    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, each in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, *inner = each.types
        writer.add_key_value(name, each.contents(), kind, inner[0] if inner else None)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        dtype = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else gguf.GGMLQuantizationType.BF16
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def servers(args: argparse.Namespace, file: Path, directory: Path | None) -> list[Server]:
    """Ours first, and whoever else was named."""
    threads = args.threads
    found = [Server("oneloop", flags=f"--model {file} --threads {threads} --dtype bfloat16 {args.flags}")]
    if args.llamacpp_python:
        # It serves one request at a time, and would end a stream early for the next one if it were not told otherwise.
        found.append(
            Server(
                "llama-cpp-python",
                f"{args.llamacpp_python} -m llama_cpp.server --model {file} --port {{port}} --n_threads {threads} "
                f"--n_threads_batch {threads} --n_ctx 4096 --cache true --interrupt_requests false",
                ready="/v1/models",
                schema=LLAMACPP_SCHEMA,
            )
        )
    if args.llamacpp_command:
        found.append(Server("llama-server", args.llamacpp_command.replace("{file}", str(file))))
    if args.transformers_python:
        found.append(
            Server(
                "transformers",
                f"{args.transformers_python} -m transformers.cli.transformers serve {directory} --port {{port}} "
                f"--device cpu --dtype {args.transformers_dtype}",
                model=str(directory),
                schema=None,
            )
        )
    for item in args.command:
        name, _, command = item.partition("=")
        command = command.replace("{directory}", str(directory)).replace("{file}", str(file))
        found.append(Server(name, command, ready="/v1/models"))  # not every server has /health
    return found


def seed_of(load: str, concurrency: int, number: int) -> int:
    """Of one round: prompts that no other round has, or servers that keep prompts would not compute them again."""
    return (list(LOADS).index(load) * 10_000 + concurrency) * 1000 + number


def one_round(server: Server, port: int, load: str, concurrency: int, seed: int) -> tuple[float, float]:
    """(output tokens a second, share of answers that are JSON) of one load. Raises RuntimeError if a request failed."""
    words = ["--port", str(port), "--endpoint", "chat", "--disable-tqdm", "--seed", str(seed), *LOADS[load].split()]
    words += ["--num-prompts", str(max(2, 2 * concurrency if concurrency < 16 else concurrency))]
    words += ["--max-concurrency", str(concurrency), "--ready-check-timeout-sec", "60"]
    if server.model is not None:
        words += ["--model", server.model]
    if load == "JSON":
        words += ["--extra-body", json.dumps({"response_format": server.schema})]
    outcome = asyncio.run(run(parse(words)))
    if outcome["failed"]:
        reason = next(error for error in outcome["errors"] if error)
        raise RuntimeError(f"{server.name}, {load}, {concurrency} at once: {outcome['failed']} failed: {reason}")
    valid = sum(_is_json(text) for text in outcome["generated_texts"])
    return float(outcome["output_throughput"]), valid / len(outcome["generated_texts"])


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def picture(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Ratios as bars, a panel for each load."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    loads = list(dict.fromkeys(row["load"] for row in rows))
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    figure, axes = plt.subplots(1, len(loads), sharey=True, figsize=(3.2 * len(loads), 3.8), squeeze=False)
    for axis, load in zip(axes[0], loads, strict=True):
        here = [row for row in rows if row["load"] == load]
        counts = sorted({row["concurrency"] for row in here})
        for at, count in enumerate(counts):
            group = sorted(
                (row for row in here if row["concurrency"] == count), key=lambda row: peers.index(row["peer"])
            )
            for number, row in enumerate(group):
                place = at + 0.8 * (number + 0.5) / len(group) - 0.4
                error = [[row["ratio"] - row["least"]], [row["most"] - row["ratio"]]]
                axis.bar(
                    place,
                    row["ratio"],
                    0.8 / max(2, len(group)),
                    yerr=error,
                    color=f"C{peers.index(row['peer'])}",
                    capsize=2,
                )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=load, xlabel="requests at once", yscale="log", xticks=range(len(counts)))
        axis.set_xticklabels(counts)
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes[0][0].set_ylabel("tokens/s, oneloop / peer")
    named = [matplotlib.patches.Patch(color=f"C{number}", label=peer) for number, peer in enumerate(peers)]
    figure.legend(handles=named, loc="lower center", ncols=len(named), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare peers", description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True, help="a Llama as GGUF")
    parser.add_argument("--as-stored", action="store_true", help="the file as it is, not in bfloat16")
    parser.add_argument("--flags", default="", help="more flags for ours")
    parser.add_argument("--llamacpp-python", metavar="PATH")
    parser.add_argument("--llamacpp-command", metavar="COMMAND", help="with {port} and {file}")
    parser.add_argument("--transformers-python", metavar="PATH")
    parser.add_argument(
        "--transformers-dtype", default="float32", help="bfloat16 is many times slower there without AVX512-BF16"
    )
    parser.add_argument("--command", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], help="other runs' --json: rows to show as well")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as up:
        file, directory = args.gguf, None
        if args.transformers_python or any("{directory}" in item for item in args.command):
            from tests.real.smollm2 import write_directory

            directory = Path(scratch) / args.gguf.stem
            directory.mkdir()
            write_directory(directory, args.gguf)
        if not args.as_stored:
            file = as_bfloat16(args.gguf, Path(scratch) / f"{args.gguf.stem}-bf16.gguf")
        found = [
            (each, up.enter_context(running(each.flags, command=each.command, ready=each.ready)))
            for each in servers(args, file, directory)
        ]
        rows = [row for path in args.earlier for row in json.loads(path.read_text())["rows"]] + _measure(found, args)
    what = f"{args.gguf.stem}, {'as stored' if args.as_stored else 'bfloat16'}, {args.threads} threads"
    print(f"\nTokens a second of ours / of the peer ({what}; median of {args.rounds}, least and most)\n")
    for load in dict.fromkeys(row["load"] for row in rows):
        for peer in dict.fromkeys(row["peer"] for row in rows):
            cells = [
                f"{row['concurrency']}: {row['ratio']:.2f} ({row['least']:.2f}-{row['most']:.2f})"
                for row in rows
                if (row["load"], row["peer"]) == (load, peer)
            ]
            if cells:
                print(f"{load:<14} {peer:<18} {'   '.join(cells)}")
    if args.png:
        picture(rows, args.png, what)
    if args.json:
        args.json.write_text(json.dumps({"what": what, "rows": rows}, indent=1))
    return 0


def _measure(found: Sequence[tuple[Server, Running]], args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for load in args.loads:
        able = [(each, up) for each, up in found if load != "JSON" or each.schema is not None]
        for concurrency in args.concurrency:
            rates: dict[str, list[float]] = {each.name: [] for each, _ in able}
            valid: dict[str, float] = {}
            for number in range(args.rounds + 1):
                for each, up in able:
                    few = concurrency if number else min(concurrency, 2)  # the first round warms all up
                    rate, valid[each.name] = one_round(each, up.port, load, few, seed_of(load, concurrency, number))
                    if number:
                        rates[each.name].append(rate)
            for each, _ in able:
                line = f"{load:<14} {concurrency:>3} at once  {each.name:<18}"
                line += f"{statistics.median(rates[each.name]):9.1f} tok/s"
                print(line + (f"  {100 * valid[each.name]:.0f}% JSON" if load == "JSON" else ""), flush=True)
            ours = rates[able[0][0].name]
            for each, _ in able[1:]:
                ratios = [a / b for a, b in zip(ours, rates[each.name], strict=True)]
                spread = {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
                tokens = {"ours_tokens_per_s": ours, "peer_tokens_per_s": rates[each.name]}
                rows.append({"load": load, "concurrency": concurrency, "peer": each.name, **spread, **tokens})
    return rows


if __name__ == "__main__":
    sys.exit(main())
