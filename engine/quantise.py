"""`python -m engine.quantise IN OUT --scheme int4`: a checkpoint with its layers' weights rounded.

What it writes is in the format compressed-tensors, which other engines read, too. Weights alone are rounded; nothing is
calibrated. Embeddings, the output layer, norms, and what chooses experts stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.config import StartupError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m engine.quantise", description=__doc__)
    parser.add_argument("source", metavar="IN", help="a directory in HF format, or a hub id")
    parser.add_argument("to", metavar="OUT", type=Path, help="a directory that is not there, or empty")
    parser.add_argument(
        "--scheme", required=True, choices=["int4", "int8", "fp8"], help="fp8: e4m3, a scale for each row"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=[32, 64, 128],
        help="columns of a scale; by default the most that divides a layer",
    )
    args = parser.parse_args(argv)
    if args.scheme == "fp8" and args.group_size is not None:
        parser.error("--group-size: fp8 has a scale for each row")
    from engine.models.hub import resolve
    from engine.models.loading.writing import write_quantised

    try:
        source = resolve(args.source, None, None)
        done = write_quantised(source, args.to, args.scheme, args.group_size)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{done.rounded} layers in {args.scheme}, {done.kept} as they were: {done.before:,} bytes -> {done.after:,}")
    print(
        f"how much worse it foretells: python -m bench.perplexity --model {args.to} --against {args.source} --text FILE"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
